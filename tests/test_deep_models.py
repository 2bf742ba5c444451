"""Tests of the variational programs: their data, their referees, and how they train."""

import math
import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import Tensor
from torch.distributions import HalfCauchy, Normal

import pyronat
from models import bayesian_regression, dmm, eight_schools, sparse_gamma_def, vae
from models.bayesian_regression import LinearRegression, LogisticRegression, with_intercept
from models.dmm import DMM
from models.eight_schools import EightSchools
from models.sparse_gamma_def import SparseGammaDEF
from models.vae import VAE
from pyronat.steps import (
    ConstantDamping,
    KLTrustRegion,
    LinearDecay,
    Momentum,
    RunningAverage,
    Shrinkage,
)


@pytest.fixture(autouse=True)
def _fresh_store() -> Iterator[None]:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    pyro.clear_param_store()


def log_prob(model: Callable[..., Any], data: tuple[Tensor, ...], **values: Tensor) -> float:
    """Log density in nats that a program gives to values of its hidden sites and its data."""
    fixed = poutine.condition(model, data=values)
    return float(poutine.trace(fixed).get_trace(*data).log_prob_sum())


def log_probs(model: Callable[..., Any], data: tuple[Tensor, ...], **values: Tensor) -> Tensor:
    """The same for many values at once: shape [many], from values of shape [many, 1, ...]."""
    many = len(next(iter(values.values())))
    with pyro.plate("many", many, dim=-2):
        trace = poutine.trace(poutine.condition(model, data=values)).get_trace(*data)
    trace.compute_log_prob()
    sites = [site for site in trace.nodes.values() if site["type"] == "sample"]
    terms = [site["log_prob"].sum(-1) for site in sites if site["name"] not in {"many", "data"}]
    return torch.stack(terms).sum(0)


def grid(low: float, high: float, points: int) -> tuple[Tensor, float]:
    """Points of the trapezoid rule for functions that vanish at both ends, and log of the step."""
    return torch.linspace(low, high, points), math.log((high - low) / (points - 1))


# --- data --------------------------------------------------------------------------------------

MAKERS = {
    "vae": (lambda seed: (vae.make_data(seed, 20),), [(20, 64)]),
    "dmm": (lambda seed: dmm.make_data(seed, 20), [(20, 12, 20), (20,)]),
    "linear": (lambda seed: bayesian_regression.make_data(seed, 20), [(20, 10), (20,)]),
    "logistic": (lambda seed: bayesian_regression.make_classes(seed, 20), [(20, 30), (20,)]),
    "schools": (lambda seed: eight_schools.make_data(seed, 20), [(20,), (20,)]),
    "def": (lambda seed: (sparse_gamma_def.make_data(seed, 20),), [(20, 64)]),
}


@pytest.mark.parametrize("name", MAKERS)
def test_data_are_seeded_and_shaped(name: str) -> None:
    make, shapes = MAKERS[name]
    state = torch.get_rng_state()
    data = make(3)
    assert [tuple(value.shape) for value in data] == shapes
    assert all(torch.equal(*pair) for pair in zip(data, make(3), strict=True))
    assert not any(torch.equal(*pair) for pair in zip(data, make(4), strict=True))
    assert data[0].dtype == torch.float64
    assert torch.equal(torch.get_rng_state(), state)
    assert not list(pyro.get_param_store())


def test_data_are_what_they_say() -> None:
    assert set(vae.make_data(0).unique().tolist()) == {0.0, 1.0}
    assert set(sparse_gamma_def.make_data(0, 1797).unique().tolist()) == set(range(17))
    x, y = bayesian_regression.make_data(0)
    assert torch.allclose(x.mean(0), torch.zeros(10)) and torch.allclose(y.std(), torch.tensor(1.0))
    assert set(bayesian_regression.make_classes(0)[1].tolist()) == {0.0, 1.0}
    assert eight_schools.make_data()[0].tolist() == [28, 8, -3, 7, -1, 1, 18, 12]


def test_chords_progress() -> None:
    x, lengths = dmm.make_data(0, 500)
    assert set(lengths.tolist()) == set(range(8, 13))
    beyond = torch.arange(12) >= lengths[:, None]
    assert float(x[beyond].abs().max()) == 0.0
    chord = x[:, 0][:, [0, 4, 7]]  # every sequence starts on the first degree
    assert abs(float(chord.mean()) - 0.9) < 4 * math.sqrt(0.09 / chord.numel())
    assert float(x[:, 7][:, [0, 4, 7]].mean()) < 0.8
    with pytest.raises(ValueError, match="17 notes"):
        dmm.make_data(0, 3, num_notes=16)


# --- regression --------------------------------------------------------------------------------


def test_linear_evidence_and_posterior_are_those_of_the_program() -> None:
    """Bayes' rule: log p(y, w) − log p(w | y) is the evidence, whatever w."""
    x, y = bayesian_regression.make_data(0, 40)
    for net in (LinearRegression(), LinearRegression(prior_scale=0.3, noise=1.5)):
        mean, covariance = net.posterior(x, y)
        posterior = torch.distributions.MultivariateNormal(mean, covariance)
        for w in posterior.sample((3,)) + torch.randn(11):
            joint = log_prob(net.model, (x, y), weights=w[:-1], intercept=w[-1])
            assert joint - float(posterior.log_prob(w)) == pytest.approx(
                float(net.log_evidence(x, y)), abs=1e-9
            )
    assert net.log_evidence(x, y, noise=1.0) != net.log_evidence(x, y)


def test_linear_evidence_equals_quadrature() -> None:
    x, y = bayesian_regression.make_data(0, 6)
    x, net = x[:, :1], LinearRegression()
    points, step = grid(-6.0, 6.0, 121)
    pairs = torch.cartesian_prod(points, points)
    joint = log_probs(net.model, (x, y), weights=pairs[:, None, :1], intercept=pairs[:, 1:])
    assert float(joint.logsumexp(0)) + 2 * step == pytest.approx(
        float(net.log_evidence(x, y)), abs=1e-8
    )
    assert torch.allclose(joint.softmax(0) @ pairs, net.posterior(x, y).mean, atol=1e-8)


def test_divergence_from_the_exact_posterior_is_evidence_minus_elbo() -> None:
    x, y = bayesian_regression.make_data(0, 30)
    net = LinearRegression()
    mean, covariance = net.posterior(x, y)
    loc, scale = mean + 0.1, 1.5 * torch.linalg.cholesky(covariance)
    q = torch.distributions.MultivariateNormal(loc, scale_tril=scale)
    w = q.sample((4000,))
    prior = Normal(0.0, 1.0).log_prob(w).sum(-1)
    joint = prior + Normal(w @ with_intercept(x).T, net.noise).log_prob(y).sum(-1)
    gap = net.log_evidence(x, y) - (joint - q.log_prob(w))
    exact = float(net.posterior(x, y).divergence_from(loc, scale @ scale.T))
    assert abs(float(gap.mean()) - exact) < 4 * float(gap.std()) / math.sqrt(len(gap))
    assert float(net.posterior(x, y).divergence_from(mean, covariance)) == pytest.approx(0.0)


def test_logistic_evidence_equals_quadrature() -> None:
    x, y = bayesian_regression.make_classes(1, 12)
    x, net = x[:, :1], LogisticRegression(prior_scale=1.5)
    points, step = grid(-9.0, 9.0, 91)
    pairs = torch.cartesian_prod(points, points)
    joint = log_probs(net.model, (x, y), weights=pairs[:, None, :1], intercept=pairs[:, 1:])
    assert torch.allclose(net.log_joint(pairs, x, y), joint)
    estimate, error = net.log_evidence(x, y)
    exact = float(joint.logsumexp(0)) + 2 * step
    assert 0 < float(error) < 0.02
    assert abs(float(estimate) - exact) < 4 * float(error)
    mode = net.laplace(x, y).mean.clone().requires_grad_()
    net.log_joint(mode, x, y).backward()
    assert float(mode.grad.abs().max()) < 1e-9


def test_minibatches_are_scaled_to_all_data() -> None:
    x, y = bayesian_regression.make_data(0, 40)
    w, b = torch.randn(10), torch.tensor(0.3)
    full = log_prob(LinearRegression().model, (x, y), weights=w, intercept=b)
    some = [
        log_prob(LinearRegression(batch_size=10).model, (x, y), weights=w, intercept=b)
        for _ in range(400)
    ]
    error = statistics.stdev(some) / math.sqrt(len(some))
    assert error > 0 and abs(statistics.fmean(some) - full) < 4 * error


# --- eight schools -----------------------------------------------------------------------------


def test_schools_evidence_and_moments_equal_quadrature() -> None:
    """Over the mean and the log of the spread, the effects integrated out."""
    y, sigma = eight_schools.make_data()
    mu, mu_step = grid(-40.0, 40.0, 321)
    log_tau, tau_step = grid(-25.0, 25.0, 501)
    tau = log_tau.exp()
    spread = (tau[:, None] ** 2 + sigma**2).sqrt()[:, None]  # [tau, 1, schools]
    joint = Normal(mu[:, None], spread).log_prob(y).sum(-1) + Normal(0.0, 5.0).log_prob(mu)
    joint = joint + (HalfCauchy(5.0).log_prob(tau) + log_tau)[:, None]
    net = EightSchools()
    exact = float(joint.flatten().logsumexp(0)) + mu_step + tau_step
    assert float(net.log_evidence(y, sigma)) == pytest.approx(exact, abs=1e-7)
    mass = joint.flatten().softmax(0).reshape(joint.shape)
    moments = net.moments(y, sigma)
    for index, values in ((0, mu.expand_as(mass)), (1, tau[:, None].expand_as(mass))):
        mean = float((mass * values).sum())
        assert float(moments.mean[index]) == pytest.approx(mean, abs=1e-6)
        std = math.sqrt(float((mass * (values - mean) ** 2).sum()))
        assert float(moments.std[index]) == pytest.approx(std, abs=1e-5)


def test_one_school_equals_quadrature_over_its_effect_too() -> None:
    y, sigma = torch.tensor([3.0]), torch.tensor([2.0])
    net = EightSchools(mean_scale=2.0, spread_scale=1.0)
    mu, mu_step = grid(-14.0, 14.0, 141)
    eta, eta_step = grid(-9.0, 9.0, 181)
    log_tau, tau_step = grid(-12.0, 12.0, 121)
    tau = log_tau.exp()[:, None, None]
    theta = mu[:, None] + tau * eta
    joint = Normal(0.0, 2.0).log_prob(mu)[:, None] + Normal(0.0, 1.0).log_prob(eta)
    joint = joint + (HalfCauchy(1.0).log_prob(tau) + log_tau[:, None, None])
    joint = joint + Normal(theta, 2.0).log_prob(y)
    exact = float(joint.flatten().logsumexp(0)) + mu_step + eta_step + tau_step
    assert float(net.log_evidence(y, sigma)) == pytest.approx(exact, abs=1e-4)
    mass = joint.flatten().softmax(0).reshape(joint.shape)
    mean = float((mass * theta).sum())
    assert float(net.moments(y, sigma).mean[2]) == pytest.approx(mean, abs=1e-3)
    std = math.sqrt(float((mass * (theta - mean) ** 2).sum()))
    assert float(net.moments(y, sigma).std[2]) == pytest.approx(std, abs=1e-3)


def test_both_programs_of_the_schools_are_one_distribution() -> None:
    data, net = eight_schools.make_data(), EightSchools()
    mu, tau, eta = torch.tensor(2.0), torch.tensor(1.7), torch.randn(8)
    free = log_prob(net.model, data, mu=mu, tau=tau, eta=eta)
    centered = log_prob(net.centered, data, mu=mu, tau=tau, theta=mu + tau * eta)
    assert centered == pytest.approx(free - 8 * math.log(1.7))


# --- deep programs -----------------------------------------------------------------------------


def check_unbiased(runs: Tensor, exact: Tensor) -> None:
    """The likelihood itself is estimated without bias: log estimates [runs, batch]."""
    ratio = (runs - exact).exp()
    error = ratio.std(0) / math.sqrt(len(runs))
    assert bool((error > 0).all()) and float(error.max()) < 0.2
    assert bool(((ratio.mean(0) - 1).abs() < 4 * error).all())


def test_vae_likelihood_equals_quadrature() -> None:
    x = vae.make_data(0, 5)
    net = VAE(num_hidden=10, code_size=1)
    with torch.no_grad():  # a code that matters, and a guide that is not the prior
        net.decoder.logits.weight *= 2
        net.encoder.loc.bias += 0.3
    code, step = grid(-9.0, 9.0, 901)
    with torch.no_grad():
        logits = net.decoder(code[:, None])[:, None]  # [codes, 1, pixels]
        given = (x * logits - torch.nn.functional.softplus(logits)).sum(-1)
    exact = (given + Normal(0.0, 1.0).log_prob(code)[:, None]).logsumexp(0) + step
    state = torch.get_rng_state()
    runs = torch.stack([net.log_likelihood(x, 2000, seed) for seed in range(10)])
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(runs[0], net.log_likelihood(x, 2000, 0))
    check_unbiased(runs, exact)
    few = torch.stack([net.log_likelihood(x, 1, seed) for seed in range(200)]).mean(0)
    assert bool((few < exact).all())  # one sample is the ELBO


def test_dmm_likelihood_equals_quadrature() -> None:
    """Two steps of one code each; the second sequence ends after the first step."""
    x, _ = dmm.make_data(0, 2, steps=2)
    lengths = torch.tensor([2, 1])
    net = DMM(code_size=1, num_hidden=6, summary_size=4)
    with torch.no_grad():
        net.emitter.logits.weight *= 2
        net.start += 0.5
        z, step = grid(-8.0, 8.0, 801)
        loc, scale = net.transition(net.start)
        first = Normal(loc, scale).log_prob(z)  # [codes]
        loc, scale = net.transition(z[:, None])
        move = Normal(loc, scale).log_prob(z)  # [codes before, codes after]
        logits = net.emitter(z[:, None])

        def emit(notes: Tensor) -> Tensor:
            return (notes * logits - torch.nn.functional.softplus(logits)).sum(-1)

        alpha = first + emit(x[0, 0])
        alpha = (alpha[:, None] + move).logsumexp(0) + step + emit(x[0, 1])
        short = first + emit(x[1, 0])
        exact = torch.stack([alpha.logsumexp(0), short.logsumexp(0)]) + step
    runs = torch.stack([net.log_likelihood(x, lengths, 2000, seed) for seed in range(10)])
    check_unbiased(runs, exact)


def test_dmm_ends_where_a_sequence_ends() -> None:
    x, lengths = dmm.make_data(0, 6)
    net = DMM()
    beyond = (torch.arange(12) >= lengths[:, None])[:, :, None]
    reference = net.log_likelihood(x, lengths, 20)
    assert torch.allclose(net.log_likelihood(torch.where(beyond, 1.0, x), lengths, 20), reference)
    changed = x.clone()
    changed[:, 0] = 1 - x[:, 0]
    assert not torch.isclose(net.log_likelihood(changed, lengths, 20), reference).any()


def test_reversing_twice_is_nothing() -> None:
    x = torch.arange(8.0).reshape(2, 4, 1)
    lengths = torch.tensor([4, 2])
    turned = dmm.reverse(x, lengths)
    assert turned[:, :, 0].tolist() == [[3, 2, 1, 0], [5, 4, 6, 7]]
    assert torch.equal(dmm.reverse(turned, lengths), x)


def test_def_is_the_sum_of_its_layers() -> None:
    x, net = sparse_gamma_def.make_data(0, 3), SparseGammaDEF((2, 3, 4, 64))
    trace = poutine.trace(net.model).get_trace(x)
    value = {name: site["value"] for name, site in trace.nodes.items() if site["type"] == "sample"}

    def gamma(values: Tensor, shape: float, rate: Any) -> Tensor:
        rate = torch.as_tensor(rate)
        constant = shape * rate.log() - math.lgamma(shape)
        return (constant + (shape - 1) * values.log() - rate * values).sum()

    total = sum(gamma(value[f"w_{name}"], 0.1, 0.3) for name in ("top", "mid", "bottom"))
    total = total + gamma(value["z_top"], 0.1, torch.full((3, 2), 0.1))
    total = total + gamma(value["z_mid"], 0.1, 0.1 / (value["z_top"] @ value["w_top"]))
    total = total + gamma(value["z_bottom"], 0.1, 0.1 / (value["z_mid"] @ value["w_mid"]))
    mean = value["z_bottom"] @ value["w_bottom"]
    total = total + (x * mean.log() - mean - torch.lgamma(x + 1)).sum()
    assert float(trace.log_prob_sum()) == pytest.approx(float(total))


def test_particles_of_the_def_do_not_mix() -> None:
    x, net = sparse_gamma_def.make_data(0, 3), SparseGammaDEF((2, 3, 4, 64))
    with pyro.plate("particles", 2, dim=-2):
        trace = poutine.trace(net.model).get_trace(x)
    mean = trace.nodes["x"]["fn"].base_dist.rate
    assert mean.shape == (2, 3, 64)
    for particle in range(2):
        z = trace.nodes["z_bottom"]["value"][particle]
        weights = trace.nodes["w_bottom"]["value"][particle, 0]
        torch.testing.assert_close(mean[particle], z @ weights)


def test_def_clips_its_guide_only() -> None:
    x, net = sparse_gamma_def.make_data(0, 3), SparseGammaDEF((2, 3, 4, 64))
    net.guide(x)
    pyro.param("own", torch.tensor(-9.0))
    with torch.no_grad():
        for name in ("shape_z_top", "mean_w_mid", "own"):
            pyro.param(name).fill_(-9.0)
    net.clip()
    assert float(pyro.param("shape_z_top").detach().max()) == sparse_gamma_def.SMALLEST_SHAPE
    assert float(pyro.param("mean_w_mid").detach().max()) == sparse_gamma_def.SMALLEST_MEAN
    assert float(pyro.param("own").detach()) == -9.0


# --- training ----------------------------------------------------------------------------------


class Program(NamedTuple):
    """A program to train.

    Attributes:
        model: The model.
        guide: The guide.
        data: Arguments of both.
        after: Called after each step.
    """

    model: Callable[..., Any]
    guide: Callable[..., Any]
    data: tuple[Tensor, ...]
    after: Callable[[], None] = lambda: None


def auto(model: Callable[..., Any], guide: type, data: tuple[Tensor, ...]) -> Program:
    return Program(model, guide(model), data)


def make_vae() -> Program:
    net = VAE(num_hidden=24, code_size=4)
    return Program(net.model, net.guide, (vae.make_data(0, 60),))


def make_dmm() -> Program:
    net = DMM(num_hidden=8, summary_size=10)
    return Program(net.model, net.guide, dmm.make_data(0, 30, steps=6))


def make_def() -> Program:
    net = SparseGammaDEF((2, 4, 6, 64))
    return Program(net.model, net.guide, (sparse_gamma_def.make_data(0, 30),), net.clip)


PROGRAMS: dict[str, Callable[[], Program]] = {
    "vae": make_vae,
    "dmm": make_dmm,
    "def": make_def,
}
for _guide in (AutoNormal, AutoMultivariateNormal):
    PROGRAMS |= {
        f"linear-{_guide.__name__}": lambda guide=_guide: auto(
            LinearRegression().model, guide, bayesian_regression.make_data(0)
        ),
        f"logistic-{_guide.__name__}": lambda guide=_guide: auto(
            LogisticRegression().model,
            guide,
            tuple(value[..., :8] if value.dim() > 1 else value for value in CLASSES()),
        ),
        f"schools-{_guide.__name__}": lambda guide=_guide: auto(
            EightSchools().model, guide, eight_schools.make_data()
        ),
        f"centered-{_guide.__name__}": lambda guide=_guide: auto(
            EightSchools().centered, guide, eight_schools.make_data()
        ),
    }


def CLASSES() -> tuple[Tensor, Tensor]:
    return bayesian_regression.make_classes(0, 200)


def negative_elbo(program: Program) -> float:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        loss = Trace_ELBO().loss
        return statistics.fmean(loss(*program[:2], *program.data) for _ in range(20))


def train(program: Program, svi: Any, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        losses.append(svi.step(*program.data))
        program.after()
    return losses


@pytest.mark.parametrize("name", PROGRAMS)
def test_stock_svi_lowers_the_loss(name: str) -> None:
    program = PROGRAMS[name]()
    program.guide(*program.data)
    before = negative_elbo(program)
    train(program, SVI(*program[:2], pyro.optim.Adam({"lr": 0.03}), Trace_ELBO()), 40)
    assert negative_elbo(program) < before


@pytest.mark.parametrize("name", PROGRAMS)
def test_natural_gradients_lower_the_loss(name: str) -> None:
    program = PROGRAMS[name]()
    program.guide(*program.data)
    before = negative_elbo(program)
    optim = pyronat.NaturalGradient(lr=LinearDecay(0.5, 30))
    svi = pyronat.NaturalSVI(*program[:2], optim, Trace_ELBO())
    losses = train(program, svi, 30)
    assert svi.info.accepted and all(map(math.isfinite, losses))
    assert negative_elbo(program) < before


def gap_after(steps: int, seed: int, rate: float | None) -> float:
    """KL(q ‖ posterior) of the diabetes regression in nats, after Adam or natural steps."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    net, data = LinearRegression(), bayesian_regression.make_data(0)
    guide = AutoMultivariateNormal(net.model)
    loss = Trace_ELBO(num_particles=128, vectorize_particles=True, max_plate_nesting=1)
    if rate is None:
        optim = pyronat.NaturalGradient(
            lr=LinearDecay(1.0, steps),
            damping=ConstantDamping(0.0, 1e-3),
            trust_region=KLTrustRegion(guide=5.0),
            curvature=RunningAverage(decay=0.0, refresh=1),
            momentum=Momentum(0.0),
            shrinkage=Shrinkage(least=1.0),
        )
        svi = pyronat.NaturalSVI(net.model, guide, optim, loss)
        for _ in range(steps):
            svi.step(*data)
    else:
        schedule = LinearDecay(1.0, steps)
        adam = pyro.optim.LambdaLR({
            "optimizer": torch.optim.Adam,
            "optim_args": {"lr": rate},
            "lr_lambda": schedule,
        })
        stock = SVI(net.model, guide, adam, loss)
        for _ in range(steps):
            stock.step(*data)
            adam.step()
    with torch.no_grad():
        q = guide.get_posterior()
        return float(net.posterior(*data).divergence_from(q.mean, q.covariance_matrix))


def test_ten_times_fewer_steps_than_tuned_adam_to_the_exact_posterior() -> None:
    """20 natural steps against 200 of Adam at the best of five rates; same loss, same seeds."""
    seeds = range(3)
    natural = [gap_after(20, seed, None) for seed in seeds]
    adam = {
        rate: [gap_after(200, seed, rate) for seed in seeds] for rate in (0.05, 0.1, 0.2, 0.3, 0.5)
    }
    best = min(adam, key=lambda rate: statistics.fmean(adam[rate]))
    print(f"natural {natural}, Adam {adam}")
    assert 0.05 < best < 0.5, "the best rate lies within the grid"
    assert statistics.fmean(natural) < 0.05
    assert statistics.fmean(adam[best]) > 0.05
    assert statistics.fmean(adam[best]) > 1.2 * statistics.fmean(natural)
