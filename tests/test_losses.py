"""Every stock ELBO trains under `NaturalSVI`, and its posterior weights are the exact ones."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.contrib.gp.kernels import RBF
from pyro.infer import (
    JitTrace_ELBO,
    JitTraceEnum_ELBO,
    JitTraceGraph_ELBO,
    JitTraceMeanField_ELBO,
    RenyiELBO,
    Trace_ELBO,
    Trace_MMD,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    TraceTailAdaptive_ELBO,
    TraceTMC_ELBO,
    config_enumerate,
)
from pyro.infer import ReweightedWakeSleep as StockRWS
from torch import Tensor

import pyronat
from pyronat import Euclidean, Full, NaturalGradient, NaturalSVI, ReweightedWakeSleep
from pyronat.errors import NoGuideOnDreams, UnsupportedProgram
from pyronat.steps import ConstantDamping, RunningAverage

Program = Callable[..., Any]
EXACT = 1e-10


def randn(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def param(name: str, seed: int, *shape: int) -> Tensor:
    return pyro.param(name, lambda: randn(seed, *shape))


X = randn(1, 30) * 2 + 1
MIXED = torch.cat([randn(2, 20) - 3, randn(3, 10) + 3])
COUNTS = torch.tensor([1, 0, 1, 1, 0])


# --- programs ----------------------------------------------------------------------------------


def gaussian(x: Tensor) -> None:
    loc = pyro.param("loc", lambda: torch.tensor(4.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def gaussian_guide(x: Tensor) -> None:
    weight, bias = param("q.w", 11, 1, 1), param("q.b", 12, 1)
    scale = pyro.param("q.s", lambda: torch.tensor(0.0)).exp()
    with pyro.plate("data", len(x)):
        loc = torch.nn.functional.linear(x.unsqueeze(-1), weight, bias).squeeze(-1)
        pyro.sample("z", dist.Normal(loc, scale))


def mixture(x: Tensor) -> None:
    """Categorical z, table of means, unit variance; θ of the emission depends on z."""
    logits, means = param("logits", 1, 2), param("means", 2, 2)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(logits=logits))
        pyro.sample("x", dist.Normal(means[z], 1.0), obs=x)


def mixture_guide(x: Tensor) -> None:
    slope, bias = param("q.w", 11, 2), param("q.b", 12, 2)
    with pyro.plate("data", x.shape[-1]):
        pyro.sample("z", dist.Categorical(logits=x.unsqueeze(-1) * slope + bias))


def no_guide(x: Tensor) -> None:
    pass


def markov(x: Tensor) -> None:
    initial, transition = param("initial", 1, 2), param("transition", 2, 2, 2)
    emission = param("emission", 3, 2)
    z = None
    for time in pyro.markov(range(len(x))):
        logits = initial if z is None else transition[z]
        z = pyro.sample(f"z{time}", dist.Categorical(logits=logits))
        pyro.sample(f"x{time}", dist.Bernoulli(logits=emission[z]), obs=x[time])


def markov_guide(x: Tensor) -> None:
    q_initial, q_transition = param("q.initial", 11, 2), param("q.transition", 12, 2, 2)
    z = None
    for time in pyro.markov(range(len(x))):
        logits = q_initial if z is None else q_transition[z]
        z = pyro.sample(f"z{time}", dist.Categorical(logits=logits))


def enumerated(program: Program, how: str = "parallel") -> Program:
    return config_enumerate(program, default=how)


TRAINED: dict[str, tuple[Any, Program, Program, Tensor]] = {
    "Trace, 1 particle": (Trace_ELBO(), gaussian, gaussian_guide, X),
    "Trace, 4 particles": (Trace_ELBO(num_particles=4), gaussian, gaussian_guide, X),
    "Trace, 4 vectorized": (
        Trace_ELBO(num_particles=4, vectorize_particles=True),
        gaussian,
        gaussian_guide,
        X,
    ),
    "Trace, discrete": (Trace_ELBO(num_particles=4), mixture, mixture_guide, MIXED),
    "TraceGraph": (TraceGraph_ELBO(num_particles=2), mixture, mixture_guide, MIXED),
    "TraceMeanField": (TraceMeanField_ELBO(), gaussian, gaussian_guide, X),
    "Renyi": (RenyiELBO(alpha=0.3, num_particles=4), gaussian, gaussian_guide, X),
    "Renyi, vectorized": (
        RenyiELBO(alpha=0.3, num_particles=4, vectorize_particles=True),
        gaussian,
        gaussian_guide,
        X,
    ),
    "TraceEnum, model": (TraceEnum_ELBO(), enumerated(mixture), no_guide, MIXED),
    "TraceEnum, guide": (TraceEnum_ELBO(), mixture, enumerated(mixture_guide), MIXED),
    "TraceEnum, sequential": (
        TraceEnum_ELBO(),
        mixture,
        enumerated(mixture_guide, "sequential"),
        MIXED[[0, 1, 20]],
    ),
    "TraceEnum, markov": (TraceEnum_ELBO(), enumerated(markov), no_guide, COUNTS.double()),
    "TraceEnum, particles": (
        TraceEnum_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1),
        mixture,
        enumerated(mixture_guide),
        MIXED,
    ),
    "RWS": (ReweightedWakeSleep(5), gaussian, gaussian_guide, X),
    "RWS, asleep": (ReweightedWakeSleep(5, insomnia=0.5), mixture, mixture_guide, MIXED),
}


@pytest.mark.parametrize("guide_geometry", [Full(), Euclidean()], ids=["natural", "adam"])
@pytest.mark.parametrize("name", TRAINED)
def test_every_loss_trains(name: str, guide_geometry: Any) -> None:
    loss, model, guide, x = TRAINED[name]
    optim = NaturalGradient(lr=0.1, guide_geometry=guide_geometry)
    svi = NaturalSVI(model, guide, optim, loss)
    losses = []
    for _ in range(40):
        losses.append(svi.step(x))
        assert svi.info.accepted
    assert all(isinstance(value, float) for value in losses)
    # Negative control: the same program that is not trained.
    pyro.clear_param_store()
    still = [svi_loss(loss, model, guide, x) for _ in range(10)]
    gain = sum(still) / 10 - sum(losses[-10:]) / 10
    assert gain > 0.02 * len(x), f"the loss fell by only {gain} nats"


def svi_loss(loss: Any, model: Program, guide: Program, x: Tensor) -> float:
    value = loss.loss(model, guide, x)
    return float(value)


# --- exact weights -----------------------------------------------------------------------------


def matrices(
    loss: Any,
    model: Program,
    guide: Program,
    x: Any,
    role: str = "model",
    guide_geometry: Any = None,
) -> dict[str, Tensor]:
    """Curvature of every block `[count, size, size]` as one step on the loss measures it."""
    args = x if isinstance(x, tuple) else (x,)
    optim = NaturalGradient(
        lr=0.0,
        geometry=Full("posterior"),
        guide_geometry=guide_geometry or Full(),
        damping=ConstantDamping(1.0),
        curvature=RunningAverage(decay=0.0, refresh=1),
    )
    svi = NaturalSVI(model, guide, optim, loss)
    svi.step(*args)
    assert svi.info.accepted
    average = optim.sides[role].average
    assert all(curvature.matrix is not None for curvature in average.values())
    return {name: torch.block_diag(*curvature.matrix)[None] for name, curvature in average.items()}


def categorical_fisher(logits: Tensor) -> Tensor:
    p = logits.detach().softmax(-1)
    return torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)


def diagonal(weights: Tensor) -> Tensor:
    return torch.diag_embed(weights)


def values(*names: str) -> list[Tensor]:
    return [pyro.param(name).detach() for name in names]


def mixture_joint(x: Tensor) -> Tensor:
    logits, means = values("logits", "means")
    emission = dist.Normal(means, 1.0).log_prob(x.unsqueeze(-1))
    return logits.log_softmax(-1) + emission


ENUMERATIONS: dict[str, tuple[Program, Program]] = {
    "model": (enumerated(mixture), no_guide),
    "guide": (mixture, enumerated(mixture_guide)),
    "sequential": (mixture, enumerated(mixture_guide, "sequential")),
}


@pytest.mark.parametrize("how", ENUMERATIONS)
def test_enumerated_mixture_has_the_exact_responsibilities(how: str) -> None:
    x = MIXED[[0, 1, 2, 20]] / 3
    found = matrices(TraceEnum_ELBO(max_plate_nesting=1), *ENUMERATIONS[how], x)
    posterior = mixture_joint(x).softmax(-1)
    if how != "model":
        slope, bias = values("q.w", "q.b")
        proposal = (x.unsqueeze(-1) * slope + bias).softmax(-1)
        assert float((proposal - posterior).abs().max()) > 0.05
        posterior = proposal  # the ELBO's gradient counts the guide's probabilities
    expected = diagonal(posterior.sum(0))
    assert torch.allclose(found["means"][0], expected, rtol=0, atol=EXACT)
    prior = len(x) * categorical_fisher(values("logits")[0])
    assert torch.allclose(found["logits"][0], prior, rtol=0, atol=EXACT)
    # Negative control: equal weights.
    assert not torch.allclose(found["means"][0], len(x) * torch.eye(2) / 2, atol=1e-2)


@pytest.mark.parametrize("how", ["guide", "sequential"])
def test_enumerated_guide_is_measured_with_its_own_probabilities(how: str) -> None:
    x = MIXED[[0, 1, 2, 20]] / 3
    model, guide = ENUMERATIONS[how]
    found = matrices(TraceEnum_ELBO(max_plate_nesting=1), model, guide, x, "guide")
    slope, bias = values("q.w", "q.b")
    expected = torch.zeros(4, 4)
    for datum in x:
        fisher = categorical_fisher(datum * slope + bias)
        jacobian = torch.cat([torch.eye(2), datum * torch.eye(2)], 1)  # q.b, q.w
        expected += jacobian.T @ fisher @ jacobian
    (matrix,) = found.values()
    assert torch.allclose(matrix[0], expected, rtol=0, atol=EXACT)


def sequences(length: int) -> list[tuple[int, ...]]:
    return list(itertools.product(range(2), repeat=length))


def chain_log_prob(z: tuple[int, ...], initial: Tensor, transition: Tensor) -> Tensor:
    log_prob = initial.log_softmax(-1)[z[0]]
    for before, after in itertools.pairwise(z):
        log_prob = log_prob + transition.log_softmax(-1)[before, after]
    return log_prob


def test_markov_model_has_the_exact_posterior_marginals() -> None:
    x = COUNTS.double()
    found = matrices(TraceEnum_ELBO(max_plate_nesting=0), enumerated(markov), no_guide, x)
    initial, transition, emission = values("initial", "transition", "emission")
    log_joint = []
    for z in sequences(len(x)):
        fn = dist.Bernoulli(logits=emission[torch.tensor(z)])
        log_joint.append(chain_log_prob(z, initial, transition) + fn.log_prob(x).sum())
    posterior = torch.stack(log_joint).softmax(0)
    visits, leaves = torch.zeros(2), torch.zeros(2)
    for weight, z in zip(posterior, sequences(len(x)), strict=True):
        for time, state in enumerate(z):
            visits[state] += weight
            leaves[state] += weight if time + 1 < len(x) else 0.0
    p = emission.sigmoid()
    assert torch.allclose(found["emission"][0], diagonal(visits * p * (1 - p)), atol=EXACT)
    blocks = [leaves[i] * categorical_fisher(transition[i]) for i in range(2)]
    assert torch.allclose(found["transition"][0], torch.block_diag(*blocks), atol=EXACT)
    assert torch.allclose(found["initial"][0], categorical_fisher(initial), atol=EXACT)


@pytest.mark.parametrize("how", ["parallel", "sequential"])
def test_markov_guide_is_measured_with_its_own_marginals(how: str) -> None:
    """A chain of enumerated sites: the weight of a state is its marginal, over all earlier ones."""
    x = COUNTS.double()
    guide = enumerated(markov_guide, how)
    found = matrices(TraceEnum_ELBO(max_plate_nesting=0), markov, guide, x, "guide")
    initial, transition = values("q.initial", "q.transition")
    marginal = initial.softmax(-1)
    expected = torch.zeros(2, 2, 2)
    for _ in range(len(x) - 1):
        expected += marginal[:, None, None] * categorical_fisher(transition)
        marginal = marginal @ transition.softmax(-1)
    assert torch.allclose(found["q.initial"][0], categorical_fisher(initial), atol=EXACT)
    assert torch.allclose(found["q.transition"][0], torch.block_diag(*expected), atol=EXACT)


@pytest.mark.parametrize("how", ["parallel", "sequential"])
def test_a_plated_guide_site_below_a_global_one_has_its_marginals(how: str) -> None:
    x = torch.tensor([0.5, -1.0])

    def joint(x: Tensor) -> None:
        g = pyro.sample("g", dist.Categorical(logits=param("logits", 1, 2)))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(logits=param("table", 2, 2, 2)[g]))
            pyro.sample("x", dist.Normal(param("means", 3, 2)[z], 1.0), obs=x)

    def guide(x: Tensor) -> None:
        g = pyro.sample("g", dist.Categorical(logits=param("q.g", 11, 2)))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Categorical(logits=param("q.z", 12, 2, 2)[g]))

    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    found = matrices(elbo, joint, enumerated(guide, how), x, "guide")
    q_g, q_z = values("q.g", "q.z")
    blocks = len(x) * q_g.softmax(-1)[:, None, None] * categorical_fisher(q_z)
    assert torch.allclose(found["q.z"][0], torch.block_diag(*blocks), rtol=0, atol=EXACT)
    assert torch.allclose(found["q.g"][0], categorical_fisher(q_g), rtol=0, atol=EXACT)


def recorded(loss: Any, name: str) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Receives (value, log p, log q) of the latent site in every pair of traces."""
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    original = type(loss)._get_trace

    class Watched(type(loss)):
        def _get_trace(self, *args: Any) -> Any:
            model, guide = original(self, *args)
            model.compute_log_prob()
            guide.compute_log_prob()
            p, q = (sum_of(trace).detach() for trace in (model, guide))
            found.append((model.nodes[name]["value"].detach(), p, q))
            return model, guide

    loss.__class__ = Watched
    return found


def sum_of(trace: poutine.Trace) -> Tensor:
    parts = [site["log_prob"] for site in trace.nodes.values() if is_scored(site)]
    return torch.stack(torch.broadcast_tensors(*parts)).sum(0)


def is_scored(site: Mapping[str, Any]) -> bool:
    return site["type"] == "sample" and type(site["fn"]).__name__ != "_Subsample"


@pytest.mark.parametrize("vectorized", [False, True])
@pytest.mark.parametrize("kind", ["trace", "graph", "renyi", "rws"])
def test_particles_count_as_their_normalized_weights(kind: str, vectorized: bool) -> None:
    x = MIXED[[0, 1, 2, 20]] / 9
    options = {"num_particles": 5, "vectorize_particles": vectorized, "max_plate_nesting": 1}
    loss: Any = {
        "trace": lambda: Trace_ELBO(**options),
        "graph": lambda: TraceGraph_ELBO(**options),
        "renyi": lambda: RenyiELBO(alpha=0.3, **options),
        "rws": lambda: ReweightedWakeSleep(**options),
    }[kind]()
    seen = recorded(loss, "z")
    found = matrices(loss, mixture, mixture_guide, x)
    # The first evaluation may have been repeated once its structure was known.
    seen = seen[-(1 if vectorized else 5) :]
    z, log_p, log_q = (torch.stack(part).reshape(5, -1) for part in zip(*seen, strict=True))
    assert (z != z[:1]).any(), "the draws do not tell weights apart"
    log_weights = log_p - log_q
    if kind == "rws":
        weights = log_weights.softmax(0)
    elif kind == "renyi":
        weights = (0.7 * log_weights).softmax(0)
    else:
        weights = torch.full_like(log_weights, 1 / 5)
    expected = torch.stack([(weights * (z == state)).sum() for state in range(2)])
    assert torch.allclose(found["means"][0], diagonal(expected), rtol=0, atol=EXACT)
    prior = len(x) * categorical_fisher(values("logits")[0])
    assert torch.allclose(found["logits"][0], prior, rtol=0, atol=EXACT)
    if kind in {"rws", "renyi"}:
        uniform = torch.stack([(z == state).sum() / 5 for state in range(2)])
        assert not torch.allclose(found["means"][0], diagonal(uniform), atol=1e-2)


def test_mean_field_measures_the_prior_although_its_divergence_is_analytic() -> None:
    found = matrices(TraceMeanField_ELBO(num_particles=3), gaussian, gaussian_guide, X)
    assert torch.allclose(found["loc"], torch.tensor([[[float(len(X))]]]))


@pytest.mark.parametrize("full", [6, 60])
def test_weights_hold_subsampling_and_masks(full: int) -> None:
    def masked(x: Tensor, seen: Tensor) -> None:
        logits, means = param("logits", 1, 2), param("means", 2, 2)
        with pyro.plate("data", full, subsample=torch.arange(6)):
            z = pyro.sample("z", dist.Categorical(logits=logits))
            with poutine.mask(mask=seen):
                pyro.sample("x", dist.Normal(means[z], 1.0), obs=x)

    x, seen = MIXED[:6] / 3, torch.tensor([True, False, True, True, False, True])

    def empty(x: Tensor, seen: Tensor) -> None:
        pass

    found = matrices(TraceEnum_ELBO(max_plate_nesting=1), enumerated(masked), empty, (x, seen))
    posterior = mixture_joint(x).softmax(-1)
    expected = (full / 6) * diagonal(posterior[seen].sum(0))
    assert torch.allclose(found["means"][0], expected, rtol=0, atol=1e-9)
    prior = full * categorical_fisher(values("logits")[0])
    assert torch.allclose(found["logits"][0], prior, rtol=0, atol=1e-9)


# --- the metric does not depend on the loss -----------------------------------------------------


def weighted(x: Tensor) -> None:
    """Half of the plate, log-probabilities scaled by 0.5, one datum masked."""
    loc = pyro.param("loc", lambda: torch.tensor(4.0))
    with pyro.plate("data", 8, subsample=torch.arange(4)), poutine.scale(scale=0.5):
        with poutine.mask(mask=torch.tensor([True, True, False, True])):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def weighted_guide(x: Tensor) -> None:
    weight, bias = param("q.w", 11, 1, 1), param("q.b", 12, 1)
    with pyro.plate("data", 8, subsample=torch.arange(4)), poutine.scale(scale=0.5):
        with poutine.mask(mask=torch.tensor([True, True, False, True])):
            loc = torch.nn.functional.linear(x.unsqueeze(-1), weight, bias).squeeze(-1)
            pyro.sample("z", dist.Normal(loc, 0.5))


CONTINUOUS: dict[str, Callable[[], Any]] = {
    "Trace": Trace_ELBO,
    "Trace, particles": lambda: Trace_ELBO(num_particles=3),
    "Trace, vectorized": lambda: Trace_ELBO(3, 1, vectorize_particles=True),
    "TraceGraph": lambda: TraceGraph_ELBO(num_particles=3),
    "TraceGraph, vectorized": lambda: TraceGraph_ELBO(3, 1, vectorize_particles=True),
    "TraceMeanField": TraceMeanField_ELBO,
    "TraceMeanField, vectorized": lambda: TraceMeanField_ELBO(3, 1, vectorize_particles=True),
    "TraceEnum": lambda: TraceEnum_ELBO(max_plate_nesting=1),
    "TraceEnum, vectorized": lambda: TraceEnum_ELBO(3, 1, vectorize_particles=True),
    "Renyi": lambda: RenyiELBO(0.3, 3),
    "Renyi, vectorized": lambda: RenyiELBO(0.3, 3, 1, vectorize_particles=True),
    "RWS": lambda: ReweightedWakeSleep(3),
    "RWS, vectorized": lambda: ReweightedWakeSleep(3, vectorize_particles=True),
    "Pyro's RWS": lambda: StockRWS(3, max_plate_nesting=1),
    "Pyro's RWS, loop": lambda: StockRWS(3, vectorize_particles=False),
    "MMD": lambda: Trace_MMD(
        RBF(1, torch.tensor(1.0), torch.tensor(1.0)), 1, 3, 1, vectorize_particles=True
    ),
}


@pytest.mark.filterwarnings("ignore:TraceEnum_ELBO found no sample sites")
@pytest.mark.parametrize("name", CONTINUOUS)
def test_every_loss_measures_the_same_metric(name: str) -> None:
    x = X[:4]
    count = 8 / 4 * 0.5 * torch.tensor([1.0, 1.0, 0.0, 1.0])
    guide = matrices(CONTINUOUS[name](), weighted, weighted_guide, x, "guide")
    inputs = torch.stack([torch.ones(4), x], 1)  # q.b, q.w
    expected = (inputs.mT * count / 0.25) @ inputs
    (found,) = guide.values()
    torch.testing.assert_close(found[0], expected, rtol=1e-10, atol=EXACT)
    pyro.clear_param_store()
    model = matrices(CONTINUOUS[name](), weighted, weighted_guide, x)
    torch.testing.assert_close(model["loc"].squeeze(), count.sum(), rtol=1e-10, atol=EXACT)


def shifted(x: Tensor) -> None:
    """A mixture whose means move together by a continuous value; z is summed out."""
    logits, means = param("logits", 1, 2), param("means", 2, 2)
    shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(means[z] + shift, 1.0), obs=x)


def shifted_guide(x: Tensor) -> None:
    pyro.sample("shift", dist.Normal(param("q.loc", 13), 0.7))


@pytest.mark.parametrize("vectorized", [False, True])
def test_enumeration_under_particles_averages_their_posteriors(vectorized: bool) -> None:
    x = MIXED[[0, 1, 2, 20]] / 3
    loss = TraceEnum_ELBO(3, 1, vectorize_particles=vectorized)
    draws: list[Tensor] = []
    get_trace = TraceEnum_ELBO._get_trace

    class Kept(TraceEnum_ELBO):
        def _get_trace(self, *args: Any) -> Any:
            traces = get_trace(self, *args)
            draws.append(traces[0].nodes["shift"]["value"].detach().reshape(-1))
            return traces

    loss.__class__ = Kept
    found = matrices(loss, shifted, shifted_guide, x)
    shifts = torch.cat(draws)[-3:]
    assert float(shifts.std()) > 0.1
    logits, means = values("logits", "means")
    joint = logits.log_softmax(-1) + dist.Normal(means + shifts[:, None, None], 1.0).log_prob(
        x.unsqueeze(-1)
    )
    expected = joint.softmax(-1).mean(0).sum(0)
    assert torch.allclose(found["means"][0], diagonal(expected), rtol=0, atol=EXACT)
    # Negative control: the first draw's posterior alone.
    assert not torch.allclose(expected, joint[0].softmax(-1).sum(0), atol=1e-3)


# --- Pyro's own wake–sleep ----------------------------------------------------------------------


def dreaming(x: Tensor, observations: Any = None) -> None:
    mixture(x)


def dreaming_guide(x: Tensor, observations: Any = None) -> None:
    mixture_guide(observations["x"] if observations else x)


@pytest.mark.parametrize("vectorized", [False, True])
def test_the_guide_is_measured_on_the_dreams_of_pyros_own_wake_sleep(vectorized: bool) -> None:
    """Between waking and sleep: (insomnia) × data + (1 − insomnia) × dreams."""
    x = MIXED[[0, 1, 2, 20]]
    seen: list[Tensor] = []

    def guide(x: Tensor, observations: Any = None) -> None:
        if observations:
            seen.append(observations["x"].detach())
        dreaming_guide(x, observations)

    loss = StockRWS(3, 0.25, num_sleep_particles=2, vectorize_particles=vectorized)
    loss.max_plate_nesting = 2
    (found,) = matrices(loss, dreaming, guide, x, "guide").values()
    dreams = torch.cat([part.reshape(-1) for part in seen])[-2 * len(x) :]
    slope, bias = values("q.w", "q.b")
    expected = torch.zeros(4, 4)
    for data, share in ((x, 0.25), (dreams, 0.75 / 2)):
        for datum in data:
            fisher = categorical_fisher(datum * slope + bias)
            jacobian = torch.cat([torch.eye(2), datum * torch.eye(2)], 1)  # q.b, q.w
            expected += share * jacobian.T @ fisher @ jacobian
    assert torch.allclose(found[0], expected, rtol=0, atol=EXACT)


@pytest.mark.parametrize("insomnia", [0.0, 0.5, 1.0])
def test_pyros_own_wake_sleep_trains(insomnia: float) -> None:
    loss = StockRWS(5, insomnia, max_plate_nesting=2)
    optim = NaturalGradient(lr=0.1, guide_geometry=Full())
    svi = NaturalSVI(dreaming, dreaming_guide, optim, loss)
    losses = [svi.step(MIXED) for _ in range(40)]
    assert all(isinstance(value, float) for value in losses)
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    # Pyro returns a loss for each program; the model's is the one that is reported.
    assert svi.evaluate_loss(MIXED) == pytest.approx(losses[-1], rel=0.2)


def test_pyros_own_sleep_needs_programs_that_take_observations() -> None:
    svi = NaturalSVI(mixture, mixture_guide, NaturalGradient(), StockRWS(3, 0.5))
    with pytest.raises(NoGuideOnDreams, match=r"'observations' .* pyronat.ReweightedWakeSleep"):
        svi.step(MIXED)
    # Negative control: awake, it runs.
    awake = NaturalSVI(mixture, mixture_guide, NaturalGradient(), StockRWS(3, max_plate_nesting=1))
    assert isinstance(awake.step(MIXED), float)


# --- baselines ----------------------------------------------------------------------------------


def test_a_baseline_with_parameters_is_left_to_others() -> None:
    """`TraceGraph_ELBO` differentiates the parameters of a baseline in the same backward pass."""
    net = torch.nn.Linear(1, 1).double()

    def guide(x: Tensor) -> None:
        pyro.module("baseline", net)
        slope, bias = param("q.w", 11, 2), param("q.b", 12, 2)
        with pyro.plate("data", len(x)):
            pyro.sample(
                "z",
                dist.Categorical(logits=x.unsqueeze(-1) * slope + bias),
                infer={
                    "baseline": {
                        "nn_baseline": lambda data: net(data).squeeze(-1),
                        "nn_baseline_input": x.unsqueeze(-1),
                    }
                },
            )

    before = net.weight.detach().clone()
    optim = NaturalGradient(lr=0.1, guide_geometry=Full(), others=pyro.optim.Adam({"lr": 0.05}))
    svi = NaturalSVI(mixture, guide, optim, TraceGraph_ELBO(num_particles=2))
    losses = [svi.step(MIXED) for _ in range(40)]
    owners = optim.assignment(["baseline$$$weight", "q.w"])
    assert owners == {"baseline$$$weight": "others", "q.w": "natural"}
    assert not torch.equal(net.weight, before)
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


# --- refused -----------------------------------------------------------------------------------


class Traceless:
    num_particles = 1

    def loss_and_grads(self, model: Program, guide: Program, x: Tensor) -> float:
        return 0.0


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (JitTrace_ELBO(), "JitTrace_ELBO .* plain"),
        (JitTraceEnum_ELBO(), "JitTraceEnum_ELBO .* plain"),
        (JitTraceGraph_ELBO(), "JitTraceGraph_ELBO .* plain"),
        (JitTraceMeanField_ELBO(), "JitTraceMeanField_ELBO .* plain"),
        (TraceTMC_ELBO(), "TraceTMC_ELBO .* plain"),
        (TraceTailAdaptive_ELBO(2, 1, vectorize_particles=True), "TraceTailAdaptive.* RenyiELBO"),
        (pyro.infer.SVGD, "makes no traces; .* Trace_ELBO"),
        (Traceless(), "Traceless .* Trace_ELBO"),
        (pyro.infer.EnergyDistance(), "EnergyDistance .* Trace_ELBO"),
    ],
    ids=lambda value: "" if isinstance(value, str) else type(value).__name__,
)
def test_losses_that_hide_their_traces_are_refused(loss: Any, words: str) -> None:
    gaussian(X)
    before = pyro.param("loc").item()
    svi = pyronat.NaturalSVI(gaussian, gaussian_guide, NaturalGradient(), loss)
    with pytest.raises(UnsupportedProgram, match=words):
        svi.step(X)
    assert pyro.param("loc").item() == pytest.approx(before, abs=0)
