"""`NaturalSVI.save` and `load`: training resumes to the last bit, wherever it was interrupted."""

from __future__ import annotations

import copy
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import X, guide, model, param
from pyro.distributions import constraints
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam
from pyro.optim import Adam
from states import parameters, same
from test_optim import assert_plain
from torch import Tensor

from models.registry import Data, Program, programs
from pyronat import Euclidean, Full, NaturalGradient, NaturalSVI, ReweightedWakeSleep, Visible
from pyronat.checkpoints import constraint_of, read, write, written
from pyronat.errors import CheckpointMismatch
from pyronat.steps import HeldOut, LevenbergMarquardt, LinearDecay, RunningAverage

ROOT = Path(__file__).parents[1]
PROGRAMS = programs()


def loss_of(program: Program) -> ELBO:
    if program.objective == "wake-sleep":
        return ReweightedWakeSleep(num_particles=4)
    if program.objective == "enumeration":
        return TraceEnum_ELBO(max_plate_nesting=program.plates)
    return Trace_ELBO(max_plate_nesting=program.plates)


def plain_adam() -> NaturalGradient:
    others = Adam({"lr": 0.01})
    return NaturalGradient(geometry=Euclidean(), guide_geometry=Euclidean(), others=others)


def clipped() -> NaturalGradient:
    others = pyro.optim.ClippedAdam({"lr": 0.01, "lrd": 0.9})
    return NaturalGradient(guide_geometry=Euclidean(), others=others)


@dataclass(frozen=True)
class Case:
    """A training of the zoo.

    Attributes:
        name: Name of the program.
        optim: Its optimizer.
        size: Number of data.
    """

    name: str
    optim: Callable[[], NaturalGradient]
    size: int = 40


CASES = {
    "defaults, classes": Case("latent class", NaturalGradient),
    "schedule": Case("latent class", lambda: NaturalGradient(lr=LinearDecay(0.5, 6))),
    "visible, enumerated": Case(
        "latent class", lambda: NaturalGradient(geometry=Visible(posterior="enumerate"))
    ),
    "visible, adapted mixing": Case(
        "latent class",
        lambda: NaturalGradient(geometry=Visible(LevenbergMarquardt(), posterior="exact")),
    ),
    "visible, held out": Case(
        "helmholtz", lambda: NaturalGradient(geometry=Visible(HeldOut(window=2)))
    ),
    "visible, compared": Case(
        "latent class", lambda: NaturalGradient(geometry=Visible("auto", posterior="enumerate"))
    ),
    "visible through the guide, compared": Case(
        "helmholtz", lambda: NaturalGradient(geometry=Visible("auto"))
    ),
    "adapted damping": Case(
        "mixture",
        lambda: NaturalGradient(geometry=Full("posterior"), damping=LevenbergMarquardt()),
    ),
    "wake-sleep": Case("helmholtz", NaturalGradient),
    "wake-sleep, natural guide": Case("bars", lambda: NaturalGradient(guide_geometry=Full())),
    "adam": Case("hmm", plain_adam),
    "clipped adam on the guide": Case("kirby bars", clipped),
    "modules": Case("vae", lambda: NaturalGradient(curvature=RunningAverage(refresh=2))),
    "modules in factors": Case(
        "vae", lambda: NaturalGradient(geometry=Full(structure={"*": "kfac"}))
    ),
    "recurrent modules": Case("dmm", NaturalGradient, 6),
    "autoguide": Case("eight schools", NaturalGradient, 8),
    "positive parameters": Case("sparse gamma def", NaturalGradient, 10),
    "tables": Case("asia", NaturalGradient),
    "random tables": Case("lda", NaturalGradient, 4),
    "regression": Case("logistic regression", NaturalGradient),
}


class Training:
    """A training of the zoo on batches that follow the global random numbers."""

    def __init__(self, case: Case, seed: int) -> None:
        self.program = PROGRAMS[case.name]
        self.data: Data = self.program.make_data(0, case.size)
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        self.trainable = self.program.make(seed)
        loss = loss_of(self.program)
        self.svi = NaturalSVI(self.trainable.model, self.trainable.guide, case.optim(), loss)

    def train(self, steps: int) -> list[float]:
        losses = []
        size = len(self.data[0])
        for _ in range(steps):
            chosen = torch.randperm(size)[: max(2, size - random.randrange(2))]
            if self.program.name in {"eight schools", "sparse gamma def"}:
                chosen = torch.arange(size)
            losses.append(self.svi.step(*[value[chosen] for value in self.data]))
            self.trainable.after_step()
        return losses


def outcome(training: Training, steps: int) -> tuple[Any, ...]:
    losses = training.train(steps)
    return losses, parameters(), copy.deepcopy(training.svi.optim.get_state()), torch.rand(3)


@pytest.mark.parametrize("name", CASES)
def test_training_resumes_to_the_last_bit(name: str, tmp_path: Path) -> None:
    """Anew from other initial values, and back in the training that went on."""
    path = tmp_path / "checkpoint.pt"
    first = Training(CASES[name], 0)
    first.train(3)
    first.svi.save(path)
    expected = outcome(first, 4)
    assert len(set(expected[0])) == 4

    second = Training(CASES[name], 1)
    second.svi.load(path)
    assert second.svi.optim.step_count == 3
    assert same(outcome(second, 4), expected)

    second.train(1)
    second.svi.load(path)
    assert same(outcome(second, 4), expected)

    assert_plain(torch.load(path, weights_only=True))


@pytest.mark.parametrize("name", ["defaults, classes", "modules", "wake-sleep", "adam"])
@pytest.mark.parametrize("steps", [0, 1, 5])
def test_any_time_is_good(name: str, steps: int, tmp_path: Path) -> None:
    """Before the first step the parameters are not there yet; at 5 a refresh is due."""
    path = tmp_path / "checkpoint.pt"
    first = Training(CASES[name], 0)
    first.train(steps)
    first.svi.save(path)
    expected = outcome(first, 3)
    # Values that a constructor draws are no parameters of Pyro's before the first run.
    second = Training(CASES[name], 1 if steps else 0)
    second.svi.load(path)
    assert same(outcome(second, 3), expected)


@pytest.mark.parametrize("missing", ["optim", "parameters", "random"])
def test_every_part_matters(missing: str, tmp_path: Path) -> None:
    """Negative control."""
    path = tmp_path / "checkpoint.pt"
    training = Training(CASES["clipped adam on the guide"], 0)
    training.train(1)
    stale = training.svi.get_state()
    training.train(3)
    write({**training.svi.get_state(), missing: stale[missing]}, path)
    expected = outcome(training, 3)
    second = Training(CASES["clipped adam on the guide"], 0)
    second.svi.load(path)
    assert not same(outcome(second, 3), expected)


# --- parameters --------------------------------------------------------------------------------


def branching(x: Tensor, late: bool) -> None:
    """A model with a parameter that some calls need."""
    with pyro.plate("data", len(x)):
        loc = param("loc", 1)
        if late:
            loc = loc + pyro.param("late", lambda: torch.rand(()), constraint=constraints.positive)
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x[:, 0])


def nothing(*args: Any) -> None:
    pass


def branches() -> NaturalSVI:
    return NaturalSVI(branching, nothing, NaturalGradient(lr=0.05))


@pytest.mark.parametrize("first", [[False] * 3, [False, True, False]], ids=["never", "once"])
@pytest.mark.parametrize("then", [[False, True, True], [True, False, True]], ids=str)
def test_parameters_may_come_late(first: list[bool], then: list[bool], tmp_path: Path) -> None:
    """Before the checkpoint or after it; what came after it is forgotten by `load`."""
    svi = branches()
    for late in first:
        svi.step(X, late)
    svi.save(tmp_path / "checkpoint.pt")
    expected = [svi.step(X, late) for late in then], parameters(), svi.optim.get_state()
    for fresh in (False, True):
        if fresh:
            pyro.clear_param_store()
            pyro.set_rng_seed(9)
            svi = branches()
        svi.load(tmp_path / "checkpoint.pt")
        assert ("late" in pyro.get_param_store()) == any(first)
        if fresh and then[0] and not any(first):
            # The first thing that a new process sees is a program that the file does not know.
            with pytest.raises(CheckpointMismatch, match="late of the model"):
                svi.step(X, then[0])
            continue
        found = [svi.step(X, late) for late in then], parameters(), svi.optim.get_state()
        assert same(found, expected)


@pytest.mark.parametrize(
    "optim",
    [NaturalGradient, clipped, plain_adam, lambda: NaturalGradient(guide_geometry=Euclidean())],
)
def test_an_emptied_store_is_no_end(optim: Callable[[], NaturalGradient], tmp_path: Path) -> None:
    """Parameters start anew, states keep their names, and `load` brings everything back."""
    svi = NaturalSVI(model, guide, optim())
    for _ in range(3):
        svi.step(X)
    svi.save(tmp_path / "checkpoint.pt")
    expected = [svi.step(X) for _ in range(3)], parameters(), svi.optim.get_state()
    pyro.clear_param_store()
    for _ in range(2):
        svi.step(X)
        state = svi.optim.get_state()
        assert all(isinstance(name, str) for name in state["others"])
    pyro.clear_param_store()
    svi.load(tmp_path / "checkpoint.pt")
    assert same(([svi.step(X) for _ in range(3)], parameters(), svi.optim.get_state()), expected)


def test_loaded_values_are_there_at_once_for_modules_too(tmp_path: Path) -> None:
    """`evaluate_loss` right after `load`, in a process that has not run the programs."""
    first = Training(CASES["modules"], 0)
    first.train(3)
    first.svi.save(tmp_path / "checkpoint.pt")
    expected = first.svi.evaluate_loss(*first.data)
    second = Training(CASES["modules"], 1)
    other = second.svi.evaluate_loss(*second.data)
    second = Training(CASES["modules"], 1)
    second.svi.load(tmp_path / "checkpoint.pt")
    assert second.svi.evaluate_loss(*second.data) == expected != other
    assert len(second.train(2)) == 2


class Own(PyroModule):
    """A model whose parameters are attributes, one of them constrained."""

    def __init__(self, loc: float) -> None:
        super().__init__()
        self.scale = PyroParam(torch.tensor(loc).exp(), constraint=constraints.positive)
        self.linear = PyroModule[torch.nn.Linear](2, 1)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            loc = self.linear(x[:, :2]).squeeze(-1) + z
            pyro.sample("x", dist.Normal(loc, self.scale), obs=x[:, 2])


def test_pyro_modules_take_their_values(tmp_path: Path) -> None:
    def make(seed: int) -> NaturalSVI:
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        net = Own(float(seed))
        return NaturalSVI(net, AutoNormal(net), NaturalGradient(lr=0.05))

    first = make(0)
    for _ in range(3):
        first.step(X)
    first.save(tmp_path / "checkpoint.pt")
    expected = [first.step(X) for _ in range(3)], parameters()
    second = make(1)
    second.load(tmp_path / "checkpoint.pt")
    assert same(([second.step(X) for _ in range(3)], parameters()), expected)
    held = dict(second.model.named_parameters())
    for name, leaf in pyro.get_param_store().named_parameters():
        if name in held:
            assert held[name] is leaf


def test_other_trainings_in_the_store_keep_their_parameters(tmp_path: Path) -> None:
    svi = NaturalSVI(model, guide, NaturalGradient(lr=0.05))
    svi.step(X)
    svi.save(tmp_path / "checkpoint.pt")
    pyro.param("stranger", torch.ones(3))
    svi.load(tmp_path / "checkpoint.pt")
    assert torch.equal(pyro.param("stranger"), torch.ones(3))


# --- constraints -------------------------------------------------------------------------------

CONSTRAINTS = {
    "real": constraints.real,
    "positive": constraints.positive,
    "softplus": constraints.softplus_positive,
    "unit": constraints.unit_interval,
    "interval": constraints.interval(-1.5, 2.0),
    "tensor interval": constraints.interval(torch.zeros(2), torch.tensor([1.0, 2.0])),
    "greater": constraints.greater_than(3.0),
    "less": constraints.less_than(-1.0),
    "simplex": constraints.simplex,
    "ordered": constraints.ordered_vector,
    "cholesky": constraints.lower_cholesky,
    "softplus cholesky": constraints.softplus_lower_cholesky,
    "correlation": constraints.corr_cholesky,
    "definite": constraints.positive_definite,
    "independent": constraints.independent(constraints.positive, 1),
    "stacked": constraints.stack([constraints.positive, constraints.real], dim=-1),
    "sphere": constraints.sphere,
}


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_constraints_go_round(name: str, tmp_path: Path) -> None:
    constraint = CONSTRAINTS[name]
    write({"constraint": written(constraint)}, tmp_path / "file.pt")
    found = constraint_of(read(tmp_path / "file.pt")["constraint"])
    assert type(found) is type(constraint)
    assert same(written(found), written(constraint))
    if not vars(constraint):
        assert found is constraint
    free = torch.randn(2, 3 if name == "correlation" else 2)
    mine = torch.distributions.transform_to(constraint)(free)
    assert torch.equal(mine, torch.distributions.transform_to(found)(free))


class Mine(constraints.positive.__class__):
    """A constraint of the user's own."""


@torch.distributions.transform_to.register(Mine)
def _mine(constraint: Mine) -> Any:
    return torch.distributions.transform_to(constraints.positive)


def test_a_constraint_from_elsewhere_needs_its_parameter(tmp_path: Path) -> None:
    def own(x: Tensor) -> None:
        scale = pyro.param("scale", torch.tensor(2.0), constraint=Mine(0.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, scale), obs=x[:, 0])

    def make() -> NaturalSVI:
        pyro.clear_param_store()
        return NaturalSVI(own, nothing, NaturalGradient(lr=0.05))

    svi = make()
    svi.step(X)
    svi.save(tmp_path / "checkpoint.pt")
    expected = svi.step(X)
    svi = make()
    with pytest.raises(CheckpointMismatch, match=r"scale.*evaluate_loss"):
        svi.load(tmp_path / "checkpoint.pt")
    svi.evaluate_loss(X)  # the way out that the message names
    svi.load(tmp_path / "checkpoint.pt")
    assert svi.step(X) == expected


# --- what does not fit -------------------------------------------------------------------------


def changed(state: dict[str, Any], name: str, **values: Any) -> dict[str, Any]:
    parameters = {**state["parameters"], name: {**state["parameters"][name], **values}}
    return {**state, "parameters": parameters}


MISMATCHES: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "shape": (lambda s: changed(s, "W", value=torch.zeros(2, 2)), r"W has shape \(2, 2\)"),
    "type": (lambda s: changed(s, "b", value=torch.zeros(3).float()), "b has shape.*float32"),
    "constraint": (
        lambda s: changed(s, "s", constraint=written(constraints.positive)),
        "s has another constraint",
    ),
    "format": (lambda s: {**s, "training": 0}, "not a state of NaturalSVI"),
    "optimizer's state": (lambda s: s["optim"], "not a state of NaturalSVI"),
    "optimizer": (
        lambda s: {**s, "optim": {**s["optim"], "others_kind": "SGD"}},
        "others_kind of the state: SGD",
    ),
    "rule": (
        lambda s: {**s, "optim": {**s["optim"], "adapted": "damping by LevenbergMarquardt"}},
        "damping by LevenbergMarquardt, this optimizer: no adaptive rule",
    ),
    "geometry": (
        lambda s: {
            **s,
            "optim": {
                **s["optim"],
                "sides": {
                    **s["optim"]["sides"],
                    "guide": {**s["optim"]["sides"]["guide"], "damping": {}},
                },
            },
        },
        "another geometry of the guide",
    ),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_what_does_not_fit_changes_nothing(name: str) -> None:
    change, words = MISMATCHES[name]
    svi = NaturalSVI(model, guide, NaturalGradient(lr=0.05))
    svi.step(X)
    strange = change(svi.get_state())
    svi.step(X)
    before = copy.deepcopy(svi.get_state())
    with pytest.raises(CheckpointMismatch, match=words):
        svi.set_state(strange)
    assert same(svi.get_state(), before)


def test_files_of_something_else_are_refused(tmp_path: Path) -> None:
    svi = NaturalSVI(model, guide, NaturalGradient(lr=0.05))
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointMismatch, match="holds a list"):
        svi.load(tmp_path / "list.pt")
    with pytest.raises(CheckpointMismatch, match="holds a list"):
        svi.optim.load(str(tmp_path / "list.pt"))


# --- killed processes --------------------------------------------------------------------------

CHILD = """
import random, sys, time
import pyro, torch
sys.path[:0] = ["tests"]
torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)
from test_checkpoints import CASES, Training
from pyronat import checkpoints

name, path, steps, mode = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
training = Training(CASES[name], 1 if mode == "resume" else 0)
if mode == "resume":
    training.svi.load(path)

def torn(state, file):
    file.write(b"PK" + bytes(1000))
    file.flush()
    print("writing", flush=True)
    time.sleep(600)

while training.svi.optim.step_count < steps:
    step = training.svi.optim.step_count
    (loss,) = training.train(1)
    print(step, loss.hex(), flush=True)
    if mode == "torn" and step == 4:
        checkpoints.torch.save = torn
    if mode != "whole" and step % 2 == 0:
        training.svi.save(path)
for name, leaf in sorted(pyro.get_param_store().named_parameters()):
    print(name, [float(value).hex() for value in leaf.detach().reshape(-1)], flush=True)
"""


def child(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("defaults, classes", "torn"),
        ("visible, enumerated", "kill"),
        ("wake-sleep", "torn"),
    ],
)
def test_a_killed_training_resumes_to_the_last_bit(name: str, mode: str, tmp_path: Path) -> None:
    """In the middle of a step or of a write; the uninterrupted run is a process of its own."""
    path = str(tmp_path / "checkpoint.pt")
    whole = child(name, path, "9", "whole")
    expected = whole.communicate(timeout=300)[0].splitlines()
    assert whole.returncode == 0 and len(expected) > 9

    killed = child(name, path, "1000000", mode)
    assert killed.stdout is not None
    seen = []
    for line in killed.stdout:
        if line.startswith("writing"):
            break
        seen.append(line.strip())
        if mode == "kill" and len(seen) == 6:
            time.sleep(0.003)
            break
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    if mode == "torn":
        assert (tmp_path / "checkpoint.pt.tmp").stat().st_size < 2000
    assert seen[:6] == expected[:6][: len(seen)]

    resumed = child(name, path, "9", "resume")
    found = resumed.communicate(timeout=300)[0].splitlines()
    assert resumed.returncode == 0
    start = int(re.match(r"\d+", found[0])[0])  # type: ignore[index]
    assert start == 3 if mode == "torn" else 3 <= start <= 7
    assert found == expected[start:]
    assert not (tmp_path / "checkpoint.pt.tmp").exists()
