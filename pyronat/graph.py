"""The Bayesian network of a program: sites, parents, parameter blocks, districts.

Static, hashable structure on networkx; no tensor, no torch, no Pyro.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence, Set
from dataclasses import asdict, dataclass
from functools import cached_property
from html import escape
from itertools import combinations
from typing import Any, Literal

import networkx as nx

from pyronat.blocks import LayerAxes, ParamBlock, UnitAxes, UnitEntries
from pyronat.drawing import Network, draw_networks, networks_as_svg
from pyronat.errors import UnknownName


@dataclass(frozen=True)
class Site:
    """A random variable of the network: one Pyro sample site, often a layer of units.

    Attributes:
        name: the site's name.
        kind: "latent", or "observed".
        family: name of the innermost distribution.
        plates: names of the plates around the site, outermost first.
        shape: shape of the value in the analyzed run, `(*batch, *event)`.
        event_dim: number of event dimensions of the value.
        params: names of the parameters that the distribution depends on, other sites held fixed.
        reads_data: observed sites whose data the distribution reads from the program's arguments,
            not from the site's value; such a program cannot be run on simulated data.
        coupled_plates: plates along which an element of the distribution depends on values or
            arguments of other elements, as after BatchNorm; their elements are not independent.
        elements: pixels, items or words of one value in the analyzed run, see
            `weights.elements_of`.
    """

    name: str
    kind: Literal["latent", "observed"]
    family: str
    plates: tuple[str, ...]
    shape: tuple[int, ...]
    event_dim: int
    params: tuple[str, ...]
    reads_data: tuple[str, ...] = ()
    coupled_plates: tuple[str, ...] = ()
    elements: int = 1


@dataclass(frozen=True)
class Edge:
    """A dependence of one site's distribution on another site's value.

    Attributes:
        parent: name of the site whose value is read.
        child: name of the site whose distribution depends on it.
        kind: "data" where tensors carry the value, "control" where Python does.
    """

    parent: str
    child: str
    kind: Literal["data", "control"]


@dataclass(frozen=True)
class District:
    """Families linked by shared hidden variables; the visible metric is block diagonal over them.

    Attributes:
        sites: members, sorted.
        hidden: the latent ones among the members.
        params: parameters of the members, sorted.
        replicates: plates whose elements are independent copies of the district, given the
            parameters: all members lie inside and nothing couples the elements.
    """

    sites: tuple[str, ...]
    hidden: tuple[str, ...]
    params: tuple[str, ...]
    replicates: tuple[str, ...] = ()


@dataclass(frozen=True)
class BayesNet:
    """Structure of a Pyro program as a Bayesian network.

    Attributes:
        sites: in program order.
        edges: parent → child.
        blocks: blocks of the full-system Fisher information, sorted by parameter names.
        without_fisher: (parameter, reason) of those that belong to no block.
        guide: the network of the guide, or None.
    """

    sites: tuple[Site, ...]
    edges: tuple[Edge, ...]
    blocks: tuple[ParamBlock, ...]
    without_fisher: tuple[tuple[str, str], ...] = ()
    guide: BayesNet | None = None

    @cached_property
    def graph(self) -> nx.DiGraph:
        """The sites as a `networkx.DiGraph` with their attributes; edges carry `kind`."""
        graph = nx.DiGraph()
        for site in self.sites:
            attributes = asdict(site)
            graph.add_node(attributes.pop("name"), **attributes)
        graph.add_edges_from((edge.parent, edge.child, {"kind": edge.kind}) for edge in self.edges)
        return graph

    @cached_property
    def params(self) -> tuple[str, ...]:
        """All parameter names of the program, sorted."""
        owned = {name for block in self.blocks for name in block.params}
        return tuple(sorted(owned | {name for name, _ in self.without_fisher}))

    def parents(self, site: str) -> frozenset[str]:
        """Sites that the distribution of a site reads."""
        return frozenset(self.graph.predecessors(site))

    def children(self, site: str) -> frozenset[str]:
        """Sites whose distributions read a site."""
        return frozenset(self.graph.successors(site))

    def markov_blanket(self, site: str) -> frozenset[str]:
        """Parents, children and co-parents: given them, the site is independent of the rest."""
        children = self.children(site)
        coparents = (self.parents(child) for child in children)
        return (self.parents(site) | children).union(*coparents) - {site}

    @cached_property
    def districts(self) -> tuple[District, ...]:
        """Connected components of families that share a hidden variable (Tian & Pearl 2002)."""
        links = nx.Graph()
        links.add_nodes_from(self.graph)
        for site in self.sites:
            if site.kind == "latent":
                links.add_edges_from((site.name, child) for child in self.children(site.name))
        by_name = {site.name: site for site in self.sites}
        districts = []
        for members in nx.connected_components(links):
            sites = [by_name[name] for name in sorted(members)]
            districts.append(
                District(
                    sites=tuple(site.name for site in sites),
                    hidden=tuple(site.name for site in sites if site.kind == "latent"),
                    params=tuple(sorted({name for site in sites for name in site.params})),
                    replicates=_replicates(sites),
                )
            )
        return tuple(sorted(districts, key=lambda district: district.sites))

    def d_separated(self, first: Set[str], second: Set[str], given: Set[str] = frozenset()) -> bool:
        """Whether every path between two sets of sites is blocked by a third one (Pearl 1988).

        Then the first set is independent of the second one given the third, whatever the
        parameters are.

        Args:
            first: names of sites.
            second: names of sites.
            given: names of sites.

        Returns:
            Whether the sets are d-separated.
        """
        return bool(nx.is_d_separator(self.graph, set(first), set(second), set(given)))

    def moral_graph(self) -> nx.Graph:
        """The undirected graph that marries the parents of every site."""
        moral = self.graph.to_undirected()
        for site in self.graph:
            moral.add_edges_from(combinations(self.parents(site), 2))
        return moral

    def to_json(self) -> str:
        """The structure as JSON text, with stable order."""
        return json.dumps(self._as_dict(), indent=2)

    def _as_dict(self) -> dict[str, Any]:
        return {
            "sites": [asdict(site) for site in self.sites],
            "edges": [asdict(edge) for edge in self.edges],
            "blocks": [asdict(block) for block in self.blocks],
            "districts": [asdict(district) for district in self.districts],
            "without_fisher": [list(entry) for entry in self.without_fisher],
            "guide": None if self.guide is None else self.guide._as_dict(),
        }

    @classmethod
    def from_json(cls, text: str) -> BayesNet:
        """The network that `to_json` wrote."""
        return _network(json.loads(text))

    def to_dot(self) -> str:
        """The site graph in the DOT language of Graphviz; observed sites are filled."""
        lines = ["digraph {", "  node [shape=ellipse];"]
        for site in self.sites:
            style = ', style=filled, fillcolor="lightgray"' if site.kind == "observed" else ""
            label = f"{site.name}\\n{site.family}"
            lines.append(f"  {json.dumps(site.name)} [label={_dot_text(label)}{style}];")
        for edge in self.edges:
            style = " [style=dashed]" if edge.kind == "control" else ""
            lines.append(f"  {json.dumps(edge.parent)} -> {json.dumps(edge.child)}{style};")
        return "\n".join([*lines, "}"])

    def plot(self, path: str | os.PathLike[str], blanket_of: str | None = None) -> None:
        """Draws model and guide with matplotlib (extra `cli`).

        Districts with hidden sites have colors. Dotted lines marry the parents of a site, so that
        a Markov blanket is all that is joined to a site.

        Args:
            path: the picture file; its ending says in which format.
            blanket_of: a site whose Markov blanket is to stand out.

        Raises:
            MissingPackage: if matplotlib is not installed.
            UnknownName: if there is no such site.
        """
        draw_networks(self._pictures(blanket_of), path)

    def _pictures(self, center: str | None) -> list[Network]:
        programs = {"model": self, "guide": self.guide}
        nets = {title: net for title, net in programs.items() if net is not None and net.sites}
        if center is not None and all(center not in net.graph for net in nets.values()):
            names = ", ".join(site.name for net in nets.values() for site in net.sites)
            raise UnknownName(f"there is no site {center!r} to show; there are {names}")
        return [net._picture(title, center) for title, net in nets.items()]

    def _picture(self, title: str, center: str | None) -> Network:
        # A guide hides nothing.
        hidden = [d.sites for d in self.districts if d.hidden and title == "model"]
        if center is None or center not in self.graph:
            return Network(title, self.graph, hidden)
        return Network(title, self.graph, hidden, center, self.markov_blanket(center))

    def __str__(self) -> str:
        """A report of sites, blocks and districts, then of the guide."""
        lines = list(self._report())
        if self.guide is not None:
            lines += ["", "Guide", *self.guide._report()]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """The same for notebooks, with the network drawn where matplotlib is installed."""
        parts = [f"<div>{networks_as_svg(self._pictures(None))}</div>"]
        for title, net in (("", self), ("Guide", self.guide)):
            if net is not None:
                parts += [f"<h4>{title}</h4>"] if title else []
                parts += [_html(*section) for section in net._sections()]
        return "\n".join(parts)

    def _report(self) -> Iterator[str]:
        for title, rows, lines in self._sections():
            yield title
            yield from _table(rows)
            yield from (f"  {line}" for line in lines)

    def _sections(self) -> Iterator[tuple[str, Sequence[tuple[str, ...]], list[str]]]:
        """The parts of the report.

        Yields:
            Title, table with its header, and further lines of each.
        """
        rows = [("site", "kind", "family", "shape", "plates", "parents", "Markov blanket")]
        for site in self.sites:
            parents = ", ".join(sorted(self.parents(site.name)))
            blanket = ", ".join(sorted(self.markov_blanket(site.name)))
            plates, shape = ", ".join(site.plates), " × ".join(map(str, site.shape))
            rows.append((site.name, site.kind, site.family, shape, plates, parents, blanket))
        yield f"Sites ({len(self.sites)})", rows, []
        table = [("parameters", "sites", "structure", "blocks", "exact", "memory", "factoring")]
        for block in self.blocks:
            shape = f"{block.count} of {block.size} × {block.size}"
            exact = "yes" if block.exact else "no"
            costs = _quantity(4 * block.matrix_entries, "B"), _quantity(block.factor_flops, "FLOP")
            sites = ", ".join(block.sites)
            table.append((block.name, sites, block.structure, shape, exact, *costs))
        memory = _quantity(sum(4 * block.matrix_entries for block in self.blocks), "B")
        flops = _quantity(sum(block.factor_flops for block in self.blocks), "FLOP")
        lines = [f"in all {memory} in single precision, {flops} to factor at a refresh"]
        lines += [f"without a Fisher: {name} ({reason})" for name, reason in self.without_fisher]
        yield f"Blocks of the full-system Fisher information ({len(self.blocks)})", table, lines
        yield f"Districts ({len(self.districts)})", [], [*self._district_lines()]

    def _district_lines(self) -> Iterator[str]:
        for district in self.districts:
            hidden = ", ".join(district.hidden) or "none"
            line = f"{', '.join(district.sites)}; hidden: {hidden}"
            if district.replicates:
                line += f"; independent replicates along {', '.join(district.replicates)}"
            yield line
        for site in self.sites:
            if site.coupled_plates:
                plates = ", ".join(site.coupled_plates)
                yield f"coupled: elements of {site.name} depend on each other along {plates}"
            if site.reads_data:
                data = ", ".join(site.reads_data)
                yield f"{site.name} reads the data of {data} from the arguments"


def _network(content: dict[str, Any]) -> BayesNet:
    guide = content["guide"]
    return BayesNet(
        sites=tuple(Site(**_tuples(site)) for site in content["sites"]),
        edges=tuple(Edge(**edge) for edge in content["edges"]),
        blocks=tuple(_param_block(block) for block in content["blocks"]),
        without_fisher=_tuples(content["without_fisher"]),
        guide=None if guide is None else _network(guide),
    )


def _param_block(content: dict[str, Any]) -> ParamBlock:
    (kind, values), *_ = content["units"].items()
    units = {"axes": UnitAxes, "entries": UnitEntries}[kind](_tuples(values))
    layers = tuple(LayerAxes(**_tuples(layer)) for layer in content["layers"])
    return ParamBlock(**{**_tuples(content), "units": units, "layers": layers})


def _tuples(content: Any) -> Any:
    """Lists, at any depth, as tuples."""
    if isinstance(content, dict):
        return {key: _tuples(value) for key, value in content.items()}
    return tuple(map(_tuples, content)) if isinstance(content, list) else content


def _replicates(members: Sequence[Site]) -> tuple[str, ...]:
    """Plates around all members along which no member is coupled, outermost first."""
    coupled = {plate for site in members for plate in site.coupled_plates}
    return tuple(
        plate
        for plate in members[0].plates
        if plate not in coupled and all(plate in site.plates for site in members)
    )


def _dot_text(text: str) -> str:
    return '"' + text.replace('"', '\\"') + '"'


def _quantity(value: float, unit: str) -> str:
    prefixes = ["", "k", "M", "G", "T"]
    while value >= 1000 and len(prefixes) > 1:
        value /= 1000
        prefixes.pop(0)
    return f"{value:.3g} {prefixes[0]}{unit}"


def _table(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  " + "  ".join(map(str.ljust, row, widths)).rstrip()


def _html(title: str, rows: Sequence[tuple[str, ...]], lines: Sequence[str]) -> str:
    """A part of the report as HTML."""
    head, *body = [[escape(cell) for cell in row] for row in rows] or [[]]
    cells = ["".join(f"<td>{cell}</td>" for cell in row) for row in body]
    table = "".join(f"<tr>{row}</tr>" for row in ["".join(f"<th>{c}</th>" for c in head), *cells])
    text = "<br>".join(map(escape, lines))
    return (
        f"<b>{escape(title)}</b>" + (f"<table>{table}</table>" if head else "") + f"<p>{text}</p>"
    )
