"""How much of what a stream of data says is kept: natural gradients against online EM and Adam.

A Gaussian mixture, a latent class model and a hidden Markov model, whose hidden variables Pyro sums
out, see batches of 100 fresh data, each once. Their true parameters are known, and the start is as
accurate as the best estimate from the first 200 batches: the truth plus a normal deviation of the
covariance of Cramér and Rao, (n G_V)⁻¹ with n = 20,000 data. From there on, after N data in all,

    excess = 2 KL(truth ‖ estimate) · N / number of parameters

is 1 for an efficient estimate, whatever its parametrization, and k if it wastes all but one in k of
the data. The divergence is a sum over all values of a datum, or for the mixture over a fine grid.

Four ways go on from the start:

* `pyronat.streaming()`, the visible natural gradient with nothing to tune;
* the full natural gradient at rate 1/t, which is online EM;
* the full one at a constant rate, with iterates averaged;
* Adam at the best of three constant rates, by hindsight, with iterates averaged.

Run it as `python -m examples.streaming`, or with `--quick` for a small version. Runs that the
output folder has already are kept, so that it can be stopped and called again. It writes there:

* runs.jsonl: every run with its curve;
* results.json: summaries by problem and method;
* table.md: the table, which is also printed;
* excess.png: median excess against batches.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyro
import torch
from matplotlib.figure import Figure
from pyro.infer import SVI, TraceEnum_ELBO
from torch import Tensor
from torch.distributions import Distribution, transform_to
from torch.func import grad, vmap
from tqdm import tqdm

import pyronat
from examples.comparison import markdown
from models import latent_class, mixture
from models.hmm import DiscreteHMM
from models.latent_class import LatentClass
from models.mixture import GaussianMixture
from pyronat.steps import ConstantDamping, InverseTime, PolyakRuppert, RunningAverage

BATCH = 100
"""Data per batch."""
BEHIND = 200
"""Batches that the start is worth."""
ADAM_RATES = (0.001, 0.003, 0.01)
MARKS = (20, 50, 100, 200, 500, 1000, 2000, 5000)
"""Batches after which estimates are judged."""


class Problem:
    """A program, its true parameters, and what mathematics knows about it.

    Attributes:
        name: Name in the table.
        net: The program, of the zoo.
        points: All values of a datum, or a grid of them.
        truth: True parameters in unconstrained coordinates, one vector.
        weights: Probabilities of the points.
        size: Number of free parameters.
    """

    def __init__(
        self, name: str, net: Any, truth: Mapping[str, Tensor], points: Tensor, volume: float = 1.0
    ) -> None:
        """Computes the visible Fisher information at the truth.

        Args:
            name: Name in the table.
            net: The program.
            truth: Constrained values by parameter name.
            points: Values of a datum that integrals are sums over.
            volume: Volume that each of them stands for.

        Raises:
            ValueError: If the probabilities of the points do not sum to 1.
        """
        self.name, self.net, self.points = name, net, points
        self._transforms = {key: transform_to(net.constraints[key]) for key in truth}
        parts = {key: self._transforms[key].inv(value) for key, value in truth.items()}
        self._shapes = {key: part.shape for key, part in parts.items()}
        self.truth = torch.cat([part.reshape(-1) for part in parts.values()])
        self._log_prob = self.log_prob(self.truth)
        self.weights = volume * self._log_prob.exp()
        if abs(float(self.weights.sum()) - 1) > 1e-6:
            raise ValueError(f"the points of {name} have probability {float(self.weights.sum())}")
        scores = vmap(grad(self._one), in_dims=(None, 0))(self.truth, points)
        information, directions = torch.linalg.eigh(scores.T @ (self.weights[:, None] * scores))
        # A simplex has one coordinate too many, on which nothing depends.
        known = information > 1e-9 * information.max()
        self._root = directions[:, known] / information[known].sqrt()
        self.size = int(known.sum())

    def constrained(self, vector: Tensor) -> dict[str, Tensor]:
        """Constrained values by parameter name, of unconstrained coordinates in one vector."""
        pieces = vector.split([shape.numel() for shape in self._shapes.values()])
        return {
            name: self._transforms[name](piece.reshape(shape))
            for (name, shape), piece in zip(self._shapes.items(), pieces, strict=True)
        }

    def stored(self) -> Tensor:
        """Unconstrained coordinates of the parameters in Pyro's store, a new vector."""
        store = pyro.get_param_store()
        return torch.cat([
            store[name].unconstrained().detach().reshape(-1) for name in self._shapes
        ])

    def log_prob(self, vector: Tensor) -> Tensor:
        """Log probability of every point in nats, shape [points]."""
        found: Tensor = vmap(self._one, in_dims=(None, 0))(vector, self.points)
        return found

    def _one(self, vector: Tensor, point: Tensor) -> Tensor:
        found: Tensor = self.net.log_likelihood(self.constrained(vector), point[None])
        return found

    def divergence(self, vector: Tensor) -> float:
        """KL divergence of an estimate from the truth, in nats per datum."""
        return float((self.weights * (self._log_prob - self.log_prob(vector))).sum())

    def start(self, seed: int) -> Tensor:
        """An estimate as accurate as the best one from the batches behind the start."""
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(self.size, generator=generator)
        return self.truth + self._root @ noise / math.sqrt(BEHIND * BATCH)

    def batches(self, seed: int, count: int) -> tuple[Tensor, ...]:
        """Fresh data in batches."""
        size, seed = count * BATCH, 10_000 + seed
        if isinstance(self.net, GaussianMixture):
            data = self.net.sample(self.constrained(self.truth), size, seed)
        else:
            generator = torch.Generator().manual_seed(seed)
            chosen = torch.multinomial(self.weights, size, replacement=True, generator=generator)
            data = self.points[chosen]
        return data.split(BATCH)


def make_problems() -> dict[str, Callable[[], Problem]]:
    """How the problems are made, by name, in the order of the table."""
    axis = torch.arange(-80, 81) / 10
    items, symbols = torch.tensor([0.0, 1.0]), torch.arange(4)
    hmm = DiscreteHMM(3, 4, 5)
    return {
        "Gaussian mixture": lambda: Problem(
            "Gaussian mixture",
            *(GaussianMixture(), mixture.make_truth()),
            *(torch.cartesian_prod(axis, axis), 0.01),
        ),
        "latent class": lambda: Problem(
            "latent class",
            *(LatentClass(), latent_class.make_truth(0), torch.cartesian_prod(*[items] * 8)),
        ),
        "hidden Markov model": lambda: Problem(
            "hidden Markov model",
            *(hmm, hmm.make_truth(0), torch.cartesian_prod(*[symbols] * 5)),
        ),
    }


# --- methods -----------------------------------------------------------------------------------


def _full(
    lr: float | InverseTime, averaging: PolyakRuppert | None, seed: int
) -> pyronat.NaturalGradient:
    return pyronat.NaturalGradient(
        lr,
        pyronat.Full("model"),
        damping=ConstantDamping(0.0, relative=1e-3),
        curvature=RunningAverage(decay=0.95, refresh=20),
        averaging=averaging,
        seed=seed,
    )


VISIBLE, ONLINE_EM = "visible, streaming defaults", "full, 1/t (online EM)"
AVERAGED = "full, 0.05, averaged"
NATURAL: dict[str, Callable[[int], pyronat.NaturalGradient]] = {
    VISIBLE: lambda seed: pyronat.streaming(BEHIND, seed=seed),
    ONLINE_EM: lambda seed: _full(InverseTime(1 / (BEHIND + 1), BEHIND + 1), None, seed),
    AVERAGED: lambda seed: _full(0.05, PolyakRuppert(), seed),
}
"""Optimizers for a seed of the dreams, by the name of the method."""

ADAM = {f"Adam, {rate}, averaged": rate for rate in ADAM_RATES}
"""Rates of Adam by the name of the method."""

METHODS = (*NATURAL, *ADAM)


def _natural(
    problem: Problem, method: str, seed: int
) -> tuple[Callable[[Tensor], Any], Callable[[], Tensor]]:
    """What takes a step, and what gives the estimate, in one vector."""
    net, optim = problem.net, NATURAL[method](seed)
    svi = pyronat.NaturalSVI(net.model, net.guide, optim, TraceEnum_ELBO(max_plate_nesting=1))

    def estimate() -> Tensor:
        if optim.averaging is None:
            return problem.stored()
        with svi.averaged():
            return problem.stored()

    return svi.step, estimate


def _adam(
    problem: Problem, method: str, seed: int
) -> tuple[Callable[[Tensor], Any], Callable[[], Tensor]]:
    """The same by stock `SVI`, with the same averaging by hand."""
    net, rule = problem.net, PolyakRuppert()
    optim = pyro.optim.Adam({"lr": ADAM[method]})
    svi = SVI(net.model, net.guide, optim, TraceEnum_ELBO(max_plate_nesting=1))
    mean, count = problem.stored(), 0

    def step(batch: Tensor) -> None:
        nonlocal count
        svi.step(batch)
        mean.lerp_(problem.stored(), rule.weight(count))
        count += 1

    return step, mean.clone


@dataclass(frozen=True)
class Run:
    """A run.

    Attributes:
        problem: Name of the problem.
        method: Name of the method.
        seed: Seed of start, data and dreams.
        batches: Batches at each evaluation.
        excess: Excess at each evaluation; 1 is efficient.
        seconds: Processor time of all steps.
    """

    problem: str
    method: str
    seed: int
    batches: list[int]
    excess: list[float]
    seconds: float


@contextmanager
def _unchecked() -> Generator[None, None, None]:
    """Distributions and Pyro do not validate arguments, which takes a third of a small step."""
    before = Distribution._validate_args  # type: ignore[attr-defined]
    Distribution.set_default_validate_args(False)
    try:
        with pyro.validation_enabled(False):
            yield
    finally:
        Distribution.set_default_validate_args(before)


def train(problem: Problem, method: str, seed: int, count: int) -> Run:
    """Goes once through a stream.

    Args:
        problem: The problem.
        method: Name of the method.
        seed: Seed of start, data and dreams.
        count: Number of batches.

    Returns:
        The run.
    """
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    for name, value in problem.constrained(problem.start(seed)).items():
        pyro.param(name, value.clone(), constraint=problem.net.constraints[name])
    step, estimate = (_adam if method in ADAM else _natural)(problem, method, seed)
    run, seconds = Run(problem.name, method, seed, [], [], 0.0), 0.0
    with _unchecked():
        for number, batch in enumerate(problem.batches(seed, count), 1):
            begin = time.process_time()
            step(batch)
            seconds += time.process_time() - begin
            if number in MARKS:
                seen = (BEHIND + number) * BATCH
                run.batches.append(number)
                run.excess.append(2 * problem.divergence(estimate()) * seen / problem.size)
    return Run(**{**asdict(run), "seconds": seconds})


# --- summaries ---------------------------------------------------------------------------------


def summarize(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Excess by problem, method and number of batches: median, mean, and largest of the seeds.

    Args:
        runs: All runs.

    Returns:
        One summary for each problem and method; of Adam's rates only the best, by the median at
        the last evaluation that all have.
    """
    summaries: list[dict[str, Any]] = []
    for problem in make_problems():
        own = [run for run in runs if run.problem == problem]
        found = [
            _summary([run for run in own if run.method == method])
            for method in METHODS
            if any(run.method == method for run in own)
        ]
        adam = [one for one in found if one["method"] in ADAM]
        summaries += [one for one in found if one not in adam]
        if adam:
            last = min(one["batches"][-1] for one in adam)
            summaries.append(min(adam, key=lambda one: one["median"][one["batches"].index(last)]))
    return summaries


def _summary(runs: Sequence[Run]) -> dict[str, Any]:
    shared = [mark for mark in MARKS if all(mark in run.batches for run in runs)]
    columns = [[run.excess[run.batches.index(mark)] for run in runs] for mark in shared]
    steps = sum(run.batches[-1] for run in runs)
    return {
        "problem": runs[0].problem,
        "method": runs[0].method,
        "seeds": len(runs),
        "batches": shared,
        "median": [statistics.median(column) for column in columns],
        "mean": [statistics.fmean(column) for column in columns],
        "max": [max(column) for column in columns],
        "milliseconds per step": 1000 * sum(run.seconds for run in runs) / steps,
    }


def make_table(summaries: Sequence[Mapping[str, Any]], columns: Sequence[int]) -> str:
    """The table in Markdown.

    Args:
        summaries: Of `summarize`.
        columns: Numbers of batches.

    Returns:
        Median, mean and largest excess after each of them.
    """
    rows = [["problem", "method", *(f"{count} batches" for count in columns), "seeds", "ms / step"]]
    for one in summaries:
        cells = []
        for count in columns:
            if count in one["batches"]:
                at = one["batches"].index(count)
                values = (one[key][at] for key in ("median", "mean", "max"))
                median, mean, largest = (f"{value:.2f}" for value in values)
                cells.append(f"**{median}** / {mean} / {largest}")
            else:
                cells.append("–")
        speed = f"{one['milliseconds per step']:.1f}"
        rows.append([one["problem"], one["method"], *cells, str(one["seeds"]), speed])
    return markdown(rows)


def plot(summaries: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws median excess against batches, a panel for each problem.

    Args:
        summaries: Of `summarize`.
        path: File to write.
    """
    problems = list(dict.fromkeys(one["problem"] for one in summaries))
    figure = Figure(figsize=(4.2 * len(problems), 3.6), layout="constrained")
    for axes, problem in zip(
        figure.subplots(1, len(problems), squeeze=False, sharey=True)[0], problems, strict=True
    ):
        for one in summaries:
            if one["problem"] == problem:
                place = len(NATURAL) if one["method"] in ADAM else METHODS.index(one["method"])
                style = {"color": f"C{place}", "marker": "o", "ms": 3}
                axes.loglog(one["batches"], one["median"], label=one["method"], **style)
        axes.axhline(1, color="gray", lw=0.8)
        axes.set(title=problem, xlabel="batches of 100")
        axes.legend(fontsize=7)
    figure.axes[0].set_ylabel("excess (1 is Cramér–Rao)")
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs all methods on all problems.

    Args:
        arguments: Command line, by default that of the process.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small version")
    parser.add_argument("--output", type=Path, default=Path("results/streaming"))
    parser.add_argument("--batches", type=int, default=MARKS[-1], help="batches of a run")
    parser.add_argument("--seeds", type=int, default=8, help="runs of a method")
    parser.add_argument("--problems", nargs="*", choices=list(make_problems()), help="only these")
    parser.add_argument("--methods", nargs="*", choices=METHODS, help="only these")
    settings = parser.parse_args(arguments)
    count, seeds = (20, 2) if settings.quick else (settings.batches, settings.seeds)
    settings.output.mkdir(parents=True, exist_ok=True)
    log = settings.output / "runs.jsonl"
    torch.set_num_threads(1)
    precision = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        runs = _all_runs(settings, count, seeds, log)
    finally:
        torch.set_default_dtype(precision)
    summaries = summarize(runs)
    table = make_table(summaries, [mark for mark in (500, 2000, 5000) if mark <= count] or [count])
    (settings.output / "results.json").write_text(json.dumps(summaries, indent=1))
    (settings.output / "table.md").write_text(table + "\n")
    plot(summaries, settings.output / "excess.png")
    print(table)
    print(f"wrote {settings.output}")


def _all_runs(settings: argparse.Namespace, count: int, seeds: int, log: Path) -> list[Run]:
    """The runs of a log, and those that it has not yet.

    Args:
        settings: Of the command line.
        count: Batches of a run.
        seeds: Runs of a method.
        log: File with a run on each line.

    Returns:
        All runs.
    """
    runs = (
        [Run(**json.loads(line)) for line in log.read_text().splitlines()] if log.exists() else []
    )
    last = max(mark for mark in MARKS if mark <= count)
    done = {(run.problem, run.method, run.seed) for run in runs if last in run.batches}
    wanted = [
        (name, method, seed)
        for name in settings.problems or make_problems()
        for method in settings.methods or METHODS
        for seed in range(seeds)
        if (name, method, seed) not in done
    ]
    problems = {name: make_problems()[name]() for name in dict.fromkeys(n for n, _, _ in wanted)}
    for name, method, seed in tqdm(wanted, disable=None):
        run = train(problems[name], method, seed, count)
        runs = [one for one in runs if (one.problem, one.method, one.seed) != (name, method, seed)]
        runs.append(run)
        with log.open("a") as lines:
            lines.write(json.dumps(asdict(run)) + "\n")
    return runs


if __name__ == "__main__":
    main()
