"""A linear Gaussian state space model of sequences, where noise makes EM slow.

A hidden state turns slowly and is damped, pushed by unit noise; each step shows a noisy linear
image of it: z_0 ~ N(initial, I), z_t ~ N(A z_{t-1}, I) and x_t ~ N(C z_t, diag(scale²)). All
sequences have the same length and are independent. The more noise there is, the more information
about the states is missing, and the less EM gains per step.

`StateSpace` offers the program, the same program with the states integrated out, the exact
posterior of the states as a guide (filter forward, sample backward), and referees in plain torch:
the log likelihood by the Kalman filter, and the exact EM step by the smoother of Rauch, Tung and
Striebel. (R. H. Shumway and D. S. Stoffer, "An approach to time series smoothing and forecasting
using the EM algorithm", Journal of Time Series Analysis 3, 1982. C. K. Carter and R. Kohn, "On
Gibbs sampling for state space models", Biometrika 81, 1994.)
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from models.values import as_default, eye, normal, parameters, second_generator, stored, uniform

_DAMPING = 0.9
_TURN = 0.5  # radians per step
_NOISE = 2.0


class _Filtered(NamedTuple):
    """The forward pass of the Kalman filter, whose covariances do not depend on the data.

    Attributes:
        means: Mean of each state given the data so far, by step, each of shape [batch, states].
        covariances: Its covariance, by step, each of shape [states, states].
        log_likelihood: Total log likelihood in nats, a scalar.
    """

    means: list[Tensor]
    covariances: list[Tensor]
    log_likelihood: Tensor


class _Backward(NamedTuple):
    """One state given the next one and the data: N(offset + gain next, covariance).

    Attributes:
        gain: Shape [states, states].
        offset: Shape [batch, states].
        covariance: Shape [states, states].
    """

    gain: Tensor
    offset: Tensor
    covariance: Tensor


class _Smoothed(NamedTuple):
    """Moments of the states given all data.

    Attributes:
        means: Shape [batch, length, states].
        covariances: Shape [length, states, states].
        cross: Covariance of each state but the first with the one before it, shape
            [length - 1, states, states].
    """

    means: Tensor
    covariances: Tensor
    cross: Tensor


class StateSpace:
    """A linear Gaussian state space model, for sequences of one length.

    The parameters are "initial" of shape [states], the mean of the first state; "transition" of
    shape [states, states]; "emission" of shape [visible, states]; and the *standard deviations*
    "scale" of shape [visible] of what is seen. They live in Pyro's parameter store, so two
    instances in one process share them by name.

    The noise of the states is the unit matrix, which fixes their coordinates up to a rotation or
    reflection: the likelihood is the same for Q initial, Q transition Qᵀ and emission Qᵀ with any
    orthogonal Q, so that states (states - 1) / 2 coordinates are redundant. The default model has
    15 coordinates and 14 free parameters.

    Attributes:
        num_states: Dimensions of the state.
        num_visible: Number of visible units at each step.
        length: Length of the sequences.
        seed: Seed of the initial values in `initial`.
        constraints: The constraint of each parameter by name.
    """

    constraints: Mapping[str, Any] = {
        "initial": dist.constraints.real,
        "transition": dist.constraints.real,
        "emission": dist.constraints.real,
        "scale": dist.constraints.positive,
    }

    def __init__(
        self, num_states: int = 2, num_visible: int = 3, length: int = 12, seed: int = 0
    ) -> None:
        """Makes a model; its parameters are made on first use.

        Args:
            num_states: Dimensions of the state.
            num_visible: Number of visible units at each step.
            length: Length of the sequences, at least 2.
            seed: Seed of the initial values in `initial`.

        Raises:
            ValueError: If there are no states, no visible units or fewer than two steps.
        """
        if num_states < 1 or num_visible < 1 or length < 2:
            raise ValueError(
                "need at least 1 state, 1 visible unit and 2 steps,"
                f" got {num_states}, {num_visible} and {length}"
            )
        self.num_states = num_states
        self.num_visible = num_visible
        self.length = length
        self.seed = seed

    @property
    def initial(self) -> dict[str, Tensor]:
        """The values at which `model` creates its parameters: `start` at the model's seed."""
        return self.start(self.seed)

    def start(self, seed: int) -> dict[str, Tensor]:
        """Draws initial values, leaving the global random state as it was.

        The first state's mean and the emission are standard normal, the transition is half the
        identity and a little noise, and standard deviations are uniform from 1 to 3.

        Args:
            seed: Seed of the values.

        Returns:
            Parameters by name, in the default dtype and on the default device.
        """
        generator = torch.Generator(device="cpu").manual_seed(seed)
        size = self.num_states
        half = 0.5 * torch.eye(size, dtype=torch.float64, device="cpu")
        values = {
            "initial": normal((size,), generator),
            "transition": half + 0.1 * normal((size, size), generator),
            "emission": normal((self.num_visible, size), generator),
            "scale": _NOISE * (0.5 + uniform((self.num_visible,), generator)),
        }
        return {name: as_default(value) for name, value in values.items()}

    def truth(self, seed: int) -> dict[str, Tensor]:
        """Draws the parameters behind the data of the same seed.

        States turn by about half a radian per step while their length shrinks by a tenth, and start
        about two standard deviations from the origin.

        Args:
            seed: Seed of the values.

        Returns:
            Parameters by name, in the default dtype and on the default device.
        """
        return {
            name: as_default(value) for name, value in self._truth(second_generator(seed)).items()
        }

    def make_data(self, seed: int, size: int) -> Tensor:
        """Samples sequences from the model of `truth`.

        Neither the global random state nor the parameter store is touched.

        Args:
            seed: Seed of the true parameters and of the sequences.
            size: Number of sequences.

        Returns:
            Sequences, shape [size, length, visible], in the default dtype and on the default
            device.
        """
        generator = second_generator(seed)
        truth = self._truth(generator)
        state = truth["initial"] + normal((size, self.num_states), generator)
        states = [state]
        for _ in range(1, self.length):
            state = state @ truth["transition"].T + normal(state.shape, generator)
            states.append(state)
        errors = truth["scale"] * normal((size, self.length, self.num_visible), generator)
        return as_default(torch.stack(states, 1) @ truth["emission"].T + errors)

    def model(self, x: Tensor) -> None:
        """The program, with hidden sites "z0", "z1" and so on and observed sites "x0", "x1" ...

        Args:
            x: Sequences, shape [batch, length, visible].
        """
        steps = self._steps(x)
        initial, transition, emission, scale = parameters(self).values()
        state = None
        with pyro.plate("data", x.shape[0], dim=-1):
            for step in pyro.markov(range(self.length)):
                mean = initial if state is None else state @ transition.T
                state = pyro.sample(f"z{step}", dist.Normal(mean, 1.0).to_event(1))
                visible = dist.Normal(state @ emission.T, scale).to_event(1)
                pyro.sample(f"x{step}", visible, obs=steps[step])

    def collapsed(self, x: Tensor) -> None:
        """The program with its states integrated out, which has the same parameters.

        Its one site "x" is a whole sequence, step by step.

        Args:
            x: Sequences, shape [batch, length, visible].
        """
        self._steps(x)
        initial, transition, emission, scale = parameters(self).values()
        pushes = torch.cat([initial, initial.new_zeros((self.length - 1) * self.num_states)])
        # The visible units are a linear image of the noise that pushes the states.
        image = torch.kron(eye(self.length, x), emission) @ self._propagator(transition)
        covariance = image @ image.T + torch.diag(scale.square().repeat(self.length))
        with pyro.plate("data", x.shape[0], dim=-1):
            whole = dist.MultivariateNormal(image @ pushes, covariance)
            pyro.sample("x", whole, obs=x.flatten(1))

    def guide(self, x: Tensor) -> None:
        """A guide without sites, for the collapsed program.

        Args:
            x: Sequences, shape [batch, length, visible].
        """

    def recognize(self, x: Tensor, observations: Mapping[str, Tensor] | None = None) -> None:
        """A guide that samples from the exact posterior of the states, from the last to the first.

        It has no parameters of its own. It reads those of the model from the store, at their
        present values and without gradients, or takes their initial values if there are none yet.

        Args:
            x: Sequences, shape [batch, length, visible].
            observations: Values of observed sites by name that take the place of the data, as
                wake-sleep and dreams give them.
        """
        given = observations or {}
        x = torch.stack([given.get(f"x{step}", now) for step, now in enumerate(self._steps(x))], 1)
        with torch.no_grad():
            params = stored(self.initial)
            filtered = self._filter(params, x)
            links = self._backward(params, filtered)
            last = torch.linalg.cholesky(filtered.covariances[-1])
            scales = [torch.linalg.cholesky(link.covariance) for link in links]
        with pyro.plate("data", x.shape[0], dim=-1):
            final = dist.MultivariateNormal(filtered.means[-1], scale_tril=last)
            state = pyro.sample(f"z{self.length - 1}", final)
            for step in reversed(range(self.length - 1)):
                mean = links[step].offset + state @ links[step].gain.T
                conditional = dist.MultivariateNormal(mean, scale_tril=scales[step])
                state = pyro.sample(f"z{step}", conditional)

    def log_likelihood(self, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Exact log likelihood, differentiable with respect to the parameters.

        Args:
            params: Parameters by name, on their constrained spaces.
            x: Sequences, shape [batch, length, visible].

        Returns:
            Total log likelihood in nats, a scalar.
        """
        return self._filter(params, x).log_likelihood

    @torch.no_grad()
    def em_step(self, params: Mapping[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        """One exact step of expectation maximization.

        Args:
            params: Parameters by name, on their constrained spaces.
            x: Sequences, shape [batch, length, visible].

        Returns:
            New parameters by name; their log likelihood is at least that of the old ones.
        """
        means, covariances, cross = self._smooth(params, x)
        squares = torch.einsum("btj,btk->tjk", means, means) / len(x) + covariances
        pairs = torch.einsum("btj,btk->jk", means[:, 1:], means[:, :-1]) / len(x) + cross.sum(0)
        images = torch.einsum("bti,btk->ik", x, means) / len(x)
        emission = torch.linalg.solve(squares.sum(0), images.T).T
        # The mean square of x − C z as a sum of squares, which cannot become negative.
        residual = (x - means @ emission.T).square().mean((0, 1))
        spread = ((emission @ covariances.mean(0)) * emission).sum(-1)
        return {
            "initial": means[:, 0].mean(0),
            "transition": torch.linalg.solve(squares[:-1].sum(0), pairs.T).T,
            "emission": emission,
            "scale": (residual + spread).sqrt(),
        }

    def _steps(self, x: Tensor) -> tuple[Tensor, ...]:
        """The sequences step by step, each of shape [batch, visible].

        Args:
            x: Sequences, shape [batch, length, visible].

        Returns:
            Visible units by step.

        Raises:
            ValueError: If the data have another shape.
        """
        if x.dim() != 3 or x.shape[1:] != (self.length, self.num_visible):
            raise ValueError(
                f"data must have shape [batch, {self.length}, {self.num_visible}],"
                f" got {list(x.shape)}"
            )
        return x.unbind(1)

    def _truth(self, generator: torch.Generator) -> dict[str, Tensor]:
        """True parameters in double precision on the CPU: a damped rotation, seen with noise."""
        size = self.num_states
        angles = _TURN * (0.5 + uniform((size, size), generator)).triu(1)
        direction = normal((size,), generator)
        return {
            "initial": 2 * direction / direction.norm(),
            "transition": _DAMPING * torch.linalg.matrix_exp(angles - angles.T),
            "emission": normal((self.num_visible, size), generator),
            "scale": _NOISE * (0.5 + uniform((self.num_visible,), generator)),
        }

    def _propagator(self, transition: Tensor) -> Tensor:
        """Maps the noise of all steps to all states, shape [length × states, length × states]."""
        identity = eye(self.length, transition)
        before = torch.cat([torch.zeros_like(identity[:1]), identity[:-1]])
        inverse = eye(self.length * self.num_states, transition) - torch.kron(before, transition)
        unit = eye(len(inverse), transition)
        result: Tensor = torch.linalg.solve_triangular(
            inverse, unit, upper=False, unitriangular=True
        )
        return result

    def _filter(self, params: Mapping[str, Tensor], x: Tensor) -> _Filtered:
        """Runs the Kalman filter, in the form that is accurate with little noise."""
        transition, emission, scale = params["transition"], params["emission"], params["scale"]
        identity = eye(self.num_states, x)
        scaled = emission / scale[:, None]
        constant = self.num_visible * math.log(2 * math.pi) + 2 * scale.log().sum()
        means: list[Tensor] = []
        covariances: list[Tensor] = []
        total = -0.5 * len(x) * self.length * constant
        for visible in self._steps(x):
            mean = means[-1] @ transition.T if means else params["initial"].expand(len(x), -1)
            prior = transition @ covariances[-1] @ transition.T + identity if means else identity
            factor = torch.linalg.cholesky(prior)
            # In coordinates in which the prior is the unit matrix, the data add to the precision.
            image = scaled @ factor
            inner = torch.linalg.cholesky(identity + image.T @ image)
            error = (visible - mean @ emission.T) / scale
            push = error @ torch.cholesky_solve(image.T, inner).T
            total = total - 0.5 * ((error - push @ image.T).square().sum() + push.square().sum())
            total = total - len(x) * inner.diagonal().log().sum()
            spread = torch.linalg.solve_triangular(inner, factor.T, upper=False)
            means.append(mean + push @ factor.T)
            covariances.append(spread.T @ spread)
        return _Filtered(means, covariances, total)

    def _backward(self, params: Mapping[str, Tensor], filtered: _Filtered) -> list[_Backward]:
        """Each state but the last given the next one and the data, by step."""
        transition = params["transition"]
        identity = eye(self.num_states, transition)
        links = []
        for mean, covariance in zip(filtered.means[:-1], filtered.covariances[:-1], strict=True):
            prior = transition @ covariance @ transition.T + identity
            gain = torch.linalg.solve(prior, transition @ covariance).T
            keep = identity - gain @ transition
            # A sum of squares, which stays positive definite.
            rest = keep @ covariance @ keep.T + gain @ gain.T
            links.append(_Backward(gain, mean @ keep.T, rest))
        return links

    def _smooth(self, params: Mapping[str, Tensor], x: Tensor) -> _Smoothed:
        """Runs the smoother of Rauch, Tung and Striebel."""
        filtered = self._filter(params, x)
        means, covariances = [filtered.means[-1]], [filtered.covariances[-1]]
        cross = []
        for gain, offset, covariance in reversed(self._backward(params, filtered)):
            cross.append(covariances[-1] @ gain.T)
            means.append(offset + means[-1] @ gain.T)
            covariances.append(covariance + gain @ cross[-1])
        return _Smoothed(
            torch.stack(means[::-1], 1),
            torch.stack(covariances[::-1]),
            torch.stack(cross[::-1]),
        )


_system = StateSpace()


def model(x: Tensor) -> None:
    """The program of a default model, with its states.

    Args:
        x: Sequences, shape [batch, 12, 3].
    """
    _system.model(x)


def guide(x: Tensor, observations: Mapping[str, Tensor] | None = None) -> None:
    """The exact posterior of the states of the default model.

    Args:
        x: Sequences, shape [batch, 12, 3].
        observations: Values of observed sites by name that take the place of the data.
    """
    _system.recognize(x, observations)


def make_data(seed: int, size: int = 200) -> Tensor:
    """Samples sequences for the default model from a slow, damped rotation seen with noise.

    Neither the global random state nor the parameter store is touched.

    Args:
        seed: Seed of the true parameters and of the sequences.
        size: Number of sequences.

    Returns:
        Sequences, shape [size, 12, 3], in the default dtype and on the default device.
    """
    return _system.make_data(seed, size)
