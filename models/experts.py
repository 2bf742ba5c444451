"""A mixture of linear experts: a gate chooses, by the features, which regression applies.

A datum has features x and a response y. The gate picks one of a few experts, with probabilities
that are the softmax of linear functions of x; the expert is a linear regression of y on x with a
noise of its own. Which one it was is hidden. The model is of y given x, and its likelihood is a sum
over the experts, so that it is known exactly, and so is an EM step: a weighted least-squares fit
per expert, and a softmax regression of the gate on the experts' shares, for which Newton's method
runs to convergence within the step.

The data are scikit-learn's diabetes study: progression of the disease, given body mass index, blood
pressure and a blood measurement. It varies less where it is mild: two experts reach a log
likelihood of -436.8 nats, one regression, with 9 parameters less, -482.1. As with all mixtures
whose noise is learned, the likelihood has no global maximum: an expert that goes exactly through a
few data makes it infinite. The maxima that EM reaches are local ones.

(R. A. Jacobs, M. I. Jordan, S. J. Nowlan and G. E. Hinton, "Adaptive mixtures of local experts",
Neural Computation 3, 1991. M. I. Jordan and R. A. Jacobs, "Hierarchical mixtures of experts and the
EM algorithm", Neural Computation 6, 1994.)
"""

import math
from collections.abc import Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from models import bayesian_regression
from models.bayesian_regression import with_intercept
from models.softmax import softmax_logits, softmax_regression
from models.values import as_default, normal, parameters, stored, uniform

_FEATURES = (2, 3, 8)
"""Body mass index, mean blood pressure, and the logarithm of the serum triglycerides."""

_NUM_PATIENTS = 442


class LinearExperts:
    """Linear regressions with their own noise, mixed by a softmax gate.

    The parameters are "gate" of shape [experts - 1, features + 1], the weights of the logits of all
    experts but the first, whose logit is 0; "weight" of shape [experts, features + 1], the
    regressions; both with the intercept last; and "scale" of shape [experts], the standard
    deviations of the noise. They live in Pyro's parameter store, so two instances in one process
    share them by name. The likelihood does not depend on the order of the experts.

    Attributes:
        num_experts: Number of experts.
        num_features: Number of features, the intercept not counted.
        seed: Seed of the initial values in `initial`.
        constraints: The constraint of each parameter by name.
    """

    constraints: Mapping[str, Any] = {
        "gate": dist.constraints.real,
        "weight": dist.constraints.real,
        "scale": dist.constraints.positive,
    }

    def __init__(self, num_experts: int = 2, num_features: int = 3, seed: int = 0) -> None:
        """Makes a model; its parameters are made on first use.

        Args:
            num_experts: Number of experts.
            num_features: Number of features, the intercept not counted.
            seed: Seed of the initial values in `initial`.

        Raises:
            ValueError: If there are fewer than two experts or no features.
        """
        if num_experts < 2 or num_features < 1:
            raise ValueError(
                f"need at least 2 experts and 1 feature, got {num_experts} and {num_features}"
            )
        self.num_experts = num_experts
        self.num_features = num_features
        self.seed = seed

    @property
    def initial(self) -> dict[str, Tensor]:
        """The values at which `model` creates its parameters: `start` at the model's seed."""
        return self.start(self.seed)

    def start(self, seed: int) -> dict[str, Tensor]:
        """Draws initial values for standardized data, leaving the global random state as it was.

        Weights of the gate and of the experts are normal with standard deviation 1/2, scales
        uniform from 1/2 to 3/2.

        Args:
            seed: Seed of the values.

        Returns:
            Parameters by name, in the default dtype and on the default device.
        """
        generator = torch.Generator("cpu").manual_seed(seed)
        experts, columns = self.num_experts, self.num_features + 1
        scale = 0.5 + uniform((experts,), generator)
        return {
            "gate": as_default(0.5 * normal((experts - 1, columns), generator)),
            "weight": as_default(0.5 * normal((experts, columns), generator)),
            "scale": as_default(scale),
        }

    def model(self, x: Tensor, y: Tensor) -> None:
        """The program; its "expert" is summed out by enumeration.

        Args:
            x: Features, shape [batch, features].
            y: Responses, shape [batch].
        """
        design = self._design(x, y)
        gate, weight, scale = parameters(self).values()
        with pyro.plate("data", x.shape[0], dim=-1):
            choice = dist.Categorical(logits=softmax_logits(design, gate))
            expert = pyro.sample("expert", choice, infer={"enumerate": "parallel"})
            mean = (design * weight[expert]).sum(-1)
            pyro.sample("y", dist.Normal(mean, scale[expert]), obs=y)

    def guide(self, x: Tensor, y: Tensor) -> None:
        """The empty guide: the expert is summed out.

        Args:
            x: Features, shape [batch, features].
            y: Responses, shape [batch].
        """

    def recognize(self, x: Tensor, y: Tensor) -> None:
        """A guide that samples from the exact posterior of the experts.

        It has no parameters of its own. It reads those of the model from the store, at their
        present values and without gradients, or takes their initial values if there are none yet.

        Args:
            x: Features, shape [batch, features].
            y: Responses, shape [batch].
        """
        with torch.no_grad():
            logits = self._log_joint(stored(self.initial), x, y)
        with pyro.plate("data", x.shape[0], dim=-1):
            pyro.sample("expert", dist.Categorical(logits=logits))

    def log_likelihood(self, params: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        """Exact log likelihood of y given x, differentiable with respect to the parameters.

        Args:
            params: Parameters by name, on their constrained spaces.
            x: Features, shape [batch, features].
            y: Responses, shape [batch].

        Returns:
            Total conditional log likelihood in nats, a scalar.
        """
        return self._log_joint(params, x, y).logsumexp(-1).sum()

    @torch.no_grad()
    def em_step(self, params: Mapping[str, Tensor], x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """One exact step of expectation maximization.

        Args:
            params: Parameters by name, on their constrained spaces.
            x: Features, shape [batch, features].
            y: Responses, shape [batch].

        Returns:
            New parameters by name; their log likelihood is at least that of the old ones.

        Raises:
            ValueError: If an expert is left with too few data: it then goes through them exactly,
                or is not determined by them.
        """
        design = self._design(x, y)
        share = self._log_joint(params, x, y).softmax(-1)
        weighted = share.T[:, :, None] * design  # [experts, batch, features + 1]
        factor, info = torch.linalg.cholesky_ex(design.T @ weighted)
        weight = torch.cholesky_solve((weighted.mT @ y)[..., None], factor)[..., 0]
        square = (y[:, None] - design @ weight.T) ** 2
        scale = ((share * square).sum(0) / share.sum(0)).sqrt()
        least = torch.finfo(y.dtype).eps ** 0.5 * y.square().mean().sqrt()
        if bool(info.any()) or not bool((scale > least).all()):
            raise ValueError("an expert has too few data left to fit a regression with noise to")
        return {"gate": softmax_regression(design, share), "weight": weight, "scale": scale}

    def sample(self, params: Mapping[str, Tensor], x: Tensor, seed: int) -> Tensor:
        """Draws responses, leaving the global random state as it was.

        Args:
            params: Parameters by name, on their constrained spaces.
            x: Features, shape [batch, features].
            seed: Seed of the responses.

        Returns:
            Responses in torch's default precision and device, shape [batch].
        """
        gate, weight, scale = (params[name].detach().double().cpu() for name in self.constraints)
        generator = torch.Generator("cpu").manual_seed(seed)
        design = with_intercept(x.double().cpu())
        probs = softmax_logits(design, gate).softmax(-1)
        expert = torch.multinomial(probs, 1, generator=generator)[:, 0]
        noise = normal(expert.shape, generator)
        return as_default((design * weight[expert]).sum(-1) + scale[expert] * noise)

    def _design(self, x: Tensor, y: Tensor) -> Tensor:
        """Features with a last column of ones, shape [batch, features + 1].

        Args:
            x: Features, shape [batch, features].
            y: Responses, shape [batch].

        Returns:
            Features and ones.

        Raises:
            ValueError: If the data have other shapes.
        """
        if x.dim() != 2 or x.shape[1] != self.num_features or y.shape != x.shape[:1]:
            raise ValueError(
                f"x must be of shape [batch, {self.num_features}] and y of shape [batch],"
                f" got {list(x.shape)} and {list(y.shape)}"
            )
        return with_intercept(x)

    def _log_joint(self, params: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        """Log p(y, expert | x) in nats, shape [batch, experts]."""
        design = self._design(x, y)
        gate, weight, scale = (params[name] for name in self.constraints)
        standardized = (y[:, None] - design @ weight.T) / scale
        log_density = -0.5 * standardized**2 - scale.log() - 0.5 * math.log(2 * math.pi)
        return softmax_logits(design, gate).log_softmax(-1) + log_density


_experts = LinearExperts()


def model(x: Tensor, y: Tensor) -> None:
    """The program of a default model, of 2 experts and 3 features.

    Args:
        x: Features, shape [batch, 3].
        y: Responses, shape [batch].
    """
    _experts.model(x, y)


def guide(x: Tensor, y: Tensor) -> None:
    """The empty guide of the default model.

    Args:
        x: Features, shape [batch, 3].
        y: Responses, shape [batch].
    """
    _experts.guide(x, y)


def make_data(seed: int, size: int = _NUM_PATIENTS) -> tuple[Tensor, Tensor]:
    """Draws patients without replacement from scikit-learn's diabetes study.

    Args:
        seed: Seed of their order.
        size: Number of patients, at most 442.

    Returns:
        Body mass index, blood pressure and a blood measurement, shape [size, 3], and progression of
        the disease, shape [size], all of mean 0 and standard deviation 1 over all patients.

    Raises:
        ValueError: If there are not as many patients.
    """
    if not 1 <= size <= _NUM_PATIENTS:
        raise ValueError(f"size must be from 1 to {_NUM_PATIENTS} patients, got {size}")
    x, y = bayesian_regression.make_data(seed, size)
    return x[:, list(_FEATURES)], y
