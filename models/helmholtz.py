"""Helmholtz machines: stacks of Bernoulli layers with a factorized recognition network.

The generative model is a sigmoid belief network. Its top layer has a prior, and each layer below
is Bernoulli given the layer above it. The guide goes the other way, from the data up, one layer
at a time. `Helmholtz` also carries two referees for its log likelihood: the exact sum over all
hidden states for small machines, and an importance sampling estimate for the others.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import linear, softplus

MAX_STATES = 2**20
"""The largest number of joint hidden states that the exact referee sums over."""

_CHUNK_ELEMENTS = 2**22
_MEAN_MARGIN = 0.02


class Affine(NamedTuple):
    """The weight and bias that give one layer's logits from its input layer.

    Attributes:
        weight: Weight, shape [units out, units in].
        bias: Bias, shape [units out].
    """

    weight: Tensor
    bias: Tensor


class Fantasies(NamedTuple):
    """Ancestral samples of the visible layer.

    Attributes:
        means: Probability that each visible unit is on, given the sampled hidden layer above it,
            shape [samples, visible].
        values: Sampled visible units, 0 or 1, shape [samples, visible].
    """

    means: Tensor
    values: Tensor


class Helmholtz:
    """A stack of Bernoulli layers with a factorized recognition network.

    For sizes (64, 32, 16) the model samples h2 (16 units), then h1 (32 units), then observes x
    (64 units); the guide samples h1 given x, then h2 given h1. Layer l of the model has the
    parameters "layer{l}.weight" and "layer{l}.bias", the top layer's prior has "top.bias", and
    layer l of the guide has "recognition{l}.weight" and "recognition{l}.bias". The parameters live
    in Pyro's parameter store, so two machines in one process share them by name.

    Attributes:
        sizes: Units per layer, the visible layer first.
        visible_mean: Mean of the training data per visible unit, shape [visible], or None.
        init_scale: Standard deviation of an initial weight, times the square root of its fan-in.
    """

    def __init__(
        self,
        sizes: Sequence[int] = (64, 32, 16),
        visible_mean: Tensor | None = None,
        init_scale: float = 0.5,
    ) -> None:
        """Makes a machine; its parameters are made on first use.

        Args:
            sizes: Units per layer, the visible layer first.
            visible_mean: Mean of the training data per visible unit, shape [visible]. The visible
                bias then starts at the logit of this mean, clipped away from 0 and 1. With None it
                starts at zero.
            init_scale: Standard deviation of an initial weight, times the square root of its
                fan-in.

        Raises:
            ValueError: If there is no hidden layer, a layer is empty, or the mean's shape is wrong.
        """
        if len(sizes) < 2 or min(sizes) < 1:
            raise ValueError(f"need a visible and a hidden layer of at least 1 unit, got {sizes}")
        if visible_mean is not None and visible_mean.shape != (sizes[0],):
            raise ValueError(
                f"visible_mean must have shape [{sizes[0]}], got {list(visible_mean.shape)}"
            )
        self.sizes = tuple(sizes)
        self.visible_mean = visible_mean
        self.init_scale = init_scale

    @property
    def depth(self) -> int:
        """The number of hidden layers."""
        return len(self.sizes) - 1

    @property
    def num_states(self) -> int:
        """The number of joint states of the hidden units."""
        return int(2 ** sum(self.sizes[1:]))

    def model(self, x: Tensor) -> None:
        """The generative model, from the top layer down to the observed data.

        Args:
            x: Data, 0 or 1 as floats, shape [batch, visible].
        """
        top = self._top_bias()
        layers = self._generative()
        with pyro.plate("data", x.shape[0], dim=-1):
            hidden = pyro.sample(f"h{self.depth}", dist.Bernoulli(logits=top).to_event(1))
            for level in range(self.depth, 1, -1):
                logits = linear(hidden, *layers[level - 1])
                hidden = pyro.sample(f"h{level - 1}", dist.Bernoulli(logits=logits).to_event(1))
            logits = linear(hidden, *layers[0])
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """The recognition network, from the data up to the top layer.

        Args:
            x: Data, 0 or 1 as floats, shape [batch, visible].
        """
        layers = self._recognition()
        with pyro.plate("data", x.shape[0], dim=-1):
            below = x
            for level, layer in enumerate(layers, start=1):
                logits = linear(below, *layer)
                below = pyro.sample(f"h{level}", dist.Bernoulli(logits=logits).to_event(1))

    @torch.no_grad()
    def exact_log_likelihood(self, x: Tensor) -> Tensor:
        """Sums the joint probability over all hidden states, in double precision.

        The sum is taken layer by layer from the top, which is exact because each layer depends
        only on the one above it.

        Args:
            x: Data, 0 or 1, shape [batch, visible].

        Returns:
            log p(x) in nats, float64, shape [batch].

        Raises:
            ValueError: If there are more than `MAX_STATES` joint hidden states.
        """
        if self.num_states > MAX_STATES:
            raise ValueError(
                f"{self.num_states} hidden states are too many to enumerate (at most {MAX_STATES});"
                " use importance_log_likelihood"
            )
        top = self._top_bias().double()
        layers = [Affine(*(p.double() for p in layer)) for layer in self._generative()]
        states = _all_states(self.sizes[-1], top.device)
        log_prior = _bernoulli_log_prob(states, top)
        for level in range(self.depth, 0, -1):
            below = _all_states(self.sizes[level - 1], top.device) if level > 1 else x.double()
            log_prior = _marginal_log_prob(below, states, log_prior, layers[level - 1])
            states = below
        return log_prior

    @torch.no_grad()
    def importance_log_likelihood(self, x: Tensor, num_samples: int, seed: int = 0) -> Tensor:
        """Estimates the log likelihood by importance sampling with the guide as proposal.

        The likelihood estimate is unbiased, so its logarithm is in expectation a lower bound that
        tightens as the number of samples grows. The global random state is left as it was.

        Args:
            x: Data, 0 or 1 as floats, shape [batch, visible].
            num_samples: Samples from the guide per datum.
            seed: Seed of the estimate's own random state.

        Returns:
            Estimate of log p(x) in nats, shape [batch].
        """
        top, layers, recognition = self._top_bias(), self._generative(), self._recognition()
        chunk = max(1, _CHUNK_ELEMENTS // (x.shape[0] * max(self.sizes)))
        total = x.new_full(x.shape[:1], -math.inf)
        with torch.random.fork_rng(devices=_cuda_devices(x)):
            torch.manual_seed(seed)
            for start in range(0, num_samples, chunk):
                count = min(chunk, num_samples - start)
                log_weight = _log_weights(x, count, top, layers, recognition)
                total = torch.logaddexp(total, log_weight.logsumexp(0))
        return total - math.log(num_samples)

    @torch.no_grad()
    def sample(self, num: int, seed: int = 0) -> Fantasies:
        """Draws ancestral samples, leaving the global random state as it was.

        Args:
            num: Number of samples.
            seed: Seed of the samples' own random state.

        Returns:
            Means and values of the visible layer, each of shape [samples, visible].
        """
        top, layers = self._top_bias(), self._generative()
        with torch.random.fork_rng(devices=_cuda_devices(top)):
            torch.manual_seed(seed)
            values = torch.bernoulli(torch.sigmoid(top).expand(num, -1))
            means = values
            for layer in reversed(layers):
                means = torch.sigmoid(linear(values, *layer))
                values = torch.bernoulli(means)
        return Fantasies(means, values)

    def _top_bias(self) -> Tensor:
        bias: Tensor = pyro.param("top.bias", lambda: torch.zeros(self.sizes[-1]))
        return bias

    def _generative(self) -> list[Affine]:
        """The model's layers from the bottom up; layer l has shape [units l - 1, units l]."""
        return [
            self._affine(
                f"layer{level}",
                self.sizes[level - 1],
                self.sizes[level],
                self._visible_bias if level == 1 else None,
            )
            for level in range(1, self.depth + 1)
        ]

    def _recognition(self) -> list[Affine]:
        """The guide's layers from the bottom up; layer l has shape [units l, units l - 1]."""
        return [
            self._affine(f"recognition{level}", self.sizes[level], self.sizes[level - 1])
            for level in range(1, self.depth + 1)
        ]

    def _affine(
        self,
        name: str,
        units_out: int,
        units_in: int,
        init_bias: Callable[[], Tensor] | None = None,
    ) -> Affine:
        scale = self.init_scale / math.sqrt(units_in)
        return Affine(
            pyro.param(f"{name}.weight", lambda: scale * torch.randn(units_out, units_in)),
            pyro.param(f"{name}.bias", init_bias or (lambda: torch.zeros(units_out))),
        )

    def _visible_bias(self) -> Tensor:
        if self.visible_mean is None:
            return torch.zeros(self.sizes[0])
        mean = self.visible_mean.to(torch.get_default_dtype())
        return torch.logit(mean.clamp(_MEAN_MARGIN, 1 - _MEAN_MARGIN))


def _cuda_devices(tensor: Tensor) -> list[torch.device]:
    return [tensor.device] if tensor.is_cuda else []


def _bernoulli_log_prob(values: Tensor, logits: Tensor) -> Tensor:
    """Log probability of a layer's values, summed over its units.

    Args:
        values: Values, 0 or 1, shape [..., units].
        logits: Logits, broadcastable with the values, shape [..., units].

    Returns:
        Log probability in nats, shape [...].
    """
    return (values * logits - softplus(logits)).sum(-1)


def _all_states(units: int, device: torch.device) -> Tensor:
    """All joint states of binary units, float64, shape [2**units, units]."""
    index = torch.arange(2**units, device=device)
    return ((index[:, None] >> torch.arange(units, device=device)) & 1).double()


def _marginal_log_prob(below: Tensor, states: Tensor, log_prior: Tensor, layer: Affine) -> Tensor:
    """Sums one layer out, in chunks of its states.

    Args:
        below: Values of the layer below, shape [values, units below].
        states: All states of the layer that is summed out, shape [states, units].
        log_prior: Log probability of those states in nats, shape [states].
        layer: Weight and bias of the layer below, shapes [units below, units] and [units below].

    Returns:
        Log marginal probability of the values below in nats, shape [values].
    """
    chunk = max(1, _CHUNK_ELEMENTS // max(below.shape))
    total = below.new_full(below.shape[:1], -math.inf)
    for start in range(0, states.shape[0], chunk):
        part = slice(start, start + chunk)
        logits = linear(states[part], *layer)
        log_joint = below @ logits.T + (log_prior[part] - softplus(logits).sum(-1))
        total = torch.logaddexp(total, log_joint.logsumexp(-1))
    return total


def _log_weights(
    x: Tensor, count: int, top: Tensor, layers: list[Affine], recognition: list[Affine]
) -> Tensor:
    """Log importance weights log p(x, h) - log q(h | x) of hidden states drawn from the guide.

    Args:
        x: Data, shape [batch, visible].
        count: Number of samples.
        top: Logits of the top layer's prior, shape [top units].
        layers: The model's layers, from the bottom up.
        recognition: The guide's layers, from the bottom up.

    Returns:
        Log weights in nats, shape [samples, batch].
    """
    below = x.expand(count, *x.shape)
    log_weight = x.new_zeros(count, x.shape[0])
    for layer, inverse in zip(layers, recognition, strict=True):
        logits = linear(below, *inverse)
        hidden = torch.bernoulli(torch.sigmoid(logits))
        log_weight = log_weight - _bernoulli_log_prob(hidden, logits)
        log_weight = log_weight + _bernoulli_log_prob(below, linear(hidden, *layer))
        below = hidden
    return log_weight + _bernoulli_log_prob(below, top)


_machine = Helmholtz((16, 8, 4))


def model(x: Tensor) -> None:
    """The model of a small default machine.

    Args:
        x: Data, 0 or 1 as floats, shape [batch, 16].
    """
    _machine.model(x)


def guide(x: Tensor) -> None:
    """The guide of a small default machine.

    Args:
        x: Data, 0 or 1 as floats, shape [batch, 16].
    """
    _machine.guide(x)


def make_data(seed: int, size: int = 200) -> Tensor:
    """Samples data for the default machine from another one with random parameters.

    Neither the global random state nor the parameter store is touched.

    Args:
        seed: Seed of the random machine and of its samples.
        size: Number of data.

    Returns:
        Data, 0 or 1 as floats, shape [size, 16].
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = _machine.sizes
    values = torch.randint(2, (size, sizes[-1]), generator=generator).to(torch.get_default_dtype())
    for units_out, units_in in zip(sizes[-2::-1], sizes[:0:-1], strict=True):
        weight = 4 * torch.randn(units_out, units_in, generator=generator) / math.sqrt(units_in)
        logits = linear(values - 0.5, weight)
        values = torch.bernoulli(torch.sigmoid(logits), generator=generator)
    return values
