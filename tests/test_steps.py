"""Step rules against their formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pyronat import Full
from pyronat.steps import (
    Constant,
    ConstantDamping,
    InverseTime,
    KLTrustRegion,
    LeverageDamping,
    LinearDecay,
    Moments,
    ReachScaledAdam,
    RunningAverage,
)

DIAGONAL = torch.tensor([2.0, 0.5, 0.0], dtype=torch.float64)
LEVERAGE = torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Constant(0.3), {0: 0.3, 1: 0.3, 10**6: 0.3}),
        (LinearDecay(0.5, 100), {0: 0.5, 50: 0.25, 97: 0.015, 99: 0.01, 100: 0.01, 10**6: 0.01}),
        (LinearDecay(0.5, 100, floor=0.0), {99: 0.005, 100: 0.0, 500: 0.0}),
        (InverseTime(0.5, 10.0), {0: 0.5, 10: 0.25, 90: 0.05, 990: 0.005}),
        (InverseTime(0.5, 10.0, floor=0.1), {0: 0.5, 10: 0.25, 90: 0.1, 10**6: 0.1}),
    ],
    ids=str,
)
def test_schedules(schedule: Callable[[int], float], expected: dict[int, float]) -> None:
    assert {step: schedule(step) for step in expected} == pytest.approx(expected)


@pytest.mark.parametrize("lr", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(
    ("damping", "formula"),
    [
        (LeverageDamping(), lambda d, a, lr: 0.05 * d + 4 * lr * a / 3),
        (LeverageDamping(relative=0.2, surprise=2.0), lambda d, a, lr: 0.2 * d + 2 * lr * a),
        (LeverageDamping(surprise=math.inf), lambda d, a, lr: 0.05 * d),
        (ConstantDamping(0.7), lambda d, a, lr: 0 * d + 0.7),
        (ConstantDamping(0.7, relative=0.1), lambda d, a, lr: 0.7 + 0.1 * d),
    ],
    ids=str,
)
def test_damping(damping: Any, formula: Callable[..., Tensor], lr: float) -> None:
    found = damping(DIAGONAL, LEVERAGE, lr)
    assert torch.allclose(found, formula(DIAGONAL, LEVERAGE, lr), rtol=0, atol=1e-14)
    assert bool((found >= 0).all())


def test_leverage_damping_bounds_the_move_of_a_surprising_datum() -> None:
    """A saturated unit, G = 0: the datum's own logit moves by lr · ‖a‖² / λ, at most `surprise`."""
    inputs = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    for lr in (0.01, 0.3, 1.0):
        leverage = 0.25 * inputs.square().sum().reshape(1)
        damping = LeverageDamping(surprise=3.0)(torch.zeros(1), leverage, lr)
        move = lr * inputs.square().sum() / damping
        assert move.item() == pytest.approx(3.0)


@pytest.mark.parametrize("divergence", [0.0, 1e-300, 0.5, 1.0, 4.0, 1e12])
@pytest.mark.parametrize("radius", [0.25, 1.0, math.inf])
def test_trust_region_shrinks_a_step_to_its_radius(radius: float, divergence: float) -> None:
    factor = KLTrustRegion(radius).factor(torch.tensor(divergence)).item()
    assert 0 < factor <= 1
    assert factor**2 * divergence <= radius * (1 + 1e-12)
    if divergence <= radius:
        assert factor == pytest.approx(1.0)
    else:
        assert factor**2 * divergence == pytest.approx(radius)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.8, 0.99])
def test_running_average_is_the_mean_until_it_forgets(decay: float) -> None:
    rule = RunningAverage(decay=decay)
    values = [3.0, -1.0, 4.0, 1.0, -5.0, 9.0, 2.0]
    mean, weights = 0.0, []
    for count, value in enumerate(values):
        share = rule.share(count)
        mean = (1 - share) * mean + share * value
        weights = [weight * (1 - share) for weight in weights] + [share]
        assert sum(weights) == pytest.approx(1.0)
        if share > 1 - decay + 1e-12:
            assert mean == pytest.approx(sum(values[: count + 1]) / (count + 1))
    assert rule.share(0) == pytest.approx(1.0)
    assert rule.share(10**9) == pytest.approx(1 - decay)
    # the past decays at the stated rate once it is past
    late = int(1 / (1 - decay)) + 1
    assert 1 - rule.share(late) == pytest.approx(decay)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: RunningAverage(decay=1.0), "decay"),
        (lambda: RunningAverage(decay=-0.1), "decay"),
        (lambda: RunningAverage(refresh=0), "refresh"),
        (lambda: Full("fisher"), "pooled.*'fisher'"),
        (lambda: Full(num_runs=0), "num_runs"),
    ],
    ids=["one", "negative", "never", "expectation", "runs"],
)
def test_options_out_of_range_are_refused(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("expectation", ["pooled", "model", "posterior", "exact"])
def test_shares_of_expectations_sum_to_one(expectation: Any) -> None:
    assert sum(Full(expectation).sources.values()) == pytest.approx(1.0)


# --- Adam scaled by reach ----------------------------------------------------------------------


def scaled_path(rule: ReachScaledAdam, reach: Tensor, lr: float, gradients: Tensor) -> Tensor:
    value, state, path = torch.zeros_like(reach), None, []
    for gradient in gradients:
        change, state = rule.step(gradient, 1 / reach, lr, state)
        value = value + change
        path.append(value)
    return torch.stack(path)


@pytest.mark.parametrize("eps", [1e-8, 1e-2])
def test_scaled_adam_is_stock_adam_at_its_own_rate(eps: float) -> None:
    generator = torch.Generator().manual_seed(1)
    gradients = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    reach = torch.tensor([1.0, 4.0, 0.5], dtype=torch.float64)
    rule = ReachScaledAdam(logits_per_lr=2.0, betas=(0.8, 0.95), eps=eps)
    found = scaled_path(rule, reach, 0.1, gradients)
    for entry in range(3):
        stock = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        adam = torch.optim.Adam(
            [stock], lr=2.0 * 0.1 / reach[entry].item(), betas=(0.8, 0.95), eps=eps
        )
        for step, gradient in enumerate(gradients):
            stock.grad = gradient[entry].reshape(1)
            adam.step()
            assert found[step, entry].item() == pytest.approx(stock.item(), rel=1e-10, abs=1e-13)


def test_scaled_adam_moves_a_logit_by_its_rate_whatever_the_fan_in() -> None:
    for fan_in in (1, 10, 1000):
        inputs = torch.ones(fan_in, dtype=torch.float64)
        reach = (2 * 0.5 * inputs.abs().sum()).expand(fan_in)  # 2 √w_ref E‖a‖₁, w_ref = 1/4
        change, _ = ReachScaledAdam().step(-inputs, 1 / reach, 0.1, None)
        assert (change @ inputs).item() == pytest.approx(3.0 * 0.1, rel=1e-6)


def test_scaled_adam_does_not_write_to_its_state() -> None:
    gradient = torch.ones(2, dtype=torch.float64)
    _, state = ReachScaledAdam().step(gradient, torch.ones(2), 0.1, None)
    before = state.first.clone(), state.second.clone(), state.steps
    _, after = ReachScaledAdam().step(3 * gradient, torch.ones(2), 0.1, state)
    assert torch.equal(state.first, before[0])
    assert torch.equal(state.second, before[1])
    assert (state.steps, after.steps) == (1, 2)
    assert isinstance(after, Moments)
    assert not torch.equal(after.first, state.first)
