"""Runs all benchmarks at a small size, and writes what they find in one folder.

Each runs in a process of its own, one after the other, on one thread: costs of steps, their growth,
memory, solvers, time until Adam's final loss, and in small versions the analysis of programs and
the many seeds of the zoo. Together they take about ten minutes of one core. The folder then holds

* NAME.json: what a benchmark has found;
* figures.json: all of them together;
* performance.md: the section "Performance" of the README.

Run it as `python -m examples.benchmarks`, or with `--quick` for small programs. With `--readme
FILE` the section takes the place of the one in that file, and the figures that of those which are
kept beside this program, from which a test makes the section again. With `--figures FILE` nothing
is measured: the section is made from an earlier figures.json.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.benchmarks import memory, overhead, scaling, solvers, time_to_target

ROOT = Path(__file__).parents[2]
FIGURES = Path(__file__).with_name("figures.json")
BEGIN, END = "<!-- performance -->\n", "<!-- end of performance -->\n"
SOME = ("--programs", "mixture", "latent class", "vae", "--seeds", "1", "--steps", "5")
COMMANDS: dict[str, tuple[str, ...]] = {
    "overhead": (),
    "scaling": ("--turns", "4"),
    "memory": (),
    "solvers": (),
    "time_to_target": ("--seeds", "3"),
    "structure": ("--quick",),
    "robustness": (*SOME, "--size", "50"),
}
"""Benchmarks with their options."""
ALWAYS_SMALL = {"structure", "robustness"}
"""Those whose options are for small versions."""

Report = Mapping[str, Any]


def run_all(folder: Path, quick: bool) -> dict[str, Report]:
    """Runs all benchmarks.

    Args:
        folder: Where each writes its file.
        quick: Whether programs are small.

    Returns:
        What they have found, by name.

    Raises:
        SystemExit: If one of them fails.
    """
    reports = {}
    for name, options in COMMANDS.items():
        if quick and name not in ALWAYS_SMALL:
            options = ("--quick",)
        path = folder / f"{name}.json"
        command = [sys.executable, "-m", f"examples.benchmarks.{name}", *options]
        print(f"\n{name}", flush=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "KINETO_LOG_LEVEL": "5"}
        done = subprocess.run([*command, "--json", str(path.resolve())], cwd=ROOT, env=environment)
        if done.returncode:
            raise SystemExit(f"{name} has failed with exit status {done.returncode}")
        reports[name] = json.loads(path.read_text())
    return reports


@dataclass(frozen=True)
class Part:
    """A table of the section.

    Attributes:
        name: Name of its benchmark.
        words: What it shows.
        table: Makes it from the results of the report.
    """

    name: str
    words: str
    table: Callable[[list[dict[str, Any]]], str]


def _late(results: list[dict[str, Any]]) -> str:
    shown = [solvers.Result(**{**one, "shape": tuple(one["shape"])}) for one in results]
    return solvers.table([one for one in shown if one.phase == "late"])


PARTS = (
    Part(
        "overhead",
        "Processor time of a step of `NaturalSVI` with defaults, in steps of stock `SVI` with Adam "
        "on the same loss, batch 100; the longest one measures curvature; means over the first 400 "
        "steps and late, as measurements get rarer:",
        lambda results: overhead.table([overhead.Result(**one) for one in results]),
    ),
    Part(
        "memory",
        "Bytes that are kept between steps, parameters and gradients apart, and the most that is "
        "alive at once in a plain and in a measuring step, in those of Adam. In the visible "
        "geometry `Visible(memory=...)` bounds them:",
        lambda results: memory.table([memory.Result(**one) for one in results]),
    ),
    Part(
        "scaling",
        "How the time of a step grows with the size of a sigmoid belief network (1 particle, full "
        "geometry): exponents over two decades of units, fan-in and data of a batch, and over 1 to "
        "8 hidden layers; in brackets those of the last decade:",
        lambda results: scaling.summary(scaling.growth([scaling.Result(**one) for one in results])),
    ),
    Part(
        "solvers",
        "What a layer with saturated units can be held in, at the default damping: time to form, "
        "factor and solve, over that of a plain batched Cholesky factorization and in pairs of "
        "products forward and backward through the layer, and the error in the norm of the damped "
        "matrix (`--json` has layers at their start as well, where `shared` errs by 0.01):",
        _late,
    ),
    Part(
        "time_to_target",
        "Steps and seconds that the untuned natural gradients take, in those of Adam at the best "
        "of five rates, until the loss with which it ends, and until within 0.1 % of the way from "
        "the start to it (medians over seeds, – where most never get there):",
        lambda results: time_to_target.table([time_to_target.Result(**one) for one in results]),
    ),
)


def section(reports: Mapping[str, Report]) -> str:
    """The section of the README.

    Args:
        reports: What the benchmarks have found, by name.

    Returns:
        Markdown.
    """
    machine = reports["overhead"]
    threads = "one thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    intro = (
        "`python -m examples.benchmarks` measures all of this in about ten minutes of one core, "
        f"and writes this section. Processor: {machine['processor']}, {threads} on "
        f"{machine['processors']} cores shared with other work; torch {machine['torch']}. All "
        "are ratios of medians within one run of a benchmark."
    )
    parts = []
    for part in PARTS:
        command = f"`python -m examples.benchmarks.{part.name}`: "
        parts.append(f"{command}{part.words}\n\n{part.table(list(reports[part.name]['results']))}")
    return "\n\n".join([intro, *parts]) + "\n"


def replaced(text: str, new: str) -> str:
    """A README with another section.

    Args:
        text: The README.
        new: The section.

    Returns:
        The README with it.

    Raises:
        SystemExit: If the README has no place for it.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"there is no place for the section between {BEGIN}and {END}")
    return f"{before}{begin}\n{new}\n{end}{after}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, and writes the files.

    Args:
        arguments: Command line arguments; by default those of the process.
    """
    parser = argparse.ArgumentParser(description="All benchmarks at a small size.")
    parser.add_argument("--output", type=Path, default=Path("benchmarks-output"), metavar="FOLDER")
    parser.add_argument("--quick", action="store_true", help="small programs")
    parser.add_argument("--figures", type=Path, metavar="FILE", help="show these, measure nothing")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="write the section there, too")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    if options.figures is None:
        reports = run_all(options.output, options.quick)
    else:
        reports = json.loads(options.figures.read_text())
    new, figures = section(reports), json.dumps(reports, indent=1) + "\n"
    if options.readme is not None:
        options.readme.write_text(replaced(options.readme.read_text(), new))
        FIGURES.write_text(figures)
    (options.output / "figures.json").write_text(figures)
    (options.output / "performance.md").write_text(new)
    print(
        f"\n{new}\nWrote {len(reports)} reports, figures.json, performance.md in {options.output}"
    )


if __name__ == "__main__":
    main()
