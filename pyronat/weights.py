"""What the elements of a distribution count for, seen from the distribution that it wraps."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyronat.wrappers import wrappers


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


def without_copies(tensor: Tensor, repeated: Iterable[int]) -> Tensor:
    """One of the copies along each of some leading dimensions."""
    for dim in repeated:
        tensor = tensor.narrow(dim, 0, 1)
    return tensor
