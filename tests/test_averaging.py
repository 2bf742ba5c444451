"""Averages of iterates: their weights, their exchange with the last iterates, their checkpoints."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import X, guide, model, param
from pyro.nn import PyroModule, PyroParam
from pyro.optim import Adam
from states import parameters, same
from torch import Tensor
from torch.distributions import constraints

from pyronat import Euclidean, NaturalGradient, NaturalSVI
from pyronat.averaging import Averages
from pyronat.errors import AveragesInPlace, CheckpointMismatch, NoAverage, StructureChanged
from pyronat.steps import ConstantDamping, PolyakRuppert

DEFAULT = PolyakRuppert()

KINDS: dict[str, dict[str, Any]] = {
    "natural": {},
    "scaled": {"guide_geometry": Euclidean()},
    "others": {"guide_geometry": Euclidean(), "others": Adam({"lr": 0.01})},
    "excluded": {"exclude": ["W", "q.*"]},
}
"""Options of `NaturalGradient` by who moves the parameters."""


def make(averaging: PolyakRuppert | None = DEFAULT, **options: Any) -> NaturalSVI:
    return NaturalSVI(model, guide, NaturalGradient(lr=0.05, averaging=averaging, **options))


def train(svi: NaturalSVI, steps: int, x: Tensor = X) -> list[dict[str, Tensor]]:
    """Takes steps and returns the iterates."""
    iterates = []
    for _ in range(steps):
        svi.step(x)
        iterates.append(parameters())
    return iterates


def shown(svi: NaturalSVI) -> dict[str, Tensor]:
    with svi.averaged():
        return parameters()


def explicit(iterates: list[Tensor], share: float) -> Tensor:
    """The average with all weights written out."""
    power = (1 + math.sqrt(1 - share)) / share
    # Γ(j + m − 1) / Γ(j), which is j^(m − 1) for large j.
    weights = torch.tensor([
        math.exp(math.lgamma(j + power - 1) - math.lgamma(j)) for j in range(1, len(iterates) + 1)
    ])
    return (torch.stack(iterates).movedim(0, -1) * (weights / weights.sum())).sum(-1)


# --- the rule ----------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.3, 0.85, 1.0])
def test_an_average_is_worth_its_share_of_the_iterates(share: float) -> None:
    """1 / Σ w² is the number of independent iterates whose plain mean has the same variance."""
    rule, weights = PolyakRuppert(share), torch.zeros(0)
    for count in range(4000):
        new = rule.weight(count)
        weights = torch.cat([weights * (1 - new), torch.tensor([new])])
    assert float(weights.sum()) == pytest.approx(1, abs=1e-12)
    assert float(1 / weights.square().sum()) == pytest.approx(share * 4000, rel=5e-3)
    power = (1 + math.sqrt(1 - share)) / share
    assert float(weights[:400].sum()) == pytest.approx(0.1**power, rel=power**2 / 400)


@pytest.mark.parametrize("options", [{"share": 0.0}, {"share": 1.1}, {"start": -1}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="share"):
        PolyakRuppert(**options)


# --- averages ----------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_averages_are_the_explicit_ones_of_all_parameters(kind: str, share: float) -> None:
    svi = make(PolyakRuppert(share), **KINDS[kind])
    iterates = train(svi, 7)
    averages = shown(svi)
    assert averages.keys() == iterates[0].keys() and len(averages) == 7
    for name, value in averages.items():
        torch.testing.assert_close(
            value, explicit([point[name] for point in iterates], share), rtol=1e-12, atol=1e-14
        )
        # Another share, or the last iterate, is another point.
        assert not torch.allclose(value, explicit([p[name] for p in iterates], 0.7), rtol=1e-6)
        assert not torch.allclose(value, iterates[-1][name], rtol=1e-6)


def test_averaging_changes_no_step() -> None:
    plain = train(make(None), 5)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    assert same(train(make(), 5), plain)


def test_steps_before_the_start_do_not_count() -> None:
    svi = make(PolyakRuppert(1.0, start=3))
    train(svi, 3)
    assert same(shown(svi), parameters())
    iterates = train(svi, 2)
    for name, value in shown(svi).items():
        torch.testing.assert_close(value, (iterates[0][name] + iterates[1][name]) / 2)


def constrained_model(x: Tensor) -> None:
    scale = pyro.param("scale", torch.tensor(2.0), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(0.0, scale).expand([3]).to_event(1), obs=x)


def test_averages_are_those_of_unconstrained_coordinates() -> None:
    optim = NaturalGradient(lr=0.2, averaging=PolyakRuppert(1.0))
    svi = NaturalSVI(constrained_model, lambda x: None, optim)
    scales = []
    for _ in range(4):
        svi.step(X)
        scales.append(pyro.param("scale").detach().clone())
    stacked = torch.stack(scales)
    with svi.averaged():
        torch.testing.assert_close(pyro.param("scale").detach(), stacked.log().mean().exp())
        assert not torch.allclose(pyro.param("scale").detach(), stacked.mean(), rtol=1e-6)


def test_small_weights_are_not_lost_in_single_precision() -> None:
    """A running mean in single precision stays where it is once weights are small."""
    rule, averages = PolyakRuppert(1.0), Averages()
    single = torch.tensor(0.0, dtype=torch.float32)
    steps = 20_000
    for step in range(steps):
        leaf = torch.tensor(1000.0 + step / steps, dtype=torch.float32, requires_grad=True)
        averages = averages.entered(rule, step, {"p": leaf})
        single = single.lerp(leaf.detach(), rule.weight(step))
    assert float(averages.of["p"].mean) == pytest.approx(1000.5, abs=1e-3)
    assert abs(float(single) - 1000.5) > 5e-3


def test_rejected_steps_do_not_count() -> None:
    svi = make()
    train(svi, 3)
    before = shown(svi)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        svi.step(1e200 * X)
    assert svi.info is not None and not svi.info.accepted
    assert same(shown(svi), before)
    svi.step(X)
    assert svi.info.accepted and not same(shown(svi), before)


def branching(x: Tensor, late: bool) -> None:
    with pyro.plate("data", len(x)):
        loc = param("loc", 1, 3)
        if late:
            loc = loc + param("late", 2, 3)
        else:
            loc = loc + param("early", 3, 3)
        pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)


def branching_svi() -> NaturalSVI:
    optim = NaturalGradient(lr=0.3, averaging=PolyakRuppert(1.0), damping=ConstantDamping(1.0))
    return NaturalSVI(branching, lambda x, late: None, optim)


def test_parameters_that_come_late_or_leave_have_averages_of_their_own(tmp_path: Path) -> None:
    svi, points = branching_svi(), []
    for late in (False, False, True, True, True):
        svi.step(X, late)
        points.append(parameters())
    found = shown(svi)
    for name, chosen in {"loc": points, "late": points[2:], "early": points[:2]}.items():
        mean = torch.stack([point[name] for point in chosen]).mean(0)
        torch.testing.assert_close(found[name], mean, rtol=1e-12, atol=1e-14)
    # A parameter that left may be gone altogether, one of the last step may not.
    svi.optim.save(str(tmp_path / "optim.pt"))
    for gone, allowed in [("early", True), ("late", False)]:
        fresh = branching_svi()
        fresh.optim.load(str(tmp_path / "optim.pt"))
        pyro.clear_param_store()
        for name in found.keys() - {gone}:
            pyro.param(name, points[-1][name].clone())
        if allowed:
            assert same(shown(fresh), {n: v for n, v in found.items() if n != gone})
        else:
            with pytest.raises(NoAverage, match="late"):
                shown(fresh)


# --- the exchange ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_iterates_are_back_to_the_last_bit(kind: str) -> None:
    svi = make(**KINDS[kind])
    (*_, last) = train(svi, 4)
    leaves = dict(pyro.get_param_store().named_parameters())
    with svi.averaged():
        assert not same(parameters(), last)
    assert same(parameters(), last)
    # Training goes on as if nothing had been.
    following = train(svi, 3)
    assert all(leaf is leaves[n] for n, leaf in pyro.get_param_store().named_parameters())
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    assert same(train(make(**KINDS[kind]), 7)[4:], following)


def test_the_last_iterates_are_back_after_errors_too() -> None:
    svi = make()
    (*_, last) = train(svi, 4)
    with pytest.raises(KeyError), svi.averaged():
        raise KeyError
    assert same(parameters(), last)
    assert not same(shown(svi), last)


def test_parameters_stored_from_within_are_the_averages(tmp_path: Path) -> None:
    svi = make()
    train(svi, 4)
    averages, last = shown(svi), parameters()
    loss = svi.evaluate_loss(X)
    with svi.averaged():
        pyro.get_param_store().save(str(tmp_path / "params.pt"))
        assert svi.evaluate_loss(X) != loss
    assert same(parameters(), last)
    pyro.get_param_store().set_state(torch.load(tmp_path / "params.pt", weights_only=False))
    assert same(parameters(), averages)


def test_modules_hold_their_averages() -> None:
    class Net(PyroModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.linear = PyroModule[torch.nn.Linear](3, 3)
            self.scale = PyroParam(torch.ones(3), constraint=constraints.positive)

        def forward(self, x: Tensor) -> None:
            loc = self.linear(X)
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(loc, self.scale).to_event(1), obs=x)

    net = Net()
    optim = NaturalGradient(lr=0.1, averaging=PolyakRuppert(1.0))
    svi = NaturalSVI(net, lambda x: None, optim)
    values = []
    for _ in range(3):
        svi.step(X.flip(1))
        values.append(net.linear.weight.detach().clone())
    with svi.averaged():
        torch.testing.assert_close(net.linear.weight.detach(), torch.stack(values).mean(0))
    assert torch.equal(net.linear.weight, values[-1])


def test_no_step_and_no_second_exchange_while_averages_are_in_place() -> None:
    svi = make()
    train(svi, 2)
    last, state = parameters(), svi.optim.get_state()
    for forbidden in (lambda: svi.step(X), lambda: svi.averaged().__enter__()):
        with svi.averaged(), pytest.raises(AveragesInPlace, match="leave the context"):
            forbidden()
        assert same(parameters(), last) and same(svi.optim.get_state(), state)
    svi.step(X)


def test_without_averaging_there_is_nothing_to_show() -> None:
    svi = make(None)
    train(svi, 2)
    with pytest.raises(NoAverage, match="PolyakRuppert"), svi.averaged():
        raise AssertionError


def test_before_the_first_step_parameters_stand_for_themselves() -> None:
    svi = make()
    svi.evaluate_loss(X)
    start = parameters()
    assert same(shown(svi), start)


# --- checkpoints -------------------------------------------------------------------------------


def save(svi: NaturalSVI, folder: Path) -> None:
    svi.optim.save(str(folder / "optim.pt"))
    pyro.get_param_store().save(str(folder / "params.pt"))
    torch.save(torch.get_rng_state(), folder / "rng.pt")


def load(svi: NaturalSVI, folder: Path) -> None:
    pyro.get_param_store().set_state(torch.load(folder / "params.pt", weights_only=False))
    svi.optim.load(str(folder / "optim.pt"))
    torch.set_rng_state(torch.load(folder / "rng.pt"))


@pytest.mark.parametrize("kind", KINDS)
def test_averages_resume_to_the_last_bit(kind: str, tmp_path: Path) -> None:
    first = make(**KINDS[kind])
    train(first, 4)
    save(first, tmp_path)
    now = shown(first)
    train(first, 3)
    end = shown(first)

    pyro.clear_param_store()
    second = make(**KINDS[kind])
    load(second, tmp_path)
    # At once, before a step.
    assert same(shown(second), now)
    train(second, 3)
    assert same(shown(second), end)
    # Negative control: without the averages of the state the end is another.
    pyro.clear_param_store()
    third = make(**KINDS[kind])
    load(third, tmp_path)
    third.optim.set_state({**third.optim.get_state(), "averages": {}})
    train(third, 3)
    assert not same(shown(third), end)


def broken(change: Callable[[Averages], Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def changed(state: dict[str, Any]) -> dict[str, Any]:
        averages = Averages.from_state(state["averages"], PolyakRuppert())
        return {**state, "averages": change(averages)}

    return changed


def without_mean(averages: Averages) -> dict[str, Any]:
    return {name: {"count": 1, "step": 0} for name in averages.state()}


def of_integers(averages: Averages) -> dict[str, Any]:
    whole = {n: replace(average, mean=average.mean.long()) for n, average in averages.of.items()}
    return Averages(whole).state()


DAMAGED: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "left out": lambda state: {k: v for k, v in state.items() if k != "averages"},
    "no averages": lambda state: {**state, "averages": None},
    "no dict": lambda state: {**state, "averages": 3},
    "no mean": broken(without_mean),
    "integers": broken(of_integers),
}


@pytest.mark.parametrize("bound", [True, False])
@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_averages_are_refused_and_change_nothing(damage: str, bound: bool) -> None:
    svi = make()
    train(svi, 2)
    state = svi.optim.get_state()
    other = svi if bound else make()
    before = other.optim.get_state()
    with pytest.raises(CheckpointMismatch):
        other.optim.set_state(DAMAGED[damage](state))
    assert same(other.optim.get_state(), before)
    other.optim.set_state(state)
    assert same(shown(other), shown(svi))


def test_a_state_with_averages_needs_an_optimizer_that_averages() -> None:
    svi = make()
    train(svi, 2)
    with pytest.raises(CheckpointMismatch, match="averaging=None"):
        make(None).optim.set_state(svi.optim.get_state())


def test_averages_of_another_shape_are_refused() -> None:
    svi = make()
    train(svi, 2)
    pyro.clear_param_store()
    pyro.param("W", torch.zeros(5, 2))
    with pytest.raises(StructureChanged, match="W"), svi.averaged():
        raise AssertionError
    assert torch.equal(pyro.param("W").detach(), torch.zeros(5, 2))
