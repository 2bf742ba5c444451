"""Cross-validated mixing: what one batch says about the ones before it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pyro
import pytest
import torch
from pyro.infer import TraceEnum_ELBO
from torch import Tensor

from models import latent_class
from pyronat import Full, NaturalGradient, NaturalSVI, Visible
from pyronat.operators import cholesky
from pyronat.rates import PerName
from pyronat.sides import Side
from pyronat.spectrum import Spectrum, VisibleAverage, spectrum
from pyronat.steps import (
    Constant,
    CrossValidated,
    Evidence,
    HeldOut,
    LevenbergMarquardt,
    LinearDecay,
)
from pyronat.validation import _evidence, ahead, compared, unsettled

WIDTH = 40
RETAINED = torch.cat([torch.full((20,), 0.02), torch.full((20,), 0.9)]).double()
CANDIDATES = (0.3, 0.1)


# --- the rule ----------------------------------------------------------------------------------


def after(
    rule: CrossValidated, scores: Callable[[int], tuple[float, float]], steps: int
) -> Evidence:
    state = rule.start()
    for step in range(steps):
        state = rule.judged(state, scores(step))
    return state


def test_the_rule_takes_candidates_that_gain_one_by_one() -> None:
    rule = CrossValidated(CANDIDATES)
    assert rule.start() == Evidence(1.0)
    assert after(rule, lambda _: (0.0, 0.0), 50).value == 1.0
    assert after(rule, lambda _: (0.5, 0.0), 50).value == 0.3
    assert after(rule, lambda _: (0.5, 0.5), 50).value == 0.1
    assert after(rule, lambda _: (0.0, 0.5), 50).value == 1.0
    assert after(rule, lambda _: (-0.5, 0.5), 50).value == 1.0
    # Two standard errors of about 39 steps are 0.32; five steps are too few for a mean of 0.5.
    assert after(rule, lambda _: (0.3, 0.0), 500).value == 1.0
    assert after(rule, lambda _: (0.5, 0.0), 5).value == 1.0
    assert after(CrossValidated(CANDIDATES, errors=1.0), lambda _: (0.3, 0.0), 500).value == 0.3


def test_scores_that_scatter_count_less_and_single_ones_are_bounded() -> None:
    rule = CrossValidated(CANDIDATES)
    assert after(rule, lambda step: (0.5 + 3.0 * (-1) ** step, 0.0), 51).value == 1.0
    spike = after(rule, lambda step: (1e6 if step == 20 else 0.0, 0.0), 22)
    assert spike.value == 1.0
    assert spike.sums[0] == pytest.approx(3.0 * 0.95)


def test_old_scores_are_forgotten() -> None:
    state = after(CrossValidated(CANDIDATES), lambda step: (1.0 if step < 50 else -0.2, 0.0), 100)
    assert state.value == 1.0
    assert state.count == 100


@pytest.mark.parametrize(
    "options",
    [
        {"candidates": ()},
        {"candidates": (0.1, 0.3)},
        {"candidates": (1.0,)},
        {"candidates": (0.0,)},
        {"errors": 0.0},
        {"decay": 1.0},
        {"memory": -0.1},
        {"largest": 0.0},
    ],
)
def test_options_are_checked(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        CrossValidated(**options)  # type: ignore[arg-type]


def test_auto_is_the_rule_with_its_defaults() -> None:
    assert Visible("auto") == Visible(CrossValidated())
    assert Visible("auto", posterior="enumerate").regularizer == Full()
    assert Visible("auto", posterior="exact").regularizer == Full("exact")
    assert Visible(posterior="enumerate").regularizer == Full("model")
    with pytest.raises(ValueError, match='"auto", not'):
        Visible("automatic")  # type: ignore[arg-type]


@pytest.mark.parametrize("rule", [CrossValidated(), HeldOut(), LevenbergMarquardt()])
def test_two_rules_are_refused(rule: CrossValidated | HeldOut | LevenbergMarquardt) -> None:
    with pytest.raises(ValueError, match="not both"):
        NaturalGradient(geometry=Visible(rule), damping=LevenbergMarquardt())


# --- the evidence ------------------------------------------------------------------------------


def known(retained: Tensor) -> tuple[Spectrum, Tensor]:
    """A spectrum with given shares, and the root L of its block."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64) / 4
    matrix = root @ root.mT + torch.eye(WIDTH, dtype=torch.float64)
    factor = cholesky(matrix[None], torch.zeros(1, dtype=torch.float64))
    lower = factor.lower[0]
    turned = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator).double()).Q
    visible = lower @ (turned * retained) @ turned.mT @ lower.mT
    found = spectrum(VisibleAverage("visible", visible, None, 1e9), {"b": factor})
    return found, lower @ turned


def scores(signal: Tensor, samples: int = 400) -> Tensor:
    """Scores `[samples, 2]` of pairs of batches with the same signal in every direction."""
    some, columns = known(RETAINED)
    generator = torch.Generator().manual_seed(1)
    rates = ahead(LinearDecay(0.5, 40), 0)

    def batch() -> dict[str, Tensor]:
        noise = RETAINED.sqrt() * torch.randn(WIDTH, generator=generator, dtype=torch.float64)
        return {"b": (columns @ (signal + noise))[None]}

    found = []
    for _ in range(samples):
        gain, variance = _evidence(some, batch(), batch(), CANDIDATES, rates)
        found.append(gain / variance.sqrt())
    return torch.stack(found)


def test_noise_alone_has_scores_around_zero() -> None:
    found = scores(torch.zeros(WIDTH).double())
    mean, spread = found.mean(0), found.std(0)
    assert bool((mean.abs() < 4 * spread / len(found) ** 0.5).all())
    # The larger one of two variances is taken, so that noise is overestimated.
    assert bool(((spread > 0.5) & (spread < 1.1)).all())


def test_what_slow_directions_hold_is_found() -> None:
    """The same signal in fast directions alone, which the full geometry settles, is none."""
    slow, fast = torch.zeros(2, WIDTH).double()
    slow[:20] = RETAINED[:20].sqrt()
    fast[20:] = RETAINED[20:].sqrt()
    assert bool((scores(slow).mean(0) > 1.0).all())
    assert bool((scores(fast).mean(0).abs() < 0.4).all())


def test_steps_to_come() -> None:
    assert sum(count for _, count in ahead(LinearDecay(0.5, 1000), 100)) == 900
    assert ahead(LinearDecay(0.5, 10), 8) == [(pytest.approx(0.1), 1), (pytest.approx(0.05), 1)]
    assert sum(count for _, count in ahead(Constant(0.1), 70)) == 70
    assert sum(count for _, count in ahead(LinearDecay(0.5, 10), 30)) == 30
    assert ahead(Constant(0.1), 0) == [(0.1, 1)]
    assert ahead(PerName(LinearDecay(0.5, 10), {}), 9) == [(pytest.approx(0.05), 1)]
    left = unsettled(torch.tensor([0.0, 0.5, 1.0]), [(0.1, 3), (0.2, 1)])
    torch.testing.assert_close(left, torch.tensor([1.0, (0.95**3 * 0.9) ** 2, (0.9**3 * 0.8) ** 2]))
    # A rate beyond 2 is no gain, and no loss either.
    assert unsettled(torch.tensor([1.0]), [(5.0, 2)]).item() == 1.0


# --- in training -------------------------------------------------------------------------------


def training(
    geometry: Visible, lr: float = 0.3
) -> tuple[NaturalSVI, Callable[[int, int], list[float]]]:
    """Latent classes, and a function that trains on batches of a size and gives ρ of each step."""
    net, x = latent_class.LatentClass(), latent_class.make_data(0, 800)
    optim = NaturalGradient(lr=lr, geometry=geometry)
    svi = NaturalSVI(net.model, net.guide, optim, TraceEnum_ELBO(max_plate_nesting=1))
    generator = torch.Generator().manual_seed(0)

    def train(size: int, steps: int) -> list[float]:
        found = []
        for _ in range(steps):
            svi.step(x[torch.randperm(len(x), generator=generator)[:size]])
            assert svi.info is not None
            found.append(svi.info.mixing)
        return found

    return svi, train


@pytest.mark.parametrize(("size", "lr", "falls"), [(5, 0.3, False), (800, 0.02, True)])
def test_mixing_falls_only_where_batches_agree(size: int, lr: float, falls: bool) -> None:
    """Small batches are noise; on the whole data set short steps leave slow directions behind."""
    _, train = training(Visible("auto", posterior="enumerate"), lr)
    mixing = train(size, 40)
    assert mixing[0] == 1.0
    assert set(mixing) <= {1.0, 0.3}
    assert mixing[-1] < 1 if falls else sum(mixing) / len(mixing) > 0.95


def test_gradients_are_moved_along_with_steps() -> None:
    """By G_V times the step, as the dense visible Fisher information has it."""
    svi, train = training(
        Visible("auto", posterior="enumerate", estimator="direct", num_dreams=2000)
    )
    train(100, 4)
    optim = svi.optim
    side, last = optim.sides["model"], optim.caution
    assert isinstance(last, Evidence) and last.changes
    (average,) = side.visible.values()
    assert average.matrix is not None
    (some,) = side.spectra.values()

    def row(values: dict[str, Tensor]) -> Tensor:
        return torch.cat([values[name].flatten() for name in some.factors])

    moved = compared(CrossValidated(memory=0.9), side, last, zeros(side), [(0.1, 1)])
    share = max(0.1, 1 / (last.batches + 1))
    bent = (1 - share) * average.matrix @ row(last.changes)
    found = row(moved.trend) - (1 - share) * row(last.trend)
    # Apart from shares that the estimate has above 1, which are taken for 1.
    assert (found - bent).norm() < 0.02 * bent.norm()
    assert bent.norm() > 0.05 * row(last.trend).norm()


def zeros(side: Side) -> dict[str, Tensor]:
    """Gradients of 0, by parameter."""
    return {
        name: torch.zeros(shape)
        for block in side.plan.blocks.values()
        for name, shape in zip(block.params, block.shapes, strict=True)
    }


def test_other_blocks_start_anew() -> None:
    svi, train = training(Visible("auto", posterior="enumerate"))
    train(100, 3)
    last, side = svi.optim.caution, svi.optim.sides["model"]
    assert isinstance(last, Evidence) and last.count == 1
    none = replace(last, trend={}, batches=0, changes={})
    other = replace(last, trend={"x": torch.zeros(1, 1)})
    found = compared(CrossValidated(), side, other, zeros(side), [(0.1, 1)])
    assert found.trend.keys() == side.solved.keys() and found.batches == 1
    assert replace(found, trend={}, batches=0) == none
    bare = replace(side, spectra={})
    assert compared(CrossValidated(), bare, last, {}, [(0.1, 1)]) == none


def test_nothing_changes_while_mixing_is_one() -> None:
    """Steps are those of the full geometry, bit for bit, as long as noise rules."""
    losses = []
    for geometry in (Visible("auto", posterior="enumerate"), Full()):
        net, x = latent_class.LatentClass(), latent_class.make_data(0, 800)
        pyro.clear_param_store()
        optim = NaturalGradient(lr=0.3, geometry=geometry)
        svi = NaturalSVI(net.model, net.guide, optim, TraceEnum_ELBO(max_plate_nesting=1))
        losses.append([svi.step(batch) for batch in x.split(20)[:8]])
    assert losses[0] == losses[1]
