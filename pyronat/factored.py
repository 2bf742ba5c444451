"""Operators on large blocks that are never formed: rows of a Jacobian."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from pyronat.conjugate_gradients import IterativeUnits, conjugate_gradients
from pyronat.kronecker import Kronecker
from pyronat.operators import BlockMatrix, BlockOperator, Diagonal, Solver, cholesky
from pyronat.shared import SharedUnits
from pyronat.unit_rows import UnitRows


@dataclass(frozen=True)
class Outer:
    """Rows δ ⊗ a of one parameter.

    Attributes:
        units: δ `[rows, units]`.
        inputs: a `[rows, fan_in]`.
        columns: whether the parameter is `[fan_in, units]`, not `[units, fan_in]`.
    """

    units: Tensor
    inputs: Tensor
    columns: bool

    @property
    def width(self) -> int:
        """Number of entries of the parameter."""
        return self.units.shape[1] * self.inputs.shape[1]

    @property
    def _pair(self) -> tuple[Tensor, Tensor]:
        return (self.inputs, self.units) if self.columns else (self.units, self.inputs)

    def mv(self, vector: Tensor) -> Tensor:
        """R x `[rows]` for `[width]`."""
        first, second = self._pair
        matrix = vector.reshape(first.shape[1], second.shape[1])
        return ((first @ matrix) * second).sum(1)

    def rmv(self, weights: Tensor) -> Tensor:
        """Rᵀ y `[width]` for `[rows]`."""
        first, second = self._pair
        return ((first * weights.unsqueeze(1)).mT @ second).reshape(-1)

    def gram(self) -> Tensor:
        """R Rᵀ `[rows, rows]`."""
        return (self.units @ self.units.mT) * (self.inputs @ self.inputs.mT)

    def squares(self) -> Tensor:
        """Σ over rows of the squares `[width]`."""
        first, second = self._pair
        return (first.square().mT @ second.square()).reshape(-1)

    def scaled(self, factors: Tensor) -> Outer:
        """The rows times factors `[rows]`."""
        return replace(self, units=self.units * factors.unsqueeze(1))

    def tensors(self) -> list[Tensor]:
        """What it holds."""
        return [self.units, self.inputs]


@dataclass(frozen=True)
class Explicit:
    """Rows of one parameter, or of several, entry by entry.

    Attributes:
        matrix: `[rows, width]`.
    """

    matrix: Tensor

    @property
    def width(self) -> int:
        """Number of entries."""
        return self.matrix.shape[1]

    def mv(self, vector: Tensor) -> Tensor:
        """R x `[rows]` for `[width]`."""
        return self.matrix @ vector

    def rmv(self, weights: Tensor) -> Tensor:
        """Rᵀ y `[width]` for `[rows]`."""
        return self.matrix.mT @ weights

    def gram(self) -> Tensor:
        """R Rᵀ `[rows, rows]`."""
        return self.matrix @ self.matrix.mT

    def squares(self) -> Tensor:
        """Σ over rows of the squares `[width]`."""
        return self.matrix.square().sum(0)

    def scaled(self, factors: Tensor) -> Explicit:
        """The rows times factors `[rows]`."""
        return Explicit(self.matrix * factors.unsqueeze(1))

    def tensors(self) -> list[Tensor]:
        """What it holds."""
        return [self.matrix]


Piece: TypeAlias = Outer | Explicit


def concatenated(first: Piece, second: Piece) -> Piece:
    """Rows of one after those of the other; explicit where the two are of different form."""
    if isinstance(first, Outer) and isinstance(second, Outer):
        return Outer(
            torch.cat([first.units, second.units]),
            torch.cat([first.inputs, second.inputs]),
            first.columns,
        )
    return Explicit(torch.cat([explicit(first), explicit(second)]))


def explicit(piece: Piece) -> Tensor:
    """The rows entry by entry `[rows, width]`."""
    if isinstance(piece, Explicit):
        return piece.matrix
    first, second = piece._pair
    return (first.unsqueeze(2) * second.unsqueeze(1)).flatten(1)


@dataclass(frozen=True)
class Rows(BlockOperator):
    """G = Rᵀ R of a joint block, never formed.

    Attributes:
        pieces: R, one piece after the other along the entries of the block.
        method: "dual" solves with R Rᵀ, "cg" by conjugate gradients with products R x and Rᵀ y.
        max_rows: rows that an average keeps, the newest first; the others' share goes to them.
    """

    pieces: tuple[Piece, ...]
    method: Literal["dual", "cg"]
    max_rows: int

    @property
    def num_rows(self) -> int:
        """Number of rows of R."""
        return len(self.pieces[0].tensors()[0])

    @cached_property
    def _widths(self) -> list[int]:
        return [piece.width for piece in self.pieces]

    def forward(self, vector: Tensor) -> Tensor:
        """R x `[rows]` for `[size]`."""
        parts = zip(self.pieces, vector.split(self._widths), strict=True)
        return torch.stack([piece.mv(part) for piece, part in parts]).sum(0)

    def backward(self, weights: Tensor) -> Tensor:
        """Rᵀ y `[size]` for `[rows]`."""
        return torch.cat([piece.rmv(weights) for piece in self.pieces])

    def gram(self) -> Tensor:
        """R Rᵀ `[rows, rows]`."""
        return torch.stack([piece.gram() for piece in self.pieces]).sum(0)

    def diagonal(self) -> Tensor:
        """Diagonal of G `[size]`."""
        return torch.cat([piece.squares() for piece in self.pieces])

    def mv(self, vectors: Tensor) -> Tensor:
        """Rᵀ R x for `[1, size]`."""
        return self.backward(self.forward(vectors[0])).unsqueeze(0)

    def quadratic(self, vectors: Tensor) -> Tensor:
        """‖R x‖² for `[1, size]`, a 0-d tensor."""
        return self.forward(vectors[0]).square().sum()

    def dense(self) -> Tensor:
        """The matrix `[1, size, size]`."""
        rows = torch.cat([explicit(piece) for piece in self.pieces], 1)
        return (rows.mT @ rows).unsqueeze(0)

    def mean_diagonal(self) -> Tensor:
        """Mean of the diagonal `[1]`."""
        return self.diagonal().mean().unsqueeze(0)

    def factor(self, damping: Tensor) -> Solver:
        """G + damping · I; without damping, jitter of 1e-7 of the mean diagonal takes its place.

        Args:
            damping: `[1]`.

        Returns:
            The solver of the method.
        """
        least = 1e-7 * self.mean_diagonal()
        jitter = (least - damping).clamp_min(0)
        damped, added = damping + jitter, float(jitter)
        if self.method == "cg":
            return IterativeSolver(self, damped, added)
        gram = BlockMatrix(self.gram().unsqueeze(0).to(torch.float64))
        return DualSolver(self, damped, cholesky(gram.matrix, damped.to(torch.float64)), added)

    def __add__(self, other: Rows) -> Rows:
        """The rows of both."""
        pairs = zip(self.pieces, other.pieces, strict=True)
        pieces = tuple(concatenated(a, b) for a, b in pairs)
        return replace(self, pieces=pieces, max_rows=self.max_rows + other.max_rows)

    def lerp(self, other: Rows, share: float) -> Rows:
        """The newest rows of both, those of the other first, scaled."""
        both = other._scaled(share) + self._scaled(1 - share) if share < 1 else other
        return both._newest(max(self.max_rows, other.max_rows))

    def _scaled(self, share: float) -> Rows:
        like = self.pieces[0].tensors()[0]
        factors = like.new_full((self.num_rows,), share**0.5)
        return replace(self, pieces=tuple(piece.scaled(factors) for piece in self.pieces))

    def _newest(self, count: int) -> Rows:
        """The first rows, scaled so that the trace is that of all."""
        if self.num_rows <= count:
            return replace(self, max_rows=count)
        norms = self._norms()
        share = norms.sum() / norms[:count].sum().clamp_min(torch.finfo(norms.dtype).tiny)
        factors = share.sqrt().expand(count)

        def cut(piece: Piece) -> Piece:
            if isinstance(piece, Outer):
                return Outer(piece.units[:count], piece.inputs[:count], piece.columns)
            return Explicit(piece.matrix[:count])

        pieces = tuple(cut(piece).scaled(factors) for piece in self.pieces)
        return replace(self, pieces=pieces, max_rows=count)

    def _norms(self) -> Tensor:
        """Squared norm of each row."""
        parts = [
            piece.units.square().sum(1) * piece.inputs.square().sum(1)
            if isinstance(piece, Outer)
            else piece.matrix.square().sum(1)
            for piece in self.pieces
        ]
        return torch.stack(parts).sum(0)

    def zeros(self) -> Rows:
        """Rows of zeros."""
        return self._scaled(0.0)

    def state(self) -> dict[str, Any]:
        """Plain tensors, numbers, strings and lists."""
        return {
            "form": "Rows",
            "pieces": [
                {"tensors": piece.tensors(), "columns": getattr(piece, "columns", None)}
                for piece in self.pieces
            ],
            "method": self.method,
            "max_rows": self.max_rows,
        }


@dataclass(frozen=True)
class DualSolver(Solver):
    """(RᵀR + λ)⁻¹ = (1 − Rᵀ (λ + R Rᵀ)⁻¹ R) / λ.

    Attributes:
        rows: R.
        damping: λ `[1]`.
        lower: Cholesky factor of λ + R Rᵀ, in float64.
        jitter: part of λ that is not damping.
    """

    rows: Rows
    damping: Tensor
    lower: Solver
    jitter: float

    def solve(self, vectors: Tensor) -> Tensor:
        """The solution for `[1, size]`."""
        inner = self.lower.solve(self.rows.forward(vectors[0]).unsqueeze(0))[0]
        return (vectors - self.rows.backward(inner).unsqueeze(0)) / self.damping


@dataclass(frozen=True)
class IterativeSolver(Solver):
    """Conjugate gradients on RᵀR + λ with the diagonal as preconditioner.

    Attributes:
        rows: R.
        damping: λ `[1]`.
        jitter: part of λ that is not damping.
    """

    rows: Rows
    damping: Tensor
    jitter: float

    @cached_property
    def _inverse_diagonal(self) -> Tensor:
        return 1 / (self.rows.diagonal() + self.damping)

    def solve(self, vectors: Tensor) -> Tensor:
        """The solution for `[1, size]`, to a relative error of about ε^¾ of the type.

        Args:
            vectors: right-hand side `[1, size]`.

        Returns:
            The solution.

        Raises:
            NotPositiveDefinite: if it has not converged after `MAX_ITERATIONS`.
        """
        return conjugate_gradients(
            lambda x: self.rows.mv(x) + self.damping * x,
            lambda r: r * self._inverse_diagonal,
            vectors,
            torch.finfo(vectors.dtype).eps ** 0.75,
        )


_OF_UNITS: dict[str, Callable[[UnitRows], BlockOperator]] = {
    "SharedUnits": SharedUnits,
    "IterativeUnits": IterativeUnits,
}


def operator_from(state: dict[str, Any]) -> BlockOperator:
    """The operator of a `state`."""
    content = {key: value for key, value in state.items() if key != "form"}
    if state["form"] in _OF_UNITS:
        return _OF_UNITS[state["form"]](UnitRows(**content))
    if state["form"] == "Rows":
        content["pieces"] = tuple(_piece(**piece) for piece in content["pieces"])
    if content.get("rows") is not None:
        content["rows"] = tuple(content["rows"])
    forms = {form.__name__: form for form in (BlockMatrix, Diagonal, Kronecker, Rows)}
    return forms[state["form"]](**content)


def _piece(tensors: Sequence[Tensor], columns: bool | None) -> Piece:
    return Explicit(tensors[0]) if columns is None else Outer(tensors[0], tensors[1], columns)
