"""Trying steps: what a step gains, and how to take it back."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from pyro.infer import ELBO
from torch import Tensor

from pyronat.errors import PyronatError
from pyronat.guards import all_finite
from pyronat.optim import NaturalGradient
from pyronat.others import restore, state_of
from pyronat.proposals import Proposal, Unjudged
from pyronat.refresh import Call
from pyronat.steps import Caution
from pyronat.tracing import Program


@dataclass(frozen=True)
class Trial:
    """The outcome of one gradient.

    Attributes:
        proposal: the step, or None if there is none.
        accepted: whether it was taken.
        caution: state of the adaptive rule afterwards.
        used: state of the adaptive rule that the step was made with.
        tries: steps that were tried.
        finite: whether the loss, the gradient and one of the steps were finite.
    """

    proposal: Proposal | None
    accepted: bool
    caution: Caution
    used: Caution
    tries: int
    finite: bool


class Undo:
    """Takes parameters and the optimizer of those without a metric back to where they are now."""

    def __init__(self, params: Mapping[str, Tensor], optim: NaturalGradient) -> None:
        self._before = {name: leaf.detach().clone() for name, leaf in params.items()}
        self._params = params
        self._others = optim.other_optimizer()
        self._state = state_of(self._others)

    def __call__(self) -> None:
        """Takes them back."""
        with torch.no_grad():
            for name, leaf in self._params.items():
                leaf.copy_(self._before[name])
        restore(self._others, self._state)


def applied(proposal: Proposal, params: Mapping[str, Tensor], optim: NaturalGradient) -> bool:
    """Takes a step: changes all parameters, or none if anything is not finite.

    Args:
        proposal: the step of those with a metric, and of the scaled Adam.
        params: unconstrained leaves by name, with gradients.
        optim: the optimizer, which moves the others.

    Returns:
        Whether the parameters were changed.
    """
    if not all_finite(proposal.changes.values()):
        return False
    kinds = optim.assignment(list(params))
    others = {name: params[name] for name, kind in kinds.items() if kind == "others"}
    moved = {name: leaf for name, leaf in others.items() if leaf.requires_grad}
    with torch.no_grad():
        before = {name: leaf.clone() for name, leaf in moved.items()}
    if moved:
        optimizer = optim.other_optimizer()
        snapshot = state_of(optimizer)
        optimizer([moved[name] for name in sorted(moved)])
        if not all_finite(moved.values()):
            _put(moved, before)
            restore(optimizer, snapshot)
            return False
    with torch.no_grad():
        for name, change in proposal.changes.items():
            if name in params:
                params[name].add_(change)
    return True


def gradient_of(leaf: Tensor) -> Tensor:
    """The gradient of a leaf, 0 where it has none."""
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


@dataclass(frozen=True)
class Judge:
    """Evaluates the loss at other parameters, on the random numbers of a call.

    Attributes:
        model: the model.
        guide: its guide.
        loss: the loss of both.
    """

    model: Program
    guide: Program
    loss: ELBO

    def evaluate(self, call: Call) -> float:
        """The loss in nats; NaN where it cannot be computed."""
        try:
            with call.replayed(), torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return float(self.loss.loss(self.model, self.guide, *call.args, **call.kwargs))
        except (ValueError, RuntimeError, PyronatError):
            return math.nan

    def gain(self, last: Unjudged, params: Mapping[str, Tensor], loss: float, call: Call) -> float:
        """What an earlier step of the model gains on another batch.

        Args:
            last: the step.
            params: unconstrained leaves by name; they are the same afterwards.
            loss: of the batch after the step, in nats.
            call: arguments and random numbers of the batch.

        Returns:
            Its gain in nats; 0 where the loss before it is not finite.
        """
        before = {name: value for name, value in last.before.items() if name in params}
        now = {name: params[name].detach().clone() for name in before}
        try:
            _put(params, before)
            gain = self.evaluate(call) - loss
        finally:
            _put(params, now)
        return gain if math.isfinite(gain) else 0.0

    def gain_ratio(
        self,
        proposal: Proposal,
        gradients: Mapping[str, Tensor],
        params: Mapping[str, Tensor],
        loss: float,
        call: Call,
    ) -> float:
        """Actual gain of a step that has been taken over the predicted one.

        The gain is measured on the random numbers of the gradient. Where it drowns in rounding, it
        is the trapezoid ½ (g₀ + g₁)ᵀ d instead, with the gradients before and after the step.

        Args:
            proposal: the step.
            gradients: before the step, by parameter.
            params: unconstrained leaves by name.
            loss: before the step, in nats.
            call: arguments and random numbers.

        Returns:
            The ratio; −∞ where the loss is not finite or cannot be computed.
        """
        predicted = float(proposal.scalars["gain"])
        if not predicted > 0:
            return -math.inf
        gain = loss - self.evaluate(call)
        lost = 1e-10 * max(1.0, abs(loss))
        if abs(gain) < lost and predicted < 100 * lost:
            try:
                after = self._gradients(params, gradients, call)
            except (ValueError, RuntimeError, PyronatError):
                return -math.inf
            gain = -sum(
                float(((gradients[name] + after[name]) * change).sum()) / 2
                for name, change in proposal.changes.items()
            )
        return gain / predicted if math.isfinite(gain) else -math.inf

    def _gradients(
        self, params: Mapping[str, Tensor], before: Mapping[str, Tensor], call: Call
    ) -> dict[str, Tensor]:
        """Gradients of the loss by parameter; those that the leaves hold are put back."""
        for leaf in params.values():
            leaf.grad = None
        try:
            with call.replayed():
                self.loss.loss_and_grads(self.model, self.guide, *call.args, **call.kwargs)
            return {name: gradient_of(leaf) for name, leaf in params.items()}
        finally:
            for name, leaf in params.items():
                leaf.grad = before[name]


@torch.no_grad()
def _put(params: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        params[name].copy_(value)
