"""What steps carry over: momentum and its restarts, and the share of signal."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import X, guide, model
from states import parameters, same
from torch import Tensor

from pyronat import Euclidean, Full, NaturalGradient, NaturalSVI, Visible
from pyronat.steps import (
    ConstantDamping,
    HeldOut,
    KLTrustRegion,
    LevenbergMarquardt,
    Momentum,
    RunningAverage,
    Shrinkage,
)
from pyronat.weights import elements_of

FREE = KLTrustRegion(network=math.inf, guide=math.inf, model=math.inf)
STILL = RunningAverage(0.0, 1)
NO_SHRINKAGE = Shrinkage(least=1.0)


# --- the rules ---------------------------------------------------------------------------------


def test_momentum_grows_with_the_steps_since_a_restart() -> None:
    rule = Momentum(decay=0.5)
    age = torch.tensor(0.0)
    decays = []
    for slope in (-1.0, -1.0, -1.0, -1.0, 0.1, -1.0):
        age = rule.age(age, torch.tensor(slope))
        decays.append(rule.decay_at(age).item())
        age = age + 1
    assert decays == pytest.approx([0, 1 / 4, 2 / 5, 1 / 2, 0, 1 / 4])


def test_without_restarts_it_is_constant() -> None:
    rule = Momentum(decay=0.9, restarts=False)
    age = rule.age(torch.tensor(3.0), torch.tensor(1.0))
    assert age.item() == 3
    assert rule.decay_at(age).item() == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("share", "factor"), [(0.0, 0.1**0.5), (0.01, 0.1**0.5), (0.04, 0.4**0.5), (0.5, 1.0)]
)
def test_shrinkage_is_the_root_of_the_share(share: float, factor: float) -> None:
    rule = Shrinkage(gain=10.0, least=0.1)
    assert rule.factor(torch.tensor(share)).item() == pytest.approx(factor)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Momentum(1.0),
        lambda: Momentum(-0.1),
        lambda: Shrinkage(gain=0.0),
        lambda: Shrinkage(least=0.0),
        lambda: Shrinkage(decay=1.0),
    ],
)
def test_options_out_of_range_are_refused(make: Any) -> None:
    with pytest.raises(ValueError, match="must be"):
        make()


@pytest.mark.parametrize(
    "options",
    [
        {"damping": LevenbergMarquardt()},
        {"geometry": Visible(LevenbergMarquardt())},
        {"geometry": Visible(HeldOut())},
    ],
    ids=str,
)
def test_rules_that_judge_steps_take_them_without_momentum(options: dict[str, Any]) -> None:
    assert NaturalGradient(**options).carry.is_none
    with pytest.raises(ValueError, match="without momentum"):
        NaturalGradient(momentum=Momentum(), **options)


# --- in training -------------------------------------------------------------------------------

WIDTHS = torch.tensor([1.0, 0.05], dtype=torch.float64)


def slow(x: Tensor) -> None:
    """A mean in two directions, one of which the metric takes for 20 times as well known."""
    loc = pyro.param("loc", torch.tensor([3.0, 3.0]))
    with pyro.plate("data", len(x)), pyro.plate("side", 2):
        pyro.sample("x", dist.Normal(loc.unsqueeze(-1), 1.0), obs=x.T)
    pyro.factor("rest", (0.5 * (1 - WIDTHS) * loc.square()).sum() * len(x))


def no_guide(*args: Any) -> None:
    pass


def trained(steps: int, **options: Any) -> tuple[Tensor, NaturalSVI]:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    optim = NaturalGradient(
        0.5,
        geometry=Full("posterior"),
        damping=ConstantDamping(0.0),
        trust_region=FREE,
        curvature=STILL,
        rejection=None,
        **options,
    )
    svi = NaturalSVI(slow, no_guide, optim)
    for _ in range(steps):
        svi.step(torch.zeros(8, 2))
    return pyro.param("loc").detach().clone(), svi


def test_steps_are_those_of_the_heavy_ball() -> None:
    """loss = N Σ w_i loc_i² / 2 with metric N: d_i = w_i loc_i, restarts by gᵀΔ."""
    loc, change, age = torch.tensor([3.0, 3.0]), torch.zeros(2), 0
    restarts = 0
    for steps in range(1, 40):
        direction = WIDTHS * loc
        if float((direction * change).sum()) > 0:
            age, restarts = 0, restarts + 1
        change = min(age / (age + 3), 0.95) * change - 0.5 * direction
        loc, age = loc + change, age + 1
        if steps in (1, 2, 5, 39):
            assert torch.allclose(trained(steps)[0], loc, rtol=1e-9, atol=1e-12)
    assert restarts > 0


def test_momentum_is_faster_where_the_metric_makes_steps_short() -> None:
    """And the negative control: without it the error is that of the slow direction alone."""
    with_it, _ = trained(40)
    without, _ = trained(40, momentum=Momentum(0.0))
    assert without[1].item() == pytest.approx(3 * (1 - 0.5 * 0.05) ** 40)
    assert with_it.abs().max() < 0.2 * without[1]


def test_the_divergence_is_that_of_the_whole_step() -> None:
    before, _ = trained(5)
    after, svi = trained(6)
    assert svi.info is not None and svi.info.momentum > 0
    assert svi.info.kl == pytest.approx(float(0.5 * 8 * (after - before).square().sum()))


def test_the_radius_bounds_the_whole_step_and_what_it_carries_on() -> None:
    trust_region = KLTrustRegion(0.01, math.inf, math.inf, math.inf)
    pyro.clear_param_store()
    optim = NaturalGradient(
        0.5, Full("posterior"), damping=ConstantDamping(0.0), trust_region=trust_region
    )
    svi = NaturalSVI(slow, no_guide, optim)
    for _ in range(6):
        before = pyro.get_param_store().get_state()["params"].get("loc")
        before = None if before is None else before.detach().clone()
        svi.step(torch.zeros(8, 2))
        assert svi.info is not None
        assert svi.info.kl == pytest.approx(0.01)
        if before is not None:
            moved = (pyro.param("loc").detach() - before).square().sum()
            assert 0.5 * 8 * float(moved) == pytest.approx(0.01)
    assert svi.info is not None and svi.info.momentum > 0


def wide(x: Tensor) -> None:
    """A posterior whose natural gradient is nearly all noise once the guide is there."""
    with pyro.plate("side", 20):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def wide_guide(x: Tensor) -> None:
    with pyro.plate("side", 20):
        loc = pyro.param("loc", torch.full((20,), 3.0))
        scale = pyro.param("scale", torch.ones(20), constraint=dist.constraints.positive)
        pyro.sample("z", dist.Normal(loc, scale))


def test_the_share_of_signal_falls_and_steps_with_it() -> None:
    """Far from the posterior nearly all is signal, at it nearly nothing."""

    def ends(**options: Any) -> tuple[list[float], float]:
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        optim = NaturalGradient(0.2, momentum=Momentum(0.0), **options)
        svi = NaturalSVI(wide, wide_guide, optim)
        shares, error = [], 0.0
        for step in range(120):
            svi.step(torch.zeros(20))
            assert svi.info is not None
            shares.append(math.nan if svi.info.signal is None else svi.info.signal)
            if step >= 60:
                error += float(pyro.param("loc").detach().square().mean()) / 60
        return shares, error

    shares, error = ends()
    assert min(shares[:2]) > 0.5
    assert sum(shares[60:]) / 60 < 0.15
    plain, wider = ends(shrinkage=NO_SHRINKAGE)
    assert all(map(math.isnan, plain))
    # The variance of where steps wander is that of their length.
    assert error < 0.7 * wider


def test_networks_of_a_guide_and_models_are_not_shrunk() -> None:
    svi = NaturalSVI(model, guide, NaturalGradient(0.05, guide_geometry=Euclidean()))
    for _ in range(3):
        svi.step(X)
    assert svi.info is not None and svi.info.signal is None


def test_a_trial_that_fails_leaves_no_momentum() -> None:
    """A step that is not finite changes nothing, and the next one goes on as if it had not been."""

    def run(bad: bool) -> dict[str, Tensor]:
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi = NaturalSVI(model, guide, NaturalGradient(0.05))
        for step in range(6):
            if step == 4 and bad:
                state = torch.get_rng_state()
                with pytest.raises(Exception, match="NaN"):
                    svi.step(X * math.nan)
                torch.set_rng_state(state)
            svi.step(X)
        return parameters()

    assert same(run(True), run(False))


def test_momentum_is_in_checkpoints() -> None:
    """Resumed from a state with momentum, and from one whose momentum is forgotten."""

    def resumed(forget: bool) -> dict[str, Tensor]:
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi = NaturalSVI(model, guide, NaturalGradient(0.05))
        for _ in range(4):
            svi.step(X)
        state = svi.optim.get_state()
        assert {"model", "guide"} == set(state["motions"])
        if forget:
            state["motions"] = {}
        fresh = NaturalSVI(model, guide, NaturalGradient(0.05))
        fresh.optim.set_state(state)
        for _ in range(3):
            fresh.step(X)
        return parameters()

    def straight() -> dict[str, Tensor]:
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi = NaturalSVI(model, guide, NaturalGradient(0.05))
        for _ in range(7):
            svi.step(X)
        return parameters()

    assert same(resumed(False), straight())
    assert not same(resumed(True), straight())


# --- bounds, and parameters that a step does not use ---------------------------------------------


@pytest.mark.parametrize("as_event", [True, False])
def test_models_are_bounded_per_element(as_event: bool) -> None:
    """Whether elements are declared as one event or as a plate; a single one is the control."""

    def far(x: Tensor) -> None:
        loc = pyro.param("loc", torch.full((x.shape[1],), 50.0))
        with pyro.plate("data", len(x), dim=-1 if as_event else -2):
            if as_event:
                pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)
                return
            with pyro.plate("side", x.shape[1], dim=-1):
                pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    moved = {}
    for width in (1, 5):
        pyro.clear_param_store()
        svi = NaturalSVI(far, no_guide, NaturalGradient(0.5, trust_region=KLTrustRegion(model=0.1)))
        svi.step(torch.zeros(8, width))
        assert svi.info is not None
        moved[width] = svi.info.kl
    assert moved == {1: pytest.approx(0.1 * 8), 5: pytest.approx(0.1 * 8 * 5)}


ELEMENTS = {
    "a number": (dist.Normal(torch.zeros(4), 1.0), 1),
    "pixels": (dist.Bernoulli(logits=torch.zeros(4, 6)).to_event(1), 6),
    "an image": (dist.Bernoulli(logits=torch.zeros(4, 2, 3)).to_event(2), 6),
    "expanded": (dist.Bernoulli(logits=torch.zeros(1)).expand([4, 6]).to_event(1), 6),
    "masked": (dist.Bernoulli(logits=torch.zeros(4, 6)).mask(torch.ones(4, 6) > 0).to_event(1), 6),
    "transformed": (dist.LogNormal(torch.zeros(4, 6), 1.0).to_event(1), 6),
    "a category": (dist.Categorical(logits=torch.zeros(4, 5)), 1),
    "one-hot": (dist.OneHotCategorical(logits=torch.zeros(4, 5)), 1),
    "one-hot, straight through": (dist.OneHotCategoricalStraightThrough(logits=torch.zeros(5)), 1),
    "one-hot, relaxed": (
        dist.RelaxedOneHotCategorical(torch.tensor(0.5), logits=torch.zeros(5)),
        1,
    ),
    "items": (dist.Categorical(logits=torch.zeros(4, 6, 5)).to_event(1), 6),
    "one-hot items": (dist.OneHotCategorical(logits=torch.zeros(4, 6, 5)).to_event(1), 6),
    "words": (dist.Multinomial(7, logits=torch.zeros(4, 5)), 7),
    "words of any document": (dist.DirichletMultinomial(torch.ones(5), 7), 7),
    "successes": (dist.Binomial(7, logits=torch.zeros(4)), 7),
    "successes of single data": (dist.Binomial(torch.tensor([1.0, 5.0]), logits=torch.zeros(2)), 3),
    "no trial": (dist.Binomial(0, logits=torch.zeros(4)), 1),
    "failures": (dist.NegativeBinomial(7, logits=torch.zeros(4)), 1),
    "a vector": (dist.Normal(torch.zeros(4, 3), 1.0).to_event(1), 3),
    "a joint vector": (dist.MultivariateNormal(torch.zeros(4, 3), torch.eye(3)), 3),
    "shares": (dist.Dirichlet(torch.ones(4, 3)), 2),
    "a share": (dist.Beta(torch.ones(4), 1.0), 1),
    "two shares": (dist.Dirichlet(torch.ones(4, 2)), 1),
}


@pytest.mark.parametrize("name", ELEMENTS)
def test_elements_are_pixels_items_and_words(name: str) -> None:
    distribution, expected = ELEMENTS[name]
    assert elements_of(distribution) == expected


def far_category(x: Tensor) -> None:
    logits = pyro.param("logits", torch.tensor([3.0, 0.0, 0.0, 0.0]))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Categorical(logits=logits), obs=x)


def far_one_hot(x: Tensor) -> None:
    logits = pyro.param("logits", torch.tensor([3.0, 0.0, 0.0, 0.0]))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.OneHotCategorical(logits=logits), obs=torch.eye(4)[x])


def far_counts(x: Tensor) -> None:
    """All data in one count."""
    logits = pyro.param("logits", torch.tensor([3.0, 0.0, 0.0, 0.0]))
    counts = torch.bincount(x, minlength=4).to(logits)
    pyro.sample("x", dist.Multinomial(len(x), logits=logits), obs=counts)


@pytest.mark.parametrize("program", [far_category, far_one_hot, far_counts])
def test_a_category_is_bounded_alike_however_it_is_written(program: Callable[..., None]) -> None:
    x, moved = torch.arange(8) % 4, []
    for bound in (0.03, math.inf):
        pyro.clear_param_store()
        region, damping = KLTrustRegion(model=bound), ConstantDamping(1e-9)
        optim = NaturalGradient(0.5, Full("exact"), trust_region=region, damping=damping)
        svi = NaturalSVI(program, no_guide, optim)
        svi.step(x)
        assert svi.info is not None
        moved.append(svi.info.kl)
    assert moved[0] == pytest.approx(0.03 * len(x))
    assert moved[1] > 3 * moved[0]


def branching(x: Tensor, both: bool) -> None:
    first = pyro.param("first", torch.tensor(3.0))
    second = pyro.param("second", torch.tensor(3.0)) if both else None
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(first, 1.0), obs=x)
        if second is not None:
            pyro.sample("y", dist.Normal(second, 1.0), obs=x)


def test_what_a_step_does_not_use_keeps_its_momentum() -> None:
    optim = NaturalGradient(0.1, trust_region=FREE, damping=ConstantDamping(0.0))
    svi = NaturalSVI(branching, no_guide, optim)
    for _ in range(4):
        svi.step(torch.zeros(8), True)
    place = pyro.param("second").detach().clone()
    left = optim.get_state()["motions"]["model"]["changes"]["second"].clone()
    first = pyro.param("first").detach().clone()
    for _ in range(2):
        before, first = first, pyro.param("first").detach().clone()
        svi.step(torch.zeros(8), False)
        assert svi.info is not None
        moved = pyro.param("first").detach() - first
        assert svi.info.kl == pytest.approx(float(0.5 * 8 * moved.square()))
    assert float(before) != float(first)
    assert torch.equal(pyro.param("second"), place) and float(left) != 0
    assert torch.equal(optim.get_state()["motions"]["model"]["changes"]["second"], left)
