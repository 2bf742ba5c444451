"""Eight schools: effects of coaching with a common mean and spread, centered or not.

School j reports an estimate y_j ~ N(θ_j, σ_j) of its effect θ_j ~ N(μ, τ). In the centered program
the effects are sites, in the other their standardized deviations η_j = (θ_j − μ) / τ: the same
joint distribution in coordinates that suit a normal guide better, where τ is small.

Effects and mean integrate out in closed form given the spread, so that evidence and posterior
moments are integrals over one number. (D. B. Rubin, "Estimation in parallel randomized
experiments", J. Educ. Stat. 6, 1981. A. Gelman et al., "Bayesian data analysis", Sec. 5.5.)
"""

import math
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor


class Moments(NamedTuple):
    """Posterior means and standard deviations.

    Attributes:
        mean: Mean of μ, τ and the effects, shape [2 + schools].
        std: Their standard deviations, shape [2 + schools].
    """

    mean: Tensor
    std: Tensor


class EightSchools:
    """The hierarchical model of any number of schools.

    Attributes:
        mean_scale: Standard deviation of μ in its normal prior of mean 0.
        spread_scale: Scale of τ in its half-Cauchy prior.
    """

    def __init__(self, mean_scale: float = 5.0, spread_scale: float = 5.0) -> None:
        """Makes a model.

        Args:
            mean_scale: Standard deviation of μ in its normal prior of mean 0.
            spread_scale: Scale of τ in its half-Cauchy prior.
        """
        self.mean_scale = mean_scale
        self.spread_scale = spread_scale

    def model(self, y: Tensor, sigma: Tensor) -> None:
        """The program that is not centered: its sites are "mu", "tau" and "eta".

        Args:
            y: Estimated effects, shape [schools].
            sigma: Their standard errors, shape [schools].
        """
        mu, tau = self._sample_prior(y)
        with pyro.plate("schools", len(y)):
            eta = pyro.sample("eta", dist.Normal(y.new_zeros(()), 1.0))
            pyro.sample("y", dist.Normal(mu + tau * eta, sigma), obs=y)

    def centered(self, y: Tensor, sigma: Tensor) -> None:
        """The centered program: its sites are "mu", "tau" and "theta".

        Args:
            y: Estimated effects, shape [schools].
            sigma: Their standard errors, shape [schools].
        """
        mu, tau = self._sample_prior(y)
        with pyro.plate("schools", len(y)):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, sigma), obs=y)

    def log_evidence(self, y: Tensor, sigma: Tensor, points: int = 4001) -> Tensor:
        """The log evidence by quadrature over log τ.

        Args:
            y: Estimated effects, shape [schools].
            sigma: Their standard errors, shape [schools].
            points: Number of points.

        Returns:
            log p(y) in nats, a scalar, accurate to about ten digits.
        """
        return self._log_mass(y, sigma, points)[1].logsumexp(0)

    def moments(self, y: Tensor, sigma: Tensor, points: int = 4001) -> Moments:
        """Posterior means and standard deviations by quadrature over log τ.

        Args:
            y: Estimated effects, shape [schools].
            sigma: Their standard errors, shape [schools].
            points: Number of points.

        Returns:
            Moments of μ, τ and the effects, in this order.
        """
        tau, log_mass = self._log_mass(y, sigma, points)
        weight = log_mass.softmax(0)[:, None]
        precision, mean = self._mean_given_spread(y, sigma, tau)
        # θ_j given τ: a precision-weighted mean of y_j and μ, with μ itself uncertain.
        share = tau[:, None] ** 2 / (tau[:, None] ** 2 + sigma**2)
        effect = share * y + (1 - share) * mean[:, None]
        variance = share * sigma**2 + (1 - share) ** 2 / precision[:, None]
        means = torch.cat([mean[:, None], tau[:, None], effect], dim=1)
        within = torch.cat(
            [1 / precision[:, None], torch.zeros_like(tau)[:, None], variance], dim=1
        )
        total = (weight * means).sum(0)
        return Moments(total, (weight * (within + (means - total) ** 2)).sum(0).sqrt())

    def _sample_prior(self, y: Tensor) -> tuple[Tensor, Tensor]:
        mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), self.mean_scale))
        return mu, pyro.sample("tau", dist.HalfCauchy(y.new_tensor(self.spread_scale)))

    def _mean_given_spread(self, y: Tensor, sigma: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
        """Precision and mean of μ given τ and the data, each of shape [points]."""
        precisions = 1 / (sigma**2 + tau[:, None] ** 2)
        precision = precisions.sum(1) + 1 / self.mean_scale**2
        return precision, (precisions * y).sum(1) / precision

    def _log_mass(self, y: Tensor, sigma: Tensor, points: int) -> tuple[Tensor, Tensor]:
        """Points τ and log ∫ p(y, μ, τ) dμ dτ around each, both of shape [points].

        The integrand decays exponentially on either side of log τ, where the trapezoid rule
        converges faster than any power of the step.
        """
        log_tau = torch.linspace(-30.0, 30.0, points, dtype=torch.float64, device=y.device)
        tau = log_tau.exp()
        y, sigma = y.double(), sigma.double()
        variance = sigma**2 + tau[:, None] ** 2
        precision, mean = self._mean_given_spread(y, sigma, tau)
        log_likelihood = -0.5 * (
            (2 * math.pi * variance).log().sum(1)
            + (y**2 / variance).sum(1)
            - precision * mean**2
            + (precision * self.mean_scale**2).log()
        )
        prior = dist.HalfCauchy(tau.new_tensor(self.spread_scale))
        step = math.log(60.0 / (points - 1))
        return tau, log_likelihood + prior.log_prob(tau) + log_tau + step


def make_data(seed: int | None = None, size: int = 8) -> tuple[Tensor, Tensor]:
    """The eight schools, or simulated ones.

    Args:
        seed: Seed of simulated schools, or None for the real eight. The global random state stays
            as it was.
        size: Number of simulated schools.

    Returns:
        Estimated effects and their standard errors, each of shape [schools].
    """
    if seed is None:
        y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
        return y, torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
    generator = torch.Generator("cpu").manual_seed(seed)
    numbers = torch.randn(4, size, generator=generator, dtype=torch.float64, device="cpu")
    sigma = 8 + 10 * torch.sigmoid(numbers[3])
    y = 5 * numbers[0, 0] + 5 * numbers[1] + sigma * numbers[2]
    device, dtype = torch.get_default_device(), torch.get_default_dtype()
    return y.to(device, dtype), sigma.to(device, dtype)
