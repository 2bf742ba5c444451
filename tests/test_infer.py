"""`NaturalSVI`, the only writer of parameters: what it takes, what it refuses, what it leaves."""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from collections.abc import Callable
from typing import Any

import programs
import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import X, guide, model, param
from pyro.infer import SVI, Trace_ELBO
from states import parameters, same
from torch import Tensor
from torch.nn.functional import linear

import pyronat
from pyronat import Euclidean, Full, NaturalGradient, NaturalSVI
from pyronat.errors import (
    InvalidData,
    NonFiniteStep,
    StructureChanged,
    UnassignedParameter,
    UnsupportedDistribution,
)
from pyronat.steps import ConstantDamping, RunningAverage

Program = Callable[..., Any]


MODEL_PARAMS = ("W", "b", "s", "top")
GUIDE_PARAMS = ("q.W", "q.b", "q.s")

OPTIMIZERS: dict[str, Callable[[], NaturalGradient]] = {
    "natural": lambda: NaturalGradient(lr=0.05),
    "scaled adam": lambda: NaturalGradient(lr=0.05, guide_geometry=Euclidean()),
    "others": lambda: NaturalGradient(
        lr=0.05, guide_geometry=Euclidean(), others=pyro.optim.Adam({"lr": 0.01})
    ),
    "excluded": lambda: NaturalGradient(
        lr=0.05, exclude=["W", "q.*"], others=pyro.optim.SGD({"lr": 1e-4, "momentum": 0.9})
    ),
}
by_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)


def snapshot(svi: NaturalSVI) -> dict[str, Any]:
    state = svi.optim.get_state()
    return copy.deepcopy({"params": parameters(), "optim": state})


class unchanged:
    """Asserts that its body changes no parameter and no optimizer state, and leaves no gradient."""

    def __init__(self, svi: NaturalSVI) -> None:
        self.svi, self.before = svi, snapshot(svi)

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, *error: Any) -> None:
        if kind is None:
            assert same(self.before, snapshot(self.svi))
            leaves = pyro.get_param_store().named_parameters()
            assert all(leaf.grad is None for _, leaf in leaves)


def warm(optimizer: str, steps: int = 3) -> NaturalSVI:
    svi = NaturalSVI(model, guide, OPTIMIZERS[optimizer]())
    for _ in range(steps):
        svi.step(X)
    return svi


def assert_next_step_is_good(svi: NaturalSVI) -> None:
    before = parameters()
    loss = svi.step(X)
    assert math.isfinite(loss)
    assert svi.info.accepted
    after = parameters()
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_the_state_comparison_can_fail() -> None:
    """Negative control of `unchanged`."""
    svi = warm("others")
    for change in (
        lambda: svi.step(X),
        lambda: svi.optim.set_state({**svi.optim.get_state(), "step_count": 77}),
        lambda: pyro.param("W").data.add_(1e-15),
    ):
        with pytest.raises(AssertionError), unchanged(svi):
            change()


# --- a step ------------------------------------------------------------------------------------


@by_optimizer
def test_a_step_moves_every_parameter_and_describes_itself(optimizer: str) -> None:
    svi = warm(optimizer)
    assert_next_step_is_good(svi)
    info = svi.info
    assert (info.step, info.accepted, info.refreshed, info.ess) == (3, True, False, None)
    assert info.lr == pytest.approx(0.05)
    for name in ("loss", "kl", "grad_norm", "natural_norm", "cosine", "damping", "seconds"):
        assert math.isfinite(getattr(info, name)), name
    assert 0 < info.cosine <= 1
    assert min(info.kl, info.grad_norm, info.natural_norm, info.damping, info.seconds) > 0
    assert set(dataclasses.asdict(info)) >= {"mixing", "jitter"}


def test_loss_and_gradient_are_those_of_stock_pyro() -> None:
    svi = warm("natural", 1)
    store = pyro.get_param_store()
    leaves = dict(store.named_parameters())
    pyro.set_rng_seed(5)
    expected = Trace_ELBO().loss_and_grads(model, guide, X)
    norm = torch.cat([leaf.grad.reshape(-1) for leaf in leaves.values()]).norm().item()
    for leaf in leaves.values():
        leaf.grad = None
    pyro.set_rng_seed(5)
    assert svi.step(X) == pytest.approx(expected, rel=1e-12)
    assert svi.info.grad_norm == pytest.approx(norm, rel=1e-12)


def test_evaluate_loss_changes_nothing() -> None:
    svi = warm("natural")
    with unchanged(svi):
        pyro.set_rng_seed(5)
        value = svi.evaluate_loss(X)
    pyro.set_rng_seed(5)
    assert value == pytest.approx(Trace_ELBO().loss(model, guide, X), rel=1e-12)
    assert isinstance(value, float)


def test_natural_gradient_in_stock_svi_names_the_way_out() -> None:
    svi = SVI(model, guide, NaturalGradient(), Trace_ELBO())
    with pytest.raises(pyronat.PyronatError, match="NaturalSVI"):
        svi.step(X)


@pytest.mark.parametrize(
    "optim", [pyro.optim.Adam({"lr": 0.1}), torch.optim.Adam, None, 0.1], ids=str
)
def test_other_optimizers_are_refused(optim: Any) -> None:
    with pytest.raises(TypeError, match=r"NaturalGradient.*others="):
        NaturalSVI(model, guide, optim)


# --- not finite --------------------------------------------------------------------------------


def with_entry(x: Tensor, entry: float) -> Tensor:
    x = x.clone()
    x[3, 1] = entry
    return x


@by_optimizer
@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("steps", [0, 3, 5])
@pytest.mark.parametrize("entry", [math.nan, math.inf])
def test_data_that_are_not_finite_are_refused(
    optimizer: str, validate: bool, steps: int, entry: float
) -> None:
    """Before the first step, between two refreshes, and at a refresh."""
    model(X)
    guide(X)
    svi = warm(optimizer, steps)
    before = parameters()
    with pyro.validation_enabled(validate), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(4):
            if steps:
                with unchanged(svi), pytest.raises(InvalidData, match="NaN"):
                    svi.step(with_entry(X, entry))
            else:
                with pytest.raises(InvalidData, match="NaN"):
                    svi.step(with_entry(X, entry))
    assert same(before, parameters())
    assert_next_step_is_good(svi)


@pytest.mark.parametrize("entry", [math.nan, math.inf, -math.inf])
def test_data_that_are_not_finite_are_refused_as_no_argument_too(entry: float) -> None:
    data = {"x": X}

    def closed() -> None:
        model(data["x"])

    def closed_guide() -> None:
        guide(X)

    svi = NaturalSVI(closed, closed_guide, NaturalGradient(lr=0.05))
    svi.step()
    data["x"] = with_entry(X, entry)
    with pyro.validation_enabled(False), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with unchanged(svi), pytest.raises(InvalidData, match="'x'.*poutine.mask"):
            svi.step()


@by_optimizer
def test_the_third_infinite_loss_in_a_row_stops_training(optimizer: str) -> None:
    svi = warm(optimizer)
    infinite = 1e200 * X
    with unchanged(svi), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            assert not math.isfinite(svi.step(infinite))
            assert not svi.info.accepted
            assert not math.isfinite(svi.info.loss)
    # a good step in between starts the count anew
    assert_next_step_is_good(svi)
    with unchanged(svi), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            svi.step(infinite)
        with pytest.raises(NonFiniteStep, match="3 steps in a row.*last good step"):
            svi.step(infinite)
    assert_next_step_is_good(svi)


@pytest.mark.parametrize(
    "others",
    [
        lambda: pyro.optim.SGD({"lr": 1e300, "momentum": 0.9}),
        lambda: pyro.optim.ClippedAdam({"lr": math.inf}),
    ],
    ids=["sgd", "adam"],
)
@pytest.mark.parametrize("good_steps", [0, 2])
def test_an_infinite_step_of_the_other_optimizer_is_taken_back(
    others: Callable[[], Any], good_steps: int
) -> None:
    huge = {"value": 1.0}

    def scaled(x: Tensor) -> None:
        with pyro.poutine.scale(scale=huge["value"]):
            guide_free(x)

    def guide_free(x: Tensor) -> None:
        pyro.sample("x", dist.Normal(param("loc", 1, 3), 1.0).expand(x.shape).to_event(2), obs=x)

    def nothing(x: Tensor) -> None:
        pass

    optimizer = pyro.optim.SGD({"lr": 1e-3, "momentum": 0.9})
    optim = NaturalGradient(exclude=["loc"], others=optimizer)
    svi = NaturalSVI(scaled, nothing, optim)
    for _ in range(good_steps):
        svi.step(X)
    if good_steps:
        # The optimizers exist: what is too large is the gradient, which is finite itself.
        for single in optimizer.optim_objs.values():
            single.param_groups[0]["lr"] = 1e300
    else:
        optim.others = others()
    huge["value"] = 1e20
    before = parameters()
    state = copy.deepcopy(optim.get_state()["others"])
    svi.step(X)
    assert math.isfinite(svi.info.loss)
    assert not svi.info.accepted
    assert optim.step_count == good_steps
    leaf = pyro.param("loc").unconstrained()
    assert bool(torch.isfinite(leaf).all())
    if good_steps:
        assert same(before, parameters())
        assert same(state, optim.get_state()["others"])


# --- batches -----------------------------------------------------------------------------------


@by_optimizer
def test_an_empty_batch_is_refused(optimizer: str) -> None:
    svi = warm(optimizer)
    with unchanged(svi), pytest.raises(pyronat.PyronatError, match=r"empty|no data"):
        svi.step(X[:0])
    assert_next_step_is_good(svi)


def test_an_empty_first_batch_is_refused() -> None:
    svi = NaturalSVI(model, guide, NaturalGradient(lr=0.05))
    with pytest.raises(InvalidData, match="batch is empty"):
        svi.step(X[:0])
    assert_next_step_is_good(svi)


@by_optimizer
@pytest.mark.parametrize(
    "wrong", [X[:, :2], X.T, X.unsqueeze(0)], ids=["narrow", "transposed", "deep"]
)
def test_wrong_shapes_change_nothing(optimizer: str, wrong: Tensor) -> None:
    svi = warm(optimizer)
    with unchanged(svi), pytest.raises((ValueError, RuntimeError)):
        svi.step(wrong)
    assert_next_step_is_good(svi)


def test_batches_of_other_sizes_are_welcome() -> None:
    svi = warm("natural")
    for size in (1, 7, 20, 3):
        svi.step(X[:size])
        assert svi.info.accepted


# --- structure ---------------------------------------------------------------------------------


def switched() -> tuple[NaturalSVI, dict[str, str]]:
    """A program whose structure follows a switch, after two good steps."""
    mode = {"now": "as before"}

    def changing(x: Tensor) -> None:
        with pyro.plate("data", x.shape[0]):
            if mode["now"] == "other shape":
                pyro.get_param_store()["loc"] = torch.tensor([1.0])
            loc = torch.tensor(0.5) if mode["now"] == "missing parameter" else param("loc", 1)
            if mode["now"] == "late parameter":
                loc = loc + param("late", 2)
            if mode["now"] == "other site":
                pyro.sample("w", dist.Normal(0.0, 1.0), obs=x[:, 0])
            fn = dist.Normal(loc, 1.0)
            if mode["now"] == "other family":
                fn = dist.Uniform(loc - 10, loc + 10)
            name = "y" if mode["now"] == "other name" else "x"
            pyro.sample(name, fn, obs=x[:, 0])

    svi = NaturalSVI(changing, lambda x: None, NaturalGradient(lr=0.05))
    svi.step(X)
    svi.step(X)
    return svi, mode


@pytest.mark.parametrize("refresh", [True, False])
@pytest.mark.parametrize(
    ("change", "error", "culprit"),
    [
        ("other family", UnsupportedDistribution, "x"),
        ("other shape", StructureChanged, "loc"),
    ],
)
def test_a_changed_structure_is_refused(
    change: str, error: type[Exception], culprit: str, refresh: bool
) -> None:
    svi, mode = switched()
    if refresh:
        for _ in range(3):
            svi.step(X)
        assert svi.optim.due
    before = svi.optim.get_state()
    value = pyro.param("loc").item()
    mode["now"] = change
    with pytest.raises(error, match=rf"\b({culprit})\b"):
        svi.step(X)
    assert same(before, svi.optim.get_state())
    mode["now"] = "as before"
    if change != "other shape":
        assert pyro.param("loc").item() == pytest.approx(value, abs=0)
        svi.step(X)
        assert svi.info.accepted


@pytest.mark.parametrize("refresh", [True, False])
@pytest.mark.parametrize(
    ("change", "sites", "blocks"),
    [
        ("late parameter", "x", [("late", "loc")]),
        ("missing parameter", "x", [("loc",)]),
        ("other site", "x w", [("loc",)]),
        ("other name", "x y", [("loc",)]),
    ],
)
def test_a_changed_structure_is_learned(
    change: str, sites: str, blocks: list[tuple[str, ...]], refresh: bool
) -> None:
    svi, mode = switched()
    for _ in range(3 if refresh else 0):
        svi.step(X)
    mode["now"] = change
    for now in (change, "as before", change):
        mode["now"] = now
        svi.step(X)
        assert svi.info.accepted
    assert {site.name for site in svi.net.sites} == set(sites.split())
    assert [block.params for block in svi.net.blocks] == blocks
    known = svi.net
    svi.step(X)
    assert svi.net == known


def test_a_parameter_of_model_and_guide_is_refused_by_name() -> None:
    def sharing(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(linear(x, param("W", 2, 2, 3)), 1.0).to_event(1))

    def shared_model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            loc = linear(z, param("W", 2, 2, 3).T, param("b", 3, 3))
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    svi = NaturalSVI(shared_model, sharing, NaturalGradient())
    with pytest.raises(UnassignedParameter, match="W is used by model and guide.*exclude"):
        svi.step(X)
    # the way out that the message names
    svi = NaturalSVI(shared_model, sharing, NaturalGradient(exclude=["W"]))
    before = parameters()
    svi.step(X)
    assert not torch.equal(before["W"], parameters()["W"])


# --- other optimizers --------------------------------------------------------------------------


def test_excluded_parameters_follow_stock_adam_on_the_same_gradient() -> None:
    """Gradients are captured by hooks; a hand-written Adam must go where `others` went."""
    optim = NaturalGradient(lr=0.05, exclude=["q.W"], others=pyro.optim.Adam({"lr": 0.03}))
    svi = NaturalSVI(model, guide, optim)
    guide(X)
    model(X)
    leaf = pyro.get_param_store()._params["q.W"]
    seen: list[Tensor] = []
    leaf.register_hook(lambda gradient: seen.append(gradient.detach().clone()))
    copied = leaf.detach().clone().requires_grad_()
    adam = torch.optim.Adam([copied], lr=0.03)
    natural = parameters()["q.b"]
    for _ in range(6):
        svi.step(X)
        copied.grad = seen[-1]
        adam.step()
        assert torch.equal(leaf.detach(), copied.detach())
    assert len(seen) == 6
    # Negative control: another rate goes elsewhere, and the others did move by their geometry.
    assert not torch.equal(parameters()["q.b"], natural)
    torch.optim.Adam([copied], lr=0.031).step()
    assert not torch.equal(leaf.detach(), copied.detach())


def test_a_euclidean_guide_with_adam_is_stock_svi_with_adam() -> None:
    """With the model held still, the guide of NaturalSVI and of SVI is the same to the last bit."""

    def trajectory(natural: bool, lr: float = 0.02) -> list[dict[str, Tensor]]:
        pyro.clear_param_store()
        model(X)
        guide(X)
        adam = pyro.optim.Adam({"lr": lr})
        if natural:
            optim = NaturalGradient(lr=0.0, guide_geometry=Euclidean(), others=adam)
            svi: Any = NaturalSVI(model, guide, optim)
        else:
            still = pyro.poutine.block(model, hide=list(MODEL_PARAMS))
            svi = SVI(still, guide, adam, Trace_ELBO())
        pyro.set_rng_seed(7)
        path = []
        for _ in range(12):
            svi.step(X)
            path.append(parameters())
        return path

    ours, stock, control = trajectory(True), trajectory(False), trajectory(False, 0.021)
    for mine, theirs in zip(ours, stock, strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert not torch.equal(ours[-1]["q.W"], control[-1]["q.W"])
    assert not torch.equal(ours[-1]["q.W"], ours[0]["q.W"])


# --- random numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize("expectation", ["pooled", "model"])
def test_dreams_do_not_disturb_the_random_numbers_of_the_loss(expectation: str) -> None:
    def losses(refresh: int, num_runs: int = 1) -> list[float]:
        pyro.clear_param_store()
        model(X)
        guide(X)
        optim = NaturalGradient(
            lr=0.0,
            geometry=Full(expectation, num_runs=num_runs),
            curvature=RunningAverage(refresh=refresh),
        )
        svi = NaturalSVI(model, guide, optim)
        pyro.set_rng_seed(7)
        found = [svi.step(X) for _ in range(5)]
        assert len(set(found)) == 5
        return [*found, torch.rand(()).item()]

    pyro.set_rng_seed(7)
    model(X)
    guide(X)
    pyro.set_rng_seed(7)
    stock = [Trace_ELBO().loss_and_grads(model, guide, X) for _ in range(5)]
    rare = losses(1000)
    assert losses(1) == rare
    assert losses(1, num_runs=3) == rare
    assert rare[:5] == pytest.approx(stock, rel=1e-12)


def test_training_is_deterministic_under_seeds() -> None:
    def trained(seed: int, dreams: int = 0) -> dict[str, Tensor]:
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        svi = NaturalSVI(model, guide, NaturalGradient(lr=0.05, seed=dreams))
        for _ in range(7):
            svi.step(X)
        return parameters()

    first = trained(1)
    assert same(first, trained(1))
    assert not same(first, trained(2))
    assert not same(first, trained(1, dreams=1))


def renamed(names: dict[str, str]) -> tuple[Program, Program]:
    def name_of(name: str) -> str:
        return names.get(name, name)

    def rename(program: Program) -> Program:
        def visit(x: Tensor) -> None:
            original = programs.param
            programs.param = lambda name, *rest: original(name_of(name), *rest)
            try:
                program(x)
            finally:
                programs.param = original

        return visit

    return rename(model), rename(guide)


@pytest.mark.parametrize("optimizer", ["natural", "scaled adam", "others"])
def test_names_do_not_change_the_trajectory(optimizer: str) -> None:
    """Sorting is by name: new names in reverse order must go the same way."""
    names = dict(zip(sorted(MODEL_PARAMS), ("z4", "z3", "z2", "z1"), strict=True))
    names |= dict(zip(sorted(GUIDE_PARAMS), ("y3", "y2", "y1"), strict=True))
    found = {}
    for label, pair in {"plain": (model, guide), "renamed": renamed(names)}.items():
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        svi = NaturalSVI(*pair, OPTIMIZERS[optimizer]())
        for _ in range(12):
            svi.step(X)
        found[label] = parameters()
    assert found["renamed"].keys() == set(names.values())
    for old, new in names.items():
        assert torch.allclose(found["plain"][old], found["renamed"][new], rtol=0, atol=1e-9)


# --- one step by hand --------------------------------------------------------------------------


def test_one_step_is_the_damped_natural_gradient() -> None:
    """loc of a Gaussian: Δ = lr (N + λ)⁻¹ Σ(x − loc), nothing else."""

    def plain(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(param("loc", 1), 1.0), obs=x)

    x = X[:, 0]
    optim = NaturalGradient(lr=0.3, geometry=Full("posterior"), damping=ConstantDamping(2.0))
    svi = NaturalSVI(plain, lambda x: None, optim)
    plain(x)
    before = pyro.param("loc").item()
    svi.step(x)
    gradient = (x - before).sum().item()
    direction = gradient / (len(x) + 2.0)
    assert pyro.param("loc").item() == pytest.approx(before + 0.3 * direction, rel=1e-12)
    info = svi.info
    assert info.kl == pytest.approx(0.5 * 0.09 * len(x) * direction**2, rel=1e-12)
    assert info.grad_norm == pytest.approx(abs(gradient), rel=1e-12)
    assert info.natural_norm == pytest.approx(math.sqrt(gradient * direction), rel=1e-12)
    assert info.cosine == pytest.approx(1.0)
    assert info.damping == pytest.approx(2.0)


def test_initial_parameters_are_those_of_stock_svi():
    def random_model(x):
        loc = pyro.param("loc", lambda: torch.randn(()))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def random_guide(x):
        shift = pyro.param("shift", lambda: torch.randn(()))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x + shift, 1.0))

    initial = []
    for svi in (
        pyronat.NaturalSVI(random_model, random_guide, pyronat.NaturalGradient(lr=0.0)),
        pyro.infer.SVI(
            random_model, random_guide, pyro.optim.SGD({"lr": 0.0}), pyro.infer.Trace_ELBO()
        ),
    ):
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        svi.step(torch.arange(3.0))
        initial.append([pyro.param(name).item() for name in ("loc", "shift")])
    assert initial[0] == initial[1]
