"""`NaturalSVI`: the imperative shell, and the only writer of parameters."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Generator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

import torch
from pyro import poutine
from pyro.infer import ELBO, Trace_ELBO
from pyro.util import get_rng_state
from torch import Tensor

from pyronat.averaging import Exchange
from pyronat.buffers import kept_buffers, noted_buffers
from pyronat.checkpoints import Claims, read, write
from pyronat.errors import NoAverage, NonFiniteStep, StructureChanged
from pyronat.expectation import Averaging, LossObserver, check_simulable
from pyronat.geometry import Visible
from pyronat.graph import BayesNet
from pyronat.guards import all_finite, explained, inside_domain
from pyronat.loss_traces import check_loss, number_of, watch_traces
from pyronat.optim import NaturalGradient
from pyronat.programs import (
    MAX_BRANCHES,
    KnownProgram,
    UnknownStructure,
    check_same_program,
    know,
    learn,
)
from pyronat.refresh import Call, Meter
from pyronat.reports import StepInfo, describe
from pyronat.resume import resume, training_state
from pyronat.sides import Role, Side
from pyronat.steps import Searched, Tally
from pyronat.telling import tell
from pyronat.tracing import (
    FreshTransforms,
    create_parameters,
    data_count,
    guide_messenger,
    own_torch_numbers,
    params_of,
    random_state,
    stored_leaves,
)
from pyronat.trials import (
    Judge,
    Suspect,
    Trial,
    Undo,
    applied,
    before_last_step,
    check_finite,
    compare,
    gradient_of,
    taken,
    watch_loss,
)

Callback: TypeAlias = Callable[[StepInfo, "NaturalSVI"], None]
"""Called after each step with its report and the training."""


class NaturalSVI:
    """Stochastic variational inference with natural gradients; mirrors `pyro.infer.SVI`.

    A step that is not finite is rejected: parameters and optimizer stay as they were. A step after
    which the loss is not finite, or worse beyond noise, is taken back (`steps.Rejection`).

    Args:
        model: a Pyro model.
        guide: its guide.
        optim: a `NaturalGradient`.
        loss: a Pyro ELBO that makes traces, or `pyronat.ReweightedWakeSleep`.
        callbacks: called after each step, in turn, with its `StepInfo` and this object, such as
            `pyronat.JSONLines`. The step has been taken then: what a callback raises ends
            `step`, and parameters and optimizer are those after the step.

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
        >>> no_bound = pyronat.steps.KLTrustRegion(model=float("inf"))
        >>> full = pyronat.Full("posterior")
        >>> optim = NaturalGradient(1.0, full, damping=no_damping, trust_region=no_bound)
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
        callbacks: Sequence[Callback] = (),
    ) -> None:
        if not isinstance(optim, NaturalGradient):
            raise TypeError(
                f"optim must be a pyronat.NaturalGradient, not {type(optim).__name__}; "
                "pass other optimizers as NaturalGradient(others=...)"
            )
        self.model, self.guide, self.optim = model, guide, optim
        self.loss = Trace_ELBO() if loss is None else loss
        self.callbacks = list(callbacks)
        self._analyzed = False
        self._info: StepInfo | Callable[[], StepInfo] | None = None
        self._rejected = self._undone = 0
        self._unclaimed: set[str] = set()
        self._dream_ess: Tensor | None = None
        self._exchange = Exchange()

    @property
    def info(self) -> StepInfo | None:
        """The report of the last step, made when it is first asked for; None before the first."""
        if callable(self._info):
            self._info = self._info()
        return self._info

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
        """Estimate of the loss in nats; nothing is changed."""
        with torch.no_grad(), kept_buffers(), FreshTransforms(), Claims(self._unclaimed):
            return number_of(self.loss.loss(self.model, self.guide, *args, **kwargs))

    @contextmanager
    def averaged(self) -> Generator[None, None, None]:
        """In this context all parameters are the averages of their iterates.

        Whatever reads them sees the averages: `evaluate_loss`, `pyro.infer.Predictive`, modules,
        `pyro.get_param_store().save`. Afterwards, and after errors, the last iterates are back to
        the last bit. A checkpoint to resume from is written outside of the context.

        Yields:
            Nothing.

        Raises:
            NoAverage: if the optimizer has no `averaging`, or a parameter to exchange is not there.
            AveragesInPlace: if the context is entered twice.
            StructureChanged: if a parameter has another shape than its average.

        Example:
            >>> import pyro, pyro.distributions as dist, pyronat, torch
            >>> def model(x):
            ...     loc = pyro.param("loc", torch.tensor(0.0))
            ...     with pyro.plate("data", len(x)):
            ...         pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
            >>> pyro.clear_param_store()
            >>> mean = pyronat.steps.PolyakRuppert(share=1.0)
            >>> optim = NaturalGradient(lr=0.1, averaging=mean)
            >>> svi = NaturalSVI(model, lambda x: None, optim)
            >>> iterates = []
            >>> for step in range(3):
            ...     _ = svi.step(torch.tensor([1.0, 2.0, 6.0]))
            ...     iterates.append(pyro.param("loc").item())
            >>> with svi.averaged():
            ...     abs(pyro.param("loc").item() - sum(iterates) / 3) < 1e-6
            True
        """
        if self.optim.averaging is None:
            raise NoAverage(
                "the optimizer averages no iterates; ask for it with "
                "NaturalGradient(averaging=pyronat.steps.PolyakRuppert())"
            )
        with self._exchange.context(self.optim.averages, stored_leaves()):
            yield

    def get_state(self) -> dict[str, Any]:
        """All that training depends on: optimizer, Pyro's parameters, random numbers."""
        self._exchange.check()
        info = None if self.info is None else dict(vars(self.info))
        return {**training_state(self.optim), "info": info, "rejected": self._rejected}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Takes a state of `get_state`, at once; see `load`.

        Args:
            state: the state.

        Raises:
            CheckpointMismatch: if it is not a state of this class, or of another program; then
                nothing is changed.
            AveragesInPlace: if averages are in the place of parameters.
        """
        self._exchange.check()
        self._unclaimed = resume(self.optim, state)
        self._rejected = state["rejected"]
        self._info = None if state["info"] is None else StepInfo(**state["info"])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes all that training depends on to one file: the way to resume it to the last bit.

        The file holds the state of the optimizer, all of Pyro's parameters with their constraints
        and the states of all random numbers. It is written beside the old one (`path` + ".tmp")
        and takes its place when it is whole: at any time a killed process leaves the old file or
        the new one. Not in it are arguments of steps, settings, states of callbacks, and buffers of
        modules, such as BatchNorm's running means: those are in the modules' own `state_dict`.

        Args:
            path: the file.
        """
        write(self.get_state(), path)

    def load(self, path: str | os.PathLike[str], map_location: Any = None) -> None:
        """Takes what `save` wrote; training goes on as it would have, to the last bit.

        Parameters that are there take their values in place; others are made, and modules take
        them over when they are first run. Parameters of this training that are not in the file
        are removed, as they were made later.

        Args:
            path: the file, loaded with `weights_only=True`.
            map_location: as `torch.load` takes it.

        Raises:
            CheckpointMismatch: if it is of another program, optimizer or format. Before the first
                step the program is not known: then that step raises.
        """
        self.set_state(read(path, map_location))

    def step(self, *args: Any, **kwargs: Any) -> float:
        """Takes one step on the loss of model and guide.

        Args:
            *args: arguments of model and guide.
            **kwargs: keyword arguments of model and guide.

        Returns:
            The loss before the step, in nats.

        Raises:
            InvalidData: if a batch is empty, if an observed value is not finite, or if Pyro or
                torch refuse arguments that are not.
            StructureChanged: if a program takes a branch that cannot be analyzed.
            NonFiniteStep: after three rejected steps in a row.
            Diverged: after several steps in a row that were taken back.
            AveragesInPlace: in the context of `averaged`.
        """
        self._exchange.check()
        start, self._undone = time.perf_counter(), 0
        check_loss(self.loss, (self.model, self.guide))
        judged, first = False, not self._analyzed
        if first:
            self._analyze(args, kwargs)
        call = Call(args, kwargs, (get_rng_state(), random_state()), start)
        for _ in range(MAX_BRANCHES + 1):
            error: Exception | None = None
            try:
                return self._try_step(call, judged)
            except UnknownStructure as unknown:
                self._learn(unknown, call, first)
            except Suspect as suspect:
                judged, error = True, suspect.error
                if Judge(self.model, self.guide, self.loss).took_back(self.optim, call, suspect):
                    self._undone, error = 1, None
            if error is not None:
                raise error
            call.rewind()
        raise StructureChanged(
            f"the programs took {MAX_BRANCHES} branches in one step that were all new"
        )

    def settle(self, *args: Any, **kwargs: Any) -> bool:
        """Judges the last step, which no further one will, and takes it back where it did harm.

        The loss is evaluated after the step and before it, on the same random numbers. Where it is
        lower before, or not finite after, parameters and optimizer go back there. Meant for the end
        of a training, on data that are worth trusting, as the whole data set; no step is taken.

        Args:
            *args: arguments of model and guide.
            **kwargs: keyword arguments of model and guide.

        Returns:
            Whether the step was taken back; False, too, where none was taken or it was so before.

        Raises:
            InvalidData: if the loss of these data is finite neither before nor after the step.
            ValueError: with `rejection=None`, which keeps nothing to go back to.
            AveragesInPlace: in the context of `averaged`.
        """
        self._exchange.check()
        if not self._analyzed and self.optim.last is not None:
            self._analyze(args, kwargs)  # a checkpoint was loaded
        call = Call(args, kwargs, (get_rng_state(), random_state()), time.perf_counter())
        return Judge(self.model, self.guide, self.loss).settled(self.optim, call)

    def _try_step(self, call: Call, judged: bool) -> float:
        """One step, or none if a program takes a branch that is not known."""
        optim = self.optim
        due = optim.due
        observer = self._observer(due)
        sides: Mapping[Role, Side] = optim.sides
        trial = Trial(None, False, optim.caution, optim.caution, 0, False)
        state = optim.caution, optim.watch
        with poutine.trace(param_only=True) as capture, noted_buffers() as buffers:
            try:
                loss = self._backward(observer, call, judged)
                params = params_of(capture.trace)
                gradients = {name: gradient_of(leaf) for name, leaf in params.items()}
                optim.check_params(gradients)
                finite = math.isfinite(loss) and all_finite(gradients.values())
                data = data_count(observer.model_sites)
                watch_loss(optim, loss if finite else math.nan, data, judged)
                if finite:
                    self._judge(params, loss, call)
                    compare(optim, gradients)
                    if due:
                        sides = self._refreshed(due, observer, call, params)
                    optim.shrink(gradients)
                    sides, trial = self._move(sides, gradients, params, loss, call)
            except BaseException:
                optim.caution, optim.watch = state
                buffers.restore()
                raise
            finally:
                for leaf in params_of(capture.trace).values():
                    leaf.grad = None
        if not trial.finite:
            buffers.restore()
        self._rejected = 0 if trial.finite else self._rejected + 1
        samples = getattr(self.loss, "ess", None), self._dream_ess
        report = describe(optim, sides, trial, loss, samples, bool(due), self._rejected)
        if trial.accepted and trial.proposal is not None:
            optim.commit(sides, trial.proposal, trial.caution, params)
            self._exchange.leaves.update(params)
        self._info = partial(report, self._undone, time.perf_counter() - call.start)
        for callback in self.callbacks:
            assert self.info is not None
            callback(self.info, self)
        check_finite(trial, observer.model_sites, loss, self._rejected)
        return loss

    def _refreshed(
        self, due: Set[Role], observer: LossObserver, call: Call, params: Mapping[str, Tensor]
    ) -> dict[Role, Side]:
        """The sides with new estimates of those that are due."""
        optim, meter = self.optim, Meter(self.model, self.guide, self.loss)
        decay, seed = optim.curvature.decay, _mixed(optim.seed, optim.step_count)
        reading = meter.read(due, optim.sides, observer, call, params, seed, decay)
        if "model" in due:
            self._dream_ess = reading.ess
        with own_torch_numbers(seed + 1):
            return optim.refreshed(reading.curvature, reading.visible)

    def _judge(self, params: Mapping[str, Tensor], loss: float, call: Call) -> None:
        """Tries the last step of the model on this batch, where a rule asks for it."""
        rule, tally = self.optim.adaptation.held_out, self.optim.caution
        if rule is not None and isinstance(tally, Tally) and tally.before:
            judge = Judge(self.model, self.guide, self.loss)
            gain = judge.gain(tally.before, params, loss, call)
            self.optim.caution = rule.judged(tally, gain)

    def _move(
        self,
        sides: Mapping[Role, Side],
        gradients: Mapping[str, Tensor],
        params: Mapping[str, Tensor],
        loss: float,
        call: Call,
    ) -> tuple[Mapping[Role, Side], Trial]:
        """Takes the step of a gradient, or under an adaptive rule the first one that gains."""
        optim, rule = self.optim, self.optim.rule
        caution = optim.caution
        if rule is None or not isinstance(caution, Searched):
            return sides, taken(sides, gradients, params, optim)
        finite, judge = False, Judge(self.model, self.guide, self.loss)
        for tries in range(1, rule.max_tries + 1):
            sides = optim.with_caution(sides, caution)
            proposal = optim.propose(sides, gradients, caution)
            undo = Undo(params, optim)
            ratio = -math.inf
            try:
                if applied(proposal, params, optim, undo):
                    finite = True
                    ratio = judge.gain_ratio(proposal, gradients, params, loss, call)
            finally:
                if not rule.accepts(ratio):
                    undo()
            after = rule.judged(caution, ratio, float(proposal.scalars["length"]))
            if rule.accepts(ratio):
                optim.last = None if optim.rejection is None else undo.before
                return sides, Trial(proposal, True, after, caution, tries, True)
            caution = after
        return sides, Trial(proposal, False, caution, caution, tries, finite)

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

        Args:
            args: arguments of model and guide.
            kwargs: their keyword arguments.

        Raises:
            InvalidData: where Pyro or torch refuse arguments that are not finite, or empty.
            ValueError: as Pyro or torch raise it.
            RuntimeError: as Pyro or torch raise it.
        """
        try:
            with explained(args, kwargs):
                self._analyze_here(args, kwargs)
        except (ValueError, RuntimeError):
            # A checkpoint may have been written after a step that is still to be taken back.
            with before_last_step(self.optim) as known:
                if not known:
                    raise
                self._analyze_here(args, kwargs)

    def _analyze_here(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Analyzes the programs at the parameters as they are."""
        create_parameters(self.model, self.guide, args, kwargs, within=Claims(self._unclaimed))
        model = know(self.model, args, kwargs)
        guide = self._of_guide(know(self.guide, args, kwargs), model)
        check_same_program(
            {role: side.net for role, side in self.optim.sides.items()}, model, guide
        )
        self._check_simulable(model)
        self.optim.bind({"model": model, "guide": guide})
        self._analyzed = True
        tell(self.optim, stacklevel=4)

    def _of_guide(self, guide: KnownProgram, model: KnownProgram) -> KnownProgram:
        """The guide without parameters of a model that it only runs along with itself."""
        if guide_messenger(self.guide) is None:
            return guide
        own = [entry for entry in guide.net.without_fisher if entry[0] not in model.net.params]
        return replace(guide, net=replace(guide.net, without_fisher=tuple(own)))

    def _check_simulable(self, model: KnownProgram) -> None:
        geometry = self.optim.geometry
        if not model.net.blocks:
            return  # Nothing is measured, so nothing is simulated.
        if isinstance(geometry, Visible) or {"dreams", "exact"} & geometry.sources.keys():
            check_simulable(model.net)

    def _learn(self, unknown: UnknownStructure, call: Call, first: bool) -> None:
        """Analyzes the branch that a program took, and plans the blocks anew.

        Args:
            unknown: the branch.
            call: arguments of the programs.
            first: whether the programs were analyzed in this call.
        """
        programs = {role: side.plan.program for role, side in self.optim.sides.items()}
        if unknown.known is programs["model"]:
            programs["model"] = learn(unknown, self.model, call.args, call.kwargs, first)
            self._check_simulable(programs["model"])
        else:
            guide = learn(unknown, self.guide, call.args, call.kwargs, first)
            programs["guide"] = self._of_guide(guide, programs["model"])
        self.optim.replan(programs)
        tell(self.optim, stacklevel=3)

    def _observer(self, due: Set[Role]) -> LossObserver:
        model, guide = self.optim.sides["model"], self.optim.sides["guide"]
        measured = set()
        if "model" in due and ("posterior" in model.geometry.sources or not model.natural):
            measured.add("model")
        if "guide" in due and guide.plan.blocks:
            measured.add("guide")
        return LossObserver(
            model.plan,
            guide.plan,
            frozenset(measured),
            Averaging(
                num_particles=self.loss.num_particles,
                wake_share=getattr(self.loss, "insomnia", 1.0),
                num_sleep_particles=getattr(self.loss, "num_sleep_particles", 1),
            ),
            guide_matrix=guide.natural,
            seed=_mixed(self.optim.seed + 1, self.optim.step_count),
        )

    def _backward(self, observer: LossObserver, call: Call, judged: bool) -> float:
        """Differentiates the loss and checks that the programs are those that were analyzed.

        Args:
            observer: measures the traces of the loss.
            call: arguments of model and guide.
            judged: whether the last step is known not to be to blame for errors.

        Returns:
            The loss in nats.

        Raises:
            InvalidData: where Pyro or torch refuse arguments that are not finite, or empty.
            NonFiniteStep: where the last step has moved a distribution out of its domain.
            ValueError: as Pyro or torch raise it.
            RuntimeError: as Pyro or torch raise it.
            Suspect: in place of the last three where a last step may be to blame.
        """
        args, kwargs = call.args, call.kwargs

        def last_kl() -> float | None:
            return None if self.info is None else self.info.kl

        try:
            with (
                inside_domain(last_kl),
                explained(args, kwargs),
                watch_traces(self.loss, observer),
                self._fresh_transforms(),
            ):
                loss = self.loss.loss_and_grads(self.model, self.guide, *args, **kwargs)
        except (NonFiniteStep, ValueError, RuntimeError) as error:
            if judged or self.optim.last is None or self.optim.rejection is None:
                raise
            raise Suspect(math.nan, error=error) from error
        return number_of(loss)

    def _fresh_transforms(self) -> AbstractContextManager[Any]:
        """`FreshTransforms`, where a program is known to have distributions with transforms."""
        transformed = any(side.plan.transformed for side in self.optim.sides.values())
        return FreshTransforms() if transformed else nullcontext()


def _mixed(seed: int, step: int) -> int:
    """A seed for each step, far from the small ones that users choose."""
    return (seed * 1_000_003 + step * 7_919 + 0x9E3779B9) % 2**31
