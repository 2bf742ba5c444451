"""Trying steps: what a step gains, and how to take it back."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from pyro.infer import ELBO
from torch import Tensor

from pyronat.errors import Diverged, InvalidData, NonFiniteStep, PyronatError
from pyronat.guards import all_finite
from pyronat.optim import NaturalGradient
from pyronat.others import state_of, with_moments_of
from pyronat.proposals import Before, Proposal
from pyronat.records import SiteRecord
from pyronat.refresh import Call
from pyronat.sides import Role, Side
from pyronat.steps import Caution, Evidence, Rejection, Searched, Tally
from pyronat.tracing import Program, inside_support, stored_leaves
from pyronat.validation import after_step, ahead, compared

log = logging.getLogger(__name__)

MAX_REJECTED = 3
"""Rejected steps in a row after which training stops with an error."""

MAX_SHORTER = 20
"""Steps that are tried with one gradient until one stays in the support of all parameters."""


@dataclass(frozen=True)
class Trial:
    """The outcome of one gradient.

    Attributes:
        proposal: the step, or None if there is none.
        accepted: whether it was taken.
        caution: state of the adaptive rule afterwards, or None.
        used: that which the step was made with.
        tries: steps that were tried.
        finite: whether the loss, the gradient and one of the steps were finite.
    """

    proposal: Proposal | None
    accepted: bool
    caution: Caution | None
    used: Caution | None
    tries: int
    finite: bool


class Suspect(Exception):
    """A loss that the last step may be to blame for; whoever took the step decides.

    Attributes:
        loss: in nats; NaN where it cannot be computed.
        data: number of data that it counts.
        error: why it cannot be computed, or None.
    """

    def __init__(self, loss: float, data: float = 1.0, error: Exception | None = None) -> None:
        super().__init__(f"a loss of {loss} nats on {data} data")
        self.loss, self.data, self.error = loss, data, error


def watch_loss(optim: NaturalGradient, loss: float, data: float, judged: bool) -> None:
    """Remembers a loss, and with it that the last step was kept.

    Args:
        optim: the optimizer.
        loss: in nats; NaN where the gradient is not finite.
        data: number of data that it counts.
        judged: whether it is known already that the last step is not to blame.

    Raises:
        Suspect: if the last step may be to blame.
    """
    rule, value = optim.rejection, loss / data
    if rule is None:
        return
    if rule.suspects(optim.watch, value):
        if optim.last is not None and not judged:
            raise Suspect(loss, data)
        if math.isfinite(value):
            optim.watch = rule.anew(optim.watch, value)
    else:
        watch = rule.seen(optim.watch, value)
        optim.watch = watch if optim.last is None else rule.kept(watch)


def compare(optim: NaturalGradient, gradients: Mapping[str, Tensor]) -> None:
    """Compares a new batch with earlier ones, where a rule of the optimizer asks for it.

    Args:
        optim: the optimizer.
        gradients: of the batch, by parameter name.
    """
    rule, evidence = optim.adaptation.compared, optim.caution
    if rule is not None and isinstance(evidence, Evidence):
        rates = ahead(optim.lr, optim.step_count)
        optim.caution = compared(rule, optim.sides["model"], evidence, gradients, rates)


class Undo:
    """Takes parameters and the optimizer's state back to where they are now."""

    def __init__(self, params: Mapping[str, Tensor], optim: NaturalGradient) -> None:
        values = {name: leaf.detach().clone() for name, leaf in params.items()}
        self.before = Before(values, optim.moving_state(), dict(params))
        self._optim = optim

    def __call__(self) -> None:
        """Takes them back."""
        _put(self.before.leaves or {}, self.before.params)
        self._optim.take(self.before.state)


@contextmanager
def before_last_step(optim: NaturalGradient) -> Generator[bool, None, None]:
    """In this context parameters are those before the last step.

    Args:
        optim: the optimizer.

    Yields:
        Whether they are known; otherwise nothing is changed.
    """
    last = optim.last
    leaves = None if last is None else last.leaves_in(stored_leaves())
    if last is None or leaves is None:
        yield False
        return
    now = {name: leaf.detach().clone() for name, leaf in leaves.items()}
    _put(leaves, last.params)
    try:
        yield True
    finally:
        _put(leaves, now)


def applied(
    proposal: Proposal, params: Mapping[str, Tensor], optim: NaturalGradient, undo: Undo
) -> bool:
    """Takes a step.

    Args:
        proposal: the step of those with a metric, and of the scaled Adam.
        params: unconstrained leaves by name, with gradients.
        optim: the optimizer, which moves the others.
        undo: takes the step back; called where something is not finite or out of its support.

    Returns:
        Whether the parameters were changed.
    """
    if not all_finite(proposal.changes.values()):
        return False
    kinds = optim.assignment(list(params))
    moved = {n: p for n, p in params.items() if kinds[n] == "others" and p.requires_grad}
    with torch.no_grad():
        if moved:
            optim.other_optimizer()([moved[name] for name in sorted(moved)])
        for name, leaf in moved.items() if optim.watch.factor < 1 else ():
            leaf.copy_(torch.lerp(undo.before.params[name], leaf, optim.watch.factor))
        for name, change in proposal.changes.items():
            if name in params:
                params[name].add_(change)
    good = all_finite(moved.values()) and (optim.rejection is None or inside_support(params))
    if not good:
        undo()
    return good


def taken(
    sides: Mapping[Role, Side],
    gradients: Mapping[str, Tensor],
    params: Mapping[str, Tensor],
    optim: NaturalGradient,
) -> Trial:
    """Takes the step of a gradient, or a shorter one where that leaves the support of a parameter.

    Args:
        sides: curvature to use.
        gradients: by parameter name.
        params: unconstrained leaves by name.
        optim: the optimizer.

    Returns:
        What came of it.
    """
    undo, watch, rule = Undo(params, optim), optim.watch, optim.rejection
    proposal = whole = optim.propose(sides, gradients)
    most = 1 if rule is None else MAX_SHORTER
    for tries in range(1, most + 1):
        proposal = optim.carried(sides, optim.shaped(sides, whole, gradients), gradients)
        watched = _watched(optim, proposal, params)
        if applied(proposal, params, optim, undo):
            optim.last = None if rule is None else undo.before
            return Trial(proposal, True, watched, optim.caution, tries, True)
        optim.watch = watch if rule is None else rule.shorter(optim.watch)
    optim.watch = watch  # shorter steps are no way out
    return Trial(proposal, False, optim.caution, optim.caution, most, False)


def _watched(
    optim: NaturalGradient, proposal: Proposal, params: Mapping[str, Tensor]
) -> Caution | None:
    """The state of the adaptive rule with what the next batch needs to judge a step."""
    caution, model = optim.caution, optim.sides["model"]
    if isinstance(caution, Evidence):
        return after_step(caution, model, proposal.changes)
    if not isinstance(caution, Tally):
        return caution
    owned = model.plan.owner()
    names = [name for name in proposal.changes if name in owned and name in params]
    before = {name: params[name].detach().clone() for name in names}
    return replace(caution, before=before, promised=float(proposal.scalars["model_gain"]))


def check_finite(trial: Trial, sites: Iterable[SiteRecord], loss: float, rejected: int) -> None:
    """Raises where data or several steps in a row are at fault.

    Args:
        trial: what came of the gradient.
        sites: of the model, in a run of the loss.
        loss: in nats.
        rejected: steps in a row that were not finite.

    Raises:
        InvalidData: if the step was not finite, nor is an observed value.
        NonFiniteStep: after several steps in a row that were not finite.
    """
    if trial.finite:
        return
    log.warning("a step was not taken: loss %g, %d in a row that were not finite", loss, rejected)
    for record in sites:
        if record.observed and not bool(torch.isfinite(record.value).all()):
            raise InvalidData(
                f"the data of site {record.name!r} hold NaN or infinite values; the step was not "
                "taken. Mask missing values with poutine.mask, and replace them by any number"
            )
    if rejected >= MAX_REJECTED:
        raise NonFiniteStep(
            f"{rejected} steps in a row were not finite (loss {loss}); parameters "
            "and optimizer are those of the last good step. Lower lr or raise the damping"
        )


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

    def took_back(self, optim: NaturalGradient, call: Call, suspect: Suspect) -> bool:
        """Takes the last step back, if it is to blame for a loss.

        Args:
            optim: the optimizer.
            call: arguments and random numbers of the loss.
            suspect: the loss after the step.

        Returns:
            Whether the step was taken back.

        Raises:
            Diverged: if it was one too many in a row.
        """
        rule, last, data = optim.rejection, optim.last, suspect.data
        if rule is None or last is None:
            return False
        with before_last_step(optim) as known:
            before = self.evaluate(call) if known else math.nan
        if not rule.blames(optim.watch, suspect.loss / data, before / data):
            return False
        _take_back(optim, rule, last)
        undone, best = optim.watch.undone, optim.watch.best
        if undone > rule.max_undone:
            optim.watch = replace(optim.watch, undone=0)
            raise Diverged(
                f"{undone} steps in a row were taken back, although each was half as long as the "
                f"one before: after the last one the loss was {suspect.error or suspect.loss}, "
                f"before it {before:.6g} nats, at best {best:.4g} per datum. Parameters and "
                "optimizer are those of the last good step. Lower lr, or bound steps with "
                "trust_region=KLTrustRegion(1.0)"
            ) from suspect.error
        return True

    def settled(self, optim: NaturalGradient, call: Call) -> bool:
        """Takes the last step back, if the loss is lower before it; see `NaturalSVI.settle`.

        Args:
            optim: the optimizer.
            call: arguments and random numbers of the loss.

        Returns:
            Whether the step was taken back.

        Raises:
            InvalidData: if the loss is finite neither before nor after the step.
            ValueError: if nothing is ever kept to go back to.
        """
        rule, last = optim.rejection, optim.last
        if rule is None:
            raise ValueError(
                "NaturalGradient(rejection=None) keeps no parameters to go back to; give it a "
                "pyronat.steps.Rejection()"
            )
        if last is None:
            return False
        after = self.evaluate(call)
        with before_last_step(optim) as known:
            before = self.evaluate(call) if known else math.nan
        if not (math.isfinite(before) or math.isfinite(after)):
            raise InvalidData(
                f"the loss is {after} after the last step and {before} before it: these data do "
                "not tell which is better, and nothing was changed. evaluate_loss on them shows "
                "the cause"
            )
        if after <= before or not math.isfinite(before):
            return False
        _take_back(optim, rule, last)
        return True

    def gain(
        self,
        earlier: Mapping[str, Tensor],
        params: Mapping[str, Tensor],
        loss: float,
        call: Call,
    ) -> float:
        """What an earlier step of the model gains on another batch.

        Args:
            earlier: parameters before the step, by name.
            params: unconstrained leaves by name; they are the same afterwards.
            loss: of the batch after the step, in nats.
            call: arguments and random numbers of the batch.

        Returns:
            Its gain in nats; 0 where the loss before it is not finite.
        """
        before = {name: value for name, value in earlier.items() if name in params}
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


def _take_back(optim: NaturalGradient, rule: Rejection, last: Before) -> None:
    """Parameters and optimizer are those before the last step, and further ones shorter."""
    _put(stored_leaves(), last.params)
    others = with_moments_of(last.state["others"], state_of(optim.other_optimizer()))
    optim.take({**last.state, "others": others})
    optim.last, optim.watch = None, rule.shorter(optim.watch)
    if optim.rule is not None and isinstance(optim.caution, Searched):
        optim.caution = optim.rule.judged(optim.caution, -math.inf)
    step, factor = optim.step_count - 1, optim.watch.factor
    log.warning("step %d was taken back, further ones have the factor %g", step, factor)


@torch.no_grad()
def _put(params: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        params[name].copy_(value)
