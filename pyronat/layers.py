"""Layers of a network between sites: weights with their inputs, and what flows back into them.

A linear map, a convolution or a bias in the autograd graph of a distribution's coordinates is a
*tap*: for every row of its output the derivative of a coordinate with respect to the weight is
δ ⊗ a, with a the row's inputs and δ what flows back into its output. A recurrent weight has
several taps. What is not recognized is left to whoever can differentiate it as a whole.

Reads private names of torch's graph nodes, as `autograd` does; where they are renamed nothing is
recognized.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from pyronat.autograd import (
    TRANSPOSING,
    Edge,
    SampleGate,
    edge_of,
    shape_of,
    walk,
    weight_leaf,
)
from pyronat.jacobians import vector_jacobian_products


@dataclass(frozen=True)
class Tap:
    """One use of a layer in the graph.

    Attributes:
        edge: its output.
        inputs: a `[rows, fan_in]`, detached; a column of ones for a bias.
        channels: axis of the output that numbers the units; the others number the rows.
    """

    edge: Edge
    inputs: Tensor
    channels: int

    def rows(self, flowing: Tensor) -> Tensor:
        """What flows back into the output, `[num_cotangents, *output]`, as `[..., rows, units]`."""
        moved = flowing.movedim(self.channels + 1, -1)
        return moved.reshape(len(flowing), -1, moved.shape[-1])


@dataclass(frozen=True)
class Layer:
    """A parameter whose uses in a graph are all taps.

    Attributes:
        leaf: a weight, or a bias.
        unit_axis: axis of the leaf that numbers the units.
        taps: its uses.
    """

    leaf: Tensor
    unit_axis: int
    taps: tuple[Tap, ...]


def find_layers(tensors: Sequence[Tensor], stops: Collection[Edge]) -> list[Layer]:
    """Weights and biases that tensors depend on through recognized maps.

    Args:
        tensors: coordinates of a distribution.
        stops: edges that are not crossed, as those of sample values.

    Returns:
        The layers, in order of discovery; a parameter with any other use is none.
    """
    found: dict[int, Tensor] = {}
    uses: dict[int, int] = defaultdict(int)
    axes: dict[int, set[int]] = defaultdict(set)
    taps: dict[int, list[Tap]] = defaultdict(list)
    seen: set[Any] = set()
    for tensor in tensors:
        if tensor.grad_fn is None:
            continue
        for node in walk(edge_of(tensor), stops):
            if node in seen:
                continue
            seen.add(node)
            for leaf in _used_by(node):
                uses[id(leaf)] += 1
            for leaf, axis, tap in _taps(node):
                found[id(leaf)] = leaf
                axes[id(leaf)].add(axis)
                taps[id(leaf)].append(tap)
    return [
        Layer(leaf, next(iter(axes[key])), tuple(taps[key]))
        for key, leaf in found.items()
        if len(axes[key]) == 1 and len(taps[key]) == uses[key]
    ]


def _used_by(node: Any) -> Iterator[Tensor]:
    """Leaves that a node uses, transposed or not.

    Args:
        node: of the graph; those that transpose use nothing themselves.

    Yields:
        A leaf for each use.
    """
    if node.name() in TRANSPOSING:
        return
    for child, _ in node.next_functions:
        while child is not None and child.name() in TRANSPOSING:
            child = child.next_functions[0][0]
        leaf = getattr(child, "variable", None)
        if leaf is not None:
            yield leaf


def _taps(node: Any) -> Iterator[tuple[Tensor, int, Tap]]:
    """What a node uses.

    Args:
        node: of the graph.

    Yields:
        Each parameter with its unit axis and the use.
    """
    reader = _READERS.get(node.name())
    if reader is None:
        return
    try:
        yield from list(reader(node))
    except AttributeError:
        return


_Found = Iterator[tuple[Tensor, int, Tap]]


def _of_addmm(node: Any) -> _Found:
    bias, _, matrix = node.next_functions
    if node._saved_alpha != 1 or node._saved_beta != 1:
        return
    yield from _weight(node, matrix, node._saved_mat1)
    yield from _bias(node, bias, -1)


def _of_mm(node: Any) -> _Found:
    yield from _weight(node, node.next_functions[1], node._saved_self)


def _weight(node: Any, matrix: Edge, inputs: Tensor | None) -> _Found:
    weight = weight_leaf(matrix)
    if weight is not None and inputs is not None:
        leaf, columns = weight
        yield leaf, 1 if columns else 0, Tap((node, 0), inputs.detach(), 1)


def _of_add(node: Any) -> _Found:
    if node._saved_alpha == 1:
        for child in node.next_functions:
            yield from _bias(node, child, -1)


def _of_convolution(node: Any) -> _Found:
    weight = node.next_functions[1][0]
    leaf = getattr(weight, "variable", None)
    plain = not node._saved_transposed and node._saved_groups == 1
    if leaf is not None and plain and leaf.dim() == 4 and node._saved_input is not None:
        patches = torch.nn.functional.unfold(
            node._saved_input.detach(),
            leaf.shape[2:],
            tuple(node._saved_dilation),
            tuple(node._saved_padding),
            tuple(node._saved_stride),
        )
        yield leaf, 0, Tap((node, 0), patches.mT.reshape(-1, patches.shape[1]), 1)
    yield from _bias(node, node.next_functions[2], 1)


def _bias(node: Any, edge: Edge, channels: int) -> _Found:
    """A vector that is added along one axis of a node's output.

    Args:
        node: of the graph.
        edge: of the vector.
        channels: the axis.

    Yields:
        The vector with its unit axis and the use, if it is a parameter.
    """
    leaf = getattr(edge[0], "variable", None)
    shape = shape_of((node, 0))
    if leaf is None or not shape or leaf.dim() == 0:
        return
    axis = channels % len(shape)
    if leaf.shape != (shape[axis],) and leaf.shape != (*[1] * (leaf.dim() - 1), shape[axis]):
        return
    rows = prod(shape) // max(shape[axis], 1)
    yield leaf, leaf.dim() - 1, Tap((node, 0), leaf.new_ones(rows, 1).detach(), axis)


_READERS: dict[str, Callable[[Any], _Found]] = {
    "AddmmBackward0": _of_addmm,
    "MmBackward0": _of_mm,
    "AddBackward0": _of_add,
    "ConvolutionBackward0": _of_convolution,
}


def flow_back(
    layers: Sequence[Layer],
    outputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    gate: SampleGate,
) -> list[tuple[Tensor, ...]]:
    """What flows back into every tap.

    Args:
        layers: the layers.
        outputs: coordinates of a distribution.
        cotangents: for each of them `[num_cotangents, *shape]`.
        gate: the sample values, which are held fixed.

    Returns:
        For each layer and tap δ `[num_cotangents, rows, units]`, detached.
    """
    edges = {tap.edge: None for layer in layers for tap in layer.taps}
    inputs = [GradientEdge(*edge) for edge in edges]
    flowing = vector_jacobian_products(outputs, inputs, cotangents, gate)
    by_edge = dict(zip(edges, flowing, strict=True))
    count = len(cotangents[0])

    def of(tap: Tap) -> Tensor:
        value = by_edge[tap.edge]
        if value is None:
            value = tap.inputs.new_zeros(count, *shape_of(tap.edge))
        return tap.rows(value)

    return [tuple(of(tap) for tap in layer.taps) for layer in layers]
