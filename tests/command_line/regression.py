"""A Bayesian regression with an autoguide of its own, and data by name."""

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoDiagonalNormal


def model(x, y=None):
    weight = pyro.sample("weight", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    noise = pyro.sample("noise", dist.Gamma(2.0, 2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ weight, noise), obs=y)


guide = AutoDiagonalNormal(model)


def make_data(seed):
    generator = torch.Generator("cpu").manual_seed(seed)
    x = torch.randn(60, 2, generator=generator)
    noise = 0.3 * torch.randn(60, generator=generator)
    return {"x": x, "y": x @ torch.tensor([1.0, -2.0]) + noise}
