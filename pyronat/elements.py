"""Coordinates that are functions of one entry of each parameter, as those of a mean field are.

The Jacobian of such coordinates is diagonal, so that one backward pass gives all of it. Whether it
is diagonal is checked by a second one, of a random combination.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyronat.autograd import SampleGate
from pyronat.blocks import ParamBlock
from pyronat.curvature import Curvature, Factor, largest_eigenvalue_bound
from pyronat.datum_rows import Data
from pyronat.families import Group
from pyronat.jacobians import vector_jacobian_products
from pyronat.operators import BlockMatrix, BlockOperator, Diagonal, Layout
from pyronat.records import SiteRecord
from pyronat.weights import spread_weights


@dataclass(frozen=True)
class ElementFactor(Factor):
    """What one site contributes to units that belong to one element of its distribution each.

    Attributes:
        block: name of the block.
        record: the site in that run.
        group: the coordinates.
        data: the data of the site.
        elements: the element of each unit `[count]`.
        jacobian: ∂θ/∂(entries of the unit) `[count, coordinates, size]`.
        diagonal: whether the diagonal of the matrices is wanted alone.
    """

    block: str
    record: SiteRecord
    group: Group
    data: Data
    elements: Tensor
    jacobian: Tensor
    diagonal: bool

    def curvature(self, weights: Tensor, with_matrix: bool = True) -> Curvature:
        """w_u J_uᵀ F_u J_u, see `Factor.curvature`."""
        size = self.jacobian.shape[1]
        weights = weights.to(self.jacobian.dtype).sum_to_size(self.record.distribution.batch_shape)
        spread = self.data.total(spread_weights(weights, self.record.distribution))
        own = spread.reshape(-1)[self.elements]
        fisher = self.data.own(self.group.fisher).reshape(-1, size, size)[self.elements]
        reference = fisher
        if self.group.bound is not None:
            bound = torch.as_tensor(self.group.bound, dtype=own.dtype, device=own.device)
            wide = self.data.own(bound.expand(self.group.fisher.shape[:-2])).reshape(-1)
            eye = torch.eye(size, dtype=own.dtype, device=own.device)
            reference = wide[self.elements][:, None, None] * eye
        reached = (own > 0).to(own.dtype)
        norms = reference.diagonal(dim1=1, dim2=2).sqrt() * self.jacobian.abs().sum(2)
        operator: BlockOperator | None = None
        if with_matrix:
            weighted = own[:, None, None] * fisher @ self.jacobian
            if self.diagonal:
                operator = Diagonal((self.jacobian * weighted).sum(1))
            else:
                operator = BlockMatrix(self.jacobian.mT @ weighted)
        largest = largest_eigenvalue_bound(reference @ self.jacobian @ self.jacobian.mT)
        return Curvature(
            operator,
            leverage=reached * self.record.largest_scale * largest,
            reach=2 * reached * norms.amax(1),
            mass=weights.sum(),
        )


def slopes_of(
    coordinates: Sequence[Tensor], leaves: Mapping[str, Tensor], gate: SampleGate
) -> list[dict[str, Tensor]] | None:
    """Derivatives of each coordinate by the entry at its own place.

    Args:
        coordinates: tensors of one number n of elements.
        leaves: parameters by name.
        gate: the sample values, which are held fixed.

    Returns:
        For each coordinate its derivatives `[n]` by parameter, or None where a coordinate depends
        on an entry at another place.
    """
    count = coordinates[0].numel()
    if any(leaf.numel() != count for leaf in leaves.values()):
        return None
    trial = 1 + torch.rand(count, dtype=coordinates[0].dtype, device=coordinates[0].device)
    cotangents = torch.stack([torch.ones_like(trial), trial])
    found = []
    for coordinate in coordinates:
        rows = vector_jacobian_products(
            [coordinate], list(leaves.values()), [cotangents.reshape(2, *coordinate.shape)], gate
        )
        slopes = {}
        for name, row in zip(leaves, rows, strict=True):
            slope, mixed = cotangents.new_zeros(2, count) if row is None else row.reshape(2, -1)
            tolerance = torch.finfo(slope.dtype).eps ** 0.5 * slope.abs().max()
            if bool(((mixed - trial * slope).abs() > tolerance).any()):
                return None
            slopes[name] = slope
        found.append(slopes)
    return found


def unit_jacobian(
    block: ParamBlock, layout: Layout, slopes: Sequence[Mapping[str, Tensor]], each: int
) -> tuple[Tensor, Tensor] | None:
    """The Jacobian of each unit, if the units belong to one element each.

    Args:
        block: the block.
        layout: where its parameters lie.
        slopes: of each coordinate, by parameter `[elements * each]`.
        each: coordinates that a tensor of coordinates has for one element.

    Returns:
        The element of each unit `[count]`, and ∂θ/∂(entries) `[count, coordinates, size]`; None
        if the entries of a unit belong to several elements.
    """
    like = slopes[0][block.params[0]]
    places = torch.arange(len(like), device=like.device)
    shapes = dict(zip(block.params, block.shapes, strict=True))
    index = layout.pack({name: places.reshape(shape) for name, shape in shapes.items()})
    elements = index // each
    if not bool((elements == elements[:, :1]).all()):
        return None
    columns = []
    for own in slopes:
        packed = layout.pack({name: own[name].reshape(shape) for name, shape in shapes.items()})
        places = torch.nn.functional.one_hot(index % each, each)
        columns.append((packed.unsqueeze(2) * places).mT)
    return elements[:, 0], torch.cat(columns, 1)
