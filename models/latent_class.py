"""Latent class models: binary items that are independent given an unknown class.

The likelihood is a sum over the classes, so that it is known exactly, and so is an EM step. The
closer the classes of `make_data`, the less the items say about the class, and the slower is EM.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions.constraints import Constraint

from models.values import as_default, stored

TRUTH_OFFSET = 1_000_003
"""Added to a seed for true parameters, so that nothing else is drawn from the same stream."""


class LatentClass:
    """A latent class model with binary items.

    The parameters "weights" of shape [classes] and "probs" of shape [classes, items] live in Pyro's
    parameter store. Pyro holds the weights as the softmax of as many coordinates as there are
    classes, one of which is redundant: the default model has 27 coordinates and 26 free parameters.

    Attributes:
        num_classes: Number of classes.
        num_items: Number of items.
        initial: Constrained values that the parameters start from, by their names.
        constraints: Constraint of each parameter, by its name.
    """

    constraints: ClassVar[dict[str, Constraint]] = {
        "weights": constraints.simplex,
        "probs": constraints.unit_interval,
    }

    def __init__(self, num_classes: int = 3, num_items: int = 8, seed: int = 0) -> None:
        """Makes a model; its parameters are made on first use.

        Args:
            num_classes: Number of classes.
            num_items: Number of items.
            seed: Seed of the initial values.

        Raises:
            ValueError: If there is no class or no item.
        """
        if min(num_classes, num_items) < 1:
            raise ValueError(f"need at least 1 class and 1 item, got {num_classes} and {num_items}")
        self.num_classes = num_classes
        self.num_items = num_items
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
        weights = 0.5 + torch.rand(self.num_classes, **draw)
        values = {
            "weights": weights / weights.sum(),
            "probs": 0.2 + 0.6 * torch.rand(self.num_classes, self.num_items, **draw),
        }
        return {name: as_default(value) for name, value in values.items()}

    def current(self, x: Tensor) -> dict[str, Tensor]:
        """The parameters' values in Pyro's store, or the initial ones before the first use.

        Args:
            x: Data, 0 or 1 as floats, shape [batch, items].

        Returns:
            Constrained values by parameter name, detached, in the precision and on the device of
            the data.
        """
        return {name: value.to(x) for name, value in stored(self.initial).items()}

    def model(self, x: Tensor) -> None:
        """The latent class model; its "class" is summed out by enumeration.

        Args:
            x: Data, 0 or 1 as floats, shape [batch, items].
        """
        weights, probs = self._param("weights", x), self._param("probs", x)
        with pyro.plate("data", x.shape[0], dim=-1):
            kind = pyro.sample("class", dist.Categorical(weights), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Bernoulli(probs[kind]).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """The empty guide: every hidden variable is summed out.

        Args:
            x: Data, 0 or 1 as floats, shape [batch, items].
        """

    def recognize(self, x: Tensor) -> None:
        """A guide that draws the classes from their exact posterior.

        Args:
            x: Data, 0 or 1 as floats, shape [batch, items].
        """
        with torch.no_grad():
            logits = self._log_joint(self.current(x), x)
        with pyro.plate("data", x.shape[0], dim=-1):
            pyro.sample("class", dist.Categorical(logits=logits))

    def log_likelihood(self, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """The exact log likelihood; it can be differentiated in the parameters.

        Args:
            params: Constrained values by parameter name, probabilities strictly between 0 and 1.
            x: Data, 0 or 1 as floats, shape [batch, items].

        Returns:
            log p(x) in nats, summed over the data, shape [].
        """
        return self._log_joint(params, x).logsumexp(-1).sum()

    @torch.no_grad()
    def em_step(self, params: Mapping[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        """One exact step of EM.

        Args:
            params: Constrained values by parameter name, probabilities strictly between 0 and 1.
            x: Data, 0 or 1 as floats, shape [batch, items].

        Returns:
            New constrained values by parameter name, kept off 0 and 1 by `inside_unit`.
        """
        share = self._log_joint(params, x).softmax(-1)
        count = share.sum(0)
        return {
            "weights": count / count.sum(),
            "probs": inside_unit(share.T @ x / count[:, None]),
        }

    def sample(self, params: Mapping[str, Tensor], size: int, seed: int) -> Tensor:
        """Draws data, leaving the global random state as it was.

        Args:
            params: Constrained values by parameter name.
            size: Number of data.
            seed: Seed of the data.

        Returns:
            Data, 0 or 1 in torch's default precision and device, shape [size, items].

        Raises:
            ValueError: If there are no data.
        """
        if size < 1:
            raise ValueError(f"need at least 1 datum, got {size}")
        weights, probs = (params[name].double().cpu() for name in ("weights", "probs"))
        generator = torch.Generator("cpu").manual_seed(seed)
        kind = torch.multinomial(weights, size, replacement=True, generator=generator)
        return as_default(torch.bernoulli(probs[kind], generator=generator))

    def _param(self, name: str, x: Tensor) -> Tensor:
        """A parameter; its first value is a copy, so that training leaves `initial` alone."""
        value: Tensor = pyro.param(
            name, lambda: self.initial[name].to(x, copy=True), constraint=self.constraints[name]
        )
        return value

    def _log_joint(self, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Log p(x, class) in nats, shape [batch, classes]."""
        probs = params["probs"]
        log_likelihood = x @ probs.log().T + (1 - x) @ torch.log1p(-probs).T
        return params["weights"].log() + log_likelihood


def inside_unit(probs: Tensor) -> Tensor:
    """Keeps probabilities off 0 and 1 by as little as Pyro does, so that their logits are finite.

    Args:
        probs: Probabilities, any shape.

    Returns:
        Probabilities of the same shape.
    """
    info = torch.finfo(probs.dtype)
    return probs.clamp(info.tiny, 1 - info.eps)


_classes = LatentClass()


def model(x: Tensor) -> None:
    """The model of the default instance, of 3 classes and 8 items.

    Args:
        x: Data, 0 or 1 as floats, shape [batch, 8].
    """
    _classes.model(x)


def guide(x: Tensor) -> None:
    """The empty guide of the default instance.

    Args:
        x: Data, 0 or 1 as floats, shape [batch, 8].
    """
    _classes.guide(x)


def make_data(seed: int, size: int = 2000, separation: float = 0.9) -> Tensor:
    """Samples data for the default model from one with random parameters.

    Neither the global random state nor the parameter store is touched.

    Args:
        seed: Seed of the true parameters and of the samples.
        size: Number of data.
        separation: Mean logit of an item in the class that it marks; in the other classes it is
            minus a third of that. EM needs more steps the smaller it is.

    Returns:
        Data, 0 or 1 as floats, shape [size, 8].
    """
    return _classes.sample(make_truth(seed, separation), size, seed)


def make_truth(seed: int, separation: float = 0.9) -> dict[str, Tensor]:
    """The parameters behind the data of `make_data`.

    Args:
        seed: Seed of the parameters.
        separation: Mean logit of an item in the class that it marks.

    Returns:
        Constrained values by parameter name, in double precision on the CPU.
    """
    generator = torch.Generator("cpu").manual_seed(seed + TRUTH_OFFSET)
    shape = (_classes.num_classes, _classes.num_items)
    classes, items = (torch.arange(count, device="cpu") for count in shape)
    own = items % shape[0] == classes[:, None]
    spread = 0.6 + 0.8 * torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu")
    weights = torch.full(shape[:1], 1 / shape[0], dtype=torch.float64, device="cpu")
    logits = separation * spread * torch.where(own, 1.0, -1 / 3)
    return {"weights": weights, "probs": torch.sigmoid(logits)}
