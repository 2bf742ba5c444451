"""Learning rates of single parameters, schedules of torch, and bounds on gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import torch
from torch import Tensor

Schedule: TypeAlias = Callable[[int], float]
"""Step number, from 0, → learning rate."""


@dataclass(frozen=True)
class PerName:
    """A learning rate with factors for some parameters: lr_t(name) = base_t · factor_t(name).

    Of several patterns that match a name the last one counts; without a match the factor is 1. The
    factors are for natural steps and the scaled Adam; `others` have settings of their own. They
    come after the bounds per datum of `KLTrustRegion` and before its radius.

    Attributes:
        base: rate, or schedule from step number to rate.
        factors: factor, or schedule from step number to factor, by name or pattern (`"encoder*"`).
    """

    base: float | Schedule
    factors: Mapping[str, float | Schedule]

    def __post_init__(self) -> None:
        """Checks the factors.

        Raises:
            ValueError: naming a pattern whose factor is negative or not finite.
        """
        for pattern, factor in self.factors.items():
            if not callable(factor) and not 0 <= factor < math.inf:
                raise ValueError(f"the factor of {pattern!r} must be finite and not negative")

    def __call__(self, step: int) -> float:
        """The base rate at a step."""
        return _at(self.base, step)

    def factor(self, name: str, step: int) -> float:
        """The factor of a parameter at a step."""
        found = [factor for pattern, factor in self.factors.items() if fnmatchcase(name, pattern)]
        return _at(found[-1], step) if found else 1.0

    def unmatched(self, names: Iterable[str]) -> list[str]:
        """Patterns that match none of some names."""
        names = list(names)
        return [p for p in self.factors if not any(fnmatchcase(name, p) for name in names)]


def _at(rate: float | Schedule, step: int) -> float:
    return float(rate(step)) if callable(rate) else float(rate)


@dataclass(frozen=True)
class FromTorch:
    """The rates of a scheduler of torch, as a schedule: a function of the step number.

    The scheduler runs on an optimizer of its own, one `scheduler.step()` for each step; nothing has
    to be called or saved.

    Attributes:
        scheduler: makes it from an optimizer, as `lambda o: CosineAnnealingLR(o, 100)` does.
        initial: rate of the optimizer.

    Example:
        >>> from torch.optim.lr_scheduler import StepLR
        >>> schedule = FromTorch(lambda optimizer: StepLR(optimizer, 2, gamma=0.5), 0.8)
        >>> [schedule(step) for step in range(5)]
        [0.8, 0.8, 0.4, 0.4, 0.2]
    """

    scheduler: Callable[[torch.optim.Optimizer], Any]
    initial: float
    _rates: list[float] = field(default_factory=list, init=False, repr=False, compare=False)
    _running: list[Any] = field(default_factory=list, init=False, repr=False, compare=False)

    def __call__(self, step: int) -> float:
        """The rate at a step.

        Args:
            step: number of the step; all steps up to the largest that was asked for are remembered.

        Returns:
            The rate.

        Raises:
            TypeError: if the scheduler goes by a metric, as `ReduceLROnPlateau` does.
        """
        if not self._running:
            optimizer = torch.optim.SGD([torch.zeros((), requires_grad=True)], lr=self.initial)
            scheduler = self.scheduler(optimizer)
            if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
                raise TypeError("ReduceLROnPlateau goes by a metric; its rates are no schedule")
            self._running.extend([optimizer, scheduler])
            self._rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer, scheduler = self._running
        while len(self._rates) <= step:
            optimizer.step()
            scheduler.step()
            self._rates.append(float(optimizer.param_groups[0]["lr"]))
        return self._rates[step]


@dataclass(frozen=True)
class Clip:
    """Shrinks gradients whose norm exceeds a bound, keeping their direction.

    `KLTrustRegion` bounds what a step does; this bounds what a single batch can say, whatever the
    learning rate.

    Attributes:
        natural: largest √(gᵀ(G + λ)⁻¹g) of all parameters with a metric together, in √nats.
        euclidean: largest √(gᵀg) of all parameters without a metric together, as
            `torch.nn.utils.clip_grad_norm_` bounds it; before `others` or the scaled Adam see it.
    """

    natural: float = math.inf
    euclidean: float = math.inf

    def __post_init__(self) -> None:
        """Checks the bounds.

        Raises:
            ValueError: if one is not positive.
        """
        if not (self.natural > 0 and self.euclidean > 0):
            raise ValueError(f"bounds on norms must be positive, not {self}")

    def natural_factor(self, norm: Tensor) -> Tensor | float:
        """Factor on the natural gradient, at most 1."""
        return 1.0 if math.isinf(self.natural) else _shrinking(self.natural, norm)

    @torch.no_grad()
    def shrink(self, gradients: Mapping[str, Tensor]) -> None:
        """Scales gradients of parameters without a metric in place.

        Args:
            gradients: by name, of any shapes.
        """
        if math.isinf(self.euclidean) or not gradients:
            return
        squares = [gradient.square().sum() for gradient in gradients.values()]
        norm = torch.stack([square.to(squares[0]) for square in squares]).sum().sqrt()
        factor = _shrinking(self.euclidean, norm)
        for gradient in gradients.values():
            gradient.mul_(factor.to(gradient))


def _shrinking(bound: float, norm: Tensor) -> Tensor:
    return (bound / norm.clamp_min(torch.finfo(norm.dtype).tiny)).clamp_max(1.0)
