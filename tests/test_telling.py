"""What the package says while it works: warnings and the log, and nothing on its own account."""

from __future__ import annotations

import logging
import math
import re
import warnings
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoGuideList, AutoNormal
from torch import Tensor

import pyronat
from pyronat import NaturalGradient, NaturalSVI, errors
from pyronat.cli import main
from pyronat.errors import NonFiniteStep, WithoutFisher
from pyronat.steps import ConstantDamping, KLTrustRegion

X = torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64)
README = (Path(__file__).parents[1] / "README.md").read_text()


def normal(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0), obs=x)


def hidden(x: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mean, scale), obs=x)


def no_guide(x: Tensor) -> None:
    pass


def partly_points() -> AutoGuideList:
    guide = AutoGuideList(hidden)
    guide.append(AutoNormal(poutine.block(hidden, expose=["mean"])))
    guide.append(AutoDelta(poutine.block(hidden, expose=["scale"])))
    return guide


# --- warnings ----------------------------------------------------------------------------------


def test_points_that_nobody_moves_are_warned_of() -> None:
    svi = NaturalSVI(hidden, partly_points(), NaturalGradient())
    with pytest.warns(WithoutFisher) as caught:
        svi.step(X)
    assert len(caught) == 1 and caught[0].filename == __file__
    message = str(caught[0].message)
    for words in ("scale have no metric", "rate 1e-3", "others=pyro.optim.Adam", "exclude=[...]"):
        assert words in message
    assert "mean" not in message
    svi.step(X)  # once is enough


def test_distributions_without_a_fisher_information_are_warned_of() -> None:
    def model(x: Tensor) -> None:
        end = pyro.param("end", torch.tensor(2.0))
        pyro.sample("x", dist.Uniform(-2.0, end).expand([3]).to_event(1), obs=x)

    with pytest.warns(WithoutFisher, match=r"end have .*\(x \(Uniform\) has no Fisher"):
        NaturalSVI(model, no_guide, NaturalGradient()).step(X)


@pytest.mark.parametrize(
    "options",
    [{"others": pyro.optim.Adam({"lr": 0.1})}, {"exclude": ["*.scale"]}],
    ids=["others", "exclude"],
)
def test_what_was_meant_is_not_warned_of(options: dict[str, Any]) -> None:
    NaturalSVI(hidden, partly_points(), NaturalGradient(**options)).step(X)


def test_nothing_to_warn_of() -> None:
    """Negative control, with warnings as errors."""
    NaturalSVI(hidden, AutoNormal(hidden), NaturalGradient()).step(X)
    NaturalSVI(normal, no_guide, NaturalGradient()).step(X)


def test_warnings_have_their_table() -> None:
    kinds = {
        name
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.PyronatWarning)
    } - {"PyronatWarning"}
    section = README.partition("### Warnings and the log")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == kinds == {"WithoutFisher"}
    assert issubclass(pyronat.PyronatWarning, UserWarning)


# --- the log -----------------------------------------------------------------------------------


def said(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == level]


def test_a_training_is_logged(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    caplog.set_level(logging.DEBUG, "pyronat")
    svi = NaturalSVI(normal, no_guide, NaturalGradient())
    for _ in range(11):
        svi.step(X)
    assert said(caplog, logging.DEBUG) == ["measured 1 blocks, 0 districts"] * 3
    svi.save(tmp_path / "a.pt")
    svi.load(tmp_path / "a.pt")
    assert said(caplog, logging.INFO) == [
        "model: 1 sites, 1 blocks, 1 districts, Full geometry",
        "guide: 0 sites, 0 blocks, 0 districts, Full geometry",
        f"wrote {tmp_path / 'a.pt'}",
        f"read {tmp_path / 'a.pt'}",
    ]
    assert not said(caplog, logging.WARNING)
    assert {record.name.split(".")[0] for record in caplog.records} == {"pyronat"}


def test_new_branches_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    def model(x: Tensor) -> None:
        normal(x)
        if len(x) > 2:
            pyro.sample("y", dist.Normal(pyro.param("other", torch.tensor(0.0)), 1.0), obs=x[0])

    caplog.set_level(logging.INFO, "pyronat")
    svi = NaturalSVI(model, no_guide, NaturalGradient())
    svi.step(X[:2])
    svi.step(X)
    found = [line for line in said(caplog, logging.INFO) if line.startswith("model")]
    assert [line[:26] for line in found] == [
        "model: 1 sites, 1 blocks, ",
        "model: 2 sites, 2 blocks, ",
    ]


def test_steps_that_are_not_taken_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    svi = NaturalSVI(normal, no_guide, NaturalGradient())
    with pytest.raises(NonFiniteStep):
        for _ in range(3):
            svi.step(torch.tensor([1e200]))
    found = said(caplog, logging.WARNING)
    assert len(found) == 3 and "not taken" in found[0] and "3 in a row" in found[2]


def test_steps_that_are_taken_back_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    free = KLTrustRegion(model=math.inf)
    optim = NaturalGradient(50.0, damping=ConstantDamping(0.0), trust_region=free)
    svi = NaturalSVI(normal, no_guide, optim)
    undone = []
    for step in range(4):
        svi.step(X)
        undone += [step] * svi.info.undone
    found = said(caplog, logging.WARNING)
    assert undone and len(found) == len(undone)
    assert found[0] == f"step {undone[0] - 1} was taken back, further ones have the factor 0.5"


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Not even warnings of the log, without a handler: the package has one that does nothing."""
    handlers = logging.getLogger("pyronat").handlers
    assert any(isinstance(handler, logging.NullHandler) for handler in handlers)
    svi = NaturalSVI(normal, no_guide, NaturalGradient())
    pyronat.analyze(normal, X)
    for _ in range(2):
        svi.step(torch.tensor([1e200]))
    svi.step(X)
    svi.save(tmp_path / "a.pt")
    assert capfd.readouterr() == ("", "")


# --- the command line --------------------------------------------------------------------------

PROGRAM = """
import pyro, torch, pyro.distributions as dist
from pyro.infer.autoguide import AutoDelta

def model(x):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

guide = AutoDelta(model)

def make_data(seed):
    return torch.zeros(20) + 3
"""


def test_the_command_line_is_heard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "points.py"
    path.write_text(PROGRAM)
    log, before = logging.getLogger("pyronat"), warnings.showwarning
    handlers, level = list(log.handlers), log.level
    argv = ["train", str(path), "--steps", "2", "--quiet"]
    for options, words in (
        ([], ("note: AutoDelta.mean have no metric",)),
        (["-v"], ("INFO pyronat.telling: model: 2 sites",)),
        (["-vv"], ("INFO pyronat.telling: model", "DEBUG pyronat.refresh: measured")),
    ):
        assert main([*argv, *options]) == 0
        err = capsys.readouterr().err
        assert all(word in err for word in words), err
        assert ("DEBUG" in err, "INFO" in err) == ("-vv" in options, bool(options))
    assert list(log.handlers) == handlers and log.level == level
    assert warnings.showwarning is before
