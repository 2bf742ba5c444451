"""What a step of `NaturalSVI` costs, in steps of Pyro's own SVI with Adam on the same loss.

Three problems, on one thread, with batches of 100 and pixels that are on or off at random:

* a sigmoid belief network with layers of 784, 200, 200 and 200 units, and reweighted wake-sleep
  with 10 particles;
* the same with a single particle and `Trace_ELBO`, whose plain step does the least work;
* a variational autoencoder with layers of 784, 400 and 20 units.

All methods train by turns, for 20 steps at a time, with all defaults. In each turn curvature is
measured; where that is dear, once, that of a guide with a metric then in a step of its own. A plain
step, and one that measures, the longer one of the two, cost their median processor time over that
of Adam's steps in the same turn; medians over turns count. From these follow the mean costs of a
step over the first 400 steps of a training and after some thousand, when measurements have become
rarer, as they do by default.

Run it as `python -m examples.benchmarks.overhead`, or with `--quick` for small programs. It prints
a table, and writes the numbers to a file if `--json` names one.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import pyro
import torch
from pyro.infer import ELBO, SVI, Trace_ELBO

import pyronat
from examples.benchmarks import files
from examples.comparison import markdown
from models.helmholtz import Helmholtz
from models.vae import VAE
from pyronat.optim import RARE

BATCH = 100
TURN = RARE.refresh
"""Steps of a turn: from one refresh of the curvature to the next one."""
EARLY = 400
"""Steps at the start of a training whose mean cost is told."""
RATE = 1e-3
"""Of all methods: what a step costs does not depend on it."""


@dataclass(frozen=True)
class Problem:
    """A program and its loss.

    Attributes:
        name: What it is.
        make: Makes the program, with fresh parameters.
        pixels: Pixels of a datum.
        loss: Makes the loss.
        visible: Whether the visible geometry is measured, too.
        batch: Data of a batch.
    """

    name: str
    make: Callable[[], Any]
    pixels: int
    loss: Callable[[], ELBO]
    visible: bool
    batch: int = BATCH


@dataclass(frozen=True)
class Settings:
    """How much to measure.

    Attributes:
        layers: Units of the sigmoid belief network, the visible layer first.
        hidden: Units of the hidden layers of the autoencoder.
        code: Size of its code.
        turns: Turns of each method, the first of which is not counted.
    """

    layers: tuple[int, ...]
    hidden: int
    code: int
    turns: int


FULL = Settings((784, 200, 200, 200), hidden=400, code=20, turns=6)
QUICK = Settings((16, 8, 4), hidden=8, code=2, turns=2)


def problems(settings: Settings) -> list[Problem]:
    """The problems at some size."""
    layers, pixels = settings.layers, settings.layers[0]
    name = "-".join(map(str, layers))

    def reweighted() -> ELBO:
        return pyronat.ReweightedWakeSleep(num_particles=10)

    def autoencoder() -> Any:
        return VAE(pixels, settings.hidden, settings.code)

    shape = f"{pixels}-{settings.hidden}-{settings.code}"
    return [
        Problem(f"SBN {name}, 10 particles", lambda: Helmholtz(layers), pixels, reweighted, True),
        Problem(f"SBN {name}, 1 particle", lambda: Helmholtz(layers), pixels, Trace_ELBO, True),
        Problem(f"VAE {shape}", autoencoder, pixels, Trace_ELBO, False),
    ]


@dataclass
class Trainee:
    """A method in training.

    Attributes:
        svi: The training, Pyro's or ours.
        store: Its parameters.
        plain: Seconds of steps that do not measure curvature, by turn.
        measuring: Seconds of steps that do, by turn.
    """

    svi: Any
    store: Any
    plain: list[list[float]] = field(default_factory=list)
    measuring: list[list[float]] = field(default_factory=list)

    def turn(self, data: torch.Tensor) -> None:
        """Takes a turn of steps, each on a batch of its own.

        Args:
            data: Data, shape [turn, batch, pixels].
        """
        plain, measuring = [], []
        with pyro.get_param_store().scope(self.store):
            for batch in data:
                start = time.process_time()
                self.svi.step(batch)
                passed = time.process_time() - start
                info = getattr(self.svi, "info", None)
                (measuring if info is not None and info.refreshed else plain).append(passed)
        self.plain.append(plain)
        self.measuring.append(measuring)


def start(problem: Problem, method: str) -> Trainee:
    """Starts a training with fresh parameters.

    Args:
        problem: The problem.
        method: "Adam", "full" or "visible".

    Returns:
        The training.
    """
    pyro.set_rng_seed(0)
    with pyro.get_param_store().scope() as store:
        program = problem.make()
        if method == "Adam":
            svi: Any = SVI(
                program.model, program.guide, pyro.optim.Adam({"lr": RATE}), problem.loss()
            )
        else:
            geometry = pyronat.Visible() if method == "visible" else None
            optim = pyronat.NaturalGradient(RATE, geometry)
            svi = pyronat.NaturalSVI(program.model, program.guide, optim, problem.loss())
    return Trainee(svi, store)


@dataclass(frozen=True)
class Result:
    """Costs of a step of a method, in steps of Adam.

    Attributes:
        problem: Name of the problem.
        method: "full" or "visible".
        adam: Median milliseconds of a step of Adam.
        plain: A step that does not measure curvature.
        measuring: The longest step, which measures curvature.
        early: Mean of the first steps of a training.
        late: Mean after some thousand steps, when measurements have become rarer.
    """

    problem: str
    method: str
    adam: float
    plain: float
    measuring: float
    early: float
    late: float


def measure(problem: Problem, turns: int) -> list[Result]:
    """Trains by turns with all methods.

    Args:
        problem: The problem.
        turns: Turns of each method, the first of which is not counted.

    Returns:
        The costs of the natural gradients.
    """
    names = ["Adam", "full", *(["visible"] if problem.visible else [])]
    trainees = {name: start(problem, name) for name in names}
    generator = torch.Generator().manual_seed(0)
    for _ in range(turns):
        data = torch.rand(TURN, problem.batch, problem.pixels, generator=generator).round()
        for trainee in trainees.values():
            trainee.turn(data)
    adam = [statistics.median(steps) for steps in trainees["Adam"].plain[1:]]

    def cost(
        turns: Sequence[Sequence[float]], typical: Callable[[Sequence[float]], float]
    ) -> float:
        pairs = zip(turns[1:], adam, strict=True)
        return statistics.median(typical(steps) / base for steps, base in pairs if steps)

    results = []
    for name in names[1:]:
        trainee = trainees[name]
        rule, second = trainee.svi.optim.curvature, trainee.measuring[1]
        # Model and guide, where they are measured apart.
        parts = len(second) // sum(map(rule.is_due, range(TURN, 2 * TURN)))
        longest = cost(trainee.measuring, partial(_longest, parts))
        plain = cost(trainee.plain, statistics.median)
        extra = parts * (cost(trainee.measuring, statistics.fmean) - plain)
        shares = (sum(map(rule.is_due, range(EARLY))) / EARLY, 1 / (rule.longest or rule.refresh))
        early, late = (plain + extra * share for share in shares)
        milliseconds = 1e3 * statistics.median(adam)
        results.append(Result(problem.name, name, milliseconds, plain, longest, early, late))
    return results


def _longest(parts: int, steps: Sequence[float]) -> float:
    """The median of the part that takes longest, of steps that measure parts by turns."""
    return max(statistics.median(steps[i::parts]) for i in range(min(parts, len(steps))))


def table(results: Sequence[Result]) -> str:
    """The costs as a table in Markdown."""
    header = ["problem", "geometry", "Adam", "plain step", "longest step", "mean, early", "late"]
    rows = [
        [
            result.problem,
            result.method,
            f"{result.adam:.1f} ms",
            *(
                f"{value:.2f}"
                for value in (result.plain, result.measuring, result.early, result.late)
            ),
        ]
        for result in results
    ]
    return markdown([header, *rows])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints.

    Args:
        arguments: Command line arguments; by default those of the process.
    """
    parser = files.parser("Costs of natural steps in steps of Adam.", "small programs")
    options = parser.parse_args(arguments)
    settings = QUICK if options.quick else FULL
    torch.set_num_threads(1)
    results = [
        result for problem in problems(settings) for result in measure(problem, settings.turns)
    ]
    print(table(results))
    if options.json is not None:
        found = [asdict(result) for result in results]
        files.write(options.json, turns=settings.turns, results=found)


if __name__ == "__main__":
    main()
