"""Jacobians and products with them, sample values held fixed."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from pyronat.autograd import SampleGate

MAX_JACOBIAN_ENTRIES = 2**14
"""Largest number of entries of a block that is not linear: columns of a Jacobian."""


def jacobian(coordinates: Tensor, params: Sequence[Tensor], gate: SampleGate) -> Tensor:
    """Jacobian of a flattened tensor, sample values held fixed.

    Rows are vector-Jacobian products; with fewer parameters than coordinates, columns are taken
    instead, by differentiating the product with respect to its cotangent.

    Args:
        coordinates: tensor `[*shape]` with n elements.
        params: leaves with p entries in all.
        gate: the sample values.

    Returns:
        Tensor `[n, p]`, detached; a parameter that the coordinates do not reach gives zeros.
    """
    flat = coordinates.reshape(-1)
    size = sum(param.numel() for param in params)
    if not flat.requires_grad:
        return flat.new_zeros(flat.numel(), size)
    if flat.numel() <= size:
        eye = torch.eye(flat.numel(), dtype=flat.dtype, device=flat.device)
        rows = vector_jacobian_products([flat], params, [eye], gate)
        return torch.cat(
            [
                flat.new_zeros(flat.numel(), param.numel())
                if row is None
                else row.reshape(flat.numel(), -1)
                for row, param in zip(rows, params, strict=True)
            ],
            1,
        )
    with gate.closed():
        return _jacobian_by_columns(flat, params, size)


def vector_jacobian_products(
    outputs: Sequence[Tensor | GradientEdge],
    inputs: Sequence[Any],
    cotangents: Sequence[Tensor],
    gate: SampleGate,
) -> list[Tensor | None]:
    """Σ_outputs cᵀ ∂output/∂input for many cotangents c, sample values held fixed.

    Args:
        outputs: tensors `[*shape]`, or `GradientEdge`s of the graph.
        inputs: leaves, or such edges.
        cotangents: for each output `[num_cotangents, *shape]`.
        gate: the sample values.

    Returns:
        For each input `[num_cotangents, *input]`, detached, or None where no output reaches it.
    """
    attached = [isinstance(o, GradientEdge) or o.requires_grad for o in outputs]
    some: Any = [output for output, keep in zip(outputs, attached, strict=True) if keep]
    given = [cotangent for cotangent, keep in zip(cotangents, attached, strict=True) if keep]
    if not some or not inputs:
        return [None] * len(inputs)
    with gate.closed():
        found = _products_at_once(some, inputs, given) if len(given[0]) > 1 else None
        found = found or _products_in_turn(some, inputs, given)
    return [None if part is None else part.detach() for part in found]


def _products_at_once(
    outputs: Sequence[Any], inputs: Sequence[Any], cotangents: Sequence[Tensor]
) -> Sequence[Tensor | None] | None:
    """Products of all cotangents in one batched pass, None where a function has no batched form."""
    with warnings.catch_warnings():
        # Of the time that operations without a batching rule take.
        warnings.filterwarnings("ignore", "There is a performance drop")
        try:
            return torch.autograd.grad(
                outputs,
                inputs,
                cotangents,
                is_grads_batched=True,
                retain_graph=True,
                allow_unused=True,
            )
        except RuntimeError:
            return None


def _products_in_turn(
    outputs: Sequence[Any], inputs: Sequence[Any], cotangents: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    """Products of one cotangent after the other."""
    each = [
        torch.autograd.grad(outputs, inputs, row, retain_graph=True, allow_unused=True)
        for row in zip(*cotangents, strict=True)
    ]
    if len(each) == 1:
        return [None if part is None else part.unsqueeze(0) for part in each[0]]
    return [None if parts[0] is None else torch.stack(parts) for parts in zip(*each, strict=True)]


def _jacobian_by_columns(flat: Tensor, params: Sequence[Tensor], size: int) -> Tensor:
    cotangent = torch.zeros_like(flat, requires_grad=True)
    products = torch.autograd.grad(
        flat, params, cotangent, create_graph=True, retain_graph=True, allow_unused=True
    )
    filled = [
        torch.zeros_like(param) if product is None else product
        for product, param in zip(products, params, strict=True)
    ]
    product = torch.cat([part.reshape(-1) for part in filled])
    if not product.requires_grad:
        return flat.new_zeros(flat.numel(), size)
    eye = torch.eye(size, dtype=flat.dtype, device=flat.device)
    (columns,) = torch.autograd.grad(
        product, cotangent, eye, is_grads_batched=True, retain_graph=True
    )
    return columns.detach().mT
