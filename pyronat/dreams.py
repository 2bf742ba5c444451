"""Dreams (v, h) ~ p and what the guide, or enumeration, says about their hidden values.

Part of the border with Pyro: hands out plain records.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyronat.errors import NoGuideOnDreams, NotEnumerable, UnsupportedProgram
from pyronat.loss_traces import watch_traces, with_simulated
from pyronat.records import Run, SiteRecord, visible_elements
from pyronat.tracing import (
    Program,
    constant_samples,
    fixed_values,
    is_random,
    params_of,
    quietly,
    records_of,
    unconditioned,
)


@dataclass(frozen=True)
class Dream:
    """One run of a model forward, observed sites sampled too.

    Attributes:
        run: the run; its records have unscaled log-probabilities.
        visible: names of the sites that the program observes.
        observed: what it observes there, by site.
        subsamples: indices that subsampled plates drew, by plate.
    """

    run: Run
    visible: frozenset[str]
    observed: dict[str, Any]
    subsamples: dict[str, Tensor]

    @property
    def values(self) -> dict[str, Tensor]:
        """Values of all sites."""
        return {record.name: record.value for record in self.run.records}


def draw(model: Program, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Dream:
    """Dreams once: one dream for each element of independent plates.

    Args:
        model: the model.
        args: its arguments.
        kwargs: its keyword arguments.

    Returns:
        The dream.

    Raises:
        UnsupportedProgram: if factor statements make the model another one than it samples from.
    """
    with quietly(), constant_samples():
        trace = poutine.trace(unconditioned(model)).get_trace(*args, **kwargs)
    sites = {name: site for name, site in trace.nodes.items() if site["type"] == "sample"}
    factors = sorted(name for name, s in sites.items() if type(s["fn"]).__name__ == "Unit")
    if factors:
        raise UnsupportedProgram(
            f"factor statement {factors[0]!r}: dreams do not follow a density that is not "
            "normalized; write it as an observed site, or use Full(expectation='posterior')"
        )
    observed = {
        name: site["infer"].get("obs")
        for name, site in sites.items()
        if site["infer"].get("was_observed") and is_random(site)
    }
    return Dream(
        run=_scored(trace),
        visible=frozenset(observed),
        observed=observed,
        subsamples={
            name: site["value"]
            for name, site in sites.items()
            if type(site["fn"]).__name__ == "_Subsample" and site["value"] is not None
        },
    )


def _scored(trace: poutine.Trace) -> Run:
    records = tuple(
        replace(record, log_prob=record.distribution.log_prob(record.value))
        for record in records_of(trace)
    )
    return Run(records, params_of(trace))


class _Subsamples(Messenger):
    """Makes plates take the elements that they took in a dream."""

    def __init__(self, indices: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._indices = indices

    def _pyro_sample(self, message: dict[str, Any]) -> None:
        if message["name"] in self._indices and type(message["fn"]).__name__ == "_Subsample":
            message["value"], message["done"] = self._indices[message["name"]], True


def run_model(
    model: Program,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    dream: Dream,
    hidden: Mapping[str, Tensor],
) -> Run:
    """Runs the model on the visible values of a dream and other hidden ones.

    Args:
        model: the model.
        args: its arguments.
        kwargs: its keyword arguments.
        dream: the dream.
        hidden: values by hidden site.

    Returns:
        The run, its records with unscaled log-probabilities.

    Raises:
        NoGuideOnDreams: if the model has other hidden sites on these values.
        UnsupportedProgram: if it has other visible ones.
    """
    seen = {name: value for name, value in dream.values.items() if name in dream.visible}
    given = fixed_values({**seen, **hidden})
    with quietly(), _Subsamples(dream.subsamples), constant_samples(), given:
        run = _scored(poutine.trace(unconditioned(model)).get_trace(*args, **kwargs))
    names = {record.name for record in run.records}
    if not names >= seen.keys():
        raise UnsupportedProgram(
            f"{', '.join(sorted(seen.keys() - names))}: which sites are observed depends on hidden "
            "values, so the visible geometry is not defined; use Full()"
        )
    _check_sites(names - seen.keys(), set(hidden))
    return run


def _check_sites(model: set[str], guide: set[str]) -> None:
    """Compares the hidden sites of a model with the random sites of its guide.

    Args:
        model: names of the hidden sites.
        guide: names of the random sites.

    Raises:
        NoGuideOnDreams: naming those that differ.
    """
    if model != guide:
        raise NoGuideOnDreams(
            f"{', '.join(sorted(model ^ guide))}: hidden sites of the model and random sites of "
            "the guide differ, so the guide has no density for dreams, as with autoguides over "
            "auxiliary variables, AutoDelta and enumerated sites; write a guide with one random "
            "site for each hidden one, or use Visible(posterior='enumerate') where all are discrete"
        )


class GuideOnDream:
    """A guide on the visible values of a dream.

    Args:
        guide: the guide.
        args: its arguments on the data.
        kwargs: its keyword arguments on the data.
        dream: the dream.

    Raises:
        NoGuideOnDreams: if the guide cannot be given the simulated values.
    """

    def __init__(
        self, guide: Program, args: Sequence[Any], kwargs: Mapping[str, Any], dream: Dream
    ) -> None:
        values = dream.values
        simulated = {
            record.name: (given, _where_seen(record, given))
            for record in dream.run.records
            for given in [dream.observed.get(record.name)]
            if record.name in dream.visible
        }
        self._guide, self._dream = guide, dream
        self._args, self._kwargs = with_simulated(guide, simulated, args, kwargs)
        self._hidden = {name: values[name] for name in values.keys() - dream.visible}

    def on_own(self) -> Run:
        """The run that gives the hidden values of the dream itself.

        Returns:
            The run, its records with unscaled log-probabilities.

        Raises:
            NoGuideOnDreams: if the sites of the guide are not the hidden ones of the dream.
        """
        run = self._run(self._hidden)
        _check_sites(set(self._hidden), {record.name for record in run.records})
        return run

    def drawn(self) -> Run:
        """A run that draws hidden values, its records with unscaled log-probabilities."""
        return self._run({})

    def _run(self, values: Mapping[str, Tensor]) -> Run:
        with (
            quietly(),
            _Subsamples(self._dream.subsamples),
            constant_samples(),
            fixed_values(values),
        ):
            return _scored(poutine.trace(self._guide).get_trace(*self._args, **self._kwargs))


def _where_seen(record: SiteRecord, given: Any) -> Tensor:
    """The simulated value, but what masks hide as the data have it.

    Else the guide would know of hidden values what the weights do not.
    """
    seen = visible_elements(record)
    if bool(seen.all()) or not isinstance(given, Tensor):
        return record.value
    return torch.where(seen, record.value, given.to(record.value))


@dataclass(frozen=True)
class Marginals:
    """A run with all values of the hidden sites enumerated.

    Attributes:
        run: the run; batch shapes have enumerated dimensions on the left.
        weights: posterior probability of each element by site, `[*batch]`; sites whose
            log-probability does not depend on parameters are left out.
    """

    run: Run
    weights: dict[str, Tensor]


class _Unscaled(Messenger):
    """Undoes the scales of all sites: they change the loss, not the posterior."""

    def _pyro_sample(self, message: dict[str, Any]) -> None:
        message["scale"] = 1.0


class _Keep:
    """Keeps the one model trace that a loss makes."""

    def __init__(self) -> None:
        self.traces: list[poutine.Trace] = []

    def wake(self, model: poutine.Trace, guide: poutine.Trace) -> None:
        self.traces.append(model)

    def sleep(self, guide: poutine.Trace) -> None:
        """Never called: the loss has no sleep phase."""


def posterior_marginals(
    model: Program, args: Sequence[Any], kwargs: Mapping[str, Any], dream: Dream
) -> Marginals:
    """Exact posterior marginals of all hidden sites given the visible values of a dream.

    p(h_r = j | v) = ∂ log p(v) / ∂ log p(h_r = j | pa), by the variable elimination of Pyro's
    `TraceEnum_ELBO`.

    Args:
        model: the model.
        args: its arguments.
        kwargs: its keyword arguments.
        dream: the dream.

    Returns:
        The enumerated run with the marginals.

    Raises:
        NotEnumerable: if a hidden site has infinitely many values.
    """
    hidden = [record for record in dream.run.records if record.name not in dream.visible]
    whole = [record.name for record in hidden if not record.distribution.has_enumerate_support]
    if whole:
        raise NotEnumerable(
            f"hidden site {whole[0]!r} cannot be enumerated: it is continuous, or joins several "
            "units by to_event; use Visible(posterior='guide'), or a site for each unit"
        )
    nesting = max((len(r.distribution.batch_shape) for r in dream.run.records), default=0)
    values, originals = dream.values, {record.name: record for record in dream.run.records}
    given = fixed_values({name: values[name] for name in dream.visible}, observed=True)
    loss, kept = TraceEnum_ELBO(max_plate_nesting=nesting), _Keep()

    def enumerated(*args: Any, **kwargs: Any) -> None:
        with _Unscaled(), given:
            unconditioned(model)(*args, **kwargs)

    def empty_guide(*args: Any, **kwargs: Any) -> None:
        return

    try:
        with quietly(), _Subsamples(dream.subsamples), watch_traces(loss, kept):
            program = config_enumerate(enumerated)
            total = loss.differentiable_loss(program, empty_guide, *args, **kwargs)
    except (ValueError, RuntimeError, IndexError) as error:
        reason = str(error).partition("\n")[0]
        raise NotEnumerable(
            f"Pyro cannot enumerate the hidden sites of the model: {reason}; write the model so "
            "that it broadcasts over dimensions on the left, or use Visible(posterior='guide')"
        ) from error
    records, params = records_of(kept.traces[0]), params_of(kept.traces[0])
    _check_broadcast(records, originals)
    attached = [r for r in records if r.log_prob is not None and r.log_prob.requires_grad]
    found = torch.autograd.grad(-total, [_log_prob(r) for r in attached], retain_graph=True)
    weights = {record.name: part for record, part in zip(attached, found, strict=True)}
    scaled = [replace(record, scale=originals[record.name].scale) for record in records]
    return Marginals(Run(tuple(scaled), params), weights)


def _check_broadcast(records: Sequence[SiteRecord], originals: Mapping[str, SiteRecord]) -> None:
    """Refuses programs that take enumerated dimensions for their own.

    Args:
        records: sites of an enumerated run.
        originals: the same sites of a run without.

    Raises:
        NotEnumerable: naming the site.
    """
    for record in records:
        event, own = record.distribution.event_shape, originals[record.name].distribution
        if event != own.event_shape:
            raise NotEnumerable(
                f"site {record.name!r} has event shape {tuple(event)} where values are enumerated, "
                f"{tuple(own.event_shape)} else: write the model so that it broadcasts over "
                "dimensions on the left, or use Visible(posterior='guide')"
            )


def _log_prob(record: SiteRecord) -> Tensor:
    assert record.log_prob is not None
    return record.log_prob
