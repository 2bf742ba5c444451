"""Tests of factor analysis and the hidden Markov model: their programs, data and referees."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from pyro.poutine import condition, replay, trace
from torch import Tensor
from torch.distributions import transform_to

from models import factor_analysis, hmm
from models.factor_analysis import FactorAnalysis
from models.hmm import DiscreteHMM

Params = Mapping[str, Tensor]

ANALYSES = [
    FactorAnalysis(),
    FactorAnalysis(5, 2, isotropic=True),
    FactorAnalysis(10, 3, noise=1e-3),
    FactorAnalysis(10, 3, noise=1e-3, isotropic=True),
]
CHAINS = [DiscreteHMM(), DiscreteHMM(3, 3, 4), DiscreteHMM(3, 2, 2)]


@pytest.fixture(autouse=True)
def _fresh_store() -> Iterator[None]:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    pyro.clear_param_store()


def _put(machine: Any, params: Params) -> None:
    """Makes these the values in the parameter store."""
    for name, value in params.items():
        pyro.param(name, value.clone(), constraint=machine.constraints[name])


def _slope(machine: Any, params: Params, x: Tensor) -> float:
    """Norm of the gradient per datum in Pyro's unconstrained coordinates."""
    maps = {name: transform_to(constraint) for name, constraint in machine.constraints.items()}
    free = {name: maps[name].inv(value).clone().requires_grad_() for name, value in params.items()}
    constrained = {name: maps[name](value) for name, value in free.items()}
    total = machine.log_likelihood(constrained, x) / len(x)
    gradients = torch.autograd.grad(total, list(free.values()))
    return float(torch.cat([gradient.reshape(-1) for gradient in gradients]).norm())


def _climb(machine: Any, params: dict[str, Tensor], x: Tensor, steps: int) -> dict[str, Tensor]:
    """Runs EM and checks on the way that the likelihood never decreases."""
    value = float(machine.log_likelihood(params, x))
    for _ in range(steps):
        params = machine.em_step(params, x)
        new = float(machine.log_likelihood(params, x))
        assert new >= value - 1e-10 * abs(value)
        value = new
    return params


def _name(machine: Any) -> str:
    return "-".join(str(value) for value in vars(machine).values())


# --- both --------------------------------------------------------------------------------------


@pytest.mark.parametrize("machine", [*ANALYSES, *CHAINS], ids=_name)
def test_start_and_data_have_their_own_randomness(machine: Any) -> None:
    state = torch.get_rng_state()
    x, params = machine.make_data(3, 20), machine.start(3)
    assert torch.equal(x, machine.make_data(3, 20))
    assert not torch.equal(x, machine.make_data(4, 20))
    for name, value in params.items():
        assert torch.equal(value, machine.start(3)[name])
        assert not torch.equal(value, machine.start(4)[name])
        assert value.dtype == torch.float64
        assert bool(machine.constraints[name].check(value).all())
        assert torch.equal(machine.initial[name], machine.start(machine.seed)[name])
    assert torch.equal(torch.get_rng_state(), state)
    assert not list(pyro.get_param_store())


@pytest.mark.parametrize("machine", [*ANALYSES, *CHAINS], ids=_name)
def test_em_never_decreases_the_likelihood(machine: Any) -> None:
    x = machine.make_data(1, 50)
    for seed in range(3):
        start = machine.start(seed)
        params = _climb(machine, start, x, 40)
        assert float(machine.log_likelihood(params, x) - machine.log_likelihood(start, x)) > 0
        for name, value in params.items():
            assert value.shape == start[name].shape
            assert bool(machine.constraints[name].check(value).all())


@pytest.mark.parametrize(
    ("machine", "size", "steps"),
    [
        (FactorAnalysis(6, 1, noise=0.3), 100, 150),
        (FactorAnalysis(6, 2, noise=0.5, isotropic=True), 100, 400),
        (DiscreteHMM(2, 2, 2), 20, 150),
    ],
    ids=lambda value: _name(value) if hasattr(value, "seed") else str(value),
)
def test_em_ends_where_the_gradient_vanishes(machine: Any, size: int, steps: int) -> None:
    x = machine.make_data(0, size)
    params = machine.start(1)
    assert _slope(machine, params, x) > 1e-2
    assert _slope(machine, _climb(machine, params, x, steps), x) < 1e-7


@pytest.mark.parametrize("machine", [ANALYSES[0], ANALYSES[3], *CHAINS], ids=_name)
def test_recognition_makes_no_parameters_and_follows_them(machine: Any) -> None:
    x = machine.make_data(0, 6)
    first = trace(machine.recognize).get_trace(x)
    assert not list(pyro.get_param_store()) and not first.param_nodes
    _put(machine, machine.start(7))
    second = trace(machine.recognize).get_trace(x)
    assert not second.param_nodes
    site = first.stochastic_nodes[1]
    value = first.nodes[site]["value"]
    log_prob = [guide.nodes[site]["fn"].log_prob(value) for guide in (first, second)]
    assert not log_prob[1].requires_grad
    assert not torch.allclose(*log_prob)


@pytest.mark.parametrize("machine", [*ANALYSES, *CHAINS], ids=_name)
def test_the_posterior_makes_the_bound_tight(machine: Any) -> None:
    """With an exact guide every sample's weight is the likelihood, whatever was sampled."""
    x = machine.make_data(0, 6)
    params = machine.start(2)
    _put(machine, params)
    exact = float(machine.log_likelihood(params, x))
    elbo = Trace_ELBO(max_plate_nesting=1)
    losses = [-elbo.loss(machine.model, machine.recognize, x) for _ in range(3)]
    assert losses == pytest.approx([exact] * 3, rel=1e-9)
    many = Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1)
    assert -many.loss(machine.model, machine.recognize, x) == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("module", [factor_analysis, hmm])
def test_zoo_module(module: Any) -> None:
    make_data: Callable[[int], Tensor] = module.make_data
    state = torch.get_rng_state()
    x = make_data(3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, make_data(3))
    assert not torch.equal(x, make_data(4))
    assert not list(pyro.get_param_store())
    enumerates = module is hmm
    elbo = TraceEnum_ELBO(max_plate_nesting=1) if enumerates else Trace_ELBO(max_plate_nesting=1)
    machine = DiscreteHMM() if enumerates else FactorAnalysis()
    exact = float(machine.log_likelihood(machine.initial, x))
    assert -elbo.loss(module.model, module.guide, x) == pytest.approx(exact, rel=1e-9)


# --- factor analysis ---------------------------------------------------------------------------


@pytest.mark.parametrize("machine", ANALYSES, ids=_name)
def test_collapsed_loss_is_the_likelihood(machine: FactorAnalysis) -> None:
    x = machine.make_data(0, 40)
    params = machine.start(5)
    _put(machine, params)
    exact = float(machine.log_likelihood(params, x))
    loss = Trace_ELBO(max_plate_nesting=1).loss(machine.collapsed, machine.guide, x)
    assert -loss == pytest.approx(exact, rel=1e-10)


@pytest.mark.parametrize("machine", ANALYSES, ids=_name)
def test_likelihood_by_the_factors_side(machine: FactorAnalysis) -> None:
    """The matrix inversion and determinant lemmas, which never form the covariance of the data."""
    x = machine.make_data(0, 40)
    params = machine.start(5)
    loadings, noise = params["loadings"], params["noise"].expand(machine.num_visible)
    inner = torch.eye(machine.num_factors) + loadings.T @ (loadings / noise[:, None])
    log_det = noise.log().sum() + torch.logdet(inner)
    projected = x / noise @ loadings
    square = (x**2 / noise).sum() - (projected @ inner.inverse() * projected).sum()
    constant = machine.num_visible * math.log(2 * math.pi)
    expected = -0.5 * (len(x) * (constant + log_det) + square)
    torch.testing.assert_close(machine.log_likelihood(params, x), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("machine", ANALYSES, ids=_name)
def test_gradient_through_the_program(machine: FactorAnalysis) -> None:
    x = machine.make_data(0, 40)
    params = {name: value.requires_grad_() for name, value in machine.start(5).items()}
    machine.log_likelihood(params, x).backward()
    _put(machine, {name: value.detach() for name, value in params.items()})
    Trace_ELBO(max_plate_nesting=1).loss_and_grads(machine.collapsed, machine.guide, x)
    store = dict(pyro.get_param_store().named_parameters())
    for name, value in params.items():
        scale = value.detach() if name == "noise" else 1.0  # the free coordinate is its logarithm
        torch.testing.assert_close(-store[name].grad, value.grad * scale, rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize("machine", ANALYSES, ids=_name)
def test_posterior_by_conditioning_the_joint(machine: FactorAnalysis) -> None:
    x = machine.make_data(0, 8)
    params = machine.start(5)
    _put(machine, params)
    guide = trace(machine.recognize).get_trace(x).nodes["z"]["fn"]
    loadings = params["loadings"]
    joint = loadings @ loadings.T + torch.diag(params["noise"].expand(machine.num_visible))
    gain = torch.linalg.solve(joint, loadings).T
    covariance = torch.eye(machine.num_factors) - gain @ loadings
    torch.testing.assert_close(guide.mean, x @ gain.T, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(
        guide.covariance_matrix.expand(8, -1, -1),
        covariance.expand(8, -1, -1),
        rtol=1e-8,
        atol=1e-12,
    )


def test_em_step_of_one_factor_by_hand() -> None:
    """The textbook step, datum by datum."""
    machine = FactorAnalysis(3, 1)
    x, params = machine.make_data(0, 9), machine.start(1)
    w, noise = params["loadings"][:, 0], params["noise"]
    variance = 1 / (1 + float((w**2 / noise).sum()))
    means = [variance * float((w / noise * row).sum()) for row in x]
    second = sum(variance + mean**2 for mean in means)
    loadings = sum(mean * row for mean, row in zip(means, x, strict=True)) / second
    square = sum(
        (row - loadings * mean) ** 2 + loadings**2 * variance
        for mean, row in zip(means, x, strict=True)
    )
    new = machine.em_step(params, x)
    torch.testing.assert_close(new["loadings"][:, 0], loadings)
    torch.testing.assert_close(new["noise"], square / 9)


@pytest.mark.parametrize("noise", [1.0, 1e-3])
def test_closed_form_optimum(noise: float) -> None:
    machine = FactorAnalysis(10, 3, noise, isotropic=True)
    x = machine.make_data(0, 200)
    params, best = machine.optimum(x)
    assert {name: value.shape for name, value in params.items()} == {
        "loadings": (10, 3),
        "noise": (),
    }
    assert _slope(machine, params, x) < 1e-8
    assert float(best) == float(machine.log_likelihood(params, x))
    for seed in range(3):
        climbed = _climb(machine, machine.start(seed), x, 100)
        assert float(machine.log_likelihood(climbed, x)) <= float(best) + 1e-9 * abs(float(best))
    kept = machine.em_step(params, x)
    for name, value in params.items():
        torch.testing.assert_close(kept[name], value, rtol=1e-8, atol=1e-10)
    assert _slope(machine, kept, x) < 1e-8


def test_em_finds_the_closed_form() -> None:
    machine = FactorAnalysis(6, 2, noise=0.5, isotropic=True)
    x = machine.make_data(0, 100)
    params = _climb(machine, machine.start(1), x, 400)
    best = machine.optimum(x)
    torch.testing.assert_close(
        machine.log_likelihood(params, x), best.log_likelihood, rtol=1e-12, atol=0
    )
    torch.testing.assert_close(params["noise"], best.params["noise"], rtol=1e-6, atol=0)


def test_little_noise_makes_em_slow() -> None:
    machine = FactorAnalysis(10, 3, noise=1e-3, isotropic=True)
    x = machine.make_data(0, 200)
    params = machine.start(0)
    for _ in range(500):
        params = machine.em_step(params, x)
    assert _slope(machine, params, x) > 1e-3
    assert float(machine.optimum(x).log_likelihood - machine.log_likelihood(params, x)) > 1


def test_shapes_of_factor_analysis() -> None:
    for machine, shape in ((FactorAnalysis(10, 3), (10,)), (FactorAnalysis(isotropic=True), ())):
        pyro.clear_param_store()
        x = machine.make_data(0, 7)
        guide = trace(machine.recognize).get_trace(x)
        model = trace(replay(machine.model, guide)).get_trace(x)
        model.compute_log_prob()
        assert model.stochastic_nodes == ["data", "z"] and model.observation_nodes == ["x"]
        assert model.nodes["z"]["value"].shape == (7, machine.num_factors)
        assert model.nodes["z"]["log_prob"].shape == model.nodes["x"]["log_prob"].shape == (7,)
        assert pyro.param("loadings").shape == (10, machine.num_factors)
        assert pyro.param("noise").shape == shape
        collapsed = trace(machine.collapsed).get_trace(x)
        collapsed.compute_log_prob()
        assert collapsed.nodes["x"]["log_prob"].shape == (7,)
        assert set(collapsed.param_nodes) == set(model.param_nodes) == {"loadings", "noise"}


def test_data_follow_the_noise() -> None:
    for noise in (1.0, 1e-3):
        machine = FactorAnalysis(10, 3, noise, isotropic=True)
        ratio = float(machine.optimum(machine.make_data(0, 2000)).params["noise"]) / noise
        assert 0.45 < ratio < 1.55
    assert not torch.equal(factor_analysis.make_data(0), factor_analysis.make_data(0, noise=0.1))


def test_bad_arguments_of_factor_analysis() -> None:
    with pytest.raises(ValueError, match="at least 1 factor"):
        FactorAnalysis(10, 0)
    with pytest.raises(ValueError, match="fewer than the 3 visible"):
        FactorAnalysis(3, 3)
    for noise in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="positive variance"):
            FactorAnalysis(noise=noise)
    with pytest.raises(ValueError, match="isotropic models only"):
        FactorAnalysis().optimum(torch.zeros(4, 10))


# --- hidden Markov model -----------------------------------------------------------------------


def _paths(machine: DiscreteHMM) -> Tensor:
    """All sequences of hidden states, shape [sequences, length]."""
    states = itertools.product(range(machine.num_states), repeat=machine.length)
    return torch.tensor(list(states))


def _joint(params: Params, path: Tensor, x: Tensor) -> Tensor:
    """Probability of one sequence of states and one of symbols, by multiplication."""
    result = params["initial"][path[0]]
    for before, after in itertools.pairwise(path):
        result = result * params["transition"][before, after]
    for state, symbol in zip(path, x, strict=True):
        result = result * params["emission"][state, symbol]
    return result


def _table(machine: DiscreteHMM, params: Params, x: Tensor) -> Tensor:
    """Joint probabilities of all sequences of states with the data, shape [batch, sequences]."""
    paths = _paths(machine)
    return torch.stack([torch.stack([_joint(params, path, row) for path in paths]) for row in x])


@pytest.mark.parametrize("machine", CHAINS, ids=_name)
def test_enumerated_loss_and_likelihood_and_brute_force(machine: DiscreteHMM) -> None:
    x = machine.make_data(0, 5)
    params = machine.start(5)
    _put(machine, params)
    exact = float(machine.log_likelihood(params, x))
    loss = TraceEnum_ELBO(max_plate_nesting=1).loss(machine.model, machine.guide, x)
    assert -loss == pytest.approx(exact, rel=1e-10)
    slow = _table(machine, params, x).sum(-1).log().sum()
    assert float(slow) == pytest.approx(exact, rel=1e-10)


def test_likelihoods_of_all_sequences_sum_to_one() -> None:
    machine = DiscreteHMM(3, 2, 3)
    params = machine.start(0)
    everything = torch.tensor(list(itertools.product(range(2), repeat=3)))
    total = sum(float(machine.log_likelihood(params, row[None]).exp()) for row in everything)
    assert total == pytest.approx(1, abs=1e-12)


def test_gradient_through_the_enumerated_program() -> None:
    machine = DiscreteHMM(3, 3, 4)
    x = machine.make_data(0, 30)
    params = machine.start(5)
    _put(machine, params)
    TraceEnum_ELBO(max_plate_nesting=1).loss_and_grads(machine.model, machine.guide, x)
    free = dict(pyro.get_param_store().named_parameters())
    found = torch.cat([value.grad.reshape(-1) for value in free.values()]).norm() / 30
    assert float(found) == pytest.approx(_slope(machine, params, x), rel=1e-9)
    assert sum(value.numel() - value[..., 0].numel() for value in free.values()) == 14


@pytest.mark.parametrize("machine", CHAINS, ids=_name)
def test_chain_posterior_by_enumeration(machine: DiscreteHMM) -> None:
    x = machine.make_data(0, 4)
    params = machine.start(5)
    _put(machine, params)
    table = _table(machine, params, x)
    posterior = table / table.sum(-1, keepdim=True)
    for path, expected in zip(_paths(machine), posterior.T, strict=True):
        sites = {f"z{step}": state.expand(4) for step, state in enumerate(path)}
        found = trace(condition(machine.recognize, sites)).get_trace(x)
        found.compute_log_prob()
        log_prob = sum(found.nodes[name]["log_prob"] for name in sites)
        assert isinstance(log_prob, Tensor) and log_prob.shape == (4,)
        torch.testing.assert_close(log_prob.exp(), expected, rtol=1e-9, atol=1e-14)


def test_em_step_by_enumeration() -> None:
    """Expected counts, path by path."""
    machine = DiscreteHMM(2, 3, 4)
    x, params = machine.make_data(0, 6), machine.start(1)
    table = _table(machine, params, x)
    posterior = table / table.sum(-1, keepdim=True)
    counts = {name: torch.zeros_like(value) for name, value in params.items()}
    for (row, weights), (index, path) in itertools.product(
        zip(x, posterior, strict=True), enumerate(_paths(machine))
    ):
        counts["initial"][path[0]] += weights[index]
        for before, after in itertools.pairwise(path):
            counts["transition"][before, after] += weights[index]
        for state, symbol in zip(path, row, strict=True):
            counts["emission"][state, symbol] += weights[index]
    new = machine.em_step(params, x)
    for name, count in counts.items():
        torch.testing.assert_close(new[name], count / count.sum(-1, keepdim=True))


def test_long_sequences_do_not_underflow() -> None:
    machine = DiscreteHMM(2, 3, 800)
    x, params = machine.make_data(0, 2), machine.start(0)
    assert -2 * 800 * 3 < float(machine.log_likelihood(params, x)) < -2 * 800 * 0.5
    assert all(bool(value.isfinite().all()) for value in machine.em_step(params, x).values())
    guide = trace(machine.recognize).get_trace(x)
    assert bool(guide.nodes["z0"]["fn"].probs.isfinite().all())


def test_shapes_of_the_chain() -> None:
    machine = DiscreteHMM()
    x = machine.make_data(0, 7)
    assert x.shape == (7, 5) and x.dtype == torch.long
    guide = trace(machine.recognize).get_trace(x)
    model = trace(replay(machine.model, guide)).get_trace(x)
    model.compute_log_prob()
    assert model.stochastic_nodes == ["data", *(f"z{step}" for step in range(5))]
    assert model.observation_nodes == [f"x{step}" for step in range(5)]
    assert all(model.nodes[f"z{step}"]["value"].shape == (7,) for step in range(5))
    assert all(model.nodes[f"x{step}"]["log_prob"].shape == (7,) for step in range(5))
    sizes = [value.numel() for _, value in pyro.get_param_store().named_parameters()]
    assert sizes == [2, 4, 6]  # logits


def test_enumeration_recycles_dimensions() -> None:
    """Without that, 80 states in a row would need more dimensions than a tensor may have."""
    machine = DiscreteHMM(2, 3, 80)
    x = machine.make_data(0, 2)
    loss = TraceEnum_ELBO(max_plate_nesting=1).loss(machine.model, machine.guide, x)
    exact = float(machine.log_likelihood(machine.initial, x))
    assert -loss == pytest.approx(exact, rel=1e-10)


def test_sequences_follow_the_truth() -> None:
    """States stay, so that a symbol tends to come again, and all symbols are frequent."""
    x = DiscreteHMM(3, 3, 5).make_data(0, 4000)
    frequency = torch.bincount(x.reshape(-1), minlength=3) / x.numel()
    assert bool((frequency > 0.2).all()) and len(frequency) == 3
    again = float((x[:, 1:] == x[:, :-1]).double().mean())
    assert again > float((frequency**2).sum()) + 0.02


def test_bad_arguments_of_the_chain() -> None:
    for sizes in ((1, 3, 5), (2, 1, 5), (2, 3, 1)):
        with pytest.raises(ValueError, match="at least 2 states"):
            DiscreteHMM(*sizes)
    machine = DiscreteHMM()
    for x in (torch.zeros(4, 5), torch.zeros(4, 6).long(), torch.zeros(5).long()):
        for function in (machine.model, machine.recognize):
            with pytest.raises(ValueError, match=r"of shape \[batch, 5\]"):
                function(x)
