"""Linear units of a layer: the rows that their Fisher matrices are sums of."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import combinations_with_replacement
from math import prod
from typing import Any

import torch
from torch import Tensor

from pyronat.errors import NotPositiveDefinite
from pyronat.operators import JITTERS, is_finite

MAX_ROWS = 4
"""Rows that are kept, in multiples of the size of a unit, before an average is compressed."""

_CHUNK_ELEMENTS = 2**22
"""Elements of the temporary that a Gram matrix is summed from."""

_STRIPS = 6
"""Strips that a Gram matrix is formed in, those on one side of its diagonal."""

_NARROWEST = 32
"""Columns of a strip, on average, below which strips cost more than they save."""


@dataclass(frozen=True)
class UnitRows:
    """G_u = Σ_n w_nu a_n a_nᵀ for every unit u of a layer, as rows a_n with weights w_n.

    Linear units of one layer see the same inputs a and differ in their weights alone.

    Attributes:
        weights: w, not negative `[rows, units]`.
        inputs: a `[rows, size]`.
        compressed: whether the inputs are Vᵀ and the weights eᵀ of `basis` and `values`.
    """

    weights: Tensor
    inputs: Tensor
    compressed: bool = False

    @cached_property
    def basis(self) -> Tensor:
        """V `[size, size]`, the eigenvectors of Σ_u G_u, in the type of the inputs.

        Raises:
            NotPositiveDefinite: if the sum over units is not finite.
        """
        if self.compressed:
            return self.inputs.mT
        total = (self.inputs * self.weights.sum(1, keepdim=True)).mT @ self.inputs
        if not is_finite(total):
            raise NotPositiveDefinite("a curvature block is not finite")
        vectors: Tensor = torch.linalg.eigh(total.to(torch.float64)).eigenvectors
        return vectors.to(self.inputs.dtype)

    @cached_property
    def values(self) -> Tensor:
        """e_uj = v_jᵀ G_u v_j = Σ_n w_nu (v_jᵀ a_n)² `[units, size]`."""
        if self.compressed:
            return self.weights.mT
        return self.weights.mT @ (self.inputs @ self.basis).square()

    def gram(self) -> Tensor:
        """G `[units, size, size]`."""
        return gram(self.weights, self.inputs)

    def mean_diagonal(self) -> Tensor:
        """Mean of the diagonal of each G_u `[units]`."""
        return self.weights.mT @ self.inputs.square().mean(1)

    def jitter(self, damping: Tensor) -> Tensor:
        """What damping `[units]` lacks of 1e-7 of the mean diagonal `[units]`."""
        return (JITTERS[1] * self.mean_diagonal() - damping).clamp_min(0)

    def __add__(self, other: UnitRows) -> UnitRows:
        """The rows of both, those of this first."""
        weights = torch.cat([self.weights, other.weights])
        return UnitRows(weights, torch.cat([self.inputs, other.inputs]))

    def lerp(self, other: UnitRows, share: float) -> UnitRows:
        """The rows of both, those of this weighted by 1 − share, those of the other by `share`."""
        weights = torch.cat([self.weights * (1 - share), other.weights * share])
        return UnitRows(weights, torch.cat([self.inputs, other.inputs]))

    def empty(self) -> UnitRows:
        """Without rows."""
        return UnitRows(self.weights[:0], self.inputs[:0])

    def compact(self, newest: int = 0) -> UnitRows:
        """The same, where rows are more than `MAX_ROWS` · size, in fewer.

        Args:
            newest: multiples of the size that are kept as they are, from the end.

        Returns:
            For the older rows one for each column of their basis, with weights e, then the newest.
        """
        rows, size = self.inputs.shape
        if rows <= MAX_ROWS * size:
            return self
        if not newest:
            return UnitRows(self.values.mT, self.basis.mT, compressed=True)
        older, kept = (
            UnitRows(self.weights[some], self.inputs[some])
            for some in (slice(None, -newest * size), slice(-newest * size, None))
        )
        return UnitRows(older.values.mT, older.basis.mT) + kept

    def state(self) -> dict[str, Any]:
        """Plain tensors; what follows from them is computed again."""
        return {"weights": self.weights, "inputs": self.inputs, "compressed": self.compressed}


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
