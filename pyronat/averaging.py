"""Averages of iterates, and their exchange with the last ones."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyronat.errors import AveragesInPlace, CheckpointMismatch, NoAverage, StructureChanged
from pyronat.steps import PolyakRuppert


@dataclass(frozen=True)
class Average:
    """The average of one parameter.

    Attributes:
        mean: in unconstrained coordinates and double precision, of the parameter's shape. In single
            precision the small weights of late iterates would be lost.
        count: iterates that it averages.
        step: number of the step that led to the last one.
    """

    mean: Tensor
    count: int
    step: int


@dataclass(frozen=True)
class Averages:
    """Averages of all parameters that steps have moved.

    A parameter that is first used late has an average of its own, over fewer iterates. Where a step
    does not use a parameter, its average stays.

    Attributes:
        of: average by parameter.
    """

    of: Mapping[str, Average] = field(default_factory=dict)

    @torch.no_grad()
    def entered(self, rule: PolyakRuppert, step: int, params: Mapping[str, Tensor]) -> Averages:
        """The averages with new iterates in them.

        Args:
            rule: of averaging.
            step: number of the step that led to the iterates.
            params: unconstrained leaves by name; they are copied.

        Returns:
            The averages.
        """
        if step < rule.start:
            return self
        found = dict(self.of)
        for name, leaf in params.items():
            if leaf.requires_grad:
                value, old = leaf.detach().to(torch.float64, copy=True), found.get(name)
                if old is not None:
                    mean = old.mean.to(value.device)
                    value = mean.lerp(value, rule.weight(old.count))
                count = 0 if old is None else old.count
                found[name] = Average(value, count + 1, step)
        return Averages(found)

    def misfits(self, params: Mapping[str, Tensor]) -> set[str]:
        """Parameters of another shape than their averages."""
        return {
            name
            for name, average in self.of.items()
            if name in params and params[name].shape != average.mean.shape
        }

    def missing(self, params: Mapping[str, Tensor]) -> set[str]:
        """Parameters of the last step that are not there; those that left before may be."""
        last = max((average.step for average in self.of.values()), default=0)
        return {
            name for name, average in self.of.items() if average.step == last and name not in params
        }

    def state(self) -> dict[str, dict[str, Any]]:
        """The averages as plain tensors, numbers, strings and dicts."""
        return {name: dict(vars(average)) for name, average in self.of.items()}

    @classmethod
    def from_state(cls, state: Any, rule: PolyakRuppert | None) -> Averages:
        """The averages of a state.

        Args:
            state: what `state` returned, or None of an optimizer that does not average.
            rule: of the optimizer that takes the state.

        Returns:
            The averages.

        Raises:
            CheckpointMismatch: if only one of both optimizers averages, or the state is damaged.
        """
        if (state is None) != (rule is None):
            has = "no averages of iterates" if state is None else "averages of iterates"
            raise CheckpointMismatch(
                f"the state has {has}, but this optimizer has averaging={rule}; both must average, "
                "or neither"
            )
        try:
            averages = {name: Average(**values) for name, values in (state or {}).items()}
        except (AttributeError, TypeError) as error:
            raise CheckpointMismatch(f"the averages of the state are damaged: {error}") from error
        damaged = [name for name, average in averages.items() if not _is_sound(average)]
        if damaged:
            raise CheckpointMismatch(
                f"the state's averages of {', '.join(sorted(damaged))} are damaged"
            )
        return cls(averages)


def _is_sound(average: Average) -> bool:
    numbers = isinstance(average.count, int) and isinstance(average.step, int)
    if not numbers or not isinstance(average.mean, Tensor):
        return False
    return average.count > 0 and average.step >= 0 and average.mean.dtype == torch.float64


class Exchange:
    """Puts averages in the place of parameters, and the parameters back.

    Attributes:
        leaves: unconstrained leaves that steps have moved, by name, whether or not they are in a
            parameter store.
    """

    def __init__(self) -> None:
        self.leaves: dict[str, Tensor] = {}
        self._in_place = False

    def check(self) -> None:
        """Refuses to go on while averages are in place.

        Raises:
            AveragesInPlace: if they are.
        """
        if self._in_place:
            raise AveragesInPlace(
                "the parameters are averages at the moment; leave the context of "
                "NaturalSVI.averaged() before a step, and before you enter it again"
            )

    @contextmanager
    def context(
        self, averages: Averages, stored: Mapping[str, Tensor]
    ) -> Generator[None, None, None]:
        """In this context the leaves of parameters hold their averages.

        Args:
            averages: the averages.
            stored: leaves of a parameter store, by name; they go before those of earlier steps.

        Yields:
            Nothing.

        Raises:
            AveragesInPlace: if they are in place already.
            NoAverage: if a parameter of the last step is not there.
            StructureChanged: if a parameter has another shape than its average.
        """
        self.check()
        leaves = {**self.leaves, **stored}
        leaves = {name: leaves[name] for name in averages.of if name in leaves}
        if missing := averages.missing(leaves):
            raise NoAverage(
                f"{', '.join(sorted(missing))} have averages, but no values to exchange them with; "
                "load the parameters, or register them by one call of evaluate_loss"
            )
        if misfits := averages.misfits(leaves):
            raise StructureChanged(
                f"{', '.join(sorted(misfits))} have other shapes than their averages; keep the "
                "shapes of parameters"
            )
        before = {name: leaf.detach().clone() for name, leaf in leaves.items()}
        self._in_place = True
        try:
            _write(leaves, {name: averages.of[name].mean for name in leaves})
            yield
        finally:
            _write(leaves, before)
            self._in_place = False


@torch.no_grad()
def _write(leaves: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, leaf in leaves.items():
        leaf.copy_(values[name])
