"""Runs every example in its quick version."""

import importlib
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pyro
import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
OUTPUTS = {
    "digits": {"curves.png", "digits.png", "metrics.jsonl"},
    "missing_information": {"paths.png", "results.json", "table.md"},
    "variational": {"curves.png", "results.json", "table.md"},
}
"""The files that each example writes."""


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    threads = torch.get_num_threads()
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()
    torch.set_num_threads(threads)


def test_every_example_is_listed() -> None:
    names = {path.stem for path in EXAMPLES.glob("*.py")} - {"__init__"}
    assert names == set(OUTPUTS)


@pytest.mark.parametrize("name", sorted(OUTPUTS))
def test_example_runs(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "folder"
    importlib.import_module(f"examples.{name}").main(["--quick", "--output", str(output)])
    printed = capsys.readouterr().out
    assert str(output) in printed
    assert {path.name for path in output.iterdir()} == OUTPUTS[name]
    for path in output.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    if name == "digits":
        check_digits(output, printed)
    if name == "variational":
        check_variational(output, printed)


def check_digits(output: Path, printed: str) -> None:
    """The metrics of the digits are complete and sound."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    keys = [(m["split"], m["method"], m["rate"], m["seed"], m["epoch"]) for m in lines]
    assert keys and len(set(keys)) == len(keys)
    assert all(m["seconds"] > 0 and math.isfinite(m["loss"]) for m in lines)
    assert {m["method"] for m in lines if m["method"] not in printed} == set()
    assert all(math.isfinite(m["nll"]) for m in lines if m["split"] == "test")
    assert len(lines) == 2 * (2 + 4)
    finals = {m["method"]: m["nll"] for m in lines if (m["split"], m["epoch"]) == ("test", 2)}
    assert len(finals) == 4
    assert all(15 < nll < 25 for nll in finals.values())


def check_variational(output: Path, printed: str) -> None:
    """Every program has its methods, and every run its curve or its error."""
    runs = json.loads((output / "results.json").read_text())
    assert (output / "table.md").read_text() in printed + "\n"
    programs = {run["program"] for run in runs}
    assert len(programs) == 6 and len(runs) == 6 * (2 + 2)
    for run in runs:
        assert (run["error"] is None) == math.isfinite(run["validation"])
        assert len(run["steps"]) == len(run["seconds"]) == len(run["values"])
        if run["method"] == "Adam":
            assert run["error"] is None and all(map(math.isfinite, run["values"]))
    natural = [run for run in runs if run["method"] != "Adam" and run["error"] is None]
    assert {"linear regression", "eight schools"} <= {run["program"] for run in natural}
