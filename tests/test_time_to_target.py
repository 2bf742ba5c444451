"""`examples.benchmarks.time_to_target`: who is how soon as low as Adam ends."""

import json
import math
from pathlib import Path

import pytest

from examples.benchmarks import time_to_target
from examples.benchmarks.time_to_target import best, compare, reached
from examples.zoo import Run


def run(values: list[float], rate: float = 0.1, seed: int = 0, cost: float = 0.5) -> Run:
    steps = list(range(len(values)))
    seconds = [cost * step for step in steps]
    return Run("net", "Adam", rate, seed, steps, seconds, values, values[-1])


def test_the_first_time_at_or_below_the_target() -> None:
    curve = run([9.0, 5.0, 3.0, 4.0, 1.0])
    assert reached(curve, 4.0) == (2, 1.0) and reached(curve, 1.0) == (4, 2.0)
    assert reached(curve, 0.9) == (math.inf, math.inf)


def test_the_best_rate_ends_lowest_in_the_mean_and_never_fails() -> None:
    lucky = [run([9.0, 1.0], 0.1, 0), run([9.0, 8.0], 0.1, 1)]
    steady = [run([9.0, 4.0], 0.03, 0), run([9.0, 4.0], 0.03, 1)]
    broken = Run("net", "Adam", 0.3, 0, [0], [0.0], [9.0], None, "ArithmeticError at step 1")
    assert best([*lucky, *steady, broken]) == steady
    with_luck = best([*lucky, *steady[:1], run([9.0, 6.0], 0.03, 1)])
    assert [one.rate for one in with_luck] == [0.1, 0.1]


def test_ratios_are_medians_over_seeds() -> None:
    adam = [run([9.0, 5.0, 4.0, 2.0, 2.0], seed=seed) for seed in range(3)]
    natural = [
        run([9.0, 2.0, 1.0], seed=0, cost=2.0),  # in 1 of 3 steps, 2 of 1.5 s
        run([9.0, 3.0, 1.0], seed=1, cost=2.0),  # in 2 of 3, 4 of 1.5
        run([9.0, 8.0, 7.0], seed=2, cost=2.0),
    ]
    found = compare(adam, natural, 0.0)
    assert (found.rate, found.target, found.adam_steps, found.adam_seconds) == (0.1, 2, 3, 1.5)
    assert (found.reached, found.seeds) == (2, 3)
    assert found.steps == pytest.approx(2 / 3) and found.seconds == pytest.approx(4 / 1.5)
    lost = compare(adam, [natural[0], natural[2], natural[2]], 0.0)
    assert (lost.reached, lost.steps, lost.seconds) == (1, None, None)
    # Within 3 / 7 of the way, everyone is there earlier: at 5, instead of at 2.
    close = compare(adam, natural, 3 / 7)
    assert (close.target, close.adam_steps, close.reached) == (pytest.approx(5), 1, 2)
    assert close.steps == pytest.approx(1)
    table = time_to_target.table([found, lost])
    assert "| 2 of 3 | 0.67 | 2.67 |" in table and "| 1 of 3 | – | – |" in table


def test_the_quick_version(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "target.json"
    time_to_target.main(["--quick", "--json", str(file)])
    report = json.loads(file.read_text())
    assert report["rates"] == [0.1, 0.3]
    found = [(result["method"], result["slack"]) for result in report["results"]]
    assert found == [(name, slack) for name in ("natural", "visible") for slack in (0, 0.001)]
    for result in report["results"]:
        assert result["adam_steps"] <= 8 and result["adam_seconds"] > 0
        assert (result["steps"] is None) == (result["reached"] == 0)
    assert capsys.readouterr().out.count("| mixture |") == 4
