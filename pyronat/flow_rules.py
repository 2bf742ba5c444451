"""How an operation joins what its inputs depend on: one rule for each kind of operation.

A rule gets an operation and the shadows of its inputs, and returns the shadow of its result, one
for all outputs or one for each. It may join too much, never too little. Operations without a rule
join all elements of all inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from pyronat.lattices import Lattice, Selection

Reader: TypeAlias = Callable[[Tensor], Tensor]
"""Tensor → shadow `[planes, *shape]`."""

Shadows: TypeAlias = "Tensor | Sequence[Tensor | None] | None"
"""The shadow of all outputs, or one for each; None where everything is to be joined."""


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
        pointers = {tensor.untyped_storage()._cdata for tensor in found if _strided(tensor)}
        return found + [
            tensor
            for tensor in self.changed
            if id(tensor) not in returned
            and not (_strided(tensor) and tensor.untyped_storage()._cdata in pointers)
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


def _strided(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided


def result_shadows(operation: Operation, read: Reader, lattice: Lattice) -> list[Tensor]:
    """What the tensors that an operation wrote depend on.

    Args:
        operation: the operation, done.
        read: gives the shadows of its inputs.
        lattice: joins them.

    Returns:
        One shadow for each of `operation.written`, broadcastable to its shape.
    """
    outputs = tensors_in(operation.result)
    if any(not _strided(tensor) for tensor in [*operation.read, *outputs]):
        found: Shadows = None
    elif operation.pointwise or operation["reduction"] == 0:
        found = _pointwise(operation, read, lattice)
    else:
        rule = RULES.get(operation.name, _everything)
        try:
            found = rule(operation, read, lattice)
        except _NOT_APPLICABLE:
            found = None
    written = operation.written
    single = found is None or isinstance(found, Tensor)
    shadows: Sequence[Tensor | None] = [found] * len(outputs) if single else found
    proven = [*shadows, *[None] * (len(written) - len(shadows))]
    if all(s is not None and _fits(s, t) for s, t in zip(proven, written, strict=True)):
        return [shadow for shadow in proven if shadow is not None]
    everything = _everything(operation, read, lattice)
    return [
        shadow if shadow is not None and _fits(shadow, tensor) else _spread(everything, tensor)
        for shadow, tensor in zip(proven, written, strict=True)
    ]


def _fits(shadow: Tensor, tensor: Tensor) -> bool:
    """Whether a shadow can be broadcast to the shape of a tensor."""
    if shadow.dim() != tensor.dim() + 1:
        return False
    return all(a in {1, b} for a, b in zip(shadow.shape[1:], tensor.shape, strict=True))


def _spread(joined: Tensor, tensor: Tensor) -> Tensor:
    return joined.reshape(-1, *[1] * tensor.dim())


def _everything(operation: Operation, read: Reader, lattice: Lattice) -> Tensor:
    """All elements of all inputs, `[planes]`."""
    joined = [lattice.join_elements(read(tensor)) for tensor in operation.read]
    return lattice.join_many(joined)


def _pointwise(operation: Operation, read: Reader, lattice: Lattice) -> Tensor | None:
    """Elements at the same place, after broadcasting."""
    output = tensors_in(operation.result)[0]
    return _aligned([read(tensor) for tensor in operation.read], output, lattice)


def _aligned(shadows: Sequence[Tensor], output: Tensor, lattice: Lattice) -> Tensor | None:
    """The join of shadows broadcast to an output, or None where they do not fit it."""
    width = output.dim() + 1
    if any(shadow.dim() > width for shadow in shadows):
        return None
    placed = [
        shadow.reshape(len(shadow), *[1] * (width - shadow.dim()), *shadow.shape[1:])
        for shadow in shadows
    ]
    return lattice.join_many(placed)


def _reduction(operation: Operation, read: Reader, lattice: Lattice) -> list[Tensor]:
    """Elements along the reduced dimensions."""
    tensor = operation["self"]
    joined = (
        lattice.join_along(read(tensor), operation.dims(tensor)) if tensor.dim() else read(tensor)
    )
    return [_shaped(joined, output) for output in tensors_in(operation.result)]


def _shaped(shadow: Tensor, output: Tensor) -> Tensor:
    """Drops the dimensions of size 1 that an output does not have."""
    return shadow.reshape(len(shadow), *output.shape)


def _along(operation: Operation, read: Reader, lattice: Lattice) -> list[Tensor]:
    """Elements along one dimension, all of them for every element of the result."""
    tensor = operation["self"]
    dims = (operation["dim"] if operation["dim"] is not None else -1,)
    joined = lattice.join_along(read(tensor), dims) if tensor.dim() else read(tensor)
    return [joined for _ in tensors_in(operation.result)]


def _moved(operation: Operation, read: Reader, lattice: Lattice) -> Shadows:
    """Elements keep their labels and take new places; new elements depend on nothing."""
    inputs = {id(tensor): read(tensor) for tensor in operation.read}
    arguments = {**operation.arguments, **({"value": 0} if operation["value"] is not None else {})}
    planes = []
    for plane in range(lattice.planes):
        replaced = tree_map(
            lambda leaf, p=plane: (
                inputs[id(leaf)][p].contiguous() if isinstance(leaf, Tensor) else leaf
            ),
            arguments,
        )
        planes.append(tensors_in(getattr(torch.ops.aten, operation.name)(**replaced)))
    return [torch.stack(parts) for parts in zip(*planes, strict=True)]


def _reshaped(operation: Operation, read: Reader, lattice: Lattice) -> Tensor:
    """Elements keep their order."""
    return _shaped(read(operation["self"]), *tensors_in(operation.result))


def _matrices(operation: Operation, read: Reader, lattice: Lattice) -> Shadows:
    """All elements of the matrices that lie at one place of a batch."""
    joined = [lattice.join_along(read(tensor), (-2, -1)) for tensor in operation.read]
    width = max(shadow.dim() for shadow in joined)
    aligned = [s.reshape(len(s), *[1] * (width - s.dim()), *s.shape[1:]) for s in joined]
    batch = lattice.join_many(aligned)[..., 0, 0]
    return [
        batch.reshape(*batch.shape, *[1] * (output.dim() + 1 - batch.dim()))
        for output in tensors_in(operation.result)
    ]


def _triangular_solve(operation: Operation, read: Reader, lattice: Lattice) -> Shadows:
    """A matrix, and one column of the right-hand sides."""
    if operation["left"] is False:
        return _matrices(operation, read, lattice)
    matrix = lattice.join_along(read(operation["self"]), (-2, -1))
    columns = lattice.join_along(read(operation["B"]), (-2,))
    return _aligned([matrix, columns], tensors_in(operation.result)[0], lattice)


def _pooling(operation: Operation, read: Reader, lattice: Lattice) -> Tensor:
    """All places of one channel of one example."""
    tensor = operation["self"]
    width = next(n for n in (1, 2, 3) if f"{n}d" in operation.name)
    return lattice.join_along(read(tensor), range(-width, 0))


def _product(operation: Operation, read: Reader, lattice: Lattice) -> Tensor | None:
    """A row of the left factor, a column of the right one, and what is added."""
    left, right = (operation[name] for name in _FACTORS[operation.name])
    added = operation["self"] if operation.name in _ADDING else None
    (output,) = tensors_in(operation.result)
    rows = lattice.join_along(read(left), (-1,))
    columns = lattice.join_along(read(right), (-2 if right.dim() > 1 else -1,))
    if right.dim() == 1:
        rows, columns = rows.squeeze(-1), columns.reshape(len(columns), *[1] * (left.dim() - 1))
    shadows = [lattice.join(rows, columns)]
    if added is not None:
        shadows.append(read(added))
    return _aligned(shadows, output, lattice)


def _linear(operation: Operation, read: Reader, lattice: Lattice) -> Tensor | None:
    """A row of the input, a row of the weight, and a bias."""
    (output,) = tensors_in(operation.result)
    rows = lattice.join_along(read(operation["input"]), (-1,))
    units = lattice.join_along(read(operation["weight"]), (-1,)).squeeze(-1)
    shadows = [rows, units]
    if operation["bias"] is not None:
        shadows.append(read(operation["bias"]))
    return _aligned(shadows, output, lattice)


def _convolution(operation: Operation, read: Reader, lattice: Lattice) -> Tensor | None:
    """All elements of an example, and the weights of one output channel."""
    (output,) = tensors_in(operation.result)
    tensor, weight, bias = (operation[name] for name in ("input", "weight", "bias"))
    channels = 0
    if operation["transposed"]:
        if operation["groups"] != 1:
            return None
        channels = 1
    if tensor.dim() != output.dim() or weight.dim() != output.dim():
        return None
    examples = lattice.join_along(read(tensor), range(1, tensor.dim()))
    others = [dim for dim in range(weight.dim()) if dim != channels]
    shadows = [lattice.join_along(read(weight), others).reshape(lattice.planes, -1)]
    if bias is not None:
        shadows.append(read(bias))
    units = lattice.join_many(shadows).reshape(lattice.planes, 1, -1, *[1] * (output.dim() - 2))
    return lattice.join(examples, units)


def _normalization(operation: Operation, read: Reader, lattice: Lattice) -> Shadows:
    """Elements that share a mean, and the scale and shift of each."""
    tensor = operation["input"]
    scales = [operation[name] for name in ("weight", "bias", "running_mean", "running_var")]
    if operation.name == "native_layer_norm":
        joined = range(tensor.dim() - len(operation["normalized_shape"]), tensor.dim())
        shape: tuple[int, ...] | None = None
    elif operation.name == "native_group_norm":
        joined, shape = range(1, tensor.dim()), (-1, *[1] * (tensor.dim() - 2))
    else:
        training = operation["training"] or operation["running_mean"] is None
        joined = [dim for dim in range(tensor.dim()) if dim != 1 and training]
        shape = (-1, *[1] * (tensor.dim() - 2))
    shadows = [lattice.join_along(read(tensor), list(joined)) if joined else read(tensor)]
    for scale in scales:
        if scale is not None:
            shadow = read(scale)
            shadows.append(shadow if shape is None else shadow.reshape(lattice.planes, *shape))
    first, *rest = tensors_in(operation.result)
    return [_aligned(shadows, first, lattice), *[None] * len(rest)]


def _attention(operation: Operation, read: Reader, lattice: Lattice) -> Shadows:
    """A query, all keys and a column of the values, for every head of every example."""
    query, key, value = (operation[name] for name in ("query", "key", "value"))
    queries = lattice.join_along(read(query), (-1,))
    weights = lattice.join(queries, lattice.join_along(read(key), (-2, -1)))
    for tensor in operation.read:
        if all(tensor is not factor for factor in (query, key, value)):
            weights = lattice.join(weights, _spread(lattice.join_elements(read(tensor)), query))
    found = lattice.join(weights, lattice.join_along(read(value), (-2,)))
    return [found, *[None] * (len(tensors_in(operation.result)) - 1)]


def _selection(operation: Operation, read: Reader, lattice: Lattice) -> Tensor | None:
    """Elements at the positions that an index holds."""
    table: Tensor = operation["self"] if operation.name != "embedding" else operation["weight"]
    (output,) = tensors_in(operation.result)
    dims, indices, move = _indexing(operation, table)
    table_shadow = read(table)
    if any(index.dtype in {torch.bool, torch.uint8} for index in indices):
        if lattice.follows_positions and not any(_marked(read(index)) for index in indices):
            return lattice.move(table_shadow, move)
        return None
    if operation.name == "gather":
        places = torch.arange(output.numel(), device="cpu").reshape(output.shape)
        shadow = read(indices[0])
    else:
        shape = torch.broadcast_tensors(*indices)[0].shape
        adjacent = dims == tuple(range(dims[0], dims[0] + len(dims)))
        before = dims[0] if adjacent else 0
        after = output.dim() - before - len(shape)

        def placed(values: Tensor) -> Tensor:
            width = before + len(shape) - (values.dim() - 1)
            return values.reshape(len(values), *[1] * width, *values.shape[1:], *[1] * after)

        shadow = lattice.join_many([placed(read(index)) for index in indices])
        if not lattice.follows_positions:
            dims, indices = _varying(operation, table, dims, indices)
            if not indices:
                return lattice.join(lattice.move(table_shadow, move), shadow)
        shape = torch.broadcast_tensors(*indices)[0].shape
        places = torch.arange(shape.numel(), device="cpu").reshape(1, *shape)
        places = placed(places)[0].expand(output.shape)
    if not _marked(table_shadow):
        return shadow
    index_shadow = shadow if _marked(shadow) else None
    key = tuple(part for index in indices for part in _identity(index))
    return lattice.select(table_shadow, Selection(dims, move, places, index_shadow, key))


def _varying(
    operation: Operation, table: Tensor, dims: tuple[int, ...], indices: Sequence[Tensor]
) -> tuple[tuple[int, ...], list[Tensor]]:
    """Dimensions and indices without those that the program counts through from end to end."""
    kept = [
        (dim, index)
        for dim, index in zip(dims, indices, strict=True)
        if not (
            operation.is_range(index)
            and index.numel() == table.shape[dim]
            and torch.equal(index.cpu().flatten(), torch.arange(index.numel(), device="cpu"))
        )
    ]
    return tuple(dim for dim, _ in kept), [index for _, index in kept]


def _indexing(
    operation: Operation, table: Tensor
) -> tuple[tuple[int, ...], list[Tensor], Callable[[Tensor], Tensor]]:
    """Indexed dimensions, the indices, and the operation on another table of the same shape."""
    aten = torch.ops.aten
    if operation.name == "embedding":
        index = operation["indices"].cpu()
        return (0,), [operation["indices"]], lambda t: t[index]
    if operation.name == "index":
        given = operation["indices"]
        dims = tuple(dim for dim, index in enumerate(given) if index is not None)
        local = [None if index is None else index.cpu() for index in given]
        return dims, [given[dim] for dim in dims], lambda t: aten.index(t, local)
    index, dim = operation["index"].cpu(), operation["dim"]
    function = aten.gather if operation.name == "gather" else aten.index_select
    return (dim % max(table.dim(), 1),), [operation["index"]], lambda t: function(t, dim, index)


def _identity(index: Tensor) -> tuple[int, ...]:
    """What tells one index from another: its memory and its values."""
    values = index.detach().cpu().contiguous()
    return (
        int(index.untyped_storage()._cdata),
        index.storage_offset(),
        *index.stride(),
        *index.shape,
        hash(values.numpy().tobytes()),
    )


def _marked(shadow: Tensor) -> bool:
    return bool((shadow != 0).any())


def _scattering(operation: Operation, read: Reader, lattice: Lattice) -> Tensor | None:
    """Elements that stay, and values written at the positions that an index holds."""
    target = operation["self"]
    indices = tensors_in([operation[name] for name in ("index", "indices", "mask")])
    source = next(
        (operation[n] for n in ("src", "source", "values") if operation[n] is not None), None
    )
    sources = tensors_in(source)
    if lattice.follows_positions and not any(_marked(read(index)) for index in indices):
        try:
            return _scattered(operation, read, lattice, sources)
        except _NOT_APPLICABLE:
            pass
    marked = [*indices, *sources]
    if operation.name.startswith("scatter"):
        along = [lattice.join_along(read(tensor), (operation["dim"],)) for tensor in marked]
        written = lattice.join_many(along)
        if all(b in {1, a} for a, b in zip(target.shape, written.shape[1:], strict=True)):
            return lattice.join(read(target), written)
    everything = lattice.join_many([lattice.join_elements(read(tensor)) for tensor in marked])
    return lattice.join(read(target), _spread(everything, target))


def _scattered(
    operation: Operation, read: Reader, lattice: Lattice, sources: Sequence[Tensor]
) -> Tensor:
    """Values written at known positions, over what was there or joined with it."""
    target = read(operation["self"])
    written = [read(tensor) for tensor in sources]
    once = {"accumulate": False} if operation.name == "index_put" else {}
    name = _WITHOUT_SUM.get(operation.name, operation.name)
    sums = (
        name != operation.name or bool(operation["accumulate"]) or operation["reduce"] is not None
    )
    if sums:
        raise NotImplementedError
    planes = []
    for plane in range(lattice.planes):
        by_id = {id(t): w[plane].contiguous() for t, w in zip(sources, written, strict=True)}
        by_id[id(operation["self"])] = target[plane].contiguous()
        arguments = {
            key: tree_map(
                lambda leaf, some=by_id: (
                    some.get(id(leaf), leaf.cpu()) if isinstance(leaf, Tensor) else leaf
                ),
                value,
            )
            for key, value in {**operation.arguments, **once}.items()
        }
        if not sources and arguments.get("value") is not None:
            arguments["value"] = 0
        planes.append(getattr(torch.ops.aten, name)(**arguments))
    return torch.stack(planes)


Rule: TypeAlias = Callable[[Operation, Reader, Lattice], Shadows]

_NOT_APPLICABLE = (RuntimeError, NotImplementedError, TypeError, IndexError, ValueError)

_OVERWRITING = frozenset(
    "copy fill zero empty_like full_like ones_like rand_like randn_like randint_like zeros_like "
    "new_empty new_empty_strided new_full new_ones new_zeros uniform exponential random "
    "log_normal cauchy geometric".split()
)
"""Operations that take from their first argument its shape or its memory, not its values."""

_FACTORS = {
    "mm": ("self", "mat2"),
    "bmm": ("self", "mat2"),
    "mv": ("self", "vec"),
    "dot": ("self", "tensor"),
    "addmm": ("mat1", "mat2"),
    "_addmm_activation": ("mat1", "mat2"),
    "baddbmm": ("batch1", "batch2"),
    "addmv": ("mat", "vec"),
}
_ADDING = frozenset({"addmm", "_addmm_activation", "baddbmm", "addmv"})
_WITHOUT_SUM = {"scatter_add": "scatter", "index_add": "index_copy", "scatter_reduce": "scatter"}

_NAMES: dict[Rule, str] = {
    _pointwise: (
        "clone _to_copy copy fill lift_fresh native_dropout bernoulli poisson _standard_gamma "
        "binomial masked_fill where log_sigmoid_forward floor_divide __and__ __or__ __xor__"
    ),
    _reduction: (
        "sum mean amax amin max min prod any all argmax argmin logsumexp var std var_mean "
        "std_mean norm linalg_vector_norm median nanmedian mode aminmax nansum count_nonzero "
        "kthvalue"
    ),
    _along: (
        "_softmax _log_softmax _safe_softmax cumsum cumprod logcumsumexp cummax cummin sort "
        "argsort topk"
    ),
    _reshaped: "_unsafe_view view reshape",
    _moved: (
        "cat stack repeat flip roll constant_pad_nd tril triu diag_embed unfold_copy "
        "select_scatter slice_scatter diagonal_scatter as_strided_scatter rot90 block_diag "
        "unsafe_split unsafe_split_with_sizes transpose t permute"
    ),
    _matrices: (
        "linalg_cholesky_ex linalg_inv_ex _linalg_det _linalg_slogdet "
        "_linalg_solve_ex cholesky_inverse cholesky_solve triangular_solve _linalg_eigh linalg_qr "
        "_linalg_svd linalg_matrix_exp linalg_lu_factor_ex linalg_lu"
    ),
    _triangular_solve: "linalg_solve_triangular",
    _pooling: (
        "max_pool2d_with_indices max_pool3d_with_indices avg_pool2d avg_pool3d "
        "_adaptive_avg_pool2d _adaptive_avg_pool3d upsample_nearest1d upsample_nearest2d "
        "upsample_bilinear2d"
    ),
    _product: " ".join(_FACTORS),
    _linear: "linear",
    _convolution: "convolution",
    _normalization: (
        "native_layer_norm native_group_norm native_batch_norm _native_batch_norm_legit "
        "_batch_norm_with_update"
    ),
    _attention: (
        "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention "
        "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention"
    ),
    _selection: "index embedding index_select gather",
    _scattering: (
        "index_put _index_put_impl index_copy index_add index_fill scatter scatter_add "
        "scatter_reduce masked_scatter"
    ),
}

RULES: dict[str, Rule] = {name: rule for rule, names in _NAMES.items() for name in names.split()}
"""Name of an operation → its rule."""
