"""Which number of a step an adaptive rule sets, if one does."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pyronat.geometry import Geometry, Visible
from pyronat.steps import (
    Caution,
    Clip,
    CrossValidated,
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
        compared: compares what minibatches say of each other, or None; it judges no step.
        what: what is adapted, and by which rule.
        geometry: of the model.
    """

    search: LevenbergMarquardt | None
    held_out: HeldOut | None
    compared: CrossValidated | None
    what: str
    geometry: Geometry

    @property
    def active(self) -> bool:
        """Whether there is a rule that judges steps."""
        return self.search is not None or self.held_out is not None

    def start(self) -> Caution | None:
        """The state of the rule at the start, or None."""
        rule = self.search or self.held_out or self.compared
        return None if rule is None else rule.start()

    def mixing(self, caution: Caution | None, step: int) -> float | RetainedShare:
        """ρ of the model's geometry at a step, or the rule for it by district.

        Args:
            caution: state of the rule, or None.
            step: number of the step.

        Returns:
            ρ or its rule; 1 for a geometry that mixes nothing.
        """
        if not isinstance(self.geometry, Visible):
            return 1.0
        mixing = self.geometry.mixing
        if isinstance(mixing, (LevenbergMarquardt, HeldOut, CrossValidated)):
            assert caution is not None
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
    kinds = (LevenbergMarquardt, HeldOut, CrossValidated)
    found = [rule for rule in (mixing, damping) if isinstance(rule, kinds)]
    if len(found) > 1:
        raise ValueError("either mixing or damping is adapted, not both")
    rule = found[0] if found else None
    if rule is None:
        return Adaptation(None, None, None, "no adaptive rule", geometry)
    search = rule if isinstance(rule, LevenbergMarquardt) else None
    if search is not None and (isinstance(lr, PerName) or clip.natural < math.inf):
        raise ValueError("an adaptive rule sets the length of steps: no PerName, no Clip")
    held_out = rule if isinstance(rule, HeldOut) else None
    compared = rule if isinstance(rule, CrossValidated) else None
    what = f"{'damping' if rule is damping else 'mixing'} by {type(rule).__name__}"
    return Adaptation(search, held_out, compared, what, geometry)
