"""The visible Fisher without dreams: small nets enumerated, or the Hessian of a loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyronat.curvature import UnitFactor
from pyronat.districts import DistrictPlan
from pyronat.enumeration import WeightedRun, enumerate_parents
from pyronat.errors import UnsupportedProgram
from pyronat.expectation import check_simulable, common_plates
from pyronat.importance import DatumPlates
from pyronat.observation import observe_units
from pyronat.plans import Plan
from pyronat.records import Plate, SiteRecord, visible_elements
from pyronat.scores import BlockColumns, Slots, datum_scores, element_weights
from pyronat.spectrum import VisibleAverage
from pyronat.tracing import Program
from pyronat.visible import check_width, columns_of

_STATES = "states"


def exact_visible(
    model: Program,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    plan: Plan,
    districts: Sequence[DistrictPlan],
) -> dict[str, VisibleAverage]:
    """The visible Fisher of each district from all joint values of visible and hidden sites.

        G_V = Σ_v p(v) s_V s_Vᵀ,    s_V = Σ_h p(h|v) s(v, h)

    Elements of plates around all sites that are independent have sums of their own.

    Args:
        model: the model, all of whose sites are discrete.
        args: its arguments.
        kwargs: its keyword arguments.
        plan: its plan.
        districts: the districts.

    Returns:
        The exact G_V by district, in the units of the loss.

    Raises:
        NotEnumerable: if a site has infinitely many values, or the states are too many.
        BlockTooLarge: if a district has too many parameter entries for a matrix.
    """
    net = plan.program.net
    check_simulable(net)
    for district in districts:
        check_width(district)
    sites = frozenset(site.name for site in net.sites)
    shared = common_plates(net)
    runs = enumerate_parents(model, args, kwargs, sites, shared)
    factors = []
    for weighted in runs:
        plan.program.check(weighted.run.records, weighted.run.params)
        factors.append(observe_units(weighted.run.records, plan, weighted.run.params))
    seen = frozenset(site.name for site in net.sites if site.kind == "observed")
    numbers = _numbers([_visible_values(weighted, seen) for weighted in runs])
    probabilities = torch.cat([
        one.probabilities.reshape(len(one.probabilities), -1) for one in runs
    ])
    averages = {}
    for district in districts:
        columns = columns_of(plan, district)
        scores = torch.cat([
            _state_scores(weighted, some, columns, shared)
            for weighted, some in zip(runs, factors, strict=True)
        ])
        matrix = _outer_of_means(scores, probabilities, numbers)
        averages[district.name] = VisibleAverage("visible", matrix, None, float("inf"))
    return averages


def _visible_values(weighted: WeightedRun, seen: frozenset[str]) -> Tensor:
    """Values of the observed sites in each state `[states, values]`."""
    states = len(weighted.probabilities)
    parts = [
        torch.where(visible_elements(record), record.value, 0).reshape(states, -1).double()
        for record in weighted.run.records
        if record.name in seen
    ]
    return torch.cat(parts, 1) if parts else torch.zeros(states, 1)


def _numbers(values: Sequence[Tensor]) -> Tensor:
    """Number of the visible value of every state `[states]`."""
    found: Tensor = torch.unique(torch.cat(list(values)), dim=0, return_inverse=True)[1]
    return found


def _state_scores(
    weighted: WeightedRun,
    factors: Sequence[UnitFactor],
    columns: BlockColumns,
    shared: frozenset[str],
) -> Tensor:
    """Scores `[states, data, width]`."""
    shape = weighted.probabilities.shape
    plates = _data_plates(weighted.run.records, shared)
    sizes = [shape[plate.dim] for plate in plates]
    if weighted.stacked:
        plates, sizes = [Plate(_STATES, -len(shape), 1.0), *plates], [shape[0], *sizes]
    count = weighted.probabilities.numel()
    numbers = torch.arange(count, device=weighted.probabilities.device).reshape(sizes)
    slots = Slots(DatumPlates(tuple(plates)), numbers, count)
    chosen = [(f, element_weights(f.record)) for f in factors if f.block in columns.blocks]
    scores = datum_scores(chosen, slots, columns)
    return scores.reshape(shape[0], -1, scores.shape[1])


def _data_plates(records: Sequence[SiteRecord], shared: frozenset[str]) -> list[Plate]:
    plates = {plate.name: plate for record in records for plate in record.plates}
    return sorted((plates[name] for name in shared), key=lambda plate: plate.dim)


def _outer_of_means(scores: Tensor, probabilities: Tensor, numbers: Tensor) -> Tensor:
    """Σ_v p(v) s_V s_Vᵀ, summed over data.

    Args:
        scores: `[states, data, width]`.
        probabilities: `[states, data]`.
        numbers: number of the visible value of each state `[states]`.

    Returns:
        `[width, width]`.
    """
    count = int(numbers.max()) + 1
    mass = probabilities.new_zeros(count, probabilities.shape[1])
    mass.index_add_(0, numbers, probabilities)
    weighted = scores.new_zeros(count, *scores.shape[1:])
    weighted.index_add_(0, numbers, scores * probabilities.unsqueeze(-1))
    tiny = torch.finfo(mass.dtype).tiny
    rows = (weighted / mass.clamp_min(tiny).sqrt().unsqueeze(-1)).flatten(0, 1)
    return rows.mT @ rows


def observed_information(
    loss: Tensor,
    params: Mapping[str, Tensor],
    plan: Plan,
    districts: Sequence[DistrictPlan],
) -> dict[str, VisibleAverage]:
    """The observed information −∇² log p(v) of each district (Louis 1982), by autograd.

    Args:
        loss: −log p(v) in nats, differentiable twice.
        params: unconstrained leaves by name.
        plan: plan of the model.
        districts: the districts.

    Returns:
        The Hessian by district; it may have negative eigenvalues.

    Raises:
        UnsupportedProgram: if the loss cannot be differentiated twice.
        BlockTooLarge: if a district has too many parameter entries for a matrix.
    """
    for district in districts:
        check_width(district)
    names = sorted({param for d in districts for b in d.blocks for param in plan.blocks[b].params})
    leaves = [params[name] for name in names]
    gradients = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
    if any(gradient is None or not gradient.requires_grad for gradient in gradients):
        raise UnsupportedProgram(
            "the loss cannot be differentiated twice; use Visible(estimator='direct')"
        )
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    rows = [
        torch.cat([
            part.reshape(-1)
            for part in torch.autograd.grad(
                entry, leaves, retain_graph=True, materialize_grads=True
            )
        ])
        for entry in flat
    ]
    hessian = torch.stack(rows)
    sizes = [leaf.numel() for leaf in leaves]
    averages = {}
    for district in districts:
        columns = columns_of(plan, district)
        half = _packed(hessian, names, leaves, sizes, plan, columns)
        matrix = _packed(half.mT, names, leaves, sizes, plan, columns)
        averages[district.name] = VisibleAverage("observed", matrix, None, float("inf"))
    return averages


def _packed(
    rows: Tensor,
    names: Sequence[str],
    leaves: Sequence[Tensor],
    sizes: Sequence[int],
    plan: Plan,
    columns: BlockColumns,
) -> Tensor:
    """Columns of parameters `[rows, entries]` → columns of blocks `[rows, width]`."""
    positions = {
        name: part.reshape(leaf.shape)
        for name, leaf, part in zip(
            names, leaves, torch.arange(sum(sizes)).split(list(sizes)), strict=True
        )
    }
    order = columns.join({name: plan.layouts[name].pack(positions) for name in columns.blocks})
    return rows[:, order]
