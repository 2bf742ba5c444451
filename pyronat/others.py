"""States of the Pyro optimizers that move what has no metric."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pyro.optim


def state_of(optimizer: pyro.optim.PyroOptim) -> dict[str, Any]:
    """A copy of a Pyro optimizer's state, with what it was given but has not used yet."""
    waiting = optimizer._state_waiting_to_be_consumed
    return copy.deepcopy({**waiting, **optimizer.get_state()})


def restore(optimizer: pyro.optim.PyroOptim, state: Mapping[str, Any]) -> None:
    """Makes a state of `state_of` the only one that a Pyro optimizer knows."""
    optimizer.optim_objs.clear()
    optimizer._state_waiting_to_be_consumed.clear()
    optimizer.set_state(copy.deepcopy(dict(state)))


def kind_of(optimizer: pyro.optim.PyroOptim | None) -> str:
    """Name of the torch optimizer behind a Pyro optimizer; "default" for None."""
    if optimizer is None:
        return "default"
    constructor = optimizer.pt_optim_constructor
    return str(getattr(constructor, "__name__", type(constructor).__name__))
