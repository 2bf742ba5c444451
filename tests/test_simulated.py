"""Fisher information of distributions without a closed form: exact sums and simulated scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import SGD
from torch import Tensor
from torch.distributions import constraints

import pyronat
from pyronat import Full, NaturalGradient, NaturalSVI, testing
from pyronat.blocks import SCORE, SUPPORT
from pyronat.errors import NoFisher, UnsupportedDistribution
from pyronat.families import groups
from pyronat.simulated import MAX_DRAWS, fisher_groups
from pyronat.wrappers import distribution_tensors

Make = Callable[..., Any]


def negative_binomial(total_count: Tensor, logits: Tensor) -> Any:
    return dist.NegativeBinomial(total_count, logits=logits)


def beta_binomial(concentration1: Tensor, concentration0: Tensor) -> Any:
    return dist.BetaBinomial(concentration1, concentration0, total_count=4)


def mixture(logits: Tensor, loc: Tensor) -> Any:
    return dist.MixtureSameFamily(
        dist.Categorical(logits=logits), dist.Normal(loc, torch.tensor(0.7))
    )


def zero_inflated(gate: Tensor, concentration: Tensor) -> Any:
    return dist.ZeroInflatedDistribution(dist.GammaPoisson(concentration, 0.8), gate=gate)


SIMULATED: dict[str, tuple[Make, dict[str, list[float]]]] = {
    "GammaPoisson": (dist.GammaPoisson, {"concentration": [1.5, 4.0], "rate": [0.6, 2.0]}),
    "NegativeBinomial": (negative_binomial, {"total_count": [2.5, 6.0], "logits": [-0.4, 0.7]}),
    "MixtureSameFamily": (mixture, {"logits": [0.3, -0.5], "loc": [-1.0, 1.5]}),
    "ZeroInflated": (zero_inflated, {"gate": [0.3, 0.1], "concentration": [2.0, 5.0]}),
}


def leaves(values: dict[str, list[float]]) -> dict[str, Tensor]:
    return {name: torch.tensor(value, requires_grad=True) for name, value in values.items()}


def of_values(group: Any, params: dict[str, Tensor]) -> Tensor:
    """Jᵀ F J summed over batch elements, for each value by itself `[values, size, size]`."""
    weights = group.fisher.diagonal(dim1=-2, dim2=-1)
    parts = []
    for index, log_prob in enumerate(group.coordinates):
        total = torch.zeros(())
        for element in range(max(log_prob.numel(), 1)):
            grads = torch.autograd.grad(
                log_prob.reshape(-1)[element], list(params.values()), retain_graph=True
            )
            score = torch.cat([grad.reshape(-1) for grad in grads])
            weight = weights[..., index].reshape(-1)[element]
            total = total + weight * score.outer(score)
        parts.append(total)
    return torch.stack(parts)


def of_family(make: Make, params: dict[str, Tensor]) -> Tensor:
    return testing.family_fisher(make, {name: value.detach() for name, value in params.items()})


def mixture_fisher(params: dict[str, Tensor]) -> Tensor:
    """∫ p s sᵀ dx by the trapezoidal rule, which is exact to rounding for Gaussian tails."""
    grid = torch.linspace(-9, 9, 1001)
    log_prob = mixture(**params).log_prob(grid)
    eye = torch.eye(len(grid))
    grads = torch.autograd.grad(log_prob, list(params.values()), eye, is_grads_batched=True)
    score = torch.cat(grads, 1)
    weights = log_prob.detach().exp() * (grid[1] - grid[0])
    return score.mT @ (score * weights.unsqueeze(1))


@pytest.mark.parametrize("name", SIMULATED)
def test_simulated_scores_are_unbiased(name: str) -> None:
    make, values = SIMULATED[name]
    params = leaves(values)
    with pytest.raises(UnsupportedDistribution):
        groups(make(**params))
    oracle = mixture_fisher(params) if name == "MixtureSameFamily" else of_family(make, params)
    draws = []
    for _ in range(40):
        (group,) = fisher_groups(make(**params))
        assert group.name == SCORE and len(group.coordinates) == MAX_DRAWS
        draws.append(of_values(group, params) * MAX_DRAWS)
    each = torch.cat(draws)
    error = (each.std(0) / len(each) ** 0.5).clamp_min(1e-9)
    scores = (each.mean(0) - oracle) / error
    assert scores.abs().max() < 5
    # The test sees a factor of 1.3.
    assert ((1.3 * each.mean(0) - oracle) / error).abs().max() > 5


def test_a_small_support_is_summed_exactly() -> None:
    params = leaves({"concentration1": [1.5, 0.7], "concentration0": [2.0, 3.0]})
    (group,) = fisher_groups(beta_binomial(**params))
    assert group.name == SUPPORT and len(group.coordinates) == 5
    oracle = testing.family_fisher(beta_binomial, {n: v.detach() for n, v in params.items()})
    torch.testing.assert_close(of_values(group, params).sum(0), oracle)


def test_the_network_says_what_is_simulated() -> None:
    def model() -> None:
        r = pyro.param("r", torch.tensor(2.0), constraint=constraints.positive)
        p = pyro.param("p", torch.tensor([0.2, 0.1, 0.3]))
        a = pyro.param("a", torch.tensor([1.0, 2.0]), constraint=constraints.positive)
        with pyro.plate("three", 3):
            pyro.sample("n", dist.NegativeBinomial(r, logits=p))
        with pyro.plate("two", 2):
            pyro.sample("k", dist.BetaBinomial(a, 2.0, total_count=3))
            pyro.sample("m", dist.GammaPoisson(a.detach(), 2.0))

    net = pyronat.analyze(model)
    found = {block.params: (block.structure, block.count, block.exact) for block in net.blocks}
    # One value of a: a unit for each element; total_count ties all elements of n together.
    assert found == {("a",): ("unit", 2, True), ("p", "r"): ("dense", 1, False)}
    exact, _ = pyronat.fisher(model, geometry=Full("model"), num_samples=1).dense()
    again, _ = pyronat.fisher(model, geometry=Full("model"), num_samples=1).dense()
    assert torch.equal(exact[:2, :2], again[:2, :2]) and not torch.equal(exact, again)


def test_no_fisher_is_no_group() -> None:
    bound = torch.tensor(1.0, requires_grad=True)
    assert fisher_groups(dist.Uniform(0.0, bound)) == ()
    with pytest.raises(NoFisher, match="support of Uniform"):
        groups(dist.Uniform(0.0, bound))


def counts(x: Tensor) -> None:
    r = pyro.param("r", torch.tensor(2.0), constraint=constraints.positive)
    b = pyro.param("b", torch.tensor(0.5), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Gamma(2.0, 1.0))
        pyro.sample("x", dist.GammaPoisson(r * z, b), obs=x)


def guide(x: Tensor) -> None:
    a = pyro.param("a", torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Gamma(a, 1.0))


def test_simulation_leaves_the_random_numbers_of_the_training_alone() -> None:
    x = dist.Poisson(torch.full((20,), 3.0)).sample()
    Trace_ELBO().loss(counts, guide, x)  # creates the parameters
    pyro.set_rng_seed(3)
    stock = SVI(counts, guide, SGD({"lr": 0.0}), Trace_ELBO())
    expected = [stock.step(x) for _ in range(4)]
    pyro.set_rng_seed(3)
    svi = NaturalSVI(counts, guide, NaturalGradient(0.0), Trace_ELBO())
    assert [svi.step(x) for _ in range(4)] == expected
    assert svi.net is not None
    assert {b.exact for b in svi.net.blocks} == {False}


def test_training_with_simulated_scores() -> None:
    pyro.set_rng_seed(0)
    x = dist.GammaPoisson(torch.tensor(6.0), torch.tensor(2.0)).sample((500,))

    def model(x: Tensor) -> None:
        a = pyro.param("a", torch.tensor(1.0), constraint=constraints.positive)
        b = pyro.param("b", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.GammaPoisson(a, b), obs=x)

    svi = NaturalSVI(model, lambda x: None, NaturalGradient(0.5))
    losses = [svi.step(x) for _ in range(40)]
    best = -dist.GammaPoisson(torch.tensor(6.0), torch.tensor(2.0)).log_prob(x).sum().item()
    assert losses[0] > best + 100
    # Maximum likelihood is below the loss of the true parameters.
    assert losses[-1] < best + 0.1


@pytest.mark.parametrize("name", ["NegativeBinomial", "VonMises"])
def test_what_has_been_drawn_changes_no_structure(name: str) -> None:
    """They keep what they draw by, once they have drawn: a gamma distribution, a proposal."""

    def distribution(first: Any, second: Any) -> Any:
        if name == "VonMises":
            return dist.VonMises(second, first)
        return dist.NegativeBinomial(first, logits=second)

    def model(x: Tensor) -> None:
        first = pyro.param("first", torch.tensor(2.0), constraint=constraints.positive)
        second = pyro.param("second", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", distribution(first, second), obs=x)

    x = torch.tensor([0.0, 3.0, 1.0, 3.0, 2.0, 2.0])
    svi = NaturalSVI(model, lambda x: None, NaturalGradient(0.3))
    losses = [svi.step(x) for _ in range(20)]
    assert losses[-1] < losses[0]
    drawn = distribution(torch.tensor(2.0), torch.tensor(0.5))
    drawn.log_prob(torch.tensor(1.0))
    before = len(distribution_tensors(drawn))
    drawn.sample()
    assert len(distribution_tensors(drawn)) == before
