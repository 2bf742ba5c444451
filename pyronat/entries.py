"""Sets of parameter entries that tensor elements depend on, and the partition they imply.

A set is a node of a growing graph: a parameter entry, a *join* of other nodes, or a *choice*. A
choice stands for an element of a table that is read at a position which varies from batch to batch,
as in `table[z]`: it is one of the rows, nobody knows which, but all choices at one position choose
the same row. Entries are coupled if some coordinate of a distribution, a *root*, can depend on both
at once. Operations are followed symbolically, never by the values of derivatives: a zero input or a
dead unit hides nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyronat.lattices import Lattice, Selection

MAX_CHOICES = 2**22
"""Elements up to which choices are told apart by position; beyond, all rows count as read."""

_WORTH_NARROWING = 512
"""Elements from which on it pays to look for dimensions that say the same again and again."""

_SHIFT = 2**31
_MIXED = -1


@dataclass(frozen=True)
class _Join:
    """New nodes, each the union of others: `parents[i]` contains `children[i]`."""

    first: int
    count: int
    parents: Tensor
    children: Tensor


@dataclass(frozen=True)
class _Choice:
    """New nodes, each one unknown row of a column of a table.

    Attributes:
        nodes: `[n]`.
        positions: number of the position in the index, equal where the same row is chosen, `[n]`.
        columns: column of the table, `[n]`.
        members: nodes of the table `[rows, columns]`, 0 where there is none.
    """

    nodes: Tensor
    positions: Tensor
    columns: Tensor
    members: Tensor


class EntryGroups(Lattice):
    """Sets of parameter entries as nodes of a graph."""

    planes = 1

    def __init__(self) -> None:
        self._count = 1
        self._steps: list[_Join | _Choice] = []
        self._chosen = torch.zeros(1024, dtype=torch.bool, device="cpu")
        self._within = torch.zeros(1024, dtype=torch.int64, device="cpu")
        self._positions: dict[tuple[Any, ...], int] = {}
        # Indices are kept, so that another one never has the address of one that is gone.
        self._alive: list[tuple[Tensor, ...]] = []
        self._num_positions = 1

    @property
    def follows_positions(self) -> bool:
        """Positions vary between batches; a partition has to hold for all of them."""
        return False

    def new(self, count: int) -> Tensor:
        """New nodes, as for the entries of a parameter, `[count]`."""
        nodes = torch.arange(self._count, self._count + count, device="cpu")
        self._count += count
        if self._count > len(self._chosen):
            self._chosen = _grown(self._chosen, 2 * self._count)
            self._within = _grown(self._within, 2 * self._count)
        return nodes

    def _joined(self, count: int, parents: Tensor, children: Tensor) -> Tensor:
        """New nodes whose i-th is the union of the children with `parents == i`."""
        nodes = self.new(count)
        self._steps.append(_Join(int(nodes[0]), count, nodes[parents], children))
        self._chosen[nodes[parents[self._chosen[children]]]] = True
        self._within[children] = nodes[parents]
        return nodes

    def join(self, first: Tensor, second: Tensor) -> Tensor:
        """A node for each distinct pair of different ones."""
        if first.shape != second.shape:
            first, second = torch.broadcast_tensors(first, second)
        shape = first.shape
        first, second = _narrowed((first, second), ())
        # Of a node and a union that contains it, the union is kept.
        contained = (self._within[first] == second) & (second != 0)
        first = torch.where(contained, second, first)
        contained = (self._within[second] == first) & (first != 0)
        second = torch.where(contained, first, second)
        joined = torch.maximum(first, second)
        mixed = (first != 0) & (second != 0) & (first != second)
        if bool(mixed.any()):
            left, right = first[mixed], second[mixed]
            code = torch.minimum(left, right) * _SHIFT + torch.maximum(left, right)
            pairs, inverse = torch.unique(code, return_inverse=True)
            parents = torch.arange(len(pairs), device="cpu").repeat(2)
            children = torch.cat([pairs // _SHIFT, pairs % _SHIFT])
            joined[mixed] = self._joined(len(pairs), parents, children)[inverse]
        return joined.expand(shape)

    def join_along(self, shadow: Tensor, dims: Sequence[int]) -> Tensor:
        """A node for each distinct set along the dimensions."""
        axes = sorted({dim % (shadow.dim() - 1) + 1 for dim in dims})
        kept = [1 if axis in axes else size for axis, size in enumerate(shadow.shape)]
        if shadow.numel() == 0:
            return shadow.new_zeros(kept)
        (shadow,) = _narrowed([shadow], axes)
        rest = [axis for axis in range(shadow.dim()) if axis not in axes]
        rows = shadow.permute(*rest, *axes).reshape(-1, _numel(shadow, axes))
        joined = rows.amax(1)
        lowest = torch.where(rows == 0, joined.unsqueeze(1), rows).amin(1)
        mixed = lowest != joined
        if bool(mixed.any()):
            rows = rows[mixed]
            parents = torch.arange(len(rows), device="cpu").unsqueeze(1).expand_as(rows)
            nonzero = rows != 0
            joined[mixed] = self._joined(len(rows), parents[nonzero], rows[nonzero])
        narrow = [1 if axis in axes else size for axis, size in enumerate(shadow.shape)]
        return joined.reshape(narrow).expand(kept)

    def select(self, shadow: Tensor, selection: Selection) -> Tensor:
        """Choices: one node for each output element that is read from a table of entries."""
        if not 0 < selection.positions.numel() <= MAX_CHOICES or bool(self._chosen[shadow].any()):
            anywhere = self.join_along(shadow, selection.dims).expand(shadow.shape)
            found = self.move(anywhere, selection.move)
        else:
            found = self._choices(shadow, selection)
        return found if selection.index is None else self.join(found, selection.index)

    def _choices(self, shadow: Tensor, selection: Selection) -> Tensor:
        axes = [dim + 1 for dim in selection.dims]
        rest = [axis for axis in range(shadow.dim()) if axis not in axes]
        members = shadow.permute(*axes, *rest).reshape(_numel(shadow, axes), -1)
        sizes = [1 if axis in axes else size for axis, size in enumerate(shadow.shape)]
        numbers = torch.arange(members.shape[1], device="cpu").reshape(sizes).expand(shadow.shape)
        columns = self.move(numbers, selection.move).reshape(-1)
        key = (*map(_identity, selection.indices), *(shadow.shape[axis] for axis in axes))
        if key not in self._positions:
            self._alive.append(selection.indices)
            self._positions[key] = self._num_positions
            self._num_positions += int(selection.positions.max()) + 1
        positions = selection.positions.reshape(-1) + self._positions[key]
        code, inverse = torch.unique(positions * _SHIFT + columns, return_inverse=True)
        nodes = self.new(len(code))
        self._chosen[nodes] = True
        self._steps.append(_Choice(nodes, code // _SHIFT, code % _SHIFT, members.clone()))
        empty = (members == 0).all(0)[columns]
        found = torch.where(empty, torch.zeros_like(columns), nodes[inverse])
        return found.reshape(1, *selection.positions.shape)

    def components(self, roots: Tensor) -> tuple[Tensor, Tensor]:
        """Which nodes are coupled, given the sets that coordinates depend on.

        Args:
            roots: nodes `[n]`, one for each Fisher-orthogonal group of coordinates of one batch
                element; a root couples all that it contains.

        Returns:
            Number of the component of every node `[nodes]`, and whether some root contains it
            `[nodes]`.
        """
        kinds = self._kinds()
        reached, mixed = self._reached(roots, kinds)
        edges = []
        pure = []
        for step in self._steps:
            if isinstance(step, _Join):
                used = reached[step.parents]
                found = torch.stack([step.parents[used], step.children[used]])
                edges.append(found)
                pure.append(found[:, kinds[found[0]] > 0])
            else:
                edges.append(_to_members(step, mixed[step.nodes]))
        edges += self._rowwise(reached, connected_components(self._count, pure))
        return connected_components(self._count, edges), reached

    def linked(self, roots: Tensor) -> Tensor:
        """Components `[nodes]` if every choice could be all rows of its table at once.

        A root and all that it contains are linked; what is not linked is not contained.
        """
        reached, _ = self._reached(roots, self._kinds())
        edges = []
        for step in self._steps:
            if isinstance(step, _Join):
                used = reached[step.parents]
                edges.append(torch.stack([step.parents[used], step.children[used]]))
            else:
                edges.append(_to_members(step, reached[step.nodes]))
        return connected_components(self._count, edges)

    def _kinds(self) -> Tensor:
        """For each node the one position that all its choices share, 0 for none, else mixed."""
        kinds = torch.zeros(self._count, dtype=torch.int64, device="cpu")
        for step in self._steps:
            if isinstance(step, _Choice):
                kinds[step.nodes] = step.positions
                continue
            found, places = kinds[step.children], step.parents - step.first
            start = torch.full((step.count,), _MIXED - 1, device="cpu")
            highest = start.scatter_reduce_(0, places, found, "amax")
            start = torch.full((step.count,), _SHIFT, device="cpu")
            lowest = start.scatter_reduce_(0, places, found, "amin")
            kind = torch.where(highest == lowest, highest, _MIXED)
            kinds[step.first : step.first + step.count] = kind
        return kinds

    def _reached(self, roots: Tensor, kinds: Tensor) -> tuple[Tensor, Tensor]:
        """Nodes contained in roots, and those of them that a mixed set contains."""
        reached = torch.zeros(self._count, dtype=torch.bool, device="cpu")
        mixed = torch.zeros(self._count, dtype=torch.bool, device="cpu")
        reached[roots] = True
        for step in reversed(self._steps):
            if isinstance(step, _Join):
                used = reached[step.parents]
                reached[step.children[used]] = True
                blurred = used & (mixed[step.parents] | (kinds[step.parents] == _MIXED))
                mixed[step.children[blurred]] = True
            else:
                columns = step.columns[reached[step.nodes]].unique()
                reached[step.members[:, columns]] = True
        reached[0] = False
        return reached, mixed

    def _rowwise(self, reached: Tensor, groups: Tensor) -> list[Tensor]:
        """Edges between entries of one row, for columns that are read together at one position."""
        choices = [step for step in self._steps if isinstance(step, _Choice)]
        found = [reached[step.nodes] for step in choices]
        if not any(bool(used.any()) for used in found):
            return []
        group = torch.cat([
            groups[step.nodes[used]] for step, used in zip(choices, found, strict=True)
        ])
        table = torch.cat([torch.full_like(u.nonzero()[:, 0], i) for i, u in enumerate(found)])
        column = torch.cat([s.columns[used] for s, used in zip(choices, found, strict=True)])
        order = torch.argsort(group, stable=True)
        group, table, column = group[order], table[order], column[order]
        start = torch.ones_like(group, dtype=torch.bool)
        start[1:] = group[1:] != group[:-1]
        first = start.nonzero()[:, 0][start.cumsum(0) - 1]
        pairs = torch.stack([table[first], column[first], table, column])[:, ~start].unique(dim=1)
        edges = []
        for which in pairs[[0, 2]].unique(dim=1).T:
            one, two = (choices[int(i)].members for i in which)
            some = pairs[:, (pairs[0] == which[0]) & (pairs[2] == which[1])]
            left, right = one[:, some[1]], two[:, some[3]]
            nonzero = (left != 0) & (right != 0)
            edges.append(torch.stack([left[nonzero], right[nonzero]]))
        return edges


def _identity(index: Tensor) -> tuple[int, ...]:
    """What tells one index from another: its memory, how often it was written, and its values."""
    values = index.detach().cpu().contiguous()
    return (
        int(index.untyped_storage()._cdata),
        index._version,
        index.storage_offset(),
        *index.stride(),
        *index.shape,
        hash(values.numpy().tobytes()),
    )


def _grown(tensor: Tensor, size: int) -> Tensor:
    grown = tensor.new_zeros(size)
    grown[: len(tensor)] = tensor
    return grown


def _to_members(step: _Choice, some: Tensor) -> Tensor:
    """Edges `[2, n]` that connect some of a step's nodes with all rows that they may be.

    Rows of a column are connected with the first of them, and so are the nodes that read it.
    """
    columns, places = step.columns[some].unique(return_inverse=True)
    members = step.members[:, columns]
    nonzero = members != 0
    first = members.gather(0, nonzero.to(torch.uint8).argmax(0, keepdim=True))
    of_rows = torch.stack([first.expand_as(members)[nonzero], members[nonzero]])
    of_nodes = torch.stack([step.nodes[some], first[0, places]])
    return torch.cat([of_rows, of_nodes[:, of_nodes[1] != 0]], 1)


def _numel(tensor: Tensor, axes: Sequence[int]) -> int:
    numel = 1
    for axis in axes:
        numel *= tensor.shape[axis]
    return numel


def _narrowed(shadows: Sequence[Tensor], kept: Sequence[int]) -> list[Tensor]:
    """Shadows of one shape, narrowed to size 1 along dimensions where all of them are constant.

    The kept dimensions may be narrowed as well: a union of equal sets is that set.
    """
    narrowed = list(shadows)
    if narrowed[0].numel() < _WORTH_NARROWING:
        return narrowed
    for axis in range(narrowed[0].dim()):
        if narrowed[0].shape[axis] > 1:
            firsts = [shadow.narrow(axis, 0, 1) for shadow in narrowed]
            if all(
                shadow.stride(axis) == 0 or bool((shadow == first).all())
                for shadow, first in zip(narrowed, firsts, strict=True)
            ):
                narrowed = firsts
    return narrowed


def connected_components(count: int, edges: Sequence[Tensor]) -> Tensor:
    """Smallest node of the connected component of each node.

    Args:
        count: number of nodes.
        edges: pairs of nodes, each `[2, n]`.

    Returns:
        `[count]`.
    """
    label = torch.arange(count, device="cpu")
    if not edges:
        return label
    ends = torch.cat(list(edges), 1)
    while True:
        left, right = label[ends[0]], label[ends[1]]
        apart = left != right
        if not bool(apart.any()):
            return label
        ends, left, right = ends[:, apart], left[apart], right[apart]
        label.scatter_reduce_(0, torch.maximum(left, right), torch.minimum(left, right), "amin")
        while True:
            jumped = label[label]
            if torch.equal(jumped, label):
                break
            label = jumped
