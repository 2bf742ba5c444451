"""Reweighted wake–sleep against a loop over data and particles that shares nothing with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI
from torch import Tensor
from torch.nn.functional import linear

import pyronat
from models.helmholtz import Helmholtz
from pyronat import ReweightedWakeSleep
from pyronat.errors import NoGuideOnDreams
from pyronat.testing import z_score

Draws = dict[str, Tensor]
Program = Callable[..., Any]
EXACT = 1e-10
SIGMAS = 4.8


def randn(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def bits(seed: int, *shape: int) -> Tensor:
    return (randn(seed, *shape) > 0).double()


def param(name: str, seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    return pyro.param(name, lambda: randn(seed, *shape, scale=scale))


# --- programs; dimension 0 of every argument and of every latent site is the datum ---------------


SBN = Helmholtz((6, 4, 3), init_scale=2.0)


def gaussian_model(x: Tensor) -> None:
    weight = param("W", 1, 3, 2)
    with pyro.plate("data", len(x)):
        z2 = pyro.sample("z2", dist.Normal(param("top", 2, 2), 1.0).to_event(1))
        loc = linear(z2, param("V", 3, 2, 2))
        z1 = pyro.sample("z1", dist.Normal(loc, param("s", 4).exp()).to_event(1))
        pyro.sample("x", dist.Normal(linear(z1, weight), 0.7).to_event(1), obs=x)


def gaussian_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        loc = linear(x, param("q.A", 11, 2, 3))
        z1 = pyro.sample("z1", dist.Normal(loc, param("q.s1", 12).exp()).to_event(1))
        # z1 is reparametrized in stock Pyro: its path must not carry a gradient to q.A.
        loc = linear(z1, param("q.B", 13, 2, 2))
        pyro.sample("z2", dist.Normal(loc, param("q.s2", 14).exp()).to_event(1))


def nested_model(x: Tensor) -> None:
    with pyro.plate("data", len(x), dim=-2):
        h = pyro.sample("h", dist.Bernoulli(logits=param("b", 1)))
        with pyro.plate("inner", x.shape[1], dim=-1):
            z = pyro.sample("z", dist.Bernoulli(logits=param("w", 2) * h + param("c", 3)))
            pyro.sample("x", dist.Normal(param("v", 4) * z + h, 1.0), obs=x)


def nested_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x), dim=-2):
        summary = x.mean(-1, keepdim=True)
        pyro.sample("h", dist.Bernoulli(logits=param("q.a", 11) * summary))
        with pyro.plate("inner", x.shape[1], dim=-1):
            pyro.sample("z", dist.Bernoulli(logits=param("q.b", 12) * x + param("q.c", 13)))


def masked_model(x: Tensor, seen: Tensor) -> None:
    with pyro.plate("data", len(x)):
        h = pyro.sample("h", dist.Bernoulli(logits=param("b", 1)))
        with poutine.mask(mask=seen):
            pyro.sample("x", dist.Normal(param("w", 2) * h + param("c", 3), 1.0), obs=x)


def masked_guide(x: Tensor, seen: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("h", dist.Bernoulli(logits=param("q.a", 11) * x + param("q.b", 12)))


def tied_model(x: Tensor) -> None:
    g = pyro.sample("g", dist.Bernoulli(logits=param("b", 1)))
    with pyro.plate("data", len(x)):
        h = pyro.sample("h", dist.Bernoulli(logits=param("w", 2) * g))
        pyro.sample("x", dist.Normal(param("v", 3) * h + g, 1.0), obs=x)


def tied_guide(x: Tensor) -> None:
    pyro.sample("g", dist.Bernoulli(logits=param("q.g", 11)))
    with pyro.plate("data", len(x)):
        pyro.sample("h", dist.Bernoulli(logits=param("q.a", 12) * x))


def deterministic_model(x: Tensor, seen: Tensor) -> None:
    pyro.deterministic("doubled", 2 * param("w", 2))
    masked_model(x, seen)


SEEN = torch.tensor([True, False, True, True, False])


@dataclass(frozen=True)
class Case:
    """A model with its guide, and whether a latent site outside the plate ties the data."""

    name: str
    model: Program
    guide: Program
    args: tuple[Tensor, ...]
    tied: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def data(self) -> list[slice]:
        """Parts of the batch with importance weights of their own."""
        size = len(self.args[0])
        return [slice(None)] if self.tied else [slice(n, n + 1) for n in range(size)]


CASES = (
    Case("sbn", SBN.model, SBN.guide, (bits(1, 7, 6),)),
    Case("gaussian", gaussian_model, gaussian_guide, (randn(2, 5, 3),)),
    Case("nested", nested_model, nested_guide, (randn(3, 4, 3),)),
    Case("masked", masked_model, masked_guide, (randn(4, 5), SEEN)),
    Case("deterministic", deterministic_model, masked_guide, (randn(4, 5), SEEN)),
    Case("tied", tied_model, tied_guide, (randn(5, 4),), tied=True),
)
by_case = pytest.mark.parametrize("case", CASES, ids=str)


# --- the slow oracle ---------------------------------------------------------------------------


def record_draws(elbo: ReweightedWakeSleep) -> list[Draws]:
    """A list that receives the latent values of every guide run on data."""
    draws: list[Draws] = []
    get_trace = elbo._get_trace

    def watched(*args: Any) -> Any:
        model_trace, guide_trace = get_trace(*args)
        nodes = guide_trace.nodes
        draws.append({name: nodes[name]["value"].detach() for name in latent(guide_trace)})
        return model_trace, guide_trace

    elbo._get_trace = watched
    return draws


def latent(trace: poutine.Trace) -> list[str]:
    return [n for n, s in trace.nodes.items() if s["type"] == "sample" and not s["is_observed"]]


def log_prob(program: Program, values: Mapping[str, Tensor], args: Sequence[Tensor]) -> Tensor:
    """Log-probability of given values, which carry no gradient, under one run."""
    conditioned = poutine.condition(program, data=dict(values))
    return poutine.trace(conditioned).get_trace(*args).log_prob_sum()


def cut(values: Mapping[str, Tensor], part: slice, tied: bool) -> Draws:
    return dict(values) if tied else {name: value[part] for name, value in values.items()}


def loop_losses(case: Case, draws: Sequence[Draws]) -> tuple[Tensor, Tensor]:
    """Wake-θ and wake-φ losses, one datum and one particle after the other."""
    theta, phi = torch.zeros(()), torch.zeros(())
    for part in case.data:
        args = tuple(argument[part] for argument in case.args)
        mine = [cut(draw, part, case.tied) for draw in draws]
        log_q = [log_prob(case.guide, values, args) for values in mine]
        log_p = [log_prob(case.model, values, args) for values in mine]
        weights = [(p - q).detach() for p, q in zip(log_p, log_q, strict=True)]
        top = max(weights)
        total = sum((w - top).exp() for w in weights)
        theta = theta - (top + total.log() - math.log(len(draws)))
        for p, q, w in zip(log_p, log_q, weights, strict=True):
            share = (w - top).exp() / total
            # zero in value, so that only the gradient of the evidence is added
            theta = theta - share * (p - p.detach())
            phi = phi - share * q
    return theta, phi


def gradients(loss: Tensor) -> Draws:
    leaves = {name: leaf for name, leaf in pyro.get_param_store().named_parameters()}
    found = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True, allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), found, strict=True)
    }


def backward(elbo: ReweightedWakeSleep, case: Case, seed: int = 3) -> tuple[float, Draws]:
    """Loss and gradients of ours; the gradients are cleared."""
    pyro.set_rng_seed(seed)
    loss = elbo.loss_and_grads(case.model, case.guide, *case.args)
    found = {}
    for name, leaf in pyro.get_param_store().named_parameters():
        found[name] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.clone()
        leaf.grad = None
    return loss, found


def create_params(case: Case) -> None:
    with torch.no_grad(), poutine.block():
        case.model(*case.args)
        case.guide(*case.args)


def error(first: Draws, second: Draws) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def added(first: Draws, second: Draws, share: float = 1.0) -> Draws:
    return {name: first[name] + share * second[name] for name in first}


# --- wake --------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_particles", [1, 4])
@by_case
def test_wake_gradients_are_those_of_the_loop(case: Case, num_particles: int) -> None:
    create_params(case)
    elbo = ReweightedWakeSleep(num_particles)
    draws = record_draws(elbo)
    loss, found = backward(elbo, case)
    assert len(draws) == num_particles
    theta, phi = loop_losses(case, draws)
    assert isinstance(loss, float)
    assert loss == pytest.approx(theta.item(), abs=EXACT)
    assert error(found, gradients(theta + phi)) < EXACT
    if num_particles > 1:
        # Negative control: uniform weights are another gradient.
        uniform = sum(log_prob(case.guide, draw, case.args) for draw in draws) / num_particles
        assert error(found, gradients(theta - uniform)) > 1e-3


@by_case
def test_vectorized_wake_gradients_are_those_of_the_loop(case: Case) -> None:
    create_params(case)
    elbo = ReweightedWakeSleep(4, vectorize_particles=True)
    stacked = record_draws(elbo)
    loss, found = backward(elbo, case)
    assert len(stacked) == 1
    plain = poutine.trace(case.guide).get_trace(*case.args).nodes
    draws = [
        {name: value[k].reshape(plain[name]["value"].shape) for name, value in stacked[0].items()}
        for k in range(4)
    ]
    theta, phi = loop_losses(case, draws)
    assert loss == pytest.approx(theta.item(), abs=EXACT)
    assert error(found, gradients(theta + phi)) < EXACT


def test_joint_weights_are_rejected_by_the_loop() -> None:
    """Negative control: one weight for the whole batch, as in Pyro's own class."""
    case = CASES[0]
    create_params(case)
    elbo = ReweightedWakeSleep(4)
    draws = record_draws(elbo)
    _, found = backward(elbo, case)
    joint = Case("joint", case.model, case.guide, case.args, tied=True)
    theta, phi = loop_losses(joint, draws)
    assert error(found, gradients(theta + phi)) > 1e-2


def test_a_reparametrized_guide_does_not_leak_through_its_first_layer() -> None:
    case = CASES[1]
    create_params(case)
    elbo = ReweightedWakeSleep(4)
    draws = record_draws(elbo)
    _, found = backward(elbo, case)
    theta, phi = loop_losses(case, draws)
    right = gradients(theta + phi)
    (x,) = case.args
    leaked = torch.zeros(())
    weights = torch.stack([
        per_datum(gaussian_model, d, x) - per_datum(gaussian_guide, d, x) for d in draws
    ]).softmax(0)
    for draw, weight in zip(draws, weights, strict=True):
        loc = linear(x, pyro.param("q.A"))
        scale = pyro.param("q.s1").exp()
        noise = (draw["z1"] - loc.detach()) / scale.detach()
        z1 = loc + scale * noise
        log_q = dist.Normal(loc, scale).log_prob(z1).sum(-1)
        second = dist.Normal(linear(z1, pyro.param("q.B")), pyro.param("q.s2").exp())
        log_q = log_q + second.log_prob(draw["z2"]).sum(-1)
        leaked = leaked - (weight.detach() * log_q).sum()
    wrong = gradients(leaked)
    assert error({"q.A": found["q.A"]}, {"q.A": right["q.A"]}) < EXACT
    assert float((found["q.A"] - wrong["q.A"]).abs().max()) > 1e-2
    # and the wake-θ phase gives nothing to the guide
    assert all((g == 0).all() for n, g in gradients(theta).items() if n.startswith("q."))


def per_datum(program: Program, values: Draws, x: Tensor) -> Tensor:
    trace = poutine.trace(poutine.condition(program, data=values)).get_trace(x)
    trace.compute_log_prob()
    return sum(s["log_prob"] for s in trace.nodes.values() if s["type"] == "sample").detach()


@by_case
def test_loss_is_the_wake_loss_without_gradients(case: Case) -> None:
    create_params(case)
    elbo = ReweightedWakeSleep(3)
    pyro.set_rng_seed(3)
    value = elbo.loss(case.model, case.guide, *case.args)
    assert isinstance(value, float)
    assert value == pytest.approx(backward(elbo, case)[0], abs=EXACT)


@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[2]], ids=str)
def test_vectorized_particles_agree_with_looped_ones_in_expectation(case: Case) -> None:
    create_params(case)
    samples = {}
    for vectorized in (False, True):
        elbo = ReweightedWakeSleep(3, vectorize_particles=vectorized)
        seeds = range(1000 * vectorized, 1000 * vectorized + 100)
        runs = [backward(elbo, case, seed)[1] for seed in seeds]
        samples[vectorized] = torch.stack([flat(run) for run in runs])
    differences = samples[True] - samples[False]
    assert z_score(differences, torch.zeros_like(differences[0])).abs().max() < SIGMAS
    # Negative control: other particles, another gradient.
    runs = [backward(ReweightedWakeSleep(1), case, seed)[1] for seed in range(100)]
    differences = torch.stack([flat(run) for run in runs]) - samples[False]
    assert z_score(differences, torch.zeros_like(differences[0])).abs().max() > SIGMAS


def flat(values: Draws) -> Tensor:
    return torch.cat([values[name].reshape(-1) for name in sorted(values)])


# --- batches -----------------------------------------------------------------------------------


def test_effective_sample_size_does_not_depend_on_the_batch() -> None:
    machine = Helmholtz((8, 5, 3), init_scale=1.0)
    x = bits(8, 256, 8)
    elbo = ReweightedWakeSleep(30, vectorize_particles=True, max_plate_nesting=1)
    elbo.loss(machine.model, machine.guide, x)
    batch = float(elbo.ess)
    singles = []
    for datum in x:
        elbo.loss(machine.model, machine.guide, datum.unsqueeze(0))
        singles.append(float(elbo.ess))
    assert batch == pytest.approx(sum(singles) / len(singles), rel=0.1)
    assert 2 < batch < 29
    # Negative control: weights of the whole batch, here because a site outside the plate ties it.

    def tied(program: Program) -> Program:
        def wrapped(data: Tensor) -> None:
            pyro.sample("tie", dist.Bernoulli(torch.tensor(0.5)))
            program(data)

        return wrapped

    joint = ReweightedWakeSleep(30)
    joint.loss(tied(machine.model), tied(machine.guide), x)
    assert float(joint.ess) < 2 < batch / 2


def subsampled(full: int) -> Case:
    def model(x: Tensor) -> None:
        with pyro.plate("data", full, subsample=torch.arange(len(x))):
            h = pyro.sample("h", dist.Bernoulli(logits=param("b", 1)))
            pyro.sample("x", dist.Normal(param("w", 2) * h, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", full, subsample=torch.arange(len(x))):
            pyro.sample("h", dist.Bernoulli(logits=param("q.a", 11) * x))

    return Case(f"{len(X)} of {full}", model, guide, (X,))


X = randn(9, 6)


@pytest.mark.parametrize("insomnia", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("vectorized", [False, True])
def test_subsampling_scales_the_loss_and_not_the_weights(vectorized: bool, insomnia: float) -> None:
    create_params(subsampled(6))
    elbo = ReweightedWakeSleep(5, insomnia, vectorize_particles=vectorized, max_plate_nesting=1)
    loss, small = backward(elbo, subsampled(6))
    ess = float(elbo.ess)
    scaled_loss, large = backward(elbo, subsampled(60))
    assert float(elbo.ess) == pytest.approx(ess, abs=EXACT)
    assert 1.2 < ess < 4.9
    assert scaled_loss == pytest.approx(10 * loss, rel=1e-12)
    assert error(large, {name: 10 * value for name, value in small.items()}) < 1e-9


# --- sleep -------------------------------------------------------------------------------------


def coin_model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        h = pyro.sample("h", dist.Bernoulli(logits=param("b", 1)))
        pyro.sample("x", dist.Bernoulli(logits=param("w", 2) * h + param("c", 3)), obs=x)


def coin_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("h", dist.Bernoulli(logits=param("q.a", 11) * x + param("q.b", 12)))


def observations_guide(x: Tensor, observations: Mapping[str, Tensor] | None = None) -> None:
    coin_guide(x if observations is None else observations["x"])


def exact_sleep_gradient(size: int) -> Draws:
    """−N Σ_{h,x} p(h, x) ∇ log q(h|x), by enumeration of the coin model."""
    total = torch.zeros(())
    for h in (0.0, 1.0):
        for x in (0.0, 1.0):
            value, data = {"h": torch.tensor([h])}, (torch.tensor([x]),)
            log_p = log_prob(coin_model, value, data).detach()
            total = total - log_p.exp() * log_prob(coin_guide, value, data)
    return {name: size * grad for name, grad in gradients(total).items()}


@pytest.mark.parametrize("guide", [coin_guide, observations_guide])
def test_sleep_gradient_has_the_exact_expectation(guide: Program) -> None:
    case = Case("coin", coin_model, guide, (torch.ones(40),))
    create_params(case)
    elbo = ReweightedWakeSleep(1, insomnia=0.0, num_sleep_particles=2)
    runs = [backward(elbo, case, seed)[1] for seed in range(200)]
    names = ["q.a", "q.b"]
    samples = torch.stack([torch.stack([run[name] for name in names]) for run in runs])
    exact = exact_sleep_gradient(40)
    truth = torch.stack([exact[name] for name in names])
    assert z_score(samples, truth).abs().max() < SIGMAS
    # Negative control: the guide on the observed data rather than on the dream.
    awake = [backward(ReweightedWakeSleep(1, 1.0), case, seed)[1] for seed in range(50)]
    control = torch.stack([torch.stack([run[name] for name in names]) for run in awake])
    assert z_score(control, truth).abs().max() > SIGMAS


@pytest.mark.parametrize("insomnia", [0.0, 0.25, 0.5, 1.0])
def test_insomnia_mixes_wake_and_sleep(insomnia: float) -> None:
    case = Case("coin", coin_model, coin_guide, (bits(5, 12),))
    create_params(case)
    dreams: list[Draws] = []

    class Watched(ReweightedWakeSleep):
        def _get_sleep_trace(self, *args: Any) -> Any:
            trace = super()._get_sleep_trace(*args)
            dreams.append({"h": trace.nodes["h"]["value"]})
            return trace

    elbo = Watched(3, insomnia, num_sleep_particles=2)
    draws = record_draws(elbo)
    inputs: list[Tensor] = []

    def spying_guide(x: Tensor) -> None:
        inputs.append(x)
        coin_guide(x)

    loss, found = backward(elbo, Case("spy", coin_model, spying_guide, case.args))
    theta, phi = loop_losses(case, draws)
    sleep = torch.zeros(())
    for dream, x in zip(dreams, inputs[len(inputs) - len(dreams) :], strict=True):
        for n in range(12):
            sleep = sleep - log_prob(coin_guide, {"h": dream["h"][n : n + 1]}, (x[n : n + 1],)) / 2
    assert len(dreams) == (0 if insomnia == 1 else 2)
    assert loss == pytest.approx(theta.item(), abs=EXACT)
    expected = theta + insomnia * phi + (1 - insomnia) * sleep
    assert error(found, gradients(expected)) < EXACT
    # the dreams give no gradient to the model
    model_only = {n: g for n, g in gradients(theta).items() if not n.startswith("q.")}
    assert error({n: found[n] for n in model_only}, model_only) < EXACT


def test_the_dream_replaces_the_observed_argument_wherever_it_is() -> None:
    seen: list[Tensor] = []

    def model(batch: Mapping[str, Any], scale: Tensor) -> None:
        coin_model(batch["x"])

    def guide(batch: Mapping[str, Any], scale: Tensor) -> None:
        seen.append(batch["x"])
        assert scale is fixed
        coin_guide(batch["x"])

    x, fixed = torch.full((500,), 1.0), torch.ones(500)
    ReweightedWakeSleep(1, insomnia=0.0).loss_and_grads(model, guide, {"x": x}, fixed)
    wake, *_, sleep = seen
    assert wake is x
    assert 0 < float(sleep.mean()) < 1
    assert bool((x == 1).all())


def copying_model(x: Tensor) -> None:
    coin_model(x + 0.0)


def test_a_guide_that_cannot_see_dreams_is_refused() -> None:
    x = bits(5, 4)
    asleep, awake = ReweightedWakeSleep(2, insomnia=0.5), ReweightedWakeSleep(2)
    with pytest.raises(NoGuideOnDreams, match="values of x: .*'observations'.*arguments"):
        asleep.loss_and_grads(copying_model, coin_guide, x)
    # both ways out, and no dreams at all, work
    asleep.loss_and_grads(coin_model, coin_guide, x)
    asleep.loss_and_grads(copying_model, observations_guide, x)
    awake.loss_and_grads(copying_model, coin_guide, x)


# --- use ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("insomnia", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("vectorized", [False, True])
def test_it_trains_in_stock_svi(vectorized: bool, insomnia: float) -> None:
    x = (torch.arange(50) < 45).double()
    elbo = ReweightedWakeSleep(5, insomnia, vectorize_particles=vectorized)
    svi = SVI(coin_model, coin_guide, pyro.optim.Adam({"lr": 0.05}), loss=elbo)
    losses = [svi.step(x) for _ in range(80)]
    assert all(isinstance(loss, float) for loss in losses)
    optimum = -(45 * math.log(0.9) + 5 * math.log(0.1))
    assert sum(losses[-10:]) / 10 < optimum + 2 < sum(losses[:5]) / 5


def test_it_trains_in_natural_svi_and_reports_the_effective_sample_size() -> None:
    x = (torch.arange(50) < 45).double()
    elbo = ReweightedWakeSleep(5, 0.5, vectorize_particles=True)
    svi = pyronat.NaturalSVI(coin_model, coin_guide, pyronat.NaturalGradient(lr=0.2), elbo)
    losses = [svi.step(x) for _ in range(60)]
    assert 1 <= svi.info.ess <= 5
    assert svi.info.ess == pytest.approx(float(elbo.ess))
    optimum = -(45 * math.log(0.9) + 5 * math.log(0.1))
    assert sum(losses[-10:]) / 10 < optimum + 1 < sum(losses[:3]) / 3


@pytest.mark.parametrize(
    "options",
    [{"insomnia": -0.1}, {"insomnia": 1.1}, {"num_particles": 0}, {"num_sleep_particles": 0}],
    ids=str,
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    words = "insomnia" if "insomnia" in options else "particle"
    with pytest.raises(ValueError, match=words):
        ReweightedWakeSleep(**options)


# --- data that depend on each other ------------------------------------------------------------


def averaged(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.mean(), 1.0), obs=x)


def separate(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def proposal(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x - x.mean(), 1.0))


def joint_bound(model: Callable[..., Any], x: Tensor, num_particles: int) -> float:
    """−log (1/K) Σ_k p(x, z_k) / q(z_k|x) of the whole data set."""
    log_weights = []
    for _ in range(num_particles):
        q = poutine.trace(proposal).get_trace(x)
        p = poutine.trace(poutine.replay(model, trace=q)).get_trace(x)
        log_weights.append(p.log_prob_sum() - q.log_prob_sum())
    return math.log(num_particles) - float(torch.stack(log_weights).logsumexp(0))


@pytest.mark.parametrize(("model", "tied"), [(averaged, True), (separate, False)])
def test_weights_are_joint_where_data_depend_on_each_other(
    model: Callable[..., Any], tied: bool
) -> None:
    x = torch.linspace(-1, 1, 6)
    pyro.set_rng_seed(3)
    loss = ReweightedWakeSleep(num_particles=5).loss(model, proposal, x)
    pyro.set_rng_seed(3)
    assert (abs(loss - joint_bound(model, x, 5)) < EXACT) == tied
