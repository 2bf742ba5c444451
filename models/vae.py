"""A variational autoencoder of handwritten digits: an encoder and a decoder network.

A digit x has a code z ~ N(0, I) of a few numbers; its pixels are independent given the code, with
logits from the decoder. The guide is N(loc(x), diag(scale(x)²)), both heads on one encoder layer.
Trained on scikit-learn's 8 × 8 digits, binarized at half of the maximum.

`VAE.log_likelihood` estimates the likelihood by importance sampling, as the program has no exact
one: the estimate is too low on average, and less so with more samples. (D. P. Kingma and
M. Welling, "Auto-encoding variational Bayes", ICLR 2014. Y. Burda, R. Grosse and R. Salakhutdinov,
"Importance weighted autoencoders", ICLR 2016.)
"""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.nn.functional import softplus


class Encoder(nn.Module):
    """Location and scale of the code of each digit."""

    def __init__(self, num_pixels: int, num_hidden: int, code_size: int) -> None:
        """Makes a network with random weights.

        Args:
            num_pixels: Number of pixels.
            num_hidden: Units of the hidden layer.
            code_size: Size of the code.
        """
        super().__init__()
        self.hidden = nn.Linear(num_pixels, num_hidden)
        self.loc = nn.Linear(num_hidden, code_size)
        self.scale = nn.Linear(num_hidden, code_size)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Reads digits.

        Args:
            x: Digits, shape [batch, pixels].

        Returns:
            Location and scale of their codes, each of shape [batch, code].
        """
        hidden = softplus(self.hidden(x))
        return self.loc(hidden), torch.exp(0.5 * self.scale(hidden))


class Decoder(nn.Module):
    """Logits of the pixels given the code."""

    def __init__(self, num_pixels: int, num_hidden: int, code_size: int) -> None:
        """Makes a network with random weights.

        Args:
            num_pixels: Number of pixels.
            num_hidden: Units of the hidden layer.
            code_size: Size of the code.
        """
        super().__init__()
        self.hidden = nn.Linear(code_size, num_hidden)
        self.logits = nn.Linear(num_hidden, num_pixels)

    def forward(self, z: Tensor) -> Tensor:
        """Draws digits.

        Args:
            z: Codes, shape [batch, code].

        Returns:
            Logits, shape [batch, pixels].
        """
        logits: Tensor = self.logits(softplus(self.hidden(z)))
        return logits


class VAE:
    """A variational autoencoder with one hidden layer on either side.

    The weights are those of PyTorch modules, which `model` and `guide` register with Pyro. They are
    made once: clear Pyro's parameter store and make a new instance to start again.

    Attributes:
        num_pixels: Number of pixels.
        code_size: Size of the code.
        decoder: The model's network.
        encoder: The guide's network.
    """

    def __init__(
        self, num_pixels: int = 64, num_hidden: int = 128, code_size: int = 8, seed: int = 0
    ) -> None:
        """Makes both networks, leaving the global random state as it was.

        Args:
            num_pixels: Number of pixels.
            num_hidden: Units of each hidden layer.
            code_size: Size of the code.
            seed: Seed of the initial weights.
        """
        self.num_pixels = num_pixels
        self.code_size = code_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.decoder = Decoder(num_pixels, num_hidden, code_size)
            self.encoder = Encoder(num_pixels, num_hidden, code_size)

    def model(self, x: Tensor) -> None:
        """Codes and pixels.

        Args:
            x: Digits, 0 or 1 as floats, shape [batch, pixels].
        """
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            prior = dist.Normal(x.new_zeros(self.code_size), 1.0).to_event(1)
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """Codes given pixels.

        Args:
            x: Digits, 0 or 1 as floats, shape [batch, pixels].
        """
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            loc, scale = self.encoder(x)
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    def log_likelihood(self, x: Tensor, num_samples: int = 1000, seed: int = 0) -> Tensor:
        """Importance-weighted estimate of the log likelihood.

        Args:
            x: Digits, 0 or 1 as floats, shape [batch, pixels].
            num_samples: Codes per digit.
            seed: Seed of the codes; the global random state stays as it was.

        Returns:
            Estimate for each digit in nats, shape [batch].
        """
        return importance_log_likelihood(self.model, self.guide, x, count=num_samples, seed=seed)


def importance_log_likelihood(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *data: Tensor,
    count: int,
    seed: int,
    chunk: int = 50,
) -> Tensor:
    """Estimates log p(x) as log (1/K) Σ_k p(x, z_k) / q(z_k | x), with z_k from the guide.

    Args:
        model: A program whose outermost plate runs over the data, with no random site outside.
        guide: Its guide, likewise.
        *data: Arguments of both, one row per datum.
        count: Number K of samples per datum.
        seed: Seed of the samples; the global random state stays as it was.
        chunk: Samples that are drawn at once.

    Returns:
        Estimate for each datum in nats, too low on average, shape [batch].
    """
    size = len(data[0])
    parts = []
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for start in range(0, count, chunk):
            copies = min(chunk, count - start)
            many = [value.repeat(copies, *[1] * (value.dim() - 1)) for value in data]
            drawn = poutine.trace(guide).get_trace(*many)
            joint = poutine.trace(poutine.replay(model, trace=drawn)).get_trace(*many)
            weight = _log_prob(joint, copies * size) - _log_prob(drawn, copies * size)
            parts.append(weight.reshape(copies, size))
    return torch.cat(parts).logsumexp(0) - math.log(count)


def _log_prob(trace: Any, size: int) -> Tensor:
    """Log probability of a trace for each datum, shape [size]."""
    trace.compute_log_prob()
    sites = [site for site in trace.nodes.values() if site["type"] == "sample"]
    terms = [site["log_prob"] for site in sites if "log_prob" in site and site["log_prob"].dim()]
    return torch.stack([term.expand(size) for term in terms]).sum(0)


def make_data(seed: int, size: int = 1797) -> Tensor:
    """Draws digits without replacement from scikit-learn's.

    Args:
        seed: Seed of their order.
        size: Number of digits, at most 1797.

    Returns:
        Digits, 0 or 1 as floats, shape [size, 64].
    """
    from sklearn.datasets import load_digits

    x = torch.tensor(load_digits().data >= 8, device="cpu")
    order = torch.randperm(len(x), generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
    return x[order[:size]].to(torch.get_default_device(), torch.get_default_dtype())
