"""The shifter problem: two rows of pixels, one of which is the other moved by one pixel.

Each pixel of the first row is on with the same probability, independently. The second row is the
first one moved to the left or to the right, with probability 1/2 each, on a ring: what leaves at
one end enters at the other. Which way is not shown, and no pixel tells it on its own: it is in how
the pixels of the two rows agree.

The referee is the exact distribution, listed image by image, with its entropy. With 8 pixels per
row the entropy is 4.5792, 5.5374 and 6.2275 nats where a pixel is on with probability 0.2, 0.3 and
0.5. Four of the 256 rows (empty, full, and alternating) look the same moved either way, so that 508
images are distinct.

(G. E. Hinton and T. J. Sejnowski, "Learning and relearning in Boltzmann machines", in Parallel
Distributed Processing, 1986, where staying in place is a third way to move. P. Dayan, G. E. Hinton,
R. M. Neal and R. S. Zemel, "The Helmholtz machine", Neural Computation 7, 1995, where each row is
shown twice, which does not change the entropy.)
"""

import itertools
from collections import defaultdict

from torch import Tensor

from models.bars import States
from models.helmholtz import Helmholtz

MAX_WIDTH = 16
"""The largest number of pixels per row for which all images are listed."""


def states(width: int = 8, probability: float = 0.3) -> States:
    """Lists the images that have positive probability.

    Args:
        width: Pixels per row.
        probability: Probability that a pixel is on.

    Returns:
        Patterns of shape [states, 2 * width], the first row first, and their probabilities of shape
        [states].

    Raises:
        ValueError: If the rows are too short to tell the directions apart or too long to be listed,
            or the probability is not strictly between 0 and 1.
    """
    if not 3 <= width <= MAX_WIDTH:
        raise ValueError(f"width must be from 3 to {MAX_WIDTH} pixels, got {width}")
    if not 0 < probability < 1:
        raise ValueError(f"probability must be strictly between 0 and 1, got {probability}")
    total: defaultdict[tuple[int, ...], float] = defaultdict(float)
    for row in itertools.product((0, 1), repeat=width):
        share = probability ** sum(row) * (1 - probability) ** (width - sum(row))
        left, right = row[1:] + row[:1], row[-1:] + row[:-1]
        for moved in (left, right):
            total[row + moved] += share / 2
    return States.of(total)


def entropy(width: int = 8, probability: float = 0.3) -> float:
    """Entropy of a shifter problem.

    Args:
        width: Pixels per row.
        probability: Probability that a pixel is on.

    Returns:
        Entropy in nats.
    """
    return states(width, probability).entropy()


def make_data(seed: int, size: int = 500, width: int = 8, probability: float = 0.3) -> Tensor:
    """Samples images of a shifter problem, leaving the global random state as it was.

    Args:
        seed: Seed of the samples.
        size: Number of images.
        width: Pixels per row.
        probability: Probability that a pixel is on.

    Returns:
        Images, 0 or 1 as floats, shape [size, 2 * width].
    """
    return states(width, probability).sample(seed, size)


def machine(width: int = 8) -> Helmholtz:
    """Makes a Helmholtz machine that can come as close to a shifter problem as one likes.

    The top unit may stand for the direction, and each unit between for a pixel of the first row
    that is on and has moved in one of the two directions.

    Args:
        width: Pixels per row.

    Returns:
        A machine with layers of 2 * width, 2 * width and 1 units.
    """
    return Helmholtz((2 * width, 2 * width, 1))


def model(x: Tensor) -> None:
    """The model of the machine for rows of 8 pixels.

    Args:
        x: Images, 0 or 1 as floats, shape [batch, 16].
    """
    _machine.model(x)


def guide(x: Tensor) -> None:
    """The guide of the machine for rows of 8 pixels.

    Args:
        x: Images, 0 or 1 as floats, shape [batch, 16].
    """
    _machine.guide(x)


def kl_from_truth(helmholtz: Helmholtz, probability: float = 0.3) -> float:
    """Divergence of a machine's exact marginal from the true distribution of the images.

    Args:
        helmholtz: A machine with twice as many visible units as a row has pixels.
        probability: Probability that a pixel is on.

    Returns:
        KL(truth || machine) in nats.

    Raises:
        ValueError: If the machine's visible units cannot be two rows.
    """
    if helmholtz.sizes[0] % 2:
        raise ValueError(f"two rows have an even number of pixels, got {helmholtz.sizes[0]}")
    return states(helmholtz.sizes[0] // 2, probability).divergence(helmholtz)


_machine = machine()
