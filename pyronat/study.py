"""`pyronat.fisher`: the Fisher information of a program as an operator, for study and reuse."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyronat.curvature import Curvature, make_plan, mix
from pyronat.errors import UnsupportedProgram
from pyronat.expectation import (
    check_simulable,
    dream_curvature,
    exact_curvature,
    posterior_curvature,
)
from pyronat.geometry import Full, Geometry
from pyronat.graph import BayesNet
from pyronat.operators import BlockMatrix, Layout, add_parts
from pyronat.programs import KnownProgram, know, with_all_branches
from pyronat.tracing import Program


@dataclass(frozen=True)
class Fisher:
    """Fisher information of a program, in the units of its log-probability (nats).

    Vectors are dicts from parameter name to a tensor of the parameter's shape, in unconstrained
    coordinates.

    Attributes:
        net: the analyzed program.
        blocks: block name → its matrices.
        layouts: block name → where the parameters lie in them.
    """

    net: BayesNet
    blocks: dict[str, BlockMatrix]
    layouts: dict[str, Layout]

    def mv(self, vector: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """G x."""
        return self._map(vector, lambda name, x: self.blocks[name].mv(x))

    def solve(self, vector: Mapping[str, Tensor], damping: float = 1e-3) -> dict[str, Tensor]:
        """(G + damping · I)⁻¹ x, with jitter where a block is singular.

        Args:
            vector: right-hand side by parameter name.
            damping: added to the diagonal, in nats per squared unit of the parameters.

        Returns:
            The solution by parameter name.
        """

        def solve(name: str, x: Tensor) -> Tensor:
            block = self.blocks[name]
            return block.factor(block.matrix.new_full(block.matrix.shape[:1], damping)).solve(x)

        return self._map(vector, solve)

    def dense(self) -> tuple[Tensor, list[tuple[str, slice]]]:
        """The whole matrix `[P, P]`, and where each parameter lies, sorted by name."""
        shapes = {
            name: shape
            for layout in self.layouts.values()
            for name, shape in zip(layout.names, layout.shapes, strict=True)
        }
        slices, start = [], 0
        for name in sorted(shapes):
            stop = start + torch.Size(shapes[name]).numel()
            slices.append((name, slice(start, stop)))
            start = stop
        where = dict(slices)
        any_block = next(iter(self.blocks.values())).matrix
        dense = any_block.new_zeros(start, start)
        for key, layout in self.layouts.items():
            index = {
                name: torch.arange(where[name].start, where[name].stop).reshape(shapes[name])
                for name in layout.names
            }
            for entries, matrix in zip(layout.pack(index), self.blocks[key].matrix, strict=True):
                dense[entries.unsqueeze(1), entries] = matrix
        return dense, slices

    def _map(
        self, vector: Mapping[str, Tensor], function: Callable[[str, Tensor], Tensor]
    ) -> dict[str, Tensor]:
        result: dict[str, Tensor] = {}
        for name, layout in self.layouts.items():
            add_parts(result, layout.unpack(function(name, layout.pack(vector))))
        return dict(sorted(result.items()))


def fisher(
    model: Callable[..., Any],
    *args: Any,
    geometry: Geometry | None = None,
    guide: Callable[..., Any] | None = None,
    num_samples: int = 1000,
    **kwargs: Any,
) -> Fisher:
    """Fisher information of a program in its present parameters.

    G_r = E_{x_pa(r)}[J_rᵀ F(θ_r) J_r], scaled and masked as the program's log-probability is. With
    `Full("posterior")` or `Full("pooled")` the parents come from observed data and a weighted
    guide, and the result is a Gauss–Newton-like metric rather than the Fisher information.

    Args:
        model: a Pyro model, or a guide to be studied by itself.
        *args: its arguments.
        geometry: a `Full`; by default `Full("model")`.
        guide: proposes hidden values for posterior expectations.
        num_samples: runs of the model, and guide draws.
        **kwargs: keyword arguments of model and guide.

    Returns:
        The operator. Random numbers are drawn from the global generator.

    Raises:
        UnsupportedProgram: if the geometry has no metric, or needs a guide that is not given.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> def coin():
        ...     pyro.sample("x", dist.Bernoulli(logits=pyro.param("logit", torch.tensor(0.0))))
        >>> pyro.clear_param_store()
        >>> fisher(coin, geometry=Full("exact")).dense()[0]
        tensor([[0.2500]])
    """
    metric = Full("model") if geometry is None else geometry
    if not metric.sources:
        raise UnsupportedProgram(f"{metric} has no metric; use Full(...)")
    if "posterior" in metric.sources and guide is None:
        raise UnsupportedProgram(
            "a posterior expectation needs a guide: pass guide=..., or use Full('model')"
        )
    return with_all_branches(
        know(model, args, kwargs),
        model,
        args,
        kwargs,
        lambda known: _measured(known, model, args, kwargs, metric, guide, num_samples),
    )


def _measured(
    known: KnownProgram,
    model: Program,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    metric: Geometry,
    guide: Program | None,
    num_samples: int,
) -> Fisher:
    if {"dreams", "exact"} & metric.sources.keys():
        check_simulable(known.net)
    plan = make_plan(known)
    total: dict[str, Curvature] = {}
    weight = 0.0
    for source, share in metric.sources.items():
        if source == "dreams":
            part = dream_curvature(model, args, kwargs, plan, num_samples)
        elif source == "exact":
            part = exact_curvature(model, args, kwargs, plan)
        else:
            assert guide is not None
            part = posterior_curvature(model, guide, args, kwargs, plan, num_samples)
        weight += share
        total = mix(total, part, share / weight)
    matrices = {name: c.matrix for name, c in total.items() if c.matrix is not None}
    return Fisher(
        net=known.net,
        blocks={name: BlockMatrix(matrix) for name, matrix in matrices.items()},
        layouts={name: plan.layouts[name] for name in matrices},
    )
