"""All that a training depends on, as one state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyronat.checkpoints import forget, put, random_numbers, set_random_numbers, stored
from pyronat.errors import CheckpointMismatch
from pyronat.optim import NaturalGradient

TRAINING_FORMAT = 1


def training_state(optim: NaturalGradient) -> dict[str, Any]:
    """States of an optimizer, of Pyro's parameters and of the random numbers."""
    return {
        "training": TRAINING_FORMAT,
        "optim": optim.get_state(),
        "parameters": stored(),
        "random": random_numbers(),
    }


def resume(optim: NaturalGradient, state: Mapping[str, Any]) -> set[str]:
    """Takes a state of `training_state`, at once.

    Args:
        optim: the optimizer.
        state: the state.

    Returns:
        Names of parameters that have been made, and that modules may claim.

    Raises:
        CheckpointMismatch: if it is not such a state, or of another program; then nothing is
            changed.
    """
    if state.get("training") != TRAINING_FORMAT:
        raise CheckpointMismatch(f"this is not a state of NaturalSVI in format {TRAINING_FORMAT}")
    mine = {name for side in optim.sides.values() for name in side.net.params}
    made, undo = put(state["parameters"])
    try:
        optim.set_state(state["optim"])
    except BaseException:
        undo()
        raise
    for name in mine - state["parameters"].keys():
        forget(name)
    set_random_numbers(state["random"])
    return made
