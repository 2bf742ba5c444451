"""Traces that losses are made of, and a way to see them before they are differentiated."""

from __future__ import annotations

import inspect
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from pyro import poutine
from pyro.infer import ELBO, TraceTailAdaptive_ELBO
from pyro.infer.util import is_validation_enabled
from pyro.poutine.util import prune_subsample_sites
from pyro.util import check_if_enumerated, check_model_guide_match, check_site_shape
from torch import Tensor
from torch.utils._pytree import tree_map

from pyronat.errors import NoGuideOnDreams, UnsupportedProgram
from pyronat.tracing import (
    Program,
    by_itself,
    constant_samples,
    fixed_values,
    guide_messenger,
    is_random,
)


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
    messenger = guide_messenger(guide)
    with constant_samples():
        if messenger is not None:
            guide(*args, **kwargs)
            model_trace, guide_trace = messenger.get_traces()
        else:
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

    Returns:
        Traces of the dream and of the guide, the latter with log-probabilities.
    """
    with constant_samples():
        dreamed = poutine.trace(poutine.uncondition(model)).get_trace(*args, **kwargs)
    simulated = {
        name: (site["infer"].get("obs"), site["value"])
        for name, site in dreamed.nodes.items()
        if site["type"] == "sample" and site["infer"].get("was_observed") and is_random(site)
    }
    args, kwargs = with_simulated(guide, simulated, args, kwargs)
    if guide_messenger(guide) is None:
        replay = poutine.replay(trace=dreamed)
    else:
        # Replaying would overwrite what such a guide notes down at its sites.
        nodes = dreamed.nodes.items()
        replay = fixed_values({n: site["value"] for n, site in nodes if site["type"] == "sample"})
    with replay:
        trace = poutine.trace(by_itself(guide)).get_trace(*args, **kwargs)
    return dreamed, _scored(trace, float("inf"))


def with_simulated(
    guide: Program,
    simulated: Mapping[str, tuple[Any, Tensor]],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """Arguments of a guide on simulated data.

    A guide with a parameter `observations` gets the simulated values by site name, Pyro's own
    convention. For any other guide the arguments whose tensors are the observed values are
    replaced, recognized by identity.

    Args:
        guide: the guide.
        simulated: (observed value, simulated value) by site.
        args: arguments of the guide on the data.
        kwargs: its keyword arguments on the data.

    Returns:
        Arguments and keyword arguments.

    Raises:
        NoGuideOnDreams: if the observed values of a site are not among the arguments.
    """
    if "observations" in inspect.signature(guide).parameters:
        given = {name: pair[1] for name, pair in simulated.items()}
        return args, {**kwargs, "observations": given}
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


_STOCK_SLEEP = "_get_matched_trace"
_SLEEP_TRACES = ("_get_sleep_trace", _STOCK_SLEEP)


def _with_params(trace: poutine.Trace, other: poutine.Trace) -> poutine.Trace:
    """A trace with the parameters of another one too.

    A program may use a module that the other one registers, and a guide that runs its model along
    leaves all parameters to the trace of the model.
    """
    found = trace.copy()
    for name, site in other.nodes.items():
        if site["type"] == "param" and name not in found.nodes:
            found.nodes[name] = site
    return found


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
    check_loss(loss)
    get_trace = loss._get_trace
    # Ours and Pyro's own have a sleep phase, which makes traces in another way.
    name = next((n for n in _SLEEP_TRACES if hasattr(loss, n)), "")
    get_sleep_trace: Any = getattr(loss, name, None)

    awake: list[poutine.Trace] = []

    def watched(*args: Any) -> Any:
        model, guide = get_trace(*args)
        awake[:] = [_with_params(model, guide)]
        visitor.wake(awake[0], _with_params(guide, model))
        return model, guide

    def watched_sleep(*args: Any) -> Any:
        guide = get_sleep_trace(*args)
        visitor.sleep(_with_params(guide, awake[0]) if awake else guide)
        return guide

    loss._get_trace = watched
    if name:
        setattr(loss, name, watched_sleep)
    try:
        yield
    finally:
        vars(loss).pop("_get_trace", None)
        vars(loss).pop(name, None)


def check_loss(loss: Any, programs: Sequence[Program] = ()) -> None:
    """Refuses losses whose traces cannot be seen before they are differentiated.

    Args:
        loss: what a user gave as a loss.
        programs: the model and the guide it is to be used with.

    Raises:
        UnsupportedProgram: naming the loss and what to use in its place.
        NoGuideOnDreams: if Pyro's own sleep phase cannot hand its dreams to the programs.
    """
    kind = type(loss).__name__
    if not isinstance(loss, ELBO) or not hasattr(loss, "_get_trace"):
        raise UnsupportedProgram(
            f"the loss {kind} makes no traces; use an ELBO such as Trace_ELBO()"
        )
    if kind.startswith(("Jit", "TraceTMC")):
        raise UnsupportedProgram(f"{kind} hides its traces; use its plain counterpart")
    if isinstance(loss, TraceTailAdaptive_ELBO):
        raise UnsupportedProgram(
            f"{kind} computes no loss, so no step can be judged; use RenyiELBO, whose alpha "
            "weights the tails"
        )
    if hasattr(loss, _STOCK_SLEEP) and loss.insomnia < 1 and not all(map(_takes_data, programs)):
        raise NoGuideOnDreams(
            "the sleep phase of pyro.infer.ReweightedWakeSleep calls model and guide with a "
            "keyword argument 'observations' (site name → value), which one of them does not "
            "take; add it, or use pyronat.ReweightedWakeSleep"
        )


def _takes_data(program: Program) -> bool:
    taken = inspect.signature(program).parameters.values()
    return any(p.name == "observations" or p.kind is p.VAR_KEYWORD for p in taken)


def number_of(loss: Any) -> float:
    """A loss in nats; of a loss for each program, as Pyro's wake–sleep has it, the model's."""
    return float(loss[0] if isinstance(loss, tuple) else loss)
