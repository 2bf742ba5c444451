"""The bars problems: small images of horizontal or vertical lines, with known entropies.

Two kinds are offered, both on a square grid whose orientation is vertical with probability 2/3
and horizontal with probability 1/3:

* "hinton": 4 x 4 pixels. Each of the 4 lines of the chosen orientation is on with probability 0.2,
  independently. The entropy is 2.3764 nats. (G. E. Hinton, P. Dayan, B. J. Frey and R. M. Neal,
  "The wake-sleep algorithm for unsupervised neural networks", Science 268, 1995.)
* "kirby": 3 x 3 pixels. One or two of the 3 lines of the chosen orientation are on, each such set
  of lines with equal probability. The entropy is 2.4283 nats. (K. G. Kirby, "A tutorial on
  Helmholtz machines", 2006.)
"""

import itertools
from collections import defaultdict
from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from models.helmholtz import Helmholtz

Kind = Literal["hinton", "kirby"]

_VERTICAL_PROBABILITY = 2 / 3
_LINE_PROBABILITY = 0.2


class States(NamedTuple):
    """A distribution over images, listed state by state.

    Attributes:
        patterns: Distinct images, 0 or 1 as floats, shape [states, pixels].
        probabilities: Probability of each image, float64, shape [states].
    """

    patterns: Tensor
    probabilities: Tensor

    @classmethod
    def of(cls, probabilities: Mapping[tuple[int, ...], float]) -> "States":
        """Takes a distribution from a table.

        Args:
            probabilities: Probability of each image, a tuple of 0 and 1.

        Returns:
            The distribution, in the order of the table.
        """
        return cls(
            torch.tensor(list(probabilities), dtype=torch.get_default_dtype()),
            torch.tensor(list(probabilities.values()), dtype=torch.float64),
        )

    def entropy(self) -> float:
        """Entropy in nats: the least mean negative log likelihood that any model can have."""
        return float(-(self.probabilities * self.probabilities.log()).sum())

    def sample(self, seed: int, size: int) -> Tensor:
        """Draws images, leaving the global random state as it was.

        Args:
            seed: Seed of the images.
            size: Number of images.

        Returns:
            Images, 0 or 1 as floats, shape [size, pixels].
        """
        generator = torch.Generator("cpu").manual_seed(seed)
        probabilities = self.probabilities.cpu()
        index = torch.multinomial(probabilities, size, replacement=True, generator=generator)
        return self.patterns[index.to(self.patterns.device)]

    def divergence(self, helmholtz: Helmholtz) -> float:
        """Divergence of a machine's exact marginal from this distribution.

        Args:
            helmholtz: A machine with as many visible units as the images have pixels.

        Returns:
            KL(this || machine) in nats.
        """
        log_likelihood = helmholtz.exact_log_likelihood(self.patterns)
        log_ratio = self.probabilities.log() - log_likelihood.to(self.probabilities.device)
        return float((self.probabilities * log_ratio).sum())


def states(kind: Kind = "hinton") -> States:
    """Lists the images that have positive probability.

    Args:
        kind: Which bars problem.

    Returns:
        Patterns of shape [states, pixels], row by row of the image, and their probabilities of
        shape [states].

    Raises:
        ValueError: If the kind is unknown.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind must be one of {get_args(Kind)}, got {kind!r}")
    lines = _line_sets(kind)
    side = len(next(iter(lines)))
    total: defaultdict[tuple[int, ...], float] = defaultdict(float)
    for line_set, probability in lines.items():
        vertical = line_set * side
        horizontal = tuple(line for line in line_set for _ in range(side))
        total[vertical] += _VERTICAL_PROBABILITY * probability
        total[horizontal] += (1 - _VERTICAL_PROBABILITY) * probability
    return States.of(total)


def entropy(kind: Kind = "hinton") -> float:
    """Entropy of a bars problem.

    Args:
        kind: Which bars problem.

    Returns:
        Entropy in nats.
    """
    return states(kind).entropy()


def make_data(seed: int, size: int = 500, kind: Kind = "hinton") -> Tensor:
    """Samples images of a bars problem, leaving the global random state as it was.

    Args:
        seed: Seed of the samples.
        size: Number of images.
        kind: Which bars problem.

    Returns:
        Images, 0 or 1 as floats, shape [size, pixels].
    """
    return states(kind).sample(seed, size)


def machine(kind: Kind = "hinton") -> Helmholtz:
    """Makes a Helmholtz machine that suits a bars problem.

    Args:
        kind: Which bars problem.

    Returns:
        A machine with layers of 16, 8 and 1 units for "hinton" and of 9, 6 and 1 for "kirby".
    """
    return Helmholtz((16, 8, 1) if kind == "hinton" else (9, 6, 1))


def model(x: Tensor) -> None:
    """The model of the machine for the "hinton" bars.

    Args:
        x: Images, 0 or 1 as floats, shape [batch, 16].
    """
    _hinton_machine.model(x)


def guide(x: Tensor) -> None:
    """The guide of the machine for the "hinton" bars.

    Args:
        x: Images, 0 or 1 as floats, shape [batch, 16].
    """
    _hinton_machine.guide(x)


def kl_from_truth(helmholtz: Helmholtz, kind: Kind = "hinton") -> float:
    """Divergence of a machine's exact marginal from the true distribution of the images.

    Args:
        helmholtz: A machine with as many visible units as the images have pixels.
        kind: Which bars problem.

    Returns:
        KL(truth || machine) in nats.
    """
    return states(kind).divergence(helmholtz)


def _line_sets(kind: Kind) -> dict[tuple[int, ...], float]:
    """Which lines may be on together, and with what probability given the orientation."""
    if kind == "hinton":
        return {
            lines: _LINE_PROBABILITY ** sum(lines) * (1 - _LINE_PROBABILITY) ** (4 - sum(lines))
            for lines in itertools.product((0, 1), repeat=4)
        }
    return {lines: 1 / 6 for lines in itertools.product((0, 1), repeat=3) if 0 < sum(lines) < 3}


_hinton_machine = machine("hinton")
