"""Memory of a training with `NaturalSVI`, in that of Pyro's own SVI with Adam on the same loss.

The problems are those of `examples.benchmarks.overhead`, on one thread, with batches of 100. All
methods train for 22 steps with all defaults, two of which measure curvature: the first one, which
also analyzes the program, and the twenty-first. Torch's profiler records every allocation on the
CPU, to the byte, but for what libraries allocate by themselves. From that follow

* the state: what is alive between two steps, parameters and gradients apart;
* peaks: the most that is alive at once within a step, parameters, gradients and all that the loss
  keeps for its backward pass included, of steps that measure curvature and those that do not. The
  first step is left out.

Run it as `python -m examples.benchmarks.memory`, or with `--quick` for small programs. It prints a
table, and writes the numbers to a file if `--json` names one.
"""

import gc
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyro
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from examples.benchmarks import files
from examples.benchmarks.overhead import FULL, QUICK, TURN, Problem, problems, start
from examples.comparison import markdown

STEPS = TURN + 2
"""Steps of a training: the first and the last but one measure curvature."""
PLAIN, MEASURING = "plain step", "measuring step"


@dataclass(frozen=True)
class Use:
    """Memory of torch in bytes.

    Attributes:
        alive: What is alive at the end.
        peaks: The most that is alive at once, by the name of a `record_function`.
    """

    alive: int
    peaks: dict[str, int]


def recorded(work: Callable[[], None]) -> Use:
    """Records all that torch allocates on the CPU, and whether it is freed.

    Args:
        work: What to record. Nothing is known of what was allocated before.

    Returns:
        What is used.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
        gc.collect()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(path))
        events = sorted(json.loads(path.read_text())["traceEvents"], key=lambda e: e["ts"])
    spans = [event for event in events if event["name"] in {PLAIN, MEASURING}]
    alive, peaks, now = 0, {}, 0
    for event in events:
        if event["name"] != "[memory]":
            continue
        alive += event["args"]["Bytes"]
        while now < len(spans) and spans[now]["ts"] + spans[now]["dur"] < event["ts"]:
            now += 1
        if now < len(spans) and spans[now]["ts"] <= event["ts"]:
            name = spans[now]["name"]
            peaks[name] = max(peaks.get(name, 0), alive)
    return Use(alive, peaks)


@dataclass(frozen=True)
class Result:
    """Memory of a method in bytes.

    Attributes:
        problem: Name of the problem.
        method: "Adam", "full" or "visible".
        parameters: Bytes of the parameters.
        state: What is alive between steps, parameters and gradients apart.
        plain: Peak of steps that measure no curvature.
        measuring: Peak of those that do, or None.
    """

    problem: str
    method: str
    parameters: int
    state: int
    plain: int
    measuring: int | None


def measure(problem: Problem, method: str) -> Result:
    """Trains by a method.

    Args:
        problem: The problem.
        method: "Adam", "full" or "visible".

    Returns:
        The memory that it takes.
    """
    generator = torch.Generator().manual_seed(0)
    data = torch.rand(STEPS, problem.batch, problem.pixels, generator=generator).round()
    kept: list[Any] = []

    def train() -> None:
        trainee = start(problem, method)
        with pyro.get_param_store().scope(trainee.store):
            for step, batch in enumerate(data):
                due = method != "Adam" and trainee.svi.optim.curvature.is_due(step)
                name = (MEASURING if due else PLAIN) if step else "first step"
                with record_function(name):
                    trainee.svi.step(batch)
        kept.append(trainee)

    use = recorded(train)
    leaves = [leaf for leaf in kept[0].store["params"].values()]
    parameters = sum(leaf.nbytes for leaf in leaves)
    gradients = sum(leaf.grad.nbytes for leaf in leaves if leaf.grad is not None)
    return Result(
        problem.name,
        method,
        parameters,
        use.alive - parameters - gradients,
        use.peaks[PLAIN],
        use.peaks.get(MEASURING),
    )


def run(quick: bool) -> list[Result]:
    """Measures all methods on all problems.

    Args:
        quick: Whether programs are small, and those of many particles are left out.

    Returns:
        The memory of each, Adam first for each problem.
    """
    return [
        measure(problem, method)
        for problem in (problems(QUICK)[1:] if quick else problems(FULL))
        for method in ["Adam", "full", *(["visible"] if problem.visible else [])]
    ]


def table(results: Sequence[Result]) -> str:
    """The memory of natural gradients in that of Adam, as a table in Markdown."""
    rows = [["problem", "geometry", "Adam's state", "state", "Adam's peak", "plain", "measuring"]]
    adam = {result.problem: result for result in results if result.method == "Adam"}
    for result in results:
        base = adam[result.problem]
        if result is not base:
            assert result.measuring is not None
            rows.append([
                result.problem,
                result.method,
                f"{base.state / 1e6:.1f} MB",
                f"{result.state / base.state:.2f}",
                f"{base.plain / 1e6:.1f} MB",
                f"{result.plain / base.plain:.2f}",
                f"{result.measuring / base.plain:.2f}",
            ])
    return markdown(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints.

    Args:
        arguments: Command line arguments; by default those of the process.
    """
    parser = files.parser("Memory of natural gradients in that of Adam.", "small programs")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results = run(options.quick)
    print(table(results))
    if options.json is not None:
        files.write(options.json, results=[asdict(result) for result in results])


if __name__ == "__main__":
    main()
