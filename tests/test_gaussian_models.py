"""Tests of linear Gaussian networks and state space models: programs, data and referees."""

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.poutine import condition, replay, trace
from sklearn.datasets import load_diabetes
from sklearn.linear_model import LinearRegression
from torch import Tensor
from torch.distributions import MultivariateNormal, transform_to

from models import linear_gaussian, state_space
from models.linear_gaussian import LinearGaussianNetwork
from models.state_space import StateSpace

Params = Mapping[str, Tensor]
Regression = tuple[str, str | None, str | None]

PATIENTS = linear_gaussian._network
VISIBLE = {"d": ("c", "a"), "b": ("a",), "a": (), "c": ("a", "b")}
# One hidden node with parents, one without, one without children, one with a hidden parent.
GRAPH = {
    "x": ("h", "a"),
    "a": (),
    "h": ("a", "top"),
    "top": (),
    "y": ("h",),
    "z": ("top", "h", "y"),
    "loose": ("x", "top"),
    "u": ("h",),
    "v": ("h", "top"),
}
FACTOR = {"f": (), "one": ("f",), "two": ("f", "one"), "three": ("f",), "four": ("f",)}
NETWORKS = {
    "patients": PATIENTS,
    "visible": LinearGaussianNetwork(VISIBLE, seed=4),
    "graph": LinearGaussianNetwork(GRAPH, ("top", "h", "loose"), seed=3),
    "factor": LinearGaussianNetwork(FACTOR, ("f",)),
    "one": LinearGaussianNetwork({"only": ()}),
}
SYSTEMS = {
    "default": StateSpace(),
    "wide": StateSpace(3, 2, 5),
    "small": StateSpace(1, 1, 2),
}
MACHINES = NETWORKS | SYSTEMS
HIDING = {name: machine for name, machine in MACHINES.items() if name not in {"visible", "one"}}


def _each(machines: Mapping[str, Any]) -> Any:
    return pytest.mark.parametrize("machine", machines.values(), ids=machines.keys())


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


def _free(machine: Any, params: Params) -> dict[str, Tensor]:
    """Unconstrained coordinates, as leaves."""
    return {
        name: transform_to(machine.constraints[name]).inv(value).clone().requires_grad_()
        for name, value in params.items()
    }


def _bound(machine: Any, free: Params) -> dict[str, Tensor]:
    """Constrained values."""
    return {name: transform_to(machine.constraints[name])(value) for name, value in free.items()}


def _gradient(machine: Any, params: Params, x: Tensor) -> dict[str, Tensor]:
    """Gradient of the total log likelihood in Pyro's unconstrained coordinates."""
    free = _free(machine, params)
    total = machine.log_likelihood(_bound(machine, free), x)
    return dict(zip(free, torch.autograd.grad(total, list(free.values())), strict=True))


def _flat(values: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([value.reshape(-1) for value in values.values()])


def _slope(machine: Any, params: Params, x: Tensor) -> float:
    """Norm of the gradient per datum."""
    return float(_flat(_gradient(machine, params, x)).norm()) / len(x)


def _climb(machine: Any, params: dict[str, Tensor], x: Tensor, steps: int) -> dict[str, Tensor]:
    """Runs EM and checks on the way that the likelihood never decreases."""
    value = float(machine.log_likelihood(params, x))
    for _ in range(steps):
        params = machine.em_step(params, x)
        new = float(machine.log_likelihood(params, x))
        assert new >= value - 1e-10 * abs(value)
        value = new
    return params


# --- slow oracles ------------------------------------------------------------------------------


class _Whole(NamedTuple):
    """The joint distribution of everything, hidden units first, as one normal distribution.

    Attributes:
        mean: Shape [units].
        covariance: Shape [units, units].
        hidden: Number of hidden units.
    """

    mean: Tensor
    covariance: Tensor
    hidden: int

    def visible(self) -> MultivariateNormal:
        count = self.hidden
        return MultivariateNormal(self.mean[count:], self.covariance[count:, count:])

    def posterior(self, x: Tensor) -> MultivariateNormal:
        """That of the hidden units, for one flat datum per row."""
        count = self.hidden
        gain = torch.linalg.solve(self.covariance[count:, count:], self.covariance[count:, :count])
        mean = self.mean[:count] + (x - self.mean[count:]) @ gain
        covariance = self.covariance[:count, :count] - self.covariance[:count, count:] @ gain
        return MultivariateNormal(mean, (covariance + covariance.T) / 2)


def _whole(machine: Any, params: Params) -> _Whole:
    if isinstance(machine, StateSpace):
        return _whole_sequence(machine, params)
    return _whole_network(machine, params)


def _whole_network(machine: LinearGaussianNetwork, params: Params) -> _Whole:
    """Moments node by node, after Shachter and Kenley."""
    mean: dict[str, Tensor] = {}
    covariance: dict[tuple[str, str], Tensor] = {}
    zero, one = torch.zeros(()), torch.ones(())
    for node in machine.order:
        terms = [
            (params[f"weight.{node}"][index], parent)
            for index, parent in enumerate(machine.parents[node])
        ]
        bias = params.get(f"bias.{node}", zero)
        mean[node] = bias + sum(weight * mean[parent] for weight, parent in terms)
        for other in list(mean)[:-1]:
            value = zero + sum(weight * covariance[parent, other] for weight, parent in terms)
            covariance[node, other] = covariance[other, node] = value
        noise = params.get(f"scale.{node}", one) ** 2
        covariance[node, node] = noise + sum(
            weight * covariance[parent, node] for weight, parent in terms
        )
    nodes = [*machine.hidden, *machine.observed]
    rows = [torch.stack([covariance[node, other] for other in nodes]) for node in nodes]
    return _Whole(
        torch.stack([mean[node] for node in nodes]), torch.stack(rows), len(machine.hidden)
    )


def _whole_sequence(machine: StateSpace, params: Params) -> _Whole:
    """Moments of all steps by powers of the transition."""
    transition, emission = params["transition"], params["emission"]
    power = torch.linalg.matrix_power
    steps = range(machine.length)
    spread = [
        sum(power(transition, k) @ power(transition, k).T for k in range(step + 1))
        for step in steps
    ]

    def covariance(first: int, second: int) -> Tensor:
        if first <= second:
            return spread[first] @ power(transition, second - first).T
        return power(transition, first - second) @ spread[second]

    states = torch.cat([torch.cat([covariance(s, t) for t in steps], 1) for s in steps])
    means = torch.cat([power(transition, step) @ params["initial"] for step in steps])
    image = torch.block_diag(*[emission] * machine.length)
    noise = torch.diag(params["scale"].repeat(machine.length) ** 2)
    rows = torch.cat([states, states @ image.T], 1)
    visible = torch.cat([image @ states, image @ states @ image.T + noise], 1)
    return _Whole(torch.cat([means, image @ means]), torch.cat([rows, visible]), len(means))


def _draws(posterior: MultivariateNormal) -> list[Tensor]:
    """A few numbers with the mean and the covariance of the posterior, each [batch, hidden]."""
    count = posterior.event_shape[0]
    root = math.sqrt(count) * torch.linalg.cholesky(posterior.covariance_matrix[0])
    return [posterior.mean + sign * column for column in root.T for sign in (1, -1)]


def _least_squares(features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of shape [targets, features], and mean squares of what is left."""
    weights = torch.linalg.lstsq(features, targets).solution
    return weights.T, (targets - features @ weights).square().mean(0)


def _regress_nodes(machine: LinearGaussianNetwork, values: Mapping[str, Tensor]) -> Params:
    """The best parameters if nothing is hidden."""
    params = {}
    for node, names in machine.parents.items():
        constant = [] if node in machine.hidden else [torch.ones_like(values[node])]
        if not constant and not names:
            continue
        features = torch.stack([*constant, *(values[name] for name in names)], -1)
        weights, square = _least_squares(features, values[node][:, None])
        if constant:
            params[f"bias.{node}"], params[f"scale.{node}"] = weights[0, 0], square[0].sqrt()
        if names:
            params[f"weight.{node}"] = weights[0, len(constant) :]
    return params


def _regress_steps(machine: StateSpace, states: Tensor, x: Tensor) -> Params:
    """The best parameters if nothing is hidden."""
    transition, _ = _least_squares(states[:, :-1].flatten(0, 1), states[:, 1:].flatten(0, 1))
    emission, square = _least_squares(states.flatten(0, 1), x.flatten(0, 1))
    initial = states[:, 0].mean(0)
    return {
        "initial": initial,
        "transition": transition,
        "emission": emission,
        "scale": square.sqrt(),
    }


# --- both --------------------------------------------------------------------------------------


@_each(MACHINES)
def test_start_and_data_have_their_own_randomness(machine: Any) -> None:
    state = torch.get_rng_state()
    x, params, truth = machine.make_data(3, 20), machine.start(3), machine.truth(3)
    assert torch.equal(x, machine.make_data(3, 20))
    assert not torch.equal(x, machine.make_data(4, 20))
    assert set(params) == set(truth) == set(machine.constraints)
    for name, value in params.items():
        assert torch.equal(value, machine.start(3)[name])
        assert torch.equal(truth[name], machine.truth(3)[name])
        assert truth[name].shape == value.shape
        assert not torch.equal(value, machine.start(4)[name])
        assert not torch.equal(value, truth[name])
        assert value.dtype == truth[name].dtype == torch.float64
        assert bool(machine.constraints[name].check(value).all())
        assert bool(machine.constraints[name].check(truth[name]).all())
        assert torch.equal(machine.initial[name], machine.start(machine.seed)[name])
    assert torch.equal(torch.get_rng_state(), state)
    assert not list(pyro.get_param_store())


@_each(MACHINES)
def test_data_follow_the_truth(machine: Any) -> None:
    x = machine.make_data(2, 4000).flatten(1)
    law = _whole(machine, machine.truth(2)).visible()
    white = torch.linalg.solve_triangular(law.scale_tril, (x - law.mean).T, upper=False)
    root = math.sqrt(len(x))
    scores = torch.cat([white.mean(1), ((white @ white.T / len(x)).tril(-1)).flatten()]) * root
    squares = (white.square().mean(1) - 1) * root / math.sqrt(2)
    assert float(scores.abs().max()) < 4.5
    assert float(squares.abs().max()) < 4.5


@_each(MACHINES)
def test_likelihood_and_collapsed_loss_by_one_normal_distribution(machine: Any) -> None:
    x, params = machine.make_data(0, 15), machine.start(5)
    exact = float(_whole(machine, params).visible().log_prob(x.flatten(1)).sum())
    assert float(machine.log_likelihood(params, x)) == pytest.approx(exact, rel=1e-10)
    _put(machine, params)
    loss = Trace_ELBO(max_plate_nesting=1).loss(machine.collapsed, machine.guide, x)
    assert -loss == pytest.approx(exact, rel=1e-10)


@_each(MACHINES)
def test_gradient_through_the_collapsed_program(machine: Any) -> None:
    x, params = machine.make_data(0, 15), machine.start(5)
    expected = _gradient(machine, params, x)
    _put(machine, params)
    Trace_ELBO(max_plate_nesting=1).loss_and_grads(machine.collapsed, machine.guide, x)
    for name, value in pyro.get_param_store().named_parameters():
        torch.testing.assert_close(-value.grad, expected[name], rtol=1e-8, atol=1e-8)


@_each(HIDING)
def test_gradient_through_the_program(machine: Any) -> None:
    """By Fisher's identity, over a few points that have the moments of the posterior."""
    x, params = machine.make_data(0, 15), machine.start(5)
    expected = _gradient(machine, params, x)
    _put(machine, params)
    points = _draws(_whole(machine, params).posterior(x.flatten(1)))
    for point in points:
        found = trace(condition(machine.model, _sites(machine, point))).get_trace(x)
        (-found.log_prob_sum() / len(points)).backward()
    for name, value in pyro.get_param_store().named_parameters():
        torch.testing.assert_close(-value.grad, expected[name], rtol=1e-8, atol=1e-8)


def _sites(machine: Any, hidden: Tensor) -> dict[str, Tensor]:
    """Values of the hidden sites, from those of all hidden units."""
    if isinstance(machine, StateSpace):
        steps = hidden.unflatten(1, (machine.length, machine.num_states)).unbind(1)
        return {f"z{step}": state for step, state in enumerate(steps)}
    return dict(zip(machine.hidden, hidden.unbind(1), strict=True))


@_each(HIDING)
def test_posterior_by_conditioning_one_normal_distribution(machine: Any) -> None:
    x, params = machine.make_data(0, 6), machine.start(5)
    _put(machine, params)
    posterior = _whole(machine, params).posterior(x.flatten(1))
    for _ in range(2):
        hidden = posterior.mean + torch.randn(posterior.mean.shape)
        found = trace(condition(machine.recognize, _sites(machine, hidden))).get_trace(x)
        found.compute_log_prob()
        log_prob = sum(found.nodes[name]["log_prob"] for name in _sites(machine, hidden))
        assert isinstance(log_prob, Tensor) and log_prob.shape == (6,)
        torch.testing.assert_close(log_prob, posterior.log_prob(hidden), rtol=1e-8, atol=1e-8)


@_each(MACHINES)
def test_the_posterior_makes_the_bound_tight(machine: Any) -> None:
    """With an exact guide every sample's weight is the likelihood, whatever was sampled."""
    x, params = machine.make_data(0, 6), machine.start(2)
    _put(machine, params)
    exact = float(machine.log_likelihood(params, x))
    elbo = Trace_ELBO(max_plate_nesting=1)
    losses = [-elbo.loss(machine.model, machine.recognize, x) for _ in range(3)]
    assert losses == pytest.approx([exact] * 3, rel=1e-9)
    many = Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    assert -many.loss(machine.model, machine.recognize, x) == pytest.approx(exact, rel=1e-9)
    parts = [-elbo.loss(machine.model, machine.recognize, part) for part in x.split([1, 5])]
    assert sum(parts) == pytest.approx(exact, rel=1e-9)


@_each(HIDING)
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


@_each(HIDING)
def test_recognition_of_other_observations(machine: Any) -> None:
    x, other = machine.make_data(0, 6), machine.make_data(1, 6)
    if isinstance(machine, StateSpace):
        given = {f"x{step}": value for step, value in enumerate(other.unbind(1))}
    else:
        given = dict(zip(machine.observed, other.unbind(1), strict=True))
    expected = trace(machine.recognize).get_trace(other)
    sites = {name: expected.nodes[name]["value"] for name in expected.stochastic_nodes[1:]}
    program = condition(machine.recognize, sites)
    found = trace(program).get_trace(x, observations=given).log_prob_sum()
    torch.testing.assert_close(found, expected.log_prob_sum())
    assert not torch.allclose(trace(program).get_trace(x).log_prob_sum(), found)
    name = list(given)[-1]
    mixed = x.clone()
    mixed[:, -1] = other[:, -1]
    torch.testing.assert_close(
        trace(program).get_trace(x, observations={name: given[name]}).log_prob_sum(),
        trace(program).get_trace(mixed).log_prob_sum(),
    )


@_each(MACHINES)
def test_em_step_by_regression_on_points(machine: Any) -> None:
    """Least squares on a few points per datum that have the moments of the posterior."""
    x, params = machine.make_data(0, 12), machine.start(1)
    whole = _whole(machine, params)
    points = [x.new_zeros(len(x), 0)]
    if whole.hidden:
        points = _draws(whole.posterior(x.flatten(1)))
    hidden, seen = torch.cat(points), x.repeat(len(points), *[1] * (x.dim() - 1))
    if isinstance(machine, StateSpace):
        states = hidden.unflatten(1, (machine.length, machine.num_states))
        expected = _regress_steps(machine, states, seen)
    else:
        values = dict(zip(machine.observed, seen.unbind(1), strict=True))
        expected = _regress_nodes(machine, values | _sites(machine, hidden))
    new = machine.em_step(params, x)
    assert set(new) == set(expected) == set(params)
    for name, value in new.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-7, atol=1e-9)


@_each(MACHINES)
def test_em_never_decreases_the_likelihood(machine: Any) -> None:
    x = machine.make_data(1, 50)
    for seed in range(2):
        start = machine.start(seed)
        params = _climb(machine, start, x, 15)
        assert float(machine.log_likelihood(params, x) - machine.log_likelihood(start, x)) > 1
        for name, value in params.items():
            assert value.shape == start[name].shape
            assert bool(machine.constraints[name].check(value).all())


@pytest.mark.parametrize(
    ("machine", "size", "steps"),
    [(NETWORKS["factor"], 300, 400), (StateSpace(1, 2, 4), 200, 250)],
    ids=["factor", "small"],
)
def test_em_ends_where_the_gradient_vanishes(machine: Any, size: int, steps: int) -> None:
    x = machine.make_data(0, size)
    params = machine.start(1)
    assert _slope(machine, params, x) > 1e-2
    params = _climb(machine, params, x, steps)
    assert _slope(machine, params, x) < 1e-7
    kept = machine.em_step(params, x)
    for name, value in params.items():
        torch.testing.assert_close(kept[name], value, rtol=1e-4, atol=1e-4)


@_each(MACHINES)
def test_single_precision(machine: Any) -> None:
    x, params = machine.make_data(0, 20), machine.start(0)
    exact = float(machine.log_likelihood(params, x))
    step = machine.em_step(params, x)
    torch.set_default_dtype(torch.float32)
    short, start = machine.make_data(0, 20), machine.initial
    torch.testing.assert_close(short, x.float())
    assert {value.dtype for value in (short, *start.values())} == {torch.float32}
    given = {name: value.float() for name, value in params.items()}
    assert float(machine.log_likelihood(given, short)) == pytest.approx(exact, rel=1e-5)
    for name, value in machine.em_step(given, short).items():
        torch.testing.assert_close(value, step[name].float(), rtol=1e-3, atol=1e-4)
    _put(machine, given)
    elbo = Trace_ELBO(max_plate_nesting=1)
    for program, guide in (
        (machine.model, machine.recognize),
        (machine.collapsed, machine.guide),
    ):
        assert -elbo.loss_and_grads(program, guide, short) == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("module", [linear_gaussian, state_space])
def test_zoo_module(module: Any) -> None:
    machine = PATIENTS if module is linear_gaussian else StateSpace()
    state = torch.get_rng_state()
    x = module.make_data(3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, module.make_data(3)) and len(module.make_data(3, 7)) == 7
    assert not torch.equal(x, module.make_data(4))
    assert not list(pyro.get_param_store())
    exact = float(machine.log_likelihood(machine.initial, x))
    loss = Trace_ELBO(max_plate_nesting=1).loss(module.model, module.guide, x)
    assert -loss == pytest.approx(exact, rel=1e-9)
    assert set(pyro.get_param_store()) == set(machine.constraints)
    for name, value in machine.initial.items():
        torch.testing.assert_close(pyro.param(name).detach(), value)


# --- linear Gaussian networks ------------------------------------------------------------------


def _optimum(machine: Any, params: Params, x: Tensor) -> dict[str, Tensor]:
    """The end of a search by gradients, far more exact than EM is in the same time."""
    free = _free(machine, params)
    search = torch.optim.LBFGS(
        list(free.values()), 1.0, 300, line_search_fn="strong_wolfe", tolerance_change=1e-14
    )

    def closure() -> Tensor:
        search.zero_grad()
        loss: Tensor = -machine.log_likelihood(_bound(machine, free), x) / len(x)
        loss.backward()
        return loss

    search.step(closure)
    return {name: value.detach() for name, value in _bound(machine, free).items()}


def test_closed_form_optimum_by_scikit_learn() -> None:
    machine = NETWORKS["visible"]
    x = machine.make_data(0, 60)
    params, best = machine.optimum(x)
    assert list(params) == list(machine.constraints)
    columns = dict(zip(machine.observed, x.cpu().unbind(1), strict=True))
    for node, names in VISIBLE.items():
        bias, errors = columns[node].mean(), columns[node] - columns[node].mean()
        if names:
            features = torch.stack([columns[name] for name in names], 1).numpy()
            fit = LinearRegression().fit(features, columns[node].numpy())
            assert params[f"weight.{node}"].tolist() == pytest.approx(fit.coef_.tolist())
            errors = columns[node] - torch.tensor(fit.predict(features), device="cpu")
            bias = torch.tensor(fit.intercept_)
        assert float(params[f"bias.{node}"]) == pytest.approx(float(bias))
        assert float(params[f"scale.{node}"]) == pytest.approx(float(errors.std(correction=0)))
    assert float(best) == float(machine.log_likelihood(params, x))
    assert _slope(machine, params, x) < 1e-12
    for seed in range(3):
        step = machine.em_step(machine.start(seed), x)
        torch.testing.assert_close(_flat(step), _flat(params))


def test_patients_by_hand() -> None:
    frame = load_diabetes(as_frame=True, scaled=False).frame
    x = linear_gaussian.make_data(0)
    assert x.shape == (442, 9) and PATIENTS.hidden == ("adiposity", "resistance")
    torch.testing.assert_close(x.mean(0), torch.zeros(9))
    torch.testing.assert_close(x.var(0, correction=0), torch.ones(9))
    names = {"pressure": "bp", "hdl": "s3", "ldl": "s2", "triglycerides": "s5", "glucose": "s6"}
    raw = torch.stack(
        [
            torch.tensor(frame[names.get(node, node)].to_numpy(float))
            for node in [*PATIENTS.observed[:-1], "target"]
        ],
        1,
    )
    raw = (raw - raw.mean(0)) / raw.std(0, correction=0)
    distance = torch.cdist(x, raw)
    assert float(distance.min(1).values.max()) < 1e-6
    assert sorted(distance.argmin(1).tolist()) == list(range(442))


def test_optimum_of_the_patients_is_unique_up_to_signs() -> None:
    x = linear_gaussian.make_data(0)
    ends = [_optimum(PATIENTS, PATIENTS.start(seed), x) for seed in range(3)]
    for end in ends:
        assert _slope(PATIENTS, end, x) < 1e-5
        torch.testing.assert_close(_flat(end).abs(), _flat(ends[0]).abs(), rtol=1e-3, atol=1e-3)
        assert min(float(end[f"scale.{node}"]) for node in PATIENTS.observed) > 0.5
    free = _free(PATIENTS, ends[0])
    sizes = [value.numel() for value in free.values()]

    def total(flat: Tensor) -> Tensor:
        parts = flat.split(sizes)
        values = {
            name: part.reshape(value.shape)
            for (name, value), part in zip(free.items(), parts, strict=True)
        }
        return PATIENTS.log_likelihood(_bound(PATIENTS, values), x) / len(x)

    curvature = -torch.autograd.functional.hessian(total, _flat(free).detach())
    assert float(torch.linalg.eigvalsh(curvature)[0]) > 5e-3
    slow = PATIENTS.start(0)
    for _ in range(100):
        slow = PATIENTS.em_step(slow, x)
    gap = PATIENTS.log_likelihood(ends[0], x) - PATIENTS.log_likelihood(slow, x)
    assert 0.05 < float(gap) < 1


def test_signs_of_hidden_nodes_are_free() -> None:
    machine = NETWORKS["graph"]
    x, params = machine.make_data(0, 10), machine.start(0)
    for flipped in itertools.chain(machine.hidden, ["a"]):
        other = dict(params)
        for node, names in machine.parents.items():
            sign = torch.tensor([-1.0 if name == flipped else 1.0 for name in names])
            if names:
                other[f"weight.{node}"] = params[f"weight.{node}"] * (
                    -sign if node == flipped else sign
                )
        gap = machine.log_likelihood(other, x) - machine.log_likelihood(params, x)
        assert (abs(float(gap)) < 1e-10) == (flipped in machine.hidden)


def test_order_of_nodes() -> None:
    machine = NETWORKS["graph"]
    assert machine.observed == ("x", "a", "y", "z", "u", "v")
    assert sorted(machine.order) == sorted(GRAPH) and set(machine.hidden) == {"top", "h", "loose"}
    for node, names in GRAPH.items():
        assert all(machine.order.index(name) < machine.order.index(node) for name in names)
    assert machine.order == LinearGaussianNetwork(GRAPH, machine.hidden).order


def test_shapes_of_a_network() -> None:
    machine = NETWORKS["graph"]
    x = machine.make_data(0, 7)
    guide = trace(machine.recognize).get_trace(x)
    model = trace(replay(machine.model, guide)).get_trace(x)
    model.compute_log_prob()
    assert sorted(model.stochastic_nodes) == ["data", "h", "loose", "top"]
    assert sorted(model.observation_nodes) == sorted(machine.observed)
    assert all(model.nodes[name]["value"].shape == (7,) for name in GRAPH)
    assert all(model.nodes[name]["log_prob"].shape == (7,) for name in GRAPH)
    assert set(model.param_nodes) == set(machine.constraints)
    assert pyro.param("weight.z").shape == (3,) and pyro.param("bias.z").shape == ()
    assert not {"bias.h", "scale.h", "weight.top", "weight.a"} & set(machine.constraints)
    collapsed = trace(machine.collapsed).get_trace(x)
    collapsed.compute_log_prob()
    assert collapsed.nodes["x"]["log_prob"].shape == (7,)
    assert set(collapsed.param_nodes) == set(machine.constraints)


def test_little_noise_in_a_network() -> None:
    machine = NETWORKS["factor"]
    x, params = machine.make_data(0, 10), machine.start(0)
    params |= {name: 1e-4 * params[name] for name in params if name.startswith("scale.")}
    _put(machine, params)
    exact = float(machine.log_likelihood(params, x))
    loss = Trace_ELBO(max_plate_nesting=1).loss(machine.model, machine.recognize, x)
    assert -loss == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize(
    ("parents", "hidden", "message"),
    [
        ({"a": ("b",)}, (), "parents of a are not in the graph"),
        ({"a": ("b", "b"), "b": ()}, (), "a has a parent twice"),
        ({"a": ("b",), "b": ("a",)}, (), "has a cycle"),
        ({"a": ("a",)}, (), "has a cycle"),
        ({"a": ()}, ("b",), "hidden nodes are not in the graph"),
        ({"a": ()}, ("a",), "at least one node must be observed"),
        ({}, (), "at least one node must be observed"),
        ({"data": ()}, (), "may not have the names"),
        ({"a": ("b",), "b": (), "weight.a": ()}, (), "may not have the names"),
    ],
)
def test_bad_networks(parents: Any, hidden: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LinearGaussianNetwork(parents, hidden)


def test_bad_arguments_of_networks() -> None:
    with pytest.raises(ValueError, match="without hidden nodes only"):
        PATIENTS.optimum(torch.zeros(4, 9))
    for x in (torch.zeros(9), torch.zeros(4, 8), torch.zeros(4, 11)):
        for function in (PATIENTS.model, PATIENTS.collapsed, PATIENTS.recognize):
            with pytest.raises(ValueError, match=r"have shape \[batch, 9\]"):
                function(x)
        for referee in (PATIENTS.log_likelihood, PATIENTS.em_step):
            with pytest.raises(ValueError, match=r"have shape \[batch, 9\]"):
                referee(PATIENTS.initial, x)
    for size in (0, 443):
        with pytest.raises(ValueError, match="442 patients"):
            linear_gaussian.make_data(0, size)


# --- state space models ------------------------------------------------------------------------


def test_the_truth_is_a_damped_rotation() -> None:
    for seed in range(5):
        truth = StateSpace().truth(seed)
        values = torch.linalg.eigvals(truth["transition"])
        torch.testing.assert_close(values.abs(), torch.full((2,), 0.9))
        assert bool((values.angle().abs() > 0.24).all() and (values.angle().abs() < 0.76).all())
        assert float(truth["initial"].norm()) == pytest.approx(2)
    wide = StateSpace(4, 3, 5).truth(0)["transition"]
    torch.testing.assert_close(wide @ wide.T, 0.81 * torch.eye(4))


def test_coordinates_of_the_state_are_free_up_to_a_rotation() -> None:
    machine = StateSpace(3, 2, 5)
    x, params = machine.make_data(0, 10), machine.start(0)
    turn = torch.linalg.qr(torch.randn(3, 3)).Q
    turned = {
        "initial": turn @ params["initial"],
        "transition": turn @ params["transition"] @ turn.T,
        "emission": params["emission"] @ turn.T,
        "scale": params["scale"],
    }
    exact = machine.log_likelihood(params, x)
    torch.testing.assert_close(machine.log_likelihood(turned, x), exact, rtol=1e-12, atol=0)
    stretched = params | {"initial": 2 * params["initial"], "emission": params["emission"] / 2}
    assert abs(float(machine.log_likelihood(stretched, x) - exact)) > 1


def test_rank_of_the_information() -> None:
    """Scores of single sequences span all directions but the rotation of two states."""
    machine = StateSpace()
    truth = machine.truth(0)
    x = machine.make_data(0, 40)
    scores = torch.stack([_flat(_gradient(machine, truth, row[None])) for row in x])
    values = torch.linalg.svdvals(scores)
    assert len(values) == 15
    assert float(values[13] / values[0]) > 1e-3
    assert float(values[14] / values[0]) < 1e-12


def test_overlap_of_noise_makes_em_slow() -> None:
    machine = StateSpace()
    x = state_space.make_data(0)
    params = machine.start(0)
    for _ in range(40):
        params = machine.em_step(params, x)
    best = _optimum(machine, params, x)
    assert _slope(machine, best, x) < 1e-5
    gap = machine.log_likelihood(best, x) - machine.log_likelihood(params, x)
    assert 0.5 < float(gap) < 20
    assert float(machine.log_likelihood(best, x) - machine.log_likelihood(machine.truth(0), x)) > 0


def test_long_sequences() -> None:
    machine = StateSpace(2, 3, 100)
    x = machine.make_data(0, 3)
    params = machine.truth(0)
    _put(machine, params)
    exact = float(machine.log_likelihood(params, x))
    elbo = Trace_ELBO(max_plate_nesting=1)
    assert -elbo.loss(machine.collapsed, machine.guide, x) == pytest.approx(exact, rel=1e-9)
    assert -elbo.loss(machine.model, machine.recognize, x) == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("noise", [1e-4, 1e4])
def test_little_and_much_noise(noise: float) -> None:
    machine = StateSpace()
    x, params = machine.make_data(0, 5), machine.start(0)
    params["scale"] = noise * params["scale"]
    _put(machine, params)
    exact = float(machine.log_likelihood(params, x))
    dense = _whole(machine, params).visible().log_prob(x.flatten(1)).sum()
    assert float(dense) == pytest.approx(exact, rel=1e-6)
    loss = Trace_ELBO(max_plate_nesting=1).loss(machine.model, machine.recognize, x)
    assert -loss == pytest.approx(exact, rel=1e-9)


def test_shapes_of_a_system() -> None:
    machine = StateSpace(2, 3, 4)
    x = machine.make_data(0, 7)
    assert x.shape == (7, 4, 3)
    guide = trace(machine.recognize).get_trace(x)
    model = trace(replay(machine.model, guide)).get_trace(x)
    model.compute_log_prob()
    assert model.stochastic_nodes == ["data", *(f"z{step}" for step in range(4))]
    assert model.observation_nodes == [f"x{step}" for step in range(4)]
    assert all(model.nodes[f"z{step}"]["value"].shape == (7, 2) for step in range(4))
    for kind, step in itertools.product("xz", range(4)):
        assert model.nodes[f"{kind}{step}"]["log_prob"].shape == (7,)
    shapes = {name: tuple(pyro.param(name).shape) for name in machine.constraints}
    assert shapes == {"initial": (2,), "transition": (2, 2), "emission": (3, 2), "scale": (3,)}
    collapsed = trace(machine.collapsed).get_trace(x)
    collapsed.compute_log_prob()
    assert collapsed.nodes["x"]["log_prob"].shape == (7,)
    assert set(collapsed.param_nodes) == set(model.param_nodes) == set(shapes)


def test_bad_arguments_of_systems() -> None:
    for sizes in ((0, 3, 5), (2, 0, 5), (2, 3, 1)):
        with pytest.raises(ValueError, match="at least 1 state"):
            StateSpace(*sizes)
    machine = StateSpace()
    for x in (torch.zeros(12, 3), torch.zeros(4, 11, 3), torch.zeros(4, 12, 2)):
        for function in (machine.model, machine.collapsed, machine.recognize):
            with pytest.raises(ValueError, match=r"have shape \[batch, 12, 3\]"):
                function(x)
        for referee in (machine.log_likelihood, machine.em_step):
            with pytest.raises(ValueError, match=r"have shape \[batch, 12, 3\]"):
                referee(machine.initial, x)
