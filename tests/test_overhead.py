"""`examples.benchmarks.overhead`: costs in steps of Adam are ratios of what was timed."""

import json
from pathlib import Path

import pyro
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from examples.benchmarks import overhead

pytestmark = pytest.mark.usefixtures("single_precision")


def test_the_quick_version_measures_every_method(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "new" / "costs.json"
    overhead.main(["--quick", "--json", str(file)])
    report = json.loads(file.read_text())
    found = [(result["problem"].split()[0], result["method"]) for result in report["results"]]
    sbn = [("SBN", "full"), ("SBN", "visible")]
    assert found == [*sbn, *sbn, ("VAE", "full")]
    for result in report["results"]:
        assert result["measuring"] > result["plain"] > 0
        assert result["plain"] < result["late"] < result["early"] < result["measuring"]
    printed = capsys.readouterr().out
    assert printed.count("\n| ") == 6 and str(file) in printed


def test_every_turn_of_a_natural_gradient_measures_once() -> None:
    problem = overhead.problems(overhead.QUICK)[0]
    natural, adam = overhead.start(problem, "full"), overhead.start(problem, "Adam")
    data = torch.rand(overhead.TURN, 20, problem.pixels).round()
    for trainee in (natural, adam, natural, adam):
        trainee.turn(data)
    assert [len(steps) for steps in natural.plain] == [16, 16]
    assert [len(steps) for steps in natural.measuring] == [4, 4]
    assert [len(steps) for steps in adam.plain] == [20, 20] and adam.measuring == [[], []]
    assert not list(pyro.get_param_store()), "each has parameters of its own"
    shared = natural.store["params"].keys() & adam.store["params"].keys()
    assert shared and all(
        natural.store["params"][name] is not adam.store["params"][name] for name in shared
    )


def test_a_guide_with_a_metric_is_measured_in_a_step_of_its_own() -> None:
    problem = overhead.problems(overhead.QUICK)[2]
    natural = overhead.start(problem, "full")
    for _ in range(2):
        natural.turn(torch.rand(overhead.TURN, 20, problem.pixels).round())
    assert [len(steps) for steps in natural.measuring] == [2, 2]


def test_a_plain_step_reads_three_numbers_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss, and whether gradient and step are finite; steps that measure curvature read more.

    Checks of arguments by Pyro and torch are turned off, as for speed.
    """
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", False)
    problem = overhead.problems(overhead.QUICK)[0]
    reads: dict[str, list[int]] = {}
    for method in ("Adam", "full"):
        trainee = overhead.start(problem, method)
        data = torch.rand(overhead.TURN, 20, problem.pixels).round()
        with pyro.validation_enabled(False), pyro.get_param_store().scope(trainee.store):
            for batch in data:
                with profile(activities=[ProfilerActivity.CPU]) as seen:
                    trainee.svi.step(batch)
                events = seen.key_averages()
                found = [e.count for e in events if e.key == "aten::_local_scalar_dense"]
                reads.setdefault(method, []).append(sum(found))
    measuring, plain = reads["full"][::5], [n for i, n in enumerate(reads["full"]) if i % 5]
    assert plain == [3] * 16
    assert min(measuring) > 3, "reads are counted"
    assert min(reads["Adam"][1:]) > 3, "of which stock Adam has more"
