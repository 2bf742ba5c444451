"""Scores of single data: ∇ log p(x_r | x_pa(r)) in the entries of blocks, datum by datum.

The factors of a run give Jacobians, the family gives ∂ log p / ∂θ; a datum's score is the sum of
their products over the elements that belong to it. For linear units it is δ ⊗ a.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
    return _summed([factors], slots, columns)


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

    def combined(self, coefficients: Tensor) -> Tensor:
        """Σ_k c_k s_k `[count, width]` for coefficients c `[runs, count]`; no s_k is formed."""
        return _summed(self.runs, self.slots, self.columns, coefficients)


def _summed(
    runs: Sequence[Sequence[tuple[UnitFactor, Tensor]]],
    slots: Slots,
    columns: BlockColumns,
    coefficients: Tensor | None = None,
) -> Tensor:
    """The sum over runs `[count, width]`, weighted by `[runs, count]` coefficients or plain."""
    first = next((factor for factors in runs for factor, _ in factors), None)
    like = torch.empty(0) if first is None else first.group.coordinates[0].detach()
    total = {
        name: like.new_zeros(slots.count, block.count, block.size)
        for name, block in columns.blocks.items()
    }
    for number, factors in enumerate(runs):
        known: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
        for factor, weights in factors:
            key = id(factor.record), factor.group.name
            if key not in known:
                found, rows = _element_scores(factor, weights, slots)
                if coefficients is not None and slots.count:
                    found = found * coefficients[number][rows.clamp_min(0)].unsqueeze(1)
                known[key] = found, rows
            _add(total[factor.block], factor, *known[key])
    return columns.join(total)


def _element_scores(factor: UnitFactor, weights: Tensor, slots: Slots) -> tuple[Tensor, Tensor]:
    """Weighted scores of a site's base elements in the coordinates of a group, and their rows.

    Args:
        factor: the site and the group.
        weights: `[*batch]`.
        slots: which element belongs to which datum.

    Returns:
        `[elements, size]`, and the row of each element `[elements]`.

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
    rows = rows.reshape(torch.Size([*batch, *[1] * joined])).expand(base.batch_shape)
    return found.reshape(-1, found.shape[-1]), rows.reshape(-1)


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


def _add(total: Tensor, factor: UnitFactor, scores: Tensor, rows: Tensor) -> None:
    """Adds Jᵀ δ of one factor to the scores `[rows, count, size]` of its block."""
    if factor.inputs is None:
        _add_entries(total, factor, scores, rows)
        return
    units, inputs = factor.units, factor.inputs
    slopes = scores.reshape(-1, units)
    if factor.slope is not None:
        slopes = slopes * factor.slope
    rows = rows.reshape(-1, units)
    repeats = len(slopes) // len(inputs)
    if factor.places is not None:
        inputs = inputs[factor.places]
    elif repeats > 1:
        inputs = inputs.repeat(repeats, 1)
    if bool((rows == rows[:, :1]).all()):
        if torch.equal(rows[:, 0], torch.arange(len(total), device=rows.device)):
            total.baddbmm_(slopes.unsqueeze(2), inputs.unsqueeze(1))
            return
        chosen = rows[:, 0] >= 0
        products = slopes[chosen].unsqueeze(2) * inputs[chosen].unsqueeze(1)
        total.index_add_(0, rows[chosen, 0], products)
        return
    row, unit = (rows >= 0).nonzero(as_tuple=True)
    products = slopes[row, unit].unsqueeze(1) * inputs[row]
    total.view(-1, inputs.shape[1]).index_add_(0, rows[row, unit] * units + unit, products)


def _add_entries(total: Tensor, factor: UnitFactor, scores: Tensor, rows: Tensor) -> None:
    assert factor.jacobian is not None
    chosen = rows >= 0
    if factor.table is not None:
        _add_rows(total, factor.jacobian, factor.table, scores[chosen], rows[chosen], chosen)
        return
    jacobian = factor.jacobian.unflatten(0, scores.shape)[chosen]
    products = torch.einsum("nc,ncus->nus", scores[chosen], jacobian)
    total.index_add_(0, rows[chosen], products)


def _add_rows(
    total: Tensor, jacobian: Tensor, table: TableRows, scores: Tensor, rows: Tensor, chosen: Tensor
) -> None:
    """The same by rows of a table: the scores of a datum in each row are summed first."""
    count, size = len(table.first), scores.shape[1]
    summed = scores.new_zeros(len(total) * count, size)
    summed.index_add_(0, rows * count + table.numbers[chosen], scores)
    by_row = jacobian.unflatten(0, (count, size))
    total += torch.einsum("brc,rcus->bus", summed.unflatten(0, (-1, count)), by_row)


def element_weights(record: SiteRecord) -> Tensor:
    """√scale × mask `[*batch]`, so that squares of scores count as the loss does."""
    return record.base_weights().sqrt()
