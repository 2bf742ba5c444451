"""Districts as the visible geometry needs them: which blocks hidden variables tie together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import networkx as nx

from pyronat.blocks import BY_VALUE, ParamBlock
from pyronat.errors import BlockTooLarge, UnsupportedDistribution
from pyronat.graph import BayesNet, District


@dataclass(frozen=True)
class Part:
    """Sites whose hidden values are independent of those of other parts, given the visible ones.

    Attributes:
        sites: members, sorted.
        hidden: the latent ones among them; none in a part without missing information.
        replicates: plates whose elements are independent copies of the part, given the parameters
            and the visible values, in the model and in the guide.
    """

    sites: tuple[str, ...]
    hidden: tuple[str, ...]
    replicates: tuple[str, ...]


@dataclass(frozen=True)
class DistrictPlan:
    """Blocks that hidden variables tie together: one diagonal block of the visible Fisher.

    Attributes:
        blocks: names of the blocks, sorted.
        size: number of parameter entries in them.
        parts: districts whose parameters lie in the blocks.
    """

    blocks: tuple[str, ...]
    size: int
    parts: tuple[Part, ...]

    @property
    def name(self) -> str:
        """The names of the blocks, joined."""
        return "; ".join(self.blocks)

    @property
    def hidden_parts(self) -> tuple[Part, ...]:
        """Those of which information is missing."""
        return tuple(part for part in self.parts if part.hidden)


def plan_districts(
    net: BayesNet, blocks: Mapping[str, ParamBlock], guide: BayesNet | None = None
) -> tuple[DistrictPlan, ...]:
    """Plans the visible geometry of a model.

    G_V is block diagonal over districts (Ay, Sec. 4; Tian & Pearl 2002). Districts that share a
    block of parameters are solved together, and so are those whose hidden sites a guide draws
    together. Blocks that no hidden variable reaches are in no plan: there G_V = G.

    Args:
        net: network of the model.
        blocks: its measured blocks, by name.
        guide: network of the guide, where it proposes hidden values.

    Returns:
        One plan for each set of blocks that are tied together.
    """
    parts = _parts(net, guide)
    ties = nx.Graph()
    for number, part in enumerate(parts):
        owned = [name for name, block in blocks.items() if set(block.sites) & set(part.sites)]
        ties.add_node(number)
        ties.add_edges_from((number, name) for name in owned)
    plans = []
    for tied in nx.connected_components(ties):
        names = tuple(sorted(name for name in tied if isinstance(name, str)))
        members = tuple(parts[number] for number in sorted(n for n in tied if isinstance(n, int)))
        if names and any(part.hidden for part in members):
            for name in names:
                _check(blocks[name])
            size = sum(blocks[name].num_entries for name in names)
            plans.append(DistrictPlan(names, size, members))
    return tuple(sorted(plans, key=lambda plan: plan.blocks))


def _check(block: ParamBlock) -> None:
    """Refuses blocks whose scores cannot be taken datum by datum.

    Args:
        block: a block of a district with hidden sites.

    Raises:
        BlockTooLarge: if it is not held unit by unit.
        UnsupportedDistribution: if its Fisher information is simulated.
    """
    if not block.by_unit:
        raise BlockTooLarge(
            f"the block of {block.name} is held as {block.structure!r}, but the visible geometry "
            f"needs it dense; choose Full() for this model, or Full(structure={{...: 'dense'}}) as "
            "Visible(full=...) where it is small enough"
        )
    if any(group in BY_VALUE for _, group in block.factors):
        raise UnsupportedDistribution(
            f"site {', '.join(block.sites)} of the block of {block.name} has no closed-form Fisher "
            "information, which the visible geometry needs; choose Full() for this model"
        )


def _parts(net: BayesNet, guide: BayesNet | None) -> list[Part]:
    """Districts, those united whose hidden sites the guide draws together."""
    districts = net.districts
    owner = {site: number for number, d in enumerate(districts) for site in d.hidden}
    drawn = nx.Graph()
    drawn.add_nodes_from(range(len(districts)))
    for edge in guide.edges if guide is not None else ():
        if edge.parent in owner and edge.child in owner:
            drawn.add_edge(owner[edge.parent], owner[edge.child])
    united = (sorted(numbers) for numbers in nx.connected_components(drawn))
    return [_united([districts[number] for number in numbers], guide) for numbers in united]


def _united(districts: list[District], guide: BayesNet | None) -> Part:
    hidden = sorted({site for district in districts for site in district.hidden})
    replicates = set(districts[0].replicates)
    for district in districts:
        replicates &= set(district.replicates)
    for site in guide.sites if guide is not None else ():
        if site.name in hidden:
            replicates &= set(site.plates) - set(site.coupled_plates)
    sites = sorted({site for district in districts for site in district.sites})
    return Part(tuple(sites), tuple(hidden), tuple(sorted(replicates)))
