"""The border with Pyro: runs programs and hands out plain records of their sites.

No Pyro message leaves this module.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.infer.util import is_validation_enabled
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites
from pyro.util import check_if_enumerated, check_model_guide_match, check_site_shape
from torch import Tensor
from torch.distributions import Distribution
from torch.utils._pytree import tree_map

from pyronat.dataflow import Dataflow, Labels
from pyronat.errors import NoGuideOnDreams, NotEnumerable, UnsupportedProgram
from pyronat.families import groups, peel

Program = Callable[..., Any]

MAX_STATES = 2**16
"""Joint states that an exact expectation may enumerate."""


@dataclass(frozen=True)
class Plate:
    """A vectorized plate around a site.

    Attributes:
        name: name of the plate.
        dim: its batch dimension, negative.
        scale: full size over subsample size.
    """

    name: str
    dim: int
    scale: float


@dataclass(frozen=True)
class SiteRecord:
    """One random variable in one run of a program.

    Attributes:
        name: name of the site.
        distribution: its distribution with all wrappers, parameters attached to the graph.
        value: `[*batch, *event]`.
        observed: whether the value is data.
        scale: factor of the log-probability, from subsampling or `poutine.scale`.
        mask: elements that count, or None for all.
        plates: the vectorized plates around the site, outermost first.
        log_prob: unscaled log-probability `[*batch]` in nats, or None where it was not computed.
        enumeration_dim: batch dimension along which the value is enumerated, or None.
        num_values: values that are enumerated one by one, in traces of their own, or None.
        num_samples: values drawn to stand for an enumeration, or None.
    """

    name: str
    distribution: Distribution
    value: Tensor
    observed: bool
    scale: float | Tensor
    mask: bool | Tensor | None
    plates: tuple[Plate, ...]
    log_prob: Tensor | None
    enumeration_dim: int | None = None
    num_values: int | None = None
    num_samples: int | None = None

    def base_weights(self) -> Tensor:
        """Scale × mask, `[*batch]`: what one element's log-probability counts for."""
        shape = self.distribution.batch_shape
        weights = torch.as_tensor(self.scale, dtype=self.dtype, device=self.value.device)
        weights = weights.detach().expand(shape)
        if self.mask is not None:
            weights = weights * torch.as_tensor(self.mask, device=weights.device)
        return weights

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of the distribution's tensors."""
        tensors = distribution_tensors(self.distribution)
        return next((t.dtype for t in tensors if t.is_floating_point()), torch.get_default_dtype())


@dataclass(frozen=True)
class SiteStructure:
    """What the analysis run of a program found at one site.

    Attributes:
        record: the site in that run; sample values are constants.
        parents: sites whose values the distribution reads through tensors.
        control: sites whose values left for Python before this site.
        data: sites whose observed data the distribution reads from the arguments' memory.
    """

    record: SiteRecord
    parents: Labels
    control: Labels
    data: Labels


@dataclass(frozen=True)
class Run:
    """One run of a program: its random variables and its parameters.

    Attributes:
        records: random variables in program order.
        params: unconstrained leaves by name, sorted.
    """

    records: tuple[SiteRecord, ...]
    params: dict[str, Tensor]


def is_random(site: Mapping[str, Any]) -> bool:
    """Whether a Pyro node is a random variable: not a subsample, deterministic or factor."""
    if site["type"] != "sample" or type(site["fn"]).__name__ == "_Subsample":
        return False
    if site["infer"].get("_deterministic"):
        return False
    return type(peel(site["fn"]).base).__name__ not in {"Delta", "Unit"}


def records_of(trace: poutine.Trace) -> tuple[SiteRecord, ...]:
    """Records of the random variables in a trace."""
    return tuple(_record(site) for site in trace.nodes.values() if is_random(site))


def scored_records_of(trace: poutine.Trace) -> tuple[SiteRecord, ...]:
    """Records of all sites with a log-probability: random variables, factors and densities."""
    return tuple(_record(site) for site in trace.nodes.values() if site["type"] == "sample")


def _record(site: Mapping[str, Any]) -> SiteRecord:
    return SiteRecord(
        name=site["name"],
        distribution=site["fn"],
        value=site["value"],
        observed=site["is_observed"],
        scale=site["scale"],
        mask=site["mask"],
        plates=tuple(
            Plate(frame.name, frame.dim, (frame.full_size or frame.size) / max(frame.size, 1))
            for frame in site["cond_indep_stack"]
            if frame.vectorized
        ),
        log_prob=site.get("unscaled_log_prob"),
        enumeration_dim=site["infer"].get("_enumerate_dim"),
        num_values=site["infer"].get("_enum_total"),
        num_samples=site["infer"].get("num_samples"),
    )


def params_of(trace: poutine.Trace) -> dict[str, Tensor]:
    """Unconstrained parameter leaves in a trace by name, sorted."""
    leaves = {}
    for name, site in trace.nodes.items():
        if site["type"] == "param":
            value = site["value"]
            leaves[name] = value.unconstrained() if hasattr(value, "unconstrained") else value
    return dict(sorted(leaves.items()))


def distribution_tensors(distribution: Distribution) -> list[Tensor]:
    """All tensors that a distribution and the distributions and transforms in it hold."""
    found: list[Tensor] = []
    stack: list[Any] = [distribution]
    seen: set[int] = set()
    while stack:
        item = stack.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, (list, tuple)):
            stack.extend(item)
        elif isinstance(item, dict):
            stack.extend(item.values())
        elif isinstance(item, (Distribution, torch.distributions.Transform, torch.nn.Module)):
            stack.extend(vars(item).values())
    return found


class _Outermost(Messenger):
    """Decides a site's value last, when its distribution is already expanded by the plates."""

    def __init__(self, visit: Callable[[dict[str, Any]], None]) -> None:
        super().__init__()
        self._visit = visit

    def _pyro_sample(self, message: dict[str, Any]) -> None:
        if is_random(message):
            self._visit(message)


def _set_value(message: dict[str, Any], value: Tensor) -> None:
    message["value"] = value
    message["done"] = True


def _draw_constant(message: dict[str, Any]) -> None:
    """Samples a latent site as a constant: nothing flows back through its value."""
    if not message["is_observed"] and message["value"] is None:
        with torch.no_grad():
            _set_value(message, message["fn"]().detach())


@contextmanager
def _quietly() -> Generator[None, None, None]:
    """Without Pyro's validation, whose checks read values, and without its warnings."""
    with ExitStack() as stack:
        stack.enter_context(pyro.validation_enabled(False))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(torch.enable_grad())
        stack.enter_context(poutine.block())
        yield


def run_with_dataflow(
    program: Program, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[tuple[SiteStructure, ...], dict[str, Tensor]]:
    """Runs a program twice on the same random numbers and follows its sample values.

    The first run lists the sites; the second one marks every value, the observed ones also where
    the program's arguments hold them, and asks which marks reach each distribution.

    Args:
        program: model or guide.
        args: its arguments.
        kwargs: its keyword arguments.

    Returns:
        The structure at each random site, and the parameter leaves by name.
    """
    with _quietly(), torch.random.fork_rng():
        state = torch.random.get_rng_state()
        with _Outermost(_draw_constant):
            first = poutine.trace(program).get_trace(*args, **kwargs)
        torch.random.set_rng_state(state)
        names = [record.name for record in records_of(first)]
        observed = {record.name: record.value for record in records_of(first) if record.observed}
        flow = Dataflow([*names, *map(_data_label, names)])
        for name, value in observed.items():
            flow.mark(value, _data_label(name))
        found: dict[str, tuple[Labels, Labels]] = {}

        def visit(message: dict[str, Any]) -> None:
            name = message["name"]
            found[name] = flow.labels(*distribution_tensors(message["fn"])), flow.escaped
            if isinstance(message["mask"], Tensor):
                found[name] = found[name][0] | flow.labels(message["mask"]), flow.escaped
            with flow.paused():
                _draw_constant(message)
                _set_value(message, message["value"].detach().clone())
                flow.mark(message["value"], name)

        with _Outermost(visit), flow.active():
            second = poutine.trace(program).get_trace(*args, **kwargs)
    sites = set(names)
    structures = tuple(
        SiteStructure(
            record=record,
            parents=found[record.name][0] & sites,
            control=(found[record.name][1] & sites) - found[record.name][0],
            data=frozenset(n for n in names if _data_label(n) in found[record.name][0]),
        )
        for record in records_of(second)
    )
    return structures, params_of(second)


def _data_label(site: str) -> str:
    return f"data of {site}"


def dream(program: Program, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Run:
    """Runs a program forward, observed sites sampled too; sample values are constants.

    Args:
        program: model or guide.
        args: its arguments, which give the sizes of its plates.
        kwargs: its keyword arguments.

    Returns:
        The run; its distributions carry the graph of the parameters.
    """
    with _quietly(), _Outermost(_draw_constant):
        trace = poutine.trace(poutine.uncondition(program)).get_trace(*args, **kwargs)
    return Run(records_of(trace), params_of(trace))


@dataclass(frozen=True)
class WeightedRun:
    """A run on enumerated values.

    Attributes:
        run: the run; where states are stacked, all batch shapes begin with them.
        probabilities: of the stacked states `[states]`, or of the one state `[]`.
    """

    run: Run
    probabilities: Tensor


def enumerate_parents(
    program: Program, args: Sequence[Any], kwargs: Mapping[str, Any], parents: frozenset[str]
) -> list[WeightedRun]:
    """Runs a program on all joint values of some discrete sites.

    All states are stacked leftmost in one run, in a plate. A program that does not broadcast over
    a leading dimension, as two single states show, is run once for each state.

    Args:
        program: model or guide.
        args: its arguments.
        kwargs: its keyword arguments.
        parents: the sites to enumerate; all others are integrated by their families.

    Returns:
        One run with all states, or one for each state.

    Raises:
        NotEnumerable: if a parent is continuous or masked, or the states are too many.
    """
    with _quietly(), torch.random.fork_rng():
        prototype = dream(program, args, kwargs).records
        cells = [_cells(record) for record in prototype if record.name in parents]
        states = prod(len(support) ** count for support, count in cells)
        if states > MAX_STATES:
            raise NotEnumerable(
                f"{', '.join(sorted(parents))} have {states} joint states, at most {MAX_STATES} "
                "are enumerated; use Full(expectation='model') or 'pooled'"
            )
        values = _joint_values(prototype, parents, cells, states)
        rng = torch.random.get_rng_state()

        def run_state(state: int) -> WeightedRun:
            torch.random.set_rng_state(rng)
            run = _run_on(program, args, kwargs, {name: v[state] for name, v in values.items()})
            return WeightedRun(run, _joint_log_prob(run, parents, ()).exp())

        try:
            torch.random.set_rng_state(rng)
            nesting = max((len(r.distribution.batch_shape) for r in prototype), default=0)
            stacked = _run_stacked(program, args, kwargs, prototype, values, states, nesting)
            probabilities = _joint_log_prob(stacked, parents, (states,)).exp()
            runs = [WeightedRun(stacked, probabilities)]
            broadcasts = all(
                _same_row(stacked, run_state(state).run, state, states)
                for state in {states // 2, states - 1}
            )
        except (RuntimeError, ValueError, IndexError):
            broadcasts = False
        if not broadcasts:
            runs = [run_state(state) for state in range(states)]
    mass = float(torch.stack([run.probabilities.sum() for run in runs]).sum())
    if abs(mass - 1) > 1e-4:
        raise NotEnumerable(
            f"the probabilities of all states of {', '.join(sorted(parents))} sum to {mass:.6g}, "
            "not to 1: a parent is masked, or its support depends on other sites"
        )
    return runs


def _run_on(
    program: Program,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    values: Mapping[str, Tensor],
) -> Run:
    """Runs a program with the values of some sites given, all others sampled as constants."""

    def visit(message: dict[str, Any]) -> None:
        if message["name"] in values:
            _set_value(message, values[message["name"]])
        _draw_constant(message)

    with _Outermost(visit):
        trace = poutine.trace(poutine.uncondition(program)).get_trace(*args, **kwargs)
    return Run(records_of(trace), params_of(trace))


def _run_stacked(
    program: Program,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    prototype: Sequence[SiteRecord],
    values: Mapping[str, Tensor],
    states: int,
    nesting: int,
) -> Run:
    batch_dims = {record.name: len(record.distribution.batch_shape) for record in prototype}
    padded = {
        name: value.reshape(states, *[1] * (nesting - batch_dims[name]), *value.shape[1:])
        for name, value in values.items()
    }
    plate = pyro.plate("enumerated states", states, dim=-1 - nesting)
    return _run_on(plate(program), args, kwargs, padded)


def _joint_log_prob(run: Run, parents: frozenset[str], shape: tuple[int, ...]) -> Tensor:
    """Log-probability of the enumerated values, one for each stacked state."""
    parts = [
        record.distribution.log_prob(record.value).detach().reshape(*shape, -1).sum(-1)
        for record in run.records
        if record.name in parents
    ]
    return torch.stack(parts).sum(0) if parts else torch.zeros(shape)


def _same_row(stacked: Run, single: Run, state: int, states: int) -> bool:
    """Whether one row of a stacked run has the distributions of a run on that state alone."""
    if [record.name for record in stacked.records] != [record.name for record in single.records]:
        return False
    for many, one in zip(stacked.records, single.records, strict=True):
        if many.distribution.batch_shape[:1] != (states,):
            return False
        wide, narrow = (groups(peel(record.distribution).base) for record in (many, one))
        for row, expected in zip(wide, narrow, strict=True):
            for a, b in zip(row.coordinates, expected.coordinates, strict=True):
                if a[state].numel() != b.numel() or not torch.allclose(a[state].reshape_as(b), b):
                    return False
    return True


def _cells(record: SiteRecord) -> tuple[Tensor, int]:
    """The support of one element of a site, and the number of elements.

    Args:
        record: the site in a prototype run.

    Returns:
        Values `[values, *event]`, and how many elements the site has.

    Raises:
        NotEnumerable: if the support is infinite.
    """
    base = peel(record.distribution).base
    try:
        support = base.enumerate_support(expand=False)
    except NotImplementedError as error:
        raise NotEnumerable(
            f"site {record.name!r} ({type(base).__name__}) is a parent with infinitely many "
            "values; use Full(expectation='model') or 'pooled'"
        ) from error
    support = support.reshape(len(support), *base.event_shape)
    return support, record.value.numel() // max(prod(base.event_shape), 1)


def _joint_values(
    records: Sequence[SiteRecord],
    parents: frozenset[str],
    cells: Sequence[tuple[Tensor, int]],
    states: int,
) -> dict[str, Tensor]:
    """All joint values: for each parent `[states, *batch, *event]`."""
    index = torch.arange(states)
    values = {}
    enumerated = [record for record in records if record.name in parents]
    for record, (support, count) in zip(enumerated, cells, strict=True):
        digits = []
        for _ in range(count):
            digits.append(index % len(support))
            index = index // len(support)
        chosen = support[torch.stack(digits, 1).to(support.device)]
        values[record.name] = chosen.reshape(states, *record.value.shape)
    return values


def importance_traces(
    model: Program,
    guide: Program,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    max_plate_nesting: float,
) -> tuple[poutine.Trace, poutine.Trace]:
    """Runs the guide with sample values as constants, then the model on these values.

    Returns:
        Traces of model and guide with log-probabilities, without subsample sites.
    """
    with _Outermost(_draw_constant):
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(
            *args, **kwargs
        )
    if is_validation_enabled():
        check_model_guide_match(model_trace, guide_trace, max_plate_nesting)
        check_if_enumerated(guide_trace)
    return _scored(model_trace, max_plate_nesting), _scored(guide_trace, max_plate_nesting)


def _scored(trace: poutine.Trace, max_plate_nesting: float) -> poutine.Trace:
    trace = prune_subsample_sites(trace)
    trace.compute_log_prob()
    if is_validation_enabled():
        for site in trace.nodes.values():
            if site["type"] == "sample":
                check_site_shape(site, max_plate_nesting)
    return trace


def sleep_traces(
    model: Program, guide: Program, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[poutine.Trace, poutine.Trace]:
    """Runs the model forward, then the guide on the simulated data, replaying the dream.

    A guide with a parameter `observations` gets the simulated values by site name, Pyro's own
    convention. For any other guide the arguments whose tensors are the observed values are
    replaced, recognized by identity.

    Returns:
        Traces of the dream and of the guide, the latter with log-probabilities.

    Raises:
        NoGuideOnDreams: if the observed values of a site are not among the arguments.
    """
    with _Outermost(_draw_constant):
        dreamed = poutine.trace(poutine.uncondition(model)).get_trace(*args, **kwargs)
    simulated = {
        name: (site["infer"].get("obs"), site["value"])
        for name, site in dreamed.nodes.items()
        if site["type"] == "sample" and site["infer"].get("was_observed") and is_random(site)
    }
    if "observations" in inspect.signature(guide).parameters:
        kwargs = {**kwargs, "observations": {name: pair[1] for name, pair in simulated.items()}}
    else:
        args, kwargs = _replace_data(simulated, args, kwargs)
    with poutine.replay(trace=dreamed):
        trace = poutine.trace(guide).get_trace(*args, **kwargs)
    return dreamed, _scored(trace, float("inf"))


def _replace_data(
    simulated: Mapping[str, tuple[Any, Tensor]], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Sequence[Any], Mapping[str, Any]]:
    replaced: set[int] = set()
    by_identity = {id(observed): value for observed, value in simulated.values()}

    def swap(leaf: Any) -> Any:
        if id(leaf) in by_identity:
            replaced.add(id(leaf))
            return by_identity[id(leaf)].to(leaf.dtype)
        return leaf

    swapped = tree_map(swap, (tuple(args), dict(kwargs)))
    missing = [name for name, (observed, _) in simulated.items() if id(observed) not in replaced]
    if missing:
        raise NoGuideOnDreams(
            f"the guide cannot be given simulated values of {', '.join(missing)}: either let it "
            "take a keyword argument 'observations' (site name → value), or pass the observed "
            "tensors themselves as arguments"
        )
    return swapped  # type: ignore[no-any-return]


class TraceVisitor(Protocol):
    """What is shown the traces of a loss."""

    def wake(self, model: poutine.Trace, guide: poutine.Trace) -> None:
        """Sees model and guide on the observed data."""

    def sleep(self, guide: poutine.Trace) -> None:
        """Sees the guide on simulated data."""


@contextmanager
def watch_traces(loss: ELBO, visitor: TraceVisitor) -> Generator[None, None, None]:
    """Shows all traces that a loss makes, before it differentiates them.

    Args:
        loss: a stock Pyro ELBO or one of pyronat's.
        visitor: is shown each pair of traces.

    Yields:
        Nothing; the loss is as before when the context ends.

    Raises:
        UnsupportedProgram: for losses that compile or do not make traces.
    """
    kind = type(loss).__name__
    if not isinstance(loss, ELBO) or not hasattr(loss, "_get_trace"):
        raise UnsupportedProgram(
            f"the loss {kind} makes no traces; use an ELBO such as Trace_ELBO()"
        )
    if kind.startswith(("Jit", "TraceTMC")):
        raise UnsupportedProgram(f"{kind} hides its traces; use its plain counterpart")
    get_trace = loss._get_trace
    loss_sleep_trace: Any = getattr(loss, "_get_sleep_trace", None)

    def watched(*args: Any) -> Any:
        model_trace, guide_trace = get_trace(*args)
        visitor.wake(model_trace, guide_trace)
        return model_trace, guide_trace

    def watched_sleep(*args: Any) -> Any:
        guide_trace = loss_sleep_trace(*args)
        visitor.sleep(guide_trace)
        return guide_trace

    loss._get_trace = watched
    if loss_sleep_trace is not None:
        loss._get_sleep_trace = watched_sleep
    try:
        yield
    finally:
        vars(loss).pop("_get_trace", None)
        vars(loss).pop("_get_sleep_trace", None)


@contextmanager
def own_random_numbers(seed: int) -> Generator[None, None, None]:
    """Runs on random numbers of its own, so that the caller's stream is not disturbed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
