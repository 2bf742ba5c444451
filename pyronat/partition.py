"""From a partition of parameter entries to blocks, and the union of several partitions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import accumulate, chain, combinations
from math import prod
from typing import Literal

import networkx as nx
import torch
from torch import Tensor

from pyronat.blocks import (
    MAX_DENSE_SIZE,
    SCORE,
    UNKNOWN_FAMILY,
    LayerAxes,
    ParamBlock,
    Structure,
    UnitAxes,
    UnitEntries,
    Units,
)
from pyronat.entries import connected_components
from pyronat.errors import StructureChanged, UnsupportedDistribution
from pyronat.graph import BayesNet, Edge, Site
from pyronat.operators import AxesLayout, EntriesLayout, Layout

IRREGULAR, UNREACHED = "has no Fisher information", "reaches no random site"
"""Why a parameter is in no block: its site's distribution is to blame, or it has none."""


@dataclass(frozen=True)
class FactorStructure:
    """A Fisher-orthogonal group of one site's coordinates and the parameters behind it.

    Attributes:
        site: name of the site.
        group: name of the group.
        params: the parameters that its coordinates depend on, sorted.
        exact: whether its Fisher information is computed exactly, not simulated.
        plates: plates around the site.
        unit_axes: where the coordinates are recognized as functions of one affine unit each: the
            axes of each of `params` that number the units; else None.
        layers: layers of a network behind the coordinates.
    """

    site: str
    group: str
    params: tuple[str, ...]
    exact: bool
    plates: tuple[str, ...]
    unit_axes: tuple[tuple[int, ...], ...] | None
    layers: tuple[LayerAxes, ...] = ()


def layout_of(block: ParamBlock) -> Layout:
    """Where the entries of a block lie in its vectors."""
    if isinstance(block.units, UnitAxes):
        return AxesLayout(block.params, block.shapes, block.units.axes)
    return EntriesLayout(block.params, block.shapes, block.units.entries)


def components_of(blocks: Sequence[ParamBlock]) -> dict[str, Tensor]:
    """Number of the unit that each parameter entry belongs to, −1 for none, of its shape."""
    numbers: dict[str, Tensor] = {}
    start = 0
    for block in blocks:
        layout = layout_of(block)
        units = torch.arange(start + 1, start + 1 + block.count, device="cpu")
        for name, part in layout.unpack(units.unsqueeze(1).expand(-1, block.size)).items():
            before = numbers.get(name, torch.zeros_like(part))
            numbers[name] = torch.maximum(before, part)
        start += block.count
    return {name: number - 1 for name, number in numbers.items()}


def blocks_of(
    components: Mapping[str, Tensor], factors: Sequence[FactorStructure], sites: Sequence[str]
) -> tuple[ParamBlock, ...]:
    """Gathers units of equal form into blocks.

    Parameters that share a unit form a group. If the same axes of all its parameters number the
    units, the group is one block of whole parameters; entries that reach no site then stay with
    their row. Else its units are listed entry by entry, one block for each set of parameters and
    size of unit.

    Args:
        components: number of the unit of each parameter entry, −1 for entries without one.
        factors: groups of coordinates that depend on parameters.
        sites: names of the sites in program order.

    Returns:
        The blocks, sorted by parameters and size.
    """
    used = {name: number for name, number in components.items() if bool((number >= 0).any())}
    order = {name: place for place, name in enumerate(sites)}
    readers: dict[str, list[int]] = defaultdict(list)
    for index, factor in enumerate(factors):
        for name in factor.params:
            readers[name].append(index)
    blocks = []
    for names in _linked(used):
        group = {name: used[name] for name in names}
        for params, units in _units_of(group):
            found = {index for name in params for index in readers[name]}
            members = sorted(
                (factors[index] for index in found), key=lambda f: (order[f.site], f.group)
            )
            blocks.append(_block(params, units, components, members, order))
    return tuple(sorted(blocks, key=lambda block: (block.params, block.size)))


def _linked(components: Mapping[str, Tensor]) -> list[list[str]]:
    """Groups of parameters that share a unit, each sorted."""
    links = nx.Graph()
    links.add_nodes_from(components)
    names = sorted(components)
    if names:
        pairs = [
            torch.stack([number.unique(), torch.full_like(number.unique(), index)])
            for index, number in enumerate(components[name] for name in names)
        ]
        found = torch.cat(pairs, 1)
        found = found[:, found[0] >= 0]
        found = found[:, torch.argsort(found[0], stable=True)]
        same = found[0, 1:] == found[0, :-1]
        together = torch.stack([found[1, :-1][same], found[1, 1:][same]]).unique(dim=1)
        links.add_edges_from((names[a], names[b]) for a, b in together.T.tolist())
    return sorted(sorted(group) for group in nx.connected_components(links))


def _units_of(group: Mapping[str, Tensor]) -> list[tuple[tuple[str, ...], Units]]:
    names = tuple(group)
    axes = _common_axes(list(group.values()))
    if axes is not None:
        return [(names, UnitAxes(axes))]
    flat = torch.cat([number.reshape(-1) for number in group.values()])
    owner = torch.cat([
        torch.full((number.numel(),), index, device="cpu")
        for index, number in enumerate(group.values())
    ])
    order = torch.argsort(flat, stable=True)
    order = order[flat[order] >= 0]
    lengths = flat[order].unique_consecutive(return_counts=True)[1].tolist()
    found: dict[tuple[tuple[int, ...], int], list[list[int]]] = defaultdict(list)
    for positions in order.split(lengths):
        params = tuple(owner[positions].unique().tolist())
        found[params, len(positions)].append(positions.tolist())
    starts = list(accumulate((number.numel() for number in group.values()), initial=0))
    lists: list[tuple[tuple[str, ...], Units]] = []
    for (params, _), entries in found.items():
        local, start = {}, 0
        for index in params:
            local[index] = start - starts[index]
            start += group[names[index]].numel()
        moved = tuple(
            tuple(position + local[int(owner[position])] for position in unit) for unit in entries
        )
        lists.append((tuple(names[index] for index in params), UnitEntries(moved)))
    return lists


def _common_axes(numbers: Sequence[Tensor]) -> tuple[tuple[int, ...], ...] | None:
    """For each tensor the axes that number its units, if all number the same units alike."""
    options = [_axes_of(number) for number in numbers]
    for axes, ids in options[0]:
        chosen, merged = [axes], ids
        for option in options[1:]:
            match = next(
                (
                    (other, torch.maximum(merged, more))
                    for other, more in option
                    if len(more) == len(merged)
                    and bool(((more == merged) | (more < 0) | (merged < 0)).all())
                ),
                None,
            )
            if match is None:
                break
            chosen.append(match[0])
            merged = match[1]
        present = merged[merged >= 0]
        if len(chosen) == len(options) and len(present.unique()) == len(present):
            return tuple(chosen)
    return None


def _axes_of(number: Tensor) -> list[tuple[tuple[int, ...], Tensor]]:
    """Sets of axes that tell the units of a tensor apart, most units first, with their numbers."""
    wide = [axis for axis in range(number.dim()) if number.shape[axis] > 1]
    found = []
    for axes in chain.from_iterable(combinations(wide, k) for k in range(len(wide), -1, -1)):
        rest = [axis for axis in range(number.dim()) if axis not in axes]
        ids = number.permute((*axes, *rest)).reshape(prod(number.shape[a] for a in axes), -1)
        highest = ids.amax(1)
        constant = bool(((ids == highest.unsqueeze(1)) | (ids < 0)).all())
        present = highest[highest >= 0]
        if constant and len(present.unique()) == len(present):
            found.append((axes, highest))
    return sorted(found, key=lambda option: -len(option[1]))


def _block(
    params: tuple[str, ...],
    units: Units,
    components: Mapping[str, Tensor],
    members: Sequence[FactorStructure],
    order: Mapping[str, int],
) -> ParamBlock:
    shapes = tuple(tuple(components[name].shape) for name in params)
    if isinstance(units, UnitAxes):
        count = prod(shapes[0][axis] for axis in units.axes[0])
        size = sum(map(prod, shapes)) // count
        axes = dict(zip(params, units.axes, strict=True))
        linear = tuple(_is_linear(factor, axes, components) for factor in members)
    else:
        count, size = len(units.entries), len(units.entries[0])
        linear = (False,) * len(members)
    sites = {factor.site for factor in members}
    plates = members[0].plates if members else ()
    layers = _common_layers(members) if count == 1 and isinstance(units, UnitAxes) else ()
    structure: Structure = "unit" if count > 1 or all(linear) else "dense"
    if structure == "dense" and size > MAX_DENSE_SIZE:
        structure = "kronecker" if layers else "dual"
    return ParamBlock(
        params=params,
        sites=tuple(sorted(sites, key=order.__getitem__)),
        structure=structure,
        count=count,
        size=size,
        exact=structure in {"unit", "dense"} and all(factor.exact for factor in members),
        factors=tuple((factor.site, factor.group) for factor in members),
        linear=linear,
        shapes=shapes,
        units=units,
        plates=tuple(p for p in plates if all(p in factor.plates for factor in members)),
        layers=layers,
        network=any(
            sum(size > 1 for size in components[name].shape) > 1
            for layer in layers
            for name in layer.params
        ),
    )


def _common_layers(members: Sequence[FactorStructure]) -> tuple[LayerAxes, ...]:
    """Layers that every factor sees as such, if it sees their parameters at all."""
    candidates = dict.fromkeys(layer for factor in members for layer in factor.layers)
    return tuple(
        sorted(
            (
                layer
                for layer in candidates
                if all(
                    layer in factor.layers or not set(layer.params) & set(factor.params)
                    for factor in members
                )
            ),
            key=lambda layer: layer.params,
        )
    )


def _is_linear(
    factor: FactorStructure,
    axes: Mapping[str, tuple[int, ...]],
    components: Mapping[str, Tensor],
) -> bool:
    """Whether the recognized units of a factor are the units of the block."""
    if factor.unit_axes is None:
        return False
    for name, recognized in zip(factor.params, factor.unit_axes, strict=True):
        shape = components[name].shape
        if name not in axes or axes[name] != tuple(a for a in recognized if shape[a] > 1):
            return False
    return True


def union(first: BayesNet, second: BayesNet) -> BayesNet:
    """The network of a program that is now the one, now the other.

    Sites and edges are united; two parameter entries are in one unit if they are in either
    network, or in a chain of such units. Guides are left out.

    Args:
        first: a network.
        second: a network of another run of the same program.

    Returns:
        The union, sites in the order of the first.

    Raises:
        StructureChanged: if a parameter has changed its shape.
        UnsupportedDistribution: if a parameter has a Fisher information in one of them alone.
    """
    sites = {site.name: site for site in first.sites}
    for site in second.sites:
        sites[site.name] = _site_union(sites[site.name], site) if site.name in sites else site
    kinds: dict[tuple[str, str], Literal["data", "control"]] = {}
    for edge in sorted([*first.edges, *second.edges], key=lambda edge: edge.kind):
        kinds[edge.parent, edge.child] = edge.kind
    blocks = blocks_of(
        _joined_components(first.blocks, second.blocks),
        _factor_union([*_factors(first), *_factors(second)]),
        list(sites),
    )
    assigned = {name for block in blocks for name in block.params}
    without = dict([*first.without_fisher, *second.without_fisher])
    check_regular(without, assigned)
    order = list(sites)
    return BayesNet(
        sites=tuple(sites.values()),
        edges=tuple(
            Edge(*pair, kind)
            for pair, kind in sorted(
                kinds.items(),
                key=lambda item: (order.index(item[0][1]), item[1] != "data", item[0]),
            )
        ),
        blocks=blocks,
        without_fisher=tuple(sorted((n, r) for n, r in without.items() if n not in assigned)),
    )


def check_regular(without: Mapping[str, str], assigned: Set[str]) -> None:
    """Refuses parameters of regular and irregular distributions at once.

    Args:
        without: why parameters have no Fisher information, by name.
        assigned: parameters that have one through some site.

    Raises:
        UnsupportedDistribution: naming the parameter and the site.
    """
    for name, reason in without.items():
        if IRREGULAR in reason and name in assigned:
            raise UnsupportedDistribution(
                f"parameter {name!r} has a Fisher information at some site, but {reason}; use "
                "parameters of its own there, or detach it"
            )


def _site_union(first: Site, second: Site) -> Site:
    def merged(a: Sequence[str], b: Sequence[str]) -> tuple[str, ...]:
        return tuple(sorted({*a, *b}))

    return replace(
        first,
        kind="observed" if "observed" in {first.kind, second.kind} else "latent",
        family=" | ".join(merged(first.family.split(" | "), second.family.split(" | "))),
        plates=tuple(plate for plate in first.plates if plate in second.plates),
        params=merged(first.params, second.params),
        reads_data=merged(first.reads_data, second.reads_data),
        coupled_plates=merged(first.coupled_plates, second.coupled_plates),
    )


def _joined_components(
    first: Sequence[ParamBlock], second: Sequence[ParamBlock]
) -> dict[str, Tensor]:
    """Units of either partition, joined where they share an entry.

    Args:
        first: blocks of one network.
        second: blocks of another.

    Returns:
        Number of the unit of each parameter entry, −1 for entries without one.

    Raises:
        StructureChanged: if a parameter has changed its shape.
    """
    one, two = components_of(first), components_of(second)
    count = sum(block.count for block in first)
    edges = []
    for name in one.keys() & two.keys():
        if one[name].shape != two[name].shape:
            raise StructureChanged(
                f"parameter {name!r} has changed its shape from {tuple(one[name].shape)} to "
                f"{tuple(two[name].shape)}; keep the shapes of parameters"
            )
        both = (one[name] >= 0) & (two[name] >= 0)
        edges.append(torch.stack([one[name][both], two[name][both] + count]))
    joined = connected_components(count + sum(block.count for block in second), edges)
    found = {}
    for name in one.keys() | two.keys():
        like = one[name] if name in one else two[name]
        left = one.get(name, torch.full_like(like, -1))
        right = two.get(name, torch.full_like(like, -1))
        number = torch.where(left >= 0, left, torch.where(right >= 0, right + count, right))
        found[name] = torch.where(number >= 0, joined[number.clamp_min(0)], number)
    return found


def _factors(net: BayesNet) -> list[FactorStructure]:
    """The factors of all blocks, with the parameters that site and block have in common."""
    sites = {site.name: site for site in net.sites}
    found = []
    for block in net.blocks:
        for (site, group), linear in zip(block.factors, block.linear, strict=True):
            owned = [i for i, name in enumerate(block.params) if name in sites[site].params]
            axes = block.units.axes if linear and isinstance(block.units, UnitAxes) else None
            found.append(
                FactorStructure(
                    site=site,
                    group=group,
                    params=tuple(block.params[i] for i in owned),
                    exact=group not in {UNKNOWN_FAMILY, SCORE},
                    plates=sites[site].plates,
                    unit_axes=None if axes is None else tuple(axes[i] for i in owned),
                    layers=tuple(
                        layer
                        for layer in block.layers
                        if set(layer.params) <= set(sites[site].params)
                    ),
                )
            )
    return found


def _factor_union(factors: Sequence[FactorStructure]) -> list[FactorStructure]:
    """Factors of the same coordinates as one, linear where all of them are and agree."""
    merged: dict[tuple[str, str], FactorStructure] = {}
    for factor in factors:
        known = merged.get((factor.site, factor.group))
        if known is not None and known != factor:
            params = tuple(sorted({*known.params, *factor.params}))
            alike = known.params == factor.params and known.unit_axes == factor.unit_axes
            plates = tuple(plate for plate in known.plates if plate in factor.plates)
            axes = known.unit_axes if alike else None
            layers = _common_layers([known, factor])
            factor = replace(known, params=params, plates=plates, unit_axes=axes, layers=layers)
        merged[factor.site, factor.group] = factor
    return list(merged.values())
