"""Which labeled values an operation's result depends on, seen below autograd.

Labels live in a mirror of the storage: every storage that carries labels has a *shadow*, an
integer tensor of the same layout whose bits are labels. Views share storage, so they share labels
without any rule; detached, indexed, in-place and no-grad operations are all seen, because every
operation passes the dispatcher. An unknown operation joins all its inputs into all its outputs: a
result may carry a label too many, never one too few. Values that leave for Python (`.item()`,
`if`, `.numpy()`) are recorded as escapes.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Labels = frozenset[str]

_PLANE = 62
"""Labels in one plane of a shadow: bits of a signed 64-bit integer."""

_ESCAPING = (Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.data_ptr, torch.tensor)
"""Functions that read values without passing the dispatcher."""


class Dataflow:
    """Follows labels through torch operations while active.

    Example:
        >>> flow = Dataflow(["a"])
        >>> a = torch.zeros(2)
        >>> with flow.active():
        ...     flow.mark(a, "a")
        ...     b = a.detach() + 1
        >>> sorted(flow.labels(b))
        ['a']
    """

    def __init__(self, labels: Sequence[str]) -> None:
        """Prepares shadows for a fixed set of labels."""
        self._bits = {label: divmod(index, _PLANE) for index, label in enumerate(labels)}
        self._planes = 1 + max(len(labels) - 1, 0) // _PLANE
        self._shadows: dict[int, tuple[Any, Tensor]] = {}
        self.escaped: Labels = frozenset()
        self.watching = False

    @contextmanager
    def active(self) -> Generator[None, None, None]:
        """Watches every operation in this context."""
        with ExitStack() as stack:
            stack.enter_context(_FunctionWatch(self))
            stack.enter_context(_DispatchWatch(self))
            self.watching = True
            try:
                yield
            finally:
                self.watching = False

    @contextmanager
    def paused(self) -> Generator[None, None, None]:
        """Lets operations pass unseen."""
        before, self.watching = self.watching, False
        try:
            yield
        finally:
            self.watching = before

    def mark(self, tensor: Tensor, label: str) -> None:
        """Gives every element of a tensor one label, and no other."""
        plane, bit = self._bits[label]
        with self.paused():
            shadow = self._shadow_of(tensor, create=True)
            assert shadow is not None
            shadow.zero_()
            shadow[plane] = 1 << bit

    def labels(self, *tensors: Tensor) -> Labels:
        """All labels that any element of the tensors carries."""
        with self.paused():
            joined = self._join_all(tensors)
        return frozenset() if joined is None else self._decode(joined)

    def escape(self, *tensors: Tensor) -> None:
        """Records that values left for Python."""
        self.escaped |= self.labels(*tensors)

    def propagate(self, function: Any, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Labels the outputs of an operation by its rule."""
        if function in _OVERWRITING:
            inputs = inputs[1:]
        if not any(self._shadow_of(tensor) is not None for tensor in inputs):
            for tensor in outputs:
                self._write(tensor, None)
            return
        rule = _rule_for(function)
        for tensor in outputs:
            self._write(tensor, rule(self, inputs, tensor))

    def join_all(self, inputs: Sequence[Tensor], output: Tensor) -> Tensor | None:
        """The safe rule: every output element depends on every input element."""
        joined = self._join_all(inputs)
        return None if joined is None else joined.reshape(-1, *[1] * output.dim())

    def join_pointwise(self, inputs: Sequence[Tensor], output: Tensor) -> Tensor | None:
        """The rule of pointwise operations: broadcast and join."""
        shadows = [shadow for shadow in map(self._shadow_of, inputs) if shadow is not None]
        if not shadows or any(shadow.dim() > output.dim() + 1 for shadow in shadows):
            return self.join_all(inputs, output)
        aligned = [
            shadow.reshape(len(shadow), *[1] * (output.dim() + 1 - shadow.dim()), *shadow.shape[1:])
            for shadow in shadows
        ]
        return reduce(torch.bitwise_or, aligned)

    def join_matrix_product(self, inputs: Sequence[Tensor], output: Tensor) -> Tensor | None:
        """The rule of `mm`: a row of the left factor, a column of the right one."""
        *added, left, right = inputs
        if output.dim() != 2 or left.dim() != 2 or right.dim() != 2:
            return self.join_all(inputs, output)
        parts = [
            self._reduced(left, 1),
            self._reduced(right, 0),
            *(self.join_pointwise([tensor], output) for tensor in added),
        ]
        known = [part for part in parts if part is not None]
        return reduce(torch.bitwise_or, known) if known else None

    def _reduced(self, tensor: Tensor, dim: int) -> Tensor | None:
        shadow = self._shadow_of(tensor)
        return None if shadow is None else _join_along(shadow, dim + 1)

    def _shadow_of(self, tensor: Tensor, create: bool = False) -> Tensor | None:
        if tensor.layout != torch.strided:
            return None
        storage = tensor.untyped_storage()
        entry = self._shadows.get(storage._cdata)
        if entry is None:
            if not create:
                return None
            size = max(storage.nbytes() // max(tensor.element_size(), 1), 1)
            # The storage is kept alive with its shadow, so that its address is not used again.
            entry = (storage, torch.zeros(self._planes, size, dtype=torch.int64))
            self._shadows[storage._cdata] = entry
        shadow = entry[1]
        return shadow.as_strided(
            (self._planes, *tensor.shape),
            (shadow.shape[1], *tensor.stride()),
            tensor.storage_offset(),
        )

    def _join_all(self, tensors: Iterable[Tensor]) -> Tensor | None:
        shadows = [shadow for shadow in map(self._shadow_of, tensors) if shadow is not None]
        if not shadows:
            return None
        return reduce(torch.bitwise_or, map(_join_elements, shadows))

    def _write(self, tensor: Tensor, labels: Tensor | None) -> None:
        if tensor.layout != torch.strided:
            if labels is not None:
                # As those of sparse tensors: they cannot be followed.
                self.escaped |= self._decode(_join_elements(labels))
            return
        shadow = self._shadow_of(tensor, create=labels is not None)
        if shadow is None:
            return
        # Elements of an expanded tensor share memory: their labels are joined by the caller.
        if labels is None:
            shadow.zero_()
        else:
            shadow.copy_(labels.expand(shadow.shape))

    def _decode(self, joined: Tensor) -> Labels:
        """The labels whose bits are set in joined planes `[planes]`."""
        planes = joined.tolist()
        return frozenset(
            label for label, (plane, bit) in self._bits.items() if planes[plane] >> bit & 1
        )


def _join_elements(shadow: Tensor) -> Tensor:
    """Bitwise or over all elements of a shadow, `[planes]`."""
    return _join_along(shadow.reshape(len(shadow), -1), 1).flatten()


def _join_along(shadow: Tensor, dim: int) -> Tensor:
    """Bitwise or along a dimension, which is kept with size 1."""
    while shadow.shape[dim] > 1:
        half = shadow.shape[dim] // 2
        left, right = shadow.narrow(dim, 0, half), shadow.narrow(dim, half, half)
        rest = shadow.narrow(dim, 2 * half, shadow.shape[dim] - 2 * half)
        shadow = torch.cat([left | right, rest], dim)
    if shadow.shape[dim] == 0:
        return shadow.new_zeros([1 if d == dim else n for d, n in enumerate(shadow.shape)])
    return shadow


Rule = Callable[[Dataflow, Sequence[Tensor], Tensor], "Tensor | None"]

_OVERWRITING = {
    torch.ops.aten.copy_.default,
    torch.ops.aten.fill_.Scalar,
    torch.ops.aten.fill_.Tensor,
    torch.ops.aten.zero_.default,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.full_like.default,
    torch.ops.aten.ones_like.default,
    torch.ops.aten.rand_like.default,
    torch.ops.aten.randn_like.default,
    torch.ops.aten.zeros_like.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_full.default,
    torch.ops.aten.new_ones.default,
    torch.ops.aten.new_zeros.default,
}
"""Operations that take from their first argument its shape or its memory, not its values."""

_MATRIX_PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}


def _rule_for(function: Any) -> Rule:
    if function in _MATRIX_PRODUCTS:
        return Dataflow.join_matrix_product
    pointwise = torch.Tag.pointwise in function.tags or function in {
        torch.ops.aten.clone.default,
        torch.ops.aten._to_copy.default,
        torch.ops.aten.copy_.default,
    }
    return Dataflow.join_pointwise if pointwise else Dataflow.join_all


class _DispatchWatch(TorchDispatchMode):
    """Sees every operation below autograd."""

    def __init__(self, flow: Dataflow) -> None:
        super().__init__()
        self.flow = flow

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        result = func(*args, **kwargs)
        if not self.flow.watching or func.is_view:
            return result
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if func is torch.ops.aten._local_scalar_dense.default or not outputs:
            self.flow.escape(*inputs)
        else:
            with self.flow.paused():
                self.flow.propagate(func, inputs, outputs)
        return result


class _FunctionWatch(TorchFunctionMode):
    """Sees the few functions that read values without passing the dispatcher."""

    def __init__(self, flow: Dataflow) -> None:
        super().__init__()
        self.flow = flow

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if not self.flow.watching:
            return func(*args, **kwargs)
        if func in _ESCAPING:
            self.flow.escape(*[leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)])
        if func is Tensor.__getitem__ and _has_scalar_index(args[1]):
            return self._select(*args)
        return func(*args, **kwargs)

    def _select(self, tensor: Tensor, index: Any) -> Tensor:
        """`tensor[z]` with a 0-d integer z: torch turns z into a Python number; it is data."""
        with self.flow.paused():
            result = tensor[index].clone()
            inputs = [tensor, *(leaf for leaf in tree_leaves(index) if isinstance(leaf, Tensor))]
            self.flow._write(result, self.flow.join_all(inputs, result))
        return result


def _has_scalar_index(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return any(
        isinstance(part, Tensor) and part.dim() == 0 and not part.is_floating_point()
        for part in parts
    )
