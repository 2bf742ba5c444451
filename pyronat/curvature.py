"""Local Fisher information of a program's parameter blocks, from runs of the program.

One run gives every block its *factors*: inputs of linear units or Jacobians, and the Fisher
information of the family at the run's parents. Weights say what the run stands for: dreams,
importance-weighted posterior samples, or enumerated states. Weighted factors sum to a block's
`Curvature`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyronat.autograd import LinearUnits, SampleGate, jacobian, leaves, linear_units
from pyronat.blocks import ParamBlock
from pyronat.errors import (
    BlockTooLarge,
    PyronatError,
    StructureChanged,
    UnsupportedDistribution,
)
from pyronat.families import Group, groups, peel
from pyronat.graph import BayesNet
from pyronat.operators import Layout
from pyronat.partition import layout_of
from pyronat.programs import KnownProgram
from pyronat.records import SiteRecord

MAX_DENSE_SIZE = 2048
"""Largest number of entries in one unit of a block that is not linear."""

MAX_JACOBIAN_ENTRIES = 2**14
"""Largest number of entries of a block that is not linear: columns of a Jacobian."""

_CHUNK_ELEMENTS = 2**22
"""Elements of the temporary that a Gram matrix is summed from."""


@dataclass(frozen=True)
class Plan:
    """What is fixed about a program's curvature: its blocks and where their parameters lie.

    Attributes:
        program: the program.
        blocks: blocks to measure, by name.
        layouts: their layouts, by name.
        blocks_of: (site, group of coordinates) → names of its blocks.
    """

    program: KnownProgram
    blocks: dict[str, ParamBlock]
    layouts: dict[str, Layout]
    blocks_of: dict[tuple[str, str], tuple[str, ...]]

    def owner(self) -> dict[str, str]:
        """Parameter → name of a block that holds it."""
        return {param: name for name, block in self.blocks.items() for param in block.params}


def make_plan(program: KnownProgram, excluded: Iterable[str] = (), required: bool = True) -> Plan:
    """Plans the curvature of a program's blocks.

    Args:
        program: the analyzed program.
        excluded: parameters to leave out; a block that holds one is left out whole.
        required: whether every block must be measured; else those that cannot be are left out.

    Returns:
        The plan.

    Raises:
        UnsupportedDistribution: if a block has no closed-form Fisher information.
        BlockTooLarge: if a dense block is too large to be formed.
    """
    left_out = set(excluded)
    net = program.net
    blocks = {block.name: block for block in net.blocks if not left_out & set(block.params)}
    for name, block in list(blocks.items()):
        obstacle = _obstacle(block, net)
        if obstacle is not None:
            if required:
                raise obstacle
            del blocks[name]
    blocks_of: dict[tuple[str, str], tuple[str, ...]] = {}
    for name, block in blocks.items():
        for factor in block.factors:
            blocks_of[factor] = (*blocks_of.get(factor, ()), name)
    return Plan(
        program=program,
        blocks=blocks,
        layouts={name: layout_of(block) for name, block in blocks.items()},
        blocks_of=blocks_of,
    )


def _obstacle(block: ParamBlock, net: BayesNet) -> PyronatError | None:
    """Why a block cannot be measured, or None."""
    advice = (
        f"leave {block.name} to another optimizer with NaturalGradient(exclude=[...]), or choose "
        "Euclidean() for this program"
    )
    if not block.exact:
        families = {site.name: site.family for site in net.sites}
        kinds = ", ".join(f"{name} ({families[name]})" for name in block.sites)
        return UnsupportedDistribution(
            f"no closed-form Fisher information at site {kinds}; {advice}"
        )
    if all(block.linear):
        return None
    if block.size > MAX_DENSE_SIZE:
        return BlockTooLarge(
            f"the dense block of {block.name} has {block.size} entries, at most {MAX_DENSE_SIZE} "
            f"are formed; {advice}"
        )
    if block.num_entries > MAX_JACOBIAN_ENTRIES:
        return BlockTooLarge(
            f"{block.name} has {block.num_entries} entries that are not linear units, at most "
            f"{MAX_JACOBIAN_ENTRIES} are differentiated; {advice}"
        )
    return None


@dataclass(frozen=True)
class Curvature:
    """Local second-order information of one block, in the units of the loss (nats).

    Attributes:
        matrix: Fisher information Σ w Jᵀ F J `[count, size, size]`, or None where not measured.
        leverage: w_ref E‖a‖² × scale `[count]`: how far one datum can move its own coordinate,
            squared, with w_ref the largest Fisher weight of the family, over the data that reach
            the unit; 0 where none did.
        reach: 2 √w_ref E‖a‖₁ `[count]`: how far a unit change of all entries moves a coordinate,
            in units of a logit for the Bernoulli family.
    """

    matrix: Tensor | None
    leverage: Tensor
    reach: Tensor

    def __add__(self, other: Curvature) -> Curvature:
        """Sum over sites: Fisher informations add, the largest leverage and reach count."""
        matrix = self.matrix
        if matrix is not None and other.matrix is not None:
            matrix = matrix + other.matrix
        return Curvature(
            matrix,
            torch.maximum(self.leverage, other.leverage),
            torch.maximum(self.reach, other.reach),
        )

    def mix(self, other: Curvature, share: float) -> Curvature:
        """(1 − share) of this and `share` of the other.

        A unit that one of them has not reached, whose leverage and reach are 0 there, keeps those
        of the other.
        """

        def lerp(a: Tensor, b: Tensor) -> Tensor:
            return a if share == 0 else torch.lerp(a, b.to(a.dtype), share)

        def lerp_reached(a: Tensor, b: Tensor) -> Tensor:
            return torch.where(a == 0, b.to(a.dtype), torch.where(b == 0, a, lerp(a, b)))

        matrix = self.matrix
        if matrix is not None and other.matrix is not None:
            matrix = lerp(matrix, other.matrix)
        return Curvature(
            matrix,
            lerp_reached(self.leverage, other.leverage),
            lerp_reached(self.reach, other.reach),
        )

    def unreached(self) -> Curvature:
        """What a run contributes that reaches none of the units."""
        matrix = None if self.matrix is None else torch.zeros_like(self.matrix)
        return Curvature(matrix, torch.zeros_like(self.leverage), torch.zeros_like(self.reach))


@dataclass(frozen=True)
class Factor:
    """What one site of one run contributes to its block, up to weights.

    Attributes:
        block: name of the block.
        record: the site in that run.
        group: the coordinates of its family that the block is reached through.
        units: number of linear units, or 1.
        inputs: inputs of linear units `[rows, fan_in]`, in the order of the block, or None.
        slope: ∂θ/∂(preactivation) `[repeats * rows, units]`, or None where it is 1.
        jacobian: ∂θ/∂(entries) `[batch * coordinates, units, size]`, or None for linear units.
    """

    block: str
    record: SiteRecord
    group: Group
    units: int
    inputs: Tensor | None = None
    slope: Tensor | None = None
    jacobian: Tensor | None = None

    @property
    def fisher(self) -> Tensor:
        """Fisher information of the family `[*batch, size, size]`."""
        return self.group.fisher

    @property
    def bound(self) -> Tensor | float | None:
        """Largest Fisher weight `[*batch]` or scalar, or None where unbounded."""
        return self.group.bound

    def curvature(self, weights: Tensor, with_matrix: bool = True) -> Curvature:
        """Σ_n w_n J_nᵀ F_n J_n with its leverage and reach.

        Args:
            weights: what each batch element of the site counts for, `[*batch]` or wider.
            with_matrix: whether the matrix is wanted.

        Returns:
            The curvature of the block, of this site in this run alone.
        """
        distribution = self.record.distribution
        weights = weights.to(self.fisher.dtype).sum_to_size(distribution.batch_shape)
        spread = spread_weights(weights, distribution)
        scale = torch.as_tensor(self.record.scale).max().to(spread)
        if self.inputs is not None:
            curvature = self._of_units(spread, self.inputs, with_matrix)
        else:
            curvature = self._of_entries(spread, with_matrix)
        return replace(curvature, leverage=curvature.leverage * scale)

    def _of_units(self, spread: Tensor, inputs: Tensor, with_matrix: bool) -> Curvature:
        rows, units = len(inputs), self.units
        squared = 1.0 if self.slope is None else self.slope**2
        fisher = self.fisher[..., 0, 0]
        weighted = (spread * fisher).reshape(-1, units) * squared
        bound = fisher if self.bound is None else torch.as_tensor(self.bound).expand_as(fisher)
        reference = (bound.reshape(-1, units) * squared).amax(0)
        share = spread.reshape(-1, rows, units).sum((0, 2))
        share = share / share.sum().clamp_min(torch.finfo(share.dtype).tiny)
        return Curvature(
            gram(weighted.reshape(-1, rows, units).sum(0), inputs) if with_matrix else None,
            leverage=reference * (share @ (inputs**2).sum(1)),
            reach=2 * reference.sqrt() * (share @ inputs.abs().sum(1)),
        )

    def _of_entries(self, spread: Tensor, with_matrix: bool) -> Curvature:
        assert self.jacobian is not None
        size = self.fisher.shape[-1]
        fisher = self.fisher.reshape(-1, size, size)
        jacobian = self.jacobian.unflatten(0, (len(fisher), size)).movedim(2, 0)
        flat = spread.reshape(-1)
        tiny = torch.finfo(flat.dtype).tiny
        if self.bound is None:
            reference = fisher
        else:
            bound = torch.as_tensor(self.bound, dtype=flat.dtype).expand(spread.shape).reshape(-1)
            reference = bound[:, None, None] * torch.eye(size, dtype=flat.dtype, device=flat.device)
        leverage = (flat[:, None, None] * (reference @ jacobian) * jacobian).sum((1, 2, 3))
        norms = reference.diagonal(dim1=1, dim2=2).sqrt() * jacobian.abs().sum(-1)
        matrix = None
        if with_matrix:
            weighted = (flat[:, None, None] * fisher) @ jacobian
            matrix = jacobian.flatten(1, 2).mT @ weighted.flatten(1, 2)
        # A unit that only some data reach, as the row of a table, is judged by those.
        touched = (norms.amax(-1) > 0) * flat
        elements = spread.shape[spread.dim() - self._joined_dims() :].numel()
        data = touched.reshape(len(touched), -1, elements).amax(-1)
        return Curvature(
            matrix,
            leverage=leverage / data.sum(1).clamp_min(tiny),
            reach=2 * (norms.amax(-1) @ flat) / touched.sum(1).clamp_min(tiny),
        )

    def _joined_dims(self) -> int:
        """Rightmost batch dimensions of the base distribution that make up one event."""
        inner: Any = self.record.distribution
        dims = 0
        while hasattr(inner, "base_dist"):
            dims += getattr(inner, "reinterpreted_batch_ndims", 0)
            inner = inner.base_dist
        return dims


def spread_weights(weights: Tensor, distribution: Distribution) -> Tensor:
    """Weights of a distribution's batch elements → weights of its base distribution's.

    Args:
        weights: `[*batch]`.
        distribution: with its wrappers.

    Returns:
        `[*base_batch]`: `Independent` copies the weight to the elements it joins,
        `ExpandedDistribution` sums the copies it made, `MaskedDistribution` drops what it hides.
    """
    inner: Any = distribution
    while True:
        kind = type(inner).__name__
        if kind == "Independent":
            dims = inner.reinterpreted_batch_ndims
            weights = weights.reshape(*weights.shape, *[1] * dims)
            weights = weights.expand(inner.base_dist.batch_shape)
        elif kind == "ExpandedDistribution":
            weights = weights.sum_to_size(inner.base_dist.batch_shape)
        elif kind == "MaskedDistribution":
            weights = weights * torch.as_tensor(inner._mask, device=weights.device)
        else:
            return weights
        inner = inner.base_dist


def gram(weights: Tensor, inputs: Tensor) -> Tensor:
    """Σ_n w_nu a_n a_nᵀ for every unit u, summed over chunks of rows.

    Args:
        weights: `[rows, units]`.
        inputs: `[rows, fan_in]`.

    Returns:
        `[units, fan_in, fan_in]`.
    """
    size = inputs.shape[1]
    chunk = max(_CHUNK_ELEMENTS // max(size * size, 1), 1)
    total: Tensor = inputs.new_zeros(weights.shape[1], size * size)
    for some, part in zip(weights.split(chunk), inputs.split(chunk), strict=True):
        pairs = (part.unsqueeze(2) * part.unsqueeze(1)).flatten(1)
        total.addmm_(some.mT, pairs)
    return total.reshape(-1, size, size)


def observe(
    records: Sequence[SiteRecord], plan: Plan, params: Mapping[str, Tensor]
) -> list[Factor]:
    """Factors of all planned blocks in one run, taken before the graph is differentiated.

    Args:
        records: the random sites of the run.
        plan: the plan of the program.
        params: unconstrained leaves by name.

    Returns:
        One factor for each group of coordinates that belongs to a block.

    Raises:
        StructureChanged: if linear units are not those of the plan.
    """
    gate = SampleGate([record.value for record in records])
    sites = {site for site, _ in plan.blocks_of}
    try:
        return [
            factor
            for record in records
            if record.name in sites
            for group in groups(peel(record.distribution))
            if (record.name, group.name) in plan.blocks_of
            for factor in _factors(record, group, plan, params, gate)
        ]
    finally:
        gate.remove()


def _factors(
    record: SiteRecord, group: Group, plan: Plan, params: Mapping[str, Tensor], gate: SampleGate
) -> list[Factor]:
    """What one group of coordinates contributes to each of its blocks.

    Args:
        record: the site.
        group: one of its groups.
        plan: the plan of the program.
        params: unconstrained leaves by name.
        gate: the sample values.

    Returns:
        A factor for each block; none if this run reads no parameters there.

    Raises:
        StructureChanged: if linear units are not those of the plan.
    """
    names = plan.blocks_of[record.name, group.name]
    factors = [Factor(name, record, group, plan.blocks[name].count) for name in names]
    first = plan.blocks[names[0]]
    if first.linear[first.factors.index((record.name, group.name))]:
        units = linear_units(group.coordinates[0], gate)
        if units is None and not leaves(group.coordinates, gate.edges):
            return []
        if units is None or units.units != first.count:
            raise StructureChanged(
                f"site {record.name!r} is no longer a layer of {first.count} linear units of "
                f"{first.name}, as it was when it was analyzed"
            )
        inputs = _ordered_inputs(units, first, params)
        return [replace(factors[0], inputs=inputs, slope=units.slope)]
    shapes = {
        param: shape
        for name in names
        for param, shape in zip(plan.blocks[name].params, plan.blocks[name].shapes, strict=True)
    }
    present = [param for param in shapes if param in params]
    if not present:
        return []
    # Parameters of other branches have no derivatives here.
    found = _jacobian(group, [params[param] for param in present], gate)
    parts = dict(zip(present, found.split([prod(shapes[p]) for p in present], 1), strict=True))
    columns = torch.cat(
        [parts.get(p, found.new_zeros(len(found), prod(shape))) for p, shape in shapes.items()], 1
    )
    starts = accumulate((prod(shape) for shape in shapes.values()), initial=0)
    positions = {
        param: torch.arange(start, start + prod(shape), device=columns.device).reshape(shape)
        for start, (param, shape) in zip(starts, shapes.items(), strict=False)
    }
    return [
        replace(factor, jacobian=columns[:, plan.layouts[name].pack(positions)])
        for name, factor in zip(names, factors, strict=True)
    ]


def _jacobian(group: Group, params: Sequence[Tensor], gate: SampleGate) -> Tensor:
    """Derivatives of all coordinates `[batch * coordinates, entries]`."""
    size = group.size // len(group.coordinates)
    parts = [
        jacobian(coordinate, params, gate).reshape(-1, size, sum(map(Tensor.numel, params)))
        for coordinate in torch.broadcast_tensors(*group.coordinates)
    ]
    return torch.cat(parts, 1).flatten(0, 1)


def _ordered_inputs(units: LinearUnits, block: ParamBlock, params: Mapping[str, Tensor]) -> Tensor:
    """Inputs of the units in the order of the block, zeros for parameters of other factors.

    Args:
        units: the units that were recognized.
        block: their block.
        params: unconstrained leaves by name.

    Returns:
        `[rows, size]`.

    Raises:
        StructureChanged: if the units use parameters that are not in the block.
    """
    inputs = {id(term.leaf): term.inputs for term in units.terms}
    rows = next(iter(inputs.values()))
    places = {id(params[name]): name for name in block.params if name in params}
    if not inputs.keys() <= places.keys():
        raise StructureChanged(f"the linear units of {block.name} use other parameters than before")
    by_name = {places[leaf]: values for leaf, values in inputs.items()}
    return torch.cat(
        [
            by_name.get(name, rows.new_zeros(len(rows), prod(shape) // block.count))
            for name, shape in zip(block.params, block.shapes, strict=True)
        ],
        1,
    )


def total_curvature(
    contributions: Iterable[tuple[Factor, Tensor]], with_matrix: bool = True
) -> dict[str, Curvature]:
    """Sums weighted factors by block."""
    total: dict[str, Curvature] = {}
    for factor, weights in contributions:
        curvature = factor.curvature(weights, with_matrix)
        before = total.get(factor.block)
        total[factor.block] = curvature if before is None else before + curvature
    return total


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
