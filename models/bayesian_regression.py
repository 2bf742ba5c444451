"""Bayesian linear and logistic regression: a posterior over weights, and what it should be.

`LinearRegression` has a normal prior and normal noise, so its posterior and its evidence are known
in closed form, and KL(q‖posterior) = log evidence − ELBO exactly. Its data are scikit-learn's
diabetes study, whose blood measurements are nearly collinear: the posterior is long and thin.
`LogisticRegression` tells benign from malignant tumors; its evidence is estimated by importance
sampling from a t distribution on the Laplace approximation.
"""

import math
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal
from torch.nn.functional import logsigmoid


class Posterior(NamedTuple):
    """A normal distribution of all weights, the intercept last.

    Attributes:
        mean: Shape [features + 1].
        covariance: Shape [features + 1, features + 1].
    """

    mean: Tensor
    covariance: Tensor

    def divergence_from(self, loc: Tensor, covariance: Tensor) -> Tensor:
        """KL(N(loc, covariance) ‖ this) in nats.

        Args:
            loc: Mean of the other normal distribution, shape [features + 1].
            covariance: Its covariance, shape [features + 1, features + 1].

        Returns:
            The divergence, a scalar.
        """
        other = MultivariateNormal(loc, covariance)
        return torch.distributions.kl_divergence(other, MultivariateNormal(*self))


class LinearRegression:
    """Linear regression with a normal prior on the weights and normal noise.

    Attributes:
        prior_scale: Standard deviation of each weight and of the intercept.
        noise: Standard deviation of the noise.
        learn_noise: Whether the noise is a parameter "noise", which starts at `noise`.
        batch_size: Number of data that a run looks at, or None for all of them.
    """

    def __init__(
        self,
        prior_scale: float = 1.0,
        noise: float = 0.7,
        learn_noise: bool = False,
        batch_size: int | None = None,
    ) -> None:
        """Makes a model.

        Args:
            prior_scale: Standard deviation of each weight and of the intercept.
            noise: Standard deviation of the noise.
            learn_noise: Whether the noise is a parameter "noise", which starts at `noise`.
            batch_size: Number of data that a run looks at, or None for all of them.
        """
        self.prior_scale = prior_scale
        self.noise = noise
        self.learn_noise = learn_noise
        self.batch_size = batch_size

    def model(self, x: Tensor, y: Tensor) -> None:
        """Weights and responses.

        Args:
            x: Features, shape [batch, features].
            y: Responses, shape [batch].
        """
        noise = x.new_tensor(self.noise)
        if self.learn_noise:
            noise = pyro.param("noise", noise, constraint=dist.constraints.positive)
        weights, intercept = _sample_weights(x, self.prior_scale)
        with pyro.plate("data", len(x), self.batch_size) as index:
            mean = (x[index] * weights).sum(-1) + intercept
            pyro.sample("y", dist.Normal(mean, noise), obs=y[index])

    def posterior(self, x: Tensor, y: Tensor, noise: float | None = None) -> Posterior:
        """The exact posterior of weights and intercept.

        Args:
            x: Features, shape [batch, features].
            y: Responses, shape [batch].
            noise: Standard deviation of the noise, by default that of the model.

        Returns:
            Mean and covariance, the intercept last.
        """
        variance = (self.noise if noise is None else noise) ** 2
        design = with_intercept(x)
        precision = design.T @ design / variance
        precision = precision + torch.eye(len(precision)).to(x) / self.prior_scale**2
        covariance = torch.cholesky_inverse(torch.linalg.cholesky(precision))
        return Posterior(covariance @ design.T @ y / variance, covariance)

    def log_evidence(self, x: Tensor, y: Tensor, noise: float | None = None) -> Tensor:
        """The exact log evidence: y is jointly normal with the weights integrated out.

        Args:
            x: Features, shape [batch, features].
            y: Responses, shape [batch].
            noise: Standard deviation of the noise, by default that of the model.

        Returns:
            log p(y) in nats, a scalar.
        """
        variance = (self.noise if noise is None else noise) ** 2
        design = self.prior_scale * with_intercept(x)
        covariance = design @ design.T + variance * torch.eye(len(x)).to(x)
        return MultivariateNormal(torch.zeros_like(y), covariance).log_prob(y)


class LogisticRegression:
    """Logistic regression with a normal prior on the weights.

    Attributes:
        prior_scale: Standard deviation of each weight and of the intercept.
        batch_size: Number of data that a run looks at, or None for all of them.
    """

    def __init__(self, prior_scale: float = 1.0, batch_size: int | None = None) -> None:
        """Makes a model.

        Args:
            prior_scale: Standard deviation of each weight and of the intercept.
            batch_size: Number of data that a run looks at, or None for all of them.
        """
        self.prior_scale = prior_scale
        self.batch_size = batch_size

    def model(self, x: Tensor, y: Tensor) -> None:
        """Weights and classes.

        Args:
            x: Features, shape [batch, features].
            y: Classes, 0 or 1 as floats, shape [batch].
        """
        weights, intercept = _sample_weights(x, self.prior_scale)
        with pyro.plate("data", len(x), self.batch_size) as index:
            logits = (x[index] * weights).sum(-1) + intercept
            pyro.sample("y", dist.Bernoulli(logits=logits), obs=y[index])

    def log_joint(self, weights: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Log density of weights and classes.

        Args:
            weights: Weights, the intercept last, shape [..., features + 1].
            x: Features, shape [batch, features].
            y: Classes, 0 or 1 as floats, shape [batch].

        Returns:
            log p(y, weights) in nats, shape [...].
        """
        logits = weights @ with_intercept(x).T
        prior = torch.distributions.Normal(torch.zeros_like(weights), self.prior_scale)
        return prior.log_prob(weights).sum(-1) + logsigmoid((2 * y - 1) * logits).sum(-1)

    def laplace(self, x: Tensor, y: Tensor) -> Posterior:
        """The normal distribution with the posterior's mode and curvature there.

        Args:
            x: Features, shape [batch, features].
            y: Classes, 0 or 1 as floats, shape [batch].

        Returns:
            Mode and inverse curvature, the intercept last.
        """
        design = with_intercept(x)
        prior = torch.eye(design.shape[1]).to(x) / self.prior_scale**2
        mode = x.new_zeros(design.shape[1])
        for _ in range(30):  # Newton's method on a concave function
            probs = torch.sigmoid(design @ mode)
            precision = (design.T * (probs * (1 - probs))) @ design + prior
            mode = mode + torch.linalg.solve(precision, design.T @ (y - probs) - prior @ mode)
        return Posterior(mode, torch.linalg.inv(precision))

    def log_evidence(
        self, x: Tensor, y: Tensor, num_samples: int = 20_000, seed: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Importance-sampling estimate of the log evidence.

        Weights are drawn from a t distribution with 10 degrees of freedom around the mode, whose
        tails are longer than those of the posterior.

        Args:
            x: Features, shape [batch, features].
            y: Classes, 0 or 1 as floats, shape [batch].
            num_samples: Number of samples.
            seed: Seed of the samples; the global random state stays as it was.

        Returns:
            Estimate of log p(y) in nats and its standard error, scalars.
        """
        mode, covariance = self.laplace(x, y)
        proposal = dist.MultivariateStudentT(10.0, mode, torch.linalg.cholesky(covariance))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            weights = proposal.sample((num_samples,))
        log_ratio = self.log_joint(weights, x, y) - proposal.log_prob(weights)
        estimate = log_ratio.logsumexp(0) - math.log(num_samples)
        error = (log_ratio - estimate).exp().std() / math.sqrt(num_samples)
        return estimate, error


def _sample_weights(x: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Draws weights of shape [features] and the intercept, a scalar."""
    prior = dist.Normal(x.new_zeros(x.shape[1]), scale).to_event(1)
    weights = pyro.sample("weights", prior)
    return weights, pyro.sample("intercept", dist.Normal(x.new_zeros(()), scale))


def with_intercept(x: Tensor) -> Tensor:
    """Features with a last column of ones, shape [batch, features + 1]."""
    return torch.cat([x, torch.ones_like(x[:, :1])], dim=1)


def make_data(seed: int, size: int = 442) -> tuple[Tensor, Tensor]:
    """Draws patients without replacement from scikit-learn's diabetes study.

    Args:
        seed: Seed of their order.
        size: Number of patients, at most 442.

    Returns:
        Features, shape [size, 10], and progression of the disease, shape [size], both of mean 0 and
        standard deviation 1 over all patients.
    """
    from sklearn.datasets import load_diabetes

    return _standardized(load_diabetes(), seed, size, scale_target=True)


def make_classes(seed: int, size: int = 569) -> tuple[Tensor, Tensor]:
    """Draws tumors without replacement from scikit-learn's breast cancer study.

    Args:
        seed: Seed of their order.
        size: Number of tumors, at most 569.

    Returns:
        Features of mean 0 and standard deviation 1 over all tumors, shape [size, 30], and whether a
        tumor is benign, 0 or 1 as floats, shape [size].
    """
    from sklearn.datasets import load_breast_cancer

    return _standardized(load_breast_cancer(), seed, size, scale_target=False)


def _standardized(bunch: Any, seed: int, size: int, scale_target: bool) -> tuple[Tensor, Tensor]:
    x = torch.tensor(bunch.data, dtype=torch.float64, device="cpu")
    y = torch.tensor(bunch.target, dtype=torch.float64, device="cpu")
    x = (x - x.mean(0)) / x.std(0)
    if scale_target:
        y = (y - y.mean()) / y.std()
    generator = torch.Generator("cpu").manual_seed(seed)
    order = torch.randperm(len(x), generator=generator, device="cpu")[:size]
    device, dtype = torch.get_default_device(), torch.get_default_dtype()
    return x[order].to(device, dtype), y[order].to(device, dtype)
