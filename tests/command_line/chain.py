"""A hidden Markov model whose states are marked to be enumerated, without a guide."""

import pyro
import pyro.distributions as dist
import torch


def softmax_rows(name, *shape):
    return pyro.param(name, lambda: torch.randn(shape)).softmax(-1)


def model(x):
    move, emit = softmax_rows("move", 3, 3), softmax_rows("emit", 3, 4)
    with pyro.plate("sequences", len(x), dim=-1):
        z = 0
        for t in pyro.markov(range(x.shape[1])):
            z = pyro.sample(f"z{t}", dist.Categorical(move[z]), infer={"enumerate": "parallel"})
            pyro.sample(f"x{t}", dist.Categorical(emit[z]), obs=x[:, t])


def make_data(seed, size=80):
    generator = torch.Generator("cpu").manual_seed(seed)
    start = torch.randint(4, (size, 1), generator=generator)
    return (start + torch.arange(4)) % 4
