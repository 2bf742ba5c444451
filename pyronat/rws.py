"""Reweighted wake–sleep with one set of importance weights for each datum."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from pyro.infer import ELBO
from torch import Tensor

from pyronat.flows import tied_plates
from pyronat.importance import datum_plates, effective_sample_size
from pyronat.loss_traces import importance_traces, sleep_traces
from pyronat.tracing import scored_records_of

_PARTICLES = "num_particles_vectorized"


class ReweightedWakeSleep(ELBO):
    """Reweighted wake–sleep (Bornschein & Bengio 2015) with importance weights per datum.

    With guide draws h_k ~ q(h|v) and weights w_k ∝ p(v, h_k) / q(h_k|v), normalized over the
    particles of each element of the plates that all sites share, as far as the analysis of both
    programs proves these elements independent; weights are joint over plates whose elements depend
    on each other's values, as after a batch mean of hidden variables:

    - wake-θ:  −log (1/K) Σ_k p(v, h_k) / q(h_k|v), for the model;
    - wake-φ:  −Σ_k w_k log q(h_k|v), for the guide, weight `insomnia`;
    - sleep-φ: −log q(h|v) on dreams (v, h) ~ p, for the guide, weight 1 − `insomnia`.

    Sums over data honor subsampling. Pyro's own class weights whole minibatches jointly, so that
    one particle wins for all data. It can be used in the stock `pyro.infer.SVI`.

    Args:
        num_particles: guide draws K for each datum.
        insomnia: share of the wake phase in the guide's loss, between 0 and 1.
        num_sleep_particles: dreams for each datum and step, if `insomnia` < 1.
        vectorize_particles: whether particles are drawn in one run, in a plate further left.
        max_plate_nesting: bound on the number of nested plates; guessed if omitted.

    Raises:
        ValueError: if `insomnia` is outside [0, 1] or a number of particles is below 1.
    """

    def __init__(
        self,
        num_particles: int = 10,
        insomnia: float = 1.0,
        *,
        num_sleep_particles: int = 1,
        vectorize_particles: bool = False,
        max_plate_nesting: float = float("inf"),
    ) -> None:
        if not 0 <= insomnia <= 1:
            raise ValueError(f"insomnia is a share between 0 and 1, not {insomnia}")
        if num_particles < 1 or num_sleep_particles < 1:
            raise ValueError("at least one particle is needed")
        super().__init__(
            num_particles=num_particles,
            vectorize_particles=vectorize_particles,
            max_plate_nesting=max_plate_nesting,
        )
        self.insomnia = insomnia
        self.num_sleep_particles = num_sleep_particles
        self._tied: dict[tuple[Any, Any], frozenset[str]] = {}
        self.ess: Tensor | None = None
        """Effective sample size of the last evaluation, mean over data."""

    def _get_trace(
        self, model: Callable[..., Any], guide: Callable[..., Any], args: Any, kwargs: Any
    ) -> tuple[poutine.Trace, poutine.Trace]:
        return importance_traces(model, guide, args, kwargs, self.max_plate_nesting)

    def _get_sleep_trace(
        self, model: Callable[..., Any], guide: Callable[..., Any], args: Any, kwargs: Any
    ) -> poutine.Trace:
        return sleep_traces(model, guide, args, kwargs)[1]

    def _wake(
        self, model: Callable[..., Any], guide: Callable[..., Any], args: Any, kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Wake losses of model and guide in nats, scalars."""
        log_ps, log_qs = [], []
        scale = 1.0
        for model_trace, guide_trace in self._get_traces(model, guide, args, kwargs):
            p, q = scored_records_of(model_trace), scored_records_of(guide_trace)
            tied = self._tied_plates(model, guide, args, kwargs)
            plates = datum_plates([*p, *q], ignored=[_PARTICLES, *tied])
            stacked = self.vectorize_particles and self.num_particles > 1
            kept = [-self.max_plate_nesting] if stacked else []
            log_ps.append(plates.log_prob(p, kept))
            log_qs.append(plates.log_prob(q, kept))
            scale = plates.scale
        log_p, log_q = (
            terms[0] if self.vectorize_particles and self.num_particles > 1 else torch.stack(terms)
            for terms in (log_ps, log_qs)
        )
        log_weights = log_p - log_q.detach()
        self.ess = effective_sample_size(log_weights.detach()).mean()
        weights = log_weights.detach().softmax(0)
        theta = -(log_weights.logsumexp(0) - math.log(self.num_particles)).sum() * scale
        return theta, -(weights * log_q).sum() * scale

    def _tied_plates(
        self, model: Callable[..., Any], guide: Callable[..., Any], args: Any, kwargs: Any
    ) -> frozenset[str]:
        """Plates whose elements have no weights of their own, looked up once for each program."""
        if (model, guide) not in self._tied:
            tied = (tied_plates(program, args, kwargs) for program in (model, guide))
            self._tied[model, guide] = frozenset().union(*tied)
        return self._tied[model, guide]

    def _sleep(
        self, model: Callable[..., Any], guide: Callable[..., Any], args: Any, kwargs: Any
    ) -> Tensor:
        """Sleep loss of the guide in nats, a scalar."""
        losses = [
            -self._get_sleep_trace(model, guide, args, kwargs).log_prob_sum()
            for _ in range(self.num_sleep_particles)
        ]
        return torch.stack(losses).mean()

    def loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> float:
        """The wake-θ loss in nats: minus the importance-weighted bound on log p(v)."""
        with torch.no_grad():
            return float(self._wake(model, guide, args, kwargs)[0])

    def loss_and_grads(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> float:
        """Differentiates all phases in one backward pass and returns the wake-θ loss in nats."""
        theta, wake = self._wake(model, guide, args, kwargs)
        phi = self.insomnia * wake if self.insomnia > 0 else theta.new_zeros(())
        if self.insomnia < 1:
            phi = phi + (1 - self.insomnia) * self._sleep(model, guide, args, kwargs)
        total = theta + phi
        if total.requires_grad:
            total.backward()
        return float(theta.detach())
