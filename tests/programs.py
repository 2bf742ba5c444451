"""Seeded parameters, and a Gaussian model and guide to be trained on `X`."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import linear


def randn(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    return values.to(torch.get_default_device())


def param(name: str, seed: int, *shape: int) -> Tensor:
    return pyro.param(name, lambda: randn(seed, *shape))


X = randn(1, 20, 3)


def model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(param("top", 1, 2), 1.0).to_event(1))
        loc = linear(z, param("W", 2, 3, 2), param("b", 3, 3))
        pyro.sample("x", dist.Normal(loc, param("s", 4).exp()).to_event(1), obs=x)


def guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        loc = linear(x, param("q.W", 11, 2, 3), param("q.b", 12, 2))
        pyro.sample("z", dist.Normal(loc, param("q.s", 13).exp()).to_event(1))
