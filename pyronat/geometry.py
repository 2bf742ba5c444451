"""Geometries: which metric turns a gradient into a step. Strategy objects without state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, TypeAlias

Source: TypeAlias = Literal["dreams", "posterior", "exact"]
"""Where the parents of a site come from when its Fisher information is averaged."""

Expectation: TypeAlias = Literal["pooled", "model", "posterior", "exact"]

_SOURCES: dict[str, dict[Source, float]] = {
    "pooled": {"dreams": 0.5, "posterior": 0.5},
    "model": {"dreams": 1.0},
    "posterior": {"posterior": 1.0},
    "exact": {"exact": 1.0},
}


class Geometry(ABC):
    """A metric on the parameters of one program."""

    @property
    @abstractmethod
    def sources(self) -> dict[Source, float]:
        """Expectations to measure and their shares, which sum to 1; empty without a metric."""


@dataclass(frozen=True)
class Full(Geometry):
    """The full-system geometry: how p(v, h; ξ) moves (Ay, Sec. 2).

    G_r = E_{x_pa(r)}[J_rᵀ F(θ_r) J_r] for every site r, zero across sites that share no parameter:
    one block for each unit or joint set of parameters. The value of the site itself is integrated
    in closed form; `expectation` says where its parents come from.

    Attributes:
        expectation: for the model,

            - "model": dreams (v, h) ~ p, the Fisher information;
            - "exact": the same, by enumeration of all discrete parents, observed ones included;
            - "posterior": observed v and h weighted by the posterior, a Gauss–Newton-like metric;
            - "pooled": the mean of the first and the third, robust in training.

            For a guide, "exact" enumerates its discrete sites; all others use the guide's own
            samples on the data that gave the gradient.
        num_runs: dream runs of the model at a refresh; a run has one dream per plate element.
    """

    expectation: Expectation = "pooled"
    num_runs: int = 1

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            ValueError: naming the option.
        """
        if self.expectation not in _SOURCES:
            raise ValueError(
                f"expectation must be one of {', '.join(_SOURCES)}, not {self.expectation!r}"
            )
        if self.num_runs < 1:
            raise ValueError(f"num_runs must be at least 1, not {self.num_runs}")

    @property
    def sources(self) -> dict[Source, float]:
        """Shares of the expectations."""
        return dict(_SOURCES[self.expectation])


@dataclass(frozen=True)
class Euclidean(Geometry):
    """No metric: the parameters are left to the `others` optimizer."""

    @property
    def sources(self) -> dict[Source, float]:
        """None are needed."""
        return {}
