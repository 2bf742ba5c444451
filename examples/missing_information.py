"""EM and its rivals against natural gradients where much information is missing.

Maximum likelihood with hidden variables, on the full batch, in double precision, with exact
likelihoods. EM is slow where the observed variables say little about the parameters compared with
what the hidden ones would say. Every method starts at the same parameters and runs until the
gradient of the mean log likelihood per datum, in Pyro's unconstrained coordinates, has a Euclidean
norm below 1e-7, or until its time is up:

* EM, and SQUAREM (Varadhan & Roland 2008, scheme S3, monotone); an iteration is one EM step;
* the full natural gradient with rate 1, and the visible one; an iteration is one `svi.step`, and
  the seconds include the analysis of the program;
* Adam with the best of five constant rates, picked for each run by hindsight;
* L-BFGS with strong Wolfe line search; an iteration is one evaluation of likelihood and gradient.

Where EM, SQUAREM or a natural gradient do not need the likelihood, its evaluation to decide when to
stop is not part of their seconds. Above 200 iterations EM and SQUAREM look only every 0.5 % more
iterations, which rounds their counts up.

Run it as `python -m examples.missing_information`, or with `--quick` for a small version. It prints
tables with medians over seeds, which change data and start, and writes to the output folder:

* table.md: the tables in Markdown;
* results.json: the medians, and every run with its path, thinned;
* paths.png: the norm of the gradient against iterations and against seconds.
"""

import argparse
import itertools
import json
import math
import os
import platform
import statistics
import textwrap
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import pyro
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO
from torch import Tensor
from torch.distributions import transform_to
from tqdm import tqdm

import pyronat
from models import latent_class, mixture
from models.factor_analysis import FactorAnalysis
from models.hmm import DiscreteHMM
from models.noisy_or import NoisyOr

Params: TypeAlias = dict[str, Tensor]

TOLERANCE = 1e-7
RATES = (0.003, 0.01, 0.03, 0.1, 0.3)
EXACT_CHECKS = 200
CHECK_SPACING = 1.005
SAME = 1e-8
BEST = 1e-6
SLACK = 1e-12
"""Share of a log likelihood that is lost in rounding."""
LBFGS_HISTORY = 20
LBFGS_RESTARTS = 3
"""Restarts in a row without a better likelihood after which L-BFGS is given up."""
LOWEST = -700.0
"""Unconstrained stand-in for minus infinity: its exponential is still positive."""
MAX_POINTS = 120
"""Points of a path in files and figures."""
EM = "EM"
SQUAREM = "SQUAREM"
FULL = "full natural"
VISIBLE = "visible natural"
ADAM = "Adam"
LBFGS = "L-BFGS"
METHODS = (EM, SQUAREM, FULL, VISIBLE, ADAM, LBFGS)
QUICK = ("mixture", "fa")
QUICK_SIZE = 200


@dataclass(frozen=True)
class Settings:
    """How much to run.

    Attributes:
        problems: Names of the problems.
        methods: Names of the methods.
        seeds: Number of data sets and starts per problem.
        seconds: Time limit of a run; each of Adam's rates is a run.
        rates: Adam's rates.
        size: Number of data, or None for that of each problem.
        output: Folder for the results.
    """

    problems: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: int
    seconds: float
    rates: tuple[float, ...]
    size: int | None
    output: Path


@dataclass(frozen=True)
class Evaluation:
    """The objective at one point.

    Attributes:
        value: Mean log likelihood per datum in nats; NaN where it cannot be computed.
        gradient: Its gradient in unconstrained coordinates, shape [parameters].
    """

    value: float
    gradient: Tensor

    @property
    def norm(self) -> float:
        """Euclidean norm of the gradient."""
        return float(self.gradient.norm())


@dataclass(frozen=True)
class Problem:
    """Data, a model and a start.

    Attributes:
        name: Name in the tables.
        seed: Seed of data and start.
        net: The model, an object of one of the classes in `models`.
        x: The data, one per row.
        start: Constrained parameters by name.
        constraints: Pyro's constraints by name.
    """

    name: str
    seed: int
    net: Any
    x: Tensor
    start: Params
    constraints: dict[str, Any]

    @property
    def em_step(self) -> Callable[[Params], Params] | None:
        """One step of EM on constrained parameters, or None where it has no closed form."""
        step = getattr(self.net, "em_step", None)
        return None if step is None else lambda params: step(params, self.x)

    @property
    def collapsed(self) -> Callable[[Tensor], None] | None:
        """The program with the hidden variables integrated out, or None if there is none."""
        program: Callable[[Tensor], None] | None = getattr(self.net, "collapsed", None)
        return program

    @property
    def size(self) -> int:
        """Number of unconstrained parameters."""
        return self.flatten(self.start).numel()

    def flatten(self, params: Params) -> Tensor:
        """Unconstrained coordinates of constrained parameters, shape [parameters]."""
        parts = [
            transform_to(constraint).inv(params[name]).reshape(-1)
            for name, constraint in self.constraints.items()
        ]
        return torch.cat(parts).clamp_min(LOWEST)

    def constrain(self, point: Tensor) -> Params:
        """Constrained parameters, by name, of unconstrained coordinates."""
        params = {}
        for name, constraint in self.constraints.items():
            shape = self.start[name].shape
            part, point = point[: shape.numel()], point[shape.numel() :]
            params[name] = transform_to(constraint)(part.reshape(shape))
        return params

    def log_likelihood(self, point: Tensor) -> Tensor:
        """Mean log likelihood per datum at unconstrained coordinates, a scalar."""
        total: Tensor = self.net.log_likelihood(self.constrain(point), self.x)
        return total / len(self.x)

    def evaluate(self, point: Tensor) -> Evaluation:
        """Mean log likelihood and gradient at unconstrained coordinates."""
        leaf = point.detach().requires_grad_()
        try:
            value = self.log_likelihood(leaf)
            (gradient,) = torch.autograd.grad(value, leaf)
        except (RuntimeError, ValueError):
            return Evaluation(math.nan, torch.full_like(point, math.nan))
        return Evaluation(value.item(), gradient)

    def fill_store(self) -> None:
        """Makes the start the only content of the parameter store."""
        pyro.clear_param_store()
        for name, constraint in self.constraints.items():
            pyro.param(name, self.start[name].clone(), constraint=constraint)

    def stored(self) -> Tensor:
        """Unconstrained coordinates of the parameter store, shape [parameters]."""
        leaves = dict(pyro.get_param_store().named_parameters())
        return torch.cat([leaves[name].detach().reshape(-1) for name in self.constraints])


def make_problem(name: str, net: Any, x: Tensor, seed: int) -> Problem:
    """Makes a problem, and asks the model for its constraints.

    Args:
        name: Name of the problem.
        net: The model.
        x: The data.
        seed: Seed of data and start.

    Returns:
        The problem.
    """
    pyro.clear_param_store()
    net.model(x)
    constraints = dict(pyro.get_param_store().get_state()["constraints"])
    pyro.clear_param_store()
    return Problem(name, seed, net, x, net.start(seed), constraints)


@dataclass(frozen=True)
class Point:
    """A point of a path.

    Attributes:
        iteration: Number of iterations so far.
        seconds: Time so far, without the evaluations that only decide when to stop.
        value: Mean log likelihood per datum in nats.
        norm: Norm of its gradient.
    """

    iteration: int
    seconds: float
    value: float
    norm: float


class Track:
    """The path of a run, its clock and its end.

    Attributes:
        points: The points so far, the start included.
    """

    def __init__(self, start: Evaluation, seconds: float, iterations: float = math.inf) -> None:
        """Begins at a start.

        Args:
            start: The objective at the start.
            seconds: Time limit.
            iterations: Limit on the number of iterations.
        """
        self.points = [Point(0, 0.0, start.value, start.norm)]
        self._limits = seconds, iterations
        self._total = 0.0
        self._since: float | None = None

    @property
    def seconds(self) -> float:
        """Time on the clock."""
        running = 0.0 if self._since is None else time.perf_counter() - self._since
        return self._total + running

    @property
    def converged(self) -> bool:
        """Whether the last point is within the tolerance."""
        return self.points[-1].norm < TOLERANCE

    @contextmanager
    def clock(self) -> Generator[None, None, None]:
        """Lets the clock run."""
        self._since = time.perf_counter()
        try:
            yield
        finally:
            self._total, self._since = self.seconds, None

    def due(self, iteration: int) -> bool:
        """Whether it is time to look at the gradient."""
        spaced = iteration >= CHECK_SPACING * self.points[-1].iteration
        return iteration <= EXACT_CHECKS or spaced or self._over(iteration)

    def visit(self, iteration: int, found: Evaluation) -> bool:
        """Adds a point.

        Args:
            iteration: Number of iterations so far.
            found: The objective there.

        Returns:
            Whether to go on.

        Raises:
            ArithmeticError: If the objective is not finite.
        """
        if not (math.isfinite(found.value) and math.isfinite(found.norm)):
            raise ArithmeticError(f"not finite after {iteration} iterations")
        self.points.append(Point(iteration, self.seconds, found.value, found.norm))
        return not (self.converged or self._over(iteration))

    def _over(self, iteration: int) -> bool:
        seconds, iterations = self._limits
        return self.seconds >= seconds or iteration >= iterations


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        problem: Name of the problem.
        method: Name of the method.
        seed: Seed of data and start.
        rate: Adam's rate, or None.
        points: The path.
        failure: Why it ended early, or None.
    """

    problem: str
    method: str
    seed: int
    rate: float | None
    points: tuple[Point, ...]
    failure: str | None

    @property
    def converged(self) -> bool:
        """Whether the tolerance was reached."""
        return self.points[-1].norm < TOLERANCE

    @property
    def final(self) -> Point:
        """The last point if it converged, else the most likely one."""
        if self.converged:
            return self.points[-1]
        return max(self.points, key=lambda point: point.value)


def run_em(problem: Problem, track: Track) -> None:
    """Iterates EM.

    Args:
        problem: The problem.
        track: The path to extend.
    """
    step = problem.em_step
    assert step is not None
    params = problem.start
    for iteration in itertools.count(1):
        with track.clock():
            params = step(params)
        if track.due(iteration):
            if not track.visit(iteration, problem.evaluate(problem.flatten(params))):
                return


def run_squarem(problem: Problem, track: Track) -> None:
    """Iterates SQUAREM cycles of three EM steps each.

    Args:
        problem: The problem.
        track: The path to extend.
    """
    point = problem.flatten(problem.start)
    value = track.points[0].value
    for iteration in itertools.count(3, 3):
        with track.clock():
            point, value = squarem_cycle(problem, point, value)
        if track.due(iteration) and not track.visit(iteration, problem.evaluate(point)):
            return


def squarem_cycle(problem: Problem, start: Tensor, value: float) -> tuple[Tensor, float]:
    """Two EM steps, an extrapolation that must not lose likelihood, and an EM step from there.

    Args:
        problem: The problem.
        start: Unconstrained coordinates, shape [parameters].
        value: Mean log likelihood there.

    Returns:
        The new coordinates and their mean log likelihood.
    """
    em_step = problem.em_step
    assert em_step is not None

    def step(point: Tensor) -> Tensor:
        return problem.flatten(em_step(problem.constrain(point)))

    first = step(start)
    point = second = step(first)
    change = first - start
    bend = second - first - change
    length = -float(change.norm() / bend.norm()) if bend.any() else -1.0
    while length < -1.01:
        trial = start - 2 * length * change + length**2 * bend
        if log_likelihood(problem, trial) >= value - SLACK * max(1.0, abs(value)):
            point = trial
            break
        length = (length - 1) / 2
    point = step(point)
    return point, log_likelihood(problem, point)


def log_likelihood(problem: Problem, point: Tensor) -> float:
    """The mean log likelihood without its gradient; minus infinity where it does not exist."""
    try:
        with torch.no_grad():
            value = float(problem.log_likelihood(point))
    except (RuntimeError, ValueError):
        return -math.inf
    return value if math.isfinite(value) else -math.inf


def run_adam(problem: Problem, track: Track, rate: float) -> None:
    """Takes Adam steps at a constant rate.

    Args:
        problem: The problem.
        track: The path to extend.
        rate: The rate.
    """
    leaf = problem.flatten(problem.start).requires_grad_()
    optimizer = torch.optim.Adam([leaf], lr=rate)
    leaf.grad = -problem.evaluate(leaf).gradient
    for iteration in itertools.count(1):
        with track.clock():
            optimizer.step()
            found = problem.evaluate(leaf)
            leaf.grad = -found.gradient
        if not track.visit(iteration, found):
            return


class _Finished(Exception):
    """Leaves torch's L-BFGS from within."""


class Lbfgs:
    """L-BFGS that starts afresh from its best point when a line search fails.

    Attributes:
        best: Unconstrained coordinates of the most likely point, shape [parameters].
        value: Its mean log likelihood.
        evaluations: Number of evaluations so far.
    """

    def __init__(self, problem: Problem, track: Track) -> None:
        """Begins at the problem's start.

        Args:
            problem: The problem.
            track: The path to extend.
        """
        self.problem, self.track = problem, track
        self.best, self.value = problem.flatten(problem.start), -math.inf
        self.evaluations = 0

    def run(self) -> None:
        """Runs to the end.

        Raises:
            ArithmeticError: If no restart gets any further.
        """
        failures = 0
        while failures < LBFGS_RESTARTS:
            before = self.value
            try:
                self.search(rate=0.5**failures)
            except _Finished:
                return
            except ArithmeticError:
                pass
            failures = 0 if self.value > before else failures + 1
        raise ArithmeticError("the line search fails")

    def search(self, rate: float) -> None:
        """Runs torch's optimizer from the best point until it stops or is stopped.

        Args:
            rate: Length of the first trial step of a line search.
        """
        leaf = self.best.clone().requires_grad_()
        optimizer = torch.optim.LBFGS(
            [leaf],
            lr=rate,
            max_iter=10**9,
            max_eval=10**9,
            tolerance_grad=0,
            tolerance_change=0,
            history_size=LBFGS_HISTORY,
            line_search_fn="strong_wolfe",
        )
        with self.track.clock():
            optimizer.step(lambda: self.closure(leaf))

    def closure(self, leaf: Tensor) -> Tensor:
        """Evaluates the objective for torch's optimizer.

        Args:
            leaf: Unconstrained coordinates, whose gradient is set.

        Returns:
            Minus the mean log likelihood.

        Raises:
            _Finished: At the end of the run.
        """
        found = self.problem.evaluate(leaf)
        self.evaluations += 1
        goes_on = self.track.visit(self.evaluations, found)
        if found.value > self.value:
            self.best, self.value = leaf.detach().clone(), found.value
        if not goes_on:
            raise _Finished
        leaf.grad = -found.gradient
        return torch.tensor(-found.value)


def run_natural(
    problem: Problem,
    track: Track,
    program: Callable[[Tensor], None],
    optim: pyronat.NaturalGradient,
    loss: ELBO,
) -> None:
    """Takes natural gradient steps.

    Args:
        problem: The problem.
        track: The path to extend.
        program: The Pyro program to train.
        optim: The optimizer.
        loss: The exact loss.
    """
    problem.fill_store()
    svi = pyronat.NaturalSVI(program, problem.net.guide, optim, loss)
    with pyro.validation_enabled(False):
        for iteration in itertools.count(1):
            with track.clock():
                svi.step(problem.x)
            if not track.visit(iteration, problem.evaluate(problem.stored())):
                return


def run_lbfgs(problem: Problem, track: Track) -> None:
    """Runs L-BFGS.

    Args:
        problem: The problem.
        track: The path to extend.
    """
    Lbfgs(problem, track).run()


def run_full(problem: Problem, track: Track) -> None:
    """Takes unit steps along the full natural gradient of a program with discrete hidden variables.

    Its Fisher information weighs hidden variables by their exact posterior at the data, as EM does;
    it is damped only as much as redundant coordinates need.

    Args:
        problem: The problem.
        track: The path to extend.
    """
    optim = pyronat.NaturalGradient(
        lr=1.0,
        geometry=pyronat.Full("posterior"),
        damping=pyronat.steps.ConstantDamping(0.0, relative=1e-9),
        curvature=pyronat.steps.RunningAverage(decay=0.0, refresh=1),
    )
    loss = TraceEnum_ELBO(max_plate_nesting=1)
    run_natural(problem, track, problem.net.model, optim, loss)


def run_visible(problem: Problem, track: Track) -> None:
    """Takes steps along the visible natural gradient, with defaults.

    The metric is exact where all values of hidden and visible variables can be enumerated; where
    the data are continuous it comes from dreams with enumerated posteriors. The full geometry of a
    program without hidden variables is the visible one.

    Args:
        problem: The problem.
        track: The path to extend.
    """
    adaptive = pyronat.steps.LevenbergMarquardt()
    if problem.collapsed is not None:
        optim = pyronat.NaturalGradient(geometry=pyronat.Full("exact"), damping=adaptive)
        run_natural(problem, track, problem.collapsed, optim, Trace_ELBO())
        return
    continuous = isinstance(problem.net, mixture.GaussianMixture)
    geometry = pyronat.Visible(adaptive, posterior="enumerate" if continuous else "exact")
    optim = pyronat.NaturalGradient(geometry=geometry)
    loss = TraceEnum_ELBO(max_plate_nesting=1)
    run_natural(problem, track, problem.net.model, optim, loss)


RUNNERS: dict[str, Callable[[Problem, Track], None]] = {
    EM: run_em,
    SQUAREM: run_squarem,
    FULL: run_full,
    VISIBLE: run_visible,
    LBFGS: run_lbfgs,
}


@dataclass(frozen=True)
class Case:
    """A family of problems, one per seed.

    Attributes:
        title: Name in tables and figures.
        make: Makes model and data from a seed and the number of data.
        size: Number of data.
    """

    title: str
    make: Callable[[int, int], tuple[Any, Tensor]]
    size: int

    def problem(self, seed: int, size: int | None = None) -> Problem:
        """The problem of a seed, with another number of data if one is given."""
        return make_problem(self.title, *self.make(seed, size or self.size), seed)


def _mixture(seed: int, size: int) -> tuple[Any, Tensor]:
    return mixture.GaussianMixture(), mixture.make_data(seed, size)


def _factor_analysis(
    seed: int, size: int, factors: int, noise: float, isotropic: bool = False
) -> tuple[Any, Tensor]:
    net = FactorAnalysis(10, factors, noise, isotropic)
    return net, net.make_data(seed, size)


def _latent_class(seed: int, size: int, separation: float) -> tuple[Any, Tensor]:
    return latent_class.LatentClass(), latent_class.make_data(seed, size, separation)


def _hmm(seed: int, size: int, states: int, length: int) -> tuple[Any, Tensor]:
    net = DiscreteHMM(states, 3, length)
    return net, net.make_data(seed, size)


def _noisy_or(seed: int, size: int, edges: int, net_seed: int) -> tuple[Any, Tensor]:
    net = NoisyOr(3, 7, edges, net_seed)
    return net, net.sample(net.truth(seed), size, seed)


CASES = {
    "mixture": Case("Gaussian mixture, 3 components", _mixture, 1000),
    "fa": Case("FA d10 k2, noise 1", partial(_factor_analysis, factors=2, noise=1.0), 1000),
    "fa-small-noise": Case(
        "FA d10 k3, noise 1e-3", partial(_factor_analysis, factors=3, noise=1e-3), 1000
    ),
    "ppca-small-noise": Case(
        "PPCA d10 k3, noise 1e-3",
        partial(_factor_analysis, factors=3, noise=1e-3, isotropic=True),
        1000,
    ),
    "latent-class": Case("latent class 3x8, sep .9", partial(_latent_class, separation=0.9), 1000),
    "latent-class-close": Case(
        "latent class 3x8, sep .6", partial(_latent_class, separation=0.6), 1000
    ),
    "hmm-2": Case("HMM S2 O3 T5", partial(_hmm, states=2, length=5), 1000),
    "hmm-3": Case("HMM S3 O3 T4", partial(_hmm, states=3, length=4), 1000),
    "noisy-or-1": Case("noisy-or 3x7, net 1", partial(_noisy_or, edges=11, net_seed=0), 5000),
    "noisy-or-2": Case("noisy-or 3x7, net 2", partial(_noisy_or, edges=13, net_seed=1), 20000),
}


def applies(method: str, problem: Problem) -> bool:
    """Whether a method can be run on a problem."""
    if method in {EM, SQUAREM}:
        return problem.em_step is not None
    return method != FULL or problem.collapsed is None


def attempt(
    problem: Problem,
    method: str,
    runner: Callable[[Problem, Track], None],
    track: Track,
    rate: float | None = None,
) -> Run:
    """Runs a method and catches its failure.

    Args:
        problem: The problem.
        method: Name of the method.
        runner: Extends the path.
        track: The path.
        rate: Adam's rate.

    Returns:
        The run.
    """
    failure = None
    try:
        runner(problem, track)
    except Exception as error:
        # Whatever goes wrong is a result of the comparison, and printed with it.
        failure = f"{type(error).__name__}: {error}"
    return Run(problem.name, method, problem.seed, rate, tuple(track.points), failure)


def solve(problem: Problem, method: str, settings: Settings) -> list[Run]:
    """Runs a method on a problem, Adam with all its rates.

    Args:
        problem: The problem.
        method: Name of the method.
        settings: The settings.

    Returns:
        The runs, the best one last.
    """
    start = problem.evaluate(problem.flatten(problem.start))
    if method != ADAM:
        track = Track(start, settings.seconds)
        return [attempt(problem, method, RUNNERS[method], track)]
    runs: list[Run] = []
    fewest = math.inf
    for rate in settings.rates:
        # A rate that needs more iterations than another one cannot be the best.
        track = Track(start, settings.seconds, fewest)
        run = attempt(problem, ADAM, partial(run_adam, rate=rate), track, rate)
        if run.converged:
            fewest = run.final.iteration
        runs.append(run)
    return sorted(runs, key=merit)


def warm_up(settings: Settings) -> None:
    """Takes an iteration of every method, so that no run pays for what a process does once."""
    problem = CASES[settings.problems[0]].problem(0, settings.size)
    start = problem.evaluate(problem.flatten(problem.start))
    for method in settings.methods:
        if method in RUNNERS and applies(method, problem):
            attempt(problem, method, RUNNERS[method], Track(start, math.inf, iterations=1))


def merit(run: Run) -> tuple[bool, float]:
    """Key that sorts runs by merit, the best one last."""
    return run.converged, -(run.final.iteration if run.converged else run.final.norm)


@dataclass(frozen=True)
class Summary:
    """What a method did on the seeds of a problem.

    Attributes:
        problem: Name of the problem.
        method: Name of the method.
        seeds: Number of seeds.
        converged: Number of seeds with a gradient below the tolerance.
        iterations: Median over seeds, or None unless most of them converged.
        seconds: Median over seeds, or None unless most of them converged.
        norm: Median of the norms of the final gradients of seeds that did not converge, or None.
        log_likelihood: Median of the final mean log likelihoods per datum in nats.
        best: Seeds whose optimum is within 1e-6 of the best one of all methods.
        better: Seeds whose optimum is better by 1e-8 than those of all other methods.
        same: Seeds whose optimum is that of the best other method.
        worse: Seeds whose optimum is worse by 1e-8 than that of another method.
        rates: Best rate of each seed, or nothing.
        failures: Why runs ended early.
        as_em: Whether the numbers are those of EM.
    """

    problem: str
    method: str
    seeds: int
    converged: int
    iterations: float | None
    seconds: float | None
    norm: float | None
    log_likelihood: float
    best: int
    better: int
    same: int
    worse: int
    rates: tuple[float, ...]
    failures: tuple[str, ...]
    as_em: bool = False


def summarize(runs: Sequence[Run]) -> list[Summary]:
    """Summarizes the best runs of one problem.

    Args:
        runs: A run for each method and seed.

    Returns:
        A summary for each method.
    """
    values = {(run.method, run.seed): run.final.value for run in runs}
    methods: dict[str, list[Run]] = {}
    for run in runs:
        methods.setdefault(run.method, []).append(run)
    summaries = []
    for method, group in methods.items():
        gains = [
            run.final.value
            - max(
                (v for (m, s), v in values.items() if s == run.seed and m != method),
                default=run.final.value,
            )
            for run in group
        ]
        failed = [run.final.norm for run in group if not run.converged]
        summaries.append(
            Summary(
                problem=group[0].problem,
                method=method,
                seeds=len(group),
                converged=len(group) - len(failed),
                iterations=median(group, lambda run: run.final.iteration),
                seconds=median(group, lambda run: run.final.seconds),
                norm=statistics.median(failed) if failed else None,
                log_likelihood=statistics.median(run.final.value for run in group),
                best=sum(gain >= -BEST for gain in gains),
                better=sum(gain > SAME for gain in gains),
                same=sum(abs(gain) <= SAME for gain in gains),
                worse=sum(gain < -SAME for gain in gains),
                rates=tuple(run.rate for run in group if run.rate is not None),
                failures=tuple(run.failure for run in group if run.failure is not None),
            )
        )
    return summaries


def median(runs: Sequence[Run], number: Callable[[Run], float]) -> float | None:
    """Median over runs in which those that did not converge count as infinite.

    Args:
        runs: The runs.
        number: What to take from each.

    Returns:
        The median, or None if it is infinite.
    """
    value = statistics.median(number(run) if run.converged else math.inf for run in runs)
    return value if math.isfinite(value) else None


def with_full(summaries: Sequence[Summary], problem: Problem) -> list[Summary]:
    """Adds EM's numbers as those of the full natural gradient where it is the same.

    Args:
        summaries: Summaries of a problem, by method.
        problem: The problem.

    Returns:
        The summaries.
    """
    if problem.collapsed is None:
        return list(summaries)
    copies = [replace(s, method=FULL, as_em=True) for s in summaries if s.method == EM]
    return [*summaries, *copies]


def effort(summary: Summary) -> str:
    """Iterations and seconds, or the norm of the gradient that was reached."""
    mark = "†" if summary.as_em else ""
    share = "" if summary.converged == summary.seeds else f" ({summary.converged}/{summary.seeds})"
    if summary.iterations is None or summary.seconds is None:
        return f"- {summary.norm:.0e}{share}{mark}"
    return f"{summary.iterations:.0f} · {summary.seconds:.2f} s{share}{mark}"


def optimum(summary: Summary) -> str:
    """How often the best optimum was found, and how it compares with the others'."""
    mark = "†" if summary.as_em else ""
    return f"{summary.best}/{summary.seeds}, {summary.better}/{summary.same}/{summary.worse}{mark}"


def likelihood(summary: Summary) -> str:
    """The log likelihood."""
    return f"{summary.log_likelihood:.9f}" + ("†" if summary.as_em else "")


TABLES: tuple[tuple[str, Callable[[Summary], str]], ...] = (
    (
        "Iterations and seconds, medians over seeds; or '-' with the norm of the gradient that was "
        "reached in the time limit. In brackets the share of the seeds that converged, unless all "
        "did.",
        effort,
    ),
    (
        f"Seeds whose optimum is the best of all methods within {BEST:g}; then seeds on which it "
        f"is better than, the same as, or worse than the best of the other methods' within "
        f"{SAME:g}.",
        optimum,
    ),
    ("Final mean log likelihood per datum in nats, median over seeds.", likelihood),
)
FOOTNOTE = (
    "† With the exact posterior, the full natural gradient with rate 1 of a program with normal "
    "hidden variables is EM: EM's numbers."
)


def table(summaries: Sequence[Summary], cell: Callable[[Summary], str]) -> list[tuple[str, ...]]:
    """Lays out one line per problem and one column per method.

    Args:
        summaries: The summaries.
        cell: Formats a summary.

    Returns:
        Rows of cells, the header first; "n/a" where a method does not apply.
    """
    found = {(summary.problem, summary.method): summary for summary in summaries}
    methods = [method for method in METHODS if any(s.method == method for s in summaries)]
    rows = [("problem", *methods)]
    for problem in dict.fromkeys(summary.problem for summary in summaries):
        cells = [found.get((problem, method)) for method in methods]
        rows.append((problem, *("n/a" if s is None else cell(s) for s in cells)))
    return rows


def text(rows: Sequence[tuple[str, ...]]) -> str:
    """A table as plain text."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


def markdown(rows: Sequence[tuple[str, ...]]) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join(lines)


def report(summaries: Sequence[Summary], layout: Callable[[list[tuple[str, ...]]], str]) -> str:
    """All tables with their captions.

    Args:
        summaries: The summaries.
        layout: Formats the rows of a table.

    Returns:
        The report.
    """
    parts = []
    for caption, cell in TABLES:
        parts += [textwrap.fill(caption, 100), layout(table(summaries, cell))]
    if any(summary.as_em for summary in summaries):
        parts.append(textwrap.fill(FOOTNOTE, 100))
    return "\n\n".join(parts)


def write_results(
    summaries: Sequence[Summary], runs: Sequence[Run], settings: Settings, path: Path
) -> None:
    """Writes the medians and all runs to a JSON file.

    Args:
        summaries: The summaries.
        runs: All runs, with all of Adam's rates.
        settings: The settings.
        path: The file to write.
    """
    machine = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processors": os.cpu_count(),
    }
    content = {
        "machine": machine,
        "tolerance": TOLERANCE,
        "columns of points": [field.name for field in fields(Point)],
        "settings": {**asdict(settings), "output": str(settings.output)},
        "summaries": [asdict(summary) for summary in summaries],
        "runs": [
            {
                **asdict(replace(run, points=())),
                "converged": run.converged,
                "final": asdict(run.final),
                "points": [list(asdict(point).values()) for point in thinned(run.points)],
            }
            for run in runs
        ],
    }
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most about `MAX_POINTS` points, at equal distances in the logarithm of the iteration."""
    kept = list(points[:2])
    ratio = max(points[-1].iteration, 2) ** (1 / MAX_POINTS)
    for point in points[2:-1]:
        if point.iteration >= ratio * kept[-1].iteration:
            kept.append(point)
    return [*kept, points[-1]] if len(points) > 2 else kept


def plot_paths(runs: Sequence[Run], path: Path) -> None:
    """Draws the norm of the gradient against iterations and seconds, two panels per problem.

    Args:
        runs: The best run for each problem, method and seed.
        path: The PNG file to write.
    """
    problems = list(dict.fromkeys(run.problem for run in runs))
    columns = min(2, len(problems))
    rows = -(-len(problems) // columns)
    figure = Figure(figsize=(8 * columns, 2.8 * rows + 0.6), layout="constrained")
    grid = figure.subplots(rows, 2 * columns, squeeze=False)
    panels = [(row[i], row[i + 1]) for row in grid for i in range(0, 2 * columns, 2)]
    for (left, right), problem in itertools.zip_longest(panels, problems):
        if problem is None:
            left.set_axis_off()
            right.set_axis_off()
            continue
        group = [run for run in runs if run.problem == problem]
        plot_panel(left, group, lambda point: point.iteration)
        plot_panel(right, group, lambda point: point.seconds)
        left.set(title=problem, xlabel="iterations", ylabel="norm of the gradient")
        right.set(xlabel="seconds")
    present = [method for method in METHODS if any(run.method == method for run in runs)]
    handles = [
        Line2D([], [], color=f"C{METHODS.index(method)}", label=method) for method in present
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(present), frameon=False)
    figure.savefig(path, dpi=110)


def plot_panel(axes: Axes, runs: Sequence[Run], number: Callable[[Point], float]) -> None:
    """Draws the paths of one problem, that of the first seed in bold.

    Args:
        axes: Where to draw.
        runs: The runs of the problem.
        number: The abscissa of a point.
    """
    for run in runs:
        points = [point for point in thinned(run.points) if number(point) > 0]
        first = run.seed == 0
        axes.plot(
            [number(point) for point in points],
            [point.norm for point in points],
            color=f"C{METHODS.index(run.method)}",
            linewidth=1.5 if first else 0.7,
            alpha=1.0 if first else 0.35,
        )
    axes.axhline(TOLERANCE, color="black", linewidth=0.6, linestyle=":")
    axes.set(xscale="log", yscale="log")


def parse(argv: Sequence[str] | None) -> Settings:
    """Reads the command line.

    Args:
        argv: Arguments, or None for those of the process.

    Returns:
        The settings.
    """
    parser = argparse.ArgumentParser(
        description="EM and its rivals against natural gradients where much is missing."
    )
    parser.add_argument(
        "--problem", action="append", choices=CASES, help="only this one; may be repeated"
    )
    parser.add_argument("--seeds", type=int, default=5, help="number of data sets and starts")
    parser.add_argument("--seconds", type=float, default=10.0, help="time limit of a run")
    parser.add_argument("--output", type=Path, default=Path("missing-information-output"))
    parser.add_argument("--quick", action="store_true", help="small data, 1 seed, 2 rates")
    options = parser.parse_args(argv)
    settings = Settings(
        problems=tuple(options.problem or CASES),
        methods=METHODS,
        seeds=options.seeds,
        seconds=options.seconds,
        rates=RATES,
        size=None,
        output=options.output,
    )
    if options.quick:
        problems = tuple(options.problem or QUICK)
        return replace(
            settings, problems=problems, seeds=1, seconds=1.0, rates=RATES[-2:], size=QUICK_SIZE
        )
    return settings


def compare(settings: Settings) -> tuple[list[Summary], list[Run], list[Run]]:
    """Runs all methods on all problems.

    Args:
        settings: The settings.

    Returns:
        The summaries, the best run for each problem, method and seed, and all other runs.
    """
    summaries: list[Summary] = []
    best: list[Run] = []
    others: list[Run] = []
    warm_up(settings)
    with tqdm(total=len(settings.problems) * settings.seeds * len(settings.methods)) as bar:
        for name in settings.problems:
            group = []
            for seed in range(settings.seeds):
                problem = CASES[name].problem(seed, settings.size)
                for method in settings.methods:
                    bar.set_description(f"{name}, seed {seed}, {method}")
                    if applies(method, problem):
                        *rest, run = solve(problem, method, settings)
                        group.append(run)
                        others.extend(rest)
                    bar.update()
            best.extend(group)
            summaries.extend(with_full(summarize(group), problem))
    return summaries, best, others


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the comparison.

    Args:
        argv: Arguments, or None for those of the process.
    """
    settings = parse(argv)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    summaries, best, others = compare(settings)
    print(f"Until the norm of the gradient is below {TOLERANCE:g}; seeds: {settings.seeds}; ")
    print(f"time limit of a run: {settings.seconds:g} s\n")
    print(report(summaries, text))
    for summary in summaries:
        for failure in summary.failures:
            print(f"\n{summary.problem}, {summary.method} ended early: {failure.splitlines()[0]}")

    settings.output.mkdir(parents=True, exist_ok=True)
    table_file = settings.output / "table.md"
    table_file.write_text(report(summaries, markdown) + "\n", encoding="utf-8")
    write_results(summaries, [*best, *others], settings, settings.output / "results.json")
    plot_paths(best, settings.output / "paths.png")
    print(f"\nWrote table.md, results.json and paths.png to {settings.output}")


if __name__ == "__main__":
    main()
