"""Gaussian mixtures with diagonal covariances: overlapping components make EM slow.

The likelihood is a sum over the components, so that it is known exactly, and so is an EM step. The
data of `make_data` come from components whose means are about one standard deviation apart: the
component of a datum is then mostly unknown, and EM, whose rate is the share of the information that
is missing, takes thousands of steps.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions.constraints import Constraint

from models.values import as_default, stored

_TRUE_SCALES = ((0.75, 1.35), (1.35, 0.75), (1.0, 1.0))


class GaussianMixture:
    """A mixture of Gaussians with diagonal covariances.

    The parameters "weights" of shape [components], "loc" and "scale" of shape [components, dim]
    live in Pyro's parameter store. Pyro holds the weights as the softmax of as many coordinates as
    there are components, one of which is redundant: the default mixture has 15 coordinates and 14
    free parameters.

    Attributes:
        num_components: Number of components.
        dim: Dimensions of a datum.
        initial: Constrained values that the parameters start from, by their names.
        constraints: Constraint of each parameter, by its name.
    """

    constraints: ClassVar[dict[str, Constraint]] = {
        "weights": constraints.simplex,
        "loc": constraints.real,
        "scale": constraints.positive,
    }

    def __init__(self, num_components: int = 3, dim: int = 2, seed: int = 0) -> None:
        """Makes a mixture; its parameters are made on first use.

        Args:
            num_components: Number of components.
            dim: Dimensions of a datum.
            seed: Seed of the initial values.

        Raises:
            ValueError: If there is no component or no dimension.
        """
        if min(num_components, dim) < 1:
            raise ValueError(
                f"need at least 1 component and 1 dimension, got {num_components} and {dim}"
            )
        self.num_components = num_components
        self.dim = dim
        self.initial = self.start(seed)

    def start(self, seed: int) -> dict[str, Tensor]:
        """Draws initial values, leaving the global random state as it was.

        Args:
            seed: Seed of the values.

        Returns:
            Constrained values by parameter name, in torch's default precision and device.
        """
        generator = torch.Generator("cpu").manual_seed(seed)
        draw: dict[str, Any] = {"generator": generator, "dtype": torch.float64, "device": "cpu"}
        weights = 0.5 + torch.rand(self.num_components, **draw)
        values = {
            "weights": weights / weights.sum(),
            "loc": torch.randn(self.num_components, self.dim, **draw),
            "scale": 0.75 + 0.5 * torch.rand(self.num_components, self.dim, **draw),
        }
        return {name: as_default(value) for name, value in values.items()}

    def current(self, x: Tensor) -> dict[str, Tensor]:
        """The parameters' values in Pyro's store, or the initial ones before the first use.

        Args:
            x: Data, shape [batch, dim].

        Returns:
            Constrained values by parameter name, detached, in the precision and on the device of
            the data.
        """
        return {name: value.to(x) for name, value in stored(self.initial).items()}

    def model(self, x: Tensor) -> None:
        """The mixture; its "component" is summed out by enumeration.

        Args:
            x: Data, shape [batch, dim].
        """
        weights, loc, scale = (self._param(name, x) for name in ("weights", "loc", "scale"))
        with pyro.plate("data", x.shape[0], dim=-1):
            component = pyro.sample(
                "component", dist.Categorical(weights), infer={"enumerate": "parallel"}
            )
            pyro.sample("x", dist.Normal(loc[component], scale[component]).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """The empty guide: every hidden variable is summed out.

        Args:
            x: Data, shape [batch, dim].
        """

    def recognize(self, x: Tensor) -> None:
        """A guide that draws the components from their exact posterior.

        Args:
            x: Data, shape [batch, dim].
        """
        with torch.no_grad():
            logits = self._log_joint(self.current(x), x)
        with pyro.plate("data", x.shape[0], dim=-1):
            pyro.sample("component", dist.Categorical(logits=logits))

    def log_likelihood(self, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """The exact log likelihood; it can be differentiated in the parameters.

        Args:
            params: Constrained values by parameter name.
            x: Data, shape [batch, dim].

        Returns:
            log p(x) in nats, summed over the data, shape [].
        """
        return self._log_joint(params, x).logsumexp(-1).sum()

    @torch.no_grad()
    def em_step(self, params: Mapping[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        """One exact step of EM.

        Args:
            params: Constrained values by parameter name.
            x: Data, shape [batch, dim].

        Returns:
            New constrained values by parameter name.
        """
        share = self._log_joint(params, x).softmax(-1)
        count = share.sum(0)
        loc = share.T @ x / count[:, None]
        squares = (x[:, None] - loc) ** 2
        variance = (share[:, :, None] * squares).sum(0) / count[:, None]
        return {"weights": count / count.sum(), "loc": loc, "scale": variance.sqrt()}

    def sample(self, params: Mapping[str, Tensor], size: int, seed: int) -> Tensor:
        """Draws data, leaving the global random state as it was.

        Args:
            params: Constrained values by parameter name.
            size: Number of data.
            seed: Seed of the data.

        Returns:
            Data in torch's default precision and device, shape [size, dim].

        Raises:
            ValueError: If there are no data.
        """
        if size < 1:
            raise ValueError(f"need at least 1 datum, got {size}")
        weights, loc, scale = (params[name].double().cpu() for name in ("weights", "loc", "scale"))
        generator = torch.Generator("cpu").manual_seed(seed)
        component = torch.multinomial(weights, size, replacement=True, generator=generator)
        noise = torch.randn(size, self.dim, generator=generator, dtype=torch.float64, device="cpu")
        return as_default(loc[component] + scale[component] * noise)

    def _param(self, name: str, x: Tensor) -> Tensor:
        """A parameter; its first value is a copy, so that training leaves `initial` alone."""
        value: Tensor = pyro.param(
            name, lambda: self.initial[name].to(x, copy=True), constraint=self.constraints[name]
        )
        return value

    def _log_joint(self, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Log p(x, component) in nats, shape [batch, components]."""
        loc, scale = params["loc"], params["scale"]
        standardized = (x[:, None] - loc) / scale
        log_density = -0.5 * standardized**2 - scale.log() - 0.5 * math.log(2 * math.pi)
        return params["weights"].log() + log_density.sum(-1)


_mixture = GaussianMixture()


def model(x: Tensor) -> None:
    """The model of the default mixture, of 3 components in 2 dimensions.

    Args:
        x: Data, shape [batch, 2].
    """
    _mixture.model(x)


def guide(x: Tensor) -> None:
    """The empty guide of the default mixture.

    Args:
        x: Data, shape [batch, 2].
    """
    _mixture.guide(x)


def make_data(seed: int, size: int = 2000, separation: float = 0.9) -> Tensor:
    """Samples data for the default mixture from one whose means lie on a ring.

    Neither the global random state nor the parameter store is touched.

    Args:
        seed: Seed of the samples.
        size: Number of data.
        separation: Distance between any two of the means. A component's standard deviations are
            about one, so this is in units of them.

    Returns:
        Data, shape [size, 2].
    """
    return _mixture.sample(make_truth(separation), size, seed)


def make_truth(separation: float = 0.9) -> dict[str, Tensor]:
    """The parameters behind the data of `make_data`.

    Args:
        separation: Distance between any two of the means.

    Returns:
        Constrained values by parameter name, in double precision on the CPU.
    """
    angle = 2 * math.pi / 3 * torch.arange(3, dtype=torch.float64, device="cpu")
    ring = torch.stack([angle.cos(), angle.sin()], dim=-1) / math.sqrt(3)
    return {
        "weights": torch.full((3,), 1 / 3, dtype=torch.float64, device="cpu"),
        "loc": separation * ring,
        "scale": torch.tensor(_TRUE_SCALES, dtype=torch.float64, device="cpu"),
    }
