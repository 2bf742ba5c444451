"""Discrete Bayesian networks some of whose nodes are never observed: EM against visible steps.

The structures of child, alarm and insurance are known, their tables are not, and five nodes are
hidden: drawn at random, by the seed, among those that have children. The data are cases from the
networks' own tables. Every method starts at the same tables, which are one EM step from random
ones, so that what does not depend on hidden nodes is learned already. All likelihoods are exact.

* EM, by variable elimination, until an iteration gains less than 1e-9 of the log likelihood: its
  end is the optimum that the others are measured by;
* the visible natural gradient with defaults, one solve for each district of hidden nodes:
  `Visible(LevenbergMarquardt(), posterior="enumerate")`;
* Adam at the best of several rates, picked by hindsight, with linear decay.

The question is after how many iterations, and seconds of processor time, held-out cases have a log
likelihood within 0.1 % of that of EM's optimum, and the training cases one within 2 nats in all.

Run it as `python -m examples.bnlearn_hidden`, or with `--quick` for a small version. It prints a
table, and writes to the output folder:

* table.md: the table;
* results.json: every run with its path;
* curves.png: what the held-out cases lack of EM's optimum, against iterations and seconds.
"""

import argparse
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pyro
import torch
from matplotlib.figure import Figure
from pyro.infer import TraceEnum_ELBO
from torch import Tensor
from tqdm import tqdm

import pyronat
from examples.comparison import Step, adam, markdown
from models import bayes_net
from models.hidden_nodes import HiddenNodes
from pyronat.steps import LevenbergMarquardt

Params = dict[str, Tensor]

EM, VISIBLE, ADAM = "EM", "visible natural", "Adam"
SHARE = 1e-3
"""Share of the held-out log likelihood of EM's optimum that may be missing."""
NATS = 2.0
"""Log likelihood of all training cases that may be missing."""
EXACT_LOOKS = 300
"""Iterations after which every tenth is looked at only."""


@dataclass(frozen=True)
class Settings:
    """How much to run.

    Attributes:
        networks: Names of networks.
        num_hidden: Number of hidden nodes.
        seeds: Number of choices of hidden nodes, data and starts per network.
        cases: Number of cases to learn from.
        held_out: Number of cases to judge by.
        em_steps: Limit on the iterations of EM.
        visible_steps: Limit on those of the visible natural gradient.
        adam_steps: Those of Adam.
        rates: Adam's rates.
    """

    networks: tuple[str, ...] = ("child", "alarm", "insurance")
    num_hidden: int = 5
    seeds: int = 3
    cases: int = 2000
    held_out: int = 5000
    em_steps: int = 3000
    visible_steps: int = 60
    adam_steps: int = 200
    rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0)


@dataclass(frozen=True)
class Problem:
    """Data and a start.

    Attributes:
        network: Name of the network.
        seed: Seed of everything.
        net: The program.
        x: Training cases, shape [cases, observed nodes].
        held_out: Cases to judge by, shape [cases, observed nodes].
        start: Tables to start from, by name.
    """

    network: str
    seed: int
    net: HiddenNodes
    x: Tensor
    held_out: Tensor
    start: Params

    def fill_store(self) -> None:
        """Makes the start the only content of the parameter store."""
        pyro.clear_param_store()
        pyro.set_rng_seed(self.seed)
        for name, value in self.start.items():
            pyro.param(name, value.clone(), constraint=self.net.constraints[name])

    def stored(self) -> Params:
        """Tables in the parameter store."""
        return {name: pyro.param(name).detach() for name in self.net.constraints}


@dataclass(frozen=True)
class Point:
    """A point of a path.

    Attributes:
        iteration: Number of iterations so far.
        seconds: Processor time so far, without what only judges.
        train: Log likelihood of training and pseudo-cases, in all, in nats.
        held_out: Mean log likelihood of a held-out case in nats.
    """

    iteration: int
    seconds: float
    train: float
    held_out: float


@dataclass(frozen=True)
class Run:
    """A run.

    Attributes:
        network: Name of the network.
        seed: Seed of hidden nodes, data and start.
        method: Name of the method.
        rate: Adam's rate, or None.
        hidden: The hidden nodes.
        districts: Hidden nodes of each district, where they were analyzed.
        points: The path, the start included.
        error: The error that ended the run, or None.
    """

    network: str
    seed: int
    method: str
    rate: float | None
    hidden: tuple[str, ...]
    districts: tuple[tuple[str, ...], ...]
    points: tuple[Point, ...]
    error: str | None = None

    def first(self, reached: Callable[[Point], bool]) -> Point | None:
        """The first point with a property."""
        return next((point for point in self.points if reached(point)), None)


def make_problem(network: str, seed: int, settings: Settings) -> Problem:
    """Draws hidden nodes, cases and a start.

    Args:
        network: Name of the network.
        seed: Seed of everything.
        settings: The settings.

    Returns:
        The problem.
    """
    discrete = bayes_net.load(network)
    parents = {parent for node in discrete.nodes for parent in discrete.parents[node]}
    hidden = random.Random(seed).sample(sorted(parents), settings.num_hidden)
    net = HiddenNodes(discrete, hidden, seed=seed)
    x = net.make_data(seed, settings.cases)
    held_out = net.make_data(seed + 10**6, settings.held_out)
    return Problem(network, seed, net, x, held_out, net.em_step(net.initial, x))


def judged(problem: Problem, params: Params, iteration: int, seconds: float) -> Point:
    """Looks at tables.

    Args:
        problem: The problem.
        params: The tables.
        iteration: Number of iterations so far.
        seconds: Processor time so far.

    Returns:
        The point.
    """
    with torch.no_grad():
        train = float(problem.net.log_likelihood(params, problem.x))
        held_out = float(problem.net.case_log_likelihood(params, problem.held_out).mean())
    return Point(iteration, seconds, train, held_out)


def follow(
    problem: Problem, steps: Iterator[Params], limit: int, done: Callable[[Sequence[Point]], bool]
) -> tuple[tuple[Point, ...], str | None]:
    """Takes the steps of a method and looks at where they lead.

    Args:
        problem: The problem.
        steps: Yields tables after each iteration.
        limit: Limit on the number of iterations.
        done: Whether a path is at its end.

    Returns:
        The path, and the error that ended it or None.
    """
    points = [judged(problem, problem.start, 0, 0.0)]
    seconds = 0.0
    for iteration in range(1, limit + 1):
        begin = time.process_time()
        try:
            params = next(steps)
        except pyronat.PyronatError as error:
            return tuple(points), type(error).__name__
        seconds += time.process_time() - begin
        if iteration <= EXACT_LOOKS or iteration % 10 == 0 or iteration == limit:
            points.append(judged(problem, params, iteration, seconds))
            if done(points):
                break
    return tuple(points), None


def em(problem: Problem) -> Iterator[Params]:
    """EM without end.

    Args:
        problem: The problem.

    Yields:
        Tables.
    """
    params = problem.start
    while True:
        params = problem.net.em_step(params, problem.x)
        yield params


def gained_nothing(points: Sequence[Point]) -> bool:
    """Whether the last iteration has gained less than 1e-9 of the log likelihood."""
    old, new = points[-2:]
    return new.train - old.train < 1e-9 * abs(new.train) * (new.iteration - old.iteration)


def descend(problem: Problem, step: Step) -> Iterator[Params]:
    """Steps of an optimizer without end.

    Args:
        problem: The problem, whose start is in the store.
        step: Takes a step.

    Yields:
        Tables.
    """
    while True:
        step((problem.x,))
        yield problem.stored()


def run_all(problem: Problem, settings: Settings) -> list[Run]:
    """Runs all methods on a problem.

    Args:
        problem: The problem.
        settings: The settings.

    Returns:
        The runs, EM's first.
    """
    head = (problem.network, problem.seed)
    hidden = problem.net.hidden
    loss = TraceEnum_ELBO(max_plate_nesting=1)
    points, error = follow(problem, em(problem), settings.em_steps, gained_nothing)
    runs = [Run(*head, EM, None, hidden, (), points, error)]
    goal = targets(runs[0])

    problem.fill_store()
    geometry = pyronat.Visible(LevenbergMarquardt(), posterior="enumerate")
    natural = pyronat.NaturalGradient(geometry=geometry)
    svi = pyronat.NaturalSVI(problem.net.model, problem.net.guide, natural, loss)
    points, error = follow(
        problem,
        descend(problem, lambda data: svi.step(*data)),
        settings.visible_steps,
        lambda path: all(reached(path[-1]) for reached in goal),
    )
    districts = tuple(district.hidden for district in svi.net.districts if district.hidden)
    runs.append(Run(*head, VISIBLE, None, hidden, districts, points, error))

    for rate in settings.rates:
        problem.fill_store()
        step = adam(problem.net.model, problem.net.guide, loss, rate, settings.adam_steps)
        points, error = follow(
            problem, descend(problem, step), settings.adam_steps, lambda path: False
        )
        runs.append(Run(*head, ADAM, rate, hidden, (), points, error))
    return runs


def targets(reference: Run) -> tuple[Callable[[Point], bool], Callable[[Point], bool]]:
    """What is to be reached: held-out within 0.1 %, and training cases within 2 nats.

    Args:
        reference: The run of EM.

    Returns:
        Whether a point has reached each.
    """
    best = reference.points[-1]
    held_out = best.held_out - SHARE * abs(best.held_out)
    return lambda p: p.held_out >= held_out, lambda p: p.train >= best.train - NATS


def select(runs: Sequence[Run]) -> list[Run]:
    """The runs of one problem, with the best of Adam's rates alone.

    Args:
        runs: All runs of the problem.

    Returns:
        One run for each method, EM's first.
    """
    reached = targets(runs[0])[0]

    def order(run: Run) -> tuple[float, float]:
        point = run.first(reached)
        return (math.inf if point is None else point.iteration, -run.points[-1].held_out)

    adam = [run for run in runs if run.method == ADAM]
    others = [run for run in runs if run.method != ADAM]
    return others + ([min(adam, key=order)] if adam else [])


def cell(point: Point | None, reference: Point | None) -> str:
    """Iterations and seconds at a point, and how many times fewer iterations than EM.

    Args:
        point: The point, or None if the goal was not reached.
        reference: That of EM, or None.

    Returns:
        The cell of a table.
    """
    if point is None:
        return "–"
    text = f"{point.iteration} · {point.seconds:.3g} s"
    if reference is not None and reference is not point and point.iteration:
        text += f" ({reference.iteration / point.iteration:.1f}×)"
    return text


def table(problems: Sequence[Sequence[Run]]) -> str:
    """The comparison in Markdown, and the median ratio for each network.

    Args:
        problems: The runs of each problem.

    Returns:
        One line per problem and method, and one sentence per network.
    """
    rows = [
        (
            *("network, hidden nodes", "method", "held-out within 0.1 % after"),
            *("training within 2 nats after", "held-out at the end"),
        )
    ]
    ratios: dict[str, list[float]] = {}
    for runs in problems:
        goal = targets(runs[0])
        label = f"{runs[0].network}: {', '.join(runs[0].hidden)}"
        for run in select(runs):
            cells = [cell(run.first(reached), runs[0].first(reached)) for reached in goal]
            name = run.method if run.rate is None else f"{run.method}, rate {run.rate:g}"
            name += f" ({run.error})" if run.error else ""
            rows.append((label, name, *cells, f"{run.points[-1].held_out:.4f}"))
            label = f"{len(run.districts)} districts" if run.districts else ""
            if run.method == VISIBLE:
                own, theirs = run.first(goal[0]), runs[0].first(goal[0])
                assert theirs is not None
                ratio = 0.0 if own is None else theirs.iteration / max(own.iteration, 1)
                ratios.setdefault(run.network, []).append(ratio)
    sentences = [
        f"{network}: EM needs {statistics.median(some):.1f} times the iterations of the visible"
        f" natural gradient (median of {len(some)}: {', '.join(f'{r:.1f}' for r in sorted(some))})."
        for network, some in ratios.items()
    ]
    return "\n".join([markdown(rows), "", *sentences])


def plot_curves(problems: Sequence[Sequence[Run]], path: Path) -> None:
    """Draws what the held-out cases lack of EM's optimum.

    Args:
        problems: The runs of each problem.
        path: The PNG file to write.
    """
    names = list(dict.fromkeys(runs[0].network for runs in problems))
    figure = Figure(figsize=(9, 3 * len(names)), layout="constrained")
    panels = figure.subplots(len(names), 2, squeeze=False)
    colors = {EM: "C0", VISIBLE: "C1", ADAM: "C2"}
    for row, name in zip(panels, names, strict=True):
        for runs in problems:
            if runs[0].network != name:
                continue
            best = runs[0].points[-1].held_out
            for run in select(runs):
                lacks = [max(best - point.held_out, 1e-6) / abs(best) for point in run.points[1:]]
                for axes, key in zip(row, ("iteration", "seconds"), strict=True):
                    places = [getattr(point, key) for point in run.points[1:]]
                    axes.loglog(places, lacks, color=colors[run.method], label=run.method, lw=1)
        for axes, key in zip(row, ("iterations", "seconds"), strict=True):
            axes.axhline(SHARE, color="gray", lw=0.5)
            axes.set(title=name, xlabel=key, ylabel="held-out, share missing")
    handles = {line.get_label(): line for line in panels[0][0].lines if line.get_label()[0] != "_"}
    panels[0][0].legend(handles.values(), handles.keys(), frameon=False)
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the comparison.

    Args:
        argv: Arguments, or None for those of the process.
    """
    parser = argparse.ArgumentParser(description="Discrete networks with hidden nodes.")
    parser.add_argument("--networks", nargs="+", default=Settings.networks)
    parser.add_argument("--seeds", type=int, default=Settings.seeds)
    parser.add_argument("--output", type=Path, default=Path("bnlearn-hidden-output"))
    parser.add_argument("--quick", action="store_true", help="asia, 1 seed, few cases")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    settings = Settings(tuple(options.networks), seeds=options.seeds)
    if options.quick:
        settings = Settings(
            ("asia",), 2, 1, 300, 500, em_steps=500, visible_steps=15, adam_steps=20, rates=(0.1,)
        )

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        wanted = [(name, seed) for name in settings.networks for seed in range(settings.seeds)]
        problems = [
            run_all(make_problem(name, seed, settings), settings)
            for name, seed in tqdm(wanted, disable=None)
        ]
    finally:
        torch.set_default_dtype(before)
    text = table(problems)
    print("Iterations and seconds of processor time; in brackets how many times fewer than EM's.")
    print(text)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "table.md").write_text(text + "\n", encoding="utf-8")
    (options.output / "results.json").write_text(
        json.dumps([asdict(run) for runs in problems for run in runs], indent=1), encoding="utf-8"
    )
    plot_curves(problems, options.output / "curves.png")
    print(f"\nWrote table.md, results.json and curves.png to {options.output}")


if __name__ == "__main__":
    main()
