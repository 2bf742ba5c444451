"""The static structure against networkx and brute force."""

from __future__ import annotations

import dataclasses
import json
from itertools import combinations
from pathlib import Path

import networkx as nx
import pytest
from cases import CASES

import pyronat
from pyronat.blocks import ParamBlock, UnitAxes
from pyronat.graph import BayesNet, District, Edge, Site


def site(name: str, kind: str = "latent", params: tuple[str, ...] = ()) -> Site:
    return Site(name, kind, "Normal", (), (), 0, params)  # type: ignore[arg-type]


def net_of(graph: nx.DiGraph, observed: frozenset[str] = frozenset()) -> BayesNet:
    order = list(nx.topological_sort(graph))
    sites = (
        site(name, "observed" if name in observed else "latent", (f"p.{name}",)) for name in order
    )
    return BayesNet(tuple(sites), tuple(Edge(a, b, "data") for a, b in graph.edges), ())


def random_dag(seed: int, size: int = 8, probability: float = 0.3) -> nx.DiGraph:
    undirected = nx.gnp_random_graph(size, probability, seed=seed, directed=True)
    graph = nx.DiGraph()
    graph.add_nodes_from(f"s{i}" for i in range(size))
    graph.add_edges_from((f"s{a}", f"s{b}") for a, b in undirected.edges if a < b)
    return graph


SEEDS = range(20)


def observed_of(seed: int, graph: nx.DiGraph) -> frozenset[str]:
    return frozenset(name for i, name in enumerate(sorted(graph)) if (seed * 7 + i * i) % 3 == 0)


# --- relations ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_markov_blanket_separates_and_is_minimal(seed: int) -> None:
    graph = random_dag(seed)
    net = net_of(graph)
    for name in graph:
        blanket = net.markov_blanket(name)
        rest = set(graph) - blanket - {name}
        assert not rest or nx.is_d_separator(graph, {name}, rest, set(blanket))
        for member in blanket:
            smaller = set(blanket) - {member}
            assert not nx.is_d_separator(graph, {name}, rest | {member}, smaller)


@pytest.mark.parametrize("seed", SEEDS)
def test_markov_blanket_is_the_neighborhood_of_the_moral_graph(seed: int) -> None:
    graph = random_dag(seed)
    net = net_of(graph)
    moral, expected = net.moral_graph(), nx.moral_graph(graph)
    assert set(moral) == set(expected)
    assert set(map(frozenset, moral.edges)) == set(map(frozenset, expected.edges))
    for name in graph:
        assert net.markov_blanket(name) == set(moral.neighbors(name))


def test_random_graphs_are_interesting() -> None:
    # A table of graphs without colliders or blankets would test nothing.
    graphs = [random_dag(seed) for seed in SEEDS]
    assert any(graph.in_degree(name) >= 2 for graph in graphs for name in graph)
    married = [len(nx.moral_graph(graph).edges) - len(graph.edges) for graph in graphs]
    assert sum(count > 0 for count in married) > len(graphs) / 2
    sizes = {
        len(net_of(g, observed_of(s, g)).districts) for s, g in zip(SEEDS, graphs, strict=True)
    }
    assert len(sizes) > 2


def districts_by_force(graph: nx.DiGraph, observed: frozenset[str]) -> set[frozenset[str]]:
    """Families {child, parents} that share a hidden variable, joined until nothing changes."""
    hidden = {
        name: frozenset(v for v in {name, *graph.predecessors(name)} if v not in observed)
        for name in graph
    }
    groups = [{name} for name in graph]
    changed = True
    while changed:
        changed = False
        for a, b in combinations(groups, 2):
            if any(hidden[x] & hidden[y] for x in a for y in b):
                groups = [group for group in groups if group not in (a, b)] + [a | b]
                changed = True
                break
    return set(map(frozenset, groups))


@pytest.mark.parametrize("seed", SEEDS)
def test_districts_by_brute_force(seed: int) -> None:
    graph = random_dag(seed, size=7)
    observed = observed_of(seed, graph)
    net = net_of(graph, observed)
    assert {frozenset(d.sites) for d in net.districts} == districts_by_force(graph, observed)
    for district in net.districts:
        assert district.sites == tuple(sorted(district.sites))
        assert set(district.hidden) == set(district.sites) - observed
        assert district.params == tuple(sorted(f"p.{name}" for name in district.sites))


def test_districts_without_hidden_sites_are_families() -> None:
    graph = random_dag(3)
    net = net_of(graph, frozenset(graph))
    assert all(len(district.sites) == 1 and district.hidden == () for district in net.districts)


@pytest.mark.parametrize("seed", SEEDS)
def test_parents_and_children(seed: int) -> None:
    graph = random_dag(seed)
    net = net_of(graph)
    for name in graph:
        assert net.parents(name) == set(graph.predecessors(name))
        assert net.children(name) == set(graph.successors(name))
        assert isinstance(net.parents(name), frozenset)
    assert set(net.graph.edges) == set(graph.edges)


def test_unknown_site() -> None:
    with pytest.raises(nx.NetworkXError, match="nowhere"):
        net_of(random_dag(0)).parents("nowhere")


# --- a net by hand -----------------------------------------------------------------------------


def by_hand() -> BayesNet:
    block = ParamBlock(
        params=("W", "b"),
        sites=("x",),
        structure="unit",
        count=2,
        size=3,
        exact=True,
        factors=(("x", "logits"),),
        linear=(True,),
        shapes=((2, 2), (2,)),
        units=UnitAxes(((0,), (0,))),
    )
    guide = BayesNet((site('q "z"'),), (), ())
    return BayesNet(
        sites=(
            site("z", params=("p",)),
            Site("x", "observed", "Bernoulli", ("data",), (5, 2), 1, ("W", "b"), ("y",)),
            site("y"),
        ),
        edges=(Edge("z", "x", "data"), Edge("z", "y", "control")),
        blocks=(block,),
        without_fisher=(("unused", "reaches no random site"),),
        guide=guide,
    )


def test_graph_attributes() -> None:
    net = by_hand()
    assert net.graph.nodes["x"] == {
        "kind": "observed",
        "family": "Bernoulli",
        "plates": ("data",),
        "shape": (5, 2),
        "event_dim": 1,
        "params": ("W", "b"),
        "reads_data": ("y",),
        "coupled_plates": (),
        "elements": 1,
    }
    assert net.graph.edges["z", "x"] == {"kind": "data"}
    assert net.graph.edges["z", "y"] == {"kind": "control"}
    assert list(net.graph) == ["z", "x", "y"]
    assert net.params == ("W", "b", "unused")
    assert net.blocks[0].name == "W, b"


def test_json() -> None:
    net = by_hand()
    content = json.loads(net.to_json())
    assert list(content) == ["sites", "edges", "blocks", "districts", "without_fisher", "guide"]
    assert content["sites"][1]["shape"] == [5, 2]
    assert content["edges"][1] == {"parent": "z", "child": "y", "kind": "control"}
    assert content["blocks"][0]["params"] == ["W", "b"]
    assert content["without_fisher"] == [["unused", "reaches no random site"]]
    assert content["guide"]["sites"][0]["name"] == 'q "z"' and content["guide"]["guide"] is None
    assert net.to_json() == by_hand().to_json()
    assert json.loads(dataclasses.replace(net, edges=()).to_json()) != content


def test_dot() -> None:
    lines = by_hand().to_dot().splitlines()
    assert lines[0] == "digraph {" and lines[-1] == "}"
    assert [line for line in lines if "lightgray" in line] == [
        '  "x" [label="x\\nBernoulli", style=filled, fillcolor="lightgray"];'
    ]
    assert '  "z" -> "x";' in lines
    assert '  "z" -> "y" [style=dashed];' in lines
    quoted = BayesNet((site('a "b"'),), (), ()).to_dot()
    assert r'"a \"b\"" [label="a \"b\"\nNormal"]' in quoted


def test_report() -> None:
    text = str(by_hand())
    assert "Sites (3)" in text and "5 × 2" in text and "2 of 3 × 3" in text
    assert "without a Fisher: unused (reaches no random site)" in text
    assert text.index("Guide") < text.index('q "z"')
    assert not any(line != line.rstrip() for line in text.splitlines())


@pytest.mark.parametrize("case", [*CASES[:3], CASES[8]], ids=str)
def test_plot_writes_a_picture(case: object, tmp_path: Path) -> None:
    net = pyronat.analyze(case.model, *case.args)  # type: ignore[attr-defined]
    path = tmp_path / "net.png"
    net.plot(str(path))
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) > 2000


# --- immutability ------------------------------------------------------------------------------


def test_hashable_and_equal() -> None:
    assert hash(by_hand()) == hash(by_hand()) and by_hand() == by_hand()
    changed = dataclasses.replace(by_hand(), edges=())
    assert changed != by_hand()
    assert len({by_hand(), by_hand(), changed}) == 2


def test_caches_do_not_enter_equality() -> None:
    fresh, used = by_hand(), by_hand()
    assert used.graph and used.districts and used.params
    assert fresh == used and hash(fresh) == hash(used)
    assert fresh.to_json() == used.to_json()


@pytest.mark.parametrize(
    "thing",
    [by_hand(), *by_hand().sites, *by_hand().edges, *by_hand().blocks, *by_hand().districts],
    ids=lambda thing: type(thing).__name__,
)
def test_frozen(thing: object) -> None:
    hash(thing)
    field = dataclasses.fields(thing)[0].name  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(thing, field, None)
    assert isinstance(thing, (BayesNet, Site, Edge, ParamBlock, District))
