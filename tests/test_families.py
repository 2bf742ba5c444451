"""Every family in every parametrisation, against sums and integrals of the log density."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.distributions
from pyro.infer import TraceEnum_ELBO
from torch import Tensor
from torch.distributions import constraints

from pyronat import NaturalGradient, NaturalSVI, Visible, families, testing, wrappers
from pyronat.errors import NoFisher, PyronatError, UnsupportedDistribution
from pyronat.families import (
    FAMILIES,
    REPARAMETRIZED,
    SINGULAR,
    Group,
    base_value,
    family_name,
    family_of,
    groups,
    peel,
    score,
)

Nodes = Callable[[Any], tuple[Tensor, Tensor]]
"""A distribution → points `[num_nodes, *batch, *event]` and probabilities `[num_nodes, *batch]`."""


@dataclass(frozen=True)
class Row:
    """A family with the parameters a user stores, `[*batch, *event]`.

    Attributes:
        family: its name.
        params: what can be learned.
        fixed: other arguments.
        tolerance: of the comparison with the oracle, relative to the largest entry.
        oracle: a rule of integration, "family" for that of `testing.family_fisher`, or None where
            there are only samples.
        smooth: whether the log density has second derivatives.
        events: event dimensions of parameters that their constraints do not tell.
        draw: sampler, where the distribution has none of its own.
        batched: whether there can be many of them at once.
    """

    family: str
    params: Mapping[str, Any]
    fixed: Mapping[str, Any] | None = None
    tolerance: float = 1e-9
    oracle: Nodes | str | None = "family"
    smooth: bool = True
    events: Mapping[str, int] = field(default_factory=dict)
    draw: Callable[[Any], Tensor] | None = None
    batched: bool = True

    def __str__(self) -> str:
        return "-".join([self.family, *self.params])

    def make(self, module: Any) -> Callable[..., Any]:
        fixed = {
            name: torch.tensor(value, dtype=torch.float64) if isinstance(value, list) else value
            for name, value in (self.fixed or {}).items()
        }
        kind = getattr(module, self.family, None) or getattr(pyro.distributions, self.family, None)
        kind = kind or SPECIAL_KINDS[self.family]

        def build(**params: Any) -> Any:
            if "scale_tril" in params:
                # Wishart reads the lower triangle alone, but autograd does not know.
                params["scale_tril"] = params["scale_tril"].tril()
            return kind(**params, **fixed)

        return build

    def values(self) -> dict[str, Tensor]:
        return {name: torch.tensor(v, dtype=torch.float64) for name, v in self.params.items()}

    def event_dim(self, name: str) -> int:
        """Rightmost dimensions of a parameter that belong to one batch element."""
        plain = self.make(pyro.distributions)(**self.values())
        constraint = plain.arg_constraints.get(name)
        return self.events.get(name, getattr(constraint, "event_dim", 0))

    def samples(self, count: int) -> tuple[Any, dict[str, Tensor]]:
        """A distribution of `[count, *batch]` elements, and its parameters as leaves."""
        plain = self.make(pyro.distributions)(**self.values())
        batch = len(plain.batch_shape)
        wide = {}
        for name, value in self.values().items():
            event = self.event_dim(name)
            shape, inner = value.shape[: value.dim() - event], value.shape[value.dim() - event :]
            spread = value.reshape(*[1] * (1 + batch - len(shape)), *shape, *inner)
            wide[name] = spread.expand(count, *spread.shape[1:]).clone().requires_grad_()
        return self.make(pyro.distributions)(**wide), wide


def zero_inflated(kind: str) -> Callable[..., Any]:
    def build(gate: Any = None, gate_logits: Any = None, **params: Any) -> Any:
        base = getattr(pyro.distributions, kind)(**params)
        return pyro.distributions.ZeroInflatedDistribution(base, gate=gate, gate_logits=gate_logits)

    return build


SPECIAL_KINDS = {
    "ZeroInflatedDistribution of Geometric": zero_inflated("Geometric"),
    "ZeroInflatedDistribution of Binomial": zero_inflated("Binomial"),
    "ExpRelaxedCategorical": torch.distributions.relaxed_categorical.ExpRelaxedCategorical,
    "LogitRelaxedBernoulli": torch.distributions.relaxed_bernoulli.LogitRelaxedBernoulli,
}


# --- rules of integration ----------------------------------------------------------------------


def circle(d: Any) -> tuple[Tensor, Tensor]:
    """The trapezoidal rule of a periodic density, exact to rounding."""
    x = torch.linspace(-torch.pi, torch.pi, 2001)[:-1].reshape(-1, *[1] * len(d.batch_shape))
    x = x.expand(-1, *d.batch_shape)
    return x, d.log_prob(x).exp() * (2 * torch.pi / 2000)


def both_sides(d: Any) -> tuple[Tensor, Tensor]:
    """Points loc ± exp(v), for a density with a kink at loc."""
    steps = torch.linspace(-40, 8, 4001)
    far = steps.exp().reshape(-1, *[1] * len(d.batch_shape))
    x = torch.cat([d.loc - far, d.loc + far])
    weights = d.log_prob(x).exp() * torch.cat([far, far]) * (steps[1] - steps[0])
    return x, weights


def quantiles(d: Any) -> tuple[Tensor, Tensor]:
    """Points F⁻¹(1 − exp(−e)) of the generalized Pareto law, e being exponential."""
    steps = torch.linspace(-40, 4, 4001)
    e = steps.exp().reshape(-1, *[1] * len(d.batch_shape))
    x = d.loc + d.scale / d.concentration * torch.expm1(d.concentration * e)
    return x, ((-e).exp() * e * (steps[1] - steps[0])).expand(x.shape)


def up_to_four(d: Any) -> tuple[Tensor, Tensor]:
    """The counts 0 … 4, all that there are."""
    x = torch.arange(5.0).reshape(-1, *[1] * len(d.batch_shape)).expand(-1, *d.batch_shape)
    return x, d.log_prob(x).exp()


def ways_of_four(d: Any) -> tuple[Tensor, Tensor]:
    """All ways to share four draws among three categories."""
    ways = [[a, b, 4.0 - a - b] for a in range(5) for b in range(5 - a)]
    x = torch.tensor(ways).reshape(-1, *[1] * len(d.batch_shape), 3).expand(-1, *d.batch_shape, 3)
    return x, d.log_prob(x).exp()


def average(value: Callable[[Any], Tensor]) -> Nodes:
    """One point, the mean, where second derivatives are affine in the value."""

    def nodes(d: Any) -> tuple[Tensor, Tensor]:
        return value(d).unsqueeze(0), torch.ones(1, *d.batch_shape)

    return nodes


def any_value(d: Any) -> Tensor:
    """Where second derivatives do not depend on the value, every one has their mean."""
    found: Tensor = d.sample()
    return found


def north(d: Any) -> Tensor:
    found: Tensor = torch.tensor([0.0, 0.0, 1.0]).expand((*d.batch_shape, 3))
    return found


def hessian_oracle(row: Row, nodes: Nodes) -> Tensor:
    """−E[Hessian], or E[score scoreᵀ] where there is no Hessian, by a rule of integration."""
    make, values = row.make(pyro.distributions), row.values()
    with torch.no_grad():
        point = make(**values)
        x, weights = nodes(point)
        if len(x) > 1:
            torch.testing.assert_close(weights.sum(0), torch.ones(point.batch_shape))
    names, sizes = list(values), [value.numel() for value in values.values()]
    size, flat = sum(sizes), torch.cat([value.reshape(-1) for value in values.values()])

    def build(theta: Tensor) -> Any:
        parts = zip(names, theta.split(sizes), values.values(), strict=True)
        return make(**{name: part.reshape(old.shape) for name, part, old in parts})

    if row.smooth:

        def expected(theta: Tensor) -> Tensor:
            found: Tensor = (weights * build(theta).log_prob(x)).sum()
            return found

        return -torch.autograd.functional.hessian(expected, flat).reshape(size, size)

    # Every parameter is one for each batch element.
    distribution, leaves = row.samples(len(x))
    found = torch.autograd.grad(distribution.log_prob(x).sum(), list(leaves.values()))
    scores = torch.stack(found, 1)
    blocks = torch.einsum("nb,nib,njb->bij", weights, scores, scores)
    rows = torch.einsum("bij,bc->ibjc", blocks, torch.eye(len(blocks)))
    return rows.reshape(size, size)


def draw_direction(d: Any) -> Tensor:
    """Von Mises-Fisher directions: the height has a closed-form quantile (Ulrich 1984)."""
    length = d.concentration.norm(dim=-1)
    u = torch.rand(length.shape)
    height = 1 + torch.log(u + (1 - u) * (-2 * length).exp()) / length
    up = d.concentration / length.unsqueeze(-1)
    side = torch.linalg.cross(up, torch.randn(up.shape))
    side = side / side.norm(dim=-1, keepdim=True)
    return height.unsqueeze(-1) * up + (1 - height**2).sqrt().unsqueeze(-1) * side


def draw_correlations(d: Any) -> Tensor:
    """The onion method of Lewandowski et al. (2009): row k has |w|² ~ Beta(k/2, η + (D−1−k)/2).

    That of torch draws from another distribution in more than two dimensions.
    """
    kind = type(d).__name__
    steps = torch.arange(1.0, d.dim)
    second = d.concentration.unsqueeze(-1) + (d.dim - 1 - steps) / 2
    length = torch.distributions.Beta((steps / 2).expand(second.shape), second).sample()
    found = torch.zeros((*d.batch_shape, d.dim, d.dim))
    found[..., 0, 0] = 1
    for k in range(1, d.dim):
        direction = torch.randn((*d.batch_shape, k))
        direction = direction / direction.norm(dim=-1, keepdim=True)
        found[..., k, :k] = length[..., k - 1, None].sqrt() * direction
        found[..., k, k] = (1 - length[..., k - 1]).sqrt()
    return found if kind == "LKJCholesky" else found @ found.mT


def draw_wishart(d: Any) -> Tensor:
    """Without the warning that a draw was repeated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: Tensor = d.sample()
    return found


def draw_coalescences(d: Any) -> Tensor:
    """k lineages meet at the rate k (k − 1) / 2. Pyro draws at rate 1, whatever the rate."""
    assert not d.leaf_times.any()
    lineages = torch.arange(len(d.leaf_times), 1.0, -1)
    rates = d.rate.detach().unsqueeze(-1) * lineages * (lineages - 1) / 2
    return -torch.distributions.Exponential(rates).sample().cumsum(-1).flip(-1)


PROBS, LOGITS = [0.2, 0.7], [-1.3, 0.4]
ROWS_OF_PROBS = [[0.2, 0.5, 0.3], [0.1, 0.8, 0.1]]
ROWS_OF_LOGITS = [[0.3, -1.0, 0.2], [2.0, 0.1, -0.7]]
TRIL = [[1.2, 0.0, 0.0], [-0.4, 0.7, 0.0], [0.3, 0.5, 1.9]]
SYMMETRIC = [[2.0, 0.4, -0.3], [0.4, 1.5, 0.2], [-0.3, 0.2, 0.8]]
LOC = [[0.3, -1.2, 0.5], [1.0, 0.0, 2.0]]
FACTOR = [[0.9, -0.2], [0.4, 1.1], [-0.7, 0.3]]
LOC_SCALE = {"loc": [0.3, -0.2], "scale": [0.5, 1.7]}
TWO = {"concentration1": [2.5, 1.5], "concentration0": [0.9, 3.0]}

ROWS = (
    Row("AffineBeta", TWO, {"loc": -1.0, "scale": 3.0}, 1e-6),
    Row("Bernoulli", {"probs": PROBS}),
    Row("Bernoulli", {"logits": LOGITS}),
    Row("Beta", TWO, tolerance=1e-6),
    Row("Binomial", {"probs": PROBS}, {"total_count": 5}),
    Row("Binomial", {"logits": LOGITS}, {"total_count": 1}),
    Row("Categorical", {"probs": ROWS_OF_PROBS}),
    Row("Categorical", {"logits": ROWS_OF_LOGITS}),
    # Unnormalized probabilities: torch normalizes them, the chain rule has to know.
    Row("Categorical", {"probs": [[2.0, 5.0, 3.0], [0.1, 0.8, 0.4]]}),
    Row("Cauchy", LOC_SCALE, tolerance=1e-6),
    Row("Chi2", {"df": [3.0, 7.5]}, tolerance=1e-6),
    Row("ContinuousBernoulli", {"probs": PROBS}, tolerance=1e-6),
    Row("ContinuousBernoulli", {"logits": LOGITS}, tolerance=1e-6),
    Row("ContinuousBernoulli", {"logits": [0.15, -0.25]}, tolerance=1e-6),
    Row("Dirichlet", {"concentration": [[2.0, 0.7, 1.5], [4.0, 3.0, 0.9]]}),
    Row("Exponential", {"rate": [0.4, 6.0]}, tolerance=1e-6),
    Row("ExtendedBinomial", {"probs": PROBS}, {"total_count": 5}),
    Row("ExtendedBinomial", {"logits": LOGITS}, {"total_count": 3}),
    Row("FisherSnedecor", {"df1": [3.0, 5.0], "df2": [7.0, 2.5]}, tolerance=1e-6),
    Row("Gamma", {"concentration": [2.5, 4.0], "rate": [0.6, 3.0]}, tolerance=1e-6),
    Row("Gamma", {"concentration": [2.5, 4.0], "rate": 1.5}, tolerance=1e-6),
    Row("Geometric", {"probs": PROBS}),
    Row("Geometric", {"logits": LOGITS}),
    Row("Gumbel", LOC_SCALE, tolerance=1e-6),
    Row("HalfCauchy", {"scale": [0.5, 1.7]}, tolerance=1e-6),
    Row("HalfNormal", {"scale": [0.5, 1.7]}, tolerance=1e-6),
    Row("InverseGamma", {"concentration": [2.5, 4.0], "rate": [0.6, 3.0]}, tolerance=1e-6),
    Row("Kumaraswamy", TWO, tolerance=1e-6),
    Row("Kumaraswamy", {"concentration1": [1.5, 2.0], "concentration0": [1.01, 2.02]}, None, 1e-6),
    Row("Kumaraswamy", {"concentration1": [0.8, 2.0], "concentration0": [1.0, 2.0]}, None, 1e-6),
    Row("Logistic", LOC_SCALE, tolerance=1e-6),
    Row("LogNormal", {"loc": [0.3, -0.2], "scale": [0.5, 0.7]}, tolerance=1e-6),
    Row(
        "LowRankMultivariateNormal",
        {"loc": LOC, "cov_factor": FACTOR, "cov_diag": [0.5, 1.2, 0.8]},
    ),
    Row(
        "Multinomial",
        {"probs": ROWS_OF_PROBS},
        {"total_count": 4},
        oracle=ways_of_four,
    ),
    Row(
        "Multinomial",
        {"logits": ROWS_OF_LOGITS},
        {"total_count": 4},
        oracle=ways_of_four,
    ),
    Row("MultivariateNormal", {"loc": LOC, "scale_tril": TRIL}),
    Row("MultivariateNormal", {"loc": LOC, "covariance_matrix": SYMMETRIC}),
    Row("MultivariateNormal", {"loc": LOC, "precision_matrix": SYMMETRIC}),
    Row("MultivariateNormal", {"loc": [0.1], "scale_tril": [[[0.7]], [[1.9]]]}),
    Row("MultivariateStudentT", {"df": [3.0, 8.0], "loc": LOC, "scale_tril": TRIL}, oracle=None),
    Row("NegativeBinomial", {"probs": [0.2, 0.6]}, {"total_count": 3}),
    Row("NegativeBinomial", {"logits": LOGITS}, {"total_count": 2.5}),
    Row("Normal", {"loc": [0.3, -2.0], "scale": [0.5, 1.7]}, tolerance=1e-6),
    # One scale for all elements: its weights add up.
    Row("Normal", {"loc": [0.3, -2.0], "scale": 0.6}, tolerance=1e-6),
    Row("OneHotCategorical", {"probs": ROWS_OF_PROBS}),
    Row("OneHotCategorical", {"logits": ROWS_OF_LOGITS}),
    Row("OneHotCategoricalStraightThrough", {"probs": ROWS_OF_PROBS}),
    Row("OneHotCategoricalStraightThrough", {"logits": ROWS_OF_LOGITS}),
    Row("OrderedLogistic", {"predictor": [0.3, -1.0], "cutpoints": [-0.7, 0.2, 1.1]}),
    Row("Pareto", {"alpha": [0.8, 3.0]}, {"scale": [1.5]}, 1e-6),
    Row("Poisson", {"rate": [0.4, 6.0]}),
    Row("RelaxedBernoulli", {"probs": PROBS}, {"temperature": [0.7]}, 1e-6),
    Row("RelaxedBernoulli", {"logits": LOGITS}, {"temperature": [0.7]}, 1e-6),
    Row("RelaxedOneHotCategorical", {"probs": ROWS_OF_PROBS}, {"temperature": [0.7]}, oracle=None),
    Row(
        "RelaxedOneHotCategorical", {"logits": ROWS_OF_LOGITS}, {"temperature": [0.7]}, oracle=None
    ),
    Row("SkewLogistic", {**LOC_SCALE, "asymmetry": [0.6, 2.5]}, tolerance=1e-6),
    Row("SoftLaplace", LOC_SCALE, tolerance=1e-6),
    Row("StudentT", {"df": [1.5, 6.0], **LOC_SCALE}, tolerance=1e-6),
    Row("Weibull", {"scale": [0.5, 1.7], "concentration": [0.8, 2.3]}, tolerance=1e-6),
    Row(
        "ZeroInflatedDistribution of Binomial",
        {"probs": PROBS, "gate": [0.3, 0.1]},
        {"total_count": 4},
        oracle=up_to_four,
    ),
    Row(
        "ZeroInflatedNegativeBinomial",
        {"probs": [0.2, 0.6], "gate": [0.3, 0.1]},
        {"total_count": [3.0]},
    ),
    Row("ZeroInflatedPoisson", {"rate": [0.4, 6.0], "gate": [0.3, 0.1]}),
)
"""Families that can be drawn from and expanded."""

OTHER_ROWS = (
    Row(
        "AsymmetricLaplace",
        {**LOC_SCALE, "asymmetry": [0.6, 2.5]},
        tolerance=1e-6,
        oracle=both_sides,
        smooth=False,
    ),
    Row(
        "AVFMultivariateNormal",
        {"loc": LOC[0], "scale_tril": TRIL},
        {"control_var": torch.ones(2, 1, 3)},
        events={"loc": 1, "scale_tril": 2},
        batched=False,
    ),
    Row(
        "CoalescentTimes",
        {"rate": [0.5, 2.0]},
        {"leaf_times": [0.0, 0.0, 0.0, 0.0]},
        oracle=average(any_value),
        draw=draw_coalescences,
    ),
    Row(
        "GeneralizedPareto",
        {"scale": [0.5, 1.7], "concentration": [0.4, -0.2]},
        {"loc": [1.0]},
        tolerance=1e-6,
        oracle=quantiles,
    ),
    Row("Laplace", LOC_SCALE, tolerance=1e-6, oracle=both_sides, smooth=False),
    Row(
        "LKJ",
        {"concentration": [0.8, 3.0]},
        {"dim": 3},
        oracle=average(any_value),
        draw=draw_correlations,
    ),
    Row(
        "LogisticNormal",
        {"loc": LOC[0], "scale": [0.5, 1.7, 0.9]},
        oracle=None,
        events={"loc": 1, "scale": 1},
    ),
    Row(
        "OMTMultivariateNormal",
        {"loc": LOC[0], "scale_tril": TRIL},
        events={"loc": 1, "scale_tril": 2},
        batched=False,
    ),
    Row("RelaxedBernoulliStraightThrough", {"probs": PROBS}, {"temperature": [0.7]}, oracle=None),
    Row(
        "RelaxedOneHotCategoricalStraightThrough",
        {"probs": ROWS_OF_PROBS},
        {"temperature": [0.7]},
        oracle=None,
    ),
    Row("RelaxedBernoulliStraightThrough", {"logits": LOGITS}, {"temperature": [0.7]}, oracle=None),
    Row(
        "RelaxedOneHotCategoricalStraightThrough",
        {"logits": ROWS_OF_LOGITS},
        {"temperature": [0.7]},
        oracle=None,
    ),
    Row("SpanningTree", {"edge_logits": [0.3, -0.4, 1.1, 0.0, 0.6, -0.9]}, batched=False),
    # torch's Bessel functions are polynomials, good to 1e-7, their derivatives to less.
    Row("VonMises", {"loc": [0.3, -2.0], "concentration": [0.7, 9.0]}, None, 1e-5, circle),
    Row(
        "VonMises3D",
        {"concentration": [[0.3, -1.0, 0.5], [3.0, 1.0, -2.0]]},
        tolerance=1e-6,
        oracle=average(north),
        events={"concentration": 1},
        draw=draw_direction,
    ),
    Row(
        "VonMises3D",
        {"concentration": [[0.03, -0.01, 0.05]]},
        tolerance=1e-6,
        oracle=average(north),
        events={"concentration": 1},
        draw=draw_direction,
    ),
    Row(
        "Wishart",
        {"df": [6.5, 9.0], "scale_tril": TRIL},
        oracle=average(lambda d: d.mean),
        draw=draw_wishart,
    ),
    Row(
        "Wishart",
        {"df": [6.5, 9.0], "covariance_matrix": SYMMETRIC},
        oracle=average(lambda d: d.mean),
        draw=draw_wishart,
    ),
    Row(
        "Wishart",
        {"df": [6.5, 9.0], "precision_matrix": SYMMETRIC},
        oracle=average(lambda d: d.mean),
        draw=draw_wishart,
    ),
    Row("ExpRelaxedCategorical", {"probs": ROWS_OF_PROBS}, {"temperature": [0.7]}, oracle=None),
    Row("ExpRelaxedCategorical", {"logits": ROWS_OF_LOGITS}, {"temperature": [0.7]}, oracle=None),
    Row(
        "LKJCholesky",
        {"concentration": [0.8, 3.0]},
        {"dim": 3},
        oracle=average(any_value),
        draw=draw_correlations,
    ),
    Row("LogitRelaxedBernoulli", {"probs": PROBS}, {"temperature": [0.7]}, 1e-6),
    Row("LogitRelaxedBernoulli", {"logits": LOGITS}, {"temperature": [0.7]}, 1e-6),
    Row("ZeroInflatedDistribution of Geometric", {"logits": LOGITS, "gate_logits": [-0.5, 0.8]}),
    Row(
        "ZeroInflatedNegativeBinomial",
        {"logits": LOGITS, "gate_logits": [-0.5, 0.8]},
        {"total_count": [3.0]},
    ),
    Row("ZeroInflatedPoisson", {"rate": [0.4, 6.0], "gate_logits": [-0.5, 0.8]}),
)
"""Families with kinks, without a faithful sampler, or that cannot be expanded once drawn from."""
LATER = {"GeneralizedPareto", "StableWithLogProb"} - vars(pyro.distributions).keys()
"""Families of a later torch or Pyro than these."""
OTHER_ROWS = tuple(row for row in OTHER_ROWS if row.family not in LATER)
ALL_ROWS = ROWS + OTHER_ROWS
MODULES = (torch.distributions, pyro.distributions)


def flat_coordinates(group: Group) -> Tensor:
    """Coordinates of each batch element `[num_batch, size]`."""
    each = group.size // len(group.coordinates)
    wide = torch.broadcast_tensors(*group.coordinates)
    return torch.cat([coordinate.reshape(-1, each) for coordinate in wide], 1)


def pulled_back(make: Callable[..., Any], values: Mapping[str, Tensor]) -> Tensor:
    """Σ_groups Jᵀ F J in the entries of the user's parameters."""
    names, tensors = list(values), tuple(values.values())
    size = sum(value.numel() for value in tensors)
    total = torch.zeros(size, size)
    found = groups(peel(make(**values)))
    for index, group in enumerate(found):

        def coordinates(*moved: Tensor, index: int = index) -> Tensor:
            distribution = peel(make(**dict(zip(names, moved, strict=True))))
            return flat_coordinates(groups(distribution)[index])

        parts = torch.autograd.functional.jacobian(coordinates, tensors)
        jacobian = torch.cat([part.reshape(*part.shape[:2], -1) for part in parts], 2)
        fisher = group.fisher.reshape(-1, group.size, group.size)
        assert len(fisher) == len(jacobian), "one Fisher matrix for each batch element"
        total += (jacobian.mT @ fisher @ jacobian).sum(0)
    return total


EXACT = [row for row in ALL_ROWS if row.oracle is not None]
SAMPLED = [row for row in ALL_ROWS if row.batched]
SAMPLES = 250_000
Z_LIMIT = 5.0


def exact_fisher(row: Row, module: Any) -> Tensor:
    if callable(row.oracle):
        return hessian_oracle(row, row.oracle)
    return testing.family_fisher(row.make(module), row.values())


@pytest.mark.parametrize("module", MODULES, ids=["torch", "pyro"])
@pytest.mark.parametrize("row", EXACT, ids=str)
def test_fisher_in_the_users_coordinates(row: Row, module: Any) -> None:
    oracle = exact_fisher(row, module)
    ours = pulled_back(row.make(module), row.values())
    tolerance = row.tolerance * float(oracle.abs().max())
    torch.testing.assert_close(ours, oracle, rtol=0, atol=tolerance)
    # The comparison is sharp enough to see one percent in one entry.
    mutant = ours.clone()
    mutant[0, 0] *= 1.01
    assert (mutant - oracle).abs().max() > tolerance


@pytest.mark.parametrize("row", SAMPLED, ids=str)
def test_fisher_is_the_mean_square_of_the_score(row: Row) -> None:
    """Autograd's scores of many draws in the user's parameters, every entry by its z-score."""
    torch.manual_seed(1)
    distribution, leaves = row.samples(SAMPLES)
    with torch.no_grad():
        value = distribution.sample() if row.draw is None else row.draw(distribution)
    gradients = torch.autograd.grad(distribution.log_prob(value).sum(), list(leaves.values()))
    scores = torch.cat([gradient.reshape(SAMPLES, -1) for gradient in gradients], 1)
    mean = scores.mT @ scores / SAMPLES
    error = (((scores**2).mT @ scores**2 / SAMPLES - mean**2).clamp_min(0) / SAMPLES).sqrt()
    ours = pulled_back(row.make(pyro.distributions), row.values())

    def worst(fisher: Tensor) -> float:
        # Some squares are constant, or rounding alone.
        floor = 1e-6 * fisher.abs().max()
        return float(((mean - fisher).abs() / (error + 1e-3 * floor))[error >= 0].max())

    assert worst(ours) < Z_LIMIT
    # Five percent in one entry are seen, whichever of the largest it is.
    mutant = ours.clone()
    most = int((ours.diagonal() / error.diagonal().clamp_min(1e-300)).argmax())
    mutant[most, most] *= 1.05 if mean[most, most] < ours[most, most] else 0.95
    assert worst(mutant) > Z_LIMIT


@pytest.mark.parametrize(
    "family", ["Bernoulli", "ContinuousBernoulli", "Geometric", "OneHotCategorical"]
)
def test_the_parametrisations_differ(family: str) -> None:
    # Negative control: the Fisher information of probs is not that of logits.
    kind = getattr(torch.distributions, family)
    probs = torch.tensor(ROWS_OF_PROBS if family == "OneHotCategorical" else PROBS)
    logits = kind(probs=probs).logits
    oracle = testing.family_fisher(kind, {"logits": logits})
    wrong = pulled_back(kind, {"probs": probs})
    torch.testing.assert_close(pulled_back(kind, {"logits": logits}), oracle)
    assert (wrong - oracle).abs().max() > 0.3 * oracle.abs().max()


def test_every_family_has_a_row() -> None:
    covered = set()
    for row in ALL_ROWS:
        found = family_of(peel(row.make(pyro.distributions)(**row.values())))
        assert found is not None, row
        covered.add(found)
    assert covered == set(FAMILIES) - LATER
    assert len(FAMILIES) >= 40


PARAMETRISATIONS = {
    "Bernoulli": {"probs", "logits"},
    "Binomial": {"probs", "logits"},
    "Categorical": {"probs", "logits"},
    "ContinuousBernoulli": {"probs", "logits"},
    "ExpRelaxedCategorical": {"probs", "logits"},
    "ExtendedBinomial": {"probs", "logits"},
    "Geometric": {"probs", "logits"},
    "LogitRelaxedBernoulli": {"probs", "logits"},
    "Multinomial": {"probs", "logits"},
    "MultivariateNormal": {"scale_tril", "covariance_matrix", "precision_matrix"},
    "NegativeBinomial": {"probs", "logits"},
    "OneHotCategorical": {"probs", "logits"},
    "OneHotCategoricalStraightThrough": {"probs", "logits"},
    "RelaxedBernoulli": {"probs", "logits"},
    "RelaxedBernoulliStraightThrough": {"probs", "logits"},
    "RelaxedOneHotCategorical": {"probs", "logits"},
    "RelaxedOneHotCategoricalStraightThrough": {"probs", "logits"},
    "Wishart": {"scale_tril", "covariance_matrix", "precision_matrix"},
    "ZeroInflatedNegativeBinomial": {"probs", "logits", "gate", "gate_logits"},
    "ZeroInflatedPoisson": {"gate", "gate_logits"},
}


@pytest.mark.parametrize(
    "family", sorted({row.family for row in ALL_ROWS if " of " not in row.family})
)
def test_every_parametrisation_has_a_row(family: str) -> None:
    rows = [row for row in ALL_ROWS if row.family == family]
    covered = {name for row in rows for name in row.params}
    plain = rows[0].make(pyro.distributions)(**rows[0].values())
    learned = (
        set(plain.arg_constraints)
        - {name for row in rows for name in row.fixed or {}}
        - {"total_count"}
    )
    assert covered == learned, "what can be learned is learned in a row"
    several = {"probs", "logits", "scale_tril", "covariance_matrix", "gate", "gate_logits"}
    if len(covered & several) > 1:
        assert PARAMETRISATIONS[family] <= covered


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_groups_are_well_formed(row: Row) -> None:
    leaves = {name: value.requires_grad_() for name, value in row.values().items()}
    distribution = row.make(pyro.distributions)(**leaves)
    found = groups(distribution)
    assert len({group.name for group in found}) == len(found)
    for group in found:
        assert group.fisher.shape[:-2] == distribution.batch_shape
        assert not group.fisher.requires_grad
        assert any(coordinate.requires_grad for coordinate in group.coordinates)
        assert torch.linalg.eigvalsh(group.fisher).min() > -1e-12
        torch.testing.assert_close(group.fisher, group.fisher.mT)
        if group.scalar:
            assert group.size == 1 and group.coordinates[0].shape == distribution.batch_shape
        else:
            assert group.size > 1 or distribution.event_shape
        if group.bound is not None:
            diagonal = group.fisher.diagonal(dim1=-2, dim2=-1).amax(-1)
            assert (diagonal <= torch.as_tensor(group.bound) + 1e-15).all()


@pytest.mark.parametrize(
    "distribution",
    [
        torch.distributions.Bernoulli(probs=torch.tensor(0.5)),
        torch.distributions.Binomial(torch.tensor(7), probs=torch.tensor(0.5)),
        torch.distributions.Categorical(probs=torch.tensor([0.5, 0.5, 0.0])),
    ],
    ids=lambda distribution: type(distribution).__name__,
)
def test_bound_is_attained(distribution: Any) -> None:
    (group,) = groups(distribution)
    largest = group.fisher.diagonal(dim1=-2, dim2=-1).amax(-1)
    expected = torch.as_tensor(group.bound, dtype=torch.float64).expand_as(largest)
    torch.testing.assert_close(largest.double(), expected, rtol=1e-6, atol=0)


def test_off_diagonal_entries_matter() -> None:
    # Negative control: Gamma coordinates are not orthogonal, so they are one group.
    row = next(row for row in ROWS if row.family == "Gamma")
    oracle = testing.family_fisher(row.make(torch.distributions), row.values())
    assert (oracle - oracle.diagonal().diag()).abs().max() > 0.1
    assert len(groups(row.make(torch.distributions)(**row.values()))) == 1


# --- wrappers ----------------------------------------------------------------------------------


def test_peel_removes_all_wrappers() -> None:
    base = pyro.distributions.Normal(torch.zeros(2, 3), 1.0)
    one = torch.tensor([True, False])
    other = torch.tensor([[True], [True]])
    wrapped = base.to_event(1).mask(one).expand_by([2]).mask(other)
    assert type(peel(wrapped)) is pyro.distributions.Normal
    assert peel(base) is base


def test_peel_keeps_the_graph_through_expansion() -> None:
    logits = torch.zeros(3, requires_grad=True)
    expanded = pyro.distributions.Bernoulli(logits=logits).expand_by([4]).to_event(1)
    (group,) = groups(peel(expanded))
    assert group.coordinates[0].shape == group.fisher.shape[:-2] == (4, 3)
    (gradient,) = torch.autograd.grad(group.coordinates[0].sum(), logits)
    assert gradient.tolist() == [4.0] * 3


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_expanded_families_repeat_their_fisher(row: Row) -> None:
    distribution = row.make(pyro.distributions)(**row.values())
    expanded = distribution.expand((4, *distribution.batch_shape))
    for plain, wide in zip(groups(distribution), groups(peel(expanded)), strict=True):
        torch.testing.assert_close(wide.fisher, plain.fisher.expand(wide.fisher.shape))
        assert wide.fisher.shape[0] == 4


# --- refusals ----------------------------------------------------------------------------------


class Subclassed(pyro.distributions.Normal):
    """A user's subclass, whose density may be another."""

    def log_prob(self, value: Tensor) -> Tensor:
        return 2 * super().log_prob(value)


class Plain(torch.distributions.Bernoulli):
    """A user's subclass that changes nothing, which is not known here."""


def mixture(loc: Tensor | float = 0.0) -> Any:
    weights = pyro.distributions.Categorical(torch.ones(2) / 2)
    parts = pyro.distributions.Normal(loc * torch.ones(2), 1.0)
    return pyro.distributions.MixtureSameFamily(weights, parts)


UNSUPPORTED = {
    "BetaBinomial": pyro.distributions.BetaBinomial(torch.tensor(2.0), torch.tensor(2.0), 3),
    "FoldedDistribution": pyro.distributions.FoldedDistribution(
        pyro.distributions.Normal(torch.tensor(0.5), 1.0)
    ),
    "GammaPoisson": pyro.distributions.GammaPoisson(torch.tensor(2.0), torch.tensor(2.0)),
    "MixtureSameFamily": mixture(),
    "ProjectedNormal": pyro.distributions.ProjectedNormal(torch.tensor([0.5, 0.1])),
    # Peeled it is a normal distribution, see below; as it stands it is none.
    "TransformedDistribution": torch.distributions.TransformedDistribution(
        torch.distributions.Normal(0.0, 1.0), [torch.distributions.transforms.TanhTransform()]
    ),
    # A mixture of a density and a point mass is neither.
    "ZeroInflatedDistribution": pyro.distributions.ZeroInflatedDistribution(
        pyro.distributions.Normal(torch.tensor(0.0), 1.0), gate=torch.tensor(0.3)
    ),
    "Subclassed": Subclassed(0.0, 1.0),
    "Plain": Plain(torch.tensor(0.3)),
    # Missing elements have no density, so the closed form of the whole would be too large.
    "NanMaskedNormal": pyro.distributions.NanMaskedNormal(torch.zeros(2), torch.ones(2)),
    "NanMaskedMultivariateNormal": pyro.distributions.NanMaskedMultivariateNormal(
        torch.zeros(2), torch.eye(2)
    ),
}


@pytest.mark.parametrize("name", sorted(UNSUPPORTED))
def test_unsupported_families_are_refused(name: str) -> None:
    distribution = UNSUPPORTED[name]
    with pytest.raises(UnsupportedDistribution) as error:
        groups(distribution)
    assert str(error.value).startswith(name)
    assert isinstance(error.value, PyronatError) and not isinstance(error.value, NoFisher)
    if name != "ZeroInflatedDistribution":
        assert family_of(distribution) is None
        for family in FAMILIES:
            assert family in str(error.value)


def learned(value: float | list[float]) -> Tensor:
    return torch.tensor(value, requires_grad=True)


def uniform_mixture() -> Any:
    weights = pyro.distributions.Categorical(torch.ones(2) / 2)
    parts = pyro.distributions.Uniform(torch.zeros(2), learned([1.0, 2.0]))
    return pyro.distributions.MixtureSameFamily(weights, parts)


D = pyro.distributions
NO_FISHER: dict[str, Callable[[], Any]] = {
    "the support of Uniform moves": lambda: D.Uniform(0.0, learned(1.0)),
    "the support of Uniform moves with its": lambda: D.TransformedDistribution(
        D.Uniform(0.0, learned(1.0)), [torch.distributions.transforms.ExpTransform()]
    ),
    # Also where it is a part of something else.
    "support of Uniform": uniform_mixture,
    "the point of Delta": lambda: D.Delta(learned(1.0)),
    "Empirical": lambda: D.Empirical(torch.randn(4), learned([0.0, 0.1, 0.2, 0.3])),
    "Unit": lambda: D.Unit(learned(1.0)),
    "scale of Pareto": lambda: D.Pareto(learned(1.0), torch.tensor(2.0)),
    "loc of GeneralizedPareto": lambda: D.GeneralizedPareto(learned(1.0), 1.0, torch.tensor(0.2)),
    "loc of AffineBeta": lambda: D.AffineBeta(2.0, 2.0, learned(1.0), 1.0),
    "scale of AffineBeta": lambda: D.AffineBeta(2.0, 2.0, 1.0, learned(1.0)),
    "leaf_times of CoalescentTimes": lambda: D.CoalescentTimes(learned([0.0, 0.1, 0.2])),
    "total_count of Binomial": lambda: D.Binomial(learned(3.0), torch.tensor(0.2)),
}


@pytest.mark.parametrize(
    "message", sorted(message for message in NO_FISHER if message.split()[-1] not in LATER)
)
def test_distributions_without_fisher_information_are_told_apart(message: str) -> None:
    with pytest.raises(NoFisher, match=message) as error:
        groups(peel(NO_FISHER[message]()))
    assert "no Fisher information" in str(error.value)


@pytest.mark.parametrize(
    "distribution",
    [
        D.Uniform(torch.zeros(2), torch.ones(2)),
        D.Delta(torch.zeros(2)),
        D.ImproperUniform(torch.distributions.constraints.real, (2,), ()),
    ],
    ids=lambda distribution: type(distribution).__name__,
)
def test_fixed_distributions_without_fisher_information_are_harmless(distribution: Any) -> None:
    for group in groups(distribution):
        assert group.coordinates[0].shape == distribution.batch_shape
        assert not group.fisher.any()
    if type(distribution).__name__ == "Uniform":
        assert [group.name for group in groups(distribution)] == ["low, high"]


FIXED: dict[str, Callable[[], Any]] = {
    "total_count of NegativeBinomial": lambda: D.NegativeBinomial(learned(3.0), torch.tensor(0.2)),
    "total_count of NegativeBinomial depends": lambda: D.ZeroInflatedNegativeBinomial(
        learned(3.0), probs=torch.tensor(0.2), gate=torch.tensor(0.3)
    ),
    "temperature of RelaxedBernoulli": lambda: D.RelaxedBernoulli(
        learned(0.5), logits=torch.tensor(0.2)
    ),
    "temperature of RelaxedOneHotCategorical": lambda: D.RelaxedOneHotCategorical(
        learned(0.5), logits=torch.zeros(3)
    ),
    # The variate of the gradient estimator is held, but the density does not depend on it.
    "AVFMultivariateNormal holds a tensor": lambda: D.AVFMultivariateNormal(
        torch.zeros(2), torch.eye(2), torch.ones(2, 1, 2).requires_grad_()
    ),
}


@pytest.mark.parametrize("message", sorted(FIXED))
def test_tensors_that_no_coordinate_covers_are_refused(message: str) -> None:
    with pytest.raises(UnsupportedDistribution, match=message) as error:
        groups(peel(FIXED[message]()))
    assert not isinstance(error.value, NoFisher)


def test_an_attribute_that_is_not_known_is_refused() -> None:
    normal = D.Normal(learned(0.0), learned(1.0))
    groups(normal)
    normal.skewness = learned(0.5).exp()
    with pytest.raises(UnsupportedDistribution, match="otherwise than through its coordinates"):
        groups(normal)
    # What is computed from the coordinates is no danger, however deep the network before them.
    deep = learned(0.1)
    for _ in range(300):
        deep = deep.sin()
    normal = D.Normal(deep, 1.0)
    normal.variance_of_the_loc = deep.exp()
    groups(normal)
    covariance = (torch.eye(2) * deep.exp()).expand(3, 2, 2)
    groups(D.MultivariateNormal(torch.zeros(3, 2), covariance_matrix=covariance))


# --- transformed distributions -----------------------------------------------------------------

T = torch.distributions.transforms


@pytest.mark.parametrize(
    "transforms",
    [
        [T.TanhTransform()],
        [T.ExpTransform(), T.AffineTransform(1.0, torch.tensor(2.0))],
        [T.ComposeTransform([T.SigmoidTransform(), T.ExpTransform()]).inv.inv],
        [T.StickBreakingTransform()],
        [D.transforms.Permute(torch.tensor([1, 0, 2]))],
    ],
    ids=["tanh", "exp-affine", "compose", "stick-breaking", "permute"],
)
def test_fixed_transforms_keep_the_fisher_information(transforms: list[Any]) -> None:
    torch.manual_seed(0)
    loc = learned([[0.1, -0.4, 0.2], [0.3, 0.0, 1.0]])
    base = D.Normal(loc, 0.5)
    moved = D.TransformedDistribution(base, transforms).expand_by([2])
    inner = peel(moved)
    assert type(inner) is D.Normal
    assert family_name(moved) == "TransformedDistribution(Normal)"
    value = moved.sample()
    back = base_value(moved, value)
    assert back.shape == inner.batch_shape
    (expected,) = torch.autograd.grad(moved.log_prob(value).sum(), loc)
    found = score(inner, "loc", back)[..., 0].sum(0)
    torch.testing.assert_close(found, expected)
    # Negative control: the value itself has another score.
    wrong = value[..., :3] if value.shape != back.shape else value
    assert (score(inner, "loc", wrong)[..., 0].sum(0) - expected).abs().max() > 1e-3


KEPT: dict[str, Callable[[], Any]] = {
    "a learned shift": lambda: D.TransformedDistribution(
        D.Normal(0.0, 1.0), [T.AffineTransform(learned(0.3), 1.0)]
    ),
    "a network": lambda: D.TransformedDistribution(
        D.Normal(torch.zeros(2), 1.0), [D.transforms.affine_coupling(2, [3])]
    ),
    # The network hides in a function that binds its context.
    "a conditioned network": lambda: D.ConditionalTransformedDistribution(
        D.Normal(torch.zeros(2), 1.0), [D.transforms.conditional_affine_coupling(2, 1, [3])]
    ).condition(torch.ones(1)),
    "two to one": lambda: D.TransformedDistribution(D.Normal(0.0, 1.0), [T.AbsTransform()]),
    "folded": lambda: D.FoldedDistribution(D.Normal(torch.tensor(0.0), 1.0)),
    "discrete": lambda: D.TransformedDistribution(
        D.Bernoulli(torch.tensor(0.3)), [T.AffineTransform(1.0, 2.0)]
    ),
    "masked within": lambda: D.TransformedDistribution(
        D.Normal(torch.tensor(0.0), 1.0).mask(torch.tensor(True)), [T.ExpTransform()]
    ),
}


@pytest.mark.parametrize("name", sorted(KEPT))
def test_other_transforms_are_not_walked_through(name: str) -> None:
    distribution = KEPT[name]()
    assert peel(distribution) is distribution
    with pytest.raises(UnsupportedDistribution):
        groups(distribution)


def test_families_built_by_transforms_are_no_wrappers() -> None:
    for distribution in (
        D.LogNormal(torch.zeros(2), 1.0),
        D.RelaxedBernoulli(torch.tensor(0.5), torch.tensor(0.3)),
        D.InverseGamma(torch.tensor(2.0), 1.0),
    ):
        assert peel(distribution) is distribution
        assert family_name(distribution) == type(distribution).__name__
    masked = D.LogisticNormal(torch.zeros(2), torch.ones(2)).mask(torch.tensor(True))
    assert family_name(masked) == "LogisticNormal" and isinstance(
        peel(masked), torch.distributions.Normal
    )
    twice = D.TransformedDistribution(D.LogNormal(torch.zeros(2), 1.0), [T.ExpTransform()])
    assert family_name(twice) == "TransformedDistribution(LogNormal)"


def test_reparametrized_families_are_those_with_differentiable_draws() -> None:
    found = set()
    for row in ALL_ROWS:
        distribution = peel(row.make(pyro.distributions)(**row.values()))
        if type(distribution).__name__ in FAMILIES and distribution.has_rsample:
            found.add(type(distribution).__name__)
    assert found == REPARAMETRIZED - LATER


@pytest.mark.parametrize("row", OTHER_ROWS, ids=str)
def test_score_is_the_gradient_of_the_log_density(row: Row) -> None:
    """In the user's parameters, as `tests/test_scores.py` has it for the other rows."""
    torch.manual_seed(2)
    leaves = {name: value.requires_grad_() for name, value in row.values().items()}
    distribution = row.make(pyro.distributions)(**leaves)
    with torch.no_grad():
        value = distribution.sample() if row.draw is None else row.draw(distribution)
    expected = torch.autograd.grad(
        distribution.log_prob(value).sum(), list(leaves.values()), retain_graph=True
    )
    inner, total = peel(distribution), [torch.zeros_like(leaf) for leaf in leaves.values()]
    for group in groups(inner):
        parts = score(inner, group.name, base_value(distribution, value)).split(
            group.size // len(group.coordinates), -1
        )
        for part, coordinate in zip(parts, group.coordinates, strict=True):
            pulled = torch.autograd.grad(
                coordinate,
                list(leaves.values()),
                part.reshape(coordinate.shape),
                retain_graph=True,
                allow_unused=True,
            )
            total = [a if b is None else a + b for a, b in zip(total, pulled, strict=True)]
    torch.testing.assert_close(total, list(expected), rtol=1e-9, atol=1e-9)
    assert max(float(part.abs().max()) for part in expected) > 1e-3


def test_learnable_total_count_is_refused() -> None:
    count = torch.tensor(3.0, requires_grad=True)
    learnable = torch.distributions.Binomial(count, probs=torch.tensor(0.3), validate_args=False)
    with pytest.raises(UnsupportedDistribution, match="total_count of Binomial"):
        groups(learnable)
    groups(torch.distributions.Binomial(count.detach(), probs=torch.tensor(0.3)))


def test_number_of_trials_may_differ_between_elements() -> None:
    counts = torch.tensor([1.0, 4.0])
    p = torch.tensor([0.3, 0.8])
    (group,) = groups(pyro.distributions.Binomial(counts, probs=p))
    torch.testing.assert_close(group.fisher[:, 0, 0], counts * p * (1 - p))
    torch.testing.assert_close(group.bound, counts / 4)


# --- families of users -------------------------------------------------------------------------


class Own(pyro.distributions.Exponential):
    """Exponential, from elsewhere."""


class Other(Own):
    """A subclass, whose density may be another one."""


def own_form(d: Any) -> tuple[Group, ...]:
    return (Group("rate", (d.rate,), lambda: families.diagonal(d.rate**-2)),)


@pytest.fixture
def own() -> Iterator[None]:
    families.add(Own, own_form)
    yield
    families._OWN.clear()


def test_added_families_have_their_closed_form(own: None) -> None:
    rate = torch.tensor([0.5, 2.0], requires_grad=True)
    (group,) = groups(Own(rate))
    assert torch.equal(group.fisher, groups(torch.distributions.Exponential(rate))[0].fisher)
    assert score(Own(rate), "rate", rate.detach()).shape == (2, 1)
    assert families.is_reparametrized("Own")
    with pytest.raises(UnsupportedDistribution, match=r"Other.*families\.add"):
        groups(Other(rate))


def own_step() -> None:
    """A step of the visible geometry on a mixture of two rates."""

    def model(x: Tensor) -> None:
        rates = pyro.param("rates", torch.tensor([0.5, 2.0]), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            kind = pyro.sample("kind", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            pyro.sample("x", Own(rates[kind.long()]), obs=x)

    optim = NaturalGradient(geometry=Visible(posterior="enumerate", num_dreams=50))
    svi = NaturalSVI(model, lambda x: None, optim, TraceEnum_ELBO(max_plate_nesting=1))
    svi.step(torch.tensor([0.1, 1.0, 3.0]))
    assert svi.info is not None and svi.info.accepted and svi.info.missing is not None


def test_the_visible_geometry_takes_added_families(own: None) -> None:
    own_step()


def test_the_visible_geometry_refuses_others() -> None:
    """Negative control."""
    with pytest.raises(UnsupportedDistribution, match="site x .* no closed-form"):
        own_step()


def test_families_that_were_not_added_have_none() -> None:
    """Negative control."""
    rate = torch.tensor([0.5, 2.0], requires_grad=True)
    assert not families.is_reparametrized("Own")
    with pytest.raises(UnsupportedDistribution):
        groups(Own(rate))


def test_fixed_arguments_of_added_families_are_refused(own: None) -> None:
    families.add(Own, own_form, fixed=("rate",))
    with pytest.raises(UnsupportedDistribution, match="rate of Own"):
        groups(Own(torch.tensor(1.0, requires_grad=True)))


@pytest.mark.parametrize("kind", [pyro.distributions.Normal, torch.distributions.Gamma])
def test_families_of_torch_and_pyro_stay_as_they_are(kind: Any) -> None:
    with pytest.raises(ValueError, match="is of torch or Pyro"):
        families.add(kind, own_form)


# --- the table of the README -------------------------------------------------------------------

README = (Path(__file__).parents[1] / "README.md").read_text()
ABSTRACT = {
    "ExpandedDistribution",
    "ExponentialFamily",
    "Independent",
    "MaskedDistribution",
    "TorchDistribution",
}
"""Exported by Pyro, but wrappers and bases."""


def table() -> dict[str, set[str]]:
    """What the README says of distributions, by the beginning of its first column."""
    found = re.search(r"<!-- families -->(.*?)<!-- end -->", README, re.DOTALL)
    assert found is not None
    rows = [line.strip("|").split("|") for line in found[1].strip().splitlines()[2:]]
    return {kind.strip(): set(names.strip().split(", ")) for kind, names in rows}


CLOSED, SUBCLASSES, WALKED, SIMULATED, SINGULARS, UNDRAWN = table().values()


def test_table_names_every_distribution_once() -> None:
    exported = {
        name
        for name, kind in vars(pyro.distributions).items()
        if isinstance(kind, type) and issubclass(kind, torch.distributions.Distribution)
    }
    named = [name for names in table().values() for name in names]
    assert len(named) == len(set(named))
    only_torch = {"ExpRelaxedCategorical", "LogitRelaxedBernoulli"}
    assert set(named) - only_torch - LATER == exported - ABSTRACT
    assert exported >= ABSTRACT


def test_table_says_what_the_code_does() -> None:
    assert CLOSED == set(FAMILIES)
    assert SINGULARS == set(SINGULAR)
    assert WALKED == wrappers.TRANSFORMED
    for name in SUBCLASSES:
        kind = getattr(pyro.distributions, name)
        assert name not in FAMILIES
        assert {base.__name__ for base in kind.__mro__} & set(FAMILIES)
    covered = {row.family for row in ALL_ROWS}
    assert covered >= SUBCLASSES - {"LKJCorrCholesky"}  # deprecated: it warns
    for name in (SIMULATED | UNDRAWN) - LATER:
        kinds = getattr(pyro.distributions, name).__mro__
        module = kinds[0].__module__
        assert module.endswith("nanmasked") or not {k.__name__ for k in kinds} & set(FAMILIES)


def test_what_pyro_cannot_draw() -> None:
    """A sample of them; `sample` or `log_prob` is missing."""
    d = pyro.distributions
    eye, zeros = torch.eye(2).expand(3, 2, 2), d.Normal(torch.zeros(3, 2), 1.0).to_event(1)
    first = d.Normal(torch.zeros(2), 1.0).to_event(1)
    undrawn = {
        "CoalescentTimesWithRate": d.CoalescentTimesWithRate(torch.zeros(3), torch.ones(4)),
        "GroupedNormalNormal": d.GroupedNormalNormal(
            torch.zeros(2), torch.ones(2), torch.ones(4), torch.tensor([0, 0, 1, 1])
        ),
        "LinearHMM": d.LinearHMM(first, eye, zeros, eye, zeros),
        "LogNormalNegativeBinomial": d.LogNormalNegativeBinomial(
            torch.tensor(2.0),
            logits=torch.tensor(0.1),
            multiplicative_noise_scale=torch.tensor(0.3),
        ),
    }
    assert set(undrawn) <= UNDRAWN
    for distribution in undrawn.values():
        with pytest.raises(NotImplementedError):
            distribution.log_prob(distribution.sample())
        with pytest.raises(UnsupportedDistribution):
            groups(distribution)
