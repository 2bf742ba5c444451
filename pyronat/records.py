"""What a run of a program leaves behind: plain records of sites, without a word of Pyro."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.distributions.utils import lazy_property


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
    inner: Any = record.distribution
    masks = [(record.mask, len(inner.event_shape))]
    while hasattr(inner, "base_dist"):
        masks.append((getattr(inner, "_mask", None), len(inner.event_shape)))
        inner = inner.base_dist
    for mask, event_dim in masks:
        if mask is not None:
            part = torch.as_tensor(mask, device=found.device)
            found = found & part.reshape(*part.shape, *[1] * event_dim)
    return found


def distribution_tensors(distribution: Distribution) -> list[Tensor]:
    """All tensors that a distribution and the distributions and transforms in it hold."""
    return [tensor for alternatives in held_tensors(distribution) for tensor in alternatives]


def held_tensors(distribution: Distribution) -> list[tuple[Tensor, ...]]:
    """Tensors that a distribution holds, those together that are computed from one of them.

    Distributions keep what they compute on demand, as probabilities of logits. Which ones they
    hold thus depends on what has been asked of them.

    Args:
        distribution: with its wrappers.

    Returns:
        Tuples of one tensor, or of one tensor and what has been computed from it, in any order,
        where the distribution does not say which one it was given.
    """
    found: list[tuple[Tensor, ...]] = []
    stack: list[Any] = [distribution]
    seen: set[int] = set()
    while stack:
        item = stack.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        listed = isinstance(item, (list, tuple))
        named = list(enumerate(item)) if listed else list(_attributes(item).items())
        kind: Any = type(item)
        lazy = _computed_on_demand(kind)
        alternatives = []
        for name, part in named:
            if isinstance(part, Tensor):
                if name in lazy:
                    alternatives.append(part)
                elif id(part) not in seen:
                    seen.add(id(part))
                    found.append((part,))
            elif isinstance(part, _HOLDERS) and not isinstance(part, torch.Size):
                stack.append(part)
        if alternatives and not any(str(name).startswith("_unbroadcasted") for name, _ in named):
            given = [part for part in alternatives if part is getattr(item, "_param", None)]
            found.append(tuple(given or alternatives))
    return found


def _attributes(item: Any) -> dict[Any, Any]:
    if isinstance(item, dict):
        return item
    # Transforms remember the last value that they have seen.
    return {name: part for name, part in vars(item).items() if not name.startswith("_cached")}


@cache
def _computed_on_demand(kind: Any) -> frozenset[str]:
    return frozenset(
        name
        for ancestor in getattr(kind, "__mro__", ())
        for name, attribute in vars(ancestor).items()
        if isinstance(attribute, lazy_property)
    )


_HOLDERS = (Distribution, torch.distributions.Transform, torch.nn.Module, list, tuple, dict)
