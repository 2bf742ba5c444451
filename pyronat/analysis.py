"""`pyronat.analyze`: from a Pyro program to its Bayesian network and parameter blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx
from torch import Tensor

from pyronat.autograd import LinearUnits, SampleGate, leaves, linear_units
from pyronat.errors import UnsupportedDistribution, UnsupportedProgram
from pyronat.families import groups, peel
from pyronat.graph import BayesNet, Edge, ParamBlock, Site
from pyronat.records import SiteStructure, distribution_tensors
from pyronat.tracing import Program, run_with_dataflow

UNKNOWN_FAMILY = "score"
"""Name of the one group of coordinates of a distribution without a closed-form Fisher."""


@dataclass(frozen=True)
class _Factor:
    """A Fisher-orthogonal group of one site's coordinates and the parameters behind it."""

    site: str
    group: str
    params: tuple[str, ...]
    transposed: tuple[bool, ...]
    units: int | None
    exact: bool
    plates: tuple[str, ...]


def analyze(
    model: Callable[..., Any],
    *args: Any,
    guide: Callable[..., Any] | None = None,
    **kwargs: Any,
) -> BayesNet:
    """Extracts the Bayesian network of a Pyro program and the blocks of its Fisher information.

    Edges come from following every sample value through the torch operations of one run, parameter
    ownership from the autograd graph with sample values held fixed. Parameter entries fall in the
    same block if they reach the same Fisher-orthogonal group of coordinates of a site, or a chain
    of such groups; a block of linear units that share nothing but their inputs is split by unit
    (Ay, "On the locality of the natural gradient", Sec. 2).

    Args:
        model: a Pyro model.
        *args: its arguments.
        guide: the guide for the same arguments, analyzed into `.guide`.
        **kwargs: its keyword arguments.

    Returns:
        The network.

    Raises:
        UnsupportedProgram: if a parameter reaches a site without being registered with Pyro, or
            the sites depend on each other in a cycle.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> def model():
        ...     p = pyro.param("p", torch.tensor(0.0))
        ...     z = pyro.sample("z", dist.Bernoulli(logits=p))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.3))
        >>> net = analyze(model)
        >>> sorted(net.parents("x")), net.blocks[0].params
        (['z'], ('p',))
    """
    network = _analyze_program(model, args, kwargs)
    if guide is None:
        return network
    guide_network = _analyze_program(guide, args, kwargs)
    return BayesNet(
        network.sites, network.edges, network.blocks, network.without_fisher, guide_network
    )


def _analyze_program(program: Program, args: Sequence[Any], kwargs: Mapping[str, Any]) -> BayesNet:
    structures, params = run_with_dataflow(program, args, kwargs)
    names = {id(leaf): name for name, leaf in params.items() if leaf.requires_grad}
    sites = tuple(_site(structure, names) for structure in structures)
    edges = tuple(edge for structure in structures for edge in _edges(structure))
    factors = [factor for structure in structures for factor in _site_factors(structure, names)]
    order = [site.name for site in sites]
    blocks = _blocks(factors, order, params)
    assigned = {name for block in blocks for name in block.params}
    without = tuple(
        (name, "reaches no random site" if leaf.requires_grad else "requires no gradient")
        for name, leaf in params.items()
        if name not in assigned
    )
    network = BayesNet(sites, edges, blocks, without)
    if not nx.is_directed_acyclic_graph(network.graph):
        cycle = " → ".join(parent for parent, _ in nx.find_cycle(network.graph))
        raise UnsupportedProgram(f"the sites depend on each other in a cycle: {cycle}")
    return network


def _site(structure: SiteStructure, names: Mapping[int, str]) -> Site:
    record = structure.record
    return Site(
        name=record.name,
        kind="observed" if record.observed else "latent",
        family=type(peel(record.distribution).base).__name__,
        plates=tuple(plate.name for plate in record.plates),
        shape=tuple(record.value.shape),
        event_dim=len(record.distribution.event_shape),
        params=_names(distribution_tensors(record.distribution), names, record.name),
        reads_data=tuple(sorted(structure.data)),
    )


def _edges(structure: SiteStructure) -> list[Edge]:
    child = structure.record.name
    tensors = structure.parents | (structure.data - {child})
    data = [Edge(parent, child, "data") for parent in sorted(tensors)]
    control = [Edge(parent, child, "control") for parent in sorted(structure.control - tensors)]
    return data + control


def _names(tensors: Sequence[Tensor], names: Mapping[int, str], site: str) -> tuple[str, ...]:
    found = []
    for leaf in leaves(tensors, ()):
        if id(leaf) not in names:
            raise UnsupportedProgram(
                f"site {site!r} depends on a parameter of shape {tuple(leaf.shape)} that Pyro does "
                "not know; register its module with pyro.module or PyroModule, or detach it"
            )
        found.append(names[id(leaf)])
    return tuple(sorted(found))


def _site_factors(structure: SiteStructure, names: Mapping[int, str]) -> list[_Factor]:
    """The groups of coordinates of one site that depend on parameters."""
    record = structure.record
    plates = tuple(plate.name for plate in record.plates)
    try:
        found = groups(peel(record.distribution).base)
    except UnsupportedDistribution:
        params = _names(distribution_tensors(record.distribution), names, record.name)
        flags = (False,) * len(params)
        unknown = _Factor(record.name, UNKNOWN_FAMILY, params, flags, None, False, plates)
        return [unknown] if params else []
    gate = SampleGate([])
    factors = []
    for group in found:
        params = _names(group.coordinates, names, record.name)
        if params:
            units = linear_units(group.coordinates[0], gate) if group.scalar else None
            flags, count = _unit_structure(units, params, names)
            factors.append(_Factor(record.name, group.name, params, flags, count, True, plates))
    return factors


def _unit_structure(
    units: LinearUnits | None, params: tuple[str, ...], names: Mapping[int, str]
) -> tuple[tuple[bool, ...], int | None]:
    if units is None:
        return (False,) * len(params), None
    flags = {names[id(term.leaf)]: term.transposed for term in units.terms}
    return tuple(flags[name] for name in params), units.units


def _blocks(
    factors: Sequence[_Factor], order: Sequence[str], params: Mapping[str, Tensor]
) -> tuple[ParamBlock, ...]:
    """Connected components of the bipartite graph of factors and parameters."""
    bipartite = nx.Graph()
    for index, factor in enumerate(factors):
        bipartite.add_edges_from((index, name) for name in factor.params)
    blocks = []
    for component in nx.connected_components(bipartite):
        members = [factors[node] for node in sorted(n for n in component if isinstance(n, int))]
        names = tuple(sorted(node for node in component if isinstance(node, str)))
        blocks.append(_block(members, names, order, params))
    return tuple(sorted(blocks, key=lambda block: block.params))


def _block(
    members: Sequence[_Factor],
    names: tuple[str, ...],
    order: Sequence[str],
    params: Mapping[str, Tensor],
) -> ParamBlock:
    entries = sum(params[name].numel() for name in names)
    forms = {(factor.params, factor.transposed, factor.units) for factor in members}
    first = members[0]
    unit = len(forms) == 1 and first.units is not None
    count = first.units if unit and first.units is not None else 1
    sites = {factor.site for factor in members}
    plates = [plate for plate in first.plates if all(plate in factor.plates for factor in members)]
    return ParamBlock(
        params=names,
        sites=tuple(site for site in order if site in sites),
        structure="unit" if unit else "dense",
        count=count,
        size=entries // count,
        exact=all(factor.exact for factor in members),
        transposed=first.transposed if unit else (False,) * len(names),
        factors=tuple((factor.site, factor.group) for factor in members),
        plates=tuple(plates),
    )
