"""Parameter blocks: sets of parameter entries with Fisher information of their own.

Static and hashable; no tensor, no torch, no Pyro.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Literal, TypeAlias


@dataclass(frozen=True)
class UnitAxes:
    """Units that run along axes of every parameter, as the rows of a weight and its biases do.

    Attributes:
        axes: for each parameter of the block, the axes that number the units, in row-major order.
    """

    axes: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class UnitEntries:
    """Units that are listed entry by entry.

    Attributes:
        entries: `[count][size]` positions in the concatenation of the flattened parameters.
    """

    entries: tuple[tuple[int, ...], ...]


Units: TypeAlias = UnitAxes | UnitEntries

Structure: TypeAlias = Literal[
    "unit", "dense", "shared", "kronecker", "kfac", "dual", "cg", "diagonal"
]
"""How the Fisher information of a block is held, see `ParamBlock.structure`."""

SCORE = "score"
"""Name of a group whose coordinates are log densities at simulated values."""

SUPPORT = "support"
"""Name of a group whose coordinates are log probabilities of all values."""

BY_VALUE = frozenset({SCORE, SUPPORT})
"""Groups whose coordinates are log densities of particular values."""

UNKNOWN_FAMILY = "unknown"
"""Name of the one group of a distribution whose Fisher information cannot even be simulated."""

CHOICES = frozenset({"dense", "shared", "kronecker", "kfac", "dual", "cg", "diagonal"})
"""Structures that a user may ask for."""

FACTORED = frozenset({"kronecker", "kfac"})
"""Structures that take a block layer by layer."""

MAX_DENSE_SIZE = 2048
"""Largest number of entries of a joint block that is held as a matrix by default."""

COMPLETE = 128
"""Size of a matrix up to which all of its eigenvectors are taken."""

LEADING = 32
"""Leading eigenvectors that are taken of a larger one.

On binarized digits a variational autoencoder with layers of 784, 400 and 20 units is no better with
64 after 900 steps, nor a sigmoid belief network with layers of 784, 200 and 200 units after 3,000
with all 201.
"""


@dataclass(frozen=True)
class LayerAxes:
    """A layer inside a joint block: a weight, a bias, or both.

    Attributes:
        params: parameter names, sorted.
        axes: for each of them, the axis that numbers the units.
    """

    params: tuple[str, ...]
    axes: tuple[int, ...]


@dataclass(frozen=True)
class ParamBlock:
    """Parameter entries whose Fisher information is orthogonal to that of all others.

    A block is a family of `count` *units* of equal size; entries of different units are orthogonal
    as well, so the Fisher information of the block is `count` matrices.

    Attributes:
        params: parameter names, sorted.
        sites: sites whose Fisher information is summed in the block, in program order.
        structure: how the Fisher information of the block is held,

            - "unit": a matrix for each of several units, or units whose coordinates are affine in
              them;
            - "dense": one matrix over all entries;
            - "shared": linear units of a layer by their diagonals in one basis, of large units in
              its leading eigenvectors;
            - "kronecker": B ⊗ A for each layer of a network, its eigenvalues corrected, without
              what couples layers;
            - "kfac": the same without the correction;
            - "dual": rows of Jacobians, solved with in the space of samples;
            - "cg": the same, solved with by conjugate gradients, without any matrix; or linear
              units by their inputs and weights, whose matrices are not formed either;
            - "diagonal": the diagonal alone.
        count: number of units.
        size: number of entries in each.
        exact: whether the Fisher information, given the parents, is computed exactly; else it is
            an approximation, or estimated from simulated values.
        factors: the (site, group of coordinates) pairs that the block is summed over.
        linear: for each factor, whether its coordinates are functions of one affine unit each.
        shapes: shapes of the parameters.
        units: which entries make up a unit.
        plates: names of the plates common to all sites.
        layers: layers of a network in a joint block, where they have been recognized.
        network: whether there is a weight among them, or among those that the block is a part of.
    """

    params: tuple[str, ...]
    sites: tuple[str, ...]
    structure: Structure
    count: int
    size: int
    exact: bool
    factors: tuple[tuple[str, str], ...]
    linear: tuple[bool, ...]
    shapes: tuple[tuple[int, ...], ...]
    units: Units = field(repr=False)
    plates: tuple[str, ...] = ()
    layers: tuple[LayerAxes, ...] = ()
    network: bool = False

    @property
    def name(self) -> str:
        """The parameter names, joined; with the size where the parameters have other blocks too."""
        names = ", ".join(self.params)
        return names if isinstance(self.units, UnitAxes) else f"{names} (size {self.size})"

    @property
    def num_entries(self) -> int:
        """Number of entries in all units."""
        return self.count * self.size

    @property
    def explicit(self) -> bool:
        """Whether the block is held as one matrix for each unit."""
        return self.structure in {"unit", "dense"}

    @property
    def by_unit(self) -> bool:
        """Whether the units, or the one there is, are told apart, and have a root."""
        return self.explicit or self.structure == "shared"

    @property
    def matrix_entries(self) -> int:
        """Numbers in the Fisher matrices of all units, count × size², or in their factors."""
        if self.structure in FACTORED:
            return sum(a * a + b * b for a, b in self.layer_sizes())
        if self.structure == "shared":
            return (self.count + self.size) * num_eigenvectors(self.size)
        return self.num_entries if not self.explicit else self.count * self.size**2

    @property
    def factor_flops(self) -> float:
        """Operations of a Cholesky factorization, count × size³ / 3, or of that of the factors."""
        if self.structure in FACTORED:
            return sum(a**3 + b**3 for a, b in self.layer_sizes()) / 3
        if self.structure == "shared":
            return float(self.size**2 * num_eigenvectors(self.size))
        return self.num_entries if not self.explicit else self.count * self.size**3 / 3

    def layer_sizes(self) -> list[tuple[int, int]]:
        """(fan-in, units) of each layer."""
        shape_of = dict(zip(self.params, self.shapes, strict=True))
        sizes = []
        for layer in self.layers:
            units = shape_of[layer.params[0]][layer.axes[0]]
            sizes.append((sum(prod(shape_of[name]) for name in layer.params) // units, units))
        return sizes


def num_eigenvectors(size: int) -> int:
    """Eigenvectors that are taken of a matrix: all of a small one, leading ones of a large one."""
    return size if size <= COMPLETE else LEADING


def numel(shape: tuple[int, ...]) -> int:
    """Number of elements of a shape."""
    return prod(shape)
