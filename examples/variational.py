"""Adam against natural gradients on six variational programs as Pyro users write them.

A variational autoencoder, a deep Markov model, Bayesian linear and logistic regression, the eight
schools and a sparse gamma DEF are trained by stock `SVI` with Adam at five rates and by
`NaturalSVI`: with its defaults, and with its curvature measured less often. All methods use the
same loss, particles, batches and initial parameters, get the same seconds of processor time,
and let their rate decay linearly over them: the number of steps is what a short trial run says.

Run it as `python -m examples.variational`, or with `--quick` for a small version. It prints a
table, and writes to the output folder:

* table.md: the table;
* results.json: every run with its curve;
* curves.png: negative ELBO against seconds.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyro
import torch
from matplotlib.figure import Figure
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal
from tqdm import tqdm

import pyronat
from examples.comparison import Data, adam, batches, markdown, natural, negative_elbo
from models import bayesian_regression, dmm, eight_schools, sparse_gamma_def, vae
from models.bayesian_regression import LinearRegression, LogisticRegression
from models.eight_schools import EightSchools
from models.sparse_gamma_def import SparseGammaDEF
from pyronat.steps import RunningAverage

ADAM_RATES = (0.003, 0.01, 0.03, 0.1, 0.3)
NATURAL_RATE = 0.3
NATURAL: dict[str, dict[str, Any]] = {
    "natural, defaults": {},
    "natural, curvature every 20 steps": {"curvature": RunningAverage(0.8, 20)},
}
"""Options of `NaturalGradient` by the name of the method."""


@dataclass(frozen=True)
class Settings:
    """How much to run.

    Attributes:
        seeds: Number of runs per method.
        share: Share of each program's seconds to use.
        rates: Adam's rates.
        trial_steps: Steps that tell how long a step takes.
        small: Whether the largest programs are cut down.
        points: Evaluations per run.
    """

    seeds: int
    share: float
    rates: tuple[float, ...] = ADAM_RATES
    trial_steps: int = 10
    small: bool = False
    points: int = 20


@dataclass(frozen=True)
class Program:
    """A program to train.

    Attributes:
        name: Name in the table.
        make: Makes model and guide, and what to call after each step; the parameters start afresh.
        train: Data to train on.
        validation: Data by which Adam's rate is chosen.
        test: Data by which methods are judged.
        seconds: Processor time of a run.
        batch_size: Data per step, or None for all of them.
        num_particles: Particles of the training loss.
        eval_particles: Particles of an evaluation.
        per_datum: Whether nats are divided by the number of data.
        bound: Negative log evidence in nats, where it is known.
    """

    name: str
    make: Callable[[], tuple[Callable[..., Any], Callable[..., Any], Callable[[], None]]]
    train: Data
    validation: Data
    test: Data
    seconds: float
    batch_size: int | None = None
    num_particles: int = 1
    eval_particles: int = 20
    per_datum: bool = True
    bound: float | None = None

    def loss(self, num_particles: int) -> Trace_ELBO:
        """The ELBO."""
        return Trace_ELBO(
            num_particles=num_particles,
            vectorize_particles=num_particles > 1,
            max_plate_nesting=1,
        )


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        name: Name in the table.
        rate: The rate at the first step.
        options: Options of `NaturalGradient`, or None for Adam.
    """

    name: str
    rate: float
    options: dict[str, Any] | None = None


@dataclass(frozen=True)
class Run:
    """A run.

    Attributes:
        program: Name of the program.
        method: Name of the method.
        rate: The rate at the first step.
        seed: Seed of the run.
        steps: Steps at each evaluation.
        seconds: Processor time until then, evaluations left out.
        values: Negative ELBO of the test data in nats.
        validation: Final negative ELBO of the validation data in nats, infinite after an error.
        error: The error that ended the run, or None.
    """

    program: str
    method: str
    rate: float
    seed: int
    steps: list[int]
    seconds: list[float]
    values: list[float]
    validation: float
    error: str | None


def _nothing() -> None:
    pass


def _auto(model: Callable[..., Any]) -> Callable[[], tuple[Any, Any, Callable[[], None]]]:
    return lambda: (model, AutoMultivariateNormal(model), _nothing)


def _module(net: type) -> Callable[[], tuple[Any, Any, Callable[[], None]]]:
    def make() -> tuple[Any, Any, Callable[[], None]]:
        instance = net()
        return instance.model, instance.guide, _nothing

    return make


def _global(name: str, net: Any, data: Data, evidence: torch.Tensor, seconds: float) -> Program:
    """A program whose guide is one normal distribution, with its evidence as the referee."""
    return Program(
        name,
        _auto(net.model),
        *(data, data, data),
        seconds=seconds,
        num_particles=10,
        eval_particles=1000,
        per_datum=False,
        bound=-float(evidence),
    )


def _double(data: Data) -> Data:
    return tuple(value.double() for value in data)


def make_programs(small: bool) -> list[Program]:
    """All programs with their data.

    Args:
        small: Whether to leave out most images of the DEF and most features of the tumors.

    Returns:
        The programs, in the order of the table.
    """
    digits = vae.make_data(0)
    counts = (sparse_gamma_def.make_data(0, 20 if small else 200),)
    gamma = SparseGammaDEF()
    linear, study = LinearRegression(), bayesian_regression.make_data(0)
    logistic, (features, benign) = LogisticRegression(), bayesian_regression.make_classes(0)
    tumors = features[:, : 8 if small else 30], benign
    schools, effects = EightSchools(), eight_schools.make_data()
    return [
        Program(
            "VAE",
            _module(vae.VAE),
            *((digits[:1200],), (digits[1200:1400],), (digits[1400:],)),
            seconds=6.0,
            batch_size=100,
        ),
        Program(
            "deep Markov model",
            _module(dmm.DMM),
            *(dmm.make_data(0, 200), dmm.make_data(1, 100), dmm.make_data(2, 100)),
            seconds=15.0,
            batch_size=50,
        ),
        _global(
            "linear regression", linear, study, linear.log_evidence(*_double(study)), seconds=3.0
        ),
        _global(
            "logistic regression",
            *(logistic, tumors, logistic.log_evidence(*_double(tumors))[0]),
            seconds=5.0,
        ),
        _global("eight schools", schools, effects, schools.log_evidence(*effects), seconds=2.0),
        Program(
            "sparse gamma DEF",
            lambda: (gamma.model, gamma.guide, gamma.clip),
            *(counts, counts, counts),
            seconds=5.0,
        ),
    ]


def judge(program: Program, model: Any, guide: Any, data: Data) -> float:
    """Negative ELBO by many particles with a fixed seed; random numbers of training are left alone.

    Args:
        program: The program.
        model: Its model.
        guide: Its guide.
        data: Data, all of them.

    Returns:
        Nats per datum, or in all if the program is not judged per datum.
    """
    total = negative_elbo(program.loss(program.eval_particles), model, guide, data)
    return total / len(data[0]) if program.per_datum else total


def start(program: Program, method: Method, seed: int, steps: int) -> tuple[Any, Any, Any]:
    """Empties the parameter store and prepares a run.

    Args:
        program: The program.
        method: The method.
        seed: Seed of the parameters, and of what follows.
        steps: Steps over which the rate decays.

    Returns:
        Model, guide, and a function that takes a step on a batch.
    """
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    model, guide, after = program.make()
    loss = program.loss(program.num_particles)
    if method.options is None:
        optimize = adam(model, guide, loss, method.rate, steps)
    else:
        optimize = natural(model, guide, loss, method.rate, steps, **method.options)

    def step(data: Data) -> None:
        optimize(data)
        after()

    return model, guide, step


def affordable_steps(program: Program, method: Method, settings: Settings) -> int:
    """Number of steps in the seconds of a program, from a short run at a tiny rate.

    Args:
        program: The program.
        method: The method.
        settings: The settings.

    Returns:
        The number, at least 2.
    """
    _, _, step = start(program, Method(method.name, 1e-4, method.options), 0, 10**6)
    data = batches(program.train, program.batch_size, 0)
    step(next(data))
    begin = time.process_time()
    for _ in range(settings.trial_steps):
        step(next(data))
    each = (time.process_time() - begin) / settings.trial_steps
    return max(2, int(settings.share * program.seconds / each))


def train(program: Program, method: Method, seed: int, steps: int, points: int) -> Run:
    """Trains once.

    Args:
        program: The program.
        method: The method.
        seed: Seed of the run.
        steps: Number of steps.
        points: Evaluations of the run.

    Returns:
        The run, which ends early with an error of the program or of the optimizer.
    """
    model, guide, step = start(program, method, seed, steps)
    data = batches(program.train, program.batch_size, seed)
    marks = {math.ceil(steps * (point + 1) / points) for point in range(points)}
    run = Run(program.name, method.name, method.rate, seed, [], [], [], math.inf, None)
    seconds = 0.0
    try:
        for count in range(1, steps + 1):
            batch, begin = next(data), time.process_time()
            step(batch)
            seconds += time.process_time() - begin
            if count in marks:
                value = judge(program, model, guide, program.test)
                run.values.append(value)
                run.steps.append(count)
                run.seconds.append(seconds)
        final = judge(program, model, guide, program.validation)
    except (pyronat.PyronatError, ValueError) as error:  # Pyro checks arguments by ValueError
        return Run(**{**asdict(run), "error": f"{type(error).__name__} at step {count}"})
    return Run(**{**asdict(run), "validation": final if math.isfinite(final) else math.inf})


def compare(program: Program, settings: Settings) -> list[Run]:
    """Trains a program by all methods.

    Args:
        program: The program.
        settings: The settings.

    Returns:
        All runs, Adam's first.
    """
    methods = [Method("Adam", rate) for rate in settings.rates]
    methods += [Method(name, NATURAL_RATE, options) for name, options in NATURAL.items()]
    runs = []
    steps = 0
    for method in tqdm(methods, desc=program.name, disable=None):
        try:
            if method.options is not None or not steps:
                steps = affordable_steps(program, method, settings)
        except pyronat.PyronatError as error:
            name = f"{type(error).__name__} at step 1"
            head = (program.name, method.name, method.rate)
            runs += [Run(*head, seed, [], [], [], math.inf, name) for seed in range(settings.seeds)]
            continue
        runs += [
            train(program, method, seed, steps, settings.points) for seed in range(settings.seeds)
        ]
    return runs


def select(runs: Sequence[Run]) -> list[list[Run]]:
    """Groups runs by method, with Adam at the rate that is best on the validation data.

    Args:
        runs: All runs of a program.

    Returns:
        One list for each method, Adam's first.
    """
    groups: dict[tuple[str, float], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.method, run.rate), []).append(run)
    adam = [group for (name, _), group in groups.items() if name == "Adam"]
    best = min(adam, key=lambda group: statistics.fmean(run.validation for run in group))
    return [best, *(group for (name, _), group in groups.items() if name != "Adam")]


def passing(group: Sequence[Run], target: float) -> str:
    """When the mean of a method's runs reached a value.

    Args:
        group: The method's runs.
        target: Negative ELBO in nats.

    Returns:
        Steps and seconds at the first evaluation that is at the target or below, or a dash.
    """
    for index in range(min(len(run.values) for run in group)):
        if statistics.fmean(run.values[index] for run in group) <= target:
            seconds = statistics.fmean(run.seconds[index] for run in group)
            return f"{group[0].steps[index]} steps, {seconds:.1f} s"
    return "–"


def table(programs: Sequence[Program], runs: Sequence[Run]) -> str:
    """The comparison in Markdown.

    Args:
        programs: The programs.
        runs: All runs.

    Returns:
        The table, one line per program and method.
    """
    rows = [("program", "method", "negative ELBO", "seconds", "steps", "passes Adam's final after")]
    for program in programs:
        groups = select([run for run in runs if run.program == program.name])
        done = all(run.error is None for run in groups[0])
        target = statistics.fmean(run.values[-1] for run in groups[0]) if done else -math.inf
        label = program.name
        if program.bound is not None:
            label += f" (−log evidence {program.bound:.2f})"
        for group in groups:
            name = group[0].method
            if name == "Adam":
                name = f"Adam, rate {group[0].rate:g}"
            errors = [run.error for run in group if run.error is not None]
            if errors:
                cells = (f"{len(errors)} of {len(group)} fail: {errors[0]}", "", "", "–")
            else:
                finals = [run.values[-1] for run in group]
                spread = f" ± {statistics.stdev(finals):.2f}" if len(finals) > 1 else ""
                cells = (
                    f"{statistics.fmean(finals):.2f}{spread}",
                    f"{statistics.fmean(run.seconds[-1] for run in group):.1f}",
                    str(group[0].steps[-1]),
                    "" if group is groups[0] else passing(group, target),
                )
            rows.append((label, name, *cells))
            label = ""
    return markdown(rows)


def plot_curves(programs: Sequence[Program], runs: Sequence[Run], path: Path) -> None:
    """Draws the negative ELBO of the test data against seconds.

    Args:
        programs: The programs.
        runs: All runs.
        path: The PNG file to write.
    """
    figure = Figure(figsize=(10, 6), layout="constrained")
    panels = figure.subplots(2, 3).flat
    for axes, program in zip(panels, programs, strict=False):
        groups = select([run for run in runs if run.program == program.name])
        finals = []
        for index, group in enumerate(groups):
            for run in group:
                label = run.method if run is group[0] else None
                axes.plot(run.seconds, run.values, color=f"C{index}", label=label, linewidth=1)
                finals += run.values[-1:]
        if finals:
            low, middle = min(finals), statistics.median(finals)
            axes.set_ylim(low - 0.1 * (middle - low) - 0.1, middle + 2 * (middle - low) + 1)
        axes.set(title=program.name, xlabel="seconds")
    figure.axes[0].set_ylabel("negative ELBO (nats)")
    figure.axes[0].legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the comparison.

    Args:
        argv: Arguments, or None for those of the process.
    """
    parser = argparse.ArgumentParser(description="Adam against natural gradients, six programs.")
    parser.add_argument("--seeds", type=int, default=3, help="number of runs per method")
    parser.add_argument("--share", type=float, default=1.0, help="share of each program's seconds")
    parser.add_argument("--programs", nargs="+", help="first words of programs to run")
    parser.add_argument("--output", type=Path, default=Path("variational-output"))
    parser.add_argument("--quick", action="store_true", help="1 seed, 2 rates, few steps")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    settings = Settings(options.seeds, options.share)
    if options.quick:
        settings = Settings(1, 0.02, ADAM_RATES[1:3], trial_steps=2, small=True, points=2)
    programs = make_programs(settings.small)
    if options.programs:
        programs = [p for p in programs if p.name.startswith(tuple(options.programs))]

    runs = [run for program in programs for run in compare(program, settings)]
    text = table(programs, runs)
    print("Negative ELBO in nats, per datum for the first two programs and the last.")
    print(text)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "table.md").write_text(text + "\n", encoding="utf-8")
    (options.output / "results.json").write_text(
        json.dumps([asdict(run) for run in runs], indent=1), encoding="utf-8"
    )
    plot_curves(programs, runs, options.output / "curves.png")
    print(f"\nWrote table.md, results.json and curves.png to {options.output}")


if __name__ == "__main__":
    main()
