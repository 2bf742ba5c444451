"""`examples.benchmarks.memory`: what torch allocates, and how much of it natural gradients keep."""

import json
from pathlib import Path

import pytest
import torch
from torch.profiler import record_function

import pyronat
from examples.benchmarks import memory
from examples.benchmarks.overhead import QUICK, Problem, problems
from models.helmholtz import Helmholtz
from pyronat.shared import SharedUnits

pytestmark = pytest.mark.usefixtures("single_precision")


def test_every_byte_is_counted() -> None:
    kept = []

    def work() -> None:
        kept.append(torch.empty(1000))
        with record_function(memory.PLAIN):
            torch.empty(500)
            torch.empty(200)
        with record_function(memory.MEASURING):
            some = torch.empty(300)
            torch.empty(400)
            del some
        torch.empty(5000)

    use = memory.recorded(work)
    assert use.alive == 4 * 1000
    assert use.peaks == {memory.PLAIN: 4 * 1500, memory.MEASURING: 4 * 1700}


def test_the_state_of_adam_is_its_moments() -> None:
    machine = problems(QUICK)[1]
    found = memory.measure(machine, "Adam")
    layers = [(8, 16), (4, 8)]
    sizes = [n for a, b in layers for n in (a * b, b, a * b, a)] + [4]
    assert found.parameters == 4 * sum(sizes)
    assert found.state == 2 * found.parameters + 4 * len(sizes), "and the number of its steps"
    assert found.plain > found.state + 2 * found.parameters, "gradients and values"
    assert found.measuring is None


def test_wide_layers_keep_within_three_times_adam(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = Problem(
        "wide",
        lambda: Helmholtz((784, 40)),
        784,
        lambda: pyronat.ReweightedWakeSleep(num_particles=3),
        visible=False,
    )
    adam, full = memory.measure(wide, "Adam"), memory.measure(wide, "full")
    assert full.parameters == adam.parameters
    assert adam.state < full.state < 3 * adam.state
    assert full.measuring is not None and full.plain < full.measuring < 3 * adam.plain
    # Rows of all particles, which an average of eigenvectors takes the place of.
    monkeypatch.setattr(SharedUnits, "compact", lambda units: units)
    assert memory.measure(wide, "full").state > 4 * adam.state


def test_the_command_writes_what_it_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [
        memory.Result("net", "Adam", 10**6, 2 * 10**6, 8 * 10**6, None),
        memory.Result("net", "full", 10**6, 5 * 10**6, 12 * 10**6, 20 * 10**6),
    ]
    monkeypatch.setattr(memory, "run", lambda quick: found if quick else [])
    file = tmp_path / "new" / "memory.json"
    memory.main(["--quick", "--json", str(file)])
    assert "| net | full | 2.0 MB | 2.50 | 8.0 MB | 1.50 | 2.50 |" in capsys.readouterr().out
    assert json.loads(file.read_text())["results"] == [vars(result) for result in found]
