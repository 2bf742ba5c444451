"""`NaturalGradient`: its state, its checkpoints, and who moves which parameter."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import X, guide, model, param
from pyro.optim import Adam
from states import parameters, same
from torch import Tensor
from torch.nn.functional import linear

from pyronat import Euclidean, Full, NaturalGradient, NaturalSVI, ReweightedWakeSleep
from pyronat.errors import CheckpointMismatch
from pyronat.steps import InverseTime, KLTrustRegion, LinearDecay, RunningAverage

Program = Callable[..., Any]


BITS = (X > 0).double()


def binary_model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        h = pyro.sample("h", dist.Bernoulli(logits=param("top", 1, 2)).to_event(1))
        logits = linear(h, param("W", 2, 3, 2), param("b", 3, 3))
        pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)


def binary_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        logits = linear(x, param("q.W", 11, 2, 3), param("q.b", 12, 2))
        pyro.sample("h", dist.Bernoulli(logits=logits).to_event(1))


def gaussian(**options: Any) -> NaturalSVI:
    return NaturalSVI(model, guide, NaturalGradient(lr=0.05, **options))


def binary(**options: Any) -> NaturalSVI:
    elbo = ReweightedWakeSleep(4, insomnia=0.5)
    return NaturalSVI(binary_model, binary_guide, NaturalGradient(lr=0.05, **options), elbo)


SETUPS: dict[str, tuple[Callable[[], NaturalSVI], Tensor]] = {
    "natural": (gaussian, X),
    "scaled adam": (lambda: gaussian(guide_geometry=Euclidean()), X),
    "others": (lambda: gaussian(guide_geometry=Euclidean(), others=Adam({"lr": 0.01})), X),
    "excluded": (lambda: gaussian(exclude=["W", "q.*"]), X),
    "schedule": (lambda: gaussian(), X),
    "wake-sleep": (binary, BITS),
    "alternating": (
        lambda: gaussian(curvature=RunningAverage(refresh=4, alternating=True)),
        X,
    ),
    "never again": (lambda: gaussian(curvature=RunningAverage(refresh=100)), X),
}
by_setup = pytest.mark.parametrize("setup", SETUPS)


def train(svi: NaturalSVI, x: Tensor, steps: int) -> list[float]:
    return [svi.step(x) for _ in range(steps)]


# --- checkpoints -------------------------------------------------------------------------------


def save(svi: NaturalSVI, folder: Path) -> None:
    svi.optim.save(str(folder / "optim.pt"))
    pyro.get_param_store().save(str(folder / "params.pt"))
    torch.save(torch.get_rng_state(), folder / "rng.pt")


def load(svi: NaturalSVI, folder: Path) -> None:
    """Parameters in place, as a user with living modules does, then the optimizer."""
    state = torch.load(folder / "params.pt", weights_only=False)
    store = pyro.get_param_store()
    if set(store.keys()) == set(state["params"]):
        with torch.no_grad():
            for name, leaf in store.named_parameters():
                leaf.copy_(state["params"][name])
    else:
        store.set_state(state)
    svi.optim.load(str(folder / "optim.pt"))
    torch.set_rng_state(torch.load(folder / "rng.pt"))


@pytest.mark.parametrize("steps", [5, 7])
@pytest.mark.parametrize("when", ["before the first step", "after some steps"])
@by_setup
def test_resuming_is_exact_to_the_last_bit(
    setup: str, when: str, steps: int, tmp_path: Path
) -> None:
    """At a refresh, and between two; the resumed training took other steps before, or none."""
    make, x = SETUPS[setup]
    first = make()
    train(first, x, steps)
    save(first, tmp_path)
    expected = train(first, x, 6)
    end, state = parameters(), copy.deepcopy(first.optim.get_state())

    pyro.clear_param_store()
    second = make()
    if when == "after some steps":
        train(second, x, 3)
    load(second, tmp_path)
    assert second.optim.step_count == steps
    assert train(second, x, 6) == expected
    assert same(parameters(), end)
    assert same(second.optim.get_state(), state)
    assert second.info.step == steps + 5


@pytest.mark.parametrize("missing", ["optim.pt", "rng.pt", "params.pt"])
def test_resuming_without_a_part_is_not_exact(missing: str, tmp_path: Path) -> None:
    """Negative control: each of the three files matters."""
    make, x = SETUPS["others"]
    first = make()
    train(first, x, 1)
    save(first, tmp_path)
    stale = (tmp_path / missing).read_bytes()
    train(first, x, 6)
    save(first, tmp_path)
    expected = train(first, x, 6)
    (tmp_path / missing).write_bytes(stale)
    pyro.clear_param_store()
    second = make()
    load(second, tmp_path)
    assert train(second, x, 6) != expected


@by_setup
def test_a_state_is_plain_and_loads_with_weights_only(setup: str, tmp_path: Path) -> None:
    make, x = SETUPS[setup]
    svi = make()
    train(svi, x, 3)
    state = svi.optim.get_state()
    assert_plain(state)
    svi.optim.save(str(tmp_path / "optim.pt"))
    assert same(torch.load(tmp_path / "optim.pt", weights_only=True), state)


def assert_plain(value: Any) -> None:
    if isinstance(value, dict):
        assert type(value) is dict
        for key, item in value.items():
            assert_plain(key)
            assert_plain(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            assert_plain(item)
    else:
        assert type(value) in {Tensor, float, int, str, bool, type(None)}, type(value)


@by_setup
def test_a_state_goes_round_at_once(setup: str) -> None:
    make, x = SETUPS[setup]
    svi = make()
    train(svi, x, 3)
    state = copy.deepcopy(svi.optim.get_state())
    train(svi, x, 4)
    assert not same(svi.optim.get_state(), state)
    svi.optim.set_state(copy.deepcopy(state))
    assert same(svi.optim.get_state(), state)
    fresh = make().optim
    fresh.set_state(copy.deepcopy(state))
    assert fresh.step_count == 3
    assert same(fresh.get_state(), state)


def test_a_state_from_before_the_first_step_is_a_start() -> None:
    empty = gaussian().optim.get_state()
    svi = gaussian()
    svi.optim.set_state(empty)
    train(svi, X, 2)
    assert svi.optim.step_count == 2


@pytest.mark.parametrize("setup", ["natural", "others", "wake-sleep"])
def test_a_state_in_memory_is_not_changed_by_further_training(setup: str) -> None:
    make, x = SETUPS[setup]
    svi = make()
    train(svi, x, 3)
    state = svi.optim.get_state()
    before = copy.deepcopy(state)
    train(svi, x, 6)
    assert same(state, before)


def small_model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(param("top", 1, 2), 1.0).to_event(1))
        loc = linear(z, param("W", 2, 1, 2), param("b", 3, 1))
        pyro.sample("x", dist.Normal(loc, param("s", 4).exp()).to_event(1), obs=x)


MISMATCHES: dict[str, tuple[Callable[[], NaturalSVI], Tensor, str]] = {
    "family": (binary, BITS, "h, .* of the model"),
    "no guide geometry": (
        lambda: gaussian(guide_geometry=Euclidean()),
        X,
        "geometry of the guide",
    ),
    "exclusion": (lambda: gaussian(exclude=["top"]), X, "top"),
    "shapes": (
        lambda: NaturalSVI(
            lambda x: small_model(x[:, :1]), guide, NaturalGradient(geometry=Full("posterior"))
        ),
        X,
        "W, b of the model",
    ),
}


@pytest.mark.parametrize("other", MISMATCHES)
def test_a_state_of_another_program_changes_nothing(other: str) -> None:
    make, x, words = MISMATCHES[other]
    stranger = make()
    train(stranger, x, 3)
    strange = stranger.optim.get_state()
    pyro.clear_param_store()
    svi = gaussian()
    train(svi, X, 3)
    before = copy.deepcopy(svi.optim.get_state()), parameters()
    with pytest.raises(CheckpointMismatch, match=words):
        svi.optim.set_state(strange)
    assert same(before[0], svi.optim.get_state())
    assert same(before[1], parameters())
    assert math.isfinite(svi.step(X))


def test_a_state_of_another_program_is_refused_at_the_first_step_and_can_be_replaced() -> None:
    stranger = binary()
    train(stranger, BITS, 3)
    strange = stranger.optim.get_state()
    pyro.clear_param_store()
    first = gaussian()
    train(first, X, 3)
    right = copy.deepcopy(first.optim.get_state())
    svi = gaussian()
    svi.optim.set_state(strange)
    before = parameters()
    for _ in range(2):
        with pytest.raises(CheckpointMismatch, match="h, .* of the model"):
            svi.step(X)
    assert same(before, parameters())
    svi.optim.set_state(right)
    svi.step(X)
    assert svi.optim.step_count == 4


@pytest.mark.parametrize(
    "state", [{}, {"loc": {}}, {"format": 1}, {"format": 99, "sides": {}}], ids=str
)
@pytest.mark.parametrize("bound", [False, True])
def test_what_is_not_a_state_is_refused(state: dict[str, Any], bound: bool) -> None:
    svi = gaussian()
    if bound:
        svi.step(X)
    before = copy.deepcopy(svi.optim.get_state())
    with pytest.raises(CheckpointMismatch, match="not a state of NaturalGradient"):
        svi.optim.set_state(state)
    assert same(before, svi.optim.get_state())


# --- who moves what ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "natural", "scaled", "others"),
    [
        ({}, "W b q.W q.b q.s s top", "", ""),
        ({"guide_geometry": Euclidean()}, "W b s top", "q.W q.b q.s", ""),
        ({"geometry": Euclidean()}, "q.W q.b q.s", "W b s top", ""),
        (
            {"guide_geometry": Euclidean(), "others": Adam({"lr": 0.1})},
            "W b s top",
            "",
            "q.W q.b q.s",
        ),
        ({"exclude": "q.*"}, "W b s top", "", "q.W q.b q.s"),
        # W and b are one block: a block that holds an excluded parameter is left out whole.
        ({"exclude": ["W"]}, "q.W q.b q.s s top", "", "W b"),
        ({"exclude": ["nobody"]}, "W b q.W q.b q.s s top", "", ""),
    ],
    ids=str,
)
def test_every_parameter_has_one_owner(
    options: dict[str, Any], natural: str, scaled: str, others: str
) -> None:
    svi = gaussian(**options)
    svi.step(X)
    found = svi.optim.assignment(sorted(parameters()))
    for kind, names in {"natural": natural, "scaled": scaled, "others": others}.items():
        assert {name for name, owner in found.items() if owner == kind} == set(names.split())


def test_guides_are_natural_only_where_their_draws_are_reparametrized() -> None:
    first, second = gaussian(), binary()
    first.step(X)
    assert first.optim.sides["guide"].natural
    pyro.clear_param_store()
    second.step(BITS)
    assert not second.optim.sides["guide"].natural
    assert second.optim.sides["model"].natural


# --- step rules in a training ------------------------------------------------------------------


@pytest.mark.parametrize("radius", [1e-3, 0.1, math.inf])
def test_the_trust_region_bounds_every_step(radius: float) -> None:
    svi = gaussian(trust_region=KLTrustRegion(radius))
    free = gaussian()
    losses = train(free, X, 1)
    assert free.info.kl > 0.1
    pyro.clear_param_store()
    found = []
    for _ in range(8):
        svi.step(X)
        found.append(svi.info.kl)
    assert all(kl <= radius * (1 + 1e-9) for kl in found)
    assert max(found) == pytest.approx(min(radius, max(found)))
    assert losses


@pytest.mark.parametrize("radius", [1e-6, 1e-4])
def test_a_bounded_step_has_the_divergence_it_reports(radius: float) -> None:
    """Against the true divergence of a Gaussian whose mean moves."""

    def plain(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(param("loc", 1, 3), 2.0).to_event(1), obs=x)

    optim = NaturalGradient(geometry=Full("model"), trust_region=KLTrustRegion(radius))
    svi = NaturalSVI(plain, lambda x: None, optim)
    plain(X)
    before = parameters()["loc"]
    svi.step(X)
    moved = parameters()["loc"] - before
    divergence = len(X) * float(moved.square().sum()) / (2 * 4.0)
    assert svi.info.kl == pytest.approx(radius, rel=1e-9)
    assert divergence == pytest.approx(radius, rel=1e-9)


@pytest.mark.parametrize(
    "schedule",
    [LinearDecay(0.1, 4), InverseTime(0.1, 2.0), lambda step: 0.1 / 2**step],
    ids=["linear", "inverse", "function"],
)
def test_a_schedule_sets_the_rate_of_every_step(schedule: Callable[[int], float]) -> None:
    svi = NaturalSVI(model, guide, NaturalGradient(lr=schedule))
    rates = []
    for _ in range(6):
        svi.step(X)
        rates.append(svi.info.lr)
    assert rates == [schedule(step) for step in range(6)]
    assert rates[-1] < rates[0]


@pytest.mark.parametrize("refresh", [1, 3, 5])
def test_curvature_is_measured_when_it_is_due(refresh: int) -> None:
    svi = gaussian(curvature=RunningAverage(refresh=refresh))
    assert svi.optim.due == {"model", "guide"}
    measured = []
    for _ in range(10):
        svi.step(X)
        measured.append(svi.info.refreshed)
    assert measured == [step % refresh == 0 for step in range(10)]


def test_measurements_get_rarer_as_training_lasts() -> None:
    rule = RunningAverage(refresh=5, longest=20)
    due = [step for step in range(480) if rule.is_due(step)]
    gaps = [after - before for before, after in pairwise(due)]
    assert gaps == [5] * 10 + [10] * 5 + [20] * 18
    fixed = [step for step in range(480) if RunningAverage(refresh=5).is_due(step)]
    assert fixed == list(range(0, 480, 5))
    hasty = RunningAverage(refresh=5, longest=20, patience=2)
    due = [step for step in range(60) if hasty.is_due(step)]
    assert due == [0, 5, 10, 20, 40]
    halfway = [step for step in range(60) if hasty.is_due(step, halfway=True)]
    assert halfway == [2, 7, 15, 30, 50]
    with pytest.raises(ValueError, match="longest"):
        RunningAverage(refresh=5, longest=4)
    with pytest.raises(ValueError, match="patience"):
        RunningAverage(patience=0)


@pytest.mark.parametrize("geometry", [Full(), Euclidean()])
def test_programs_are_measured_apart_where_the_rule_is_alternating(geometry: Any) -> None:
    """A guide without a metric costs little, and is measured along with the model."""

    def measured(alternating: bool) -> list[tuple[bool, int, int]]:
        pyro.clear_param_store()
        rule = RunningAverage(refresh=4, alternating=alternating)
        svi = gaussian(curvature=rule, guide_geometry=geometry)
        counts = []
        for _ in range(8):
            svi.step(X)
            sides = svi.optim.sides
            counts.append((svi.info.refreshed, sides["model"].refreshes, sides["guide"].refreshes))
        return counts

    together = [(step % 4 == 0, 1 + step // 4, 1 + step // 4) for step in range(8)]
    apart = [(step % 2 == 0, 1 + step // 4, 1 + (step + 2) // 4) for step in range(8)]
    assert measured(alternating=False) == together
    assert measured(alternating=True) == (apart if geometry == Full() else together)


def test_a_program_without_blocks_is_not_run_to_be_measured() -> None:
    runs = []

    def fixed_model(x: Tensor) -> None:
        runs.append(len(x))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def global_guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(param("loc", 1), 1.0))

    svi = NaturalSVI(fixed_model, global_guide, NaturalGradient(curvature=RunningAverage(0.0, 1)))
    train(svi, X[:, 0], 2)
    runs.clear()
    svi.step(X[:, 0])
    assert svi.info.refreshed and len(runs) == 1


def test_a_step_that_measures_one_program_leaves_the_other_as_it_was() -> None:
    svi = gaussian(curvature=RunningAverage(refresh=4, alternating=True))
    train(svi, X, 2)
    before = dict(svi.optim.sides)
    assert svi.optim.due == {"guide"}
    svi.step(X)
    after = svi.optim.sides
    assert after["model"] is before["model"] and after["guide"] is not before["guide"]


def test_the_average_of_curvature_is_the_running_one() -> None:
    """Precision of a Gaussian whose scale the data's arguments set: G = N / scale²."""

    def plain(x: Tensor, scale: float) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(param("loc", 1), scale), obs=x)

    rule = RunningAverage(decay=0.6, refresh=1)
    svi = NaturalSVI(plain, lambda x, scale: None, NaturalGradient(curvature=rule))
    expected = 0.0
    for count, scale in enumerate([1.0, 2.0, 0.5, 1.0, 3.0]):
        svi.step(X[:, 0], scale)
        share = max(0.4, 1 / (count + 1))
        expected += share * (20 / scale**2 - expected)
        (curvature,) = svi.optim.sides["model"].average.values()
        assert curvature.matrix.item() == pytest.approx(expected, rel=1e-12)


def test_state_of_another_kind_of_others_is_refused():
    state = NaturalGradient(others=Adam({"lr": 0.01})).get_state()
    for other in (None, pyro.optim.SGD({"lr": 0.01})):
        with pytest.raises(CheckpointMismatch, match="Adam"):
            NaturalGradient(others=other).set_state(state)
    NaturalGradient(others=Adam({"lr": 0.1})).set_state(state)
