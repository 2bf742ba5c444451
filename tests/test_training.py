"""Trainings whose end is known: exact optima, and every kind of program that Pyro users write."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import linear

from pyronat import Euclidean, Full, NaturalGradient, NaturalSVI
from pyronat.steps import ConstantDamping, KLTrustRegion, LinearDecay

Program = Callable[..., Any]


def randn(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def parameters() -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in pyro.get_param_store().named_parameters()}


# --- factor analysis: the optimum is known from the eigenvalues of the covariance ----------------


LATENT, VISIBLE, NOISE = 1, 6, 1.0


def factor_data(size: int = 300) -> Tensor:
    weight = randn(1, VISIBLE, LATENT)
    return randn(2, size, LATENT) @ weight.T + NOISE * randn(3, size, VISIBLE) + randn(4, VISIBLE)


def factor_model(x: Tensor) -> None:
    weight = pyro.param("W", lambda: 0.3 * randn(11, VISIBLE, LATENT))
    bias = pyro.param("b", lambda: torch.zeros(VISIBLE))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(LATENT), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(linear(z, weight, bias), NOISE).to_event(1), obs=x)


def factor_guide(x: Tensor) -> None:
    weight = pyro.param("q.W", lambda: 0.3 * randn(12, LATENT, VISIBLE))
    bias = pyro.param("q.b", lambda: torch.zeros(LATENT))
    scale = pyro.param("q.s", lambda: torch.zeros(LATENT)).exp()
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(linear(x, weight, bias), scale).to_event(1))


def factor_optimum(x: Tensor) -> float:
    """Smallest −log p(x) with isotropic noise of known size (Tipping & Bishop 1999).

    A Gaussian guide whose mean is linear in x reaches it. One factor: there is no slow rotation.
    """
    covariance = torch.cov(x.T, correction=0)
    values = torch.linalg.eigvalsh(covariance).flip(0)
    modeled = torch.full_like(values, NOISE**2)
    modeled[:LATENT] = values[:LATENT].clamp_min(NOISE**2)
    terms = modeled.log() + values / modeled + math.log(2 * math.pi)
    return 0.5 * len(x) * terms.sum().item()


@pytest.mark.parametrize("guide_geometry", [None, Euclidean()], ids=["natural", "adam"])
@pytest.mark.parametrize("seed", [0])
def test_factor_analysis_trains_to_its_optimum_with_defaults(
    seed: int, guide_geometry: Any
) -> None:
    x = factor_data()
    optimum = factor_optimum(x)
    pyro.set_rng_seed(seed)
    optim = NaturalGradient(LinearDecay(0.1, 300), guide_geometry=guide_geometry)
    svi = NaturalSVI(factor_model, factor_guide, optim, Trace_ELBO())
    losses = []
    for _ in range(300):
        losses.append(svi.step(x))
        assert svi.info.accepted
    pyro.set_rng_seed(77)
    final = sum(svi.evaluate_loss(x) for _ in range(100)) / 100
    # stable: no step is ever worse than the start by more than noise
    assert max(losses) < losses[0] * 1.05
    # 0.02 nats per datum below (noise of the estimate) and 0.1 above the optimum
    assert -0.02 * len(x) < final - optimum < 0.1 * len(x)
    assert losses[0] - optimum > 1.0 * len(x)


def test_another_optimum_is_not_in_the_window() -> None:
    """Negative control: without training the model, the window is missed."""
    x = factor_data()
    svi = NaturalSVI(factor_model, factor_guide, NaturalGradient(lr=0.0))
    for _ in range(20):
        svi.step(x)
    assert svi.evaluate_loss(x) - factor_optimum(x) > 0.1 * len(x)


# --- conjugate Gaussian: the guide's optimum is the posterior -----------------------------------


def mean_model(x: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, 0.5), obs=x)


CHARTS: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "loc, log scale": lambda: (
        pyro.param("loc", torch.tensor(-1.0)),
        pyro.param("s", torch.tensor(0.0)).exp(),
    ),
    "constrained scale": lambda: (
        pyro.param("loc", torch.tensor(-1.0)),
        pyro.param("s", torch.tensor(1.0), constraint=constraints.positive),
    ),
    "stretched": lambda: (
        100 * pyro.param("loc", torch.tensor(-0.01)),
        (pyro.param("s", torch.tensor(0.0)) / 20).exp(),
    ),
    "sheared": lambda: (
        pyro.param("loc", torch.tensor(-1.0)) + 3 * pyro.param("s", torch.tensor(0.0)),
        pyro.param("s").exp(),
    ),
    "precision": lambda: (
        pyro.param("loc", torch.tensor(-1.0)),
        pyro.param("s", torch.tensor(1.0), constraint=constraints.positive) ** -0.5,
    ),
}


def chart_path(chart: str, lr: float = 0.2, steps: int = 40) -> tuple[Tensor, Tensor]:
    """Mean and log-scale of the guide after each step `[steps]`."""
    pyro.clear_param_store()
    pyro.set_rng_seed(3)

    def guide(x: Tensor) -> None:
        pyro.sample("mu", dist.Normal(*CHARTS[chart]()))

    optim = NaturalGradient(lr, damping=ConstantDamping(1e-9), trust_region=KLTrustRegion(0.05))
    elbo = TraceMeanField_ELBO(num_particles=30, vectorize_particles=True, max_plate_nesting=1)
    svi = NaturalSVI(mean_model, guide, optim, elbo)
    path = []
    for _ in range(steps):
        svi.step(X)
        loc, scale = CHARTS[chart]()
        path.append(torch.stack([loc, scale.log()]).detach())
    return tuple(torch.stack(path).T)


X = 0.5 * randn(5, 10) + 1.0


@pytest.mark.parametrize("chart", CHARTS)
def test_the_natural_gradient_finds_the_posterior_in_any_chart(chart: str) -> None:
    precision = 1 / 4 + len(X) / 0.25
    loc, scale = chart_path(chart, lr=0.05, steps=150)
    assert loc[-30:].mean().item() == pytest.approx(X.sum().item() / 0.25 / precision, abs=0.06)
    assert scale[-30:].exp().mean().item() == pytest.approx(precision**-0.5, rel=0.15)


@pytest.mark.parametrize("chart", [name for name in CHARTS if name != "loc, log scale"])
def test_small_steps_follow_the_same_path_in_any_chart(chart: str) -> None:
    """Invariance: charts differ by terms of the order lr²."""
    reference = torch.stack(chart_path("loc, log scale", lr=1e-4, steps=20))
    found = torch.stack(chart_path(chart, lr=1e-4, steps=20))
    start = torch.tensor([-1.0, 0.0])[:, None]
    moved = (reference - start).abs().max()
    assert (found - reference).abs().max() < 0.02 * moved
    # Negative control: plain gradients go elsewhere in a stretched chart.
    if chart == "stretched":
        assert plain_move("stretched") > 100 * plain_move("loc, log scale")


def plain_move(chart: str) -> float:
    """How far one step of plain gradient descent moves the mean."""
    pyro.clear_param_store()

    def guide(x: Tensor) -> None:
        pyro.sample("mu", dist.Normal(*CHARTS[chart]()))

    others = pyro.optim.SGD({"lr": 1e-4})
    optim = NaturalGradient(guide_geometry=Euclidean(), others=others)
    NaturalSVI(mean_model, guide, optim).step(X)
    return abs(CHARTS[chart]()[0].item() + 1.0)


# --- kinds of programs -------------------------------------------------------------------------


COVARIATES = randn(6, 60, 2)
RESPONSES = (COVARIATES @ torch.tensor([1.0, -2.0], dtype=torch.float64) + 0.5).unsqueeze(1)


class BayesianRegression(PyroModule):
    """Weights are random, the noise is a constrained parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = PyroModule[torch.nn.Linear](2, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 3.0).expand([1, 2]).to_event(2))
        self.linear.bias = PyroSample(dist.Normal(0.0, 3.0).expand([1]).to_event(1))
        self.noise = PyroParam(torch.tensor(1.0), constraint=constraints.positive)

    def forward(self, x: Tensor, y: Tensor) -> None:
        mean = self.linear(x)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, self.noise).to_event(1), obs=y)


@pytest.mark.parametrize(
    "kind", [AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal, AutoDelta]
)
@pytest.mark.parametrize("guide_geometry", [None, Euclidean()], ids=["default", "adam"])
def test_autoguides_train_a_pyro_module(kind: Any, guide_geometry: Any) -> None:
    program = BayesianRegression()
    guide = kind(program)
    optim = NaturalGradient(
        LinearDecay(0.1, 200), guide_geometry=guide_geometry, others=pyro.optim.Adam({"lr": 0.05})
    )
    svi = NaturalSVI(program, guide, optim)
    losses = []
    for _ in range(200):
        losses.append(svi.step(COVARIATES, RESPONSES))
        assert svi.info.accepted
    median = guide.median()
    expected = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    assert torch.allclose(median["linear.weight"], expected, atol=0.15)
    assert median["linear.bias"].item() == pytest.approx(0.5, abs=0.15)
    assert program.noise.item() < 0.4
    assert losses[-1] < losses[0] - 50


def plain_module(layer: torch.nn.Linear) -> tuple[Program, Program]:
    def model(x: Tensor, y: Tensor) -> None:
        registered = pyro.module("layer", layer)
        noise = pyro.param("noise", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(registered(x), noise).to_event(1), obs=y)

    return model, lambda x, y: None


def constrained() -> tuple[Program, Program]:
    def model(x: Tensor, y: Tensor) -> None:
        share = pyro.param("share", torch.tensor(0.5), constraint=constraints.unit_interval)
        simplex = pyro.param("simplex", torch.ones(3) / 3, constraint=constraints.simplex)
        lower = pyro.param("lower", torch.eye(2), constraint=constraints.lower_cholesky)
        with pyro.plate("data", len(x)):
            pyro.sample("positive", dist.Bernoulli(share), obs=(y[:, 0] > 0).double())
            group = (y[:, 0] > 1).long() + (y[:, 0] > 0).long()
            pyro.sample("group", dist.Categorical(simplex), obs=group)
            fn = dist.MultivariateNormal(torch.zeros(2), scale_tril=lower)
            pyro.sample("x", fn, obs=x)

    return model, lambda x, y: None


def test_a_module_reaches_least_squares() -> None:
    layer = torch.nn.Linear(2, 1)
    optim = NaturalGradient(lr=LinearDecay(0.3, 150))
    svi = NaturalSVI(*plain_module(layer), optim)
    noisy = RESPONSES + 0.3 * randn(8, 60, 1)
    for _ in range(150):
        svi.step(COVARIATES, noisy)
    inputs = torch.cat([COVARIATES, torch.ones(60, 1)], 1)
    best = torch.linalg.lstsq(inputs, noisy).solution[:, 0]
    found = torch.cat([layer.weight[0], layer.bias]).detach()
    assert torch.allclose(found, best, atol=1e-3)
    residual = (inputs @ best - noisy[:, 0]).square().mean().sqrt()
    assert pyro.param("noise").item() == pytest.approx(residual.item(), rel=0.01)


def test_constrained_parameters_reach_their_maximum_likelihood() -> None:
    svi = NaturalSVI(*constrained(), NaturalGradient(lr=LinearDecay(0.3, 150)))
    for _ in range(150):
        svi.step(COVARIATES, RESPONSES)
        assert svi.info.accepted
    y = RESPONSES[:, 0]
    shares = torch.stack([(y <= 0), (y > 0) & (y <= 1), (y > 1)]).double().mean(1)
    assert pyro.param("share").item() == pytest.approx((y > 0).double().mean().item(), abs=1e-3)
    assert torch.allclose(pyro.param("simplex").detach(), shares, atol=1e-3)
    lower = pyro.param("lower").detach()
    second = COVARIATES.T @ COVARIATES / len(COVARIATES)
    assert torch.allclose(lower @ lower.T, second, atol=1e-2)


# --- precisions --------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("params", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("guide_geometry", [Full(), Euclidean()], ids=["natural", "adam"])
def test_data_and_parameters_may_differ_in_precision(
    params: torch.dtype, data: torch.dtype, guide_geometry: Any
) -> None:
    torch.set_default_dtype(params)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(pyro.param("top", torch.tensor(0.0)), 1.0))
            loc = z * pyro.param("w", torch.ones(1)) + pyro.param("b", torch.tensor(0.0))
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            loc = pyro.param("q.w", torch.tensor(0.1)) * x + pyro.param("q.b", torch.zeros(1))
            pyro.sample("z", dist.Normal(loc, 1.0))

    svi = NaturalSVI(model, guide, NaturalGradient(guide_geometry=guide_geometry))
    for _ in range(7):
        svi.step(X.to(data))
        assert svi.info.accepted
    assert {value.dtype for value in parameters().values()} == {params}
