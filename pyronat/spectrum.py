"""The visible geometry as a low-rank correction of the local blocks.

With L Lᵀ = G + Λ, the damped full-system blocks, and U, λ the eigenvectors and eigenvalues of
L⁻¹ G_V L⁻ᵀ where they have been estimated,

    A_ρ⁻¹ g = L⁻ᵀ [ I + U diag(1/κ − 1) Uᵀ ] L⁻¹ g,    κ = (1 − ρ) λ + ρ,

for every mixing ρ. Directions that no dream has seen have λ = 1: there the step is that of the
full geometry. 1 − λ is the share of information that hiding takes away (Ay, Sec. 3; Dempster,
Laird & Rubin 1977: the convergence rate of EM).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from pyronat.operators import Whitener
from pyronat.steps import RetainedShare

Kind: TypeAlias = Literal["visible", "missing", "observed"]
"""What an estimate is of: G_V, G − G_V, or −∇² log p(v)."""

MAX_ROWS = 200
"""Rows that stand for the missing information of a district that is not kept as a matrix."""

MAX_NUMBERS = 2**22
"""Numbers in those rows, of which very wide districts keep fewer.

With four times as many, a sigmoid belief network with layers of 784, 200 and 200 units was as good
after 600 and after 2,000 steps on binarized digits.
"""

_MAX_DOUBLE = 2**18
"""Numbers in the rows of a district up to which they are taken to float64.

Of more, only the eigenvalues of their Gram matrix are found in float64. Rounding then spoils the
directions of its smallest eigenvalues, which hardly count in a step.
"""

_NEGLIGIBLE = 1e-6
"""Missing information, as a share of the whole, that is taken for none."""


@dataclass(frozen=True)
class VisibleAverage:
    """Running average of what dreams say about the visible Fisher of some blocks.

    Attributes:
        kind: what is estimated.
        matrix: the estimate `[width, width]`, or None.
        rows: rows whose Gram matrix RᵀR is the estimate `[rows, width]`, or None.
        num_dreams: dreams behind it, averaging included; infinite for exact expectations.
        max_rows: rows that are kept.
    """

    kind: Kind
    matrix: Tensor | None
    rows: Tensor | None
    num_dreams: float
    max_rows: int = MAX_ROWS

    def mix(self, other: VisibleAverage, share: float) -> VisibleAverage:
        """(1 − share) of this and `share` of a newer one; that alone if it is of another form."""
        keep = 1 - share
        if keep == 0 or (self.kind, self.matrix is None) != (other.kind, other.matrix is None):
            return other
        count = 1 / max(keep**2 / self.num_dreams + share**2 / other.num_dreams, 1e-30)
        if self.matrix is not None and other.matrix is not None:
            return replace(
                other, matrix=torch.lerp(self.matrix, other.matrix, share), num_dreams=count
            )
        assert self.rows is not None and other.rows is not None
        parts = [(other.rows, share**0.5), (self.rows, keep**0.5)]
        return replace(other, rows=sketched(parts, self.max_rows), num_dreams=count)


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues and eigenvectors of L⁻¹ G_V L⁻ᵀ, where they have been estimated.

    Attributes:
        factors: L by block, in the order of the columns.
        directions: U `[width, rank]`, orthonormal.
        retained: λ `[rank]`, the share of information that is retained; all others are 1.
        damps_mixed: whether mixing counts the damping too, A = (1−ρ) G_V + ρ (G + Λ), rather than
            A = (1−ρ) G_V + ρ G + Λ.
        damping: Λ by block, `[count]`.
        noise: parameter entries over dreams behind the estimate.
    """

    factors: Mapping[str, Whitener]
    directions: Tensor
    retained: Tensor
    damps_mixed: bool
    damping: Mapping[str, Tensor] = field(default_factory=dict)
    noise: float = 0.0

    @cached_property
    def least(self) -> float:
        """The smallest λ, 1 where nothing is missing; one transfer from the device."""
        return float(self.retained.min()) if len(self.retained) else 1.0

    def missing(self) -> float:
        """Largest share of information that hiding takes away, 1 − λ."""
        return 1 - self.least

    @cached_property
    def least_share(self) -> float:
        """The smallest λ in units of G without damping, where G is more than the damping."""
        full = 1 - self._damping_share()
        found = self.retained / full if self.damps_mixed else 1 - (1 - self.retained) / full
        found = found[full > 0.5].clamp(0, 1)
        return float(found.min()) if len(found) else 1.0

    def _damping_share(self) -> Tensor:
        """uᵀ L⁻¹ Λ L⁻ᵀ u `[rank]` of every direction u."""
        shapes = [factor.shape for factor in self.factors.values()]
        pieces = self.directions.mT.split([shape.numel() for shape in shapes], 1)
        total = torch.zeros_like(self.retained)
        for (name, factor), shape, piece in zip(self.factors.items(), shapes, pieces, strict=True):
            squares = factor.unwhiten(piece.unflatten(1, shape)).square().sum(-1)
            if name in self.damping:
                total += (squares * self.damping[name]).sum(-1).to(total)
        return total

    def mixing_by(self, rule: float | RetainedShare) -> float:
        """ρ, as it is given or as a rule has it for this district."""
        return rule if isinstance(rule, float) else rule.of(self.least_share, self.noise)

    def stretch(self, mixing: float) -> Tensor:
        """κ `[rank]`: A_ρ in units of the damped full geometry, with the mixing it needs."""
        mixing = max(mixing, self.least_mixing())
        return (1 - mixing) * self.retained + mixing

    def damped(self, mixing: float) -> float:
        """Share of the damping that A_ρ contains."""
        return max(mixing, self.least_mixing()) if self.damps_mixed else 1.0

    def least_mixing(self) -> float:
        """The smallest mixing for which A_ρ is safely positive; 0 unless λ has negative entries."""
        if self.least >= 0:
            return 0.0
        bound = -self.least / (1 - self.least)
        return min(2 * bound, (1 + bound) / 2)

    def solve(self, gradients: Mapping[str, Tensor], mixing: float) -> dict[str, Tensor]:
        """A_ρ⁻¹ g.

        Args:
            gradients: g by block, `[count, size]`.
            mixing: ρ.

        Returns:
            The solution by block, `[count, size]`.
        """
        white = self.whitened(gradients)
        coefficients = (1 / self.stretch(mixing) - 1) * (white @ self.directions)
        return self.unwhitened(white + self.directions @ coefficients, gradients)

    def whitened(self, vectors: Mapping[str, Tensor]) -> Tensor:
        """L⁻¹ x `[width]`, for x by block."""
        parts = [factor.whiten(vectors[name]).flatten() for name, factor in self.factors.items()]
        return torch.cat(parts).to(self.directions)

    def unwhitened(self, white: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """L⁻ᵀ x by block `[count, size]`, for x `[width]`, in the type of other vectors."""
        pieces = white.split([factor.shape.numel() for factor in self.factors.values()])
        return {
            name: factor.unwhiten(piece.reshape(like[name].shape)).to(like[name].dtype)
            for (name, factor), piece in zip(self.factors.items(), pieces, strict=True)
        }


def sketched(parts: Sequence[tuple[Tensor, float]], count: int) -> Tensor:
    """Fewer rows whose Gram matrix has the same expectation: sums with random signs.

    Args:
        parts: rows `[rows, width]`, each with a factor on them.
        count: rows to keep at most.

    Returns:
        `[at most count, width]`.
    """
    total = sum(len(rows) for rows, _ in parts)
    first = parts[0][0]
    found = first.new_empty(min(total, count), first.shape[1])
    signs = torch.randint(2, (total, 1), device=first.device).to(first) * 2 - 1
    # Piece by piece, so that the rows are not written down once more.
    place, written = 0, 0
    for rows, factor in parts:
        while len(rows):
            some, rows = rows.tensor_split([len(found) - place])
            scale = signs[written : written + len(some)] * factor
            target = found[place : place + len(some)]
            if written < len(found):
                torch.mul(some, scale, out=target)
            else:
                target.addcmul_(some, scale)
            written, place = written + len(some), (place + len(some)) % len(found)
    return found


def spectrum(
    average: VisibleAverage,
    factors: Mapping[str, Whitener],
    damping: Mapping[str, Tensor] | None = None,
) -> Spectrum:
    """Eigenvalues of the visible Fisher in units of the damped full-system one.

    Estimates of G_V and of G − G_V have eigenvalues between 0 and 1, as the true ones do; those of
    the observed information are left as they are. A few rows are shrunk towards no missing
    information at all, by the share of their squared norm that is not noise (Ledoit & Wolf 2004).

    Args:
        average: the estimate.
        factors: of its damped blocks, in the order of its columns.
        damping: what was added to their diagonals before, `[count]`; nothing by default.

    Returns:
        The spectrum, in float64; in the type of the factors for wide districts.
    """
    if average.matrix is not None:
        half = _whitened(average.matrix, factors)
        inner = _symmetric(_whitened(half.mT, factors).double())
        values, directions = torch.linalg.eigh(inner)
        missing = values if average.kind == "missing" else 1 - values
        if average.kind != "observed":
            missing = missing.clamp(0, 1)
        kept = missing.abs() > _NEGLIGIBLE
        directions = directions[:, kept]
    else:
        assert average.rows is not None
        white = _whitened(average.rows, factors)
        white = white if white.numel() > _MAX_DOUBLE else white.double()
        gram = white @ white.mT
        values, vectors = torch.linalg.eigh(_symmetric(gram).double())
        width = average.rows.shape[1]
        share = _signal_share(gram.diagonal(), values, width, average.num_dreams)
        missing = (values * share).clamp(0, 1)
        kept = missing > _NEGLIGIBLE
        directions = white.mT @ (vectors[:, kept] / values[kept].sqrt()).to(white)
    return Spectrum(
        dict(factors),
        directions,
        (1 - missing[kept]).to(directions),
        average.kind != "missing",
        damping or {},
        len(directions) / average.num_dreams,
    )


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.mT) / 2


def _whitened(rows: Tensor, factors: Mapping[str, Whitener]) -> Tensor:
    """R L⁻ᵀ of rows `[rows, width]`, in the type of L."""
    shapes = [factor.shape for factor in factors.values()]
    parts = rows.split([shape.numel() for shape in shapes], 1)
    return torch.cat(
        [
            factor.whiten(part.unflatten(1, shape)).flatten(1)
            for factor, shape, part in zip(factors.values(), shapes, parts, strict=True)
        ],
        1,
    )


def _signal_share(squares: Tensor, values: Tensor, width: int, num_dreams: float) -> float:
    """Share of ‖RᵀR‖² that is not sampling noise, 1 where dreams are many.

    The rows are independent, so that the noise of their sum is about Σ ‖r‖⁴ − ‖RᵀR‖² / n.

    Args:
        squares: ‖r‖² `[rows]`.
        values: eigenvalues of RᵀR that are not 0.
        width: of the rows.
        num_dreams: dreams behind them.

    Returns:
        The share.
    """
    total = float(values.square().sum())
    if num_dreams >= ENOUGH * width or total == 0:
        return 1.0
    noise = float(squares.square().sum()) - total / len(squares)
    return max(0.0, 1 - max(noise, 0.0) / total)


ENOUGH = 3
"""Dreams per parameter entry from which on no shrinkage is needed."""
