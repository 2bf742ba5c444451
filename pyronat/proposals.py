"""Steps that have been computed, and what describes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyronat.steps import Moments


@dataclass(frozen=True)
class Motion:
    """What one program remembers of its natural steps.

    Attributes:
        changes: the last step Δ, by parameter.
        fresh: its new part −η d, by parameter; empty where no share of signal is wanted.
        age: steps since momentum was last restarted, a 0-d tensor.
        agreement: running mean of gᵀ times the new part of the step before, a 0-d tensor.
        power: running mean of gᵀ times the new part of the same step, a 0-d tensor.
    """

    changes: Mapping[str, Tensor]
    fresh: Mapping[str, Tensor]
    age: Tensor
    agreement: Tensor
    power: Tensor

    def state(self) -> dict[str, Any]:
        """Plain tensors and dicts."""
        return {**vars(self), "changes": dict(self.changes), "fresh": dict(self.fresh)}


@dataclass(frozen=True)
class Proposal:
    """A step that has been computed but not taken.

    Attributes:
        changes: what to add to each parameter of a geometry or of the scaled Adam.
        moments: new states of the scaled Adam, by parameter.
        scalars: length, gain of all natural parameters, model_gain of the model's, grad_norm,
            natural_norm, cosine and damping, and kl where it is known, as 0-d tensors.
        motions: what it leaves to later steps, by program.
    """

    changes: dict[str, Tensor]
    moments: dict[str, Moments]
    scalars: dict[str, Tensor]
    motions: Mapping[str, Motion] = field(default_factory=dict)


@dataclass(frozen=True)
class Before:
    """Where a step came from.

    Attributes:
        params: parameters before the step, by name.
        state: `NaturalGradient.moving_state` before it.
        leaves: the unconstrained leaves that it moved, or None where a state was loaded.
    """

    params: dict[str, Tensor]
    state: dict[str, Any]
    leaves: dict[str, Tensor] | None = None

    def leaves_in(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """The leaves to take back.

        Args:
            stored: those of a parameter store, by name.

        Returns:
            The leaves, or None where others have taken their place.
        """
        found = {name: stored[name] for name in self.params if name in stored}
        same = self.leaves is None or all(found.get(n) is leaf for n, leaf in self.leaves.items())
        shapes = all(found[n].shape == self.params[n].shape for n in found)
        return found if same and shapes and len(found) == len(self.params) else None


def gain(products: Tensor, length: Tensor) -> Tensor:
    """(η − η²/2) gᵀd, what a step of length η gains as its metric has it, in nats."""
    return (length - 0.5 * length**2) * products[3]


def step_scalars(products: Tensor, length: Tensor) -> dict[str, Tensor]:
    """What describes a step.

    Args:
        products: (Σλ, count, gᵀg, gᵀd, dᵀd, dᵀAd without damping) `[6]`.
        length: η.

    Returns:
        length, gain, kl, grad_norm, natural_norm, cosine and damping, as 0-d tensors; 0 where there
        are no blocks.
    """
    damping, count, grad, inner, direction, quadratic = products.unbind()
    tiny = torch.finfo(products.dtype).tiny
    return {
        "length": length,
        "gain": gain(products, length),
        "kl": 0.5 * length**2 * quadratic.clamp_min(0),
        "grad_norm": grad.sqrt(),
        "natural_norm": inner.clamp_min(0).sqrt(),
        "cosine": inner / (grad * direction).sqrt().clamp_min(tiny),
        "damping": damping / count.clamp_min(1),
    }
