"""Every error raised on purpose: a minimal program that provokes it, and what it must say."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, JitTrace_ELBO, Trace_ELBO
from torch import Tensor

import pyronat
from pyronat import Euclidean, Full, NaturalGradient, NaturalSVI, ReweightedWakeSleep, errors
from pyronat.operators import cholesky
from pyronat.steps import ConstantDamping

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


def laplace() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Laplace(pyro.param("loc", torch.tensor(0.0)), 1.0), obs=x)

    step(model)


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

    step(model)


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


@dataclass(frozen=True)
class Row:
    """An error, a program that provokes it, and words of its message: culprit, then way out."""

    error: type[errors.PyronatError]
    provoke: Callable[[], None]
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.error.__name__}-{self.provoke.__name__}"


TABLE = (
    Row(errors.UnsupportedDistribution, laplace, ("x (Laplace)", "exclude", "Euclidean()", "loc")),
    Row(errors.UnsupportedProgram, jit, ("JitTrace_ELBO", "plain counterpart")),
    Row(errors.UnsupportedProgram, unregistered, ("'x'", "(1, 1)", "pyro.module", "detach")),
    Row(errors.UnsupportedProgram, reads_data, ("'y'", "data of x", "pyro.sample returns")),
    Row(errors.UnsupportedProgram, no_metric, ("Euclidean()", "Full(")),
    Row(errors.UnsupportedProgram, no_proposal, ("guide=", "Full('model')")),
    Row(errors.NotEnumerable, continuous_parent, ("'z' (Normal)", "Full(expectation='model')")),
    Row(errors.NotEnumerable, many_states, ("z", str(2**17), "Full(expectation='model')")),
    Row(errors.BlockTooLarge, large_block, ("large", "4900", "exclude", "Euclidean()")),
    Row(errors.NotPositiveDefinite, indefinite, ("1 of 1", "size 2", "raise the damping")),
    Row(errors.NotPositiveDefinite, indefinite_block, ("block of loc", "damping")),
    Row(errors.StructureChanged, other_shape, ("loc", "keep the shapes")),
    Row(errors.StructureChanged, restless, ("at the sites x", "from call to call")),
    Row(errors.StockSVI, stock, ("pyro.infer.SVI", "pyronat.NaturalSVI(")),
    Row(errors.InvalidData, nan_data, ("NaN",)),
    Row(errors.InvalidData, empty_batch, ("batch is empty",)),
    Row(errors.NonFiniteStep, diverged, ("3 steps", "last good step", "Lower lr", "damping")),
    Row(errors.UnassignedParameter, shared, ("both", "exclude=")),
    Row(errors.CheckpointMismatch, not_a_state, ("NaturalGradient", "format")),
    Row(errors.CheckpointMismatch, other_program, ("z of the model", "another program")),
    Row(errors.NoGuideOnDreams, asleep, ("x", "'observations'", "arguments")),
)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("row", TABLE, ids=str)
def test_an_error_names_the_culprit_and_the_way_out(row: Row) -> None:
    with pytest.raises(errors.PyronatError) as caught:
        row.provoke()
    assert type(caught.value) is row.error
    message = str(caught.value)
    missing = [words for words in row.words if words not in message]
    assert not missing, f"{missing} not in: {message}"


def error_classes() -> set[type]:
    return {kind for _, kind in inspect.getmembers(errors, inspect.isclass)}


def test_every_error_has_a_row() -> None:
    assert {row.error for row in TABLE} == error_classes() - {errors.PyronatError}


def test_every_error_has_one_base_and_a_docstring() -> None:
    for kind in error_classes() - {errors.PyronatError}:
        assert kind.__bases__ == (errors.PyronatError,)
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
