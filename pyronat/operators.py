"""Positive semi-definite operators on parameter blocks, and the dense and diagonal ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import prod
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from pyronat.errors import NotPositiveDefinite

JITTERS = (0.0, 1e-7, 1e-6, 1e-5, 1e-4)
"""Diagonal added on failure, relative to the mean diagonal of the block."""


@dataclass(frozen=True)
class Layout(ABC):
    """How parameter entries are laid out in a block of `count` vectors of length `size`.

    Attributes:
        names: parameter names.
        shapes: their shapes.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    @abstractmethod
    def count(self) -> int:
        """Number of vectors."""

    @abstractmethod
    def pack(self, values: Mapping[str, Tensor]) -> Tensor:
        """Parameters by name → `[count, size]`."""

    @abstractmethod
    def unpack(self, vectors: Tensor) -> dict[str, Tensor]:
        """`[count, size]` → parameters by name, zero outside the block."""

    @abstractmethod
    def spread(self, values: Tensor) -> dict[str, Tensor]:
        """One number for each vector `[count]` → by name what broadcasts to the parameter."""

    def positions(self) -> Tensor:
        """Place of every entry in the concatenation of the flattened parameters `[count, size]`."""
        starts = accumulate((prod(shape) for shape in self.shapes), initial=0)
        return self.pack({
            name: torch.arange(start, start + prod(shape), device="cpu").reshape(shape)
            for name, shape, start in zip(self.names, self.shapes, starts, strict=False)
        })


@dataclass(frozen=True)
class AxesLayout(Layout):
    """Vectors that axes of every parameter number.

    Attributes:
        axes: for each parameter, the axes that number the vectors, in row-major order.
    """

    axes: tuple[tuple[int, ...], ...]

    @property
    def count(self) -> int:
        """Number of vectors."""
        return prod(self.shapes[0][axis] for axis in self.axes[0])

    def pack(self, values: Mapping[str, Tensor]) -> Tensor:
        """Parameters by name → `[count, size]`."""
        count = self.count
        return torch.cat(
            [
                values[name].permute(self._order(i)).reshape(count, -1)
                for i, name in enumerate(self.names)
            ],
            1,
        )

    def unpack(self, vectors: Tensor) -> dict[str, Tensor]:
        """`[count, size]` → parameters by name."""
        parts = vectors.split([prod(shape) // self.count for shape in self.shapes], 1)
        values = {}
        for i, (name, shape, part) in enumerate(zip(self.names, self.shapes, parts, strict=True)):
            wide = [shape[axis] for axis in self._order(i)]
            values[name] = part.reshape(wide).permute(self._places(i))
        return values

    def spread(self, values: Tensor) -> dict[str, Tensor]:
        """One number for each vector `[count]` → by name what broadcasts to the parameter."""
        found = {}
        for i, (name, shape) in enumerate(zip(self.names, self.shapes, strict=True)):
            wide = [shape[axis] if axis in self.axes[i] else 1 for axis in self._order(i)]
            found[name] = values.reshape(wide).permute(self._places(i))
        return found

    def _places(self, index: int) -> list[int]:
        """Where each axis of a parameter is in `_order`."""
        order = self._order(index)
        return sorted(range(len(order)), key=order.__getitem__)

    def _order(self, index: int) -> tuple[int, ...]:
        """Axes of a parameter, those that number the vectors first."""
        axes = self.axes[index]
        return (*axes, *(a for a in range(len(self.shapes[index])) if a not in axes))


@dataclass(frozen=True)
class EntriesLayout(Layout):
    """Vectors that are listed entry by entry.

    Attributes:
        entries: `[count][size]` positions in the concatenation of the flattened parameters.
    """

    entries: tuple[tuple[int, ...], ...]

    @property
    def count(self) -> int:
        """Number of vectors."""
        return len(self.entries)

    def pack(self, values: Mapping[str, Tensor]) -> Tensor:
        """Parameters by name → `[count, size]`."""
        flat = torch.cat([values[name].reshape(-1) for name in self.names])
        return flat[self._index.to(flat.device)]

    def unpack(self, vectors: Tensor) -> dict[str, Tensor]:
        """`[count, size]` → parameters by name, zero outside the block."""
        lengths = [prod(shape) for shape in self.shapes]
        flat = vectors.new_zeros(sum(lengths))
        flat[self._index.to(flat.device)] = vectors
        parts = zip(self.names, flat.split(lengths), self.shapes, strict=True)
        return {name: part.reshape(shape) for name, part, shape in parts}

    def spread(self, values: Tensor) -> dict[str, Tensor]:
        """One number for each vector `[count]` → parameters by name, zero outside the block."""
        return self.unpack(values.unsqueeze(1).expand(-1, len(self.entries[0])))

    @cached_property
    def _index(self) -> Tensor:
        return torch.tensor(self.entries, device="cpu")


def inner(first: Tensor, second: Tensor) -> Tensor:
    """Σ of the products of two tensors of one shape, a 0-d tensor; products are not written down.

    Of equal types where that matters for speed.
    """
    if first.dtype == second.dtype:
        return torch.dot(first.reshape(-1), second.reshape(-1))
    return (first * second).sum()


def summed(products: Sequence[Tensor]) -> Tensor:
    """The sum of products `[6]` of blocks, as `proposals.step_scalars` has them; 0 without any."""
    if not products:
        return torch.zeros(6)
    return torch.stack([product.to(products[0]) for product in products]).sum(0)


def add_parts(total: dict[str, Tensor], part: Mapping[str, Tensor]) -> None:
    """Adds what one block says about its parameters to what other blocks say."""
    for name, value in part.items():
        total[name] = total[name] + value if name in total else value


class Solver(ABC):
    """A damped block that can be solved with.

    Attributes:
        jitter: largest diagonal added beyond the damping, in the units of the matrix.
    """

    jitter: float

    @abstractmethod
    def solve(self, vectors: Tensor) -> Tensor:
        """(G + damping + jitter)⁻¹ x for `[count, size]`."""


@runtime_checkable
class Whitener(Protocol):
    """A solver with a root that can be applied by itself, G + damping + jitter = L Lᵀ."""

    @property
    def shape(self) -> torch.Size:
        """(count, size)."""

    def whiten(self, vectors: Tensor) -> Tensor:
        """L⁻¹ x for `[*rows, count, size]`, in the type of the factor."""

    def unwhiten(self, vectors: Tensor) -> Tensor:
        """L⁻ᵀ x for `[*rows, count, size]`, in the type of the factor."""


class BlockOperator(ABC):
    """A symmetric positive semi-definite operator on a block of `count` vectors `[count, size]`.

    Operators of one block add and average; what they average may be an approximation of the
    matrix that they stand for.
    """

    @abstractmethod
    def mv(self, vectors: Tensor) -> Tensor:
        """G x for `[count, size]`."""

    def quadratic(self, vectors: Tensor) -> Tensor:
        """Σ xᵀ G x over the vectors of `[count, size]`, a 0-d tensor."""
        return inner(vectors, self.mv(vectors))

    @abstractmethod
    def dense(self) -> Tensor:
        """The matrices `[groups, width, width]` on the flattened vectors, width entries each."""

    @abstractmethod
    def mean_diagonal(self) -> Tensor:
        """Mean of the diagonal over each vector `[count]`."""

    @abstractmethod
    def factor(self, damping: Tensor) -> Solver:
        """G + damping · I, ready to be solved with; damping `[count]`."""

    def usable(self, damping: Tensor) -> Tensor:
        """The damping `[count]` that the operator can take, close to the one asked for."""
        return damping

    @abstractmethod
    def __add__(self, other: Any) -> BlockOperator:
        """The sum, or its approximation in the same form."""

    @abstractmethod
    def lerp(self, other: Any, share: float) -> BlockOperator:
        """(1 − share) of this and `share` of the other, or its approximation in the same form."""

    @abstractmethod
    def zeros(self) -> BlockOperator:
        """The operator 0 of the same form."""

    def compact(self) -> BlockOperator:
        """The same operator in fewer numbers, where it can be had: what an average is kept as."""
        return self

    def state(self) -> dict[str, Any]:
        """Plain tensors, numbers, strings, lists and dicts, with the name of the class."""
        return {"form": type(self).__name__, **vars(self)}


@dataclass(frozen=True)
class BlockMatrix(BlockOperator):
    """A block-diagonal matrix, G = diag(G_1, …, G_count).

    Attributes:
        matrix: symmetric positive semi-definite `[count, size, size]`.
    """

    matrix: Tensor

    @property
    def held(self) -> Tensor:
        """What is held of each unit."""
        return self.matrix

    def mv(self, vectors: Tensor) -> Tensor:
        """G x for `[count, size]`."""
        return (self.matrix @ vectors.unsqueeze(-1)).squeeze(-1)

    def dense(self) -> Tensor:
        """The matrices themselves."""
        return self.matrix

    def mean_diagonal(self) -> Tensor:
        """Mean of the diagonal of each matrix, `[count]`."""
        return self.matrix.diagonal(dim1=-2, dim2=-1).mean(-1)

    def factor(self, damping: Tensor) -> CholeskyFactor:
        """Factors G + damping · I, see `cholesky`."""
        return cholesky(self.matrix, damping)

    def __add__(self, other: BlockMatrix) -> BlockMatrix:
        """The sum."""
        return BlockMatrix(self.matrix + other.matrix)

    def lerp(self, other: BlockMatrix, share: float) -> BlockMatrix:
        """(1 − share) of this and `share` of the other."""
        return BlockMatrix(lerp(self.matrix, other.matrix, share))

    def zeros(self) -> BlockMatrix:
        """Zero matrices."""
        return BlockMatrix(torch.zeros_like(self.matrix))


@dataclass(frozen=True)
class Diagonal(BlockOperator):
    """The diagonal of a matrix alone: what couples entries is left out.

    Attributes:
        values: not negative `[count, size]`.
    """

    values: Tensor

    @property
    def held(self) -> Tensor:
        """What is held of each unit."""
        return self.values

    def mv(self, vectors: Tensor) -> Tensor:
        """G x for `[count, size]`."""
        return self.values * vectors

    def dense(self) -> Tensor:
        """Diagonal matrices `[count, size, size]`."""
        return torch.diag_embed(self.values)

    def mean_diagonal(self) -> Tensor:
        """Mean of each row, `[count]`."""
        return self.values.mean(1)

    def factor(self, damping: Tensor) -> DiagonalSolver:
        """G + damping · I; entries without any are left where they are."""
        return DiagonalSolver(self.values + damping.unsqueeze(1))

    def __add__(self, other: Diagonal) -> Diagonal:
        """The sum."""
        return Diagonal(self.values + other.values)

    def lerp(self, other: Diagonal, share: float) -> Diagonal:
        """(1 − share) of this and `share` of the other."""
        return Diagonal(lerp(self.values, other.values, share))

    def zeros(self) -> Diagonal:
        """Zeros."""
        return Diagonal(torch.zeros_like(self.values))


@dataclass(frozen=True)
class DiagonalSolver(Solver):
    """A damped diagonal.

    Attributes:
        damped: `[count, size]`.
        jitter: none is added.
    """

    damped: Tensor
    jitter: float = 0.0

    def solve(self, vectors: Tensor) -> Tensor:
        """Vectors over the diagonal, 0 where the diagonal is."""
        return torch.where(self.damped > 0, vectors / self.damped, torch.zeros_like(vectors))


def lerp(first: Tensor, second: Tensor, share: float) -> Tensor:
    """(1 − share) of one tensor and `share` of another, in the type of the first."""
    return first if share == 0 else torch.lerp(first, second.to(first.dtype), share)


@dataclass(frozen=True)
class CholeskyFactor(Solver):
    """A batch of Cholesky factors with what had to be added to make them.

    Attributes:
        lower: `[count, size, size]`.
        jitter: largest diagonal added beyond the damping, in the units of the matrix.
    """

    lower: Tensor
    jitter: float

    @property
    def shape(self) -> torch.Size:
        """(count, size)."""
        return self.lower.shape[:2]

    def solve(self, vectors: Tensor) -> Tensor:
        """(G + damping + jitter)⁻¹ x for `[count, size]`."""
        return self.unwhiten(self.whiten(vectors)).to(vectors.dtype)

    def whiten(self, vectors: Tensor) -> Tensor:
        """L⁻¹ x for `[*rows, count, size]`, in the type of the factor."""
        return self._triangular(self.lower, vectors, upper=False)

    def unwhiten(self, vectors: Tensor) -> Tensor:
        """L⁻ᵀ x for `[*rows, count, size]`, in the type of the factor."""
        return self._triangular(self.lower.mT, vectors, upper=True)

    # For many factors two triangular solves take a third of what `cholesky_solve` does.
    @staticmethod
    def _triangular(matrix: Tensor, vectors: Tensor, upper: bool) -> Tensor:
        if matrix.shape[-1] == 1:
            return vectors.to(matrix.dtype) / matrix.squeeze(-1)
        columns = vectors.to(matrix.dtype).reshape(-1, *vectors.shape[-2:]).permute(1, 2, 0)
        solved: Tensor = torch.linalg.solve_triangular(matrix, columns, upper=upper)
        return solved.permute(2, 0, 1).reshape(vectors.shape)


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are finite; their sum, which is cheaper, says so in almost all cases."""
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def cholesky(matrix: Tensor, damping: Tensor) -> CholeskyFactor:
    """Batched Cholesky factorization of matrix + damping · I with a jitter ladder.

    Matrices that fail get a diagonal of 1e-7, …, 1e-4 of their mean diagonal; then all are
    factored in float64 on the same ladder.

    Args:
        matrix: symmetric `[count, size, size]`.
        damping: `[count]`, not negative.

    Returns:
        The factors and the largest jitter used.

    Raises:
        NotPositiveDefinite: if a matrix is not finite or fails on the whole ladder.
    """
    if not is_finite(matrix):
        raise NotPositiveDefinite("a curvature block is not finite")
    for dtype in dict.fromkeys([matrix.dtype, torch.float64]):
        wide = matrix.to(dtype)
        unit = wide.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(torch.finfo(dtype).tiny)
        extra, failed = torch.zeros_like(unit), torch.ones_like(unit, dtype=torch.bool)
        for jitter in JITTERS:
            extra = torch.where(failed, unit * jitter, extra)
            shifted = wide.clone()
            shifted.diagonal(dim1=-2, dim2=-1).add_((damping.to(dtype) + extra).unsqueeze(-1))
            lower, info = torch.linalg.cholesky_ex(shifted)
            failed = info > 0
            if not bool(failed.any()):
                return CholeskyFactor(lower, float(extra.max()))
    raise NotPositiveDefinite(
        f"{int(failed.sum())} of {len(matrix)} matrices of size {matrix.shape[-1]} cannot be "
        "factored; raise the damping"
    )
