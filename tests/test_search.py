"""Adaptive rules: steps that are tried, judged, and undone."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from pyro.util import get_rng_state
from states import parameters, same
from torch import Tensor

from models.factor_analysis import FactorAnalysis
from models.helmholtz import Helmholtz
from models.latent_class import LatentClass
from pyronat import Full, NaturalGradient, NaturalSVI
from pyronat.geometry import Visible
from pyronat.steps import (
    ConstantDamping,
    KLTrustRegion,
    LevenbergMarquardt,
    RunningAverage,
    Searched,
)

RULE = LevenbergMarquardt()
NEVER = LevenbergMarquardt(rejected=math.inf, max_tries=3)
"""Keeps no step."""

# --- the rule ----------------------------------------------------------------------------------

TABLE: tuple[tuple[float, float, float, float, float], ...] = (
    # value and length of a step, its ratio, value and length of the next one
    (0.1, 1.0, 1.0, 0.02, 1.0),
    (0.1, 1.0, 0.61, 0.02, 1 / 1.39),
    (0.1, 1.0, 0.6, 0.1, 1 / 1.4),
    (0.1, 1.0, 0.25, 0.1, 1 / 1.75),
    (0.1, 1.0, 0.24, 0.25, 1 / 1.76),
    (0.6, 1.0, 0.1, 1.0, 1 / 1.9),
    (1e-12, 1.0, 1.0, 1e-12, 1.0),
    (1.0, 0.25, 1.0, 0.2, 1.0),
    (0.1, 1.6, 0.1, 0.25, 1.6 / 1.96),
    # Lengths have bounds.
    (0.1, 1.0, 1.9, 0.02, 1.6),
    (0.1, 1.0, 2.5, 0.02, 1.6),
    (0.1, 0.1, 0.06, 0.25, 0.4),
    # Steps that are undone.
    (0.1, 1.0, 0.05, 0.4, 1.0),
    (0.1, 0.7, -3.0, 0.4, 0.7),
    (0.5, 1.0, -math.inf, 1.0, 1.0),
    (0.5, 1.0, math.nan, 1.0, 1.0),
    (1.0, 1.0, -1.0, 1.0, 0.5),
    (1.0, 0.5, 0.0, 1.0, 0.25),
)


@pytest.mark.parametrize("row", TABLE, ids=str)
def test_judgement(row: tuple[float, ...]) -> None:
    value, length, ratio, next_value, next_length = row
    found = RULE.judged(Searched(value, length), ratio)
    assert found.value == pytest.approx(next_value, rel=1e-12)
    assert found.scale == pytest.approx(next_length, rel=1e-12)
    kept = ratio > 0.05
    assert RULE.accepts(ratio) == kept
    # A step that is undone is followed by a shorter one or by more of the full metric.
    assert kept or found.value > value or found.scale < length


def test_start() -> None:
    assert RULE.start() == Searched(1.0, 1.0)
    assert replace(RULE, initial=0.3).start() == Searched(0.3, 1.0)


@pytest.mark.parametrize("damping", [RULE, replace(RULE, initial=0.1)])
def test_one_number_is_adapted(damping: LevenbergMarquardt) -> None:
    with pytest.raises(ValueError, match="mixing or damping"):
        NaturalGradient(geometry=Visible(mixing=RULE), damping=damping)
    NaturalGradient(geometry=Visible(mixing=0.1), damping=damping)
    NaturalGradient(geometry=Visible(mixing=RULE), damping=ConstantDamping(0.1))


# --- full batches ------------------------------------------------------------------------------


def latent_class(rule: Any = RULE, **options: Any) -> tuple[NaturalSVI, Tensor]:
    net = LatentClass(2, 5)
    x = net.sample(net.start(3), 80, 1)
    geometry = Visible(mixing=rule, posterior="enumerate")
    optim = NaturalGradient(lr=1.0, geometry=geometry, **options)
    return NaturalSVI(net.model, net.guide, optim, TraceEnum_ELBO(max_plate_nesting=1)), x


def factors(**options: Any) -> tuple[NaturalSVI, Tensor]:
    net = FactorAnalysis(10, 2)
    options = {"damping": RULE, "geometry": Full("exact"), **options}
    optim = NaturalGradient(lr=1.0, **options)
    return NaturalSVI(net.collapsed, net.guide, optim, Trace_ELBO()), net.make_data(0, 50)


def test_the_loss_never_increases() -> None:
    svi, x = latent_class()
    losses, infos = [], []
    for _ in range(40):
        before = svi.optim.caution
        losses.append(svi.step(x))
        infos.append(svi.info)
        if svi.info.tries == 1:
            assert svi.info.mixing == before.value
        elif svi.info.accepted:
            assert svi.info.mixing >= before.value
    rounding = 1e-12 * abs(losses[0])
    assert all(b <= a + rounding for a, b in itertools.pairwise(losses))
    assert losses[-1] < losses[0] - 10
    mixings = [info.mixing for info in infos]
    assert mixings[0] == 1.0 and min(mixings) < 1e-3
    assert all(1e-12 <= mixing <= 1 for mixing in mixings)
    assert all(1 <= info.tries <= RULE.max_tries for info in infos)
    assert {info.accepted for info in infos[:20]} == {True}


@pytest.mark.parametrize("initial", [1e-3, 1e-2])
def test_without_a_search_the_loss_may_increase(initial: float) -> None:
    """Negative control: the problem is not so simple that every step gains."""
    svi, x = latent_class(replace(RULE, initial=initial, rejected=-math.inf, max_tries=1))
    losses = [svi.step(x) for _ in range(10)]
    assert any(b > a + 1e-6 for a, b in itertools.pairwise(losses))


@pytest.mark.parametrize("initial", [1e-6, 1e-3])
def test_bold_starts_are_taken_back(initial: float) -> None:
    svi, x = latent_class(replace(RULE, initial=initial))
    losses, tries = [], []
    for _ in range(10):
        losses.append(svi.step(x))
        tries.append(svi.info.tries)
    assert max(tries) > 1
    assert all(b <= a for a, b in itertools.pairwise(losses))


def test_factor_analysis_converges() -> None:
    svi, x = factors()
    losses, dampings = [], []
    for _ in range(60):
        losses.append(svi.step(x))
        dampings.append(svi.info.damping)
        if svi.info.grad_norm < 1e-6:
            break
    assert svi.info.grad_norm < 1e-6
    assert all(b <= a + 1e-9 for a, b in itertools.pairwise(losses))
    assert min(dampings) < 1e-3 * dampings[0]
    assert svi.info.mixing == 1.0 and svi.info.missing is None


def test_a_fixed_damping_converges_more_slowly() -> None:
    # Negative control.
    svi, x = factors(damping=ConstantDamping(0.0, 1.0))
    for _ in range(20):
        svi.step(x)
    assert svi.info.grad_norm > 1e-3


def test_damping_is_adapted_between_refreshes() -> None:
    svi, x = factors(curvature=RunningAverage(decay=0.0, refresh=5))
    dampings, cautions = [], []
    for _ in range(3):
        cautions.append(svi.optim.caution.value)
        svi.step(x)
        assert svi.info.tries == 1
        dampings.append(svi.info.damping)
    ratios = [d / c for d, c in zip(dampings, cautions, strict=True)]
    assert cautions[-1] < cautions[0]
    assert ratios == pytest.approx([ratios[0]] * 3)


def test_a_trust_region_is_no_reason_to_undo_a_step() -> None:
    svi, x = latent_class(trust_region=KLTrustRegion(1e-3))
    for _ in range(3):
        svi.step(x)
        assert svi.info.kl <= 1e-3 * (1 + 1e-9)
        assert svi.info.tries == 1


# --- steps that are undone ---------------------------------------------------------------------

OTHERS: dict[str, Callable[[], dict[str, Any]]] = {
    "alone": dict,
    "with others": lambda: {"exclude": ["probs"], "others": pyro.optim.Adam({"lr": 0.01})},
    "with defaults": lambda: {"exclude": ["weights"]},
}


@pytest.mark.parametrize("others", OTHERS)
@pytest.mark.parametrize("steps", [0, 3])
def test_a_rejected_step_changes_nothing(others: str, steps: int) -> None:
    svi, x = latent_class(**OTHERS[others]())
    svi.step(x)
    for _ in range(steps):
        svi.step(x)
    svi.optim.adaptation = replace(svi.optim.adaptation, search=NEVER)
    before = parameters(), copy.deepcopy(svi.optim.get_state())
    for _ in range(5):
        loss = svi.step(x)
        assert math.isfinite(loss)
        assert not svi.info.accepted and svi.info.tries == 3
        assert same(before[0], parameters())
        # The loss itself is remembered.
        assert same({**before[1], "watch": None}, {**svi.optim.get_state(), "watch": None})
        assert all(leaf.grad is None for _, leaf in pyro.get_param_store().named_parameters())
    svi.optim.adaptation = replace(svi.optim.adaptation, search=RULE)
    svi.step(x)
    assert svi.info.accepted
    after = parameters()
    assert all(not torch.equal(before[0][name], after[name]) for name in after)


def test_steps_at_the_optimum_gain_nothing() -> None:
    svi, x = latent_class()
    for _ in range(36):
        svi.step(x)
    end = svi.evaluate_loss(x)
    for _ in range(8):
        svi.step(x)
    assert svi.info.grad_norm < 1e-6
    assert svi.evaluate_loss(x) == pytest.approx(end, rel=1e-12)


def gaussian(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0), obs=x)


def nothing(x: Tensor) -> None:
    pass


def simple(model: Any, rule: LevenbergMarquardt = RULE, **options: Any) -> NaturalSVI:
    optim = NaturalGradient(lr=1.0, geometry=Full("model"), damping=rule, **options)
    return NaturalSVI(model, nothing, optim)


def test_a_gradient_of_zero_is_no_error() -> None:
    svi = simple(gaussian)
    for _ in range(5):
        svi.step(torch.tensor([1.0, -1.0]))
        assert svi.info.grad_norm == 0
        assert pyro.param("loc").item() == 0
        assert not svi.info.accepted and svi.info.tries == RULE.max_tries


# --- trials that cannot be evaluated -----------------------------------------------------------

EDGE = 2.0


def raising(error: type[Exception]) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(0.0))
        if loc.item() > EDGE:
            raise error("beyond the edge")
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    return model


def beyond(value: float) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            y = dist.Normal(loc + torch.where(loc > EDGE, value, 0.0), 1.0)
            with pyro.validation_enabled(False):
                pyro.sample("x", y, obs=x)

    return model


EDGES: dict[str, Callable[[Tensor], None]] = {
    "ValueError": raising(ValueError),
    "RuntimeError": raising(RuntimeError),
    "nan": beyond(math.nan),
    "inf": beyond(math.inf),
}


@pytest.mark.filterwarnings("ignore:Encountered NaN")
@pytest.mark.parametrize("edge", EDGES)
def test_trials_beyond_the_edge_are_undone(edge: str) -> None:
    """The best step would go to 10, where the loss cannot be computed."""
    x = torch.tensor([9.0, 11.0])
    svi = simple(EDGES[edge], replace(RULE, initial=1e-3))
    locs, losses, tries = [], [], []
    with pyro.validation_enabled(False):
        for _ in range(6):
            losses.append(svi.step(x))
            locs.append(pyro.param("loc").item())
            tries.append(svi.info.tries)
    assert all(0 < loc <= EDGE for loc in locs)
    assert max(tries) > 3
    assert all(map(math.isfinite, losses))
    assert all(b <= a for a, b in itertools.pairwise(losses))
    assert locs[-1] > 1.5


def test_without_an_edge_the_step_is_taken() -> None:
    # Negative control.
    svi = simple(gaussian, replace(RULE, initial=1e-3))
    svi.step(torch.tensor([9.0, 11.0]))
    assert svi.info.tries == 1 and pyro.param("loc").item() == pytest.approx(10, rel=1e-2)


@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt])
def test_an_unforeseen_error_of_a_trial_leaves_the_last_good_parameters(error: Any) -> None:
    svi = simple(raising(error), replace(RULE, initial=1e-3))
    x = torch.tensor([9.0, 11.0])
    state = None
    for _ in range(2):
        with pytest.raises(error):
            svi.step(x)
        assert pyro.param("loc").item() == 0
        assert svi.optim.step_count == 0
        assert state is None or same(state, svi.optim.get_state())
        state = copy.deepcopy(svi.optim.get_state())


def test_others_take_the_gradient_of_the_step() -> None:
    """Also when the search has evaluated another gradient before."""

    def model(x: Tensor) -> None:
        near, other = (pyro.param(name, torch.tensor(1e-8)) for name in ("near", "other"))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(near, 1.0), obs=x)
            pyro.sample("y", dist.Normal(other, 1.0), obs=x)

    class Second(LevenbergMarquardt):
        """Undoes the first step, about which it is asked three times."""

        def accepts(self, ratio: float) -> bool:
            calls.append(ratio)
            return len(calls) > 3

    calls: list[float] = []
    others = pyro.optim.SGD({"lr": 0.1})
    svi = simple(model, Second(max_tries=5), exclude=["other"], others=others)
    svi.step(torch.zeros(4))
    assert svi.info.accepted and svi.info.tries > 1
    # The gradient is 4 · 1e-8.
    assert pyro.param("other").item() == pytest.approx(1e-8 - 0.1 * 4e-8, rel=1e-6)


# --- random numbers ----------------------------------------------------------------------------


def machine(mixing: Any) -> tuple[NaturalSVI, Tensor]:
    net = Helmholtz((8, 4, 2))
    x = torch.rand(20, 8, generator=torch.Generator().manual_seed(1)).round()
    geometry = Visible(mixing=mixing, num_particles=3, num_dreams=20)
    return NaturalSVI(net.model, net.guide, NaturalGradient(geometry=geometry)), x


def test_trials_leave_random_numbers_alone() -> None:
    states, tries = [], []
    for mixing in (0.5, RULE, NEVER):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi, x = machine(mixing)
        found = []
        for _ in range(4):
            svi.step(x)
            found.append(get_rng_state())
            tries.append(svi.info.tries)
        states.append(found)
    assert max(tries) > 1
    for found in states[1:]:
        for first, second in zip(states[0], found, strict=True):
            assert torch.equal(first["torch"], second["torch"])
            assert first["random"] == second["random"]
            numpy = first["numpy"][1], second["numpy"][1]
            assert numpy[0].tolist() == numpy[1].tolist()
    # Negative control: one evaluation of the loss uses some.
    svi.evaluate_loss(x)
    assert not torch.equal(torch.get_rng_state(), states[-1][-1]["torch"])


def test_trials_are_judged_on_the_random_numbers_of_the_step() -> None:
    """At the parameters of the step the loss is the same to the last bit."""
    svi, x = machine(RULE)
    original = svi.loss.loss
    seen = []

    def watched(*args: Any, **kwargs: Any) -> float:
        leaves = dict(pyro.get_param_store().named_parameters())
        moved = parameters()
        assert not same(moved, before)
        with torch.no_grad():
            for name, leaf in leaves.items():
                leaf.copy_(before[name])
            seen.append(original(*args, **kwargs))
            for name, leaf in leaves.items():
                leaf.copy_(moved[name])
        raise ValueError

    svi.step(x)
    svi.loss.loss = watched
    before = parameters()
    loss = svi.step(x)
    assert seen and all(value == pytest.approx(loss, rel=1e-14) for value in seen)
    assert not svi.info.accepted and svi.info.tries == RULE.max_tries == len(seen)
    assert same(parameters(), before)
