"""Streams: the mixing that follows from the spectrum, and the optimizer that is set up for them."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceEnum_ELBO
from states import parameters, same
from torch import Tensor

import pyronat
from models.latent_class import LatentClass
from pyronat import Full, NaturalGradient, NaturalSVI, Visible, streaming
from pyronat.operators import cholesky
from pyronat.spectrum import VisibleAverage, spectrum
from pyronat.steps import (
    ConstantDamping,
    InverseTime,
    KLTrustRegion,
    RetainedShare,
    RunningAverage,
)

COPIES = 50
"""Independent copies of one problem, so that one run has many seeds."""
BATCH = 100
BEHIND = 10


def mixtures(x: Tensor) -> None:
    """Weights of two overlapping normal distributions, which are known."""
    weights = pyro.param("weights", lambda: torch.zeros(COPIES))
    with pyro.plate("data", len(x), dim=-2), pyro.plate("copies", COPIES, dim=-1):
        h = pyro.sample("h", dist.Bernoulli(logits=weights), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(h, 1.0), obs=x)


def nothing(x: Tensor) -> None:
    pass


def information() -> tuple[float, float]:
    """Visible and full Fisher information of a weight of one half, of one datum."""
    x = torch.arange(-8, 9, 0.01)
    first, second = (torch.exp(-((x - m) ** 2) / 2) / math.sqrt(2 * math.pi) for m in (0.0, 1.0))
    score = (second - first) / 4 / ((first + second) / 2)
    return float((0.01 * score**2 * (first + second) / 2).sum()), 0.25


def excess(optim: NaturalGradient, batches: int) -> float:
    """Mean of squared error · information · data over copies, from an efficient start at 0."""
    visible, _ = information()
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(COPIES, generator=generator) / math.sqrt(visible * BEHIND * BATCH)
    pyro.clear_param_store()
    pyro.param("weights", start.to(torch.get_default_device()))
    svi = NaturalSVI(mixtures, nothing, optim, TraceEnum_ELBO(max_plate_nesting=2))
    for _ in range(batches):
        h = torch.rand(BATCH, COPIES, generator=generator) < 0.5
        x = h + torch.randn(BATCH, COPIES, generator=generator)
        svi.step(x.to(torch.get_default_device()))
    error = pyro.param("weights").detach().square().mean()
    return float(error * visible * (BEHIND + batches) * BATCH)


def test_streaming_is_efficient_where_online_em_is_not() -> None:
    """Squared errors of 50 copies have mean 1 and standard error √(2/50); 1/t EM forgets slowly."""
    visible, full = information()
    share = visible / full
    assert 0.1 < share < 0.25
    batches, error = 300, math.sqrt(2 / COPIES)
    found = excess(streaming(BEHIND), batches)
    assert abs(found - 1) < 4 * error
    em = NaturalGradient(
        InverseTime(1 / (BEHIND + 1), BEHIND + 1),
        Full("model"),
        damping=ConstantDamping(0.0, 1e-3),
    )
    # E' = E (1 − 2a) + a² in log time, a the share of information that is retained.
    grown = ((BEHIND + batches) / BEHIND) ** (1 - 2 * share)
    expected = (1 + share**2 / (1 - 2 * share)) * grown - share**2 / (1 - 2 * share)
    assert abs(excess(em, batches) / expected - 1) < 4 * error
    assert expected > 2.5


# --- the rule ----------------------------------------------------------------------------------


def test_the_rule_is_the_least_share_within_bounds() -> None:
    rule = RetainedShare(factor=2.0, noise=1.0, smallest=0.01)
    assert rule.of(0.1, 0.05) == 0.2
    assert rule.of(0.1, 0.5) == 0.5
    assert rule.of(0.001, 0.001) == 0.01
    assert rule.of(0.9, 0.1) == rule.of(0.1, 7.0) == 1.0


@pytest.mark.parametrize("kind", ["visible", "missing"])
def test_shares_are_those_of_information_without_damping(kind: str) -> None:
    """One direction has no information at all, another less than the damping: neither counts."""
    full = torch.diag(torch.tensor([1.0, 4.0, 0.0, 1e-4]))
    retained = torch.tensor([0.5, 0.02, 0.0, 1e-3])
    matrix = torch.diag(retained) @ full
    if kind == "missing":
        matrix = full - matrix
    damping = torch.tensor([0.1])
    average = VisibleAverage(kind, matrix, None, 1000.0)  # type: ignore[arg-type]
    found = spectrum(average, {"b": cholesky(full[None], damping)}, {"b": damping})
    assert found.least_share == pytest.approx(0.02, rel=1e-9)
    assert found.noise == 4 / 1000
    # Without knowing the damping, the direction without information would rule.
    blind = spectrum(average, {"b": cholesky(full[None], damping)})
    assert abs(blind.least_share - 0.02) > 1e-4
    assert found.mixing_by(0.3) == 0.3
    assert found.mixing_by(RetainedShare()) == pytest.approx(0.01, rel=1e-9)


def latent_class(optim: NaturalGradient) -> tuple[NaturalSVI, Tensor]:
    net = LatentClass(2, 4)
    data = net.sample(net.start(1), 100, 0)
    loss = TraceEnum_ELBO(max_plate_nesting=1)
    return NaturalSVI(net.model, net.guide, optim, loss), data


def test_mixing_falls_as_dreams_add_up() -> None:
    optim = streaming(curvature=RunningAverage(0.96, 1))
    svi, data = latent_class(optim)
    found = []
    for _ in range(30):
        svi.step(data)
        assert svi.info is not None
        found.append(svi.info.mixing)
        if len(found) == 1:
            first = next(iter(optim.sides["model"].spectra.values())).least_share
    (some,) = optim.sides["model"].spectra.values()
    width = len(some.directions)
    assert found[0] == pytest.approx(max(0.3 * width / 200, 0.5 * first))
    assert found[-1] == max(0.5 * some.least_share, 0.3 * some.noise, 1e-4)
    assert some.noise < width / 200 / 3
    assert 0 < some.least_share < 1


# --- the optimizer -----------------------------------------------------------------------------


def test_steps_weigh_a_batch_as_one_of_all_that_were_seen() -> None:
    lr = streaming(50).lr
    assert [lr(t) for t in (0, 1, 49)] == pytest.approx([1 / 51, 1 / 52, 1 / 100])
    assert streaming(0).lr(0) == 1


def test_other_options_go_before() -> None:
    optim = streaming(20, "guide", trust_region=KLTrustRegion(3.0), exclude=["b*"], seed=7)
    assert optim.trust_region == KLTrustRegion(3.0)
    assert optim.exclude == ("b*",) and optim.seed == 7
    assert isinstance(optim.geometry, Visible)
    assert optim.geometry.posterior == "guide" and optim.geometry.num_particles == 20
    assert pyronat.streaming is streaming


def test_a_negative_number_of_batches_is_refused() -> None:
    with pytest.raises(ValueError, match="batches_behind_start"):
        streaming(-1)


def test_a_stream_resumes_to_the_last_bit() -> None:
    first, data = latent_class(streaming(curvature=RunningAverage(0.9, 2)))
    for _ in range(3):
        first.step(data)
    state, params = first.optim.get_state(), parameters()
    rng = torch.get_rng_state()
    for _ in range(3):
        first.step(data)
    end = parameters()
    with torch.no_grad():
        for name, leaf in pyro.get_param_store().named_parameters():
            leaf.copy_(params[name])
    torch.set_rng_state(rng)
    second, _ = latent_class(streaming(curvature=RunningAverage(0.9, 2)))
    second.optim.set_state(state)
    for _ in range(3):
        second.step(data)
    assert same(parameters(), end)
