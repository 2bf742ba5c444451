"""Leading eigenvectors of symmetric matrices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyronat.blocks import num_eigenvectors
from pyronat.errors import NotPositiveDefinite
from pyronat.operators import is_finite

_SPARE = 16
"""Columns that a subspace has beyond those that are kept."""

_ROUNDS = 1
"""Products with a matrix that turn random columns towards its leading eigenvectors.

With two a variational autoencoder with layers of 784, 400 and 20 units is 0.3 nats worse after 600
steps on binarized digits.
"""


@dataclass(frozen=True)
class Leading:
    """Leading eigenvectors of a symmetric positive semi-definite matrix.

    Attributes:
        vectors: orthonormal `[size, rank]`.
        values: `[rank]`.
        rest: mean eigenvalue of what is orthogonal to them, `[1]`, or `[0]` if they are complete.
    """

    vectors: Tensor
    values: Tensor
    rest: Tensor

    @property
    def all_values(self) -> Tensor:
        """Those of the vectors, and the one of the rest if there is any."""
        return torch.cat([self.values, self.rest])


def leading(matrix: Tensor) -> Leading:
    """All eigenvectors of a small matrix, the leading ones of a large one.

    The latter by subspace iteration (Halko, Martinsson & Tropp 2011, Alg. 4.4) from columns that
    are the same each time, so that they follow from the matrix alone.

    Args:
        matrix: symmetric positive semi-definite `[size, size]`.

    Returns:
        The eigenvectors.

    Raises:
        NotPositiveDefinite: if the matrix is not finite.
    """
    if not is_finite(matrix):
        raise NotPositiveDefinite("a curvature block is not finite")
    size, count = len(matrix), num_eigenvectors(len(matrix))
    if count == size:
        values, vectors = _eigenvectors(matrix)
        return Leading(vectors, values, values[:0])
    generator = torch.Generator().manual_seed(size)
    columns = torch.randn(size, count + _SPARE, dtype=matrix.dtype, generator=generator)
    columns = columns.to(matrix.device)
    for _ in range(_ROUNDS):
        columns = torch.linalg.qr(matrix @ columns).Q
    inner_values, inner = _eigenvectors(columns.mT @ (matrix @ columns))
    vectors, values = columns @ inner[:, -count:], inner_values[-count:]
    rest = (matrix.trace() - values.sum()).clamp_min(0) / (size - count)
    return Leading(vectors, values, rest.unsqueeze(0))


def _eigenvectors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors, found in float64: in float32 LAPACK fails now and then."""
    values, vectors = torch.linalg.eigh(matrix.to(torch.float64))
    return values.clamp_min(0).to(matrix.dtype), vectors.to(matrix.dtype)
