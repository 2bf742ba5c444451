"""What a run computed, as a short text: equal texts mean equal structure.

The fingerprint of a run is that of the autograd graphs between the parameters and the
distributions, shapes and values aside. It is taken at every step, where following the run through
every operation would cost too much.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence, Set
from functools import lru_cache
from typing import Any, NamedTuple

from torch import Tensor

from pyronat.autograd import Edge, edge_of
from pyronat.families import family_name
from pyronat.records import SiteRecord, held_tensors

_SAVED = {
    "SelectBackward0": ("_saved_dim", "_saved_index"),
    "SliceBackward0": ("_saved_dim", "_saved_start", "_saved_end", "_saved_step"),
}
"""Nodes that read a part of a tensor which Python numbers choose."""


def fingerprint(
    records: Sequence[SiteRecord], params: Mapping[str, Tensor], positions: bool = True
) -> str:
    """Digest of the random sites of a run and of the graphs of their distributions.

    Sites are told apart by name, family and plates, graphs by their operations and parameters.
    Sample values count as constants. Shapes do not count, nor does what depends on no parameter.

    Args:
        records: the random sites.
        params: unconstrained leaves by name.
        positions: whether the Python numbers count that rows and slices are taken at. They may not
            where 0-d tensors index tables: torch turns sample values into such numbers.

    Returns:
        A hexadecimal digest, the same in every process.
    """
    names, constants, edges = _ends(records, params)
    graphs = _Graphs(names, constants, dict.fromkeys(edges, _NOTHING), positions)
    return _digest("run", tuple(_of_site(record, graphs) for record in records))


def outline(
    records: Sequence[SiteRecord], params: Mapping[str, Tensor], positions: bool = True
) -> tuple[object, ...]:
    """All that `fingerprint` depends on, node by node: longer, but had in less than half the time.

    Runs of equal outlines have equal fingerprints; the reverse need not be so, as distributions
    may hold more tensors once they have been asked for them.

    Args:
        records: the random sites.
        params: unconstrained leaves by name.
        positions: as of `fingerprint`.

    Returns:
        What can be hashed and compared.
    """
    names, constants, edges = _ends(records, params)
    numbers = dict.fromkeys(edges, -1)
    found: list[object] = []
    for record in records:
        found += (record.name, family_name(record.distribution))
        found.append(tuple(plate.name for plate in record.plates))
        for alternatives in held_tensors(record.distribution):
            found.append(len(alternatives))
            for tensor in alternatives:
                found.extend(_spelled(tensor, names, constants, numbers, positions))
    return tuple(found)


def _ends(
    records: Sequence[SiteRecord], params: Mapping[str, Tensor]
) -> tuple[dict[int, str], set[int], list[Edge]]:
    """Where graphs end: names of parameters and sample values by identity, edges of the latter."""
    values = [record.value for record in records if record.value.requires_grad]
    return (
        {id(leaf): name for name, leaf in params.items()},
        {id(value) for value in values},
        [edge_of(value) for value in values if value.grad_fn is not None],
    )


def _spelled(
    tensor: Tensor,
    names: Mapping[int, str],
    constants: Set[int],
    numbers: dict[Edge, int],
    positions: bool,
) -> Iterator[object]:
    """The graph of a tensor in an `outline`.

    Args:
        tensor: of a distribution.
        names: names of the parameters by identity.
        constants: identities of sample values, which may be leaves.
        numbers: of the edges that have been spelled before; those of this graph are added.
        positions: as of `fingerprint`.

    Yields:
        What each node computes and the number of its sources, those of sources after it; the
        number of an edge that is met again; the name of a parameter; None for constants.
    """

    def of_leaf(leaf: Tensor) -> object:
        return None if id(leaf) in constants else ("parameter", names.get(id(leaf)))

    if not tensor.requires_grad or tensor.grad_fn is None or id(tensor) in constants:
        yield of_leaf(tensor) if tensor.requires_grad else None
        return
    stack = [edge_of(tensor)]
    while stack:
        edge = stack.pop()
        if edge[0] is None or edge in numbers:
            yield numbers.get(edge)
            continue
        numbers[edge] = len(numbers)
        sources = edge[0].next_functions
        variable = None if sources else getattr(edge[0], "variable", None)
        if variable is not None:
            yield of_leaf(variable)
            continue
        yield _kind(edge, positions)
        yield len(sources)
        stack.extend(sources)


def _of_site(record: SiteRecord, graphs: _Graphs) -> str:
    family = family_name(record.distribution)
    plates = tuple(plate.name for plate in record.plates)
    # Of tensors that are computed from each other, the first one has the least deep graph.
    tensors = (
        min(map(graphs.of_tensor, alternatives)).digest
        for alternatives in held_tensors(record.distribution)
    )
    return _digest(record.name, (family, *plates, *tensors))


class _Signature(NamedTuple):
    """Depth and digest of a graph."""

    depth: int
    digest: str


_NOTHING = _Signature(0, "")


class _Graphs:
    """Signatures of the graphs of one run.

    Args:
        names: names of the parameters by identity.
        constants: identities of sample values, which may be leaves.
        known: signatures of edges that are not to be crossed.
        positions: whether the numbers count that rows and slices are taken at.
    """

    def __init__(
        self,
        names: Mapping[int, str],
        constants: Set[int],
        known: dict[Edge, _Signature],
        positions: bool,
    ) -> None:
        self._names, self._constants, self._known = names, constants, known
        self._positions = positions

    def of_tensor(self, tensor: Tensor) -> _Signature:
        if not tensor.requires_grad or id(tensor) in self._constants:
            return _NOTHING
        if tensor.grad_fn is None:
            return self._of_leaf(tensor)
        return self._of_edge(edge_of(tensor))

    def _of_leaf(self, leaf: Tensor) -> _Signature:
        if id(leaf) in self._constants:
            return _NOTHING
        return _Signature(1, _digest("parameter", (self._names.get(id(leaf), "unknown"),)))

    def _of_edge(self, root: Edge) -> _Signature:
        """Visits nodes after those that they depend on."""
        known, stack = self._known, [root]
        while stack:
            edge = stack[-1]
            if edge in known:
                stack.pop()
                continue
            node = edge[0]
            variable = getattr(node, "variable", None)
            if variable is not None:
                known[edge] = self._of_leaf(variable)
                continue
            sources = node.next_functions
            waiting = [s for s in sources if s[0] is not None and s not in known]
            if waiting:
                stack.extend(waiting)
                continue
            parts = [_NOTHING if s[0] is None else known[s] for s in sources]
            depth = max((part.depth for part in parts), default=0)
            known[edge] = _NOTHING
            if depth:
                digests = tuple(part.digest for part in parts)
                kind = ":".join(map(str, _kind(edge, self._positions)))
                known[edge] = _Signature(1 + depth, _digest(kind, digests))
        return known[root]


def _kind(edge: Edge, positions: bool) -> tuple[Any, ...]:
    """What a node computes, and which of its outputs an edge is; places that it reads if asked."""
    node, number = edge
    name = node.name()
    if name not in _SAVED or not positions:
        return name, number
    return name, number, str([getattr(node, part, None) for part in _SAVED[name]])


@lru_cache(maxsize=2**16)
def _digest(kind: str, parts: tuple[str, ...]) -> str:
    return hashlib.sha1(repr((kind, parts)).encode(), usedforsecurity=False).hexdigest()
