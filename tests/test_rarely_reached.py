"""Parameters that few measurements of curvature reach.

Local variables with parameters of their own, of which a batch holds a few, and branches of programs
that few runs take.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor
from torch.distributions import constraints

from pyronat import Full, NaturalGradient, NaturalSVI, tables
from pyronat.curvature import Curvature
from pyronat.errors import BlockTooLarge
from pyronat.jacobians import MAX_JACOBIAN_ENTRIES
from pyronat.operators import BlockMatrix, Diagonal
from pyronat.steps import KLTrustRegion, LinearDecay, Momentum, RunningAverage

SIZE, BATCH, NOISE = 300, 30, 0.5


@pytest.fixture
def x() -> Tensor:
    return 1.1 * torch.randn(SIZE) + 0.5


def plate(x: Tensor) -> Any:
    return pyro.plate("data", len(x), subsample_size=BATCH)


def model(x: Tensor) -> None:
    mean = pyro.param("mean", torch.tensor(0.0))
    with plate(x) as index:
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("x", dist.Normal(z, NOISE), obs=x[index])


def guide(x: Tensor) -> None:
    with plate(x):
        loc = pyro.param("loc", torch.zeros(len(x)), event_dim=0)
        scale = pyro.param(
            "scale", torch.ones(len(x)), constraint=constraints.positive, event_dim=0
        )
        pyro.sample("z", dist.Normal(loc, scale))


def surprise(x: Tensor, mean: float) -> float:
    """The negative log evidence, which the loss comes down to with the exact posterior."""
    marginal = dist.Normal(mean, (1 + NOISE**2) ** 0.5)
    return -float(marginal.log_prob(x).sum())


def test_every_posterior_is_found_though_batches_hold_a_tenth_of_them(x: Tensor) -> None:
    steps = 400
    svi = NaturalSVI(model, guide, NaturalGradient(LinearDecay(0.3, steps)))
    for _ in range(steps):
        svi.step(x)
    mean = float(pyro.param("mean").detach())
    exact = (mean + x / NOISE**2) / (1 + 1 / NOISE**2)
    loc, scale = pyro.param("loc").detach(), pyro.param("scale").detach()
    deviation = (1 + 1 / NOISE**2) ** -0.5
    assert float((loc - exact).square().mean().sqrt()) < 0.5 * deviation
    assert float((scale / deviation).log().abs().mean()) < 0.2
    loss = sum(svi.evaluate_loss(x) for _ in range(20)) / 20
    assert abs(mean - float(x.mean())) < 0.1
    assert loss < surprise(x, mean) + 0.15 * SIZE


def test_autoguides_that_make_their_plates_are_trained(x: Tensor) -> None:
    def hierarchical(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
        with plate(x) as index:
            z = pyro.sample("z", dist.Normal(mean, 1.0))
            pyro.sample("x", dist.Normal(z, NOISE), obs=x[index])

    auto = AutoNormal(hierarchical, create_plates=plate)
    svi = NaturalSVI(hierarchical, auto, NaturalGradient(LinearDecay(0.3, 200)))
    losses = torch.tensor([svi.step(x) for _ in range(200)])
    assert losses[-20:].mean() < 0.6 * losses[:5].mean()


def test_curvature_is_that_of_the_variables_in_the_batch(x: Tensor) -> None:
    """A normal variable in a batch counts N / B times with 1 / s² and, in log s, 2."""
    optim = NaturalGradient(0.1)
    svi = NaturalSVI(model, guide, optim)
    svi.step(x)
    average = optim.sides["guide"].average
    loc, log_scale = (average[name].operator.dense().flatten() for name in ("loc", "scale"))
    seen = loc > 0
    assert int(seen.sum()) == BATCH and torch.equal(seen, log_scale > 0)
    assert torch.allclose(loc[seen], torch.full((BATCH,), SIZE / BATCH))
    assert torch.allclose(log_scale[seen], torch.full((BATCH,), 2.0 * SIZE / BATCH))


def test_there_may_be_more_of_them_than_a_jacobian_has_columns() -> None:
    x = torch.randn(MAX_JACOBIAN_ENTRIES + 10)
    optim = NaturalGradient(0.3)
    svi = NaturalSVI(many, many_guide, optim)
    losses = [svi.step(x) for _ in range(8)]
    assert optim.sides["guide"].average["local"].operator.mean_diagonal().shape == x.shape
    assert all(math.isfinite(loss) for loss in losses)


def many(x: Tensor) -> None:
    with pyro.plate("data", len(x), subsample_size=100) as index:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, NOISE), obs=x[index])


def many_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x), subsample_size=100):
        local = pyro.param("local", torch.zeros(len(x)), event_dim=0)
        pyro.sample("z", dist.Normal(local, 0.5))


@pytest.mark.parametrize("most", [2**27, 2**14])
def test_rows_of_large_tables_may_be_read_twice(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(tables, "MOST", most)

    def model(row: Tensor, y: Tensor) -> None:
        effects = pyro.param("effects", torch.zeros(MAX_JACOBIAN_ENTRIES + 10))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(effects[row], 1.0), obs=y)

    row = torch.arange(100)
    row[1] = 0
    optim = NaturalGradient(0.5, Full("posterior"))
    svi = NaturalSVI(model, lambda row, y: None, optim)
    if most < 2**27:
        with pytest.raises(BlockTooLarge, match="effects has"):
            svi.step(row, row + 1.0)
        return
    svi.step(row, row + 1.0)
    counts = optim.sides["model"].average["effects"].operator.mean_diagonal()
    assert counts[:3].tolist() == [2.0, 0.0, 1.0] and float(counts.sum()) == 100


@pytest.mark.parametrize("refresh", [1, 40])
def test_what_no_batch_has_held_moves_like_the_others(refresh: int, x: Tensor) -> None:
    """Or the first batch that holds it after a refresh would find a step without bound."""
    optim = NaturalGradient(0.3, curvature=RunningAverage(refresh=refresh))
    svi = NaturalSVI(model, guide, optim)
    before = torch.zeros(SIZE)
    for _ in range(15):
        svi.step(x)
        loc = pyro.param("loc").detach().clone()
        assert float((loc - before).abs().max()) < 10
        before = loc
    assert float((before != 0).double().mean()) > 0.6


@pytest.mark.parametrize("form", [lambda v: BlockMatrix(v.reshape(-1, 1, 1)), Diagonal])
def test_units_keep_what_they_had_when_they_were_last_seen(
    form: Callable[[Tensor], BlockMatrix | Diagonal],
) -> None:
    def curvature(*values: float) -> Curvature:
        held = torch.tensor(values)
        return Curvature(form(held.reshape(-1, 1)), held, held)

    def values(operator: Any) -> list[float]:
        return operator.held.flatten().tolist()  # type: ignore[no-any-return]

    first = curvature(4.0, 2.0, 0.0, 0.0)
    mixed = first.visit(curvature(8.0, 0.0, 6.0, 0.0), 0.25)
    assert values(mixed.operator) == [5.0, 2.0, 6.0, 0.0]
    assert values(mixed.filled()) == pytest.approx([5.0, 2.0, 6.0, 13 / 3])
    assert values(first.mix(curvature(8.0, 0.0, 6.0, 0.0), 0.25).operator) == [5.0, 1.5, 1.5, 0.0]


def test_the_loss_of_stock_pyro_is_what_is_compared_with(x: Tensor) -> None:
    """At equal steps, Adam at the best of its rates."""
    steps = 60

    def judged() -> float:
        loss = Trace_ELBO(num_particles=20, vectorize_particles=True, max_plate_nesting=1)
        return sum(float(loss.loss(model, guide, x)) for _ in range(10)) / 10

    def by_adam(rate: float) -> float:
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        optim = pyro.optim.LambdaLR({
            "optimizer": torch.optim.Adam,
            "optim_args": {"lr": rate},
            "lr_lambda": LinearDecay(1.0, steps),
        })
        svi = pyro.infer.SVI(model, guide, optim, Trace_ELBO())
        for _ in range(steps):
            svi.step(x)
            optim.step()
        return judged()

    adam = min(map(by_adam, (0.03, 0.1, 0.3)))
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    svi = NaturalSVI(model, guide, NaturalGradient(LinearDecay(0.3, steps)))
    for _ in range(steps):
        svi.step(x)
    assert judged() < adam


# --- branches ----------------------------------------------------------------------------------


def branching(x: Tensor) -> None:
    """Data around one of five means, which one says how often a coin has shown heads in a row."""
    heads = pyro.param("heads", torch.tensor(0.5), constraint=constraints.unit_interval)
    means = pyro.param("means", torch.zeros(5))
    count = 0
    while count < 4 and pyro.sample(f"coin {count}", dist.Bernoulli(heads)) > 0.5:
        count += 1
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(means[count], 1.0), obs=x)


def branching_guide(x: Tensor) -> None:
    logits = pyro.param("logits", torch.zeros(5))
    count = 0
    while count < 4 and pyro.sample(f"coin {count}", dist.Bernoulli(logits=logits[count])) > 0.5:
        count += 1


@pytest.mark.parametrize("seed", range(4))
def test_means_of_rare_branches_stay_within_the_data(seed: int) -> None:
    """Without curvature of its own, a mean was carried twenty deviations beyond the data."""
    pyro.set_rng_seed(seed)
    x = 1.0 + torch.randn(60)
    svi = NaturalSVI(branching, branching_guide, NaturalGradient(LinearDecay(0.1, 40)))
    for _ in range(40):
        svi.step(x)
        means = pyro.param("means").detach()
        assert float(means.abs().max()) < 2.5


def test_units_without_curvature_count_as_if_all_data_reached_them() -> None:
    def model(x: Tensor, rows: Tensor) -> None:
        means = pyro.param("means", torch.zeros(3))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(means[rows], 1.0), obs=x)

    x = torch.full((20,), 4.0)
    full = Full("posterior")
    optim = NaturalGradient(1.0, full, momentum=Momentum(0.0), trust_region=KLTrustRegion())
    svi = NaturalSVI(model, lambda x, rows: None, optim)
    svi.step(x, torch.zeros(20, dtype=torch.int64))  # measures, and reaches the first row alone
    before = pyro.param("means").detach().clone()
    assert before[0] > 0 and not before[1:].any()
    svi.step(x, torch.ones(20, dtype=torch.int64))  # measures nothing
    assert svi.info is not None and not svi.info.refreshed
    assert 0 < float(pyro.param("means").detach()[1]) < 4
