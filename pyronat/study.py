"""`pyronat.fisher`: the Fisher information of a program as an operator, for study and reuse.

The visible one shows why EM is slow: along a direction whose share of missing information is m,
its error shrinks by the factor m in each iteration (Dempster, Laird & Rubin 1977).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import torch
from torch import Tensor

from pyronat.buffers import kept_buffers
from pyronat.curvature import Curvature, mix
from pyronat.districts import plan_districts
from pyronat.errors import UnsupportedProgram
from pyronat.expectation import (
    check_simulable,
    dream_curvature,
    exact_curvature,
    posterior_curvature,
)
from pyronat.geometry import Euclidean, Full, Geometry, Visible
from pyronat.graph import BayesNet
from pyronat.operators import BlockMatrix, BlockOperator, Layout, add_parts
from pyronat.plans import make_plan
from pyronat.programs import KnownProgram, know, with_all_branches
from pyronat.scores import BlockColumns
from pyronat.spectrum import VisibleAverage
from pyronat.tracing import Program
from pyronat.visible import Dreamer, columns_of, measure_visible
from pyronat.visible_exact import exact_visible

_RANGE = 1e-10
"""Eigenvalues of a Fisher matrix, relative to the largest, below which a direction is not in it; in
single precision, what rounding leaves of a zero is larger."""


@dataclass(frozen=True)
class Fisher:
    """Fisher information of a program, in the units of its log-probability (nats).

    Vectors are dicts from parameter name to a tensor of the parameter's shape, in unconstrained
    coordinates.

    Attributes:
        net: the analyzed program.
        blocks: block name → its operator; `net.blocks` says which are exact.
        layouts: block name → where the parameters lie in them.
    """

    net: BayesNet
    blocks: dict[str, BlockOperator]
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
            return self.blocks[name].factor(x.new_full((len(x),), damping)).solve(x)

        return self._map(vector, solve)

    def dense(self) -> tuple[Tensor, list[tuple[str, slice]]]:
        """The whole matrix `[P, P]`, and where each parameter lies, sorted by name."""
        slices = self.slices()
        positions = self.positions()
        size = slices[-1][1].stop if slices else 0
        matrices = {key: block.dense() for key, block in self.blocks.items()}
        dense = next(iter(matrices.values())).new_zeros(size, size)
        for key, index in positions.items():
            # An operator may couple the vectors of a block.
            groups = index.reshape(len(matrices[key]), -1)
            for entries, matrix in zip(groups, matrices[key], strict=True):
                dense[entries.unsqueeze(1), entries] = matrix
        return dense, slices

    def slices(self) -> list[tuple[str, slice]]:
        """Where each parameter lies in a flattened vector, sorted by name."""
        shapes = self._shapes()
        slices, start = [], 0
        for name in sorted(shapes):
            stop = start + torch.Size(shapes[name]).numel()
            slices.append((name, slice(start, stop)))
            start = stop
        return slices

    def positions(self) -> dict[str, Tensor]:
        """Places of each block's entries in a flattened vector, `[count, size]`."""
        shapes, where = self._shapes(), dict(self.slices())
        index = {
            name: torch.arange(place.start, place.stop).reshape(shapes[name])
            for name, place in where.items()
        }
        return {key: layout.pack(index) for key, layout in self.layouts.items()}

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            name: shape
            for layout in self.layouts.values()
            for name, shape in zip(layout.names, layout.shapes, strict=True)
        }

    def _map(
        self, vector: Mapping[str, Tensor], function: Callable[[str, Tensor], Tensor]
    ) -> dict[str, Tensor]:
        result: dict[str, Tensor] = {}
        for name, layout in self.layouts.items():
            add_parts(result, layout.unpack(function(name, layout.pack(vector))))
        return dict(sorted(result.items()))


@dataclass(frozen=True)
class Direction:
    """A direction in which hiding takes information away.

    Attributes:
        missing: its share of missing information, an eigenvalue of 1 − G⁻¹G_V between 0 and 1;
            EM shrinks its error by this factor in each iteration.
        vector: the direction by parameter name, of unit length in the full geometry.
    """

    missing: float
    vector: dict[str, Tensor]


@dataclass(frozen=True)
class VisibleFisher:
    """A_ρ = (1 − ρ) G_V + ρ G of a program, in the units of its log-probability (nats).

    With mixing 0 it is the Fisher information of the visible units. Vectors are dicts from
    parameter name to a tensor of the parameter's shape, in unconstrained coordinates.

    Attributes:
        full: the Fisher information of the full system, G.
        mixing: ρ.
        columns: the blocks of each district with hidden sites, by name.
        visible: G_V of each such district `[width, width]`; everywhere else it equals G.
    """

    full: Fisher
    mixing: float
    columns: dict[str, BlockColumns]
    visible: dict[str, Tensor]

    @property
    def net(self) -> BayesNet:
        """The analyzed program."""
        return self.full.net

    @property
    def blocks(self) -> dict[str, BlockOperator]:
        """The blocks of G, by name."""
        return self.full.blocks

    def mv(self, vector: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A_ρ x."""
        return self._map(vector, self.full.mv(vector), lambda matrix, x: matrix @ x)

    def solve(self, vector: Mapping[str, Tensor], damping: float = 1e-3) -> dict[str, Tensor]:
        """(A_ρ + damping · I)⁻¹ x, with jitter where it is singular.

        Args:
            vector: right-hand side by parameter name.
            damping: added to the diagonal, in nats per squared unit of the parameters.

        Returns:
            The solution by parameter name.
        """

        def solve(matrix: Tensor, x: Tensor) -> Tensor:
            factor = BlockMatrix(matrix.unsqueeze(0)).factor(matrix.new_full((1,), damping))
            return factor.solve(x.unsqueeze(0)).squeeze(0)

        return self._map(vector, self.full.solve(vector, damping), solve)

    def dense(self) -> tuple[Tensor, list[tuple[str, slice]]]:
        """The whole matrix `[P, P]`, and where each parameter lies, sorted by name."""
        dense, slices = self.full.dense()
        for name, index in self._index().items():
            dense[index.unsqueeze(1), index] = self._matrix(name)
        return dense, slices

    def missing_information(self) -> list[Direction]:
        """All directions of districts with hidden sites, the most missing first.

        Directions in which G vanishes, as along redundant parameters, are left out.

        Returns:
            Eigenvectors of G⁻¹G_V with 1 − eigenvalue.
        """
        slices, found = self.full.slices(), []
        shapes = self.full._shapes()
        for name, index in self._index().items():
            root = _root(self._full(name))
            inverse = torch.linalg.pinv(root)
            retained, vectors = torch.linalg.eigh(inverse @ self.visible[name] @ inverse.mT)
            directions = (inverse.mT @ vectors).mT
            for value, direction in zip(retained.tolist(), directions, strict=True):
                flat = direction.new_zeros(slices[-1][1].stop)
                flat[index] = direction
                vector = {key: flat[place].reshape(shapes[key]) for key, place in slices}
                found.append(Direction(min(max(1 - value, 0.0), 1.0), vector))
        return sorted(found, key=lambda direction: -direction.missing)

    def _index(self) -> dict[str, Tensor]:
        positions = self.full.positions()
        return {name: columns.join(positions) for name, columns in self.columns.items()}

    def _full(self, name: str) -> Tensor:
        """G of a district `[width, width]`."""
        blocks = (self.full.blocks[block].dense() for block in self.columns[name].blocks)
        found: Tensor = torch.block_diag(*(matrix for block in blocks for matrix in block))
        return found

    def _matrix(self, name: str) -> Tensor:
        """A_ρ of a district `[width, width]`."""
        return torch.lerp(self.visible[name], self._full(name), self.mixing)

    def _map(
        self,
        vector: Mapping[str, Tensor],
        outside: Mapping[str, Tensor],
        function: Callable[[Tensor, Tensor], Tensor],
    ) -> dict[str, Tensor]:
        """What a function of a district's matrix gives there, and another result elsewhere."""
        slices = self.full.slices()
        flat = torch.cat([vector[name].reshape(-1) for name, _ in slices])
        result = torch.cat([outside[name].reshape(-1) for name, _ in slices])
        for name, index in self._index().items():
            result[index] = function(self._matrix(name), flat[index])
        return {name: result[place].reshape(vector[name].shape) for name, place in slices}


def _root(matrix: Tensor) -> Tensor:
    """S with S Sᵀ = G, as many columns as G has directions `[width, rank]`."""
    values, vectors = torch.linalg.eigh(matrix)
    rounding = len(values) * torch.finfo(values.dtype).eps
    kept = values > max(_RANGE, rounding) * values.max()
    root: Tensor = vectors[:, kept] * values[kept].sqrt()
    return root


@overload
def fisher(
    model: Callable[..., Any],
    *args: Any,
    geometry: Visible,
    guide: Callable[..., Any] | None = None,
    num_samples: int = 1000,
    **kwargs: Any,
) -> VisibleFisher: ...


@overload
def fisher(
    model: Callable[..., Any],
    *args: Any,
    geometry: Full | Euclidean | None = None,
    guide: Callable[..., Any] | None = None,
    num_samples: int = 1000,
    **kwargs: Any,
) -> Fisher: ...


@kept_buffers()
def fisher(
    model: Callable[..., Any],
    *args: Any,
    geometry: Geometry | None = None,
    guide: Callable[..., Any] | None = None,
    num_samples: int = 1000,
    **kwargs: Any,
) -> Fisher | VisibleFisher:
    """Fisher information of a program in its present parameters.

    G_r = E_{x_pa(r)}[J_rᵀ F(θ_r) J_r], scaled and masked as the program's log-probability is. With
    `Full("posterior")` or `Full("pooled")` the parents come from observed data and a weighted
    guide, and the result is a Gauss–Newton-like metric rather than the Fisher information.

    With `Visible(...)` it is (1 − ρ) G_V + ρ G; `Visible(mixing=0, posterior="exact")` gives the
    Fisher information of the visible units. G is then the model's, not pooled with the posterior,
    unless the geometry says so.

    Large blocks of networks are held in approximations, as `Fisher.net.blocks` says; see
    `Full(structure=...)`.

    Args:
        model: a Pyro model, or a guide to be studied by itself.
        *args: its arguments.
        geometry: a `Full` or `Visible`; by default `Full("model")`.
        guide: proposes hidden values for posterior expectations and dreams.
        num_samples: runs of the model, and guide draws; dreams of a `Visible` that does not say.
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
    proposes = isinstance(metric, Visible) and metric.posterior == "guide"
    weighs = not isinstance(metric, Visible) or metric.full is not None
    if guide is None and (proposes or (weighs and "posterior" in metric.sources)):
        raise UnsupportedProgram(
            "a posterior expectation needs a guide: pass guide=..., or use Full('model') or "
            "Visible(posterior='enumerate')"
        )
    if isinstance(metric, Visible):
        return _visible_fisher(model, args, kwargs, metric, guide, num_samples)
    return with_all_branches(
        know(model, args, kwargs),
        model,
        args,
        kwargs,
        lambda known: _measured(known, model, args, kwargs, metric, guide, num_samples),
    )


def _visible_fisher(
    model: Program,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    geometry: Visible,
    guide: Program | None,
    num_samples: int,
) -> VisibleFisher:
    """The visible Fisher, over all branches of model and guide that turn up.

    Args:
        model: the model.
        args: its arguments.
        kwargs: its keyword arguments.
        geometry: the options.
        guide: the guide, or None.
        num_samples: dreams where the geometry does not say.

    Returns:
        The operator.

    Raises:
        UnsupportedProgram: if the geometry is not an expectation with a fixed mixing.
    """
    if not isinstance(geometry.mixing, (int, float)) or geometry.estimator == "observed":
        raise UnsupportedProgram(
            "only an expectation with a fixed mixing can be studied; use Visible(mixing=0, ...)"
        )
    mixing = float(geometry.mixing)
    exact = geometry.posterior == "exact"
    asked = replace(
        geometry,
        num_dreams=geometry.num_dreams or num_samples,
        full=geometry.full or Full("exact" if exact else "model"),
    )

    def measured(known: KnownProgram, proposing: KnownProgram | None) -> VisibleFisher:
        full = _measured(known, model, args, kwargs, asked.regularizer, guide, num_samples)
        plan = make_plan(known, structures=asked.structures)
        guide_net = proposing.net if proposing else None
        districts = plan_districts(known.net, plan.blocks, guide_net)
        if asked.posterior == "exact":
            averages = exact_visible(model, args, kwargs, plan, districts)
        elif districts:
            guide_plan = make_plan(proposing, required=False) if proposing else None
            dreamer = Dreamer(asked, plan, guide_plan, model, guide, args, kwargs)
            averages = measure_visible(asked, plan, districts, dreamer, decay=0.0).averages
        else:
            averages = {}
        columns = {district.name: columns_of(plan, district) for district in districts}
        result = VisibleFisher(full, mixing, columns, {})
        visible = {
            name: _matrix_of(average, result._full(name)) for name, average in averages.items()
        }
        return replace(result, visible=visible)

    def of_model(known: KnownProgram) -> VisibleFisher:
        if guide is None or asked.posterior != "guide":
            return measured(known, None)
        return with_all_branches(
            know(guide, args, kwargs), guide, args, kwargs, lambda found: measured(known, found)
        )

    return with_all_branches(know(model, args, kwargs), model, args, kwargs, of_model)


def _matrix_of(average: VisibleAverage, full: Tensor) -> Tensor:
    """The estimate of G_V `[width, width]`, with eigenvalues of G⁻¹G_V between 0 and 1."""
    matrix = average.matrix
    if matrix is None:
        assert average.rows is not None
        matrix = average.rows.mT @ average.rows
    if average.kind == "visible":
        return matrix
    root = _root(full)
    inverse = torch.linalg.pinv(root)
    missing, vectors = torch.linalg.eigh(inverse @ matrix @ inverse.mT)
    half = root @ vectors
    visible: Tensor = (half * (1 - missing.clamp(0, 1))) @ half.mT
    return visible


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
    plan = make_plan(known, structures=metric.structures)
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
    blocks = {name: c.operator for name, c in total.items() if c.operator is not None}
    return Fisher(
        net=plan.net,
        blocks=blocks,
        layouts={name: plan.layouts[name] for name in blocks},
    )
