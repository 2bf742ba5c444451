"""`python -m examples.benchmarks`: what it writes, and that the README says what was measured."""

import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.benchmarks import __main__ as benchmarks
from examples.benchmarks import files
from examples.benchmarks.__main__ import BEGIN, COMMANDS, END, FIGURES, PARTS, replaced, section

FOLDER = FIGURES.parent
README = FOLDER.parents[1] / "README.md"
ALONE = {"__init__", "__main__", "files"}


def test_every_benchmark_is_run() -> None:
    assert set(COMMANDS) == {path.stem for path in FOLDER.glob("*.py")} - ALONE
    assert {part.name for part in PARTS} | benchmarks.ALWAYS_SMALL == set(COMMANDS)


def test_the_readme_shows_the_figures_that_are_kept() -> None:
    text, reports = README.read_text(), json.loads(FIGURES.read_text())
    assert replaced(text, section(reports)) == text, (
        "write the section anew: python -m examples.benchmarks --figures "
        "examples/benchmarks/figures.json --readme README.md"
    )
    reports["overhead"]["results"][0]["plain"] += 1
    assert replaced(text, section(reports)) != text


def test_the_figures_are_of_one_thread_and_full_size() -> None:
    reports = json.loads(FIGURES.read_text())
    assert set(reports) == set(COMMANDS)
    for name, report in reports.items():
        assert report["threads"] == 1, name
        assert report["processor"] == reports["overhead"]["processor"], name
    problems = {result["problem"] for result in reports["overhead"]["results"]}
    assert "SBN 784-200-200-200, 10 particles" in problems
    assert {result["size"] for result in reports["scaling"]["results"]} >= {100, 10000}


def test_every_benchmark_in_a_process_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmarks, "COMMANDS", {"solvers": ("--unknown",)})
    found = benchmarks.run_all(tmp_path, quick=True)
    assert found == {"solvers": json.loads((tmp_path / "solvers.json").read_text())}
    assert found["solvers"]["results"] and found["solvers"]["threads"] == 1
    with pytest.raises(SystemExit, match="solvers has failed with exit status 2"):
        benchmarks.run_all(tmp_path, quick=False)
    assert "--unknown" in capfd.readouterr().err


def test_an_earlier_run_is_shown_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reports = json.loads(FIGURES.read_text())
    reports["overhead"]["processor"] = "abacus"
    given, kept, readme = (tmp_path / name for name in ("given.json", "kept.json", "README.md"))
    given.write_text(json.dumps(reports))
    readme.write_text(f"before\n{BEGIN}old\n{END}after\n")
    monkeypatch.setattr(benchmarks, "FIGURES", kept)
    output = tmp_path / "new" / "folder"
    arguments = ["--figures", str(given), "--readme", str(readme), "--output", str(output)]
    benchmarks.main(arguments)
    new = section(reports)
    assert "abacus" in new and new in capsys.readouterr().out
    assert readme.read_text() == f"before\n{BEGIN}\n{new}\n{END}after\n"
    assert json.loads(kept.read_text()) == reports
    assert {path.name for path in output.iterdir()} == {"figures.json", "performance.md"}
    with pytest.raises(SystemExit, match="no place for the section"):
        replaced("before", new)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_options_are_known(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Benchmarks read their options before anything else; here they get no further."""

    class Read(Exception):
        pass

    def stop(*args: Any) -> None:
        raise Read

    module = importlib.import_module(f"examples.benchmarks.{name}")
    monkeypatch.setattr(torch, "set_num_threads", stop)
    if name == "robustness":
        monkeypatch.setattr(module, "run_all", stop)
    options = [COMMANDS[name]] if name in benchmarks.ALWAYS_SMALL else [COMMANDS[name], ["--quick"]]
    for some in options:
        with pytest.raises(Read):
            module.main(some)


def test_what_kind_of_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel name\t: Some Kind @ 2 GHz: new\nflags: fpu\n")
    monkeypatch.setattr(files, "CPU_INFO", info)
    assert files.processor() == "Some Kind @ 2 GHz: new"
    monkeypatch.setattr(files, "CPU_INFO", tmp_path / "none")
    assert files.processor()
    files.write(tmp_path / "one.json", results=[1])
    assert json.loads((tmp_path / "one.json").read_text())["results"] == [1]
    with pytest.raises(ValueError, match="JSON"):
        files.write(tmp_path / "two.json", results=[math.inf])
