"""Coordinates that are read from the rows of a table: one Jacobian for each row, not each element.

A discrete variable picks a row of a table of parameters for every element of its children. All
elements with the same row have the same Jacobian, and a table has few rows. The rows are found in
the graph, as the indices of the operations that all paths to parameters go through; that an element
depends on its own row alone is checked by the gradient of a combination of all elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyronat.autograd import Edge, SampleGate, jacobian, picked_places

FEW = 4
"""A row is differentiated by itself where it has at least so many elements on average."""


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
    places = [row for rows in found if rows is not None for row in rows]
    if any(rows is None for rows in found):
        return None
    together = places[0]
    for place in places[1:]:
        together = together * (place.max() + 1) + place
    distinct, numbers = torch.unique(together, return_inverse=True)
    rows, elements = len(distinct), len(numbers)
    if rows * FEW > elements:
        return None
    order = torch.arange(elements, device=numbers.device)
    first = order.new_zeros(rows).scatter_(0, numbers.flip(0), order.flip(0))
    parts = [part.reshape(elements, size) for part in coordinates]
    derivatives = torch.cat(
        [jacobian(part[first], params, gate).reshape(rows, size, -1) for part in parts], 1
    ).flatten(0, 1)
    if not _holds(parts, derivatives, numbers, params, gate):
        return None
    return TableRows(derivatives, numbers, first)


def _picked(part: Tensor, size: int, gate: SampleGate) -> list[Tensor] | None:
    """Places that each element is read from `[elements]`, one for each table, or None."""
    if part.grad_fn is None:
        return None
    try:
        return [
            found.to(part.device).expand(part.shape).reshape(-1, size)[:, 0]
            for found in _tables(part, gate.edges)
        ] or None
    except RuntimeError:  # not the shape of the coordinates
        return None


def _tables(part: Tensor, stops: frozenset[Edge]) -> list[Tensor]:
    """Places that are picked by operations behind which all leaves are; none if some are not."""
    found: list[Tensor] = []
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
            found.append(places)
        else:
            waiting += [edge for edge in node.next_functions if edge[0] is not None]
    return found


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
