"""Parameters and nested states, to be compared bit by bit."""

from typing import Any

import pyro
import torch
from torch import Tensor


def parameters() -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in pyro.get_param_store().named_parameters()}


def same(first: Any, second: Any) -> bool:
    """Bit-identity of nested states."""
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)
