"""The benchmark of many seeds says what becomes of trainings."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path

import pyro
import pytest
import torch
from torch.distributions import constraints

import pyronat
from examples.benchmarks import robustness
from pyronat import NaturalSVI
from pyronat.steps import KLTrustRegion

pytestmark = pytest.mark.usefixtures("single_precision")


def run(path: Path, *arguments: str) -> tuple[int, dict[str, list[dict[str, object]]]]:
    small = ["--seeds", "2", "--steps", "3", "--size", "30", "--json", str(path)]
    status = robustness.main([*small, *arguments])
    return status, json.loads(path.read_text())


def test_every_training_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, report = run(tmp_path / "new" / "report.json", "--programs", "mixture", "vae")
    assert status == 0
    found = [(r["program"], r["geometry"], r["seed"], r["outcome"]) for r in report["runs"]]
    assert found == [
        (program, geometry, seed, outcome)
        for seed in (0, 1)
        for program, geometry, outcome in [
            ("mixture", "full", "trained"),
            ("mixture", "visible", "trained"),
            ("vae", "full", "trained"),
            ("vae", "visible", "refused"),
        ]
    ]
    lines = (tmp_path / "new" / "report.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == report["runs"]
    assert report["outcomes"] == {"trained": 6, "refused": 2}
    assert "BlockTooLarge" in str(report["runs"][3]["error"])
    assert "| vae | visible | 0 | 2 | 0 | 0 | 0 | 0 | 0 | 0 |" in capsys.readouterr().out


@pytest.mark.parametrize("bounded", [True, False])
def test_rates_that_are_too_large_are_bounded_or_taken_back(
    bounded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not bounded:
        free = KLTrustRegion(model=math.inf)
        optimizer = partial(pyronat.NaturalGradient, trust_region=free)
        monkeypatch.setattr(pyronat, "NaturalGradient", optimizer)
    status, report = run(
        tmp_path / "report.json", "--programs", "factor analysis", "--rate-factor", "500"
    )
    assert status == 0
    assert all(bool(r["undone"]) != bounded for r in report["runs"])


@pytest.mark.parametrize("what", ["crashed", "broken"])
def test_failures_are_seen(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control."""
    step = NaturalSVI.step

    def bad(self: NaturalSVI, *args: object) -> float:
        loss = step(self, *args)
        if what == "crashed":
            raise KeyError("of no use")
        for _, leaf in pyro.get_param_store().named_parameters():
            leaf.data.fill_(torch.nan)
        return loss

    monkeypatch.setattr(NaturalSVI, "step", bad)
    status, report = run(tmp_path / "report.json", "--programs", "mixture", "--steps", "1")
    assert status == 1
    assert {r["outcome"] for r in report["runs"]} == {what}


def test_parameters_outside_their_support_are_seen() -> None:
    pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
    assert robustness.sound()
    pyro.get_param_store()._params["scale"].data.fill_(-200.0)
    assert not robustness.sound()
