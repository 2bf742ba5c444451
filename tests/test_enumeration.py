"""Exact expectations: one element stands for a plate, unless the program tells elements apart."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

import pyronat
from pyronat import Full, Visible
from pyronat.enumeration import enumerate_parents
from pyronat.testing import enumerated_sitewise_fisher

COVARIATE = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)


def weight() -> Tensor:
    found: Tensor = pyro.param("w", torch.tensor(0.3))
    return found


def alike(u: Tensor) -> None:
    with pyro.plate("data", len(u)):
        h = pyro.sample("h", dist.Bernoulli(logits=pyro.param("top", torch.tensor(0.2))))
        pyro.sample("x", dist.Bernoulli(logits=weight() * h + u.mean()))


def by_argument(u: Tensor) -> None:
    with pyro.plate("data", len(u)):
        pyro.sample("x", dist.Bernoulli(logits=weight() * u))


def by_index(u: Tensor) -> None:
    with pyro.plate("data", len(u)) as index:
        pyro.sample("x", dist.Bernoulli(logits=weight() * u[index]))


def by_subsample(u: Tensor) -> None:
    with pyro.plate("data", len(u)):
        pyro.sample("x", dist.Bernoulli(logits=weight() * pyro.subsample(u, event_dim=0)))


def by_parameter(u: Tensor) -> None:
    own = pyro.param("own", COVARIATE.clone())
    with pyro.plate("data", len(u)):
        pyro.sample("x", dist.Bernoulli(logits=weight() + own))


def by_scale(u: Tensor) -> None:
    with pyro.plate("data", len(u)), poutine.scale(scale=torch.tensor([1.0, 2.0, 3.0])):
        pyro.sample("x", dist.Bernoulli(logits=weight()))


def by_mask(u: Tensor) -> None:
    with pyro.plate("data", len(u)), poutine.mask(mask=u > 0):
        pyro.sample("x", dist.Bernoulli(logits=weight()))


def in_part(u: Tensor) -> None:
    with pyro.plate("data", 12, subsample_size=3):
        pyro.sample("x", dist.Bernoulli(logits=weight()))


PROGRAMS = [
    alike,
    by_argument,
    by_index,
    by_subsample,
    by_parameter,
    by_scale,
    by_mask,
    in_part,
]


@pytest.mark.parametrize("program", PROGRAMS)
def test_exact_fisher_is_that_of_all_elements(program: Callable[[Tensor], None]) -> None:
    found = pyronat.fisher(program, COVARIATE, geometry=Full("exact")).dense()[0]
    oracle = program
    if program is in_part:
        # The oracle refuses random subsamples: twelve elements are the same.
        def oracle(u: Tensor) -> None:
            with pyro.plate("data", 12):
                pyro.sample("x", dist.Bernoulli(logits=weight()))

    expected = enumerated_sitewise_fisher(oracle, COVARIATE)[0]
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)


def test_equal_elements_are_enumerated_once() -> None:
    u = torch.zeros(10_000)
    alike(u)
    shared = frozenset({"data"})
    (run,) = enumerate_parents(alike, (u,), {}, frozenset({"h", "x"}), shared)
    assert run.probabilities.shape == (4, 1)
    assert {record.distribution.batch_shape for record in run.run.records} == {(4, 1)}
    by_index(u)
    (run,) = enumerate_parents(by_index, (u[:5],), {}, frozenset({"x"}), shared)
    assert run.probabilities.shape == (2, 5)


def test_visible_fisher_is_proportional_to_the_number_of_equal_data() -> None:
    def observed(u: Tensor) -> None:
        with pyro.plate("data", len(u)):
            h = pyro.sample("h", dist.Bernoulli(logits=pyro.param("top", torch.tensor(0.2))))
            pyro.sample("x", dist.Bernoulli(logits=weight() * h - 0.5), obs=u)

    exact = Visible(mixing=0, posterior="exact")
    few, many = (
        pyronat.fisher(observed, torch.zeros(size), geometry=exact).dense()[0] for size in (2, 500)
    )
    assert torch.allclose(many, 250 * few, rtol=1e-12)
