"""Importance weights per datum: over plates whose elements are independent given parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from pyronat.families import peel
from pyronat.records import Plate, SiteRecord


@dataclass(frozen=True)
class DatumPlates:
    """The plates around every random site: their elements carry weights of their own.

    Attributes:
        plates: sorted by dimension, leftmost first.
    """

    plates: tuple[Plate, ...]

    @property
    def scale(self) -> float:
        """Full number of data over the number in the minibatch."""
        return prod(plate.scale for plate in self.plates)

    def log_prob(self, records: Sequence[SiteRecord], kept: Sequence[int] = ()) -> Tensor:
        """Log-probability of all sites for each datum.

        Subsampling over the shared plates does not count; inner subsampling and `poutine.scale` do.

        Args:
            records: sites with log-probabilities.
            kept: further batch dimensions to keep, as that of vectorized particles.

        Returns:
            Tensor `[*kept, *plates]` in nats, dimensions in the order of the batch shape.
        """
        dims = {*kept, *(plate.dim for plate in self.plates)}
        total: Tensor | float = 0.0
        for record in records:
            log_prob = record.log_prob
            assert log_prob is not None
            if record.mask is not None:
                mask = torch.as_tensor(record.mask, device=log_prob.device)
                log_prob = torch.where(mask, log_prob, torch.zeros_like(log_prob))
            log_prob = log_prob * (record.scale / self.scale)
            summed = [dim for dim in range(-log_prob.dim(), 0) if dim not in dims]
            total = total + (log_prob.sum(summed) if summed else log_prob)
        return torch.as_tensor(total)

    def spread(self, weights: Tensor, record: SiteRecord) -> Tensor:
        """Weights `[*plates]` laid along the batch dimensions of a site."""
        width = max((-plate.dim for plate in self.plates), default=0)
        shape = [1] * width
        for plate, size in zip(self.plates, weights.shape, strict=True):
            shape[plate.dim] = size
        return weights.reshape(shape) * record.base_weights()


def datum_plates(records: Sequence[SiteRecord], ignored: Sequence[str] = ()) -> DatumPlates:
    """Plates common to all sites with a density of their own.

    A site outside a plate ties the elements of that plate together: their weights are then joint.

    Args:
        records: scored sites of model and guide.
        ignored: plates that do not count, as that of vectorized particles.

    Returns:
        The shared plates.
    """
    stacks = [
        {plate.name: plate for plate in record.plates if plate.name not in ignored}
        for record in records
        if type(peel(record.distribution)).__name__ != "Delta"
    ]
    shared = set(stacks[0]).intersection(*stacks) if stacks else set()
    plates = [stacks[0][name] for name in shared]
    return DatumPlates(tuple(sorted(plates, key=lambda plate: plate.dim)))


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """1 / Σ_k w_k² of the normalized weights of each datum.

    Args:
        log_weights: `[particles, *data]` in nats.

    Returns:
        `[*data]`, between 1 and the number of particles.
    """
    return 1 / log_weights.softmax(0).square().sum(0)
