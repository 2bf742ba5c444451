"""Rows of a square root of the Fisher information, datum by datum.

With L Lᵀ = F the Fisher information of a datum's coordinates θ, the rows Lᵀ J of all data have
Σ_n w_n (L_nᵀ J_n)ᵀ (L_nᵀ J_n) = Σ_n w_n J_nᵀ F_n J_n. One backward pass with a column of L for
every datum at once gives a row of each, since what flows back into a layer keeps the data apart:
a row of J is δ ⊗ a. Whether it does is checked by comparison with the gradient of a random
combination. Where there are too many coordinates, random signs mix the columns of each datum,
which keeps the expectation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from pyronat.autograd import SampleGate
from pyronat.families import Group
from pyronat.jacobians import vector_jacobian_products
from pyronat.layers import Layer, flow_back
from pyronat.records import SiteRecord
from pyronat.weights import joined_dims, spread_weights, without_copies
from pyronat.wrappers import wrappers


@dataclass(frozen=True)
class Data:
    """How the coordinates of a site's base distribution fall into data.

    Attributes:
        record: the site.
        shape: batch shape of the base distribution, 1 where all its elements are one.
        count: number of data; N below.
        elements: elements of the base distribution that belong to one datum; E below.
        expanded: whether a datum stands for several batch elements of the site.
        repeated: batch dimensions of the site along which its coordinates are copies.
    """

    record: SiteRecord
    shape: torch.Size
    count: int
    elements: int
    expanded: bool
    repeated: tuple[int, ...] = ()

    def weights(self, weights: Tensor) -> Tensor:
        """What each datum counts for `[count]`, from what each batch element does."""
        distribution = self.record.distribution
        if self.expanded:
            return spread_weights(weights, distribution).reshape(-1)
        return self.total(weights.sum_to_size(distribution.batch_shape)).reshape(-1)

    def own(self, tensor: Tensor) -> Tensor:
        """A tensor `[*base_batch, *rest]` without copies."""
        return without_copies(tensor, self.repeated)

    def total(self, tensor: Tensor) -> Tensor:
        """A tensor `[*base_batch, *rest]` summed over copies."""
        return tensor.sum(self.repeated, keepdim=True) if self.repeated else tensor

    def visible(self, like: Tensor) -> Tensor:
        """1 for elements that the distribution itself does not mask, `[count, elements]`."""
        if self.expanded:
            return like.new_ones(self.count, self.elements)
        batch = self.record.distribution.batch_shape
        ones = spread_weights(like.new_ones(batch), self.record.distribution)
        joined = joined_dims(self.record.distribution)
        wide = ones.expand(torch.Size([*batch, *ones.shape[ones.dim() - joined :]]))
        return self.own(wide).reshape(self.count, self.elements)


def data_of(record: SiteRecord, group: Group) -> Data:
    """The data of a site, as far as one backward pass may tell them apart.

    Particles that a loss has added, and plates that a distribution was expanded by, repeat the
    same coordinates: they are taken once, with all their weight.

    Args:
        record: the site.
        group: a group of its coordinates.

    Returns:
        The data.
    """
    wide = torch.broadcast_tensors(*group.coordinates)
    shape = wide[0].shape[: wide[0].dim() - group.event_dim]
    joined = joined_dims(record.distribution)
    batch = shape[: len(shape) - joined]
    if batch != record.distribution.batch_shape:
        return Data(record, shape, shape.numel(), 1, True)
    masked = any(type(w).__name__ == "MaskedDistribution" for w in wrappers(record.distribution))
    repeated = tuple(
        dim
        for dim, size in enumerate(batch)
        if size > 1 and not masked and all(part.stride(dim) == 0 for part in wide)
    )
    own = torch.Size([1 if dim in repeated else size for dim, size in enumerate(shape)])
    count = own[: len(batch)].numel()
    return Data(record, own, count, own[len(batch) :].numel(), False, repeated)


@dataclass(frozen=True)
class Cotangents:
    """Columns of L for every datum at once, or random mixtures of them.

    Attributes:
        data: what they belong to.
        values: `[num_cotangents, count, elements, size]`.
        group: the coordinates.
    """

    data: Data
    values: Tensor
    group: Group

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        """The coordinates, of one batch shape, without copies."""
        wide = torch.broadcast_tensors(*self.group.coordinates)
        return tuple(self.data.own(part) for part in wide)

    def split(self, values: Tensor) -> list[Tensor]:
        """Values `[*rows, count, elements, size]` as cotangents of the coordinates."""
        event = self.outputs[0].shape[len(self.data.shape) :]
        parts = values.chunk(len(self.group.coordinates), -1)
        rows = values.shape[:-3]
        return [part.reshape(*rows, *self.data.shape, *event) for part in parts]


def all_columns(data: Data, group: Group, root: Tensor) -> Cotangents:
    """Every column of L by itself, E × size in number.

    Args:
        data: what they belong to.
        group: the coordinates.
        root: L `[count, elements, size, size]`.

    Returns:
        The cotangents; the number of the element runs before that of the column.
    """
    elements, size = root.shape[1:3]
    values = root.new_zeros(elements, size, *root.shape[:3])
    for element in range(elements):
        values[element, :, :, element] = root[:, element].permute(2, 0, 1)
    return Cotangents(data, values.flatten(0, 1), group)


def with_signs(columns: Cotangents) -> Cotangents:
    """The same with a random sign for each datum.

    Where a network mixes data, what flows back from them then adds up right on average.

    Args:
        columns: the cotangents.

    Returns:
        The cotangents with signs.
    """
    values = columns.values
    signs = _signs(values.new_empty(columns.data.count, 1, 1))
    return replace(columns, values=values * signs)


def _signs(like: Tensor) -> Tensor:
    """Random signs of the shape of a tensor."""
    return torch.randint(0, 2, like.shape, device=like.device).to(like.dtype) * 2 - 1


def mixed_columns(data: Data, group: Group, root: Tensor, count: int) -> Cotangents:
    """L ε / √count with random signs ε, other ones for each datum: E[LεεᵀLᵀ] = F."""
    signs = _signs(root.new_empty(count, *root.shape[:3]))
    # One coordinate is most frequent, and products of 1 × 1 matrices take their time.
    mixed = root[..., 0] * signs if root.shape[-1] == 1 else (root @ signs.unsqueeze(-1))[..., 0]
    values = mixed / count**0.5
    return Cotangents(data, values, group)


def fisher_root(data: Data, group: Group) -> Tensor:
    """L with L Lᵀ = F, 0 for masked elements, `[count, elements, size, size]`."""
    fisher = group.fisher
    size = fisher.shape[-1]
    if size == 1:
        root = fisher.clamp_min(0).sqrt()
    else:
        values, vectors = torch.linalg.eigh(fisher.to(torch.float64))
        root = (vectors * values.clamp_min(0).sqrt().unsqueeze(-2)).to(fisher.dtype)
    root = (
        data
        .own(root)
        .expand(*data.shape, size, size)
        .reshape(data.count, data.elements, size, size)
    )
    return root * data.visible(root)[:, :, None, None].sqrt()


def bound_root(data: Data, group: Group, like: Tensor) -> Tensor | None:
    """The root of the largest Fisher information, as `fisher_root`; None where unbounded."""
    if group.bound is None:
        return None
    bound = torch.as_tensor(group.bound, dtype=like.dtype, device=like.device)
    if bound.dim() == len(data.shape):
        bound = data.own(bound)
    wide = bound.expand(data.shape).reshape(data.count, data.elements) * data.visible(like)
    return torch.diag_embed(wide.sqrt().unsqueeze(-1).expand(like.shape[:-1]))


Order: TypeAlias = Literal["together", "alternating"]
"""Whether the rows of a datum follow each other, or each datum has one row in turn."""


def along_rows(values: Tensor, rows: int, order: Order) -> Tensor:
    """Values of the data `[*, count]` as those of rows `[*, rows]`."""
    times = rows // values.shape[-1]
    if order == "together":
        return values.repeat_interleave(times, -1)
    return values.repeat(*[1] * (values.dim() - 1), times)


def by_datum(rows: Tensor, count: int, order: Order) -> Tensor:
    """`[*, rows, width]` → `[*, count, rows of a datum, width]`."""
    shape = (count, -1) if order == "together" else (-1, count)
    found: Tensor = rows.unflatten(-2, shape)
    return found if order == "together" else found.transpose(-3, -2)


@dataclass(frozen=True)
class LayerRows:
    """Rows of one layer: δ ⊗ a, summed over its taps and over the rows of a datum.

    Attributes:
        layer: the layer.
        flowing: δ by tap `[num_cotangents, rows, units]`.
        order: of the rows of taps that have several for each datum; None if data are mixed.
        complete: whether the taps are all that the coordinates depend on the leaf through.
    """

    layer: Layer
    flowing: tuple[Tensor, ...]
    order: Order | None
    complete: bool

    def outer(self, count: int) -> tuple[Tensor, Tensor] | None:
        """(δ `[num_cotangents * count, units]`, a) where a row of J is one outer product."""
        if len(self.flowing) > 1 or self.flowing[0].shape[1] != count:
            return None
        (flowing,), (tap,) = self.flowing, self.layer.taps
        return flowing.flatten(0, 1), tap.inputs.repeat(len(flowing), 1)

    def explicit(self, count: int) -> Tensor:
        """The rows in the entries of the leaf `[num_cotangents, count, entries]`."""
        assert self.order is not None
        total: Any = 0
        for tap, flowing in zip(self.layer.taps, self.flowing, strict=True):
            inputs = by_datum(tap.inputs, count, self.order)
            products = torch.einsum("kntu,nti->knui", by_datum(flowing, count, self.order), inputs)
            total = total + products
        return self._in_leaf(total)

    def combined(self, factors: Tensor, order: Order = "together") -> Tensor:
        """Σ over rows of factor × δ ⊗ a, of the leaf's shape; factors `[num_cotangents, count]`."""
        total: Any = 0
        for tap, flowing in zip(self.layer.taps, self.flowing, strict=True):
            spread = along_rows(factors, flowing.shape[1], order).unsqueeze(2)
            total = total + (flowing * spread).sum(0).mT @ tap.inputs
        return self._in_leaf(total).reshape(self.layer.leaf.shape)

    def _in_leaf(self, matrices: Tensor) -> Tensor:
        """`[*rows, units, fan_in]` → `[*rows, entries]` in the order of the leaf."""
        rows, leaf = matrices.shape[:-2], self.layer.leaf
        units = leaf.shape[self.layer.unit_axis]
        others = [size for axis, size in enumerate(leaf.shape) if axis != self.layer.unit_axis]
        spread = matrices.reshape(*rows, units, *others)
        return spread.movedim(len(rows), len(rows) + self.layer.unit_axis).flatten(len(rows))


def layer_rows(
    layers: Sequence[Layer], cotangents: Cotangents, gate: SampleGate, power: float = 0.5
) -> list[LayerRows]:
    """Rows of layers, checked against the gradient of a random combination of them.

    Args:
        layers: the layers.
        cotangents: which rows.
        gate: the sample values.
        power: of the precision of the type, up to which they have to agree; the rows are right to
            that accuracy even if data are not quite separate.

    Returns:
        For each layer its rows, in the order in which they agree.
    """
    values, count = cotangents.values, cotangents.data.count
    found = flow_back(layers, cotangents.outputs, cotangents.split(values), gate)
    like = values.new_ones(len(values), count)
    factors = _signs(like) * (1 + torch.rand_like(like))
    # If data were mixed up, or a use of the leaf were missing, these would not agree.
    gradients = _combination(layers, cotangents, factors, gate)
    result = []
    for layer, flowing, gradient in zip(layers, found, gradients, strict=True):
        rows = LayerRows(layer, flowing, None, False)
        orders: tuple[Order, ...] = ("together", "alternating")
        fits = all(len(tap.inputs) % count == 0 for tap in layer.taps)
        order = next(
            (
                o
                for o in orders
                if fits and _agrees(rows.combined(factors, o), gradient, rows, power)
            ),
            None,
        )
        complete = order is not None
        if not complete:  # whether data are mixed or uses are missing
            (plain,) = _combination([layer], cotangents, like, gate)
            complete = _agrees(rows.combined(like[:, :1]), plain, rows, power)
        result.append(LayerRows(layer, flowing, order, complete))
    return result


def _combination(
    layers: Sequence[Layer], cotangents: Cotangents, factors: Tensor, gate: SampleGate
) -> list[Tensor]:
    """Σ factor × row of each layer, of its leaf's shape; factors `[num_cotangents, count]`."""
    values = (cotangents.values * factors[:, :, None, None]).sum(0, keepdim=True)
    leaves = [layer.leaf for layer in layers]
    found = vector_jacobian_products(cotangents.outputs, leaves, cotangents.split(values), gate)
    return [
        torch.zeros_like(leaf) if gradient is None else gradient[0]
        for leaf, gradient in zip(leaves, found, strict=True)
    ]


def same_rows(
    known: Sequence[LayerRows], cotangents: Cotangents, gate: SampleGate
) -> list[LayerRows]:
    """Other rows of layers whose order has been found out.

    Args:
        known: rows of the same layers in the same graph.
        cotangents: which rows.
        gate: the sample values.

    Returns:
        For each layer its rows.
    """
    layers = [rows.layer for rows in known]
    found = flow_back(layers, cotangents.outputs, cotangents.split(cotangents.values), gate)
    return [replace(rows, flowing=flowing) for rows, flowing in zip(known, found, strict=True)]


def _agrees(combined: Tensor, gradient: Tensor, rows: LayerRows, power: float) -> bool:
    """Whether a combination of rows is a gradient, up to rounding.

    Args:
        combined: the combination, with factors of up to 2.
        gradient: of the leaf.
        rows: what was combined.
        power: see `layer_rows`.

    Returns:
        Whether they agree; where one of them is not finite, nobody can tell.
    """
    magnitudes = [
        (flowing.norm(dim=(0, 2)) @ tap.inputs.norm(dim=1))
        for flowing, tap in zip(rows.flowing, rows.layer.taps, strict=True)
    ]
    eps = torch.finfo(gradient.dtype).eps
    rounding = 100 * eps * torch.stack(magnitudes).sum()
    return not bool((combined - gradient).norm() > eps**power * gradient.norm() + rounding)


def remaining_rows(
    leaf: Tensor, cotangents: Cotangents, gate: SampleGate, chunk: int = 64
) -> Tensor:
    """Rows of a parameter that is no layer, one backward pass for each.

    Args:
        leaf: the parameter.
        cotangents: which rows.
        gate: the sample values.
        chunk: backward passes at once.

    Returns:
        `[num_cotangents, count, entries]`.
    """
    values, count = cotangents.values, cotangents.data.count
    places = torch.arange(len(values) * count, device=values.device)
    parts = []
    for some in places.split(chunk):
        alone = values.new_zeros(len(some), *values.shape[1:])
        index = torch.arange(len(some), device=values.device)
        alone[index, some % count] = values[some // count, some % count]
        (rows,) = vector_jacobian_products(
            cotangents.outputs, [leaf], cotangents.split(alone), gate
        )
        nothing = leaf.new_zeros(len(some), leaf.numel()).detach()
        parts.append(nothing if rows is None else rows.reshape(len(some), -1))
    found: Tensor = torch.cat(parts).unflatten(0, (len(values), count))
    return found
