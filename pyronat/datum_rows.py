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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyronat.autograd import SampleGate, vector_jacobian_products
from pyronat.families import Group
from pyronat.layers import Layer, flow_back
from pyronat.records import SiteRecord
from pyronat.weights import joined_dims, spread_weights


@dataclass(frozen=True)
class Data:
    """How the coordinates of a site's base distribution fall into data.

    Attributes:
        record: the site.
        shape: batch shape of the base distribution.
        count: number of data; N below.
        elements: elements of the base distribution that belong to one datum; E below.
        expanded: whether a datum stands for several batch elements of the site.
    """

    record: SiteRecord
    shape: torch.Size
    count: int
    elements: int
    expanded: bool

    def weights(self, weights: Tensor) -> Tensor:
        """What each datum counts for `[count]`, from what each batch element does."""
        distribution = self.record.distribution
        if self.expanded:
            return spread_weights(weights, distribution).reshape(-1)
        return weights.sum_to_size(distribution.batch_shape).reshape(-1)

    def visible(self, like: Tensor) -> Tensor:
        """1 for elements that the distribution itself does not mask, `[count, elements]`."""
        if self.expanded:
            return like.new_ones(self.count, self.elements)
        batch = self.record.distribution.batch_shape
        ones = spread_weights(like.new_ones(batch), self.record.distribution)
        return ones.expand(self.shape).reshape(self.count, self.elements)


def data_of(record: SiteRecord, group: Group) -> Data:
    """The data of a site, as far as one backward pass may tell them apart."""
    shape = torch.broadcast_shapes(
        *(part.shape[: part.dim() - group.event_dim] for part in group.coordinates)
    )
    joined = joined_dims(record.distribution)
    batch = shape[: len(shape) - joined]
    if batch == record.distribution.batch_shape:
        return Data(record, shape, batch.numel(), shape[len(batch) :].numel(), False)
    return Data(record, shape, shape.numel(), 1, True)


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
        """The coordinates, of one batch shape."""
        return tuple(torch.broadcast_tensors(*self.group.coordinates))

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


def mixed_columns(data: Data, group: Group, root: Tensor, count: int) -> Cotangents:
    """L ε / √count with random signs ε, other ones for each datum: E[LεεᵀLᵀ] = F."""
    signs = torch.randint(0, 2, (count, *root.shape[:3]), device=root.device).to(root.dtype) * 2 - 1
    values = (root @ signs.unsqueeze(-1)).squeeze(-1) / count**0.5
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
    root = root.expand(*data.shape, size, size).reshape(data.count, data.elements, size, size)
    return root * data.visible(root)[:, :, None, None].sqrt()


def bound_root(data: Data, group: Group, like: Tensor) -> Tensor | None:
    """The root of the largest Fisher information, as `fisher_root`; None where unbounded."""
    if group.bound is None:
        return None
    bound = torch.as_tensor(group.bound, dtype=like.dtype, device=like.device)
    wide = bound.expand(data.shape).reshape(data.count, data.elements) * data.visible(like)
    return torch.diag_embed(wide.sqrt().unsqueeze(-1).expand(like.shape[:-1]))


@dataclass(frozen=True)
class LayerRows:
    """Rows of one layer: δ ⊗ a, summed over its taps and over the rows of a datum.

    Attributes:
        layer: the layer.
        flowing: δ by tap `[num_cotangents, rows, units]`.
        separable: whether the rows of each datum are known to follow each other.
        complete: whether the taps are all that the coordinates depend on the leaf through.
    """

    layer: Layer
    flowing: tuple[Tensor, ...]
    separable: bool
    complete: bool

    def outer(self, count: int) -> tuple[Tensor, Tensor] | None:
        """(δ `[num_cotangents * count, units]`, a) where a row of J is one outer product."""
        if len(self.flowing) > 1 or self.flowing[0].shape[1] != count:
            return None
        (flowing,), (tap,) = self.flowing, self.layer.taps
        return flowing.flatten(0, 1), tap.inputs.repeat(len(flowing), 1)

    def explicit(self, count: int) -> Tensor:
        """The rows in the entries of the leaf `[num_cotangents, count, entries]`."""
        total: Any = 0
        for tap, flowing in zip(self.layer.taps, self.flowing, strict=True):
            inputs = tap.inputs.reshape(count, -1, tap.inputs.shape[1])
            by_datum = flowing.unflatten(1, (count, -1))
            total = total + torch.einsum("kntu,nti->knui", by_datum, inputs)
        return self._in_leaf(total)

    def combined(self, factors: Tensor) -> Tensor:
        """Σ over rows of factor × δ ⊗ a, of the leaf's shape; factors `[num_cotangents, count]`."""
        total: Any = 0
        for tap, flowing in zip(self.layer.taps, self.flowing, strict=True):
            rows = flowing.shape[1]
            spread = factors.repeat_interleave(rows // factors.shape[1], 1).unsqueeze(2)
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
    layers: Sequence[Layer], cotangents: Cotangents, gate: SampleGate
) -> list[LayerRows]:
    """Rows of layers, checked against the gradient of a random combination of them.

    Args:
        layers: the layers.
        cotangents: which rows.
        gate: the sample values.

    Returns:
        For each layer its rows.
    """
    values, count = cotangents.values, cotangents.data.count
    found = flow_back(layers, cotangents.outputs, cotangents.split(values), gate)
    like = values.new_ones(len(values), count)
    signs = torch.randint(0, 2, like.shape, device=like.device).to(like.dtype) * 2 - 1
    factors = signs * (1 + torch.rand_like(like))
    # If data were mixed up, or a use of the leaf were missing, these two would not agree.
    trials = torch.stack([(values * f[:, :, None, None]).sum(0) for f in (factors, like)])
    leaves = [layer.leaf for layer in layers]
    gradients = vector_jacobian_products(cotangents.outputs, leaves, cotangents.split(trials), gate)
    result = []
    for layer, flowing, gradient in zip(layers, found, gradients, strict=True):
        rows = LayerRows(layer, flowing, False, False)
        fits = all(len(tap.inputs) % count == 0 for tap in layer.taps)
        expected = layer.leaf.new_zeros(2, *layer.leaf.shape) if gradient is None else gradient
        agree = [
            _agrees(rows.combined(f if fits else f[:, :1]), g)
            for f, g in zip((factors, like), expected, strict=True)
        ]
        separable = fits and agree[0]
        result.append(LayerRows(layer, flowing, separable, separable or agree[1]))
    return result


def _agrees(ours: Tensor, theirs: Tensor) -> bool:
    tolerance = torch.finfo(ours.dtype).eps ** 0.5 * (1 + ours.numel()) ** 0.25
    return bool((ours.detach() - theirs).norm() <= tolerance * theirs.norm() + 1e-30)


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
