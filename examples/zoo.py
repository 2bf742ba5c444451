"""Adam and EM against natural gradients on every program of the zoo.

Each program of `models.registry` is trained by

* Adam: stock `SVI`, the best by its final loss of five rates that decay linearly;
* Adam, two rates: the same with a fifth or five times the rate for the guide, where model and guide
  both have parameters, the best of the ten;
* descent: plain gradient descent, the best of five rates per datum;
* natural: `NaturalSVI` with its defaults, and a rate that decays linearly from 0.3;
* visible: the same with the visible geometry, where there are hidden variables;
* EM, where the program has a step of it.

All start at the same parameters. All but EM have the same loss, batches and number of steps. They
are judged by the exact negative log likelihood of the training data per datum where it is known,
else by the negative ELBO per datum, with many particles and a fixed seed. The optimum is the exact
one, where mathematics gives it, or for each seed the lower of the limit of EM and of the best loss
that any method has found. What counts is when 99 % of the way from the start to the optimum is
done, in steps and in seconds of processor time, and where the same number of steps ends. Seconds
are those of the steps alone, the analysis of the program in the first one included; evaluations are
not.

EM's final loss is that after as many steps as the others have, but it goes on to its limit, and may
reach the mark later than they can.

Run it as `python -m examples.zoo`, or with `--quick` for a small version. It prints a table, and
writes to the output folder:

* table.md: the table;
* results.json: every run with its curve, versions and settings, to compare versions of the library;
* curves.png: share of the way to the optimum that is left, against seconds.
"""

import argparse
import importlib.metadata
import json
import math
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyro
import torch
from matplotlib.figure import Figure
from pyro import poutine
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from tqdm import tqdm

import pyronat
from examples.comparison import (
    Data,
    Step,
    adam,
    batches,
    descent,
    markdown,
    natural,
    negative_elbo,
)
from models.registry import Program, Trainable, programs

ADAM, TWO_RATES, DESCENT, NATURAL, VISIBLE, EM = METHODS = (
    "Adam",
    "Adam, two rates",
    "descent",
    "natural",
    "visible",
    "EM",
)
TUNED = (ADAM, TWO_RATES, DESCENT)
"""Methods whose rate is the one of several that ends best."""
ADAM_RATES = (0.003, 0.01, 0.03, 0.1, 0.3)
DESCENT_FACTOR = 10
"""Rates per datum of gradient descent, in units of Adam's."""
GUIDE_FACTORS = (0.2, 5.0)
NATURAL_RATE = 0.3
MARK = 0.01
"""Share of the way from the start to the optimum that is left where a run is called done."""
SAME = 0.001
"""Share of that way below which two losses are called the same."""
DIVERGED = 100.0
"""How far above the start, in units of it and at least of 1 nat per datum, a run is ended, as
estimates mean nothing there."""
EM_GAIN = 1e-9
"""Gain in an iteration, as a share of the loss, at which EM has converged."""
LOSS_PARTICLES, SLEEP_PARTICLES = 5, 10
GLOBAL_PARTICLES, LOCAL_PARTICLES = 200, 10
"""Particles of an evaluation: hidden variables of each datum are averaged over the data as well."""
LOCAL = {"sparse gamma def"}
"""Programs whose guide alone has parameters, for hidden variables of each datum too."""
FIRST_MARKS = (1, 2, 3, 5, 8, 13, 20)
EVEN_MARKS = 33
ERRORS = (pyronat.PyronatError, ValueError, ArithmeticError, torch.linalg.LinAlgError)
"""What may end a run; Pyro checks arguments by ValueError."""
PACKAGES = ("pyronat", "torch", "pyro-ppl", "numpy", "scikit-learn", "pgmpy")


@dataclass(frozen=True)
class Plan:
    """How long to train a program.

    Attributes:
        steps: Number of steps.
        size: Number of data, or None for the usual one.
        seeds: Largest number of runs per method.
    """

    steps: int = 200
    size: int | None = None
    seeds: int = 100


PLANS = {
    "lda": Plan(50, seeds=1),
    **dict.fromkeys(("linear Gaussian", "state space", "dmm"), Plan(100)),
    **dict.fromkeys(("helmholtz", "bars", "kirby bars", "shifter"), Plan(150)),
    **dict.fromkeys(("earthquake", "cancer", "survey", "asia"), Plan(50)),
    **dict.fromkeys(("sachs", "child", "alarm", "insurance"), Plan(50, size=500, seeds=2)),
}
"""Plans of the programs whose steps take long."""
QUICK = ("mixture", "experts", "factor analysis", "ppca", "bars", "linear regression", "vae")
"""What the small version runs."""


@dataclass(frozen=True)
class Settings:
    """How much to run.

    Attributes:
        programs: Names of the programs.
        seeds: Number of runs per method, unless the plan of the program has less.
        share: Share of each program's steps to take.
        rates: Adam's rates.
        size: Largest number of data, or None for no limit.
        em_steps: Steps after which EM is stopped at the latest.
    """

    programs: tuple[str, ...]
    seeds: int
    share: float
    rates: tuple[float, ...] = ADAM_RATES
    size: int | None = None
    em_steps: int = 5000

    def plan(self, program: Program) -> Plan:
        """How long to train a program.

        Args:
            program: The program.

        Returns:
            Its plan with these settings, all of whose numbers are given.
        """
        plan = PLANS.get(program.name, Plan())
        size = plan.size or program.size
        return Plan(
            max(2, round(self.share * plan.steps)),
            size if self.size is None else min(size, self.size),
            min(self.seeds, plan.seeds),
        )


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        name: Name in the table.
        rate: The rate at the first step, per datum for gradient descent; None for EM.
        guide_rate: That of the guide, or None for the same.
    """

    name: str
    rate: float | None = None
    guide_rate: float | None = None


@dataclass(frozen=True)
class Run:
    """A run.

    Attributes:
        program: Name of the program.
        method: Name of the method.
        rate: The rate at the first step, per datum for gradient descent; None for EM.
        seed: Seed of the run.
        steps: Steps at each evaluation, the first of which is at the start.
        seconds: Processor time until then, evaluations left out.
        values: Loss per datum in nats.
        final: Loss after the steps that all methods have, or None after an error.
        error: The error that ended the run, or None.
        guide_rate: The rate of the guide, or None for the same.
    """

    program: str
    method: str
    rate: float | None
    seed: int
    steps: list[int]
    seconds: list[float]
    values: list[float]
    final: float | None = None
    error: str | None = None
    guide_rate: float | None = None

    def record(self, step: int, seconds: float, value: float) -> None:
        """Adds an evaluation.

        Args:
            step: Steps so far.
            seconds: Processor time so far.
            value: Loss per datum.

        Raises:
            ArithmeticError: If the loss is not finite, or far above that of the start.
        """
        start = self.values[0] if self.values else value
        if not math.isfinite(value) or value > start + DIVERGED * max(1.0, abs(start)):
            raise ArithmeticError(f"loss {value} at step {step}")
        self.steps.append(step)
        self.seconds.append(seconds)
        self.values.append(value)


# --- training ----------------------------------------------------------------------------------


def start(program: Program, data: Data, seed: int) -> tuple[Trainable, bool]:
    """Empties the parameter store, makes a program and its parameters, and seeds what follows.

    Args:
        program: The program.
        data: Its data.
        seed: The seed.

    Returns:
        The program, and whether its guide has hidden variables.
    """
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    trainable = program.make(seed)
    with torch.no_grad():
        trace = poutine.trace(trainable.guide).get_trace(*data)
        poutine.replay(trainable.model, trace=trace)(*data)
    guided = any(not site_is_subsample(trace.nodes[name]) for name in trace.stochastic_nodes)
    pyro.set_rng_seed(seed)
    return trainable, guided


def make_loss(program: Program, particles: int | None = None) -> ELBO:
    """The loss of a program.

    Args:
        program: The program.
        particles: Particles of the ELBO; None for the usual ones.

    Returns:
        A loss of `SVI` and `NaturalSVI`.
    """
    if program.objective == "enumeration":
        return TraceEnum_ELBO(max_plate_nesting=program.plates)
    if program.objective == "wake-sleep":
        return pyronat.ReweightedWakeSleep(num_particles=SLEEP_PARTICLES)
    if particles is None:
        one = program.batch_size is not None or program.name in LOCAL
        particles = 1 if one else LOSS_PARTICLES
    return Trace_ELBO(
        num_particles=particles,
        vectorize_particles=particles > 1,
        max_plate_nesting=program.plates,
    )


def judge(program: Program, trainable: Trainable, data: Data) -> float:
    """The loss by which methods are judged; random numbers of training are left alone.

    Args:
        program: The program.
        trainable: The same, made.
        data: All data.

    Returns:
        Nats per datum.
    """
    if trainable.log_likelihood is not None:
        with torch.no_grad():
            return -float(trainable.log_likelihood(*data)) / len(data[0])
    few = program.hidden or program.name in LOCAL
    loss = make_loss(program, LOCAL_PARTICLES if few else GLOBAL_PARTICLES)
    return negative_elbo(loss, trainable.model, trainable.guide, data) / len(data[0])


def marks(steps: int) -> list[int]:
    """Steps after which to evaluate, denser early, the last one included."""
    even = (math.ceil(steps * (mark + 1) / EVEN_MARKS) for mark in range(EVEN_MARKS))
    return sorted({*(mark for mark in FIRST_MARKS if mark < steps), *even})


def stepper(
    program: Program, method: Method, trainable: Trainable, guided: bool, data: Data, steps: int
) -> Step:
    """Prepares any method but EM.

    Args:
        program: The program.
        method: The method.
        trainable: The program, made.
        guided: Whether its guide has hidden variables.
        data: All data.
        steps: Steps over which the rate decays.

    Returns:
        Function that takes a step on a batch.
    """
    prepare: Callable[..., Step] = adam if method.name in {ADAM, TWO_RATES} else natural
    options: dict[str, Any] = {}
    rate = method.rate
    if method.name == DESCENT:
        assert rate is not None
        prepare, rate = descent, rate / (program.batch_size or len(data[0]))
    if method.name == TWO_RATES:
        options = {"guide_rate": method.guide_rate, "guide_params": params_of(trainable, *data)[1]}
    if method.name == NATURAL:
        options["geometry"] = pyronat.Full()
    if method.name == VISIBLE:
        options["geometry"] = pyronat.Visible(posterior="guide" if guided else "enumerate")
    loss = make_loss(program)
    return prepare(trainable.model, trainable.guide, loss, rate, steps, **options)


def params_of(trainable: Trainable, *data: Tensor) -> tuple[set[str], set[str]]:
    """Names of the parameters of a program whose parameters are in the store.

    Args:
        trainable: The program, made.
        *data: Its data.

    Returns:
        Those of the model, and those of the guide alone.
    """
    with torch.no_grad(), poutine.trace(param_only=True) as of_guide:
        trace = poutine.trace(trainable.guide).get_trace(*data)
    with torch.no_grad(), poutine.trace(param_only=True) as of_model:
        poutine.replay(trainable.model, trace=trace)(*data)
    model = set(of_model.trace.param_nodes)
    return model, set(of_guide.trace.param_nodes) - model


def train(program: Program, method: Method, data: Data, seed: int, steps: int) -> Run:
    """Trains once by any method but EM.

    Args:
        program: The program.
        method: The method.
        data: All data.
        seed: Seed of the run.
        steps: Number of steps.

    Returns:
        The run, which ends early with an error of the program or of the optimizer.
    """
    trainable, guided = start(program, data, seed)
    run = Run(
        program.name, method.name, method.rate, seed, [], [], [], guide_rate=method.guide_rate
    )
    run.record(0, 0.0, judge(program, trainable, data))
    stream = batches(data, program.batch_size, seed)
    due, seconds, done = set(marks(steps)), 0.0, 0
    try:
        step = stepper(program, method, trainable, guided, data, steps)
        for count in range(1, steps + 1):
            batch, begin = next(stream), time.process_time()
            step(batch)
            trainable.after_step()
            seconds += time.process_time() - begin
            done = count
            if count in due:
                run.record(count, seconds, judge(program, trainable, data))
    except ERRORS as error:
        name = type(error).__name__
        refused = not done and isinstance(error, pyronat.PyronatError)
        return replace(run, error=f"refused: {name}" if refused else f"{name} at step {done + 1}")
    return replace(run, final=run.values[-1])


def train_by_em(program: Program, data: Data, seed: int, steps: int, most: int) -> Run:
    """Runs EM to its limit, or to its last step.

    Args:
        program: The program.
        data: All data.
        seed: Seed of the run.
        steps: Steps of the other methods.
        most: Steps after which EM is stopped, unless the others have more.

    Returns:
        The run.
    """
    trainable, _ = start(program, data, seed)
    assert trainable.params is not None and trainable.em_step is not None
    params = trainable.params()
    run = Run(program.name, EM, None, seed, [], [], [])
    run.record(0, 0.0, judge(program, trainable, data))
    due, seconds = set(marks(steps)), 0.0
    for count in range(1, max(steps, most) + 1):
        begin = time.process_time()
        try:
            params = trainable.em_step(params, *data)
        except ERRORS as error:
            return replace(run, error=f"{type(error).__name__} at step {count}")
        seconds += time.process_time() - begin
        if count in due or (count > steps and count >= 1.05 * run.steps[-1]):
            fill_store(params)
            run.record(count, seconds, judge(program, trainable, data))
            gain = (run.values[-2] - run.values[-1]) / (run.steps[-1] - run.steps[-2])
            if count >= steps and gain < EM_GAIN * abs(run.values[-1]):
                break
    return replace(run, final=run.values[run.steps.index(steps)])


def fill_store(params: dict[str, Tensor]) -> None:
    """Makes values the only content of the parameter store, exactly as they are."""
    pyro.clear_param_store()
    for name, value in params.items():
        pyro.param(name, value.detach().clone())


def compare(program: Program, settings: Settings, data: Data, bar: tqdm) -> list[Run]:
    """Trains a program by all methods.

    Args:
        program: The program.
        settings: The settings.
        data: The data.
        bar: Shows what is done.

    Returns:
        All runs.
    """
    plan = settings.plan(program)
    methods = [Method(ADAM, rate) for rate in settings.rates]
    trainable, _ = start(program, data, 0)
    if all(params_of(trainable, *data)):
        methods += [
            Method(TWO_RATES, rate, factor * rate)
            for rate in settings.rates
            for factor in GUIDE_FACTORS
        ]
    methods += [Method(DESCENT, DESCENT_FACTOR * rate) for rate in settings.rates]
    methods.append(Method(NATURAL, NATURAL_RATE))
    if program.hidden:
        methods.append(Method(VISIBLE, NATURAL_RATE))
    if trainable.em_step is not None:
        methods.append(Method(EM))
    runs = []
    for method in methods:
        for seed in range(plan.seeds):
            bar.set_description(f"{program.name}, {method.name}, seed {seed}")
            if method.name == EM:
                runs.append(train_by_em(program, data, seed, plan.steps, settings.em_steps))
            else:
                runs.append(train(program, method, data, seed, plan.steps))
    return runs


# --- judging -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Referee:
    """What the runs of a program are compared with, in nats per datum.

    Attributes:
        starts: Loss at the start, by seed.
        optima: The optimum, by seed.
        kind: Where the optimum is from.
        bound: What no loss is below, or None where it is unknown.
        exact: Whether runs are judged by their likelihood, not by the ELBO.
    """

    starts: tuple[float, ...]
    optima: tuple[float, ...]
    kind: str
    bound: float | None
    exact: bool

    @property
    def gap(self) -> float:
        """Mean way from the start to the optimum."""
        return statistics.fmean(self.starts) - statistics.fmean(self.optima)

    def left(self, run: Run) -> list[float]:
        """Share of the way to the optimum that is left at each evaluation."""
        start, optimum = self.starts[run.seed], self.optima[run.seed]
        return [(value - optimum) / (start - optimum) for value in run.values]

    def reach(self, run: Run) -> tuple[float, float]:
        """Steps and seconds to the mark, or twice infinity."""
        for index, left in enumerate(self.left(run)):
            if left <= MARK:
                return run.steps[index], run.seconds[index]
        return math.inf, math.inf


@dataclass(frozen=True)
class Summary:
    """Runs of a method on a program.

    Attributes:
        method: Name of the method.
        rate: The rate at the first step.
        guide_rate: That of the guide, or None for the same.
        seeds: Number of runs.
        final: Mean final loss of those that ended well; infinite without any.
        steps: Median of the steps to the mark, where failed runs take infinitely many.
        seconds: Median of the seconds to the mark.
        errors: Errors of the others.
    """

    method: str
    rate: float | None
    guide_rate: float | None
    seeds: int
    final: float
    steps: float
    seconds: float
    errors: tuple[str, ...]

    @property
    def works(self) -> bool:
        """Whether no run failed."""
        return not self.errors


def find_referee(program: Program, data: Data, runs: Sequence[Run], most: int) -> Referee:
    """Finds the optimum, after training.

    Args:
        program: The program.
        data: All data.
        runs: All its runs.
        most: Steps after which EM was stopped if it had not converged.

    Returns:
        The referee.
    """
    trainable = program.make(0)
    size = len(data[0])
    exact = trainable.log_likelihood is not None
    bound = None if trainable.bound is None else -float(trainable.bound(*data)) / size
    by_seed: dict[int, list[Run]] = {}
    for run in runs:
        by_seed.setdefault(run.seed, []).append(run)
    starts = tuple(group[0].values[0] for group in by_seed.values())
    if trainable.optimum is not None:
        optimum = -float(trainable.optimum(*data)) / size
        return Referee(starts, (optimum,) * len(starts), "exact", bound, exact)
    optima = tuple(min(min(run.values) for run in group) for group in by_seed.values())
    by_em = [run for run in runs if run.method == EM and run.error is None]
    limits = [run.values[-1] for run in by_em if run.steps[-1] < most]
    slack = SAME * (statistics.fmean(starts) - statistics.fmean(optima))
    reached = len(limits) == len(optima) and all(
        limit <= optimum + slack for limit, optimum in zip(limits, optima, strict=True)
    )
    return Referee(starts, optima, "EM limit" if reached else "best found", bound, exact)


def summarize(runs: Sequence[Run], referee: Referee) -> list[Summary]:
    """Puts the seeds of each method together, with Adam and descent at the rates that end best.

    Args:
        runs: All runs of a program.
        referee: Its referee.

    Returns:
        One summary for each method, the tuned ones first.
    """
    groups: dict[tuple[str, float | None, float | None], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.method, run.rate, run.guide_rate), []).append(run)
    found = [
        Summary(
            *key,
            len(group),
            statistics.fmean(finals) if (finals := _finals(group)) else math.inf,
            *(statistics.median(column) for column in zip(*map(referee.reach, group), strict=True)),
            tuple(run.error for run in group if run.error is not None),
        )
        for key, group in groups.items()
    ]
    best = [
        min((s for s in found if s.method == method), key=lambda s: (not s.works, s.final))
        for method in TUNED
        if any(s.method == method for s in found)
    ]
    return [*best, *(summary for summary in found if summary.method not in TUNED)]


def _finals(group: Sequence[Run]) -> list[float]:
    return [run.final for run in group if run.final is not None]


def verdict(summaries: Sequence[Summary], referee: Referee) -> str:
    """Says in words whether a natural gradient helps.

    It does not where each of them is beaten: a rival needs fewer steps and fewer seconds, or ends
    lower.

    Args:
        summaries: The methods of a program.
        referee: Its referee.

    Returns:
        The words.
    """
    naturals = [s for s in summaries if s.method in {NATURAL, VISIBLE} and s.works]
    rivals = [s for s in summaries if s.method in {*TUNED, EM} and s.works]
    slack = SAME * referee.gap
    if not naturals:
        return "**no**: every natural gradient is refused or fails"
    defeats = {s.method: [d for r in rivals if (d := defeat(s, r, slack))] for s in naturals}
    best = min(naturals, key=lambda s: (len(defeats[s.method]), s.steps, s.final))
    if defeats[best.method]:
        return "**no**: " + ", ".join(defeats[best.method])
    wins = [
        "fewer steps" if all(best.steps < r.steps for r in rivals) else "",
        "fewer seconds" if all(best.seconds < r.seconds for r in rivals) else "",
        "ends lower" if all(best.final < r.final - slack for r in rivals) else "",
    ]
    words = ", ".join(filter(None, wins))
    if not words:
        return "no clear difference"
    quicker = [r.method for r in rivals if r.seconds < best.seconds]
    return f"{best.method}: {words}" + "".join(f"; {r} takes fewer seconds" for r in quicker)


def defeat(natural_gradient: Summary, rival: Summary, slack: float) -> str:
    """In which way a rival beats a natural gradient, or nothing.

    Args:
        natural_gradient: The natural gradient.
        rival: The rival.
        slack: Difference of losses that does not count.

    Returns:
        The words.
    """
    fewer_steps = rival.steps < natural_gradient.steps
    words = [
        "is faster" if fewer_steps and rival.seconds < natural_gradient.seconds else "",
        "ends lower" if rival.final < natural_gradient.final - slack else "",
    ]
    return f"{rival.method} " + " and ".join(filter(None, words)) if any(words) else ""


# --- showing -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """Everything about a program.

    Attributes:
        program: The program.
        plan: How long it was trained.
        runs: All runs.
        referee: What they are compared with.
        summaries: One for each method.
    """

    program: Program
    plan: Plan
    runs: list[Run]
    referee: Referee
    summaries: list[Summary]


def cell(summary: Summary | None) -> str:
    """Final loss, and steps and seconds to the mark; or the error."""
    if summary is None:
        return ""
    if summary.errors:
        first, count = summary.errors[0], len(summary.errors)
        if count == summary.seeds and first.startswith("refused"):
            return first
        return f"{count} of {summary.seeds} fail: {first}"
    reached = math.isfinite(summary.steps)
    effort = f"{summary.steps:.0f} · {summary.seconds:.3g} s" if reached else "–"
    rate = f" (rate {summary.rate:g})" if summary.method in TUNED else ""
    if summary.guide_rate is not None:
        rate = f" (rates {summary.rate:g}, {summary.guide_rate:g})"
    return f"{summary.final:.4f} · {effort}{rate}"


def table(entries: Sequence[Entry]) -> str:
    """The comparison in Markdown.

    Args:
        entries: The programs.

    Returns:
        The table, one line per program.
    """
    rows = [
        (
            "program",
            "data, steps, seeds",
            "start",
            "optimum",
            *METHODS,
            "at equal steps",
            "does it help?",
        )
    ]
    for entry in entries:
        plan, referee = entry.plan, entry.referee
        optimum = f"{statistics.fmean(referee.optima):.4f} {referee.kind}"
        if referee.bound is not None:
            optimum += f", bound {referee.bound:.4f}"
        found = {summary.method: summary for summary in entry.summaries}
        rows.append((
            entry.program.name + ("" if referee.exact else " †"),
            f"{plan.size}, {plan.steps}, {plan.seeds}",
            f"{statistics.fmean(referee.starts):.4f}",
            optimum,
            *(cell(found.get(method)) for method in METHODS),
            ending(entry.summaries, referee)[0],
            verdict(entry.summaries, referee),
        ))
    return f"{markdown(rows)}\n\n{CAPTION}\n\n{tally(entries)}"


def ending(summaries: Sequence[Summary], referee: Referee) -> tuple[str, float]:
    """How the natural gradient with its defaults ends, against the best of the tuned methods.

    Args:
        summaries: The methods of a program.
        referee: Its referee.

    Returns:
        "lower", "equal" or "higher", and by which share of the loss it ends higher.
    """
    own = next(s for s in summaries if s.method == NATURAL)
    rivals = [s.final for s in summaries if s.method in TUNED and s.works]
    if not own.works or not rivals:
        return ("fails" if not own.works else "lower"), (math.inf if not own.works else -math.inf)
    best = min(rivals)
    excess = (own.final - best) / abs(best)
    if abs(own.final - best) <= SAME * referee.gap:
        return "equal", excess
    return ("lower" if own.final < best else f"higher by {excess:.2%}"), excess


def tally(entries: Sequence[Entry]) -> str:
    """On how many programs the natural gradient ends no higher, and how much higher elsewhere."""
    found = [ending(entry.summaries, entry.referee) for entry in entries]
    good = sum(word in {"lower", "equal"} for word, _ in found)
    worst = max(excess for _, excess in found)
    return (
        f"At equal steps the natural gradient ends as low as the best tuned method, or lower, on "
        f"{good} of {len(found)} programs; at worst {max(worst, 0.0):.2%} higher."
    )


CAPTION = (
    "Losses: negative log likelihood of the training data per datum in nats, with †: negative "
    "ELBO; means over seeds. A method's cell: final loss · steps · seconds of one core until "
    f"{MARK:.0%} of the way from start to optimum is left, medians over seeds, – if that is not "
    "reached. **no**: another method gets there in fewer steps and seconds, or ends lower by "
    f"more than {SAME:.1%} of the way."
)


def write_results(entries: Sequence[Entry], settings: Settings, path: Path) -> None:
    """Writes all runs with what they depend on.

    Args:
        entries: The programs.
        settings: The settings.
        path: The JSON file to write.
    """
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    content = {
        "versions": {"python": platform.python_version(), "commit": commit(), **versions},
        "settings": asdict(settings),
        "left out": [name for name in programs() if name not in settings.programs],
        "programs": [
            {
                "name": entry.program.name,
                "objective": entry.program.objective,
                "plan": asdict(entry.plan),
                "referee": asdict(entry.referee),
                "summaries": [_finite(asdict(summary)) for summary in entry.summaries],
                "verdict": verdict(entry.summaries, entry.referee),
            }
            for entry in entries
        ],
        "runs": [asdict(run) for entry in entries for run in entry.runs],
    }
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _finite(numbers: dict[str, Any]) -> dict[str, Any]:
    """The same with None for infinity, which JSON does not have."""
    return {name: None if number == math.inf else number for name, number in numbers.items()}


def commit() -> str | None:
    """The commit that is checked out, "-dirty" if files differ from it, or None without Git."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=40"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def plot_curves(entries: Sequence[Entry], path: Path) -> None:
    """Draws the share of the way to the optimum that is left against seconds.

    Args:
        entries: The programs.
        path: The PNG file to write.
    """
    columns = min(5, len(entries))
    rows = -(-len(entries) // columns)
    figure = Figure(figsize=(3 * columns, 2.4 * rows + 0.4), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, entry in zip(panels, entries, strict=False):
        rates = {s.method: (s.rate, s.guide_rate) for s in entry.summaries}
        for run in entry.runs:
            if (run.rate, run.guide_rate) != rates[run.method]:
                continue
            color = f"C{METHODS.index(run.method)}"
            left = [max(share, 1e-5) for share in entry.referee.left(run)]
            axes.plot(run.seconds[1:], left[1:], color=color, linewidth=1)
        axes.axhline(MARK, color="black", linewidth=0.6, linestyle=":")
        axes.set(xscale="log", yscale="log", ylim=(1e-4, 2), title=entry.program.name)
    for axes in panels[len(entries) :]:
        axes.set_axis_off()
    panels[0].set(xlabel="seconds", ylabel="way to the optimum left")
    for index, method in enumerate(METHODS):
        panels[0].plot([], [], color=f"C{index}", label=method)
    panels[0].legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=110)


def parse(argv: Sequence[str] | None) -> tuple[Settings, Path]:
    """Reads the command line.

    Args:
        argv: Arguments, or None for those of the process.

    Returns:
        The settings, and the output folder.
    """
    names = tuple(programs())
    parser = argparse.ArgumentParser(description="Adam and EM against natural gradients: the zoo.")
    parser.add_argument("--programs", nargs="+", choices=names, metavar="NAME", help="only these")
    parser.add_argument("--seeds", type=int, default=3, help="number of runs per method")
    parser.add_argument("--steps-share", type=float, default=1.0, help="share of the usual steps")
    parser.add_argument("--output", type=Path, default=Path("zoo-output"))
    parser.add_argument("--quick", action="store_true", help="a few programs and steps, 1 seed")
    options = parser.parse_args(argv)
    settings = Settings(tuple(options.programs or names), options.seeds, options.steps_share)
    if options.quick:
        chosen = tuple(options.programs or QUICK)
        settings = Settings(chosen, 1, 0.04, ADAM_RATES[-2:], size=100, em_steps=20)
    return settings, options.output


def run_all(settings: Settings) -> Iterator[Entry]:
    """Runs the comparison, after a first short run that is not counted.

    Args:
        settings: The settings.

    Yields:
        The programs, one after the other.
    """
    registry = programs()
    with tqdm(settings.programs, disable=None) as bar:
        for index, name in enumerate(bar):
            program, plan = registry[name], settings.plan(registry[name])
            data = program.make_data(0, plan.size)
            if index == 0:
                short = replace(settings, seeds=1, share=0.0, em_steps=2)
                compare(program, short, data, bar)
            runs = compare(program, settings, data, bar)
            referee = find_referee(program, data, runs, settings.em_steps)
            yield Entry(program, plan, runs, referee, summarize(runs, referee))


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the comparison and writes its results.

    Args:
        argv: Arguments, or None for those of the process.
    """
    settings, output = parse(argv)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    entries = list(run_all(settings))
    text = table(entries)
    print(text)
    output.mkdir(parents=True, exist_ok=True)
    (output / "table.md").write_text(text + "\n", encoding="utf-8")
    write_results(entries, settings, output / "results.json")
    plot_curves(entries, output / "curves.png")
    print(f"\nWrote table.md, results.json and curves.png to {output}")


if __name__ == "__main__":
    main()
