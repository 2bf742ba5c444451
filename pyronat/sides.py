"""Curvature of one program, model or guide: averaged, damped, factored, solved with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from pyronat.curvature import Curvature, Plan, mix
from pyronat.errors import CheckpointMismatch, PyronatError
from pyronat.geometry import Geometry
from pyronat.graph import BayesNet
from pyronat.operators import BlockMatrix, CholeskyFactor, add_parts
from pyronat.steps import Damping, RunningAverage

Role: TypeAlias = Literal["model", "guide"]


@dataclass(frozen=True)
class SolvedBlock:
    """A damped block, factored.

    Attributes:
        damping: λ `[count]` at the refresh that factored it.
        factor: Cholesky factor of G + λ I.
    """

    damping: Tensor
    factor: CholeskyFactor


@dataclass(frozen=True)
class Side:
    """Curvature of one program: what the metric is, and its running average.

    Attributes:
        role: "model" or "guide".
        geometry: its metric.
        net: its structure.
        plan: the blocks that are measured.
        refreshes: how often the average was refreshed.
        average: running average of the curvature by block.
        solved: damped factors by block, of a natural geometry.
    """

    role: Role
    geometry: Geometry
    net: BayesNet
    plan: Plan
    refreshes: int = 0
    average: Mapping[str, Curvature] = field(default_factory=dict)
    solved: Mapping[str, SolvedBlock] = field(default_factory=dict)

    @property
    def natural(self) -> bool:
        """Whether the side has a metric."""
        return bool(self.geometry.sources)

    def refreshed(
        self, curvature: Mapping[str, Curvature], rule: RunningAverage, damping: Damping, lr: float
    ) -> Side:
        """This side with a new estimate of the curvature averaged in."""
        share = rule.share(self.refreshes)
        average = mix(self.average, curvature, share) if self.average else dict(curvature)
        side = replace(self, refreshes=self.refreshes + 1, average=average)
        return side.factored(damping, lr) if self.natural else side

    def factored(self, damping: Damping, lr: float) -> Side:
        """This side with its blocks damped at a learning rate and factored."""
        solved = {}
        for name, curvature in self.average.items():
            assert curvature.matrix is not None
            diagonal = BlockMatrix(curvature.matrix).mean_diagonal()
            strength = damping(diagonal, curvature.leverage, lr).expand(diagonal.shape)
            solved[name] = self._solve(name, curvature.matrix, strength)
        return replace(self, solved=solved)

    def _solve(self, name: str, matrix: Tensor, damping: Tensor) -> SolvedBlock:
        try:
            return SolvedBlock(damping, BlockMatrix(matrix).factor(damping))
        except PyronatError as error:
            raise type(error)(f"block of {name}: {error}") from error

    def reach(self) -> dict[str, Tensor]:
        """Reach of every parameter entry, by parameter name."""
        reach: dict[str, Tensor] = {}
        for name, curvature in self.average.items():
            layout = self.plan.layouts[name]
            size = self.plan.blocks[name].size
            add_parts(reach, layout.unpack(curvature.reach.unsqueeze(1).expand(-1, size)))
        return reach

    def directions(self, gradients: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Natural gradients d = (G + λ)⁻¹ g by parameter, and the products that describe them.

        Args:
            gradients: g by parameter name.

        Returns:
            d by parameter name, and (gᵀg, gᵀd, dᵀd, dᵀGd, Σλ, count) of each block.
        """
        directions: dict[str, Tensor] = {}
        products = []
        for name, solved in self.solved.items():
            layout = self.plan.layouts[name]
            gradient = layout.pack(gradients)
            direction = solved.factor.solve(gradient)
            inner = (gradient * direction).sum()
            squares = direction.square().sum(1)
            # (G + λ) d = g, so dᵀGd needs no product with G.
            quadratic = inner - (solved.damping * squares).sum()
            entries = torch.tensor(float(layout.count), dtype=inner.dtype, device=inner.device)
            products.append(
                torch.stack([
                    gradient.square().sum(),
                    inner,
                    squares.sum(),
                    quadratic,
                    solved.damping.sum(),
                    entries,
                ])
            )
            add_parts(directions, layout.unpack(direction))
        return directions, products

    def state(self) -> dict[str, Any]:
        """Structure, running averages and damping as plain tensors, numbers, lists and dicts."""
        return {
            "families": dict(self.plan.families),
            "shapes": {
                name: [list(shape) for shape in layout.shapes]
                for name, layout in self.plan.layouts.items()
            },
            "refreshes": self.refreshes,
            "average": {
                name: {key: value for key, value in vars(curvature).items() if value is not None}
                for name, curvature in self.average.items()
            },
            "damping": {name: solved.damping for name, solved in self.solved.items()},
        }

    def restored(self, state: Mapping[str, Any]) -> Side:
        """This side with the averages of a state; its blocks are factored as they were.

        Args:
            state: what `state` returned.

        Returns:
            The side.

        Raises:
            CheckpointMismatch: if the state is of another program or geometry.
        """
        own = self.state()
        for key in ("families", "shapes"):
            if state[key] != own[key]:
                changed = sorted(
                    name
                    for name in state[key].keys() | own[key].keys()
                    if state[key].get(name) != own[key].get(name)
                )
                raise CheckpointMismatch(
                    f"the state is of another program: {key} of {', '.join(changed)} of the "
                    f"{self.role} differ"
                )
        if self.natural != bool(state["damping"]) and state["average"]:
            raise CheckpointMismatch(f"the state is of another geometry of the {self.role}")
        average = {
            name: Curvature(values.get("matrix"), values["leverage"], values["reach"])
            for name, values in state["average"].items()
        }
        side = replace(self, refreshes=state["refreshes"], average=average)
        solved = {}
        for name, damping in state["damping"].items():
            matrix = average[name].matrix
            assert matrix is not None
            solved[name] = side._solve(name, matrix, damping)
        return replace(side, solved=solved)
