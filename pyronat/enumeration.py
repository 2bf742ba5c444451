"""Runs of a program on all joint values of its discrete parents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from pyronat.errors import NotEnumerable
from pyronat.families import groups, peel
from pyronat.records import Run, SiteRecord
from pyronat.tracing import Program, dream, in_plate, quietly, run_on

MAX_STATES = 2**16
"""Joint states that an exact expectation may enumerate."""


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
    with quietly(), torch.random.fork_rng():
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
            run = run_on(program, args, kwargs, {name: v[state] for name, v in values.items()})
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
            "not to 1: a parent is masked, its support depends on other sites, or branches have "
            "parents of their own; use Full(expectation='model') or 'pooled'"
        )
    return runs


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
