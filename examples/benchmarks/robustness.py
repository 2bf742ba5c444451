"""Many seeds of every program of the zoo: nothing may end in NaN or in an error of its own.

Every program of `models.registry` is trained with the defaults of `NaturalGradient` from many
seeds, in the full geometry, and where something is hidden in the visible one. What becomes of a
training is one of

* trained: all parameters are finite and inside their support, and so is the loss, which is no
  worse than `MOST` nats per datum above the one at the start;
* refused: a `PyronatError` in the first step, which says that a program does not suit a geometry;
* stopped: a `PyronatError` later, with finite parameters inside their support;
* worse: as trained, but for the loss;
* broken: a number is not finite, or a parameter is outside its support;
* crashed: any other exception.

With `--rate-factor` the learning rate is that many times the default: then a training may be
stopped, but neither be broken nor crash.

Run it as `python -m examples.benchmarks.robustness --seeds 100 --jobs 16 --json FILE`. It prints a
table, and writes every run to the file, and at once to the same with the ending `.jsonl`. The exit
status is 1 if any run is broken or has crashed.
"""

import argparse
import json
import math
import multiprocessing
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import torch
from torch.distributions import transform_to
from tqdm import tqdm

import pyronat
from examples.benchmarks import files
from examples.comparison import batches
from examples.zoo import judge, make_loss, start
from models.registry import Program, programs

OUTCOMES = ("trained", "refused", "stopped", "worse", "broken", "crashed")
FAILED = {"broken", "crashed"}
MOST = 1.0
"""Nats per datum by which the loss of a sane training may end above the one at the start."""
DEFAULT_RATE = 0.1
SIZES = {"lda": 20, "dmm": 60, "vae": 200, "sparse gamma def": 50, "fvsbn": 200}
"""Largest numbers of data, where fewer than `Settings.size` are enough."""


@dataclass(frozen=True)
class Settings:
    """How to train.

    Attributes:
        steps: Number of steps.
        rate_factor: Factor on the default learning rate.
        size: Largest number of data.
    """

    steps: int
    rate_factor: float
    size: int


@dataclass(frozen=True)
class Case:
    """A training.

    Attributes:
        program: Name of the program.
        geometry: "full" or "visible".
        seed: Its seed.
    """

    program: str
    geometry: str
    seed: int


@dataclass(frozen=True)
class Run:
    """What became of a training.

    Attributes:
        program: Name of the program.
        geometry: "full" or "visible".
        seed: Its seed.
        outcome: One of `OUTCOMES`.
        error: What was raised, or None.
        start: Loss per datum before it in nats, or None if it cannot be computed.
        end: Loss per datum after it.
        steps: Steps that were taken.
        undone: Steps that were taken back.
        rejected: Steps that were not taken.
        seconds: Wall clock seconds.
    """

    program: str
    geometry: str
    seed: int
    outcome: str
    error: str | None
    start: float | None
    end: float | None
    steps: int
    undone: int
    rejected: int
    seconds: float


def geometry_of(program: Program, name: str) -> Any:
    """A geometry with its defaults; the posterior is enumerated where there is no guide."""
    if name == "full":
        return pyronat.Full()
    enumerated = program.objective == "enumeration" and program.name != "lda"
    return pyronat.Visible(posterior="enumerate") if enumerated else pyronat.Visible()


def sound() -> bool:
    """Whether all parameters are finite and inside their support."""
    store = pyro.get_param_store()
    for name, leaf in store.named_parameters():
        constraint = store._constraints[name]
        value = transform_to(constraint)(leaf.detach())
        if not (torch.isfinite(leaf).all() and torch.isfinite(value).all()):
            return False
        if not bool(constraint.check(value).all()):
            return False
    return True


def finite(number: float) -> float | None:
    """A number, or None where JSON has none."""
    return number if math.isfinite(number) else None


def train(settings: Settings, case: Case) -> Run:
    """Trains a program.

    Args:
        settings: How.
        case: Which, and from which seed.

    Returns:
        What became of it.
    """
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    program = programs()[case.program]
    size = min(program.size, settings.size, SIZES.get(program.name, settings.size))
    data = program.make_data(case.seed, size)
    began = time.perf_counter()
    trainable, _ = start(program, data, case.seed)
    optim = pyronat.NaturalGradient(
        lr=DEFAULT_RATE * settings.rate_factor,
        geometry=geometry_of(program, case.geometry),
        seed=case.seed,
    )
    counts: Counter[str] = Counter()

    def count(info: pyronat.StepInfo, svi: pyronat.NaturalSVI) -> None:
        counts["undone"] += getattr(info, "undone", 0)
        counts["rejected"] += not info.accepted

    loss = make_loss(program)
    svi = pyronat.NaturalSVI(trainable.model, trainable.guide, optim, loss, callbacks=[count])
    first = judge(program, trainable, data)
    outcome, error = "trained", None
    batch_size = None if program.batch_size is None else min(program.batch_size, size)
    try:
        for batch, _ in zip(
            batches(data, batch_size, case.seed), range(settings.steps), strict=False
        ):
            svi.step(*batch)
            trainable.after_step()
    except pyronat.PyronatError as caught:
        outcome = "stopped" if optim.step_count else "refused"
        error = f"{type(caught).__name__}: {caught}"
    except Exception:
        outcome, error = "crashed", traceback.format_exc()
    last = math.nan
    if outcome != "crashed":
        try:
            last = judge(program, trainable, data)
        except (ValueError, ArithmeticError, RuntimeError) as caught:
            error = f"{error or ''} at the end {caught}".strip()
        if not sound() or not math.isfinite(last):
            outcome = "broken"
        elif outcome == "trained" and last > first + MOST:
            outcome = "worse"
    return Run(
        **asdict(case),
        outcome=outcome,
        error=error,
        start=finite(first),
        end=finite(last),
        steps=optim.step_count,
        undone=counts["undone"],
        rejected=counts["rejected"],
        seconds=time.perf_counter() - began,
    )


def cases(names: Sequence[str], geometries: Sequence[str], seeds: Iterable[int]) -> list[Case]:
    """All trainings, seed by seed, so that an interrupted benchmark has seen every program."""
    known = programs()
    return [
        Case(name, geometry, seed)
        for seed in seeds
        for name in names
        for geometry in geometries
        if geometry == "full" or known[name].hidden
    ]


def run_all(settings: Settings, todo: Sequence[Case], jobs: int) -> Iterator[Run]:
    """Trains in this process, or in several others.

    Args:
        settings: How.
        todo: All trainings.
        jobs: Number of processes.

    Yields:
        What became of each, in order.
    """
    work = partial(train, settings)
    if jobs == 1:
        yield from map(work, tqdm(todo))
    else:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, mp_context=spawn) as pool:
            yield from tqdm(pool.map(work, todo), total=len(todo))


def table(runs: Sequence[Run]) -> str:
    """Outcomes by program and geometry, as Markdown."""
    rows: dict[tuple[str, str], Counter[str]] = {}
    for run in runs:
        row = rows.setdefault((run.program, run.geometry), Counter())
        row[run.outcome] += 1
        row["undone"] += run.undone
        row["rejected"] += run.rejected
    columns = (*OUTCOMES, "undone", "rejected")
    lines = ["| program | geometry | " + " | ".join(columns) + " |", "| --- " * 10 + "|"]
    for (program, geometry), row in rows.items():
        cells = " | ".join(str(row[column]) for column in columns)
        lines.append(f"| {program} | {geometry} | {cells} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains and prints.

    Args:
        arguments: Command line arguments; by default those of the process.

    Returns:
        0 if no run is broken or has crashed, else 1.
    """
    parser = argparse.ArgumentParser(description="Trains the zoo from many seeds.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--size", type=int, default=500, help="largest number of data")
    parser.add_argument("--programs", nargs="+", default=list(programs()), choices=programs())
    parser.add_argument("--geometries", nargs="+", default=["full", "visible"])
    parser.add_argument("--rate-factor", type=float, default=1.0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every run to this file")
    options = parser.parse_args(arguments)
    settings = Settings(options.steps, options.rate_factor, options.size)
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    todo = cases(options.programs, options.geometries, seeds)

    runs: list[Run] = []
    for run in run_all(settings, todo, options.jobs):
        runs.append(run)
        if options.json is not None:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            with options.json.with_suffix(".jsonl").open("w" if len(runs) == 1 else "a") as file:
                file.write(json.dumps(asdict(run), allow_nan=False) + "\n")
    print(table(runs))
    failures = [run for run in runs if run.outcome in FAILED]
    for run in failures:
        print(f"\n{run.outcome}: {run.program}, {run.geometry}, seed {run.seed}\n{run.error}")
    if options.json is not None:
        files.write(
            options.json,
            settings=asdict(settings),
            seeds=[seeds.start, seeds.stop],
            outcomes=Counter(run.outcome for run in runs),
            runs=[asdict(run) for run in runs],
        )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
