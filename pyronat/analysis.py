"""`pyronat.analyze`: from a Pyro program to its Bayesian network and parameter blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import networkx as nx
from torch import Tensor

from pyronat.autograd import Edge as GraphEdge
from pyronat.autograd import LinearUnits, SampleGate, linear_units
from pyronat.blocks import LayerAxes
from pyronat.errors import UnsupportedProgram
from pyronat.families import family_name
from pyronat.flows import GroupFlow, ProgramFlow, SiteFlow, follow
from pyronat.graph import BayesNet, Edge, Site
from pyronat.layers import find_layers
from pyronat.partition import IRREGULAR, UNREACHED, FactorStructure, blocks_of, check_regular
from pyronat.tracing import Program
from pyronat.weights import elements_of


def analyze(
    model: Callable[..., Any],
    *args: Any,
    guide: Callable[..., Any] | None = None,
    **kwargs: Any,
) -> BayesNet:
    """Extracts the Bayesian network of a Pyro program and the blocks of its Fisher information.

    Every sample value and every parameter entry is followed through the torch operations of a run
    of the program, whatever autograd can see of them. Two entries fall in the same block if they
    reach the same Fisher-orthogonal group of coordinates of one element of a site, or a chain of
    such groups (Ay, "On the locality of the natural gradient", Sec. 2): the finest partition that
    holds for all values of the parameters, the samples and the data. What a run cannot show
    is joined: a block may be too large, never too small. Only branches that the run takes are seen;
    `NaturalSVI` watches for others.

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
    network = analyze_program(model, args, kwargs)
    if guide is None:
        return network
    return replace(network, guide=analyze_program(guide, args, kwargs))


def analyze_program(program: Program, args: Sequence[Any], kwargs: Mapping[str, Any]) -> BayesNet:
    """The network of a model or a guide alone, see `analyze`."""
    return network_of(follow(program, args, kwargs))


def network_of(flow: ProgramFlow) -> BayesNet:
    """The network that an analyzed run shows.

    Args:
        flow: what flows into every site.

    Returns:
        The network.

    Raises:
        UnsupportedProgram: if the sites depend on each other in a cycle.
        UnsupportedDistribution: if a parameter has a Fisher information at some of its sites only.
    """
    names = {id(leaf): name for name, leaf in flow.params.items()}
    sites = tuple(map(_site, flow.sites))
    factors = [
        _factor(site, group, names)
        for site in flow.sites
        for group in site.groups.values()
        if group.params
    ]
    blocks = blocks_of(flow.components, factors, [site.name for site in sites])
    assigned = {name for block in blocks for name in block.params}
    irregular = _irregular(flow)
    check_regular(irregular, assigned)
    network = BayesNet(
        sites=sites,
        edges=tuple(edge for site in flow.sites for edge in _edges(site)),
        blocks=blocks,
        without_fisher=_without_fisher(flow, assigned, irregular),
    )
    if not nx.is_directed_acyclic_graph(network.graph):
        cycle = " → ".join(parent for parent, _ in nx.find_cycle(network.graph))
        raise UnsupportedProgram(f"the sites depend on each other in a cycle: {cycle}")
    return network


def _site(site: SiteFlow) -> Site:
    record = site.record
    return Site(
        name=record.name,
        kind="observed" if record.observed else "latent",
        family=_family(site),
        plates=tuple(plate.name for plate in record.plates),
        shape=tuple(record.value.shape),
        event_dim=len(record.distribution.event_shape),
        params=site.params,
        reads_data=tuple(sorted(site.data)),
        coupled_plates=site.coupled,
        elements=elements_of(record.distribution),
    )


def _edges(site: SiteFlow) -> list[Edge]:
    child = site.record.name
    data = [Edge(parent, child, "data") for parent in sorted(site.parents)]
    control = [Edge(parent, child, "control") for parent in sorted(site.control)]
    return data + control


def _irregular(flow: ProgramFlow) -> dict[str, str]:
    """Parameters of distributions without a Fisher information, and why."""
    return {
        name: f"{site.record.name} ({_family(site)}) {IRREGULAR}"
        for site in flow.sites
        if not site.groups
        for name in site.params
    }


def _without_fisher(
    flow: ProgramFlow, assigned: set[str], irregular: Mapping[str, str]
) -> tuple[tuple[str, str], ...]:
    def reason(name: str, leaf: Tensor) -> str:
        if not leaf.requires_grad:
            return "requires no gradient"
        return irregular.get(name, UNREACHED)

    return tuple(
        (name, reason(name, leaf)) for name, leaf in flow.params.items() if name not in assigned
    )


def _family(site: SiteFlow) -> str:
    return family_name(site.record.distribution)


def _factor(site: SiteFlow, group: GroupFlow, names: Mapping[int, str]) -> FactorStructure:
    units = linear_units(group.coordinates[0], SampleGate([])) if group.scalar else None
    return FactorStructure(
        site=site.record.name,
        group=group.name,
        params=group.params,
        exact=group.exact,
        plates=tuple(plate.name for plate in site.record.plates),
        unit_axes=None if units is None else _unit_axes(units, group.params, names),
        layers=_layers(group, names),
    )


def _layers(group: GroupFlow, names: Mapping[int, str]) -> tuple[LayerAxes, ...]:
    """Layers behind a group; parameters with all their uses at the same places form one."""
    by_uses: dict[frozenset[GraphEdge], dict[str, int]] = {}
    for layer in find_layers(group.coordinates, ()):
        if id(layer.leaf) in names:
            uses = frozenset(tap.edge for tap in layer.taps)
            by_uses.setdefault(uses, {})[names[id(layer.leaf)]] = layer.unit_axis
    found = [
        LayerAxes(params=tuple(sorted(axes)), axes=tuple(axes[name] for name in sorted(axes)))
        for axes in by_uses.values()
    ]
    return tuple(sorted(found, key=lambda layer: layer.params))


def _unit_axes(
    units: LinearUnits, params: tuple[str, ...], names: Mapping[int, str]
) -> tuple[tuple[int, ...], ...]:
    """For each parameter, the axes that number the recognized units."""
    axes = {names[id(term.leaf)]: term.unit_axes for term in units.terms}
    return tuple(axes[name] for name in params)
