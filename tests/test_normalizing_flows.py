"""Normalizing flows: distributions whose transforms have parameters, and remember values."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as transforms
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

from pyronat import Full, NaturalGradient, NaturalSVI, fisher
from pyronat.errors import UnsupportedDistribution, WithoutFisher
from pyronat.steps import Constant, Rejection
from pyronat.wrappers import clear_caches

INVERTIBLE = {
    "affine coupling": lambda: transforms.affine_coupling(3),
    "affine autoregressive": lambda: transforms.affine_autoregressive(3),
    "matrix exponential": lambda: transforms.matrix_exponential(3),
    "spline": lambda: transforms.spline(3, count_bins=4),
    "spline coupling": lambda: transforms.spline_coupling(3, count_bins=4),
    "spline autoregressive": lambda: transforms.spline_autoregressive(
        3, hidden_dims=[6], count_bins=4
    ),
}
"""What has a density at values that it is given."""
ONE_WAY = {
    "batchnorm": lambda: transforms.batchnorm(3),
    "neural autoregressive": lambda: transforms.neural_autoregressive(3),
    "planar": lambda: transforms.planar(3),
    "polynomial": lambda: transforms.polynomial(3),
    "radial": lambda: transforms.radial(3),
    "sylvester": lambda: transforms.sylvester(3),
}
"""What has one at values that it has drawn itself, or at one value for each datum."""


@pytest.fixture
def x() -> Tensor:
    return 0.5 * torch.randn(30, 3) + 1.0


def density(transform: nn.Module) -> Callable[[Tensor], None]:
    """A model of data whose density is a flow."""

    def model(x: Tensor) -> None:
        pyro.module("flow", transform)
        base = dist.Normal(torch.zeros(3), 1.0).to_event(1)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.TransformedDistribution(base, [transform]), obs=x)

    return model


def no_guide(x: Tensor) -> None:
    pass


def hidden(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)


def proposal(transform: nn.Module) -> Callable[[Tensor], None]:
    """A guide of `hidden` that draws from a flow."""

    def guide(x: Tensor) -> None:
        pyro.module("flow", transform)
        base = dist.Normal(torch.zeros(3), 1.0).to_event(1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.TransformedDistribution(base, [transform]))

    return guide


@pytest.mark.parametrize("name", INVERTIBLE)
def test_densities_are_trained(name: str, x: Tensor) -> None:
    svi = NaturalSVI(density(INVERTIBLE[name]()), no_guide, NaturalGradient(0.1))
    losses = [svi.step(x) for _ in range(12)]  # on one tensor, which transforms remember
    assert losses[-1] < losses[0] - 3
    assert len(svi.optim.sides["model"].plan.program.runs) <= 2
    (block,) = {block.name for block in svi.net.blocks} if svi.net else {""}
    assert block.startswith("flow$$$")


@pytest.mark.parametrize("name", INVERTIBLE)
def test_guides_are_trained(name: str, x: Tensor) -> None:
    svi = NaturalSVI(hidden, proposal(INVERTIBLE[name]()), NaturalGradient(0.05))
    losses = torch.tensor([svi.step(x) for _ in range(30)])
    assert losses[-5:].mean() < losses[:5].mean()


@pytest.mark.parametrize("name", ONE_WAY)
def test_guides_that_cannot_be_inverted_take_steps_of_another_optimizer(
    name: str, x: Tensor
) -> None:
    guide = proposal(ONE_WAY[name]())
    with pytest.warns(WithoutFisher, match=r"have no metric \(the score of z"):
        NaturalSVI(hidden, guide, NaturalGradient()).step(x)
    pyro.clear_param_store()
    guide = proposal(ONE_WAY[name]())
    optim = NaturalGradient(0.05, others=pyro.optim.Adam({"lr": 0.02}))
    svi = NaturalSVI(hidden, guide, optim)
    losses = torch.tensor([svi.step(x) for _ in range(20)])
    assert torch.isfinite(losses).all()
    assert "others" in optim.assignment(list(pyro.get_param_store())).values()


@pytest.mark.parametrize("name", sorted(ONE_WAY.keys() - {"neural autoregressive"}))
def test_a_metric_of_what_cannot_be_inverted_is_refused(name: str, x: Tensor) -> None:
    optim = NaturalGradient(guide_geometry=Full())
    svi = NaturalSVI(hidden, proposal(ONE_WAY[name]()), optim)
    with pytest.raises(UnsupportedDistribution, match=r"site z \(TransformedDistribution\)"):
        svi.step(x)


def test_losses_are_those_of_the_parameters_as_they_are(x: Tensor) -> None:
    transform = transforms.spline_autoregressive(3, [6], count_bins=4)
    model = density(transform)
    svi = NaturalSVI(model, no_guide, NaturalGradient(0.1))
    svi.step(x)
    svi.evaluate_loss(x)
    with torch.no_grad():
        for leaf in transform.parameters():
            leaf.add_(0.1 * torch.randn_like(leaf))
    stale = Trace_ELBO().loss(model, no_guide, x)  # Pyro's own remembers
    found = svi.evaluate_loss(x)
    assert found == pytest.approx(svi.evaluate_loss(x.clone()), rel=1e-12)
    assert abs(stale - found) > 1e-3
    assert svi.step(x) == pytest.approx(found, rel=1e-12)


def test_a_step_that_is_taken_back_is_judged_by_what_was_before(x: Tensor) -> None:
    svi = NaturalSVI(
        density(transforms.affine_autoregressive(3)),
        no_guide,
        NaturalGradient(Constant(0.2), rejection=Rejection()),
    )
    for _ in range(5):
        before = svi.evaluate_loss(x)
        svi.step(x)
    with torch.no_grad():
        for leaf in pyro.get_param_store().values():
            leaf.mul_(-5.0)  # as a step would that does harm
    assert svi.evaluate_loss(x) > before
    assert svi.settle(x)
    assert svi.evaluate_loss(x) == pytest.approx(before, rel=1e-9)


def test_the_same_data_again_are_trained_on_where_stock_pyro_fails(x: Tensor) -> None:
    model = density(transforms.spline_autoregressive(3, [6], count_bins=4))
    stock = SVI(model, no_guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    stock.step(x)
    with pytest.raises(RuntimeError, match="second time"):
        stock.step(x)


def test_the_score_of_a_flow_is_that_of_autograd() -> None:
    """A shift b and a scale e^s of a normal variable: the Fisher information is diag(1, 2)."""

    class Affine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.entries = nn.Parameter(torch.tensor([0.3, -0.2]))

    net = Affine()

    def model(x: Tensor) -> None:
        pyro.module("net", net)
        shift, scale = net.entries[0], net.entries[1].exp()
        base = dist.Normal(torch.zeros(()), 1.0)
        flow = dist.TransformedDistribution(base, [transforms.AffineTransform(shift, scale)])
        with pyro.plate("data", len(x)):
            pyro.sample("x", flow, obs=x)

    n = 4000
    matrix = fisher(model, torch.zeros(n), geometry=Full("model")).dense()[0] / n
    scale = torch.tensor(-0.2).exp()
    expected = torch.diag(torch.stack([scale**-2, torch.tensor(2.0)]))
    assert torch.allclose(matrix, expected, atol=0.25)


def test_transforms_forget_once() -> None:
    transform = transforms.spline(2)
    base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    inner = dist.TransformedDistribution(base, [transforms.ComposeTransform([transform])])
    value = inner.sample()
    assert transform._cached_x_y[1] is value
    met: set[int] = set()
    clear_caches(inner.expand([3]), met)
    assert transform._cached_x_y == (None, None)
    value = inner.sample()
    clear_caches(inner, met)
    assert transform._cached_x_y[1] is value
