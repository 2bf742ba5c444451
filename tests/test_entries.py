"""Sets of parameter entries against plain Python sets, and the laws of all lattices."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import networkx as nx
import pytest
import torch
from torch import Tensor

from pyronat.entries import EntryGroups, connected_components
from pyronat.lattices import LabelSets, Lattice, Origins, Selection

Partition = frozenset[frozenset[int]]


# --- sets of entries, by hand --------------------------------------------------------------------


@dataclass(frozen=True)
class Chosen:
    """One unknown row: the node of each row, by the number of the position."""

    position: tuple[Any, ...]
    rows: tuple[int, ...]


class Reference:
    """What every node means: an entry, a union of nodes, or a choice among nodes."""

    def __init__(self) -> None:
        self.meaning: dict[int, int | tuple[int, ...] | Chosen | None] = {0: None}

    def name(self, node: int, meaning: Any) -> None:
        """A node is one thing for ever: the lattice may find it again."""
        if node in self.meaning:
            positions = self.positions(node) | self._positions_of(meaning)
            for rows in self.worlds(positions):
                assert self.entries(node, rows) == self._entries_of(meaning, rows)
        else:
            self.meaning[node] = meaning

    def positions(self, node: int) -> frozenset[tuple[Any, ...]]:
        return self._positions_of(self.meaning[node])

    def _positions_of(self, meaning: Any) -> frozenset[tuple[Any, ...]]:
        if isinstance(meaning, Chosen):
            return frozenset({meaning.position}).union(*map(self.positions, meaning.rows))
        if isinstance(meaning, tuple):
            return frozenset().union(*map(self.positions, meaning))
        return frozenset()

    @staticmethod
    def worlds(positions: Iterable[tuple[Any, ...]]) -> Iterable[dict[tuple[Any, ...], int]]:
        """All ways to choose rows; the last part of a position is the number of rows."""
        order = sorted(positions)
        for rows in product(*(range(position[-1]) for position in order)):
            yield dict(zip(order, rows, strict=True))

    def entries(self, node: int, rows: dict[tuple[Any, ...], int]) -> frozenset[int]:
        return self._entries_of(self.meaning[node], rows)

    def _entries_of(self, meaning: Any, rows: dict[tuple[Any, ...], int]) -> frozenset[int]:
        if meaning is None:
            return frozenset()
        if isinstance(meaning, Chosen):
            return self.entries(meaning.rows[rows[meaning.position]], rows)
        if isinstance(meaning, tuple):
            return frozenset().union(*(self.entries(node, rows) for node in meaning))
        return frozenset({meaning})

    def components(self, roots: Sequence[int]) -> Partition:
        """Entries that one root contains at once, whatever rows are chosen, and chains of them."""
        graph = nx.Graph()
        for root in roots:
            for rows in self.worlds(self.positions(root)):
                found = sorted(self.entries(root, rows))
                graph.add_nodes_from(found)
                graph.add_edges_from((found[0], other) for other in found[1:])
        return frozenset(map(frozenset, nx.connected_components(graph)))


INDICES = [torch.full((1,), key) for key in range(200)]
"""Index tensors: the same one chooses alike."""


def components(lattice: EntryGroups, roots: Sequence[int], entries: Sequence[int]) -> Partition:
    numbers, reached = lattice.components(torch.tensor(roots))
    groups: dict[int, set[int]] = {}
    for entry in entries:
        if bool(reached[entry]):
            groups.setdefault(int(numbers[entry]), set()).add(entry)
    return frozenset(map(frozenset, groups.values()))


class Followed:
    """A lattice and its reference, side by side."""

    def __init__(self, count: int) -> None:
        self.lattice, self.reference = EntryGroups(), Reference()
        self.entries = self.lattice.new(count).tolist()
        for entry in self.entries:
            self.reference.name(entry, entry)

    def join(self, first: Tensor, second: Tensor) -> Tensor:
        found = self.lattice.join(first, second)
        left, right = torch.broadcast_tensors(first, second)
        assert found.shape == left.shape
        for node, a, b in zip(*(t.flatten().tolist() for t in (found, left, right)), strict=True):
            self.reference.name(node, (a, b))
        return found

    def join_along(self, shadow: Tensor, dims: Sequence[int]) -> Tensor:
        found = self.lattice.join_along(shadow, dims)
        axes = {dim % (shadow.dim() - 1) + 1 for dim in dims}
        for index in product(*(range(size) for size in found.shape)):
            where = tuple(slice(None) if a in axes else i for a, i in enumerate(index))
            self.reference.name(int(found[index]), tuple(shadow[where].flatten().tolist()))
        return found

    def choose(
        self, table: Tensor, index: Sequence[int], key: int, depends: int | None = None
    ) -> Tensor:
        """`table[index]`, whose rows vary.

        Args:
            table: nodes `[rows, columns]`.
            index: the present positions.
            key: identity of the index.
            depends: node of the index itself.

        Returns:
            A shadow `[1, len(index), columns]`.
        """
        chosen = torch.tensor(index)
        count, columns = len(index), table.shape[1]
        own = None if depends is None else torch.full((1, count, columns), depends)
        selection = Selection(
            dims=(0,),
            move=lambda plane: plane[chosen],
            positions=torch.arange(count).unsqueeze(1).expand(count, columns),
            index=own,
            indices=(INDICES[key],),
        )
        found = self.lattice.select(table.unsqueeze(0), selection)
        assert found.shape == (1, count, columns)
        for place, column in product(range(count), range(columns)):
            one = Chosen((key, place, len(table)), tuple(table[:, column].tolist()))
            node = int(found[0, place, column])
            if depends is None:
                self.reference.name(node, one if any(one.rows) else None)
            else:
                fresh = -len(self.reference.meaning)
                self.reference.meaning[fresh] = one
                self.reference.name(node, (fresh, depends))
        return found

    def check(self, roots: Sequence[int]) -> Partition:
        expected = self.reference.components(roots)
        assert components(self.lattice, roots, self.entries) == expected
        return expected


def shadow(*nodes: int) -> Tensor:
    return torch.tensor([nodes])


# --- unions --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_random_unions(seed: int) -> None:
    generator = random.Random(seed)
    both = Followed(generator.randrange(2, 12))
    known = [*both.entries, 0]

    def some(*shape: int) -> Tensor:
        count = torch.Size(shape).numel()
        drawn = [generator.choice(known) for _ in range(count)]
        return torch.tensor(drawn).reshape(1, *shape)

    for _ in range(generator.randrange(1, 8)):
        kind = generator.randrange(3)
        if kind == 0:
            found = both.join(some(3), some(3))
        elif kind == 1:
            found = both.join(some(2, 1), some(1, 2))
        else:
            dims = generator.choice([(0,), (1,), (-1,), (0, 1), (0, -1)])
            found = both.join_along(some(2, 3), dims)
        known += found.flatten().tolist()
    roots = generator.sample(known, min(len(known), generator.randrange(1, 6)))
    both.check([root for root in roots if root] or [both.entries[0]])


def test_random_unions_are_neither_one_component_nor_all_single() -> None:
    """Negative control of the reference."""
    both = Followed(6)
    a, b, c, *_ = both.entries
    pair = both.join(shadow(a, b), shadow(b, c))
    assert both.check(pair.flatten().tolist()) == {frozenset({a, b, c})}
    assert both.check([int(pair[0, 0]), c]) == {frozenset({a, b}), frozenset({c})}
    assert both.check([a, b]) == {frozenset({a}), frozenset({b})}
    wrong = both.reference.components([int(pair[0, 0])])
    assert components(both.lattice, [a, b], both.entries) != wrong


def test_unions_are_idempotent_and_nothing_is_neutral() -> None:
    both = Followed(4)
    nodes = torch.tensor([both.entries])
    assert torch.equal(both.join(nodes, nodes), nodes)
    assert torch.equal(both.join(nodes, torch.zeros_like(nodes)), nodes)
    assert torch.equal(both.join(torch.zeros_like(nodes), nodes), nodes)
    assert torch.equal(both.lattice.join_along(nodes.expand(4, 4).unsqueeze(0), (0,))[0], nodes)


@pytest.mark.parametrize("dims", [(0,), (1,), (2,), (0, 2), (-1, 0), (0, 1, 2), (-3, 1)])
def test_a_union_along_dimensions_is_that_of_one_by_one(dims: tuple[int, ...]) -> None:
    both = Followed(9)
    generator = random.Random(3)
    nodes = torch.tensor([generator.choice([0, *both.entries]) for _ in range(12)])
    nodes = nodes.reshape(1, 2, 3, 2)
    found = both.join_along(nodes, dims)
    step = nodes
    for dim in dims:
        axis = dim % 3 + 1
        parts = step.split(1, axis)
        step = parts[0]
        for part in parts[1:]:
            step = both.join(step, part)
    assert found.shape == step.shape
    for one, two in zip(found.flatten().tolist(), step.flatten().tolist(), strict=True):
        assert both.reference.entries(one, {}) == both.reference.entries(two, {})


def test_empty_tensors_depend_on_nothing() -> None:
    lattice = EntryGroups()
    lattice.new(3)
    empty = torch.zeros(1, 0, 2, dtype=torch.int64)
    assert lattice.join_along(empty, (0,)).tolist() == [[[0, 0]]]
    assert lattice.join_elements(empty).tolist() == [0]
    assert lattice.join(empty, empty).shape == empty.shape


def test_expanded_tensors_cost_one_node_for_each_distinct_set() -> None:
    both = Followed(2)
    a, b = both.entries
    found = both.join(shadow(a).expand(1, 1000), shadow(b).expand(1, 1000))
    assert len(found.unique()) == 1
    assert len(both.reference.meaning) == 4


# --- choices -------------------------------------------------------------------------------------


def tables(count: int = 1, rows: int = 3, columns: int = 2) -> tuple[Followed, list[Tensor]]:
    both = Followed(count * rows * columns)
    entries = torch.tensor(both.entries).reshape(count, rows, columns)
    return both, list(entries)


def test_columns_of_one_choice_are_coupled_row_by_row() -> None:
    both, (table,) = tables()
    found = both.choose(table, [0, 2], key=1)
    joined = both.join_along(found, (1,))
    expected = both.check(joined.flatten().tolist())
    assert expected == {frozenset(row) for row in table.tolist()}
    assert all(len(unit) == 2 for unit in expected)


def test_choices_alone_couple_nothing() -> None:
    both, (table,) = tables()
    found = both.choose(table, [1], key=1)
    expected = both.check(found.flatten().tolist())
    assert expected == {frozenset({entry}) for entry in both.entries}


def test_rows_that_the_batch_does_not_choose_are_reached() -> None:
    both, (table,) = tables()
    found = both.choose(table, [1], key=1)
    _, reached = both.lattice.components(found.flatten())
    assert bool(reached[torch.tensor(both.entries)].all())
    one = found[0, 0, :1]
    _, reached = both.lattice.components(one)
    assert reached[torch.tensor(both.entries)].reshape(3, 2).tolist() == [[True, False]] * 3


def test_equal_keys_choose_alike() -> None:
    both, (first, second) = tables(2)
    found = [both.choose(table, [0, 1], key=1) for table in (first, second)]
    joined = both.join(*found)
    expected = both.check(joined.flatten().tolist())
    pairs = zip(first.flatten().tolist(), second.flatten().tolist(), strict=True)
    assert expected == {frozenset(pair) for pair in pairs}


def test_different_keys_choose_on_their_own() -> None:
    """Negative control: all rows of one table meet all rows of the other."""
    both, (first, second) = tables(2)
    found = [both.choose(table, [0, 1], key=key) for key, table in enumerate((first, second))]
    joined = both.join(*found)
    expected = both.check(joined.flatten().tolist())
    assert expected == {
        frozenset([*first[:, column].tolist(), *second[:, column].tolist()]) for column in (0, 1)
    }


def test_different_positions_choose_on_their_own() -> None:
    both, (table,) = tables()
    found = both.choose(table, [0, 1], key=1)
    joined = both.join(found[:, :1, :1], found[:, 1:, :1])
    assert both.check(joined.flatten().tolist()) == {frozenset(table[:, 0].tolist())}


def test_equal_keys_of_tables_of_other_lengths_are_not_compared() -> None:
    both = Followed(10)
    first = torch.tensor(both.entries[:4]).reshape(2, 2)
    second = torch.tensor(both.entries[4:]).reshape(3, 2)
    joined = both.join(both.choose(first, [0], key=1), both.choose(second, [0], key=1))
    assert len(both.check(joined.flatten().tolist())) == 2


def test_an_entry_beside_a_choice_meets_all_rows() -> None:
    both, (table, other) = tables(2)
    found = both.choose(table, [0], key=1)
    joined = both.join(found[:, :, :1], other[:1, :1].unsqueeze(0))
    expected = both.check(joined.flatten().tolist())
    assert expected == {frozenset([*table[:, 0].tolist(), int(other[0, 0])])}


def test_mixed_and_pure_contexts_of_one_choice() -> None:
    """Pure in one root, beside an entry in another; the roots share columns."""
    both, (table, other) = tables(2, columns=3)
    found = both.choose(table, [0], key=1)
    pure = both.join(found[:, :, 1:2], found[:, :, 2:])
    mixed = both.join(found[:, :, :1], other[:1, :1].unsqueeze(0))
    expected = both.check([int(pure), int(mixed)])
    assert len(expected) == 4
    chained = both.join(found[:, :, :1], found[:, :, 1:2])
    assert len(both.check([int(pure), int(mixed), int(chained)])) == 1


def test_what_an_index_depends_on_meets_all_rows() -> None:
    both, (table, other) = tables(2)
    found = both.choose(table, [0], key=1, depends=int(other[2, 1]))
    expected = both.check(found.flatten().tolist())
    assert expected == {frozenset([*both.entries[:6], int(other[2, 1])])}


def test_a_choice_out_of_choices_is_all_of_them() -> None:
    """Sound, not exact: the positions of the inner choice are given up."""
    lattice = EntryGroups()
    table = lattice.new(6).reshape(1, 3, 2)

    def selection(key: int) -> Selection:
        place = torch.tensor([0, 1])
        return Selection(
            (0,),
            lambda plane: plane[place],
            torch.arange(2).reshape(2, 1).expand(2, 2),
            None,
            (INDICES[key],),
        )

    once = lattice.select(table, selection(1))
    twice = lattice.select(once, selection(2))
    numbers, reached = lattice.components(twice.flatten())
    entries = table[0]
    assert bool(reached[entries].all())
    for column in (0, 1):
        assert len(numbers[entries[:, column]].unique()) == 1


@pytest.mark.parametrize("seed", range(80))
def test_random_programs_of_unions_and_choices(seed: int) -> None:
    """Full tables of entries and of unions of entries, keys that recur, any order."""
    generator = random.Random(seed)
    both = Followed(12)
    plain = list(both.entries)
    for _ in range(generator.randrange(3)):
        some = [torch.tensor([generator.sample(plain, 2)]) for _ in range(2)]
        plain += both.join(*some).flatten().tolist()
    known = list(plain)
    for _ in range(generator.randrange(2, 7)):
        if generator.random() < 0.5:
            rows, columns = generator.choice([2, 3]), generator.choice([1, 2])
            table = torch.tensor(generator.sample(plain, rows * columns)).reshape(rows, columns)
            index = [generator.randrange(rows) for _ in range(generator.choice([1, 2]))]
            known += both.choose(table, index, generator.randrange(2)).flatten().tolist()
        else:
            some = [torch.tensor([[generator.choice(known)]]) for _ in range(2)]
            known += both.join(*some).flatten().tolist()
    roots = generator.sample(known, min(len(known), 4))
    positions = frozenset().union(*map(both.reference.positions, roots))
    if len(positions) > 6:
        pytest.skip("too many worlds")
    expected = both.reference.components(roots)
    found = components(both.lattice, roots, both.entries)
    # Sound: whatever is coupled is found so, and nothing is left out.
    assert frozenset().union(*found) == frozenset().union(*expected)
    assert all(any(unit <= coarse for coarse in found) for unit in expected)
    assert found == expected


# --- connected components ------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(30))
def test_connected_components(seed: int) -> None:
    generator = random.Random(seed)
    count = generator.choice([1, 2, 10, 100, 1000])
    pairs = [
        (generator.randrange(count), generator.randrange(count))
        for _ in range(generator.choice([0, 1, count // 3, count // 2, count, 3 * count]))
    ]
    graph = nx.Graph()
    graph.add_nodes_from(range(count))
    graph.add_edges_from(pairs)
    expected = [0] * count
    for members in nx.connected_components(graph):
        for node in members:
            expected[node] = min(members)
    ends = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T
    cut = generator.randrange(len(pairs) + 1)
    assert connected_components(count, [ends[:, :cut], ends[:, cut:]]).tolist() == expected
    if pairs:
        # Negative control: edges matter.
        alone = [pair for pair in pairs if pair[0] != pair[1]]
        assert (connected_components(count, [ends]).tolist() == list(range(count))) == (not alone)


def test_connected_components_of_a_long_path() -> None:
    count = 20_000
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    assert connected_components(
        count, [torch.stack([order[:-1], order[1:]])]
    ).unique().tolist() == [0]


def test_connected_components_without_edges() -> None:
    assert connected_components(3, []).tolist() == [0, 1, 2]
    none = torch.zeros(2, 0, dtype=torch.int64)
    assert connected_components(3, [none]).tolist() == [0, 1, 2]


# --- laws ----------------------------------------------------------------------------------------

LABELS = [f"label {i}" for i in range(150)]


def label_shadows(seed: int, *shape: int) -> Tensor:
    sets = LabelSets(LABELS)
    generator = random.Random(seed)
    codes = []
    for _ in range(torch.Size(shape).numel()):
        code = torch.zeros(sets.planes, dtype=torch.int64)
        for label in generator.sample(LABELS, generator.randrange(4)):
            code = code | sets.of(label)
        codes.append(code)
    return torch.stack(codes, 1).reshape(sets.planes, *shape)


def origin_shadows(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 3, (2, *shape), generator=generator)


LATTICES: dict[str, tuple[Lattice, Any]] = {
    "labels": (LabelSets(LABELS), label_shadows),
    "origins": (Origins(2), origin_shadows),
}
by_lattice = pytest.mark.parametrize("name", LATTICES)


@by_lattice
@pytest.mark.parametrize("seed", range(10))
def test_laws_of_unions(name: str, seed: int) -> None:
    lattice, make = LATTICES[name]
    a, b, c = (make(3 * seed + i, 4, 5) for i in range(3))
    join = lattice.join
    assert torch.equal(join(a, b), join(b, a))
    assert torch.equal(join(join(a, b), c), join(a, join(b, c)))
    assert torch.equal(join(a, a), a)
    assert torch.equal(join(a, torch.zeros_like(a)), a)
    assert torch.equal(join(join(a, b), a), join(a, b))
    assert torch.equal(lattice.join_many([a, b, c]), join(join(a, b), c))
    # Negative control: unions of different sets are something else.
    assert not torch.equal(join(a, b), a)


@by_lattice
@pytest.mark.parametrize("dims", [(0,), (1,), (2,), (-1,), (0, 2), (2, 0), (-2, 0), (0, 1, 2)])
@pytest.mark.parametrize("shape", [(2, 3, 5), (1, 4, 1), (7, 1, 2)])
def test_unions_along_dimensions(name: str, dims: tuple[int, ...], shape: tuple[int, ...]) -> None:
    lattice, make = LATTICES[name]
    whole = make(5, *shape)
    found = lattice.join_along(whole, dims)
    step = whole
    for dim in dims:
        parts = step.split(1, dim % 3 + 1)
        step = lattice.join_many(parts)
    assert torch.equal(found, step)
    axes = {dim % 3 for dim in dims}
    assert found.shape[1:] == tuple(1 if i in axes else n for i, n in enumerate(shape))


@by_lattice
def test_unions_along_no_dimension_change_nothing(name: str) -> None:
    lattice, make = LATTICES[name]
    whole = make(5, 2, 3)
    assert torch.equal(lattice.join_along(whole, ()), whole)


def test_sets_of_entries_along_no_dimension_change_nothing() -> None:
    lattice = EntryGroups()
    nodes = lattice.new(6).reshape(1, 2, 3)
    assert torch.equal(lattice.join_along(nodes, ()), nodes)


@by_lattice
@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)])
def test_unions_of_nothing(name: str, shape: tuple[int, ...]) -> None:
    lattice, _ = LATTICES[name]
    empty = torch.zeros(lattice.planes, *shape, dtype=torch.int64)
    found = lattice.join_along(empty, tuple(range(len(shape))))
    assert found.shape == (lattice.planes, *[1] * len(shape))
    assert not bool(found.any())
    assert lattice.join_elements(empty).tolist() == [0] * lattice.planes


@by_lattice
def test_the_union_of_all_elements(name: str) -> None:
    lattice, make = LATTICES[name]
    whole = make(9, 3, 4)
    expected = lattice.join_many([whole[:, i, j] for i in range(3) for j in range(4)])
    assert torch.equal(lattice.join_elements(whole), expected)


def test_labels_are_decoded() -> None:
    sets = LabelSets(LABELS)
    assert sets.planes == 3
    generator = random.Random(0)
    for _ in range(20):
        chosen = generator.sample(LABELS, generator.randrange(20))
        code = sets.join_many([torch.zeros(3, dtype=torch.int64), *map(sets.of, chosen)])
        assert sets.decode(code) == set(chosen)
    assert len({tuple(sets.of(label).tolist()) for label in LABELS}) == len(LABELS)
    assert LabelSets([]).planes == 1 and LabelSets(LABELS[:62]).planes == 1
    assert LabelSets(LABELS[:63]).planes == 2


def test_origins_are_one_or_several() -> None:
    lattice = Origins(1)
    several = Origins.SEVERAL
    for numbers, expected in {
        (0, 0): 0,
        (0, 3): 3,
        (3, 3): 3,
        (3, 2): several,
        (several, 0): several,
        (several, 3): several,
        (several, several): several,
    }.items():
        one, two = (torch.tensor([number]) for number in numbers)
        assert lattice.join(one, two).tolist() == lattice.join(two, one).tolist() == [expected]
        assert lattice.join_along(torch.tensor([numbers]), (0,)).tolist() == [[expected]]


@by_lattice
def test_what_is_read_at_positions(name: str) -> None:
    """An index that depends on something may be any; else it is the present one."""
    lattice, make = LATTICES[name]
    table, index = make(3, 4, 2), make(4, 3, 2)
    place = torch.tensor([0, 3, 3])
    fixed = Selection((0,), lambda plane: plane[place], torch.zeros(3, 2), None, (INDICES[0],))
    assert torch.equal(lattice.select(table, fixed), table[:, place])
    varying = Selection((0,), lambda plane: plane[place], torch.zeros(3, 2), index, (INDICES[0],))
    anywhere = lattice.join_along(table, (0,))
    assert torch.equal(lattice.select(table, varying), lattice.join(anywhere, index))
