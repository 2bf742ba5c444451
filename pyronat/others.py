"""States of the Pyro optimizers that move what has no metric."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pyro
import pyro.optim
from pyro.optim.optim import _get_state_dict, _load_state_dict


def state_of(optimizer: pyro.optim.PyroOptim) -> dict[str, Any]:
    """A copy of a Pyro optimizer's state, with what it was given but has not used yet.

    Parameters that Pyro's store does not hold any more are left out.
    """
    leaves = dict(pyro.get_param_store().named_parameters())
    found = {
        name: _get_state_dict(single)
        for leaf, single in optimizer.optim_objs.items()
        if (name := pyro.get_param_store().param_name(leaf)) is not None and leaves[name] is leaf
    }
    return copy.deepcopy({**optimizer._state_waiting_to_be_consumed, **found})


def restore(optimizer: pyro.optim.PyroOptim, state: Mapping[str, Any]) -> None:
    """Makes a state of `state_of` the only one that a Pyro optimizer knows, at once."""
    leaves = dict(pyro.get_param_store().named_parameters())
    waiting = copy.deepcopy(dict(state))
    found, clips = {}, {}
    for name in waiting.keys() & leaves.keys():
        leaf = leaves[name]
        single = optimizer.optim_objs.get(leaf)
        found[leaf] = optimizer._get_optim(leaf) if single is None else single
        clips[leaf] = optimizer._get_grad_clip(leaf)
        _load_state_dict(found[leaf], waiting.pop(name))
    for held, new in (
        (optimizer.optim_objs, found),
        (optimizer.grad_clip, clips),
        (optimizer._state_waiting_to_be_consumed, waiting),
    ):
        held.clear()
        held.update(new)


def with_moments_of(saved: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, Any]:
    """A state with the moments of an earlier one, but rates and schedules as they are now.

    A scheduler may have stepped since the earlier one, and rates may have been set by hand.

    Args:
        saved: the earlier state.
        current: the state now.

    Returns:
        The state.
    """
    found = dict(saved)
    for name, now in current.items():
        scheduled = "scheduler" in now
        before, single = saved.get(name, {}), now["optimizer"] if scheduled else now
        moments = (before.get("optimizer", {}) if scheduled else before).get("state", {})
        merged = {**single, "state": moments}
        found[name] = {**now, "optimizer": merged} if scheduled else merged
    return found


def kind_of(optimizer: pyro.optim.PyroOptim | None) -> str:
    """Name of the torch optimizer behind a Pyro optimizer; "default" for None."""
    if optimizer is None:
        return "default"
    constructor = optimizer.pt_optim_constructor
    return str(getattr(constructor, "__name__", type(constructor).__name__))
