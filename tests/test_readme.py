"""The README says only what is so: its example runs, its tables are complete."""

import inspect
import re
import shlex
from pathlib import Path

import pyro
import pytest
import torch

import pyronat
from pyronat import errors, families
from pyronat.cli import main

README = (Path(__file__).parents[1] / "README.md").read_text()


def block(marker: str) -> str:
    found = re.search(rf"<!-- {marker} -->\n```\w+\n(.*?)```", README, re.DOTALL)
    assert found is not None, f"the README has no block {marker!r}"
    return found[1]


def test_example_runs_and_trains(capsys):
    torch.set_default_dtype(torch.float32)
    pyro.set_rng_seed(0)
    namespace = {}
    exec(block("example"), namespace)
    printed = capsys.readouterr().out
    assert "16 of 5 × 5" in printed
    assert namespace["svi"].info.step == 99
    assert namespace["svi"].info.accepted
    loss = namespace["svi"].evaluate_loss(namespace["x"]) / 200
    independent_pixels = 16 * 0.611  # entropy of Bernoulli(.3) in nats
    assert loss < independent_pixels + 0.5


EXAMPLES = re.findall(r"<!-- example -->\n```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("number", range(1, len(EXAMPLES)))
def test_other_examples_run(number, capsys):
    assert README.count("```python") == len(EXAMPLES)
    torch.set_default_dtype(torch.float32)
    exec(EXAMPLES[number], {})
    assert capsys.readouterr().out


def test_commands_do_all_the_set_up():
    for marker in ("command: main", "command: test"):
        command = block(marker).strip()
        assert "\n" not in command
        assert "venv" in command and "pip install" in command
    assert "python -m examples.digits" in block("command: main")
    assert "python -m pytest" in block("command: test")


def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").symlink_to(Path(__file__).parents[1] / "models")
    commands = block("command line").splitlines()
    for command in commands:
        program, *argv = shlex.split(command)
        assert program == "pyronat"
        assert main([*argv, "--size", "200"]) == 0
    assert "60 before" in capsys.readouterr().out
    written = set(re.findall(r"\S+\.(?:png|pt|jsonl)", " ".join(commands)))
    assert written == {path.name for path in tmp_path.iterdir()} - {"models"}


def test_error_table_is_complete():
    table = set(re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE))
    raised = {
        name
        for name, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, pyronat.PyronatError) and kind is not pyronat.PyronatError
    }
    assert raised <= table
    assert {name for name in table if hasattr(errors, name)} == raised


def test_all_families_are_named():
    for family in families.FAMILIES:
        assert re.search(rf"\b{family}\b", README), f"the README does not name {family}"


@pytest.mark.parametrize("name", sorted(set(pyronat.__all__) - {"Fisher", "PyronatError"}))
def test_public_names_have_docstrings(name):
    item = getattr(pyronat, name)
    assert inspect.getdoc(item)


@pytest.mark.parametrize("example", ["digits", "mnist"])
def test_results_are_filled_in(example):
    results = re.search(rf"<!-- results: {example} -->(.*?)<!-- end -->", README, re.DOTALL)
    assert results is not None
    assert "natural" in results[1] and "Adam" in results[1]
