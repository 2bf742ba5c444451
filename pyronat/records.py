"""What a run of a program leaves behind: plain records of sites, without a word of Pyro."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyronat.wrappers import distribution_tensors as distribution_tensors
from pyronat.wrappers import held_tensors as held_tensors
from pyronat.wrappers import wrappers


@dataclass(frozen=True)
class Plate:
    """A vectorized plate around a site.

    Attributes:
        name: name of the plate.
        dim: its batch dimension, negative.
        scale: full size over subsample size.
    """

    name: str
    dim: int
    scale: float


@dataclass(frozen=True)
class SiteRecord:
    """One random variable in one run of a program.

    Attributes:
        name: name of the site.
        distribution: its distribution with all wrappers, parameters attached to the graph.
        value: `[*batch, *event]`.
        observed: whether the value is data.
        scale: factor of the log-probability, from subsampling or `poutine.scale`.
        mask: elements that count, or None for all.
        plates: the vectorized plates around the site, outermost first.
        log_prob: unscaled log-probability `[*batch]` in nats, or None where it was not computed.
        enumeration_dim: batch dimension along which the value is enumerated, or None.
        num_values: values that are enumerated one by one, in traces of their own, or None.
        num_samples: values drawn to stand for an enumeration, or None.
    """

    name: str
    distribution: Distribution
    value: Tensor
    observed: bool
    scale: float | Tensor
    mask: bool | Tensor | None
    plates: tuple[Plate, ...]
    log_prob: Tensor | None
    enumeration_dim: int | None = None
    num_values: int | None = None
    num_samples: int | None = None

    def base_weights(self) -> Tensor:
        """Scale × mask, `[*batch]`: what one element's log-probability counts for."""
        shape = self.distribution.batch_shape
        weights = torch.as_tensor(self.scale, dtype=self.dtype, device=self.value.device)
        weights = weights.detach().expand(shape)
        if self.mask is not None:
            weights = weights * torch.as_tensor(self.mask, device=weights.device)
        return weights

    @property
    def largest_scale(self) -> float | Tensor:
        """The largest scale of an element, a number or a 0-d tensor."""
        return self.scale.max() if isinstance(self.scale, Tensor) else self.scale

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of the distribution's tensors."""
        tensors = distribution_tensors(self.distribution)
        return next((t.dtype for t in tensors if t.is_floating_point()), torch.get_default_dtype())


@dataclass(frozen=True)
class Run:
    """One run of a program: its random variables and its parameters.

    Attributes:
        records: random variables in program order.
        params: unconstrained leaves by name, sorted.
    """

    records: tuple[SiteRecord, ...]
    params: dict[str, Tensor]


def visible_elements(record: SiteRecord) -> Tensor:
    """Which elements of a site's value no mask hides, broadcastable to the value."""
    found = torch.tensor(True, device=record.value.device)
    masks = [(record.mask, len(record.distribution.event_shape))]
    for wrapper in wrappers(record.distribution):
        masks.append((getattr(wrapper, "_mask", None), len(wrapper.event_shape)))
    for mask, event_dim in masks:
        if mask is not None:
            part = torch.as_tensor(mask, device=found.device)
            found = found & part.reshape(*part.shape, *[1] * event_dim)
    return found
