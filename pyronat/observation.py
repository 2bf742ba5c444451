"""From one run of a program to the factors of its blocks, before its graph is differentiated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod

import torch
from torch import Tensor

from pyronat.autograd import LinearUnits, SampleGate, leaves, linear_units
from pyronat.blocks import FACTORED, ParamBlock
from pyronat.curvature import Factor, UnitFactor
from pyronat.datum_rows import (
    Cotangents,
    Data,
    LayerRows,
    all_columns,
    bound_root,
    data_of,
    fisher_root,
    layer_rows,
    mixed_columns,
    remaining_rows,
    same_rows,
    with_signs,
)
from pyronat.elements import ElementFactor, slopes_of, unit_jacobian
from pyronat.errors import StructureChanged
from pyronat.factored import Explicit, Piece
from pyronat.families import Group
from pyronat.jacobians import jacobian
from pyronat.layers import Layer, find_layers
from pyronat.network_factors import LayerFactor, RowsFactor, piece_of
from pyronat.plans import Plan, too_many_entries
from pyronat.records import SiteRecord
from pyronat.simulated import fisher_groups
from pyronat.tables import TableRows, table_rows
from pyronat.weights import without_copies

MAX_ROWS = 1024
"""Rows of a joint block that are taken from one run; its average keeps as many."""

MAX_COLUMNS = 16
"""Coordinates of a datum up to which Kronecker factors take each by itself."""

MIXTURES = 1
"""Random mixtures of a datum's coordinates that Kronecker factors take otherwise."""

ROUNDING = 0.25
"""Power of the precision of a type up to which estimates have to agree with gradients."""

FEW_COORDINATES = 64
"""Coordinates of a run that are differentiated one by one."""

MAX_PASSES = 1024
"""Backward passes that a factored Jacobian may take at once."""


def observe(
    records: Sequence[SiteRecord],
    plan: Plan,
    params: Mapping[str, Tensor],
    by_element: bool = False,
) -> list[Factor]:
    """Factors of all planned blocks in one run, taken before the graph is differentiated.

    Random numbers are drawn from the global generators where a distribution has no closed form
    and where coordinates are mixed.

    Args:
        records: the random sites of the run.
        plan: the plan of the program.
        params: unconstrained leaves by name.
        by_element: whether every element of a site is wanted by itself, for its score.

    Returns:
        Factors for each group of coordinates, one for each of its blocks.

    Raises:
        StructureChanged: if linear units or layers are not those of the plan.
    """
    gate = SampleGate([record.value for record in records])
    sites = {site for site, _ in plan.blocks_of}
    try:
        return [
            factor
            for record in records
            if record.name in sites
            for group in fisher_groups(record.distribution)
            if (record.name, group.name) in plan.blocks_of
            for factor in _factors(_Seen(record, group, plan, params, gate, by_element))
        ]
    finally:
        gate.remove()


def observe_units(
    records: Sequence[SiteRecord], plan: Plan, params: Mapping[str, Tensor]
) -> list[UnitFactor]:
    """The factors of blocks that are held unit by unit, from which scores of data are made."""
    by_unit = {name for name, block in plan.blocks.items() if block.by_unit}
    kept = {
        factor: tuple(name for name in names if name in by_unit)
        for factor, names in plan.blocks_of.items()
    }
    kept = {factor: names for factor, names in kept.items() if names}
    factors = observe(records, replace(plan, blocks_of=kept), params, by_element=True)
    return [factor for factor in factors if isinstance(factor, UnitFactor)]


@dataclass(frozen=True)
class _Seen:
    """A group of coordinates of a site in a run.

    Attributes:
        record: the site.
        group: one of its groups.
        plan: the plan of the program.
        params: unconstrained leaves by name.
        gate: the sample values.
        by_element: whether every element is wanted by itself.
    """

    record: SiteRecord
    group: Group
    plan: Plan
    params: Mapping[str, Tensor]
    gate: SampleGate
    by_element: bool = False

    @property
    def blocks(self) -> list[ParamBlock]:
        """Blocks that the group contributes to."""
        names = self.plan.blocks_of[self.record.name, self.group.name]
        return [self.plan.blocks[name] for name in names]

    def present(self, block: ParamBlock) -> list[str]:
        """Parameters of a block that the run has; those of other branches it has not."""
        return [name for name in block.params if name in self.params]

    def layers(self, names: Sequence[str]) -> dict[str, Layer]:
        """Layers among parameters, by name."""
        wanted = {id(self.params[name]): name for name in names if name in self.params}
        found = find_layers(self.group.coordinates, self.gate.edges)
        return {wanted[id(la.leaf)]: la for la in found if id(la.leaf) in wanted}


def _factors(seen: _Seen) -> Iterator[Factor]:
    """What one group of coordinates contributes to each of its blocks.

    Args:
        seen: the coordinates.

    Yields:
        The factors.
    """
    joint = [b for b in seen.blocks if b.structure in FACTORED]
    rows = [b for b in seen.blocks if b.count == 1 and b.structure in {"dual", "cg", "diagonal"}]
    single = [b for b in seen.blocks if b not in joint and b not in rows]
    if single:
        yield from _unit_factors(seen, single)
    if joint:
        yield from _layer_factors(seen, joint)
    for block in rows:
        yield from _rows_factors(seen, block)


# --- units with matrices of their own ------------------------------------------------------------


def _unit_factors(seen: _Seen, blocks: Sequence[ParamBlock]) -> list[Factor]:
    """Factors of units that are held one by one.

    Args:
        seen: the coordinates.
        blocks: the blocks.

    Returns:
        A factor for each block; none if this run reads no parameters there.

    Raises:
        StructureChanged: if linear units are not those of the plan.
    """
    record, group, gate = seen.record, seen.group, seen.gate
    factors = [_unit_factor(seen, block) for block in blocks]
    first = blocks[0]
    if first.linear[first.factors.index((record.name, group.name))]:
        units = linear_units(group.coordinates[0], gate)
        if units is None and not leaves(group.coordinates, gate.edges):
            return []
        if units is None or units.units != first.count:
            raise StructureChanged(
                f"site {record.name!r} is no longer a layer of {first.count} linear units of "
                f"{first.name}, as it was when it was analyzed; let all runs compute its "
                "distribution by the same operations"
            )
        inputs = _ordered_inputs(units, first, seen.params)
        return [replace(factors[0], inputs=inputs, slope=units.slope, places=units.places)]
    shapes = {
        param: shape
        for block in blocks
        for param, shape in zip(block.params, block.shapes, strict=True)
    }
    present = [param for param in shapes if param in seen.params]
    if not present:
        return []
    data = data_of(record, group)
    by_element = None if seen.by_element else _element_factors(seen, blocks, data)
    if by_element is not None:
        return by_element
    repeated = () if seen.by_element else data.repeated
    table = _table_rows(seen, present, repeated)
    entries = sum(prod(shapes[param]) for param in present)
    error = too_many_entries(", ".join(present), entries)
    if table is None and error is not None:
        raise error
    found = _jacobian(seen, present, repeated) if table is None else table.jacobian
    columns, positions = _columns(found, present, shapes)
    layouts = seen.plan.layouts
    return [
        replace(
            factor,
            jacobian=columns[:, layouts[factor.block].pack(positions)],
            repeated=repeated,
            table=table,
        )
        for factor in factors
    ]


def _unit_factor(seen: _Seen, block: ParamBlock) -> UnitFactor:
    """The factor of a block of units, without what a run tells of it."""
    return UnitFactor(
        block.name,
        seen.record,
        seen.group,
        block.count,
        structure=block.structure,
    )


def _columns(
    found: Tensor, present: Sequence[str], shapes: Mapping[str, Sequence[int]]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Derivatives by all parameters of some blocks.

    Args:
        found: derivatives by those that are there, `[coordinates, entries]`.
        present: their names, in the order of the columns.
        shapes: shape of each parameter, by name.

    Returns:
        Derivatives `[coordinates, all entries]`, 0 for parameters of other branches, and the
        columns of each parameter, in its shape.
    """
    parts = dict(zip(present, found.split([prod(shapes[p]) for p in present], 1), strict=True))
    columns = torch.cat(
        [parts.get(p, found.new_zeros(len(found), prod(shape))) for p, shape in shapes.items()], 1
    )
    starts = accumulate((prod(shape) for shape in shapes.values()), initial=0)
    positions = {
        param: torch.arange(start, start + prod(shape), device=columns.device).reshape(shape)
        for start, (param, shape) in zip(starts, shapes.items(), strict=False)
    }
    return columns, positions


def _element_factors(seen: _Seen, blocks: Sequence[ParamBlock], data: Data) -> list[Factor] | None:
    """Factors of units that belong to one element of the site each.

    Args:
        seen: the coordinates.
        blocks: the blocks.
        data: the data of the site.

    Returns:
        A factor for each block; None where that saves nothing or is not so.
    """
    coordinates = [data.own(part) for part in torch.broadcast_tensors(*seen.group.coordinates)]
    params = {name: seen.params.get(name) for block in blocks for name in block.params}
    leaves_of = {name: leaf for name, leaf in params.items() if leaf is not None}
    if coordinates[0].numel() <= FEW_COORDINATES or len(leaves_of) < len(params):
        return None
    slopes = slopes_of(coordinates, leaves_of, seen.gate)
    if slopes is None:
        return None
    each = seen.group.size // len(coordinates)
    factors: list[Factor] = []
    for block in blocks:
        found = unit_jacobian(block, seen.plan.layouts[block.name], slopes, each)
        if found is None:
            return None
        diagonal = block.structure == "diagonal"
        factors.append(
            ElementFactor(block.name, seen.record, seen.group, data, *found, diagonal=diagonal)
        )
    return factors


def _table_rows(seen: _Seen, names: Sequence[str], repeated: Sequence[int]) -> TableRows | None:
    """Derivatives by rows of tables; None where that saves nothing or is not so."""
    wide = torch.broadcast_tensors(*seen.group.coordinates)
    own = [without_copies(part, repeated) for part in wide]
    if own[0].numel() <= FEW_COORDINATES:
        return None
    params = [seen.params[name] for name in names]
    return table_rows(own, seen.group.size // len(own), params, seen.gate)


def _jacobian(seen: _Seen, names: Sequence[str], repeated: Sequence[int] = ()) -> Tensor:
    """Derivatives of all coordinates `[batch * coordinates, entries]`, of copies once."""
    group, params = seen.group, [seen.params[name] for name in names]
    found = _factored_jacobian(seen, names, repeated)
    if found is not None:
        return found
    parts = torch.broadcast_tensors(*group.coordinates)
    wide = [without_copies(part, repeated) for part in parts]
    size = group.size // len(group.coordinates)
    rows = [
        jacobian(coordinate, params, seen.gate).reshape(-1, size, sum(map(Tensor.numel, params)))
        for coordinate in wide
    ]
    return torch.cat(rows, 1).flatten(0, 1)


def _factored_jacobian(seen: _Seen, names: Sequence[str], repeated: Sequence[int]) -> Tensor | None:
    """The same from layers, one backward pass for each coordinate of a datum.

    Args:
        seen: the coordinates.
        names: the parameters.
        repeated: batch dimensions whose copies are wanted once.

    Returns:
        The Jacobian, or None where it saves nothing, where a parameter is no layer, or where the
        data of the site are not separate.
    """
    data, size = data_of(seen.record, seen.group), seen.group.size
    passes = data.elements * size
    if data.count * passes <= FEW_COORDINATES or data.count < 2 or passes > MAX_PASSES:
        return None
    layers = seen.layers(names)
    if layers.keys() != set(names):
        return None
    like = seen.group.coordinates[0]
    eye = torch.eye(size, dtype=like.dtype, device=like.device)
    eye = eye.expand(data.count, data.elements, size, size)
    columns = all_columns(data, seen.group, eye)
    rows = layer_rows([layers[name] for name in names], columns, seen.gate)
    if any(row.order is None for row in rows):
        return None
    found = torch.cat([row.explicit(data.count) for row in rows], -1).movedim(0, 1)
    # Copies of a datum have the same derivatives.
    batch = list(torch.broadcast_tensors(*seen.group.coordinates)[0].shape[: len(data.shape)])
    for dim in repeated:
        batch[dim] = 1
    wide = found.reshape(*data.shape, size, -1).expand(*batch, size, found.shape[-1])
    return wide.reshape(-1, found.shape[-1])


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


# --- networks ------------------------------------------------------------------------------------


def _cotangents(seen: _Seen, most: int, mixtures: int) -> tuple[Cotangents, Cotangents | None]:
    """Rows to take: all columns of each datum if there are few, else random mixtures.

    Args:
        seen: the coordinates.
        most: columns of a datum up to which all are taken.
        mixtures: number of mixtures otherwise.

    Returns:
        Those of the Fisher information, and one mixture of the largest where it is bounded.
    """
    data = data_of(seen.record, seen.group)
    root = fisher_root(data, seen.group)
    if data.elements * seen.group.size <= most:
        columns = with_signs(all_columns(data, seen.group, root))
    else:
        columns = mixed_columns(data, seen.group, root, mixtures)
    largest = bound_root(data, seen.group, root)
    reference = None if largest is None else mixed_columns(data, seen.group, largest, 1)
    return columns, reference


def _layer_factors(seen: _Seen, blocks: Sequence[ParamBlock]) -> Iterator[Factor]:
    """Kronecker factors of all layers, from the same backward passes.

    Args:
        seen: the coordinates.
        blocks: of the layers.

    Yields:
        A factor for each layer that the coordinates depend on.

    Raises:
        StructureChanged: if the graph has uses of a layer that the plan does not know.
    """
    names = [name for block in blocks for name in seen.present(block)]
    layers = seen.layers(names)
    reached = {id(leaf) for leaf in leaves(seen.group.coordinates, seen.gate.edges)}
    present = [name for name in names if id(seen.params[name]) in reached]
    lost = [name for name in present if name not in layers]
    columns, bounded = _cotangents(seen, MAX_COLUMNS, MIXTURES)
    known = [layers[name] for name in present if name in layers]
    found = layer_rows(known, columns, seen.gate, ROUNDING)
    rows = dict(zip((name for name in present if name in layers), found, strict=True))
    lost += [name for name, row in rows.items() if not row.complete]
    if lost:
        raise StructureChanged(
            f"{', '.join(sorted(lost))} of site {seen.record.name!r} are used in ways that were "
            "not seen when the program was analyzed; choose Full(structure={'...': 'dual'}) for "
            "them"
        )
    reference: dict[str, LayerRows] = {}
    if bounded is not None:
        largest = same_rows(list(rows.values()), bounded, seen.gate)
        reference = dict(zip(rows, largest, strict=True))
    for block in blocks:
        own = [name for name in block.params if name in rows]
        if own:
            yield LayerFactor(
                block.name,
                seen.record,
                seen.group,
                columns.data,
                rows[own[0]],
                reference.get(own[0]),
                _layer_inputs(block, layers),
                block.structure == "kronecker",
            )


def _layer_inputs(block: ParamBlock, layers: Mapping[str, Layer]) -> tuple[Tensor, ...]:
    """Inputs of all parameters of a layer by tap, in the order of the block."""
    members = [layers[name] for name in block.params if name in layers]
    by_edge = [{tap.edge: tap.inputs for tap in member.taps} for member in members]
    return tuple(torch.cat([inputs[tap.edge] for inputs in by_edge], 1) for tap in members[0].taps)


def _rows_factors(seen: _Seen, block: ParamBlock) -> Iterator[Factor]:
    """Rows of a joint block, of layers as outer products.

    Args:
        seen: the coordinates.
        block: the block.

    Yields:
        One factor, if the run has parameters of the block.
    """
    present = seen.present(block)
    if not present:
        return
    count = data_of(seen.record, seen.group).count
    columns, bounded = _cotangents(seen, max(MAX_ROWS // count, 1), max(MAX_ROWS // count, 1))
    layers = seen.layers(block.params)
    found = layer_rows(list(layers.values()), columns, seen.gate, ROUNDING)
    rows = dict(zip(layers, found, strict=True))
    pieces = _pieces(seen, block, columns, rows)
    reference = None
    if bounded is not None:
        largest = dict(zip(layers, same_rows(found, bounded, seen.gate), strict=True))
        reference = _pieces(seen, block, bounded, largest)
    assert block.structure in {"dual", "cg", "diagonal"}
    yield RowsFactor(
        block.name,
        seen.record,
        seen.group,
        columns.data,
        pieces,
        reference,
        block.structure,
        MAX_ROWS,
    )


def _pieces(
    seen: _Seen, block: ParamBlock, columns: Cotangents, rows: Mapping[str, LayerRows]
) -> tuple[Piece, ...]:
    """Rows along the entries of a block, in its order; of layers where their data are separate."""
    count, total = columns.data.count, len(columns.values) * columns.data.count
    pieces: list[Piece] = []
    for name, shape in zip(block.params, block.shapes, strict=True):
        if name in rows and rows[name].order is not None:
            pieces.append(piece_of(rows[name], count))
        elif name in seen.params:
            rest = remaining_rows(seen.params[name], columns, seen.gate)
            pieces.append(Explicit(rest.flatten(0, 1)))
        else:
            pieces.append(Explicit(columns.values.new_zeros(total, prod(shape))))
    return tuple(pieces)
