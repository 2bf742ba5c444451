"""What the elements of tensors depend on, followed below autograd while a program runs.

Labels live in a mirror of the storage: every storage that carries labels has a shadow of the same
layout. Views share storage, so they share labels without any rule; detached, indexed, in-place and
no-grad operations are all seen, because every operation passes the dispatcher. `flow_rules` says
how an operation joins its inputs; an unknown operation joins all of them into all its outputs: a
result may depend on too much, never on too little. Values that leave for Python (`.item()`, `if`,
`.numpy()`) are recorded as escapes.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from pyronat.flow_rules import result_shadows
from pyronat.lattices import Lattice
from pyronat.operations import Operation, tensors_in

_READING = frozenset({Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.data_ptr, torch.tensor})
"""Functions that read values without passing the dispatcher."""

_RESHAPING_IN_PLACE = frozenset(
    "squeeze unsqueeze t transpose swapdims swapaxes as_strided detach".split()
)
"""Operations whose in-place variants leave the memory as it is."""

_BUILDING = frozenset({torch.tensor, torch.as_tensor, torch.asarray})
"""Functions that make a tensor of a nested list, whose numbers may be tensors."""


class Dataflow:
    """Follows what tensor elements depend on, while active.

    Args:
        lattice: represents sets of labels and joins them.

    Attributes:
        escaped: labels of all values that have left for Python, `[planes]`.
        indexed_by_scalars: whether a 0-d tensor has indexed one that carries labels.

    Example:
        >>> from pyronat.lattices import LabelSets
        >>> sets = LabelSets(["a", "b"])
        >>> flow = Dataflow(sets)
        >>> a = torch.zeros(2)
        >>> with flow.active():
        ...     flow.mark(a, sets.of("a"))
        ...     b = a.detach() + 1
        >>> sets.decode(flow.joined(b))
        frozenset({'a'})
    """

    def __init__(self, lattice: Lattice) -> None:
        self.lattice = lattice
        self.escaped = torch.zeros(lattice.planes, dtype=torch.int64, device="cpu")
        self.indexed_by_scalars = False
        self.watching = False
        self._memory: dict[int, _Mirror] = {}
        self._ranges: dict[int, Any] = {}

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
        if not self.watching:
            yield
            return
        self.watching = False
        try:
            with torch._C.DisableTorchFunction(), _disable_current_modes():
                yield
        finally:
            self.watching = True

    def mark(self, tensor: Tensor, labels: Tensor) -> None:
        """Gives a tensor labels, and no others.

        Args:
            tensor: any tensor with a storage.
            labels: `[planes]`, the same for all elements, or a shadow `[planes, *shape]`.
        """
        with self.paused():
            width = labels.dim() - 1
            spread = labels.reshape(
                len(labels), *[1] * (tensor.dim() - width if width == 0 else 0), *labels.shape[1:]
            )
            self.write(tensor, spread.expand(len(labels), *tensor.shape))

    def shadow(self, tensor: Tensor) -> Tensor:
        """What each element depends on, `[planes, *shape]`."""
        with self.paused():
            return self._read(tensor)

    def joined(self, *tensors: Tensor) -> Tensor:
        """What any element of the tensors depends on, `[planes]`."""
        with self.paused():
            marked = [tensor for tensor in tensors if self.carries(tensor)]
            sets = [self.lattice.join_elements(self._read(tensor)) for tensor in marked]
            nothing = torch.zeros(self.lattice.planes, dtype=torch.int64, device="cpu")
            return self.lattice.join_many([nothing, *sets])

    def escape(self, *tensors: Tensor) -> None:
        """Records that values left for Python."""
        found = self.joined(*tensors)
        with self.paused():
            self.escaped = self.lattice.join(self.escaped, found)

    def carries(self, tensor: Tensor) -> bool:
        """Whether the memory of a tensor carries labels."""
        return tensor.layout == torch.strided and _address(tensor) in self._memory

    def concerns(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether a call has to do with labels, or counts."""
        if func.overloadpacket is torch.ops.aten.arange:
            return True
        known, ranges = self._memory, self._ranges
        for part in args if not kwargs else (*args, *kwargs.values()):
            if isinstance(part, Tensor):
                if part.layout != torch.strided or (at := _address(part)) in known or at in ranges:
                    return True
            elif isinstance(part, (list, tuple)) and any(
                tensor.layout != torch.strided or _address(tensor) in known
                for tensor in tensors_in(part)
            ):
                return True
        return False

    def propagate(self, operation: Operation) -> None:
        """Labels the outputs of an operation by its rule."""
        if operation.changed and operation.name in _RESHAPING_IN_PLACE:
            return
        if operation.sizing:
            self.escape(*operation.sizing)
        for tensor in operation.changed:
            self._ranges.pop(_address(tensor) if tensor.layout == torch.strided else 0, None)
        if operation.name == "arange":
            for tensor in operation.written:
                self._ranges[_address(tensor)] = tensor.untyped_storage()
        operation.is_range = lambda tensor: _address(tensor) in self._ranges
        if not any(map(self.carries, operation.read)):
            for tensor in operation.written:
                self.write(tensor, None)
            return
        shadows = result_shadows(operation, self._read, self.lattice)
        for tensor, shadow in zip(operation.written, shadows, strict=True):
            self.write(tensor, shadow)

    def _read(self, tensor: Tensor) -> Tensor:
        planes = self.lattice.planes
        mirror = self._memory.get(_address(tensor)) if tensor.layout == torch.strided else None
        if mirror is None:
            return torch.zeros(planes, *[1] * tensor.dim(), dtype=torch.int64, device="cpu").expand(
                planes, *tensor.shape
            )
        if mirror.element_size != tensor.element_size():
            everything = self.lattice.join_elements(mirror.labels)
            return everything.reshape(planes, *[1] * tensor.dim()).expand(planes, *tensor.shape)
        return mirror.view(tensor)

    def write(self, tensor: Tensor, shadow: Tensor | None) -> None:
        """Replaces the labels of a tensor's memory, None for nothing."""
        if tensor.layout != torch.strided:
            if shadow is not None:
                # As those of sparse tensors: they cannot be followed.
                self.escaped = self.lattice.join(self.escaped, self.lattice.join_elements(shadow))
            return
        mirror = self._memory.get(_address(tensor))
        if mirror is None:
            if shadow is None:
                return
            mirror = self._memory[_address(tensor)] = _Mirror(tensor, self.lattice.planes)
        if mirror.element_size != tensor.element_size():
            if shadow is not None:
                both = [self.lattice.join_elements(labels) for labels in (mirror.labels, shadow)]
                mirror.labels.copy_(self.lattice.join(*both).unsqueeze(1))
            return
        repeated = [d for d, s in enumerate(tensor.stride()) if s == 0 and tensor.shape[d] > 1]
        view = mirror.view(tensor)
        once = view
        for dim in repeated:
            # Elements of an expanded tensor share memory, which can be written to once.
            once = once.narrow(dim + 1, 0, 1)
        if shadow is None:
            once.zero_()
            return
        shadow = shadow.expand(view.shape)
        if repeated:
            shadow = self.lattice.join_along(shadow, repeated).expand(once.shape)
        # The shadow of an operation in place may be the memory that it is written to.
        once.copy_(shadow.clone())


class _Mirror:
    """Labels of one storage; it keeps the storage alive, so that its address is not used again."""

    def __init__(self, tensor: Tensor, planes: int) -> None:
        self.storage = tensor.untyped_storage()
        self.element_size = max(tensor.element_size(), 1)
        size = max(self.storage.nbytes() // self.element_size, 1)
        self.labels = torch.zeros(planes, size, dtype=torch.int64, device="cpu")

    def view(self, tensor: Tensor) -> Tensor:
        return self.labels.as_strided(
            (len(self.labels), *tensor.shape),
            (self.labels.shape[1], *tensor.stride()),
            tensor.storage_offset(),
        )


def _address(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


_RAISES = torch.ops.aten._linalg_check_errors.default
"""Ends the program or does nothing: what it reads decides on nothing that follows."""


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
        flow = self.flow
        if func.is_view or func is _RAISES or not flow.watching:
            return func(*args, **kwargs)
        if not flow.concerns(func, args, kwargs):
            return func(*args, **kwargs)
        operation = Operation.of(func, args, kwargs)
        operation.result = func(*args, **kwargs)
        flow.watching = False
        try:
            with torch._C.DisableTorchFunction():
                if func is torch.ops.aten._local_scalar_dense.default or not operation.written:
                    flow.escape(*operation.read)
                else:
                    flow.propagate(operation)
        finally:
            flow.watching = True
        return operation.result


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
        if func in _BUILDING and args and isinstance(args[0], (list, tuple)):
            return self._built(func, args, kwargs)
        if func in _READING:
            self.flow.escape(*tensors_in(args))
        if func is Tensor.__getitem__:
            return self._select(args[0], args[1])
        if func is Tensor.__setitem__:
            return self._assign(*args)
        if func is one_hot:
            return _one_hot(*args, **kwargs)
        return func(*args, **kwargs)

    def _built(self, func: Callable[..., Tensor], args: Any, kwargs: Any) -> Tensor:
        """`torch.tensor([x, y])`: torch turns x and y into Python numbers; they are data."""
        with self.flow.paused():
            result = func(*args, **kwargs)
            parts = tensors_in(args[0])
            if any(map(self.flow.carries, parts)):
                self.flow.mark(result, self.flow.joined(*parts))
        return result

    def _select(self, tensor: Tensor, index: Any) -> Tensor:
        """`tensor[z]` with a 0-d integer z, which stays data."""
        widened = _widened(tensor, index)
        if widened is None:
            return tensor[index]
        self.flow.indexed_by_scalars |= self.flow.carries(tensor)
        return tensor[widened.parts].squeeze(widened.dim)

    def _assign(self, tensor: Tensor, index: Any, value: Any) -> None:
        """`tensor[z] = y` with a 0-d integer z, which stays data."""
        widened = _widened(tensor, index)
        if widened is None:
            tensor[index] = value
            return
        if isinstance(value, Tensor):
            with self.flow.paused():
                shape = list(tensor[widened.parts].shape)
            del shape[widened.dim]
            value = value.expand(shape).unsqueeze(widened.dim)
        tensor[widened.parts] = value


class _Widened(NamedTuple):
    """An index with 1-d instead of 0-d integer tensors, and the dimension this adds."""

    parts: tuple[Any, ...]
    dim: int


def _widened(tensor: Tensor, index: Any) -> _Widened | None:
    """Keeps 0-d integer tensors from becoming Python numbers; None where there is none."""
    parts = index if isinstance(index, tuple) else (index,)
    scalars = [i for i, part in enumerate(parts) if _is_scalar_index(part)]
    others = [part for part in parts if isinstance(part, (list, Tensor))]
    if not scalars or len(others) > len(scalars):
        return None
    wide = tuple(part.reshape(1) if i in scalars else part for i, part in enumerate(parts))
    between = parts[scalars[0] : scalars[-1]]
    apart = any(isinstance(part, slice) or part is None or part is Ellipsis for part in between)
    return _Widened(wide, 0 if apart else _dims_before(tensor, parts, scalars[0]))


def _one_hot(tensor: Tensor, num_classes: int = -1) -> Tensor:
    """`one_hot` without the check of the classes, for which torch reads the values."""
    if num_classes <= 0:
        return one_hot(tensor, num_classes)
    classes = torch.arange(num_classes, device=tensor.device)
    return (tensor.unsqueeze(-1) == classes).long()


def _is_scalar_index(part: Any) -> bool:
    return (
        isinstance(part, Tensor)
        and part.dim() == 0
        and not part.is_floating_point()
        and part.dtype != torch.bool
    )


def _dims_before(tensor: Tensor, parts: Sequence[Any], stop: int) -> int:
    """Dimensions of `tensor[parts]` that the parts before one of them give rise to."""
    consumed = sum(part is not None and part is not Ellipsis for part in parts)
    dims = 0
    for part in parts[:stop]:
        if part is Ellipsis:
            dims += tensor.dim() - consumed
        elif part is None or isinstance(part, slice):
            dims += 1
    return dims
