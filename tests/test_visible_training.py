"""Training in the visible geometry: where EM crawls, through the guide, and as wake–sleep."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO
from torch import Tensor

import pyronat
from models import helmholtz, latent_class, mixture, noisy_or
from models.factor_analysis import FactorAnalysis
from models.helmholtz import Helmholtz
from models.hmm import DiscreteHMM
from pyronat import Euclidean, Full, NaturalGradient, NaturalSVI, ReweightedWakeSleep, Visible
from pyronat.geometry import Geometry
from pyronat.steps import (
    ConstantDamping,
    HeldOut,
    KLTrustRegion,
    LevenbergMarquardt,
    Momentum,
    RunningAverage,
    Tally,
)
from pyronat.testing import z_score

TOLERANCE = 1e-7


def evaluate(net: Any, x: Tensor) -> tuple[float, float]:
    """Mean log likelihood per datum, and the norm of its gradient in Pyro's coordinates."""
    store = pyro.get_param_store()
    leaves = [leaf for _, leaf in sorted(store.named_parameters())]
    value = net.log_likelihood({name: store[name] for name in store}, x) / len(x)
    gradients = torch.autograd.grad(value, leaves)
    return value.item(), torch.cat([part.reshape(-1) for part in gradients]).norm().item()


def iterations(net: Any, x: Tensor, svi: NaturalSVI, most: int) -> int:
    """Steps until the gradient vanishes."""
    for number in range(1, most + 1):
        svi.step(x)
        if evaluate(net, x)[1] < TOLERANCE:
            return number
    return most + 1


def of_factors(factors: int, noise: float, isotropic: bool) -> Callable[[], tuple[Any, Tensor]]:
    def make() -> tuple[Any, Tensor]:
        net = FactorAnalysis(10, factors, noise, isotropic)
        return net, net.make_data(0, 200)

    return make


def collapsed(net: Any) -> NaturalSVI:
    optim = NaturalGradient(geometry=Full("exact"), damping=LevenbergMarquardt())
    return NaturalSVI(net.collapsed, lambda x: None, optim, Trace_ELBO())


def enumerated(posterior: Any) -> Callable[[Any], NaturalSVI]:
    def make(net: Any) -> NaturalSVI:
        geometry = Visible(LevenbergMarquardt(), posterior=posterior)
        loss = TraceEnum_ELBO(max_plate_nesting=1)
        return NaturalSVI(net.model, net.guide, NaturalGradient(geometry=geometry), loss)

    return make


SLOW: dict[str, tuple[Callable[[], tuple[Any, Tensor]], Callable[[Any], NaturalSVI], int]] = {
    "factor analysis": (of_factors(2, 1.0, False), collapsed, 16),
    "factor analysis, noise 1e-3": (of_factors(3, 1e-3, False), collapsed, 28),
    "PPCA, noise 1e-3": (of_factors(3, 1e-3, True), collapsed, 22),
    "latent class": (
        lambda: (latent_class.LatentClass(), latent_class.make_data(0)),
        enumerated("exact"),
        37,
    ),
    "noisy-or": (lambda: (noisy_or.NoisyOr(), noisy_or.make_data(0)), enumerated("exact"), 13),
    "HMM": (
        lambda: (DiscreteHMM(3, 3, 4), DiscreteHMM(3, 3, 4).make_data(0, 10000)),
        enumerated("exact"),
        30,
    ),
    "mixture": (
        lambda: (mixture.GaussianMixture(), mixture.make_data(1)),
        enumerated("enumerate"),
        55,
    ),
}
"""Problems on which EM needs hundreds to hundred thousands of steps, and the most allowed here."""


@pytest.mark.parametrize("name", SLOW)
def test_few_steps_where_em_is_slow(name: str) -> None:
    make, svi_of, most = SLOW[name]
    net, x = make()
    assert iterations(net, x, svi_of(net), most) <= most
    params = {key: value.detach() for key, value in pyro.get_param_store().items()}
    value = net.log_likelihood(params, x).item()
    for _ in range(20):
        params = net.em_step(params, x)
    # EM finds nothing better nearby.
    assert net.log_likelihood(params, x).item() - value < 1e-8 * len(x)


def test_the_closed_form_of_ppca_is_reached() -> None:
    net, x = of_factors(3, 1e-3, True)()
    svi = collapsed(net)
    iterations(net, x, svi, 30)
    optimum = float(net.optimum(x).log_likelihood) / len(x)
    assert evaluate(net, x)[0] == pytest.approx(optimum, abs=1e-8)


def test_em_is_slow_there() -> None:
    """Negative control: after a hundred times as many steps EM is not done."""
    net, x = of_factors(3, 1e-3, False)()
    params = net.initial
    for _ in range(2000):
        params = net.em_step(params, x)
    for name, value in params.items():
        pyro.param(name, value.clone(), constraint=net.constraints[name])
    assert evaluate(net, x)[1] > 1e-3


# --- through the guide -------------------------------------------------------------------------


def test_the_guide_mediates_the_metric_of_the_collapsed_program() -> None:
    """With exact posterior draws E[ŝŝᵀ] = (1 − 1/K) G_V + G/K; G_V without the factors is exact."""
    net = FactorAnalysis(5, 2, noise=0.4)
    x = net.make_data(0, 400)
    visible = pyronat.fisher(net.collapsed, x, geometry=Full("exact")).dense()[0]
    for num_particles in (2, 5):
        full, found = [], []
        for seed in range(24):
            pyro.set_rng_seed(seed)
            fisher = pyronat.fisher(
                net.model,
                x,
                geometry=Visible(0, num_particles, 400, estimator="direct"),
                guide=net.recognize,
                num_samples=10,
            )
            full.append(fisher.full.dense()[0])
            found.append(fisher.dense()[0])
        share = 1 / num_particles
        exact = torch.stack(full).mean(0)
        difference = torch.stack(found) - share * torch.stack(full)
        assert z_score(difference, (1 - share) * visible).abs().max() < 4.5
        assert z_score(torch.stack(found), exact).abs().max() > 8


def test_training_through_the_guide_reaches_the_optimum_of_the_collapsed_program() -> None:
    """Down to the Monte-Carlo floor, and in fewer steps than the full geometry."""
    net = FactorAnalysis(6, 2, noise=0.3)
    x = net.make_data(0, 200)
    params = net.initial
    for _ in range(3000):
        params = net.em_step(params, x)
    optimum = net.log_likelihood(params, x).item() / len(x)

    def gap(geometry: Geometry, steps: int) -> float:
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        optim = NaturalGradient(
            lr=0.5,
            geometry=geometry,
            damping=ConstantDamping(0.0, 1e-3),
            curvature=RunningAverage(0.5, 1),
            trust_region=KLTrustRegion(model=math.inf),
            momentum=Momentum(0.0),
        )
        svi = NaturalSVI(net.model, net.recognize, optim, Trace_ELBO(num_particles=5))
        for _ in range(steps):
            svi.step(x)
        assert svi.info is not None
        if isinstance(geometry, Visible):
            assert svi.info.dream_ess == pytest.approx((10.0, 10.0, 10.0))
        return optimum - evaluate(net, x)[0]

    assert gap(Visible(0.1, full=Full("model")), 30) < 0.01
    assert gap(Full("model"), 30) > 0.05


def test_branches_of_model_and_guide() -> None:
    """Hidden sites that exist in some runs only, against brute force."""

    def model(x: Tensor) -> None:
        a = pyro.sample("a", dist.Bernoulli(logits=pyro.param("top", torch.tensor(0.1))))
        logits = pyro.param("c", torch.tensor(0.9))
        if a > 0.5:
            b = pyro.sample("b", dist.Bernoulli(logits=pyro.param("middle", torch.tensor(0.3))))
            logits = pyro.param("w", torch.tensor([0.5, -1.5]))[b.long()]
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Bernoulli(logits=logits), obs=x)

    def guide(x: Tensor) -> None:
        a = pyro.sample("a", dist.Bernoulli(logits=pyro.param("qa", torch.tensor(0.1))))
        if a > 0.5:
            pyro.sample("b", dist.Bernoulli(logits=pyro.param("qb", torch.tensor(0.1))))

    x = torch.tensor([1.0, 0.0, 1.0])
    pyronat.testing.parameters(model, x)
    expected, layout = pyronat.testing.enumerated_visible_fisher(model, x)
    places = dict(layout)
    geometry = Visible(0, num_particles=6, num_dreams=80, estimator="direct")
    fisher = pyronat.fisher(model, x, geometry=geometry, guide=guide, num_samples=40)
    slices = fisher.full.slices()
    order = torch.cat([torch.arange(places[n].start, places[n].stop) for n, _ in slices])
    visible = expected[order][:, order]
    missing = (fisher.full.dense()[0] - visible).norm()
    assert (fisher.dense()[0] - visible).norm() < 0.6 * missing


# --- mixing for minibatches --------------------------------------------------------------------


def test_held_out_gains_move_the_mixing() -> None:
    rule = HeldOut(initial=0.3, window=2)
    once = rule.judged(replace(rule.start(), promised=1.0), 1.0)
    assert once == Tally(0.3, gain=1.0, predicted=1.0, count=1)
    once = replace(once, promised=1.0)
    assert rule.judged(once, 1.0) == Tally(0.15)
    assert rule.judged(once, -0.9) == Tally(0.6)
    assert rule.judged(once, -0.2) == Tally(0.3)
    assert rule.judged(Tally(0.9, count=1, promised=1.0), -1.0).value == 1.0
    assert rule.judged(Tally(0.01, count=1, promised=1.0), 1.0).value == 0.01


@pytest.mark.parametrize(("size", "rises"), [(5, True), (800, False)])
def test_noise_turns_to_the_full_geometry(size: int, rises: bool) -> None:
    """Small batches promise what the next one does not keep; the whole data set keeps it."""
    net, x = latent_class.LatentClass(), latent_class.make_data(0, 800)
    geometry = Visible(HeldOut(window=4), posterior="enumerate", num_dreams=200)
    optim = NaturalGradient(lr=0.3, geometry=geometry)
    svi = NaturalSVI(net.model, net.guide, optim, TraceEnum_ELBO(max_plate_nesting=1))
    generator = torch.Generator().manual_seed(0)
    for _ in range(25):
        svi.step(x[torch.randperm(len(x), generator=generator)[:size]])
    assert svi.info is not None
    assert svi.info.mixing > 0.5 if rises else svi.info.mixing < 0.1


# --- wake–sleep --------------------------------------------------------------------------------


WAKE_SLEEP: dict[str, tuple[Callable[[], ELBO], Geometry, Geometry | None]] = {
    "natural wake and natural sleep": (
        lambda: ReweightedWakeSleep(1, insomnia=0.0),
        Full(),
        Full(),
    ),
    "visible wake and natural sleep": (
        lambda: ReweightedWakeSleep(1, insomnia=0.0),
        Visible(),
        Full(),
    ),
    "natural reweighted wake-sleep": (lambda: ReweightedWakeSleep(5), Full(), Full()),
    "visible reweighted wake-sleep": (lambda: ReweightedWakeSleep(5), Visible(), Euclidean()),
}


@pytest.mark.parametrize("name", WAKE_SLEEP)
def test_natural_wake_sleep_beats_adam(name: str) -> None:
    """After 60 steps on the Helmholtz machine, Adam with the better of two rates."""
    make_loss, geometry, guide_geometry = WAKE_SLEEP[name]
    x = helmholtz.make_data(0, 400)

    def train(step_of: Callable[[Helmholtz], Callable[[Tensor], float]]) -> float:
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        machine = Helmholtz((16, 8, 4))
        machine.model(x)
        machine.guide(x)
        step = step_of(machine)
        for _ in range(60):
            step(x[torch.randperm(len(x))[:100]])
        return -machine.exact_log_likelihood(x).mean().item()

    def natural(machine: Helmholtz) -> Callable[[Tensor], float]:
        optim = NaturalGradient(lr=0.2, geometry=geometry, guide_geometry=guide_geometry)
        return NaturalSVI(machine.model, machine.guide, optim, make_loss()).step

    def adam(rate: float) -> Callable[[Helmholtz], Callable[[Tensor], float]]:
        def make(machine: Helmholtz) -> Callable[[Tensor], float]:
            optim = pyro.optim.Adam({"lr": rate})
            step: Callable[[Tensor], float] = pyro.infer.SVI(
                machine.model, machine.guide, optim, make_loss()
            ).step
            return step

        return make

    assert train(natural) < min(train(adam(rate)) for rate in (0.03, 0.1))


def test_the_metric_of_natural_sleep_comes_from_dreams() -> None:
    """A layer of the guide whose inputs are always off in the data is known from dreams alone."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            h = pyro.sample("h", dist.Bernoulli(logits=pyro.param("prior", torch.zeros(()))))
            logits = pyro.param("w", torch.ones(2)) + h.unsqueeze(-1)
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        weight = pyro.param("v", torch.zeros(1, 2))
        with pyro.plate("data", len(x)):
            pyro.sample("h", dist.Bernoulli(logits=(x @ weight.T).squeeze(-1)))

    def average(insomnia: float) -> Tensor:
        pyro.clear_param_store()
        optim = NaturalGradient(guide_geometry=Full())
        svi = NaturalSVI(model, guide, optim, ReweightedWakeSleep(2, insomnia))
        svi.step(torch.zeros(50, 2))
        (curvature,) = optim.sides["guide"].average.values()
        assert curvature.matrix is not None
        return curvature.matrix

    assert average(1.0).abs().max() == 0
    assert average(0.0).diagonal(dim1=-2, dim2=-1).min() > 1


def test_a_district_with_a_block_that_no_run_has_reached_is_left_to_the_full_geometry() -> None:
    net, x = latent_class.LatentClass(), latent_class.make_data(0, 100)
    svi = enumerated("exact")(net)
    svi.step(x)
    side = svi.optim.sides["model"]
    assert len(side.spectra) == 1
    unreached = sorted(side.average)[0]
    average = {name: value for name, value in side.average.items() if name != unreached}
    partial = replace(side, average=average).factored(ConstantDamping(1.0), 1.0)
    assert not partial.spectra
    found = partial.directions({}, 0.5).changes(torch.ones(()))
    assert found.keys() < {"probs", "weights"}
