"""Coordinates that are read from the rows of a table: one Jacobian for each row, not each element.

A discrete variable picks a row of a table of parameters for every element of its children. All
elements with the same row have the same Jacobian, and a table has few rows. The rows are found in
the graph, as the indices of the operations that all paths to parameters go through; that an element
depends on its own row alone is checked by the gradient of a combination of all elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from pyronat.autograd import (
    Edge,
    SampleGate,
    picked_places,
    shape_of,
)
from pyronat.jacobians import MAX_JACOBIAN_ENTRIES, jacobian, vector_jacobian_products

FEW = 4
"""A row is differentiated by itself where it has at least so many elements on average.

In tables of more than `MAX_JACOBIAN_ENTRIES` it is anyway, as all elements cannot be.
"""

MOST = 2**27
"""Entries of the Jacobian of all rows above which there is none."""


@dataclass(frozen=True)
class TableRows:
    """Jacobian of the coordinates of some elements, by the rows that they are read from.

    Attributes:
        jacobian: derivatives `[rows * coordinates, entries]`.
        numbers: row of each element `[elements]`.
        first: an element of each row `[rows]`.
    """

    jacobian: Tensor
    numbers: Tensor
    first: Tensor


def table_rows(
    coordinates: Sequence[Tensor], size: int, params: Sequence[Tensor], gate: SampleGate
) -> TableRows | None:
    """Differentiates coordinates row by row.

    Args:
        coordinates: parts of the coordinates, each `[*batch]` with `size` coordinates of an element
            in its last entries.
        size: coordinates of an element in each part.
        params: leaves.
        gate: the sample values.

    Returns:
        The Jacobian, or None where the coordinates are not rows of a table, or of a large one.
    """
    found = [_picked(part, size, gate) for part in coordinates]
    places = [pick.rows for picks in found for pick in picks]
    if not all(found):
        return None
    together = places[0]
    for place in places[1:]:
        together = together * (place.max() + 1) + place
    distinct, numbers = torch.unique(together, return_inverse=True)
    rows, elements = len(distinct), len(numbers)
    entries = sum(param.numel() for param in params)
    if (rows * FEW > elements and entries <= MAX_JACOBIAN_ENTRIES) or rows * size * entries > MOST:
        return None
    order = torch.arange(elements, device=numbers.device)
    first = order.new_zeros(rows).scatter_(0, numbers.flip(0), order.flip(0))
    parts = [part.reshape(elements, size) for part in coordinates]
    behind = [
        _behind(part, first, picks, params, gate)
        for part, picks in zip(coordinates, found, strict=True)
    ]
    each = [
        jacobian(part[first], params, gate).reshape(rows, size, -1) if known is None else known
        for part, known in zip(parts, behind, strict=True)
    ]
    derivatives = torch.cat(each, 1).flatten(0, 1)
    if not _holds(parts, derivatives, numbers, params, gate):
        return None
    return TableRows(derivatives, numbers, first)


@dataclass(frozen=True)
class _Pick:
    """An operation that reads tables by indices.

    Attributes:
        edge: its result.
        places: places in the flattened table that the result was read from, of its shape.
        rows: the first one of each element of the coordinates `[elements]`.
    """

    edge: Edge
    places: Tensor
    rows: Tensor


def _picked(part: Tensor, size: int, gate: SampleGate) -> list[_Pick]:
    """What reads the tables behind some coordinates; nothing where they are no rows of tables."""
    if part.grad_fn is None:
        return []
    try:
        return [
            _Pick(edge, places, places.to(part.device).expand(part.shape).reshape(-1, size)[:, 0])
            for edge, places in _tables(part, gate.edges)
        ]
    except RuntimeError:  # not the shape of the coordinates
        return []


def _tables(part: Tensor, stops: frozenset[Edge]) -> list[tuple[Edge, Tensor]]:
    """Operations by indices behind which all leaves are, with the places that they pick.

    None if some leaves are not.
    """
    found: list[tuple[Edge, Tensor]] = []
    seen: set[Any] = set()  # nodes themselves: another one may get the number of one let go
    waiting: list[Edge] = [(part.grad_fn, part.output_nr)]
    while waiting:
        node, number = waiting.pop()
        if (node, number) in stops or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            return []
        places = picked_places(node)
        if places is not None:
            found.append(((node, number), places))
        else:
            waiting += [edge for edge in node.next_functions if edge[0] is not None]
    return found


def _behind(
    part: Tensor, first: Tensor, picks: Sequence[_Pick], params: Sequence[Tensor], gate: SampleGate
) -> Tensor | None:
    """Derivatives of some elements of coordinates, which depend on what was read for them alone.

    Args:
        part: coordinates `[*batch, *event]`.
        first: numbers of the elements `[rows]`.
        picks: what reads the tables.
        params: leaves.
        gate: the sample values.

    Returns:
        `[rows, size, entries]`, or None where elements share what was read.
    """
    elements, rows = len(picks[0].rows), len(first)
    width = next(dim for dim in range(part.dim() + 1) if prod(part.shape[:dim]) == elements)
    if any(pick.places.shape[:width] != part.shape[:width] for pick in picks):
        return None
    size = part.numel() // elements
    each = torch.arange(size, device=part.device)
    ones = part.new_zeros(size, elements, size).detach()
    ones[each[:, None], first, each[:, None]] = 1
    edges = [GradientEdge(*pick.edge) for pick in picks]
    flowing = vector_jacobian_products([part], edges, [ones.reshape(size, *part.shape)], gate)
    total = part.new_zeros(rows, size, sum(param.numel() for param in params)).detach()
    for pick, flow in zip(picks, flowing, strict=True):
        if flow is not None:
            own = flow.reshape(size, elements, -1)[:, first].transpose(0, 1)
            places = pick.places.to(own.device).reshape(elements, -1)[first].unsqueeze(1)
            table = pick.edge[0].next_functions[0]
            shape = shape_of(table)
            into = own.new_zeros(rows, size, prod(shape))
            into.scatter_add_(2, places.expand(own.shape), own)
            total += _through(table, into.reshape(rows * size, *shape), params, gate).view_as(total)
    return total


def _through(table: Edge, into: Tensor, params: Sequence[Tensor], gate: SampleGate) -> Tensor:
    """What flows from a table into the parameters, for cotangents `[n, *shape]` of the table."""
    leaf = getattr(table[0], "variable", None)
    if leaf is None:
        found = vector_jacobian_products([GradientEdge(*table)], params, [into], gate)
    else:
        found = [into if param is leaf else None for param in params]
    parts = [
        into.new_zeros(len(into), param.numel()) if part is None else part.flatten(1)
        for param, part in zip(params, found, strict=True)
    ]
    return torch.cat(parts, 1)


def _holds(
    parts: Sequence[Tensor],
    derivatives: Tensor,
    numbers: Tensor,
    params: Sequence[Tensor],
    gate: SampleGate,
) -> bool:
    """Whether a combination of all elements has the gradient that the rows say."""
    rows, size = len(derivatives) // sum(p.shape[1] for p in parts), parts[0].shape[1]
    # Numbers without a pattern, and without touching any generator.
    cotangents = [
        torch.cos(1.0 + 1.7 * torch.arange(p.numel(), device=p.device).to(p) ** 1.5).reshape_as(p)
        for p in parts
    ]
    with gate.closed():
        gradients = torch.autograd.grad(
            list(parts), list(params), cotangents, retain_graph=True, allow_unused=True
        )
    actual = torch.cat([
        (torch.zeros_like(p) if g is None else g).reshape(-1)
        for p, g in zip(params, gradients, strict=True)
    ])
    summed = torch.cat(
        [c.new_zeros(rows, size).index_add_(0, numbers, c) for c in cotangents], 1
    ).reshape(-1)
    said = summed @ derivatives
    scale = summed.abs() @ derivatives.abs()
    slack = len(numbers) ** 0.5 * torch.finfo(said.dtype).eps * 100
    return bool(((actual - said).abs() <= slack * scale.clamp_min(scale.max())).all())
