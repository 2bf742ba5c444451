"""From numbered parameter entries to blocks and back, and the union of networks."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations, pairwise

import networkx as nx
import pytest
import torch
from cases import CASES, Case
from programs import X, guide, model
from torch import Tensor

import pyronat
from pyronat.blocks import ParamBlock, UnitAxes, UnitEntries
from pyronat.errors import StructureChanged
from pyronat.graph import BayesNet, Edge, Site
from pyronat.operators import AxesLayout, EntriesLayout
from pyronat.partition import FactorStructure, blocks_of, components_of, layout_of, union

Partition = frozenset[frozenset[tuple[str, int]]]


def partition(components: Mapping[str, Tensor]) -> Partition:
    """Sets of entries of equal numbers."""
    units: dict[int, set[tuple[str, int]]] = {}
    for name, number in components.items():
        for place, unit in enumerate(number.flatten().tolist()):
            if unit >= 0:
                units.setdefault(unit, set()).add((name, place))
    return frozenset(map(frozenset, units.values()))


def factor(site: str, *params: str, group: str = "loc") -> FactorStructure:
    return FactorStructure(
        site=site, group=group, params=params, exact=True, plates=(), unit_axes=None
    )


def blocks(components: Mapping[str, Tensor]) -> tuple[ParamBlock, ...]:
    return blocks_of(components, [factor("x", *sorted(components))], ["x"])


def rows(count: int, *shape: int, start: int = 0) -> Tensor:
    """Numbers along the first axis."""
    number = torch.arange(start, start + count)
    return number.reshape(count, *[1] * len(shape)).expand(count, *shape).clone()


# --- forms of units ------------------------------------------------------------------------------


def test_rows_and_biases() -> None:
    (block,) = blocks({"W": rows(3, 4), "b": rows(3)})
    assert block.units == UnitAxes(((0,), (0,)))
    assert (block.structure, block.count, block.size) == ("unit", 3, 5)
    assert isinstance(layout_of(block), AxesLayout)


def test_columns() -> None:
    (block,) = blocks({"W": rows(3, 4).T.clone(), "b": rows(3)})
    assert block.units == UnitAxes(((1,), (0,)))
    assert (block.count, block.size) == (3, 5)


def test_several_axes() -> None:
    number = torch.arange(6).reshape(2, 1, 3).expand(2, 4, 3).clone()
    (block,) = blocks({"W": number, "b": torch.arange(6).reshape(2, 3)})
    assert block.units == UnitAxes(((0, 2), (0, 1)))
    assert (block.count, block.size) == (6, 5)


def test_one_unit_of_everything() -> None:
    (block,) = blocks({"W": torch.full((2, 3), 7), "b": torch.full((4,), 7)})
    assert block.units == UnitAxes(((), ()))
    assert (block.structure, block.count, block.size) == ("dense", 1, 10)


def test_every_entry_by_itself() -> None:
    (block,) = blocks({"W": torch.arange(6).reshape(2, 3)})
    assert block.units == UnitAxes(((0, 1),))
    assert (block.count, block.size) == (6, 1)


def test_axes_of_size_one_number_nothing() -> None:
    (block,) = blocks({"W": rows(3, 1), "b": rows(3)})
    assert block.units == UnitAxes(((0,), (0,)))
    (block,) = blocks({"W": rows(1, 4), "b": torch.zeros(1, dtype=torch.int64)})
    assert block.units == UnitAxes(((), ()))
    (block,) = blocks({"c": torch.tensor(3)})
    assert (block.units, block.count, block.size) == (UnitAxes(((),)), 1, 1)


def test_parameters_without_common_units_are_blocks_of_their_own() -> None:
    found = blocks({"W": rows(3, 4), "b": rows(3, start=3), "c": rows(2, start=6)})
    assert [(block.params, block.count, block.size) for block in found] == [
        (("W",), 3, 4),
        (("b",), 3, 1),
        (("c",), 2, 1),
    ]


def test_entries_that_reach_no_site_stay_with_their_row() -> None:
    number = rows(3, 4)
    number[:, 2] = -1
    number[1, 0] = -1
    (block,) = blocks({"W": number, "b": rows(3)})
    assert block.units == UnitAxes(((0,), (0,)))
    assert block.size == 5
    assert torch.equal(components_of([block])["W"], rows(3, 4))


def test_a_row_that_reaches_no_site_is_a_unit() -> None:
    number = rows(3, 4)
    number[1] = -1
    (block,) = blocks({"W": number, "b": rows(3)})
    assert block.units == UnitAxes(((0,), (0,)))
    assert (block.count, block.size) == (3, 5)
    assert partition(components_of([block])) == partition({"W": rows(3, 4), "b": rows(3)})


def test_parameters_that_reach_no_site_have_no_block() -> None:
    assert blocks({"W": torch.full((2, 2), -1)}) == ()
    (block,) = blocks({"W": torch.full((2, 2), -1), "b": rows(2)})
    assert block.params == ("b",)


def test_units_in_another_order_are_listed() -> None:
    numbers = {"W": rows(3, 4), "b": torch.tensor([2, 0, 1])}
    (block,) = blocks(numbers)
    assert isinstance(block.units, UnitEntries)
    assert (block.count, block.size) == (3, 5)
    assert isinstance(layout_of(block), EntriesLayout)
    assert block.units.entries == ((0, 1, 2, 3, 13), (4, 5, 6, 7, 14), (8, 9, 10, 11, 12))
    assert partition(components_of([block])) == partition(numbers)
    # Negative control: in the same order they are rows.
    (aligned,) = blocks({**numbers, "b": rows(3)})
    assert isinstance(aligned.units, UnitAxes)


def test_units_of_several_sizes_in_one_parameter() -> None:
    numbers = {"a": torch.tensor([0, 0, 1, 2, 2, 3, 3, 3, -1])}
    found = blocks(numbers)
    assert [(block.count, block.size) for block in found] == [(1, 1), (2, 2), (1, 3)]
    assert len({block.name for block in found}) == 3
    merged = partition(components_of(found))
    assert merged == partition(numbers)


def test_units_of_several_sets_of_parameters() -> None:
    numbers = {
        "a": torch.tensor([0, 1, 2, 3]),
        "b": torch.tensor([[0, 5], [1, 6]]),
        "c": torch.tensor([2, 0]),
    }
    found = blocks(numbers)
    assert [(block.params, block.count, block.size) for block in found] == [
        (("a",), 1, 1),
        (("a", "b"), 1, 2),
        (("a", "b", "c"), 1, 3),
        (("a", "c"), 1, 2),
        (("b",), 2, 1),
    ]
    assert partition(components_of(found)) == partition(numbers)


def test_blocks_name_the_sites_that_read_them() -> None:
    numbers = {"W": rows(3, 4), "b": rows(3), "s": rows(2, start=3)}
    factors = [factor("y", "W", "b"), factor("x", "b"), factor("x", "s", group="scale")]
    found = blocks_of(numbers, factors, ["x", "y"])
    assert [(block.params, block.sites) for block in found] == [
        (("W", "b"), ("x", "y")),
        (("s",), ("x",)),
    ]
    assert set(found[0].factors) == {("y", "loc"), ("x", "loc")}


# --- round trips ---------------------------------------------------------------------------------


def random_components(seed: int, wild: bool = False) -> dict[str, Tensor]:
    """Numbers for parameters of fixed shapes: coarse, fine, by rows, or without order."""
    generator = random.Random(seed)
    shapes = {"a": (2, 3), "b": (3,), "c": (2, 2, 2), "d": ()}
    numbers = {}
    for name, shape in shapes.items():
        kind = generator.choice(["any", "any", "rows", "one", "absent"])
        size = torch.Size(shape).numel()
        most = generator.choice([2, 4, 20])
        if kind == "absent":
            continue
        if kind == "any" or not shape:
            found = torch.tensor([generator.randrange(most) for _ in range(size)]).reshape(shape)
        elif kind == "rows":
            found = rows(shape[0], *shape[1:], start=generator.randrange(4))
        else:
            found = torch.full(shape, generator.randrange(4))
        if wild:
            hidden = torch.tensor([generator.random() < 0.2 for _ in range(size)]).reshape(shape)
            found = torch.where(hidden, torch.full_like(found, -1), found)
        numbers[name] = found
    return numbers


@pytest.mark.parametrize("seed", range(40))
def test_blocks_hold_every_unit(seed: int) -> None:
    numbers = random_components(seed)
    found = blocks(numbers)
    assert partition(components_of(found)) == partition(numbers)
    assert sum(block.num_entries for block in found) == sum(n.numel() for n in numbers.values())
    assert len({block.name for block in found}) == len(found)
    assert list(found) == sorted(found, key=lambda block: (block.params, block.size))


@pytest.mark.parametrize("seed", range(40))
def test_entries_without_a_unit_join_no_units(seed: int) -> None:
    numbers = random_components(seed, wild=True)
    found = components_of(blocks(numbers))
    known = {
        name: torch.where(number >= 0, found.get(name, number), number)
        for name, number in numbers.items()
    }
    assert partition(known) == partition(numbers)


def test_random_partitions_are_of_all_forms() -> None:
    """Negative control of the two tests above."""
    found = [block for seed in range(40) for block in blocks(random_components(seed))]
    kinds = {type(block.units) for block in found}
    assert kinds == {UnitAxes, UnitEntries}
    assert any(len(block.params) > 2 for block in found)
    assert any(block.count > 1 and block.size > 1 for block in found)


@pytest.mark.parametrize("seed", range(20))
def test_layouts_pack_and_unpack(seed: int) -> None:
    numbers = random_components(seed)
    values = {name: torch.randn(number.shape) for name, number in numbers.items()}
    total = {name: torch.zeros_like(value) for name, value in values.items()}
    for block in blocks(numbers):
        layout = layout_of(block)
        packed = layout.pack(values)
        assert packed.shape == (block.count, block.size)
        for name, part in layout.unpack(packed).items():
            total[name] += part
        assert sorted(layout.positions().flatten().tolist()) == sorted(
            set(layout.positions().flatten().tolist())
        )
        # A unit is one component.
        for unit in layout.pack({name: number for name, number in numbers.items()}):
            assert len(unit.unique()) == 1
    assert all(torch.equal(total[name], values[name]) for name in values)


# --- unions --------------------------------------------------------------------------------------


def network(
    numbers: Mapping[str, Tensor], names: Sequence[str] = ("x",), **options: str
) -> BayesNet:
    """Sites that read all parameters, in a chain of edges."""
    sites = tuple(
        Site(
            name=name,
            kind="latent",
            family=options.get("family", "Normal"),
            plates=("data",),
            shape=(3,),
            event_dim=1,
            params=tuple(sorted(numbers)),
        )
        for name in names
    )
    factors = [factor(name, *sorted(numbers)) for name in names]
    factors = [replace(one, plates=("data",)) for one in factors]
    return BayesNet(
        sites=sites,
        edges=tuple(Edge(a, b, "data") for a, b in pairwise(names)),
        blocks=blocks_of(numbers, factors, list(names)),
        without_fisher=(),
    )


def joined(*many: Mapping[str, Tensor]) -> Partition:
    """What networkx says: entries that share a unit in one of several partitions."""
    graph = nx.Graph()
    for numbers in many:
        for unit in partition(numbers):
            first, *rest = sorted(unit)
            graph.add_node(first)
            graph.add_edges_from((first, other) for other in rest)
    return frozenset(map(frozenset, nx.connected_components(graph)))


def units_of(block: ParamBlock) -> object:
    """Units in any order."""
    listed = isinstance(block.units, UnitEntries)
    return frozenset(block.units.entries) if listed else block.units


def shape_of(net: BayesNet) -> tuple[object, ...]:
    """What does not depend on the order of sites."""
    return (
        frozenset(replace(site, shape=()) for site in net.sites),
        frozenset(net.edges),
        partition(components_of(net.blocks)),
        frozenset(
            (b.params, b.structure, b.count, b.size, b.exact, units_of(b), frozenset(b.factors))
            for b in net.blocks
        ),
        net.without_fisher,
    )


@pytest.mark.parametrize("seed", range(40))
def test_union_of_random_partitions(seed: int) -> None:
    first, second = random_components(seed), random_components(1000 + seed)
    found = union(network(first), network(second))
    assert partition(components_of(found.blocks)) == joined(first, second)


def test_unions_are_coarser_than_either_part() -> None:
    """Negative control: the units of the union are those of neither part alone."""
    pairs = [(random_components(seed), random_components(1000 + seed)) for seed in range(40)]
    assert sum(joined(a, b) not in {partition(a), partition(b)} for a, b in pairs) > 12


@pytest.mark.parametrize("seed", range(20))
def test_union_is_commutative(seed: int) -> None:
    first = network(random_components(seed), ["x", "y"])
    second = network(random_components(1000 + seed), ["y", "z"], family="LogNormal")
    one, two = union(first, second), union(second, first)
    assert shape_of(one) == shape_of(two)
    assert [site.name for site in one.sites] == ["x", "y", "z"]
    assert [site.name for site in two.sites] == ["y", "z", "x"]
    assert {site.name: site.family for site in one.sites} == {
        "x": "Normal",
        "y": "LogNormal | Normal",
        "z": "LogNormal",
    }


@pytest.mark.parametrize("seed", range(12))
def test_union_is_associative(seed: int) -> None:
    many = [random_components(1000 * i + seed) for i in range(3)]
    a, b, c = (
        network(numbers, names)
        for numbers, names in zip(many, (["x"], ["x", "y"], ["z", "y"]), strict=True)
    )
    orders = [(a, b, c), (c, b, a), (b, a, c)]
    found = {shape_of(union(union(*order[:2]), order[2])) for order in orders}
    found |= {shape_of(union(order[0], union(*order[1:]))) for order in orders}
    assert len(found) == 1
    assert partition(components_of(union(union(a, b), c).blocks)) == joined(*many)


@pytest.mark.parametrize("seed", range(20))
def test_union_is_idempotent(seed: int) -> None:
    net = network(random_components(seed), ["x", "y"])
    assert union(net, net) == net
    other = union(net, network(random_components(1000 + seed), ["y", "z"]))
    assert union(other, other) == other
    assert shape_of(union(other, net)) == shape_of(union(net, other)) == shape_of(other)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_union_with_itself_is_the_network_itself(case: Case) -> None:
    """With linear units, plates, and parameters without a Fisher information."""
    net = pyronat.analyze(case.model, *case.args)
    assert union(net, net) == net


def test_linear_units_stay_linear_where_both_agree() -> None:
    net = pyronat.analyze(model, X)
    (block,) = [block for block in net.blocks if block.params == ("W", "b")]
    assert block.linear == (True,)
    listed = replace(net, blocks=tuple(replace(b, linear=(False,)) for b in net.blocks))
    for pair in ((net, listed), (listed, net)):
        assert not any(any(block.linear) for block in union(*pair).blocks)
    assert any(any(block.linear) for block in union(net, net).blocks)


def test_union_of_other_shapes_is_refused() -> None:
    with pytest.raises(StructureChanged, match=r"'W' has changed its shape from \(3, 4\) to"):
        union(network({"W": rows(3, 4)}), network({"W": rows(4, 3)}))


def test_union_keeps_what_only_one_part_has() -> None:
    one = replace(network({"a": rows(3)}), without_fisher=(("b", "reaches no random site"),))
    two = network({"b": rows(2)}, ["y"])
    found = union(one, two)
    assert found.without_fisher == ()
    assert found.params == ("a", "b")
    assert union(one, one).without_fisher == one.without_fisher
    observed = replace(two, sites=tuple(replace(site, kind="observed") for site in two.sites))
    assert {site.kind for site in union(two, observed).sites} == {"observed"}


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_networks_come_back_from_files(case: Case) -> None:
    net = pyronat.analyze(case.model, *case.args, guide=case.guide)
    again = BayesNet.from_json(net.to_json())
    assert again == net and hash(again) == hash(net)
    assert again.to_json() == net.to_json()


@pytest.mark.parametrize("seed", range(20))
def test_listed_units_come_back_from_files(seed: int) -> None:
    net = network(random_components(seed), ["x", "y"])
    net = replace(
        net,
        guide=network(random_components(1000 + seed)),
        without_fisher=(("unused", "reaches no random site"),),
        sites=tuple(replace(s, reads_data=("y",), coupled_plates=("data",)) for s in net.sites),
    )
    again = BayesNet.from_json(net.to_json())
    assert again == net
    for one, two in zip(again.blocks, net.blocks, strict=True):
        assert type(one.units) is type(two.units)
        assert layout_of(one) == layout_of(two)


def test_networks_that_differ_come_back_different() -> None:
    """Negative control of the comparison."""
    nets = [network(random_components(seed)) for seed in range(6)]
    nets += [pyronat.analyze(model, X), pyronat.analyze(model, X, guide=guide)]
    again = [BayesNet.from_json(net.to_json()) for net in nets]
    assert all(a != b for a, b in combinations(again, 2))
    assert again[-1].guide == pyronat.analyze(guide, X)
