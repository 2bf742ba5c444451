"""What the examples share that compare Adam with natural gradients."""

import itertools
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.infer import ELBO, SVI
from torch import Tensor
from torch.optim import Optimizer

import pyronat
from pyronat.averaging import Averages, Exchange
from pyronat.steps import LinearDecay, PolyakRuppert
from pyronat.tracing import stored_leaves

Data = tuple[Tensor, ...]
Step = Callable[[Data], object]
"""Takes a step on a batch."""


def batches(data: Data, batch_size: int | None, seed: int) -> Iterator[Data]:
    """Batches without end, the same for all methods.

    Args:
        data: The arguments of model and guide, all data.
        batch_size: Data per batch, or None for all of them.
        seed: Seed of their order.

    Yields:
        The arguments of model and guide.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        if batch_size is None:
            yield data
        else:
            for index in torch.randperm(len(data[0]), generator=generator).split(batch_size):
                yield tuple(value[index] for value in data)


@dataclass(frozen=True)
class Rates:
    """Rates of the first step, by the name of a parameter.

    Attributes:
        model: That of the model.
        guide: That of the guide.
        guide_params: Names of the guide's parameters.
    """

    model: float
    guide: float
    guide_params: Set[str]

    def __call__(self, name: str) -> dict[str, float]:
        """Options of an optimizer."""
        return {"lr": self.guide if name in self.guide_params else self.model}


def adam(
    model: Any,
    guide: Any,
    loss: ELBO,
    rate: float,
    steps: int,
    guide_rate: float | None = None,
    guide_params: Set[str] = frozenset(),
) -> Step:
    """Stock `SVI` with Adam, whose rate decays linearly.

    Args:
        model: The model.
        guide: The guide.
        loss: The loss.
        rate: The rate at the first step.
        steps: Steps over which it decays.
        guide_rate: That of the guide's parameters, or None for the same.
        guide_params: Names of the guide's parameters.

    Returns:
        Function that takes a step.
    """
    rates = Rates(rate, rate if guide_rate is None else guide_rate, guide_params)
    return stock(model, guide, loss, torch.optim.Adam, rates, LinearDecay(1.0, steps))


def descent(model: Any, guide: Any, loss: ELBO, rate: float, steps: int) -> Step:
    """Stock `SVI` with plain gradient descent, whose rate decays linearly.

    Args:
        model: The model.
        guide: The guide.
        loss: The loss.
        rate: The rate at the first step.
        steps: Steps over which it decays.

    Returns:
        Function that takes a step.
    """
    rates = Rates(rate, rate, frozenset())
    return stock(model, guide, loss, torch.optim.SGD, rates, LinearDecay(1.0, steps))


def stock(
    model: Any,
    guide: Any,
    loss: ELBO,
    optimizer: type[Optimizer],
    rates: Rates,
    decay: Callable[[int], float],
) -> Step:
    """Stock `SVI` with an optimizer of torch.

    Args:
        model: The model.
        guide: The guide.
        loss: The loss.
        optimizer: The optimizer.
        rates: Its rates at the first step.
        decay: Factor on the rates, by the number of the step.

    Returns:
        Function that takes a step.
    """
    options = {"optimizer": optimizer, "optim_args": rates, "lr_lambda": decay}
    optim = pyro.optim.LambdaLR(options)
    svi = SVI(model, guide, optim, loss)

    def step(data: Data) -> None:
        svi.step(*data)
        optim.step()

    return step


class Averaged:
    """Averages of iterates for optimizers that have none, as `NaturalGradient(averaging=...)`."""

    def __init__(self, step: Step, rule: PolyakRuppert) -> None:
        """Has no average before the first step.

        Args:
            step: Takes a step of all parameters in the store.
            rule: How iterates are averaged.
        """
        self._step, self._rule, self._count = step, rule, 0
        self._averages = Averages()

    def step(self, data: Data) -> None:
        """Takes a step, and averages where it led."""
        self._step(data)
        self._averages = self._averages.entered(self._rule, self._count, stored_leaves())
        self._count += 1

    def context(self) -> AbstractContextManager[None]:
        """In this context the averages stand in the place of the parameters."""
        return Exchange().context(self._averages, stored_leaves())


def natural(model: Any, guide: Any, loss: ELBO, rate: float, steps: int, **options: Any) -> Step:
    """`NaturalSVI` with a rate that decays linearly.

    Args:
        model: The model.
        guide: The guide.
        loss: The loss.
        rate: The rate at the first step.
        steps: Steps over which it decays.
        **options: Other options of `NaturalGradient`.

    Returns:
        Function that takes a step.
    """
    optim = pyronat.NaturalGradient(lr=LinearDecay(rate, steps), **options)
    svi = pyronat.NaturalSVI(model, guide, optim, loss)
    return lambda data: svi.step(*data)


def negative_elbo(loss: ELBO, model: Any, guide: Any, data: Data) -> float:
    """The loss with a fixed seed; random numbers of training are left alone.

    Args:
        loss: An ELBO, with many particles.
        model: The model.
        guide: The guide.
        data: Data, all of them.

    Returns:
        Nats in all.
    """
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        return float(loss.loss(model, guide, *data))


def reached(curve: Sequence[tuple[float, float]], target: float) -> float | None:
    """When a curve comes down to a target, on straight lines between its points.

    Args:
        curve: Times, in any unit, and negative log likelihoods in nats.
        target: Negative log likelihood in nats.

    Returns:
        The time, or None if it never does.
    """
    if curve[0][1] <= target:
        return curve[0][0]
    for (t0, y0), (t1, y1) in itertools.pairwise(curve):
        if y1 <= target:
            return t0 + (t1 - t0) * (y0 - target) / (y0 - y1)
    return None


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown.

    Args:
        rows: Rows of cells, the header first.

    Returns:
        The table.
    """
    header, *body = rows
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
