"""`NaturalSVI`: the imperative shell, and the only writer of parameters."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro import poutine
from pyro.infer import ELBO, Trace_ELBO
from pyro.util import get_rng_state, set_rng_state
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pyronat.curvature import Curvature, mix
from pyronat.errors import InvalidData, NonFiniteStep, StructureChanged
from pyronat.expectation import LossObserver, check_simulable, dream_curvature, exact_curvature
from pyronat.geometry import Full
from pyronat.graph import BayesNet
from pyronat.loss_traces import watch_traces
from pyronat.optim import NaturalGradient, Proposal, restore, state_of
from pyronat.programs import MAX_BRANCHES, KnownProgram, UnknownStructure, know, learn
from pyronat.sides import Role, Side
from pyronat.tracing import (
    own_random_numbers,
    params_of,
    random_state,
    set_random_state,
    stored_parameters,
)

MAX_REJECTED = 3
"""Rejected steps in a row after which training stops with an error."""


@dataclass(frozen=True)
class StepInfo:
    """What one step did.

    Attributes:
        step: number of the step, from 0.
        loss: in nats.
        accepted: whether the parameters were changed.
        lr: learning rate.
        kl: ½ lr² dᵀGd of the natural blocks in nats, summed over what the loss sums over.
        grad_norm: Euclidean norm of the gradient of the natural blocks.
        natural_norm: √(gᵀ(G + λ)⁻¹g) of the natural blocks.
        cosine: of the angle between gradient and natural gradient.
        damping: mean λ over units.
        jitter: largest diagonal added to factor a block, beyond the damping.
        mixing: share of the full geometry in the metric of the model; 1 for `Full`.
        ess: mean effective sample size of the importance weights, or None.
        refreshed: whether curvature was measured.
        seconds: wall-clock time of the step.
    """

    step: int
    loss: float
    accepted: bool
    lr: float
    kl: float
    grad_norm: float
    natural_norm: float
    cosine: float
    damping: float
    jitter: float
    mixing: float
    ess: float | None
    refreshed: bool
    seconds: float


class NaturalSVI:
    """Stochastic variational inference with natural gradients; mirrors `pyro.infer.SVI`.

    A step that is not finite is rejected: parameters and optimizer stay as they were.

    Args:
        model: a Pyro model.
        guide: its guide.
        optim: a `NaturalGradient`.
        loss: a Pyro ELBO that makes traces, or `pyronat.ReweightedWakeSleep`.

    Raises:
        TypeError: if `optim` is not a `NaturalGradient`.

    Example:
        >>> import pyro, pyro.distributions as dist, pyronat, torch
        >>> def model(x):
        ...     loc = pyro.param("loc", torch.tensor(0.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
        >>> pyro.clear_param_store()
        >>> no_damping = pyronat.steps.ConstantDamping(0.0)
        >>> optim = NaturalGradient(lr=1.0, geometry=Full("posterior"), damping=no_damping)
        >>> svi = NaturalSVI(model, lambda x: None, optim)
        >>> _ = svi.step(torch.tensor([1.0, 2.0, 6.0]))
        >>> round(pyro.param("loc").item(), 4)
        3.0
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        optim: NaturalGradient,
        loss: ELBO | None = None,
    ) -> None:
        if not isinstance(optim, NaturalGradient):
            raise TypeError(
                f"optim must be a pyronat.NaturalGradient, not {type(optim).__name__}; "
                "pass other optimizers as NaturalGradient(others=...)"
            )
        self.model, self.guide, self.optim = model, guide, optim
        self.loss = Trace_ELBO() if loss is None else loss
        self._analyzed = False
        self.info: StepInfo | None = None
        self._rejected = 0

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
        """Estimate of the loss in nats; nothing is changed."""
        with torch.no_grad():
            return float(self.loss.loss(self.model, self.guide, *args, **kwargs))

    def step(self, *args: Any, **kwargs: Any) -> float:
        """Takes one step on the loss of model and guide.

        Args:
            *args: arguments of model and guide.
            **kwargs: keyword arguments of model and guide.

        Returns:
            The loss before the step, in nats.

        Raises:
            InvalidData: if a batch is empty, if an observed value is NaN, or if Pyro or torch
                refuse arguments that are not finite.
            StructureChanged: if a program takes a branch that cannot be analyzed.
            NonFiniteStep: after three rejected steps in a row.
        """
        start = time.perf_counter()
        if not self._analyzed:
            with _explained(args, kwargs):
                self._analyze(args, kwargs)
        state = get_rng_state(), random_state()
        for _ in range(MAX_BRANCHES):
            try:
                return self._try_step(start, args, kwargs)
            except UnknownStructure as unknown:
                self._learn(unknown, args, kwargs)
                set_rng_state(state[0])
                set_random_state(state[1])
        raise StructureChanged(
            f"the programs took {MAX_BRANCHES} branches in one step that were all new"
        )

    def _try_step(self, start: float, args: Sequence[Any], kwargs: Mapping[str, Any]) -> float:
        """One step, or none if a program takes a branch that is not known."""
        optim = self.optim
        refresh = optim.refresh_due
        observer = self._observer(refresh)
        sides: Mapping[Role, Side] = optim.sides
        proposal = None
        with poutine.trace(param_only=True) as capture:
            try:
                loss = self._backward(observer, args, kwargs)
                params = params_of(capture.trace)
                gradients = {name: _gradient(leaf) for name, leaf in params.items()}
                optim.check_params(gradients)
                if math.isfinite(loss) and _all_finite(gradients.values()):
                    if refresh:
                        sides = optim.refreshed(self._curvature(observer, args, kwargs))
                    proposal = optim.propose(sides, gradients)
                accepted = proposal is not None and self._apply(proposal, params)
            finally:
                for leaf in params_of(capture.trace).values():
                    leaf.grad = None
        info = self._describe(loss, accepted, sides, proposal, refresh, start)
        if accepted and proposal is not None:
            optim.commit(sides, proposal)
        self.info = info
        self._count_rejections(accepted, observer, info)
        return loss

    @property
    def net(self) -> BayesNet | None:
        """The network of the model with the guide's, over all branches seen; None before."""
        if not self._analyzed:
            return None
        sides = self.optim.sides
        return replace(sides["model"].net, guide=sides["guide"].net)

    def _analyze(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Creates the parameters as a first evaluation of the loss would, then plans the blocks.

        Random numbers are used up only if parameters are created, so that their initial values are
        those of stock SVI and independent of the first draws, and resuming disturbs nothing.
        """
        stored = stored_parameters()
        with torch.random.fork_rng(), poutine.block(), torch.no_grad():
            guide_trace = poutine.trace(self.guide).get_trace(*args, **kwargs)
            poutine.replay(self.model, trace=guide_trace)(*args, **kwargs)
            after = random_state()
        if stored != stored_parameters():
            set_random_state(after)
        model, guide = know(self.model, args, kwargs), know(self.guide, args, kwargs)
        self._check_simulable(model)
        self.optim.bind({"model": model, "guide": guide})
        self._analyzed = True

    def _check_simulable(self, model: KnownProgram) -> None:
        if {"dreams", "exact"} & self.optim.geometry.sources.keys():
            check_simulable(model.net)

    def _learn(
        self, unknown: UnknownStructure, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> None:
        """Analyzes the branch that a program took, and plans the blocks anew."""
        programs = {role: side.plan.program for role, side in self.optim.sides.items()}
        if unknown.known is programs["model"]:
            programs["model"] = learn(unknown, self.model, args, kwargs)
            self._check_simulable(programs["model"])
        else:
            programs["guide"] = learn(unknown, self.guide, args, kwargs)
        self.optim.replan(programs)

    def _observer(self, refresh: bool) -> LossObserver:
        model, guide = self.optim.sides["model"], self.optim.sides["guide"]
        measured = set()
        if refresh and ("posterior" in model.geometry.sources or not model.natural):
            measured.add("model")
        if refresh and guide.plan.blocks:
            measured.add("guide")
        return LossObserver(
            model.plan,
            guide.plan,
            frozenset(measured),
            num_particles=self.loss.num_particles,
            wake_share=getattr(self.loss, "insomnia", 1.0),
            num_sleep_particles=getattr(self.loss, "num_sleep_particles", 1),
            guide_matrix=guide.natural,
        )

    def _backward(
        self, observer: LossObserver, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> float:
        """Differentiates the loss and checks that the programs are those that were analyzed.

        Args:
            observer: measures the traces of the loss.
            args: arguments of model and guide.
            kwargs: their keyword arguments.

        Returns:
            The loss in nats.

        Raises:
            InvalidData: where Pyro or torch refuse arguments that are not finite, or empty.
        """
        with _explained(args, kwargs), watch_traces(self.loss, observer):
            loss = self.loss.loss_and_grads(self.model, self.guide, *args, **kwargs)
        return float(loss[0] if isinstance(loss, tuple) else loss)

    def _curvature(
        self, observer: LossObserver, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> dict[Role, dict[str, Curvature]]:
        """New estimates of the curvature of both sides."""
        sides = self.optim.sides
        model = sides["model"]
        found: dict[Role, dict[str, Curvature]] = {}
        parts: list[tuple[float, dict[str, Curvature]]] = []
        with own_random_numbers(_mixed(self.optim.seed, self.optim.step_count)):
            for source, share in model.geometry.sources.items():
                if source == "dreams":
                    runs = model.geometry.num_runs if isinstance(model.geometry, Full) else 1
                    part = dream_curvature(self.model, args, kwargs, model.plan, runs)
                elif source == "exact":
                    part = exact_curvature(self.model, args, kwargs, model.plan)
                else:
                    part = observer.model_curvature()
                parts.append((share, part))
            if not model.natural:
                parts.append((1.0, observer.model_curvature(with_matrix=False)))
            found["model"] = _weighted(parts)
            guide = sides["guide"]
            if guide.plan.blocks:
                if "exact" in guide.geometry.sources:
                    found["guide"] = exact_curvature(self.guide, args, kwargs, guide.plan)
                else:
                    found["guide"] = observer.guide_curvature()
        return found

    def _apply(self, proposal: Proposal, params: Mapping[str, Tensor]) -> bool:
        """Changes all parameters, or none if anything is not finite."""
        if not _all_finite(proposal.changes.values()):
            return False
        kinds = self.optim.assignment(list(params))
        others = {name: params[name] for name, kind in kinds.items() if kind == "others"}
        moved = {name: leaf for name, leaf in others.items() if leaf.requires_grad}
        with torch.no_grad():
            before = {name: leaf.clone() for name, leaf in moved.items()}
        if moved:
            optimizer = self.optim.other_optimizer()
            snapshot = state_of(optimizer)
            optimizer([moved[name] for name in sorted(moved)])
            if not _all_finite(moved.values()):
                with torch.no_grad():
                    for name, leaf in moved.items():
                        leaf.copy_(before[name])
                restore(optimizer, snapshot)
                return False
        with torch.no_grad():
            for name, change in proposal.changes.items():
                if name in params:
                    params[name].add_(change)
        return True

    def _describe(
        self,
        loss: float,
        accepted: bool,
        sides: Mapping[Role, Side],
        proposal: Proposal | None,
        refreshed: bool,
        start: float,
    ) -> StepInfo:
        names = ("kl", "grad_norm", "natural_norm", "cosine", "damping")
        values = [math.nan] * len(names)
        if proposal is not None:
            values = torch.stack([proposal.scalars[name] for name in names]).tolist()
        jitter = max(
            (block.factor.jitter for side in sides.values() for block in side.solved.values()),
            default=0.0,
        )
        ess = getattr(self.loss, "ess", None)
        return StepInfo(
            step=self.optim.step_count,
            loss=loss,
            accepted=accepted,
            lr=self.optim.lr(self.optim.step_count),
            **dict(zip(names, values, strict=True)),
            jitter=jitter,
            mixing=1.0,
            ess=None if ess is None else float(ess),
            refreshed=refreshed,
            seconds=time.perf_counter() - start,
        )

    def _count_rejections(self, accepted: bool, observer: LossObserver, info: StepInfo) -> None:
        if accepted:
            self._rejected = 0
            return
        self._rejected += 1
        for record in observer.model_sites:
            if record.observed and bool(torch.isnan(record.value).any()):
                raise InvalidData(
                    f"the data of site {record.name!r} hold NaN; the step was not taken. Mask "
                    "missing values with poutine.mask, and replace them by any number"
                )
        if self._rejected >= MAX_REJECTED:
            raise NonFiniteStep(
                f"{self._rejected} steps in a row were not finite (loss {info.loss}); parameters "
                "and optimizer are those of the last good step. Lower lr or raise the damping"
            )


def _weighted(parts: Sequence[tuple[float, dict[str, Curvature]]]) -> dict[str, Curvature]:
    """Mean of curvatures with shares that sum to 1."""
    total, mean = parts[0]
    for share, part in parts[1:]:
        total += share
        mean = mix(mean, part, share / total)
    return mean


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _mixed(seed: int, step: int) -> int:
    """A seed for each step, far from the small ones that users choose."""
    return (seed * 1_000_003 + step * 7_919 + 0x9E3779B9) % 2**31


def _all_finite(tensors: Any) -> bool:
    """Whether all entries are finite, with one transfer from the device."""
    sums = [tensor.detach().sum() for tensor in tensors]
    if not sums:
        return True
    first = sums[0]
    return bool(torch.isfinite(torch.stack([part.to(first) for part in sums])).all())


@contextmanager
def _explained(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Generator[None, None, None]:
    """Names the arguments where they are why Pyro or torch raise.

    Args:
        args: arguments of model and guide.
        kwargs: their keyword arguments.

    Yields:
        Nothing.

    Raises:
        InvalidData: if an argument is not finite, or a plate is empty.
        ValueError: as Pyro or torch raise it.
        RuntimeError: as Pyro or torch raise it.
    """
    try:
        yield
    except ZeroDivisionError as error:
        raise InvalidData(f"a plate has no elements, the batch is empty: {error}") from error
    except (ValueError, RuntimeError) as error:
        if not _is_finite((args, kwargs)):
            raise InvalidData(f"an argument holds NaN or infinite values: {error}") from error
        raise


def _is_finite(arguments: Any) -> bool:
    return all(
        bool(torch.isfinite(leaf).all())
        for leaf in tree_leaves(arguments)
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    )
