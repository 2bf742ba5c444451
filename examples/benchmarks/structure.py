"""How long reading the structure of a program takes, and whether the structure is right.

Two programs are analyzed, on one thread. The first one is the largest discrete network that comes
with pgmpy, munin with 1041 nodes: its Markov blankets must be those that pgmpy finds in the same
network. The second one is a sigmoid belief network with layers of 200, 200, 200 and 784 units: its
parameters must fall into one block per unit. For the latter, the check of every training step
whether the program took a known branch is timed against a step of Pyro's own SVI.

Run it as `python -m examples.benchmarks.structure`, or with `--quick` for small programs. It prints
a table, and writes the numbers to a file if `--json` names one. The exit status is 1 if a structure
is wrong.
"""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO

import pyronat
from examples.benchmarks import files
from models import bayes_net
from models.helmholtz import Helmholtz
from pyronat.fingerprint import fingerprint
from pyronat.tracing import params_of, records_of

REPEATS = 5


@dataclass(frozen=True)
class Settings:
    """What to analyze.

    Attributes:
        network: Name of a network that comes with pgmpy.
        cases: Cases in the network's data.
        layers: Units per layer of the sigmoid belief network, from the top down.
        batch: Data of the sigmoid belief network.
    """

    network: str
    cases: int
    layers: tuple[int, ...]
    batch: int


FULL = Settings("munin", cases=2, layers=(200, 200, 200, 784), batch=100)
QUICK = Settings("alarm", cases=2, layers=(10, 10, 10, 16), batch=20)


@dataclass(frozen=True)
class Result:
    """Measurements of one program.

    Attributes:
        program: What was analyzed.
        cold: Seconds of the first analysis.
        warm: Median seconds of the later ones.
        run: Median seconds of one plain run of the program, recorded by Pyro, for comparison.
        counted: What is counted in the structure.
        found: Number of those that are right.
        expected: Number of those that must be right.
    """

    program: str
    cold: float
    warm: float
    run: float
    counted: str
    found: int
    expected: int


def seconds(function: Callable[[], Any]) -> float:
    """Wall clock seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(model: Callable[..., Any], *args: Any) -> tuple[float, float, float]:
    """Times the analysis of a program, from an empty parameter store.

    Args:
        model: The program.
        *args: Its arguments.

    Returns:
        Seconds of the first analysis, and medians of later ones and of plain runs.
    """
    pyro.clear_param_store()
    cold = seconds(lambda: pyronat.analyze(model, *args))
    warm = [seconds(lambda: pyronat.analyze(model, *args)) for _ in range(REPEATS)]
    runs = [seconds(lambda: pyro.poutine.trace(model).get_trace(*args)) for _ in range(REPEATS)]
    return cold, statistics.median(warm), statistics.median(runs)


def measure_network(name: str, cases: int) -> Result:
    """Analyzes a network and compares it with what pgmpy finds in the same network.

    Args:
        name: Name of a network that comes with pgmpy.
        cases: Number of cases in the data.

    Returns:
        The measurements, which count Markov blankets.
    """
    net = bayes_net.load(name)
    model, data = bayes_net.make_model(net), bayes_net.make_data(net, 0, cases)
    times = measure(model, data)
    structure = pyronat.analyze(model, data)
    referee = bayes_net.to_pgmpy(net)
    right = sum(
        structure.markov_blanket(node) == frozenset(referee.get_markov_blanket(node))
        for node in net.nodes
    )
    program = f"{name}, {len(net.nodes)} nodes"
    return Result(program, *times, "Markov blankets", right, len(net.nodes))


def measure_layers(layers: tuple[int, ...], batch: int) -> Result:
    """Analyzes a sigmoid belief network, whose parameters fall into one block per unit.

    Args:
        layers: Units per layer, from the top down.
        batch: Number of data.

    Returns:
        The measurements, which count unit blocks.
    """
    machine = Helmholtz(layers[::-1])
    data = torch.bernoulli(torch.full((batch, layers[-1]), 0.5))
    times = measure(machine.model, data)
    structure = pyronat.analyze(machine.model, data)
    units = sum(block.count for block in structure.blocks if block.structure == "unit")
    program = "sigmoid belief network " + "-".join(map(str, layers))
    return Result(program, *times, "unit blocks", units, sum(layers))


@dataclass(frozen=True)
class Guard:
    """Cost of the check of every step against that of a plain step.

    Attributes:
        guard: Median milliseconds to take the fingerprints of a model and a guide trace.
        step: Median milliseconds of a step of SVI with Trace_ELBO and Adam, without validation.
        share: The first over the second.
    """

    guard: float
    step: float
    share: float


def _fingerprints(runs: Sequence[tuple[Any, Any]]) -> list[str]:
    return [fingerprint(records, params) for records, params in runs]


def measure_guard(layers: tuple[int, ...], batch: int, steps: int = 60) -> Guard:
    """Times the check by turns with steps of stock SVI on the sigmoid belief network.

    Args:
        layers: Units per layer, from the top down.
        batch: Number of data.
        steps: Number of steps.

    Returns:
        The medians.
    """
    pyro.clear_param_store()
    machine = Helmholtz(layers[::-1])
    data = torch.bernoulli(torch.full((batch, layers[-1]), 0.5))
    svi = SVI(machine.model, machine.guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    guards, plain = [], []
    with pyro.validation_enabled(False):
        for _ in range(steps):
            plain.append(seconds(lambda: svi.step(data)))
            guide = poutine.trace(machine.guide).get_trace(data)
            model = poutine.trace(poutine.replay(machine.model, trace=guide)).get_trace(data)
            runs = [(records_of(trace), params_of(trace)) for trace in (model, guide)]
            guards.append(seconds(partial(_fingerprints, runs)))
    guard, step = (1e3 * statistics.median(times) for times in (guards, plain))
    return Guard(guard, step, guard / step)


def table(results: Sequence[Result]) -> str:
    """The measurements as lines of text."""
    header = ("program", "cold s", "warm s", "run s", "right", "of", "counted")
    rows = [
        (
            result.program,
            *(f"{value:.3f}" for value in (result.cold, result.warm, result.run)),
            str(result.found),
            str(result.expected),
            result.counted,
        )
        for result in results
    ]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if 0 < i < len(header) - 1 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (header, *rows)
    ]
    return "\n".join(line.rstrip() for line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints.

    Args:
        arguments: Command line arguments; by default those of the process.

    Returns:
        0 if all structures are right, else 1.
    """
    parser = files.parser("Measures the analysis of two large programs.", "small programs")
    options = parser.parse_args(arguments)
    settings = QUICK if options.quick else FULL

    torch.set_num_threads(1)
    pyro.set_rng_seed(0)
    results = [
        measure_layers(settings.layers, settings.batch),
        measure_network(settings.network, settings.cases),
    ]
    guard = measure_guard(settings.layers, settings.batch)
    print(table(results))
    print(
        f"check of a step: {guard.guard:.2f} ms, {guard.share:.1%} of a plain SVI step of "
        f"{guard.step:.2f} ms"
    )
    if options.json is not None:
        found = [asdict(result) for result in results]
        files.write(options.json, repeats=REPEATS, results=found, guard=asdict(guard))
    return 0 if all(result.found == result.expected for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
