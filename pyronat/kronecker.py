"""Kronecker factors of a layer: an operator on its units that is never formed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from pyronat.eigenvectors import leading
from pyronat.operators import BlockOperator, Solver, lerp

FLOOR = 1e-12
"""Smallest eigenvalue of a damped Kronecker product, relative to the largest."""

_CHUNK_ELEMENTS = 2**22
"""Elements of the temporary that moments are summed from."""


@dataclass(frozen=True)
class Kronecker(BlockOperator):
    """G ≈ B ⊗ A of a layer, vectors being its units: G X = B X A (Martens & Grosse 2015).

    A is the mean of a aᵀ over the rows of its inputs, B the sum of δ δᵀ over what flows back into
    its units. It is exact where a and δ do not vary together, as for one datum. With `rows` the
    eigenvalues of B ⊗ A are replaced by second moments in its eigenbasis (George et al. 2018), the
    best diagonal there is in that basis. A factor of more than `blocks.COMPLETE` rows is held by
    its leading eigenvectors; what is orthogonal to them shares mean eigenvalues, so that the trace
    of G is kept.

    Attributes:
        inputs: A `[fan_in, fan_in]`.
        outputs: B `[units, units]`.
        mass: Σ weights behind A, `[]`.
        rows: δ `[data, rows, units]` and a `[data, rows, fan_in]` that correct the eigenvalues, or
            None; the derivatives of a datum are summed over its rows.
    """

    inputs: Tensor
    outputs: Tensor
    mass: Tensor
    rows: tuple[Tensor, Tensor] | None = None

    def mv(self, vectors: Tensor) -> Tensor:
        """B X A for `[units, fan_in]`, in the eigenbasis where eigenvalues are corrected."""
        if self.rows is None:
            return self.outputs @ vectors @ self.inputs
        return self._eigen.mv(vectors)

    def quadratic(self, vectors: Tensor) -> Tensor:
        """⟨X, G X⟩ for `[units, fan_in]`, a 0-d tensor."""
        return super().quadratic(vectors) if self.rows is None else self._eigen.quadratic(vectors)

    def dense(self) -> Tensor:
        """One matrix `[1, units * fan_in, units * fan_in]`."""
        if self.rows is None:
            return torch.kron(self.outputs, self.inputs).unsqueeze(0)
        shape = (len(self.outputs), len(self.inputs))
        columns = torch.eye(prod(shape), dtype=self.inputs.dtype, device=self.inputs.device)
        return self._eigen.mv(columns.reshape(-1, *shape)).reshape(1, prod(shape), prod(shape))

    def mean_diagonal(self) -> Tensor:
        """B_uu · mean diag A, `[units]`."""
        return self.outputs.diagonal() * self.inputs.diagonal().mean()

    def usable(self, damping: Tensor) -> Tensor:
        """Its mean for all units where eigenvalues are corrected, in a basis without damping."""
        return damping if self.rows is None else damping.mean().expand_as(damping)

    def factor(self, damping: Tensor) -> KroneckerSolver:
        """Eigenvectors of B ⊗ A + diag(damping) ⊗ I.

        With the damping Λ of each unit, Λ^½ (Λ^-½ B Λ^-½ ⊗ A + I) Λ^½ is that matrix.

        Args:
            damping: Λ `[units]`, as `usable` has it.

        Returns:
            The solver.
        """
        largest = damping.max()
        if self.rows is not None or not bool(largest > 0):
            return self._eigen.lifted(float(damping.mean()))
        scale = damping.clamp_min(1e-6 * largest).sqrt()
        return self._solver(scale).lifted(1.0)

    @cached_property
    def _eigen(self) -> KroneckerSolver:
        """Eigenvectors and eigenvalues, the corrected ones where there are any, without damping."""
        return self._solver(None)

    def _solver(self, scale: Tensor | None) -> KroneckerSolver:
        """Eigenvectors and eigenvalues of Λ^-½ B Λ^-½ ⊗ A with the scale Λ^½ `[units]`."""
        outputs = self.outputs if scale is None else self.outputs / scale / scale.unsqueeze(1)
        left = leading(outputs)
        right = leading(self.inputs)
        if self.rows is None:
            values = left.all_values.unsqueeze(1) * right.all_values
        else:
            values = _second_moments(*self.rows, left.vectors, right.vectors)
        return KroneckerSolver(scale, left.vectors, right.vectors, values, 0.0)

    def state(self) -> dict[str, Any]:
        """Plain tensors; what follows from them is computed again."""
        own = {"inputs": self.inputs, "outputs": self.outputs, "mass": self.mass}
        return {"form": "Kronecker", **own, "rows": self.rows}

    def __add__(self, other: Kronecker) -> Kronecker:
        """B added, A averaged: exact only where both layers have the same inputs."""
        total = (self.mass + other.mass).clamp_min(torch.finfo(self.mass.dtype).tiny)
        rows = None
        if self.rows is not None and other.rows is not None:
            rows = _stacked(self.rows, other.rows)
        return Kronecker(
            torch.lerp(self.inputs, other.inputs, other.mass / total),
            self.outputs + other.outputs,
            self.mass + other.mass,
            rows,
        )

    def lerp(self, other: Kronecker, share: float) -> Kronecker:
        """Factor by factor; the rows are those of the other, unless it has seen nothing."""
        mine, its = (1 - share) * self.mass, share * other.mass.to(self.mass.dtype)
        part = float(its / (mine + its).clamp_min(torch.finfo(mine.dtype).tiny))
        return Kronecker(
            lerp(self.inputs, other.inputs, part),
            lerp(self.outputs, other.outputs, share),
            mine + its,
            other.rows if float(its) else self.rows,
        )

    def zeros(self) -> Kronecker:
        """B = 0."""
        zero = torch.zeros_like
        rows = None if self.rows is None else (zero(self.rows[0]), self.rows[1])
        return Kronecker(zero(self.inputs), zero(self.outputs), zero(self.mass), rows)


def _second_moments(flowing: Tensor, inputs: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Σ over data of (uᵀ M v)², M = Σ δ aᵀ over the rows of a datum, for all vectors u and v.

    What is orthogonal to the vectors has the mean over all directions there.

    Args:
        flowing: δ `[data, rows, units]`.
        inputs: a `[data, rows, fan_in]`.
        left: orthonormal u `[units, p]`.
        right: orthonormal v `[fan_in, q]`.

    Returns:
        `[p, q]`, with one more row where u is not complete, one more column where v is
        not.
    """
    flowing, inputs = flowing.to(left.dtype), inputs.to(right.dtype)
    inner, outer = flowing @ left, inputs @ right
    moments = _squared_products(inner, outer)
    missing = (len(left) - left.shape[1], len(right) - right.shape[1])
    if not any(missing):
        return moments
    of_flowing, of_inputs = flowing @ flowing.mT, inputs @ inputs.mT
    by_left = (inner * (of_inputs @ inner)).sum((0, 1))
    by_right = (outer * (of_flowing @ outer)).sum((0, 1))
    total = (of_flowing * of_inputs).sum()
    moments = _with_rest(moments, by_left, by_right, total, missing).clamp_min(0)
    if missing[0]:
        moments[-1] /= missing[0]
    if missing[1]:
        moments[:, -1] /= missing[1]
    return moments


def _squared_products(first: Tensor, second: Tensor) -> Tensor:
    """Σ_n (Σ_r x_nri y_nrj)² for `[data, rows, p]` and `[data, rows, q]`, `[p, q]`."""
    if first.shape[1] == 1:
        return first[:, 0].square().mT @ second[:, 0].square()
    total = first.new_zeros(first.shape[2], second.shape[2])
    chunk = max(_CHUNK_ELEMENTS // total.numel(), 1)
    for some, part in zip(first.split(chunk), second.split(chunk), strict=True):
        total += (some.mT @ part).square().sum(0)
    return total


def _stacked(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Data of both; the shorter ones are filled up with rows that nothing flows back into."""
    length = max(first[0].shape[1], second[0].shape[1])

    def joined(a: Tensor, b: Tensor) -> Tensor:
        parts = (pad(x, (0, 0, 0, length - x.shape[1])) for x in (a, b))
        return torch.cat(list(parts))

    return joined(first[0], second[0]), joined(first[1], second[1])


@dataclass(frozen=True)
class _Shares:
    """What the values for pairs of vectors are sums of.

    Attributes:
        both: the value of what is orthogonal to both U and V, `[]`.
        of_left: what u adds to it `[p, 1]`.
        of_right: what v adds to it `[q]`.
        own: what u and v add to these together `[p, q]`.
    """

    both: Tensor
    of_left: Tensor
    of_right: Tensor
    own: Tensor


@dataclass(frozen=True)
class KroneckerSolver(Solver):
    """Λ^½ (U ⊗ V) diag(values) (U ⊗ V)ᵀ Λ^½, and what is orthogonal to U or V.

    Attributes:
        scale: Λ^½ `[units]`, or None for 1.
        left: U, orthonormal `[units, p]`.
        right: V, orthonormal `[fan_in, q]`.
        values: `[p, q]`, with one more row for what is orthogonal to U where U is not complete, and
            one more column where V is not.
        jitter: what had to be added to the smallest of them.
    """

    scale: Tensor | None
    left: Tensor
    right: Tensor
    values: Tensor
    jitter: float

    def lifted(self, damping: float) -> KroneckerSolver:
        """With damping added to all values, and more to those that are still negligible."""
        values = self.values + damping
        floor = FLOOR * values.max()
        added = float((floor - values.min()).clamp_min(0))
        return replace(self, values=values.clamp_min(floor), jitter=added)

    def mv(self, vectors: Tensor) -> Tensor:
        """The product with `[*, units, fan_in]`."""
        found = self._applied(self._shares(self.values), self._scaled(vectors, inverse=False))
        return self._scaled(found, inverse=False).to(vectors.dtype)

    def solve(self, vectors: Tensor) -> Tensor:
        """Λ^-½ U [(Uᵀ Λ^-½ X V) / values] Vᵀ for `[units, fan_in]`, and the rest over its own."""
        found = self._applied(self._inverse_shares, self._scaled(vectors, inverse=True))
        return self._scaled(found, inverse=True).to(vectors.dtype)

    def _scaled(self, vectors: Tensor, inverse: bool) -> Tensor:
        """Λ^½ X or Λ^-½ X, in the type of the factors."""
        vectors = vectors.to(self.values)
        if self.scale is None:
            return vectors
        scale = self.scale.unsqueeze(1)
        return vectors / scale if inverse else vectors * scale

    @property
    def _missing(self) -> tuple[int, int]:
        """Directions that are orthogonal to U and to V."""
        return len(self.left) - self.left.shape[1], len(self.right) - self.right.shape[1]

    def _shares(self, values: Tensor) -> _Shares:
        """What values are sums of."""
        missing = self._missing
        table = pad(values, (0, int(not missing[1]), 0, int(not missing[0])))
        both = table[-1, -1]
        of_left, of_right = table[:-1, -1:] - both, table[-1, :-1] - both
        return _Shares(both, of_left, of_right, table[:-1, :-1] - of_left - of_right - both)

    @cached_property
    def _inverse_shares(self) -> _Shares:
        return self._shares(1 / self.values)

    def _applied(self, shares: _Shares, vectors: Tensor) -> Tensor:
        """Σ values_ij u_i u_iᵀ X v_j v_jᵀ, what is orthogonal to U or V included."""
        outer, missing = vectors @ self.right, self._missing
        core = shares.own * (self.left.mT @ outer)
        if not missing[0]:
            core = core @ self.right.mT
            if missing[1]:
                core = core + shares.of_left * (self.left.mT @ vectors)
            return self.left @ core
        outer = (self.left @ core).addcmul_(shares.of_right, outer)
        if not missing[1]:
            return outer @ self.right.mT
        found = (outer @ self.right.mT).addcmul_(vectors, shares.both)
        inner = shares.of_left * (self.left.mT @ vectors)
        return found.addmm_(self.left, inner) if found.dim() == 2 else found.add_(self.left @ inner)

    def quadratic(self, vectors: Tensor) -> Tensor:
        """⟨X, G X⟩ for `[units, fan_in]`, a 0-d tensor."""
        vectors = self._scaled(vectors, inverse=False)
        inner = self.left.mT @ vectors
        squares = (inner @ self.right).square()
        if any(self._missing):
            of_right = (vectors @ self.right).square().sum(0)
            margins = inner.square().sum(1), of_right, vectors.square().sum()
            squares = _with_rest(squares, *margins, self._missing).clamp_min(0)
        return (squares * self.values).sum()


def _with_rest(
    inside: Tensor, by_left: Tensor, by_right: Tensor, total: Tensor, missing: tuple[int, int]
) -> Tensor:
    """Sums over vectors of two bases, with those over what is orthogonal to either.

    Args:
        inside: for each pair of vectors `[p, q]`.
        by_left: for each vector of the first one and all directions of the second one `[p]`.
        by_right: the other way round `[q]`.
        total: over all directions of both, `[]`.
        missing: directions that are orthogonal to the vectors of either.

    Returns:
        `inside`, with one more row where the first basis is not complete, one more column where the
        second one is not.
    """
    table = pad(inside, (0, 1, 0, 1))
    table[:-1, -1] = by_left - inside.sum(1)
    table[-1, :-1] = by_right - inside.sum(0)
    table[-1, -1] = total - by_left.sum() - by_right.sum() + inside.sum()
    rows, columns = len(inside) + bool(missing[0]), inside.shape[1] + bool(missing[1])
    return table[:rows, :columns]
