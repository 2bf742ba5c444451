"""Conjugate gradients on many systems at once, and linear units that are solved with by them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyronat.errors import NotPositiveDefinite
from pyronat.operators import BlockOperator, Solver
from pyronat.shared import SharedSolver, SharedUnits
from pyronat.unit_rows import MAX_ROWS, UnitRows

MAX_ITERATIONS = 1000

UNITS_TOLERANCE = 0.07
"""Estimated error of a solution for units in the norm of their damped matrices, relative.

The estimate was 0.7 to 1 of the true error on layers of 65 to 785 inputs with saturated units at
the default damping, half of it at a hundredth of that.
"""


def conjugate_gradients(
    product: Callable[[Tensor], Tensor],
    precondition: Callable[[Tensor], Tensor],
    right: Tensor,
    tolerance: float,
) -> Tensor:
    """Solves A_u x_u = b_u for all u, each with step lengths of its own (Hestenes & Stiefel 1952).

    It ends when Σ_u r_uᵀ M_u⁻¹ r_u of the residuals r is at most tolerance² of Σ_u x_uᵀ A_u x_u:
    that is the squared error in the norm of A, relative to the solution, where the preconditioner
    M is A. Wherever it ends, xᵀ A x = xᵀ b. Each iteration waits for one number from the device.

    Args:
        product: x → A x `[count, size]`.
        precondition: r → M⁻¹ r `[count, size]`.
        right: b `[count, size]`.
        tolerance: relative error.

    Returns:
        x `[count, size]`; not finite where b is not.

    Raises:
        NotPositiveDefinite: if it has not converged after `MAX_ITERATIONS`.
    """
    found, residual = torch.zeros_like(right), right
    direction = preconditioned = precondition(residual)
    energy, gained = _inner(residual, preconditioned), 0.0
    for _ in range(MAX_ITERATIONS):
        image = product(direction)
        length = _ratio(energy, _inner(direction, image))
        found, residual = found + length * direction, residual - length * image
        preconditioned = precondition(residual)
        before, energy = energy, _inner(residual, preconditioned)
        left, gain = torch.stack([energy.sum(), (length * before).sum()]).tolist()
        gained += gain
        if not left > tolerance**2 * gained:
            return found
        direction = preconditioned + _ratio(energy, before) * direction
    raise NotPositiveDefinite(
        f"conjugate gradients have not converged in {MAX_ITERATIONS} iterations; raise the "
        "damping, or choose another structure"
    )


def _inner(first: Tensor, second: Tensor) -> Tensor:
    """Products of vectors `[count, size]` → `[count, 1]`."""
    return (first * second).sum(1, keepdim=True)


def _ratio(first: Tensor, second: Tensor) -> Tensor:
    """Their ratio, and 0 for systems that are solved."""
    return torch.where(second > 0, first / second, 0.0)


@dataclass(frozen=True)
class IterativeUnits(BlockOperator):
    """G_u = Σ_n w_nu a_n a_nᵀ for every unit u of a layer, without any matrix of a unit.

    A product with all of them is one product forward through the layer and one backward. Of an
    average the newest rows are kept, and what is older in one basis, as in `shared.SharedUnits`.

    Attributes:
        rows: what the G_u are sums of.
    """

    rows: UnitRows

    def mv(self, vectors: Tensor) -> Tensor:
        """G_u x for `[units, size]`."""
        inputs = self.rows.inputs
        products = ((inputs @ vectors.mT) * self.rows.weights).mT @ inputs
        return self.rows.plus_rest(products, vectors)

    def dense(self) -> Tensor:
        """The matrices `[units, size, size]`."""
        return self.rows.gram()

    def mean_diagonal(self) -> Tensor:
        """Mean of the diagonal of each G_u `[units]`."""
        return self.rows.mean_diagonal()

    def factor(self, damping: Tensor) -> IterativeUnitsSolver:
        """G + damping, with jitter of 1e-7 of the mean diagonal where that is missing.

        Args:
            damping: `[units]`.

        Returns:
            The solver.
        """
        nearby = SharedUnits(self.rows).factor(damping)
        return IterativeUnitsSolver(
            self, damping + self.rows.jitter(damping), nearby, nearby.jitter
        )

    def __add__(self, other: IterativeUnits) -> IterativeUnits:
        """The rows of both."""
        return IterativeUnits(self.rows + other.rows)

    def lerp(self, other: IterativeUnits, share: float) -> IterativeUnits:
        """The rows of both, weighted; those of this are `compact` where they are many."""
        return IterativeUnits(self.compact().rows.lerp(other.rows, share))

    def compact(self) -> IterativeUnits:
        """Of many rows the newest as they are, the older ones in a basis of their own."""
        return IterativeUnits(self.rows.compact(newest=MAX_ROWS - 1))

    def zeros(self) -> IterativeUnits:
        """Without rows."""
        return IterativeUnits(self.rows.empty())

    def state(self) -> dict[str, Any]:
        """Plain tensors; what follows from them is computed again."""
        return {"form": "IterativeUnits", **self.rows.state()}


@dataclass(frozen=True)
class IterativeUnitsSolver(Solver):
    """Conjugate gradients on G_u + λ_u for all units, preconditioned in one basis.

    Attributes:
        units: G.
        damping: λ, with jitter `[units]`.
        nearby: the preconditioner.
        jitter: largest diagonal added beyond the damping.
    """

    units: IterativeUnits
    damping: Tensor
    nearby: SharedSolver
    jitter: float

    def solve(self, vectors: Tensor) -> Tensor:
        """(G + λ)⁻¹ x for `[units, size]`, to `UNITS_TOLERANCE`; 0 where nothing is known.

        Args:
            vectors: right-hand sides.

        Returns:
            The solutions.

        Raises:
            NotPositiveDefinite: if it has not converged after `MAX_ITERATIONS`.
        """
        damping = self.damping.unsqueeze(1)

        def product(x: Tensor) -> Tensor:
            return self.units.mv(x) + damping * x

        right = vectors.to(damping)
        found = conjugate_gradients(product, self.nearby.solve, right, UNITS_TOLERANCE)
        return found.to(vectors.dtype)
