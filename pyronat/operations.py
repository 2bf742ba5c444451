"""One call of an operation of the dispatcher, and joins that many rules share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from pyronat.lattices import Lattice

Reader: TypeAlias = Callable[[Tensor], Tensor]
"""Tensor → shadow `[planes, *shape]`."""

Shadows: TypeAlias = "Tensor | Sequence[Tensor | None] | None"
"""The shadow of all outputs, or one for each; None where everything is to be joined."""


NOT_APPLICABLE = (RuntimeError, NotImplementedError, TypeError, IndexError, ValueError)
"""What a rule raises that cannot deal with a call."""

_OVERWRITING = frozenset(
    "copy fill zero empty_like full_like ones_like rand_like randn_like randint_like zeros_like "
    "new_empty new_emptyis_strided new_full new_ones new_zeros uniform exponential random "
    "log_normal cauchy geometric".split()
)
"""Operations that take from their first argument its shape or its memory, not its values."""


@dataclass
class Operation:
    """One call of an operation of the dispatcher.

    Attributes:
        name: its name without the mark of in-place variants.
        arguments: its arguments by name.
        read: tensors whose values it reads.
        pointwise: whether torch declares it pointwise.
        changed: tensors that it changes in place.
        is_range: whether the program made a tensor by counting.
        sizing: tensors whose values decide on the size of its result, which Python can see.
        result: what it returned.
    """

    name: str
    arguments: dict[str, Any]
    read: list[Tensor]
    pointwise: bool
    changed: list[Tensor]
    sizing: list[Tensor] = field(default_factory=list)
    is_range: Callable[[Tensor], bool] = lambda tensor: False
    result: Any = None

    @classmethod
    def of(cls, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Operation:
        """Describes a call before it is made."""
        kind = _kind(func)
        arguments = {**dict(zip(kind.arguments, args, strict=False)), **kwargs}
        unread = kind.arguments[0] if kind.overwrites else None
        read = tensors_in([value for key, value in arguments.items() if key != unread])
        sizing: list[Tensor] = []
        if kind.sized_by_values:
            dtypes = {torch.bool, torch.uint8} if kind.name == "index" else None
            values = arguments.get("mask", arguments.get("indices", read))
            sizing = [t for t in tensors_in(values) if dtypes is None or t.dtype in dtypes]
        return cls(
            name=kind.name,
            arguments=arguments,
            read=read,
            pointwise=kind.pointwise,
            changed=tensors_in([arguments.get(name) for name in kind.changed]),
            sizing=sizing,
        )

    @property
    def written(self) -> list[Tensor]:
        """The tensors it returned, then those it changed but did not return."""
        found = tensors_in(self.result)
        if not self.changed:
            return found
        returned = {id(tensor) for tensor in found}
        pointers = {tensor.untyped_storage()._cdata for tensor in found if is_strided(tensor)}
        return found + [
            tensor
            for tensor in self.changed
            if id(tensor) not in returned
            and not (is_strided(tensor) and tensor.untyped_storage()._cdata in pointers)
        ]

    def __getitem__(self, name: str) -> Any:
        """An argument by name, None where it is not given."""
        return self.arguments.get(name)

    def dims(self, tensor: Tensor, name: str = "dim") -> tuple[int, ...]:
        """Dimensions of a tensor that an argument names, all of them by default."""
        dim = self[name]
        if dim is None or (isinstance(dim, (list, tuple)) and not dim):
            return tuple(range(tensor.dim()))
        given = [dim] if isinstance(dim, int) else dim
        return tuple(d % max(tensor.dim(), 1) for d in given)


class _Kind(NamedTuple):
    """What the schema of an operation says."""

    name: str
    arguments: tuple[str, ...]
    changed: tuple[str, ...]
    overwrites: bool
    pointwise: bool
    sized_by_values: bool


@cache
def _kind(func: Any) -> _Kind:
    schema = func._schema
    arguments = tuple(argument.name for argument in schema.arguments)
    name = func.overloadpacket.__name__
    name = name[:-1] if name.endswith("_") and not name.endswith("__") else name
    return _Kind(
        name=name,
        arguments=arguments,
        changed=tuple(
            argument.name
            for argument in schema.arguments
            if argument.alias_info is not None and argument.alias_info.is_write
        ),
        overwrites=name in _OVERWRITING and bool(arguments),
        pointwise=torch.Tag.pointwise in func.tags,
        sized_by_values=torch.Tag.dynamic_output_shape in func.tags,
    )


def tensors_in(tree: Any) -> list[Tensor]:
    """All tensors in nested lists, tuples and dicts."""
    found = []
    stack = [tree]
    while stack:
        part = stack.pop()
        if isinstance(part, Tensor):
            found.append(part)
        elif isinstance(part, (list, tuple)):
            stack.extend(reversed(part))
        elif isinstance(part, dict):
            stack.extend(reversed(part.values()))
    return found


def is_strided(tensor: Tensor) -> bool:
    """Whether a tensor has a storage with strides, which labels can mirror."""
    return tensor.layout == torch.strided


def fits(shadow: Tensor, tensor: Tensor) -> bool:
    """Whether a shadow can be broadcast to the shape of a tensor."""
    if shadow.dim() != tensor.dim() + 1:
        return False
    return all(a in {1, b} for a, b in zip(shadow.shape[1:], tensor.shape, strict=True))


def spread(joined: Tensor, tensor: Tensor) -> Tensor:
    """A joined set `[planes]` as the shadow of a tensor, to be broadcast."""
    return joined.reshape(-1, *[1] * tensor.dim())


def everything(operation: Operation, read: Reader, lattice: Lattice) -> Tensor:
    """All elements of all inputs, `[planes]`."""
    joined = [lattice.join_elements(read(tensor)) for tensor in operation.read]
    return lattice.join_many(joined)


def aligned(shadows: Sequence[Tensor], output: Tensor, lattice: Lattice) -> Tensor | None:
    """The join of shadows broadcast to an output, or None where they do not fit it."""
    width = output.dim() + 1
    if any(shadow.dim() > width for shadow in shadows):
        return None
    placed = [
        shadow.reshape(len(shadow), *[1] * (width - shadow.dim()), *shadow.shape[1:])
        for shadow in shadows
    ]
    return lattice.join_many(placed)
