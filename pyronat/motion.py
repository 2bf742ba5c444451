"""What steps carry over to the next one: momentum that restarts, and the share of signal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyronat.operators import inner
from pyronat.proposals import Motion, Proposal
from pyronat.shaping import Shape, shaped
from pyronat.sides import Role, Side
from pyronat.steps import Momentum, Shrinkage


@dataclass(frozen=True)
class Carry:
    """Rules of what is carried over.

    Attributes:
        momentum: of both programs.
        shrinkage: of the guide, whose gradient comes from few draws; not of its networks, whose
            steps `steps.KLTrustRegion` keeps short.
    """

    momentum: Momentum
    shrinkage: Shrinkage

    def __call__(
        self,
        proposal: Proposal,
        sides: Mapping[Role, Side],
        gradients: Mapping[str, Tensor],
        motions: Mapping[str, Motion],
    ) -> Proposal:
        """A step with what it carries over from earlier ones.

        Δ_t = β Δ_{t−1} − f η d_t for each program with a metric, with β of `steps.Momentum` and, of
        the guide, f of `steps.Shrinkage`. Its divergence is no longer known (`shaping.measured`).
        Parameters that this step does not use keep what earlier ones left.

        Args:
            proposal: the step without.
            sides: curvature that it was made with.
            gradients: by parameter.
            motions: what earlier steps have left, by program.

        Returns:
            The step, with new `motions`, and "momentum" and "signal" among its scalars.
        """
        changes, scalars = dict(proposal.changes), dict(proposal.scalars)
        scalars.pop("kl", None)
        zero = torch.zeros_like(scalars["gain"])
        found: dict[str, Motion] = {}
        for role, side in sides.items():
            owned = side.plan.owner() if side.natural else {}
            fresh = {name: changes[name] for name in sorted(owned) if name in changes}
            if not fresh:
                continue
            before = motions.get(role) or Motion({}, {}, zero, zero, zero)
            noisy = self._noisy(side, fresh)
            if noisy:
                before, scalars["signal"] = self._share(before, noisy, gradients)
                factor = self.shrinkage.factor(scalars["signal"])
            slope = _inner(gradients, before.changes, zero)
            age = self.momentum.age(before.age, slope)
            decay = self.momentum.decay_at(age)
            for name, change in fresh.items():
                changes[name] = factor.to(change) * change if name in noisy else change
                if name in before.changes:
                    old = before.changes[name]
                    changes[name] = torch.addcmul(changes[name], old, decay.to(change))
            found[role] = replace(
                before,
                changes={**before.changes, **{name: changes[name] for name in fresh}},
                fresh={**before.fresh, **noisy},
                age=age + 1,
            )
            scalars["momentum"] = torch.maximum(scalars.get("momentum", zero), decay)
        return replace(proposal, changes=changes, scalars=scalars, motions=found)

    @property
    def is_none(self) -> bool:
        """Whether nothing is ever carried over."""
        return self.momentum.decay == 0 and not self.shrinkage.active

    def _noisy(self, side: Side, fresh: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The part of a step that is shrunk: that of a guide, its networks left out."""
        if side.role != "guide" or not self.shrinkage.active:
            return {}
        networks = {n for b in side.plan.blocks.values() if b.network for n in b.params}
        return {name: change for name, change in fresh.items() if name not in networks}

    def _share(
        self, before: Motion, fresh: Mapping[str, Tensor], gradients: Mapping[str, Tensor]
    ) -> tuple[Motion, Tensor]:
        """The motion with new running means, and the share of signal, 1 before the second step."""
        one = torch.ones_like(before.age)
        if not before.fresh:
            return before, one
        keep = self.shrinkage.decay
        agreement = torch.lerp(_inner(gradients, before.fresh, one), before.agreement, keep)
        power = torch.lerp(_inner(gradients, fresh, one), before.power, keep)
        # Both are negative where steps go downhill.
        share = torch.where(power < 0, agreement / power, one).clamp(0, 1)
        return replace(before, agreement=agreement, power=power), share


def within(
    proposal: Proposal, sides: Mapping[Role, Side], gradients: Mapping[str, Tensor], factor: Tensor
) -> Proposal:
    """A step whose natural part is shortened, and what it leaves to later ones with it.

    Args:
        proposal: a step with its motions.
        sides: curvature that it was made with.
        gradients: by parameter.
        factor: at most 1.

    Returns:
        The step.
    """
    proposal = shaped(proposal, sides, gradients, Shape(natural=factor))
    motions = {
        role: replace(
            motion, changes={n: proposal.changes.get(n, old) for n, old in motion.changes.items()}
        )
        for role, motion in proposal.motions.items()
    }
    return replace(proposal, motions=motions)


def _inner(first: Mapping[str, Tensor], second: Mapping[str, Tensor], like: Tensor) -> Tensor:
    """Σ of products over the parameters that both have."""
    parts = [inner(first[name], second[name]).to(like) for name in first if name in second]
    return torch.stack(parts).sum() if parts else torch.zeros_like(like)
