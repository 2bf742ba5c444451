"""One program by several methods from the same start: Adam with a sweep of rates, geometries."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import pyro
import torch
from pyro import poutine
from pyro.infer import SVI
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from pyronat.errors import PyronatError
from pyronat.loading import Loaded
from pyronat.progress import Progress, progress
from pyronat.recipes import Recipe
from pyronat.tracing import repeatable
from pyronat.training import Batches, Settings, evaluate, natural

ADAM, TWO_RATES = STOCK = ("adam", "two-rate")
GEOMETRIES = ("full", "visible", "euclidean")
METHODS = (*STOCK, *GEOMETRIES)
RATES = (0.003, 0.01, 0.03, 0.1, 0.3)
"""Adam's rates, unless a user gives others."""

GUIDE_FACTORS = (0.2, 5.0)
"""The guide's rates where Adam has two, as multiples of the model's."""

MARKS = 30
"""Evaluations of a run, evenly spaced; there are some more among the first steps."""

NEARLY = 1e-3
"""Share of Adam's gain by which its final loss may be missed and is still called reached."""

EARLY = (1, 2, 3, 5, 8, 13, 20)

ERRORS = (PyronatError, ValueError, ArithmeticError, LinAlgError)
"""What may end a run; Pyro checks arguments by ValueError."""


@dataclass(frozen=True)
class Run:
    """A run of a method.

    Attributes:
        method: one of `METHODS`.
        rate: learning rate at the first step.
        seed: its seed.
        steps: steps at each evaluation, the first of which is the start.
        seconds: wall-clock time of the steps until then, evaluations left out.
        losses: nats per datum.
        error: what ended the run early, or None.
        guide_rate: that of the guide's parameters, or None for the same.
    """

    method: str
    rate: float
    seed: int
    steps: tuple[int, ...] = ()
    seconds: tuple[float, ...] = ()
    losses: tuple[float, ...] = ()
    error: str | None = None
    guide_rate: float | None = None

    @property
    def final(self) -> float:
        """The last loss; infinite after an error."""
        return self.losses[-1] if self.losses and self.error is None else math.inf

    def reaches(self, loss: float) -> tuple[float, float]:
        """Steps and seconds until a loss, both infinite if it is never reached.

        Args:
            loss: nats per datum.

        Returns:
            Those of the first evaluation that is as low.
        """
        for step, seconds, value in zip(self.steps, self.seconds, self.losses, strict=True):
            if value <= loss:
                return step, seconds
        return math.inf, math.inf

    def record(self, step: int, seconds: float, loss: float) -> Run:
        """The run with an evaluation more.

        Args:
            step: steps so far.
            seconds: time so far.
            loss: nats per datum.

        Returns:
            The run.

        Raises:
            ValueError: if the loss is not finite.
        """
        if not math.isfinite(loss):
            raise ValueError(f"the loss is {loss}")
        return replace(
            self,
            steps=(*self.steps, step),
            seconds=(*self.seconds, seconds),
            losses=(*self.losses, loss),
        )


def marks(steps: int) -> frozenset[int]:
    """Steps after which a run is evaluated, the last one among them."""
    even = (math.ceil(steps * (mark + 1) / MARKS) for mark in range(MARKS))
    return frozenset({*(mark for mark in EARLY if mark < steps), *even})


@dataclass(frozen=True)
class Comparison:
    """What to compare.

    Attributes:
        methods: some of `METHODS`.
        settings: how to train; the rate is that of the natural gradients.
        rates: Adam's rates.
        seeds: number of seeds, from that of the settings on.
    """

    methods: tuple[str, ...]
    settings: Settings
    rates: tuple[float, ...] = RATES
    seeds: int = 1

    def planned(self) -> list[Run]:
        """All runs, before they have begun."""
        first = self.settings.seed
        return [
            Run(method, rate, seed, guide_rate=of_guide)
            for method in self.methods
            for rate in (self.rates if method in STOCK else (self.settings.lr,))
            for of_guide in (
                [factor * rate for factor in GUIDE_FACTORS] if method == TWO_RATES else [None]
            )
            for seed in range(first, first + self.seeds)
        ]

    def run(self, start: Callable[[int], Recipe], quiet: bool = False) -> list[Run]:
        """Runs all methods.

        Args:
            start: makes the program and its parameters anew, from a seed.
            quiet: whether to show no progress.

        Returns:
            Their curves. A method that fails has an error, and the others go on.
        """
        runs, planned = list[Run](), self.planned()
        with progress(len(planned) * self.settings.steps, 0, quiet) as shown:
            for number, run in enumerate(planned):
                recipe = start(run.seed)
                settings = replace(self.settings, seed=run.seed)
                runs.append(_run(run, recipe, settings, shown, number * settings.steps))
        return runs


def _run(run: Run, recipe: Recipe, settings: Settings, shown: Progress, before: int) -> Run:
    """One run from the start to its end or its error.

    Args:
        run: what to run.
        recipe: the program at its start.
        settings: how to train it.
        shown: shows how far all runs are.
        before: steps of the runs before.

    Returns:
        The run with its evaluations.

    Raises:
        ValueError: never; it is among the errors that end the run.
    """
    batches = Batches(recipe.program, settings.batch_size, settings.seed)
    due = marks(settings.steps)
    words = {"method": run.method, "rate": _rates(run.rate, run.guide_rate)}
    done, seconds = 0, 0.0
    try:
        run = run.record(0, 0.0, evaluate(recipe, settings))
        step = _stepper(run, recipe, settings)
        for done in range(1, settings.steps + 1):
            batch, begin = batches(done - 1), time.perf_counter()
            loss = step(batch)
            seconds += time.perf_counter() - begin
            if not math.isfinite(loss):
                raise ValueError(f"the loss is {loss}")
            if done in due:
                run = run.record(done, seconds, evaluate(recipe, settings))
            shown.show(before + done, {**words, "loss": f"{run.losses[-1]:.5g}"})
    except ERRORS as error:
        first = str(error).strip().partition("\n")[0]
        return replace(run, error=f"step {done}: {type(error).__name__}: {first}")
    return run


def _stepper(run: Run, recipe: Recipe, settings: Settings) -> Callable[[Loaded], float]:
    """A function that takes a step of a method on a batch, and returns the loss before it."""
    program = recipe.program
    after_step = program.after_step or (lambda: None)
    if run.method not in STOCK:
        svi = natural(recipe, settings, run.method)

        def step(batch: Loaded) -> float:
            loss = svi.step(*batch.args, **batch.kwargs)
            after_step()
            return loss

        return step
    own = frozenset[str]() if run.guide_rate is None else guide_params(recipe)
    optim = pyro.optim.LambdaLR({
        "optimizer": torch.optim.Adam,
        "optim_args": lambda name: {"lr": run.guide_rate if name in own else run.rate},
        "lr_lambda": settings.schedule(1.0),
    })
    stock = SVI(program.model, recipe.guide, optim, recipe.loss(settings.particles))

    def stock_step(batch: Loaded) -> float:
        loss = stock.step(*batch.args, **batch.kwargs)
        optim.step()
        after_step()
        return float(loss[0] if isinstance(loss, tuple) else loss)

    return stock_step


def guide_params(recipe: Recipe) -> frozenset[str]:
    """Names of parameters that the guide alone has; random numbers are left alone."""
    program = recipe.program
    with torch.no_grad(), repeatable():
        guide, model = (
            set(poutine.trace(p, param_only=True).get_trace(*program.args, **program.kwargs))
            for p in (recipe.guide, program.model)
        )
    return frozenset(guide - model)


def _rates(rate: float, of_guide: float | None) -> str:
    return f"{rate:g}" if of_guide is None else f"{rate:g}, guide {of_guide:g}"


@dataclass(frozen=True)
class Row:
    """A method at its best rate.

    Attributes:
        method: its name.
        rate: the rate with the lowest mean final loss.
        runs: one for each seed.
        guide_rate: that of the guide's parameters, or None for the same.
    """

    method: str
    rate: float
    runs: tuple[Run, ...]
    guide_rate: float | None = None

    @property
    def rates(self) -> str:
        """Both rates in words."""
        return _rates(self.rate, self.guide_rate)

    @property
    def final(self) -> float:
        """Mean final loss; infinite where a run failed."""
        return statistics.fmean(run.final for run in self.runs)

    @property
    def error(self) -> str | None:
        """What ended a run, if something did."""
        return next((run.error for run in self.runs if run.error is not None), None)

    @property
    def seconds(self) -> float:
        """Mean seconds of a run."""
        return statistics.fmean(run.seconds[-1] if run.seconds else 0.0 for run in self.runs)


def best_rows(runs: Sequence[Run]) -> list[Row]:
    """Each method at its best rate.

    Args:
        runs: all runs.

    Returns:
        Methods in the order of their runs.
    """
    groups: dict[tuple[str, float, float | None], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.method, run.rate, run.guide_rate), []).append(run)
    rows = [
        Row(method, rate, tuple(group), of_guide)
        for (method, rate, of_guide), group in groups.items()
    ]
    methods = dict.fromkeys(row.method for row in rows)
    return [
        min((r for r in rows if r.method == method), key=lambda r: (r.final, r.rate))
        for method in methods
    ]


def table(rows: Sequence[Row], rates: Sequence[float]) -> list[str]:
    """A table of methods, in Markdown.

    Args:
        rows: the methods.
        rates: the rates of Adam.

    Returns:
        Lines, with a remark where the best rate is at an end of the sweep.
    """
    adam = next((row for row in rows if row.method == ADAM and row.error is None), None)
    header = ["method", "rate", "loss (nats per datum)", "seconds", "ms per step"]
    if adam is not None:
        header.append("reaches Adam's final loss after")
    lines = [header, ["---"] * len(header)]
    for row in rows:
        tried = {ADAM: len(rates), TWO_RATES: len(rates) * len(GUIDE_FACTORS)}.get(row.method, 1)
        rate = row.rates + (f" (best of {tried})" if tried > 1 else "")
        if row.error is not None:
            lines.append([row.method, rate, row.error, *[""] * (len(header) - 3)])
            continue
        steps = row.runs[0].steps[-1]
        cells = [f"{row.seconds:.2f}", f"{1000 * row.seconds / steps:.1f}"]
        if adam is not None:
            cells.append(_reach(row, adam))
        lines.append([row.method, rate, _spread(row), *cells])
    found = ["| " + " | ".join(line) + " |" for line in lines]
    if adam is not None and len(rates) > 1 and adam.rate in {min(rates), max(rates)}:
        found += ["", f"Adam's best rate, {adam.rate:g}, is at an end of the sweep: widen --rates."]
    return found


def _spread(row: Row) -> str:
    finals = [run.final for run in row.runs]
    if len(finals) == 1:
        return f"{row.final:.5g}"
    return f"{row.final:.5g} ± {statistics.stdev(finals):.2g}"


def _reach(row: Row, adam: Row) -> str:
    """Median steps and seconds to Adam's final loss of the same seed, or nearly."""
    goals = {run.seed: run.final + NEARLY * abs(run.losses[0] - run.final) for run in adam.runs}
    reached = [run.reaches(goals[run.seed]) for run in row.runs]
    steps, seconds = (statistics.median(column) for column in zip(*reached, strict=True))
    return f"{steps:g} steps, {seconds:.2f} s" if math.isfinite(steps) else "–"


def json_lines(runs: Sequence[Run]) -> str:
    """All runs with their curves, a line of strict JSON for each."""
    return "".join(json.dumps(asdict(run), allow_nan=False) + "\n" for run in runs)
