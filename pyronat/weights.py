"""What the elements of a distribution count for, seen from the distribution that it wraps."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyronat.wrappers import peel, wrappers

_OF_ITEMS = frozenset({"BetaBinomial", "Binomial", "DirichletMultinomial", "Multinomial"})
"""Families whose values count items, `total_count` of them."""


def spread_weights(weights: Tensor, distribution: Distribution) -> Tensor:
    """Weights of a distribution's batch elements → weights of its base distribution's.

    Args:
        weights: `[*batch]`.
        distribution: with its wrappers.

    Returns:
        `[*base_batch]`: `Independent` copies the weight to the elements it joins,
        `ExpandedDistribution` sums the copies it made, `MaskedDistribution` drops what it hides;
        a transformed distribution has the elements of its base.
    """
    for wrapper in wrappers(distribution):
        kind = type(wrapper).__name__
        if kind == "Independent":
            dims = wrapper.reinterpreted_batch_ndims
            weights = weights.reshape(*weights.shape, *[1] * dims)
            weights = weights.expand(wrapper.base_dist.batch_shape)
        elif kind == "ExpandedDistribution":
            weights = weights.sum_to_size(wrapper.base_dist.batch_shape)
        elif kind == "MaskedDistribution":
            weights = weights * torch.as_tensor(wrapper._mask, device=weights.device)
    return weights


def joined_dims(distribution: Distribution) -> int:
    """Rightmost batch dimensions of the base distribution that make up one event."""
    return sum(
        getattr(wrapper, "reinterpreted_batch_ndims", 0) for wrapper in wrappers(distribution)
    )


def elements_of(distribution: Distribution) -> int:
    """Elements of one value of a distribution: pixels, items, words.

    They do not depend on how it is written. A category is one element, as a number or one-hot.
    Counts of N items are N, as N categories would be. A vector has as many as coordinates, whether
    they are independent or not; K shares that sum to 1 have K − 1, as K − 1 sticks broken one by
    one would, and `Beta` has 1.

    Args:
        distribution: with its wrappers.

    Returns:
        At least 1. Where counts differ between batch elements, their mean.
    """
    joined = prod(
        size
        for wrapper in wrappers(distribution)
        for size in _joined_shape(wrapper, getattr(wrapper, "reinterpreted_batch_ndims", 0))
    )
    return max(1, joined * _of_one(peel(distribution)))


def _joined_shape(wrapper: Any, dims: int) -> torch.Size:
    """Sizes of the batch dimensions that a wrapper makes part of an event."""
    shape: torch.Size = wrapper.base_dist.batch_shape
    return shape[len(shape) - dims :]


def _of_one(base: Any) -> int:
    kind, shape = type(base).__name__, base.event_shape
    size: int = shape.numel()
    if "OneHotCategorical" in kind:
        return 1
    if kind in _OF_ITEMS:
        return round(torch.as_tensor(base.total_count, dtype=torch.float64).mean().item())
    return size - 1 if kind == "Dirichlet" else size


def without_copies(tensor: Tensor, repeated: Iterable[int]) -> Tensor:
    """One of the copies along each of some leading dimensions."""
    for dim in repeated:
        tensor = tensor.narrow(dim, 0, 1)
    return tensor
