"""Latent Dirichlet allocation: topics of documents, with an exact likelihood for short ones.

A document has shares of the topics, θ ~ Dirichlet(α, ..., α). Each of its words has a topic, drawn
with these shares, and is drawn from the distribution of that topic. α is fixed; the topics are the
parameters. (D. M. Blei, A. Y. Ng and M. I. Jordan, "Latent Dirichlet allocation", Journal of
Machine Learning Research 3, 2003.)

The data are 60 short documents about cooking, sailing and astronomy, some about two of these, in
`corpus.txt` next to this file: one document per line.

The likelihood is exact nonetheless. With θ integrated out, the topics of the words are draws from
Pólya's urn: the next is topic k with probability (α + n_k) / (K α + n), where n_k of the n words so
far are from topic k. So the counts are the state of a hidden Markov chain, and its forward
algorithm gives the likelihood; there are about n^(K − 1) states, few for short documents.
"""

import re
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from itertools import combinations_with_replacement
from math import comb
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from models.values import as_default, normal, stored

MAX_STATES = 2**20
"""The largest number of counts of the topics, over all documents, that the exact referee keeps."""

STOP_WORDS = frozenset(
    "a after and are as at before by can every for from go good had in into is it its let"
    " little made more of on one or our out over she so some than that the them then there they"
    " through to two under until us was we when while with".split()
)
"""Words that are left out of the documents, as they tell little about the subject."""

_RAREST = 4  # occurrences in the corpus of a word that is kept
_SPREAD = 0.5
_TINY = torch.finfo(torch.float64).tiny


class _Urn(NamedTuple):
    """What is known about the topics of all words once they have been seen.

    Attributes:
        log_likelihood: Of each document in nats, shape [documents].
        counts: Words of each topic, for all ways to share the words out, shape [states, topics].
        posterior: Probability of these counts given the words, shape [documents, states].
    """

    log_likelihood: Tensor
    counts: Tensor
    posterior: Tensor


class TopicModel:
    """Latent Dirichlet allocation with a fixed symmetric prior on the shares of the topics.

    The parameter of the model is "topics" of shape [topics, words], whose rows are distributions.
    That of the guide is "votes" of shape [words, topics], each from 0 to 1. They live in Pyro's
    parameter store, so two instances in one process share them by name. The likelihood does not
    depend on the order of the topics.

    Documents are padded to a common length; what stands beyond the end of one has no influence.
    Their plate is of dim -2 and that of their words of dim -1, as in the data.

    Attributes:
        num_topics: Number of topics.
        num_words: Number of words in the vocabulary.
        concentration: The α of the prior; small ones make documents keep to one topic.
        seed: Seed of the initial values in `initial`.
        constraints: The constraint of each parameter by name.
    """

    constraints: Mapping[str, Any] = {
        "topics": dist.constraints.simplex,
        "votes": dist.constraints.unit_interval,
    }

    def __init__(
        self,
        num_topics: int = 3,
        num_words: int | None = None,
        concentration: float = 0.5,
        seed: int = 0,
    ) -> None:
        """Makes a model; its parameters are made on first use.

        Args:
            num_topics: Number of topics.
            num_words: Number of words in the vocabulary, or None for that of the corpus.
            concentration: The α of the prior.
            seed: Seed of the initial values in `initial`.

        Raises:
            ValueError: If there are fewer than two topics or words, or if α is not positive.
        """
        num_words = len(vocabulary()) if num_words is None else num_words
        if num_topics < 2 or num_words < 2:
            raise ValueError(f"need at least 2 topics and 2 words, got {num_topics}, {num_words}")
        if not 0 < concentration < float("inf"):
            raise ValueError(f"the concentration must be positive, got {concentration}")
        self.num_topics = num_topics
        self.num_words = num_words
        self.concentration = concentration
        self.seed = seed

    @property
    def initial(self) -> dict[str, Tensor]:
        """The values at which the parameters are created: `start` at the model's seed."""
        return self.start(self.seed)

    def start(self, seed: int) -> dict[str, Tensor]:
        """Draws initial values, leaving the global random state as it was.

        The topics are close to each other. A word votes for each topic with the probability that
        it is from there, if all topics are equally frequent.

        Args:
            seed: Seed of the values.

        Returns:
            Parameters by name, in the default dtype and on the default device.
        """
        generator = torch.Generator(device="cpu").manual_seed(seed)
        logits = _SPREAD * normal((self.num_topics, self.num_words), generator)
        topics = logits.softmax(-1)
        votes = (topics / topics.sum(0)).T.contiguous()
        return {"topics": as_default(topics), "votes": as_default(votes)}

    def model(self, words: Tensor, lengths: Tensor) -> None:
        """The program, with sites "share", "topic", which Pyro can enumerate, and "word".

        Args:
            words: Words, torch.long, shape [documents, length].
            lengths: Lengths, integers, shape [documents].
        """
        present = self._present(words, lengths)
        topics = self._param("topics")
        prior = topics.new_full((self.num_topics,), self.concentration)
        with pyro.plate("documents", len(words), dim=-2):
            share = pyro.sample("share", dist.Dirichlet(prior))
            with pyro.plate("words", words.shape[1], dim=-1), poutine.mask(mask=present):
                topic = pyro.sample(
                    "topic", dist.Categorical(share), infer={"enumerate": "parallel"}
                )
                pyro.sample("word", dist.Categorical(topics[topic]), obs=words)

    def collapsed(self, words: Tensor, lengths: Tensor) -> None:
        """The same program with the topics of the words summed out by hand.

        Args:
            words: Words, torch.long, shape [documents, length].
            lengths: Lengths, integers, shape [documents].
        """
        present = self._present(words, lengths)
        topics = self._param("topics")
        prior = topics.new_full((self.num_topics,), self.concentration)
        with pyro.plate("documents", len(words), dim=-2):
            share = pyro.sample("share", dist.Dirichlet(prior))
            with pyro.plate("words", words.shape[1], dim=-1), poutine.mask(mask=present):
                pyro.sample("word", dist.Categorical(share @ topics), obs=words)

    def guide(self, words: Tensor, lengths: Tensor) -> None:
        """A Dirichlet distribution of the shares, for which the words of a document vote.

        It has the form of Blei, Ng and Jordan's, where the votes of a word for the topics sum to
        one and depend on the document. Here they need not sum to one, as they are the same in all
        documents: a word that may be from several topics tells less.

        Args:
            words: Words, torch.long, shape [documents, length].
            lengths: Lengths, integers, shape [documents].
        """
        present = self._present(words, lengths)
        votes = (self._param("votes")[words] * present[:, :, None]).sum(1, keepdim=True)
        with pyro.plate("documents", len(words), dim=-2):
            pyro.sample("share", dist.Dirichlet(self.concentration + votes))

    def recognize(self, words: Tensor, lengths: Tensor) -> None:
        """A guide that samples the shares from their exact posterior, a mixture of Dirichlets.

        It has no parameters of its own. It reads those of the model from the store, at their
        present values and without gradients, or takes their initial values if there are none yet.

        Args:
            words: Words, torch.long, shape [documents, length].
            lengths: Lengths, integers, shape [documents].
        """
        topics = stored(self.initial)["topics"]
        with torch.no_grad():
            urn = self._urn({"topics": topics}, words, lengths)
        logits = urn.posterior.log().to(topics.dtype)[:, None]
        counts = urn.counts.to(topics.dtype).expand(*logits.shape, -1)
        posterior = dist.MixtureSameFamily(
            dist.Categorical(logits=logits), dist.Dirichlet(self.concentration + counts)
        )
        with pyro.plate("documents", len(words), dim=-2):
            pyro.sample("share", posterior)

    def log_likelihood(
        self, params: Mapping[str, Tensor], words: Tensor, lengths: Tensor
    ) -> Tensor:
        """Exact log likelihood, differentiable with respect to the topics.

        Args:
            params: Parameters by name, on their constrained spaces; those of the guide are not
                needed.
            words: Words, torch.long, shape [documents, length].
            lengths: Lengths, integers, shape [documents].

        Returns:
            Total log likelihood in nats, a scalar.
        """
        total = self._urn(params, words, lengths).log_likelihood.sum()
        return total.to(params["topics"].dtype)

    @torch.no_grad()
    def mean_shares(self, params: Mapping[str, Tensor], words: Tensor, lengths: Tensor) -> Tensor:
        """The exact posterior mean of the shares of the topics.

        Args:
            params: Parameters by name, on their constrained spaces.
            words: Words, torch.long, shape [documents, length].
            lengths: Lengths, integers, shape [documents].

        Returns:
            Shares, shape [documents, topics].
        """
        urn = self._urn(params, words, lengths)
        weight = urn.posterior @ urn.counts + self.concentration
        return (weight / weight.sum(-1, keepdim=True)).to(params["topics"].dtype)

    def em_step(
        self, params: Mapping[str, Tensor], words: Tensor, lengths: Tensor
    ) -> dict[str, Tensor]:
        """One exact step of expectation maximization.

        Args:
            params: Parameters by name, on their constrained spaces.
            words: Words, torch.long, shape [documents, length].
            lengths: Lengths, integers, shape [documents].

        Returns:
            New parameters by name, of which those of the guide are as they were; their log
            likelihood is at least that of the old ones.
        """
        topics = params["topics"].detach().double().requires_grad_()
        with torch.enable_grad():
            total = self.log_likelihood({"topics": topics}, words, lengths)
        # The likelihood is a sum of products of entries of the topics, so that the derivative by
        # the logarithm of an entry is the expected number of times that it is used.
        counts = topics.detach() * torch.autograd.grad(total, topics)[0]
        new = (counts / counts.sum(-1, keepdim=True)).to(params["topics"].dtype)
        return {**params, "topics": new}

    def _param(self, name: str) -> Tensor:
        """A parameter from Pyro's parameter store."""
        value: Tensor = pyro.param(
            name, lambda: self.initial[name], constraint=self.constraints[name]
        )
        return value

    def _present(self, words: Tensor, lengths: Tensor) -> Tensor:
        """Which words are within their documents, shape [documents, length].

        Args:
            words: Words, torch.long, shape [documents, length].
            lengths: Lengths, integers, shape [documents].

        Returns:
            True up to the end of each document.

        Raises:
            ValueError: If the data have another type or shape.
        """
        if words.dtype != torch.long or words.dim() != 2 or lengths.shape != words.shape[:1]:
            raise ValueError(
                "need words, integers (torch.long) of shape [documents, length], and their"
                f" lengths, got {words.dtype} of shape {list(words.shape)}"
                f" and shape {list(lengths.shape)}"
            )
        return torch.arange(words.shape[1], device=words.device) < lengths[:, None]

    def _urn(self, params: Mapping[str, Tensor], words: Tensor, lengths: Tensor) -> _Urn:
        """Forward algorithm over the counts of the topics, in double precision.

        Args:
            params: Parameters by name, on their constrained spaces.
            words: Words, torch.long, shape [documents, length].
            lengths: Lengths, integers, shape [documents].

        Returns:
            Likelihood, and posterior of the counts. Beyond the end of a document the urn goes on
            with words that nobody sees, which changes nothing that is asked about the shares.

        Raises:
            ValueError: If documents or topics are too many for an exact computation.
        """
        present = self._present(words, lengths)
        size, length = words.shape
        needed = size * comb(length + self.num_topics - 1, length)
        if needed > MAX_STATES:
            raise ValueError(
                f"{size} documents of up to {length} words with {self.num_topics} topics have"
                f" {needed} counts, more than {MAX_STATES}: take fewer at once"
            )
        evidence = params["topics"].double().T[words]
        evidence = torch.where(present[:, :, None], evidence, 1.0).permute(1, 2, 0)
        counts, after = (table.to(words.device) for table in _states(self.num_topics, length))
        filtered = evidence.new_ones(1, size)
        log_likelihood = evidence.new_zeros(size)
        for step, likelihood in enumerate(evidence):
            drawn = _with_last(counts[: len(filtered)], step)
            chance = (self.concentration + drawn) / (self.num_topics * self.concentration + step)
            states = comb(step + self.num_topics, self.num_topics - 1)
            joint = evidence.new_zeros(states, size)
            for topic in range(self.num_topics):
                term = filtered * chance[:, topic, None] * likelihood[topic]
                joint = joint.index_add(0, after[: len(filtered), topic], term)
            predictive = joint.sum(0)
            log_likelihood = log_likelihood + predictive.log()
            filtered = joint / predictive.clamp(min=_TINY)  # zero for an impossible word
        return _Urn(log_likelihood, _with_last(counts, length).to(evidence), filtered.T)


@lru_cache(maxsize=16)
def _states(num_topics: int, length: int) -> tuple[Tensor, Tensor]:
    """States of the urn: how often each topic but the last was drawn, at most so many in all.

    Args:
        num_topics: Number of topics.
        length: Number of draws.

    Returns:
        Counts of the topics but the last, by ascending sum, shape [states, topics − 1]; and the
        place of the state after one more draw of each topic, shape [states with a draw left,
        topics].
    """
    free = range(num_topics - 1)
    draws = [
        draw for total in range(length + 1) for draw in combinations_with_replacement(free, total)
    ]
    place = {draw: index for index, draw in enumerate(draws)}
    after = [
        [*(place[tuple(sorted((*draw, topic)))] for topic in free), index]
        for index, draw in enumerate(draws)
        if len(draw) < length
    ]
    counts = [[draw.count(topic) for topic in free] for draw in draws]
    return torch.tensor(counts, device="cpu"), torch.tensor(after, device="cpu")


def _with_last(counts: Tensor, total: int) -> Tensor:
    """Adds the count of the last topic, which makes up the total."""
    return torch.cat([counts, total - counts.sum(1, keepdim=True)], 1)


@lru_cache(maxsize=1)
def _corpus() -> tuple[tuple[str, ...], Tensor, Tensor]:
    """Vocabulary, words of the documents, zero beyond their ends, and lengths."""
    lines = Path(__file__).with_name("corpus.txt").read_text(encoding="utf-8").splitlines()
    documents = [
        [word for word in re.findall(r"[a-z]+", line.lower()) if word not in STOP_WORDS]
        for line in lines
    ]
    occurrences = Counter(word for document in documents for word in document)
    kept = tuple(sorted(word for word, count in occurrences.items() if count >= _RAREST))
    index = {word: place for place, word in enumerate(kept)}
    rows = [
        torch.tensor([index[word] for word in document if word in index], device="cpu")
        for document in documents
    ]
    lengths = torch.tensor([len(row) for row in rows], device="cpu")
    return kept, pad_sequence(rows, batch_first=True), lengths


def vocabulary() -> tuple[str, ...]:
    """The words of the corpus that occur at least four times, stop words left out.

    Returns:
        Words in alphabetic order.
    """
    return _corpus()[0]


def make_data(seed: int, size: int = 60) -> tuple[Tensor, Tensor]:
    """Draws documents without replacement from the corpus.

    Neither the global random state nor the parameter store is touched.

    Args:
        seed: Seed of their order.
        size: Number of documents, at most 60.

    Returns:
        Words as places in `vocabulary`, torch.long, shape [size, length], zero beyond the end of a
        document; and the lengths of the documents, torch.long, shape [size].

    Raises:
        ValueError: If there are not as many documents.
    """
    _, words, lengths = _corpus()
    if not 1 <= size <= len(words):
        raise ValueError(f"size must be between 1 and {len(words)}, got {size}")
    generator = torch.Generator("cpu").manual_seed(seed)
    order = torch.randperm(len(words), generator=generator, device="cpu")[:size]
    device = torch.get_default_device()
    return words[order].to(device), lengths[order].to(device)


_model = TopicModel()


def model(words: Tensor, lengths: Tensor) -> None:
    """The program of a default model, of 3 topics.

    Args:
        words: Words, torch.long, shape [documents, length].
        lengths: Lengths, integers, shape [documents].
    """
    _model.model(words, lengths)


def guide(words: Tensor, lengths: Tensor) -> None:
    """The guide of the default model: a Dirichlet distribution for which words vote.

    Args:
        words: Words, torch.long, shape [documents, length].
        lengths: Lengths, integers, shape [documents].
    """
    _model.guide(words, lengths)
