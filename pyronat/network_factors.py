"""Factors of joint blocks of networks: Kronecker factors of a layer, rows of a whole block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pyronat.curvature import Curvature, Factor
from pyronat.datum_rows import Data, LayerRows, along_rows, by_datum
from pyronat.errors import UnsupportedProgram
from pyronat.factored import Explicit, Outer, Piece, Rows
from pyronat.families import Group
from pyronat.kronecker import Kronecker
from pyronat.operators import BlockOperator, Diagonal
from pyronat.records import SiteRecord


@dataclass(frozen=True)
class LayerFactor(Factor):
    """What one site contributes to a layer that is held in Kronecker factors.

    Attributes:
        block: name of the block of the layer.
        record: the site in that run.
        group: the coordinates.
        data: the data of the site.
        rows: of the layer's first parameter, with a square root of the Fisher information.
        reference: the same with the largest Fisher information, or None where unbounded.
        inputs: a of all parameters of the layer by tap `[rows, fan_in]`, in the order of the block.
        corrected: whether rows are kept to correct the eigenvalues.
    """

    block: str
    record: SiteRecord
    group: Group
    data: Data
    rows: LayerRows
    reference: LayerRows | None
    inputs: tuple[Tensor, ...]
    corrected: bool

    def curvature(self, weights: Tensor, with_matrix: bool = True) -> Curvature:
        """B = Σ_n w_n δ δᵀ and A = mean of a aᵀ, see `Factor.curvature`."""
        of_data = self.data.weights(weights.to(self.inputs[0].dtype))
        flowing, inputs = self._stacked(self.rows), torch.cat(self.inputs)
        spread = torch.cat([self._along(of_data, len(part)) for part in self.inputs])
        operator = self._operator(flowing, inputs, spread) if with_matrix else None
        largest = flowing if self.reference is None else self._stacked(self.reference)
        moved = (largest.square().sum(0) * spread.unsqueeze(1)).mT
        mass = of_data.sum().clamp_min(torch.finfo(of_data.dtype).tiny)
        tiny = torch.finfo(spread.dtype).tiny
        mean_reach = spread @ inputs.abs().sum(1) / spread.sum().clamp_min(tiny)
        return Curvature(
            operator,
            leverage=self.record.largest_scale * (moved @ inputs.square().sum(1)) / mass,
            reach=2 * (moved.sum(1) / mass).sqrt() * mean_reach,
            mass=of_data.sum(),
        )

    def _operator(self, flowing: Tensor, inputs: Tensor, spread: Tensor) -> Kronecker:
        weighted = flowing * spread.sqrt().unsqueeze(1)
        flat = weighted.flatten(0, 1)
        mass = spread.sum()
        rows = self._by_datum(weighted, inputs) if self.corrected else None
        shares = inputs * (spread / mass.clamp_min(1e-30)).unsqueeze(1)
        return Kronecker(shares.mT @ inputs, flat.mT @ flat, mass, rows)

    def _by_datum(self, flowing: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """δ and a with the rows of each datum together, one datum for each cotangent."""
        lengths, order = [len(part) for part in self.inputs], self.rows.order

        def together(tensor: Tensor) -> Tensor:
            if order is None:
                return tensor.flatten(0, 1).unsqueeze(1)
            parts = tensor.split(lengths, 1)
            return torch.cat([by_datum(part, self.data.count, order) for part in parts], 2).flatten(
                0, 1
            )

        return together(flowing), together(inputs.expand(len(flowing), *inputs.shape))

    def _stacked(self, rows: LayerRows) -> Tensor:
        """δ of all taps `[num_cotangents, rows, units]`."""
        return torch.cat(rows.flowing, 1)

    def _along(self, of_data: Tensor, rows: int) -> Tensor:
        """Weights of the rows of a tap.

        Args:
            of_data: weights of the data.
            rows: number of rows.

        Returns:
            `[rows]`.

        Raises:
            UnsupportedProgram: if weights differ but rows cannot be assigned to data.
        """
        if self.rows.order is not None:
            return along_rows(of_data, rows, self.rows.order)
        if len(of_data) and not bool((of_data == of_data[0]).all()):
            raise UnsupportedProgram(
                f"the data of site {self.record.name!r} have weights of their own, but a layer of "
                f"{self.block} mixes them, as BatchNorm does; use Full('model'), or a loss without "
                "importance weights"
            )
        return of_data[:1].expand(rows)


@dataclass(frozen=True)
class RowsFactor(Factor):
    """What one site contributes to a joint block that is held by rows.

    Attributes:
        block: name of the block.
        record: the site in that run.
        group: the coordinates.
        data: the data of the site.
        pieces: rows `[num_cotangents * count, *]` along the entries of the block.
        reference: rows with the largest Fisher information, or None where unbounded.
        structure: how the block is held.
        max_rows: rows that an average keeps.
    """

    block: str
    record: SiteRecord
    group: Group
    data: Data
    pieces: tuple[Piece, ...]
    reference: tuple[Piece, ...] | None
    structure: Literal["dual", "cg", "diagonal"]
    max_rows: int

    def curvature(self, weights: Tensor, with_matrix: bool = True) -> Curvature:
        """The rows times √w, see `Factor.curvature`."""
        like = self.pieces[0].tensors()[0]
        of_data = self.data.weights(weights.to(like.dtype))
        scaled = self._weighted(self.pieces, of_data)
        largest = scaled if self.reference is None else self._weighted(self.reference, of_data)
        mass = of_data.sum().clamp_min(torch.finfo(of_data.dtype).tiny)
        trace = torch.stack([piece.squares().sum() for piece in largest]).sum() / mass
        operator: BlockOperator | None = None
        if with_matrix and self.structure == "diagonal":
            operator = Diagonal(torch.cat([piece.squares() for piece in scaled]).unsqueeze(0))
        elif with_matrix and self.structure != "diagonal":
            operator = Rows(scaled, self.structure, self.max_rows)
        size = sum(piece.width for piece in scaled)
        return Curvature(
            operator,
            leverage=(self.record.largest_scale * trace).to(trace).unsqueeze(0),
            reach=2 * (trace * size).sqrt().unsqueeze(0),
            mass=of_data.sum(),
        )

    @staticmethod
    def _weighted(pieces: tuple[Piece, ...], of_data: Tensor) -> tuple[Piece, ...]:
        rows = len(pieces[0].tensors()[0])
        factors = of_data.clamp_min(0).sqrt().repeat(rows // len(of_data))
        return tuple(piece.scaled(factors) for piece in pieces)


def piece_of(rows: LayerRows, count: int) -> Piece:
    """Rows of a layer in the entries of its parameter."""
    outer = rows.outer(count)
    leaf = rows.layer.leaf
    if outer is not None and leaf.dim() == 2 and min(leaf.shape) > 1:
        return Outer(*outer, columns=rows.layer.unit_axis == 1)
    return Explicit(rows.explicit(count).flatten(0, 1))
