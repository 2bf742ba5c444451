"""A hidden Markov model of discrete sequences, where EM is slow because states overlap.

A hidden state moves through a few steps of a Markov chain and emits one symbol per step. All
sequences have the same length and are independent. As states emit the same symbols with similar
probabilities, most of the information about the states is missing, and EM gains little per step.

`DiscreteHMM` offers the program, whose states Pyro can enumerate, the exact posterior of the states
as a guide, and referees in plain torch: the log likelihood by the forward algorithm, and the exact
EM step, which is that of Baum and Welch. (L. R. Rabiner, "A tutorial on hidden Markov models and
selected applications in speech recognition", Proceedings of the IEEE 77, 1989.)
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from models.values import as_default, normal, parameters, stored

_STAY = 0.75
_TYPICAL = 0.6
_SPREAD = 0.1


class _Forward(NamedTuple):
    """Messages of the forward algorithm.

    Attributes:
        filtered: Probability of each state given the symbols so far, by step, each of shape
            [batch, states].
        predictive: Probability of the symbol given those before it, by step, each of shape
            [batch, 1].
    """

    filtered: list[Tensor]
    predictive: list[Tensor]


class DiscreteHMM:
    """A hidden Markov model with discrete symbols, for sequences of one length.

    The parameters are "initial" of shape [states], "transition" of shape [states, states] and
    "emission" of shape [states, symbols]. Their rows are distributions: of the first state, of the
    next state given the present one, and of the symbol given the state. They live in Pyro's
    parameter store, so two instances in one process share them by name. The likelihood does not
    depend on the order of the states.

    Attributes:
        num_states: Number of hidden states.
        num_symbols: Number of symbols.
        length: Length of the sequences.
        seed: Seed of the initial values in `initial`.
        constraints: The constraint of each parameter by name.
    """

    constraints: Mapping[str, Any] = {
        "initial": dist.constraints.simplex,
        "transition": dist.constraints.simplex,
        "emission": dist.constraints.simplex,
    }

    def __init__(
        self, num_states: int = 2, num_symbols: int = 3, length: int = 5, seed: int = 0
    ) -> None:
        """Makes a model; its parameters are made on first use.

        Args:
            num_states: Number of hidden states.
            num_symbols: Number of symbols.
            length: Length of the sequences, at least 2.
            seed: Seed of the initial values in `initial`.

        Raises:
            ValueError: If there are fewer than two states, symbols or steps.
        """
        if num_states < 2 or num_symbols < 2 or length < 2:
            raise ValueError(
                "need at least 2 states, 2 symbols and 2 steps,"
                f" got {num_states}, {num_symbols} and {length}"
            )
        self.num_states = num_states
        self.num_symbols = num_symbols
        self.length = length
        self.seed = seed

    @property
    def initial(self) -> dict[str, Tensor]:
        """The values at which `model` creates its parameters: `start` at the model's seed."""
        return self.start(self.seed)

    def start(self, seed: int) -> dict[str, Tensor]:
        """Draws initial values, leaving the global random state as it was.

        The logits of all distributions are standard normal.

        Args:
            seed: Seed of the values.

        Returns:
            Parameters by name, in the default dtype and on the default device.
        """
        generator = torch.Generator(device="cpu").manual_seed(seed)
        shapes = {
            "initial": (self.num_states,),
            "transition": (self.num_states, self.num_states),
            "emission": (self.num_states, self.num_symbols),
        }
        return {
            name: as_default(normal(shape, generator).softmax(-1)) for name, shape in shapes.items()
        }

    def make_data(self, seed: int, size: int) -> Tensor:
        """Samples sequences from a model whose states overlap.

        The true states tend to stay, and each has a typical symbol, but emits every symbol often.
        Neither the global random state nor the parameter store is touched.

        Args:
            seed: Seed of the true parameters and of the sequences.
            size: Number of sequences.

        Returns:
            Symbols, 0 up to the number of symbols, torch.long, shape [size, length].
        """
        generator = torch.Generator(device="cpu").manual_seed(seed)
        _, transition, emission = self._truths(generator).values()
        state = torch.randint(self.num_states, (size,), generator=generator, device="cpu")
        symbols = [_pick(emission[state], generator)]
        for _ in range(1, self.length):
            state = _pick(transition[state], generator)
            symbols.append(_pick(emission[state], generator))
        return torch.stack(symbols, -1).to(torch.get_default_device())

    def make_truth(self, seed: int) -> dict[str, Tensor]:
        """The parameters behind the data of `make_data`.

        Args:
            seed: Seed of the parameters.

        Returns:
            Parameters by name, in double precision on the CPU.
        """
        return self._truths(torch.Generator(device="cpu").manual_seed(seed))

    def model(self, x: Tensor) -> None:
        """The program, with hidden sites "z0", "z1" and so on, which Pyro can enumerate.

        Args:
            x: Symbols, torch.long, shape [batch, length].
        """
        columns = self._columns(x)
        initial, transition, emission = parameters(self).values()
        state = None
        with pyro.plate("data", x.shape[0], dim=-1):
            for step in pyro.markov(range(self.length)):
                probs = initial if state is None else transition[state]
                state = pyro.sample(
                    f"z{step}", dist.Categorical(probs), infer={"enumerate": "parallel"}
                )
                pyro.sample(f"x{step}", dist.Categorical(emission[state]), obs=columns[step])

    def guide(self, x: Tensor) -> None:
        """A guide without sites, for the program with enumerated states.

        Args:
            x: Symbols, torch.long, shape [batch, length].
        """

    def recognize(self, x: Tensor) -> None:
        """A guide that samples from the exact posterior of the states, from the first to the last.

        It has no parameters of its own. It reads those of the model from the store, at their
        present values and without gradients, or takes their initial values if there are none yet.

        Args:
            x: Symbols, torch.long, shape [batch, length].
        """
        first, rest = self._posterior(stored(self.initial), x)
        index = torch.arange(x.shape[0], device=x.device)
        with pyro.plate("data", x.shape[0], dim=-1):
            state = pyro.sample("z0", dist.Categorical(first))
            for step, table in enumerate(rest, start=1):
                state = pyro.sample(f"z{step}", dist.Categorical(table[index, state]))

    def log_likelihood(self, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Exact log likelihood, differentiable with respect to the parameters.

        Args:
            params: Parameters by name, on their constrained spaces.
            x: Symbols, torch.long, shape [batch, length].

        Returns:
            Total log likelihood in nats, a scalar.
        """
        predictive = self._forward(params, self._evidence(params, x)).predictive
        return torch.cat(predictive).log().sum()

    @torch.no_grad()
    def em_step(self, params: Mapping[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        """One exact step of expectation maximization.

        Args:
            params: Parameters by name, on their constrained spaces.
            x: Symbols, torch.long, shape [batch, length].

        Returns:
            New parameters by name; their log likelihood is at least that of the old ones.
        """
        evidence = self._evidence(params, x)
        filtered, predictive = self._forward(params, evidence)
        future = torch.ones_like(filtered[-1])
        pairs = torch.zeros_like(params["transition"])
        smoothed = [filtered[-1]]
        for step in range(self.length - 1, 0, -1):
            message = evidence[step] * future / predictive[step]
            pairs = pairs + filtered[step - 1].T @ message
            future = message @ params["transition"].T
            smoothed.append(filtered[step - 1] * future)
        smoothed.reverse()
        counts = params["emission"].new_zeros(self.num_symbols, self.num_states)
        counts.index_add_(0, x.T.reshape(-1), torch.cat(smoothed))
        return {
            "initial": _normalized(smoothed[0].sum(0)),
            "transition": _normalized(params["transition"] * pairs),
            "emission": _normalized(counts.T),
        }

    def _columns(self, x: Tensor) -> tuple[Tensor, ...]:
        """The symbols step by step, each of shape [batch].

        Args:
            x: Symbols, torch.long, shape [batch, length].

        Returns:
            Symbols by step.

        Raises:
            ValueError: If the data have another type or shape.
        """
        if x.dtype != torch.long or x.dim() != 2 or x.shape[1] != self.length:
            raise ValueError(
                f"data must be integers (torch.long) of shape [batch, {self.length}],"
                f" got {x.dtype} of shape {list(x.shape)}"
            )
        return x.unbind(-1)

    def _truths(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Random parameters of overlapping states; all are as likely at the first step."""
        count = self.num_states
        return {
            "initial": torch.full((count,), 1 / count, dtype=torch.float64, device="cpu"),
            "transition": self._truth(count, _STAY, generator),
            "emission": self._truth(self.num_symbols, _TYPICAL, generator),
        }

    def _truth(self, columns: int, large: float, generator: torch.Generator) -> Tensor:
        """Random rows with one large entry each, which lie close to a regular pattern."""
        rows = torch.arange(self.num_states, device="cpu")
        logits = _SPREAD * normal((self.num_states, columns), generator)
        logits[rows, rows % columns] += math.log(large * (columns - 1) / (1 - large))
        return logits.softmax(-1)

    def _evidence(self, params: Mapping[str, Tensor], x: Tensor) -> list[Tensor]:
        """Probability of the symbol given each state, by step, each of shape [batch, states]."""
        return [params["emission"].T[column] for column in self._columns(x)]

    def _forward(self, params: Mapping[str, Tensor], evidence: list[Tensor]) -> _Forward:
        """Runs the forward algorithm, normalized at every step."""
        filtered: list[Tensor] = []
        predictive: list[Tensor] = []
        for step, likelihood in enumerate(evidence):
            prior = filtered[-1] @ params["transition"] if step else params["initial"]
            joint = prior * likelihood
            predictive.append(joint.sum(-1, keepdim=True))
            filtered.append(joint / predictive[-1])
        return _Forward(filtered, predictive)

    @torch.no_grad()
    def _posterior(
        self, params: Mapping[str, Tensor], x: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The exact posterior of the states as a Markov chain, by backward messages.

        Args:
            params: Parameters by name, on their constrained spaces.
            x: Symbols, torch.long, shape [batch, length].

        Returns:
            Distribution of the first state given the data, shape [batch, states], and of each next
            state given the one before it and the data, each of shape [batch, states, states].
        """
        tables: list[Tensor] = []
        evidence = self._evidence(params, x)
        future = torch.ones_like(evidence[-1])
        for likelihood in reversed(evidence[1:]):
            joint = params["transition"] * (likelihood * future)[:, None, :]
            tables.append(_normalized(joint))
            future = _normalized(joint.sum(-1))  # known up to a factor, which is free
        return _normalized(params["initial"] * evidence[0] * future), tuple(reversed(tables))


def _pick(probs: Tensor, generator: torch.Generator) -> Tensor:
    """Samples one column per row, shape [rows]."""
    return torch.multinomial(probs, 1, generator=generator)[:, 0]


def _normalized(weights: Tensor) -> Tensor:
    return weights / weights.sum(-1, keepdim=True)


_hmm = DiscreteHMM()


def model(x: Tensor) -> None:
    """The program of a default model.

    Args:
        x: Symbols, torch.long, shape [batch, 5].
    """
    _hmm.model(x)


def guide(x: Tensor) -> None:
    """A guide without sites, for the default model with enumerated states.

    Args:
        x: Symbols, torch.long, shape [batch, 5].
    """
    _hmm.guide(x)


def make_data(seed: int, size: int = 1000) -> Tensor:
    """Samples sequences for the default model from one whose states overlap.

    Neither the global random state nor the parameter store is touched.

    Args:
        seed: Seed of the true parameters and of the sequences.
        size: Number of sequences.

    Returns:
        Symbols 0, 1 and 2, torch.long, shape [size, 5].
    """
    return _hmm.make_data(seed, size)
