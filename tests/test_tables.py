"""Jacobians by rows of tables: those of every element, and refused where they would not be."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceEnum_ELBO
from torch import Tensor

from models import bayes_net
from models.hidden_nodes import HiddenNodes
from models.mixture import GaussianMixture
from pyronat import NaturalGradient, NaturalSVI, observation, tables
from pyronat.autograd import SampleGate
from pyronat.geometry import Full, Visible
from pyronat.jacobians import jacobian
from pyronat.study import fisher

ELEMENTS = 60
PARALLEL = {"infer": {"enumerate": "parallel"}}


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape).requires_grad_()


def row(leaf: Tensor, number: Tensor) -> Tensor:
    return leaf.softmax(-1)[number]


def normalized(leaf: Tensor, number: Tensor) -> Tensor:
    rows = leaf.exp()[number]
    return (rows / rows.sum(-1, keepdim=True)).log()


def of_two_parents(leaf: Tensor, number: Tensor) -> Tensor:
    return leaf.reshape(2, 3, 4).softmax(-1)[number % 2, number % 3].log()


def after_a_constant_column(leaf: Tensor, number: Tensor) -> Tensor:
    return leaf.softmax(-1)[:, 1:][number].log() + torch.ones(ELEMENTS, 1)


def twice(leaf: Tensor, number: Tensor) -> Tensor:
    return leaf[number] * leaf.exp()[(number + 1) % 6]


TABLES = [row, normalized, of_two_parents, after_a_constant_column, twice]


def times_data(leaf: Tensor, number: Tensor) -> Tensor:
    return leaf[number] * torch.arange(ELEMENTS).unsqueeze(1)


def mixed(leaf: Tensor, number: Tensor) -> Tensor:
    return leaf[number].cumsum(0)


def also_direct(leaf: Tensor, number: Tensor) -> Tensor:
    return leaf[number] + leaf.sum()


def all_different(leaf: Tensor, number: Tensor) -> Tensor:
    return torch.cat([leaf] * 20)[torch.arange(ELEMENTS)]


NO_TABLES = [times_data, mixed, also_direct, all_different]


def found(make: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, tables.TableRows | None]:
    """The Jacobian of all elements, and that by rows."""
    param = leaf(6, 4)
    coordinates = make(param, torch.randint(6, (ELEMENTS,)))
    gate = SampleGate([])
    size = coordinates.shape[-1]
    return (
        jacobian(coordinates, [param], gate).reshape(ELEMENTS, size, -1),
        tables.table_rows([coordinates], size, [param], gate),
    )


@pytest.mark.parametrize("make", TABLES, ids=lambda make: make.__name__)
def test_rows_have_the_jacobian_of_their_elements(make):
    each, rows = found(make)
    assert rows is not None
    count = len(rows.first)
    assert count * tables.FEW <= ELEMENTS
    by_row = rows.jacobian.reshape(count, *each.shape[1:])
    torch.testing.assert_close(by_row[rows.numbers], each)
    assert torch.equal(rows.numbers[rows.first], torch.arange(count))


def of_two_variables(leaf: Tensor, number: Tensor) -> Tensor:
    """Elements that share what was read."""
    return leaf[number[:5, None] % 3] * leaf.exp()[number[None, :12] % 2]


@pytest.mark.parametrize("make", [*TABLES, of_two_variables], ids=lambda make: make.__name__)
def test_only_shared_reads_go_through_tensors_of_all_elements(make, monkeypatch):
    through = []

    def watched(*args):
        through.append(args)
        return jacobian(*args)

    monkeypatch.setattr(tables, "jacobian", watched)
    assert found(make)[1] is not None
    assert bool(through) == (make is of_two_variables)


@pytest.mark.parametrize("make", NO_TABLES, ids=lambda make: make.__name__)
def test_what_is_no_table_is_refused(make):
    assert found(make)[1] is None


def test_the_check_would_see_a_wrong_row(monkeypatch):
    monkeypatch.setattr(tables, "_holds", lambda *_: True)
    each, rows = found(times_data)
    assert rows is not None
    by_row = rows.jacobian.reshape(len(rows.first), *each.shape[1:])
    assert not torch.allclose(by_row[rows.numbers], each)


def test_no_random_numbers_are_drawn():
    param, number = leaf(6, 4), torch.randint(6, (ELEMENTS,))
    state = torch.get_rng_state()
    assert tables.table_rows([row(param, number)], 4, [param], SampleGate([])) is not None
    assert torch.equal(torch.get_rng_state(), state)


def hidden_nodes() -> tuple[Callable[..., None], Callable[..., None], Tensor]:
    net = HiddenNodes(bayes_net.load("asia"), ("either", "bronc"))
    return net.model, net.guide, net.make_data(0, 150)


def mixture() -> tuple[Callable[..., None], Callable[..., None], Tensor]:
    net = GaussianMixture()
    return net.model, net.guide, net.sample(net.start(1), 150, 0)


def beside_data() -> tuple[Callable[..., None], Callable[..., None], Tensor]:
    """Coordinates and Fisher information that differ between elements of one row."""
    offset = torch.linspace(-3, 3, 150)

    def model(x: Tensor) -> None:
        logits = pyro.param("logits", lambda: torch.tensor([0.5, -1.0]))
        loc = pyro.param("loc", lambda: torch.tensor([[0.5, 1.0], [-1.0, 2.0]]))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.4, 0.6])), **PARALLEL)
            near = dist.Normal(loc[k], offset.exp().unsqueeze(-1)).to_event(1)
            pyro.sample("x", near, obs=x)
            pyro.sample("y", dist.Bernoulli(logits=logits[k] + offset), obs=x[:, 0] * 0)

    return model, lambda x: None, torch.randn(150, 2)


@pytest.mark.parametrize("make", [hidden_nodes, mixture, beside_data])
@pytest.mark.parametrize("geometry", [Full("model"), Visible(0.1, posterior="enumerate")])
def test_the_metric_is_that_of_all_elements(make, geometry, monkeypatch):
    """With the same dreams, the Fisher information by rows is that by elements."""
    model, guide, x = make()
    used = []

    def watched(*args):
        used.append(tables.table_rows(*args))
        return used[-1]

    def dense(rows: Callable[..., tables.TableRows | None]) -> Tensor:
        monkeypatch.setattr(observation, "table_rows", rows)
        torch.manual_seed(0)
        return fisher(model, x, geometry=geometry, guide=guide, num_samples=150).dense()[0]

    by_rows = dense(watched)
    assert any(rows is not None for rows in used)
    torch.testing.assert_close(by_rows, dense(lambda *_: None), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("make", [hidden_nodes, mixture, beside_data])
def test_steps_are_those_of_all_elements(make, monkeypatch):
    """Leverage and reach too: a damped step is the same."""
    model, guide, x = make()

    def stepped(rows: Callable[..., tables.TableRows | None]) -> dict[str, Tensor]:
        monkeypatch.setattr(observation, "table_rows", rows)
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi = NaturalSVI(model, guide, NaturalGradient(), TraceEnum_ELBO(max_plate_nesting=1))
        svi.step(x)
        return {name: value.detach().clone() for name, value in pyro.get_param_store().items()}

    by_rows, by_elements = stepped(tables.table_rows), stepped(lambda *_: None)
    for name, value in by_rows.items():
        torch.testing.assert_close(value, by_elements[name], rtol=1e-9, atol=1e-9)
