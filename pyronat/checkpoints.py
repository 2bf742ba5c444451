"""Files of checkpoints, and what of Pyro and of the random numbers is in them."""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.distributions import constraints as pyro_constraints
from pyro.poutine.messenger import Messenger
from pyro.util import get_rng_state, set_rng_state
from torch import Tensor
from torch.distributions import constraints as torch_constraints
from torch.distributions import transform_to
from torch.distributions.constraints import Constraint

from pyronat.errors import CheckpointMismatch
from pyronat.tracing import random_state, set_random_state

log = logging.getLogger(__name__)

_HOMES = {"torch": torch_constraints, "pyro": pyro_constraints}
"""Modules whose constraints can be written down."""

OWN = "own"
"""What stands for a constraint from elsewhere."""


# Files


def write(state: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes a state so that there is always a whole file under the name, the old or the new one.

    Args:
        state: of plain tensors, numbers, strings, lists, tuples and dicts.
        path: the file; `path` + ".tmp" beside it is overwritten.
    """
    path = Path(path)
    draft = path.with_name(path.name + ".tmp")
    with open(draft, "wb") as file:
        torch.save(dict(state), file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)
    if hasattr(os, "O_DIRECTORY"):
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    log.info("wrote %s", path)


def read(path: str | os.PathLike[str], map_location: Any = None) -> dict[str, Any]:
    """What `write` wrote, with `weights_only=True`.

    Args:
        path: the file.
        map_location: as `torch.load` takes it.

    Returns:
        The state.

    Raises:
        CheckpointMismatch: if the file holds something else.
    """
    try:
        state = torch.load(path, map_location=map_location, weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise CheckpointMismatch(f"{path} cannot be read as a checkpoint: {error}") from error
    if not isinstance(state, dict):
        raise CheckpointMismatch(f"{path} holds a {type(state).__name__}, not a state")
    log.info("read %s", path)
    return state


def check_state(state: Mapping[str, Any], name: str, expected: Mapping[str, Any]) -> None:
    """Refuses what is not a state of its kind.

    Args:
        state: the state.
        name: of the class whose state it should be.
        expected: what it must say, by key, its "format" first, or None for anything.

    Raises:
        CheckpointMismatch: naming what it says instead.
    """
    if state.get("format") != expected["format"] or not expected.keys() <= state.keys():
        raise CheckpointMismatch(f"this is not a state of {name} in format {expected['format']}")
    for key, value in expected.items():
        if value is not None and state[key] != value:
            raise CheckpointMismatch(f"{key} of the state: {state[key]}, this optimizer: {value}")


# Random numbers


def random_numbers() -> dict[str, Any]:
    """States of the generators of torch, of all GPUs in use, of `random` and of NumPy."""
    state = get_rng_state()
    name, keys, *rest = state["numpy"]
    return {
        "torch": random_state(),
        "python": state["random"],
        "numpy": (name, keys.tolist(), *rest),
    }


def set_random_numbers(state: Mapping[str, Any]) -> None:
    """Takes a state of `random_numbers`; those of GPUs that are not the same are left out."""
    processor, *gpus = [generator.cpu() for generator in state["torch"]]
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    set_rng_state({"torch": processor, "random": state["python"], "numpy": state["numpy"]})
    set_random_state([processor, *(gpus if len(gpus) == there else [])])


# Constraints


def written(constraint: Any) -> Any:
    """A constraint of torch or Pyro as plain numbers, tensors, strings, lists and dicts."""
    if isinstance(constraint, Constraint):
        for home, module in _HOMES.items():
            kind = type(constraint)
            if getattr(module, kind.__name__, None) is kind:
                fields = {name: written(value) for name, value in vars(constraint).items()}
                return {"home": home, "kind": kind.__name__, "fields": fields}
        return OWN
    if isinstance(constraint, (list, tuple)):
        return [written(item) for item in constraint]
    return constraint.detach().clone() if isinstance(constraint, Tensor) else constraint


def constraint_of(state: Any) -> Any:
    """The constraint that `written` wrote down.

    Args:
        state: what it gave.

    Returns:
        The constraint.

    Raises:
        CheckpointMismatch: if this version of torch or Pyro does not have it.
    """
    if isinstance(state, dict):
        kind = getattr(_HOMES.get(state["home"]), state["kind"], None)
        if not (isinstance(kind, type) and issubclass(kind, Constraint)):
            raise CheckpointMismatch(f"there is no constraint {state['kind']} here")
        constraint = kind.__new__(kind)
        vars(constraint).update({k: constraint_of(v) for k, v in state["fields"].items()})
        known = [value for value in vars(_HOMES[state["home"]]).values() if type(value) is kind]
        return next((value for value in known if _same(written(value), state)), constraint)
    return [constraint_of(item) for item in state] if isinstance(state, list) else state


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor) or isinstance(second, Tensor):
        first, second = torch.as_tensor(first), torch.as_tensor(second)
        return first.shape == second.shape and bool((first.cpu() == second.cpu()).all())
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(_same(first[k], second[k]) for k in first)
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(_same, first, second))
    return bool(first == second)


# Parameters


def stored() -> dict[str, dict[str, Any]]:
    """All of Pyro's parameters by name: unconstrained values, and constraints written down."""
    store = pyro.get_param_store()
    return {
        name: {
            "value": leaf.detach().clone(),
            "constraint": written(store._constraints.get(name, torch_constraints.real)),
        }
        for name, leaf in store.named_parameters()
    }


def put(state: Mapping[str, Mapping[str, Any]]) -> tuple[set[str], Callable[[], None]]:
    """Gives Pyro's parameters the values of a state.

    Parameters that are there take their values in place, so that modules that hold them go on
    holding them; others are made.

    Args:
        state: of `stored`.

    Returns:
        Names of those that were made, and a function that takes everything back.

    Raises:
        CheckpointMismatch: if a parameter that is there has another shape, type or constraint, or
            one that is not there has a constraint that could not be written down; then nothing is
            changed.
    """
    store = pyro.get_param_store()
    leaves = dict(store.named_parameters())
    for name, saved in state.items():
        _check(name, saved, leaves.get(name))
    before = {name: leaves[name].detach().clone() for name in state if name in leaves}
    for name, saved in state.items():
        if name in leaves:
            with torch.no_grad():
                leaves[name].copy_(saved["value"])
        else:
            _hold(name, saved["value"].detach().clone().requires_grad_())
            store._constraints[name] = constraint_of(saved["constraint"])

    def undo() -> None:
        for name in state:
            if name in before:
                with torch.no_grad():
                    leaves[name].copy_(before[name])
            else:
                forget(name)

    return state.keys() - before.keys(), undo


def _check(name: str, saved: Mapping[str, Any], leaf: Tensor | None) -> None:
    value, constraint = saved["value"], saved["constraint"]
    if leaf is None:
        if constraint == OWN:
            raise CheckpointMismatch(
                f"the constraint of {name} is neither torch's nor Pyro's, and {name} is not there "
                "yet; call evaluate_loss once before, so that the programs make it"
            )
        transform_to(constraint_of(constraint))
        return
    if (leaf.shape, leaf.dtype) != (value.shape, value.dtype):
        raise CheckpointMismatch(
            f"{name} has shape {tuple(value.shape)} and type {value.dtype} in the state, here "
            f"{tuple(leaf.shape)} and {leaf.dtype}"
        )
    here = written(pyro.get_param_store()._constraints.get(name, torch_constraints.real))
    if not _same(here, constraint):
        raise CheckpointMismatch(f"{name} has another constraint in the state than here")


def _hold(name: str, leaf: Tensor) -> None:
    """Makes a leaf the unconstrained value of a parameter."""
    store = pyro.get_param_store()
    old = store._params.get(name)
    if old is not None:
        store._param_to_name.pop(old, None)
    store._params[name] = leaf
    store._param_to_name[leaf] = name


def forget(name: str) -> None:
    """Removes a parameter, as if it had never been made."""
    store = pyro.get_param_store()
    leaf = store._params.pop(name, None)
    store._constraints.pop(name, None)
    if leaf is not None:
        store._param_to_name.pop(leaf, None)


class Claims(Messenger):
    """In this context modules take over parameters that were made from a state.

    `pyro.module` shows Pyro a leaf of its own. Where the store already has a parameter of that
    name, the leaf takes its value and its place, once.

    Args:
        names: parameters that no program has asked for yet.
    """

    def __init__(self, names: set[str]) -> None:
        super().__init__()
        self._names = names

    def _pyro_param(self, message: dict[str, Any]) -> None:
        name = message["name"]
        if name not in self._names:
            return
        self._names.discard(name)
        leaf = message["args"][1] if len(message["args"]) > 1 else None
        held = pyro.get_param_store()._params.get(name)
        if isinstance(leaf, torch.nn.Parameter) and held is not None and leaf is not held:
            with torch.no_grad():
                leaf.copy_(held)
            _hold(name, leaf)
