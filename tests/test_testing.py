"""The oracles, on problems whose answers are known by hand."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import BY_NAME, CASES, Case
from pyro import poutine
from pyro.infer import config_enumerate
from torch import Tensor
from torch.distributions import constraints

from pyronat import testing
from pyronat.errors import NotEnumerable, UnsupportedProgram

P_A, P_B = 0.3, (0.8, 0.4)


def root() -> Tensor:
    logit = pyro.param("logit", torch.tensor(P_A).logit())
    return pyro.sample("a", dist.Bernoulli(logits=logit))


def two_nodes(b: Tensor) -> None:
    """a → b with p(a=1) = P_A, p(b=1|a) = P_B[a], each the sigmoid of a parameter."""
    a = root()
    table = pyro.param("table", torch.tensor(P_B).logit())
    pyro.sample("b", dist.Bernoulli(logits=table[a.long()]), obs=b)


def variance(p: float) -> float:
    return p * (1 - p)


def test_parameters_are_the_unconstrained_leaves_sorted_by_name() -> None:
    layer = torch.nn.Linear(1, 1).eval()
    layer.bias.requires_grad_(False)

    def model() -> None:
        pyro.param("z", torch.tensor(2.0), constraint=constraints.positive)
        pyro.module("layer", layer)
        pyro.param("a", torch.tensor(5.0))

    leaves = testing.parameters(model)
    assert list(leaves) == ["a", "layer$$$weight", "z"]
    assert leaves["layer$$$weight"] is layer.weight
    assert leaves["z"].item() == pytest.approx(math.log(2))
    assert leaves["z"] is pyro.param("z").unconstrained()


def test_parameters_leaves_the_random_numbers_alone() -> None:
    before = torch.get_rng_state()
    testing.parameters(root)
    assert torch.equal(before, torch.get_rng_state())


def test_states_are_the_cartesian_product_of_elements_observed_ones_included() -> None:
    def model() -> None:
        pyro.sample("k", dist.Categorical(logits=torch.zeros(3)), obs=torch.tensor(1))
        with pyro.plate("data", 2):
            pyro.sample("x", dist.Bernoulli(torch.full((2,), 0.5)).to_event(0))

    states = [
        (values["k"].item(), *values["x"].tolist()) for values, _ in testing.enumerate_states(model)
    ]
    assert states == [(k, x, y) for k in range(3) for x in (0, 1) for y in (0, 1)]


def test_states_of_event_dimensions() -> None:
    def model() -> None:
        pyro.sample("x", dist.OneHotCategorical(logits=torch.zeros(2, 3)).to_event(1))

    states = [values["x"] for values, _ in testing.enumerate_states(model)]
    assert len(states) == 9
    assert all(x.shape == (2, 3) and torch.equal(x.sum(-1), torch.ones(2)) for x in states)
    assert len({tuple(x.flatten().tolist()) for x in states}) == 9


def test_states_of_a_program_with_control_flow() -> None:
    def model() -> None:
        if pyro.sample("a", dist.Bernoulli(0.5)):
            pyro.sample("b", dist.Bernoulli(0.5))

    states = [
        {name: value.item() for name, value in values.items()}
        for values, _ in testing.enumerate_states(model)
    ]
    assert states == [{"a": 0.0}, {"a": 1.0, "b": 0.0}, {"a": 1.0, "b": 1.0}]


def test_states_ignore_enumeration_annotations_and_deterministic_sites() -> None:
    def model() -> None:
        a = root()
        pyro.deterministic("twice", 2 * a)
        pyro.sample("frozen", dist.Delta(torch.tensor(1.0)))

    for values, trace in testing.enumerate_states(config_enumerate(model)):
        assert list(values) == ["a"]
        assert trace.nodes["twice"]["value"] == 2 * values["a"]


def continuous() -> None:
    pyro.sample("x", dist.Normal(0.0, 1.0))


def infinite() -> None:
    pyro.sample("x", dist.Poisson(1.0))


def too_many_elements() -> None:
    pyro.sample("x", dist.Bernoulli(torch.full((17,), 0.5)).to_event(1))


def too_many_sites() -> None:
    for index in range(17):
        pyro.sample(f"x{index}", dist.Bernoulli(0.5))


def random_subsample() -> None:
    with pyro.plate("data", 4, subsample_size=2):
        pyro.sample("x", dist.Bernoulli(0.5))


def with_factor() -> None:
    pyro.factor("x", torch.tensor(0.0))


def masked_distribution() -> None:
    pyro.sample("x", dist.Bernoulli(0.5).mask(False))


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (continuous, NotEnumerable, "site 'x' is Normal"),
        (infinite, NotEnumerable, "site 'x' is Poisson"),
        (too_many_elements, NotEnumerable, "2\\^17 values"),
        (random_subsample, UnsupportedProgram, "subsample="),
        (with_factor, UnsupportedProgram, "factor 'x'"),
        (masked_distribution, UnsupportedProgram, "poutine.mask"),
    ],
)
def test_states_refuse(model, error, message) -> None:
    with pytest.raises(error, match=message):
        list(testing.enumerate_states(model))


def test_states_refuse_too_many_sites(monkeypatch) -> None:
    monkeypatch.setattr(testing, "MAX_STATES", 2**6)
    with pytest.raises(NotEnumerable, match="more than 64"):
        list(testing.enumerate_states(too_many_sites))


def test_fisher_of_two_nodes_by_hand() -> None:
    fisher, layout = testing.enumerated_fisher(two_nodes, torch.tensor(1.0))
    assert layout == [("logit", slice(0, 1)), ("table", slice(1, 3))]
    diagonal = [variance(P_A), (1 - P_A) * variance(P_B[0]), P_A * variance(P_B[1])]
    torch.testing.assert_close(fisher, torch.diag(torch.tensor(diagonal)), rtol=0, atol=1e-15)


def test_visible_fisher_of_two_nodes_by_hand() -> None:
    # p(b=1) = m, a Bernoulli whose gradient is that of m by the three logits.
    fisher, _ = testing.enumerated_visible_fisher(two_nodes, torch.tensor(1.0))
    m = (1 - P_A) * P_B[0] + P_A * P_B[1]
    gradient = torch.tensor([
        variance(P_A) * (P_B[1] - P_B[0]),
        (1 - P_A) * variance(P_B[0]),
        P_A * variance(P_B[1]),
    ])
    truth = torch.outer(gradient, gradient) / variance(m)
    torch.testing.assert_close(fisher, truth, rtol=0, atol=1e-15)


def test_visible_fisher_does_not_depend_on_the_values_observed() -> None:
    first, _ = testing.enumerated_visible_fisher(two_nodes, torch.tensor(1.0))
    second, _ = testing.enumerated_visible_fisher(two_nodes, torch.tensor(0.0))
    torch.testing.assert_close(first, second)


def test_visible_fisher_without_hidden_sites_is_the_full_one() -> None:
    case = BY_NAME["regression"]
    visible, _ = testing.enumerated_visible_fisher(case.model, *case.args)
    full, _ = testing.enumerated_fisher(case.model, *case.args)
    torch.testing.assert_close(visible, full)


def test_visible_fisher_without_observations_is_zero() -> None:
    fisher, _ = testing.enumerated_visible_fisher(root)
    assert fisher.abs().max() < 1e-15


def test_visible_fisher_does_not_see_masked_elements() -> None:
    def model(mask: Tensor) -> None:
        logit = pyro.param("logit", torch.tensor([0.2, 0.7]))
        with pyro.plate("data", 2), poutine.mask(mask=mask):
            pyro.sample("x", dist.Bernoulli(logits=logit), obs=torch.zeros(2))

    mask = torch.tensor([True, False])
    p = torch.tensor(0.2).sigmoid()
    truth = torch.diag(torch.stack([p * (1 - p), torch.tensor(0.0)]))
    for oracle in (
        testing.enumerated_fisher,
        testing.enumerated_sitewise_fisher,
        testing.enumerated_visible_fisher,
    ):
        torch.testing.assert_close(oracle(model, mask)[0], truth, rtol=0, atol=1e-15)


@pytest.mark.parametrize("scale", [3.0, torch.tensor(3.0), torch.tensor([1.0, 5.0])])
def test_scale_multiplies_the_sitewise_fisher_once(scale) -> None:
    def model() -> None:
        logit = pyro.param("logit", torch.tensor([0.2, 0.7]))
        with poutine.scale(scale=scale), pyro.plate("data", 2):
            pyro.sample("x", dist.Bernoulli(logits=logit))

    p = torch.tensor([0.2, 0.7]).sigmoid()
    sitewise, _ = testing.enumerated_sitewise_fisher(model)
    torch.testing.assert_close(sitewise, torch.diag(scale * p * (1 - p)), rtol=0, atol=1e-15)
    full, _ = testing.enumerated_fisher(model)
    torch.testing.assert_close(full, torch.diag(p * (1 - p)), rtol=0, atol=1e-15)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_sitewise_fisher_is_the_full_one_where_nothing_is_scaled(case: Case) -> None:
    full, layout = testing.enumerated_fisher(case.model, *case.args)
    sitewise, other_layout = testing.enumerated_sitewise_fisher(case.model, *case.args)
    assert layout == other_layout
    assert torch.allclose(full, sitewise, rtol=0, atol=1e-14) == (case.name != "subsample")


def test_a_subsample_has_the_expected_fisher_of_the_whole_plate() -> None:
    # Elements are exchangeable here: two scaled by three, and four by one and a half, give six.
    case = BY_NAME["subsample"]

    def model(size: int) -> None:
        case.model(torch.zeros(size), torch.arange(size))

    part, layout = testing.enumerated_sitewise_fisher(model, 2)
    whole, _ = testing.enumerated_sitewise_fisher(model, 4)
    torch.testing.assert_close(part, whole)
    assert [name for name, _ in layout] == ["b", "p", "v", "w"]


def test_divergences_by_hand() -> None:
    b = torch.tensor(1.0)
    step = {"logit": torch.tensor(0.5)}
    q = (torch.tensor(P_A).logit() + 0.5).sigmoid().item()
    truth = P_A * math.log(P_A / q) + (1 - P_A) * math.log((1 - P_A) / (1 - q))
    assert testing.kl_divergence(two_nodes, step, b).item() == pytest.approx(truth, abs=1e-14)
    m = (1 - P_A) * P_B[0] + P_A * P_B[1]
    n = (1 - q) * P_B[0] + q * P_B[1]
    truth = m * math.log(m / n) + (1 - m) * math.log((1 - m) / (1 - n))
    visible = testing.visible_kl_divergence(two_nodes, step, b)
    assert visible.item() == pytest.approx(truth, abs=1e-14)


def test_divergences_leave_the_parameters_bitwise_alone() -> None:
    leaves = testing.parameters(two_nodes, torch.tensor(1.0))
    before = {name: leaf.detach().clone() for name, leaf in leaves.items()}
    testing.kl_divergence(two_nodes, {"table": torch.tensor([0.1, 1e9])}, torch.tensor(1.0))
    with pytest.raises(RuntimeError):
        testing.kl_divergence(two_nodes, {"table": torch.zeros(5)}, torch.tensor(1.0))
    assert all(torch.equal(before[name], leaf) for name, leaf in leaves.items())


def tensors(**values: float | list[float]) -> dict[str, Tensor]:
    return {name: torch.tensor(value) for name, value in values.items()}


TRIL = torch.tensor([[1.2, 0.0], [-0.4, 0.7]], dtype=torch.float64)
FAMILIES = [
    (dist.Bernoulli, {"logits": [0.4, -3.0]}),
    (dist.Bernoulli, {"probs": 0.1}),
    (dist.Categorical, {"logits": [0.4, -1.0, 2.0]}),
    (dist.OneHotCategorical, {"logits": [0.4, -1.0, 2.0]}),
    (dist.Poisson, {"rate": [0.01, 150.0]}),
    (dist.Geometric, {"probs": 0.2}),
    (dist.Normal, {"loc": [100.0, -1.0], "scale": [0.01, 30.0]}),
    (dist.LogNormal, {"loc": 1.0, "scale": 1.3}),
    (dist.Exponential, {"rate": 3.0}),
    (dist.Gamma, {"concentration": [0.3, 40.0], "rate": [2.0, 0.1]}),
    (dist.Beta, {"concentration1": [0.6, 5.0], "concentration0": [0.7, 20.0]}),
    (dist.Gumbel, {"loc": 0.5, "scale": 2.0}),
    (dist.Dirichlet, {"concentration": [1.0, 2.0, 3.0]}),
    (dist.MultivariateNormal, {"loc": [0.0, 1.0], "scale_tril": TRIL.tolist()}),
]


@pytest.mark.parametrize(
    ("family", "values"), FAMILIES, ids=lambda value: getattr(value, "__name__", "")
)
def test_expected_hessian_is_the_second_order_of_the_divergence(family, values) -> None:
    coordinates = tensors(**values)
    fisher = testing.family_fisher(family, coordinates)
    torch.testing.assert_close(
        fisher, testing.kl_hessian(family, coordinates), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize(
    ("family", "values", "truth"),
    [
        (dist.Bernoulli, {"logits": math.log(0.3 / 0.7)}, [[0.21]]),
        (dist.Normal, {"loc": 3.0, "scale": 0.5}, [[4.0, 0.0], [0.0, 8.0]]),
        (dist.Exponential, {"rate": 3.0}, [[1 / 9]]),
        (dist.Poisson, {"rate": 4.0}, [[0.25]]),
        (dist.StudentT, {"df": 3.0, "loc": 0.0, "scale": 1.0}, None),
    ],
)
def test_family_fisher_closed_form(family, values, truth) -> None:
    fisher = testing.family_fisher(family, tensors(**values))
    if truth is None:  # Student's t: (df + 1) / (df + 3) for loc, 2 df / (df + 3) for scale.
        fisher, truth = fisher.diagonal()[1:], [4 / 6, 1.0]
    torch.testing.assert_close(fisher, torch.tensor(truth), rtol=0, atol=1e-6)


def test_family_fisher_of_independent_elements_and_binomial() -> None:
    def normals(loc: Tensor) -> dist.TorchDistribution:
        return dist.Normal(loc, 2.0).to_event(1)

    fisher = testing.family_fisher(normals, {"loc": torch.zeros(3)})
    torch.testing.assert_close(fisher, torch.eye(3) / 4)

    def binomial(logits: Tensor) -> dist.TorchDistribution:
        return dist.Binomial(5, logits=logits)

    fisher = testing.family_fisher(binomial, {"logits": torch.tensor(P_A).logit()})
    torch.testing.assert_close(fisher, torch.tensor([[5 * variance(P_A)]]))


def test_family_fisher_refuses_what_it_cannot_integrate() -> None:
    with pytest.raises(NotEnumerable, match="VonMises"):
        testing.family_fisher(dist.VonMises, tensors(loc=0.0, concentration=1.0))


def test_z_score() -> None:
    samples = torch.tensor([[1.0, 5.0, 7.0], [2.0, 5.0, 7.0], [3.0, 5.0, 7.0]])
    z = testing.z_score(samples, torch.tensor([2.0 - 3**-0.5, 5.0, 8.0]))
    torch.testing.assert_close(z, torch.tensor([1.0, 0.0, -torch.inf]))


def test_z_score_is_standard_normal() -> None:
    torch.manual_seed(0)
    z = testing.z_score(3.0 + torch.randn(400, 2000), torch.tensor(3.0))
    assert abs(z.mean().item()) < 4 / 2000**0.5
    assert z.std().item() == pytest.approx(1.0, abs=4 / 4000**0.5)
