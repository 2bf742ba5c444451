"""Noisy-or networks of diseases and findings, as in medical diagnosis.

A finding is absent if neither its leak nor any present disease of its parents activates it, each
independently: P(finding j absent | diseases) = (1 - leak_j) prod_i (1 - activation_ij)^disease_i.
The likelihood is a sum over all joint states of the diseases, so that it is known exactly as long
as they are few, and so is an EM step.
"""

from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions.constraints import Constraint

from models.latent_class import TRUTH_OFFSET, inside_unit
from models.values import as_default, stored

MAX_STATES = 2**20
"""The largest number of joint disease states that the exact referee sums over."""

_CHUNK_ELEMENTS = 2**22


class Tables(NamedTuple):
    """Log probabilities given each joint state of the diseases, in nats.

    Attributes:
        prior: Log probability of the state, shape [states].
        present: Log probability that a finding is present, shape [states, findings].
        absent: Log probability that a finding is absent, shape [states, findings].
    """

    prior: Tensor
    present: Tensor
    absent: Tensor

    def log_joint(self, x: Tensor) -> Tensor:
        """Log p(x, diseases) of data and all states.

        Args:
            x: Findings, 0 or 1 as floats, shape [batch, findings].

        Returns:
            Log probabilities in nats, shape [batch, states].
        """
        return self.prior + x @ self.present.T + (1 - x) @ self.absent.T


class NoisyOr:
    """A random sparse noisy-or network.

    The parameters are "prior" of shape [diseases], "leak" of shape [findings] and "activation" of
    shape [edges], all of them probabilities; they live in Pyro's parameter store. The edges of a
    finding lie next to each other in "activation", in the order of `edges`. Diseases and findings
    are sites of their own, "disease0", "finding0" and so on, so that a finding depends on its own
    leak, its own edges and its own parents alone.

    Attributes:
        num_diseases: Number of diseases.
        num_findings: Number of findings.
        edges: Pairs of a finding and a disease that can cause it, in ascending order.
        initial: Constrained values that the parameters start from, by their names.
        constraints: Constraint of each parameter, by its name.
    """

    constraints: ClassVar[dict[str, Constraint]] = {
        "prior": constraints.unit_interval,
        "leak": constraints.unit_interval,
        "activation": constraints.unit_interval,
    }

    def __init__(
        self,
        num_diseases: int = 3,
        num_findings: int = 7,
        num_edges: int = 11,
        seed: int = 0,
    ) -> None:
        """Makes a network; its parameters are made on first use.

        Every disease and every finding has at least one edge.

        Args:
            num_diseases: Number of diseases.
            num_findings: Number of findings.
            num_edges: Number of edges from a disease to a finding.
            seed: Seed of the edges and of the initial values.

        Raises:
            ValueError: If there is no disease or no finding, or the edges are too few or too many.
        """
        if min(num_diseases, num_findings) < 1:
            raise ValueError(
                f"need at least 1 disease and 1 finding, got {num_diseases} and {num_findings}"
            )
        fewest, most = max(num_diseases, num_findings), num_diseases * num_findings
        if not fewest <= num_edges <= most:
            raise ValueError(f"num_edges must be between {fewest} and {most}, got {num_edges}")
        self.num_diseases = num_diseases
        self.num_findings = num_findings
        self.edges = _random_edges(num_diseases, num_findings, num_edges, seed)
        self.initial = self.start(seed)

    @property
    def num_states(self) -> int:
        """The number of joint states of the diseases."""
        return int(2**self.num_diseases)

    def start(self, seed: int) -> dict[str, Tensor]:
        """Draws initial values, leaving the global random state as it was.

        Args:
            seed: Seed of the values.

        Returns:
            Constrained values by parameter name, in torch's default precision and device.
        """
        return self._random_params(seed, prior=(0.2, 0.5), leak=(0.05, 0.3), activation=(0.2, 0.8))

    def truth(self, seed: int) -> dict[str, Tensor]:
        """Draws values to sample data from, leaving the global random state as it was.

        Args:
            seed: Seed of the values, which are independent of `start` at this seed.

        Returns:
            Constrained values by parameter name, in torch's default precision and device.
        """
        seed += TRUTH_OFFSET
        return self._random_params(
            seed, prior=(0.35, 0.55), leak=(0.15, 0.25), activation=(0.4, 0.6)
        )

    def current(self, x: Tensor) -> dict[str, Tensor]:
        """The parameters' values in Pyro's store, or the initial ones before the first use.

        Args:
            x: Findings, 0 or 1 as floats, shape [batch, findings].

        Returns:
            Constrained values by parameter name, detached, in the precision and on the device of
            the data.
        """
        return {name: value.to(x) for name, value in stored(self.initial).items()}

    def model(self, x: Tensor) -> None:
        """The network; its diseases are summed out by enumeration.

        Args:
            x: Findings, 0 or 1 as floats, shape [batch, findings].
        """
        prior = self._param("prior", x)
        log_quiet_leak = torch.log1p(-self._param("leak", x))
        log_quiet = torch.log1p(-self._param("activation", x))
        with pyro.plate("data", x.shape[0], dim=-1):
            diseases = [
                pyro.sample(f"disease{i}", dist.Bernoulli(p), infer={"enumerate": "parallel"})
                for i, p in enumerate(prior)
            ]
            log_absent = list(log_quiet_leak)
            for edge, (finding, disease) in enumerate(self.edges):
                log_absent[finding] = log_absent[finding] + diseases[disease] * log_quiet[edge]
            for j, log_off in enumerate(log_absent):
                present = dist.Bernoulli(logits=_log_complement(log_off) - log_off)
                pyro.sample(f"finding{j}", present, obs=x[..., j])

    def guide(self, x: Tensor) -> None:
        """The empty guide: every hidden variable is summed out.

        Args:
            x: Findings, 0 or 1 as floats, shape [batch, findings].
        """

    def recognize(self, x: Tensor) -> None:
        """A guide that draws the diseases from their exact joint posterior, one after the other.

        Args:
            x: Findings, 0 or 1 as floats, shape [batch, findings].

        Raises:
            ValueError: If there are more than `MAX_STATES` joint states of the diseases.
        """
        with torch.no_grad():
            log_joint = self._tables(self.current(x), self._states(x)).log_joint(x)
        with pyro.plate("data", x.shape[0], dim=-1):
            for i in range(self.num_diseases):
                absent, present = log_joint.chunk(2, dim=-1)
                logits = present.logsumexp(-1) - absent.logsumexp(-1)
                disease = pyro.sample(f"disease{i}", dist.Bernoulli(logits=logits))
                log_joint = torch.where(disease[..., None] > 0, present, absent)

    def log_likelihood(self, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """The exact log likelihood; it can be differentiated in the parameters.

        The diseases' states are summed out in chunks, but a derivative keeps all of them.

        Args:
            params: Constrained values by parameter name, strictly between 0 and 1.
            x: Findings, 0 or 1 as floats, shape [batch, findings].

        Returns:
            log p(x) in nats, summed over the data, shape [].

        Raises:
            ValueError: If there are more than `MAX_STATES` joint states of the diseases.
        """
        tables = self._tables(params, self._states(x))
        parts = [tables.log_joint(part).logsumexp(-1).sum() for part in self._chunks(x)]
        return torch.stack(parts).sum()

    @torch.no_grad()
    def em_step(self, params: Mapping[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        """One exact step of EM, with the activation of each edge and leak as hidden variables.

        An edge from a present disease is active with probability activation / P(finding present |
        diseases) if the finding is present, and never otherwise; a leak likewise.

        Args:
            params: Constrained values by parameter name, strictly between 0 and 1.
            x: Findings, 0 or 1 as floats, shape [batch, findings].

        Returns:
            New constrained values by parameter name, kept off 0 and 1 by `inside_unit`.

        Raises:
            ValueError: If there are more than `MAX_STATES` joint states of the diseases.
        """
        states = self._states(x)
        tables = self._tables(params, states)
        count = torch.zeros_like(tables.prior)
        count_present = torch.zeros_like(tables.present)
        for part in self._chunks(x):
            share = tables.log_joint(part).softmax(-1)
            count += share.sum(0)
            count_present += share.T @ part
        ratio = count_present / tables.present.exp()
        findings, diseases = self._edge_index(x)
        ill = count @ states
        active = params["activation"] * (ratio[:, findings] * states[:, diseases]).sum(0)
        values = {
            "prior": ill / len(x),
            "leak": params["leak"] * ratio.sum(0) / len(x),
            "activation": active / ill[diseases],
        }
        return {name: inside_unit(value) for name, value in values.items()}

    def sample(self, params: Mapping[str, Tensor], size: int, seed: int) -> Tensor:
        """Draws findings, leaving the global random state as it was.

        Args:
            params: Constrained values by parameter name.
            size: Number of data.
            seed: Seed of the data.

        Returns:
            Findings, 0 or 1 in torch's default precision and device, shape [size, findings].

        Raises:
            ValueError: If there are no data.
        """
        if size < 1:
            raise ValueError(f"need at least 1 datum, got {size}")
        params = {name: value.double().cpu() for name, value in params.items()}
        generator = torch.Generator("cpu").manual_seed(seed)
        diseases = torch.bernoulli(params["prior"].expand(size, -1), generator=generator)
        probs = -torch.expm1(self._log_absent(params, diseases))
        return as_default(torch.bernoulli(probs, generator=generator))

    def _param(self, name: str, x: Tensor) -> Tensor:
        """A parameter; its first value is a copy, so that training leaves `initial` alone."""
        value: Tensor = pyro.param(
            name, lambda: self.initial[name].to(x, copy=True), constraint=self.constraints[name]
        )
        return value

    def _random_params(self, seed: int, **ranges: tuple[float, float]) -> dict[str, Tensor]:
        """Uniform values in the given ranges, by parameter name."""
        generator = torch.Generator("cpu").manual_seed(seed)
        sizes = {
            "prior": self.num_diseases,
            "leak": self.num_findings,
            "activation": len(self.edges),
        }
        draws = {
            name: torch.rand(size, generator=generator, dtype=torch.float64, device="cpu")
            for name, size in sizes.items()
        }
        return {
            name: as_default(low + (high - low) * draws[name])
            for name, (low, high) in ranges.items()
        }

    def _edge_index(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The findings and the diseases of the edges, each of shape [edges]."""
        findings, diseases = torch.tensor(self.edges, device=like.device).T
        return findings, diseases

    def _states(self, like: Tensor) -> Tensor:
        """Lists all joint states, the first disease changing slowest.

        Args:
            like: Tensor of the wanted precision and device.

        Returns:
            States, 0 or 1, shape [states, diseases].

        Raises:
            ValueError: If there are more than `MAX_STATES` of them.
        """
        if self.num_states > MAX_STATES:
            raise ValueError(
                f"{self.num_states} states of the diseases are too many to enumerate"
                f" (at most {MAX_STATES})"
            )
        index = torch.arange(self.num_states, device=like.device)
        shifts = torch.arange(self.num_diseases - 1, -1, -1, device=like.device)
        return ((index[:, None] >> shifts) & 1).to(like)

    def _log_absent(self, params: Mapping[str, Tensor], diseases: Tensor) -> Tensor:
        """Log probability that a finding is absent, in nats.

        Args:
            params: Constrained values by parameter name.
            diseases: Diseases, 0 or 1 as floats, shape [states, diseases].

        Returns:
            Log probabilities, shape [states, findings].
        """
        findings, parents = self._edge_index(diseases)
        log_quiet = diseases[:, parents] * torch.log1p(-params["activation"])
        log_leak = torch.log1p(-params["leak"]).expand(len(diseases), -1)
        return log_leak.index_add(1, findings, log_quiet)

    def _tables(self, params: Mapping[str, Tensor], states: Tensor) -> Tables:
        """The log probabilities given the states, which have the shape [states, diseases]."""
        prior = params["prior"]
        log_prior = states @ prior.log() + (1 - states) @ torch.log1p(-prior)
        log_absent = self._log_absent(params, states)
        return Tables(log_prior, _log_complement(log_absent), log_absent)

    def _chunks(self, x: Tensor) -> tuple[Tensor, ...]:
        """Parts of the data that are small enough for all states."""
        chunks: tuple[Tensor, ...] = x.split(max(1, _CHUNK_ELEMENTS // self.num_states))
        return chunks


def _log_complement(log_probs: Tensor) -> Tensor:
    """Log of 1 - p from log p, in nats, same shape."""
    return torch.log(-torch.expm1(log_probs))


def _random_edges(
    num_diseases: int, num_findings: int, num_edges: int, seed: int
) -> tuple[tuple[int, int], ...]:
    """Random edges that leave neither a disease nor a finding alone.

    The first edges pair diseases and findings in random orders, as evenly as they can, and the
    others are drawn from the pairs that are left.

    Args:
        num_diseases: Number of diseases.
        num_findings: Number of findings.
        num_edges: Number of edges.
        seed: Seed of the edges.

    Returns:
        Pairs of a finding and a disease, in ascending order.
    """
    generator = torch.Generator("cpu").manual_seed(seed)

    def shuffled(size: int) -> list[int]:
        order: list[int] = torch.randperm(size, generator=generator, device="cpu").tolist()
        return order

    findings, diseases = shuffled(num_findings), shuffled(num_diseases)
    edges = {
        (findings[k % num_findings], diseases[k % num_diseases])
        for k in range(max(num_diseases, num_findings))
    }
    rest = [divmod(pair, num_diseases) for pair in shuffled(num_findings * num_diseases)]
    rest = [edge for edge in rest if edge not in edges]
    return tuple(sorted([*edges, *rest[: num_edges - len(edges)]]))


_network = NoisyOr()


def model(x: Tensor) -> None:
    """The model of the default network, of 3 diseases and 7 findings.

    Args:
        x: Findings, 0 or 1 as floats, shape [batch, 7].
    """
    _network.model(x)


def guide(x: Tensor) -> None:
    """The empty guide of the default network.

    Args:
        x: Findings, 0 or 1 as floats, shape [batch, 7].
    """
    _network.guide(x)


def make_data(seed: int, size: int = 3000) -> Tensor:
    """Samples data for the default network from random parameters.

    Neither the global random state nor the parameter store is touched.

    Args:
        seed: Seed of the true parameters and of the samples.
        size: Number of data.

    Returns:
        Findings, 0 or 1 as floats, shape [size, 7].
    """
    return _network.sample(_network.truth(seed), size, seed)
