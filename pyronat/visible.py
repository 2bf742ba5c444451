"""Estimates of the visible Fisher information, from dreams or by enumeration.

Fisher's identity: s_V(v) = E_{p(h|v)}[s(v, h)], and G_V = G − E_v Cov_{p(h|v)}[s]. For a dream
(v, h_1) ~ p and guide draws h_k ~ q(h|v), k = 2..K, with weights w_k ∝ p(v, h_k) / q(h_k|v) that
sum to 1 for each datum, the weighted mean ŝ = Σ_k w_k s(v, h_k) satisfies for any guide and any K

    E[ŝ | v] = s_V(v),    G_V ⪯ E[ŝ ŝᵀ] ⪯ G:

the particles are exchangeable when the dream's own h has a random place among them, so that an
index drawn with probabilities w picks an exact posterior draw. A bad guide lets all weight fall on
the dream's own h; the missing information then seems to be zero, and the metric that of the full
geometry.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, prod
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pyronat.curvature import UnitFactor, total_curvature
from pyronat.districts import DistrictPlan, Part
from pyronat.dreams import Dream, GuideOnDream, draw, posterior_marginals, run_model
from pyronat.errors import BlockTooLarge
from pyronat.geometry import Visible
from pyronat.importance import DatumPlates
from pyronat.observation import observe_units
from pyronat.plans import Plan
from pyronat.records import Run, SiteRecord
from pyronat.scores import BlockColumns, DatumScores, Slots, element_weights
from pyronat.spectrum import ENOUGH, MAX_NUMBERS, MAX_ROWS, Kind, VisibleAverage
from pyronat.tracing import Program

MAX_DENSE_WIDTH = 512
"""Parameter entries of a district up to which its visible Fisher is kept as a matrix."""

MANY = 10
"""Dreams per parameter entry from which on the direct estimate is the better one."""

MAX_RUNS = 20
"""Runs of the model at a refresh, where `num_dreams` is not given."""


@dataclass(frozen=True)
class Particles:
    """Hidden values that stand for the posterior of some data, with their scores.

    Attributes:
        scores: s `[particles, data, width]`, or what makes them.
        weights: w `[particles, data]`, summing to 1 for each datum.
    """

    scores: Tensor | DatumScores
    weights: Tensor

    def mean(self) -> Tensor:
        """ŝ = Σ_k w_k s_k `[data, width]`."""
        return self._combined(self.weights)

    def deviations(self, debias: bool) -> Tensor:
        """Rows √(f w_k) (s_k − ŝ) `[particles, data, width]`: the posterior covariance of s.

        With `debias` the factor f = 1 / (1 − Σ_k w_k²), at most 2, makes up for the mean being
        taken over the same particles.
        """
        scores = torch.stack(list(self.scores))
        mean = torch.einsum("kb,kbp->bp", self.weights, scores)
        return self._roots(debias).unsqueeze(-1) * (scores - mean)

    def add_deviations(self, rows: Tensor, places: Tensor, factor: float, debias: bool) -> None:
        """Adds a row for each datum: its deviations times a factor, summed with random signs.

        The covariance of what is added is that of all deviations, and the covariance of several
        data in one row the sum of theirs. No scores are formed of a single particle.

        Args:
            rows: what they are added to `[rows, width]`.
            places: row of each datum `[data]`.
            factor: on them.
            debias: see `deviations`.
        """
        roots = factor * self._roots(debias)
        signed = (torch.randint(2, roots.shape).to(roots) * 2 - 1) * roots
        coefficients = signed - self.weights * signed.sum(0)
        if isinstance(self.scores, DatumScores):
            self.scores.add_combined(rows, coefficients, places)
        else:
            rows.index_add_(0, places, self._combined(coefficients))

    @property
    def like(self) -> Tensor:
        """A tensor of the type and device of the scores."""
        return self.scores.like if isinstance(self.scores, DatumScores) else self.scores

    def _roots(self, debias: bool) -> Tensor:
        """√(f w) `[particles, data]`."""
        factor = self.weights
        if debias:
            factor = factor * (1 / (1 - self.weights.square().sum(0))).clamp(max=2)
        return factor.sqrt()

    def _combined(self, coefficients: Tensor) -> Tensor:
        """Σ_k c_k s_k for `[particles, data]` coefficients."""
        if isinstance(self.scores, DatumScores):
            return self.scores.combined(coefficients)
        return torch.einsum("kb,kbp->bp", coefficients, self.scores)


def normalized(log_weights: Tensor) -> Tensor:
    """Weights of the particles of each datum `[particles, data]`, from log p − log q in nats."""
    return log_weights.softmax(0)


@dataclass(frozen=True)
class ExactPosterior:
    """Posterior means of the scores of some data, and the scores of their own hidden values.

    Attributes:
        visible: s_V = E_{p(h|v)}[s] `[data, width]`.
        own: s(v, h_1) `[data, width]`.
    """

    visible: Tensor
    own: Tensor

    def mean(self) -> Tensor:
        """s_V `[data, width]`."""
        return self.visible

    def deviations(self, debias: bool) -> Tensor:
        """Rows s_1 − s_V `[1, data, width]`, whose covariance is that of the posterior exactly."""
        return (self.own - self.visible).unsqueeze(0)

    def add_deviations(self, rows: Tensor, places: Tensor, factor: float, debias: bool) -> None:
        """Adds factor · (s_1 − s_V), of mean 0 for each datum, to rows `[rows, width]`."""
        rows.index_add_(0, places, self.own - self.visible, alpha=factor)

    @property
    def like(self) -> Tensor:
        """A tensor of the type and device of the scores."""
        return self.own


Evidence: TypeAlias = Particles | ExactPosterior


@dataclass(frozen=True)
class Design:
    """How the visible Fisher of one district is estimated at a refresh.

    Attributes:
        district: the district.
        columns: its blocks.
        num_dreams: dreams wanted for each of its parts.
        effective: dreams that the running average amounts to.
        kind: what is estimated.
        dense: whether the estimate is kept as a matrix.
        memory: bytes that scores may take at once.
    """

    district: DistrictPlan
    columns: BlockColumns
    num_dreams: int
    effective: float
    kind: Kind
    dense: bool
    memory: int


def design(
    geometry: Visible, plan: Plan, district: DistrictPlan, per_run: int, decay: float
) -> Design:
    """Decides how a district is estimated.

    Args:
        geometry: the options.
        plan: plan of the model.
        district: the district.
        per_run: data in one run of the model, of the part that has fewest.
        decay: weight of the past in the running average.

    Returns:
        The design.
    """
    width = district.size
    least = 200 if width <= MAX_DENSE_WIDTH else 100
    wanted = geometry.num_dreams or max(least, min(per_run, 100 * width))
    if geometry.num_dreams is None:
        wanted = min(wanted, MAX_RUNS * per_run)
    effective = wanted * (1 + decay) / (1 - decay)
    direct = geometry.estimator == "direct"
    if geometry.estimator == "auto":
        direct = width <= MAX_DENSE_WIDTH and effective >= MANY * width
    if direct:
        check_width(district)
    return Design(
        district=district,
        columns=columns_of(plan, district),
        num_dreams=wanted,
        effective=effective,
        kind="visible" if direct else "missing",
        dense=direct or (width <= MAX_DENSE_WIDTH and effective >= ENOUGH * width),
        memory=geometry.memory,
    )


def check_width(district: DistrictPlan) -> None:
    """Refuses to keep a matrix of a large district.

    Args:
        district: the district.

    Raises:
        BlockTooLarge: if it has too many parameter entries.
    """
    if district.size > MAX_DENSE_WIDTH:
        raise BlockTooLarge(
            f"the district of {district.name} has {district.size} parameter entries, at most "
            f"{MAX_DENSE_WIDTH} are kept as a matrix; use Visible(estimator='subtractive')"
        )


def columns_of(plan: Plan, district: DistrictPlan) -> BlockColumns:
    """Columns of a district's scores."""
    return BlockColumns({name: plan.blocks[name] for name in district.blocks})


@dataclass(frozen=True)
class Measurement:
    """What one refresh says about the visible geometry.

    Attributes:
        averages: estimate by district.
        ess: effective sample sizes of the particles of all dreams `[dreams]`; empty where the
            posterior is exact.
    """

    averages: dict[str, VisibleAverage]
    ess: Tensor


def measure_visible(
    geometry: Visible,
    plan: Plan,
    districts: Sequence[DistrictPlan],
    dreamer: Dreamer,
    decay: float,
) -> Measurement:
    """Estimates the visible Fisher of each district from dreams.

    Args:
        geometry: the options.
        plan: plan of the model.
        districts: the districts.
        dreamer: gives dreams and what stands for their posterior.
        decay: weight of the past in the running average.

    Returns:
        The estimates, in the units of the loss.
    """
    night = dreamer.dream()
    designs = [
        design(geometry, plan, district, min(map(night.num_data, district.hidden_parts)), decay)
        for district in districts
    ]
    sums = [_Sum(one) for one in designs]
    ess: list[Tensor] = []
    runs = max(
        ceil(one.num_dreams / night.num_data(part))
        for one in designs
        for part in one.district.hidden_parts
    )
    for number in range(runs):
        night = dreamer.dream() if number else night
        for total in sums:
            ess += total.add(night)
    averages = {total.design.district.name: total.average() for total in sums}
    return Measurement(averages, torch.cat(ess) if ess else torch.empty(0))


class _Sum:
    """Adds up the estimate of one district over runs."""

    def __init__(self, design: Design) -> None:
        self.design = design
        self._taken = {part.sites: 0 for part in design.district.parts}
        self._rows: Tensor | None = None
        self._next = 0
        self._matrix: Tensor | None = None
        self._local: list[Tensor] = []

    def add(self, night: Night) -> list[Tensor]:
        """Adds the dreams of one run that are still wanted; effective sample sizes of its parts."""
        district = self.design.district
        if self.design.kind == "visible" and district.hidden_parts != district.parts:
            self._local.append(night.local(district, self.design.columns))
        ess = []
        for part in district.hidden_parts:
            count = night.num_data(part)
            left = self.design.num_dreams - self._taken[part.sites]
            chosen = torch.randperm(count)[:left].sort().values
            self._taken[part.sites] += len(chosen)
            # Each dream stands for an equal share of the data of a run.
            weight = count / self.design.num_dreams
            weights = night.weights(part)
            if weights is not None and len(chosen):
                ess.append(1 / weights[:, chosen].square().sum(0))
            for some in chosen.split(self._chunk(night)):
                evidence = night.evidence(part, self.design.columns, some)
                self._keep(evidence, len(some), weight**0.5)
        return ess

    def _chunk(self, night: Night) -> int:
        """Dreams whose scores are held at once."""
        held = night.num_particles if self.design.dense else 1
        bytes_each = 8 * self.design.columns.width * held
        return max(self.design.memory // max(bytes_each, 1), 1)

    def _keep(self, evidence: Evidence, count: int, factor: float) -> None:
        """Adds what some dreams say, times a factor on scores."""
        enough = self.design.effective >= 5 * self.design.columns.width
        if not self.design.dense:
            self._add_rows(evidence, count, factor, enough)
            return
        if self.design.kind == "visible":
            rows = evidence.mean()
        else:
            rows = evidence.deviations(debias=enough).flatten(0, 1)
        gram = (rows.mT @ rows) * factor**2
        self._matrix = gram if self._matrix is None else self._matrix + gram

    def _add_rows(self, evidence: Evidence, count: int, factor: float, debias: bool) -> None:
        """Adds a row for each dream; where all rows have been taken, to the first ones again."""
        if self._rows is None:
            self._rows = evidence.like.new_zeros(self._num_rows(), self.design.columns.width)
        places = torch.arange(self._next, self._next + count, device=self._rows.device)
        evidence.add_deviations(self._rows, places % len(self._rows), factor, debias)
        self._next += count

    def average(self) -> VisibleAverage:
        """The estimate."""
        matrix = self._matrix
        if matrix is not None and self._local:
            matrix = matrix + torch.stack(self._local).mean(0)
        count = float(self.design.num_dreams)
        return VisibleAverage(self.design.kind, matrix, self._rows, count, self._max_rows())

    def _num_rows(self) -> int:
        """Rows that the dreams of one refresh are summed in."""
        wanted = self.design.num_dreams * len(self.design.district.hidden_parts)
        return max(min(wanted, self._max_rows()), 1)

    def _max_rows(self) -> int:
        """Rows that are kept."""
        width = self.design.columns.width
        return max(min(MAX_ROWS, MAX_NUMBERS // width, self.design.memory // (8 * width)), 1)


class Night:
    """One run of dreams, with what stands for the posterior of their hidden values.

    Args:
        dream: the run.
        runs: factors of the dream, then those of the runs on other hidden values: one for each
            guide draw, or one with all values enumerated.
        guide_runs: the guide on the hidden values of every run; none where they are enumerated.
        model_runs: the model on the same values.
        marginals: posterior weights by site of the enumerated run, or None.
    """

    def __init__(
        self,
        dream: Dream,
        runs: Sequence[Sequence[UnitFactor]],
        guide_runs: Sequence[Run],
        model_runs: Sequence[Run],
        marginals: Mapping[str, Tensor] | None,
    ) -> None:
        self._dream, self._runs, self._marginals = dream, runs, marginals
        self._guide_runs, self._model_runs = guide_runs, model_runs
        self._records = {record.name: record for record in dream.run.records}
        self._weights: dict[Part, Tensor] = {}

    @property
    def num_particles(self) -> int:
        """Score matrices that are held at once."""
        return len(self._runs)

    def num_data(self, part: Part) -> int:
        """Independent data of a part."""
        return prod(self._sizes(part))

    def _first(self, part: Part) -> SiteRecord | None:
        """A site of the part that this run has; none where it took another branch."""
        return next((self._records[name] for name in part.sites if name in self._records), None)

    def _plates(self, part: Part) -> DatumPlates:
        first = self._first(part)
        stack = first.plates if first is not None else ()
        plates = [replace(plate, scale=1.0) for plate in stack if plate.name in part.replicates]
        return DatumPlates(tuple(sorted(plates, key=lambda plate: plate.dim)))

    def _sizes(self, part: Part) -> list[int]:
        first = self._first(part)
        shape = first.distribution.batch_shape if first is not None else ()
        return [shape[plate.dim] for plate in self._plates(part).plates]

    def weights(self, part: Part) -> Tensor | None:
        """Weights of the particles `[particles, data]`, or None where the posterior is exact."""
        if not self._guide_runs:
            return None
        if part not in self._weights:
            plates = self._plates(part)

            def log_prob(run: Run, names: Sequence[str]) -> Tensor:
                records = [replace(r, scale=1.0) for r in run.records if r.name in names]
                return plates.log_prob(records).detach().reshape(-1)

            log_weights = [
                log_prob(p, part.sites) - log_prob(q, part.hidden)
                for p, q in zip(self._model_runs, self._guide_runs, strict=True)
            ]
            self._weights[part] = normalized(torch.stack(log_weights))
        return self._weights[part]

    def local(self, district: DistrictPlan, columns: BlockColumns) -> Tensor:
        """Fisher information of the parts without hidden sites, at this dream's parents.

        Args:
            district: the district.
            columns: its blocks.

        Returns:
            `[width, width]`, in the units of the loss.
        """
        sites = {site for part in district.parts if not part.hidden for site in part.sites}
        found = total_curvature([
            (factor, factor.record.base_weights())
            for factor in self._runs[0]
            if factor.record.name in sites and factor.block in columns.blocks
        ])
        like = self._dream.run.records[0].value
        units: list[Tensor] = []
        for name, block in columns.blocks.items():
            operator = found[name].operator if name in found else None
            if operator is None:
                units += torch.zeros(block.count, block.size, block.size, device=like.device)
            else:
                units += operator.dense()
        total: Tensor = torch.block_diag(*units)
        return total

    def evidence(self, part: Part, columns: BlockColumns, data: Tensor) -> Evidence:
        """Scores of some data of a part with hidden sites.

        Args:
            part: the part.
            columns: the blocks.
            data: numbers of the data `[data]`.

        Returns:
            What stands for their posterior.
        """
        device = self._dream.run.records[0].value.device
        numbers = torch.full((self.num_data(part),), -1, device=device)
        numbers[data.to(device)] = torch.arange(len(data), device=device)
        slots = Slots(self._plates(part), numbers.reshape(self._sizes(part)), len(data))

        def weighted(
            factors: Sequence[UnitFactor], marginals: Mapping[str, Tensor]
        ) -> list[tuple[UnitFactor, Tensor]]:
            return [
                (f, element_weights(f.record) * marginals.get(f.record.name, 1.0))
                for f in factors
                if f.record.name in part.sites and f.block in columns.blocks
            ]

        runs = [weighted(factors, {}) for factors in self._runs]
        if self._marginals is not None:
            runs[1] = weighted(self._runs[1], self._marginals)
            own, visible = DatumScores(runs, slots, columns)
            return ExactPosterior(visible, own)
        weights = self.weights(part)
        assert weights is not None
        return Particles(DatumScores(runs, slots, columns), weights[:, data])


@dataclass(frozen=True)
class Dreamer:
    """Makes dreams of one model.

    Attributes:
        geometry: the options.
        plan: plan of the model.
        guide_plan: plan of the guide, or None where it is not needed.
        model: the model.
        guide: the guide, or None.
        args: arguments of both.
        kwargs: keyword arguments of both.
    """

    geometry: Visible
    plan: Plan
    guide_plan: Plan | None
    model: Program
    guide: Program | None
    args: Sequence[Any]
    kwargs: Mapping[str, Any]

    def dream(self) -> Night:
        """Runs the model forward once, and what its posterior needs.

        Returns:
            The dreams.

        Raises:
            UnknownStructure: if a program took a branch that is not known.
        """
        dream = draw(self.model, self.args, self.kwargs)
        own = self._observed(dream.run)
        if self.geometry.posterior == "enumerate":
            found = posterior_marginals(self.model, self.args, self.kwargs, dream)
            return Night(dream, [own, self._observed(found.run)], [], [], found.weights)
        assert self.guide is not None and self.guide_plan is not None
        on_dream = GuideOnDream(self.guide, self.args, self.kwargs, dream)
        guide_runs = [on_dream.on_own()]
        guide_runs += [on_dream.drawn() for _ in range(self.geometry.num_particles - 1)]
        model_runs, factors = [dream.run], [own]
        for run in guide_runs:
            self.guide_plan.program.check(run.records, run.params)
        for run in guide_runs[1:]:
            hidden = {record.name: record.value for record in run.records}
            model_run = run_model(self.model, self.args, self.kwargs, dream, hidden)
            model_runs.append(model_run)
            factors.append(self._observed(model_run))
        return Night(dream, factors, guide_runs, model_runs, None)

    def _observed(self, run: Run) -> list[UnitFactor]:
        self.plan.program.check(run.records, run.params)
        return observe_units(run.records, self.plan, run.params)
