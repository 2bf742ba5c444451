"""`examples.benchmarks.scaling`: exponents are slopes of what was timed."""

import json
from pathlib import Path

import pytest

from examples.benchmarks import scaling
from examples.benchmarks.scaling import AXES, Axis, Result

pytestmark = pytest.mark.usefixtures("single_precision")


def test_exponents_of_power_laws() -> None:
    sizes = (10, 32, 100, 316, 1000)

    def result(size: int) -> Result:
        return Result("units", size, 5.0, 100 + size, 0.1 * size**1.5, 3 * size**2)

    adam, plain, measuring, mean = scaling.growth([result(size) for size in sizes])
    assert (adam.overall, adam.last) == (0.0, 0.0)
    assert (measuring.overall, measuring.last) == pytest.approx((1.5, 1.5))
    assert mean.overall == pytest.approx(2) and mean.cost == "mean"
    # A constant part hides growth, less so among large sizes.
    assert 0.3 < plain.overall < 0.6 < plain.last < 0.9
    table = scaling.summary([adam, plain, measuring, mean])
    assert "| units | 0.00 (0.00) |" in table and "| 1.50 (1.50) | 2.00 (2.00) |" in table


@pytest.mark.parametrize(
    "name, decades, layers, batch",
    [
        ("units", 2, (10000, 30), 100),
        ("fan-in", 2, (100, 1000), 100),
        ("data", 2, (300, 30), 1000),
        ("depth", 0, (50,) * 9, 100),
    ],
)
def test_axes(name: str, decades: int, layers: tuple[int, ...], batch: int) -> None:
    (axis,) = [axis for axis in AXES if axis.name == name]
    assert axis.sizes[-1] >= 10**decades * axis.sizes[0]
    problem = axis.problem(axis.sizes[-1])
    assert (problem.make().sizes, problem.pixels, problem.batch) == (layers, layers[0], batch)


def test_the_quick_version_measures_every_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    axis = Axis("units", (4, 8, 99), lambda size: (size, 3), lambda size: 2 * size)
    monkeypatch.setattr(scaling, "AXES", [axis])
    file = tmp_path / "new" / "scaling.json"
    scaling.main(["--quick", "--json", str(file)])
    report = json.loads(file.read_text())
    assert [result["size"] for result in report["results"]] == [4, 8]
    for result in report["results"]:
        assert result["measuring"] > result["mean"] > result["plain"] > 0 < result["adam"]
    assert [one["cost"] for one in report["growth"]] == ["adam", "plain", "measuring", "mean"]
    printed = capsys.readouterr().out
    assert printed.count("| units | ") == 3
