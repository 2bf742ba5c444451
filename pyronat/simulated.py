"""Fisher information of distributions without a closed form, from values of their own.

The Fisher information is E[s sᵀ], s = ∂ log p(x; θ) / ∂ξ. With log p at values x_k as coordinates
and the weights of these values as their metric, Jᵀ F J = Σ_k w_k s_k s_kᵀ: where the x_k are all
values of a small support and w_k their probabilities it is exact, where they are simulated and
w_k = 1 / K it is unbiased.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from math import prod

import torch
from torch import Tensor
from torch import distributions as dist

from pyronat.blocks import SCORE, SUPPORT
from pyronat.errors import NoFisher, UnsupportedDistribution
from pyronat.families import Group, groups, peel

MAX_SUPPORT = 64
"""Largest number of values that are summed over."""

MAX_DRAWS = 64
"""Largest number of values that are simulated for one batch element."""

_ROWS = 256
"""Simulated values that are aimed at, over all batch elements."""


def fisher_groups(
    distribution: dist.Distribution,
    drawing: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> tuple[Group, ...]:
    """Groups of coordinates of any distribution, in closed form where there is one.

    Args:
        distribution: with its wrappers.
        drawing: context in which values are simulated, by default on the global generators.

    Returns:
        The groups of its family; else one group of log probabilities of all its values, `SUPPORT`,
        which is exact; else one of log densities at simulated values, `SCORE`, which is Monte
        Carlo. None for a distribution without a Fisher information.

    Raises:
        UnsupportedDistribution: if the distribution cannot be simulated or has no log density at
            simulated values.
    """
    base = peel(distribution)
    try:
        return groups(base)
    except NoFisher:
        return ()
    except UnsupportedDistribution:
        values = _support(base)
        return (
            _support_group(base, values) if values is not None else _score_group(base, drawing),
        )


def _support(distribution: dist.Distribution) -> Tensor | None:
    """All values of a small support, the same everywhere `[values, *1s, *event]`, or None."""
    if not distribution.has_enumerate_support:
        return None
    try:
        values: Tensor = distribution.enumerate_support(expand=False)
    except NotImplementedError:
        return None
    return values if len(values) <= MAX_SUPPORT else None


def _support_group(distribution: dist.Distribution, values: Tensor) -> Group:
    shape = torch.Size([len(values), *distribution.batch_shape, *distribution.event_shape])
    log_probs = distribution.log_prob(values.expand(shape))
    return Group(
        SUPPORT, tuple(log_probs), lambda: torch.diag_embed(log_probs.exp().movedim(0, -1))
    )


def _score_group(
    distribution: dist.Distribution, drawing: Callable[[], AbstractContextManager[None]]
) -> Group:
    draws = min(max(_ROWS // max(prod(distribution.batch_shape), 1), 1), MAX_DRAWS)
    lacking = "sampler"
    try:
        with drawing(), torch.no_grad():
            values = distribution.sample(torch.Size([draws]))
        lacking = "log density of given values"
        # A copy: transforms remember values by identity, with inverses that have no history.
        log_probs = distribution.log_prob(values.clone())
    except (NotImplementedError, KeyError, RuntimeError) as error:
        raise UnsupportedDistribution(
            f"{type(distribution).__name__} has no closed-form Fisher information, and its score "
            f"cannot be simulated: it has no {lacking}"
        ) from error
    eye = torch.eye(draws, dtype=log_probs.dtype, device=log_probs.device) / draws
    shape = torch.Size([*distribution.batch_shape, draws, draws])
    return Group(SCORE, tuple(log_probs), lambda: eye.expand(shape))
