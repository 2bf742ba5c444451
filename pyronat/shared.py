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
    weights are proportional to each other. It takes rows · size · (size + units) operations, the
    units themselves rows · size² · units.

    Attributes:
        rows: what the G_u are sums of.
    """

    rows: UnitRows

    @property
    def basis(self) -> Tensor:
        """V `[size, size]`."""
        return self.rows.basis

    @property
    def values(self) -> Tensor:
        """Diagonals e `[units, size]`."""
        return self.rows.values

    def mv(self, vectors: Tensor) -> Tensor:
        """V diag(e_u) Vᵀ x for `[units, size]`."""
        return ((vectors @ self.basis) * self.values) @ self.basis.mT

    def quadratic(self, vectors: Tensor) -> Tensor:
        """Σ_u e_uᵀ (Vᵀ x_u)² for `[units, size]`, a 0-d tensor."""
        return ((vectors @ self.basis).square() * self.values).sum()

    def dense(self) -> Tensor:
        """The matrices `[units, size, size]`."""
        return (self.basis * self.values.unsqueeze(1)) @ self.basis.mT

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
        """The same as one row for each column of the basis, with weights e, where rows are many."""
        return SharedUnits(self.rows.compact())

    def zeros(self) -> SharedUnits:
        """Without rows."""
        return SharedUnits(self.rows.empty())

    def state(self) -> dict[str, Any]:
        """Plain tensors; what follows from them is computed again."""
        return {"form": "SharedUnits", **self.rows.state()}


@dataclass(frozen=True)
class SharedSolver(Solver):
    """V diag(values) Vᵀ for every unit; L = V diag(√values).

    Attributes:
        basis: V `[size, size]`.
        reciprocals: of the damped eigenvalues `[units, size]`; 0 where nothing is known of a unit.
        jitter: largest diagonal added beyond the damping.
    """

    basis: Tensor
    reciprocals: Tensor
    jitter: float

    @property
    def shape(self) -> torch.Size:
        """(units, size)."""
        return self.reciprocals.shape

    def solve(self, vectors: Tensor) -> Tensor:
        """V diag(1 / values) Vᵀ x for `[units, size]`; 0 for units of which nothing is known."""
        inner = self._times(vectors, self.basis).mul_(self.reciprocals)
        return self._times(inner, self.basis.mT).to(vectors.dtype)

    def whiten(self, vectors: Tensor) -> Tensor:
        """diag(values)^−½ Vᵀ x for `[*rows, units, size]`; 0 where nothing is known of a unit."""
        return self._times(vectors, self.basis).mul_(self.reciprocals.sqrt())

    def unwhiten(self, vectors: Tensor) -> Tensor:
        """V diag(values)^−½ x for `[*rows, units, size]`; 0 where nothing is known of a unit."""
        return self._times(vectors.to(self.basis) * self.reciprocals.sqrt(), self.basis.mT)

    def _times(self, vectors: Tensor, matrix: Tensor) -> Tensor:
        """X M, as one product of matrices however many dimensions there are."""
        flat = vectors.to(self.basis).reshape(-1, len(matrix))
        return (flat @ matrix).reshape(vectors.shape)
