"""`pyronat.analyze` against the truth table: exact, or coarser where that is documented."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import networkx as nx
import pyro
import pyro.distributions as dist
import pytest
import torch
from structure_programs import ROWS, Block, Row
from torch import Tensor

import pyronat
from pyronat import testing
from pyronat.graph import BayesNet

EXACT = 141
"""Rows whose blocks, edges and coupled plates are known to be exact; may only grow."""

Entries = dict[tuple[str, int], int]
"""The block of every parameter entry that is in one."""


@pytest.fixture(params=ROWS, ids=str)
def row(request: pytest.FixtureRequest) -> Row:
    return request.param


@cache
def analyzed(row: Row) -> tuple[BayesNet, Mapping[str, tuple[int, ...]]]:
    """The net of a row, and the shapes of the unconstrained parameters."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    net = pyronat.analyze(row.model, *row.args())
    store = pyro.get_param_store()
    return net, {name: tuple(leaf.shape) for name, leaf in store.named_parameters()}


# --- partitions ---------------------------------------------------------------------------------


def numbered(units: Mapping[str, Tensor]) -> Entries:
    return {
        (name, entry): unit
        for name, tensor in units.items()
        for entry, unit in enumerate(tensor.flatten().tolist())
        if unit >= 0
    }


def entries_of(blocks: Sequence[Block], shapes: Mapping[str, tuple[int, ...]]) -> Entries:
    """The partition that a row states; checks that its counts and sizes are those it states."""
    whole: Entries = {}
    for number, block in enumerate(blocks):
        part = numbered({name: block.units(name, shapes[name]) for name in block.names})
        assert Counter(Counter(part.values()).values()) == {block.size: block.count}, block
        assert not whole.keys() & part.keys(), f"{block} overlaps another block"
        whole |= {entry: 1_000_000 * number + unit for entry, unit in part.items()}
    return whole


def idle_entries(blocks: Sequence[Block]) -> set[tuple[str, int]]:
    return {
        (name, entry)
        for block in blocks
        for name, mask in block.idle.items()
        for entry, idle in enumerate(torch.tensor(mask).flatten().tolist())
        if idle
    }


def within(fine: Entries, coarse: Entries) -> bool:
    """Whether every unit of `fine` lies in one unit of `coarse`."""
    image: dict[int, int] = {}
    return all(
        entry in coarse and image.setdefault(unit, coarse[entry]) == coarse[entry]
        for entry, unit in fine.items()
    )


def found_entries(net: BayesNet) -> Entries:
    return numbered(testing.entry_blocks(net))


def blocks_are_exact(row: Row) -> bool:
    net, shapes = analyzed(row)
    truth, found, idle = (
        entries_of(row.blocks, shapes),
        found_entries(net),
        idle_entries(row.blocks),
    )
    busy = {entry: unit for entry, unit in truth.items() if entry not in idle}
    return within(busy, found) and within(found, truth)


def edges_of(net: BayesNet, kind: str) -> dict[str, set[str]]:
    parents: dict[str, set[str]] = {site.name: set() for site in net.sites}
    for edge in net.edges:
        if edge.kind == kind:
            parents[edge.child].add(edge.parent)
    return parents


def edges_are_exact(row: Row) -> bool:
    net, _ = analyzed(row)
    return edges_of(net, "data") == row.edges and edges_of(net, "control") == row.control


def coupled_are_exact(row: Row) -> bool:
    net, _ = analyzed(row)
    return all(set(site.coupled_plates) == set(row.coupled[site.name]) for site in net.sites)


# --- the table ----------------------------------------------------------------------------------


def test_names_are_unique() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)


def test_sites(row: Row) -> None:
    net, _ = analyzed(row)
    assert sorted(site.name for site in net.sites) == sorted(row.edges)


def test_edges(row: Row) -> None:
    net, _ = analyzed(row)
    if not row.loose:
        assert edges_of(net, "data") == row.edges
        assert edges_of(net, "control") == row.control
        return
    for site in net.sites:
        assert net.parents(site.name) >= row.edges[site.name] | row.control[site.name]


def test_params(row: Row) -> None:
    net, _ = analyzed(row)
    found = {site.name: frozenset(site.params) for site in net.sites}
    if not row.coarser:
        assert found == row.params
    assert all(found[site] >= params for site, params in row.params.items())


def test_blocks(row: Row) -> None:
    net, shapes = analyzed(row)
    truth, found = entries_of(row.blocks, shapes), found_entries(net)
    busy = {entry: unit for entry, unit in truth.items() if entry not in idle_entries(row.blocks)}
    assert within(busy, found), "finer than the truth, which is unsound"
    if not row.coarser:
        assert within(found, truth), "coarser than the truth"
    elif row.coarse is not None and not blocks_are_exact(row):
        assert within(found, entries_of(row.coarse, shapes)), "coarser than what is documented"


def test_blocks_are_those_of_their_entries(row: Row) -> None:
    # (params, count, size) of the report say the same as the map of entries, and as the table.
    net, _ = analyzed(row)
    units: dict[int, Counter[str]] = {}
    for (name, _), unit in found_entries(net).items():
        units.setdefault(unit, Counter())[name] += 1
    counted = Counter((frozenset(unit), unit.total()) for unit in units.values())
    reported: Counter[tuple[frozenset[str], int]] = Counter()
    for block in net.blocks:
        reported[frozenset(block.params), block.size] += block.count
    assert reported == counted
    stated: Counter[tuple[frozenset[str], int]] = Counter()
    for given in row.blocks:
        stated[frozenset(given.names), given.size] += given.count
    if not row.coarser and not idle_entries(row.blocks):
        assert reported == stated


def test_blocks_name_their_sites(row: Row) -> None:
    net, _ = analyzed(row)
    owners = {site.name: set(site.params) for site in net.sites}
    for block in net.blocks:
        assert block.sites
        if not row.coarser:
            assert all(owners[site] & set(block.params) for site in block.sites)
            assert set(block.params) <= set().union(*(owners[site] for site in block.sites))
        assert len(block.shapes) == len(block.params)


def test_parameters_without_a_block_are_reported(row: Row) -> None:
    net, shapes = analyzed(row)
    owned = {name for block in net.blocks for name in block.params}
    assert {name for name, _ in net.without_fisher} == set(shapes) - owned


def test_districts(row: Row) -> None:
    net, _ = analyzed(row)
    found = frozenset(frozenset(district.sites) for district in net.districts)
    if not row.loose:
        assert found == row.districts
    assert all(any(district <= other for other in found) for district in row.districts)


def test_coupled_plates(row: Row) -> None:
    net, _ = analyzed(row)
    if not row.loose:
        assert coupled_are_exact(row)
    assert all(set(site.coupled_plates) >= set(row.coupled[site.name]) for site in net.sites)
    assert all(set(site.coupled_plates) <= set(site.plates) for site in net.sites)


def test_replicates(row: Row) -> None:
    net, _ = analyzed(row)
    found = {site: district.replicates for district in net.districts for site in district.sites}
    for site, plates in row.replicates.items():
        assert set(found[site]) <= set(plates)
        assert row.loose or set(found[site]) == set(plates)


def test_analysis_is_deterministic(row: Row) -> None:
    net, _ = analyzed(row)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    again = pyronat.analyze(row.model, *row.args())
    assert again == net and hash(again) == hash(net)
    assert again.to_json() == net.to_json()


def test_number_of_exact_rows() -> None:
    inexact = [row.name for row in ROWS if not _is_exact(row)]
    assert len(ROWS) - len(inexact) >= EXACT, f"not exact: {', '.join(inexact)}"


def _is_exact(row: Row) -> bool:
    try:
        return blocks_are_exact(row) and edges_are_exact(row) and coupled_are_exact(row)
    except Exception:
        return False


# --- the helpers themselves ---------------------------------------------------------------------


def test_finer_coarser_and_exact_are_told_apart() -> None:
    rows = {("w", entry): entry // 3 for entry in range(6)}
    joint = dict.fromkeys(rows, 7)
    single = {entry: index for index, entry in enumerate(rows)}
    columns = {("w", entry): entry % 3 for entry in range(6)}
    assert within(rows, joint) and within(single, rows) and within(rows, rows)
    assert not within(joint, rows) and not within(rows, single)
    assert not within(rows, columns) and not within(columns, rows)
    assert not within(rows, {entry: unit for entry, unit in rows.items() if entry[1] < 5})


# --- d-separation -------------------------------------------------------------------------------


def random_net(seed: int, size: int = 7) -> tuple[nx.DiGraph, Tensor, BayesNet]:
    """A linear-Gaussian program on a random graph: its graph, weights and analysis."""
    generator = random.Random(seed)
    weights = torch.zeros(size, size)
    for parent, child in itertools.combinations(range(size), 2):
        if generator.random() < 0.35:
            weights[child, parent] = generator.choice([-1, 1]) * generator.uniform(0.5, 1.5)
    graph = nx.DiGraph()
    graph.add_nodes_from(range(size))
    graph.add_edges_from((int(parent), int(child)) for child, parent in weights.nonzero())

    def model() -> None:
        values: list[Any] = []
        for child in range(size):
            parents = list(graph.predecessors(child))
            loc = sum((weights[child, p] * values[p] for p in parents), torch.zeros(()))
            values.append(pyro.sample(f"s{child}", dist.Normal(loc, 1.0)))

    return graph, weights, pyronat.analyze(model)


def names(nodes: Sequence[int]) -> set[str]:
    return {f"s{node}" for node in nodes}


@pytest.mark.parametrize("seed", range(6))
def test_d_separation_in_random_graphs(seed: int) -> None:
    graph, weights, net = random_net(seed)
    expected = {(f"s{a}", f"s{b}") for a, b in graph.edges}
    assert {(edge.parent, edge.child) for edge in net.edges} == expected
    # For weights in general position, d-separation is vanishing partial covariance.
    size = len(graph)
    mixing = torch.linalg.inv(torch.eye(size) - weights)
    covariance = mixing @ mixing.T
    generator = random.Random(seed)
    outcomes = set()
    for _ in range(60):
        nodes = generator.sample(range(size), size)
        cuts = sorted(generator.sample(range(1, size), 2))
        x, y, given = nodes[:1], nodes[1 : cuts[0] + 1], nodes[cuts[0] + 1 : cuts[1] + 1]
        separated = net.d_separated(names(x), names(y), names(given))
        assert separated == nx.is_d_separator(graph, set(x), set(y), set(given))
        assert separated == net.d_separated(names(y), names(x), names(given))
        cross = covariance[x][:, y]
        if given:
            regression = torch.linalg.solve(covariance[given][:, given], covariance[given][:, y])
            cross = cross - covariance[x][:, given] @ regression
        assert separated == (cross.abs().max().item() < 1e-9)
        outcomes.add(separated)
    assert outcomes == {True, False}


def test_d_separation_of_chain_fork_and_collider() -> None:
    def model() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        c = pyro.sample("c", dist.Normal(a + b, 1.0))
        d = pyro.sample("d", dist.Normal(c, 1.0))
        pyro.sample("e", dist.Normal(c, 1.0))
        pyro.sample("f", dist.Normal(d, 1.0))

    net = pyronat.analyze(model)
    assert net.d_separated({"a"}, {"b"}, set())
    assert not net.d_separated({"a"}, {"b"}, {"c"})
    assert not net.d_separated({"a"}, {"b"}, {"f"})  # a descendant of the collider
    assert not net.d_separated({"d"}, {"e"}, set())
    assert net.d_separated({"d"}, {"e"}, {"c"})
    assert net.d_separated({"a", "b"}, {"f"}, {"d"})


@pytest.mark.parametrize("seed", range(6))
def test_markov_blanket_separates(seed: int) -> None:
    _, _, net = random_net(seed)
    everything = {site.name for site in net.sites}
    for site in everything:
        blanket = net.markov_blanket(site)
        rest = everything - blanket - {site}
        assert not rest or net.d_separated({site}, rest, blanket)
        for member in blanket:  # and none of it is superfluous
            assert not net.d_separated({site}, {member}, blanket - {member})
