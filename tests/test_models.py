"""Tests of the models, their data and their referees."""

import ast
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.poutine import replay, trace
from torch import Tensor

from models import bars, helmholtz, shifter
from models.helmholtz import Helmholtz

MODELS = Path(helmholtz.__file__).parent


@pytest.fixture(autouse=True)
def _fresh_store() -> Iterator[None]:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    pyro.clear_param_store()


def _random_machine(sizes: tuple[int, ...], scale: float = 1.5) -> Helmholtz:
    """A machine whose parameters, biases included, are far from zero."""
    machine = Helmholtz(sizes)
    x = torch.zeros(2, sizes[0])
    machine.model(x)
    machine.guide(x)
    with torch.no_grad():
        for value in pyro.get_param_store().values():
            value.copy_(scale * torch.randn_like(value))
    return machine


def _brute_force(x: list[float], sizes: tuple[int, ...]) -> float:
    """Log p(x) by a plain loop over all joint hidden states, in nats."""
    params = {name: value.tolist() for name, value in pyro.get_param_store().items()}

    def probability(values: tuple[float, ...], logits: list[float]) -> float:
        result = 1.0
        for value, logit in zip(values, logits, strict=True):
            on = 1 / (1 + math.exp(-logit))
            result *= on if value else 1 - on
        return result

    total = 0.0
    for state in itertools.product(*(itertools.product((0.0, 1.0), repeat=n) for n in sizes[1:])):
        layers = [tuple(x), *state]
        joint = probability(layers[-1], params["top.bias"])
        for level in range(1, len(sizes)):
            weight, bias = params[f"layer{level}.weight"], params[f"layer{level}.bias"]
            logits = [
                b + sum(w * h for w, h in zip(row, layers[level], strict=True))
                for row, b in zip(weight, bias, strict=True)
            ]
            joint *= probability(layers[level - 1], logits)
        total += joint
    return math.log(total)


@pytest.mark.parametrize("sizes", [(3, 4), (4, 3, 2), (3, 2, 3, 2)])
def test_exact_agrees_with_brute_force(
    sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(helmholtz, "_CHUNK_ELEMENTS", 40)
    machine = _random_machine(sizes)
    x = torch.tensor(list(itertools.product((0.0, 1.0), repeat=sizes[0])))
    exact = machine.exact_log_likelihood(x)
    slow = torch.tensor([_brute_force(row, sizes) for row in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(exact, slow, rtol=0, atol=1e-10)
    assert float(exact.exp().sum()) == pytest.approx(1, abs=1e-10)


def test_exact_refuses_too_many_states() -> None:
    machine = Helmholtz((4, 12, 9))
    with pytest.raises(ValueError, match="2097152 hidden states"):
        machine.exact_log_likelihood(torch.zeros(1, 4))


def test_importance_agrees_with_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(helmholtz, "_CHUNK_ELEMENTS", 3000)
    machine = _random_machine((6, 4, 3), scale=0.4)
    x = torch.bernoulli(torch.full((8, 6), 0.5))
    likelihood = machine.exact_log_likelihood(x).exp()
    estimates = torch.stack([
        machine.importance_log_likelihood(x, 2000, seed).double().exp() for seed in range(64)
    ])
    # The weights are mild here, so that the mean of 64 estimates is close to normal.
    z_score = (estimates.mean(0) - likelihood) / (estimates.std(0) / math.sqrt(64))
    assert float(z_score.abs().max()) < 4
    assert float((estimates.std(0) / likelihood).max()) < 0.1


def test_importance_leaves_the_random_state_alone() -> None:
    machine = _random_machine((6, 4, 3))
    x = torch.zeros(5, 6)
    before = torch.get_rng_state()
    first = machine.importance_log_likelihood(x, 50, seed=1)
    machine.sample(3, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(machine.importance_log_likelihood(x, 50, seed=1), first)
    assert not torch.equal(machine.importance_log_likelihood(x, 50, seed=2), first)


def test_samples_follow_the_exact_distribution() -> None:
    machine = _random_machine((3, 3, 2))
    means, values = machine.sample(20_000, seed=3)
    assert means.shape == values.shape == (20_000, 3)
    states = torch.tensor(list(itertools.product((0.0, 1.0), repeat=3)))
    probability = machine.exact_log_likelihood(states).exp()
    frequency = (values[:, None] == states).all(-1).double().mean(0)
    z_score = (frequency - probability) / (probability * (1 - probability) / 20_000).sqrt()
    assert float(z_score.abs().max()) < 4
    torch.testing.assert_close(means.mean(0), values.mean(0), rtol=0, atol=0.02)


def test_initial_parameters() -> None:
    mean = torch.tensor([0.0, 0.25, 0.5, 1.0])
    machine = Helmholtz((4, 3, 2), visible_mean=mean)
    machine.model(torch.zeros(2, 4))
    machine.guide(torch.zeros(2, 4))
    shapes = {name: tuple(value.shape) for name, value in pyro.get_param_store().items()}
    assert shapes == {
        "top.bias": (2,),
        "layer1.weight": (4, 3),
        "layer1.bias": (4,),
        "layer2.weight": (3, 2),
        "layer2.bias": (3,),
        "recognition1.weight": (3, 4),
        "recognition1.bias": (3,),
        "recognition2.weight": (2, 3),
        "recognition2.bias": (2,),
    }
    torch.testing.assert_close(
        pyro.param("layer1.bias").detach().sigmoid(), torch.tensor([0.02, 0.25, 0.5, 0.98])
    )
    assert float(pyro.param("layer2.bias").detach().abs().max()) == 0


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="hidden layer"):
        Helmholtz((4,))
    with pytest.raises(ValueError, match="hidden layer"):
        Helmholtz((4, 0))
    with pytest.raises(ValueError, match="visible_mean"):
        Helmholtz((4, 2), visible_mean=torch.zeros(3))


def test_the_seed_decides_the_initial_parameters() -> None:
    def weights(seed: int) -> Tensor:
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        Helmholtz((4, 3)).model(torch.zeros(2, 4))
        result: Tensor = pyro.param("layer1.weight").detach().clone()
        return result

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_trace_shapes() -> None:
    machine = Helmholtz((5, 4, 3))
    x = torch.zeros(7, 5)
    guide_trace = trace(machine.guide).get_trace(x)
    model_trace = trace(replay(machine.model, guide_trace)).get_trace(x)
    assert guide_trace.stochastic_nodes == ["data", "h1", "h2"]
    assert model_trace.stochastic_nodes == ["data", "h2", "h1"]
    assert model_trace.observation_nodes == ["x"]
    model_trace.compute_log_prob()
    for site, shape in (("h2", (7, 3)), ("h1", (7, 4)), ("x", (7, 5))):
        assert model_trace.nodes[site]["value"].shape == shape
        assert model_trace.nodes[site]["log_prob"].shape == (7,)


def test_vectorized_particles() -> None:
    machine = Helmholtz((5, 4, 3))
    x = torch.bernoulli(torch.full((7, 5), 0.5))
    elbo = Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    assert math.isfinite(elbo.loss(machine.model, machine.guide, x))
    with pyro.plate("particles", 3, dim=-2):
        guide_trace = trace(machine.guide).get_trace(x)
        model_trace = trace(replay(machine.model, guide_trace)).get_trace(x)
    model_trace.compute_log_prob()
    for site, shape in (("h2", (3, 7, 3)), ("h1", (3, 7, 4))):
        assert model_trace.nodes[site]["value"].shape == shape
    for site in ("h2", "h1", "x"):
        assert model_trace.nodes[site]["log_prob"].shape == (3, 7)


@pytest.mark.parametrize("module", [helmholtz, bars, shifter])
def test_zoo_module(module: object) -> None:
    model: Callable[[Tensor], None] = module.model  # type: ignore[attr-defined]
    guide: Callable[[Tensor], None] = module.guide  # type: ignore[attr-defined]
    make_data: Callable[[int], Tensor] = module.make_data  # type: ignore[attr-defined]
    state = torch.get_rng_state()
    x = make_data(3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, make_data(3))
    assert not torch.equal(x, make_data(4))
    assert not list(pyro.get_param_store())
    assert bool(((x == 0) | (x == 1)).all())
    assert math.isfinite(Trace_ELBO(max_plate_nesting=1).loss(model, guide, x))


@pytest.mark.parametrize(
    ("kind", "num_states", "nats"), [("hinton", 30, 2.3764), ("kirby", 12, 2.4283)]
)
def test_bars_states_and_entropy(kind: bars.Kind, num_states: int, nats: float) -> None:
    patterns, probabilities = bars.states(kind)
    assert patterns.shape[0] == probabilities.shape[0] == num_states
    assert torch.unique(patterns, dim=0).shape[0] == num_states
    assert float(probabilities.sum()) == pytest.approx(1, abs=1e-12)
    assert round(bars.entropy(kind), 4) == nats


@pytest.mark.parametrize("kind", ["hinton", "kirby"])
def test_bars_data_follow_the_states(kind: bars.Kind) -> None:
    patterns, probabilities = bars.states(kind)
    x = bars.make_data(0, 5000, kind)
    frequency = (x[:, None] == patterns).all(-1).double().mean(0)
    assert float(frequency.sum()) == pytest.approx(1)
    z_score = (frequency - probabilities) / (probabilities * (1 - probabilities) / 5000).sqrt()
    assert float(z_score.abs().max()) < 4


@pytest.mark.parametrize("kind", ["hinton", "kirby"])
def test_kl_from_truth(kind: bars.Kind) -> None:
    machine = bars.machine(kind)
    patterns, probabilities = bars.states(kind)
    pixels = patterns.shape[1]
    with torch.no_grad():
        pyro.param("layer1.weight", torch.zeros(pixels, machine.sizes[1]))
    divergence = bars.kl_from_truth(machine, kind)
    assert divergence == pytest.approx(pixels * math.log(2) - bars.entropy(kind), abs=1e-6)
    assert float(probabilities @ (patterns.sum(-1) / pixels).double()) == pytest.approx(
        0.2 if kind == "hinton" else 0.5
    )


def test_unknown_bars_are_refused() -> None:
    with pytest.raises(ValueError, match="kind must be"):
        bars.states("diagonal")  # type: ignore[arg-type]


@pytest.mark.parametrize("path", sorted(MODELS.rglob("*.py")), ids=lambda path: path.name)
def test_models_are_plain_pyro(path: Path) -> None:
    imported: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module or "")
    assert not {name for name in imported if name.split(".")[0] == "pyronat"}
