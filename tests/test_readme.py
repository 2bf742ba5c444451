"""The README says only what is so: its example runs, its tables are complete."""

import importlib
import inspect
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from test_errors import TABLE as provoked
from torch import nn

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


def test_three_lines_change():
    """The example trains with them, and by Adam with those that they replace."""
    torch.set_default_dtype(torch.float32)
    changes = block("three lines").splitlines()
    old, new = ([line[1:] for line in changes if line[0] == sign] for sign in "-+")
    assert len(old) == len(new) == 3
    lines = block("example").splitlines()
    assert all(line in lines for line in new)
    lines = [line for line in lines if not line.startswith("print(")]
    lines = [re.sub(r"^loss = .*", "loss = pyro.infer.Trace_ELBO()", line) for line in lines]
    before = [dict(zip(new, old, strict=True)).get(line, line) for line in lines]
    assert not any("pyronat" in line for line in before)
    for program, kind in ((before, pyro.infer.SVI), (lines, pyronat.NaturalSVI)):
        pyro.clear_param_store()
        namespace = {}
        exec("\n".join(program), namespace)
        assert type(namespace["svi"]) is kind and namespace["step"] == 99


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
    kinds = {name: kind for name, kind in vars(errors).items() if name in table}
    warned = {name for name, kind in kinds.items() if issubclass(kind, errors.PyronatWarning)}
    assert {name for name in table if hasattr(errors, name)} - warned == raised
    assert {row.error.__name__ for row in provoked} == raised


def known(name: str) -> bool:
    """Whether a dotted name is of pyronat, or of one of its modules."""
    first, *rest = name.split(".")
    found = pyronat.StepInfo if name.startswith("svi.info.") else getattr(pyronat, first, None)
    if name.startswith("svi.info."):
        rest = rest[1:]
    if found is None:
        found = importlib.import_module(f"pyronat.{first}")
    for part in rest:
        if is_dataclass(found) and part in {field.name for field in fields(found)}:
            return True
        found = getattr(found, part, None)
    return found is not None


def test_the_mathematics_is_in_the_code():
    section = README.partition("## The mathematics on one screen")[2].partition("\n## ")[0]
    symbols, theorems = (
        section.partition(head)[2].partition("\n\n")[0]
        for head in ("| symbol | meaning | code |", "| theorem | function | test |")
    )
    names = [re.findall(r"`([^`]+)`", line.split(" | ")[-1]) for line in symbols.splitlines()[2:]]
    rows = [re.split(r" \| ", line) for line in theorems.splitlines()[2:]]
    assert len(names) > 10 and len(rows) > 20
    tests = [re.findall(r"`([^`]+)`", row[-1]) for row in rows]
    names += [re.findall(r"`([^`]+)`", row[-2]) for row in rows]
    assert all(names) and all(tests)
    assert [name for found in names for name in found if not known(name)] == []
    root = Path(__file__).parents[1]
    assert [path for found in tests for path in found if not (root / path).is_file()] == []


def test_every_example_is_spoken_of():
    section = README.partition("### Examples")[2].partition("\n### ")[0]
    folder = Path(__file__).parents[1] / "examples"
    names = {path.stem for path in folder.glob("*.py")} - {"__init__", "comparison"}
    assert names | {"tutorial.ipynb"} == set(
        re.findall(
            r"`(\w+(?:\.ipynb)?)`(?=[,| ]*)",
            "".join(
                line.split(" | ")[0] for line in section.splitlines() if line.startswith("| `")
            ),
        )
    ) - {"python"}


@dataclass(frozen=True)
class Kernel:
    """What stands between a site and its parents, and the blocks that it makes.

    Attributes:
        row: of the README, by a part of its first column.
        make: a network, or None.
        observe: draws the site from the network and hidden bits `[data, 4]`.
        blocks: structure, count and size of each block.
    """

    row: str
    make: Callable[[], nn.Module | None]
    observe: Callable[[Any, torch.Tensor], Any]
    blocks: tuple[tuple[str, int, int], ...]


def bits(logits):
    pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1))


def noisy_or(module, h):
    rate = pyro.param("rate", torch.ones(4, 3))
    pyro.sample("x", dist.Bernoulli(1 - torch.exp(-0.1 - h @ rate)).to_event(1))


def table(module, h):
    rows = pyro.param("table", torch.ones(2, 2, 3) / 3, constraint=dist.constraints.simplex)
    pyro.sample("x", dist.Categorical(rows[h[..., 0].long(), h[..., 1].long()]))


def loc_and_scale(module, h):
    loc = pyro.param("loc", torch.zeros(2))
    scale = pyro.param("scale", torch.ones(2), constraint=dist.constraints.positive)
    pyro.sample("x", dist.Normal(loc[h[..., 0].long()], scale[h[..., 0].long()]))


def conv(module, h):
    pyro.sample("x", dist.Bernoulli(logits=module(h.unsqueeze(-2))).to_event(2))


def layers(size):
    return nn.Sequential(nn.Linear(4, size), nn.Tanh(), nn.Linear(size, 30))


NETWORKS = "several layers, `nn.GRU`"
KERNELS = (
    Kernel(
        "nn.Linear`, `F.linear", lambda: nn.Linear(4, 3), lambda m, h: bits(m(h)), (("unit", 3, 5),)
    ),
    Kernel("convolution", lambda: nn.Conv1d(1, 2, 2), conv, (("unit", 2, 3),)),
    Kernel(
        "BatchNorm",
        lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)),
        lambda m, h: bits(m(h)),
        (("unit", 3, 7),),
    ),
    Kernel("noisy-or", lambda: None, noisy_or, (("unit", 3, 4),)),
    Kernel("a table", lambda: None, table, (("unit", 4, 3),)),
    Kernel("locations and scales", lambda: None, loc_and_scale, (("unit", 2, 1), ("unit", 2, 1))),
    Kernel(
        "nn.Embedding",
        lambda: nn.Embedding(2, 3),
        lambda m, h: bits(m(h[..., 0].long())),
        (("unit", 6, 1),),
    ),
    Kernel(
        "logits of a Categorical",
        lambda: nn.Linear(4, 3),
        lambda m, h: pyro.sample("x", dist.Categorical(logits=m(h))),
        (("dense", 1, 15),),
    ),
    Kernel(NETWORKS, lambda: layers(5), lambda m, h: bits(m(h)), (("dense", 1, 205),)),
    Kernel(
        NETWORKS,
        lambda: nn.GRU(1, 3, batch_first=True),
        lambda m, h: bits(m(h.unsqueeze(-1))[0][:, -1]),
        (("dense", 1, 54),),
    ),
    Kernel(
        "the same, larger", lambda: layers(100), lambda m, h: bits(m(h)), (("kronecker", 1, 3530),)
    ),
)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: str(kernel.blocks))
def test_kernels_make_the_blocks_of_the_table(kernel):
    module = kernel.make()

    def model():
        with pyro.plate("data", 5):
            h = pyro.sample("h", dist.Bernoulli(0.5 * torch.ones(4)).to_event(1))
            if module is not None:
                pyro.module("net", module)
            kernel.observe(module, h)

    found = re.search(r"<!-- kernels -->(.*?)<!-- end -->", README, re.DOTALL)
    assert found is not None
    (row,) = [line for line in found[1].splitlines() if kernel.row in line.split(" | ")[0]]
    blocks = pyronat.analyze(model).blocks
    assert tuple((block.structure, block.count, block.size) for block in blocks) == kernel.blocks
    held = row.split(" | ")[2]
    assert all(
        f'"{block.structure}"' in held and block.exact == ("exact" in held) for block in blocks
    )


def test_every_kernel_of_the_table_is_tested():
    found = re.search(r"<!-- kernels -->(.*?)<!-- end -->", README, re.DOTALL)
    for line in found[1].strip().splitlines()[2:]:
        assert any(kernel.row in line.split(" | ")[0] for kernel in KERNELS), line


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
