"""Factor analysis and probabilistic principal components, where EM becomes arbitrarily slow.

Data are a linear image of a few independent normal factors, plus independent normal noise:
x = W z + e with z ~ N(0, I) and e ~ N(0, diag(noise)), both of mean zero. With one noise variance
for all visible units the model is probabilistic PCA, whose optimum is known in closed form. EM
gains a share of about the noise variance per step, so that little noise takes it many steps.

`FactorAnalysis` offers the program with its factors, the same program with the factors integrated
out, the exact posterior of the factors as a guide, and referees in plain torch: the exact log
likelihood, the exact EM step, and the optimum of probabilistic PCA. (D. B. Rubin and D. T. Thayer,
"EM algorithms for ML factor analysis", Psychometrika 47, 1982. M. E. Tipping and C. M. Bishop,
"Probabilistic principal component analysis", J. R. Statist. Soc. B 61, 1999.)
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from models.values import Optimum, as_default, normal, parameters, stored, uniform


class _Posterior(NamedTuple):
    """The posterior N(weights x, covariance) of the factors.

    Attributes:
        weights: Shape [factors, visible].
        covariance: Shape [factors, factors].
    """

    weights: Tensor
    covariance: Tensor


class FactorAnalysis:
    """Factor analysis of mean zero, with one noise variance per visible unit or one for all.

    The parameters are "loadings" of shape [visible, factors] and the noise *variance* "noise" of
    shape [visible], or a scalar with an isotropic model (probabilistic PCA). They live in Pyro's
    parameter store, so two instances in one process share them by name. The likelihood depends on
    the loadings up to a rotation of the factors only.

    Attributes:
        num_visible: Number of visible units.
        num_factors: Number of factors.
        noise: Typical noise variance, of initial values and of the truth behind the data.
        isotropic: Whether all visible units have the same noise variance.
        seed: Seed of the initial values in `initial`.
        constraints: The constraint of each parameter by name.
    """

    constraints: Mapping[str, Any] = {
        "loadings": dist.constraints.real,
        "noise": dist.constraints.positive,
    }

    def __init__(
        self,
        num_visible: int = 10,
        num_factors: int = 2,
        noise: float = 1.0,
        isotropic: bool = False,
        seed: int = 0,
    ) -> None:
        """Makes a model; its parameters are made on first use.

        Args:
            num_visible: Number of visible units.
            num_factors: Number of factors, less than the number of visible units.
            noise: Typical noise variance, of initial values and of the truth behind the data.
            isotropic: Whether all visible units have the same noise variance.
            seed: Seed of the initial values in `initial`.

        Raises:
            ValueError: If there are no factors or too many, or the noise is not positive.
        """
        if not 1 <= num_factors < num_visible:
            raise ValueError(
                f"need at least 1 factor and fewer than the {num_visible} visible units,"
                f" got {num_factors}"
            )
        if not 0 < noise < math.inf:
            raise ValueError(f"noise must be a positive variance, got {noise}")
        self.num_visible = num_visible
        self.num_factors = num_factors
        self.noise = noise
        self.isotropic = isotropic
        self.seed = seed

    @property
    def initial(self) -> dict[str, Tensor]:
        """The values at which `model` creates its parameters: `start` at the model's seed."""
        return self.start(self.seed)

    def start(self, seed: int) -> dict[str, Tensor]:
        """Draws initial values, leaving the global random state as it was.

        Loadings are standard normal, noise variances uniform within 50% of the typical one.

        Args:
            seed: Seed of the values.

        Returns:
            Parameters by name, in the default dtype and on the default device.
        """
        generator = torch.Generator(device="cpu").manual_seed(seed)
        return {
            "loadings": as_default(normal((self.num_visible, self.num_factors), generator)),
            "noise": as_default(self._noise(generator)),
        }

    def make_data(self, seed: int, size: int) -> Tensor:
        """Samples data from a random model of this kind.

        True parameters are distributed as initial values are. Neither the global random state nor
        the parameter store is touched.

        Args:
            seed: Seed of the true parameters and of the data.
            size: Number of data.

        Returns:
            Data, shape [size, visible], in the default dtype and on the default device.
        """
        generator = torch.Generator(device="cpu").manual_seed(seed)
        # The data come first, so that the truth is not the start of the same seed.
        errors = normal((size, self.num_visible), generator)
        factors = normal((size, self.num_factors), generator)
        loadings = normal((self.num_visible, self.num_factors), generator)
        return as_default(factors @ loadings.T + errors * self._noise(generator).sqrt())

    def model(self, x: Tensor) -> None:
        """The program with its factors.

        Args:
            x: Data, shape [batch, visible].
        """
        loadings, noise = parameters(self).values()
        with pyro.plate("data", x.shape[0], dim=-1):
            prior = dist.Normal(x.new_zeros(self.num_factors), 1.0).to_event(1)
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(z @ loadings.T, noise.sqrt()).to_event(1), obs=x)

    def collapsed(self, x: Tensor) -> None:
        """The program with its factors integrated out, which has the same parameters.

        Args:
            x: Data, shape [batch, visible].
        """
        loadings, noise = parameters(self).values()
        mean = loadings.new_zeros(self.num_visible)
        covariance = self._covariance(loadings, noise)
        with pyro.plate("data", x.shape[0], dim=-1):
            pyro.sample("x", dist.MultivariateNormal(mean, covariance), obs=x)

    def guide(self, x: Tensor) -> None:
        """A guide without sites, for the collapsed program.

        Args:
            x: Data, shape [batch, visible].
        """

    def recognize(self, x: Tensor) -> None:
        """A guide that samples from the exact posterior of the factors.

        It has no parameters of its own. It reads those of the model from the store, at their
        present values and without gradients, or takes their initial values if there are none yet.

        Args:
            x: Data, shape [batch, visible].
        """
        with torch.no_grad():
            weights, covariance = self._posterior(stored(self.initial))
            mean = x @ weights.T
            scale = torch.linalg.cholesky(covariance)
        with pyro.plate("data", x.shape[0], dim=-1):
            pyro.sample("z", dist.MultivariateNormal(mean, scale_tril=scale))

    def log_likelihood(self, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Exact log likelihood, differentiable with respect to the parameters.

        Args:
            params: Parameters by name, on their constrained spaces.
            x: Data, shape [batch, visible].

        Returns:
            Total log likelihood in nats, a scalar.
        """
        factor = torch.linalg.cholesky(self._covariance(params["loadings"], params["noise"]))
        log_det = 2 * factor.diagonal().log().sum()
        white = torch.linalg.solve_triangular(factor, x.T, upper=False)
        size = x.shape[0]
        constant = size * self.num_visible * math.log(2 * math.pi)
        total: Tensor = -0.5 * (constant + size * log_det + white.square().sum())
        return total

    @torch.no_grad()
    def em_step(self, params: Mapping[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        """One exact step of expectation maximization.

        Args:
            params: Parameters by name, on their constrained spaces.
            x: Data, shape [batch, visible].

        Returns:
            New parameters by name; their log likelihood is at least that of the old ones.
        """
        weights, covariance = self._posterior(params)
        moment = x.T @ x / x.shape[0]
        cross = weights @ moment  # mean of z xᵀ, [factors, visible]
        loadings = torch.linalg.solve(covariance + cross @ weights.T, cross).T
        # The mean square of x − W z as a sum of squares, which cannot become negative.
        residual = torch.eye(self.num_visible, dtype=x.dtype, device=x.device) - loadings @ weights
        noise = ((residual @ moment) * residual).sum(-1)
        noise = noise + ((loadings @ covariance) * loadings).sum(-1)
        return {"loadings": loadings, "noise": noise.mean() if self.isotropic else noise}

    @torch.no_grad()
    def optimum(self, x: Tensor) -> Optimum:
        """The global optimum of the isotropic model (probabilistic PCA), by an eigenvalue problem.

        Args:
            x: Data, shape [batch, visible], more of them than factors.

        Returns:
            The best parameters, whose loadings have orthogonal columns by decreasing length, and
            their log likelihood.

        Raises:
            ValueError: If the model is not isotropic.
        """
        if not self.isotropic:
            raise ValueError("the optimum is known in closed form for isotropic models only")
        values, vectors = torch.linalg.eigh(x.T @ x / x.shape[0])
        noise = values[: -self.num_factors].mean()
        lengths = (values[-self.num_factors :] - noise).clamp(min=0).sqrt()
        loadings = (vectors[:, -self.num_factors :] * lengths).flip(-1)
        params = {"loadings": loadings, "noise": noise}
        return Optimum(params, self.log_likelihood(params, x))

    def _noise(self, generator: torch.Generator) -> Tensor:
        shape = () if self.isotropic else (self.num_visible,)
        return self.noise * (0.5 + uniform(shape, generator))

    def _covariance(self, loadings: Tensor, noise: Tensor) -> Tensor:
        """Covariance of the data, shape [visible, visible]."""
        return loadings @ loadings.T + torch.diag(noise.expand(self.num_visible))

    def _posterior(self, params: Mapping[str, Tensor]) -> _Posterior:
        """The posterior of the factors, in the form that is accurate with little noise."""
        scaled = params["loadings"].T / params["noise"]
        precision = scaled @ params["loadings"]
        precision = precision + torch.eye(
            self.num_factors, dtype=precision.dtype, device=precision.device
        )
        covariance = torch.cholesky_inverse(torch.linalg.cholesky(precision))
        return _Posterior(covariance @ scaled, covariance)


_analysis = FactorAnalysis()


def model(x: Tensor) -> None:
    """The program of a default model, with its factors.

    Args:
        x: Data, shape [batch, 10].
    """
    _analysis.model(x)


def guide(x: Tensor) -> None:
    """The exact posterior of the factors of the default model.

    Args:
        x: Data, shape [batch, 10].
    """
    _analysis.recognize(x)


def make_data(seed: int, size: int = 200, noise: float = 1.0) -> Tensor:
    """Samples data for the default model from a random one.

    Neither the global random state nor the parameter store is touched.

    Args:
        seed: Seed of the random model and of its samples.
        size: Number of data.
        noise: Typical noise variance.

    Returns:
        Data, shape [size, 10].
    """
    return FactorAnalysis(noise=noise).make_data(seed, size)
