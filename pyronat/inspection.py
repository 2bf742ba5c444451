"""What hiding costs a program: its missing information, measured and in words."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pyronat.errors import NotEnumerable
from pyronat.geometry import Posterior, Visible
from pyronat.recipes import Recipe
from pyronat.study import VisibleFisher, fisher

DREAMS = 5000
"""Dreams behind an estimate of the visible Fisher information."""

LEAST_RUNS = 10
"""Runs of the model at least, where each run is one dream for each datum."""

SHOWN = 8
"""Directions that are listed."""

_HOW: dict[Posterior, str] = {
    "exact": "exact, all values enumerated",
    "enumerate": "posteriors exact, {dreams} dreams",
    "guide": "posteriors by the guide, {dreams} dreams; a lower bound where the guide is not exact",
}


@dataclass(frozen=True)
class Missing:
    """The missing information of a program.

    Attributes:
        fisher: G and G_V.
        how: how it was measured, in words.
        directions: share of missing information m of each direction, the most missing first, and
            the share of each parameter in the direction's squared length.
    """

    fisher: VisibleFisher
    how: str
    directions: tuple[tuple[float, Mapping[str, float]], ...]

    def as_list(self) -> list[dict[str, Any]]:
        """The directions as plain numbers."""
        return [{"missing": m, "params": dict(shares)} for m, shares in self.directions]

    def report(self) -> Iterator[str]:
        """Lines of text.

        Yields:
            A heading, and a line for each of the first directions.
        """
        yield f"Missing information ({self.how})"
        if not self.directions:
            yield "  none: nothing is hidden from a parameter of the model"
            return
        yield "  share  EM halves its error in  mostly along"
        for share, parts in self.directions[:SHOWN]:
            largest = sorted(parts.items(), key=lambda part: -part[1])[:3]
            along = ", ".join(f"{name} ({part:.0%})" for name, part in largest if part >= 0.01)
            yield f"  {share:5.3f}  {_half_life(share):>23}  {along}"
        if len(self.directions) > SHOWN:
            rest = [share for share, _ in self.directions[SHOWN:]]
            yield f"  and {len(rest)} more, from {rest[0]:.3f} to {rest[-1]:.3f}"


def _half_life(share: float) -> str:
    """Iterations in which m^t falls to a half."""
    if share <= 0.5:
        return "1 iteration"
    if share > 1 - 1e-4:
        return "more than 6,900"
    return f"{math.ceil(math.log(0.5) / math.log(share)):,} iterations"


def missing_information(recipe: Recipe, dreams: int = DREAMS) -> Missing:
    """Measures which information hiding takes away, as exactly as the program allows.

    Eigenvectors of G⁻¹G_V: in a direction whose share of missing information is m, EM's error
    shrinks by the factor m in each iteration (Dempster, Laird & Rubin 1977). With `NotEnumerable`
    all values are enumerated first, then hidden values alone, then the guide proposes them.

    Args:
        recipe: the program.
        dreams: dreams where it cannot be computed exactly.

    Returns:
        The directions.

    Raises:
        NotEnumerable: if hidden values cannot be enumerated, and the guide does not draw them.
    """
    drawn = bool(recipe.hidden.drawn)
    ways: list[Posterior] = ["exact", "enumerate", *(["guide"] if drawn else [])]  # type: ignore[list-item]
    for posterior in ways:
        try:
            found = _measured(recipe, posterior, dreams)
        except NotEnumerable:
            if posterior == ways[-1]:
                raise
            continue
        directions = tuple((d.missing, _shares(d.vector)) for d in found.missing_information())
        return Missing(found, _HOW[posterior].format(dreams=f"{dreams:,}"), directions)
    raise NotEnumerable("there is no way to measure it")


def _measured(recipe: Recipe, posterior: Posterior, dreams: int) -> VisibleFisher:
    program = recipe.program
    return fisher(
        program.model,
        *program.args,
        geometry=Visible(mixing=0, posterior=posterior, num_dreams=dreams),
        guide=recipe.guide if posterior == "guide" else None,
        num_samples=max(LEAST_RUNS, dreams // program.size),
        **program.kwargs,
    )


def _shares(vector: Mapping[str, Tensor]) -> dict[str, float]:
    """Share of each parameter in the squared length of a vector."""
    squares = {name: float(value.square().sum()) for name, value in vector.items()}
    total = sum(squares.values()) or 1.0
    return {name: square / total for name, square in squares.items()}
