"""Geometries: which metric turns a gradient into a step. Strategy objects without state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

from pyronat.blocks import CHOICES, Structure
from pyronat.steps import CrossValidated, HeldOut, LevenbergMarquardt, RetainedShare

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
    def structures(self) -> Mapping[str, Structure]:
        """Names or patterns of parameters → how blocks that hold them are held."""
        return {}

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
        structure: names or patterns of parameters (`{"decoder*": "dual"}`) → how the blocks that
            hold them are held, see `ParamBlock.structure`: "dense", "shared", "kronecker", "kfac",
            "dual", "cg" or "diagonal". By default a joint block of up to 2048 entries is dense, a
            larger one is held in Kronecker factors of its layers, or by rows where it has none. In
            training, linear units whose matrices would have more than 2²⁰ entries are "shared";
            "dense" keeps the matrices, "cg" solves with them to a tenth of their norm and forms
            none.
    """

    expectation: Expectation = "pooled"
    num_runs: int = 1
    structure: Mapping[str, Structure] = field(default_factory=dict, hash=False)

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
        unknown = sorted(set(self.structure.values()) - CHOICES)
        if unknown:
            raise ValueError(f"structure is one of {', '.join(sorted(CHOICES))}, not {unknown}")

    @property
    def structures(self) -> Mapping[str, Structure]:
        """What was asked for."""
        return self.structure

    @property
    def sources(self) -> dict[Source, float]:
        """Shares of the expectations."""
        return dict(_SOURCES[self.expectation])


Posterior: TypeAlias = Literal["guide", "enumerate", "exact"]

Estimator: TypeAlias = Literal["auto", "direct", "subtractive", "observed"]

Rule: TypeAlias = LevenbergMarquardt | HeldOut | RetainedShare | CrossValidated
"""Adapts ρ."""


@dataclass(frozen=True)
class Visible(Geometry):
    """The visible geometry, regularized by the full one: how p(v; ξ) moves (Ay, Sec. 3 and 4).

    A_ρ = (1 − ρ) G_V + ρ G with G_V = E_v[s_V s_Vᵀ] and s_V(v) = E_{p(h|v)}[∇ log p(v, h)], as a
    correction of the local blocks of G within each district. Families without hidden members keep
    their exact local block. ρ = 1 is the full geometry; where the posterior is known badly, the
    estimates below fall back to it by themselves.

    Attributes:
        mixing: ρ, a schedule from step number to ρ, or a rule that adapts it:
            `steps.LevenbergMarquardt`, for losses without noise, or `steps.HeldOut`, for
            minibatches, or `steps.RetainedShare`, for streams, or `steps.CrossValidated`, for
            minibatches of which it is not known whether the visible geometry pays. "auto" is the
            last one.
        posterior: where p(h|v) comes from,

            - "guide": weighted guide draws, the dream's own h among them;
            - "enumerate": exactly, by enumeration of the discrete hidden sites with variable
              elimination, for each dream;
            - "exact": the same for all joint values of visible and hidden sites, instead of
              dreams: the oracle for small nets.
        num_particles: hidden values K for each dream, its own included, with "guide".
        num_dreams: dreams behind each estimate. By default those of one run of the model, one for
            each element of independent plates, but no fewer than 200 (100 in districts of more than
            512 parameter entries) and no more than 100 for each entry.
        estimator: how dreams are used,

            - "direct": G_V from the scores s_V, good where dreams outnumber parameters;
            - "subtractive": G − E_v Cov[s | v], which keeps G where no dream has looked;
            - "auto": direct with at least 10 dreams for each parameter, averages over refreshes
              included, else subtractive;
            - "observed": no dreams but the Hessian of the loss, −∇² log p(v) at the data, for
              singular optima; the loss must be exact.
        memory: bytes that the scores of dreams may take at once, and the rows that are kept of
            them in districts too large for a matrix; there may be some times as much for moments.
        full: the full geometry that is mixed in. By default `Full("exact")` for "exact",
            `Full("model")` for "enumerate", else, and with `steps.CrossValidated`, `Full()`.
    """

    mixing: float | Callable[[int], float] | Rule | Literal["auto"] = 0.3
    num_particles: int = 10
    num_dreams: int | None = None
    posterior: Posterior = "guide"
    estimator: Estimator = "auto"
    full: Full | None = None
    memory: int = 2**28

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            ValueError: naming the option.
        """
        if self.posterior not in get_args(Posterior):
            raise ValueError(
                f"posterior must be one of {', '.join(get_args(Posterior))}, not {self.posterior!r}"
            )
        if self.estimator not in get_args(Estimator):
            raise ValueError(
                f"estimator must be one of {', '.join(get_args(Estimator))}, not {self.estimator!r}"
            )
        if self.mixing == "auto":
            object.__setattr__(self, "mixing", CrossValidated())
        if isinstance(self.mixing, str):
            raise ValueError(
                f'mixing is a share, a schedule, a rule or "auto", not {self.mixing!r}'
            )
        if isinstance(self.mixing, (int, float)) and not 0 <= self.mixing <= 1:
            raise ValueError(f"mixing is a share between 0 and 1, not {self.mixing}")
        if self.num_particles < 2:
            raise ValueError(f"num_particles must be at least 2, not {self.num_particles}")
        if self.num_dreams is not None and self.num_dreams < 1:
            raise ValueError(f"num_dreams must be at least 1, not {self.num_dreams}")

    @property
    def regularizer(self) -> Full:
        """The full geometry that is mixed in."""
        if self.full is not None:
            return self.full
        if isinstance(self.mixing, CrossValidated) and self.posterior != "exact":
            return Full()  # ρ = 1 is the geometry that there is without.
        defaults = {"exact": Full("exact"), "enumerate": Full("model"), "guide": Full()}
        return defaults[self.posterior]

    @property
    def structures(self) -> Mapping[str, Structure]:
        """Those of the full geometry."""
        return self.regularizer.structures

    @property
    def sources(self) -> dict[Source, float]:
        """Shares of the expectations of the full geometry."""
        return self.regularizer.sources


@dataclass(frozen=True)
class Euclidean(Geometry):
    """No metric: the parameters are left to the `others` optimizer."""

    @property
    def sources(self) -> dict[Source, float]:
        """None are needed."""
        return {}
