"""Which expectation over a site's parents: dreams, posterior samples, or enumerated states."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyronat.curvature import Curvature, Factor, total_curvature
from pyronat.enumeration import enumerate_parents
from pyronat.errors import InvalidData, UnsupportedProgram
from pyronat.flows import tied_plates
from pyronat.graph import BayesNet
from pyronat.importance import datum_plates
from pyronat.loss_traces import importance_traces
from pyronat.observation import observe
from pyronat.plans import Plan
from pyronat.records import SiteRecord
from pyronat.tracing import (
    Program,
    dream,
    own_torch_numbers,
    params_of,
    records_of,
    scored_records_of,
)


def dream_curvature(
    program: Program,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    plan: Plan,
    num_runs: int = 1,
) -> dict[str, Curvature]:
    """Fisher information with parents from the program itself, x_pa ~ p.

    Args:
        program: model or guide; observed sites are sampled.
        args: its arguments, which give plate sizes.
        kwargs: its keyword arguments.
        plan: the plan of the program.
        num_runs: independent runs to average; a run has one dream for each plate element.

    Returns:
        Curvature by block name.
    """
    contributions = []
    for _ in range(num_runs):
        run = dream(program, args, kwargs)
        plan.program.check(run.records, run.params)
        for factor in observe(run.records, plan, run.params):
            contributions.append((factor, factor.record.base_weights() / num_runs))
    return total_curvature(contributions)


def exact_curvature(
    program: Program,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    plan: Plan,
) -> dict[str, Curvature]:
    """Fisher information with all values of the discrete parents, weighted by probability.

    Sites that no site depends on are integrated by their families, so they may be continuous.

    Args:
        program: model or guide.
        args: its arguments.
        kwargs: its keyword arguments.
        plan: the plan of the program.

    Returns:
        Curvature by block name.
    """
    net = plan.program.net
    parents = frozenset(site.name for site in net.sites if net.children(site.name))
    check_simulable(net)
    contributions = []
    for weighted in enumerate_parents(program, args, kwargs, parents, common_plates(net)):
        run = weighted.run
        plan.program.check(run.records, run.params)
        for factor in observe(run.records, plan, run.params):
            weights = weighted.along(factor.record.distribution.batch_shape)
            contributions.append((factor, weights * factor.record.base_weights()))
    return total_curvature(contributions)


def common_plates(net: BayesNet) -> frozenset[str]:
    """Plates around all sites whose elements are independent given the parameters."""
    coupled = {plate for site in net.sites for plate in site.coupled_plates}
    plates = [set(site.plates) for site in net.sites]
    return frozenset(plates[0].intersection(*plates) - coupled) if plates else frozenset()


def posterior_curvature(
    model: Program,
    guide: Program,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    plan: Plan,
    num_particles: int,
) -> dict[str, Curvature]:
    """Gauss–Newton-like metric: observed data, hidden parents from the weighted posterior.

    Self-normalized importance weights of guide draws, one set for each datum, joint for data that
    depend on each other's values.

    Args:
        model: the model, whose blocks are measured.
        guide: proposes the hidden values.
        args: arguments of both.
        kwargs: keyword arguments of both.
        plan: the plan of the model.
        num_particles: guide draws.

    Returns:
        Curvature by block name.
    """
    tied = tied_plates(model, args, kwargs) | tied_plates(guide, args, kwargs)
    factors: list[list[Factor]] = []
    log_weights: list[Tensor] = []
    for _ in range(num_particles):
        traces = importance_traces(model, guide, args, kwargs, float("inf"))
        p, q = map(scored_records_of, traces)
        plates = datum_plates([*p, *q], ignored=sorted(tied))
        log_weights.append((plates.log_prob(p) - plates.log_prob(q)).detach())
        records, params = records_of(traces[0]), params_of(traces[0])
        plan.program.check(records, params)
        factors.append(observe(records, plan, params))
    weights = torch.stack(log_weights).softmax(0)
    return total_curvature(
        (factor, plates.spread(weight, factor.record))
        for weight, some in zip(weights, factors, strict=True)
        for factor in some
    )


def check_simulable(net: BayesNet) -> None:
    """Refuses programs whose sites read observed data instead of sampled values.

    Args:
        net: the analyzed program.

    Raises:
        UnsupportedProgram: naming the site and what it reads.
    """
    for site in net.sites:
        if site.reads_data:
            read = ", ".join(site.reads_data)
            raise UnsupportedProgram(
                f"site {site.name!r} reads the data of {read} from the program's arguments, so the "
                "program cannot be run on simulated values; use the value that pyro.sample "
                "returns, or choose Full(expectation='posterior')"
            )


@dataclass(frozen=True)
class Averaging:
    """How a loss averages.

    Attributes:
        num_particles: particles that it averages over.
        wake_share: weight of the guide on observed data, the rest is on simulated data.
        num_sleep_particles: simulated data sets that it averages over.
    """

    num_particles: int = 1
    wake_share: float = 1.0
    num_sleep_particles: int = 1


class LossObserver:
    """Measures curvature from the traces that a loss makes anyway.

    Weights of model sites are −∂loss/∂log p, elementwise: whatever the loss does with its
    particles, enumerated values, scales and masks, this is how much each element counts in the
    model's gradient: normalized importance weights, posterior marginals, or 1 / particles. Weights
    of guide sites are the guide's own: scale × mask / particles × probability of enumerated values.

    Args:
        model_plan: plan of the model.
        guide_plan: plan of the guide.
        measured: the programs whose curvature is wanted.
        loss: how the loss averages.
        guide_matrix: whether the guide's matrices are wanted.
        seed: of the values and signs that are drawn to estimate curvature.
    """

    def __init__(
        self,
        model_plan: Plan,
        guide_plan: Plan,
        measured: Set[str] = frozenset({"model", "guide"}),
        loss: Averaging | None = None,
        guide_matrix: bool = True,
        seed: int = 0,
    ) -> None:
        self._model_plan, self._guide_plan, self._measured = model_plan, guide_plan, measured
        self._loss = Averaging() if loss is None else loss
        self._guide_matrix = guide_matrix
        self._seed = seed
        self._model: deque[tuple[Factor, list[Tensor]]] = deque()
        self._guide: deque[tuple[Factor, Tensor]] = deque()
        self.model_sites: tuple[SiteRecord, ...] = ()

    def wake(self, model: Any, guide: Any) -> None:
        """Sees a pair of traces on observed data.

        Args:
            model: trace of the model.
            guide: trace of the guide.

        Raises:
            InvalidData: if a batch is empty.
            UnknownStructure: if one of the programs took a branch that is not known.
        """
        self.model_sites, params = records_of(model), params_of(model)
        for record in self.model_sites:
            if record.observed and record.value.numel() == 0:
                raise InvalidData(f"site {record.name!r} has no data: the batch is empty")
        self._model_plan.program.check(self.model_sites, params)
        if "model" in self._measured:
            for factor in self._observed(self.model_sites, self._model_plan, params):
                self._model.append((factor, _gradient_of(factor.record.log_prob)))
        self._see_guide(guide, self._loss.wake_share / self._loss.num_particles)

    def sleep(self, guide: Any) -> None:
        """Sees the guide on simulated data."""
        sleep_share = 1 - self._loss.wake_share
        self._see_guide(guide, sleep_share / self._loss.num_sleep_particles)

    def _see_guide(self, guide: Any, share: float) -> None:
        records, params = records_of(guide), params_of(guide)
        self._guide_plan.program.check(records, params)
        if "guide" in self._measured and share > 0:
            for factor in self._observed(records, self._guide_plan, params):
                weights = _guide_weights(factor.record, records)
                self._guide.append((factor, weights * share))

    def _observed(
        self, records: Sequence[SiteRecord], plan: Plan, params: Mapping[str, Tensor]
    ) -> list[Factor]:
        """Factors of a run; the random numbers of the loss are left as they are."""
        self._seed += 1
        with own_torch_numbers(self._seed):
            return observe(records, plan, params)

    def model_curvature(self, with_matrix: bool = True) -> dict[str, Curvature]:
        """Curvature of the model's blocks, once the loss has been differentiated; asked for once.

        The factors are let go of one by one, as those of many particles take much memory.

        Args:
            with_matrix: whether the matrices are wanted.

        Returns:
            Curvature by block name.
        """

        def weighted() -> Iterator[tuple[Factor, Tensor]]:
            while self._model:
                factor, gradients = self._model.popleft()
                if gradients:
                    yield factor, -gradients[0].clamp_max(0)
                else:
                    yield factor, factor.record.base_weights() / self._loss.num_particles

        return total_curvature(weighted(), with_matrix)

    def guide_curvature(self) -> dict[str, Curvature]:
        """Curvature of the guide's blocks, asked for once, as that of the model."""
        taken = (self._guide.popleft() for _ in range(len(self._guide)))
        return total_curvature(taken, self._guide_matrix)


def _gradient_of(tensor: Tensor | None) -> list[Tensor]:
    """A list that holds the tensor's gradient once it has been computed."""
    found: list[Tensor] = []
    if tensor is not None and tensor.requires_grad:
        tensor.register_hook(lambda gradient: found.append(gradient.detach()))
    return found


def _guide_weights(record: SiteRecord, records: Sequence[SiteRecord]) -> Tensor:
    """Scale × mask × probability of the enumerated values that the distribution depends on.

    The probability is the marginal one: earlier enumerated sites that the distribution does not
    depend on are summed out, each as soon as Pyro hands its batch dimension to another site.
    """
    plates = {plate.name for plate in record.plates}
    weights = record.base_weights()
    tables: list[Tensor] = []
    earlier = True
    for other in records:
        earlier = earlier and other.name != record.name
        upstream = earlier and plates.issuperset(plate.name for plate in other.plates)
        if other.enumeration_dim is not None and upstream:
            tables = [*_sum_out(tables, other.enumeration_dim), _probabilities(other)]
        elif other.num_values is not None:
            weights = weights * (_probabilities(other) if upstream else 1 / other.num_values)
    shape = record.distribution.batch_shape
    for dim in range(-max((table.dim() for table in tables), default=0), 0):
        if len(shape) < -dim or shape[dim] == 1:
            tables = _sum_out(tables, dim)
    for table in tables:
        weights = weights * table
    return weights


def _probabilities(record: SiteRecord) -> Tensor:
    assert record.log_prob is not None
    if record.num_samples is not None:
        return torch.full_like(record.log_prob, 1 / record.num_samples).detach()
    return record.log_prob.detach().exp()


def _sum_out(tables: Sequence[Tensor], dim: int) -> list[Tensor]:
    """Multiplies the tables that vary along a batch dimension and sums over it."""
    varying = [table for table in tables if table.dim() >= -dim and table.shape[dim] > 1]
    if not varying:
        return list(tables)
    product = varying[0]
    for table in varying[1:]:
        product = product * table
    rest = [table for table in tables if all(table is not one for one in varying)]
    return [*rest, product.sum(dim, keepdim=True)]
