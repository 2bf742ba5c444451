"""Pictures show what they should, and comparisons are fair."""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path

import networkx as nx
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib import rc_context
from matplotlib.colors import to_rgb
from matplotlib.image import imread

import pyronat
from pyronat import comparison, drawing, plot
from pyronat.cli import main
from pyronat.comparison import Comparison, Run, best_rows, marks, table
from pyronat.errors import BlockTooLarge, MissingPackage, UnknownName, UnsupportedProgram
from pyronat.graph import BayesNet, Edge, Site
from pyronat.loading import importable, target_of
from pyronat.predictive import Prediction, predictions
from pyronat.progress import Lines
from pyronat.recipes import Recipe
from pyronat.reports import StepInfo
from pyronat.training import Files, Settings, start, train

ROOT = Path(__file__).parents[1]
HERE = Path(__file__).parent / "command_line"
COUNTS, DIGITS = str(HERE / "counts.py"), str(HERE / "digits.py")


def pixels(path: Path) -> np.ndarray:
    """Colors of a picture from 0 to 255, shape [height, width, 3]."""
    return np.rint(255 * imread(path)[:, :, :3]).astype(int)


def count(image: np.ndarray, color: str) -> int:
    """Pixels of a color."""
    return int((np.abs(image - np.rint(255 * np.array(to_rgb(color)))).max(-1) <= 2).sum())


def colors(image: np.ndarray) -> int:
    return len(np.unique(image.reshape(-1, 3), axis=0))


# --- networks ----------------------------------------------------------------------------------


def random_dag(seed: int, size: int = 12) -> nx.DiGraph:
    undirected = nx.gnp_random_graph(size, 0.18, seed=seed, directed=True)
    graph = nx.DiGraph()
    graph.add_nodes_from(f"s{i:02}" for i in range(size))
    graph.add_edges_from((f"s{a:02}", f"s{b:02}") for a, b in undirected.edges if a < b)
    return graph


def crossings(graph: nx.DiGraph, places: dict[str, tuple[float, float]]) -> int:
    """Pairs of edges between the same two layers that cross."""
    found = 0
    for (a, b), (c, d) in combinations(graph.edges, 2):
        if (places[a][1], places[b][1]) == (places[c][1], places[d][1]):
            found += (places[a][0] - places[c][0]) * (places[b][0] - places[d][0]) < 0
    return found


@pytest.mark.parametrize("seed", range(10))
def test_layers_follow_the_edges(seed):
    graph = random_dag(seed)
    graph.add_nodes_from(f"alone{i}" for i in range(seed))
    places = drawing.layered(graph)
    assert set(places) == set(graph) and len(set(places.values())) == len(places)
    assert all(places[parent][1] > places[child][1] for parent, child in graph.edges)
    lowest = min((places[name][1] for name in graph if graph.degree(name)), default=0.0)
    assert all(places[name][1] < lowest for name in nx.isolates(graph))


def test_layers_are_ordered_so_that_few_edges_cross():
    ours = theirs = 0
    for seed in range(20):
        graph = random_dag(seed)
        places = drawing.layered(graph)
        rows: dict[float, list[str]] = {}
        for name in sorted(graph):
            rows.setdefault(places[name][1], []).append(name)
        by_name = {n: (float(i), row) for row, names in rows.items() for i, n in enumerate(names)}
        ours, theirs = ours + crossings(graph, places), theirs + crossings(graph, by_name)
    assert ours < 0.6 * theirs


def net_of(edges: str, observed: str) -> BayesNet:
    names = sorted(set(edges) - {" "})
    sites = (
        Site(n, "observed" if n in observed else "latent", "Normal", (), (), 0, ()) for n in names
    )
    return BayesNet(tuple(sites), tuple(Edge(a, b, "data") for a, b in edges.split()), ())


def test_districts_have_colors(tmp_path):
    net = net_of("zx zy wv", observed="xyv")
    path = tmp_path / "net.png"
    net.plot(path)
    image = pixels(path)
    assert len(net.districts) == 2
    assert count(image, drawing.COLORS[0]) > 500 and count(image, drawing.COLORS[1]) > 500
    assert count(image, drawing.COLORS[2]) == 0
    net_of("xy", observed="xy").plot(path)
    assert count(pixels(path), drawing.COLORS[0]) == 0


def test_blankets_stand_out(tmp_path):
    net = net_of("ab bc dc ce fg", observed="")
    (picture,) = net._pictures("b")
    inside = {name for name in "abcdefg" if picture.strength(name) == 1}
    assert inside == {"b"} | net.markov_blanket("b") == {"a", "b", "c", "d"}
    assert picture.strength("b", "c") == 1 and picture.strength("c", "e") < 1
    images = []
    for center in (None, "b", "g"):
        net.plot(tmp_path / "net.png", blanket_of=center)
        images.append(pixels(tmp_path / "net.png"))
    usual, of_b, of_g = (count(image, drawing.COLORS[0]) for image in images)
    assert of_g < of_b != usual
    assert count(images[2], drawing.COLORS[1]) > 0 == count(images[1], drawing.COLORS[1])
    with pytest.raises(UnknownName, match="no site 'q'.*there are a, b"):
        net.plot(tmp_path / "net.png", blanket_of="q")


@pytest.mark.parametrize("kind", ["data", "control"])
def test_the_legend_says_what_there_is(kind, tmp_path):
    net = replace(net_of("ac bc cd", observed=""), edges=(Edge("a", "c", kind),))
    net.plot(tmp_path / "net.svg")
    with rc_context({"svg.fonttype": "none"}):
        net.plot(tmp_path / "net.svg")
    text = (tmp_path / "net.svg").read_text()
    assert ("through Python" in text) == (kind == "control")
    assert "hidden" in text and ">observed" not in text and "parents of one" not in text


def test_parents_are_married(tmp_path):
    (picture,) = net_of("ac bc cd", observed="")._pictures(None)
    assert drawing._married(picture.graph) == [("a", "b")]


def test_formats(tmp_path):
    net = net_of("zx", observed="x")
    for name, head in (("a.svg", b"<?xml"), ("a.pdf", b"%PDF"), ("a.png", b"\x89PNG")):
        net.plot(tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(head)
    with pytest.raises(ValueError, match="not supported"):
        net.plot(tmp_path / "a.txt")


def test_html():
    net = net_of("zx", observed="x")
    text = BayesNet(net.sites, net.edges, (), (("<p>", "a & b"),), guide=net)._repr_html_()
    assert text.count("<svg ") == 1 and text.count("<table>") == 4
    assert "<td>z</td>" in text and "&lt;p&gt; (a &amp; b)" in text and "<p>:" not in text
    assert text == BayesNet(net.sites, net.edges, (), (("<p>", "a & b"),), net)._repr_html_()


# --- without matplotlib ------------------------------------------------------------------------


def test_what_happens_without_matplotlib(monkeypatch, tmp_path, capsys):
    net = net_of("zx", observed="x")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingPackage, match=r"pip install 'pyronat\[cli\]'"):
        net.plot(tmp_path / "net.png")
    assert "<svg" not in net._repr_html_() and "<td>z</td>" in net._repr_html_()
    for argv in (
        ("inspect", COUNTS, "--plot", "net.png"),
        ("inspect", COUNTS, "--heatmap", "net.png"),
        ("train", COUNTS, "--plot", "net.png"),
        ("train", COUNTS, "--compare", "full", "--plot", "net.png"),
    ):
        assert main(list(argv)) == 1
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("pyronat: MissingPackage")  # before any work
    assert main(["inspect", COUNTS]) == 0
    monkeypatch.chdir(tmp_path)
    assert main(["train", COUNTS, "--compare", "full", "--steps", "2", "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert "| full |" in out and "picture" not in out and "pyronat[cli]" in err
    assert not list(tmp_path.iterdir())


# --- Fisher information ------------------------------------------------------------------------


def test_heat_map(tmp_path, capsys):
    path = tmp_path / "fisher.png"
    assert main(["inspect", COUNTS, "--heatmap", str(path), "--plot", str(tmp_path / "n.png")]) == 0
    image = pixels(path)
    height, width, _ = image.shape
    assert height > 500 and width > 1500 and colors(image) > 100
    assert count(image, drawing.GREEN) > 1000  # bars of missing information


def test_entries_are_in_the_order_of_blocks():
    def program(x):
        W = pyro.param("W", torch.zeros(3, 2))
        b = pyro.param("b", torch.zeros(3))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(x.new_ones(2) @ W.T + b, 1.0).to_event(1), obs=x)

    fisher = pyronat.fisher(
        program, torch.zeros(4, 3), geometry=pyronat.Full("model"), num_samples=5
    )
    order, bounds = plot._order(fisher)
    assert sorted(order.tolist()) == list(range(9)) and [b[1:] for b in bounds] == [(0, 9)]
    matrix = fisher.dense()[0]
    units = torch.block_diag(*[torch.ones(3, 3)] * 3)
    assert bool(((matrix[order][:, order] != 0) == (units != 0)).all())
    assert not bool(((matrix != 0) == (units != 0)).all())  # the order matters


def test_what_is_not_drawn(tmp_path, monkeypatch):
    def nothing():
        pyro.sample("x", dist.Normal(0.0, 1.0))

    with pytest.raises(UnsupportedProgram, match="no parameters"):
        plot.fisher_blocks(pyronat.fisher(nothing), tmp_path / "a.png")

    def coin():
        pyro.sample("x", dist.Bernoulli(logits=pyro.param("p", torch.zeros(3))).to_event(1))

    fisher = pyronat.fisher(coin, geometry=pyronat.Full("exact"))
    plot.fisher_blocks(fisher, tmp_path / "a.png")
    monkeypatch.setattr(plot, "MAX_ENTRIES", 2)
    with pytest.raises(BlockTooLarge, match="3 × 3"):
        plot.fisher_blocks(fisher, tmp_path / "b.png")
    assert not (tmp_path / "b.png").exists()


# --- trainings ---------------------------------------------------------------------------------


def info(step: int, **changes: object) -> StepInfo:
    values = dict(
        step=step,
        loss=100.0 / (step + 1),
        accepted=True,
        rejected=None,
        rejections=0,
        factor=1.0,
        lr=0.1,
        kl=0.5,
        grad_norm=1.0,
        natural_norm=1.0,
        cosine=1.0,
        damping=0.1,
        jitter=0.0,
        mixing=1.0,
        missing=None,
        tries=1,
        ess=None,
        dream_ess=None,
        refreshed=False,
        seconds=0.01,
    )
    return StepInfo(**{**values, **changes})


def test_training(tmp_path):
    path = tmp_path / "curve.png"
    argv = ["train", DIGITS, "--steps", "8", "--batch-size", "50", "--geometry", "visible"]
    assert main([*argv, "--quiet", "--plot", str(path)]) == 0
    image = pixels(path)
    assert image.shape[0] > 800 and image.shape[1] > 1500 and colors(image) > 100
    used = [color for color in drawing.COLORS if count(image, color) > 20]
    assert len(used) == len(drawing.COLORS)  # every trace there is


def test_a_training_with_gaps(tmp_path):
    sizes = []
    nan = info(3, loss=math.nan, kl=math.nan, damping=math.nan, accepted=False, rejected="loss")
    noisy = [info(step, ess=3.0, loss=(-1.0) ** step) for step in range(40)]
    for infos in ([], [*noisy[:3], nan, info(4, loss=math.inf), *noisy[5:]]):
        plot.training(infos, tmp_path / "curve.png")
        sizes.append(colors(pixels(tmp_path / "curve.png")))
    assert sizes[0] < sizes[1]


# --- samples -----------------------------------------------------------------------------------


def picture(path: Path, **sites: dict[str, torch.Tensor]) -> np.ndarray:
    plot.samples(sites, path)
    return pixels(path)


def test_kinds_of_samples(tmp_path):
    """Images for squares, points for pairs, histograms for numbers, heat maps for the rest."""
    path = tmp_path / "samples.png"
    noise = torch.randn(80, 64)
    image = picture(path, x={"data": noise, "drawn": noise.flip(0)})
    gray = (image.max(-1) - image.min(-1)) <= 2
    assert gray.all() and colors(image) > 200
    pair = drawing.COLORS[:2]
    through = [0.4 + 0.6 * np.array(to_rgb(color)) for color in pair]  # points can be seen through
    for kind, values, used in (
        ("points", torch.randn(80, 2), through),
        ("histogram", torch.randn(80), pair),
        ("bars", torch.arange(80) % 3, pair),
    ):
        image = picture(path, x={"data": values, "drawn": values})
        assert min(count(image, color) for color in used) > 100, kind
    bits = torch.randint(2, (80, 2))
    for values in (torch.randn(80, 7), bits):
        image = picture(path, x={"data": values, "drawn": values})
        assert not any(count(image, color) > 20 for color in drawing.COLORS[:2])
        assert not ((image.max(-1) - image.min(-1)) <= 2).all()


def test_rows_are_sorted_and_masked_values_are_white(tmp_path):
    values = torch.tensor([[1.0], [0.0]]).repeat(20, 6)
    values[:, 5] = torch.nan
    image = picture(tmp_path / "samples.png", x={"data": values, "drawn": values})
    dark, light = (
        (np.abs(image - np.array(c)).max(-1) <= 3) for c in ((8, 48, 107), (247, 251, 255))
    )
    rows = dark.nonzero()[0], light.nonzero()[0]
    # Each kind of rows is one piece, apart from the bar of colors.
    assert dark.sum() > 20000 and light.sum() > 20000
    left = image.shape[1] // 3
    tops, bottoms = (np.nonzero(part[:, :left].any(1))[0] for part in (dark, light))
    assert tops.max() < bottoms.min() or bottoms.max() < tops.min()
    assert len(rows[0]) == len(rows[1]) or abs(dark.sum() - light.sum()) < 0.1 * dark.sum()


def test_no_samples_without_values(tmp_path):
    with pytest.raises(UnsupportedProgram, match="no observed sites"):
        plot.samples({"x": {"data": torch.zeros(0, 3)}}, tmp_path / "samples.png")
    assert not (tmp_path / "samples.png").exists()


def test_samples_of_a_training(tmp_path, capsys):
    """After training they are more like the data than at the start."""
    path = tmp_path / "samples.png"
    argv = ["train", DIGITS, "--steps", "3", "--quiet", "--samples", str(path)]
    assert main(argv) == 0
    assert f"samples: {path}" in capsys.readouterr().out
    image = pixels(path)
    assert image.shape[0] > 300 and image.shape[1] > 1000
    assert count(image, "black") > 5000 and count(image, "white") > 5000
    assert main([*argv, "--compare", "full"]) == 2


def predicted(program: str, steps: int = 0) -> tuple[Prediction, ...]:
    target = target_of(program)
    with importable(target.path):
        recipe = start(target, 0)
        if steps:
            train(recipe, Settings(steps=steps), Files(), quiet=True)
        state = torch.random.get_rng_state()
        found = predictions(recipe)
        assert torch.equal(state, torch.random.get_rng_state())
        again = predictions(recipe)
        assert str([one.drawn for one in found]) == str([one.drawn for one in again])
    return found


def test_predictions_are_of_the_trained_program():
    distances = []
    for steps in (0, 40):
        (one,) = predicted(DIGITS, steps)
        assert one.name == "x" and one.data.shape == one.drawn.shape == (200, 16)
        distances.append(float((one.data.mean(0) - one.drawn.mean(0)).abs().mean()))
    assert distances[1] < 0.05 < 0.15 < distances[0]


def test_global_variables_are_drawn_by_the_guide():
    """By the prior of the weights, the data would be much wider."""
    (one,) = predicted(str(HERE / "regression.py"), 150)
    assert one.data.dim() == 1
    assert float((one.drawn - one.data).std()) < 0.7 * float(one.data.std())


def test_sites_of_a_chain_are_joined():
    (one,) = predicted(str(HERE / "chain.py"))
    assert one.name == "x0, x1, x2, x3" and one.data.shape == one.drawn.shape == (
        one.data.shape[0],
        4,
        1,
    )
    (one,) = predicted(str(HERE / "sprinkler.py"))
    assert one.name == "sprinkler, grass"


def test_masked_data_are_nan(tmp_path):
    text = """
import pyro, torch, pyro.distributions as dist
def model(x):
    with pyro.plate("data", 30), pyro.poutine.mask(mask=x[:, 0] > 0):
        pyro.sample("x", dist.Normal(pyro.param("a", torch.zeros(3)), 1.0).to_event(1), obs=x)

def make_data(seed):
    return torch.randn(30, 3)
"""
    path = tmp_path / "masked.py"
    path.write_text(text)
    (one,) = predicted(str(path))
    seen = one.data[:, 0].isfinite()
    assert 5 < int(seen.sum()) < 25 and bool((one.data[seen, 0] > 0).all())
    assert torch.equal(one.drawn.isfinite(), one.data.isfinite())


# --- comparisons -------------------------------------------------------------------------------

METHODS = {"adam": drawing.ORANGE, "full": drawing.BLUE, "visible": drawing.GREEN}


@pytest.mark.parametrize("program", ["mixture", DIGITS])
def test_compare(program, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    path, log = tmp_path / "methods.png", tmp_path / "runs.jsonl"
    argv = ["train", program, "--compare", "adam,full,visible", "--steps", "15", "--quiet"]
    options = ["--rates", "0.001,0.1", "--plot", str(path), "--metrics", str(log)]
    assert main([*argv, *options, "--size", "150"]) == 0
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if line.startswith("| ")][2:]
    assert [row.split(" | ")[0].strip("| ") for row in rows] == list(METHODS)
    assert "0.1 (best of 2)" in rows[0] and "end of the sweep" in out
    image = pixels(path)
    assert image.shape[0] > 500 and image.shape[1] > 1200 and colors(image) > 100
    assert all(count(image, color) > 200 for color in METHODS.values())
    runs = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(r["method"], r["rate"]) for r in runs] == [
        ("adam", 0.001),
        ("adam", 0.1),
        ("full", 0.3),
        ("visible", 0.3),
    ]
    assert len({run["losses"][0] for run in runs}) == 1  # the same start
    assert all(run["losses"][-1] < run["losses"][0] and run["steps"][-1] == 15 for run in runs)
    assert runs[1]["losses"][-1] < runs[0]["losses"][-1]
    assert f"{runs[2]['losses'][-1]:.5g}" in rows[1]


def test_only_what_is_asked_for_is_drawn(tmp_path):
    path = tmp_path / "methods.png"
    argv = ["train", COUNTS, "--compare", "full,euclidean", "--steps", "3", "--quiet"]
    assert main([*argv, "--plot", str(path)]) == 0
    assert count(pixels(path), drawing.PURPLE) > 100
    assert count(pixels(path), drawing.ORANGE) == count(pixels(path), drawing.GREEN) == 0


def test_the_picture_has_a_usual_name(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", COUNTS, "--compare", "full", "--steps", "2", "--quiet"]) == 0
    assert "counts-comparison.png" in capsys.readouterr().out
    assert (tmp_path / "counts-comparison.png").exists()


def test_all_methods_see_the_same_batches():
    target = target_of(DIGITS)
    seen: dict[str, set[str]] = {}

    def begin(method: str, seed: int) -> Recipe:
        recipe = start(target, seed)

        def guide(x):
            recipe.guide(x)
            if torch.is_grad_enabled() and len(x) < recipe.program.size:
                seen.setdefault(method, set()).add(str(x.tolist()))

        return replace(recipe, guide=guide)

    settings = Settings(steps=6, batch_size=60)
    with importable(target.path):
        for method in ("adam", "full"):
            Comparison((method,), settings, (0.1,)).run(partial(begin, method), quiet=True)
    assert seen["adam"] == seen["full"] and len(seen["adam"]) == 6


def test_runs_are_the_same_for_the_same_seed(capsys):
    def finals() -> list[float]:
        target = target_of(DIGITS)
        settings = Settings(steps=4, batch_size=60)
        with importable(target.path):
            runs = Comparison(("adam", "full"), settings, (0.1,), 2).run(
                lambda seed: start(target, seed), quiet=True
            )
        return [run.final for run in runs]

    first = finals()
    assert first == finals() and len(set(first)) == 4


def test_adam_with_two_rates(capsys, tmp_path, monkeypatch):
    """The guide's parameters move at a rate of their own, in every pair of the sweep."""
    monkeypatch.chdir(tmp_path)
    argv = ["train", DIGITS, "--steps", "4", "--quiet", "--size", "50", "--metrics", "runs.jsonl"]
    assert main([*argv, "--rates", "0.01,0.1", "--compare", "adam,two-rate"]) == 0
    out = capsys.readouterr().out
    (row,) = [line for line in out.splitlines() if line.startswith("| two-rate")]
    runs = [json.loads(line) for line in Path("runs.jsonl").read_text().splitlines()]
    pairs = [(r["rate"], r["guide_rate"]) for r in runs if r["method"] == "two-rate"]
    assert pairs == [(0.01, 0.002), (0.01, 0.05), (0.1, pytest.approx(0.02)), (0.1, 0.5)]
    best = min((r for r in runs if r["guide_rate"]), key=lambda r: r["losses"][-1])
    assert f"{best['rate']:g}, guide {best['guide_rate']:g} (best of 4)" in row
    assert len({r["losses"][-1] for r in runs}) == len(runs) == 6


def test_the_second_rate_is_that_of_the_guide():
    target = target_of(DIGITS)
    moved = {}
    with importable(target.path):
        for of_guide in (None, 0.0):
            recipe = start(target, 0)
            settings = Settings(steps=1)
            assert comparison.guide_params(recipe) == {"R", "c"}
            before = {n: p.clone() for n, p in pyro.get_param_store().items()}
            run = comparison._run(
                Run("two-rate", 0.1, 0, guide_rate=of_guide), recipe, settings, Lines(1, 0), 0
            )
            assert run.error is None
            store = pyro.get_param_store()
            moved[of_guide] = {n for n, p in before.items() if not torch.equal(p, store[n])}
    assert moved[0.0] == {"W", "b", "top"}
    assert moved[None] == {"W", "b", "top", "R", "c"}


def test_no_second_rate_without_parameters_of_a_guide(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["train", COUNTS, "--steps", "2", "--quiet", "--rates", "0.1", "--compare"]
    assert main([*argv, "two-rate,full"]) == 0
    out, err = capsys.readouterr()
    assert "two-rate is left out" in err and "two-rate" not in out
    assert main([*argv, "two-rate"]) == 1
    assert "UnsupportedProgram" in capsys.readouterr().err


def test_methods_that_fail_are_named(tmp_path, capsys, monkeypatch):
    """Visible needs a guide with a density on dreams, which an autoguide is not."""
    monkeypatch.chdir(tmp_path)
    text = (HERE / "regression.py").read_text()
    text = text.replace("torch.zeros(2)", 'pyro.param("m", torch.zeros(2))')
    path = tmp_path / "fails.py"
    path.write_text(text)
    argv = ["train", str(path), "--steps", "3", "--quiet", "--compare"]
    assert main([*argv, "adam,visible"]) == 0
    (row,) = [row for row in capsys.readouterr().out.splitlines() if row.startswith("| visible")]
    assert "NoGuideOnDreams" in row
    assert main([*argv, "visible"]) == 1


@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_divergence_is_an_error_of_a_run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["train", COUNTS, "--steps", "30", "--quiet", "--rates", "1e6", "--compare", "adam,full"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert re.search(r"\| adam \| 1e\+06 \| step \d+: ValueError", out), out


# --- tables ------------------------------------------------------------------------------------


def made(method: str, rate: float, losses: tuple[float, ...], seed: int = 0, **more: object) -> Run:
    steps = tuple(range(len(losses)))
    return Run(method, rate, seed, steps, tuple(0.5 * s for s in steps), losses, **more)


def test_the_best_rate_counts():
    runs = [
        made("adam", 0.1, (5.0, 3.0), seed=0),
        made("adam", 0.1, (5.0, 3.2), seed=1),
        made("adam", 0.3, (5.0, 2.0), seed=0),
        made("adam", 0.3, (5.0,), seed=1, error="step 1: ValueError"),
        made("adam", 1.0, (5.0, 4.0), seed=0),
        made("adam", 1.0, (5.0, 4.0), seed=1),
        made("full", 0.3, (5.0, 3.1, 2.9), seed=0),
        made("full", 0.3, (5.0, 4.0, 3.0), seed=1),
    ]
    rows = best_rows(runs)
    assert [(row.method, row.rate) for row in rows] == [("adam", 0.1), ("full", 0.3)]
    lines = table(rows, (0.1, 0.3, 1.0))
    assert "| adam | 0.1 (best of 3) | 3.1 ± 0.14 |" in lines[2]
    assert "| full | 0.3 | 2.95 ± 0.071 | 1.00 | 500.0 | 2 steps, 1.00 s |" in lines[3]
    assert lines[-1].startswith("Adam's best rate, 0.1, is at an end")
    assert "end" not in table(best_rows(runs), (0.03, 0.1, 0.3))[-1]
    never = [*runs[:2], made("full", 0.3, (5.0, 4.0)), made("full", 0.3, (5.0, 4.0), seed=1)]
    assert "| – |" in table(best_rows(never), (0.1,))[3]


def test_tables_without_adam():
    lines = table(best_rows([made("full", 0.3, (5.0, 3.0))]), (0.1,))
    assert "Adam" not in "".join(lines) and len(lines) == 3


def test_marks():
    assert marks(1) == {1} and marks(4) == {1, 2, 3, 4}
    assert max(marks(500)) == 500 and {1, 2, 3, 5} < marks(500) and len(marks(500)) < 40
