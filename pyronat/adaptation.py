"""Which number of a step an adaptive rule sets, if one does."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pyronat.geometry import Geometry, Visible
from pyronat.steps import (
    Caution,
    Clip,
    Damping,
    HeldOut,
    LevenbergMarquardt,
    Momentum,
    PerName,
    RetainedShare,
    Schedule,
    Shrinkage,
)


@dataclass(frozen=True)
class Adaptation:
    """The adaptive rule among the options of an optimizer.

    Attributes:
        search: judges each step by the loss that made it, or None.
        held_out: judges it by the next minibatch, or None.
        what: what is adapted, and by which rule.
        geometry: of the model.
    """

    search: LevenbergMarquardt | None
    held_out: HeldOut | None
    what: str
    geometry: Geometry

    @property
    def active(self) -> bool:
        """Whether there is a rule."""
        return self.search is not None or self.held_out is not None

    def start(self) -> Caution:
        """The state of the rule at the start."""
        rule = self.search or self.held_out
        return Caution() if rule is None else rule.start()

    def mixing(self, caution: Caution, step: int) -> float | RetainedShare:
        """ρ of the model's geometry at a step, or the rule for it by district.

        Args:
            caution: state of the rule.
            step: number of the step.

        Returns:
            ρ or its rule; 1 for a geometry that mixes nothing.
        """
        if not isinstance(self.geometry, Visible):
            return 1.0
        mixing = self.geometry.mixing
        if isinstance(mixing, (LevenbergMarquardt, HeldOut)):
            return caution.value
        if isinstance(mixing, RetainedShare):
            return mixing
        return float(mixing(step)) if callable(mixing) else float(mixing)

    def momentum(self, asked: Momentum | None) -> Momentum:
        """The momentum of steps, none by default where they are judged by their gain.

        Args:
            asked: what the user asks for, or None.

        Returns:
            The momentum.

        Raises:
            ValueError: if steps are judged, and momentum is asked for.
        """
        if asked is not None and asked.decay and self.active:
            raise ValueError("a rule that judges steps by their gain takes them without momentum")
        return asked or (Momentum(0.0) if self.active else Momentum())

    def shrinkage(self, asked: Shrinkage | None) -> Shrinkage:
        """The shrinkage of a guide's steps, none by default where they are judged."""
        return asked or (Shrinkage(least=1.0) if self.active else Shrinkage())


def adaptation(
    geometry: Geometry, damping: Damping | LevenbergMarquardt, lr: Schedule, clip: Clip
) -> Adaptation:
    """Finds the adaptive rule.

    Args:
        geometry: of the model; its mixing may be adapted.
        damping: may be adapted.
        lr: the learning rate.
        clip: bounds on gradients.

    Returns:
        The rule, or that there is none.

    Raises:
        ValueError: if there are two, or if something else shapes its steps.
    """
    mixing = geometry.mixing if isinstance(geometry, Visible) else None
    found = [rule for rule in (mixing, damping) if isinstance(rule, LevenbergMarquardt)]
    if len(found) > 1:
        raise ValueError("either mixing or damping is adapted, not both")
    if found and (isinstance(lr, PerName) or clip.natural < math.inf):
        raise ValueError("an adaptive rule sets the length of steps: no PerName, no Clip")
    held_out = mixing if isinstance(mixing, HeldOut) else None
    rule = found[0] if found else held_out
    if rule is None:
        return Adaptation(None, None, "no adaptive rule", geometry)
    name = "damping" if rule is damping else "mixing"
    search = found[0] if found else None
    return Adaptation(search, held_out, f"{name} by {type(rule).__name__}", geometry)
