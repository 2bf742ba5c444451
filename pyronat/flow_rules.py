"""How an operation joins what its inputs depend on: one rule for each kind of operation.

A rule gets an operation and the shadows of its inputs, and returns the shadow of its result, one
for all outputs or one for each. It may join too much, never too little. Operations without a rule
join all elements of all inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from pyronat.index_rules import scattering, selection
from pyronat.lattices import Lattice
from pyronat.operations import (
    NOT_APPLICABLE,
    Operation,
    Reader,
    Shadows,
    aligned,
    everything,
    fits,
    is_strided,
    spread,
    tensors_in,
)


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
    if any(not is_strided(tensor) for tensor in [*operation.read, *outputs]):
        found: Shadows = None
    elif operation.pointwise or operation["reduction"] == 0:
        found = _pointwise(operation, read, lattice)
    else:
        rule = RULES.get(operation.name, everything)
        try:
            found = rule(operation, read, lattice)
        except NOT_APPLICABLE:
            found = None
    written = operation.written
    if found is None or isinstance(found, Tensor):
        found = [found] * len(outputs)
    proven = [*found, *[None] * (len(written) - len(found))]
    if all(s is not None and fits(s, t) for s, t in zip(proven, written, strict=True)):
        return [shadow for shadow in proven if shadow is not None]
    joined = everything(operation, read, lattice)
    return [
        shadow if shadow is not None and fits(shadow, tensor) else spread(joined, tensor)
        for shadow, tensor in zip(proven, written, strict=True)
    ]


def _pointwise(operation: Operation, read: Reader, lattice: Lattice) -> Tensor | None:
    """Elements at the same place, after broadcasting."""
    output = tensors_in(operation.result)[0]
    return aligned([read(tensor) for tensor in operation.read], output, lattice)


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
    return aligned([matrix, columns], tensors_in(operation.result)[0], lattice)


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
    return aligned(shadows, output, lattice)


def _linear(operation: Operation, read: Reader, lattice: Lattice) -> Tensor | None:
    """A row of the input, a row of the weight, and a bias."""
    (output,) = tensors_in(operation.result)
    rows = lattice.join_along(read(operation["input"]), (-1,))
    units = lattice.join_along(read(operation["weight"]), (-1,)).squeeze(-1)
    shadows = [rows, units]
    if operation["bias"] is not None:
        shadows.append(read(operation["bias"]))
    return aligned(shadows, output, lattice)


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
        joined = list(range(tensor.dim() - len(operation["normalized_shape"]), tensor.dim()))
        shape: tuple[int, ...] | None = None
    elif operation.name == "native_group_norm":
        joined, shape = list(range(1, tensor.dim())), (-1, *[1] * (tensor.dim() - 2))
    else:
        training = operation["training"] or operation["running_mean"] is None
        joined = [dim for dim in range(tensor.dim()) if dim != 1 and training]
        shape = (-1, *[1] * (tensor.dim() - 2))
    shadows = [lattice.join_along(read(tensor), joined) if joined else read(tensor)]
    for scale in scales:
        if scale is not None:
            shadow = read(scale)
            shadows.append(shadow if shape is None else shadow.reshape(lattice.planes, *shape))
    first, *rest = tensors_in(operation.result)
    return [aligned(shadows, first, lattice), *[None] * len(rest)]


def _attention(operation: Operation, read: Reader, lattice: Lattice) -> Shadows:
    """A query, all keys and a column of the values, for every head of every example."""
    query, key, value = (operation[name] for name in ("query", "key", "value"))
    queries = lattice.join_along(read(query), (-1,))
    weights = lattice.join(queries, lattice.join_along(read(key), (-2, -1)))
    for tensor in operation.read:
        if all(tensor is not factor for factor in (query, key, value)):
            weights = lattice.join(weights, spread(lattice.join_elements(read(tensor)), query))
    found = lattice.join(weights, lattice.join_along(read(value), (-2,)))
    return [found, *[None] * (len(tensors_in(operation.result)) - 1)]


Rule: TypeAlias = Callable[[Operation, Reader, Lattice], Shadows]

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
        "select_scatter slice_scatter diagonal_scatter asis_strided_scatter rot90 block_diag "
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
    selection: "index embedding index_select gather",
    scattering: (
        "index_put _index_put_impl index_copy index_add index_fill scatter scatter_add "
        "scatter_reduce masked_scatter"
    ),
}

RULES: dict[str, Rule] = {name: rule for rule, names in _NAMES.items() for name in names.split()}
"""Name of an operation → its rule."""
