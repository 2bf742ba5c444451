"""The same seed gives the same training: in every process, and however curvature is measured."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from states import parameters, same
from test_checkpoints import CASES, Case, Training
from torch import Tensor

from pyronat import Full, NaturalGradient, NaturalSVI, Visible
from pyronat.checkpoints import random_numbers
from pyronat.geometry import Geometry
from pyronat.steps import HeldOut, RunningAverage

ROOT = Path(__file__).parents[1]

# --- processes ---------------------------------------------------------------------------------

CHILD = """
import hashlib, sys
import torch
sys.path[:0] = ["tests"]
torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)
import pyro
from test_checkpoints import CASES, Training
from pyronat.checkpoints import write

for name in sys.argv[2:]:
    training = Training(CASES[name], 0)
    losses = training.train(6)
    write(training.svi.get_state(), sys.argv[1])
    digest = hashlib.sha256()
    for key, leaf in sorted(pyro.get_param_store().named_parameters()):
        digest.update(key.encode() + leaf.detach().numpy().tobytes())
    digest.update(torch.get_rng_state().numpy().tobytes())
    print(name, [loss.hex() for loss in losses], digest.hexdigest(), flush=True)
print(list({"one", "two", "three", "four"}))
"""

PROCESSES = [
    "defaults, classes",
    "visible, enumerated",
    "visible, held out",
    "clipped adam on the guide",
    "modules",
    "positive parameters",
    "tables",
]


def test_the_order_of_sets_does_not_matter(tmp_path: Path) -> None:
    """Strings hash differently in every process; no result may depend on it."""
    outputs = []
    for seed in ("0", "4711"):
        environment = {
            **os.environ,
            "PYTHONHASHSEED": seed,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
        run = subprocess.run(
            [sys.executable, "-c", CHILD, str(tmp_path / "state.pt"), *PROCESSES],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
            env=environment,
        )
        outputs.append(run.stdout.splitlines())
    assert all(len(lines) == len(PROCESSES) + 1 for lines in outputs)
    assert outputs[0][:-1] == outputs[1][:-1]
    # Negative control: sets did come in different orders.
    assert outputs[0][-1] != outputs[1][-1]


# --- the stream of training --------------------------------------------------------------------


def still(geometry: Callable[[], Geometry], guide: Geometry | None = None) -> Callable[..., Any]:
    def make(refresh: int) -> NaturalGradient:
        return NaturalGradient(
            0.0, geometry(), guide, curvature=RunningAverage(refresh=refresh), seed=refresh
        )

    return make


STREAMS: dict[str, tuple[str, Callable[[int], NaturalGradient]]] = {
    "pooled": ("helmholtz", still(Full)),
    "dreams of both": ("bars", still(lambda: Full("model", num_runs=2), Full("model"))),
    "enumerated": ("latent class", still(lambda: Full("exact"))),
    "data": ("mixture", still(lambda: Full("posterior"))),
    "visible by the guide": ("helmholtz", still(lambda: Visible(num_particles=3))),
    "visible, enumerated": ("latent class", still(lambda: Visible(posterior="enumerate"))),
    "visible, exact": ("latent class", still(lambda: Visible(posterior="exact"))),
    "visible, observed": ("mixture", still(lambda: Visible(estimator="observed"))),
    "held out": ("helmholtz", still(lambda: Visible(HeldOut(window=2)))),
    "networks": ("vae", still(Full)),
    "autoguide": ("logistic regression", still(Full)),
    "tables": ("asia", still(Full)),
}


@pytest.mark.parametrize("name", STREAMS)
def test_measuring_curvature_leaves_the_random_numbers_alone(name: str) -> None:
    """Parameters stand still, so that the losses tell the random numbers they were drawn with."""
    program, make = STREAMS[name]

    def trained(refresh: int) -> tuple[list[float], dict[str, Any]]:
        training = Training(Case(program, lambda: make(refresh)), 0)
        losses = training.train(4)
        assert len(set(losses)) > 1
        return losses, random_numbers()

    every, never = trained(1), trained(1000)
    assert same(every, never)
    # Negative control: one draw more is seen.
    torch.rand(())
    assert not same(random_numbers(), never[1])


@pytest.mark.parametrize("generator", ["python", "numpy"])
def test_other_generators_are_left_alone_too(generator: str) -> None:
    """A program that draws from Python or NumPy sees the same numbers at every refresh."""
    import numpy as np

    def model(x: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(0.0))
        noise = random.random() if generator == "python" else float(np.random.rand())
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc + noise, 1.0), obs=x)

    def trained(refresh: int) -> list[float]:
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        curvature = RunningAverage(refresh=refresh)
        optim = NaturalGradient(0.0, Full("model"), curvature=curvature)
        svi = NaturalSVI(model, lambda x: None, optim)
        return [svi.step(torch.arange(3.0)) for _ in range(5)]

    losses = trained(1)
    assert losses == trained(1000)
    assert len(set(losses)) == 5
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model(torch.arange(3.0))  # makes the parameter, as the first step does
    stock = [Trace_ELBO().loss(model, lambda x: None, torch.arange(3.0)) for _ in range(5)]
    assert losses == pytest.approx(stock)


def test_dreams_follow_their_own_seed() -> None:
    """Training with other dreams differs; with the same seed it does not."""

    def trained(seed: int) -> dict[str, Tensor]:
        case = Case("helmholtz", lambda: NaturalGradient(seed=seed))
        training = Training(case, 0)
        training.train(3)
        return parameters()

    assert same(trained(0), trained(0))
    assert not same(trained(0), trained(1))


def test_the_cases_are_known() -> None:
    assert set(PROCESSES) <= set(CASES)
