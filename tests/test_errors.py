"""Every error raised on purpose: a minimal program that provokes it, and what it must say."""

from __future__ import annotations

import copy
import inspect
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, JitTrace_ELBO, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from states import parameters, same
from torch import Tensor

import pyronat
from models.helmholtz import Helmholtz
from pyronat import Euclidean, Full, NaturalGradient, NaturalSVI, ReweightedWakeSleep, errors
from pyronat.families import groups
from pyronat.geometry import Visible
from pyronat.loading import load, target_of
from pyronat.operators import cholesky
from pyronat.steps import (
    ConstantDamping,
    KLTrustRegion,
    LevenbergMarquardt,
    PerName,
    PolyakRuppert,
)

X = torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64)


def no_guide(x: Tensor) -> None:
    pass


def normal(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0), obs=x)


def latent(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(pyro.param("top", torch.tensor(0.0)), 1.0))
        pyro.sample("x", dist.Normal(z + pyro.param("bias", torch.tensor(0.0)), 1.0), obs=x)


def latent_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(pyro.param("q.loc", torch.tensor(0.0)) * x, 1.0))


def step(model: Any, guide: Any = no_guide, loss: Any = None, x: Any = X, **options: Any) -> None:
    NaturalSVI(model, guide, NaturalGradient(**options), loss).step(x)


class Scored(dist.Normal):
    """A density that cannot be sampled from."""

    def sample(self, *args: object, **kwargs: object) -> Tensor:
        raise NotImplementedError


def no_sampler() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", Scored(pyro.param("loc", torch.tensor(0.0)), 1.0), obs=x)

    step(model)


def moving_support() -> None:
    groups(dist.Uniform(torch.zeros(1), torch.ones(1, requires_grad=True)))


def no_layers() -> None:
    def model(x: Tensor) -> None:
        joint = pyro.param("joint", torch.ones(3))
        pyro.sample("x", dist.Normal(joint.prod(), 1.0), obs=x[0])

    step(model, geometry=Full(structure={"joint": "kronecker"}))


def jit() -> None:
    step(latent, latent_guide, JitTrace_ELBO())


def unregistered() -> None:
    layer = torch.nn.Linear(1, 1)

    def model(x: Tensor) -> None:
        pyro.sample("x", dist.Normal(layer(x[:1]), 1.0).to_event(1), obs=x[:1])

    pyronat.analyze(model, X)


def reads_data() -> None:
    def model(x: Tensor) -> None:
        normal(x)
        pyro.sample("y", dist.Normal(pyro.param("w", torch.tensor(1.0)) * x.mean(), 1.0))

    pyronat.fisher(model, X)


def no_metric() -> None:
    pyronat.fisher(normal, X, geometry=Euclidean())


def no_proposal() -> None:
    pyronat.fisher(latent, X, geometry=Full("posterior"))


def continuous_parent() -> None:
    pyronat.fisher(latent, X, geometry=Full("exact"))


def many_states() -> None:
    def model(x: Tensor) -> None:
        logits = pyro.param("logits", torch.zeros(17))
        z = pyro.sample("z", dist.Bernoulli(logits=logits).to_event(1))
        pyro.sample("x", dist.Normal(pyro.param("w", torch.tensor(1.0)) * z.sum(), 1.0), obs=x[0])

    pyronat.fisher(model, X, geometry=Full("exact"))


def large_block() -> None:
    def model(x: Tensor) -> None:
        weight = pyro.param("large", torch.zeros(70, 70))
        inputs = torch.linspace(0, 1, 70)
        pyro.sample("x", dist.Normal((weight @ inputs).square().sum(), 1.0), obs=x[0])

    step(model, geometry=Full(structure={"large": "dense"}))


def indefinite() -> None:
    cholesky(torch.tensor([[[1.0, 2.0], [2.0, 1.0]]]), torch.zeros(1))


def indefinite_block() -> None:
    step(normal, damping=ConstantDamping(-math.inf))


def other_shape() -> None:
    def model(x: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(0.0))
        pyro.sample("x", dist.Normal(loc.sum(), 1.0), obs=x[0])

    svi = NaturalSVI(model, no_guide, NaturalGradient())
    svi.step(X)
    pyro.get_param_store()["loc"] = torch.zeros(2)
    svi.step(X)


def restless() -> None:
    calls = iter(range(1000))

    def model(x: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(0.0))
        pyro.sample(f"x{next(calls)}", dist.Normal(loc, 1.0), obs=x[0])

    pyronat.analyze(model, X)


def stock() -> None:
    SVI(normal, no_guide, NaturalGradient(), Trace_ELBO()).step(X)


def nan_data() -> None:
    step(normal, x=torch.tensor([1.0, math.nan]))


def empty_batch() -> None:
    step(normal, x=torch.tensor([]))


def diverged() -> None:
    svi = NaturalSVI(normal, no_guide, NaturalGradient())
    for _ in range(3):
        svi.step(torch.tensor([1e200]))


def shared() -> None:
    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(pyro.param("both", torch.tensor(0.0)), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[0])

    def guide(x: Tensor) -> None:
        pyro.sample("z", dist.Normal(pyro.param("both", torch.tensor(0.0)), 1.0))

    step(model, guide)


def not_a_state() -> None:
    NaturalGradient().set_state({"loc": {}})


def other_program() -> None:
    first = NaturalSVI(normal, no_guide, NaturalGradient())
    first.step(X)
    second = NaturalSVI(latent, latent_guide, NaturalGradient())
    second.step(X)
    second.optim.set_state(first.optim.get_state())


def asleep() -> None:
    def model(x: Tensor) -> None:
        latent(x + 0.0)

    step(model, latent_guide, ReweightedWakeSleep(2, insomnia=0.5))


# --- the visible geometry ----------------------------------------------------------------------


def units_apart(x: Tensor) -> None:
    """Counts the dimensions of its units, so that it cannot be enumerated."""
    z = pyro.sample("z", dist.Bernoulli(logits=pyro.param("top", torch.tensor(0.0))))
    logits = z[..., None] * pyro.param("w", torch.ones(3))
    pyro.sample("x", dist.Bernoulli(logits=logits).to_event(logits.dim()), obs=torch.ones(3))


def units_apart_guide(x: Tensor) -> None:
    pyro.sample("z", dist.Bernoulli(logits=pyro.param("q.w", torch.tensor(0.5))))


def units_apart_in_a_plate(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(logits=pyro.param("top", torch.tensor(0.0))))
        logits = z[..., None] * pyro.param("w", torch.ones(2))
        obs = torch.ones(len(x), 2)
        pyro.sample("x", dist.Bernoulli(logits=logits).to_event(logits.dim() - 1), obs=obs)


def with_factor(x: Tensor) -> None:
    binary(x)
    pyro.factor("prior", -pyro.param("top", torch.tensor(0.0)).square())


def binary(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(logits=pyro.param("top", torch.tensor(0.0))))
        pyro.sample("x", dist.Normal(z * pyro.param("w", torch.tensor(1.0)), 1.0), obs=x)


def binary_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("q.w", torch.tensor(0.5)) * x))


def reading(x: Tensor) -> None:
    binary(x)
    pyro.sample("y", dist.Normal(pyro.param("v", torch.tensor(1.0)) * x.mean(), 1.0))


def reading_guide(x: Tensor) -> None:
    binary_guide(x)
    pyro.sample("y", dist.Normal(0.0, 1.0))


def auto_normal() -> None:
    step(latent, AutoNormal(latent), geometry=Visible())


def forgetful() -> None:
    step(latent, geometry=Visible())


def not_an_argument() -> None:
    data = X + 0.0

    def model(x: Tensor) -> None:
        latent(data)

    step(model, latent_guide, geometry=Visible())


def enumerated_continuous() -> None:
    step(latent, latent_guide, geometry=Visible(posterior="enumerate"))


def enumerated_apart() -> None:
    step(units_apart, units_apart_guide, geometry=Visible(posterior="enumerate"))


def enumerated_apart_in_a_plate() -> None:
    step(units_apart_in_a_plate, binary_guide, geometry=Visible(posterior="enumerate"))


def factor_statement() -> None:
    step(with_factor, binary_guide, geometry=Visible(posterior="enumerate"))


def factor_with_guide() -> None:
    step(with_factor, binary_guide, geometry=Visible())


def reading_dreamer() -> None:
    step(reading, reading_guide, geometry=Visible())


def large_district() -> None:
    net = Helmholtz((40, 15))
    geometry = Visible(estimator="direct", num_particles=2, full=Full("model"))
    step(net.model, net.guide, x=torch.ones(3, 40), geometry=geometry)


def large_hessian() -> None:
    net = Helmholtz((40, 15))
    geometry = Visible(estimator="observed", full=Full("model"))
    step(net.model, net.guide, x=torch.ones(3, 40), geometry=geometry)


def visible_without_guide() -> None:
    pyronat.fisher(binary, X, geometry=Visible(mixing=0.5))


def visible_of_the_data() -> None:
    pyronat.fisher(binary, X, geometry=Visible(estimator="observed"), guide=binary_guide)


def visible_with_a_rule() -> None:
    pyronat.fisher(binary, X, geometry=Visible(mixing=LevenbergMarquardt()), guide=binary_guide)


def no_averages() -> None:
    with NaturalSVI(normal, no_guide, NaturalGradient()).averaged():
        pass


def averaging() -> NaturalSVI:
    svi = NaturalSVI(normal, no_guide, NaturalGradient(averaging=PolyakRuppert()))
    svi.step(X)
    return svi


def no_values() -> None:
    state = averaging().optim.get_state()
    pyro.clear_param_store()
    fresh = NaturalSVI(normal, no_guide, NaturalGradient(averaging=PolyakRuppert()))
    fresh.optim.set_state(state)
    with fresh.averaged():
        pass


def step_on_averages() -> None:
    svi = averaging()
    with svi.averaged():
        svi.step(X)


def factor_for_nobody() -> None:
    lr = PerName(0.1, {"nobody": 0.5})
    NaturalSVI(normal, no_guide, NaturalGradient(lr)).step(X)


def far_too_fast() -> None:
    free = KLTrustRegion(model=math.inf)
    optim = NaturalGradient(1e9, damping=ConstantDamping(0.0), trust_region=free)
    svi = NaturalSVI(normal, no_guide, optim)
    for _ in range(20):
        svi.step(X)


def no_program() -> None:
    load(target_of(__file__), seed=0)


def no_pictures() -> None:
    with patch.dict(sys.modules, {"matplotlib": None}):
        pyronat.analyze(normal, X).plot("net.png")


@dataclass(frozen=True)
class Row:
    """An error, a program that provokes it, and words of its message: culprit, then way out."""

    error: type[errors.PyronatError]
    provoke: Callable[[], None]
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.error.__name__}-{self.provoke.__name__}"


TABLE = (
    Row(
        errors.UnsupportedDistribution,
        no_sampler,
        ("x (Scored)", "exclude", "Euclidean()", "loc"),
    ),
    Row(errors.NoFisher, moving_support, ("support of Uniform", "moves with its parameters")),
    Row(errors.UnsupportedStructure, no_layers, ("joint", "no layer", "'dual'", "'diagonal'")),
    Row(errors.UnsupportedProgram, jit, ("JitTrace_ELBO", "plain counterpart")),
    Row(errors.UnsupportedProgram, unregistered, ("'x'", "(1, 1)", "pyro.module", "detach")),
    Row(errors.UnsupportedProgram, reads_data, ("'y'", "data of x", "pyro.sample returns")),
    Row(errors.UnsupportedProgram, no_metric, ("Euclidean()", "Full(")),
    Row(errors.UnsupportedProgram, no_proposal, ("guide=", "Full('model')")),
    Row(errors.NotEnumerable, continuous_parent, ("'z' (Normal)", "Full(expectation='model')")),
    Row(errors.NotEnumerable, many_states, ("z", str(2**17), "Full(expectation='model')")),
    Row(errors.BlockTooLarge, large_block, ("large", "4900", "dual", "exclude", "Euclidean()")),
    Row(errors.NotPositiveDefinite, indefinite, ("1 of 1", "size 2", "raise the damping")),
    Row(errors.NotPositiveDefinite, indefinite_block, ("block of loc", "damping")),
    Row(errors.StructureChanged, other_shape, ("loc", "keep the shapes")),
    Row(errors.StructureChanged, restless, ("at the sites x", "from call to call")),
    Row(errors.StockSVI, stock, ("pyro.infer.SVI", "pyronat.NaturalSVI(")),
    Row(errors.InvalidData, nan_data, ("NaN",)),
    Row(errors.InvalidData, empty_batch, ("batch is empty",)),
    Row(errors.NonFiniteStep, diverged, ("3 steps", "last good step", "Lower lr", "damping")),
    Row(errors.UnassignedParameter, shared, ("both", "exclude=")),
    Row(errors.UnknownName, factor_for_nobody, ("'nobody'", "PerName", "There are: loc")),
    Row(errors.Diverged, far_too_fast, ("7 steps", "last good step", "Lower lr", "trust_region")),
    Row(errors.CheckpointMismatch, not_a_state, ("NaturalGradient", "format")),
    Row(errors.CheckpointMismatch, other_program, ("z of the model", "another program")),
    Row(errors.NoGuideOnDreams, asleep, ("x", "'observations'", "arguments")),
    Row(errors.NoAverage, no_averages, ("averaging=pyronat.steps.PolyakRuppert()",)),
    Row(errors.NoAverage, no_values, ("loc", "load the parameters", "evaluate_loss")),
    Row(errors.AveragesInPlace, step_on_averages, ("averaged()", "leave the context")),
    Row(errors.InvalidProgramFile, no_program, ("test_errors.py has no 'model'", ":NAME: ")),
    Row(errors.MissingPackage, no_pictures, ("matplotlib", "pip install 'pyronat[cli]'")),
)

VISIBLE = (
    Row(errors.NoGuideOnDreams, auto_normal, ("z", "autoguides", "write a guide")),
    Row(errors.NoGuideOnDreams, forgetful, ("z", "differ", "posterior='enumerate'")),
    Row(errors.NoGuideOnDreams, not_an_argument, ("x", "'observations'", "arguments")),
    Row(errors.NotEnumerable, enumerated_continuous, ("'z'", "continuous", "posterior='guide'")),
    Row(errors.NotEnumerable, enumerated_apart, ("'x'", "broadcast", "posterior='guide'")),
    Row(errors.UnsupportedProgram, factor_statement, ("'prior'", "normalized", "observed site")),
    Row(errors.UnsupportedProgram, factor_with_guide, ("'prior'", "normalized", "observed site")),
    Row(errors.UnsupportedProgram, reading_dreamer, ("'y'", "data of x", "pyro.sample returns")),
    Row(errors.BlockTooLarge, large_district, ("layer1", "655", "512", "'subtractive'")),
    Row(errors.BlockTooLarge, large_hessian, ("layer1", "655", "512", "'subtractive'")),
)
"""Errors of a step with the visible geometry."""

STUDY = (
    Row(errors.UnsupportedProgram, visible_without_guide, ("guide=", "posterior='enumerate'")),
    Row(errors.UnsupportedProgram, visible_of_the_data, ("mixing=0",)),
    Row(errors.UnsupportedProgram, visible_with_a_rule, ("mixing=0",)),
)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("row", TABLE + VISIBLE + STUDY, ids=str)
def test_an_error_names_the_culprit_and_the_way_out(row: Row) -> None:
    with pytest.raises(errors.PyronatError) as caught:
        row.provoke()
    assert type(caught.value) is row.error
    message = str(caught.value)
    missing = [words for words in row.words if words not in message]
    assert not missing, f"{missing} not in: {message}"


def error_classes() -> set[type]:
    classes = {kind for _, kind in inspect.getmembers(errors, inspect.isclass)}
    return {kind for kind in classes if not issubclass(kind, errors.PyronatWarning)}


def test_every_error_has_a_row() -> None:
    assert {row.error for row in TABLE} == error_classes() - {errors.PyronatError}


def test_every_error_has_one_base_and_a_docstring() -> None:
    for kind in error_classes() - {errors.PyronatError}:
        assert issubclass(kind, errors.PyronatError)
        assert kind.__doc__
    assert pyronat.PyronatError is errors.PyronatError


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_programs_are_fine_otherwise() -> None:
    """Negative control: what surrounds the culprits raises nothing."""
    step(normal)
    step(latent, latent_guide)
    step(latent, latent_guide, ReweightedWakeSleep(2, insomnia=0.5))
    pyronat.fisher(normal, X)
    pyronat.fisher(latent, X, geometry=Full("posterior"), guide=latent_guide, num_samples=3)
    few = Visible(num_particles=2, num_dreams=3)
    step(binary, binary_guide, geometry=few)
    step(binary, binary_guide, geometry=Visible(posterior="enumerate"))
    step(latent, latent_guide, geometry=few)
    pyronat.fisher(binary, X, geometry=Visible(mixing=0.5), guide=binary_guide, num_samples=20)


def test_a_program_that_does_not_broadcast_in_a_plate_is_named() -> None:
    with pytest.raises(errors.NotEnumerable, match=r"site x.*broadcast"):
        enumerated_apart_in_a_plate()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("row", VISIBLE, ids=str)
def test_a_step_that_raises_changes_nothing(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the first time, which creates the parameters, nor the second one."""
    trained = []
    original = NaturalSVI.step

    def watched(self: NaturalSVI, *args: Any) -> float:
        trained.append((self, args))
        return original(self, *args)

    monkeypatch.setattr(NaturalSVI, "step", watched)
    with pytest.raises(row.error):
        row.provoke()
    ((svi, args),) = trained
    state, params = copy.deepcopy(svi.optim.get_state()), parameters()
    with pytest.raises(row.error):
        svi.step(*args)
    assert same(state, svi.optim.get_state()) and same(params, parameters())
    assert svi.optim.step_count == 0 and state["step_count"] == 0
    assert all(not side["average"] and not side["visible"] for side in state["sides"].values())
    assert all(leaf.grad is None for _, leaf in pyro.get_param_store().named_parameters())
    # Parameters are where the programs create them.
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    trace = poutine.trace(svi.guide).get_trace(*args)
    poutine.trace(poutine.replay(svi.model, trace=trace)).get_trace(*args)
    created = parameters()
    assert {name: value.shape for name, value in created.items()} == {
        name: value.shape for name, value in params.items()
    }
    assert same(created, params)


@pytest.mark.parametrize("posterior", ["guide", "enumerate"])
def test_a_refresh_that_raises_changes_nothing(
    posterior: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After some steps, at the next refresh."""
    geometry = Visible(posterior=posterior, num_particles=2, num_dreams=6)
    svi = NaturalSVI(binary, binary_guide, NaturalGradient(geometry=geometry))
    for _ in range(5):
        svi.step(X)
    state, params = copy.deepcopy(svi.optim.get_state()), parameters()
    assert svi.optim.due and state["sides"]["model"]["visible"]

    def broken(*args: Any) -> None:
        raise errors.NotEnumerable("no")

    with monkeypatch.context() as patch:
        patch.setattr("pyronat.refresh.measure_visible", broken)
        for _ in range(2):
            with pytest.raises(errors.NotEnumerable):
                svi.step(X)
            assert same(state, svi.optim.get_state()) and same(params, parameters())
            assert all(leaf.grad is None for _, leaf in pyro.get_param_store().named_parameters())
    svi.step(X)
    assert not same(params, parameters())


OPTIONS: dict[str, tuple[Callable[[], Any], str]] = {
    "guide geometry": (lambda: NaturalGradient(guide_geometry=Visible()), "guide_geometry"),
    "posterior": (lambda: Visible(posterior="sampled"), "posterior.*enumerate.*'sampled'"),
    "estimator": (lambda: Visible(estimator="best"), "estimator.*subtractive.*'best'"),
    "negative mixing": (lambda: Visible(mixing=-0.1), r"mixing.*-0\.1"),
    "large mixing": (lambda: Visible(mixing=1.5), r"mixing.*1\.5"),
    "no mixing": (lambda: Visible(mixing=math.nan), "mixing.*nan"),
    "particles": (lambda: Visible(num_particles=1), "num_particles.*at least 2.*1"),
    "dreams": (lambda: Visible(num_dreams=0), "num_dreams.*at least 1.*0"),
    "expectation": (lambda: Full(expectation="visible"), "expectation.*'visible'"),
    "runs": (lambda: Full(num_runs=0), "num_runs.*0"),
    "two rules": (
        lambda: NaturalGradient(
            geometry=Visible(mixing=LevenbergMarquardt()), damping=LevenbergMarquardt()
        ),
        "mixing or damping",
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_bad_options_are_refused(name: str) -> None:
    make, words = OPTIONS[name]
    with pytest.raises(ValueError, match=words):
        make()


def test_extreme_options_are_taken() -> None:
    """Negative control."""
    for mixing in (0, 1, 0.0, 1.0, LevenbergMarquardt(), lambda step: 0.5):
        Visible(mixing=mixing, num_particles=2, num_dreams=1)
