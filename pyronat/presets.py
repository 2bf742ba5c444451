"""Optimizers that are set up for a purpose."""

from __future__ import annotations

from typing import Any

from pyronat.geometry import Full, Posterior, Visible
from pyronat.optim import NaturalGradient
from pyronat.steps import (
    ConstantDamping,
    InverseTime,
    KLTrustRegion,
    Momentum,
    RetainedShare,
    RunningAverage,
)


def streaming(
    batches_behind_start: float = 200.0,
    posterior: Posterior = "enumerate",
    **options: Any,
) -> NaturalGradient:
    """A natural gradient for streams: each batch is new, and is seen once.

    The model's parameters take visible natural steps of length 1 / (b + t + 1) with b batches
    behind the start and t before this step, which is the weight of one batch among all. Were G_V
    known, each estimate would be as accurate as the best one from all data seen: its variance
    reaches the bound of Cramér and Rao (Amari 1998). EM's metric, the full one, is slower than any
    power of t above its smallest share of retained information. Here G_V is averaged over the
    dreams of about 400 steps, ρ follows from its spectrum (`steps.RetainedShare`), damping is low,
    and no step is longer than half a nat. Iterates are not averaged: the last one is the estimate.

    It is meant for posteriors that can be enumerated and for districts of up to some hundred
    parameters, from a start that is in the right basin: `Full()` at a constant rate leads there.

    Args:
        batches_behind_start: how many batches an efficient estimate as accurate as the start would
            have seen. If it is too large, the start is forgotten slowly; if too small, first steps
            are long and noisy.
        posterior: where p(h|v) comes from, as in `Visible`. With "guide", there are 20 particles,
            and the guide is better left to an optimizer of its own: `others=`.
        **options: other options of `NaturalGradient`, which go before those set here.

    Returns:
        The optimizer.

    Raises:
        ValueError: if `batches_behind_start` is negative.

    Example:
        >>> optim = streaming(batches_behind_start=200)
        >>> round(optim.lr(0), 6), round(optim.lr(800), 6)
        (0.004975, 0.000999)
    """
    if batches_behind_start < 0:
        raise ValueError(f"batches_behind_start is not negative, not {batches_behind_start}")
    behind = batches_behind_start + 1
    chosen: dict[str, Any] = {
        "lr": InverseTime(1 / behind, behind),
        "geometry": Visible(
            RetainedShare(), num_particles=20, posterior=posterior, full=Full("model")
        ),
        "damping": ConstantDamping(0.0, relative=1e-3),
        "trust_region": KLTrustRegion(0.5),
        "curvature": RunningAverage(decay=0.95, refresh=20),
        "momentum": Momentum(0.0),
    }
    return NaturalGradient(**{**chosen, **options})
