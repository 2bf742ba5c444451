"""A sigmoid belief network of modules, as a class with model and guide."""

import pyro
import pyro.distributions as dist
import torch
from torch import nn


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.decoder = nn.Linear(3, 8)
        self.encoder = nn.Linear(8, 3)

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            h = pyro.sample("h", dist.Bernoulli(logits=x.new_zeros(3)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(h)).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("h", dist.Bernoulli(logits=self.encoder(x)).to_event(1))


def make_data(seed):
    generator = torch.Generator("cpu").manual_seed(seed)
    left = (torch.rand(120, 1, generator=generator) < 0.5).expand(120, 4)
    noise = torch.rand(120, 8, generator=generator) < 0.1
    return (torch.cat([left, ~left], -1) ^ noise).to(torch.get_default_dtype())
