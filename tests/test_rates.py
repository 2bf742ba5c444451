"""Learning rates of single parameters, schedules of torch and Pyro, bounds on gradients."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import X, guide, model, param
from pyro.infer import SVI, Trace_ELBO
from states import parameters, same
from torch import Tensor
from torch.optim import lr_scheduler

from pyronat import Euclidean, Full, NaturalGradient, NaturalSVI, Visible
from pyronat.errors import UnknownName
from pyronat.steps import (
    Clip,
    ConstantDamping,
    FromTorch,
    HeldOut,
    KLTrustRegion,
    LevenbergMarquardt,
    LinearDecay,
    PerName,
    ReachScaledAdam,
)


def trained(steps: int = 6, **options: Any) -> tuple[NaturalSVI, dict[str, Tensor]]:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    svi = NaturalSVI(model, guide, NaturalGradient(**{"lr": 0.05, **options}))
    for _ in range(steps):
        svi.step(X)
    return svi, parameters()


def changes(**options: Any) -> dict[str, Tensor]:
    """What the first step does."""
    before = trained(0)[1]
    model(X)
    guide(X)
    before = parameters()
    after = trained(1, **options)[1]
    return {name: after[name] - before[name] for name in after}


# --- factors by name ---------------------------------------------------------------------------


def test_factors_of_one_change_nothing() -> None:
    expected, end = trained()
    found, other = trained(lr=PerName(0.05, {"W": 1.0, "*": 1.0}))
    assert same(end, other)
    assert vars(found.info) | {"seconds": 0} == vars(expected.info) | {"seconds": 0}


@pytest.mark.parametrize("guide_geometry", [None, Euclidean()], ids=["natural", "scaled"])
def test_every_change_has_its_factor(guide_geometry: Any) -> None:
    plain = changes(guide_geometry=guide_geometry)
    factors = {"q.*": 0.5, "W": 2.0, "q.b": 0.0, "top": LinearDecay(0.3, 10)}
    found = changes(lr=PerName(0.05, factors), guide_geometry=guide_geometry)
    expected = {"q.W": 0.5, "q.s": 0.5, "q.b": 0.0, "W": 2.0, "top": 0.3}
    for name, change in found.items():
        factor = expected.get(name, 1.0)
        assert torch.allclose(change, factor * plain[name], rtol=1e-10, atol=1e-14), name
        assert name == "q.b" or bool((plain[name] != 0).all())


def test_factors_follow_their_schedules() -> None:
    schedule = PerName(LinearDecay(0.1, 4), {"a*": 0.5, "ab": lambda step: 0.1 * step})
    assert [schedule(step) for step in (0, 2)] == [0.1, 0.05]
    assert [schedule.factor("ac", step) for step in (0, 9)] == [0.5, 0.5]
    assert [schedule.factor("ab", step) for step in (0, 2)] == [0.0, 0.2]
    assert schedule.factor("b", 3) == 1.0


FREE = KLTrustRegion(network=math.inf, guide=math.inf, model=math.inf)


def two_locations(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(param("first", 1), 2.0), obs=x[:, 0])
        pyro.sample("y", dist.Normal(param("second", 2), 0.5), obs=x[:, 1])


@pytest.mark.parametrize("radius", [math.inf, 1e-3])
def test_divergence_and_bound_are_those_of_the_scaled_step(radius: float) -> None:
    """Against the divergence of Gaussians whose means move: N Σ Δ² / 2σ²."""
    lr = PerName(0.2, {"first": 3.0, "second": 0.5})
    optim = NaturalGradient(lr, Full("posterior"), trust_region=KLTrustRegion(radius))
    svi = NaturalSVI(two_locations, lambda x: None, optim)
    svi.evaluate_loss(X)
    for _ in range(3):
        before = parameters()
        svi.step(X)
        moved = {name: float(value - before[name]) for name, value in parameters().items()}
        expected = len(X) / 2 * (moved["first"] ** 2 / 4 + moved["second"] ** 2 / 0.25)
        assert svi.info is not None
        assert svi.info.kl == pytest.approx(expected, rel=1e-9)
        assert svi.info.kl <= radius * (1 + 1e-9)
    assert math.isinf(radius) or svi.info.kl == pytest.approx(radius)


def test_a_common_factor_is_a_smaller_rate() -> None:
    """Predictions too: the rule that adapts the mixing to them goes the same way."""
    damping = ConstantDamping(0.1)
    options = {"damping": damping, "geometry": Full("posterior"), "trust_region": FREE}
    half, there = trained(lr=PerName(0.1, {"*": 0.5}), **options)
    plain, here = trained(lr=0.05, **options)
    assert all(torch.allclose(there[name], here[name], rtol=1e-9) for name in here)
    assert half.info.kl == pytest.approx(plain.info.kl)


@pytest.mark.parametrize("others", [None, pyro.optim.Adam({"lr": 0.01})], ids=["scaled", "adam"])
@pytest.mark.parametrize("pattern", ["nobody", "W*W", "q.*"])
def test_factors_for_nobody_are_refused(pattern: str, others: Any) -> None:
    def make(*patterns: str) -> NaturalSVI:
        lr = PerName(0.1, dict.fromkeys(patterns, 0.5))
        optim = NaturalGradient(lr, guide_geometry=Euclidean(), others=others)
        return NaturalSVI(model, guide, optim)

    svi = make("W", pattern)
    if pattern == "q.*" and others is None:
        svi.step(X)
        return
    for _ in range(2):
        with pytest.raises(UnknownName, match=re.escape(pattern) + "' in lr=.*W, b"):
            svi.step(X)
    make("W").step(X)


@pytest.mark.parametrize("factor", [-0.1, math.inf, math.nan])
def test_impossible_factors_are_refused(factor: float) -> None:
    with pytest.raises(ValueError, match="'W'"):
        PerName(0.1, {"W": factor})


@pytest.mark.parametrize(
    "options",
    [{"lr": PerName(0.1, {"W": 2.0})}, {"clip": Clip(natural=1.0)}],
    ids=["factors", "clip"],
)
def test_adaptive_rules_set_their_lengths_themselves(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="sets the length"):
        NaturalGradient(damping=LevenbergMarquardt(), **options)
    NaturalGradient(geometry=Visible(HeldOut()), **options)


# --- schedules of torch ------------------------------------------------------------------------

TORCH: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "step": lambda o: lr_scheduler.StepLR(o, 3, gamma=0.5),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.4, total_steps=20),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "warm up": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, 0.1, total_iters=4), lr_scheduler.ExponentialLR(o, 0.8)],
        milestones=[4],
    ),
}


# Torch's own schedulers call each other in a way that an early torch warns of.
@pytest.mark.filterwarnings("ignore:The epoch parameter")
@pytest.mark.parametrize("name", TORCH)
def test_schedulers_of_torch_are_schedules(name: str) -> None:
    leaf = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.SGD([leaf], lr=0.2)
    scheduler = TORCH[name](optimizer)
    expected = []
    for _ in range(20):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    schedule = FromTorch(TORCH[name], 0.2)
    assert schedule(11) == expected[11]
    assert [schedule(step) for step in range(20)] == expected
    assert len(set(expected)) > 3


def test_a_scheduler_of_torch_sets_the_rate_of_steps() -> None:
    svi, _ = trained(5, lr=FromTorch(TORCH["lambda"], 0.2))
    assert svi.info is not None
    assert svi.info.lr == pytest.approx(0.2 * 0.9**4)


def test_plateaus_are_no_schedule() -> None:
    schedule = FromTorch(lambda o: lr_scheduler.ReduceLROnPlateau(o), 0.1)
    with pytest.raises(TypeError, match="metric"):
        schedule(0)


# --- schedulers of Pyro ------------------------------------------------------------------------


def scheduler(kind: str) -> Any:
    arguments = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.05}}
    if kind == "exponential":
        return pyro.optim.ExponentialLR({**arguments, "gamma": 0.5})
    if kind == "lambda":
        return pyro.optim.LambdaLR({**arguments, "lr_lambda": lambda epoch: 1 / (1 + epoch)})
    return pyro.optim.ReduceLROnPlateau({**arguments, "patience": 0, "threshold": 10.0})


def epoch_ends(others: Any, kind: str, loss: float) -> None:
    others.step(*([loss] if kind == "plateau" else []))


def with_scheduler(kind: str) -> tuple[NaturalSVI, Any]:
    others = scheduler(kind)
    optim = NaturalGradient(lr=0.0, guide_geometry=Euclidean(), others=others)
    return NaturalSVI(model, guide, optim), others


kinds = pytest.mark.parametrize("kind", ["exponential", "lambda", "plateau"])


@kinds
def test_schedulers_of_pyro_go_as_in_stock_svi(kind: str) -> None:
    """With the model held still, to the last bit."""

    def trajectory(natural: bool, steps: bool = True) -> list[dict[str, Tensor]]:
        pyro.clear_param_store()
        model(X)
        guide(X)
        pyro.set_rng_seed(7)
        if natural:
            svi, others = with_scheduler(kind)
        else:
            others = scheduler(kind)
            still = pyro.poutine.block(model, hide=["W", "b", "s", "top"])
            svi: Any = SVI(still, guide, others, Trace_ELBO())  # type: ignore[no-redef]
        path = []
        for step in range(9):
            loss = svi.step(X)
            path.append(parameters())
            if steps and step % 3 == 2:
                epoch_ends(others, kind, loss)
        return path

    ours, stock = trajectory(True), trajectory(False)
    for mine, theirs in zip(ours, stock, strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    if kind != "plateau":  # the loss is worse only by chance
        assert not same(ours[-1], trajectory(True, steps=False)[-1])


@kinds
def test_schedulers_of_pyro_resume(kind: str, tmp_path: Path) -> None:
    """A scheduler may step between `load` and the next step."""

    def go_on(svi: NaturalSVI, others: Any) -> tuple[list[float], dict[str, Tensor]]:
        losses = []
        for _ in range(3):
            epoch_ends(others, kind, 1e9)
            losses.append(svi.step(X))
        rates = {single.optimizer.param_groups[0]["lr"] for single in others.optim_objs.values()}
        assert len(rates) == 1 and max(rates) < 0.05
        return losses, parameters()

    svi, others = with_scheduler(kind)
    for _ in range(2):
        epoch_ends(others, kind, svi.step(X))
    svi.save(tmp_path / "checkpoint.pt")
    expected = go_on(svi, others)
    svi.load(tmp_path / "checkpoint.pt")
    assert same(go_on(svi, others), expected)
    pyro.clear_param_store()
    svi, others = with_scheduler(kind)
    svi.evaluate_loss(X)
    svi.load(tmp_path / "checkpoint.pt")
    svi.step(X)
    svi.load(tmp_path / "checkpoint.pt")
    assert same(go_on(svi, others), expected)


def test_a_scheduler_steps_on_after_a_rejected_step() -> None:
    svi, others = with_scheduler("exponential")
    svi.step(X)
    before = others.optim_objs.copy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        svi.step(1e200 * X)
    assert svi.info is not None and not svi.info.accepted
    assert others.optim_objs.keys() == before.keys()
    others.step()
    rates = {single.optimizer.param_groups[0]["lr"] for single in others.optim_objs.values()}
    assert rates == {0.025}


# --- bounds on gradients -----------------------------------------------------------------------


def test_wide_bounds_change_nothing() -> None:
    expected, end = trained()
    found, other = trained(clip=Clip(natural=1e9, euclidean=1e9))
    assert all(torch.allclose(end[name], other[name], rtol=1e-12) for name in end)
    assert found.info.kl == pytest.approx(expected.info.kl)


def test_a_bound_on_the_natural_gradient_holds_for_all_parameters_together() -> None:
    free, _ = trained(1)
    assert free.info is not None
    bound = free.info.natural_norm / 3
    plain, found = changes(), changes(clip=Clip(natural=bound))
    for name in plain:
        assert torch.allclose(found[name], plain[name] / 3, rtol=1e-9)
    clipped, _ = trained(1, clip=Clip(natural=bound))
    assert clipped.info is not None
    assert clipped.info.kl == pytest.approx(free.info.kl / 9)
    assert clipped.info.natural_norm == pytest.approx(free.info.natural_norm)


@pytest.mark.parametrize("bound", [1.0, 1e6])
def test_a_bound_on_other_gradients_is_the_one_of_torch(bound: float) -> None:
    """SGD moves by lr · g, so all its changes together have norm lr · bound."""
    options = {
        "guide_geometry": Euclidean(),
        "others": pyro.optim.SGD({"lr": 0.01}),
        "clip": Clip(euclidean=bound),
    }
    model(X)
    guide(X)
    before = parameters()
    pyro.set_rng_seed(0)
    NaturalSVI(model, guide, NaturalGradient(**options)).step(X)
    found = {name: value - before[name] for name, value in parameters().items()}
    pyro.clear_param_store()
    model(X)
    guide(X)
    leaves = {n: p for n, p in pyro.get_param_store().named_parameters() if n.startswith("q.")}
    pyro.set_rng_seed(0)
    Trace_ELBO().loss_and_grads(model, guide, X)
    norm = torch.nn.utils.clip_grad_norm_(list(leaves.values()), bound)
    assert 1.0 < norm < 1e6
    for name, leaf in leaves.items():
        assert torch.allclose(found[name], -0.01 * leaf.grad, rtol=1e-6, atol=1e-12), name


def test_the_scaled_adam_sees_bounded_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    step = ReachScaledAdam.step

    def spy(self: ReachScaledAdam, gradient: Tensor, *rest: Any) -> Any:
        seen.append(gradient.clone())
        return step(self, gradient, *rest)

    monkeypatch.setattr(ReachScaledAdam, "step", spy)
    trained(1, guide_geometry=Euclidean(), clip=Clip(euclidean=0.5))
    assert len(seen) == 3
    assert torch.cat([part.reshape(-1) for part in seen]).norm() == pytest.approx(0.5)


@pytest.mark.parametrize("bounds", [{"natural": 0.0}, {"euclidean": -1.0}])
def test_impossible_bounds_are_refused(bounds: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="positive"):
        Clip(**bounds)
