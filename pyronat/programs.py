"""What is known of a program: its network, and the runs that the network has been proven for.

A program that branches on sampled values, or on anything else, has no one structure. Its network is
the union over the runs that have been seen, told apart by their fingerprints; a run that has not
been seen is analyzed as soon as it occurs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from torch import Tensor

from pyronat.analysis import network_of
from pyronat.autograd import Edge, edge_of, leaves
from pyronat.errors import StructureChanged, UnsupportedProgram
from pyronat.families import family_name
from pyronat.fingerprint import fingerprint, outline
from pyronat.flows import follow
from pyronat.graph import BayesNet
from pyronat.partition import union
from pyronat.records import SiteRecord, distribution_tensors
from pyronat.tracing import (
    ADDED_PLATES,
    Program,
    quietly,
    repeatable,
    run_constant,
    set_seed,
    stored_names,
    unconditioned,
)

ATTEMPTS = 8
"""Runs on other random numbers in which a branch may turn up again."""

MAX_BRANCHES = 32
"""Runs of unknown structure that are analyzed in one step."""

MAX_OUTLINES = 256
"""Outlines of known runs that are remembered."""

Result = TypeVar("Result")


class UnknownStructure(Exception):
    """A run whose structure has not been analyzed yet; whoever runs a program has it analyzed.

    Attributes:
        known: what is known of the program.
        records: the random sites of the run.
        params: unconstrained leaves by name.
    """

    def __init__(
        self,
        known: KnownProgram,
        records: Sequence[SiteRecord],
        params: Mapping[str, Tensor],
    ) -> None:
        super().__init__(
            "the program took a branch that has not been analyzed: "
            + _differences(known.net, records)
        )
        self.known, self.records, self.params = known, tuple(records), dict(params)


@dataclass(frozen=True)
class KnownProgram:
    """The network of a program, and the fingerprints of the runs that it describes.

    Attributes:
        net: union over these runs.
        runs: their fingerprints.
        positions: whether positions of rows and slices count in the fingerprints.
    """

    net: BayesNet
    runs: frozenset[str]
    positions: bool = True
    _outlines: set[tuple[object, ...]] = field(
        default_factory=set, init=False, repr=False, compare=False
    )

    def check(self, records: Sequence[SiteRecord], params: Mapping[str, Tensor]) -> None:
        """Compares a run with those that are known.

        Args:
            records: the random sites of the run.
            params: unconstrained leaves by name.

        Raises:
            UnknownStructure: if the run is of another structure than all known ones.
        """
        seen = outline(records, params, self.positions)
        if seen in self._outlines:
            return
        if fingerprint(records, params, self.positions) not in self.runs:
            raise UnknownStructure(self, records, params)
        if len(self._outlines) >= MAX_OUTLINES:
            self._outlines.clear()
        self._outlines.add(seen)


def know(program: Program, args: Sequence[Any], kwargs: Mapping[str, Any]) -> KnownProgram:
    """Analyzes one run of a program."""
    flow = follow(program, args, kwargs)
    return KnownProgram(network_of(flow), frozenset({flow.fingerprint}), flow.positions)


def check_same_program(
    bound: Mapping[str, BayesNet], model: KnownProgram, guide: KnownProgram
) -> None:
    """Refuses an optimizer that is in use with other programs.

    Args:
        bound: networks of the programs that it is in use with by role, if any.
        model: the model that it is to be used with.
        guide: its guide.

    Raises:
        UnsupportedProgram: if they have other sites or parameters.
    """
    for role, known in (("model", model), ("guide", guide)):
        if role in bound and _names(bound[role]) != _names(known.net):
            changed = ", ".join(sorted(_names(bound[role]) ^ _names(known.net))[:5])
            raise UnsupportedProgram(
                f"this NaturalGradient is in use with another {role} ({changed} differ); give "
                "every NaturalSVI a NaturalGradient of its own"
            )


def _names(net: BayesNet) -> set[str]:
    return {site.name for site in net.sites} | set(net.params)


def _check_registered(records: Sequence[SiteRecord], params: Mapping[str, Tensor]) -> None:
    """Refuses parameters that no step would train.

    Args:
        records: the random sites of a run that a loss made.
        params: what model and guide have shown to Pyro in that run, by name.

    Raises:
        UnsupportedProgram: naming a site and a parameter it uses that is not among them.
    """
    known, stored = {id(leaf) for leaf in params.values()}, stored_names()
    for record in records:
        for leaf in leaves(distribution_tensors(record.distribution), _value_edges(records)):
            if id(leaf) in stored and id(leaf) not in known:
                raise UnsupportedProgram(
                    f"site {record.name!r} depends on the parameter {stored[id(leaf)]!r}, which "
                    "neither model nor guide registers in this call; do so with pyro.module, "
                    "PyroModule or pyro.param, do not hide it with poutine.block, or detach it"
                )


def _value_edges(records: Sequence[SiteRecord]) -> set[Edge]:
    """Edges of the graph that sample values come from."""
    return {edge_of(record.value) for record in records if record.value.grad_fn is not None}


def learn(
    unknown: UnknownStructure,
    program: Program,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    same_call: bool = False,
) -> KnownProgram:
    """Analyzes a run of unknown structure, and unites it with what is known.

    The program is run again with the values of that run, so that it takes the same branches. Where
    the loss has added dimensions, for particles or enumerated values, the run cannot be repeated as
    it was; but such values cannot decide on a branch either. It is enough then that sites, families
    and parameters are those of a run of the program by itself; the one that `know` has analyzed
    will do, if its arguments were the same.

    Args:
        unknown: the run.
        program: model or guide.
        args: its arguments.
        kwargs: its keyword arguments.
        same_call: whether all that is known is of these arguments.

    Returns:
        What is known with this run.

    Raises:
        StructureChanged: if the branch cannot be taken again.
        UnsupportedProgram: if the run uses a parameter that is not shown to Pyro.
    """
    known, records = unknown.known, unknown.records
    _check_registered(records, unknown.params)
    batched = _is_batched(records)
    if _simulated(known.net, records):
        program = unconditioned(program)
    elif same_call and batched and _same_sites(known.net, records, unknown.params):
        seen = fingerprint(records, unknown.params, known.positions)
        return replace(known, runs=known.runs | {seen})
    values = {record.name: record.value for record in records if not record.observed}
    with repeatable():
        for attempt in range(ATTEMPTS):
            if attempt:
                # The branch may depend on random numbers that are no sample values.
                set_seed(attempt)
            flow = follow(program, args, kwargs, {} if batched else values)
            positions = flow.positions and known.positions
            seen = fingerprint(records, unknown.params, positions)
            net = network_of(flow)
            if (
                flow.fingerprint == seen
                or (batched and _same_sites(net, records, unknown.params))
                or (not batched and _repeated(program, args, kwargs, values, positions) == seen)
            ):
                runs = known.runs | {flow.fingerprint, seen}
                return KnownProgram(union(known.net, net), runs, positions)
    changed = _differences(net, records)
    raise StructureChanged(
        f"the program took a branch that it did not take again on the same values: {changed}; "
        "let branches depend on sampled values or arguments alone. A sequential plate with a "
        "random subsample is such a branch; use a vectorized one"
    )


def _is_batched(records: Sequence[SiteRecord]) -> bool:
    """Whether a loss has added dimensions to a run, for particles or enumerated values."""
    return any(
        any(plate.name in ADDED_PLATES for plate in record.plates)
        or record.value.dim() - len(record.distribution.event_shape)
        > max((-plate.dim for plate in record.plates), default=0)
        for record in records
    )


def with_all_branches(
    known: KnownProgram,
    program: Program,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    work: Callable[[KnownProgram], Result],
) -> Result:
    """Does work that runs a program, again with each structure that turns up on the way.

    Args:
        known: what is known at the beginning.
        program: model or guide.
        args: its arguments.
        kwargs: its keyword arguments.
        work: what is to be done with what is known.

    Returns:
        What the work returns.

    Raises:
        StructureChanged: if there is no end of new structures.
        UnknownStructure: if another program that the work runs took a branch that is not known.
    """
    for _ in range(MAX_BRANCHES):
        try:
            return work(known)
        except UnknownStructure as unknown:
            if unknown.known is not known:
                raise  # of another program that takes part in the work
            known = learn(unknown, program, args, kwargs)
    raise StructureChanged(f"the program took {MAX_BRANCHES} branches that were all new")


def _simulated(net: BayesNet, records: Sequence[SiteRecord]) -> bool:
    """Whether a run sampled sites that are observed by themselves."""
    observed = {site.name for site in net.sites if site.kind == "observed"}
    return any(record.name in observed and not record.observed for record in records)


def _repeated(
    program: Program,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    values: Mapping[str, Tensor],
    positions: bool,
) -> str:
    """Fingerprint of a run with given values, which require gradients where they did.

    Whether an input requires a gradient decides on the operation that torch chooses.
    """
    attached = {
        name: value.detach().requires_grad_(value.requires_grad) for name, value in values.items()
    }
    with quietly(), repeatable():
        run = run_constant(program, args, kwargs, attached)
    return fingerprint(run.records, run.params, positions)


def _same_sites(net: BayesNet, records: Sequence[SiteRecord], params: Mapping[str, Tensor]) -> bool:
    names = {id(leaf): name for name, leaf in params.items()}
    stops = _value_edges(records)
    found = {
        record.name: (
            _family(record),
            {
                names[id(leaf)]
                for leaf in leaves(distribution_tensors(record.distribution), stops)
                if id(leaf) in names
            },
        )
        for record in records
    }
    return found == {site.name: (site.family, set(site.params)) for site in net.sites}


def _differences(net: BayesNet, records: Sequence[SiteRecord]) -> str:
    found = {(record.name, _family(record)) for record in records}
    known = {(site.name, site.family) for site in net.sites}
    differing = sorted(found ^ known) or sorted(found)
    return ", ".join(f"{name} ({family})" for name, family in differing)


def _family(record: SiteRecord) -> str:
    return family_name(record.distribution)
