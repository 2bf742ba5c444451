"""What a tensor element can depend on: sets of labels in three representations.

A *shadow* is an integer tensor `[planes, *shape]`; 0 stands for "depends on nothing". A lattice
says how shadows are joined where an operation combines elements. `LabelSets` keeps every set as
bits, `Origins` keeps one origin or "several", for as many elements as there are.
`entries.EntryGroups` keeps sets of parameter entries.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

Movement = Callable[[Tensor], Tensor]
"""An operation that only moves elements, to be applied to one plane of a shadow."""


@dataclass(frozen=True)
class Selection:
    """Elements that are read at positions which another tensor holds, as by `table[index]`.

    Attributes:
        dims: dimensions of the table that are indexed.
        move: the operation; applied to a tensor of the table's shape.
        positions: number of the position in the index that each output element is read by, of the
            output's shape.
        index: shadow of the index laid along the output, or None if it depends on nothing.
        indices: the tensors that hold the positions.
    """

    dims: tuple[int, ...]
    move: Movement
    positions: Tensor
    index: Tensor | None
    indices: tuple[Tensor, ...]


class Lattice(ABC):
    """Joins of the sets that shadows stand for.

    Attributes:
        planes: size of the leading dimension of a shadow.
    """

    planes: int

    @abstractmethod
    def join(self, first: Tensor, second: Tensor) -> Tensor:
        """Unions of two shadows, elementwise after broadcasting."""

    @abstractmethod
    def join_along(self, shadow: Tensor, dims: Sequence[int]) -> Tensor:
        """Unions along dimensions of the tensor, which are kept with size 1."""

    def join_elements(self, shadow: Tensor) -> Tensor:
        """Union of all elements, `[planes]`."""
        flat = shadow.reshape(self.planes, -1)
        return self.join_along(flat, (0,)).reshape(self.planes)

    def join_many(self, shadows: Sequence[Tensor]) -> Tensor:
        """Unions of several shadows."""
        return reduce(self.join, shadows)

    def move(self, shadow: Tensor, movement: Movement) -> Tensor:
        """A shadow whose elements are moved as those of the tensor are."""
        return torch.stack([movement(plane.contiguous()) for plane in shadow])

    def select(self, shadow: Tensor, selection: Selection) -> Tensor:
        """Elements read at positions: the present ones, or any where the positions depend."""
        if selection.index is None:
            return self.move(shadow, selection.move)
        anywhere = self.join_along(shadow, selection.dims).expand(shadow.shape)
        return self.join(self.move(anywhere, selection.move), selection.index)

    @property
    def follows_positions(self) -> bool:
        """Whether positions in an index count as constants of the program."""
        return True


class LabelSets(Lattice):
    """Sets of labels out of a fixed sequence, as bits of 64-bit integers.

    Args:
        labels: names of the labels.
    """

    BITS = 62

    def __init__(self, labels: Sequence[str]) -> None:
        self._labels = tuple(labels)
        self._places = {label: divmod(i, self.BITS) for i, label in enumerate(labels)}
        self.planes = 1 + max(len(labels) - 1, 0) // self.BITS

    def of(self, label: str) -> Tensor:
        """The set of one label, `[planes]`."""
        plane, bit = self._places[label]
        code = torch.zeros(self.planes, dtype=torch.int64, device="cpu")
        code[plane] = 1 << bit
        return code

    def decode(self, joined: Tensor) -> frozenset[str]:
        """The labels of a joined set `[planes]`."""
        found = []
        for plane, bits in enumerate(joined.tolist()):
            while bits:
                lowest = bits & -bits
                found.append(self._labels[plane * self.BITS + lowest.bit_length() - 1])
                bits ^= lowest
        return frozenset(found)

    def join(self, first: Tensor, second: Tensor) -> Tensor:
        """Bitwise or."""
        return first | second

    def join_along(self, shadow: Tensor, dims: Sequence[int]) -> Tensor:
        """Bitwise or by halves."""
        for dim in dims:
            axis = dim % (shadow.dim() - 1) + 1
            while shadow.shape[axis] > 1:
                half = shadow.shape[axis] // 2
                left, right = shadow.narrow(axis, 0, half), shadow.narrow(axis, half, half)
                rest = shadow.narrow(axis, 2 * half, shadow.shape[axis] - 2 * half)
                shadow = torch.cat([left | right, rest], axis)
            if shadow.shape[axis] == 0:
                shadow = shadow.new_zeros([
                    1 if i == axis else n for i, n in enumerate(shadow.shape)
                ])
        return shadow


class Origins(Lattice):
    """One origin of each element, numbered from 1 in every plane, or `SEVERAL`.

    Args:
        planes: independent numberings, as one for each plate.
    """

    SEVERAL = -1

    def __init__(self, planes: int) -> None:
        self.planes = planes

    def join(self, first: Tensor, second: Tensor) -> Tensor:
        """The common origin, or `SEVERAL`."""
        several = torch.full_like(first, self.SEVERAL)
        agree = (second == 0) | (first == second)
        return torch.where(first == 0, second, torch.where(agree, first, several))

    def join_along(self, shadow: Tensor, dims: Sequence[int]) -> Tensor:
        """The common origin along the dimensions, or `SEVERAL`."""
        axes = [dim % (shadow.dim() - 1) + 1 for dim in dims]
        if shadow.numel() == 0:
            return shadow.new_zeros([1 if i in axes else n for i, n in enumerate(shadow.shape)])
        highest = shadow.amax(axes, keepdim=True)
        agree = ((shadow == 0) | (shadow == highest)).all(axes[0], keepdim=True) if axes else None
        for axis in axes[1:]:
            assert agree is not None
            agree = agree.all(axis, keepdim=True)
        if agree is None:
            return shadow
        return torch.where(agree, highest, torch.full_like(highest, self.SEVERAL))
