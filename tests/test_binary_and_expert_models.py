"""Tests of the shifter problem, the fully visible network and the mixture of linear experts."""

import itertools
import math
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from pyro.poutine import trace, uncondition
from scipy.optimize import linprog
from sklearn.linear_model import LinearRegression, LogisticRegression
from torch import Tensor
from torch.distributions import transform_to

from models import experts, fvsbn, shifter
from models.experts import LinearExperts
from models.fvsbn import FullyVisible
from models.helmholtz import Helmholtz
from models.softmax import softmax_logits, softmax_regression
from models.values import as_default, normal

Params = Mapping[str, Tensor]

NETWORKS = [FullyVisible(), FullyVisible(1), FullyVisible(5, seed=3)]
MIXTURES = [LinearExperts(), LinearExperts(3, 2), LinearExperts(2, 1, seed=4)]


def _name(machine: Any) -> str:
    return "-".join(str(value) for value in vars(machine).values() if isinstance(value, int))


def _bits(size: int, units: int, seed: int = 0) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    bits = torch.randint(2, (size, units), generator=generator, device="cpu")
    return bits.to(torch.get_default_device(), torch.get_default_dtype())


def _data(machine: Any, size: int = 40) -> tuple[Tensor, ...]:
    """Data of a model of this kind whose parameters are none of its starts' in these tests."""
    if isinstance(machine, FullyVisible):
        return (machine.sample(machine.start(100), size, seed=4),)
    generator = torch.Generator("cpu").manual_seed(5)
    x = as_default(normal((size, machine.num_features), generator))
    return x, machine.sample(machine.start(100), x, seed=4)


def _put(machine: Any, params: Params) -> None:
    """Makes these the values in the parameter store."""
    pyro.clear_param_store()
    for name, value in params.items():
        pyro.param(name, value.clone(), constraint=machine.constraints[name])


def _gradient(machine: Any, params: Params, *data: Tensor) -> Tensor:
    """Gradient of the log likelihood per datum in Pyro's unconstrained coordinates, flat."""
    maps = {name: transform_to(constraint) for name, constraint in machine.constraints.items()}
    free = {name: maps[name].inv(value).clone().requires_grad_() for name, value in params.items()}
    constrained = {name: maps[name](value) for name, value in free.items()}
    average = machine.log_likelihood(constrained, *data) / len(data[0])
    return torch.cat([g.flatten() for g in torch.autograd.grad(average, list(free.values()))])


def _loss(machine: Any) -> Any:
    kind = Trace_ELBO if isinstance(machine, FullyVisible) else TraceEnum_ELBO
    return kind(max_plate_nesting=1)


# --- the network and the experts ---------------------------------------------------------------


@pytest.mark.parametrize("machine", [*NETWORKS, *MIXTURES], ids=_name)
def test_starts_have_their_own_randomness(machine: Any) -> None:
    state = torch.get_rng_state()
    params = machine.start(3)
    assert list(params) == list(machine.constraints)
    for name, value in params.items():
        assert torch.equal(value, machine.start(3)[name])
        assert not torch.equal(value, machine.start(4)[name])
        assert bool(machine.constraints[name].check(value).all())
        assert torch.equal(machine.initial[name], machine.start(machine.seed)[name])
    data, others = _data(machine), _data(machine)
    assert all(map(torch.equal, data, others))
    assert torch.equal(torch.get_rng_state(), state)
    assert not list(pyro.get_param_store())


@pytest.mark.parametrize("machine", [*NETWORKS, *MIXTURES], ids=_name)
def test_programs_start_from_the_initial_values(machine: Any) -> None:
    data = _data(machine)
    loss = _loss(machine).loss(machine.model, machine.guide, *data)
    assert list(pyro.get_param_store()) == list(machine.constraints)
    for name, value in machine.initial.items():
        torch.testing.assert_close(pyro.param(name).detach(), value)
    exact = float(machine.log_likelihood(machine.initial, *data))
    assert -loss == pytest.approx(exact, rel=1e-10)


@pytest.mark.parametrize("machine", [*NETWORKS, *MIXTURES], ids=_name)
def test_referee_and_its_gradient_are_those_of_the_loss(machine: Any) -> None:
    params, data = machine.start(7), _data(machine)
    _put(machine, params)
    loss = _loss(machine).loss_and_grads(machine.model, machine.guide, *data)
    assert -loss == pytest.approx(float(machine.log_likelihood(params, *data)), rel=1e-10)
    store = dict(pyro.get_param_store().named_parameters())
    found = -torch.cat([store[name].grad.flatten() for name in params]) / len(data[0])
    expected = _gradient(machine, params, *data)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert float(expected.norm()) > 1e-3


@pytest.mark.parametrize("machine", [*NETWORKS, *MIXTURES], ids=_name)
def test_single_precision(machine: Any) -> None:
    data = _data(machine, 2000)
    double = machine.log_likelihood(machine.initial, *data)
    torch.set_default_dtype(torch.float32)
    data = tuple(value.float() for value in data)
    params = machine.initial
    single = machine.log_likelihood(params, *data)
    assert single.dtype == torch.float32
    assert float(single) == pytest.approx(float(double), rel=1e-4)
    loss = _loss(machine).loss(machine.model, machine.guide, *data)
    assert -loss == pytest.approx(float(single), rel=1e-4)
    if isinstance(machine, FullyVisible):
        best = machine.optimum(*data).params
    else:
        best = machine.em_step(params, *data)
    for name, value in best.items():
        assert value.dtype == pyro.param(name).dtype == torch.float32
        assert value.shape == params[name].shape
    assert float(machine.log_likelihood(best, *data)) > float(single)


@pytest.mark.parametrize("module", [fvsbn, experts])
def test_zoo_module(module: ModuleType) -> None:
    state = torch.get_rng_state()
    first, again, other = (module.make_data(seed) for seed in (3, 3, 4))
    few = module.make_data(3, 30)
    if module is fvsbn:
        first, again, other, few = (first,), (again,), (other,), (few,)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))
    assert all(torch.equal(part, whole[:30]) for part, whole in zip(few, first, strict=True))
    assert not list(pyro.get_param_store())
    machine = FullyVisible() if module is fvsbn else LinearExperts()
    for data in (first, few):
        exact = float(machine.log_likelihood(machine.initial, *data))
        loss = _loss(machine).loss(module.model, module.guide, *data)
        assert -loss == pytest.approx(exact, rel=1e-10)
    for size in (0, 10_000):
        with pytest.raises(ValueError, match="size must be from 1 to"):
            module.make_data(0, size)


# --- the shifter problem -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("probability", "nats"), [(0.2, 4.5792), (0.3, 5.5374), (0.5, 6.2275)], ids=str
)
def test_known_entropies(probability: float, nats: float) -> None:
    assert round(shifter.entropy(8, probability), 4) == nats
    assert len(shifter.states(8, probability).patterns) == 508
    if probability == 0.3:
        assert shifter.entropy() == shifter.entropy(8, probability)


@pytest.mark.parametrize("width", [3, 4, 5, 8])
def test_entropy_in_closed_form(width: int) -> None:
    """That of the pixels and the direction, less that of a direction that no one can tell."""
    p = 0.3
    pixels = -width * (p * math.log(p) + (1 - p) * math.log(1 - p))
    either = p**width + (1 - p) ** width
    if width % 2 == 0:
        either += 2 * (p * (1 - p)) ** (width // 2)
    expected = pixels + math.log(2) * (1 - either)
    assert shifter.entropy(width, p) == pytest.approx(expected, abs=1e-12)


def test_shifter_states() -> None:
    patterns, probabilities = shifter.states(5, 0.2)
    first, second = patterns[:, :5], patterns[:, 5:]
    left = (second == first.roll(-1, 1)).all(-1)
    right = (second == first.roll(1, 1)).all(-1)
    assert len(torch.unique(patterns, dim=0)) == len(patterns) == 62
    assert bool((left | right).all()) and int((left & right).sum()) == 2
    on = first.sum(-1)
    expected = 0.2**on * 0.8 ** (5 - on) * torch.where(left & right, 1.0, 0.5)
    torch.testing.assert_close(probabilities, expected)
    assert float(probabilities.sum()) == pytest.approx(1, abs=1e-12)


def test_shifter_data_follow_the_states() -> None:
    """Seed by seed, by the mean of Pearson's statistic, and all seeds together, state by state."""
    patterns, probabilities = shifter.states(4, 0.5)
    seeds, size = 40, 2000
    x = torch.stack([shifter.make_data(seed, size, 4, 0.5) for seed in range(seeds)])
    frequency = (x[:, :, None] == patterns).all(-1).double().mean(1)
    torch.testing.assert_close(frequency.sum(-1), torch.ones(seeds, dtype=torch.float64))
    pearson = (size * (frequency - probabilities) ** 2 / probabilities).sum(-1)
    freedom = len(patterns) - 1
    assert abs(float(pearson.mean()) - freedom) < 4 * math.sqrt(2 * freedom / seeds)
    error = (probabilities * (1 - probabilities) / (seeds * size)).sqrt()
    assert float(((frequency.mean(0) - probabilities) / error).abs().max()) < 4


def _ideal_machine(width: int, probability: float, sharpness: float = 15.0) -> Helmholtz:
    """A machine whose top unit is the direction, and whose units below are moving pixels."""
    machine = shifter.machine(width)
    eye, logit = torch.eye(width), math.log(probability / (1 - probability))
    ones = torch.ones(width)
    # A unit of the wrong direction is off, one of the right direction on with the probability.
    pyro.param("top.bias", torch.zeros(1))
    off = 2 * sharpness
    pyro.param("layer2.bias", torch.cat([logit * ones, -off * ones]))
    pyro.param("layer2.weight", torch.cat([-off * ones, (logit + off) * ones])[:, None])
    moved = torch.cat([eye.roll(-1, 0), eye.roll(1, 0)], 1)
    pixels = torch.cat([torch.cat([eye, eye], 1), moved])
    pyro.param("layer1.bias", torch.full((2 * width,), -sharpness))
    pyro.param("layer1.weight", 2 * sharpness * pixels)
    return machine


@pytest.mark.parametrize("probability", [0.2, 0.5])
def test_the_machine_can_be_exact(probability: float) -> None:
    machine = _ideal_machine(4, probability)
    assert abs(shifter.kl_from_truth(machine, probability)) < 1e-4
    assert shifter.kl_from_truth(machine, 0.35) > 0.01


def test_divergence_of_fair_coins() -> None:
    machine = shifter.machine(5)
    with torch.no_grad():
        pyro.param("layer1.weight", torch.zeros(10, 10))
    expected = 10 * math.log(2) - shifter.entropy(5)
    assert shifter.kl_from_truth(machine) == pytest.approx(expected, abs=1e-9)


def test_bad_arguments_of_the_shifter() -> None:
    for width in (2, 17):
        with pytest.raises(ValueError, match="width must be from 3 to 16"):
            shifter.states(width)
    for probability in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="strictly between 0 and 1"):
            shifter.states(4, probability)
    with pytest.raises(ValueError, match="even number of pixels, got 7"):
        shifter.kl_from_truth(Helmholtz((7, 2)))


# --- the fully visible network -----------------------------------------------------------------


def _log_prob(params: Params, row: list[float]) -> float:
    """Log probability of one datum in plain Python."""
    total = 0.0
    for unit, weights in enumerate(params[f"row{i}"].tolist() for i in range(len(row))):
        logit = weights[-1] + sum(
            weight * before for weight, before in zip(weights[:-1], row[:unit], strict=True)
        )
        on = 1 / (1 + math.exp(-logit))
        total += math.log(on if row[unit] else 1 - on)
    return total


@pytest.mark.parametrize("machine", NETWORKS, ids=_name)
def test_network_likelihood_by_loops(machine: FullyVisible) -> None:
    x, params = _bits(9, machine.num_units), machine.start(2)
    slow = sum(_log_prob(params, row) for row in x.tolist())
    assert float(machine.log_likelihood(params, x)) == pytest.approx(slow, rel=1e-12)


def test_probabilities_of_all_data_sum_to_one() -> None:
    machine = FullyVisible(5)
    everything = torch.tensor(list(itertools.product((0.0, 1.0), repeat=5)))
    params = machine.start(2)
    total = sum(float(machine.log_likelihood(params, row[None]).exp()) for row in everything)
    assert total == pytest.approx(1, abs=1e-12)


def test_samples_follow_the_exact_distribution() -> None:
    """Those of the program without its observations, and those of the referee."""
    machine, size = FullyVisible(4), 20_000
    params = machine.start(8)
    _put(machine, params)
    run = trace(uncondition(machine.model)).get_trace(torch.zeros(size, 4))
    program = torch.stack([run.nodes[f"x{unit}"]["value"] for unit in range(4)], -1)
    states = torch.tensor(list(itertools.product((0.0, 1.0), repeat=4)))
    exact = torch.stack([machine.log_likelihood(params, row[None]) for row in states]).exp()
    for x in (program, machine.sample(params, size, seed=1)):
        frequency = (x[:, None] == states).all(-1).double().mean(0)
        z_score = (frequency - exact) / (exact * (1 - exact) / size).sqrt()
        assert float(z_score.abs().max()) < 4


def test_network_shapes_with_particles() -> None:
    machine, x = FullyVisible(3), _bits(7, 3)
    with pyro.plate("particles", 4, dim=-2):
        observed = trace(machine.model).get_trace(x)
        sampled = trace(uncondition(machine.model)).get_trace(x)
    observed.compute_log_prob()
    sampled.compute_log_prob()
    assert observed.observation_nodes == ["x0", "x1", "x2"]
    assert [node for node in observed.stochastic_nodes if node.startswith("x")] == []
    for unit in range(3):
        assert observed.nodes[f"x{unit}"]["log_prob"].shape == (4, 7)
        assert sampled.nodes[f"x{unit}"]["value"].shape == (4, 7)
        assert sampled.nodes[f"x{unit}"]["log_prob"].shape == (4, 7)
    elbo = Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    exact = float(machine.log_likelihood(machine.initial, x))
    assert -elbo.loss(machine.model, machine.guide, x) == pytest.approx(exact, rel=1e-10)


def test_digits_are_medians_of_means() -> None:
    from sklearn.datasets import load_digits

    images = load_digits().images.tolist()
    cells = [(2 * row, 2 * column) for row in range(4) for column in range(4)]
    means = [
        [sum(image[i + a][j + b] for a in (0, 1) for b in (0, 1)) / 4 for i, j in cells]
        for image in images
    ]
    medians = [sorted(column)[898] for column in zip(*means, strict=True)]
    expected = [tuple(float(v > m) for v, m in zip(row, medians, strict=True)) for row in means]
    found = [tuple(row) for row in fvsbn.make_data(0).tolist()]
    assert sorted(found) == sorted(expected) and found != expected


def test_best_network_on_digits() -> None:
    machine, x = FullyVisible(), fvsbn.make_data(0)
    params, best = machine.optimum(x)
    assert float(_gradient(machine, params, x).norm()) < 1e-12
    assert float(best) == float(machine.log_likelihood(params, x))
    assert float(best) / len(x) == pytest.approx(-9.4356, abs=1e-4)
    assert max(float(value.abs().max()) for value in params.values()) < 3
    independent = torch.distributions.Bernoulli(x.mean(0)).log_prob(x).sum()
    assert float(best - independent) > len(x)  # more than a nat per digit
    generator = torch.Generator("cpu").manual_seed(0)
    for _ in range(5):
        near = {
            name: value + 1e-3 * torch.randn(len(value), generator=generator, device="cpu").to(x)
            for name, value in params.items()
        }
        assert float(machine.log_likelihood(near, x)) < float(best)


def test_best_network_is_scikit_learns_logistic_regression() -> None:
    x = fvsbn.make_data(0, 600)
    params = FullyVisible().optimum(x).params
    for unit in (1, 6, 15):
        found = LogisticRegression(C=1e10, tol=1e-10, max_iter=10_000)
        found.fit(x[:, :unit].cpu().numpy(), x[:, unit].cpu().numpy())
        expected = torch.tensor([*found.coef_[0], *found.intercept_])
        torch.testing.assert_close(params[f"row{unit}"], expected, rtol=1e-3, atol=1e-4)
    mean = x[:, 0].mean()
    torch.testing.assert_close(params["row0"][0], mean.logit())


def _has_maximum(x: Tensor) -> bool:
    """Whether each logistic regression has one best value, by rank and linear programming.

    It has where the columns are independent and no direction w has s_n w·d_n >= 0 for all data with
    one of them positive, where s_n is the sign of the datum's class.
    """
    for unit in range(x.shape[1]):
        design = torch.cat([x[:, :unit], torch.ones(len(x), 1)], 1).cpu()
        if torch.linalg.matrix_rank(design) < unit + 1:
            return False
        signed = ((2 * x[:, unit : unit + 1].cpu() - 1) * design).numpy()
        bounds = [(-1, 1)] * (unit + 1)
        found = linprog(-signed.sum(0), A_ub=-signed, b_ub=[0] * len(x), bounds=bounds)
        if -found.fun > 1e-6:
            return False
    return True


def test_optimum_exists_or_is_refused() -> None:
    """Against linear programming, on small data of which about half have no maximum."""
    machine, count = FullyVisible(3), 0
    for seed in range(60):
        x = _bits(11, 3, seed)
        if _has_maximum(x):
            count += 1
            assert float(_gradient(machine, machine.optimum(x).params, x).norm()) < 1e-10
        else:
            with pytest.raises(ValueError, match=r"unit \d, given .* no unique maximum"):
                machine.optimum(x)
    assert 15 < count < 45


def test_what_has_no_optimum_is_named() -> None:
    machine, x = FullyVisible(4), _bits(200, 4)
    machine.optimum(x)
    for unit, column in ((1, torch.ones(200)), (2, x[:, 0]), (3, x[:, 1] * x[:, 2])):
        worse = x.clone()
        worse[:, unit] = column
        with pytest.raises(ValueError, match=f"unit {unit}, given those before it"):
            machine.optimum(worse)
    with pytest.raises(ValueError, match="no unique maximum"):
        machine.optimum(torch.full_like(x, math.nan))


def test_softmax_regression_with_shares() -> None:
    generator = torch.Generator("cpu").manual_seed(0)
    design = torch.randn(50, 3, generator=generator, device="cpu")
    shares = torch.rand(50, 4, generator=generator, device="cpu") ** 3  # sums differ
    weights = softmax_regression(design, shares).requires_grad_()
    assert weights.shape == (3, 3)
    assert bool((softmax_logits(design, weights)[:, 0] == 0).all())

    def objective(values: Tensor) -> Tensor:
        logits = torch.cat([torch.zeros(50, 1, device="cpu"), design @ values.T], 1)
        return (shares * torch.log(logits.exp() / logits.exp().sum(1, keepdim=True))).sum()

    (gradient,) = torch.autograd.grad(objective(weights), weights)
    assert float(gradient.abs().max()) < 1e-10
    curvature = torch.autograd.functional.hessian(objective, weights.detach()).reshape(9, 9)
    assert float(torch.linalg.eigvalsh(curvature).max()) < -0.1


def test_softmax_regression_halves_its_steps() -> None:
    """Whole steps of Newton's method lead away from the maximum here, and to infinity."""
    design = torch.tensor([[-3.0, 1.0], [-0.4, 1.0], [0.0, 1.0]])
    shares = torch.tensor([[1e4, 1.0], [1e2, 1.0], [1e1, 1e4]])
    (weights,) = softmax_regression(design, shares)
    residual = shares[:, 1] - shares.sum(-1) * (design @ weights).sigmoid()
    assert float((design.T @ residual).abs().max()) < 1e-8


def test_bad_arguments_of_the_network() -> None:
    with pytest.raises(ValueError, match="at least 1 unit"):
        FullyVisible(0)
    machine = FullyVisible(4)
    with pytest.raises(ValueError, match="at least 1 datum"):
        machine.sample(machine.initial, 0, seed=0)
    for x in (torch.zeros(3, 5), torch.zeros(4), torch.zeros(3, 4).long()):
        for function in (machine.model, machine.optimum):
            with pytest.raises(ValueError, match=r"floats of shape \[batch, 4\]"):
                function(x)


# --- the mixture of experts --------------------------------------------------------------------


def _joints(params: Params, x: Tensor, y: Tensor) -> Tensor:
    """p(y, expert | x) in plain Python, shape [batch, experts]."""
    gate, weight, scale = (params[name].tolist() for name in ("gate", "weight", "scale"))
    rows = []
    for features, response in zip(x.tolist(), y.tolist(), strict=True):
        datum = [*features, 1.0]
        dots = [sum(w * d for w, d in zip(row, datum, strict=True)) for row in gate]
        powers = [1.0, *map(math.exp, dots)]
        row = []
        for power, line, deviation in zip(powers, weight, scale, strict=True):
            mean = sum(w * d for w, d in zip(line, datum, strict=True))
            z = (response - mean) / deviation
            density = math.exp(-z * z / 2) / (deviation * math.sqrt(2 * math.pi))
            row.append(power / sum(powers) * density)
        rows.append(row)
    return torch.tensor(rows)


@pytest.mark.parametrize("machine", MIXTURES, ids=_name)
def test_experts_likelihood_by_loops(machine: LinearExperts) -> None:
    params, (x, y) = machine.start(2), _data(machine)
    slow = _joints(params, x, y).sum(-1).log().sum()
    torch.testing.assert_close(machine.log_likelihood(params, x, y), slow, rtol=1e-12, atol=0)


def test_density_integrates_to_one() -> None:
    machine = LinearExperts(3, 2)
    params, x = machine.start(2), torch.tensor([0.7, -1.2])
    grid = torch.linspace(-14, 14, 4001)
    density = torch.stack([
        machine.log_likelihood(params, x[None], response[None]).exp() for response in grid
    ])
    assert float(torch.trapezoid(density, grid)) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("machine", MIXTURES, ids=_name)
def test_recognition_is_the_posterior(machine: LinearExperts) -> None:
    params, (x, y) = machine.start(2), _data(machine)
    before = trace(machine.recognize).get_trace(x, y)
    assert not list(pyro.get_param_store()) and not before.param_nodes
    _put(machine, params)
    after = trace(machine.recognize).get_trace(x, y)
    assert not after.param_nodes
    joints = _joints(params, x, y)
    probs = after.nodes["expert"]["fn"].probs
    torch.testing.assert_close(probs, joints / joints.sum(-1, keepdim=True))
    assert not probs.requires_grad
    assert not torch.allclose(probs, before.nodes["expert"]["fn"].probs)


@pytest.mark.parametrize("machine", MIXTURES, ids=_name)
def test_the_posterior_makes_the_bound_tight(machine: LinearExperts) -> None:
    params, data = machine.start(2), _data(machine)
    _put(machine, params)
    exact = float(machine.log_likelihood(params, *data))
    elbo = Trace_ELBO(max_plate_nesting=1)
    losses = [-elbo.loss(machine.model, machine.recognize, *data) for _ in range(3)]
    assert losses == pytest.approx([exact] * 3, rel=1e-10)
    for kind in (Trace_ELBO, TraceEnum_ELBO):
        many = kind(num_particles=4, vectorize_particles=True, max_plate_nesting=1)
        guide = machine.recognize if kind is Trace_ELBO else machine.guide
        assert -many.loss(machine.model, guide, *data) == pytest.approx(exact, rel=1e-10)


def test_scores_of_samples_average_to_zero() -> None:
    """As they do at the truth, so that the sampler and the likelihood are of one distribution."""
    machine, size = LinearExperts(3, 2), 4000
    truth = machine.start(100)
    x, y = _data(machine, size)

    def log_prob(params: Params, row: Tensor, response: Tensor) -> Tensor:
        return machine.log_likelihood(params, row[None], response[None])

    scores = torch.func.vmap(torch.func.grad(log_prob), in_dims=(None, 0, 0))(truth, x, y)
    flat = torch.cat([score.reshape(size, -1) for score in scores.values()], -1)
    z_score = flat.mean(0) / (flat.std(0) / math.sqrt(size))
    assert flat.shape[1] == 2 * 3 + 3 * 3 + 3
    assert float(z_score.abs().max()) < 4
    wrong = {**truth, "scale": 1.1 * truth["scale"]}
    scores = torch.func.vmap(torch.func.grad(log_prob), in_dims=(None, 0, 0))(wrong, x, y)
    z_score = scores["scale"].mean(0) / (scores["scale"].std(0) / math.sqrt(size))
    assert float(z_score.abs().max()) > 4


def test_the_program_samples_what_the_referee_samples() -> None:
    """Moments of y given one x, of the program without its observation and in closed form."""
    machine, size = LinearExperts(3, 2), 20_000
    params, x = machine.start(100), torch.tensor([0.7, -1.2]).expand(size, 2)
    _put(machine, params)
    run = trace(uncondition(machine.model)).get_trace(x, torch.zeros(size))
    program = run.nodes["y"]["value"].detach()
    design = torch.tensor([0.7, -1.2, 1.0])
    probs = torch.cat([torch.zeros(1), params["gate"] @ design]).softmax(-1)
    means = params["weight"] @ design
    mean = probs @ means
    second = probs @ (means**2 + params["scale"] ** 2)
    fourth = means**4 + 6 * means**2 * params["scale"] ** 2 + 3 * params["scale"] ** 4
    errors = ((second - mean**2) / size).sqrt(), ((probs @ fourth - second**2) / size).sqrt()
    for y in (program, machine.sample(params, x, seed=1)):
        assert float(abs(y.mean() - mean) / errors[0]) < 4
        assert float(abs((y**2).mean() - second) / errors[1]) < 4


@pytest.mark.parametrize("machine", MIXTURES, ids=_name)
def test_em_never_decreases_the_likelihood(machine: LinearExperts) -> None:
    data = _data(machine, 150)
    for seed in range(3):
        params = machine.start(seed)
        values = [float(machine.log_likelihood(params, *data))]
        for _ in range(25):
            after = machine.em_step(params, *data)
            for name, value in after.items():
                assert value.shape == params[name].shape
                assert bool(machine.constraints[name].check(value).all())
            params = after
            values.append(float(machine.log_likelihood(params, *data)))
        assert float(torch.tensor(values).diff().min()) > -1e-9
        assert values[-1] - values[0] > 1


@pytest.mark.parametrize("machine", MIXTURES, ids=_name)
def test_em_step_maximizes_the_expected_log_joint(machine: LinearExperts) -> None:
    params, (x, y) = machine.start(2), _data(machine)
    joints = _joints(params, x, y)
    share = joints / joints.sum(-1, keepdim=True)
    new = machine.em_step(params, x, y)
    assert all(torch.equal(value, machine.start(2)[name]) for name, value in params.items())
    free = {name: value.clone().requires_grad_() for name, value in new.items()}
    design = torch.cat([x, torch.ones(len(x), 1)], 1)
    logits = torch.cat([torch.zeros(len(x), 1), design @ free["gate"].T], 1)
    density = torch.distributions.Normal(design @ free["weight"].T, free["scale"])
    expected = share * (logits.log_softmax(-1) + density.log_prob(y[:, None]))
    for gradient in torch.autograd.grad(expected.sum(), list(free.values())):
        assert float(gradient.abs().max()) < 1e-9


def test_experts_of_an_em_step_are_weighted_least_squares() -> None:
    machine = LinearExperts()
    x, y = experts.make_data(0, 100)
    params = machine.start(1)
    joints = _joints(params, x, y)
    new = machine.em_step(params, x, y)
    for expert, share in enumerate((joints / joints.sum(-1, keepdim=True)).T):
        found = LinearRegression().fit(
            x.cpu().numpy(), y.cpu().numpy(), sample_weight=share.cpu().numpy()
        )
        expected = torch.tensor([*found.coef_, found.intercept_])
        torch.testing.assert_close(new["weight"][expert], expected)
        residual = y - torch.tensor(found.predict(x.cpu().numpy()))
        variance = (share * residual**2).sum() / share.sum()
        torch.testing.assert_close(new["scale"][expert], variance.sqrt())


def test_em_on_the_diabetes_study() -> None:
    machine = LinearExperts(seed=2)
    x, y = experts.make_data(0)
    params = machine.initial
    assert float(_gradient(machine, params, x, y).norm()) > 0.1
    for _ in range(350):
        params = machine.em_step(params, x, y)
    assert float(_gradient(machine, params, x, y).norm()) < 1e-6
    found = float(machine.log_likelihood(params, x, y))
    assert found == pytest.approx(-436.8308, abs=1e-4)
    design = torch.cat([x, torch.ones(len(x), 1)], 1)
    fitted = design @ torch.linalg.lstsq(design, y[:, None]).solution[:, 0]
    noise = (y - fitted).square().mean().sqrt()
    one = float(torch.distributions.Normal(fitted, noise).log_prob(y).sum())
    assert one == pytest.approx(-482.1175, abs=1e-4)


def test_order_of_the_experts_is_free() -> None:
    machine = LinearExperts(3, 2)
    params, data = machine.start(2), _data(machine)
    order = [2, 0, 1]
    gate = torch.cat([torch.zeros(1, 3), params["gate"]])[order]
    moved = {
        "gate": (gate - gate[0])[1:],
        "weight": params["weight"][order],
        "scale": params["scale"][order],
    }
    exact = machine.log_likelihood(params, *data)
    torch.testing.assert_close(machine.log_likelihood(moved, *data), exact)
    first, second = machine.em_step(params, *data), machine.em_step(moved, *data)
    torch.testing.assert_close(second["weight"], first["weight"][order])
    torch.testing.assert_close(second["scale"], first["scale"][order])


def test_an_expert_without_data_is_refused() -> None:
    machine = LinearExperts(2, 1)
    x = torch.linspace(-1, 1, 20)[:, None]
    on_a_line = 2 * x[:, 0] + 1
    with pytest.raises(ValueError, match="too few data left"):
        machine.em_step(machine.initial, x, on_a_line)
    y = on_a_line + 0.1 * torch.sin(40 * x[:, 0])
    machine.em_step(machine.initial, x, y)
    alone = {**machine.initial, "gate": torch.tensor([[0.0, -800.0]])}
    with pytest.raises(ValueError, match="too few data left"):
        machine.em_step(alone, x, y)


def test_experts_data_are_patients() -> None:
    from sklearn.datasets import load_diabetes

    x, y = experts.make_data(0)
    study = load_diabetes()
    found = torch.cat([x, y[:, None]], 1).cpu()
    columns = [study.data[:, study.feature_names.index(name)] for name in ("bmi", "bp", "s5")]
    expected = torch.stack([*map(torch.tensor, columns), torch.tensor(study.target)], -1)
    expected = (expected - expected.mean(0)) / expected.std(0)
    assert sorted(found.round(decimals=8).tolist()) == sorted(expected.round(decimals=8).tolist())
    assert not torch.allclose(found, expected)


def test_bad_arguments_of_the_experts() -> None:
    for sizes in ((1, 3), (2, 0)):
        with pytest.raises(ValueError, match="at least 2 experts and 1 feature"):
            LinearExperts(*sizes)
    machine = LinearExperts(2, 3)
    for x, y in (
        (torch.zeros(5, 2), torch.zeros(5)),
        (torch.zeros(5, 3), torch.zeros(4)),
        (torch.zeros(5, 3), torch.zeros(5, 1)),
        (torch.zeros(3), torch.zeros(3)),
    ):
        for function in (machine.model, machine.recognize):
            with pytest.raises(ValueError, match=r"x must be of shape \[batch, 3\]"):
                function(x, y)
