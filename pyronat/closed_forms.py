"""Closed forms of the Fisher information of scalar families, by groups of coordinates.

Each function takes a distribution and gives its groups. Where terms cancel, they are computed in
double precision, and by series where even that does not suffice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor

EULER = 0.57721566490153286
"""Euler's constant γ = −ψ(1)."""
LOGIT_WEIGHT = 0.25
"""Largest Fisher weight p (1 - p) of a Bernoulli logit."""
GUMBEL_WEIGHT = math.pi**2 / 6 + (1 - EULER) ** 2
"""Fisher information of the scale of a standard Gumbel distribution."""

Scores = tuple[Tensor, ...]
"""Scores of a value, one tensor for each coordinate."""


@dataclass(frozen=True)
class Group:
    """Coordinates of a family that are Fisher-orthogonal to its other groups.

    Attributes:
        name: what the coordinates are called, as in `loc`.
        coordinates: tensors `[*batch, *event]`, attached to the autograd graph.
        measure: computes `fisher`.
        event_dim: number of event dimensions of the coordinates.
        bound: largest Fisher weight a coordinate can attain, or None where it is unbounded.
        closed_score: value `[*batch, *event]` → ∂ log p / ∂ coordinates in closed form, one tensor
            for each coordinate, where the log density does not use the coordinates themselves.
    """

    name: str
    coordinates: tuple[Tensor, ...]
    measure: Callable[[], Tensor]
    event_dim: int = 0
    bound: Tensor | float | None = None
    closed_score: Callable[[Tensor], Scores] | None = None

    @cached_property
    def fisher(self) -> Tensor:
        """E[-Hessian of log p] `[*batch, size, size]`, detached, in nats per squared unit."""
        with torch.no_grad():
            return self.measure().detach()

    @property
    def size(self) -> int:
        """Number of coordinates of one batch element."""
        shape = self.coordinates[0].shape
        return len(self.coordinates) * prod(shape[len(shape) - self.event_dim :])

    @property
    def scalar(self) -> bool:
        """Whether one batch element has a single scalar coordinate."""
        return len(self.coordinates) == 1 and not self.event_dim


# --- building blocks ---------------------------------------------------------------------------


def diagonal(*weights: Tensor) -> Tensor:
    """Diagonal matrices `[*batch, size, size]` of weights `[*batch]`."""
    return torch.diag_embed(torch.stack(torch.broadcast_tensors(*weights), -1))


def square(*entries: Tensor) -> Tensor:
    """Matrices `[*batch, size, size]` of their entries `[*batch]`, row by row."""
    size = math.isqrt(len(entries))
    found: Tensor = torch.stack(torch.broadcast_tensors(*entries), -1).unflatten(-1, (size, size))
    return found


def scalar(
    name: str,
    coordinate: Tensor,
    weight: Callable[[], Tensor],
    bound: Tensor | float | None = None,
    closed_score: Callable[[Tensor], Scores] | None = None,
) -> Group:
    """A group of one scalar coordinate.

    Args:
        name: of the coordinate.
        coordinate: `[*batch]`.
        weight: computes its Fisher information `[*batch]`.
        bound: as of `Group`.
        closed_score: as of `Group`.

    Returns:
        The group.
    """
    return Group(name, (coordinate,), lambda: diagonal(weight()), 0, bound, closed_score)


def polygamma(order: int, x: Tensor) -> Tensor:
    """ψ_order(x), the derivatives of the digamma function ψ_0."""
    found: Tensor = torch.polygamma(order, x)
    return found


def trigamma(x: Tensor) -> Tensor:
    """ψ_1(x)."""
    return polygamma(1, x)


def precisely(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """A function computed in double precision, where its terms cancel."""
    return function(*(tensor.double() for tensor in tensors)).to(tensors[0].dtype)


# --- counts and choices of two -----------------------------------------------------------------


def bernoulli(d: Any) -> tuple[Group, ...]:
    """F = p (1 − p) of the logit."""

    def closed_score(x: Tensor) -> Scores:
        return (x - d.probs,)

    return (
        scalar("logits", d.logits, lambda: d.probs * (1 - d.probs), LOGIT_WEIGHT, closed_score),
    )


def binomial(d: Any) -> tuple[Group, ...]:
    """F = n p (1 − p) of the logit, the number of trials n being fixed."""
    count = d.total_count.detach().clamp(min=0)

    def weight() -> Tensor:
        variance: Tensor = count * d.probs * (1 - d.probs)
        return variance

    def closed_score(x: Tensor) -> Scores:
        return (x - count * d.probs,)

    return (scalar("logits", d.logits, weight, LOGIT_WEIGHT * count, closed_score),)


def geometric(d: Any) -> tuple[Group, ...]:
    """F = 1 − p of the logit, from log p(x) = log p + x log(1 − p)."""

    def closed_score(x: Tensor) -> Scores:
        return (1 - d.probs - x * d.probs,)

    return (scalar("logits", d.logits, lambda: 1 - d.probs, 1.0, closed_score),)


def negative_binomial(d: Any) -> tuple[Group, ...]:
    """F = r p of the logit, the number of failures r being fixed."""

    def closed_score(x: Tensor) -> Scores:
        return (x * (1 - d.probs) - d.total_count * d.probs,)

    def weight() -> Tensor:
        found: Tensor = d.total_count * d.probs
        return found

    bound = d.total_count.detach()
    return (scalar("logits", d.logits, weight, bound, closed_score),)


def poisson(d: Any) -> tuple[Group, ...]:
    """F = 1 / rate."""

    def closed_score(x: Tensor) -> Scores:
        return (x / d.rate - 1,)

    return (scalar("rate", d.rate, lambda: 1 / d.rate, None, closed_score),)


def continuous_bernoulli(d: Any) -> tuple[Group, ...]:
    """F = Var x = 1/λ² − 1/(4 sinh²(λ/2)) of the logit λ, at most 1/12."""

    def variance(logits: Tensor) -> Tensor:
        small = logits.abs() < 0.3
        wide = torch.where(small, torch.ones_like(logits), logits)
        large = wide**-2 - (2 * (wide / 2).sinh()) ** -2
        squared = torch.where(small, logits, torch.zeros_like(logits)) ** 2
        series = 1 / 12 - squared * (1 / 240 - squared * (1 / 6048 - squared / 172800))
        return torch.where(small, series, large)

    def mean(logits: Tensor) -> Tensor:
        small = logits.abs() < 0.3
        wide = torch.where(small, torch.ones_like(logits), logits)
        large = -1 / torch.expm1(-wide) - 1 / wide
        near = torch.where(small, logits, torch.zeros_like(logits))
        squared = near**2
        odd = 1 / 12 - squared * (1 / 720 - squared * (1 / 30240 - squared / 1209600))
        return torch.where(small, 0.5 + near * odd, large)

    def closed_score(x: Tensor) -> Scores:
        return (x - precisely(mean, d.logits),)

    def weight() -> Tensor:
        return precisely(variance, d.logits)

    return (scalar("logits", d.logits, weight, 1 / 12, closed_score),)


def relaxed_bernoulli(d: Any) -> tuple[Group, ...]:
    """F = 1/3 of the logit: noise is logistic, the temperature being fixed."""
    third = 1 / 3
    return (scalar("logits", d.logits, lambda: torch.full_like(d.logits, third), third),)


# --- location and scale ------------------------------------------------------------------------


def location_scale(loc: float, scale: float) -> Callable[[Any], tuple[Group, ...]]:
    """Families symmetric about loc: F = loc/s² and scale/s², orthogonal to each other.

    Args:
        loc: Fisher information of the location at scale 1.
        scale: Fisher information of the scale at scale 1.

    Returns:
        The function of a family.
    """

    def family(d: Any) -> tuple[Group, ...]:
        return (
            Group("loc", (d.loc,), lambda: diagonal(loc * d.scale**-2)),
            Group("scale", (d.scale,), lambda: diagonal(scale * d.scale**-2)),
        )

    return family


def pure_scale(weight: float) -> Callable[[Any], tuple[Group, ...]]:
    """Families of one scale: F = weight/s².

    Args:
        weight: Fisher information at scale 1.

    Returns:
        The function of a family.
    """

    def family(d: Any) -> tuple[Group, ...]:
        return (scalar("scale", d.scale, lambda: weight * d.scale**-2),)

    return family


def gumbel(d: Any) -> tuple[Group, ...]:
    """F = [[1, γ − 1], [γ − 1, π²/6 + (1 − γ)²]] / s² of loc and scale."""

    def fisher() -> Tensor:
        one = torch.ones_like(d.scale)
        off = (EULER - 1) * one
        plain = square(one, off, off, GUMBEL_WEIGHT * one)
        found: Tensor = plain / d.scale[..., None, None] ** 2
        return found

    return (Group("loc, scale", (d.loc, d.scale), fisher),)


def student_t(d: Any) -> tuple[Group, ...]:
    """F of loc, and of df and scale together (Lange, Little and Taylor 1989)."""

    def loc_weight() -> Tensor:
        found: Tensor = (d.df + 1) / ((d.df + 3) * d.scale**2)
        return found

    def fisher() -> Tensor:
        df, scale = d.df, d.scale
        off = -2 / ((df + 1) * (df + 3) * scale)
        return square(precisely(df_weight, df), off, off, 2 * df / ((df + 3) * scale**2))

    return (scalar("loc", d.loc, loc_weight), Group("df, scale", (d.df, d.scale), fisher))


def df_weight(df: Tensor, dim: int = 1) -> Tensor:
    """Fisher information of the degrees of freedom ν of Student's t in p dimensions.

        F = [ψ_1(ν/2) − ψ_1((ν+p)/2)] / 4 − p (ν+p+4) / (2ν (ν+p) (ν+p+2))

    Args:
        df: ν `[*batch]`, in double precision.
        dim: p.

    Returns:
        `[*batch]` in nats per squared unit of ν.
    """
    direct = (trigamma(df / 2) - trigamma((df + dim) / 2)) / 4
    direct = direct - dim * (df + dim + 4) / (2 * df * (df + dim) * (df + dim + 2))
    # Terms of the orders ν⁻² and ν⁻³ cancel.
    third = dim * (9 * dim**3 + 92 * dim**2 + 96 * dim + 40) / 6
    series = dim * (dim + 6) / 2 - dim * (dim**2 + 8 * dim + 4) / df + third / df**2
    return torch.where(df > 1000, series / df**4, direct)


def skew_logistic(d: Any) -> tuple[Group, ...]:
    """The generalized logistic family of type I, with the distribution function σ(z)^a.

    F_loc,loc = a / (a+2) / s², F_loc,scale = a m / (a+2) / s²,
    F_scale,scale = [1 + a (v + m²) / (a+2)] / s², F_loc,a = 1 / ((a+1) s),
    F_scale,a = (ψ(a) − ψ(2)) / ((a+1) s), F_aa = 1/a²,
    where m = ψ(a+1) − ψ(2) and v = ψ_1(a+1) + ψ_1(2).
    """

    def fisher() -> Tensor:
        s, a = d.scale, d.asymmetry
        two = torch.full_like(a, 2.0)
        mean = torch.digamma(a + 1) - torch.digamma(two)
        spread = trigamma(a + 1) + trigamma(two)
        share = a / (a + 2)
        first = 1 / ((a + 1) * s)
        second = (torch.digamma(a) - torch.digamma(two)) * first
        cross = share * mean / s**2
        scale = (1 + share * (spread + mean**2)) / s**2
        return square(share / s**2, cross, first, cross, scale, second, first, second, a**-2)

    return (Group("loc, scale, asymmetry", (d.loc, d.scale, d.asymmetry), fisher),)


def asymmetric_laplace(d: Any) -> tuple[Group, ...]:
    """F of loc, scale s and asymmetry k, through the scales L = s k and R = s / k of the sides.

    With T = L + R: F_loc,loc = 1/(LR), F_LL = 2/(LT) − 1/T², F_RR = 2/(RT) − 1/T²,
    F_LR = −1/T², F_loc,L = −1/(LT), F_loc,R = 1/(RT).
    """

    def fisher() -> Tensor:
        s, k = d.scale, d.asymmetry
        left, right = s * k, s / k
        total = left + right
        a, b, c = 1 / (left * total), 1 / (right * total), total**-2
        sides = square(1 / (left * right), -a, b, -a, 2 * a - c, -c, b, -c, 2 * b - c)
        one, zero = torch.ones_like(s), torch.zeros_like(s)
        slopes = square(one, zero, zero, zero, k, s, zero, 1 / k, -s / k**2)
        return slopes.mT @ sides @ slopes

    return (Group("loc, scale, asymmetry", (d.loc, d.scale, d.asymmetry), fisher),)


def von_mises(d: Any) -> tuple[Group, ...]:
    """F = κ A of loc and 1 − A/κ − A² of the concentration κ, A = I_1(κ) / I_0(κ)."""

    def spread(k: Tensor) -> Tensor:
        ratio = _resultant(k)
        # For large κ the terms cancel.
        series = 1 / 2 + (1 / 4 + (3 / 8 + (25 / 32 + 65 / 32 / k) / k) / k) / k
        return torch.where(k > 200, series / k**2, 1 - ratio / k - ratio**2)

    def loc_weight() -> Tensor:
        return precisely(lambda k: k * _resultant(k), d.concentration)

    return (
        scalar("loc", d.loc, loc_weight),
        scalar("concentration", d.concentration, lambda: precisely(spread, d.concentration)),
    )


def _resultant(concentration: Tensor) -> Tensor:
    """A(κ) = I_1(κ) / I_0(κ), the mean resultant length of a von Mises distribution."""
    found: Tensor = torch.special.i1e(concentration) / torch.special.i0e(concentration)
    return found


# --- positive numbers --------------------------------------------------------------------------


def exponential(d: Any) -> tuple[Group, ...]:
    """F = 1 / rate²."""
    return (scalar("rate", d.rate, lambda: d.rate**-2),)


def pareto(d: Any) -> tuple[Group, ...]:
    """F = 1 / α², the scale being fixed: the logarithm is exponential."""
    rate = d.base_dist.rate
    return (scalar("alpha", rate, lambda: rate**-2),)


def generalized_pareto(d: Any) -> tuple[Group, ...]:
    """F of scale and concentration ξ > −1/2, loc being fixed (Smith 1984).

    F_ss = 1 / ((1+2ξ) s²), F_sξ = 1 / ((1+ξ) (1+2ξ) s), F_ξξ = 2 / ((1+ξ) (1+2ξ)).
    """

    def fisher() -> Tensor:
        shape, scale = d.concentration, d.scale
        common = 1 / (1 + 2 * shape)
        off = common / ((1 + shape) * scale)
        return square(common / scale**2, off, off, 2 * common / (1 + shape))

    return (Group("scale, concentration", (d.scale, d.concentration), fisher),)


def gamma(d: Any) -> tuple[Group, ...]:
    """F = [[ψ_1(a), −1/b], [−1/b, a/b²]] of concentration a and rate b."""

    def fisher() -> Tensor:
        a, b = d.concentration, d.rate
        return square(trigamma(a), -1 / b, -1 / b, a / b**2)

    return (Group("concentration, rate", (d.concentration, d.rate), fisher),)


def chi2(d: Any) -> tuple[Group, ...]:
    """F = ψ_1(a) of the concentration a = df / 2 of the gamma distribution that it is."""
    return (scalar("concentration", d.concentration, lambda: trigamma(d.concentration)),)


def weibull(d: Any) -> tuple[Group, ...]:
    """F = [[(k/l)², (γ−1)/l], [(γ−1)/l, (π²/6 + (1−γ)²)/k²]] of scale l and concentration k."""

    def fisher() -> Tensor:
        scale, k = d.scale, d.concentration
        off = (EULER - 1) / scale
        return square((k / scale) ** 2, off, off, GUMBEL_WEIGHT / k**2)

    return (Group("scale, concentration", (d.scale, d.concentration), fisher),)


def fisher_snedecor(d: Any) -> tuple[Group, ...]:
    """F of df1 = 2a and df2 = 2b, from the moments of y = df1 x / (df1 x + df2) ~ Beta(a, b).

    With t = a + b: 4 F_11 = ψ_1(a) − ψ_1(t) − 2b/(at) + b/(a(t+1)), likewise F_22, and
    4 F_12 = −ψ_1(t) + 2/t − 1/(t+1).
    """

    def same(a: Tensor, b: Tensor) -> Tensor:
        total = a + b
        found = trigamma(a) - trigamma(total) - b / a * (2 / total - 1 / (total + 1))
        return found / 4

    def cross(a: Tensor, b: Tensor) -> Tensor:
        total = a + b
        return (2 / total - 1 / (total + 1) - trigamma(total)) / 4

    def fisher() -> Tensor:
        a, b = d.df1 / 2, d.df2 / 2
        off = precisely(cross, a, b)
        return square(precisely(same, a, b), off, off, precisely(same, b, a))

    return (Group("df1, df2", (d.df1, d.df2), fisher),)


# --- numbers between 0 and 1 -------------------------------------------------------------------


def beta(d: Any) -> tuple[Group, ...]:
    """F = diag(ψ_1(a), ψ_1(b)) − ψ_1(a + b) of concentration1 a and concentration0 b."""
    coordinates = (d.concentration1, d.concentration0)

    def fisher() -> Tensor:
        total = trigamma(coordinates[0] + coordinates[1])
        return diagonal(*map(trigamma, coordinates)) - total[..., None, None]

    def closed_score(x: Tensor) -> Scores:
        total = torch.digamma(coordinates[0] + coordinates[1])
        logs = x.log(), torch.log1p(-x)
        return tuple(
            log + total - torch.digamma(a) for a, log in zip(coordinates, logs, strict=True)
        )

    name = "concentration1, concentration0"
    return (Group(name, coordinates, fisher, closed_score=closed_score),)


def affine_beta(d: Any) -> tuple[Group, ...]:
    """Beta, the interval being fixed."""
    (group,) = beta(d.base_dist)
    inner = group.closed_score
    assert inner is not None

    def closed_score(x: Tensor) -> Scores:
        return inner((x - d.loc) / d.scale)

    return (Group(group.name, group.coordinates, group.measure, closed_score=closed_score),)


def kumaraswamy(d: Any) -> tuple[Group, ...]:
    """F of concentration1 a and concentration0 b, where x^a ~ Beta(1, b).

    F_bb = 1/b², F_ab = −[ψ(b+1) − ψ(2)] / (a (b−1)), and
    F_aa = {1 + b [(ψ(b) − ψ(2))² − ψ_1(b) + ψ_1(2)] / (b−2)} / a².
    """
    a, b = d.concentration1, d.concentration0

    def corner(b: Tensor) -> Tensor:
        first, second = _slope(0, b - 2), _slope(1, b - 2)
        return 1 + b * ((b - 2) * first**2 - second)

    def fisher() -> Tensor:
        off = -precisely(lambda b: _slope(0, b - 1), b) / a
        return square(precisely(corner, b) / a**2, off, off, b**-2)

    def closed_score(x: Tensor) -> Scores:
        log = a * x.log()
        rest = -torch.expm1(log)
        # y log y / (1 − y) tends to −1 where y does to 1.
        odds = torch.where(rest > 0, log.exp() * log / rest.clamp_min(1e-300), -1.0)
        return (1 + log - (b - 1) * odds) / a, 1 / b + rest.log()

    name = "concentration1, concentration0"
    return (Group(name, (a, b), fisher, closed_score=closed_score),)


def _slope(order: int, step: Tensor) -> Tensor:
    """[ψ_n(2 + t) − ψ_n(2)] / t, by its Taylor series near t = 0."""
    small = step.abs() < 0.05
    wide = torch.where(small, torch.ones_like(step), step)
    two = torch.full_like(step, 2.0)
    direct = (polygamma(order, 2 + wide) - polygamma(order, two)) / wide
    near = torch.where(small, step, torch.zeros_like(step))
    series = sum(
        (polygamma(order + k, two) * near ** (k - 1) / math.factorial(k) for k in range(1, 9)),
        torch.zeros_like(step),
    )
    return torch.where(small, series, direct)
