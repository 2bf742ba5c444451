"""Scores of single data: ∇ log p(x_r | x_pa(r)) in the entries of blocks, datum by datum.

The factors of a run give Jacobians, the family gives ∂ log p / ∂θ; a datum's score is the sum of
their products over the elements that belong to it. For linear units it is δ ⊗ a.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyronat.blocks import ParamBlock
from pyronat.curvature import UnitFactor
from pyronat.errors import UnsupportedDistribution
from pyronat.families import peel, score
from pyronat.importance import DatumPlates
from pyronat.records import SiteRecord
from pyronat.tables import TableRows
from pyronat.weights import joined_dims
from pyronat.wrappers import base_value, wrappers

FEW = 4
"""Rows that are added to together, at least on average, where that is done piece by piece."""


@dataclass(frozen=True)
class BlockColumns:
    """Columns of a score matrix: blocks one after the other, their units one after the other.

    Attributes:
        blocks: by name, in order.
    """

    blocks: Mapping[str, ParamBlock]

    @property
    def width(self) -> int:
        """Number of columns."""
        return sum(block.num_entries for block in self.blocks.values())

    def split(self, rows: Tensor) -> dict[str, Tensor]:
        """Rows `[*rows, width]` → `[*rows, count, size]` by block."""
        parts = rows.split([block.num_entries for block in self.blocks.values()], -1)
        return {
            name: part.unflatten(-1, (block.count, block.size))
            for (name, block), part in zip(self.blocks.items(), parts, strict=True)
        }

    def join(self, parts: Mapping[str, Tensor]) -> Tensor:
        """`[*rows, count, size]` by block → `[*rows, width]`."""
        return torch.cat([parts[name].flatten(-2) for name in self.blocks], -1)


@dataclass(frozen=True)
class Slots:
    """Which datum each element of a site belongs to.

    Attributes:
        plates: plates whose elements are the data.
        numbers: row of each datum `[*plates]`, −1 for data that are left out.
        count: number of rows.
    """

    plates: DatumPlates
    numbers: Tensor
    count: int

    def along(self, shape: Sequence[int]) -> Tensor:
        """Rows of the elements of a batch shape `[*batch]`."""
        width = max((-plate.dim for plate in self.plates.plates), default=0)
        spread = [1] * width
        for plate, size in zip(self.plates.plates, self.numbers.shape, strict=True):
            spread[plate.dim] = size
        return self.numbers.reshape(spread).expand(torch.Size(shape))


def datum_scores(
    factors: Sequence[tuple[UnitFactor, Tensor]], slots: Slots, columns: BlockColumns
) -> Tensor:
    """Scores of the data, summed over sites.

        s_b = Σ_r Σ_{n in b} w_n J_nᵀ ∂ log p(x_n; θ_n) / ∂θ_n

    Args:
        factors: of one run, each with a weight w for every element of its site, `[*batch]`.
        slots: which element belongs to which datum.
        columns: the blocks.

    Returns:
        `[count, width]` in nats per unit of each parameter entry.
    """
    total = _like([factors]).new_zeros(slots.count, columns.width)
    _add_runs(total, [factors], slots, columns)
    return total


@dataclass(frozen=True)
class DatumScores(Sequence[Tensor]):
    """Scores of the data in several runs, each made when it is asked for.

    Attributes:
        runs: for each, its factors with a weight for every element of their sites.
        slots: which element belongs to which datum.
        columns: the blocks.
    """

    runs: Sequence[Sequence[tuple[UnitFactor, Tensor]]]
    slots: Slots
    columns: BlockColumns

    def __len__(self) -> int:
        return len(self.runs)

    def __getitem__(self, index: Any) -> Any:
        """Scores of one run `[count, width]`."""
        return datum_scores(self.runs[index], self.slots, self.columns)

    @property
    def like(self) -> Tensor:
        """A tensor of the type and device of the scores."""
        return _like(self.runs)

    def combined(self, coefficients: Tensor) -> Tensor:
        """Σ_k c_k s_k `[count, width]` for coefficients c `[runs, count]`; no s_k is formed."""
        total = self.like.new_zeros(self.slots.count, self.columns.width)
        self.add_combined(total, coefficients, torch.arange(len(total), device=total.device))
        return total

    def add_combined(self, total: Tensor, coefficients: Tensor, places: Tensor) -> None:
        """Adds the same of each datum to a row of `total` `[rows, width]`, places `[count]`."""
        _add_runs(total, self.runs, self.slots, self.columns, (coefficients, places))


def _like(runs: Sequence[Sequence[tuple[UnitFactor, Tensor]]]) -> Tensor:
    """A tensor of the type and device of the scores of some runs."""
    first = next((factor for factors in runs for factor, _ in factors), None)
    return torch.empty(0) if first is None else first.group.coordinates[0].detach()


def _add_runs(
    total: Tensor,
    runs: Sequence[Sequence[tuple[UnitFactor, Tensor]]],
    slots: Slots,
    columns: BlockColumns,
    combination: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Adds scores, summed over runs.

    Args:
        total: what they are added to `[rows, width]`.
        runs: for each, its factors with a weight for every element of their sites.
        slots: which element belongs to which datum.
        columns: the blocks.
        combination: coefficients of each run and datum `[runs, count]`, and the row of each datum
            `[count]`; by default 1, and a row for each.
    """
    parts = columns.split(total)
    products: dict[str, list[_Products]] = {name: [] for name in parts}
    for number, factors in enumerate(runs):
        own = None if combination is None else (combination[0][number], combination[1])
        known: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
        for factor, weights in factors:
            key = id(factor.record), factor.group.name
            if key not in known:
                known[key] = _element_scores(factor, weights, slots, own)
            if factor.inputs is None:
                _add_entries(parts[factor.block], factor, *known[key])
            else:
                products[factor.block].append(_unit_products(factor, *known[key]))
    for name, found in products.items():
        _add_products(parts[name], found)


def _element_scores(
    factor: UnitFactor, weights: Tensor, slots: Slots, combination: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Weighted scores of a site's base elements in the coordinates of a group, and their rows.

    Args:
        factor: the site and the group.
        weights: `[*batch]`.
        slots: which element belongs to which datum.
        combination: coefficient and row of each datum `[count]`, or None for 1 and its own.

    Returns:
        `[elements, size]`, and the row of each element, of the base's batch shape; −1 for data that
        are left out.

    Raises:
        UnsupportedDistribution: if elements of several data share one distribution.
    """
    record = factor.record
    base: Any = peel(record.distribution)
    weights, joined = _to_base(weights, record.distribution), joined_dims(record.distribution)
    event = len(base.event_shape)
    value = base_value(record.distribution, record.value)
    shape = torch.broadcast_shapes(
        value.shape[: value.dim() - event], base.batch_shape, weights.shape
    )
    wide = base if shape == base.batch_shape else base.expand(shape)
    value = value.expand(torch.Size([*shape, *base.event_shape]))
    found = score(wide, factor.group.name, value) * weights.unsqueeze(-1)
    # The Jacobian does not depend on the value: enumerated values are summed first.
    found = found.sum_to_size(*base.batch_shape, found.shape[-1])
    batch = base.batch_shape[: len(base.batch_shape) - joined]
    try:
        rows = slots.along(batch)
    except RuntimeError as error:
        raise UnsupportedDistribution(
            f"site {record.name!r}: one distribution is shared by the elements of "
            f"{', '.join(plate.name for plate in slots.plates.plates)}; expand it in the model"
        ) from error
    rows = rows.reshape(torch.Size([*batch, *[1] * joined]))
    if combination is not None and slots.count:
        coefficients, places = (part[rows.clamp_min(0)] for part in combination)
        found, rows = found * coefficients.unsqueeze(-1), torch.where(rows < 0, rows, places)
    return found.reshape(-1, found.shape[-1]), rows.expand(base.batch_shape)


def _to_base(weights: Tensor, distribution: Distribution) -> Tensor:
    """Weights of a distribution's elements as those of its base.

    Unlike `weights.spread_weights` this keeps dimensions along which a value is enumerated.
    """
    for wrapper in wrappers(distribution):
        dims = getattr(wrapper, "reinterpreted_batch_ndims", 0)
        weights = weights.reshape(*weights.shape, *[1] * dims)
        if hasattr(wrapper, "_mask"):
            weights = weights * torch.as_tensor(wrapper._mask, device=weights.device)
    return weights


class _Products(NamedTuple):
    """Scores δ ⊗ a of linear units.

    Attributes:
        slopes: δ `[rows, units]`.
        inputs: a `[rows, size]`.
        places: datum of each row `[rows]`, or of each of its units `[rows, units]`.
    """

    slopes: Tensor
    inputs: Tensor
    places: Tensor


def _unit_products(factor: UnitFactor, scores: Tensor, rows: Tensor) -> _Products:
    """Scores of linear units, of data that are wanted."""
    units, inputs = factor.units, factor.inputs
    assert inputs is not None
    slopes = scores.reshape(-1, units).to(inputs.dtype)
    if factor.slope is not None:
        slopes = slopes * factor.slope.to(inputs.dtype)
    rows = rows.reshape(-1, units)
    repeats = len(slopes) // len(inputs)
    if factor.places is not None:
        inputs = inputs[factor.places]
    elif repeats > 1:
        inputs = inputs.repeat(repeats, 1)
    if rows.stride(1) and not bool((rows == rows[:, :1]).all()):
        return _Products(slopes, inputs, rows)
    chosen = rows[:, 0] >= 0
    return _Products(slopes[chosen], inputs[chosen], rows[chosen, 0])


def _add_products(total: Tensor, products: Sequence[_Products]) -> None:
    """Adds scores of linear units to those of a block `[rows, units, size]`."""
    alike: dict[tuple[int, ...], list[_Products]] = {}
    for some in products:
        if some.places.dim() == 1:
            alike.setdefault(tuple(some.places.tolist()), []).append(some)
        else:
            row, unit = (some.places >= 0).nonzero(as_tuple=True)
            values = some.slopes[row, unit].unsqueeze(1) * some.inputs[row]
            cells = some.places[row, unit], unit
            total.index_put_(cells, values.to(total.dtype), accumulate=True)
    for places, group in alike.items():
        slopes = torch.stack([some.slopes for some in group], 2).to(total.dtype)
        inputs = torch.stack([some.inputs for some in group], 1).to(total.dtype)
        pieces = _consecutive(places)
        if len(pieces) <= max(len(places) // FEW, 1):
            for own, rows in pieces:
                total[rows].baddbmm_(slopes[own], inputs[own])
        else:
            total.index_add_(0, group[0].places, slopes @ inputs)


def _consecutive(places: Sequence[int]) -> list[tuple[slice, slice]]:
    """Pieces of a sequence that count up by one: where they are, and what they are."""
    starts = [i for i, place in enumerate(places) if i == 0 or place != places[i - 1] + 1]
    return [
        (slice(start, end), slice(places[start], places[start] + end - start))
        for start, end in pairwise([*starts, len(places)])
    ]


def _add_entries(total: Tensor, factor: UnitFactor, scores: Tensor, rows: Tensor) -> None:
    assert factor.jacobian is not None
    rows = rows.reshape(-1)
    chosen = rows >= 0
    if factor.table is not None:
        _add_rows(total, factor.jacobian, factor.table, scores[chosen], rows[chosen], chosen)
        return
    jacobian = factor.jacobian.unflatten(0, scores.shape)[chosen]
    products = torch.einsum("nc,ncus->nus", scores[chosen].to(jacobian.dtype), jacobian)
    total.index_add_(0, rows[chosen], products.to(total.dtype))


def _add_rows(
    total: Tensor, jacobian: Tensor, table: TableRows, scores: Tensor, rows: Tensor, chosen: Tensor
) -> None:
    """The same by rows of a table: the scores of a datum in each row are summed first."""
    count, size = len(table.first), scores.shape[1]
    summed = jacobian.new_zeros(len(total) * count, size)
    summed.index_add_(0, rows * count + table.numbers[chosen], scores.to(jacobian.dtype))
    by_row = jacobian.unflatten(0, (count, size))
    total += torch.einsum("brc,rcus->bus", summed.unflatten(0, (-1, count)), by_row)


def element_weights(record: SiteRecord) -> Tensor:
    """√scale × mask `[*batch]`, so that squares of scores count as the loss does."""
    return record.base_weights().sqrt()
