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


@dataclass(frozen=True)
class ParamBlock:
    """Parameter entries whose Fisher information is orthogonal to that of all others.

    A block is a family of `count` *units* of equal size; entries of different units are orthogonal
    as well, so the Fisher information of the block is `count` matrices.

    Attributes:
        params: parameter names, sorted.
        sites: sites whose Fisher information is summed in the block, in program order.
        structure: "unit": several units, or units whose coordinates are affine in them; "dense":
            one matrix over all entries.
        count: number of units.
        size: number of entries in each.
        exact: whether the Fisher information is a closed form rather than an approximation.
        factors: the (site, group of coordinates) pairs that the block is summed over.
        linear: for each factor, whether its coordinates are functions of one affine unit each.
        shapes: shapes of the parameters.
        units: which entries make up a unit.
        plates: names of the plates common to all sites.
    """

    params: tuple[str, ...]
    sites: tuple[str, ...]
    structure: Literal["unit", "dense", "kronecker", "diagonal"]
    count: int
    size: int
    exact: bool
    factors: tuple[tuple[str, str], ...]
    linear: tuple[bool, ...]
    shapes: tuple[tuple[int, ...], ...]
    units: Units = field(repr=False)
    plates: tuple[str, ...] = ()

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
    def matrix_entries(self) -> int:
        """Numbers in the Fisher matrices of all units, count × size²."""
        return self.count * self.size**2

    @property
    def factor_flops(self) -> float:
        """Floating-point operations of their Cholesky factorization, count × size³ / 3."""
        return self.count * self.size**3 / 3


def numel(shape: tuple[int, ...]) -> int:
    """Number of elements of a shape."""
    return prod(shape)
