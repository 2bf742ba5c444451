"""A small sigmoid belief network with data, and trainings of it."""

from __future__ import annotations

import pyro
import torch
from torch import Tensor

import pyronat
from models.helmholtz import Helmholtz


def machine() -> tuple[Helmholtz, Tensor]:
    x = (torch.rand(300, 16) < torch.linspace(0.1, 0.9, 16)).double()
    return Helmholtz((16, 8, 4), visible_mean=x.mean(0)), x


def trained(
    geometry: pyronat.Full | pyronat.Visible, steps: int
) -> tuple[pyronat.NaturalSVI, Helmholtz, Tensor]:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    net, x = machine()
    optim = pyronat.NaturalGradient(lr=0.3, geometry=geometry)
    loss = pyronat.ReweightedWakeSleep(5, vectorize_particles=True, max_plate_nesting=1)
    svi = pyronat.NaturalSVI(net.model, net.guide, optim, loss)
    for _ in range(steps):
        svi.step(x)
    return svi, net, x
