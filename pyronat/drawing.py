"""Pictures: one style for all of them, and networks. Knows neither torch nor Pyro.

matplotlib (extra `cli`) is imported when a picture is drawn.
"""

from __future__ import annotations

import importlib.util
import io
import math
import os
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import networkx as nx

from pyronat.errors import MissingPackage

BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, YELLOW = COLORS = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#B8A800",
)
"""Colors that people with any color vision tell apart (Okabe & Ito 2008), yellow darkened."""

GRAY = "#777777"

STYLE: Mapping[str, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "savefig.dpi": 150,
    "svg.hashsalt": "pyronat",
}

_CHARACTER, _LINE = 0.083, 0.16
"""Inches that a letter is wide and a line is high."""

_LEGEND, _TITLE, _LEAST_WIDTH = 0.35, 0.35, 4.6
"""Inches below and above networks, and of the narrowest picture."""

_SWEEPS = 12
"""Sweeps up and down in which layers are ordered."""


def need_matplotlib() -> None:
    """Checks that pictures can be drawn.

    Raises:
        MissingPackage: if matplotlib is not installed.
    """
    try:
        importlib.import_module("matplotlib")
    except ImportError as error:
        raise MissingPackage(
            "pictures need matplotlib, which is not installed: pip install 'pyronat[cli]'"
        ) from error


def check_pictures(*paths: os.PathLike[str] | str) -> None:
    """Checks that pictures can be drawn into files of these names, before any work is done.

    Args:
        *paths: the files.

    Raises:
        MissingPackage: if matplotlib is not installed.
        ValueError: if there is no format of an ending.
    """
    need_matplotlib()
    from matplotlib.figure import Figure

    known = Figure().canvas.get_supported_filetypes()
    for path in paths:
        ending = os.path.splitext(path)[1][1:]
        if ending.lower() not in known:
            raise ValueError(f"{path} has to end in one of {', '.join(sorted(known))}")


@contextmanager
def figure(
    file: str | os.PathLike[str] | io.BytesIO,
    size: tuple[float, float],
    form: str | None = None,
    layout: Literal["constrained"] | None = "constrained",
) -> Generator[Any, None, None]:
    """A figure in the style of all pictures, which is written when the context ends.

    Args:
        file: where to; the ending of a path says in which format.
        size: width and height in inches.
        form: the format, such as "svg"; None for that of the path.
        layout: that of matplotlib; None where all places are given.

    Yields:
        The figure of matplotlib.

    Raises:
        MissingPackage: if matplotlib is not installed.
        ValueError: if there is no such format.
    """
    need_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(dict(STYLE)):
        drawn = Figure(figsize=size, layout=layout)
        # A drawing that fails leaves nothing to undo.
        yield drawn  # ruff: ignore[fallible-context-manager]
        drawn.savefig(file, format=form, metadata={"Date": None} if form == "svg" else None)


# Networks


@dataclass(frozen=True)
class Network:
    """What is drawn of a network.

    Attributes:
        title: above it.
        graph: sites and edges; nodes have `kind`, `family` and `plates`, edges `kind`.
        districts: members of each district that has hidden ones, in colors of their own.
        center: a site whose Markov blanket is to be seen, or None.
        blanket: that Markov blanket.
    """

    title: str
    graph: nx.DiGraph
    districts: Sequence[tuple[str, ...]]
    center: str | None = None
    blanket: frozenset[str] = frozenset()

    def lines(self, name: str) -> list[str]:
        """The text in a node.

        Args:
            name: the site.

        Returns:
            Its name, its family, and its plates.
        """
        site = self.graph.nodes[name]
        plates = [", ".join(site["plates"])] if site["plates"] else []
        return [name, site["family"], *plates]

    def strength(self, *sites: str) -> float:
        """How strongly to draw sites, or a line between them: pale outside of the blanket."""
        inside = self.center is None or {*sites} <= self.blanket | {self.center}
        return 1.0 if inside else 0.25

    @property
    def node_size(self) -> tuple[float, float]:
        """Width and height of each node in inches."""
        texts = [self.lines(name) for name in self.graph] or [[""]]
        longest = max(len(line) for lines in texts for line in lines)
        return max(0.9, _CHARACTER * longest + 0.25), _LINE * max(map(len, texts)) + 0.2


def draw_networks(
    networks: Sequence[Network], file: str | os.PathLike[str] | io.BytesIO, form: str | None = None
) -> None:
    """Draws networks side by side.

    Arrows are edges, dashed ones where Python carries the value. Observed sites are filled. Dotted
    lines marry the parents of a site, so that the Markov blanket of a site is all that is joined to
    it. Districts with hidden sites have colors.

    Args:
        networks: what to draw.
        file: where to.
        form: the format; None for that of the path.
    """
    laid = [layered(network.graph) for network in networks]
    sizes = [_extent(network, places) for network, places in zip(networks, laid, strict=True)]
    width = max(sum(size[0] for size in sizes), _LEAST_WIDTH)
    tallest = max((size[1] for size in sizes), default=1.0)
    height = _LEGEND + tallest + _TITLE
    with figure(file, (width, height), form, layout=None) as drawn:
        left = (width - sum(size[0] for size in sizes)) / 2
        for network, places, (wide, high) in zip(networks, laid, sizes, strict=True):
            bottom = _LEGEND + tallest - high
            box = (left / width, bottom / height, wide / width, high / height)
            _draw(drawn.add_axes(box), network, places)
            left += wide
        _legend(drawn, networks)


def networks_as_svg(networks: Sequence[Network]) -> str:
    """Networks drawn as an element of HTML, which is as wide as there is room.

    Args:
        networks: what to draw.

    Returns:
        The element; empty where matplotlib is not installed, or nothing is to be drawn.
    """
    if not networks or importlib.util.find_spec("matplotlib") is None:
        return ""
    file = io.BytesIO()
    draw_networks(networks, file, "svg")
    text = file.getvalue().decode()
    return text[text.index("<svg") :].replace(
        "<svg ", '<svg style="max-width: 100%; height: auto" ', 1
    )


def _extent(network: Network, places: Mapping[str, tuple[float, float]]) -> tuple[float, float]:
    """Width and height of a network in inches."""
    width, height = _pitch(network)
    columns = [x for x, _ in places.values()] or [0.0]
    rows = [y for _, y in places.values()] or [0.0]
    return (max(columns) - min(columns) + 1) * width, (max(rows) - min(rows) + 1) * height


def _pitch(network: Network) -> tuple[float, float]:
    """Distance between nodes in a layer, and between layers, in inches."""
    width, height = network.node_size
    return width + 0.35, height + 0.55


def layered(graph: nx.DiGraph) -> dict[str, tuple[float, float]]:
    """Places of nodes in layers below their parents, ordered so that few edges cross.

    Layers are ordered by the mean place of the neighbors above and below in turn (Sugiyama, Tagawa
    & Toda 1981).

    Args:
        graph: the graph.

    Returns:
        Column and row (downward negative) of each node, in steps of one.
    """
    if not nx.is_directed_acyclic_graph(graph):
        ring: dict[str, Any] = nx.circular_layout(graph, scale=len(graph) / math.pi)
        return {name: (float(x), float(y)) for name, (x, y) in ring.items()}
    alone = sorted(nx.isolates(graph))
    layers = _layers(graph.subgraph(set(graph) - set(alone)))
    column = {name: place for layer in layers for name, place in _spread(layer)}
    for sweep in range(_SWEEPS):
        downward = sweep % 2 == 0
        for layer in layers if downward else reversed(layers):
            near = graph.predecessors if downward else graph.successors

            def mean(name: str, near: Any = near) -> float:
                found = [column[other] for other in near(name)]
                return sum(found) / len(found) if found else column[name]

            layer.sort(key=mean)
            column.update(_spread(layer))
    widest = max([len(layer) for layer in layers] + [math.ceil(math.sqrt(len(alone)))])
    rows = [alone[start : start + widest] for start in range(0, len(alone), max(widest, 1))]
    column.update(place for row in rows for place in _spread(row))
    every = enumerate([*layers, *rows])
    return {name: (column[name], -float(row)) for row, layer in every for name in layer}


def _layers(graph: nx.DiGraph) -> list[list[str]]:
    """Layers of a graph: below all parents, and as close above the children as that allows."""
    layers = enumerate(nx.topological_generations(graph))
    level = {name: row for row, layer in layers for name in layer}
    for name in reversed(list(nx.topological_sort(graph))):
        below = [level[child] for child in graph.successors(name)]
        level[name] = min(below) - 1 if below else level[name]
    found: list[list[str]] = [[] for _ in range(max(level.values(), default=-1) + 1)]
    for name in sorted(graph):
        found[level[name]].append(name)
    return found


def _spread(layer: Sequence[str]) -> list[tuple[str, float]]:
    """Columns of a layer, one apart, around 0."""
    return [(name, index - (len(layer) - 1) / 2) for index, name in enumerate(layer)]


def colors_of(network: Network) -> dict[str, str]:
    """The color of each site in a district with hidden ones; gray for all others."""
    found = dict.fromkeys(network.graph, GRAY)
    for index, members in enumerate(network.districts):
        found.update(dict.fromkeys(members, COLORS[index % len(COLORS)]))
    return found


def _draw(axes: Any, network: Network, places: Mapping[str, tuple[float, float]]) -> None:
    """Draws a network.

    Args:
        axes: where.
        network: what.
        places: columns and rows of its nodes.
    """
    (wide, high), (width, height) = _pitch(network), network.node_size
    colors = colors_of(network)
    where = {name: (x * wide, y * high) for name, (x, y) in places.items()}
    nodes = {
        name: _node(axes, network, name, where[name], (width, height), colors[name])
        for name in network.graph
    }
    for first, second in _married(network.graph):
        options = {
            "arrowstyle": "-",
            "connectionstyle": "arc3,rad=-0.15",
            "alpha": network.strength(first, second),
        }
        _line(axes, where, nodes, (first, second), options, ":")
    for parent, child, kind in network.graph.edges(data="kind"):
        far = places[parent][1] - places[child][1] > 1
        options = {
            "arrowstyle": "-|>",
            "mutation_scale": 10,
            "connectionstyle": "arc3,rad=0.12" if far else "arc3",
            "alpha": network.strength(parent, child),
        }
        _line(axes, where, nodes, (parent, child), options, "--" if kind == "control" else "-")
    axes.set_title(network.title)
    axes.set_axis_off()
    axes.set_aspect("equal")
    xs, ys = zip(*where.values(), strict=True) if where else ((0.0,), (0.0,))
    axes.set_xlim(min(xs) - wide / 2, max(xs) + wide / 2)
    axes.set_ylim(min(ys) - high / 2, max(ys) + high / 2)


def _node(
    axes: Any,
    network: Network,
    name: str,
    place: tuple[float, float],
    size: tuple[float, float],
    color: str,
) -> Any:
    """Draws a site."""
    from matplotlib.colors import to_rgb
    from matplotlib.patches import FancyBboxPatch

    pale = tuple(1 - 0.25 * (1 - part) for part in to_rgb(color))
    observed = network.graph.nodes[name]["kind"] == "observed"
    strength = network.strength(name)
    corner = place[0] - size[0] / 2 + 0.1, place[1] - size[1] / 2 + 0.1
    patch = FancyBboxPatch(
        corner,
        size[0] - 0.2,
        size[1] - 0.2,
        boxstyle="round,pad=0.1,rounding_size=0.15",
        facecolor=pale if observed else "white",
        edgecolor=color,
        linewidth=3.0 if name == network.center else 1.6,
        alpha=strength,
        zorder=2,
    )
    axes.add_patch(patch)
    head, *rest = network.lines(name)
    top = place[1] + _LINE * len(rest) / 2
    options = {"ha": "center", "va": "center", "zorder": 3, "alpha": strength}
    axes.text(place[0], top, head, weight="bold", **options)
    for number, line in enumerate(rest, start=1):
        axes.text(place[0], top - _LINE * number, line, color=GRAY, fontsize=8, **options)
    return patch


def _line(
    axes: Any,
    where: Mapping[str, tuple[float, float]],
    nodes: Mapping[str, Any],
    ends: tuple[str, str],
    options: Mapping[str, Any],
    style: str,
) -> None:
    """Draws a line from the rim of a node to that of another one."""
    from matplotlib.patches import FancyArrowPatch

    first, second = ends
    line = FancyArrowPatch(
        where[first],
        where[second],
        patchA=nodes[first],
        patchB=nodes[second],
        shrinkA=0,
        shrinkB=1,
        color="#AAAAAA" if style == ":" else "#444444",
        linestyle=style,
        linewidth=1.0,
        zorder=1,
        **options,
    )
    axes.add_patch(line)


def _married(graph: nx.DiGraph) -> list[tuple[str, str]]:
    """Pairs of parents of a common site that no edge joins."""
    moral = nx.moral_graph(graph)
    return sorted(
        (a, b) for a, b in moral.edges if not graph.has_edge(a, b) and not graph.has_edge(b, a)
    )


def _legend(drawn: Any, networks: Sequence[Network]) -> None:
    """Says what colors and lines mean, as far as they occur."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    kinds = {kind for n in networks for _, kind in n.graph.nodes(data="kind")}
    handles: list[Any] = []
    if "latent" in kinds:
        handles.append(Patch(facecolor="white", edgecolor=GRAY, label="hidden"))
    if "observed" in kinds:
        handles.append(Patch(facecolor="#DDDDDD", edgecolor=GRAY, label="observed"))
    if any(network.districts for network in networks):
        handles.append(Patch(facecolor="white", edgecolor=COLORS[0], label="colors: districts"))
    if any(_married(network.graph) for network in networks):
        label = "parents of one site"
        handles.append(Line2D([], [], color="#AAAAAA", linestyle=":", label=label))
    if any(kind == "control" for n in networks for *_, kind in n.graph.edges(data="kind")):
        handles.append(Line2D([], [], color="#444444", linestyle="--", label="through Python"))
    drawn.legend(handles=handles, loc="lower center", ncols=len(handles))
