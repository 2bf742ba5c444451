"""`NaturalGradient`: state and step rule of one joint step over named parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn, get_args

import pyro.optim
from torch import Tensor

from pyronat.adaptation import adaptation
from pyronat.averaging import Averages
from pyronat.checkpoints import check_state, read, write
from pyronat.curvature import Curvature
from pyronat.errors import StockSVI, StructureChanged
from pyronat.geometry import Full, Geometry, Visible
from pyronat.motion import Carry, within
from pyronat.operators import summed
from pyronat.others import kind_of, restore, state_of
from pyronat.planning import Planner, check_names
from pyronat.programs import KnownProgram
from pyronat.proposals import Before, Motion, Proposal, gain, step_scalars
from pyronat.rejection import DEFAULT, Watch
from pyronat.shaping import Shape, measured, shaped
from pyronat.sides import Directions, Kind, Role, Side
from pyronat.spectrum import VisibleAverage
from pyronat.steps import (
    Caution,
    Clip,
    Constant,
    ConstantDamping,
    Damping,
    KLTrustRegion,
    LevenbergMarquardt,
    LeverageDamping,
    Moments,
    Momentum,
    PerName,
    PolyakRuppert,
    ReachScaledAdam,
    Rejection,
    RetainedShare,
    RunningAverage,
    Schedule,
    Searched,
    Shrinkage,
)

STATE_FORMAT = 6

_REQUIRED = dict.fromkeys(
    "step_count seed caution sides moments motions others averages watch last".split()
)

OFTEN = RunningAverage(longest=40)
RARE = RunningAverage(decay=0.8, refresh=20, alternating=True)
RARER = replace(RARE, longest=80, patience=5)
"""When curvature is measured: usually, of large blocks, and where that is dear.

With a longest period of 40 in place of 20, digits are the same after 60 epochs, 840 steps: 17.43
and 17.44 nats, means of 8 seeds; in the visible geometry 17.53 and 17.52 after 39, of 6 seeds.

On binarized digits a variational autoencoder with layers of 784, 400 and 20 units, whose curvature
random signs make noisy, is 0.4 nats worse after 600 steps with a decay of 0.6 in place of 0.8, and
0.8 nats with a patience of 20 in place of 5, where a step takes a tenth longer as well.
"""

LARGE = 2**19
"""Entries of the matrices of a block above which it is measured less often.

The full covariance guide of a regression on 31 features, 992² entries, ends lower with half as many
seconds if it is measured every 20 steps and not every 5.
"""


class NaturalGradient(pyro.optim.PyroOptim):
    """Natural gradient on the blocks of a Bayesian network, for `pyronat.NaturalSVI`.

    One step moves all parameters at once. A block with Fisher information G moves by
    −lr (G + λ)⁻¹ ∇; λ is the damping. Parameters on a Euclidean side, without a Fisher
    information, or excluded by name go to `others`, with the gradient of the same backward pass.

    Args:
        lr: learning rate, a schedule from step number to rate, or `steps.PerName`. An adaptive
            rule (`steps.LevenbergMarquardt`) sets the length of natural steps itself.
        geometry: metric of the model, `Full()`, `Visible()` or `Euclidean()`.
        guide_geometry: metric of the guide. By default `Full()` if all its sites are of a
            reparametrized continuous family, else `Euclidean()`: the gradient of an amortized
            discrete guide is too noisy for a natural step.
        damping: rule for λ, or `steps.LevenbergMarquardt()` for exact losses on whole data sets.
        trust_region: bound on the divergence of a step.
        curvature: how curvature is averaged over steps and how often it is measured. By default
            every 5 steps, from step 50 on every 10, from 100 on every 20 and from 200 on every 40.
            Where there are large blocks, as wide layers are, every 20; with networks, and in the
            visible geometry of large blocks, every 40 from step 100 on, every 80 from step 200 on;
            model and guide then in different steps. At every step and without the past where
            `steps.LevenbergMarquardt` adapts a number.
        others: a Pyro optimizer for all parameters without a metric. By default those of a
            Euclidean side take steps of `steps.ReachScaledAdam`; those without a Fisher
            information, or in a dense block too large to measure, of Adam with rate 1e-3.
        exclude: names or patterns (`"encoder*"`) of parameters to leave to `others`.
        clip: bounds on the norms of gradients. By default there are none.
        rejection: when a step is taken back; None for never.
        seed: seed of the dreams, which never touch the random numbers of the training.
        averaging: how all parameters that steps move are averaged over the steps, in unconstrained
            coordinates; `NaturalSVI.averaged` shows the averages. By default they are not.
        momentum: of natural steps; `steps.Momentum(0.0)` is none, as under adaptive rules.
        shrinkage: of natural steps of a guide where its gradient is noise;
            `steps.Shrinkage(least=1.0)` is none, as under adaptive rules.

    Example:
        >>> optim = NaturalGradient(lr=0.1, geometry=Full(expectation="model"))
    """

    def __init__(
        self,
        lr: float | Schedule = 0.1,
        geometry: Geometry | None = None,
        guide_geometry: Geometry | None = None,
        damping: Damping | LevenbergMarquardt | None = None,
        trust_region: KLTrustRegion | None = None,
        curvature: RunningAverage | None = None,
        others: pyro.optim.PyroOptim | None = None,
        exclude: Sequence[str] = (),
        clip: Clip | None = None,
        rejection: Rejection | None = DEFAULT,
        seed: int = 0,
        averaging: PolyakRuppert | None = None,
        momentum: Momentum | None = None,
        shrinkage: Shrinkage | None = None,
    ) -> None:
        super().__init__(_refuse, {})
        self.lr: Schedule = lr if callable(lr) else Constant(lr)
        self.geometry = Full() if geometry is None else geometry
        self.guide_geometry = guide_geometry
        self.damping = LeverageDamping() if damping is None else damping
        self.trust_region = trust_region or KLTrustRegion()
        if isinstance(guide_geometry, Visible):
            raise ValueError("a guide hides nothing: guide_geometry is Full(...) or Euclidean()")
        self.clip = clip or Clip()
        self.rejection, self.watch = rejection, Watch()
        self.last: Before | None = None
        self.adaptation = adaptation(self.geometry, self.damping, self.lr, self.clip)
        self.carry = Carry(self.adaptation.momentum(momentum), self.adaptation.shrinkage(shrinkage))
        whole = OFTEN if self.rule is None else RunningAverage(0.0, 1)
        self._curvature = curvature
        self.curvature = curvature or whole
        self.others = others
        self.exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
        self.seed = seed
        self.averaging = averaging
        self.averages = Averages()
        self.step_count = 0
        self.caution = self.adaptation.start()
        self.sides: dict[Role, Side] = {}
        self.scaled_adam = ReachScaledAdam()
        self._plain = pyro.optim.Adam({"lr": 1e-3})
        self._moments: dict[str, Moments] = {}
        self._motions: dict[str, Motion] = {}
        self._pending: dict[str, Any] | None = None

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuses the stock `pyro.infer.SVI`, which gives an optimizer no model.

        Args:
            params: ignored.
            *args: ignored.
            **kwargs: ignored.

        Raises:
            StockSVI: always.
        """
        _refuse()

    @property
    def rule(self) -> LevenbergMarquardt | None:
        """The rule that judges each step by the loss that made it, if there is one."""
        return self.adaptation.search

    def mixing(self, caution: Caution | None) -> float | RetainedShare:
        """ρ of the model's geometry at this step, or the rule for it by district."""
        return self.adaptation.mixing(caution, self.step_count)

    def step_length(self, caution: Caution | None) -> float:
        """Factor on natural gradients: the learning rate, or what an adaptive rule says."""
        return caution.scale if isinstance(caution, Searched) else self.lr(self.step_count)

    # Structure

    @property
    def bound(self) -> bool:
        """Whether the optimizer knows its program."""
        return bool(self.sides)

    def bind(self, programs: Mapping[Role, KnownProgram]) -> None:
        """Plans the curvature of analyzed programs.

        Args:
            programs: the model and its guide.

        Raises:
            UnassignedParameter: if model and guide share a parameter.
            UnknownName: if a factor of the learning rate is for no parameter.
        """
        sides = self.planner.sides(programs)
        if isinstance(self.lr, PerName):
            check_names(self.lr, sides, self.others is not None)
        self.sides = sides
        self._settle()
        if self._pending is not None:
            self._restore(self._pending)
            self._pending = None

    def _settle(self) -> None:
        """What is large is measured less often, unless the user has said how often."""
        blocks = [b for s in self.sides.values() if s.natural for b in s.plan.blocks.values()]
        networks = any(block.network for block in blocks)
        large = networks or any(
            block.structure in {"shared", "cg"} or block.matrix_entries > LARGE for block in blocks
        )
        if large and self._curvature is None and self.rule is None:
            dear = networks or isinstance(self.geometry, Visible)
            self.curvature = RARER if dear else RARE

    def replan(self, programs: Mapping[Role, KnownProgram]) -> None:
        """Plans the curvature of programs that are known better than before.

        Blocks that are as they were keep their averages.

        Args:
            programs: the model and its guide.

        Raises:
            UnassignedParameter: if model and guide share a parameter.
        """
        sides = self.planner.sides(programs)
        self.sides = {
            role: self.sides[role].replanned(side.plan, side.districts)
            if self.sides[role].geometry == side.geometry
            else side
            for role, side in sides.items()
        }
        self._settle()

    @property
    def planner(self) -> Planner:
        """Who assigns parameters to the sides, and plans their blocks."""
        return Planner(self.geometry, self.guide_geometry, self.exclude)

    def assignment(self, names: Sequence[str]) -> dict[str, str]:
        """Who moves each parameter: "natural", "scaled" (Adam by reach) or "others".

        Args:
            names: all parameters of a step.

        Returns:
            The kind of owner, by parameter.
        """
        owners = {}
        for side in self.sides.values():
            kind = "natural" if side.natural else "others" if self.others else "scaled"
            owners.update(dict.fromkeys(side.plan.owner(), kind))
        return {name: owners.get(name, "others") for name in names}

    def check_params(self, params: Mapping[str, Tensor]) -> None:
        """Compares the shapes of parameters with the analyzed ones.

        Args:
            params: tensors of the parameters' shapes, by name.

        Raises:
            StructureChanged: naming those of another shape.
        """
        changed = {
            name
            for side in self.sides.values()
            for block in side.plan.blocks.values()
            for name, shape in zip(block.params, block.shapes, strict=True)
            if name in params and params[name].shape != shape
        } | self.averages.misfits(params)
        if changed:
            raise StructureChanged(
                f"parameters have other shapes than at the first step: "
                f"{', '.join(sorted(changed))}; keep the shapes of parameters"
            )

    @property
    def due(self) -> frozenset[Role]:
        """The programs whose curvature the next step measures; before the first one, both."""
        if not self.bound:
            return frozenset(get_args(Role))
        if any(not side.complete for side in self.sides.values()):
            return frozenset(self.sides)
        rule, step, guide = self.curvature, self.step_count, self.sides["guide"]
        apart = rule.alternating and guide.natural and bool(guide.plan.blocks)
        return frozenset(r for r in self.sides if rule.is_due(step, apart and r == "guide"))

    # One step, computed without side effects

    def refreshed(
        self,
        curvature: Mapping[Role, Mapping[str, Curvature]],
        visible: Mapping[str, VisibleAverage],
    ) -> dict[Role, Side]:
        """The sides with new estimates averaged in; the optimizer's own are not changed."""
        sides = {
            role: self.sides[role].refreshed(
                some, visible if role == "model" else {}, self.curvature
            )
            for role, some in curvature.items()
        }
        if not isinstance(self.damping, LevenbergMarquardt):
            sides = self._factored(sides, self.caution)
        # Under that rule they are factored with each caution that is tried.
        return {**self.sides, **sides}

    def _factored(self, sides: Mapping[Role, Side], caution: Caution | None) -> dict[Role, Side]:
        damping = self.damping
        if isinstance(damping, LevenbergMarquardt):
            assert caution is not None
            damping = ConstantDamping(0.0, caution.value)
        lr = self.lr(self.step_count)
        return {role: side.factored(damping, lr) for role, side in sides.items()}

    def with_caution(self, sides: Mapping[Role, Side], caution: Caution) -> Mapping[Role, Side]:
        """The sides as a caution damps them."""
        adapted = isinstance(self.damping, LevenbergMarquardt)
        return self._factored(sides, caution) if adapted else sides

    def propose(
        self,
        sides: Mapping[Role, Side],
        gradients: Mapping[str, Tensor],
        caution: Caution | None = None,
    ) -> Proposal:
        """Computes a step.

        Args:
            sides: curvature to use.
            gradients: by parameter name, of all parameters that the step uses.
            caution: of an adaptive rule; by default the optimizer's own.

        Returns:
            The step; nothing has been changed.
        """
        caution = caution or self.caution
        lr = self.step_length(caution)
        found: dict[Role, Directions] = {}

        def bound(kind: Kind, quadratic: Tensor) -> Tensor:
            return self.trust_region.factor_per_datum(kind, 0.5 * lr**2 * quadratic)

        for role, side in sides.items():
            if side.natural:
                mixing = self.mixing(caution) if role == "model" else 1.0
                # An adaptive rule judges steps by their gain.
                each = bound if self.rule is None else None
                found[role] = side.directions(gradients, mixing, each)
        products = summed([one.products for one in found.values()])
        length = lr * self.trust_region.factor(0.5 * lr**2 * products[-1].clamp_min(0))
        scalars = step_scalars(products, length)
        of_model = [one.products for role, one in found.items() if role == "model"]
        scalars["model_gain"] = gain(summed(of_model), length)
        changes: dict[str, Tensor] = {}
        for one in found.values():
            steps = one.changes(-length).items()
            changes.update({name: step for name, step in steps if name in gradients})
        moments: dict[str, Moments] = {}
        kinds = self.assignment(list(gradients))
        for side in sides.values():
            for name, inverse in side.inverse_reach.items() if not side.natural else ():
                if kinds.get(name) == "scaled":
                    changes[name], moments[name] = self.scaled_adam.step(
                        gradients[name], inverse, self.lr(self.step_count), self._moments.get(name)
                    )
        return Proposal(changes, moments, scalars)

    def shaped(
        self,
        sides: Mapping[Role, Side],
        proposal: Proposal,
        gradients: Mapping[str, Tensor],
    ) -> Proposal:
        """A step of `propose` within the bound on gradients, with rates of single parameters."""
        lr, step = self.lr, self.step_count
        bound = self.clip.natural_factor(proposal.scalars["natural_norm"])
        by_name = None
        if isinstance(lr, PerName):
            by_name = {name: lr.factor(name, step) for name in proposal.changes}
        return shaped(proposal, sides, gradients, Shape(self.watch.factor, bound, by_name))

    def carried(
        self, sides: Mapping[Role, Side], proposal: Proposal, gradients: Mapping[str, Tensor]
    ) -> Proposal:
        """A step of `shaped` with what it carries over from earlier ones, within the radius.

        After a step that was taken back, nothing is carried over.
        """
        if not self.carry.is_none:
            before = {} if self.watch.undone else self._motions
            proposal = self.carry(proposal, sides, gradients, before)
        elif not isinstance(self.lr, PerName):
            return proposal  # within the radius as it was proposed
        if math.isinf(self.trust_region.radius):
            return proposal
        proposal = measured(proposal, sides)
        factor = self.trust_region.factor(proposal.scalars["kl"])
        return within(proposal, sides, gradients, factor)

    def shrink(self, gradients: Mapping[str, Tensor]) -> None:
        """Scales gradients without a metric in place, where their norm exceeds its bound."""
        if math.isfinite(self.clip.euclidean):
            kinds = self.assignment(list(gradients))
            self.clip.shrink({n: g for n, g in gradients.items() if kinds[n] != "natural"})

    def commit(
        self,
        sides: Mapping[Role, Side],
        proposal: Proposal,
        caution: Caution | None,
        params: Mapping[str, Tensor],
    ) -> None:
        """Makes the state of a taken step, which led to `params`, the optimizer's own."""
        self.sides, self.caution = dict(sides), caution
        self._moments = {**self._moments, **proposal.moments}
        self._motions = {**self._motions, **proposal.motions}
        if self.averaging is not None:
            self.averages = self.averages.entered(self.averaging, self.step_count, params)
        self.step_count += 1

    def other_optimizer(self) -> pyro.optim.PyroOptim:
        """The optimizer of parameters without a metric."""
        return self.others or self._plain

    # Checkpoints

    def moving_state(self) -> dict[str, Any]:
        """What a step changes, but for curvature, as plain tensors, numbers, lists and dicts."""
        return {
            "caution": None if self.caution is None else dict(vars(self.caution)),
            "moments": {name: dict(vars(state)) for name, state in self._moments.items()},
            "motions": {role: motion.state() for role, motion in self._motions.items()},
            "others": state_of(self.other_optimizer()),
            "averages": None if self.averaging is None else self.averages.state(),
        }

    def take(self, state: Mapping[str, Any]) -> None:
        """Takes a state of `moving_state`."""
        start = self.adaptation.start()
        self.caution = None if start is None else type(start)(**state["caution"])
        self._moments = {name: Moments(**moments) for name, moments in state["moments"].items()}
        self._motions = {role: Motion(**motion) for role, motion in state["motions"].items()}
        self.averages = Averages.from_state(state["averages"], self.averaging)
        restore(self.other_optimizer(), state["others"])

    def get_state(self) -> dict[str, Any]:
        """State as plain tensors, numbers, strings, lists and dicts."""
        if self._pending is not None:
            return self._pending
        last = self.last
        return {
            **self.moving_state(),
            "format": STATE_FORMAT,
            "step_count": self.step_count,
            "seed": self.seed,
            "sides": {role: side.state() for role, side in self.sides.items()},
            "others_kind": kind_of(self.others),
            "adapted": self.adaptation.what,
            "watch": dict(vars(self.watch)),
            "last": None if last is None else {"params": last.params, "state": last.state},
        }

    def set_state(self, state_dict: Mapping[str, Any]) -> None:
        """Takes a state of `get_state`, at once.

        Args:
            state_dict: the state.

        Raises:
            CheckpointMismatch: if it is not a state of this class, or of another program.
        """
        state = dict(state_dict)
        settings = {"others_kind": kind_of(self.others), "adapted": self.adaptation.what}
        check_state(state, "NaturalGradient", {**_REQUIRED, "format": STATE_FORMAT, **settings})
        averages = Averages.from_state(state["averages"], self.averaging)
        if self.bound:
            self._restore(state)
            self._pending = None
        else:
            self._pending = state
            self.step_count, self.seed = state["step_count"], state["seed"]
        self.averages, self.watch = averages, Watch(**state["watch"])
        self.last = None if state["last"] is None else Before(**state["last"])

    def _restore(self, state: Mapping[str, Any]) -> None:
        sides = self.planner.restored(self.sides, state["sides"])
        self.step_count, self.seed = state["step_count"], state["seed"]
        self.sides = sides
        self._settle()
        self.take(state)

    def save(self, filename: str) -> None:
        """Writes the state, in place of an older file only once the new one is whole."""
        write(self.get_state(), filename)

    def load(self, filename: str, map_location: Any = None) -> None:
        """Loads what `save` wrote, with `weights_only=True`, and takes it at once."""
        self.set_state(read(filename, map_location))


def _refuse(*args: Any, **kwargs: Any) -> NoReturn:
    raise StockSVI(
        "NaturalGradient needs the model and the guide, which pyro.infer.SVI does not give to an "
        "optimizer; use pyronat.NaturalSVI(model, guide, optim, loss) instead"
    )
