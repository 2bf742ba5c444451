"""Conjugate models: one natural step of length 1 in natural coordinates is Bayes' rule.

With q(z; η) in the exponential family of the prior, the loss is
KL(q(η) ‖ prior η₀) − E_q[log p(x|z)] = KL(q(η) ‖ posterior η*) + const, and its gradient is
F(η)(η − η*) (Hoffman et al. 2013, Sec. 2). A step −F(η)⁻¹∇ thus ends at η* from anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor
from torch.distributions import kl_divergence

from pyronat import Full, NaturalGradient, NaturalSVI
from pyronat.steps import ConstantDamping, KLTrustRegion, Momentum, RunningAverage

Program = Callable[..., Any]


# torch warns of draws from a Wishart distribution that it replaces; no draw enters the loss.
pytestmark = pytest.mark.filterwarnings("ignore:Singular sample detected")


def randn(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


class ExactELBO(Trace_ELBO):
    """−ELBO with the divergence and the expected log likelihood in closed form.

    Args:
        expected: guide's distributions by site → E_q[log p(x|z)] in nats.
    """

    def __init__(self, expected: Callable[[dict[str, Any]], Tensor]) -> None:
        super().__init__()
        self._expected = expected

    def _loss(self, model: Program, guide: Program, args: Any, kwargs: Any) -> Tensor:
        model_trace, guide_trace = self._get_trace(model, guide, args, kwargs)
        latents = [
            name
            for name, site in model_trace.nodes.items()
            if site["type"] == "sample" and not site["is_observed"]
        ]
        divergence = torch.zeros(())
        for name in latents:
            q, p = (trace.nodes[name]["fn"] for trace in (guide_trace, model_trace))
            wishart = isinstance(q, dist.Wishart)
            divergence = divergence + (wishart_divergence if wishart else kl_divergence)(q, p)
        return divergence - self._expected({n: guide_trace.nodes[n]["fn"] for n in latents})

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        with torch.no_grad():
            return float(self._loss(model, guide, args, kwargs))

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        loss = self._loss(model, guide, args, kwargs)
        loss.backward()
        return float(loss.detach())


@dataclass(frozen=True)
class Conjugate:
    """A model with a conjugate guide.

    Attributes:
        model: the model, of the data.
        guide: stored in natural coordinates, or in `others` by name.
        expected: E_q[log p(x|z)] up to a constant in nats, from the guide's distributions.
        data: the data.
        start: initial parameters by name.
        posterior: the parameters of the posterior by name, from Bayes' rule.
    """

    model: Program
    guide: Program
    expected: Callable[[dict[str, Any], Tensor], Tensor]
    data: Tensor
    start: dict[str, Tensor]
    posterior: Callable[[Tensor], dict[str, Tensor]]


def leaf(name: str) -> Tensor:
    return pyro.param(name)


# --- mean of a normal distribution --------------------------------------------------------------

NOISE, PRIOR_SCALE = 0.5, 2.0


def normal_model(x: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(1.0, PRIOR_SCALE))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mean, NOISE), obs=x)


def normal_guide(x: Tensor) -> None:
    """η₁ = loc / scale², η₂ = −1 / (2 scale²)."""
    first, second = leaf("first"), leaf("second")
    variance = -0.5 / second
    pyro.sample("mean", dist.Normal(first * variance, variance.sqrt()))


def usual_normal_guide(x: Tensor) -> None:
    """The same distributions in loc and log scale."""
    pyro.sample("mean", dist.Normal(leaf("first"), leaf("second").exp()))


def normal_expected(q: dict[str, Any], x: Tensor) -> Tensor:
    loc, variance = q["mean"].mean, q["mean"].variance
    return -0.5 * ((x - loc).square() + variance).sum() / NOISE**2


def normal_posterior(x: Tensor) -> dict[str, Tensor]:
    precision = 1 / PRIOR_SCALE**2 + len(x) / NOISE**2
    return {
        "first": 1 / PRIOR_SCALE**2 + x.sum() / NOISE**2,
        "second": torch.as_tensor(-0.5 * precision),
    }


# --- precision of a normal distribution: gamma --------------------------------------------------


def precision_model(x: Tensor) -> None:
    """Known mean 0, unknown precision."""
    precision = pyro.sample("precision", dist.Gamma(2.0, 3.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(0.0, precision.rsqrt()), obs=x)


def gamma_guide(site: str) -> Program:
    """η₁ = concentration − 1, η₂ = −rate."""

    def guide(x: Tensor) -> None:
        pyro.sample(site, dist.Gamma(leaf("first") + 1, -leaf("second")))

    return guide


def usual_gamma_guide(x: Tensor) -> None:
    pyro.sample("rate", dist.Gamma(leaf("first").exp(), leaf("second").exp()))


def gamma_moments(q: Any) -> tuple[Tensor, Tensor]:
    """E[z] and E[log z]."""
    return q.mean, torch.digamma(q.concentration) - q.rate.log()


def precision_expected(q: dict[str, Any], x: Tensor) -> Tensor:
    mean, mean_log = gamma_moments(q["precision"])
    return 0.5 * len(x) * mean_log - 0.5 * x.square().sum() * mean


def precision_posterior(x: Tensor) -> dict[str, Tensor]:
    return {
        "first": torch.tensor(2.0 + len(x) / 2 - 1),
        "second": -(3.0 + x.square().sum() / 2),
    }


# --- Gamma–Poisson ------------------------------------------------------------------------------


def poisson_model(x: Tensor) -> None:
    rate = pyro.sample("rate", dist.Gamma(2.0, 0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Poisson(rate), obs=x)


def poisson_expected(q: dict[str, Any], x: Tensor) -> Tensor:
    mean, mean_log = gamma_moments(q["rate"])
    return x.sum() * mean_log - len(x) * mean


def poisson_posterior(x: Tensor) -> dict[str, Tensor]:
    return {"first": 2.0 + x.sum() - 1, "second": torch.tensor(-0.5 - len(x))}


# --- Beta–Bernoulli -----------------------------------------------------------------------------


def coin_model(x: Tensor) -> None:
    bias = pyro.sample("bias", dist.Beta(1.5, 2.5))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Bernoulli(bias), obs=x)


def coin_guide(x: Tensor) -> None:
    """η₁ = concentration1 − 1, η₂ = concentration0 − 1."""
    pyro.sample("bias", dist.Beta(leaf("first") + 1, leaf("second") + 1))


def coin_expected(q: dict[str, Any], x: Tensor) -> Tensor:
    a, b = q["bias"].concentration1, q["bias"].concentration0
    heads, total = x.sum(), torch.digamma(a + b)
    return heads * (torch.digamma(a) - total) + (len(x) - heads) * (torch.digamma(b) - total)


def coin_posterior(x: Tensor) -> dict[str, Tensor]:
    return {"first": 1.5 + x.sum() - 1, "second": 2.5 + len(x) - x.sum() - 1}


# --- Dirichlet–Categorical ----------------------------------------------------------------------

DIRICHLET = torch.tensor([1.5, 0.7, 2.0], dtype=torch.float64)


def die_model(x: Tensor) -> None:
    probs = pyro.sample("probs", dist.Dirichlet(DIRICHLET))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Categorical(probs), obs=x)


def die_guide(x: Tensor) -> None:
    """η = concentration − 1."""
    pyro.sample("probs", dist.Dirichlet(leaf("eta") + 1))


def die_expected(q: dict[str, Any], x: Tensor) -> Tensor:
    concentration = q["probs"].concentration
    mean_log = torch.digamma(concentration) - torch.digamma(concentration.sum())
    return (torch.bincount(x, minlength=3) * mean_log).sum()


def die_posterior(x: Tensor) -> dict[str, Tensor]:
    return {"eta": DIRICHLET + torch.bincount(x, minlength=3) - 1}


# --- mean of a multivariate normal distribution -------------------------------------------------

DIM = 2
NOISE_PRECISION = torch.tensor([[2.0, 0.3], [0.3, 1.0]], dtype=torch.float64)


def symmetric(vector: Tensor) -> Tensor:
    """The symmetric matrix `[2, 2]` of (diagonal, sum of both off-diagonal entries)."""
    a, b, c = vector
    return torch.stack([a, c / 2, c / 2, b]).reshape(2, 2)


def halves(matrix: Tensor) -> Tensor:
    """What `symmetric` makes the matrix of."""
    return torch.stack([matrix[0, 0], matrix[1, 1], 2 * matrix[0, 1]])


def mean_model(x: Tensor) -> None:
    mean = pyro.sample("mean", dist.MultivariateNormal(torch.zeros(DIM), torch.eye(DIM)))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.MultivariateNormal(mean, precision_matrix=NOISE_PRECISION), obs=x)


def mean_guide(x: Tensor) -> None:
    """η₁ = P loc, η₂ = −P / 2 with the precision matrix P."""
    precision = -2 * symmetric(leaf("second"))
    loc = torch.linalg.solve(precision, leaf("first"))
    pyro.sample("mean", dist.MultivariateNormal(loc, precision_matrix=precision))


def mean_expected(q: dict[str, Any], x: Tensor) -> Tensor:
    loc, covariance = q["mean"].mean, q["mean"].covariance_matrix
    residual = x - loc
    squares = torch.einsum("ni,ij,nj->", residual, NOISE_PRECISION, residual)
    return -0.5 * (squares + len(x) * (NOISE_PRECISION * covariance).sum())


def mean_posterior(x: Tensor) -> dict[str, Tensor]:
    precision = torch.eye(DIM) + len(x) * NOISE_PRECISION
    return {"first": NOISE_PRECISION @ x.sum(0), "second": halves(-0.5 * precision)}


# --- precision matrix of a multivariate normal distribution: Wishart ----------------------------

DEGREES = 4.0


def wishart_model(x: Tensor) -> None:
    prior = dist.Wishart(torch.tensor(DEGREES), precision_matrix=torch.eye(DIM))
    precision = pyro.sample("precision", prior)
    with pyro.plate("data", len(x)):
        noise = dist.MultivariateNormal(torch.zeros(DIM), precision_matrix=precision)
        pyro.sample("x", noise, obs=x)


def wishart_guide(x: Tensor) -> None:
    """η₁ = (df − p − 1) / 2, η₂ = −V⁻¹ / 2 with the scale matrix V."""
    degrees = 2 * leaf("first") + DIM + 1
    pyro.sample("precision", dist.Wishart(degrees, precision_matrix=-2 * symmetric(leaf("second"))))


def wishart_log_det(q: Any) -> Tensor:
    """E[log det Λ]."""
    digammas = torch.digamma((q.df - torch.arange(DIM)) / 2).sum()
    return torch.logdet(q.covariance_matrix) + digammas + DIM * torch.log(torch.tensor(2.0))


def wishart_divergence(q: Any, p: Any) -> Tensor:
    """KL(q ‖ p). Torch's own is the generic one, which treats q as constant."""
    mean = q.df * q.covariance_matrix
    normalizer = p.df * torch.logdet(2 * p.covariance_matrix) / 2 + torch.mvlgamma(p.df / 2, DIM)
    trace = (p.precision_matrix * mean).sum()
    expected = (p.df - DIM - 1) / 2 * wishart_log_det(q) - trace / 2 - normalizer
    return -q.entropy() - expected


def wishart_expected(q: dict[str, Any], x: Tensor) -> Tensor:
    mean = q["precision"].df * q["precision"].covariance_matrix
    return 0.5 * len(x) * wishart_log_det(q["precision"]) - 0.5 * ((x.T @ x) * mean).sum()


def test_the_divergence_of_wishart_distributions_is_right() -> None:
    p = dist.Wishart(torch.tensor(DEGREES), precision_matrix=torch.eye(DIM))
    scale = torch.tensor([[1.2, -0.3], [-0.3, 1.6]])
    q = dist.Wishart(torch.tensor(6.0), precision_matrix=scale)
    assert float(wishart_divergence(p, p)) == pytest.approx(0, abs=1e-12)
    draws = q.sample(torch.Size([20000]))
    ratios = q.log_prob(draws) - p.log_prob(draws)
    error = float(ratios.std()) / len(ratios) ** 0.5
    assert abs(float(ratios.mean() - wishart_divergence(q, p))) < 4 * error
    assert float(ratios.mean()) > 20 * error


def wishart_posterior(x: Tensor) -> dict[str, Tensor]:
    return {
        "first": torch.tensor((DEGREES + len(x) - DIM - 1) / 2),
        "second": halves(-0.5 * (torch.eye(DIM) + x.T @ x)),
    }


COUNTS = torch.tensor([3.0, 0.0, 2.0, 5.0, 1.0, 4.0], dtype=torch.float64)
FLIPS = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0], dtype=torch.float64)


def numbers(**values: float) -> dict[str, Tensor]:
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


CONJUGATE: dict[str, Conjugate] = {
    "normal": Conjugate(
        normal_model,
        normal_guide,
        normal_expected,
        randn(1, 12) + 2,
        numbers(first=-1.0, second=-0.3),
        normal_posterior,
    ),
    "normal precision": Conjugate(
        precision_model,
        gamma_guide("precision"),
        precision_expected,
        0.7 * randn(2, 9),
        numbers(first=0.6, second=-1.1),
        precision_posterior,
    ),
    "gamma–Poisson": Conjugate(
        poisson_model,
        gamma_guide("rate"),
        poisson_expected,
        COUNTS,
        numbers(first=0.2, second=-2.0),
        poisson_posterior,
    ),
    "beta–Bernoulli": Conjugate(
        coin_model,
        coin_guide,
        coin_expected,
        FLIPS,
        numbers(first=0.4, second=2.0),
        coin_posterior,
    ),
    "Dirichlet–categorical": Conjugate(
        die_model,
        die_guide,
        die_expected,
        torch.tensor([0, 2, 2, 1, 2, 0, 2]),
        {"eta": torch.tensor([0.3, 1.0, -0.4], dtype=torch.float64)},
        die_posterior,
    ),
    "multivariate normal": Conjugate(
        mean_model,
        mean_guide,
        mean_expected,
        randn(3, 7, DIM) + 1,
        {
            "first": torch.tensor([-1.0, 0.5], dtype=torch.float64),
            "second": torch.tensor([-0.6, -0.8, 0.3], dtype=torch.float64),
        },
        mean_posterior,
    ),
    "Wishart": Conjugate(
        wishart_model,
        wishart_guide,
        wishart_expected,
        randn(4, 7, DIM),
        {
            "first": torch.tensor(1.0, dtype=torch.float64),
            "second": torch.tensor([-0.6, -0.8, 0.3], dtype=torch.float64),
        },
        wishart_posterior,
    ),
}


def one_step(
    case: Conjugate, guide: Program | None = None, start: dict[str, Tensor] | None = None
) -> tuple[dict[str, Tensor], NaturalSVI]:
    """Parameters after one natural step of length 1, without damping, averages and momentum."""
    for name, value in (case.start if start is None else start).items():
        pyro.param(name, value.clone())
    optim = NaturalGradient(
        lr=1.0,
        guide_geometry=Full("posterior"),
        damping=ConstantDamping(0.0),
        curvature=RunningAverage(decay=0.0, refresh=1),
        trust_region=KLTrustRegion(guide=math.inf),
        momentum=Momentum(0.0),
    )
    loss = ExactELBO(lambda q: case.expected(q, case.data))
    svi = NaturalSVI(case.model, guide or case.guide, optim, loss)
    svi.step(case.data)
    assert svi.info is not None and svi.info.accepted
    return {name: pyro.param(name).detach().clone() for name in case.start}, svi


@pytest.mark.parametrize("name", CONJUGATE)
def test_one_step_reaches_the_posterior(name: str) -> None:
    case = CONJUGATE[name]
    found, svi = one_step(case)
    posterior = case.posterior(case.data)
    for param, value in posterior.items():
        torch.testing.assert_close(found[param], value.double(), rtol=1e-8, atol=1e-8)
        # There was a way to go.
        assert float((case.start[param] - value).abs().max()) > 0.1
    # A second step stays there.
    svi.step(case.data)
    for param, value in posterior.items():
        torch.testing.assert_close(pyro.param(param).detach(), value.double(), rtol=1e-8, atol=1e-8)


USUAL: dict[str, tuple[Program, dict[str, Tensor], Callable[[dict[str, Tensor]], Any]]] = {
    "normal": (
        usual_normal_guide,
        # The distribution of the case's start.
        numbers(first=-1.0 / 0.6, second=-0.5 * 0.5108256237659907 * -1),
        lambda p: (p["first"] / (2 * p["second"]).exp(), -0.5 * (-2 * p["second"]).exp()),
    ),
    "gamma–Poisson": (
        usual_gamma_guide,
        numbers(first=0.1823215567939546, second=0.6931471805599453),
        lambda p: (p["first"].exp() - 1, -p["second"].exp()),
    ),
}


@pytest.mark.parametrize("name", USUAL)
def test_other_coordinates_do_not_reach_it_in_one_step(name: str) -> None:
    """Negative control: finite steps depend on the coordinates, though directions do not."""
    case = CONJUGATE[name]
    guide, start, natural = USUAL[name]
    for param, value in zip(case.start, natural(start), strict=True):
        torch.testing.assert_close(case.start[param], value, rtol=1e-9, atol=1e-9)
    found, _ = one_step(case, guide, start)
    posterior = case.posterior(case.data)
    distance = [
        float((value - target).abs())
        for value, target in zip(natural(found), posterior.values(), strict=True)
    ]
    assert max(distance) > 0.1


@pytest.mark.parametrize("name", CONJUGATE)
def test_the_plain_gradient_does_not_reach_it(name: str) -> None:
    """Negative control: the wrong metric. The best length along the gradient misses it too."""
    case = CONJUGATE[name]
    for param, value in case.start.items():
        pyro.param(param, value.clone())
    loss = ExactELBO(lambda q: case.expected(q, case.data))
    loss.loss_and_grads(case.model, case.guide, case.data)
    gradient = torch.cat([pyro.param(param).grad.reshape(-1) for param in case.start])
    posterior = case.posterior(case.data)
    way = torch.cat([(posterior[n] - case.start[n]).reshape(-1) for n in case.start])
    angle = torch.nn.functional.cosine_similarity(-gradient, way, dim=0)
    assert float(angle) < 0.999
