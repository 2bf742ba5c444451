"""Buffers of modules: training moves them as stock Pyro does, and nothing else moves them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

import pyronat
from pyronat import Full, NaturalGradient, NaturalSVI
from pyronat.buffers import Buffers, kept_buffers, noted_buffers
from pyronat.errors import InvalidData
from pyronat.steps import LevenbergMarquardt

X = torch.tensor([[1, 0, 1, 1], [0, 0, 1, 0], [1, 1, 0, 1]] * 5, dtype=torch.float64)


class Autoencoder(nn.Module):
    """A variational autoencoder, both of whose networks normalize over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 4))
        self.decoder = nn.Sequential(nn.Linear(2, 5), nn.BatchNorm1d(5), nn.Linear(5, 4))

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            prior = dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1)
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


@pytest.fixture
def net() -> Autoencoder:
    return Autoencoder()


def kept(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.named_buffers()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> Iterator[bool]:
    return (torch.equal(first[name], second[name]) for name in first)


def counts(net: Autoencoder) -> list[int]:
    return [int(part[1].num_batches_tracked) for part in (net.encoder, net.decoder)]


def trained(net: Autoencoder, **options: Any) -> NaturalSVI:
    return NaturalSVI(net.model, net.guide, NaturalGradient(0.1, **options))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"geometry": Full("model"), "guide_geometry": pyronat.Euclidean()},
        {"damping": LevenbergMarquardt()},
    ],
    ids=["defaults", "dreams", "tried steps"],
)
def test_every_step_counts_one_batch(net: Autoencoder, options: dict[str, Any]) -> None:
    svi = trained(net, **options)
    for step in range(1, 8):
        svi.step(X)
        assert counts(net) == [step, step]


def test_running_means_are_those_of_stock_pyro(net: Autoencoder) -> None:
    start = {name: value.clone() for name, value in net.state_dict().items()}
    stock = SVI(net.model, net.guide, pyro.optim.Adam({"lr": 0.0}), Trace_ELBO())
    for _ in range(3):
        stock.step(X)
    expected = kept(net.encoder)
    net.load_state_dict(start)
    pyro.clear_param_store()
    svi = NaturalSVI(net.model, net.guide, NaturalGradient(1e-20))
    for _ in range(3):
        svi.step(X)
    found = kept(net.encoder)
    assert expected.keys() == found.keys()
    for name in expected:
        assert torch.allclose(expected[name], found[name])


@pytest.mark.parametrize(
    "look",
    [
        lambda net, svi: svi.evaluate_loss(X),
        lambda net, svi: svi.settle(X),
        lambda net, svi: pyronat.analyze(net.model, X, guide=net.guide),
        lambda net, svi: pyronat.fisher(net.model, X, geometry=Full("model")),
    ],
    ids=["evaluate_loss", "settle", "analyze", "fisher"],
)
def test_looking_changes_nothing(
    net: Autoencoder, look: Callable[[Autoencoder, NaturalSVI], object]
) -> None:
    svi = trained(net)
    svi.step(X)
    before = kept(net)
    look(net, svi)
    assert all(same(before, kept(net)))


def test_refused_data_leave_no_trace(net: Autoencoder) -> None:
    svi = trained(net)
    svi.step(X)
    before = kept(net)
    bad = X.clone()
    bad[0, 0] = torch.nan
    with pytest.raises(InvalidData):
        svi.step(bad)
    assert all(same(before, kept(net)))
    net.encoder(bad)  # which is not as harmless by itself
    assert not all(same(before, kept(net)))


def test_steps_that_are_not_finite_leave_no_trace() -> None:
    norm = nn.BatchNorm1d(2)
    huge = torch.full((), 1.0)

    def model(x: Tensor) -> None:
        pyro.module("norm", norm)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(norm(x) * huge, 1.0).to_event(1), obs=x)

    x = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.0, 1.0]])
    svi = NaturalSVI(model, lambda x: None, NaturalGradient(0.1, Full("posterior")))
    svi.step(x)
    before = kept(norm)
    huge.fill_(1e300)  # the loss overflows
    svi.step(x)
    assert svi.info is not None and svi.info.rejected == "loss"
    assert all(same(before, kept(norm)))


class Counter(nn.Module):
    """Puts another tensor in the place of its buffer, and has one that is None."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("runs", torch.zeros(()))
        self.register_buffer("nothing", None)

    def forward(self, x: Tensor) -> Tensor:
        self.runs = self.runs + 1
        return x


def test_buffers_that_are_replaced_come_back() -> None:
    counter = Counter()
    runs = counter.runs
    with kept_buffers():
        counter(X)
        assert counter.runs == 1
    assert counter.runs is runs and runs == 0
    with noted_buffers() as noted:
        counter(X)
    assert counter.runs == 1
    noted.restore()
    assert counter.runs is runs


def test_contexts_may_be_nested_and_end_with_errors() -> None:
    norm = nn.BatchNorm1d(4)
    with kept_buffers():
        norm(X)
        inside = kept(norm)
        with pytest.raises(ZeroDivisionError), kept_buffers():
            norm(X)
            raise ZeroDivisionError
        assert all(same(inside, kept(norm)))
    assert int(norm.num_batches_tracked) == 0
    norm(X)
    assert int(norm.num_batches_tracked) == 1  # no hook is left


def test_graphs_are_differentiated_after_buffers_have_come_back() -> None:
    norm = nn.BatchNorm1d(4).eval()
    with kept_buffers():
        loss = norm(X).square().sum()
    loss.backward()
    assert norm.weight.grad is not None


def test_buffers_without_a_shape_are_passed_over() -> None:
    lazy = nn.LazyBatchNorm1d()
    buffers = Buffers()
    buffers.note(lazy, None)
    buffers.restore()
    assert lazy(X).shape == X.shape
