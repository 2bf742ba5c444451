"""Local Fisher information of a program's parameter blocks, from runs of the program.

One run gives every block its *factors*: inputs of linear units or Jacobians, and the Fisher
information of the family at the run's parents. Weights say what the run stands for: dreams,
importance-weighted posterior samples, or enumerated states. Weighted factors sum to a block's
`Curvature`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from pyronat.blocks import Structure
from pyronat.conjugate_gradients import IterativeUnits
from pyronat.factored import operator_from
from pyronat.families import Group
from pyronat.operators import BlockMatrix, BlockOperator, Diagonal, lerp
from pyronat.records import SiteRecord
from pyronat.shared import SharedUnits
from pyronat.tables import TableRows
from pyronat.unit_rows import UnitRows
from pyronat.weights import joined_dims, spread_weights, without_copies

_BY_UNIT = (BlockMatrix, Diagonal)
"""Operators that hold a tensor whose first dimension numbers the units."""


@dataclass(frozen=True)
class Curvature:
    """Local second-order information of one block, in the units of the loss (nats).

    Attributes:
        operator: Fisher information Σ w Jᵀ F J, or the approximation of it that the block is held
            in, or None where not measured.
        leverage: w_ref E‖a‖² × scale `[count]`: how far one datum can move its own coordinate,
            squared, with w_ref the largest Fisher weight of the family, over the data that reach
            the unit; 0 where none did.
        reach: 2 √w_ref E‖a‖₁ `[count]`: how far a unit change of all entries moves a coordinate,
            in units of a logit for the Bernoulli family.
        mass: what all data of all sites count for, `[]`: their number times the loss's scale.
    """

    operator: BlockOperator | None
    leverage: Tensor
    reach: Tensor
    mass: Tensor = field(default_factory=lambda: torch.zeros(()))

    @property
    def matrix(self) -> Tensor | None:
        """The Fisher information `[count, size, size]`, where it is held so."""
        return self.operator.matrix if isinstance(self.operator, BlockMatrix) else None

    def __add__(self, other: Curvature) -> Curvature:
        """Sum over sites: Fisher informations add, the largest leverage and reach count."""
        operator = self.operator
        if operator is not None and other.operator is not None:
            operator = operator + other.operator
        return Curvature(
            operator,
            torch.maximum(self.leverage, other.leverage),
            torch.maximum(self.reach, other.reach),
            torch.maximum(self.mass, other.mass),
        )

    def mix(self, other: Curvature, share: float) -> Curvature:
        """(1 − share) of this and `share` of the other.

        A unit that one of them has not reached, whose leverage and reach are 0 there, keeps those
        of the other.
        """

        def lerp_reached(a: Tensor, b: Tensor) -> Tensor:
            return torch.where(a == 0, b.to(a.dtype), torch.where(b == 0, a, lerp(a, b, share)))

        operator = self.operator
        if operator is not None and other.operator is not None:
            operator = operator.lerp(other.operator, share)
        return Curvature(
            operator,
            lerp_reached(self.leverage, other.leverage),
            lerp_reached(self.reach, other.reach),
            lerp_reached(self.mass, other.mass),
        )

    def visit(self, other: Curvature, share: float) -> Curvature:
        """As `mix`, but a unit that one of them has not reached keeps the matrix of the other.

        So what few batches reach, as local variables and rare rows of tables, keeps what it had
        when it was last reached.
        """
        mixed = self.mix(other, share)
        if mixed.operator is None:
            return mixed
        operator = _of_units(other.reach > 0, mixed.operator, self.operator)
        return replace(mixed, operator=_of_units(self.reach > 0, operator, other.operator))

    def filled(self) -> BlockOperator:
        """The operator, with the mean over the other units where none has been reached."""
        assert self.operator is not None
        reached = self.reach > 0
        if not isinstance(self.operator, _BY_UNIT) or bool(reached.all()):
            return self.operator
        held = self.operator.held
        weights = reached.to(held) / reached.sum().clamp_min(1)
        mean = (weights @ held.flatten(1)).reshape(1, *held.shape[1:])
        return _of_units(reached, self.operator, type(self.operator)(mean.expand_as(held)))

    def compact(self) -> Curvature:
        """The same in fewer numbers, see `BlockOperator.compact`."""
        return replace(self, operator=None if self.operator is None else self.operator.compact())

    def unreached(self) -> Curvature:
        """What a run contributes that reaches none of the units."""
        operator = None if self.operator is None else self.operator.zeros()
        nothing = map(torch.zeros_like, (self.leverage, self.reach, self.mass))
        return Curvature(operator, *nothing)

    def state(self) -> dict[str, Any]:
        """Plain tensors, numbers, strings, lists and dicts."""
        operator = None if self.operator is None else self.operator.state()
        return {
            "operator": operator,
            "leverage": self.leverage,
            "reach": self.reach,
            "mass": self.mass,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Curvature:
        """The curvature of a `state`."""
        operator = None if state["operator"] is None else operator_from(state["operator"])
        return cls(operator, state["leverage"], state["reach"], state["mass"])


class Factor(ABC):
    """What one site of one run contributes to a block, up to weights.

    Attributes:
        block: name of the block.
        record: the site in that run.
        group: the coordinates of its family that the block is reached through.
    """

    block: str
    record: SiteRecord
    group: Group

    @abstractmethod
    def curvature(self, weights: Tensor, with_matrix: bool = True) -> Curvature:
        """Σ_n w_n J_nᵀ F_n J_n with its leverage and reach.

        Args:
            weights: what each batch element of the site counts for, `[*batch]` or wider.
            with_matrix: whether the matrix is wanted.

        Returns:
            The curvature of the block, of this site in this run alone.
        """


@dataclass(frozen=True)
class UnitFactor(Factor):
    """What one site contributes to units that are held one by one.

    Attributes:
        block: name of the block.
        record: the site in that run.
        group: the coordinates of its family that the block is reached through.
        units: number of linear units, or 1.
        inputs: inputs of linear units `[rows, fan_in]`, in the order of the block, or None.
        slope: ∂θ/∂(preactivation) `[repeats * rows, units]`, or None where it is 1.
        places: row of the inputs behind each of those rows, or None where all are repeated in turn.
        jacobian: ∂θ/∂(entries) `[batch * coordinates, units, size]`, or None for linear units; with
            a table `[rows * coordinates, units, size]`.
        structure: how the units are held.
        repeated: batch dimensions along which the Jacobian has one row for all.
        table: which row of a table each element has, or None.
    """

    block: str
    record: SiteRecord
    group: Group
    units: int
    inputs: Tensor | None = None
    slope: Tensor | None = None
    places: Tensor | None = None
    jacobian: Tensor | None = None
    structure: Structure = "unit"
    repeated: tuple[int, ...] = ()
    table: TableRows | None = None

    @property
    def fisher(self) -> Tensor:
        """Fisher information of the family `[*batch, size, size]`, in the type of the block."""
        like = self.jacobian if self.inputs is None else self.inputs
        return self.group.fisher if like is None else self.group.fisher.to(like.dtype)

    @property
    def bound(self) -> Tensor | float | None:
        """Largest Fisher weight `[*batch]` or scalar, or None where unbounded."""
        return self.group.bound

    def curvature(self, weights: Tensor, with_matrix: bool = True) -> Curvature:
        """Σ_n w_n J_nᵀ F_n J_n, see `Factor.curvature`."""
        distribution = self.record.distribution
        weights = weights.to(self.fisher.dtype).sum_to_size(distribution.batch_shape)
        spread = spread_weights(weights, distribution)
        if self.inputs is not None:
            curvature = self._of_units(spread, self.inputs, with_matrix)
        else:
            curvature = self._of_entries(spread, with_matrix)
        leverage = curvature.leverage * self.record.largest_scale
        return replace(curvature, leverage=leverage, mass=weights.sum())

    def _of_units(self, spread: Tensor, inputs: Tensor, with_matrix: bool) -> Curvature:
        fisher = self.fisher[..., 0, 0]
        weighted = (spread * fisher).reshape(-1, self.units)
        squared = None if self.slope is None else self.slope.to(inputs.dtype) ** 2
        if squared is not None:
            weighted = weighted * squared
        reference = self._reference(fisher, squared)
        share = self.by_input(spread.reshape(-1, self.units).sum(1, keepdim=True)).squeeze(1)
        share = share / share.sum().clamp_min(torch.finfo(share.dtype).tiny)
        operator: BlockOperator | None = None
        if with_matrix:
            operator = _linear_units(self.structure, self.by_input(weighted), inputs)
        return Curvature(
            operator,
            leverage=reference * (share @ (inputs**2).sum(1)),
            reach=2 * reference.sqrt() * (share @ inputs.abs().sum(1)),
        )

    def _reference(self, fisher: Tensor, squared: Tensor | None) -> Tensor:
        """Largest Fisher weight of each linear unit in its preactivation `[units]`."""
        bound = fisher if self.bound is None else torch.as_tensor(self.bound).to(fisher)
        if squared is None and bound.dim() == 0:
            return bound.expand(self.units)
        largest = bound.expand_as(fisher).reshape(-1, self.units)
        return (largest if squared is None else largest * squared).amax(0)

    def by_input(self, values: Tensor) -> Tensor:
        """Values `[repeats * rows, n]` of linear units, summed over the copies of each row."""
        assert self.inputs is not None
        rows, width = len(self.inputs), values.shape[1]
        if self.places is None:
            return values.reshape(-1, rows, width).sum(0)
        return values.new_zeros(rows, width).index_add_(0, self.places, values)

    def _of_entries(self, spread: Tensor, with_matrix: bool) -> Curvature:
        assert self.jacobian is not None
        size = self.fisher.shape[-1]
        wide = self.fisher.expand(*spread.shape, size, size)
        bounds = torch.as_tensor(0.0 if self.bound is None else self.bound, dtype=spread.dtype)
        bounds = bounds.expand(spread.shape)
        wide, bounds = (without_copies(part, self.repeated) for part in (wide, bounds))
        if self.repeated:
            spread = spread.sum(self.repeated, keepdim=True)
        fisher, bounds = wide.reshape(-1, size, size), bounds.reshape(-1)
        flat = spread.reshape(-1)
        jacobian = self.jacobian.unflatten(0, (-1, size)).movedim(2, 0)
        tiny = torch.finfo(flat.dtype).tiny
        weighted = self._by_row(flat[:, None, None] * fisher) @ jacobian
        if self.bound is None:
            largest, roots = weighted, fisher.diagonal(dim1=1, dim2=2).sqrt()
        else:
            largest = self._by_row(flat * bounds)[:, None, None] * jacobian
            roots = bounds.sqrt().unsqueeze(1)
        leverage = largest_eigenvalue_bound(largest @ jacobian.mT).sum(1)
        sums = jacobian.abs().sum(-1)
        norms = roots * (sums if self.table is None else sums[:, self.table.numbers])
        operator: BlockOperator | None = None
        if with_matrix and self.structure == "diagonal":
            operator = Diagonal((jacobian * weighted).sum((1, 2)))
        elif with_matrix:
            operator = BlockMatrix(jacobian.flatten(1, 2).mT @ weighted.flatten(1, 2))
        # A unit that only some data reach, as the row of a table, is judged by those.
        touched = (norms.amax(-1) > 0) * flat
        elements = prod(spread.shape[spread.dim() - joined_dims(self.record.distribution) :])
        data = touched.reshape(len(touched), -1, elements).amax(-1)
        return Curvature(
            operator,
            leverage=leverage / data.sum(1).clamp_min(tiny),
            reach=2 * (norms.amax(-1) @ flat) / touched.sum(1).clamp_min(tiny),
        )

    def _by_row(self, values: Tensor) -> Tensor:
        """Values of the elements `[elements, ...]`, summed over those of each row of a table."""
        if self.table is None:
            return values
        total = values.new_zeros(len(self.table.first), *values.shape[1:])
        return total.index_add_(0, self.table.numbers, values)


def _of_units(
    mask: Tensor, operator: BlockOperator | None, other: BlockOperator | None
) -> BlockOperator:
    """The units of a mask `[count]` from an operator, the rest from another of its form.

    Args:
        mask: which units.
        operator: where they are held one by one; else all are taken from it.
        other: what has the rest.

    Returns:
        The operator.
    """
    assert operator is not None and other is not None
    if not isinstance(operator, _BY_UNIT) or not isinstance(other, _BY_UNIT):
        return operator
    held = operator.held
    mask = mask.reshape(-1, *[1] * (held.dim() - 1))
    return type(operator)(torch.where(mask, held, other.held.to(held)))


def _linear_units(structure: Structure, weights: Tensor, inputs: Tensor) -> BlockOperator:
    """Σ_n w_nu a_n a_nᵀ for every unit u, for `[rows, units]` and `[rows, size]`."""
    rows = UnitRows(weights, inputs)
    if structure == "diagonal":
        return Diagonal(weights.mT @ inputs.square())
    if structure == "shared":
        return SharedUnits(rows)
    if structure == "cg":
        return IterativeUnits(rows)
    return BlockMatrix(rows.gram())


def largest_eigenvalue_bound(matrices: Tensor) -> Tensor:
    """max_i Σ_j |M_ij| `[*]` of matrices `[*, size, size]`, not below any eigenvalue.

    What a datum does to its own coordinates by a step along one of them is M = F J Jᵀ: the step
    moves θ by J Jᵀ ∂log p/∂θ. Coordinates that share no parameter do not add up.
    """
    return matrices.abs().sum(-1).amax(-1)


def total_curvature(
    contributions: Iterable[tuple[Factor, Tensor]], with_matrix: bool = True
) -> dict[str, Curvature]:
    """Sums weighted factors by block; the data of a site count once, however many groups it has."""
    total: dict[str, Curvature] = {}
    masses: dict[str, dict[str, dict[str, Tensor]]] = {}
    for factor, weights in contributions:
        curvature = factor.curvature(weights, with_matrix)
        before = total.get(factor.block)
        total[factor.block] = curvature if before is None else before + curvature
        by_group = masses.setdefault(factor.block, {}).setdefault(factor.record.name, {})
        group = factor.group.name
        by_group[group] = by_group.get(group, torch.zeros_like(curvature.mass)) + curvature.mass
    return {
        name: replace(curvature, mass=_largest_of_each(masses[name]))
        for name, curvature in total.items()
    }


def _largest_of_each(masses: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
    """Σ over sites of the largest mass of a group."""
    return torch.stack([torch.stack(list(m.values())).max() for m in masses.values()]).sum()


def mix(
    first: Mapping[str, Curvature], second: Mapping[str, Curvature], share: float
) -> dict[str, Curvature]:
    """(1 − share) of the first and `share` of the second, block by block.

    A block that one of them lacks was not reached there: its Fisher information is 0.
    """

    def part(some: Mapping[str, Curvature], other: Mapping[str, Curvature], name: str) -> Curvature:
        return some[name] if name in some else other[name].unreached()

    return {
        name: part(first, second, name).mix(part(second, first, name), share)
        for name in first.keys() | second.keys()
    }
