"""A fully visible sigmoid belief network: each unit is a logistic regression on those before it.

p(x) = Π_i p(x_i | x_0, ..., x_{i-1}), where the logit of unit i is linear in the units before it.
There is nothing hidden: the likelihood is exact, and so is its maximum, which Newton's method finds
unit by unit, as each is a logistic regression of its own.

The data are scikit-learn's handwritten digits, reduced to means of 2 × 2 pixels. Each of these is
on in the digits that have more ink there than half of all digits. With one threshold for all pixels
some would be on in a few digits only, and be determined by others: the best weights are then
infinite.

(R. M. Neal, "Connectionist learning of belief networks", Artificial Intelligence 56, 1992.
B. J. Frey, "Graphical models for machine learning and digital communication", MIT Press, 1998.)
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import softplus

from models.softmax import softmax_regression
from models.values import Optimum, as_default, normal, parameters

_NUM_DIGITS = 1797


class FullyVisible:
    """A sigmoid belief network of observed units only, each with all units before it as parents.

    Unit i has one parameter "row{i}" of shape [i + 1]: the weights of the units before it, and its
    bias last. They live in Pyro's parameter store, so two instances in one process share them by
    name.

    Attributes:
        num_units: Number of units.
        seed: Seed of the initial values in `initial`.
        constraints: The constraint of each parameter by name.
    """

    constraints: Mapping[str, Any]

    def __init__(self, num_units: int = 16, seed: int = 0) -> None:
        """Makes a network; its parameters are made on first use.

        Args:
            num_units: Number of units.
            seed: Seed of the initial values in `initial`.

        Raises:
            ValueError: If there is no unit.
        """
        if num_units < 1:
            raise ValueError(f"need at least 1 unit, got {num_units}")
        self.num_units = num_units
        self.seed = seed
        self.constraints = {f"row{unit}": dist.constraints.real for unit in range(num_units)}

    @property
    def initial(self) -> dict[str, Tensor]:
        """The values at which `model` creates its parameters: `start` at the network's seed."""
        return self.start(self.seed)

    def start(self, seed: int) -> dict[str, Tensor]:
        """Draws initial values, leaving the global random state as it was.

        Weights and biases are normal with standard deviation 1/2.

        Args:
            seed: Seed of the values.

        Returns:
            Parameters by name, in the default dtype and on the default device.
        """
        generator = torch.Generator("cpu").manual_seed(seed)
        return {
            name: as_default(0.5 * normal((unit + 1,), generator))
            for unit, name in enumerate(self.constraints)
        }

    def model(self, x: Tensor) -> None:
        """The program, with one site "x0", "x1" and so on per unit.

        Each unit reads the values that the sites before it return. Without its observations, by
        `pyro.poutine.uncondition`, the program therefore samples one unit after the other.

        Args:
            x: Data, 0 or 1 as floats, shape [batch, units].
        """
        columns = self._columns(x)
        rows = parameters(self).values()
        values: list[Tensor] = []
        with pyro.plate("data", x.shape[0], dim=-1):
            for unit, (row, column) in enumerate(zip(rows, columns, strict=True)):
                logits = _design(values, column) @ row
                values.append(pyro.sample(f"x{unit}", dist.Bernoulli(logits=logits), obs=column))

    def guide(self, x: Tensor) -> None:
        """A guide without sites, as nothing is hidden.

        Args:
            x: Data, 0 or 1 as floats, shape [batch, units].
        """

    def log_likelihood(self, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Exact log likelihood, differentiable with respect to the parameters.

        Args:
            params: Parameters by name.
            x: Data, 0 or 1 as floats, shape [batch, units].

        Returns:
            Total log likelihood in nats, a scalar.
        """
        columns = self._columns(x)
        total = x.new_zeros(())
        for unit, (name, column) in enumerate(zip(self.constraints, columns, strict=True)):
            logits = _design(columns[:unit], column) @ params[name]
            total = total + (column * logits - softplus(logits)).sum()
        return total

    @torch.no_grad()
    def optimum(self, x: Tensor) -> Optimum:
        """The parameters of maximum likelihood, unit by unit by Newton's method.

        The maximum is at infinity where a unit is determined by those before it, or comes close to
        it (a hyperplane separates the data where it is on from those where it is off, ties
        allowed). It is not unique where the units before it depend linearly on one another, as when
        one is constant or two are equal. Both are refused, as there is no best value to return.

        Args:
            x: Data, 0 or 1 as floats, shape [batch, units].

        Returns:
            The best parameters and their log likelihood.

        Raises:
            ValueError: If the maximum is infinite or not unique.
        """
        columns = self._columns(x)
        params: dict[str, Tensor] = {}
        for unit, (name, column) in enumerate(zip(self.constraints, columns, strict=True)):
            design = _design(columns[:unit], column)
            try:
                weights = softmax_regression(design, torch.stack([1 - column, column], -1))
            except ValueError as error:
                raise ValueError(f"unit {unit}, given those before it: {error}") from error
            params[name] = weights[0]
        return Optimum(params, self.log_likelihood(params, x))

    def sample(self, params: Mapping[str, Tensor], size: int, seed: int) -> Tensor:
        """Draws data one unit after the other, leaving the global random state as it was.

        Args:
            params: Parameters by name.
            size: Number of data.
            seed: Seed of the data.

        Returns:
            Data, 0 or 1 in torch's default precision and device, shape [size, units].

        Raises:
            ValueError: If there are no data.
        """
        if size < 1:
            raise ValueError(f"need at least 1 datum, got {size}")
        generator = torch.Generator("cpu").manual_seed(seed)
        like = torch.zeros(size, dtype=torch.float64, device="cpu")
        values: list[Tensor] = []
        for name in self.constraints:
            logits = _design(values, like) @ params[name].detach().to(like)
            values.append(torch.bernoulli(logits.sigmoid(), generator=generator))
        return as_default(torch.stack(values, -1))

    def _columns(self, x: Tensor) -> tuple[Tensor, ...]:
        """The data unit by unit, each of shape [batch].

        Args:
            x: Data, shape [batch, units].

        Returns:
            Data by unit.

        Raises:
            ValueError: If the data have another shape or are no floats.
        """
        if x.dim() != 2 or x.shape[1] != self.num_units or not x.is_floating_point():
            raise ValueError(
                f"data must be floats of shape [batch, {self.num_units}],"
                f" got {x.dtype} of shape {list(x.shape)}"
            )
        return x.unbind(-1)


def _design(values: Sequence[Tensor], like: Tensor) -> Tensor:
    """The values of some units and a last column of ones, shape [..., batch, units + 1]."""
    return torch.stack(torch.broadcast_tensors(*values, torch.ones_like(like)), -1)


_network = FullyVisible()


def model(x: Tensor) -> None:
    """The program of a default network.

    Args:
        x: Data, 0 or 1 as floats, shape [batch, 16].
    """
    _network.model(x)


def guide(x: Tensor) -> None:
    """A guide without sites, as nothing is hidden.

    Args:
        x: Data, 0 or 1 as floats, shape [batch, 16].
    """
    _network.guide(x)


def make_data(seed: int, size: int = _NUM_DIGITS) -> Tensor:
    """Draws small digits without replacement from scikit-learn's.

    Each of 4 × 4 pixels is the mean of 2 × 2 of the original ones, and is on where that is above
    its median over all digits.

    Args:
        seed: Seed of their order.
        size: Number of digits, at most 1797.

    Returns:
        Digits, 0 or 1 as floats, shape [size, 16].

    Raises:
        ValueError: If there are not as many digits.
    """
    if not 1 <= size <= _NUM_DIGITS:
        raise ValueError(f"size must be from 1 to {_NUM_DIGITS} digits, got {size}")
    from sklearn.datasets import load_digits

    images = torch.tensor(load_digits().data, dtype=torch.float64, device="cpu")
    means = images.reshape(-1, 4, 2, 4, 2).mean((2, 4)).flatten(1)
    generator = torch.Generator("cpu").manual_seed(seed)
    order = torch.randperm(len(means), generator=generator, device="cpu")
    return as_default((means > means.median(0).values)[order[:size]])
