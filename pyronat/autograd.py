"""Reading the autograd graph: leaves that a tensor depends on, linear units.

Everything that touches private names of torch's graph nodes is here. Whatever is not recognized
is reported as such, and the caller takes the general path, which needs public names only.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

Edge: TypeAlias = tuple[Any, int]
"""A node of the autograd graph and the number of one of its outputs."""

_Head: TypeAlias = tuple[Tensor, bool, Tensor | None]
"""A leaf, whether its units are columns, and its inputs (None for a bias)."""

ELEMENTWISE = frozenset(
    f"{name}Backward0"
    for name in (
        "Abs Add Alias Clamp ClampMin ClampMax Clone Div Elu Exp Expm1 Gelu LeakyRelu Log Log1P "
        "LogSigmoid Mul Neg Pow Reciprocal Relu Rsqrt Sigmoid Silu Softplus Sqrt Sub Tanh "
        "ToCopy UnsafeView View"
    ).split()
) | {"ClampBackward1", "RsubBackward1"}
"""Nodes whose i-th output depends on the i-th input alone, after broadcasting."""

BROADCASTING = frozenset({"ExpandBackward0"})

ORDER_KEEPING = frozenset({
    "ViewBackward0",
    "UnsafeViewBackward0",
    "AliasBackward0",
    "CloneBackward0",
})
TRANSPOSING = frozenset({"TBackward0", "TransposeBackward0", "PermuteBackward0"})


class SampleGate:
    """Treats sample values as constants while closed, and does nothing while open.

    The Jacobian of a site's distribution is taken at fixed values of its parents, but a
    reparametrized value carries the graph of the distribution it came from. A tensor hook cuts it
    without replacing the value, whose identity transforms may rely on.
    """

    def __init__(self, values: Sequence[Tensor]) -> None:
        """Hooks every value that has a gradient function."""
        self._closed = False
        attached = [value for value in values if value.grad_fn is not None]
        self.edges: frozenset[Edge] = frozenset(edge_of(value) for value in attached)
        self._handles = [value.register_hook(self._hook) for value in attached]

    def _hook(self, gradient: Tensor) -> Tensor | None:
        return torch.zeros_like(gradient) if self._closed else None

    @contextmanager
    def closed(self) -> Generator[None, None, None]:
        """Within this context no gradient passes a sample value."""
        self._closed = True
        try:
            yield
        finally:
            self._closed = False

    def remove(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()


@dataclass(frozen=True)
class Term:
    """One parameter of a sum of affine maps: a weight with its inputs, or a bias with ones.

    Attributes:
        leaf: weight `[units, inputs]` or `[inputs, units]`, or bias.
        unit_axes: axes of the leaf that number the units.
        inputs: `[rows, inputs]`, detached; a column of ones for a bias.
    """

    leaf: Tensor
    unit_axes: tuple[int, ...]
    inputs: Tensor


@dataclass(frozen=True)
class LinearUnits:
    """A tensor that is an elementwise function of affine units, θ_nu = f_nu(Σ_i a_ni W_ui).

    Attributes:
        terms: the parameters and their inputs.
        units: number of units.
        rows: number of rows of the inputs; θ has `repeats * rows * units` elements.
        slope: ∂θ/∂(preactivation) `[repeats * rows, units]`, or None where it is 1.
        places: row of the inputs behind each row of θ `[repeats * rows]`, or None where all rows
            are repeated in turn.
    """

    terms: tuple[Term, ...]
    units: int
    rows: int
    slope: Tensor | None = None
    places: Tensor | None = None


def edge_of(tensor: Tensor) -> Edge:
    """The graph edge that a tensor with a gradient function comes from."""
    return tensor.grad_fn, tensor.output_nr


def leaves(tensors: Sequence[Tensor], stops: Collection[Edge]) -> list[Tensor]:
    """Leaves that require a gradient and reach the tensors without passing a stop edge.

    Args:
        tensors: tensors of any shape, attached to the graph or not.
        stops: edges that are not crossed, as those of sample values.

    Returns:
        The leaves in order of discovery, each once.
    """
    found = {
        id(tensor): tensor for tensor in tensors if tensor.requires_grad and tensor.grad_fn is None
    }
    for tensor in tensors:
        if tensor.grad_fn is not None:
            for node in walk(edge_of(tensor), stops, _is_empty):
                if hasattr(node, "variable"):
                    found[id(node.variable)] = node.variable
    return list(found.values())


def walk(
    edge: Edge, stops: Collection[Edge], passes_nothing: Callable[[Edge], bool] = lambda edge: False
) -> Iterator[Any]:
    """Nodes behind an edge, those of leaves included.

    Args:
        edge: where to begin.
        stops: edges that are not crossed.
        passes_nothing: whether an edge, by itself, is not crossed either.

    Yields:
        The nodes, each once for every output of it that is met.
    """
    stack, seen = [edge], set()
    while stack:
        edge = stack.pop()
        if edge[0] is None or edge in stops or edge in seen or passes_nothing(edge):
            continue
        seen.add(edge)
        yield edge[0]
        stack.extend(edge[0].next_functions)


def _is_empty(edge: Edge) -> bool:
    """Whether an edge stands for a tensor without elements, as an empty slice."""
    try:
        return _numel(edge) == 0
    except (AttributeError, IndexError, RuntimeError):
        return False


def _reaches_leaf(edge: Edge, stops: Collection[Edge]) -> bool:
    return any(hasattr(node, "variable") for node in walk(edge, stops))


def shape_of(edge: Edge) -> tuple[int, ...]:
    """Shape of the tensor an edge stands for."""
    node, number = edge
    if hasattr(node, "variable"):
        return tuple(node.variable.shape)
    return tuple(int(size) for size in node._input_metadata[number].shape)


def picked_places(node: Any) -> Tensor | None:
    """Where an operation by indices has read each element of its result.

    Args:
        node: a node of the graph.

    Returns:
        Places in the flattened tensor that was read, of the shape of the result, or None for other
        nodes.
    """
    if node.name() != "IndexBackward0":
        return None
    shape = [int(size) for size in node._saved_self_sym_sizes]
    indices = tuple(slice(None) if index is None else index for index in node._saved_indices)
    device = next((index.device for index in indices if isinstance(index, Tensor)), None)
    return torch.arange(prod(shape), device=device).reshape(shape)[indices]


def _numel(edge: Edge) -> int:
    return prod(shape_of(edge))


def weight_leaf(edge: Edge) -> tuple[Tensor, bool] | None:
    """The matrix behind an edge and whether its columns, not its rows, are the units."""
    node, flips = edge[0], 0
    while node is not None and node.name() in TRANSPOSING:
        flips += _exchanges_axes(node)
        node = node.next_functions[0][0]
    variable = getattr(node, "variable", None)
    if variable is None or variable.dim() != 2:
        return None
    return variable, flips % 2 == 0


def _exchanges_axes(node: Any) -> bool:
    """Whether a transposing node of a matrix exchanges its axes; negative ones wrap around."""
    if node.name() == "PermuteBackward0":
        return bool(node._saved_dims[0] % 2)
    if node.name() == "TransposeBackward0":
        return bool(node._saved_dim0 % 2 != node._saved_dim1 % 2)
    return True


def _collect(edge: Edge, stops: Collection[Edge], terms: list[_Head]) -> bool:
    """Adds the affine terms behind an edge; False where something else is met."""
    node = edge[0]
    if not _reaches_leaf(edge, stops):
        return True
    if hasattr(node, "variable"):
        terms.append((node.variable, False, None))
        return True
    name = node.name()
    if name in ORDER_KEEPING:
        return _collect(node.next_functions[0], stops, terms)
    if name == "AddBackward0" and node._saved_alpha == 1:
        numel = _numel(edge)
        return all(
            hasattr(child[0], "variable") or _numel(child) == numel
            for child in node.next_functions
            if _reaches_leaf(child, stops)
        ) and all(_collect(child, stops, terms) for child in node.next_functions)
    if name == "AddmmBackward0" and node._saved_alpha == 1 and node._saved_beta == 1:
        bias, inputs, matrix = node.next_functions
        if _reaches_leaf(bias, stops) and not hasattr(bias[0], "variable"):
            return False
        return _collect(bias, stops, terms) and _head(
            inputs, matrix, "_saved_mat1", node, stops, terms
        )
    if name == "MmBackward0":
        inputs, matrix = node.next_functions
        return _head(inputs, matrix, "_saved_self", node, stops, terms)
    return False


def _head(
    inputs: Edge, matrix: Edge, saved: str, node: Any, stops: Collection[Edge], terms: list[_Head]
) -> bool:
    weight = weight_leaf(matrix)
    values = getattr(node, saved, None)
    if weight is None or values is None or _reaches_leaf(inputs, stops):
        return False
    terms.append((*weight, values.detach()))
    return True


def linear_units(theta: Tensor, gate: SampleGate) -> LinearUnits | None:
    """Recognizes a tensor whose elements are functions of one affine unit each.

    Args:
        theta: a coordinate of a distribution `[*batch]`.
        gate: the sample values, at which the recognition stops.

    Returns:
        The units, or None where the graph holds anything that is not proven to be of this form:
        units that are broadcast, an unknown operation, parameters upstream of the inputs, a weight
        behind a constraint, a weight used twice. Also where torch has renamed what the recognition
        reads.
    """
    if not theta.requires_grad:
        return None
    try:
        return _recognize(theta, gate)
    except AttributeError:
        return None


def _recognize(theta: Tensor, gate: SampleGate) -> LinearUnits | None:
    if theta.grad_fn is None:
        return _bias_units(theta)
    found = _preactivation(edge_of(theta), gate.edges)
    if found is None:
        return None
    edge, terms, routes = found
    units = _assemble(terms, _numel(edge))
    if units is None:
        return None
    places, broadcasts = None, [route.broadcasts for route in routes]
    if not all(_in_turn(*shapes) for route in broadcasts for shapes in route):
        places = _places(broadcasts, units)
        if places is None:
            return None
        places = places.to(theta.device)
    slope = None
    if not all(route.plain for route in routes):
        slope = _slope(theta, edge, any(broadcasts), gate).reshape(-1, units.units)
    return replace(units, slope=slope, places=places)


@dataclass(frozen=True)
class _Route:
    """A way through elementwise operations.

    Attributes:
        broadcasts: shapes before and after each broadcast on the way up, the last one first.
        plain: whether no operation but broadcasts changes values.
    """

    broadcasts: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = ()
    plain: bool = True


def _preactivation(
    edge: Edge, stops: Collection[Edge]
) -> tuple[Edge, list[_Head], list[_Route]] | None:
    """The one affine edge that an edge is an elementwise function of.

    Args:
        edge: of a coordinate.
        stops: edges that are not crossed.

    Returns:
        The affine edge, its terms and the ways to it; None where there is not one alone.
    """
    found: dict[Edge, tuple[list[_Head], list[_Route]]] = {}
    stack, seen = [(edge, _Route())] if _reaches_leaf(edge, stops) else [], set()
    while stack:
        here = edge, route = stack.pop()
        if here in seen:
            continue
        seen.add(here)
        terms: list[_Head] = []
        if edge in found or _collect(edge, stops, terms):
            found.setdefault(edge, (terms, []))[1].append(route)
            continue
        name = edge[0].name()
        if name not in ELEMENTWISE and name not in BROADCASTING:
            return None
        for source in edge[0].next_functions:
            if _reaches_leaf(source, stops):
                shapes = shape_of(source), shape_of(edge)
                wider = prod(shapes[0]) != prod(shapes[1])
                broadcasts = (*route.broadcasts, shapes) if wider else route.broadcasts
                plain = route.plain and (name in ORDER_KEEPING or name in BROADCASTING)
                stack.append((source, _Route(broadcasts, plain)))
    if len(found) != 1:
        return None
    ((edge, (terms, routes)),) = found.items()
    return edge, terms, routes


def _in_turn(source: Sequence[int], target: Sequence[int]) -> bool:
    """Whether a broadcast repeats a tensor as a whole, one copy after the other."""
    while source and source[0] == 1:
        source = source[1:]
    return tuple(target[len(target) - len(source) :]) == tuple(source)


def _places(
    routes: Sequence[tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]], units: LinearUnits
) -> Tensor | None:
    """The row of the inputs that each row of a tensor comes from.

    Args:
        routes: the broadcasts on each way.
        units: what is broadcast.

    Returns:
        `[repeats * rows]`, or None where units are broadcast, or where the ways differ.
    """
    found = []
    for route in routes:
        places: Tensor | None = None
        for source, target in route:
            rows = _row_numbers(source, target, units.units)
            if rows is None:
                return None
            places = rows if places is None else rows[places]
        found.append(torch.arange(units.rows) if places is None else places)
    first, *others = found
    return first if all(torch.equal(first, other) for other in others) else None


def _row_numbers(source: Sequence[int], target: Sequence[int], units: int) -> Tensor | None:
    """Rows of one shape at the places of a wider one, or None where units are broadcast."""
    wide = (*[1] * (len(target) - len(source)), *source)
    ends = [dim for dim in range(len(target) + 1) if prod(target[dim:]) == units]
    if not ends or wide[ends[-1] :] != tuple(target[ends[-1] :]):
        return None
    rows = torch.arange(prod(source) // units).reshape(wide[: ends[-1]])
    return rows.expand(target[: ends[-1]]).reshape(-1)


def _slope(theta: Tensor, edge: Edge, broadcast: bool, gate: SampleGate) -> Tensor:
    """∂θ/∂(preactivation) of every element of θ, which depends on one preactivation each."""
    below, ones = [GradientEdge(*edge)], torch.ones_like(theta)
    with gate.closed():
        if not broadcast:
            (slope,) = torch.autograd.grad([theta], below, [ones], retain_graph=True)
            return slope.detach()
        # Jᵀ c sums over the copies of a preactivation, J 1 does not.
        cotangent = torch.zeros_like(theta, requires_grad=True)
        (product,) = torch.autograd.grad([theta], below, [cotangent], create_graph=True)
        # With respect to c a slope of 0 may not be connected.
        (slope,) = torch.autograd.grad(
            product.sum(), [cotangent], retain_graph=True, materialize_grads=True
        )
    return slope.detach()


def _bias_units(leaf: Tensor) -> LinearUnits:
    """Units without inputs: every entry of a parameter is a unit of its own."""
    term = Term(leaf, tuple(range(leaf.dim())), leaf.new_ones(1, 1))
    return LinearUnits((term,), units=leaf.numel(), rows=1)


def _assemble(heads: Sequence[_Head], numel: int) -> LinearUnits | None:
    """Joins terms whose shapes agree: weights with equally many rows, biases with one per unit."""
    if len({id(leaf) for leaf, _, _ in heads}) != len(heads):
        return None
    if len(heads) == 1 and heads[0][2] is None and heads[0][0].numel() == numel:
        return _bias_units(heads[0][0])
    counts = {leaf.shape[1 if transposed else 0] for leaf, transposed, a in heads if a is not None}
    counts = counts or {leaf.numel() for leaf, _, _ in heads}
    if len(counts) != 1:
        return None
    units = counts.pop()
    rows = numel // units
    terms = []
    for leaf, transposed, inputs in heads:
        axes = (1,) if transposed else (0,)
        if inputs is None:
            if leaf.numel() != units or leaf.shape[-1:] != (units,) or rows * units != numel:
                return None
            inputs, axes = leaf.new_ones(rows, 1), (leaf.dim() - 1,)
        if inputs.shape[0] != rows:
            return None
        terms.append(Term(leaf, axes, inputs))
    return LinearUnits(tuple(terms), units, rows)
