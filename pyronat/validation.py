"""What each batch says, as new data, about where the batches before it lead.

In the coordinates of a `Spectrum` the gradient g of a batch is c = Uᵀ L⁻¹ g. Noise gives c_i the
variance λ_i, the share of information that is retained, and c_i² / 2 λ_i nats are to be gained
where there is none. With A_ρ, a step of length η leaves a share (1 − a η)² of that, a = λ_i / κ_i.
So mixing ρ' instead of ρ gains, in the steps that are to come,

    ½ Σ_i w_i c_i m_i / λ_i,    w_i = Π (1 − a_i(ρ) η)² − Π (1 − a_i(ρ') η)²,

with the mean m of earlier batches in the place of one c: noise of different batches has nothing in
common. Where there is nothing but noise, the sum has mean 0 and variance ¼ Σ w_i² m_i² / λ_i.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor

from pyronat.rates import PerName, Schedule
from pyronat.sides import Side
from pyronat.spectrum import Spectrum
from pyronat.steps import CrossValidated, Evidence, LinearDecay

_SEGMENTS = 32
"""Pieces with one rate each that stand for the steps to come."""

_NEGLIGIBLE = 1e-6
"""Retained information, as a share of the whole, that is taken for this much."""

Ahead: TypeAlias = Sequence[tuple[float, int]]
"""Rates and the number of steps for which each is taken, as far as training is foreseen."""


def ahead(lr: Schedule, step: int) -> Ahead:
    """The rates of the steps to come.

    Args:
        lr: the schedule.
        step: number of the next step.

    Returns:
        Rates to the end of a `steps.LinearDecay`; else for as many steps as have been taken.
    """
    base = lr.base if isinstance(lr, PerName) else lr
    left = base.num_steps - step if isinstance(base, LinearDecay) else 0
    left = left if left > 0 else max(step, 1)
    pieces = min(_SEGMENTS, left)
    ends = [step + left * piece // pieces for piece in range(pieces + 1)]
    return [(lr((first + last - 1) // 2), last - first) for first, last in pairwise(ends)]


def unsettled(speed: Tensor, rates: Ahead) -> Tensor:
    """Π (1 − a η)², the share of what is to be gained that is left at the end, at most 1.

    Args:
        speed: a of each direction.
        rates: η and how often.

    Returns:
        Of the same shape.
    """
    lengths = speed.new_tensor([rate for rate, _ in rates])
    counts = speed.new_tensor([2.0 * count for _, count in rates])
    each = (1 - speed.unsqueeze(-1) * lengths).abs().clamp_max(1)
    return (each**counts).prod(-1)


def compared(
    rule: CrossValidated,
    side: Side,
    state: Evidence,
    gradients: Mapping[str, Tensor],
    rates: Ahead,
) -> Evidence:
    """The state of the rule after a new batch.

    Args:
        rule: the rule.
        side: the model's curvature, as it was for the last step.
        state: of the rule.
        gradients: of the batch at the parameters as they are, by name.
        rates: of the steps to come.

    Returns:
        Its state for the next step, with the batch; there is nothing to compare where no district
        was measured yet.
    """
    blocks = [name for some in side.spectra.values() for name in some.factors]
    packed = {name: side.packed(name, gradients) for name in blocks}
    if not packed:
        return replace(state, trend={}, batches=0, changes={})
    if not _fits(state.trend, packed):
        trend = {name: vector.clone() for name, vector in packed.items()}
        return replace(state, trend=trend, batches=1, changes={})
    trend = dict(state.trend)
    if state.changes:
        trend = {name: trend[name] + _bent(side, name, state.changes) for name in blocks}
    pieces = [
        _evidence(some, trend, packed, rule.candidates, rates) for some in side.spectra.values()
    ]
    gain, variance = torch.stack([piece.to(pieces[0]) for piece in pieces]).sum(0)
    tiny = torch.finfo(variance.dtype).tiny
    state = rule.judged(state, (gain / variance.clamp_min(tiny).sqrt()).tolist())
    share = rule.share(state.batches)
    mixed = {name: torch.lerp(trend[name], packed[name], share) for name in blocks}
    return replace(state, trend=mixed, batches=state.batches + 1, changes={})


def after_step(state: Evidence, side: Side, changes: Mapping[str, Tensor]) -> Evidence:
    """The state of the rule after a step.

    Args:
        state: before the step.
        side: the model's curvature.
        changes: the step, by parameter.

    Returns:
        The state with the step.
    """
    known = state.trend.keys() & side.solved.keys()
    return replace(state, changes={name: side.packed(name, changes) for name in sorted(known)})


def _fits(trend: Mapping[str, Tensor], packed: Mapping[str, Tensor]) -> bool:
    """Whether two gradients are of the same blocks."""
    return {n: v.shape for n, v in trend.items()} == {n: v.shape for n, v in packed.items()}


def _bent(side: Side, block: str, changes: Mapping[str, Tensor]) -> Tensor:
    """G_V Δ of a block: what a step adds to its gradient, as the metric has it."""
    some = next(one for one in side.spectra.values() if block in one.factors)
    step = {name: changes[name] for name in some.factors}
    white = some.whitened({name: side.damped(name, vector) for name, vector in step.items()})
    white = white + some.directions @ ((some.retained - 1) * (white @ some.directions))
    return side.damped(block, some.unwhitened(white, step)[block])


def _evidence(
    some: Spectrum,
    trend: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    candidates: Sequence[float],
    rates: Ahead,
) -> Tensor:
    """Gain of each candidate over the one before it, of the first over ρ = 1, and its variance.

    Args:
        some: the spectrum of a district.
        trend: mean gradient of earlier batches by block, moved to where the parameters are.
        gradients: of the new batch, by block.
        candidates: values of ρ.
        rates: of the steps to come.

    Returns:
        Σ w c m / λ and Σ w² m² max(λ, (c − m)²) / λ² `[2, candidates]`: 2 and 4 times them.
    """
    old, new = (some.whitened(g) @ some.directions for g in (trend, gradients))
    retained = some.retained.clamp_min(_NEGLIGIBLE)
    stretches = torch.stack([some.stretch(mixing) for mixing in (1.0, *candidates)])
    weights = -unsettled(retained / stretches, rates).diff(dim=0)
    # Where data scatter more than the model says, as on the way from a bad start, that counts.
    spread = torch.maximum(retained, (new - old).square())
    return torch.stack([
        (weights * new * old / retained).sum(1),
        (weights.square() * old.square() * spread / retained.square()).sum(1),
    ])
