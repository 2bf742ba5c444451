"""What distributions are made of: their wrappers, their base, the tensors that they hold."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from functools import cache, partial
from numbers import Number
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Transform, TransformedDistribution
from torch.distributions.constraints import Constraint
from torch.distributions.utils import lazy_property

WRAPPERS = frozenset({"Independent", "ExpandedDistribution", "MaskedDistribution"})
"""Wrappers that leave single elements as they are."""
TRANSFORMED = frozenset({"TransformedDistribution", "LogisticNormal", "LKJ"})
"""Distributions of a transformed variable, whose Fisher information is that of the variable."""
_PLAIN = (Number, str, type(None), torch.Size, torch.dtype, torch.device, Constraint)
_HOLDERS = (Distribution, Transform, torch.nn.Module, list, tuple, dict, partial)


def wrappers(distribution: Distribution) -> Iterator[Any]:
    """The wrappers of a distribution that has the Fisher information of its base, outermost first.

    `Independent`, `ExpandedDistribution`, `MaskedDistribution`, and transformed distributions
    whose transforms are one-to-one and hold nothing that depends on parameters: a change of
    variables that does not move changes no score. Families that torch builds by transforms, as
    `LogNormal`, are no wrappers.

    Args:
        distribution: of a site.

    Yields:
        Distributions with a `base_dist`; that of the last one is the base.
    """
    inner: Any = distribution
    while _is_wrapper(inner):
        yield inner
        inner = inner.base_dist


def peel(distribution: Distribution) -> Distribution:
    """The innermost distribution, without its `wrappers`."""
    inner: Any = distribution
    for wrapper in wrappers(distribution):
        inner = wrapper.base_dist
    found: Distribution = inner
    return found


def is_transformed(wrapper: Distribution) -> bool:
    """Whether a wrapper is a transformed distribution."""
    return type(wrapper).__name__ in TRANSFORMED


def base_value(distribution: Distribution, value: Tensor) -> Tensor:
    """A value of a distribution as a value of its peeled base.

    Args:
        distribution: with its wrappers.
        value: `[*batch, *event]`.

    Returns:
        The value with all transforms undone, detached where there are any.
    """
    # Straight-through draws remember the relaxed value that their density is of.
    value = getattr(value, "_unquantize", value)
    for wrapper in wrappers(distribution):
        if is_transformed(wrapper):
            with torch.no_grad():
                for transform in reversed(wrapper.transforms):
                    value = transform.inv(value)
    return value


def family_name(distribution: Distribution) -> str:
    """What reports call the family, as `LogNormal` or `TransformedDistribution(Normal)`."""
    name = type(peel(distribution)).__name__
    for wrapper in reversed(list(wrappers(distribution))):
        kind = type(wrapper).__name__
        if is_transformed(wrapper):
            name = f"{kind}({name})" if kind == "TransformedDistribution" else kind
    return name


def _is_wrapper(distribution: Any) -> bool:
    kind = type(distribution)
    if kind.__name__ in WRAPPERS:
        return True
    if kind.__name__ not in TRANSFORMED or not kind.__module__.startswith((
        "torch.distributions",
        "pyro.distributions",
    )):
        return False
    base = distribution.base_dist
    # A mask within would hide the density but not the Jacobian; the density of a discrete base
    # is no density of the transformed variable.
    while _is_wrapper(base):
        if type(base).__name__ == "MaskedDistribution":
            return False
        base = base.base_dist
    return not base.has_enumerate_support and all(map(_is_constant, distribution.transforms))


def _is_constant(transform: Transform) -> bool:
    """Whether a transform is one-to-one, and all it holds is known not to depend on parameters."""
    if not transform.bijective:
        return False
    stack: list[Any] = [transform]
    seen: set[int] = set()
    while stack:
        item = stack.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            if item.requires_grad:
                return False
        elif isinstance(item, (list, tuple)):
            stack.extend(item)
        elif isinstance(item, (Transform, Distribution)) and not isinstance(item, torch.nn.Module):
            stack.extend(_attributes(item).values())
        elif not isinstance(item, (*_PLAIN, weakref.ref)):
            # A module, a function: who knows what it reads.
            return False
    return True


def distribution_tensors(distribution: Distribution) -> list[Tensor]:
    """All tensors that a distribution and the distributions and transforms in it hold."""
    return [tensor for alternatives in held_tensors(distribution) for tensor in alternatives]


def held_distributions(distribution: Distribution) -> Iterator[Distribution]:
    """A distribution and all that it is made of.

    Args:
        distribution: with its wrappers.

    Yields:
        Itself, its bases, its components, and so on.
    """
    stack: list[Any] = [distribution]
    seen: set[int] = set()
    while stack:
        item = stack.pop()
        if id(item) in seen or isinstance(item, (torch.Size, torch.nn.Module)):
            continue
        seen.add(id(item))
        if isinstance(item, Distribution):
            yield item
        parts = item if isinstance(item, (list, tuple)) else _attributes(item).values()
        stack.extend(part for part in parts if isinstance(part, _HOLDERS))


def clear_caches(distribution: Distribution, met: set[int]) -> None:
    """Makes the transforms of a distribution forget what they have computed last.

    A value that they meet again has the inverse then that their parameters give it now.

    Args:
        distribution: with its wrappers.
        met: identities of transforms that are left alone; those of the distribution are added.
    """
    layer: Any = distribution
    while layer is not None:
        if isinstance(layer, TransformedDistribution):
            stack = list(layer.transforms)
            while stack:
                transform = stack.pop()
                if id(transform) in met:
                    continue
                met.add(id(transform))
                transform._cached_x_y = None, None
                for part in _attributes(transform).values():
                    parts = part if isinstance(part, (list, tuple)) else [part]
                    stack.extend(inner for inner in parts if isinstance(inner, Transform))
        layer = getattr(layer, "base_dist", None)


def held_tensors(distribution: Distribution) -> list[tuple[Tensor, ...]]:
    """Tensors that a distribution holds, those together that are computed from one of them.

    Distributions keep what they compute on demand, as probabilities of logits. Which ones they
    hold thus depends on what has been asked of them.

    Args:
        distribution: with its wrappers.

    Returns:
        Tuples of one tensor, or of one tensor and what has been computed from it, in any order.
    """
    found: list[tuple[Tensor, ...]] = []
    stack: list[Any] = [distribution]
    seen: set[int] = set()
    while stack:
        item = stack.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        listed = isinstance(item, (list, tuple))
        named = list(enumerate(item)) if listed else list(_attributes(item).items())
        kind: Any = type(item)
        lazy = _computed_on_demand(kind)
        alternatives = []
        for name, part in named:
            if name in lazy and str(name).startswith("_"):
                continue  # computed from the others, as the rate that a count is drawn from
            if isinstance(part, Tensor):
                if name in lazy or name == "_param":
                    alternatives.append(part)
                elif id(part) not in seen:
                    seen.add(id(part))
                    found.append((part,))
            elif isinstance(part, _HOLDERS) and not isinstance(part, torch.Size):
                stack.append(part)
        if alternatives and not any(str(name).startswith("_unbroadcasted") for name, _ in named):
            # Not even `_param` tells which one was given: an expanded distribution has there what
            # the original had computed.
            found.append(tuple(alternatives))
    return found


def _attributes(item: Any) -> dict[Any, Any]:
    if isinstance(item, dict):
        return item
    if isinstance(item, partial):
        # Conditional transforms bind their context so.
        return {"func": item.func, **dict(enumerate(item.args)), **item.keywords}
    # Transforms remember what they have computed last.
    return {
        name: part
        for name, part in vars(item).items()
        if not (name.startswith("_") and "cache" in name)
    }


@cache
def _computed_on_demand(kind: Any) -> frozenset[str]:
    return frozenset(
        name
        for ancestor in getattr(kind, "__mro__", ())
        for name, attribute in vars(ancestor).items()
        if isinstance(attribute, lazy_property)
    )
