"""Fisher information of distribution families, in coordinates that carry the autograd graph.

A family offers one or more *groups*: sets of coordinates that are Fisher-orthogonal to every
other group, as loc and scale of a normal distribution are. A coordinate is a tensor of the
distribution through which its density depends on the parameters; whatever parametrisation the
user chose, the chain rule through that tensor pulls the Fisher information back to it.

Adding a family is one function, in `closed_forms` or `joint_forms`, and one row of `FAMILIES`;
users give their own by `add`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence, Set
from typing import Any

import torch
from torch import Tensor
from torch import distributions as dist
from torch.distributions.utils import probs_to_logits

from pyronat import closed_forms as forms
from pyronat import joint_forms
from pyronat.closed_forms import Group as Group
from pyronat.closed_forms import Scores
from pyronat.closed_forms import diagonal as diagonal
from pyronat.errors import NoFisher, UnsupportedDistribution
from pyronat.wrappers import base_value as base_value
from pyronat.wrappers import distribution_tensors, held_distributions
from pyronat.wrappers import family_name as family_name
from pyronat.wrappers import peel as peel
from pyronat.wrappers import wrappers as wrappers


def score(distribution: dist.Distribution, name: str, value: Tensor) -> Tensor:
    """Score of a family in the coordinates of one of its groups, ∂ log p(x; θ) / ∂θ.

    Args:
        distribution: a peeled distribution, whose batch shape is that of the value.
        name: name of the group.
        value: x `[*batch, *event]`, of the peeled distribution (see `base_value`).

    Returns:
        Score `[*batch, size]` in nats per unit of each coordinate, detached; 0 in coordinates
        that do not depend on parameters.
    """
    group = next(group for group in groups(distribution) if group.name == name)
    if group.closed_score is not None:
        with torch.no_grad():
            parts = group.closed_score(value)
    else:
        log_prob = distribution.log_prob(value).sum()
        attached = [part for part in group.coordinates if part.requires_grad]
        found = iter(torch.autograd.grad(log_prob, attached, retain_graph=True))
        parts = tuple(
            next(found) if part.requires_grad else torch.zeros_like(part)
            for part in group.coordinates
        )
    shape = distribution.batch_shape
    return torch.cat([part.detach().reshape(*shape, -1) for part in parts], -1)


def family_of(distribution: dist.Distribution) -> str | None:
    """The row of `FAMILIES` a peeled distribution belongs to, or None.

    A subclass from outside torch and Pyro may change the density, so it has no family; Pyro's own
    `NanMaskedNormal` and `NanMaskedMultivariateNormal` do, where data are missing.
    """
    for kind in type(distribution).__mro__:
        if not kind.__module__.startswith(("torch.distributions", "pyro.distributions")):
            return None
        if kind.__module__ == "pyro.distributions.nanmasked":
            return None
        if kind.__name__ in FAMILIES:
            return kind.__name__
    return None


def groups(distribution: dist.Distribution) -> tuple[Group, ...]:
    """Fisher-orthogonal groups of a peeled distribution.

    Args:
        distribution: a distribution of one of the `FAMILIES`, wrappers removed.

    Returns:
        One `Group` per set of coordinates, batch shapes equal to the distribution's. A
        distribution without Fisher information, none of whose tensors depends on parameters, has
        one group of Fisher information 0, or none.

    Raises:
        NoFisher: if the distribution, or one that it is made of, depends on parameters and has no
            Fisher information.
        UnsupportedDistribution: for any other family, or when a tensor that the closed form
            treats as fixed depends on parameters.
    """
    _refuse_singular(distribution)
    if type(distribution).__name__ in SINGULAR:
        return _constants(distribution)
    family, row = type(distribution).__name__, _OWN.get(type(distribution))
    if row is None:
        family = family_of(distribution) or ""
        row = FAMILIES.get(family)
    if row is None:
        names = ", ".join(sorted(FAMILIES))
        raise UnsupportedDistribution(
            f"{type(distribution).__name__} has no closed-form Fisher information; "
            f"supported families: {names}; families.add says that of a family of your own"
        )
    function, fixed = row
    for name in fixed:
        if getattr(getattr(distribution, name), "requires_grad", False):
            raise UnsupportedDistribution(
                f"{name} of {family} depends on parameters, but the closed form treats it as fixed"
            )
    found = function(distribution)
    _refuse_uncovered(distribution, [part for group in found for part in group.coordinates])
    return found


def add(
    kind: type[dist.Distribution],
    function: Callable[[Any], tuple[Group, ...]],
    fixed: Sequence[str] = (),
) -> None:
    """Gives distributions of a class of your own a closed form of the Fisher information.

    Without one, their scores are simulated in training, and `Visible` refuses them. Subclasses are
    not meant: they may have another density.

    Args:
        kind: the class, from outside of torch and Pyro. Where it has `rsample`, guides that are
            made of it get `Full()` by default.
        function: a distribution → Fisher-orthogonal groups of its coordinates, which are tensors
            that it holds. `testing.family_fisher` is there to check it.
        fixed: names of tensors that the closed form treats as fixed.

    Raises:
        ValueError: if the class is of torch or Pyro, whose families are in `FAMILIES`.

    Example:
        >>> class Rescaled(dist.Exponential):
        ...     pass
        >>> add(Rescaled, lambda d: (Group("rate", (d.rate,), lambda: diagonal(d.rate**-2)),))
        >>> groups(Rescaled(torch.tensor(2.0)))[0].fisher
        tensor([[0.2500]])
    """
    if kind.__module__.startswith(("torch.distributions", "pyro.distributions")):
        raise ValueError(f"{kind.__name__} is of torch or Pyro, whose families are in FAMILIES")
    _OWN[kind] = function, tuple(fixed)


# --- refusals ----------------------------------------------------------------------------------


def _refuse_singular(distribution: dist.Distribution) -> None:
    """Looks for parts without Fisher information.

    Raises:
        NoFisher: if one depends on parameters.
    """
    for part in held_distributions(distribution):
        name = type(part).__name__
        if name in SINGULAR and any(t.requires_grad for t in distribution_tensors(part)):
            raise NoFisher(f"{SINGULAR[name]}, so there is no Fisher information")
        for argument in MOVING.get(name, ()):
            tensor = getattr(part, argument)
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                raise NoFisher(
                    f"{argument} of {name} depends on parameters and the support moves with it, "
                    "so there is no Fisher information"
                )


def _refuse_uncovered(distribution: dist.Distribution, coordinates: Sequence[Tensor]) -> None:
    """Looks for tensors that depend on parameters otherwise than the coordinates do.

    Raises:
        UnsupportedDistribution: if there are any.
    """
    known = {id(part) for part in coordinates}
    others = [
        tensor
        for tensor in distribution_tensors(distribution)
        if tensor.requires_grad and id(tensor) not in known
    ]
    attached = [_node_of(part) for part in coordinates if part.requires_grad]
    # Most tensors are found a few nodes behind the coordinates; a deep network is searched only
    # for those that are not.
    for limit in (64, None):
        if not others:
            return
        reached, _ = _behind(attached, frozenset(), limit)
        others = [tensor for tensor in others if not _behind([_node_of(tensor)], reached, limit)[1]]
    if others:
        raise UnsupportedDistribution(
            f"{type(distribution).__name__} holds a tensor of shape {tuple(others[0].shape)} that "
            "depends on parameters otherwise than through its coordinates, which the closed form "
            "would ignore"
        )


def _node_of(tensor: Tensor) -> Any:
    """The node of the autograd graph that a tensor comes from; of a leaf, its own."""
    return torch.autograd.graph.get_gradient_edge(tensor).node


def _behind(starts: Sequence[Any], stops: Set[Any], limit: int | None) -> tuple[set[Any], bool]:
    """Nodes of the autograd graph behind others, without those of `stops` and behind them.

    Args:
        starts: nodes, themselves counted.
        stops: nodes that are not passed.
        limit: number of nodes after which to give up, or None.

    Returns:
        The nodes, and whether no leaf is among them and none was left out.
    """
    queue, found, closed = deque(starts), set[Any](), True
    while queue:
        node = queue.popleft()
        if node is None or node in stops or node in found:
            continue
        if limit is not None and len(found) == limit:
            return found, False
        found.add(node)
        closed = closed and bool(node.next_functions)
        queue.extend(following for following, _ in node.next_functions)
    return found, closed


def _constants(distribution: Any) -> tuple[Group, ...]:
    """The arguments of a distribution that does not depend on parameters, as one group."""
    shape = distribution.batch_shape
    parts = {name: getattr(distribution, name, None) for name in distribution.arg_constraints}
    kept = {
        name: part
        for name, part in parts.items()
        if isinstance(part, Tensor) and part.shape == shape and part.is_floating_point()
    }
    if not kept:
        return ()
    weights = [torch.zeros_like(part) for part in kept.values()]
    return (Group(", ".join(kept), tuple(kept.values()), lambda: diagonal(*weights)),)


# --- mixtures with zero ------------------------------------------------------------------------


def zero_inflated(d: Any) -> tuple[Group, ...]:
    """F of the gate's logit and the coordinates of the base together.

    With g = P(gate), f the base's mass at 0, s its score there, p = g + (1 − g) f and the score
    v = [g (1 − g) (1 − f), (1 − g) f s] / p at 0, and Σ_{x>0} f(x) s(x) = −f s:

        F = p v vᵀ + (1 − g) [[g² (1 − f), g f sᵀ], [g f s, F_base − f s sᵀ]]

    Raises:
        UnsupportedDistribution: if the base has no closed form, or is continuous.
    """
    base = d.base_dist
    support: Any = base.support
    discrete = peel(base) is base and support.is_discrete
    inner = groups(base) if discrete else ()
    scores = [group.closed_score for group in inner]
    if not inner or None in scores:
        raise UnsupportedDistribution(
            f"ZeroInflatedDistribution of {family_name(base)} has no closed-form Fisher information"
        )
    shape = d.batch_shape
    # Pyro cannot expand a distribution that has computed one form of the gate from the other.
    given = vars(d).get("gate_logits")
    gate_logits: Tensor = probs_to_logits(d.gate, is_binary=True) if given is None else given
    coordinates = [gate_logits, *(part for group in inner for part in group.coordinates)]
    joined = torch.stack([part.expand(shape) for part in coordinates], -1)

    def base_score(x: Tensor) -> Tensor:
        parts = [part for function in scores if function is not None for part in function(x)]
        return torch.stack(torch.broadcast_tensors(*parts), -1)

    def at_zero() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """G and f `[*batch, 1]`, s and v `[*batch, size]`."""
        zero = torch.zeros_like(joined[..., 0])
        gate = gate_logits.sigmoid().unsqueeze(-1)
        mass = base.log_prob(zero).exp().unsqueeze(-1)
        s = base_score(zero)
        v = torch.cat([gate * (1 - gate) * (1 - mass), (1 - gate) * mass * s], -1)
        return gate, mass, s, v / (gate + (1 - gate) * mass)

    def fisher() -> Tensor:
        gate, mass, s, v = at_zero()
        total = gate + (1 - gate) * mass
        plain = torch.cat([-gate, s], -1)
        blocks = [group.fisher.expand(*shape, group.size, group.size) for group in inner]
        whole = _block_diagonal([(gate**2).unsqueeze(-1), *blocks])
        # Without what the base has at 0.
        found = (1 - gate).unsqueeze(-1) * (
            whole - mass.unsqueeze(-1) * plain.unsqueeze(-1) * plain.unsqueeze(-2)
        )
        return found + total.unsqueeze(-1) * v.unsqueeze(-1) * v.unsqueeze(-2)

    def closed_score(x: Tensor) -> Scores:
        gate, _, _, v = at_zero()
        plain = torch.cat([-gate, base_score(x)], -1)
        return (torch.where((x == 0).unsqueeze(-1), v, plain),)

    name = ", ".join(["gate_logits", *(group.name for group in inner)])
    return (Group(name, (joined,), fisher, 1, closed_score=closed_score),)


def _block_diagonal(blocks: Sequence[Tensor]) -> Tensor:
    """Block-diagonal matrices `[*batch, size, size]`."""
    size = sum(block.shape[-1] for block in blocks)
    found = blocks[0].new_zeros(*blocks[-1].shape[:-2], size, size)
    start = 0
    for block in blocks:
        stop = start + block.shape[-1]
        found[..., start:stop, start:stop] = block
        start = stop
    return found


# --- the table ---------------------------------------------------------------------------------

_normal = forms.location_scale(1, 2)

FAMILIES: dict[str, tuple[Callable[..., tuple[Group, ...]], tuple[str, ...]]] = {
    "AffineBeta": (forms.affine_beta, ("loc", "scale")),
    "AsymmetricLaplace": (forms.asymmetric_laplace, ()),
    "Bernoulli": (forms.bernoulli, ()),
    "Beta": (forms.beta, ()),
    "Binomial": (forms.binomial, ("total_count",)),
    "Categorical": (joint_forms.categorical, ()),
    "Cauchy": (forms.location_scale(1 / 2, 1 / 2), ()),
    "Chi2": (forms.chi2, ()),
    "CoalescentTimes": (joint_forms.coalescent_times, ("leaf_times",)),
    "ContinuousBernoulli": (forms.continuous_bernoulli, ()),
    "Dirichlet": (joint_forms.dirichlet, ()),
    "ExpRelaxedCategorical": (joint_forms.relaxed_categorical, ("temperature",)),
    "Exponential": (forms.exponential, ()),
    "FisherSnedecor": (forms.fisher_snedecor, ()),
    "Gamma": (forms.gamma, ()),
    "GeneralizedPareto": (forms.generalized_pareto, ("loc",)),
    "Geometric": (forms.geometric, ()),
    "Gumbel": (forms.gumbel, ()),
    "HalfCauchy": (forms.pure_scale(1 / 2), ()),
    "HalfNormal": (forms.pure_scale(2), ()),
    "InverseGamma": (forms.gamma, ()),
    "Kumaraswamy": (forms.kumaraswamy, ()),
    "LKJCholesky": (joint_forms.lkj_cholesky, ()),
    "Laplace": (forms.location_scale(1, 1), ()),
    "LogNormal": (_normal, ()),
    "Logistic": (forms.location_scale(1 / 3, (math.pi**2 + 3) / 9), ()),
    "LogitRelaxedBernoulli": (forms.relaxed_bernoulli, ("temperature",)),
    "LowRankMultivariateNormal": (joint_forms.low_rank_multivariate_normal, ()),
    "Multinomial": (joint_forms.multinomial, ("total_count",)),
    "MultivariateNormal": (joint_forms.multivariate_normal, ()),
    "MultivariateStudentT": (joint_forms.multivariate_student_t, ()),
    "NegativeBinomial": (forms.negative_binomial, ("total_count",)),
    "Normal": (_normal, ()),
    "OneHotCategorical": (joint_forms.categorical, ()),
    "Pareto": (forms.pareto, ("scale",)),
    "Poisson": (forms.poisson, ()),
    "RelaxedBernoulli": (forms.relaxed_bernoulli, ("temperature",)),
    "RelaxedOneHotCategorical": (joint_forms.relaxed_categorical, ("temperature",)),
    "SkewLogistic": (forms.skew_logistic, ()),
    # Density sech(z) / (π s): E tanh² z = 1/2 and 1 + E z² sech² z = π²/8, by parts.
    "SoftLaplace": (forms.location_scale(1 / 2, math.pi**2 / 8), ()),
    "SpanningTree": (joint_forms.spanning_tree, ()),
    "StudentT": (forms.student_t, ()),
    "VonMises": (forms.von_mises, ()),
    "VonMises3D": (joint_forms.von_mises_3d, ()),
    "Weibull": (forms.weibull, ()),
    "Wishart": (joint_forms.wishart, ()),
    "ZeroInflatedDistribution": (zero_inflated, ()),
}
"""Family → (groups, names of the tensors that the closed form treats as fixed).

Subclasses of torch and Pyro belong to the row of their base, as `OrderedLogistic` to Categorical.
"""

_OWN: dict[type[dist.Distribution], tuple[Callable[[Any], tuple[Group, ...]], tuple[str, ...]]] = {}
"""The same for classes that users have added."""

MOVING: dict[str, tuple[str, ...]] = {
    "AffineBeta": ("loc", "scale"),
    "Binomial": ("total_count",),
    "CoalescentTimes": ("leaf_times",),
    "GeneralizedPareto": ("loc",),
    "Pareto": ("scale",),
}
"""Family → names of the tensors with which its support moves."""

SINGULAR: dict[str, str] = {
    "Delta": "the point of Delta moves with its parameters",
    "Empirical": "Empirical has no density in its parameters",
    "ImproperUniform": "ImproperUniform is not normalized",
    "Uniform": "the support of Uniform moves with its parameters",
    "Unit": "Unit is a factor, no distribution",
}
"""Distributions without Fisher information, and why."""

REPARAMETRIZED = frozenset({
    "AffineBeta",
    "AsymmetricLaplace",
    "Beta",
    "Cauchy",
    "Chi2",
    "ContinuousBernoulli",
    "Dirichlet",
    "ExpRelaxedCategorical",
    "Exponential",
    "FisherSnedecor",
    "Gamma",
    "GeneralizedPareto",
    "Gumbel",
    "HalfCauchy",
    "HalfNormal",
    "InverseGamma",
    "Kumaraswamy",
    "Laplace",
    "LogNormal",
    "Logistic",
    "LowRankMultivariateNormal",
    "MultivariateNormal",
    "MultivariateStudentT",
    "Normal",
    "Pareto",
    "RelaxedBernoulli",
    "RelaxedOneHotCategorical",
    "SkewLogistic",
    "SoftLaplace",
    "StudentT",
    "Weibull",
    "Wishart",
})
"""Rows of `FAMILIES` whose draws are differentiable in the parameters."""


def is_reparametrized(family: str) -> bool:
    """Whether draws of a family, named as `family_name` does, are differentiable."""
    inner = family.removeprefix("TransformedDistribution(").removesuffix(")")
    own = {kind.__name__ for kind in _OWN if kind.has_rsample}
    return inner in REPARAMETRIZED | own
