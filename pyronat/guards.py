"""Checks of numbers before and after a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pyronat.errors import InvalidData, NonFiniteStep


@torch.no_grad()
def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all entries are finite, with one transfer from the device."""
    sums = [tensor.sum() for tensor in tensors]
    if not sums:
        return True
    if len({(part.device, part.dtype) for part in sums}) > 1:
        sums = [part.to(sums[0]) for part in sums]
    return math.isfinite(torch.stack(sums).sum().item())


@contextmanager
def explained(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Generator[None, None, None]:
    """Names the arguments where they are why Pyro or torch raise.

    Args:
        args: arguments of model and guide.
        kwargs: their keyword arguments.

    Yields:
        Nothing.

    Raises:
        InvalidData: if an argument is not finite, or a plate is empty.
        ValueError: as Pyro or torch raise it.
        RuntimeError: as Pyro or torch raise it.
    """
    try:
        yield
    except ZeroDivisionError as error:
        raise InvalidData(f"a plate has no elements, the batch is empty: {error}") from error
    except (ValueError, RuntimeError) as error:
        if not _is_finite((args, kwargs)):
            raise InvalidData(f"an argument holds NaN or infinite values: {error}") from error
        raise


@contextmanager
def inside_domain(last_kl: Callable[[], float | None]) -> Generator[None, None, None]:
    """Blames the last step where a distribution's parameters have left their domain.

    Args:
        last_kl: tells the divergence of the last step in nats, or None if there was none.

    Yields:
        Nothing.

    Raises:
        NonFiniteStep: if there was a step, and a distribution refuses its parameters.
        ValueError: as Pyro or torch raise it for any other reason.
    """
    try:
        yield
    except ValueError as error:
        divergence = last_kl() if "satisfy the constraint" in str(error) else None
        if divergence is None:
            raise
        reason = str(error).splitlines()[0]
        raise NonFiniteStep(
            f"the last step, of {divergence:.3g} nats, has moved a distribution out of its domain; "
            f"lower lr, or bound steps with trust_region=KLTrustRegion(1.0): {reason}"
        ) from error


def _is_finite(arguments: Any) -> bool:
    return all(
        bool(torch.isfinite(leaf).all())
        for leaf in tree_leaves(arguments)
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    )
