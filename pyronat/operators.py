"""Positive semi-definite operators on parameter blocks: batches of small dense matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyronat.errors import NotPositiveDefinite

JITTERS = (0.0, 1e-7, 1e-6, 1e-5, 1e-4)
"""Diagonal added on failure, relative to the mean diagonal of the block."""


@dataclass(frozen=True)
class Layout:
    """How parameters are laid out in a block of `count` vectors of length `size`.

    Attributes:
        names: parameter names.
        shapes: their shapes.
        transposed: whether the vectors run along columns (of a matrix) rather than rows.
        count: number of vectors.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    transposed: tuple[bool, ...]
    count: int

    def pack(self, values: Mapping[str, Tensor]) -> Tensor:
        """Parameters by name → `[count, size]`."""
        rows = [
            (values[name].mT if transposed else values[name]).reshape(self.count, -1)
            for name, transposed in zip(self.names, self.transposed, strict=True)
        ]
        return torch.cat(rows, 1)

    def unpack(self, vectors: Tensor) -> dict[str, Tensor]:
        """`[count, size]` → parameters by name."""
        values = {}
        parts = vectors.split([self._length(shape) for shape in self.shapes], 1)
        for name, shape, transposed, part in zip(
            self.names, self.shapes, self.transposed, parts, strict=True
        ):
            values[name] = part.reshape(shape[::-1]).mT if transposed else part.reshape(shape)
        return values

    def _length(self, shape: Sequence[int]) -> int:
        return torch.Size(shape).numel() // self.count


@dataclass(frozen=True)
class BlockMatrix:
    """A block-diagonal matrix, G = diag(G_1, …, G_count).

    Attributes:
        matrix: symmetric positive semi-definite `[count, size, size]`.
    """

    matrix: Tensor

    def mv(self, vectors: Tensor) -> Tensor:
        """G x for `[count, size]`."""
        return (self.matrix @ vectors.unsqueeze(-1)).squeeze(-1)

    def mean_diagonal(self) -> Tensor:
        """Mean of the diagonal of each matrix, `[count]`."""
        return self.matrix.diagonal(dim1=-2, dim2=-1).mean(-1)

    def factor(self, damping: Tensor) -> CholeskyFactor:
        """Factors G + damping · I, see `cholesky`."""
        return cholesky(self.matrix, damping)


@dataclass(frozen=True)
class CholeskyFactor:
    """A batch of Cholesky factors with what had to be added to make them.

    Attributes:
        lower: `[count, size, size]`.
        jitter: largest diagonal added beyond the damping, in the units of the matrix.
    """

    lower: Tensor
    jitter: float

    def solve(self, vectors: Tensor) -> Tensor:
        """(G + damping + jitter)⁻¹ x for `[count, size]`."""
        right = vectors.to(self.lower.dtype).unsqueeze(-1)
        return torch.cholesky_solve(right, self.lower).squeeze(-1).to(vectors.dtype)


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
    if not bool(torch.isfinite(matrix).all()):
        raise NotPositiveDefinite("a curvature block is not finite")
    for dtype in dict.fromkeys([matrix.dtype, torch.float64]):
        wide = matrix.to(dtype)
        unit = wide.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(torch.finfo(dtype).tiny)
        extra, failed = torch.zeros_like(unit), torch.ones_like(unit, dtype=torch.bool)
        for jitter in JITTERS:
            extra = torch.where(failed, unit * jitter, extra)
            shifted = wide + torch.diag_embed(
                (damping.to(dtype) + extra).unsqueeze(-1).expand(wide.shape[:-1])
            )
            lower, info = torch.linalg.cholesky_ex(shifted)
            failed = info > 0
            if not bool(failed.any()):
                return CholeskyFactor(lower, float(extra.max()))
    raise NotPositiveDefinite(
        f"{int(failed.sum())} of {len(matrix)} matrices of size {matrix.shape[-1]} cannot be "
        "factored; raise the damping"
    )
