"""Runs of a program on all joint values of its discrete parents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from pyronat.errors import NotEnumerable
from pyronat.families import groups, peel
from pyronat.records import Run, SiteRecord
from pyronat.tracing import OneElement, Program, in_plate, quietly, run_on

_WAY_OUT = "use Full(expectation='model') or 'pooled', or Visible(posterior='enumerate') or 'guide'"

MAX_STATES = 2**16
"""Joint states that an exact expectation may enumerate."""


@dataclass(frozen=True)
class WeightedRun:
    """A run on enumerated values.

    Attributes:
        run: the run; where states are stacked, all batch shapes begin with them.
        probabilities: of the stacked states, or of the one state, `[states or 1, *nesting]`, one
            for each element of plates that share states, 1 along all other dimensions.
        stacked: whether the run has all states.
    """

    run: Run
    probabilities: Tensor
    stacked: bool

    def along(self, shape: Sequence[int]) -> Tensor:
        """Probabilities along a batch shape of the run."""
        own = self.probabilities if self.stacked else self.probabilities[0]
        return own.reshape(own.shape[max(own.dim() - len(shape), 0) :])


def enumerate_parents(
    program: Program,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    parents: frozenset[str],
    shared: frozenset[str] = frozenset(),
) -> list[WeightedRun]:
    """Runs a program on all joint values of some discrete sites.

    Shared plates are cut to one element that stands for all, unless the program tells elements
    apart: by their indices, or by arguments and parameters that do not broadcast to one element.

    Args:
        program: model or guide.
        args: its arguments.
        kwargs: its keyword arguments.
        parents: the sites to enumerate; all others are integrated by their families.
        shared: plates around all sites whose elements are independent; they take the same states
            all at once, each element with the probabilities that they have there.

    Returns:
        One run with all states, or one for each state.
    """
    if shared:
        cut = OneElement(shared)
        try:
            runs = _enumerated(program, args, kwargs, parents, shared, cut)
            if runs[0].stacked and not cut.told_apart and all(map(_fits, runs[0].run.records)):
                return runs
        except (RuntimeError, ValueError, IndexError):
            pass
    return _enumerated(program, args, kwargs, parents, shared, nullcontext())


def _fits(record: SiteRecord) -> bool:
    """Whether scale and mask of a site are no larger than its batch shape."""
    shape = record.distribution.batch_shape
    factors = [part for part in (record.scale, record.mask) if isinstance(part, Tensor)]
    return all(torch.broadcast_shapes(part.shape, shape) == shape for part in factors)


def _enumerated(
    program: Program,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    parents: frozenset[str],
    shared: frozenset[str],
    context: AbstractContextManager[Any],
) -> list[WeightedRun]:
    """Runs a program on all joint values of some discrete sites, in a context.

    All states are stacked leftmost in one run, in a plate. A program that does not broadcast over
    a leading dimension, as two single states show, is run once for each state.

    Args:
        program: model or guide.
        args: its arguments.
        kwargs: its keyword arguments.
        parents: the sites to enumerate; all others are integrated by their families.
        shared: plates around all sites whose elements are independent; they take the same states
            all at once, each element with the probabilities that they have there.
        context: of all runs.

    Returns:
        One run with all states, or one for each state.

    Raises:
        NotEnumerable: if a parent is continuous or masked, or the states are too many.
    """
    with quietly(), torch.random.fork_rng(), context:
        prototype = run_on(program, args, kwargs, {}).records
        dims = _dims_of(prototype, shared)
        cells = [_cells(record, dims) for record in prototype if record.name in parents]
        states = prod(len(support) ** prod(shape) for support, shape in cells)
        if states > MAX_STATES:
            raise NotEnumerable(
                f"{', '.join(sorted(parents))} have {states} joint states, at most {MAX_STATES} "
                f"are enumerated; {_WAY_OUT}"
            )
        values = _joint_values(prototype, parents, cells, states)
        rng = torch.random.get_rng_state()
        nesting = max((len(r.distribution.batch_shape) for r in prototype), default=0)

        def run_state(state: int) -> WeightedRun:
            torch.random.set_rng_state(rng)
            run = run_on(program, args, kwargs, {name: v[state] for name, v in values.items()})
            return WeightedRun(run, _joint_log_prob(run, parents, nesting, dims, 1).exp(), False)

        try:
            torch.random.set_rng_state(rng)
            stacked = _run_stacked(program, args, kwargs, prototype, values, states, nesting)
            log_prob = _joint_log_prob(stacked, parents, nesting, dims, states)
            runs = [WeightedRun(stacked, log_prob.exp(), True)]
            broadcasts = all(
                _same_row(stacked, run_state(state).run, state, states)
                for state in {states // 2, states - 1}
            )
        except (RuntimeError, ValueError, IndexError):
            broadcasts = False
        if not broadcasts:
            runs = [run_state(state) for state in range(states)]
    mass = torch.stack([run.probabilities.sum(0) for run in runs]).sum(0)
    if float((mass - 1).abs().max()) > 1e-4:
        raise NotEnumerable(
            f"the probabilities of all states of {', '.join(sorted(parents))} sum to "
            f"{float(mass.flatten()[0]):.6g}, not to 1: a parent is masked, its support depends on "
            f"other sites, or branches have parents of their own; {_WAY_OUT}"
        )
    return runs


def _dims_of(records: Sequence[SiteRecord], names: frozenset[str]) -> frozenset[int]:
    """Batch dimensions of some plates."""
    return frozenset(p.dim for record in records for p in record.plates if p.name in names)


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
    return run_on(in_plate(program, states, -1 - nesting), args, kwargs, padded)


def _joint_log_prob(
    run: Run, parents: frozenset[str], nesting: int, dims: frozenset[int], states: int
) -> Tensor:
    """Log-probability of the enumerated values `[states, *nesting]`, summed but over `dims`."""
    total = torch.zeros(states, *[1] * nesting)
    for record in run.records:
        if record.name in parents:
            total = total.to(record.value.device)
            log_prob = record.distribution.log_prob(record.value).detach()
            shape = log_prob.shape[-nesting:] if nesting else ()
            log_prob = log_prob.reshape(states, *[1] * (nesting - len(shape)), *shape)
            summed = [dim for dim in range(-nesting, 0) if dim not in dims]
            total = total + (log_prob.sum(summed, keepdim=True) if summed else log_prob)
    return total


def _same_row(stacked: Run, single: Run, state: int, states: int) -> bool:
    """Whether one row of a stacked run has the distributions of a run on that state alone."""
    if [record.name for record in stacked.records] != [record.name for record in single.records]:
        return False
    for many, one in zip(stacked.records, single.records, strict=True):
        if many.distribution.batch_shape[:1] != (states,):
            return False
        wide, narrow = (groups(peel(record.distribution)) for record in (many, one))
        for row, expected in zip(wide, narrow, strict=True):
            for a, b in zip(row.coordinates, expected.coordinates, strict=True):
                if a[state].numel() != b.numel() or not torch.allclose(a[state].reshape_as(b), b):
                    return False
    return True


def _cells(record: SiteRecord, dims: frozenset[int]) -> tuple[Tensor, tuple[int, ...]]:
    """The support of one element of a site, and the elements that have states of their own.

    Args:
        record: the site in a prototype run.
        dims: batch dimensions of the distribution along which all elements share a state.

    Returns:
        Values `[values, *event]`, and the shape of the elements `[*base_batch]`, 1 along `dims`.

    Raises:
        NotEnumerable: if the support is infinite.
    """
    base = peel(record.distribution)
    try:
        support = base.enumerate_support(expand=False)
    except NotImplementedError as error:
        raise NotEnumerable(
            f"site {record.name!r} ({type(base).__name__}) is a parent with infinitely many "
            f"values; {_WAY_OUT}"
        ) from error
    support = support.reshape(len(support), *base.event_shape)
    event = len(base.event_shape)
    shape = record.value.shape[: record.value.dim() - event]
    joined = len(shape) - len(record.distribution.batch_shape)
    places = {len(shape) - joined + dim for dim in dims}
    return support, tuple(1 if i in places else size for i, size in enumerate(shape))


def _joint_values(
    records: Sequence[SiteRecord],
    parents: frozenset[str],
    cells: Sequence[tuple[Tensor, tuple[int, ...]]],
    states: int,
) -> dict[str, Tensor]:
    """All joint values: for each parent `[states, *batch, *event]`."""
    index = torch.arange(states)
    values = {}
    enumerated = [record for record in records if record.name in parents]
    for record, (support, shape) in zip(enumerated, cells, strict=True):
        digits = []
        for _ in range(prod(shape)):
            digits.append(index % len(support))
            index = index // len(support)
        chosen = support[torch.stack(digits, 1).to(support.device)]
        chosen = chosen.reshape(states, *shape, *support.shape[1:])
        values[record.name] = chosen.expand(states, *record.value.shape)
    return values
