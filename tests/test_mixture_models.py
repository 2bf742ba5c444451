"""Tests of the mixture, latent class and noisy-or models: referees, EM and exact posteriors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from types import ModuleType

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from pyro.poutine import condition, trace
from torch import Tensor
from torch.distributions import transform_to

from models import latent_class, mixture, noisy_or
from models.latent_class import LatentClass
from models.mixture import GaussianMixture
from models.noisy_or import NoisyOr

Problem = GaussianMixture | LatentClass | NoisyOr

MODULES = [mixture, latent_class, noisy_or]
PROBLEMS: dict[str, Problem] = {
    "mixture": GaussianMixture(),
    "mixture-4-1": GaussianMixture(4, 1, seed=1),
    "classes": LatentClass(),
    "classes-2-5": LatentClass(2, 5, seed=1),
    "noisy-or": NoisyOr(),
    "noisy-or-4-6": NoisyOr(4, 6, 13, seed=1),
}


@pytest.fixture(params=PROBLEMS)
def problem(request: pytest.FixtureRequest) -> Problem:
    return PROBLEMS[request.param]


def _start(problem: Problem, seed: int = 2) -> dict[str, Tensor]:
    """Initial values that are not those of the problem."""
    return problem.start(seed)


def _data(problem: Problem, size: int = 40) -> Tensor:
    return problem.sample(_start(problem, 3), size, seed=4)


def _use(problem: Problem, params: Mapping[str, Tensor]) -> None:
    """Writes values to the parameter store."""
    pyro.clear_param_store()
    for name, value in params.items():
        pyro.param(name, value.clone(), constraint=problem.constraints[name])


def _hidden_states(problem: Problem) -> list[dict[str, float]]:
    """All joint states of the hidden sites, by the names of the sites."""
    if isinstance(problem, GaussianMixture):
        return [{"component": k} for k in range(problem.num_components)]
    if isinstance(problem, LatentClass):
        return [{"class": k} for k in range(problem.num_classes)]
    states = itertools.product((0.0, 1.0), repeat=problem.num_diseases)
    return [{f"disease{i}": value for i, value in enumerate(state)} for state in states]


def _joint(
    problem: Problem, params: dict[str, Tensor], x: list[float], state: list[float]
) -> float:
    """p(x, hidden) of one datum in plain Python."""
    values = {name: value.tolist() for name, value in params.items()}
    if isinstance(problem, GaussianMixture):
        k = int(state[0])
        result = values["weights"][k]
        for datum, mean, scale in zip(x, values["loc"][k], values["scale"][k], strict=True):
            z = (datum - mean) / scale
            result *= math.exp(-z * z / 2) / (scale * math.sqrt(2 * math.pi))
        return float(result)
    if isinstance(problem, LatentClass):
        k = int(state[0])
        on = values["probs"][k]
        items = math.prod(p if v else 1 - p for v, p in zip(x, on, strict=True))
        return float(values["weights"][k] * items)
    result = math.prod(p if d else 1 - p for d, p in zip(state, values["prior"], strict=True))
    for j, value in enumerate(x):
        absent = 1 - values["leak"][j]
        for (finding, disease), activation in zip(problem.edges, values["activation"], strict=True):
            if finding == j and state[disease]:
                absent *= 1 - activation
        result *= 1 - absent if value else absent
    return float(result)


def _joints(problem: Problem, params: dict[str, Tensor], x: Tensor) -> Tensor:
    """p(x, hidden) by plain loops, shape [batch, states]."""
    states = [list(state.values()) for state in _hidden_states(problem)]
    rows = [[_joint(problem, params, row, state) for state in states] for row in x.tolist()]
    return torch.tensor(rows)


def _gradient(problem: Problem, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Gradient of the average log likelihood in Pyro's unconstrained coordinates, flat."""
    transforms = {name: transform_to(problem.constraints[name]) for name in params}
    free = {name: transforms[name].inv(value).requires_grad_() for name, value in params.items()}
    constrained = {name: transforms[name](value) for name, value in free.items()}
    average = problem.log_likelihood(constrained, x) / len(x)
    return torch.cat([g.flatten() for g in torch.autograd.grad(average, list(free.values()))])


def _em(problem: Problem, params: dict[str, Tensor], x: Tensor, steps: int) -> dict[str, Tensor]:
    for _ in range(steps):
        params = problem.em_step(params, x)
    return params


# --- the log likelihood ------------------------------------------------------------------------


def test_referee_is_the_enumerated_elbo(problem: Problem) -> None:
    params, x = _start(problem), _data(problem)
    _use(problem, params)
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    loss = elbo.loss(problem.model, problem.guide, x)
    referee = float(problem.log_likelihood(params, x))
    assert referee == pytest.approx(-loss, rel=1e-10)
    assert float(problem.log_likelihood(_start(problem, 3), x)) != pytest.approx(-loss, rel=1e-3)


def test_gradient_is_that_of_the_enumerated_elbo(problem: Problem) -> None:
    params, x = _start(problem), _data(problem)
    _use(problem, params)
    TraceEnum_ELBO(max_plate_nesting=1).loss_and_grads(problem.model, problem.guide, x)
    store = pyro.get_param_store()
    grads = [value.grad for _, value in store.named_parameters()]
    assert [name for name, _ in store.named_parameters()] == list(params)
    found = -torch.cat([g.flatten() for g in grads if g is not None]) / len(x)
    torch.testing.assert_close(found, _gradient(problem, params, x), rtol=1e-9, atol=1e-12)


def test_referee_is_brute_force(problem: Problem) -> None:
    params, x = _start(problem), _data(problem)
    slow = float(_joints(problem, params, x).sum(-1).log().sum())
    assert float(problem.log_likelihood(params, x)) == pytest.approx(slow, rel=1e-11)


@pytest.mark.parametrize("name", ["classes-2-5", "noisy-or-4-6"])
def test_probabilities_of_all_data_sum_to_one(name: str) -> None:
    problem = PROBLEMS[name]
    width = _data(problem, 1).shape[-1]
    params = _start(problem)
    total = 0.0
    for row in itertools.product((0.0, 1.0), repeat=width):
        total += float(problem.log_likelihood(params, torch.tensor([row])).exp())
    assert total == pytest.approx(1, abs=1e-12)


def test_mixture_density_integrates_to_one() -> None:
    problem = PROBLEMS["mixture-4-1"]
    params = _start(problem)
    grid = torch.linspace(-12, 12, 4001)
    density = torch.stack([problem.log_likelihood(params, x[None, None]).exp() for x in grid])
    assert float(torch.trapezoid(density, grid)) == pytest.approx(1, abs=1e-9)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = NoisyOr(4, 6, 13)
    params, x = _start(problem), _data(problem)
    whole, step = problem.log_likelihood(params, x), problem.em_step(params, x)
    monkeypatch.setattr(noisy_or, "_CHUNK_ELEMENTS", 100)
    torch.testing.assert_close(problem.log_likelihood(params, x), whole, rtol=1e-13, atol=0)
    torch.testing.assert_close(problem.em_step(params, x), step, rtol=1e-12, atol=0)


# --- EM ----------------------------------------------------------------------------------------


def test_em_never_decreases_the_likelihood(problem: Problem) -> None:
    params, x = _start(problem), _data(problem, 300)
    values = [float(problem.log_likelihood(params, x))]
    for _ in range(60):
        params = problem.em_step(params, x)
        values.append(float(problem.log_likelihood(params, x)))
    gains = torch.tensor(values).diff()
    assert float(gains.min()) > -1e-10 * abs(values[0])
    assert values[-1] - values[0] > 1


def test_em_keeps_the_constraints_and_the_arguments(problem: Problem) -> None:
    params, x = _start(problem), _data(problem)
    after = problem.em_step(params, x)
    assert list(after) == list(params)
    for name, value in after.items():
        assert value.shape == params[name].shape and value.dtype == params[name].dtype
        assert bool(problem.constraints[name].check(value).all())
        assert torch.equal(params[name], _start(problem)[name])


@pytest.mark.parametrize("name", ["mixture", "mixture-4-1", "classes", "classes-2-5"])
def test_em_step_maximizes_the_expected_log_joint(name: str) -> None:
    """The gradient of E[log p(x, h)] under the old posterior is zero at the new parameters.

    For the noisy-or the hidden variables of EM include the activations, so its step is another.
    """
    problem = PROBLEMS[name]
    params, x = _start(problem), _data(problem)
    joint = _joints(problem, params, x)
    share = joint / joint.sum(-1, keepdim=True)

    def slope(at: dict[str, Tensor]) -> float:
        leaves = {name: value.clone().requires_grad_() for name, value in at.items()}
        free = {**leaves, "weights": leaves["weights"] / leaves["weights"].sum()}
        expected = (share * problem._log_joint(free, x)).sum() / len(x)  # type: ignore[union-attr]
        grads = torch.autograd.grad(expected, list(leaves.values()))
        return float(torch.cat([g.flatten() for g in grads]).norm())

    assert slope(problem.em_step(params, x)) < 1e-12
    assert slope(params) > 1e-2


def test_noisy_or_em_step_is_that_of_the_augmented_model() -> None:
    """One step against a loop over all states of the diseases and of every cause of a finding."""
    problem = NoisyOr(2, 3, 4, seed=1)
    params, x = _start(problem), _data(problem, 6)
    names = ("prior", "leak", "activation")
    on = {name: torch.zeros_like(params[name]) for name in names}
    trials = {name: torch.zeros_like(params[name]) for name in names}
    prior, leak, activation = (params[name].tolist() for name in names)
    for row in x.tolist():
        states = []
        for bits in itertools.product((0, 1), repeat=2 + 3 + 4):
            ill, leaks, active = bits[:2], bits[2:5], bits[5:]
            causes = list(leaks)
            for (finding, disease), bit in zip(problem.edges, active, strict=True):
                causes[finding] |= bit & ill[disease]
            weight = float(causes == row)
            for bit, p in zip(bits, prior + leak + activation, strict=True):
                weight *= p if bit else 1 - p
            states.append((weight, ill, leaks, active))
        total = sum(weight for weight, *_ in states)
        for weight, ill, leaks, active in states:
            share = weight / total
            on["prior"] += share * torch.tensor(ill)
            on["leak"] += share * torch.tensor(leaks)
            present = torch.tensor([ill[disease] for _, disease in problem.edges])
            on["activation"] += share * present * torch.tensor(active)
            trials["prior"] += share
            trials["leak"] += share
            trials["activation"] += share * present
    slow = {name: on[name] / trials[name] for name in names}
    torch.testing.assert_close(problem.em_step(params, x), slow, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["mixture", "classes", "noisy-or"])
def test_em_ends_at_a_stationary_point(name: str) -> None:
    problem = PROBLEMS[name]
    easy = _well_separated(problem)
    x = problem.sample(easy, 1000, seed=0)
    end = _em(problem, easy, x, 600)
    assert float(_gradient(problem, end, x).norm()) < 1e-7
    torch.testing.assert_close(problem.em_step(end, x), end, rtol=0, atol=1e-6)
    # Neither holds where EM starts.
    assert float(_gradient(problem, easy, x).norm()) > 1e-3
    assert any(
        float((value - easy[key]).abs().max()) > 1e-3
        for key, value in problem.em_step(easy, x).items()
    )


def _well_separated(problem: Problem) -> dict[str, Tensor]:
    """Parameters that EM finds within some hundred steps."""
    weights = torch.tensor([0.5, 0.3, 0.2])
    if isinstance(problem, GaussianMixture):
        loc = torch.tensor([[0.0, 3.0], [3.0, 0.0], [-3.0, -1.0]])
        return {"weights": weights, "loc": loc, "scale": torch.ones(3, 2)}
    if isinstance(problem, LatentClass):
        probs = torch.tensor([[0.9, 0.1, 0.2], [0.2, 0.8, 0.1], [0.1, 0.2, 0.9]])
        return {"weights": weights, "probs": probs.repeat(1, 3)[:, :8]}
    sizes = {"prior": (3, 0.3), "leak": (7, 0.05), "activation": (11, 0.85)}
    return {name: torch.full((size,), value) for name, (size, value) in sizes.items()}


@pytest.mark.parametrize("module", [latent_class, noisy_or])
def test_em_stays_inside_the_unit_interval(module: ModuleType) -> None:
    """Items or findings that never vary drive probabilities to 0 or 1; logits stay finite."""
    problem = LatentClass(2, 4) if module is latent_class else NoisyOr(2, 4, 6)
    x = torch.tensor([0.0, 1.0, 0.0, 1.0]).expand(20, -1)
    params = _em(problem, problem.start(0), x, 50)
    assert math.isfinite(float(problem.log_likelihood(params, x)))
    for name, value in params.items():
        assert bool(transform_to(problem.constraints[name]).inv(value).isfinite().all())
    assert float(problem.log_likelihood(params, x)) > -1


# --- the exact posterior -----------------------------------------------------------------------


def test_recognize_is_the_exact_posterior(problem: Problem) -> None:
    params, x = _start(problem), _data(problem, 12)
    _use(problem, params)
    joint = _joints(problem, params, x)
    posterior = joint / joint.sum(-1, keepdim=True)
    for index, state in enumerate(_hidden_states(problem)):
        log_prob = _log_prob(problem, state, x)
        torch.testing.assert_close(log_prob, posterior[:, index].log(), rtol=1e-9, atol=1e-10)


def test_recognize_uses_the_current_parameters(problem: Problem) -> None:
    x, state = _data(problem, 12), _hidden_states(problem)[-1]
    first = _log_prob(problem, state, x)
    assert not list(pyro.get_param_store())
    _use(problem, problem.initial)
    torch.testing.assert_close(_log_prob(problem, state, x), first)
    _use(problem, _start(problem))
    assert float((_log_prob(problem, state, x) - first).abs().max()) > 1e-3


def _log_prob(problem: Problem, state: Mapping[str, float], x: Tensor) -> Tensor:
    """Log probability of a joint state under `recognize`, shape [batch]."""
    values = {
        name: torch.full((len(x),), value, dtype=x.dtype if isinstance(problem, NoisyOr) else None)
        for name, value in state.items()
    }
    guide_trace = trace(condition(problem.recognize, values)).get_trace(x)
    guide_trace.compute_log_prob()
    sites = [guide_trace.nodes[name] for name in state]
    assert all(site["log_prob"].shape == (len(x),) for site in sites)
    assert not any(site["log_prob"].requires_grad for site in sites)
    assert not guide_trace.param_nodes
    total: Tensor = torch.stack([site["log_prob"] for site in sites]).sum(0)
    return total


@pytest.mark.parametrize("particles", [1, 3])
def test_elbo_of_the_exact_posterior_is_the_log_likelihood(
    problem: Problem, particles: int
) -> None:
    """Whatever is drawn, log p(x, h) - log p(h | x) = log p(x)."""
    params, x = _start(problem), _data(problem)
    _use(problem, params)
    elbo = Trace_ELBO(particles, vectorize_particles=particles > 1, max_plate_nesting=1)
    loss = elbo.loss(problem.model, problem.recognize, x)
    assert -loss == pytest.approx(float(problem.log_likelihood(params, x)), rel=1e-10)


# --- parameters, data and arguments ------------------------------------------------------------


def test_parameters_start_from_the_initial_values(problem: Problem) -> None:
    x = _data(problem)
    problem.model(x)
    store = pyro.get_param_store()
    assert list(store) == list(problem.initial) == list(problem.constraints)
    for name, value in problem.initial.items():
        torch.testing.assert_close(store[name].detach(), value.to(x))
        assert store[name].dtype == x.dtype
    for name, value in problem.current(x).items():
        assert torch.equal(value, store[name]) and not value.requires_grad


@pytest.mark.parametrize("kind", [GaussianMixture, LatentClass, NoisyOr])
def test_training_leaves_the_initial_values_alone(kind: type[Problem]) -> None:
    problem = kind()  # in the precision of the data, where a value need not be copied
    problem.model(_data(problem))
    before = {name: value.clone() for name, value in problem.initial.items()}
    with torch.no_grad():
        for _, value in pyro.get_param_store().named_parameters():
            value.add_(1)
    assert all(torch.equal(problem.initial[name], value) for name, value in before.items())
    assert not any(value.requires_grad for value in problem.initial.values())


def test_starts_differ_by_their_seeds_alone(problem: Problem) -> None:
    state = torch.get_rng_state()
    first, again, other = problem.start(5), problem.start(5), problem.start(6)
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in first.items():
        assert torch.equal(value, again[name])
        assert not torch.equal(value, other[name])
        assert value.dtype == torch.get_default_dtype()
        assert bool(problem.constraints[name].check(value).all())


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("mixture", {"weights": (3,), "loc": (3, 2), "scale": (3, 2)}),
        ("classes", {"weights": (3,), "probs": (3, 8)}),
        ("noisy-or", {"prior": (3,), "leak": (7,), "activation": (11,)}),
    ],
)
def test_shapes_and_free_parameters(name: str, shapes: dict[str, tuple[int, ...]]) -> None:
    problem = PROBLEMS[name]
    assert {key: tuple(value.shape) for key, value in problem.initial.items()} == shapes
    # As many directions are identified as there are free parameters.
    params, x = problem.start(1), problem.sample(problem.start(1), 400, seed=0)
    scores = torch.stack([_gradient(problem, params, row[None]) for row in x])
    spectrum = torch.linalg.svdvals(scores)
    free = {"mixture": 14, "classes": 26, "noisy-or": 21}[name]
    assert int((spectrum > 1e-9 * spectrum[0]).sum()) == free
    assert len(spectrum) == free + (name != "noisy-or")


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_zoo_module(module: ModuleType) -> None:
    state = torch.get_rng_state()
    x = module.make_data(3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, module.make_data(3))
    assert not torch.equal(x, module.make_data(4))
    assert x.dtype == torch.get_default_dtype() and x.isfinite().all()
    assert module.make_data(3, size=7).shape == (7, x.shape[1])
    assert not list(pyro.get_param_store())
    if module is not mixture:
        assert bool(((x == 0) | (x == 1)).all())
    loss = TraceEnum_ELBO(max_plate_nesting=1).loss(module.model, module.guide, x)
    assert math.isfinite(loss)


def test_single_precision() -> None:
    torch.set_default_dtype(torch.float32)
    for module in MODULES:
        pyro.clear_param_store()
        x = module.make_data(0, 50)
        module.model(x)
        assert x.dtype == torch.float32
        assert {value.dtype for value in pyro.get_param_store().values()} == {torch.float32}


@pytest.mark.parametrize("name", ["mixture", "classes", "noisy-or"])
def test_samples_follow_the_parameters(name: str) -> None:
    problem = PROBLEMS[name]
    params, x = _start(problem), _data(problem, 1)
    x = problem.sample(params, 20_000, seed=1)
    if isinstance(problem, NoisyOr):
        states = [list(state.values()) for state in _hidden_states(problem)]
        one = torch.eye(x.shape[1])
        ill = problem._states(x)
        mean = torch.zeros(x.shape[1])
        for j in range(x.shape[1]):
            # P(finding j) = sum over the diseases, the other findings summed out by hand.
            alone = {**params, "leak": torch.where(one[j] > 0, params["leak"], 1e-300)}
            log_absent = problem._log_absent(alone, ill)[:, j]
            prior = torch.tensor([
                math.prod(
                    p if d else 1 - p for d, p in zip(state, params["prior"].tolist(), strict=True)
                )
                for state in states
            ])
            mean[j] = prior @ -torch.expm1(log_absent)
    else:
        mean = params["weights"] @ params["loc" if name == "mixture" else "probs"]
    z_score = (x.mean(0) - mean) / (x.std(0) / math.sqrt(len(x)))
    assert float(z_score.abs().max()) < 4


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("shape", [(3, 7, 11), (5, 3, 5), (2, 6, 12), (20, 40, 80)])
def test_noisy_or_edges(shape: tuple[int, int, int], seed: int) -> None:
    network = NoisyOr(*shape, seed=seed)
    assert len(set(network.edges)) == shape[2] == len(network.edges)
    assert list(network.edges) == sorted(network.edges)
    assert {finding for finding, _ in network.edges} == set(range(shape[1]))
    assert {disease for _, disease in network.edges} == set(range(shape[0]))
    assert network.edges == NoisyOr(*shape, seed=seed).edges


def test_many_diseases() -> None:
    network = NoisyOr(20, 30, 45)
    x = network.sample(network.start(1), 9, seed=0)
    model_trace = trace(network.model).get_trace(x)
    model_trace.compute_log_prob()
    assert x.shape == (9, 30)
    assert model_trace.observation_nodes == [f"finding{j}" for j in range(30)]
    assert len(model_trace.stochastic_nodes) == 1 + 20
    assert all(
        model_trace.nodes[name]["log_prob"].shape == (9,) for name in model_trace.observation_nodes
    )


def test_too_many_states_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    network = NoisyOr(21, 21, 30)
    params, x = network.start(0), torch.zeros(1, 21)
    for call in (network.log_likelihood, network.em_step):
        with pytest.raises(ValueError, match="2097152 states"):
            call(params, x)
    with pytest.raises(ValueError, match="2097152 states"):
        network.recognize(x)
    monkeypatch.setattr(noisy_or, "MAX_STATES", 8)
    assert math.isfinite(float(NoisyOr().log_likelihood(NoisyOr().initial, torch.zeros(1, 7))))


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="1 component"):
        GaussianMixture(0)
    with pytest.raises(ValueError, match="1 dimension"):
        GaussianMixture(2, 0)
    with pytest.raises(ValueError, match="1 class"):
        LatentClass(0)
    with pytest.raises(ValueError, match="1 item"):
        LatentClass(2, 0)
    with pytest.raises(ValueError, match="1 disease"):
        NoisyOr(0)
    for num_edges in (6, 22):
        with pytest.raises(ValueError, match="between 7 and 21"):
            NoisyOr(num_edges=num_edges)
    for module in MODULES:
        with pytest.raises(ValueError, match="at least 1 datum"):
            module.make_data(0, size=0)
