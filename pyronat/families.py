"""Fisher information of distribution families, in coordinates that carry the autograd graph.

A family offers one or more *groups*: sets of coordinates that are Fisher-orthogonal to every
other group, as loc and scale of a normal distribution are. A coordinate is a tensor of the
distribution through which its density depends on the parameters; whatever parametrisation the
user chose, the chain rule through that tensor pulls the Fisher information back to it.

Adding a family is one function and one row of `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch import distributions as dist

from pyronat.errors import UnsupportedDistribution

LOGIT_WEIGHT = 0.25
"""Largest Fisher weight p (1 - p) of a Bernoulli logit."""


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
    closed_score: Callable[[Tensor], tuple[Tensor, ...]] | None = None

    @cached_property
    def fisher(self) -> Tensor:
        """E[-Hessian of log p] `[*batch, size, size]`, detached, in nats per squared unit."""
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


def score(distribution: dist.Distribution, name: str, value: Tensor) -> Tensor:
    """Score of a family in the coordinates of one of its groups, ∂ log p(x; θ) / ∂θ.

    Args:
        distribution: a peeled distribution, whose batch shape is that of the value.
        name: name of the group.
        value: x `[*batch, *event]`.

    Returns:
        Score `[*batch, size]` in nats per unit of each coordinate, detached; 0 in coordinates
        that do not depend on parameters.
    """
    group = next(group for group in groups(distribution) if group.name == name)
    if group.closed_score is not None:
        with torch.no_grad():
            parts = group.closed_score(value)
    else:
        log_prob = distribution.log_prob(value).sum()
        attached = [part for part in group.coordinates if part.requires_grad]
        found = iter(torch.autograd.grad(log_prob, attached, retain_graph=True))
        parts = tuple(
            next(found) if part.requires_grad else torch.zeros_like(part)
            for part in group.coordinates
        )
    shape = distribution.batch_shape
    return torch.cat([part.detach().reshape(*shape, -1) for part in parts], -1)


def peel(distribution: dist.Distribution) -> dist.Distribution:
    """The innermost distribution, without `Independent` and what expands or masks it."""
    inner: Any = distribution
    wrappers = {"Independent", "ExpandedDistribution", "MaskedDistribution"}
    while type(inner).__name__ in wrappers:
        inner = inner.base_dist
    found: dist.Distribution = inner
    return found


def family_of(distribution: dist.Distribution) -> type | None:
    """The row of `FAMILIES` a peeled distribution belongs to, or None.

    A subclass from outside torch and Pyro may change the density, so it has no family; Pyro's own
    `NanMaskedNormal` and `NanMaskedMultivariateNormal` do, where data are missing.
    """
    kinds = type(distribution).__mro__
    first = next(
        (kind for kind in kinds if kind.__module__.startswith("torch.distributions")), None
    )
    module = type(distribution).__module__
    ours = module.startswith(("torch.distributions", "pyro.distributions"))
    ours = ours and module != "pyro.distributions.nanmasked"
    return first if ours and first in FAMILIES else None


def groups(distribution: dist.Distribution) -> tuple[Group, ...]:
    """Fisher-orthogonal groups of a peeled distribution.

    Args:
        distribution: a distribution of one of the `FAMILIES`, wrappers removed.

    Returns:
        One `Group` per set of coordinates, batch shapes equal to the distribution's.

    Raises:
        UnsupportedDistribution: for any other family, or when a tensor that the closed form
            treats as fixed depends on parameters.
    """
    family = family_of(distribution)
    if family is None:
        names = ", ".join(sorted(kind.__name__ for kind in FAMILIES))
        raise UnsupportedDistribution(
            f"{type(distribution).__name__} has no closed-form Fisher information; "
            f"supported families: {names}"
        )
    function, fixed = FAMILIES[family]
    for name in fixed:
        if getattr(getattr(distribution, name), "requires_grad", False):
            raise UnsupportedDistribution(
                f"{name} of {family.__name__} depends on parameters, "
                "but the closed form treats it as fixed"
            )
    return function(distribution)


def _diagonal(*weights: Tensor) -> Tensor:
    return torch.diag_embed(torch.stack(torch.broadcast_tensors(*weights), -1))


def _scalar(
    name: str,
    coordinate: Tensor,
    weight: Callable[[], Tensor],
    bound: Tensor | float | None = None,
) -> Group:
    return Group(name, (coordinate,), lambda: _diagonal(weight()), bound=bound)


def _bernoulli(d: dist.Bernoulli) -> tuple[Group, ...]:
    return (_scalar("logits", d.logits, lambda: d.probs * (1 - d.probs), LOGIT_WEIGHT),)


def _binomial(d: dist.Binomial) -> tuple[Group, ...]:
    def weight() -> Tensor:
        variance: Tensor = d.total_count * d.probs * (1 - d.probs)
        return variance

    return (_scalar("logits", d.logits, weight, LOGIT_WEIGHT * d.total_count.detach()),)


def _categorical(d: dist.Categorical | dist.OneHotCategorical) -> tuple[Group, ...]:
    def fisher() -> Tensor:
        p = d.probs
        return torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)

    return (Group("logits", (d.logits,), fisher, 1, LOGIT_WEIGHT),)


def _location_scale(d: dist.Normal | dist.LogNormal) -> tuple[Group, ...]:
    return (
        _scalar("loc", d.loc, lambda: d.scale**-2),
        _scalar("scale", d.scale, lambda: 2 * d.scale**-2),
    )


def _poisson(d: dist.Poisson) -> tuple[Group, ...]:
    return (_scalar("rate", d.rate, lambda: 1 / d.rate),)


def _exponential(d: dist.Exponential) -> tuple[Group, ...]:
    return (_scalar("rate", d.rate, lambda: d.rate**-2),)


def _gamma(d: dist.Gamma) -> tuple[Group, ...]:
    def fisher() -> Tensor:
        a, b = d.concentration, d.rate
        rows = [torch.polygamma(1, a), -1 / b, -1 / b, a / b**2]
        found: Tensor = torch.stack(torch.broadcast_tensors(*rows), -1).unflatten(-1, (2, 2))
        return found

    return (Group("concentration, rate", (d.concentration, d.rate), fisher),)


def _beta(d: dist.Beta) -> tuple[Group, ...]:
    coordinates = (d.concentration1, d.concentration0)

    def fisher() -> Tensor:
        total = _trigamma(sum(coordinates, torch.zeros_like(coordinates[0])))
        return _diagonal(*map(_trigamma, coordinates)) - total[..., None, None]

    def closed_score(x: Tensor) -> tuple[Tensor, ...]:
        total = torch.digamma(coordinates[0] + coordinates[1])
        logs = x.log(), torch.log1p(-x)
        return tuple(
            log + total - torch.digamma(a) for a, log in zip(coordinates, logs, strict=True)
        )

    name = "concentration1, concentration0"
    return (Group(name, coordinates, fisher, closed_score=closed_score),)


def _trigamma(x: Tensor) -> Tensor:
    found: Tensor = torch.polygamma(1, x)
    return found


def _multivariate_normal(d: dist.MultivariateNormal) -> tuple[Group, ...]:
    """Loc, and the Cholesky factor L of the covariance, F_(ij)(kl) = Li_li Li_jk + P_ik δ_jl."""
    factor = d._unbroadcasted_scale_tril.expand(*d.batch_shape, *d.event_shape, *d.event_shape)
    eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)

    def inverse() -> Tensor:
        found: Tensor = torch.linalg.solve_triangular(
            factor.detach(), eye.expand_as(factor), upper=False
        )
        return found

    def precision() -> Tensor:
        return inverse().mT @ inverse()

    def fisher() -> Tensor:
        found = torch.einsum("...li,...jk->...ijkl", inverse(), inverse())
        found = found + torch.einsum("...ik,jl->...ijkl", precision(), eye)
        lower = torch.ones_like(eye).tril()
        found = found * lower[:, :, None, None] * lower
        return found.flatten(-4, -3).flatten(-2, -1)

    def closed_score(x: Tensor) -> tuple[Tensor, ...]:
        standard = inverse() @ (x - d.loc).unsqueeze(-1)
        return ((inverse().mT @ standard @ standard.mT - inverse() * eye).tril(),)

    return (
        Group("loc", (d.loc,), precision, 1),
        Group("scale_tril", (factor,), fisher, 2, closed_score=closed_score),
    )


FAMILIES: dict[type, tuple[Callable[..., tuple[Group, ...]], tuple[str, ...]]] = {
    dist.Bernoulli: (_bernoulli, ()),
    dist.Beta: (_beta, ()),
    dist.Binomial: (_binomial, ("total_count",)),
    dist.Categorical: (_categorical, ()),
    dist.Exponential: (_exponential, ()),
    dist.Gamma: (_gamma, ()),
    dist.LogNormal: (_location_scale, ()),
    dist.MultivariateNormal: (_multivariate_normal, ()),
    dist.Normal: (_location_scale, ()),
    dist.OneHotCategorical: (_categorical, ()),
    dist.OneHotCategoricalStraightThrough: (_categorical, ()),
    dist.Poisson: (_poisson, ()),
}
"""Family → (groups, names of the tensors that the closed form treats as fixed)."""
