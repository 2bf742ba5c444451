"""Discrete Bayesian networks from files, as Pyro programs with learnable tables.

`load` reads a network: one of those that pgmpy's wheels carry, by name and without a connection,
or any file that pgmpy reads. `make_model` turns it into a Pyro program with one categorical site
and one conditional probability table per node, of which some nodes may be hidden; `make_guide`
gives a guide for these. `exact_log_likelihood` is the referee, by variable elimination, and
`read_back` is the reverse: it finds a network in a Pyro program, knowing nothing of how that was
made.

States are the integers 0, 1, ... in the order of a node's state names. Data are integer tensors of
shape [cases, observed nodes], the columns in the order of `DiscreteNet.observed`.
"""

import gzip
import itertools
import math
import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.inspect import get_model_relations
from pyro.infer.util import is_validation_enabled
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import linear

FLOOR = 1e-5
"""The least initial probability in a program: simplex coordinates of 0 would be infinite."""

MAX_STATES = 2**24
"""The largest number of joint states that the exact referee holds at once for one case."""

_CHUNK_ELEMENTS = 2**22
_ROW_TOLERANCE = 0.01
_FORMATS = {".xmlbif": "xmlbif", ".xml": "xmlbif", ".net": "net", ".uai": "uai", ".xdsl": "xdsl"}

Program = Callable[..., Any]


@dataclass(frozen=True, eq=False)
class DiscreteNet:
    """A Bayesian network of discrete nodes.

    Attributes:
        states: Names of the states of each node; the nodes are in topological order.
        parents: Parents of each node, in the order of its table's axes.
        tables: Conditional probabilities of each node, shape [*states of the parents, states],
            on the CPU. `load` and `read_back` give them as float64.
        name: Name of the network.
    """

    states: Mapping[str, tuple[str, ...]]
    parents: Mapping[str, tuple[str, ...]]
    tables: Mapping[str, Tensor]
    name: str = "network"

    def __post_init__(self) -> None:
        """Checks that the parts fit together.

        Raises:
            ValueError: If they do not, naming the node.
        """
        if not set(self.states) == set(self.parents) == set(self.tables):
            raise ValueError("states, parents and tables must have the same nodes")
        seen: set[str] = set()
        for node in self.nodes:
            if not self.states[node]:
                raise ValueError(f"node {node!r} has no states")
            if missing := [parent for parent in self.parents[node] if parent not in seen]:
                raise ValueError(f"node {node!r} stands before its parents {missing}, or has none")
            seen.add(node)
            self._check_table(node)

    @property
    def nodes(self) -> tuple[str, ...]:
        """The nodes in topological order."""
        return tuple(self.states)

    def size(self, node: str) -> int:
        """The number of states of a node."""
        return len(self.states[node])

    def observed(self, hidden: Iterable[str] = ()) -> tuple[str, ...]:
        """The nodes that are not hidden, in topological order: the columns of the data.

        Args:
            hidden: Hidden nodes.

        Returns:
            Names of the observed nodes.

        Raises:
            ValueError: If a hidden node is not in the network.
        """
        hidden = _names(hidden)
        if unknown := [node for node in hidden if node not in self.states]:
            raise ValueError(f"hidden nodes {unknown} are not in the network {self.name!r}")
        return tuple(node for node in self.nodes if node not in hidden)

    def markov_blanket(self, node: str) -> tuple[str, ...]:
        """Parents, children and the children's other parents, in topological order."""
        near = set(self.parents[node])
        for child, parents in self.parents.items():
            if node in parents:
                near.update((child, *parents))
        return tuple(member for member in self.nodes if member in near - {node})

    def smooth(self, floor: float = FLOOR) -> "DiscreteNet":
        """The same network without probabilities that are practically 0.

        Args:
            floor: Lower probabilities are raised to this one before each row is normalized.

        Returns:
            A network whose rows sum to one.
        """
        tables = {node: _normalized(table.clamp(min=floor)) for node, table in self.tables.items()}
        return DiscreteNet(self.states, self.parents, tables, self.name)

    def _check_table(self, node: str) -> None:
        table = self.tables[node].detach()
        shape = [self.size(member) for member in (*self.parents[node], node)]
        if list(table.shape) != shape:
            raise ValueError(
                f"the table of node {node!r} must have shape {shape}, got {list(table.shape)}"
            )
        if not bool(((table >= 0) & table.isfinite()).all()):
            raise ValueError(f"the table of node {node!r} has entries that are no probabilities")
        if float((table.sum(-1) - 1).abs().max()) > _ROW_TOLERANCE:
            raise ValueError(f"the table of node {node!r} has rows that do not sum to one")


# --- reading and writing -----------------------------------------------------------------------


def bundled() -> tuple[str, ...]:
    """Names of the discrete networks that come with the installed pgmpy, sorted."""
    return tuple(sorted(path.name.removesuffix(".bif.gz") for path in _folder().glob("*.bif.gz")))


def load(name_or_path: str | Path) -> DiscreteNet:
    """Reads a network, without any network connection.

    Files in the interchange format (.bif, .bif.gz) are read here, because pgmpy's reader takes
    seconds for large networks; those in the formats .net, .uai, .xdsl, .xml and .xmlbif are read by
    pgmpy. Rows of a table that do not sum to one because their entries were rounded are normalized.

    Args:
        name_or_path: A name in `bundled()`, such as "asia", or the path of a file.

    Returns:
        The network; its tables are float64, on the CPU, and may have entries of exactly 0.

    Raises:
        ValueError: If there is no such name, or the file's format or content is not understood.
    """
    path = Path(name_or_path)
    if not path.suffix:
        if (found := _folder() / f"{name_or_path}.bif.gz").is_file():
            path = found
        else:
            raise ValueError(f"no bundled network {str(name_or_path)!r}; there are {bundled()}")
    name = path.name.split(".")[0]
    if path.name.endswith(".bif.gz"):
        return _parse_bif(gzip.decompress(path.read_bytes()).decode(), name)
    if path.suffix == ".bif":
        return _parse_bif(path.read_text(encoding="utf-8"), name)
    if path.suffix not in _FORMATS:
        raise ValueError(f"cannot read {path.name!r}: not of a format .bif, .bif.gz, {_FORMATS}")
    from pgmpy.models import DiscreteBayesianNetwork

    return from_pgmpy(DiscreteBayesianNetwork.load(str(path), _FORMATS[path.suffix]), name)


def from_pgmpy(network: Any, name: str = "network") -> DiscreteNet:
    """Takes a network over from pgmpy.

    Args:
        network: A `pgmpy.models.DiscreteBayesianNetwork` with a table at every node.
        name: Name of the result.

    Returns:
        The same network.
    """
    states, parents, tables = {}, {}, {}
    for cpd in network.get_cpds():
        node = str(cpd.variable)
        states[node] = tuple(map(str, cpd.state_names[cpd.variable]))
        parents[node] = tuple(map(str, cpd.variables[1:]))
        values = torch.tensor(cpd.values.tolist(), dtype=torch.float64, device="cpu")
        tables[node] = values.movedim(0, -1)
    return _sorted_net(states, parents, tables, name)


def to_pgmpy(net: DiscreteNet) -> Any:
    """Hands a network to pgmpy, which can write it to a file.

    Args:
        net: The network.

    Returns:
        A `pgmpy.models.DiscreteBayesianNetwork` that pgmpy has checked.
    """
    from pgmpy.factors.discrete import TabularCPD
    from pgmpy.models import DiscreteBayesianNetwork

    network = DiscreteBayesianNetwork()
    network.add_nodes_from(net.nodes)
    for node in net.nodes:
        parents = net.parents[node]
        network.add_edges_from((parent, node) for parent in parents)
        cpd = TabularCPD(
            node,
            net.size(node),
            net.tables[node].reshape(-1, net.size(node)).T.tolist(),
            evidence=list(parents),
            evidence_card=[net.size(parent) for parent in parents],
            state_names={member: list(net.states[member]) for member in (node, *parents)},
        )
        network.add_cpds(cpd)
    network.check_model()
    return network


# --- programs ----------------------------------------------------------------------------------


def make_model(net: DiscreteNet, hidden: Iterable[str] = ()) -> Program:
    """Makes a Pyro program of a network.

    The program is `model(data=None, num_cases=1)`. Each node is a categorical site of its name in
    one plate over the cases, with the parameter `cpt_name(net, node)` on the simplex: its table,
    which starts at that of `net.smooth()`. Without data all nodes are sampled. To sum a few hidden
    nodes out, wrap the program in `pyro.infer.config_enumerate(model, "parallel")`.

    Args:
        net: The network.
        hidden: Nodes that have no column in the data.

    Returns:
        The program. It returns the value of each node, shape [cases].

    Raises:
        ValueError: If a hidden node is not in the network. The program raises it if the data have
            the wrong type or shape or, while Pyro's validation is on, values out of range.
    """
    observed = net.observed(hidden)
    initial = net.smooth()
    plate = _plate_name(net)

    def model(data: Tensor | None = None, num_cases: int = 1) -> dict[str, Tensor]:
        columns = {} if data is None else _columns(net, observed, data, is_validation_enabled())
        values: dict[str, Tensor] = {}
        with pyro.plate(plate, num_cases if data is None else len(data), dim=-1):
            for node in net.nodes:
                table = _cpt(initial, node)
                probs = table[tuple(values[parent] for parent in net.parents[node])]
                site = dist.Categorical(probs=probs)
                values[node] = pyro.sample(node, site, obs=columns.get(node))
        return values

    return model


def make_guide(net: DiscreteNet, hidden: Iterable[str]) -> Program:
    """Makes a guide for the hidden nodes of a network.

    The guide is `guide(data, num_cases=1, observations=None)`, where `observations` holds values by
    node that replace columns of the data. Each hidden node is categorical, independent of the other
    hidden nodes given the data; its logits are linear in the states of the observed nodes in its
    Markov blanket, with the parameters `cpt_name(net, node)` + ".weight" and ".bias".

    Args:
        net: The network.
        hidden: Nodes that have no column in the data.

    Returns:
        The guide.

    Raises:
        ValueError: If a hidden node is not in the network. The guide raises it for wrong data, as
            the model does, and without data.
    """
    hidden = _names(hidden)
    observed = net.observed(hidden)
    latent = [node for node in net.nodes if node in hidden]
    inputs = {node: [n for n in net.markov_blanket(node) if n in observed] for node in latent}
    plate = _plate_name(net)

    def guide(
        data: Tensor | None = None,
        num_cases: int = 1,
        observations: Mapping[str, Tensor] | None = None,
    ) -> None:
        columns = {} if data is None else _columns(net, observed, data, is_validation_enabled())
        columns.update(observations or {})
        if missing := [node for node in observed if node not in columns]:
            raise ValueError(f"the guide needs data; there are none for {missing}")
        size = columns[observed[0]].shape[-1] if observed else num_cases
        with pyro.plate(plate, size, dim=-1):
            for node in latent:
                features = _one_hot(net, inputs[node], columns, size)
                name, units = f"{cpt_name(net, node)}.guide", net.size(node)
                bias = pyro.param(f"{name}.bias", lambda n=units: torch.zeros(n))
                logits = bias
                if features.shape[-1]:
                    shape = (units, features.shape[-1])
                    weight = pyro.param(f"{name}.weight", lambda s=shape: torch.zeros(s))
                    logits = linear(features, weight, bias)
                pyro.sample(node, dist.Categorical(logits=logits))

    return guide


def cpt_name(net: DiscreteNet, node: str) -> str:
    """Name of the parameter that holds a node's table: the node's name and ".cpt"."""
    return _unused(net, f"{node}.cpt")


def make_data(
    net: DiscreteNet, seed: int, num_cases: int = 200, hidden: Iterable[str] = ()
) -> Tensor:
    """Samples cases from a network's own tables.

    Neither the global random state nor the parameter store is touched.

    Args:
        net: The network.
        seed: Seed of the samples.
        num_cases: Number of cases.
        hidden: Nodes that get no column.

    Returns:
        States of the observed nodes, integers, shape [num_cases, observed nodes].
    """
    observed = net.observed(hidden)
    generator = torch.Generator("cpu").manual_seed(seed)
    values: dict[str, Tensor] = {}
    for node in net.nodes:
        index = tuple(values[parent] for parent in net.parents[node])
        probs = net.tables[node][index].expand(num_cases, -1)
        values[node] = torch.multinomial(probs, 1, generator=generator).squeeze(-1)
    data = torch.stack([values[node] for node in observed], -1) if observed else None
    if data is None:
        data = torch.zeros(num_cases, 0, dtype=torch.long, device="cpu")
    return data.to(torch.get_default_device())


# --- the referee and the reverse ---------------------------------------------------------------


def exact_log_likelihood(net: DiscreteNet, data: Tensor, hidden: Iterable[str] = ()) -> Tensor:
    """Sums the joint probability over all hidden states by variable elimination.

    To judge a trained program, pass the network that `learned` or `read_back` gives. The result can
    be differentiated in the tables: a table times the gradient in it is the expected number of
    times that each of its entries was used.

    Args:
        net: The network, with the tables to use.
        data: States of the observed nodes, shape [cases, observed nodes].
        hidden: Nodes that have no column in the data.

    Returns:
        Log probability of each case in nats, float64 on the CPU, shape [cases].

    Raises:
        ValueError: If the data do not fit, or the elimination needs more than `MAX_STATES` states.
    """
    hidden = _names(hidden)
    columns = _columns(net, net.observed(hidden), data.cpu(), check_range=True)
    families = [(*net.parents[node], node) for node in net.nodes]
    order, largest = _elimination_order(net, families, hidden)
    if largest > MAX_STATES:
        raise ValueError(
            f"summing the hidden nodes out needs {largest} joint states (at most {MAX_STATES})"
        )
    chunk = max(1, _CHUNK_ELEMENTS // largest)
    total = [torch.zeros(0, dtype=torch.float64, device="cpu")]
    for start in range(0, len(data), chunk):
        given = {node: column[start : start + chunk] for node, column in columns.items()}
        cases = min(chunk, len(data) - start)
        factors = [_given(net, family, given, cases) for family in families]
        total.append(_eliminate(factors, order))
    return torch.cat(total)


def learned(net: DiscreteNet) -> DiscreteNet:
    """The network with the tables that its program has now.

    Args:
        net: The network that the program was made of.

    Returns:
        The network with the tables in Pyro's parameter store, in float64 and on the CPU; nodes that
        have none there keep those of `net.smooth()`, where they would start.
    """
    store, initial = pyro.get_param_store(), net.smooth()
    tables = {
        node: (
            _normalized(store[name].detach().double().cpu())
            if (name := cpt_name(net, node)) in store
            else initial.tables[node]
        )
        for node in net.nodes
    }
    return DiscreteNet(net.states, net.parents, tables, net.name)


@torch.no_grad()
def read_back(
    model: Program, states: Mapping[str, Sequence[str]] | None = None, name: str = "network"
) -> DiscreteNet:
    """Finds the network in a Pyro program, knowing nothing of how the program was made.

    Parents are found by Pyro's own tracking of dependencies. Tables are found by setting the
    parents of a node to each of their joint states and reading the node's distribution.

    Args:
        model: A program that is called as `model(None, num_cases)`, then samples all its sites, and
            has one plate over the cases and categorical sites without event dimensions only.
        states: Names of the states by node; by default "0", "1" and so on.
        name: Name of the result.

    Returns:
        The network with the program's present tables. The parents of a node are in program order.

    Raises:
        ValueError: If a site is not categorical.
    """
    relations = get_model_relations(model, (None, 2))["sample_sample"]
    nodes = list(relations)
    parents = {
        node: tuple(n for n in nodes if n in relations[node] and n != node) for node in nodes
    }
    trace = poutine.trace(model).get_trace(None, 1)
    for node in nodes:
        if not isinstance(trace.nodes[node]["fn"], dist.Categorical):
            raise ValueError(f"site {node!r} is not categorical")
    sizes = {node: trace.nodes[node]["fn"].probs.shape[-1] for node in nodes}
    tables: dict[str, Tensor] = {}
    for group in _with_disjoint_parents(parents):
        shapes = {node: tuple(sizes[parent] for parent in parents[node]) for node in group}
        rows = max(math.prod(shape) for shape in shapes.values())
        values: dict[str, Tensor] = {}
        for node in group:
            index = torch.arange(rows) % math.prod(shapes[node])
            values.update(zip(parents[node], torch.unravel_index(index, shapes[node]), strict=True))
        trace = poutine.trace(poutine.condition(model, values)).get_trace(None, rows)
        for node, shape in shapes.items():
            probs = trace.nodes[node]["fn"].probs[: math.prod(shape)].double().cpu()
            tables[node] = _normalized(probs.reshape(*shape, sizes[node]))
    names = {
        node: tuple(states[node]) if states else tuple(map(str, range(sizes[node])))
        for node in nodes
    }
    return DiscreteNet(names, parents, tables, name)


# --- parts of programs -------------------------------------------------------------------------


def _names(nodes: Iterable[str]) -> frozenset[str]:
    """A set of names; one string is one name."""
    return frozenset((nodes,) if isinstance(nodes, str) else nodes)


def _unused(net: DiscreteNet, name: str) -> str:
    """The name, made longer until it is not the name of a node."""
    while name in net.states:
        name += "_"
    return name


def _plate_name(net: DiscreteNet) -> str:
    return _unused(net, "data")


def _cpt(initial: DiscreteNet, node: str) -> Tensor:
    """A node's table as a parameter, shape [*states of the parents, states]."""
    if initial.size(node) == 1:
        return torch.ones(initial.tables[node].shape)  # nothing to learn
    table: Tensor = pyro.param(
        cpt_name(initial, node),
        lambda: torch.as_tensor(
            initial.tables[node],
            dtype=torch.get_default_dtype(),
            device=torch.get_default_device(),
        ),
        constraint=constraints.simplex,
    )
    return table


def _columns(
    net: DiscreteNet, observed: Sequence[str], data: Tensor, check_range: bool
) -> dict[str, Tensor]:
    """Splits data into columns.

    Args:
        net: The network.
        observed: The nodes that have columns.
        data: States, shape [cases, observed nodes].
        check_range: Whether to check the values too, not only type and shape.

    Returns:
        The data by node, each of shape [cases], as views.

    Raises:
        ValueError: If the data do not fit the network.
    """
    if data.dtype != torch.long or data.dim() != 2 or data.shape[1] != len(observed):
        raise ValueError(
            f"data must be integers (torch.long) of shape [cases, {len(observed)}], one column per"
            f" observed node, got {data.dtype} of shape {list(data.shape)}"
        )
    if check_range:
        sizes = torch.tensor([net.size(node) for node in observed], device=data.device)
        wrong = ((data < 0) | (data >= sizes)).any(0)
        if bool(wrong.any()):
            node = observed[int(wrong.nonzero()[0])]
            raise ValueError(f"the data of node {node!r} must lie in 0..{net.size(node) - 1}")
    return dict(zip(observed, data.unbind(-1), strict=True))


def _one_hot(
    net: DiscreteNet, nodes: Sequence[str], columns: Mapping[str, Tensor], size: int
) -> Tensor:
    """Indicators of the states of some nodes, shape [..., cases, states of all the nodes]."""
    if not nodes:
        return torch.zeros(size, 0)
    return torch.cat([torch.eye(net.size(node))[columns[node]] for node in nodes], -1)


def _normalized(table: Tensor) -> Tensor:
    return table / table.sum(-1, keepdim=True)


def _with_disjoint_parents(parents: Mapping[str, tuple[str, ...]]) -> list[list[str]]:
    """Groups of nodes of which no two have a parent in common, so that all can be set at once."""
    groups: list[tuple[list[str], set[str]]] = []
    for node, members in parents.items():
        free = (group for group in groups if group[1].isdisjoint(members))
        found = next(free, None)
        if found is None:
            groups.append(found := ([], set()))
        found[0].append(node)
        found[1].update(members)
    return [nodes for nodes, _ in groups]


# --- variable elimination ----------------------------------------------------------------------

_Factor = tuple[tuple[str, ...], Tensor]
"""Hidden nodes, and a tensor of shape [cases, *their states]."""


def _given(
    net: DiscreteNet, family: Sequence[str], columns: Mapping[str, Tensor], cases: int
) -> _Factor:
    """A family's table at the data, as a function of the family's hidden members."""
    hidden = tuple(node for node in family if node not in columns)
    index = []
    for node in family:
        values, axis = columns.get(node), 0
        if values is None:
            values, axis = torch.arange(net.size(node), device="cpu"), 1 + hidden.index(node)
        index.append(values.reshape([-1 if i == axis else 1 for i in range(1 + len(hidden))]))
    table = net.tables[family[-1]].double().cpu()[tuple(index)]
    return hidden, table.expand(cases, *table.shape[1:])


def _elimination_order(
    net: DiscreteNet, families: Iterable[Sequence[str]], hidden: frozenset[str]
) -> tuple[list[str], int]:
    """An order that keeps intermediate factors small, and the size of the largest one."""
    scopes = [hidden.intersection(family) for family in families]
    remaining, order, largest = sorted(hidden), [], 1

    def joined(node: str) -> frozenset[str]:
        return frozenset().union(*(scope for scope in scopes if node in scope))

    def states(scope: Iterable[str]) -> int:
        return math.prod(map(net.size, scope))

    while remaining:
        node = min(remaining, key=lambda name: states(joined(name)))
        scope = joined(node)
        largest = max(largest, states(scope))
        scopes = [other for other in scopes if node not in other] + [scope - {node}]
        remaining.remove(node)
        order.append(node)
    return order, largest


def _eliminate(factors: list[_Factor], order: Sequence[str]) -> Tensor:
    """Log of the product of the factors, summed over all nodes in this order, shape [cases]."""
    log_scale = torch.zeros(len(factors[0][1]), dtype=torch.float64, device="cpu")
    for node in order:
        touched = [factor for factor in factors if node in factor[0]]
        factors = [factor for factor in factors if node not in factor[0]]
        scope = sorted(set().union(*(nodes for nodes, _ in touched)))
        axis = {name: 1 + i for i, name in enumerate(scope)}
        kept = [name for name in scope if name != node]
        operands: list[Any] = []
        for nodes, values in touched:
            operands += [values, [0, *(axis[name] for name in nodes)]]
        product = torch.einsum(*operands, [0, *(axis[name] for name in kept)])
        scale = (product.flatten(1).amax(1) if kept else product).detach()
        scale = scale.clamp(min=torch.finfo(product.dtype).tiny)
        log_scale = log_scale + scale.log()
        factors.append((tuple(kept), product / scale.reshape(-1, *[1] * len(kept))))
    for _, values in factors:
        log_scale = log_scale + values.log()
    return log_scale


# --- files -------------------------------------------------------------------------------------


def _folder() -> Path:
    """Finds the folder of pgmpy's networks, without importing pgmpy.

    Raises:
        ModuleNotFoundError: If pgmpy is not installed, or came without networks.
    """
    spec = find_spec("pgmpy")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("networks by name come with pgmpy: pip install 'pgmpy>=1.1,<1.2'")
    folder = Path(spec.origin).parent / "utils" / "example_models"
    if not folder.is_dir():
        raise ModuleNotFoundError("this pgmpy brings no networks: pip install 'pgmpy>=1.1,<1.2'")
    return folder


def _sorted_net(
    states: Mapping[str, tuple[str, ...]],
    parents: Mapping[str, tuple[str, ...]],
    tables: Mapping[str, Tensor],
    name: str,
) -> DiscreteNet:
    """Puts a network together from parts in any order.

    Args:
        states: Names of the states of each node.
        parents: Parents of each node.
        tables: Table of each node.
        name: Name of the network.

    Returns:
        The network, in topological order and with normalized rows.

    Raises:
        ValueError: If nodes or tables are missing, or there is a cycle.
    """
    for node, members in parents.items():
        if unknown := {node, *members} - set(states):
            raise ValueError(f"{sorted(unknown)} in the family of node {node!r} are not declared")
    try:
        sorter = TopologicalSorter({node: parents.get(node, ()) for node in states})
        order = list(sorter.static_order())
    except CycleError as error:
        raise ValueError(f"the network has a cycle: {' → '.join(error.args[1])}") from None
    if missing := [node for node in order if node not in tables]:
        raise ValueError(f"nodes {missing} have no table")
    net = DiscreteNet(
        states={node: states[node] for node in order},
        parents={node: parents[node] for node in order},
        tables={node: tables[node] for node in order},
        name=name,
    )
    return net.smooth(floor=0.0)


_COMMENT = re.compile(r'("[^"]*")|/\*.*?\*/|//[^\n]*', re.DOTALL)
_VARIABLE = re.compile(r"\bvariable\s+([^{}]+?)\s*\{([^{}]*)\{([^{}]*)\}[^{}]*\}")
_PROBABILITY = re.compile(r"\bprobability\s*\(\s*([^{}]*?)\s*\)\s*\{([^{}]*)\}")
_ROW = re.compile(r"(?:\(([^)]*)\)|\b(table|default)\b)([^;]*);")


def _parse_bif(text: str, name: str) -> DiscreteNet:
    """Reads the interchange format for Bayesian networks.

    Args:
        text: Content of the file.
        name: Name of the result.

    Returns:
        The network.

    Raises:
        ValueError: If the content is not understood, naming the node.
    """
    text = _COMMENT.sub(lambda match: match[1] or " ", text).replace('"', " ")
    states = {node: tuple(_words(names)) for node, _, names in _VARIABLE.findall(text)}
    if not states:
        raise ValueError(f"the file of network {name!r} declares no variables")
    spelling = {node.lower(): node for node in states} | {node: node for node in states}
    parents: dict[str, tuple[str, ...]] = {}
    tables: dict[str, Tensor] = {}
    for header, body in _PROBABILITY.findall(text):
        family = [name for part in header.split("|") for name in _words(part, spelling)]
        node, *members = (spelling.get(name, spelling.get(name.lower(), name)) for name in family)
        if unknown := [n for n in (node, *members) if n not in states]:
            raise ValueError(f"{unknown} in the family of node {node!r} are not declared")
        parents[node] = tuple(members)
        tables[node] = _parse_table(node, [states[n] for n in members], len(states[node]), body)
    return _sorted_net(states, parents, tables, name)


def _parse_table(
    node: str, parent_states: Sequence[tuple[str, ...]], size: int, body: str
) -> Tensor:
    """Reads the rows of one table.

    Args:
        node: The node.
        parent_states: Names of the states of each parent.
        size: Number of states of the node.
        body: The text between the braces.

    Returns:
        The table, shape [*states of the parents, size].

    Raises:
        ValueError: If a row is not understood or missing.
    """
    shape = [len(names) for names in parent_states]
    index = {key: i for i, key in enumerate(itertools.product(*parent_states))}
    rows: list[list[float] | None] = [None] * len(index)
    default: list[float] | None = None
    for key, keyword, numbers in _ROW.findall(body):
        try:
            values = [float(number) for number in _words(numbers)]
        except ValueError:
            raise ValueError(f"the table of node {node!r} has {numbers.strip()!r}") from None
        if len(values) != (size * len(rows) if keyword == "table" else size):
            raise ValueError(f"the table of node {node!r} has a row of {len(values)} numbers")
        if keyword == "table":  # the states of the node vary slowest
            rows = [values[i :: len(rows)] for i in range(len(rows))]
        elif keyword == "default":
            default = values
        elif (names := tuple(part.strip() for part in key.split(","))) in index:
            rows[index[names]] = values
        else:
            raise ValueError(f"the table of node {node!r} has a row for unknown states ({key})")
    filled = [default if row is None else row for row in rows]
    if None in filled:
        raise ValueError(f"the table of node {node!r} lacks {filled.count(None)} rows")
    return torch.tensor(filled, dtype=torch.float64, device="cpu").reshape(*shape, size)


def _words(text: str, phrases: Container[str] = ()) -> list[str]:
    """Parts between commas; without commas parts between spaces, unless the whole is a phrase."""
    text = text.strip()
    if "," in text or text in phrases or text.lower() in phrases:
        return [part.strip() for part in text.split(",") if part.strip()]
    return text.split()
