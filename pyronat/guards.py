"""Checks of numbers before and after a step."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pyronat.errors import InvalidData


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all entries are finite, with one transfer from the device."""
    sums = [tensor.detach().sum() for tensor in tensors]
    if not sums:
        return True
    first = sums[0]
    return bool(torch.isfinite(torch.stack([part.to(first) for part in sums])).all())


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


def _is_finite(arguments: Any) -> bool:
    return all(
        bool(torch.isfinite(leaf).all())
        for leaf in tree_leaves(arguments)
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    )
