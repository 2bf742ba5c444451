"""How the cost of a step of `NaturalSVI` grows with the size of a network.

Sigmoid belief networks are trained by `Trace_ELBO` with a single particle and all defaults, on one
thread. Along each axis one number grows, by two decades or as far as is sensible:

* units of the layer below, at a fan-in of 30;
* its fan-in, the units of the layer above, at 100 units;
* data of a batch, each of which has one dream;
* depth, the number of hidden layers of 50 units.

Costs are those of `examples.benchmarks.overhead`, in processor time: of a plain step, of a step
that measures curvature, and of their mean at the period of measurement. An exponent is the slope
of a line through the logarithms of size and cost: over all sizes, and over the last decade alone,
where what every step costs weighs less.

Run it as `python -m examples.benchmarks.scaling`, or with `--quick` for small sizes. It prints two
tables, and writes the numbers to a file if `--json` names one.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from pyro.infer import Trace_ELBO

from examples.benchmarks import files
from examples.benchmarks.overhead import BATCH, Problem, measure
from examples.comparison import markdown
from models.helmholtz import Helmholtz

UNITS, FAN_IN = 100, 30
DEEP = 50
"""Units of each layer of deep networks."""


@dataclass(frozen=True)
class Axis:
    """What grows.

    Attributes:
        name: What it is.
        sizes: Its sizes, in rising order.
        layers: Size → units of the network, the visible layer first.
        batch: Size → data of a batch.
    """

    name: str
    sizes: tuple[int, ...]
    layers: Callable[[int], tuple[int, ...]]
    batch: Callable[[int], int] = lambda size: BATCH

    def problem(self, size: int) -> Problem:
        """The network of a size."""
        layers = self.layers(size)
        name = f"{self.name} {size}"
        make = partial(Helmholtz, layers)
        return Problem(name, make, layers[0], Trace_ELBO, False, self.batch(size))


AXES = (
    Axis("units", (100, 316, 1000, 3162, 10000), lambda size: (size, FAN_IN)),
    Axis("fan-in", (10, 32, 100, 316, 1000), lambda size: (UNITS, size)),
    Axis("data", (10, 32, 100, 316, 1000), lambda size: (3 * UNITS, FAN_IN), lambda size: size),
    Axis("depth", (1, 2, 4, 8), lambda size: (DEEP,) * (size + 1)),
)


@dataclass(frozen=True)
class Result:
    """Costs of a step in milliseconds of processor time.

    Attributes:
        axis: What grows.
        size: How large it is.
        adam: Median of a step of Adam on the same loss.
        plain: Median of a natural step that does not measure curvature.
        measuring: Median of one that does.
        mean: Mean over the first 400 steps of a training.
    """

    axis: str
    size: int
    adam: float
    plain: float
    measuring: float
    mean: float


def run(axes: Sequence[Axis], turns: int) -> list[Result]:
    """Measures all sizes.

    Args:
        axes: What grows.
        turns: Turns of 20 steps of each method, the first of which is not counted.

    Returns:
        The costs.
    """
    found = []
    for axis in axes:
        for size in axis.sizes:
            (cost,) = measure(axis.problem(size), turns)
            natural = (cost.adam * ratio for ratio in (cost.plain, cost.measuring, cost.early))
            found.append(Result(axis.name, size, cost.adam, *natural))
    return found


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Slope of the line through (log size, log cost) with the least squares."""
    slope, _ = statistics.linear_regression([*map(math.log, sizes)], [*map(math.log, costs)])
    return slope


@dataclass(frozen=True)
class Growth:
    """Exponents of the cost along an axis.

    Attributes:
        axis: What grows.
        cost: "adam", "plain", "measuring" or "mean".
        overall: The exponent over all sizes.
        last: That over the last decade, or the last two sizes.
    """

    axis: str
    cost: str
    overall: float
    last: float


def growth(results: Sequence[Result]) -> list[Growth]:
    """Exponents of all costs along all axes."""
    found = []
    for axis in dict.fromkeys(result.axis for result in results):
        own = [result for result in results if result.axis == axis]
        sizes = [result.size for result in own]
        late = max(2, sum(10 * size >= sizes[-1] for size in sizes))
        for cost in ("adam", "plain", "measuring", "mean"):
            values = [getattr(result, cost) for result in own]
            fits = exponent(sizes, values), exponent(sizes[-late:], values[-late:])
            found.append(Growth(axis, cost, *fits))
    return found


def table(results: Sequence[Result]) -> str:
    """Costs as a table in Markdown, in milliseconds and in steps of Adam."""
    rows = [["axis", "size", "Adam", "plain step", "measuring step", "mean", "in steps of Adam"]]
    for result in results:
        costs = (result.adam, result.plain, result.measuring, result.mean)
        cells = [f"{cost:.1f} ms" for cost in costs]
        rows.append([result.axis, str(result.size), *cells, f"{result.mean / result.adam:.2f}"])
    return markdown(rows)


def summary(grown: Sequence[Growth]) -> str:
    """Exponents as a table in Markdown, over all sizes and in brackets over the last decade."""
    rows = [["axis", "Adam", "plain step", "measuring step", "mean"]]
    for axis in dict.fromkeys(one.axis for one in grown):
        own = [one for one in grown if one.axis == axis]
        rows.append([axis, *(f"{one.overall:.2f} ({one.last:.2f})" for one in own)])
    return markdown(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints.

    Args:
        arguments: Command line arguments; by default those of the process.
    """
    parser = files.parser("Growth of the cost of a natural step.", "small sizes")
    parser.add_argument("--turns", type=int, default=5, help="turns of 20 steps, without the first")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    axes = [Axis(a.name, a.sizes[:2], a.layers, a.batch) for a in AXES] if options.quick else AXES
    results = run(axes, 2 if options.quick else options.turns)
    grown = growth(results)
    print(f"{table(results)}\n\n{summary(grown)}")
    if options.json is not None:
        found = [asdict(result) for result in results]
        files.write(options.json, results=found, growth=[asdict(one) for one in grown])


if __name__ == "__main__":
    main()
