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
        present: whether it has one in this run `[count]`.
        jacobian: ∂θ/∂(entries of the unit) `[count, coordinates, size]`.
        diagonal: whether the diagonal of the matrices is wanted alone.
    """

    block: str
    record: SiteRecord
    group: Group
    data: Data
    elements: Tensor
    present: Tensor
    jacobian: Tensor
    diagonal: bool

    def curvature(self, weights: Tensor, with_matrix: bool = True) -> Curvature:
        """w_u J_uᵀ F_u J_u, see `Factor.curvature`."""
        size = self.jacobian.shape[1]
        weights = weights.to(self.jacobian.dtype).sum_to_size(self.record.distribution.batch_shape)
        spread = self.data.total(spread_weights(weights, self.record.distribution))
        own = spread.reshape(-1)[self.elements] * self.present
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


@dataclass(frozen=True)
class Slopes:
    """Derivatives of a coordinate by the entries of a parameter, each of which reaches one element.

    Attributes:
        values: `[entries]`, 0 where an entry reaches none.
        places: number of the coordinate that each entry reaches `[entries]`.
        reached: whether it reaches one `[entries]`.
    """

    values: Tensor
    places: Tensor
    reached: Tensor


def slopes_of(
    coordinates: Sequence[Tensor], leaves: Mapping[str, Tensor], gate: SampleGate
) -> list[dict[str, Slopes]] | None:
    """Derivatives of coordinates that are functions of one entry of each parameter.

    Entries belong to coordinates at their own place, or where there are more of them than of
    coordinates, as of local variables of which a batch holds a few, to those that a backward pass
    with their numbers tells.

    Args:
        coordinates: tensors of one number n of elements.
        leaves: parameters by name.
        gate: the sample values, which are held fixed.

    Returns:
        For each coordinate its derivatives by parameter, or None where an entry reaches several
        elements, or others than those at its place.
    """
    count = coordinates[0].numel()
    if any(leaf.numel() < count for leaf in leaves.values()):
        return None
    trial = 1 + torch.rand(count, dtype=coordinates[0].dtype, device=coordinates[0].device)
    numbers = torch.arange(count, device=trial.device)
    cotangents = torch.stack([torch.ones_like(trial), trial, 1 + numbers.to(trial)])
    if all(leaf.numel() == count for leaf in leaves.values()):
        cotangents = cotangents[:2]
    found = []
    for coordinate in coordinates:
        rows = vector_jacobian_products(
            [coordinate],
            list(leaves.values()),
            [cotangents.reshape(-1, *coordinate.shape)],
            gate,
        )
        slopes = {}
        for (name, leaf), row in zip(leaves.items(), rows, strict=True):
            flat = cotangents.new_zeros(len(cotangents), leaf.numel()) if row is None else row
            values, mixed, *told = flat.reshape(len(cotangents), -1)
            places, reached = numbers, torch.ones_like(values, dtype=torch.bool)
            if leaf.numel() > count:
                reached = values != 0
                exact = told[0] / torch.where(reached, values, 1)
                places = torch.where(reached, exact.round() - 1, 0).long().clamp(0, count - 1)
            tolerance = torch.finfo(values.dtype).eps ** 0.5 * values.abs().max()
            if bool(((mixed - trial[places] * values).abs() > tolerance).any()):
                return None
            slopes[name] = Slopes(values, places, reached)
        found.append(slopes)
    return found


def unit_jacobian(
    block: ParamBlock, layout: Layout, slopes: Sequence[Mapping[str, Slopes]], each: int
) -> tuple[Tensor, Tensor, Tensor] | None:
    """The Jacobian of each unit, if the units belong to one element each.

    Args:
        block: the block.
        layout: where its parameters lie.
        slopes: of each coordinate, by parameter.
        each: coordinates that a tensor of coordinates has for one element.

    Returns:
        The element of each unit `[count]`, whether it has one `[count]`, and ∂θ/∂(entries)
        `[count, coordinates, size]`; None if the entries of a unit belong to several elements.
    """
    shapes = dict(zip(block.params, block.shapes, strict=True))

    def packed(part: str, own: Mapping[str, Slopes]) -> Tensor:
        parts = {name: getattr(own[name], part).reshape(shape) for name, shape in shapes.items()}
        return layout.pack(parts)

    columns, elements, reached = [], [], []
    for own in slopes:
        places, found = packed("places", own), packed("reached", own)
        parts = torch.nn.functional.one_hot(places % each, each)
        columns.append((packed("values", own).unsqueeze(2) * parts).mT)
        elements.append(torch.where(found, places // each, -1))
        reached.append(found)
    numbers = torch.cat(elements, 1)
    element = numbers.amax(1)
    if bool((torch.cat(reached, 1) & (numbers != element.unsqueeze(1))).any()):
        return None
    return element.clamp_min(0), element >= 0, torch.cat(columns, 1)
