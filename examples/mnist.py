"""Adam against natural gradients on static binarized MNIST, by training time.

A sigmoid belief network with layers of 784, 200 and 200 units (`models.helmholtz`) is trained with
per-datum reweighted wake-sleep. Every run has the same budget of processor time, of which only the
steps count, and every rate falls linearly to 0.02 of its start with the share of the budget that
is spent. All methods have the same loss, particles, batches and initial parameters, and the same
average of their iterates, which is judged beside the last one. Rates are picked on the validation
split, by short runs that decay to their own end; each of the natural gradients starts from one
fixed rate.

Run it as `python -m examples.mnist --data FILE.npz`, with the packed bits of a binarization, or
without `--data` to fetch MNIST from OpenML and binarize it; `--quick` is a small version. It
prints the search and a table, and writes to the output folder:

* runs.jsonl: one line for each method, rate, seed and mark;
* table.md: the table;
* curves.png: test negative log likelihood against minutes of training, of averages dashed.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from matplotlib.figure import Figure
from sklearn.datasets import fetch_openml, get_data_home
from torch import Tensor

import pyronat
from examples.comparison import Averaged, Rates, Step, batches, markdown, reached, stock
from models.helmholtz import Helmholtz
from pyronat.steps import PolyakRuppert

HIDDEN = (200, 200)
BATCH_SIZE = 100
NUM_PARTICLES = 10
FLOOR = 0.02
"""Smallest rate, as a share of the first one."""
AVERAGING = PolyakRuppert(share=0.25)
"""Of all methods. Parameters still move far in the time of a run: early ones must be forgotten."""
KEYS = ("train_bits", "valid_bits", "test_bits")
NUM_TRAIN = 50_000
NUM_TEST = 10_000


@dataclass(frozen=True)
class Rate:
    """Rates of the first step.

    Attributes:
        model: That of the model.
        guide: That of the guide, the same unless a method has two.
    """

    model: float
    guide: float

    @classmethod
    def of(cls, text: str) -> "Rate":
        """Reads "0.01", or "0.01:0.003" for model and guide."""
        model, _, guide = text.partition(":")
        return cls(float(model), float(guide or model))

    def __str__(self) -> str:
        return f"{self.model:g}" if self.model == self.guide else f"{self.model:g}:{self.guide:g}"


class Clock:
    """Processor time that the steps of a run have taken.

    Attributes:
        budget: Seconds that they may take.
        seconds: Seconds that they have taken.
    """

    def __init__(self, budget: float) -> None:
        """Makes a clock that stands at zero.

        Args:
            budget: Seconds that the steps may take.
        """
        self.budget = budget
        self.seconds = 0.0

    def time(self, step: Step, batch: tuple[Tensor, ...]) -> None:
        """Takes a step, which counts."""
        start = time.process_time()
        step(batch)
        self.seconds += time.process_time() - start

    def decay(self, step: int) -> float:
        """The share of its first value that a rate has now, whatever the number of the step."""
        return max(FLOOR, 1 - self.seconds / self.budget)


@dataclass(frozen=True)
class Trainee:
    """What is trained.

    Attributes:
        step: Takes a step.
        averaged: In its context the averages of iterates stand in the place of the parameters.
    """

    step: Step
    averaged: Callable[[], AbstractContextManager[None]]


Maker = Callable[[Helmholtz, Rate, Clock], Trainee]


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        name: Name in the table.
        rates: Rates to choose from.
        make: Makes what is trained.
    """

    name: str
    rates: tuple[Rate, ...]
    make: Maker = field(repr=False)


@dataclass(frozen=True)
class Splits:
    """The data, 0 or 1 as floats.

    Attributes:
        train: Shape [train, pixels].
        validation: Shape [validation, pixels].
        test: Shape [test, pixels].
    """

    train: Tensor
    validation: Tensor
    test: Tensor


@dataclass(frozen=True)
class Settings:
    """How much to run.

    Attributes:
        minutes: Processor time of a run.
        search_minutes: Processor time of a run that helps to choose a rate.
        marks: Evaluations per run, evenly spaced in time.
        seeds: Runs per method.
        hidden: Units of the hidden layers, the lowest first.
        eval_images: Images of a split that are evaluated, always the same ones.
        eval_particles: Samples from the guide per image in a likelihood estimate.
    """

    minutes: float = 10.0
    search_minutes: float = 2.0
    marks: int = 10
    seeds: int = 3
    hidden: tuple[int, ...] = HIDDEN
    eval_images: int = 500
    eval_particles: int = 100


@dataclass(frozen=True)
class Point:
    """A run at one mark.

    Attributes:
        minutes: Training time of the mark.
        seconds: Training time that had really passed.
        steps: Steps taken.
        nll: Negative log likelihood of the evaluation split in nats per datum.
        averaged: That of the average of iterates.
    """

    minutes: float
    seconds: float
    steps: int
    nll: float
    averaged: float


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        method: Name of the method.
        rate: Rates of the first step.
        split: The evaluation split.
        seed: Seed of parameters, batches and particles.
        points: The start and the marks in order; fewer if the run failed.
        train_nll: Final negative log likelihood of training images in nats per datum, of the last
            iterate and of the average.
        error: Why the run ended early, or None.
    """

    method: str
    rate: Rate
    split: str
    seed: int
    points: tuple[Point, ...]
    train_nll: tuple[float, float]
    error: str | None

    @property
    def final(self) -> float:
        """Final negative log likelihood in nats per datum; infinite for a run that failed."""
        nll = min(self.points[-1].nll, self.points[-1].averaged)
        return nll if self.error is None and math.isfinite(nll) else math.inf


# --- data ----------------------------------------------------------------------------------------


def load_data(path: Path) -> Splits:
    """Reads a binarization.

    Args:
        path: An `.npz` file with `train_bits`, `valid_bits` and `test_bits`, whose pixels are
            packed into bytes along axis 1.

    Returns:
        The splits.

    Raises:
        ValueError: If the file lacks one of them.
    """
    with np.load(path) as content:
        missing = [key for key in KEYS if key not in content]
        if missing:
            raise ValueError(f"{path} has no {', '.join(missing)}; it holds {content.files}")
        bits = [np.unpackbits(content[key], axis=1) for key in KEYS]
    return Splits(*(torch.from_numpy(part).to(torch.get_default_dtype()) for part in bits))


def fetched() -> Path:
    """MNIST from OpenML, each pixel drawn once with its intensity as probability; kept on disk.

    Returns:
        The file, in scikit-learn's data folder.
    """
    path = Path(get_data_home()) / "mnist_binarized_once.npz"
    if not path.exists():
        images = fetch_openml("mnist_784", version=1, as_frame=False).data
        values = np.random.default_rng(0).random(images.shape) < images / 255
        ends = [NUM_TRAIN, len(images) - NUM_TEST]
        packed = np.split(np.packbits(values, axis=1), ends)
        np.savez_compressed(path, **dict(zip(KEYS, packed, strict=True)))
    return path


# --- methods -------------------------------------------------------------------------------------


def make_loss() -> pyronat.ReweightedWakeSleep:
    """The loss that all methods share."""
    return pyronat.ReweightedWakeSleep(NUM_PARTICLES, vectorize_particles=True, max_plate_nesting=1)


def plain(
    optimizer: type[torch.optim.Optimizer],
    scale: float,
    machine: Helmholtz,
    rate: Rate,
    clock: Clock,
) -> Trainee:
    """Stock `SVI` with an optimizer of torch.

    Args:
        optimizer: The optimizer.
        scale: Factor on its rates.
        machine: The machine to train, whose parameters are in the store.
        rate: Rates of the first step.
        clock: Training time, with which they fall.

    Returns:
        What is trained.
    """
    of_guide = {name for name in pyro.get_param_store() if name.startswith("recognition")}
    rates = Rates(scale * rate.model, scale * rate.guide, of_guide)
    step = stock(machine.model, machine.guide, make_loss(), optimizer, rates, clock.decay)
    averaged = Averaged(step, AVERAGING)
    return Trainee(averaged.step, averaged.context)


def natural(
    options: Callable[[], dict[str, Any]], machine: Helmholtz, rate: Rate, clock: Clock
) -> Trainee:
    """`NaturalSVI`.

    Args:
        options: Options of `NaturalGradient` other than its rate.
        machine: The machine to train.
        rate: Rate of the first step.
        clock: Training time, with which it falls.

    Returns:
        What is trained.
    """
    optim = pyronat.NaturalGradient(
        lr=lambda step: rate.model * clock.decay(step), averaging=AVERAGING, **options()
    )
    svi = pyronat.NaturalSVI(machine.model, machine.guide, optim, make_loss())
    return Trainee(lambda data: svi.step(*data), svi.averaged)


def grid(*texts: str) -> tuple[Rate, ...]:
    """Rates to choose from."""
    return tuple(map(Rate.of, texts))


NATURAL_RATE = grid("0.3")
METHODS: dict[str, Method] = {
    "adam": Method(
        "Adam",
        grid("0.003", "0.006", "0.01", "0.02", "0.03"),
        partial(plain, torch.optim.Adam, 1.0),
    ),
    "two-rate": Method(
        "Adam, two rates",
        grid("0.01:0.003", "0.02:0.006", "0.03:0.006", "0.05:0.006", "0.05:0.01"),
        partial(plain, torch.optim.Adam, 1.0),
    ),
    "gd": Method(
        "gradient descent",
        grid("0.1", "0.3", "1", "3", "10"),
        # The loss is a sum over the batch.
        partial(plain, torch.optim.SGD, 1 / BATCH_SIZE),
    ),
    "full": Method("natural, defaults", NATURAL_RATE, partial(natural, dict)),
    "visible": Method(
        "natural, visible",
        NATURAL_RATE,
        partial(natural, lambda: {"geometry": pyronat.Visible()}),
    ),
}
ADAMS = ("adam", "two-rate")


# --- runs ----------------------------------------------------------------------------------------


def some_of(x: Tensor, count: int) -> Tensor:
    """Some data, chosen at random but always the same: files may be sorted by digit."""
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:count]]


def nll(machine: Helmholtz, x: Tensor, settings: Settings) -> float:
    """Estimates the mean negative log likelihood of some images of a split.

    Args:
        machine: The machine.
        x: Data, shape [data, pixels].
        settings: The settings.

    Returns:
        Nats per datum, always with the same random numbers.
    """
    some = some_of(x, settings.eval_images)
    return -float(machine.importance_log_likelihood(some, settings.eval_particles).mean())


def both(
    machine: Helmholtz, trainee: Trainee, x: Tensor, settings: Settings
) -> tuple[float, float]:
    """`nll` of the last iterate and of the average of iterates."""
    last = nll(machine, x, settings)
    with trainee.averaged():
        return last, nll(machine, x, settings)


def make_machine(x: Tensor, hidden: Sequence[int], seed: int) -> Helmholtz:
    """Empties the parameter store and fills it with a new machine's initial parameters.

    Args:
        x: Training data, shape [train, pixels].
        hidden: Units of the hidden layers, the lowest first.
        seed: Seed of the initial parameters, and of what follows.

    Returns:
        The machine.
    """
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    machine = Helmholtz((x.shape[1], *hidden), visible_mean=x.mean(0))
    machine.model(x[:1])
    machine.guide(x[:1])
    return machine


def train(
    method: Method, rate: Rate, split: str, data: Splits, seed: int, settings: Settings
) -> Run:
    """Trains a new machine until its budget is spent.

    Args:
        method: The method.
        rate: Rates of the first step.
        split: The evaluation split, "validation" for the short run of a search or "test".
        data: The data.
        seed: Seed of parameters, batches and particles.
        settings: The settings.

    Returns:
        The finished run.
    """
    searching = split == "validation"
    minutes = settings.search_minutes if searching else settings.minutes
    evaluation = data.validation if searching else data.test
    machine = make_machine(data.train, settings.hidden, seed)
    clock = Clock(60 * minutes)
    marks = [minutes * (i + 1) / settings.marks for i in range(settings.marks)]
    marks = marks[-1:] if searching else marks
    start = nll(machine, evaluation, settings)
    points = [Point(0.0, 0.0, 0, start, start)]
    trainee, error = method.make(machine, rate, clock), None
    try:
        for count, batch in enumerate(batches((data.train,), BATCH_SIZE, seed), start=1):
            clock.time(trainee.step, batch)
            passed = [mark for mark in marks if clock.seconds >= 60 * mark]
            if passed:
                nlls = both(machine, trainee, evaluation, settings)
                points += [Point(mark, clock.seconds, count, *nlls) for mark in passed]
                marks = marks[len(passed) :]
            if not marks:
                break
    except (ValueError, pyronat.PyronatError) as problem:
        error = f"{type(problem).__name__}: {problem}".splitlines()[0]
    failed = (math.nan, math.nan)
    train_nll = failed if error else both(machine, trainee, data.train, settings)
    run = Run(method.name, rate, split, seed, tuple(points), train_nll, error)
    print(f"  {method.name}, rate {rate}, seed {seed}: {described(run)}", flush=True)
    return run


def described(run: Run) -> str:
    """What came of a run, in a few words."""
    if run.error is not None:
        return run.error
    last = run.points[-1]
    nlls = f"{last.nll:.2f}, averaged {last.averaged:.2f} nats"
    return f"{nlls} ({run.split}) after {last.steps} steps, {last.seconds:.0f} s"


def chosen(method: Method, data: Splits, settings: Settings) -> tuple[Rate, list[Run]]:
    """Picks the rate that is best on the validation split.

    Args:
        method: The method.
        data: The data.
        settings: The settings.

    Returns:
        The rate, and the runs that were needed; none where there is nothing to choose.
    """
    if len(method.rates) == 1:
        return method.rates[0], []
    runs = [train(method, rate, "validation", data, 0, settings) for rate in method.rates]
    return min(runs, key=lambda run: run.final).rate, runs


# --- results -------------------------------------------------------------------------------------


KINDS = ("nll", "averaged")
"""What is judged: the last iterate, and the average of iterates."""


def mean_curve(runs: Sequence[Run], kind: str = "nll") -> list[tuple[float, float]]:
    """Minutes and mean negative log likelihood of a kind at the marks that all runs have."""
    return [
        (points[0].minutes, statistics.fmean(getattr(point, kind) for point in points))
        for points in zip(*(run.points for run in runs), strict=False)
    ]


def table(groups: Mapping[str, Sequence[Run]]) -> str:
    """Formats the comparison.

    Args:
        groups: Test runs of all seeds by key of the method.

    Returns:
        The table; negative log likelihoods in nats per datum, means over seeds.
    """
    curves = {(key, kind): mean_curve(runs, kind) for key, runs in groups.items() for kind in KINDS}
    finals = [statistics.fmean(run.final for run in groups[key]) for key in ADAMS if key in groups]
    target = min(finals, default=-math.inf)
    minutes = [minute for minute, _ in max(curves.values(), key=len)[1:]]
    header = ["method", "rate", "steps", *(f"{minute:.3g} min" for minute in minutes)]
    rows = [[*header, "training images", "reaches best Adam's final after"]]
    for (key, kind), curve in curves.items():
        runs = groups[key]
        cells = [f"{value:.2f}" for _, value in curve[1:]]
        when = reached(curve, target)
        rows.append([
            runs[0].method + ("" if kind == "nll" else ", averaged"),
            str(runs[0].rate),
            f"{statistics.fmean(run.points[-1].steps for run in runs):.0f}",
            *(cells + ["failed"] * (len(minutes) - len(cells))),
            f"{statistics.fmean(run.train_nll[KINDS.index(kind)] for run in runs):.2f}",
            "–" if when is None else f"{when:.2g} min",
        ])
    return markdown(rows)


def write_lines(runs: Sequence[Run], path: Path) -> None:
    """Writes one JSON line for each point of each run.

    Args:
        runs: The runs.
        path: The file to write.
    """
    with path.open("w", encoding="utf-8") as file:
        for run in runs:
            head = {"method": run.method, "rate": str(run.rate), "split": run.split}
            head |= {"error": run.error}
            for point in run.points:
                file.write(json.dumps({**head, "seed": run.seed, **asdict(point)}) + "\n")


def plot_curves(groups: Mapping[str, Sequence[Run]], path: Path) -> None:
    """Draws negative log likelihood against training time, that of averages dashed.

    Args:
        groups: Test runs of all seeds by key of the method.
        path: The PNG file to write.
    """
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for index, runs in enumerate(groups.values()):
        for run in runs:
            xs, ys = [p.seconds / 60 for p in run.points], [p.nll for p in run.points]
            axes.plot(xs, ys, color=f"C{index}", alpha=0.3, linewidth=0.8)
        label = f"{runs[0].method}, rate {runs[0].rate}"
        axes.plot(*zip(*mean_curve(runs), strict=True), color=f"C{index}", label=label)
        averaged = zip(*mean_curve(runs, "averaged"), strict=True)
        axes.plot(*averaged, color=f"C{index}", linestyle="--")
    finals = [run.final for runs in groups.values() for run in runs if math.isfinite(run.final)]
    if finals:
        axes.set_ylim(min(finals) - 2, max(finals) + 20)
    axes.set(xlabel="training time (minutes)", ylabel="test negative log likelihood (nats)")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


# --- command line --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """What the command line says.

    Attributes:
        data: The file of the data, or None to fetch them.
        methods: Methods by key, in the order of the table.
        settings: How much to run.
        output: Folder for the results.
    """

    data: Path | None
    methods: dict[str, Method]
    settings: Settings
    output: Path


def parse(argv: Sequence[str] | None) -> Options:
    """Reads the command line.

    Args:
        argv: Arguments, or None for those of the process.

    Returns:
        The options.
    """
    parser = argparse.ArgumentParser(description="Adam against natural gradients on MNIST.")
    add = parser.add_argument
    add("--data", type=Path, help="an .npz file of packed bits; without it, OpenML is asked")
    add("--minutes", type=float, default=10.0, help="processor time of a run")
    add("--search-minutes", type=float, default=2.0, help="that of a run with one of many rates")
    add("--marks", type=int, default=10, help="evaluations per run")
    add("--seeds", type=int, default=3, help="runs per method")
    add("--hidden", type=int, nargs="+", default=list(HIDDEN), help="hidden units")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add(
        "--rates",
        nargs="+",
        default=[],
        metavar="METHOD=RATE,RATE",
        help="rates to choose from, as adam=0.01,0.02 two-rate=0.02:0.003 (model:guide)",
    )
    add("--output", type=Path, default=Path("mnist-output"))
    add("--quick", action="store_true", help="half a second per run, two rates, few units")
    found = parser.parse_args(argv)
    grids = {key: method.rates for key, method in METHODS.items()}
    for text in found.rates:
        key, _, rates = text.partition("=")
        if key not in METHODS or not rates:
            parser.error(f"--rates takes METHOD=RATE,RATE with one of {list(METHODS)}, not {text}")
        grids[key] = grid(*rates.split(","))
    settings = Settings(
        minutes=found.minutes,
        search_minutes=found.search_minutes,
        marks=found.marks,
        seeds=found.seeds,
        hidden=tuple(found.hidden),
    )
    if found.quick:
        settings = Settings(0.5 / 60, 0.1 / 60, 2, 1, (8, 4), eval_images=50, eval_particles=10)
        grids = {key: rates[1:3] or rates for key, rates in grids.items()}
    methods = {
        key: Method(METHODS[key].name, grids[key], METHODS[key].make) for key in found.methods
    }
    return Options(found.data, methods, settings, found.output)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the comparison.

    Args:
        argv: Arguments, or None for those of the process.
    """
    options = parse(argv)
    torch.set_num_threads(1)
    settings = options.settings
    data = load_data(options.data or fetched())
    options.output.mkdir(parents=True, exist_ok=True)
    done: list[Run] = []
    groups: dict[str, list[Run]] = {}
    for key, method in options.methods.items():
        rate, search = chosen(method, data, settings)
        seeds = range(settings.seeds)
        groups[key] = [train(method, rate, "test", data, seed, settings) for seed in seeds]
        done += [*search, *groups[key]]
        write_lines(done, options.output / "runs.jsonl")
    text = table(groups)
    images = min(settings.eval_images, len(data.test))
    print(f"\nNegative log likelihood of {images} test images in nats, seeds: {settings.seeds}")
    print(text)
    (options.output / "table.md").write_text(text + "\n", encoding="utf-8")
    plot_curves(groups, options.output / "curves.png")
    print(f"\nWrote runs.jsonl, table.md and curves.png to {options.output}")


if __name__ == "__main__":
    main()
