"""The parser of the command line, and the values of its options."""

from __future__ import annotations

import argparse
import importlib.metadata
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias, get_args

import torch

from pyronat.comparison import GEOMETRIES, METHODS, RATES
from pyronat.inspection import DREAMS
from pyronat.loading import CONVENTIONS
from pyronat.recipes import LossName

_EXAMPLES = """\
examples:
  pyronat inspect model.py                        sites, blocks, districts
  pyronat inspect model.py --spectrum             and why EM is slow here
  pyronat inspect model.py --plot net.png --heatmap fisher.png
  pyronat train model.py --steps 500 --plot curve.png --samples samples.png
  pyronat train model.py --epochs 20 --batch-size 100 --checkpoint run.pt --metrics run.jsonl
  pyronat train model.py --epochs 20 --batch-size 100 --checkpoint run.pt --resume
  pyronat train model.py --compare adam,full,visible --plot comparison.png

exit codes: 0 done, 1 the program cannot be trained or read, as the message says, 2 wrong usage,
130 interrupted (after a whole step, with its checkpoint written)
"""

Command: TypeAlias = Callable[[argparse.Namespace, argparse.ArgumentParser], int]
"""What runs options, and returns an exit code."""


def make_parser(inspect: Command, train: Command) -> argparse.ArgumentParser:
    """The parser of the command line.

    Args:
        inspect: runs `pyronat inspect`.
        train: runs `pyronat train`.

    Returns:
        A parser whose options have a `command`.
    """
    parser = argparse.ArgumentParser(
        prog="pyronat",
        description="Natural gradients for Pyro programs: see the structure of one, train it.",
        epilog=_EXAMPLES + "\n" + CONVENTIONS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = importlib.metadata.version("pyronat")
    parser.add_argument("--version", action="version", version=f"pyronat {version}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_inspect(commands, inspect)
    _add_train(commands, train)
    return parser


def _add(commands: Any, name: str, about: str, command: Command) -> Any:
    """A command with the options that all have."""
    parser = commands.add_parser(
        name,
        help=about,
        description=about[0].upper() + about[1:] + ".",
        epilog=CONVENTIONS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=command)
    add = parser.add_argument
    add("file", metavar="FILE.py[:NAME]", help="a file with a Pyro program, see below")
    add("--guide", metavar="NAME", default="", help="name of the guide in the file")
    add(
        "--size",
        type=positive,
        metavar="N",
        help="number of data; by default the usual one",
    )
    add("--seed", type=int, default=0, metavar="N", help="of data, start and samples (0)")
    add("--device", type=device, default="cpu", help="cpu, cuda, cuda:1, … (cpu)")
    add("--double", action="store_true", help="double precision")
    add(
        "--threads",
        type=positive,
        metavar="N",
        help="of torch; 1 is best for small programs",
    )
    add("--traceback", action="store_true", help="with errors, where in the code they are from")
    add("--verbose", "-v", action="count", default=0, help="log what happens; twice for more")
    return parser


def _add_inspect(commands: Any, command: Command) -> None:
    about = "print the structure of a program: sites, blocks of its Fisher information, districts"
    parser = _add(commands, "inspect", about, command)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="as JSON")
    form.add_argument("--dot", action="store_true", help="the graph in the language of Graphviz")
    add = parser.add_argument
    add("--plot", type=Path, metavar="OUT", help="draw the network into a picture file")
    add("--blanket", metavar="SITE", help="whose Markov blanket is to stand out there")
    add("--spectrum", action="store_true", help="measure which information hiding takes away")
    add("--heatmap", type=Path, metavar="OUT", help="draw the Fisher information, full and visible")
    add(
        "--dreams",
        type=positive,
        default=DREAMS,
        metavar="N",
        help=f"behind both ({DREAMS})",
    )
    add("--checkpoint", type=Path, metavar="FILE", help="at the parameters of this training")


def _add_train(commands: Any, command: Command) -> None:
    parser = _add(commands, "train", "train a program by natural gradients", command)
    add = parser.add_argument
    add("--geometry", choices=GEOMETRIES, default="full", help="metric of the model (full)")
    kinds = ("full", "euclidean")
    add("--guide-geometry", choices=kinds, help="metric of the guide; by default what suits it")
    add(
        "--mixing",
        type=mixing,
        metavar="SHARE",
        help="of the full in the visible metric, or auto",
    )
    add(
        "--loss",
        choices=get_args(LossName),
        default="auto",
        help="by default what the hidden variables need",
    )
    add("--particles", type=positive, metavar="N", help="guide draws for each step")
    add("--lr", type=rate, default=0.3, metavar="RATE", help="at the first step (0.3)")
    add("--schedule", choices=("linear", "constant"), default="linear", help="of the rate (linear)")
    add("--average", action="store_true", help="keep an average over the steps, and judge it")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=positive, metavar="N", help="number of steps (200)")
    length.add_argument("--epochs", type=rate, metavar="N", help="or how often to see all data")
    add("--batch-size", type=positive, metavar="N", help="data for each step; by default all")
    _add_files(parser)
    group = parser.add_argument_group("comparison")
    names = ",".join(METHODS)
    add = group.add_argument
    add(
        "--compare",
        type=methods,
        metavar="LIST",
        help=f"some of {names}: a table and a picture",
    )
    add(
        "--rates",
        type=rates,
        default=RATES,
        metavar="LIST",
        help="Adam's; the best one counts. two-rate has a fifth or five times it for the guide",
    )
    add("--seeds", type=positive, default=1, metavar="N", help="runs of each method (1)")


def _add_files(parser: Any) -> None:
    add = parser.add_argument
    add("--checkpoint", type=Path, metavar="FILE", help="keep all that training depends on here")
    add(
        "--save-every",
        type=positive,
        default=100,
        metavar="N",
        help="steps between (100)",
    )
    add("--resume", action="store_true", help="go on from the checkpoint, as if never stopped")
    add("--overwrite", action="store_true", help="begin anew where checkpoint or metrics are there")
    add("--metrics", type=Path, metavar="FILE", help="a line of JSON for each step, or each run")
    add("--plot", type=Path, metavar="OUT", help="draw the course of the training")
    add("--samples", type=Path, metavar="OUT", help="draw data, and what the program makes of them")
    add("--quiet", "-q", action="store_true", help="no progress")


# Values of options


def positive(text: str) -> int:
    """A number of at least 1.

    Args:
        text: what was given.

    Returns:
        The value.

    Raises:
        ArgumentTypeError: if it is something else.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a number of at least 1 is needed, not {text}")
    return int(text)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def rate(text: str) -> float:
    """A positive number.

    Args:
        text: what was given.

    Returns:
        The value.

    Raises:
        ArgumentTypeError: if it is something else.
    """
    if not 0 < _number(text) < math.inf:
        raise argparse.ArgumentTypeError(f"a positive number is needed, not {text}")
    return float(text)


def mixing(text: str) -> float | str:
    """A share, or "auto".

    Args:
        text: what was given.

    Returns:
        The value.

    Raises:
        ArgumentTypeError: if it is something else.
    """
    if text == "auto":
        return text
    if not 0 <= _number(text) <= 1:
        raise argparse.ArgumentTypeError(
            f'a share between 0 and 1 is needed, or "auto", not {text}'
        )
    return float(text)


def rates(text: str) -> tuple[float, ...]:
    """Positive numbers, between commas."""
    return tuple(map(rate, text.split(",")))


def methods(text: str) -> tuple[str, ...]:
    """Methods of a comparison, between commas, each once.

    Args:
        text: what was given.

    Returns:
        The value.

    Raises:
        ArgumentTypeError: if it is something else.
    """
    names = tuple(dict.fromkeys(text.split(",")))
    if unknown := set(names) - set(METHODS):
        raise argparse.ArgumentTypeError(
            f"there is no {', '.join(sorted(unknown))}; there are {', '.join(METHODS)}"
        )
    return names


def device(text: str) -> str:
    """A device of torch that is there.

    Args:
        text: what was given.

    Returns:
        The value.

    Raises:
        ArgumentTypeError: if it is something else.
    """
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{text} is not there: {error}") from error
    return text
