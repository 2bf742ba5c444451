"""How reading and writing at positions joins: indexing, gathering, embedding, scattering."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from pyronat.lattices import Lattice, Selection
from pyronat.operations import NOT_APPLICABLE, Operation, Reader, spread, tensors_in

_WITHOUT_SUM = {"scatter_add": "scatter", "index_add": "index_copy", "scatter_reduce": "scatter"}


def selection(operation: Operation, read: Reader, lattice: Lattice) -> Tensor | None:
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
    chosen = Selection(dims, move, places, index_shadow, tuple(indices))
    return lattice.select(table_shadow, chosen)


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


def _marked(shadow: Tensor) -> bool:
    return bool((shadow != 0).any())


def scattering(operation: Operation, read: Reader, lattice: Lattice) -> Tensor | None:
    """Elements that stay, and values written at the positions that an index holds."""
    target = operation["self"]
    indices = tensors_in([operation[name] for name in ("index", "indices", "mask")])
    sources = tensors_in([operation[name] for name in ("src", "source", "values", "value")])
    if lattice.follows_positions and not any(_marked(read(index)) for index in indices):
        try:
            return _scattered(operation, read, lattice, sources)
        except NOT_APPLICABLE:
            pass
    marked = [*indices, *sources]
    if operation.name.startswith("scatter"):
        along = [lattice.join_along(read(tensor), (operation["dim"],)) for tensor in marked]
        written = lattice.join_many(along)
        if all(b in {1, a} for a, b in zip(target.shape, written.shape[1:], strict=True)):
            return lattice.join(read(target), written)
    everything = lattice.join_many([lattice.join_elements(read(tensor)) for tensor in marked])
    return lattice.join(read(target), spread(everything, target))


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
