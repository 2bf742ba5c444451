"""A deep Markov model of polyphonic music: a nonlinear chain of codes, read backward by a GRU.

At every step the code moves by a gated transition, z_t ~ N(loc(z_{t−1}), scale(z_{t−1})), and notes
sound independently of each other given z_t. The guide walks along the same chain and sees at each
step a summary of the notes from then on, which a recurrent network makes backward in time.
Sequences may differ in length; what is beyond the end is masked.

The data are generated: progressions of chords, whose notes sound most of the time. The referee is
an importance-weighted likelihood. (R. Krishnan, U. Shalit and D. Sontag, "Structured inference
networks for nonlinear state space models", AAAI 2017.)
"""

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.nn.functional import relu, softplus

from models.vae import importance_log_likelihood

CHORDS = ((0, 4, 7), (2, 5, 9), (4, 7, 11), (5, 9, 12), (7, 11, 14), (9, 12, 16))
"""Semitones of the triads of a major key, from the first to the sixth degree."""
NEXT = ((3, 4, 5), (4,), (5, 3), (4, 0, 1), (0, 5), (1, 3))
"""Degrees that may follow each degree."""


class Emitter(nn.Module):
    """Logits of the notes given the code."""

    def __init__(self, num_notes: int, code_size: int, num_hidden: int) -> None:
        """Makes a network with random weights.

        Args:
            num_notes: Number of notes.
            code_size: Size of the code.
            num_hidden: Units of each of two hidden layers.
        """
        super().__init__()
        self.first = nn.Linear(code_size, num_hidden)
        self.second = nn.Linear(num_hidden, num_hidden)
        self.logits = nn.Linear(num_hidden, num_notes)

    def forward(self, z: Tensor) -> Tensor:
        """Logits of shape [..., notes] for codes of shape [..., code]."""
        logits: Tensor = self.logits(relu(self.second(relu(self.first(z)))))
        return logits


class GatedTransition(nn.Module):
    """The next code's location and scale: a gate between a linear and a nonlinear proposal."""

    def __init__(self, code_size: int, num_hidden: int) -> None:
        """Makes a network with random weights, whose linear proposal is to stay.

        Args:
            code_size: Size of the code.
            num_hidden: Units of each hidden layer.
        """
        super().__init__()
        self.gate_hidden = nn.Linear(code_size, num_hidden)
        self.gate = nn.Linear(num_hidden, code_size)
        self.proposal_hidden = nn.Linear(code_size, num_hidden)
        self.proposal = nn.Linear(num_hidden, code_size)
        self.linear = nn.Linear(code_size, code_size)
        self.scale = nn.Linear(code_size, code_size)
        nn.init.eye_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Location and scale, each of shape [..., code], for codes of the same shape."""
        gate = torch.sigmoid(self.gate(relu(self.gate_hidden(z))))
        proposal = self.proposal(relu(self.proposal_hidden(z)))
        loc = (1 - gate) * self.linear(z) + gate * proposal
        return loc, softplus(self.scale(relu(proposal)))


class Combiner(nn.Module):
    """The code's location and scale, from the code before and a summary of the notes to come."""

    def __init__(self, code_size: int, summary_size: int) -> None:
        """Makes a network with random weights.

        Args:
            code_size: Size of the code.
            summary_size: Size of the summary.
        """
        super().__init__()
        self.hidden = nn.Linear(code_size, summary_size)
        self.loc = nn.Linear(summary_size, code_size)
        self.scale = nn.Linear(summary_size, code_size)

    def forward(self, z: Tensor, summary: Tensor) -> tuple[Tensor, Tensor]:
        """Location and scale, each of shape [batch, code]."""
        hidden = 0.5 * (torch.tanh(self.hidden(z)) + summary)
        return self.loc(hidden), softplus(self.scale(hidden))


class DMM(nn.Module):
    """A deep Markov model with all its networks.

    As in Pyro's example, `model` and `guide` both register the whole module. The weights are made
    once: clear Pyro's parameter store and make a new instance to start again.
    """

    def __init__(
        self,
        num_notes: int = 20,
        code_size: int = 3,
        num_hidden: int = 16,
        summary_size: int = 24,
        seed: int = 0,
    ) -> None:
        """Makes the networks, leaving the global random state as it was.

        Args:
            num_notes: Number of notes.
            code_size: Size of the code.
            num_hidden: Units of the model's hidden layers.
            summary_size: Size of the recurrent network's state.
            seed: Seed of the initial weights.
        """
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.emitter = Emitter(num_notes, code_size, num_hidden)
            self.transition = GatedTransition(code_size, num_hidden)
            self.combiner = Combiner(code_size, summary_size)
            self.rnn = nn.GRU(num_notes, summary_size, batch_first=True)
        self.start = nn.Parameter(torch.zeros(code_size))
        self.guide_start = nn.Parameter(torch.zeros(code_size))
        self.summary_start = nn.Parameter(torch.zeros(1, 1, summary_size))

    def model(self, x: Tensor, lengths: Tensor) -> None:
        """Codes and notes, step by step.

        Args:
            x: Notes, 0 or 1 as floats, shape [batch, steps, notes].
            lengths: Length of each sequence, integers of shape [batch].
        """
        pyro.module("dmm", self)
        z = self.start.expand(len(x), -1)
        with pyro.plate("sequences", len(x)):
            for t in pyro.markov(range(x.shape[1])):
                with poutine.mask(mask=t < lengths):
                    loc, scale = self.transition(z)
                    z = pyro.sample(f"z_{t}", dist.Normal(loc, scale).to_event(1))
                    notes = dist.Bernoulli(logits=self.emitter(z)).to_event(1)
                    pyro.sample(f"x_{t}", notes, obs=x[:, t])

    def guide(self, x: Tensor, lengths: Tensor) -> None:
        """Codes given notes, step by step.

        Args:
            x: Notes, 0 or 1 as floats, shape [batch, steps, notes].
            lengths: Length of each sequence, integers of shape [batch].
        """
        pyro.module("dmm", self)
        start = self.summary_start.expand(1, len(x), -1).contiguous()
        summary = reverse(self.rnn(reverse(x, lengths), start)[0], lengths)
        z = self.guide_start.expand(len(x), -1)
        with pyro.plate("sequences", len(x)):
            for t in pyro.markov(range(x.shape[1])):
                with poutine.mask(mask=t < lengths):
                    loc, scale = self.combiner(z, summary[:, t])
                    z = pyro.sample(f"z_{t}", dist.Normal(loc, scale).to_event(1))

    def log_likelihood(
        self, x: Tensor, lengths: Tensor, num_samples: int = 500, seed: int = 0
    ) -> Tensor:
        """Importance-weighted estimate of the log likelihood.

        Args:
            x: Notes, 0 or 1 as floats, shape [batch, steps, notes].
            lengths: Length of each sequence, integers of shape [batch].
            num_samples: Chains of codes per sequence.
            seed: Seed of the codes; the global random state stays as it was.

        Returns:
            Estimate for each sequence in nats, shape [batch].
        """
        return importance_log_likelihood(
            self.model, self.guide, x, lengths, count=num_samples, seed=seed
        )


def reverse(x: Tensor, lengths: Tensor) -> Tensor:
    """Reverses each sequence in time up to its length, and leaves the rest in place.

    Args:
        x: Sequences, shape [batch, steps, features].
        lengths: Their lengths, shape [batch].

    Returns:
        Reversed sequences, of the same shape.
    """
    steps = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
    within = steps < lengths[:, None]
    index = torch.where(within, lengths[:, None] - 1 - steps, steps)
    return x.gather(1, index[:, :, None].expand_as(x))


def make_data(
    seed: int, size: int = 200, num_notes: int = 20, steps: int = 12
) -> tuple[Tensor, Tensor]:
    """Generates chord progressions; the global random state stays as it was.

    A progression starts on the first degree and at each step stays with probability 0.4 or moves to
    one of a few degrees that may follow. A note of the chord sounds with probability 0.9, any other
    note with probability 0.02. Lengths are between two thirds of the steps and all of them.

    Args:
        seed: Seed of the sequences.
        size: Number of sequences.
        num_notes: Number of notes, one semitone apart, at least 17.
        steps: Largest length.

    Returns:
        Notes, 0 or 1 as floats, shape [size, steps, notes], zero beyond the end; and
        lengths, integers of shape [size].

    Raises:
        ValueError: If there are too few notes for the chords.
    """
    if num_notes <= max(map(max, CHORDS)):
        raise ValueError(f"the chords need at least 17 notes, got {num_notes}")
    generator = torch.Generator("cpu").manual_seed(seed)
    with torch.device("cpu"):
        probs = torch.full((len(CHORDS), num_notes), 0.02)
        move = 0.4 * torch.eye(len(CHORDS))
        for degree, (chord, following) in enumerate(zip(CHORDS, NEXT, strict=True)):
            probs[degree, list(chord)] = 0.9
            move[degree, list(following)] += 0.6 / len(following)
        path = [torch.zeros(size, dtype=torch.long)]
        for _ in range(steps - 1):
            path.append(torch.multinomial(move[path[-1]], 1, generator=generator)[:, 0])
        x = torch.bernoulli(probs[torch.stack(path, dim=1)], generator=generator)
        lengths = torch.randint(2 * steps // 3, steps + 1, (size,), generator=generator)
        x = x * (torch.arange(steps) < lengths[:, None])[:, :, None]
    device = torch.get_default_device()
    return x.to(device, torch.get_default_dtype()), lengths.to(device)
