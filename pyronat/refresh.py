"""What a step measures: the curvature of both programs and the visible Fisher of the model."""

from __future__ import annotations

import logging
from collections.abc import Generator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pyro.infer import ELBO
from pyro.util import get_rng_state, set_rng_state
from torch import Tensor

from pyronat.buffers import kept_buffers
from pyronat.curvature import Curvature, mix
from pyronat.errors import UnsupportedProgram
from pyronat.expectation import LossObserver, dream_curvature, exact_curvature
from pyronat.geometry import Full, Visible
from pyronat.sides import Role, Side
from pyronat.spectrum import VisibleAverage
from pyronat.tracing import (
    FreshTransforms,
    Program,
    own_random_numbers,
    random_state,
    set_random_state,
)
from pyronat.visible import Dreamer, measure_visible
from pyronat.visible_exact import exact_visible, observed_information

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Call:
    """One call of `NaturalSVI.step`.

    Attributes:
        args: arguments of model and guide.
        kwargs: their keyword arguments.
        random: states of all random numbers when it was made.
        start: when it was made, in seconds.
    """

    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    random: tuple[Any, Any]
    start: float

    def rewind(self) -> None:
        """Takes all random numbers back to where they were."""
        set_rng_state(self.random[0])
        set_random_state(self.random[1])

    @contextmanager
    def replayed(self) -> Generator[None, None, None]:
        """In this context random numbers are those of the call; afterwards they go on as before.

        So do modules: their buffers are put back, and transforms start afresh.
        """
        state = get_rng_state(), random_state()
        self.rewind()
        try:
            with kept_buffers(), FreshTransforms():
                yield
        finally:
            set_rng_state(state[0])
            set_random_state(state[1])


@dataclass(frozen=True)
class Reading:
    """New estimates.

    Attributes:
        curvature: of the full geometries, by program and block.
        visible: of the visible geometry of the model, by district.
        ess: effective sample sizes of the particles of all dreams, or None.
    """

    curvature: dict[Role, dict[str, Curvature]]
    visible: dict[str, VisibleAverage]
    ess: Tensor | None


@dataclass(frozen=True)
class Meter:
    """Measures what the geometries of two programs need.

    Attributes:
        model: the model.
        guide: its guide.
        loss: the loss of both.
    """

    model: Program
    guide: Program
    loss: ELBO

    def read(
        self,
        due: Set[Role],
        sides: Mapping[Role, Side],
        observer: LossObserver,
        call: Call,
        params: Mapping[str, Tensor],
        seed: int,
        decay: float,
    ) -> Reading:
        """New estimates of what the geometries need.

        Args:
            due: the programs that are measured.
            sides: model and guide.
            observer: has seen the traces of the loss.
            call: arguments and random numbers of the loss.
            params: unconstrained leaves by name.
            seed: of the dreams, which never touch the random numbers of the training.
            decay: weight of the past in running averages.

        Returns:
            The estimates.
        """
        found: dict[Role, dict[str, Curvature]] = {}
        visible: dict[str, VisibleAverage] = {}
        ess = None
        measured = {role for role in due if sides[role].plan.blocks}
        with own_random_numbers(seed):
            if "model" in measured:
                found["model"] = self._model_curvature(sides["model"], observer, call)
            if "guide" in measured:
                found["guide"] = self._guide_curvature(sides["guide"], observer, call)
            if "model" in measured:
                visible, ess = self._visible(sides, call, params, decay)
        log.debug("measured %d blocks, %d districts", sum(map(len, found.values())), len(visible))
        return Reading(found, visible, ess)

    def _model_curvature(
        self, model: Side, observer: LossObserver, call: Call
    ) -> dict[str, Curvature]:
        geometry = model.geometry
        full = geometry.regularizer if isinstance(geometry, Visible) else geometry
        parts: list[tuple[float, dict[str, Curvature]]] = []
        for source, share in geometry.sources.items():
            if source == "dreams":
                runs = full.num_runs if isinstance(full, Full) else 1
                part = dream_curvature(self.model, call.args, call.kwargs, model.plan, runs)
            elif source == "exact":
                part = exact_curvature(self.model, call.args, call.kwargs, model.plan)
            else:
                part = observer.model_curvature()
            parts.append((share, part))
        if not model.natural:
            parts.append((1.0, observer.model_curvature(with_matrix=False)))
        return _weighted(parts)

    def _guide_curvature(
        self, guide: Side, observer: LossObserver, call: Call
    ) -> dict[str, Curvature]:
        if "exact" in guide.geometry.sources:
            return exact_curvature(self.guide, call.args, call.kwargs, guide.plan)
        return observer.guide_curvature()

    def _visible(
        self, sides: Mapping[Role, Side], call: Call, params: Mapping[str, Tensor], decay: float
    ) -> tuple[dict[str, VisibleAverage], Tensor | None]:
        """The visible Fisher by district, and effective sample sizes."""
        side, geometry = sides["model"], sides["model"].geometry
        if not isinstance(geometry, Visible) or not side.districts:
            return {}, None
        if geometry.estimator == "observed":
            return self._observed(call, params, side), None
        model, guide_plan = self.model, sides["guide"].plan
        if geometry.posterior == "exact":
            return exact_visible(model, call.args, call.kwargs, side.plan, side.districts), None
        dreamer = Dreamer(
            geometry, side.plan, guide_plan, model, self.guide, call.args, call.kwargs
        )
        found = measure_visible(geometry, side.plan, side.districts, dreamer, decay)
        return found.averages, found.ess

    def _observed(
        self, call: Call, params: Mapping[str, Tensor], side: Side
    ) -> dict[str, VisibleAverage]:
        """The Hessian of the loss at the data.

        Args:
            call: arguments and random numbers.
            params: unconstrained leaves by name.
            side: the model.

        Returns:
            The observed information by district.

        Raises:
            UnsupportedProgram: if the loss has no second derivatives.
        """
        if not hasattr(self.loss, "differentiable_loss"):
            raise UnsupportedProgram(
                f"{type(self.loss).__name__} has no loss that can be differentiated twice; use "
                "TraceEnum_ELBO or Trace_ELBO, or Visible(estimator='direct')"
            )
        with call.replayed():
            loss = self.loss.differentiable_loss(self.model, self.guide, *call.args, **call.kwargs)
        return observed_information(loss, params, side.plan, side.districts)


def _weighted(parts: Sequence[tuple[float, dict[str, Curvature]]]) -> dict[str, Curvature]:
    """Mean of curvatures with shares that sum to 1."""
    total, mean = parts[0]
    for share, part in parts[1:]:
        total += share
        mean = mix(mean, part, share / total)
    return mean
