"""The oracles: slow, independent computations of what the rest of the package approximates.

Nothing here shares code with the estimators: a program is run once per joint value of its
discrete sites, every score is a plain autograd gradient, and every expectation is a sum over
all states. Use them on nets small enough to enumerate, in float64, to check a new model,
distribution family or estimator.

Names follow N. Ay, "On the locality of the natural gradient for learning in deep Bayesian
networks", Information Geometry 6 (2023): `G` is the Fisher of the full system, `G_V` that of the
visible units.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch import distributions as dist

from pyronat.errors import NotEnumerable, UnsupportedProgram
from pyronat.graph import BayesNet
from pyronat.partition import components_of

MAX_STATES = 2**16
"""Largest number of joint states that is enumerated."""

Layout = list[tuple[str, slice]]
"""Where each parameter lies in a flattened vector: names sorted, entries row-major."""

_WRAPPERS = {"Independent", "ExpandedDistribution", "MaskedDistribution"}

Program = Callable[..., Any]
Values = dict[str, Tensor]


def parameters(model: Program, *args: Any, **kwargs: Any) -> Values:
    """Unconstrained leaves of a program, by name, sorted.

    Runs the program once. `pyro.param`, `pyro.module` and `PyroModule` parameters are found;
    leaves that do not require a gradient are left out.

    Args:
        model: a Pyro program, model or guide.
        *args: its arguments.
        **kwargs: its keyword arguments.

    Returns:
        The leaf tensors themselves, not copies.

    Example:
        >>> import pyro
        >>> pyro.clear_param_store()
        >>> def model():
        ...     rate = pyro.param("rate", torch.tensor(2.0), constraint=dist.constraints.positive)
        ...     return pyro.sample("x", pyro.distributions.Poisson(rate))
        >>> {name: round(leaf.item(), 3) for name, leaf in parameters(model).items()}
        {'rate': 0.693}
    """
    with torch.random.fork_rng(), poutine.trace(param_only=True) as capture:
        model(*args, **kwargs)
    return _leaves([capture.trace])


def enumerate_states(
    model: Program, *args: Any, **kwargs: Any
) -> Iterator[tuple[Values, poutine.Trace]]:
    """Runs a program once for every joint value of all its discrete sample sites.

    Observed sites are given every value of their support too. A site's values are the Cartesian
    product over all its elements, those of plates and of `to_event` dimensions alike. Which sites
    exist may depend on the values of earlier ones. Sites without randomness (`Delta`,
    `pyro.deterministic`) keep the value that the program computes. Random subsamples, factor
    statements and masked distributions (`fn.mask`) are refused with an `UnsupportedProgram`.

    Args:
        model: a Pyro program whose random sites all have a finite support.
        *args: its arguments.
        **kwargs: its keyword arguments.

    Yields:
        The values by site name, and the trace of that run.

    Raises:
        NotEnumerable: if there are more than `MAX_STATES` states, or a site's support is not
            finite.

    Example:
        >>> import pyro
        >>> def model():
        ...     with pyro.plate("data", 2):
        ...         pyro.sample("x", pyro.distributions.Bernoulli(torch.tensor(0.3)))
        >>> [values["x"].tolist() for values, _ in enumerate_states(model)]
        [[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]
    """
    pending: list[list[Tensor]] = [[]]
    done = 0
    while pending:
        assignment = _Assignment(pending.pop())
        with assignment:
            trace = poutine.trace(model).get_trace(*args, **kwargs)
        # The stack is last in, first out: reversed, the states come in lexicographic order.
        pending.extend(reversed(assignment.alternatives))
        done += 1
        if done + len(pending) > MAX_STATES:
            raise NotEnumerable(
                f"the program has more than {MAX_STATES} joint states, at most that many are "
                "enumerated; make the net smaller or estimate by sampling"
            )
        yield assignment.values, trace


def enumerated_fisher(model: Program, *args: Any, **kwargs: Any) -> tuple[Tensor, Layout]:
    """Fisher information of the full system, by enumeration.

        G = Σ_{v,h} p(v,h) s(v,h) s(v,h)ᵀ,   s = ∇_ξ log p(v,h; ξ)

    in unconstrained coordinates, in nats per squared unit. Nothing is assumed about its
    structure: products of scores of different sites are summed too. Plate and `poutine.scale`
    factors are ignored; masked elements have no score. See `enumerated_sitewise_fisher` for the
    Fisher of a scaled program. Costs one run and one backward pass per site and state.

    Args:
        model: a Pyro program whose random sites all have a finite support.
        *args: its arguments.
        **kwargs: its keyword arguments.

    Returns:
        G `[num_params, num_params]`, and where each parameter lies in it.

    Source: Ay (2023), Section 2.

    Example:
        >>> import pyro
        >>> pyro.clear_param_store()
        >>> def model():
        ...     logit = pyro.param("logit", torch.tensor(0.0))
        ...     pyro.sample("x", pyro.distributions.Bernoulli(logits=logit))
        >>> enumerated_fisher(model)
        (tensor([[0.2500]]), [('logit', slice(0, 1, None))])
    """
    table = _tabulate(model, args, kwargs)
    return _outer(table.probs, table.score), table.layout


def enumerated_sitewise_fisher(model: Program, *args: Any, **kwargs: Any) -> tuple[Tensor, Layout]:
    """Fisher information summed over sites, each weighted by its scale, by enumeration.

        G = Σ_r scale_r Σ_{v,h} p(v,h) s_r s_rᵀ,   s_r = ∇_ξ log p(x_r | x_pa(r); ξ)

    A subsampled plate stands for scale times as many elements as it has, so its Fisher is scale
    times the sum over them, not the outer product of scaled scores, which would be scale². A
    scale that differs between the elements of a site weights each element by its own; masked
    elements contribute nothing. Without scales it equals `enumerated_fisher`.

    Args:
        model: a Pyro program whose random sites all have a finite support.
        *args: its arguments.
        **kwargs: its keyword arguments.

    Returns:
        G `[num_params, num_params]` in nats per squared unit, and where each parameter lies in it.

    Source: Ay (2023), Section 2, for the sum over sites.
    """
    # Elements of a site are independent given its parents, so that products of scores of two
    # elements have mean zero, and √scale on each score gives scale on each square.
    table = _tabulate(model, args, kwargs, power=0.5)
    terms = [_outer(table.probs, score) for score in table.scores.values()]
    return torch.stack(terms).sum(0), table.layout


def enumerated_visible_fisher(model: Program, *args: Any, **kwargs: Any) -> tuple[Tensor, Layout]:
    """Fisher information of the visible units, by enumeration.

        G_V = Σ_v p(v) s_V s_Vᵀ,   s_V(v) = ∇_ξ log p(v; ξ) = E_{p(h|v)}[ s(v,h) ]

    Visible are the sites that the program observes, under the arguments given; which values it
    observes is irrelevant. Scales are ignored, masked elements of visible sites are not seen.

    Args:
        model: a Pyro program whose random sites all have a finite support.
        *args: its arguments.
        **kwargs: its keyword arguments.

    Returns:
        G_V `[num_params, num_params]` in nats per squared unit, and where each parameter lies.

    Source: Ay (2023), Sections 3 and 4; Fisher's identity.
    """
    table = _tabulate(model, args, kwargs)
    probs = _group_sum(table.probs, table.visible)
    score = _group_sum(table.probs[:, None] * table.score, table.visible) / probs[:, None]
    return _outer(probs, score), table.layout


def expected_score(model: Program, *args: Any, **kwargs: Any) -> tuple[Tensor, Layout]:
    """Expected score E_{p(v,h)}[s], which is zero, by enumeration.

    Args:
        model: a Pyro program whose random sites all have a finite support.
        *args: its arguments.
        **kwargs: its keyword arguments.

    Returns:
        The expectation `[num_params]` in nats per unit, and where each parameter lies in it.
    """
    table = _tabulate(model, args, kwargs)
    return table.probs @ table.score, table.layout


def kl_divergence(
    model: Program, displacement: Mapping[str, Tensor], *args: Any, **kwargs: Any
) -> Tensor:
    """KL(p(v,h; ξ) ‖ p(v,h; ξ + ε)) of the full system, by enumeration.

    To second order it is ½ εᵀGε, with the G of `enumerated_fisher`: scales are ignored, and
    masked elements contribute nothing.

    Args:
        model: a Pyro program whose random sites all have a finite support.
        displacement: ε by parameter name, in unconstrained coordinates; a name left out stays.
        *args: arguments of the program.
        **kwargs: its keyword arguments.

    Returns:
        The divergence `[]` in nats. The parameters are the same after the call.
    """
    before = _tabulate(model, args, kwargs, with_scores=False)
    with _displaced(parameters(model, *args, **kwargs), displacement):
        after = _tabulate(model, args, kwargs, with_scores=False)
    return before.probs @ (before.log_probs - after.log_probs)


def visible_kl_divergence(
    model: Program, displacement: Mapping[str, Tensor], *args: Any, **kwargs: Any
) -> Tensor:
    """KL(p(v; ξ) ‖ p(v; ξ + ε)) of the visible units, by enumeration.

    To second order it is ½ εᵀG_Vε, with the G_V of `enumerated_visible_fisher`.

    Args:
        model: a Pyro program whose random sites all have a finite support.
        displacement: ε by parameter name, in unconstrained coordinates; a name left out stays.
        *args: arguments of the program.
        **kwargs: its keyword arguments.

    Returns:
        The divergence `[]` in nats. The parameters are the same after the call.
    """
    before = _tabulate(model, args, kwargs, with_scores=False)
    with _displaced(parameters(model, *args, **kwargs), displacement):
        after = _tabulate(model, args, kwargs, with_scores=False)
    probs = _group_sum(before.probs, before.visible)
    return probs @ (probs / _group_sum(after.probs, after.visible)).log()


def entry_blocks(net: BayesNet) -> dict[str, Tensor]:
    """Which unit of the Fisher's blocks each parameter entry belongs to.

    Args:
        net: an analyzed program.

    Returns:
        For each parameter that has a block a tensor of its shape: numbers that are equal for
        entries of one unit, and -1 for entries in no block.
    """
    return components_of(net.blocks)


def family_fisher(
    factory: Callable[..., dist.Distribution], coordinates: Mapping[str, Tensor]
) -> Tensor:
    """Fisher information of a distribution family, from its log density alone.

        F = −E_{p(x; θ)}[ ∇²_θ log p(x; θ) ]

    A finite support is summed over. Counts are summed up to sixty standard deviations above the
    mean. A continuous scalar is integrated by the trapezoidal rule after a double sinh
    substitution (4001 nodes), good to 1e-6 where the density is analytic in the interior of its
    support. A continuous vector has no quadrature here: its F is `kl_hessian`. The log density has
    to be twice differentiable in θ: Laplace and uniform families are out.

    Args:
        factory: gives the distribution when called with the coordinates as keywords.
        coordinates: θ by name, of any shape; use float64.

    Returns:
        F `[size, size]` in nats per squared unit, summed over the batch; entries of the
        coordinates follow each other in the order given, row-major.

    Raises:
        NotEnumerable: if the nodes do not carry all of the probability, within 1e-6.

    Example:
        >>> family_fisher(dist.Bernoulli, {"probs": torch.tensor(0.2, dtype=torch.float64)})
        tensor([[6.2500]], dtype=torch.float64)
    """
    point = _innermost(factory(**coordinates))
    if point.event_shape and not point.has_enumerate_support:
        return kl_hessian(factory, coordinates)
    with torch.no_grad():
        values, weights = _nodes(point)
    mass = weights.sum(0)
    if not (mass - 1).abs().max() < 1e-6:
        raise NotEnumerable(
            f"the nodes carry a probability of {mass.min():.9f} of {type(point).__name__}, "
            "expected 1: no quadrature for this support"
        )
    size = sum(value.numel() for value in coordinates.values())

    def expected_log_prob(theta: Tensor) -> Tensor:
        moved = _innermost(factory(**_unflatten(theta, coordinates)))
        log_prob: Tensor = moved.log_prob(values)
        return (weights * log_prob).sum()

    return -_hessian(expected_log_prob, _flatten(coordinates)).reshape(size, size)


def kl_hessian(
    factory: Callable[..., dist.Distribution], coordinates: Mapping[str, Tensor]
) -> Tensor:
    """Fisher information of a distribution family, as the second order of its KL divergence.

        F = ∇²_ε KL(p(x; θ) ‖ p(x; θ + ε)) at ε = 0

    by differentiating torch's closed form twice.

    Args:
        factory: gives the distribution when called with the coordinates as keywords.
        coordinates: θ by name, of any shape; use float64.

    Returns:
        F `[size, size]` in nats per squared unit, laid out as by `family_fisher`.

    Example:
        >>> kl_hessian(dist.Poisson, {"rate": torch.tensor(4.0, dtype=torch.float64)})
        tensor([[0.2500]], dtype=torch.float64)
    """
    fixed = factory(**{name: value.detach() for name, value in coordinates.items()})

    def divergence(theta: Tensor) -> Tensor:
        return dist.kl_divergence(fixed, factory(**_unflatten(theta, coordinates))).sum()

    return _hessian(divergence, _flatten(coordinates))


def z_score(samples: Tensor, truth: Tensor, floor: float = 1e-12) -> Tensor:
    """How many standard errors the mean of samples lies from the truth.

        z = (mean − truth) / (sd / √n)

    Args:
        samples: independent estimates `[num_samples, *shape]`, at least two.
        truth: what they estimate without bias, `[*shape]`.
        floor: rounding errors up to floor · max(1, |truth|) count as zero, so that an entry
            without noise has the score 0 if it is right.

    Returns:
        The scores `[*shape]`, standard normal for many samples; infinite where the samples agree
        on a wrong value.

    Example:
        >>> z_score(torch.tensor([1.0, 2.0, 3.0]), torch.tensor(2.0))
        tensor(0.)
    """
    error = samples.mean(0) - truth
    exact = error.abs() <= floor * truth.abs().clamp(min=1.0)
    standard_error = samples.std(0) / math.sqrt(len(samples))
    return torch.where(exact, torch.zeros_like(error), error / standard_error)


class _Assignment(Messenger):
    """Gives the random sites chosen values, and later ones the first of their support.

    Attributes:
        path: value of each random site, in the order of the program.
        values: the same by site name.
        alternatives: paths that differ from this one in their last value, and were not given.
    """

    def __init__(self, path: list[Tensor]) -> None:
        super().__init__()
        self.path = list(path)
        self.values: Values = {}
        self.alternatives: list[list[Tensor]] = []

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        _refuse_unsupported(msg)
        if not _is_random(msg):
            return
        name = msg["name"]
        position = len(self.values)
        if position == len(self.path):
            first, *others = _joint_values(name, msg["fn"])
            prefixes = [[*self.path, other] for other in others]
            # Deeper branches have to come first, since their prefixes are continued first.
            self.alternatives = prefixes + self.alternatives
            self.path.append(first)
        self.values[name] = self.path[position]
        msg["value"] = self.values[name].clone()
        msg["done"] = True


def _refuse_unsupported(site: Mapping[str, Any]) -> None:
    """Checks that a sample site has a normalized conditional distribution.

    Raises:
        UnsupportedProgram: if it has not, or masks it other than by `poutine.mask`.
    """
    name, fn = site["name"], site["fn"]
    kind = type(fn).__name__
    if kind == "_Subsample" and (fn.subsample_size or fn.size) < fn.size:
        raise UnsupportedProgram(
            f"plate {name!r} draws a random subsample, which is no part of the net; "
            "give its indices by subsample="
        )
    if kind == "Unit":
        raise UnsupportedProgram(f"factor {name!r} has no normalized conditional distribution")
    while _is_random(site) and type(fn).__name__ in _WRAPPERS:
        if type(fn).__name__ == "MaskedDistribution":
            raise UnsupportedProgram(
                f"site {name!r} masks its distribution; use poutine.mask around the statement"
            )
        fn = fn.base_dist


def _is_random(site: Mapping[str, Any]) -> bool:
    """Whether a site is random; `Delta`, deterministic and plate statements are not."""
    if site["type"] != "sample":
        return False
    return type(_innermost(site["fn"])).__name__ not in {"Delta", "_Subsample"}


def _innermost(fn: Any) -> Any:
    """The distribution of single elements, without `to_event`, expansion or mask."""
    while type(fn).__name__ in _WRAPPERS:
        fn = fn.base_dist
    return fn


def _joint_values(name: str, fn: dist.Distribution) -> list[Tensor]:
    """All values of a site: the Cartesian product of the support over its elements.

    Raises:
        NotEnumerable: if the support is not finite or there are too many values.
    """
    base = _innermost(fn)
    if not base.has_enumerate_support:
        raise NotEnumerable(
            f"site {name!r} is {type(base).__name__}, expected a family of finite support"
        )
    support = base.enumerate_support(expand=False)
    support = support.reshape(len(support), *base.event_shape)
    shape = fn.batch_shape + fn.event_shape
    count = shape[: len(shape) - len(base.event_shape)].numel()
    if len(support) ** count > MAX_STATES:
        raise NotEnumerable(
            f"site {name!r} has {len(support)}^{count} values, at most {MAX_STATES} joint states "
            "are enumerated; make the net smaller or estimate by sampling"
        )
    indices = itertools.product(range(len(support)), repeat=count)
    return [support[torch.tensor(index, dtype=torch.long)].reshape(shape) for index in indices]


@dataclass(frozen=True)
class _Table:
    """A program in all its states.

    Attributes:
        layout: where each parameter lies in a score.
        probs: p(v,h) `[num_states]`, whatever the scales and masks.
        log_probs: sum of the log densities that are not masked, unscaled `[num_states]`.
        scores: score of each site `[num_states, num_params]`, by name.
        visible: number of the visible configuration of each state `[num_states]`.
    """

    layout: Layout
    probs: Tensor
    log_probs: Tensor
    scores: Values
    visible: Tensor

    @property
    def score(self) -> Tensor:
        """Score of the full system `[num_states, num_params]`."""
        return torch.stack(list(self.scores.values())).sum(0)


def _tabulate(
    model: Program,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    power: float = 0.0,
    with_scores: bool = True,
) -> _Table:
    """Enumerates a program; scores are those of scale**power times each log density."""
    traces = [trace for _, trace in enumerate_states(model, *args, **kwargs)]
    leaves = _leaves(traces)
    log_weights, log_probs, configurations = [], [], []
    scores: dict[str, list[Tensor]] = {}
    zero = _flatten(leaves).detach() * 0 if leaves else torch.zeros(0)
    for state, trace in enumerate(traces):
        weight, log_prob, configuration = zero.new_zeros(()), zero.new_zeros(()), []
        for name, site in trace.nodes.items():
            if not _is_random(site):
                continue
            weight = weight + _innermost(site["fn"]).log_prob(site["value"]).sum().detach()
            density, mask = _masked_log_prob(site)
            log_prob = log_prob + density.sum().detach()
            if site["is_observed"]:
                seen = site["value"].reshape(density.numel(), -1)[mask.reshape(-1)]
                configuration.append((name, mask.tolist(), seen.tolist()))
            if with_scores:
                rows = scores.setdefault(name, [zero] * len(traces))
                scaled = density * torch.as_tensor(site["scale"], dtype=zero.dtype) ** power
                rows[state] = _gradient(scaled.sum(), leaves)
        log_weights.append(weight)
        log_probs.append(log_prob)
        configurations.append(repr(sorted(configuration)))
    numbers = {text: number for number, text in enumerate(dict.fromkeys(configurations))}
    return _Table(
        layout=_layout(leaves),
        probs=torch.stack(log_weights).exp(),
        log_probs=torch.stack(log_probs),
        scores={name: torch.stack(rows) for name, rows in scores.items()},
        visible=torch.tensor([numbers[text] for text in configurations]),
    )


def _masked_log_prob(site: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Unscaled log density of a site's batch elements, 0 where masked, and the mask."""
    log_prob = site["fn"].log_prob(site["value"])
    mask = torch.as_tensor(True if site["mask"] is None else site["mask"]).expand(log_prob.shape)
    return torch.where(mask, log_prob, torch.zeros_like(log_prob)), mask


def _leaves(traces: list[poutine.Trace]) -> Values:
    """Unconstrained leaves that require a gradient, over all traces, sorted by name."""
    leaves = {
        name: site["value"].unconstrained()
        for trace in traces
        for name, site in trace.nodes.items()
        if site["type"] == "param"
    }
    return {name: leaves[name] for name in sorted(leaves) if leaves[name].requires_grad}


def _gradient(log_prob: Tensor, leaves: Values) -> Tensor:
    """Gradient of a scalar for all leaves `[num_params]`, zero where it does not depend on one."""
    zeros = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    if not log_prob.requires_grad:
        return _flatten(zeros)
    gradients = torch.autograd.grad(
        log_prob, list(leaves.values()), retain_graph=True, allow_unused=True
    )
    pairs = zip(zeros.items(), gradients, strict=True)
    return _flatten({name: zero if g is None else g for (name, zero), g in pairs})


@contextmanager
def _displaced(leaves: Values, displacement: Mapping[str, Tensor]) -> Generator[None, None, None]:
    """Moves leaves within the context, and puts back their exact values after it."""
    original = {name: leaf.detach().clone() for name, leaf in leaves.items()}
    try:
        with torch.no_grad():
            for name, step in displacement.items():
                leaves[name].add_(step)
        yield
    finally:
        with torch.no_grad():
            for name, leaf in leaves.items():
                leaf.copy_(original[name])


def _outer(probs: Tensor, score: Tensor) -> Tensor:
    return score.mT @ (probs[:, None] * score)


def _group_sum(values: Tensor, groups: Tensor) -> Tensor:
    zeros = values.new_zeros(int(groups.max()) + 1, *values.shape[1:])
    return zeros.index_add(0, groups, values)


def _layout(leaves: Mapping[str, Tensor]) -> Layout:
    ends = list(itertools.accumulate(leaf.numel() for leaf in leaves.values()))
    starts = [0, *ends]
    return [(name, slice(a, b)) for name, a, b in zip(leaves, starts, ends, strict=False)]


def _flatten(values: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([value.reshape(-1) for value in values.values()])


def _unflatten(flat: Tensor, like: Mapping[str, Tensor]) -> Values:
    return {name: flat[where].reshape(like[name].shape) for name, where in _layout(like)}


def _hessian(function: Callable[[Tensor], Tensor], point: Tensor) -> Tensor:
    second_order: Callable[..., Tensor] = torch.autograd.functional.hessian
    return second_order(function, point.detach())


def _nodes(fn: Any) -> tuple[Tensor, Tensor]:
    """Points `[num_nodes, *batch, *event]` and probabilities `[num_nodes, *batch]`."""
    if fn.has_enumerate_support:
        values = fn.enumerate_support(expand=True)
    elif fn.support.is_discrete:
        last = (fn.mean + 60 * fn.variance.sqrt() + 60).max().ceil()
        count = torch.arange(int(last), dtype=fn.mean.dtype)
        values = count.reshape(-1, *[1] * len(fn.batch_shape)).expand(-1, *fn.batch_shape)
    else:
        return _quadrature(fn)
    return values, fn.log_prob(values).exp()


def _quadrature(fn: Any, num_nodes: int = 4001) -> tuple[Tensor, Tensor]:
    """Trapezoidal rule in t, x = T(center + spread · sinh(π/2 sinh t)), T mapping to the support.

    Far from the center even the integrand of a Cauchy density decays doubly exponentially in t, so
    that the rule converges exponentially in the number of nodes (Takahasi and Mori 1974). Center
    and spread come from a few samples; they only place the nodes.
    """
    transform = dist.biject_to(fn.support)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sample = transform.inv(fn.sample((1001,)))
    low, center, high = sample.quantile(sample.new_tensor([0.25, 0.5, 0.75]), dim=0)
    t = torch.linspace(-4, 4, num_nodes, dtype=center.dtype)
    t = t.reshape(-1, *[1] * len(fn.batch_shape))
    inner = math.pi / 2 * t.sinh()
    slope = math.pi / 2 * t.cosh() * inner.cosh()
    u = center + (high - low) * inner.sinh()
    x = transform(u)
    # Nodes that overflow lie in the far tails: they are moved to the center, without weight.
    inside = x.isfinite() & fn.support.check(x) & (x != 0)
    u, x = torch.where(inside, u, center), torch.where(inside, x, transform(center))
    density = (fn.log_prob(x) + transform.log_abs_det_jacobian(u, x)).exp()
    weights = density * (high - low) * slope * (t[1] - t[0])
    kept = inside & (weights > 1e-30) & weights.isfinite()
    return torch.where(kept, x, transform(center)), torch.where(kept, weights, 0.0)
