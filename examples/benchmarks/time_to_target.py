"""How soon natural gradients are as low as Adam ends at the best of five rates.

Programs of the zoo are trained as `examples.zoo` does, with its methods, losses, batches and
numbers of steps: by Adam at five rates that decay linearly, and by the natural gradients with
defaults and `LinearDecay(0.3, steps)`. There are two targets for each seed: the loss with which
Adam ends, at the rate that ends best in the mean over seeds; and a loss that is higher by 0.1 % of
the way from the start, which `examples.zoo` calls the same. Adam itself may be as low before its
end. Steps and seconds of processor time, evaluations left out, are those of the first evaluation,
of about 40, at or below the target; ratios are medians over seeds, and seeds that never get there
count as infinite.

Run it as `python -m examples.benchmarks.time_to_target`, or with `--quick` for a few short runs. It
prints a table, and writes the numbers to a file if `--json` names one.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from examples import zoo
from examples.benchmarks import files
from examples.comparison import markdown
from examples.zoo import (
    ADAM,
    ADAM_RATES,
    NATURAL,
    NATURAL_RATE,
    SAME,
    VISIBLE,
    Method,
    Run,
    Settings,
)
from models.registry import Program, programs

PROGRAMS = ("mixture", "latent class", "hmm", "bars")
SEEDS = 5


@dataclass(frozen=True)
class Result:
    """A natural gradient against Adam on a program.

    Attributes:
        program: Name of the program.
        method: "natural" or "visible".
        rate: The rate at which Adam ends best.
        slack: Share of the way from the start to Adam's final loss that may be left.
        target: Mean target, a loss per datum in nats.
        adam_steps: Median steps until it is as low.
        adam_seconds: Median seconds until then.
        seeds: Number of runs of each method.
        reached: Seeds in which the natural gradient gets there.
        steps: Median of its steps over Adam's, or None if it does not get there.
        seconds: Median of its seconds over Adam's, or None.
    """

    program: str
    method: str
    rate: float
    slack: float
    target: float
    adam_steps: float
    adam_seconds: float
    seeds: int
    reached: int
    steps: float | None
    seconds: float | None


def reached(run: Run, target: float) -> tuple[float, float]:
    """Steps and seconds until a loss, or twice infinity."""
    for step, seconds, value in zip(run.steps, run.seconds, run.values, strict=True):
        if value <= target:
            return step, seconds
    return math.inf, math.inf


def best(runs: Sequence[Run]) -> list[Run]:
    """The runs of the rate that ends lowest in the mean; a run that failed ends nowhere."""
    by_rate: dict[float | None, list[Run]] = {}
    for run in runs:
        by_rate.setdefault(run.rate, []).append(run)

    def final(group: Sequence[Run]) -> float:
        return statistics.fmean(math.inf if run.final is None else run.final for run in group)

    return min(by_rate.values(), key=final)


def compare(adam: Sequence[Run], natural: Sequence[Run], slack: float) -> Result:
    """Compares runs of the same seeds.

    Args:
        adam: Runs of Adam at its best rate.
        natural: Runs of the natural gradient.
        slack: Share of the way from the start to Adam's final loss that may be left.

    Returns:
        The comparison.
    """
    finals = [math.inf if run.final is None else run.final for run in adam]
    targets = [
        final + slack * (run.values[0] - final) for run, final in zip(adam, finals, strict=True)
    ]
    own = [reached(run, target) for run, target in zip(adam, targets, strict=True)]
    found = [reached(run, target) for run, target in zip(natural, targets, strict=True)]
    ratios = [
        statistics.median(mine[i] / max(its[i], 1e-9) for mine, its in zip(found, own, strict=True))
        for i in (0, 1)
    ]
    assert adam[0].rate is not None
    steps, seconds = (ratio if math.isfinite(ratio) else None for ratio in ratios)
    return Result(
        natural[0].program,
        natural[0].method,
        adam[0].rate,
        slack,
        statistics.fmean(targets),
        statistics.median(step for step, _ in own),
        statistics.median(second for _, second in own),
        len(natural),
        sum(math.isfinite(step) for step, _ in found),
        steps,
        seconds,
    )


def measure(program: Program, settings: Settings) -> list[Result]:
    """Trains a program by all methods.

    Args:
        program: The program.
        settings: How much to run.

    Returns:
        The natural gradients against Adam.
    """
    plan = settings.plan(program)
    data = program.make_data(0, plan.size)
    zoo.train(program, Method(NATURAL, NATURAL_RATE), data, 0, 2)  # what is only slow once

    def runs(method: Method) -> list[Run]:
        return [zoo.train(program, method, data, seed, plan.steps) for seed in range(plan.seeds)]

    adam = best([run for rate in settings.rates for run in runs(Method(ADAM, rate))])
    names = [NATURAL, *([VISIBLE] if program.hidden else [])]
    naturals = [runs(Method(name, NATURAL_RATE)) for name in names]
    return [compare(adam, natural, slack) for natural in naturals for slack in (0.0, SAME)]


def table(results: Sequence[Result]) -> str:
    """The comparison as a table in Markdown."""
    header = ["program", "Adam's best rate", "target", "Adam is there after", "method", "reached"]
    rows = [[*header, "steps, of Adam's", "seconds, of Adam's"]]
    for one in results:
        ratios = ("–" if ratio is None else f"{ratio:.2f}" for ratio in (one.steps, one.seconds))
        rows.append([
            one.program,
            f"{one.rate:g}",
            f"{one.target:.4f}"
            + (f", within {one.slack:.1%}" if one.slack else ", its final loss"),
            f"{one.adam_steps:.0f} steps",
            one.method,
            f"{one.reached} of {one.seeds}",
            *ratios,
        ])
    return markdown(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints.

    Args:
        arguments: Command line arguments; by default those of the process.
    """
    known = tuple(programs())
    parser = files.parser("Time until Adam's final loss.", "short runs of one program, two rates")
    parser.add_argument("--programs", nargs="+", choices=known, metavar="NAME", default=PROGRAMS)
    parser.add_argument("--seeds", type=int, default=SEEDS, help="runs of each method")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    settings = Settings(tuple(options.programs), options.seeds, 1.0)
    if options.quick:
        settings = Settings(settings.programs[:1], 1, 0.04, ADAM_RATES[-2:], size=100)
    results = [r for name in settings.programs for r in measure(programs()[name], settings)]
    print(table(results))
    if options.json is not None:
        found = [asdict(result) for result in results]
        files.write(options.json, rates=settings.rates, results=found)


if __name__ == "__main__":
    main()
