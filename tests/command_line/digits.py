"""A sigmoid belief network on coarse digits, with a guide of one layer."""

import pyro
import pyro.distributions as dist
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import linear


def weights(name, *shape):
    return pyro.param(name, lambda: 0.1 * torch.randn(shape))


def model(x):
    with pyro.plate("data", len(x)):
        h = pyro.sample("h", dist.Bernoulli(logits=weights("top", 6).expand(len(x), 6)).to_event(1))
        logits = linear(h, weights("W", 16, 6), weights("b", 16))
        pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)


def guide(x):
    with pyro.plate("data", len(x)):
        logits = linear(x, weights("R", 6, 16), weights("c", 6))
        pyro.sample("h", dist.Bernoulli(logits=logits).to_event(1))


def make_data(seed, size=200):
    images = torch.tensor(load_digits().data).reshape(-1, 4, 2, 4, 2).mean((2, 4)) > 6
    order = torch.randperm(len(images), generator=torch.Generator("cpu").manual_seed(seed))
    return images.reshape(-1, 16)[order[:size]].to(torch.get_default_dtype())
