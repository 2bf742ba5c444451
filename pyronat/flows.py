"""What flows where in one run of a program: values to sites, entries to coordinates, examples.

Three runs on the same random numbers, each with a lattice of its own, see the same operations.
"""

from __future__ import annotations

import gc
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pyronat.autograd import leaves
from pyronat.blocks import BY_VALUE, SCORE, UNKNOWN_FAMILY
from pyronat.dataflow import Dataflow
from pyronat.entries import EntryGroups
from pyronat.errors import StructureChanged, UnsupportedDistribution, UnsupportedProgram
from pyronat.families import Group
from pyronat.fingerprint import fingerprint
from pyronat.lattices import LabelSets, Origins
from pyronat.records import Run, SiteRecord, distribution_tensors
from pyronat.simulated import fisher_groups
from pyronat.tracing import (
    Program,
    quietly,
    repeatable,
    run_constant,
    run_followed,
    stored_parameters,
)

Labels = frozenset[str]


@dataclass
class GroupFlow:
    """A Fisher-orthogonal group of a site's coordinates and what flows into it.

    Attributes:
        name: name of the group.
        coordinates: its coordinates, attached to the graph.
        params: names of the parameters that autograd finds behind them, sorted.
        exact: whether the Fisher information of the group is not simulated.
        scalar: whether one batch element has a single scalar coordinate.
        roots: nodes of the entries that the coordinates of each batch element depend on.
    """

    name: str
    coordinates: Sequence[Tensor]
    params: tuple[str, ...]
    exact: bool
    scalar: bool
    roots: Tensor


@dataclass
class SiteFlow:
    """What flows into the distribution of one site.

    Attributes:
        record: the site.
        parents: sites whose values reach the distribution through tensors.
        control: sites whose values left for Python before this site.
        data: sites whose observed data the distribution reads from the arguments' memory.
        coupled: plates along which elements depend on other elements.
        params: parameters that autograd finds behind the distribution, sorted.
        groups: its groups of coordinates by name; none where there is no Fisher information.
    """

    record: SiteRecord
    parents: Labels = frozenset()
    control: Labels = frozenset()
    data: Labels = frozenset()
    coupled: tuple[str, ...] = ()
    params: tuple[str, ...] = ()
    groups: dict[str, GroupFlow] = field(default_factory=dict)


@dataclass(frozen=True)
class ProgramFlow:
    """One analyzed run of a program.

    Attributes:
        sites: in program order.
        params: unconstrained leaves by name, sorted.
        components: number of the unit of each parameter entry, −1 where no site depends on it.
        fingerprint: of the run.
        positions: whether positions of rows and slices count in fingerprints of the program.
    """

    sites: tuple[SiteFlow, ...]
    params: dict[str, Tensor]
    components: dict[str, Tensor]
    fingerprint: str
    positions: bool


def follow(
    program: Program,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    values: Mapping[str, Tensor] | None = None,
) -> ProgramFlow:
    """Runs a program on the same random numbers again and again and follows what flows in it.

    Args:
        program: model or guide.
        args: its arguments.
        kwargs: its keyword arguments.
        values: values of latent sites to take, so that the program takes the same branches.

    Returns:
        What flows into every site.

    Raises:
        UnsupportedProgram: if a parameter reaches a site without being registered with Pyro.
        StructureChanged: if two runs differ though their random numbers are equal.
    """
    given = {name: value.detach() for name, value in (values or {}).items()}
    with _collection_paused(), quietly(), repeatable() as rewind:
        stored = stored_parameters()
        run = run_constant(program, args, kwargs, given)
        rewind()
        if stored != stored_parameters():
            # Random numbers were used up to create parameters.
            run = run_constant(program, args, kwargs, given)
            rewind()
        again = run_constant(program, args, kwargs, given)
        if fingerprint(again.records, again.params) != fingerprint(run.records, run.params):
            names = ", ".join(record.name for record in again.records)
            raise StructureChanged(
                f"two runs on the same values and random numbers differ at the sites {names}; a "
                "program may not change what it does from call to call"
            )
        call = _Call(program, args, kwargs, given, run)
        sites = {record.name: SiteFlow(record) for record in run.records}
        for step in (_follow_values, _follow_examples):
            rewind()
            step(call, sites)
        rewind()
        components, positions = _follow_entries(call, sites)
    found = fingerprint(run.records, run.params, positions)
    return ProgramFlow(tuple(sites.values()), run.params, components, found, positions)


@contextmanager
def _collection_paused() -> Generator[None, None, None]:
    """Without the search for garbage, which takes a fifth of the time among so many objects."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@dataclass(frozen=True)
class _Call:
    """A program with its arguments, and its first run."""

    program: Program
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    values: Mapping[str, Tensor]
    run: Run

    def followed(self, flow: Dataflow, see: Any) -> None:
        """Runs the program again, with the dataflow.

        Args:
            flow: the dataflow.
            see: is called with the record of every site.

        Raises:
            UnsupportedProgram: if the sites are not those of the first run.
        """
        known = {record.name for record in self.run.records}
        seen = set()

        def check(record: SiteRecord) -> None:
            seen.add(record.name)
            if record.name in known:
                see(record)

        run_followed(self.program, self.args, self.kwargs, self.values, flow, check)
        if seen != known:
            raise UnsupportedProgram(
                f"two runs on the same random numbers differ in the sites "
                f"{', '.join(sorted(seen ^ known))}; a program may not change what it does "
                "from call to call"
            )

    @property
    def observed(self) -> list[SiteRecord]:
        return [record for record in self.run.records if record.observed]


def _follow_values(call: _Call, sites: Mapping[str, SiteFlow]) -> None:
    """Which sites' values reach each distribution, which data, and which parameters each group."""
    data = {f"data of {name}": name for name in sites}
    names = {id(leaf): name for name, leaf in call.run.params.items() if leaf.requires_grad}
    lattice = LabelSets([*sites, *data])
    flow = Dataflow(lattice)
    for record in call.observed:
        flow.mark(record.value, lattice.of(f"data of {record.name}"))

    def see(record: SiteRecord) -> None:
        with flow.paused():
            read = distribution_tensors(record.distribution)
            read += [tensor for tensor in (record.mask, record.scale) if isinstance(tensor, Tensor)]
            found = lattice.decode(flow.joined(*read))
            site = sites[record.name]
            site.data = frozenset(data[label] for label in found & data.keys()) - {record.name}
            site.parents = frozenset(found & sites.keys()) | site.data
            site.control = (lattice.decode(flow.escaped) & sites.keys()) - site.parents
            own_data = f"data of {record.name}" in found
            site.data |= {record.name} if own_data else frozenset()

            tensors = distribution_tensors(record.distribution)
            site.params = tuple(
                sorted(
                    _name(leaf, names, record.name)
                    for leaf in leaves(tensors, ())
                    # A leaf that the program made of a sample value is no parameter.
                    if id(leaf) in names or not lattice.decode(flow.joined(leaf)) & sites.keys()
                )
            )
            flow.mark(record.value, lattice.of(record.name))

    call.followed(flow, see)


def tied_plates(program: Program, args: Sequence[Any], kwargs: Mapping[str, Any]) -> frozenset[str]:
    """Plates whose elements depend on sampled or observed values of other elements.

    Given the parameters and the arguments, the elements of all other plates are independent.

    Args:
        program: model or guide.
        args: its arguments.
        kwargs: its keyword arguments.

    Returns:
        Names of plates.
    """
    with quietly(), repeatable() as rewind:
        call = _Call(program, args, kwargs, {}, run_constant(program, args, kwargs, {}))
        sites = {record.name: SiteFlow(record) for record in call.run.records}
        rewind()
        _follow_examples(call, sites, through_arguments=False)
    return frozenset(plate for site in sites.values() for plate in site.coupled)


def _follow_examples(
    call: _Call, sites: Mapping[str, SiteFlow], through_arguments: bool = True
) -> None:
    """Along which plates an element of a distribution depends on other elements.

    Sample values carry the number of their element in each plate. So do tensors among the
    arguments, if wanted, along their first dimension of the plate's size.
    """
    sizes: dict[str, int] = {}
    for record in call.run.records:
        for plate in record.plates:
            sizes[plate.name] = int(record.distribution.batch_shape[plate.dim])
    names = [name for name, size in sizes.items() if size > 1]
    if not names:
        return
    flow = Dataflow(Origins(len(names)))
    for tensor in tree_leaves((call.args, call.kwargs)) if through_arguments else ():
        if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
            flow.mark(tensor, _numbered(tensor, [_first_dim(tensor, sizes[n]) for n in names]))
    for record in call.observed:
        flow.mark(record.value, _numbered_value(record, names))

    def see(record: SiteRecord) -> None:
        log_prob = _log_prob(record)
        with flow.paused():
            origins = flow.shadow(log_prob)
            own = _numbered(log_prob, [_plate_dim(record, name, 0) for name in names])
            # A value that left for Python decides on all elements.
            escaped = (flow.escaped != 0).reshape(-1, *[1] * log_prob.dim())
            foreign = ((origins != 0) & (origins != own)) | escaped
            sites[record.name].coupled = tuple(
                plate.name
                for plate in record.plates
                if plate.name in names and bool(foreign[names.index(plate.name)].any())
            )
        flow.mark(record.value, _numbered_value(record, names))

    call.followed(flow, see)


def _log_prob(record: SiteRecord) -> Tensor:
    """What the log-probability `[*batch]` of a site is computed from, if not itself."""
    batch = record.distribution.batch_shape
    try:
        log_prob = record.distribution.log_prob(record.value)
    except (NotImplementedError, KeyError):  # a transform has no inverse of given values
        everything = [t.sum() for t in distribution_tensors(record.distribution)]
        log_prob = sum(everything, torch.zeros_like(record.value, dtype=torch.float64).sum())
    return log_prob if log_prob.shape == batch else log_prob.expand(batch)


def _numbered_value(record: SiteRecord, names: Sequence[str]) -> Tensor:
    event_dim = len(record.distribution.event_shape)
    return _numbered(record.value, [_plate_dim(record, name, event_dim) for name in names])


def _plate_dim(record: SiteRecord, name: str, event_dim: int) -> int | None:
    """The negative dimension that a plate has in a site's tensors, None outside of it."""
    dims = [plate.dim for plate in record.plates if plate.name == name]
    return dims[0] - event_dim if dims else None


def _first_dim(tensor: Tensor, size: int) -> int | None:
    dims = [dim for dim in range(tensor.dim()) if tensor.shape[dim] == size]
    return dims[0] - tensor.dim() if dims else None


def _numbered(tensor: Tensor, dims: Sequence[int | None]) -> Tensor:
    """Numbers from 1 along one dimension for each plane `[planes, *shape]`, 0 without one."""
    planes = []
    for dim in dims:
        if dim is None or -dim > tensor.dim():
            plane = torch.zeros((), dtype=torch.int64, device="cpu")
        else:
            size = tensor.shape[dim]
            plane = torch.arange(1, size + 1, device="cpu").reshape(-1, *[1] * (-dim - 1))
        planes.append(plane.expand(tensor.shape))
    return torch.stack(planes)


def _follow_entries(call: _Call, sites: Mapping[str, SiteFlow]) -> tuple[dict[str, Tensor], bool]:
    """Which parameter entries reach which coordinates, and the partition this implies.

    Args:
        call: the program.
        sites: what is known of its sites; their groups are completed.

    Returns:
        The components, and whether positions in tables are those that the program wrote down.
    """
    lattice = EntryGroups()
    flow = Dataflow(lattice)
    names = {id(leaf): name for name, leaf in call.run.params.items()}
    nodes = {}
    for name in sorted({name for site in sites.values() for name in site.params}):
        leaf = call.run.params[name]
        nodes[name] = lattice.new(leaf.numel()).reshape(leaf.shape)
        flow.mark(leaf, nodes[name].unsqueeze(0))

    def behind(tensors: Sequence[Tensor]) -> tuple[str, ...]:
        return tuple(sorted(names[id(leaf)] for leaf in leaves(tensors, ()) if id(leaf) in names))

    def see(record: SiteRecord) -> None:
        site = sites[record.name]
        site.record = record
        try:
            found = fisher_groups(record.distribution, partial(_unseen, flow))
        except UnsupportedDistribution:
            tensors = distribution_tensors(record.distribution)
            roots = flow.joined(*tensors)
            unknown = GroupFlow(UNKNOWN_FAMILY, tensors, site.params, False, False, roots)
            site.groups = {unknown.name: unknown}
        else:
            site.groups = {
                group.name: GroupFlow(
                    name=group.name,
                    coordinates=group.coordinates,
                    params=behind(group.coordinates),
                    exact=group.name != SCORE,
                    scalar=group.scalar and group.name not in BY_VALUE,
                    roots=_roots(group, flow, lattice),
                )
                for group in found
            }
        if bool(flow.escaped.any()):
            # Parameters that left for Python decide on everything that follows.
            with flow.paused():
                every = torch.cat([flow.escaped, *(g.roots for g in site.groups.values())])
                for group in site.groups.values():
                    group.roots = lattice.join_elements(every.unsqueeze(0))

    call.followed(flow, see)
    groups = [group for site in sites.values() for group in site.groups.values()]
    _add_hidden(groups, nodes, lattice)
    numbers, reached = lattice.components(_roots_of(groups))
    components = {
        name: torch.where(reached[node], numbers[node], torch.full_like(node, -1))
        for name, node in nodes.items()
    }
    return components, not flow.indexed_by_scalars


def _add_hidden(
    groups: Sequence[GroupFlow], nodes: Mapping[str, Tensor], lattice: EntryGroups
) -> None:
    """Counts as read whole what autograd knows of, but no operation of the run has shown.

    So it is with what was computed from a parameter before the run.
    """
    linked = lattice.linked(_roots_of(groups))
    for group in groups:
        seen = linked[group.roots]
        hidden = [
            nodes[name].reshape(-1)
            for name in group.params
            if not bool(torch.isin(linked[nodes[name]], seen).any())
        ]
        if hidden:
            joined = torch.cat([group.roots, *hidden])
            group.roots = lattice.join_elements(joined.unsqueeze(0))


def _roots_of(groups: Sequence[GroupFlow]) -> Tensor:
    nothing = torch.zeros(1, dtype=torch.int64, device="cpu")
    found: Tensor = torch.cat([nothing, *(group.roots for group in groups)]).unique()
    return found


@contextmanager
def _unseen(flow: Dataflow) -> Generator[None, None, None]:
    """In this context random numbers are those of another stream, and the dataflow is paused."""
    with flow.paused(), torch.random.fork_rng():
        yield


def _roots(group: Group, flow: Dataflow, lattice: EntryGroups) -> Tensor:
    """One node for the coordinates of each batch element, each distinct one once."""
    shadows = [flow.shadow(tensor) for tensor in group.coordinates]
    with flow.paused():
        joined = lattice.join_many(shadows)
        if group.event_dim:
            joined = lattice.join_along(joined, range(-group.event_dim, 0))
        found: Tensor = joined.unique()
        return found[found != 0]


def _name(leaf: Tensor, names: Mapping[int, str], site: str) -> str:
    """The name of a parameter.

    Args:
        leaf: a leaf that a site depends on.
        names: names by identity.
        site: name of the site.

    Returns:
        The name.

    Raises:
        UnsupportedProgram: if the leaf is no parameter of Pyro's.
    """
    if id(leaf) not in names:
        raise UnsupportedProgram(
            f"site {site!r} depends on a parameter of shape {tuple(leaf.shape)} that Pyro does "
            "not know; register its module with pyro.module or PyroModule, or detach it"
        )
    return names[id(leaf)]
