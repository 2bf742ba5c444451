"""Which blocks of a program are measured, and how each of them is held."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from math import prod

from pyronat.blocks import (
    FACTORED,
    MAX_DENSE_SIZE,
    SCORE,
    UNKNOWN_FAMILY,
    ParamBlock,
    Structure,
    UnitAxes,
)
from pyronat.errors import (
    BlockTooLarge,
    PyronatError,
    UnsupportedDistribution,
    UnsupportedStructure,
)
from pyronat.graph import BayesNet
from pyronat.jacobians import MAX_JACOBIAN_ENTRIES
from pyronat.operators import Layout
from pyronat.partition import layout_of
from pyronat.programs import KnownProgram

MAX_FORMED_SIZE = 4096
"""Largest number of entries in one unit that is formed where the user asks for it."""


@dataclass(frozen=True)
class Plan:
    """What is fixed about a program's curvature: its blocks and where their parameters lie.

    Attributes:
        program: the program.
        net: its network, the blocks in the structures that were asked for.
        blocks: blocks to measure, by name; the layers of a joint block are blocks by themselves
            where the block is held in Kronecker factors.
        layouts: their layouts, by name.
        blocks_of: (site, group of coordinates) → names of its blocks.
        unmeasured: why parameters of other blocks are not measured, though nobody has excluded
            them, by name.
    """

    program: KnownProgram
    net: BayesNet
    blocks: dict[str, ParamBlock]
    layouts: dict[str, Layout]
    blocks_of: dict[tuple[str, str], tuple[str, ...]]
    unmeasured: dict[str, str]

    @cached_property
    def widths(self) -> dict[str, int]:
        """Elements of a datum at the narrowest site of each block; a prior may be as wide as it."""
        elements = {site.name: site.elements for site in self.net.sites}
        return {
            name: min(elements[site] for site in block.sites) for name, block in self.blocks.items()
        }

    @cached_property
    def transformed(self) -> bool:
        """Whether distributions may have transforms, which remember values."""
        return any(site.family.startswith("TransformedDistribution") for site in self.net.sites)

    def owner(self) -> dict[str, str]:
        """Parameter → name of a block that holds it."""
        return {param: name for name, block in self.blocks.items() for param in block.params}


def make_plan(
    program: KnownProgram,
    excluded: Iterable[str] = (),
    required: bool = True,
    structures: Mapping[str, Structure] | None = None,
) -> Plan:
    """Plans the curvature of a program's blocks.

    Args:
        program: the analyzed program.
        excluded: parameters to leave out; a block that holds one is left out whole.
        required: whether every block must be measured; else those that cannot be, or only in
            factors, are left out.
        structures: names or patterns of parameters → how the blocks that hold them are held.

    Returns:
        The plan.

    Raises:
        UnsupportedDistribution: if a block has no Fisher information that can be computed.
        UnsupportedStructure: if a block cannot be held as it was asked for.
        BlockTooLarge: if a dense block is too large to be formed.
    """
    left_out = set(excluded)
    net = replace(
        program.net, blocks=tuple(_chosen(block, structures or {}) for block in program.net.blocks)
    )
    blocks: dict[str, ParamBlock] = {}
    unmeasured: dict[str, str] = {}
    for whole in net.blocks:
        if left_out & set(whole.params):
            continue
        obstacle = _obstacle(whole, net, required)
        if obstacle is not None and required:
            raise obstacle
        if obstacle is None and (required or whole.explicit):
            blocks.update((block.name, block) for block in _measured(whole))
        else:
            unmeasured.update(dict.fromkeys(whole.params, _why_unmeasured(whole, net)))
    blocks_of: dict[tuple[str, str], tuple[str, ...]] = {}
    for name, block in blocks.items():
        for factor in block.factors:
            blocks_of[factor] = (*blocks_of.get(factor, ()), name)
    return Plan(
        program=program,
        net=net,
        blocks=blocks,
        layouts={name: layout_of(block) for name, block in blocks.items()},
        blocks_of=blocks_of,
        unmeasured=unmeasured,
    )


def _chosen(block: ParamBlock, structures: Mapping[str, Structure]) -> ParamBlock:
    """A block in the structure that was asked for.

    Args:
        block: the block.
        structures: names or patterns → structure; the last that matches counts.

    Returns:
        The block.

    Raises:
        UnsupportedStructure: if the block cannot be held so.
    """
    asked = [
        structure
        for pattern, structure in structures.items()
        if any(fnmatchcase(name, pattern) for name in block.params)
    ]
    if not asked or asked[-1] == block.structure:
        return block
    structure = asked[-1]
    joint = block.count == 1 and isinstance(block.units, UnitAxes)
    if structure == "dense" and (block.structure == "unit" or not joint):
        return block  # already exact, unit by unit
    if structure in FACTORED and not block.layers:
        raise UnsupportedStructure(
            f"the block of {block.name} holds no layer of a network that is recognized, so it has "
            f"no Kronecker factors; choose 'dual' or 'diagonal' instead of {structure!r}"
        )
    linear = block.structure == "unit" and all(block.linear)
    if structure == "shared" and not linear:
        raise UnsupportedStructure(
            f"the block of {block.name} does not fall into linear units, only those can share a "
            "basis; leave it as it is, or choose 'kronecker' or 'dual' for a network"
        )
    if not joint and (structure == "dual" or (structure == "cg" and not linear)):
        raise UnsupportedStructure(
            f"the block of {block.name} falls into {block.count} units, each with a matrix of its "
            "own; 'dual' is for joint blocks of a network, 'cg' for those and for linear units"
        )
    exact = structure == "dense" and UNKNOWN_FAMILY not in {group for _, group in block.factors}
    simulated = any(group == SCORE for _, group in block.factors)
    return replace(block, structure=structure, exact=exact and not simulated)


def _measured(block: ParamBlock) -> Iterator[ParamBlock]:
    """The blocks that are measured for a block.

    Args:
        block: a block of the network.

    Yields:
        The block itself, or its layers and the rest where it is held by layers.
    """
    if block.structure not in FACTORED:
        yield block
        return
    rest = set(block.params)
    for layer in block.layers:
        rest -= set(layer.params)
        yield _part(block, layer.params, tuple((axis,) for axis in layer.axes), block.structure)
    if rest:
        names = tuple(sorted(rest))
        shape_of = dict(zip(block.params, block.shapes, strict=True))
        size = sum(prod(shape_of[name]) for name in names)
        structure: Structure = "dense" if size <= MAX_DENSE_SIZE else "dual"
        yield _part(block, names, ((),) * len(names), structure)


def _part(
    block: ParamBlock,
    params: tuple[str, ...],
    axes: tuple[tuple[int, ...], ...],
    structure: Structure,
) -> ParamBlock:
    """Some parameters of a block, without what couples them to the others.

    Args:
        block: the block.
        params: the parameters.
        axes: for each, the axes that number the units.
        structure: how they are held.

    Returns:
        A block of its own.
    """
    shape_of = dict(zip(block.params, block.shapes, strict=True))
    shapes = tuple(shape_of[name] for name in params)
    count = prod(shapes[0][axis] for axis in axes[0])
    return replace(
        block,
        params=params,
        shapes=shapes,
        structure=structure,
        count=count,
        size=sum(map(prod, shapes)) // count,
        exact=False,
        units=UnitAxes(axes),
        linear=(False,) * len(block.factors),
        layers=tuple(layer for layer in block.layers if set(layer.params) <= set(params)),
    )


def too_many_entries(names: str, count: int) -> BlockTooLarge | None:
    """The error for units that are not linear and have too many entries to be differentiated.

    Args:
        names: of their parameters.
        count: number of their entries.

    Returns:
        The error, or None if there are few enough.
    """
    if count <= MAX_JACOBIAN_ENTRIES:
        return None
    return BlockTooLarge(
        f"{names} has {count} entries that are not linear units, at most {MAX_JACOBIAN_ENTRIES} "
        f"are differentiated; {_advice(names)}"
    )


def _advice(names: str) -> str:
    return (
        f"leave {names} to another optimizer with NaturalGradient(exclude=[...]), or choose "
        "Euclidean() for this program"
    )


def _obstacle(block: ParamBlock, net: BayesNet, required: bool) -> PyronatError | None:
    """Why a block cannot be measured, or None.

    Whether many units are read element by element, and thus cheap, a run tells: they are tried
    where they are required.
    """
    advice = _advice(block.name)
    if _is_unknown(block):
        return UnsupportedDistribution(
            "no Fisher information, in closed form or from simulated values, at site "
            f"{_kinds(block, net)}; {advice}"
        )
    if all(block.linear) or block.structure not in {"unit", "dense", "diagonal"}:
        return None
    if block.explicit and block.size > MAX_FORMED_SIZE:
        return BlockTooLarge(
            f"the dense block of {block.name} has {block.size} entries, at most {MAX_FORMED_SIZE} "
            f"are formed; choose Full(structure={{{block.params[0]!r}: 'dual'}}), or {advice}"
        )
    if not block.explicit or (required and block.count > 1):
        return None
    return too_many_entries(block.name, block.num_entries)


def _why_unmeasured(block: ParamBlock, net: BayesNet) -> str:
    """Why a side without a metric does not measure a block."""
    if _is_unknown(block):
        return f"the score of {_kinds(block, net)} cannot be simulated"
    return f"blocks of {block.size} entries are not measured where there is no metric"


def _is_unknown(block: ParamBlock) -> bool:
    """Whether the block belongs to a distribution whose Fisher information is unknown."""
    return any(group == UNKNOWN_FAMILY for _, group in block.factors)


def _kinds(block: ParamBlock, net: BayesNet) -> str:
    """The sites of a block with their families."""
    families = {site.name: site.family for site in net.sites}
    return ", ".join(f"{name} ({families[name]})" for name in block.sites)
