"""The comparison on problems with much missing information: its methods, its tables, its output."""

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO

from examples import missing_information as example
from examples.missing_information import ADAM, CASES, EM, FULL, LBFGS, SQUAREM, VISIBLE

SMALL = 60


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def settings(tmp_path: Path, **changes: object) -> example.Settings:
    options = {
        "problems": ("fa",),
        "methods": example.METHODS,
        "seeds": 1,
        "seconds": 5.0,
        "rates": (0.1, 0.3),
        "size": SMALL,
        "output": tmp_path,
    }
    return example.Settings(**{**options, **changes})


def run_of(
    method: str, seed: int, value: float, iteration: int = 10, norm: float = 1e-8
) -> example.Run:
    points = (example.Point(0, 0.0, -9.0, 1.0), example.Point(iteration, 0.5, value, norm))
    return example.Run("toy", method, seed, None, points, None)


# --- problems ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_coordinates_are_those_of_the_store(name: str) -> None:
    problem = CASES[name].problem(1, SMALL)
    point = problem.flatten(problem.start)
    for key, value in problem.constrain(point).items():
        assert torch.allclose(value, problem.start[key], rtol=1e-12)
    problem.fill_store()
    assert torch.equal(problem.stored(), point)


@pytest.mark.parametrize("name", CASES)
def test_objective_is_the_loss_of_the_program(name: str) -> None:
    problem = CASES[name].problem(1, SMALL)
    problem.fill_store()
    if problem.collapsed is None:
        program, loss = problem.net.model, TraceEnum_ELBO(max_plate_nesting=1)
    else:
        program, loss = problem.collapsed, Trace_ELBO()
    total = loss.loss_and_grads(program, problem.net.guide, problem.x)
    leaves = dict(pyro.get_param_store().named_parameters())
    gradient = torch.cat([leaves[key].grad.reshape(-1) for key in problem.constraints])
    found = problem.evaluate(problem.flatten(problem.start))
    assert found.value == pytest.approx(-total / SMALL, rel=1e-10)
    assert torch.allclose(found.gradient, -gradient / SMALL, rtol=1e-7, atol=1e-10)
    assert found.norm == pytest.approx(float(gradient.norm()) / SMALL)


def test_what_cannot_be_evaluated_is_nan() -> None:
    problem = CASES["fa"].problem(0, SMALL)
    point = torch.full_like(problem.flatten(problem.start), math.nan)
    assert math.isnan(problem.evaluate(point).value)
    assert example.log_likelihood(problem, point) == -math.inf


# --- methods -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fa", "mixture", "noisy-or-1"])
def test_squarem_never_loses_likelihood(name: str) -> None:
    problem = CASES[name].problem(0, SMALL)
    point = problem.flatten(problem.start)
    values = [problem.evaluate(point).value]
    for _ in range(20):
        point, value = example.squarem_cycle(problem, point, values[-1])
        assert value == pytest.approx(problem.evaluate(point).value, rel=1e-12)
        values.append(value)
    assert all(after >= before - 1e-10 for before, after in itertools.pairwise(values))


def test_methods_agree_on_factor_analysis(tmp_path: Path) -> None:
    problem = CASES["fa"].problem(0, SMALL)
    best = {}
    for method in (EM, SQUAREM, ADAM, LBFGS):
        *_, best[method] = example.solve(problem, method, settings(tmp_path, rates=(0.1,)))
        assert best[method].converged and best[method].failure is None, method
    values = [run.final.value for run in best.values()]
    assert max(values) - min(values) < 1e-9
    counts = {method: run.final.iteration for method, run in best.items()}
    assert counts[LBFGS] < counts[EM] < counts[ADAM]
    assert counts[SQUAREM] < 0.7 * counts[EM] and counts[SQUAREM] % 3 == 0


def test_adam_takes_its_best_rate(tmp_path: Path) -> None:
    problem = CASES["fa"].problem(0, SMALL)
    runs = example.solve(problem, ADAM, settings(tmp_path, rates=(0.1, 0.001)))
    assert [run.rate for run in runs] == [0.001, 0.1]
    assert runs[1].converged and not runs[0].converged
    assert runs[0].final.iteration <= runs[1].final.iteration


def test_lbfgs_gives_up(tmp_path: Path) -> None:
    problem = CASES["fa"].problem(0, SMALL)
    net = SimpleNamespace(log_likelihood=lambda params, x: params["noise"].sum() * math.nan)
    broken = example.replace(problem, net=net)
    track = example.Track(problem.evaluate(problem.flatten(problem.start)), 5.0)
    run = example.attempt(broken, LBFGS, example.run_lbfgs, track)
    assert run.failure == "ArithmeticError: the line search fails"
    assert not run.converged and run.final.iteration == 0


def test_full_natural_gradient_follows_em(tmp_path: Path) -> None:
    problem = CASES["latent-class"].problem(0, SMALL)
    start = problem.evaluate(problem.flatten(problem.start))
    finals = []
    for runner in (example.run_em, example.run_full):
        track = example.Track(start, 60.0, iterations=5)
        assert example.attempt(problem, "", runner, track).failure is None
        finals.append(track.points[-1])
    assert start.value + 0.1 < finals[0].value
    assert finals[1].value == pytest.approx(finals[0].value, abs=0.02)


def test_visible_natural_gradient_of_collapsed_program() -> None:
    problem = CASES["fa-small-noise"].problem(0, 60)
    track = example.Track(problem.evaluate(problem.flatten(problem.start)), 60.0, iterations=100)
    run = example.attempt(problem, VISIBLE, example.run_visible, track)
    assert run.failure is None and run.converged


def test_track_ends_on_time() -> None:
    problem = CASES["fa"].problem(0, SMALL)
    start = problem.evaluate(problem.flatten(problem.start))
    track = example.Track(start, seconds=math.inf, iterations=3)
    assert track.visit(2, start)
    assert not track.visit(3, start)
    assert not example.Track(start, seconds=0.0).visit(1, start)
    zero = example.Evaluation(start.value, torch.zeros(3))
    assert not track.visit(4, zero) and track.converged
    with pytest.raises(ArithmeticError, match="after 5 iterations"):
        track.visit(5, example.Evaluation(math.nan, torch.zeros(3)))
    track = example.Track(start, seconds=math.inf)
    track.visit(1000, start)
    assert track.due(200) and not track.due(1001) and track.due(1005)


# --- tables ------------------------------------------------------------------------------------


def test_summaries_compare_optima() -> None:
    runs = [
        run_of(EM, 0, -1.0),
        run_of(EM, 1, -1.0, iteration=1000, norm=1e-3),
        run_of(EM, 2, -2.0),
        run_of(LBFGS, 0, -1.0 - 1e-9),
        run_of(LBFGS, 1, -1.0 + 1e-7),
        run_of(LBFGS, 2, -1.5, iteration=20),
    ]
    em, lbfgs = example.summarize(runs)
    assert (em.converged, em.iterations, em.norm) == (2, 10, 1e-3)
    assert (em.best, em.better, em.same, em.worse) == (2, 0, 1, 2)
    assert (lbfgs.best, lbfgs.better, lbfgs.same, lbfgs.worse) == (3, 2, 1, 0)
    assert example.effort(em) == "10 · 0.50 s (2/3)"
    assert example.optimum(lbfgs) == "3/3, 2/1/0"
    (slow,) = example.summarize([run_of(EM, seed, -1.0, norm=1e-3) for seed in range(2)])
    assert slow.iterations is None and example.effort(slow) == "- 1e-03 (0/2)"


def test_unfinished_runs_end_at_their_best_point() -> None:
    points = tuple(example.Point(i, 0.1 * i, v, 1.0) for i, v in enumerate((-3.0, -1.0, -2.0)))
    assert example.Run("toy", LBFGS, 0, None, points, None).final.iteration == 1


def test_methods_without_a_number() -> None:
    problem = CASES["latent-class"].problem(0, SMALL)
    net = SimpleNamespace(log_likelihood=problem.net.log_likelihood)
    without_em = example.replace(problem, net=net)
    assert not example.applies(EM, without_em) and not example.applies(SQUAREM, without_em)
    assert example.applies(FULL, without_em) and example.applies(EM, problem)
    summaries = example.summarize([run_of(LBFGS, 0, -1.0)])
    summaries += [example.replace(summaries[0], problem="other", method=EM)]
    rows = example.table(summaries, example.likelihood)
    assert rows == [
        ("problem", EM, LBFGS),
        ("toy", "n/a", "-1.000000000"),
        ("other", "-1.000000000", "n/a"),
    ]
    assert example.markdown(rows).splitlines()[1] == "|---|---|---|"
    assert example.text(rows).splitlines()[2].split() == ["toy", "n/a", "-1.000000000"]


def test_full_natural_gradient_of_factor_analysis_is_em() -> None:
    problem = CASES["fa"].problem(0, SMALL)
    assert not example.applies(FULL, problem)
    em, full = example.with_full(example.summarize([run_of(EM, 0, -1.0)]), problem)
    assert full.method == FULL and example.effort(full) == example.effort(em) + "†"
    assert "EM's numbers" in example.report([em, full], example.markdown)


def test_long_paths_are_thinned() -> None:
    points = [example.Point(i, i, -1.0, 1.0) for i in range(100_000)]
    kept = example.thinned(points)
    assert kept[0] is points[0] and kept[-1] is points[-1]
    assert 50 < len(kept) <= example.MAX_POINTS + 3
    assert example.thinned(points[:1]) == points[:1]


# --- the whole program -------------------------------------------------------------------------


def test_command_line() -> None:
    assert example.parse([]).problems == tuple(CASES)
    assert len(example.parse([]).rates) == 5
    chosen = example.parse(["--problem", "fa", "--problem", "hmm-2", "--seeds", "2"])
    assert (chosen.problems, chosen.seeds) == (("fa", "hmm-2"), 2)
    with pytest.raises(SystemExit):
        example.parse(["--problem", "none"])


def test_quick_version(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "folder"
    example.main(["--quick", "--output", str(output)])
    printed = capsys.readouterr().out
    assert {path.name for path in output.iterdir()} == {"paths.png", "results.json", "table.md"}
    assert (output / "paths.png").read_bytes().startswith(b"\x89PNG")
    table = (output / "table.md").read_text()
    results = json.loads((output / "results.json").read_text())
    found = {(s["problem"], s["method"]): s for s in results["summaries"]}
    for name in example.QUICK:
        title = CASES[name].title
        assert title in printed and title in table
        for method in (EM, SQUAREM, LBFGS):
            assert found[title, method]["converged"] == 1, (name, method)
            assert found[title, method]["iterations"] > 1
    assert found[CASES["fa"].title, FULL]["as_em"]
    assert all(math.isfinite(s["log_likelihood"]) for s in results["summaries"])
    for run in results["runs"]:
        assert [type(number) for number in run["points"][0]] == [int, float, float, float]
        assert len(run["points"][0]) == len(results["columns of points"])
        assert run["converged"] == (run["final"]["norm"] < results["tolerance"])
    assert str(output) in printed
