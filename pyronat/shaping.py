"""Steps whose parts are scaled after they have been computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyronat.proposals import Proposal
from pyronat.sides import Role, Side


@dataclass(frozen=True)
class Shape:
    """Factors on a step.

    Attributes:
        whole: of all parameters.
        natural: of those with a metric, all together.
        by_name: of single ones; 1 where none is given.
    """

    whole: float = 1.0
    natural: Tensor | float = 1.0
    by_name: Mapping[str, float] | None = None

    def factor(self, name: str, natural: bool) -> Tensor | float:
        """The factor of a parameter."""
        own = self.whole * (self.by_name or {}).get(name, 1.0)
        return own * self.natural if natural else own

    @property
    def is_none(self) -> bool:
        """Whether it is known to change nothing."""
        plain = isinstance(self.natural, float) and self.whole * self.natural == 1
        return plain and set((self.by_name or {}).values()) <= {1.0}


def shaped(
    proposal: Proposal, sides: Mapping[Role, Side], gradients: Mapping[str, Tensor], shape: Shape
) -> Proposal:
    """A step whose change of each parameter is scaled by a factor.

    Where factors differ, its divergence is no longer known (`measured`). Predicted gains are sums
    over parameters of (η − η²/2) gᵀd, with the length η of each: exact where the parameters of a
    block share their factor.

    Args:
        proposal: the step.
        sides: curvature that it was made with.
        gradients: by parameter.
        shape: the factors.

    Returns:
        The step.
    """
    if shape.is_none:
        return proposal
    owned = {role: side.plan.owner() for role, side in sides.items() if side.natural}
    natural = {name for names in owned.values() for name in names}
    factors = {name: shape.factor(name, name in natural) for name in proposal.changes}
    changes = {name: factors[name] * value for name, value in proposal.changes.items()}
    scalars, length = dict(proposal.scalars), proposal.scalars["length"]
    zero = torch.zeros_like(scalars["gain"])
    own = {(shape.by_name or {}).get(name, 1.0) for name in changes if name in natural}
    common = shape.whole * shape.natural * (own.pop() if len(own) == 1 else 1.0)
    scalars["length"] = length * common
    if "kl" in scalars:
        scalars["kl"] = scalars["kl"] * common**2
    if own:
        scalars.pop("kl", None)
    scalars["gain"] = scalars["model_gain"] = zero
    for name in sorted(natural & gradients.keys() & changes.keys()):
        inner = -(gradients[name] * proposal.changes[name]).sum().to(zero)
        gain = (factors[name] - factors[name] ** 2 * length.to(zero) / 2) * inner
        scalars["gain"] = scalars["gain"] + gain
        if name in owned.get("model", {}):
            scalars["model_gain"] = scalars["model_gain"] + gain
    return replace(proposal, changes=changes, scalars=scalars)


def measured(proposal: Proposal, sides: Mapping[Role, Side]) -> Proposal:
    """A step whose divergence ½ ΔᵀGΔ is known, with the full Fisher information, in nats."""
    if "kl" in proposal.scalars:
        return proposal
    zero = torch.zeros_like(proposal.scalars["gain"])
    scalars = {**proposal.scalars, "kl": _divergence(sides, proposal.changes, zero)}
    return replace(proposal, scalars=scalars)


def _divergence(sides: Mapping[Role, Side], changes: Mapping[str, Tensor], like: Tensor) -> Tensor:
    total = like
    for side in sides.values():
        for name in side.solved if side.natural else ():
            operator, block = side.average[name].operator, side.plan.blocks[name]
            assert operator is not None
            zeros = {
                param: side.solved[name].damping.new_zeros(shape)
                for param, shape in zip(block.params, block.shapes, strict=True)
                if param not in changes
            }
            vector = side.plan.layouts[name].pack({**zeros, **changes} if zeros else changes)
            vector = vector.to(side.solved[name].damping.dtype)
            total = total + 0.5 * operator.quadratic(vector).clamp_min(0).to(total)
    return total
