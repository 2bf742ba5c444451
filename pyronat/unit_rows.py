"""Linear units of a layer: the rows that their Fisher matrices are sums of."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations_with_replacement
from math import prod
from typing import Any

import torch
from torch import Tensor

from pyronat.eigenvectors import leading
from pyronat.operators import JITTERS

MAX_ROWS = 3
"""Rows that are kept, in multiples of the size of a unit, before an average is compressed.

With 1 to 4 a sigmoid belief network of 784, 200 and 200 units, trained with 2 particles, is as good
after 3,000 steps on binarized digits, within what seeds differ by.
"""

_CHUNK_ELEMENTS = 2**20
"""Elements of the temporary that a Gram matrix is summed from."""

_STRIPS = 6
"""Strips that a Gram matrix is formed in, those on one side of its diagonal."""

_NARROWEST = 32
"""Columns of a strip, on average, below which strips cost more than they save."""


@dataclass(frozen=True)
class UnitRows:
    """G_u = Σ_n w_nu a_n a_nᵀ + r_u I for every unit u of a layer, as rows a_n with weights w_n.

    Linear units of one layer see the same inputs a and differ in their weights alone. Fresh rows
    have no rest r; what has been compressed has the mean of the eigenvalues that were let go of.

    Attributes:
        weights: w `[rows, units]`; of compressed rows they may be negative, the G_u are not.
        inputs: a `[rows, size]`.
        rest: r `[units]`, or None for 0.
        compressed: whether the inputs are Vᵀ of `basis`.
    """

    weights: Tensor
    inputs: Tensor
    rest: Tensor | None = None
    compressed: bool = False

    @property
    def size(self) -> int:
        """Entries of a unit."""
        return self.inputs.shape[1]

    @cached_property
    def basis(self) -> Tensor:
        """V `[size, rank]`, the eigenvectors of Σ_u G_u that `leading` takes.

        Raises:
            NotPositiveDefinite: if the sum over units is not finite.
        """
        if self.compressed:
            return self.inputs.mT
        summed = (self.inputs * self.weights.sum(1, keepdim=True)).mT @ self.inputs
        return leading(summed).vectors

    @cached_property
    def values(self) -> Tensor:
        """e_uj = v_jᵀ G_u v_j `[units, rank]`, not negative.

        Where V is not complete, one more column: the mean over what is orthogonal to it, so that
        the trace of each G_u is kept.
        """
        if self.compressed:
            inside = self.weights.mT
        else:
            inside = self.weights.mT @ (self.inputs @ self.basis).square()
        if self.rest is not None:
            inside = inside + self.rest.unsqueeze(1)
        missing = self.size - self.basis.shape[1]
        if not missing:
            return inside.clamp_min(0) if self.rest is not None else inside
        outside = (self.size * self.mean_diagonal() - inside.sum(1)) / missing
        return torch.cat([inside, outside.unsqueeze(1)], 1).clamp_min(0)

    def gram(self) -> Tensor:
        """G `[units, size, size]`."""
        found = gram(self.weights, self.inputs)
        if self.rest is not None:
            found.diagonal(dim1=1, dim2=2).add_(self.rest.unsqueeze(1))
        return found

    def plus_rest(self, products: Tensor, vectors: Tensor) -> Tensor:
        """Products with Σ_n w_nu a_n a_nᵀ made those with G_u, for vectors `[units, size]`."""
        return products if self.rest is None else products + self.rest.unsqueeze(1) * vectors

    def mean_diagonal(self) -> Tensor:
        """Mean of the diagonal of each G_u `[units]`."""
        found = self.weights.mT @ self.inputs.square().mean(1)
        return found if self.rest is None else found + self.rest

    def jitter(self, damping: Tensor) -> Tensor:
        """What damping `[units]` lacks of 1e-7 of the mean diagonal `[units]`."""
        return (JITTERS[1] * self.mean_diagonal() - damping).clamp_min(0)

    def __add__(self, other: UnitRows) -> UnitRows:
        """The rows of both, those of this first."""
        rests = [rows.rest for rows in (self, other) if rows.rest is not None]
        return UnitRows(
            torch.cat([self.weights, other.weights]),
            torch.cat([self.inputs, other.inputs]),
            torch.stack(rests).sum(0) if rests else None,
        )

    def lerp(self, other: UnitRows, share: float) -> UnitRows:
        """The rows of both, those of this weighted by 1 − share, those of the other by `share`."""
        return self._scaled(1 - share) + other._scaled(share)

    def _scaled(self, share: float) -> UnitRows:
        rest = None if self.rest is None else self.rest * share
        return UnitRows(self.weights * share, self.inputs, rest)

    def empty(self) -> UnitRows:
        """Without rows."""
        return UnitRows(self.weights[:0], self.inputs[:0])

    def compact(self, newest: int = 0) -> UnitRows:
        """The same, where rows are more than `MAX_ROWS` · size, in fewer.

        Args:
            newest: multiples of the size that are kept as they are, from the end.

        Returns:
            For the older rows one for each column of their basis, then the newest.
        """
        if len(self.inputs) <= MAX_ROWS * self.size:
            return self
        if not newest:
            return self._in_basis()
        older, kept = (
            UnitRows(self.weights[some], self.inputs[some])
            for some in (slice(None, -newest * self.size), slice(-newest * self.size, None))
        )
        return replace(older, rest=self.rest)._in_basis() + kept

    def _in_basis(self) -> UnitRows:
        """The columns of the basis as rows."""
        inside, rest = self.values, None
        if self.basis.shape[1] < self.size:
            inside, rest = self.values[:, :-1] - self.values[:, -1:], self.values[:, -1]
        return UnitRows(inside.mT, self.basis.mT, rest, compressed=True)

    def state(self) -> dict[str, Any]:
        """Plain tensors; what follows from them is computed again."""
        own = {"weights": self.weights, "inputs": self.inputs}
        return {**own, "rest": self.rest, "compressed": self.compressed}


def gram(weights: Tensor, inputs: Tensor) -> Tensor:
    """Σ_n w_nu a_n a_nᵀ for every unit u, of which half the products are formed.

    Args:
        weights: `[rows, units]`.
        inputs: `[rows, fan_in]`.

    Returns:
        `[units, fan_in, fan_in]`, symmetric.
    """
    size, units = inputs.shape[1], weights.shape[1]
    width = -(-size // max(min(size // _NARROWEST, _STRIPS), 1))
    strips = [(slice(at, at + width), inputs[:, at : at + width]) for at in range(0, size, width)]
    if len(strips) == 1:
        return _weighted_products(weights, inputs, inputs)
    found: Tensor = inputs.new_empty(units, size, size)
    for (rows, first), (columns, second) in combinations_with_replacement(strips, 2):
        part = _weighted_products(weights, first, second)
        found[:, rows, columns] = part
        found[:, columns, rows] = part.mT
    return found


def _weighted_products(weights: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Σ_n w_nu a_n b_nᵀ, summed over chunks of rows.

    Args:
        weights: `[rows, units]`.
        first: a `[rows, m]`.
        second: b `[rows, n]`.

    Returns:
        `[units, m, n]`.
    """
    shape = (first.shape[1], second.shape[1])
    chunk = max(_CHUNK_ELEMENTS // max(prod(shape), 1), 1)
    total: Tensor = first.new_zeros(weights.shape[1], prod(shape))
    for some, a, b in zip(
        weights.split(chunk), first.split(chunk), second.split(chunk), strict=True
    ):
        total.addmm_(some.mT, (a.unsqueeze(2) * b.unsqueeze(1)).flatten(1))
    return total.reshape(len(total), *shape)
