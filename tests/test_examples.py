"""Runs every example in its quick version."""

import importlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from torch.utils.data import DataLoader

from examples import lightning_loop, mnist, streaming, zoo
from examples.comparison import Averaged, reached
from models import bayes_net
from models.registry import programs
from pyronat.tracing import stored_leaves

EXAMPLES = Path(__file__).parents[1] / "examples"
OUTPUTS = {
    "bnlearn_hidden": {"curves.png", "results.json", "table.md"},
    "digits": {"curves.png", "digits.png", "metrics.jsonl"},
    "lightning_loop": {"last.ckpt"},
    "missing_information": {"paths.png", "results.json", "table.md"},
    "mnist": {"curves.png", "runs.jsonl", "table.md"},
    "own_model": {"course.png", "network.png"} | ({"model.gv"} if find_spec("graphviz") else set()),
    "round_trip": {"given.bif", "learned.bif"},
    "streaming": {"excess.png", "results.json", "runs.jsonl", "table.md"},
    "vae": {"course.png", "digits.png", "log.jsonl"},
    "variational": {"curves.png", "results.json", "table.md"},
    "zoo": {"curves.png", "results.json", "table.md"},
}
"""The files that each example writes."""
SHARED = {"__init__", "comparison"}
"""Modules that are no examples themselves."""


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    threads = torch.get_num_threads()
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()
    torch.set_num_threads(threads)


def test_every_example_is_listed() -> None:
    names = {path.stem for path in EXAMPLES.glob("*.py")} - SHARED
    assert names == set(OUTPUTS)


@pytest.mark.parametrize("name", sorted(OUTPUTS))
def test_example_runs(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "folder"
    arguments = ["--quick", "--output", str(output)]
    if name == "mnist":
        arguments += ["--data", str(write_bits(tmp_path / "bits.npz"))]
    importlib.import_module(f"examples.{name}").main(arguments)
    printed = capsys.readouterr().out
    assert str(output) in printed
    assert {path.name for path in output.iterdir()} == OUTPUTS[name]
    for path in output.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    if name == "digits":
        check_digits(output, printed)
    if name == "mnist":
        check_mnist(output, printed)
    if name == "own_model":
        check_own_model(output, printed)
    if name == "round_trip":
        check_round_trip(output, printed)
    if name == "streaming":
        check_streaming(output, printed)
    if name == "vae":
        check_vae(output, printed)
    if name == "variational":
        check_variational(output, printed)
    if name == "zoo":
        check_zoo(output, printed)


def check_digits(output: Path, printed: str) -> None:
    """The metrics of the digits are complete and sound."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    keys = [(m["split"], m["method"], m["rate"], m["seed"], m["epoch"]) for m in lines]
    assert keys and len(set(keys)) == len(keys)
    assert all(m["seconds"] > 0 and math.isfinite(m["loss"]) for m in lines)
    assert {m["method"] for m in lines if m["method"] not in printed} == set()
    assert all(math.isfinite(m["nll"]) for m in lines if m["split"] == "test")
    assert len(lines) == 2 * (2 + 4)
    finals = {m["method"]: m["nll"] for m in lines if (m["split"], m["epoch"]) == ("test", 2)}
    assert len(finals) == 4
    assert all(15 < nll < 25 for nll in finals.values())


def test_curves_are_read_between_their_points() -> None:
    curve = [(1.0, 5.0), (2.0, 3.0), (4.0, 2.0), (5.0, 2.5)]
    assert reached(curve, 5.5) == 1.0
    assert reached(curve, 4.0) == 1.5
    assert reached(curve, 2.25) == 3.5
    assert reached(curve, 1.0) is None


def check_own_model(output: Path, printed: str) -> None:
    """The model knows more than most raters do, whom to believe, and that it is a good model."""
    right = re.findall(r"conditions that (.*) get right: (.*)%", printed)
    assert [name for name, _ in right] == ["most raters", "the model"]
    assert float(right[1][1]) > float(right[0][1]) + 5
    found = re.search(r"^right of each condition, by rater: (.*)$", printed, re.MULTILINE)
    assert found is not None
    skills = [min(rater) for rater in json.loads(found[1])]
    assert all(skill > 0.5 for skill in skills[:4]) and all(skill < 0.4 for skill in skills[4:])
    found = re.search(r"agree: (\S+), by the model (\S+) to (\S+)", printed)
    assert found is not None
    actual, low, high = map(float, found.groups())
    assert low < actual < high
    found = re.search(r"shrink by (\S+) an iteration", printed)
    assert found is not None and 0.9 < float(found[1]) < 1


def check_round_trip(output: Path, printed: str) -> None:
    """The edges are there, the tables learned, and pgmpy has them."""
    assert "4 edges, the same in pgmpy" in printed and "Pollution → Cancer" in printed
    losses = [float(found) for found in re.findall(r"([\d.]+) (?:nats a case|now)", printed)]
    truth = re.search(r"made the cases: ([\d.]+)", printed)
    assert truth is not None and losses[0] - 0.5 > losses[1] > float(truth[1]) - 0.02
    given, learned = (bayes_net.load(output / f"{name}.bif") for name in ("given", "learned"))
    assert given.parents == learned.parents and given.states == learned.states
    trained = bayes_net.learned(learned)
    for node in learned.nodes:
        assert torch.allclose(trained.tables[node], learned.tables[node], atol=1e-4), node
    assert not torch.allclose(learned.tables["Xray"], given.tables["Xray"], atol=0.01)


def check_vae(output: Path, printed: str) -> None:
    """Held-out digits get likelier, and every step is in the log."""
    losses = [float(found) for found in re.findall(r"epoch \d: ([\d.]+) nats", printed)]
    assert len(losses) == 3 and losses[2] < losses[0] < 30
    assert "kronecker" in printed
    assert len((output / "log.jsonl").read_text().splitlines()) == 3 * 14


@pytest.fixture(autouse=True)
def _without_lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same loop, whether Lightning is installed or not."""
    monkeypatch.setattr(lightning_loop, "Trainer", None)


def test_a_loop_as_lightning_has_it_resumes_to_the_last_bit(tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)

    def begin() -> tuple[lightning_loop.Digits, lightning_loop.Batches]:
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        digits = lightning_loop.make_data(seed=0, size=120)
        return lightning_loop.Digits(6), DataLoader(digits, batch_size=40, shuffle=True)

    whole, batches = begin()
    lightning_loop.fit(whole, batches, 2, tmp_path)
    part, batches = begin()
    lightning_loop.fit(part, batches, 1, tmp_path)
    rest, batches = begin()
    pyro.set_rng_seed(1)
    rest.on_load_checkpoint(torch.load(tmp_path / "last.ckpt", weights_only=True))
    lightning_loop.fit(rest, batches, 1, tmp_path)
    assert part.losses + rest.losses == whole.losses and len(whole.losses) == 6
    assert not rest.automatic_optimization and rest.configure_optimizers() is None


def write_bits(path: Path, **changes: Any) -> Path:
    """Writes 8 x 8 images of bars in the form of a binarized MNIST.

    Args:
        path: The file.
        **changes: Other arrays, None to leave one out.

    Returns:
        The file.
    """
    random = np.random.default_rng(0)
    splits = {"train_bits": 300, "valid_bits": 60, "test_bits": 80}
    arrays: dict[str, Any] = {
        key: np.packbits(np.repeat(random.random((size, 8)) < 0.3, 8, axis=1), axis=1)
        for key, size in splits.items()
    }
    np.savez(path, **{k: v for k, v in {**arrays, **changes}.items() if v is not None})
    return path


def check_mnist(output: Path, printed: str) -> None:
    """Every method ran from the same start to its end, those with many rates after a search."""
    lines = [json.loads(line) for line in (output / "runs.jsonl").read_text().splitlines()]
    assert (output / "table.md").read_text() in printed + "\n"
    assert all(line["error"] is None for line in lines)
    assert all(math.isfinite(line["nll"]) and math.isfinite(line["averaged"]) for line in lines)
    methods = {method.name: len(method.rates) > 1 for method in mnist.METHODS.values()}
    assert {line["method"] for line in lines} == set(methods)
    starts = {line["split"]: line["nll"] for line in lines if line["steps"] == 0}
    for name, searched in methods.items():
        searches, tests = (
            [line for line in lines if (line["method"], line["split"]) == (name, split)]
            for split in ("validation", "test")
        )
        assert len(searches) == (2 * 2 if searched else 0)
        assert [line["minutes"] for line in tests] == [0.0, 0.25 / 60, 0.5 / 60]
        assert tests[0]["nll"] == starts["test"] > tests[-1]["nll"]
        assert all(line["seconds"] >= 60 * line["minutes"] for line in tests)
        assert tests[-1]["steps"] > 0
        assert starts["test"] > tests[-1]["averaged"] != tests[-1]["nll"]
        assert len({line["rate"] for line in tests}) == 1
        assert {line["rate"] for line in tests} <= {line["rate"] for line in searches or tests}


def test_mnist_reads_packed_bits(tmp_path: Path) -> None:
    bits = np.zeros((4, 2), dtype=np.uint8)
    bits[0] = 0b10000001, 0b00000010
    data = mnist.load_data(write_bits(tmp_path / "bits.npz", valid_bits=bits))
    assert data.train.shape == (300, 64) and data.test.shape == (80, 64)
    assert data.validation.shape == (4, 16) and data.validation.sum() == 3
    assert data.validation[0].nonzero().flatten().tolist() == [0, 7, 14]
    with pytest.raises(ValueError, match="has no test_bits"):
        mnist.load_data(write_bits(tmp_path / "part.npz", test_bits=None))


def test_mnist_judges_files_that_are_sorted_by_images_of_all_of_them() -> None:
    rows = torch.arange(1000.0).unsqueeze(1)
    some = mnist.some_of(rows, 200)
    assert torch.equal(some, mnist.some_of(rows, 200)) and len(some.unique()) == 200
    error = 1000 / 12**0.5 / 200**0.5
    assert abs(float(some.mean()) - 499.5) < 3 * error < abs(float(rows[:200].mean()) - 499.5)
    assert len(mnist.some_of(rows, 2000)) == 1000


def test_mnist_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.zeros((40, 784))
    images[:, ::2], images[0, 0] = 255, 0
    fetches: list[str] = []

    def fetch(name: str, **options: Any) -> SimpleNamespace:
        fetches.append(name)
        return SimpleNamespace(data=images)

    monkeypatch.setattr(mnist, "fetch_openml", fetch)
    monkeypatch.setattr(mnist, "get_data_home", lambda: str(tmp_path))
    monkeypatch.setattr(mnist, "NUM_TRAIN", 20)
    monkeypatch.setattr(mnist, "NUM_TEST", 10)
    data = mnist.load_data(mnist.fetched())
    assert [len(part) for part in (data.train, data.validation, data.test)] == [20, 10, 10]
    assert torch.equal(
        torch.cat([data.train, data.validation, data.test]) > 0, torch.tensor(images) > 0
    )
    mnist.load_data(mnist.fetched())
    assert fetches == ["mnist_784"]


def test_mnist_rates_fall_with_the_time_that_is_spent() -> None:
    clock = mnist.Clock(10.0)
    assert clock.decay(0) == clock.decay(99) == 1
    clock.seconds = 4.0
    assert clock.decay(0) == pytest.approx(0.6)
    clock.seconds = 11.0
    assert clock.decay(0) == mnist.FLOOR


def test_averages_by_hand_are_those_of_the_optimizer() -> None:
    x = torch.rand(20, 6, generator=torch.Generator().manual_seed(0)).round()

    def values() -> dict[str, torch.Tensor]:
        return {name: leaf.detach().clone() for name, leaf in stored_leaves().items()}

    found = []
    for by_hand in (False, True):
        machine = mnist.make_machine(x, (3, 2), seed=0)
        trainee = mnist.natural(dict, machine, mnist.Rate.of("0.3"), mnist.Clock(60.0))
        if by_hand:
            averaged = Averaged(trainee.step, mnist.AVERAGING)
            trainee = mnist.Trainee(averaged.step, averaged.context)
        for _ in range(5):
            trainee.step((x,))
        last = values()
        with trainee.averaged():
            found.append(values())
        assert all(torch.equal(last[name], value) for name, value in values().items())
        assert all(not torch.equal(last[name], value) for name, value in found[-1].items())
    assert all(torch.equal(found[0][name], value) for name, value in found[1].items())


@pytest.mark.parametrize(
    "target, minutes", [(9.0, 0.0), (6.0, 1.5), (7.0, 1.0), (5.0, 2.0), (4.9, None)]
)
def test_mnist_when_a_curve_is_down(target: float, minutes: float | None) -> None:
    curve = [(0.0, 9.0), (1.0, 7.0), (2.0, 5.0)]
    assert mnist.reached(curve, target) == minutes


def test_mnist_rates_of_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    options = mnist.parse(["--rates", "adam=0.5", "two-rate=0.1:0.2,0.3", "--methods", "two-rate"])
    assert list(options.methods) == ["two-rate"]
    assert options.methods["two-rate"].rates == (mnist.Rate(0.1, 0.2), mnist.Rate(0.3, 0.3))
    with pytest.raises(SystemExit):
        mnist.parse(["--rates", "sgd=1"])
    assert "METHOD=RATE" in capsys.readouterr().err


def check_streaming(output: Path, printed: str) -> None:
    """Every problem has its methods, Adam its best rate, and a second call only reads the log."""
    log = (output / "runs.jsonl").read_text()
    runs = [json.loads(line) for line in log.splitlines()]
    assert len(runs) == 3 * len(streaming.METHODS) * 2
    assert all(run["batches"] == [20] and run["seconds"] > 0 for run in runs)
    assert all(0.05 < run["excess"][0] < 20 for run in runs)
    summaries = json.loads((output / "results.json").read_text())
    assert len(summaries) == 3 * (len(streaming.NATURAL) + 1)
    for one in summaries:
        values = {
            run["method"]: [other["excess"][0] for other in runs if same_cell(other, run)]
            for run in runs
            if run["problem"] == one["problem"]
        }
        assert one["mean"] == [sum(values[one["method"]]) / 2]
        if one["method"] in streaming.ADAM:
            assert one["median"][0] == min(sum(values[rate]) / 2 for rate in streaming.ADAM)
    table = (output / "table.md").read_text()
    assert table in printed + "\n" and table.count("**") == 2 * len(summaries)
    streaming.main(["--quick", "--output", str(output)])
    assert (output / "runs.jsonl").read_text() == log


def same_cell(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return all(first[key] == second[key] for key in ("problem", "method"))


@pytest.mark.parametrize("name", ["latent class", "hidden Markov model"])
def test_starts_of_streams_are_efficient_estimates(name: str) -> None:
    """2 KL · data is χ² of as many degrees of freedom as there are free parameters."""
    torch.set_default_dtype(torch.float64)
    problem = streaming.make_problems()[name]()
    assert problem.size == {"latent class": 2 + 24, "hidden Markov model": 2 + 6 + 9}[name]
    assert problem.divergence(problem.truth) == 0
    seen = streaming.BEHIND * streaming.BATCH
    found = [2 * problem.divergence(problem.start(seed)) * seen for seed in range(60)]
    error = math.sqrt(2 * problem.size / len(found))
    assert abs(sum(found) / len(found) - problem.size) < 4 * error
    assert abs(2 * sum(found) / len(found) - problem.size) > 8 * error
    # The data of a stream are those of the truth.
    batch = torch.cat(problem.batches(0, 200))
    gradient = torch.func.jacrev(
        lambda vector: problem.net.log_likelihood(problem.constrained(vector), batch)
    )(problem.truth)
    score = problem._root.T @ gradient / math.sqrt(len(batch))
    assert abs(float(score @ score) - problem.size) < 4 * math.sqrt(2 * problem.size)


def check_variational(output: Path, printed: str) -> None:
    """Every program has its methods, and every run its curve or its error."""
    runs = json.loads((output / "results.json").read_text())
    assert (output / "table.md").read_text() in printed + "\n"
    programs = {run["program"] for run in runs}
    assert len(programs) == 6 and len(runs) == 6 * (2 + 2)
    for run in runs:
        assert (run["error"] is None) == math.isfinite(run["validation"])
        assert len(run["steps"]) == len(run["seconds"]) == len(run["values"])
        if run["method"] == "Adam":
            assert run["error"] is None and all(map(math.isfinite, run["values"]))
    natural = [run for run in runs if run["method"] != "Adam" and run["error"] is None]
    assert {"linear regression", "eight schools"} <= {run["program"] for run in natural}


def check_zoo(output: Path, printed: str) -> None:
    """Every program of the registry is there or left out, with all methods that it can have."""
    content = json.loads((output / "results.json").read_text())
    assert (output / "table.md").read_text() in printed + "\n"
    names = [entry["name"] for entry in content["programs"]]
    assert sorted(names + content["left out"]) == sorted(programs())
    assert len(names) >= 5
    # A build, such as "+cu130", may be missing from the version of the package.
    assert torch.__version__.startswith(content["versions"]["torch"])
    for entry in content["programs"]:
        program = programs()[entry["name"]]
        runs = [run for run in content["runs"] if run["program"] == program.name]
        both = program.name in {"bars", "vae"}  # model and guide have parameters
        methods = ["Adam"] * 2 + ["Adam, two rates"] * 4 * both + ["descent"] * 2 + ["natural"]
        methods += ["visible"] * program.hidden
        methods += ["EM"] * (program.make(0).em_step is not None)
        assert [run["method"] for run in runs] == methods
        assert [s["method"] for s in entry["summaries"]] == list(dict.fromkeys(methods))
        check_zoo_runs(runs, entry)


def check_zoo_runs(runs: list[dict[str, Any]], entry: dict[str, Any]) -> None:
    """Runs of a program start alike, end where they say, and stay above optimum and bound."""
    (start,), (optimum,) = entry["referee"]["starts"], entry["referee"]["optima"]
    assert start > optimum >= (entry["referee"]["bound"] or -math.inf)
    for run in runs:
        assert run["values"][0] == start and run["steps"][0] == run["seconds"][0] == 0
        assert len(run["steps"]) == len(run["seconds"]) == len(run["values"])
        assert (run["error"] is None) == (run["final"] is not None)
        if run["error"] is None:
            at_end = run["steps"].index(entry["plan"]["steps"])
            assert run["values"][at_end] == run["final"]
        elif run["method"] in zoo.TUNED:
            assert " at step " in run["error"]  # too long a rate
        else:
            assert run["error"] == "refused: BlockTooLarge"
        assert min(run["values"]) >= optimum
        assert run["seconds"] == sorted(run["seconds"])
    finals = [s["final"] for s in entry["summaries"] if not s["errors"]]
    assert len(finals) >= 2 and min(finals) < start
    assert all(s["final"] < start for s in entry["summaries"] if s["method"] == "natural")


def zoo_run(method: str, rate: float | None, values: list[float], cost: float) -> zoo.Run:
    """A run whose steps cost the same."""
    steps = list(range(len(values)))
    seconds = [cost * step for step in steps]
    return zoo.Run("mixture", method, rate, 0, steps, seconds, values, values[-1])


@pytest.mark.parametrize(
    ("ends", "words", "excess"),
    [
        ([1.0, 1.5, 1.4], "lower", -0.4 / 1.4),
        ([1.4, 1.5, 1.4], "equal", 0.0),
        ([1.5, 1.5, 1.4], "higher by 7.14%", 0.1 / 1.4),
        ([1.5, 1.4, 9.0], "higher by 7.14%", 0.1 / 1.4),
    ],
)
def test_zoo_ending(ends: list[float], words: str, excess: float) -> None:
    """Against the best of the tuned methods, whichever it is; EM is none of them."""
    program = programs()["mixture"]
    methods = zip(("natural", "Adam", "descent", "EM"), [*ends, 0.9], strict=True)
    runs = [zoo_run(method, 0.1, [2.0, end], 0.1) for method, end in methods]
    referee = zoo.find_referee(program, program.make_data(0, 10), runs, 99)
    found = zoo.ending(zoo.summarize(runs, referee), referee)
    assert found == (words, pytest.approx(excess))


@pytest.mark.parametrize(
    "em, cost, words",
    [
        ([2.0, 1.005, 1.0, 1.0], 0.1, "**no**: EM is faster"),
        ([2.0, 1.5, 1.2, 1.0], 0.1, "natural: fewer steps; EM takes fewer seconds"),
        ([2.0, 1.5, 1.2, 1.0], 1.0, "natural: fewer steps, fewer seconds"),
        ([2.0, 1.5, 1.2, 1.1], 0.1, "natural: fewer steps, fewer seconds, ends lower"),
        ([2.0, 1.5, 1.0, 0.9], 0.1, "**no**: EM is faster and ends lower"),
    ],
)
def test_zoo_verdict(em: list[float], cost: float, words: str) -> None:
    program = programs()["mixture"]
    runs = [
        zoo_run("Adam", 0.1, [2.0, 1.8, 1.6, 1.4], 0.2),
        zoo_run("Adam", 0.3, [2.0, 9.0, 9.0, 9.0], 0.2),
        zoo_run("descent", 0.1, [2.0, 1.9, 1.9, 1.9], 0.1),
        zoo_run("descent", 0.3, [2.0, 1.8, 1.8, 1.8], 0.1),
        zoo_run("natural", 0.5, [2.0, 1.4, 1.0, 1.0], 0.3),
        replace(zoo_run("visible", 0.5, [2.0, 0.95], 0.3), final=None, error="Bad at step 2"),
        zoo_run("EM", None, em, cost),
    ]
    referee = zoo.find_referee(program, program.make_data(0, 10), runs[4:5] + runs[6:], 99)
    summaries = zoo.summarize(runs, referee)
    chosen = [(s.method, s.rate) for s in summaries][:3]
    assert chosen == [("Adam", 0.1), ("descent", 0.3), ("natural", 0.5)]
    assert zoo.verdict(summaries, referee) == words
    assert zoo.cell(summaries[3]) == "1 of 1 fail: Bad at step 2"
