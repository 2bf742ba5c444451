"""A Poisson mixture with parameters in Pyro's store; nobody has marked what is to be summed out."""

import pyro
import pyro.distributions as dist
import torch


def model(x):
    share = pyro.param("share", torch.tensor([0.5, 0.5]), constraint=dist.constraints.simplex)
    rate = pyro.param("rate", torch.tensor([1.0, 3.0]), constraint=dist.constraints.positive)
    with pyro.plate("data", len(x)):
        kind = pyro.sample("kind", dist.Categorical(share))
        pyro.sample("x", dist.Poisson(rate[kind]), obs=x)


def make_data(seed):
    generator = torch.Generator("cpu").manual_seed(seed)
    few = torch.rand(300, generator=generator) < 0.7
    return torch.poisson(torch.where(few, 2.0, 9.0), generator=generator)
