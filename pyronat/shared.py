"""Units that share one basis: their Fisher matrices, diagonal in the eigenvectors of their sum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyronat.operators import BlockOperator, Solver
from pyronat.unit_rows import UnitRows


@dataclass(frozen=True)
class SharedUnits(BlockOperator):
    """G_u ≈ V diag(e_u) Vᵀ for every unit u of a layer, with one orthogonal V for all.

    V holds the eigenvectors of Σ_u G_u, and e_uj = v_jᵀ G_u v_j is the best diagonal in that basis
    (George et al. 2018). Traces and Σ_u G_u are kept, and nothing is approximated where the units'
    weights are proportional to each other. Of units with more than `blocks.COMPLETE` entries the
    leading eigenvectors are taken; what is orthogonal to them has one mean eigenvalue for each
    unit, and traces alone are kept. It takes rows · size · (size + units) operations, the units
    themselves rows · size² · units.

    Attributes:
        rows: what the G_u are sums of.
    """

    rows: UnitRows

    @property
    def basis(self) -> Tensor:
        """V `[size, rank]`."""
        return self.rows.basis

    @property
    def values(self) -> Tensor:
        """Diagonals e `[units, rank]`, and what is orthogonal to V where it is not complete."""
        return self.rows.values

    def mv(self, vectors: Tensor) -> Tensor:
        """G_u x for `[units, size]`."""
        return in_basis(self.basis, self.values, vectors)

    def quadratic(self, vectors: Tensor) -> Tensor:
        """Σ_u x_uᵀ G_u x_u for `[units, size]`, a 0-d tensor."""
        squares = (vectors @ self.basis).square()
        if self.basis.shape[1] == len(self.basis):
            return (squares * self.values).sum()
        inside, rest = self.values[:, :-1] - self.values[:, -1:], self.values[:, -1]
        return (squares * inside).sum() + vectors.square().sum(1) @ rest

    def dense(self) -> Tensor:
        """The matrices `[units, size, size]`."""
        eye = torch.eye(len(self.basis), dtype=self.basis.dtype, device=self.basis.device)
        columns = eye.unsqueeze(1).expand(-1, len(self.values), -1)
        return in_basis(self.basis, self.values, columns).movedim(0, 2)

    def mean_diagonal(self) -> Tensor:
        """Mean of the diagonal of each G_u, without approximation `[units]`."""
        return self.rows.mean_diagonal()

    def factor(self, damping: Tensor) -> SharedSolver:
        """V diag(e + damping) Vᵀ, with jitter of 1e-7 of the mean diagonal where that is missing.

        Args:
            damping: `[units]`.

        Returns:
            The solver.
        """
        jitter = self.rows.jitter(damping)
        values = self.values + (damping + jitter).unsqueeze(1)
        tiny = torch.finfo(values.dtype).tiny
        reciprocals = torch.where(values > tiny, 1 / values.clamp_min(tiny), 0.0)
        return SharedSolver(self.basis, reciprocals, float(jitter.max()))

    def __add__(self, other: SharedUnits) -> SharedUnits:
        """The rows of both."""
        return SharedUnits(self.rows + other.rows)

    def lerp(self, other: SharedUnits, share: float) -> SharedUnits:
        """The rows of both, weighted; those of this are compressed where they are many."""
        return SharedUnits(self.rows.compact().lerp(other.rows, share))

    def compact(self) -> SharedUnits:
        """The same with one row for each column of the basis, where rows are many."""
        return SharedUnits(self.rows.compact())

    def zeros(self) -> SharedUnits:
        """Without rows."""
        return SharedUnits(self.rows.empty())

    def state(self) -> dict[str, Any]:
        """Plain tensors; what follows from them is computed again."""
        return {"form": "SharedUnits", **self.rows.state()}


@dataclass(frozen=True)
class SharedSolver(Solver):
    """V diag(values) Vᵀ for every unit, and what is orthogonal to V where V is not complete.

    Attributes:
        basis: V `[size, rank]`.
        reciprocals: of the damped eigenvalues `[units, rank]`, with one more column where V is not
            complete; 0 where nothing is known of a unit.
        jitter: largest diagonal added beyond the damping.
    """

    basis: Tensor
    reciprocals: Tensor
    jitter: float

    @property
    def shape(self) -> torch.Size:
        """(units, size)."""
        return torch.Size((len(self.reciprocals), len(self.basis)))

    def solve(self, vectors: Tensor) -> Tensor:
        """The solution for `[units, size]`; 0 for units of which nothing is known."""
        return in_basis(self.basis, self.reciprocals, vectors).to(vectors.dtype)

    def whiten(self, vectors: Tensor) -> Tensor:
        """L⁻¹ x for `[*rows, units, size]`, L the symmetric root; 0 for units that are unknown."""
        return in_basis(self.basis, self.reciprocals.sqrt(), vectors)

    def unwhiten(self, vectors: Tensor) -> Tensor:
        """L⁻ᵀ x for `[*rows, units, size]`, the same."""
        return self.whiten(vectors)


def in_basis(basis: Tensor, values: Tensor, vectors: Tensor) -> Tensor:
    """[V diag(e_u) Vᵀ + r_u (1 − V Vᵀ)] x_u for every unit u, as two products of matrices.

    Args:
        basis: V, orthonormal `[size, rank]`.
        values: e `[units, rank]`, with r as one more column where V is not complete.
        vectors: x `[*rows, units, size]`.

    Returns:
        `[*rows, units, size]`, in the type of the basis.
    """
    size, rank = basis.shape
    vectors = vectors.to(basis)
    inside = (vectors.reshape(-1, size) @ basis).reshape(*vectors.shape[:-1], rank)
    rest = values[:, rank:]
    inside *= values[:, :rank] - rest if rank < size else values
    found = (inside.reshape(-1, rank) @ basis.mT).reshape(vectors.shape)
    return found.addcmul_(vectors, rest) if rank < size else found
