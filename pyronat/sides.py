"""Curvature of one program, model or guide: averaged, damped, factored, solved with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from pyronat.blocks import ParamBlock
from pyronat.curvature import Curvature
from pyronat.districts import DistrictPlan
from pyronat.errors import CheckpointMismatch, PyronatError
from pyronat.families import is_reparametrized
from pyronat.geometry import Geometry
from pyronat.graph import BayesNet
from pyronat.operators import BlockOperator, Solver, Whitener, add_parts, inner, summed
from pyronat.plans import Plan
from pyronat.programs import KnownProgram
from pyronat.spectrum import Spectrum, VisibleAverage, spectrum
from pyronat.steps import BOUNDED_TOGETHER, Damping, RetainedShare, RunningAverage

Role: TypeAlias = Literal["model", "guide"]

Kind: TypeAlias = Literal["network", "guide", "model"]
"""Blocks whose steps are bounded together."""

Bound: TypeAlias = Callable[[Kind, Tensor], Tensor]
"""dᵀGd of all blocks of a kind, for each datum or part of it, → factor on their directions."""


@dataclass(frozen=True)
class SolvedBlock:
    """A damped block, factored.

    Attributes:
        damping: λ `[count]` at the refresh that factored it.
        factor: G + λ I, ready to be solved with.
        known: whether G + λ I is more than 0 `[count]`, or None where it is for all; units of which
            nothing is known stay.
    """

    damping: Tensor
    factor: Solver
    known: Tensor | None

    @cached_property
    def total(self) -> tuple[Tensor, Tensor]:
        """Σ λ and the number of units, 0-d tensors."""
        damping = self.damping
        return damping.sum(), damping.new_tensor(float(len(damping)))


@dataclass(frozen=True)
class Directions:
    """Natural gradients of a side.

    Attributes:
        plan: of the side.
        vectors: d = A⁻¹ g by block `[count, size]`.
        shrinking: factors on them by block, 0-d tensors; 1 where none is given.
        products: (Σλ, count, gᵀg, gᵀd, dᵀd, dᵀAd without damping) `[6]`, summed over blocks with
            their factors; zeros where there are none.
    """

    plan: Plan
    vectors: Mapping[str, Tensor]
    shrinking: Mapping[str, Tensor]
    products: Tensor

    def changes(self, length: Tensor) -> dict[str, Tensor]:
        """Steps length · d by parameter name."""
        total: dict[str, Tensor] = {}
        for name, vector in self.vectors.items():
            scale = length.to(vector) * self.shrinking.get(name, 1.0)
            add_parts(total, self.plan.layouts[name].unpack(scale * vector))
        return total


@dataclass(frozen=True)
class Side:
    """Curvature of one program: what the metric is, and its running average.

    Attributes:
        role: "model" or "guide".
        geometry: its metric.
        plan: its structure, and the blocks that are measured.
        refreshes: how often the average was refreshed.
        average: running average of the curvature by block.
        solved: damped factors by block, of a natural geometry.
        districts: blocks that hidden variables tie together, of a visible geometry.
        visible: running average of the visible Fisher by district.
        spectra: what it makes of the damped factors, by district.
    """

    role: Role
    geometry: Geometry
    plan: Plan
    refreshes: int = 0
    average: Mapping[str, Curvature] = field(default_factory=dict)
    solved: Mapping[str, SolvedBlock] = field(default_factory=dict)
    districts: tuple[DistrictPlan, ...] = ()
    visible: Mapping[str, VisibleAverage] = field(default_factory=dict)
    spectra: Mapping[str, Spectrum] = field(default_factory=dict)

    @property
    def net(self) -> BayesNet:
        """The structure of the program."""
        return self.plan.net

    @property
    def complete(self) -> bool:
        """Whether every block and district has been measured."""
        measured = self.plan.blocks.keys() <= self.average.keys()
        return measured and {district.name for district in self.districts} <= self.visible.keys()

    def replanned(self, plan: Plan, districts: tuple[DistrictPlan, ...]) -> Side:
        """This side with another plan; blocks that have not changed keep their averages."""
        kept = {
            name
            for name, block in plan.blocks.items()
            if name in self.plan.blocks and _same_entries(block, self.plan.blocks[name])
        }
        same = {d.name for d in districts if d in self.districts and kept.issuperset(d.blocks)}
        return replace(
            self,
            plan=plan,
            average={name: value for name, value in self.average.items() if name in kept},
            solved={name: value for name, value in self.solved.items() if name in kept},
            districts=districts,
            visible={name: value for name, value in self.visible.items() if name in same},
            spectra={name: value for name, value in self.spectra.items() if name in same},
        )

    @property
    def natural(self) -> bool:
        """Whether the side has a metric."""
        return bool(self.geometry.sources)

    def refreshed(
        self,
        curvature: Mapping[str, Curvature],
        visible: Mapping[str, VisibleAverage],
        rule: RunningAverage,
    ) -> Side:
        """This side with new estimates averaged in, not factored yet.

        Blocks and units that the estimates have not reached keep their averages.

        Args:
            curvature: of the full geometry, by block.
            visible: of the visible geometry, by district.
            rule: of averaging.

        Returns:
            The side.
        """
        share = rule.share(self.refreshes)
        kept = {
            name: value
            for name, value in self.average.items()
            if name in self.plan.blocks and not (name in curvature and self._is_certain(name))
        }
        average = {**kept, **curvature}
        average.update({n: kept[n].visit(new, share) for n, new in curvature.items() if n in kept})
        average = {name: value.compact() for name, value in average.items()}
        mixed = {
            name: self.visible[name].mix(new, share) if name in self.visible else new
            for name, new in visible.items()
        }
        return replace(self, refreshes=self.refreshes + 1, average=average, visible=mixed)

    def _is_certain(self, name: str) -> bool:
        """Whether one estimate says all: of a guide's global variables, which no data vary."""
        block = self.plan.blocks[name]
        return self.role == "guide" and block.exact and not block.plates and not block.network

    def _is_local(self, name: str) -> bool:
        """Whether units belong to a guide's local variables, of which a batch may hold a few."""
        measured = self.natural and self.role == "guide" and not self._can_surprise(name)
        return measured and self.plan.blocks[name].count > 1

    def _can_surprise(self, name: str) -> bool:
        """Whether a block is fitted to values that it may hold for impossible.

        The draws of a reparametrized guide are its own.
        """
        families = {site.name: site.family for site in self.net.sites}
        own = all(is_reparametrized(families[site]) for site in self.plan.blocks[name].sites)
        return self.role == "model" or not own or self.plan.blocks[name].network

    def factored(self, damping: Damping, lr: float) -> Side:
        """This side with its blocks damped at a learning rate and factored."""
        solved = {}
        for name, curvature in self.average.items() if self.natural else ():
            operator = curvature.filled() if self._is_local(name) else curvature.operator
            assert operator is not None
            diagonal = operator.mean_diagonal()
            leverage = _filled(curvature.leverage)
            if not self._can_surprise(name):
                leverage = torch.zeros_like(leverage)
            strength = damping(diagonal, leverage, lr).expand(diagonal.shape)
            # A unit that no run has reached yet counts as if all data did.
            most = leverage * curvature.mass.to(leverage)
            strength = torch.where(curvature.reach > 0, strength, strength + most)
            strength = operator.usable(strength)
            solved[name] = self._solve(name, operator, strength)
        return replace(self, solved=solved, spectra=self._spectra(solved))

    def _spectra(self, solved: Mapping[str, SolvedBlock]) -> dict[str, Spectrum]:
        return {
            district.name: spectrum(
                self.visible[district.name],
                {
                    name: factor
                    for name in district.blocks
                    if isinstance(factor := solved[name].factor, Whitener)
                },
                {name: solved[name].damping for name in district.blocks},
            )
            for district in self.districts
            # A branch that no run has taken yet leaves blocks without a factor.
            if district.name in self.visible and solved.keys() >= set(district.blocks)
        }

    def _solve(self, name: str, operator: BlockOperator, damping: Tensor) -> SolvedBlock:
        try:
            known = operator.mean_diagonal() + damping > 0
            factor = operator.factor(damping)
            return SolvedBlock(damping, factor, None if bool(known.all()) else known)
        except PyronatError as error:
            raise type(error)(f"block of {name}: {error}") from error

    @cached_property
    def inverse_reach(self) -> dict[str, Tensor]:
        """1 / reach of parameter entries, by name what broadcasts; 0 where nothing is known."""
        reach: dict[str, Tensor] = {}
        for name, curvature in self.average.items():
            add_parts(reach, self.plan.layouts[name].spread(_filled(curvature.reach)))
        return {name: torch.where(value > 0, 1 / value, 0.0) for name, value in reach.items()}

    def directions(
        self,
        gradients: Mapping[str, Tensor],
        mixing: float | RetainedShare = 1.0,
        bound: Bound | None = None,
    ) -> Directions:
        """Natural gradients d = A⁻¹ g, and the products that describe them.

        Args:
            gradients: g by parameter name.
            mixing: ρ, or a rule for each district; with 1, A = G + λ.
            bound: of networks and of guides, or None.

        Returns:
            The directions.
        """
        packed = {name: self._of_known(name, gradients) for name in self.solved}
        found: dict[str, Tensor] = {}
        damped: dict[str, float] = {}
        for some in self.spectra.values() if mixing != 1 else ():
            share = some.mixing_by(mixing)
            found.update(some.solve({name: packed[name] for name in some.factors}, share))
            damped.update(dict.fromkeys(some.factors, some.damped(share)))
        vectors: dict[str, Tensor] = {}
        quadratics: dict[str, Tensor] = {}
        numbers: list[Tensor] = []
        for name, solved in self.solved.items():
            gradient = packed[name]
            direction = found[name] if name in found else solved.factor.solve(gradient)
            vectors[name], product = direction, inner(gradient, direction)
            squares = torch.linalg.vector_norm(direction, dim=1).square()
            # A d = g with A damped, so dᵀAd needs no product with A.
            quadratic = product - damped.get(name, 1.0) * inner(solved.damping, squares)
            quadratics[name] = quadratic
            numbers += [*solved.total, inner(gradient, gradient), product, squares.sum(), quadratic]
        shrinking = {} if bound is None else self._shrinking(quadratics, bound)
        if not numbers:
            return Directions(self.plan, vectors, shrinking, summed([]))
        table = torch.stack([number.to(numbers[0]) for number in numbers]).reshape(-1, 6)
        if shrinking:
            factors = torch.stack([shrinking[name].to(table) for name in vectors]).unsqueeze(1)
            table[:, 3:] *= factors
            table[:, 4:] *= factors
        return Directions(self.plan, vectors, shrinking, table.sum(0))

    def _shrinking(self, quadratics: Mapping[str, Tensor], bound: Bound) -> dict[str, Tensor]:
        """Factors on the directions of blocks: one for all networks, one for the rest.

        Args:
            quadratics: dᵀGd of each block.
            bound: (kind, dᵀGd for each datum, or each part of it that is bounded) → factor.

        Returns:
            The factor by block.
        """
        factors: dict[str, Tensor] = {}
        for kind, (names, mass) in self._bounded_together.items():
            parts = [quadratics[name].to(mass) for name in names]
            relative = torch.stack(parts).sum().clamp_min(0) / mass
            factors.update(dict.fromkeys(names, bound(kind, relative)))
        return factors

    @cached_property
    def _bounded_together(self) -> dict[Kind, tuple[list[str], Tensor]]:
        """Blocks by kind, and the number of data, or of parts of them, that bounds are for."""
        found: dict[Kind, tuple[list[str], Tensor]] = {}
        kinds: tuple[Kind, ...] = ("network", self.role)
        for kind in kinds:
            names = [name for name in self.solved if self._kind(name) == kind]
            if names:
                like = self.solved[names[0]].damping
                masses = [
                    self.average[name].mass.to(like) * self._bounded_parts(kind, name)
                    for name in names
                ]
                tiny = torch.finfo(like.dtype).tiny
                found[kind] = names, torch.stack(masses).max().clamp_min(tiny)
        return found

    def _bounded_parts(self, kind: Kind, name: str) -> float:
        """Parts of a datum that `steps.KLTrustRegion` bounds each for itself."""
        if kind == "guide":
            return 1.0
        width = self.plan.widths[name]
        return float(width) if kind == "model" else max(width / BOUNDED_TOGETHER, 1.0)

    def _kind(self, name: str) -> Kind:
        return "network" if self.plan.blocks[name].network else self.role

    def packed(self, name: str, gradients: Mapping[str, Tensor]) -> Tensor:
        """Gradients `[count, size]` of a block, 0 for parameters that a step did not use."""
        block, layout = self.plan.blocks[name], self.plan.layouts[name]
        like = self.solved[name].damping
        zeros = {
            param: like.new_zeros(shape)
            for param, shape in zip(block.params, block.shapes, strict=True)
            if param not in gradients
        }
        return layout.pack({**zeros, **gradients} if zeros else gradients)

    def _of_known(self, name: str, gradients: Mapping[str, Tensor]) -> Tensor:
        """Gradients `[count, size]` of a block, 0 for units that stay, as nothing is known."""
        gradient, known = self.packed(name, gradients), self.solved[name].known
        if known is None:
            return gradient
        return torch.where(known.unsqueeze(1), gradient, torch.zeros_like(gradient))

    def damped(self, name: str, vectors: Tensor) -> Tensor:
        """(G + λ) x of a block, for x `[count, size]`."""
        operator, damping = self.average[name].operator, self.solved[name].damping
        assert operator is not None
        return operator.mv(vectors.to(damping)) + damping.unsqueeze(1) * vectors.to(damping)

    def state(self) -> dict[str, Any]:
        """Structure, running averages and damping as plain tensors, numbers, strings and dicts."""
        return {
            "net": self.plan.program.net.to_json(),
            "runs": sorted(self.plan.program.runs),
            "positions": self.plan.program.positions,
            "refreshes": self.refreshes,
            "average": {name: curvature.state() for name, curvature in self.average.items()},
            "damping": {name: solved.damping for name, solved in self.solved.items()},
            "visible": {name: dict(vars(average)) for name, average in self.visible.items()},
        }

    def restored(
        self, state: Mapping[str, Any], plan: Plan, districts: tuple[DistrictPlan, ...]
    ) -> Side:
        """This side with the averages of a state; its blocks are factored as they were.

        Args:
            state: what `state` returned.
            plan: the plan of the structure in the state.
            districts: those of the plan.

        Returns:
            The side.

        Raises:
            CheckpointMismatch: if the state is of another program or geometry.
        """
        if self.natural != bool(state["damping"]) and state["average"]:
            raise CheckpointMismatch(f"the state is of another geometry of the {self.role}")
        if state["average"] and plan.blocks.keys() != state["average"].keys():
            changed = ", ".join(sorted(plan.blocks.keys() ^ state["average"].keys()))
            raise CheckpointMismatch(f"other blocks of the {self.role} are measured: {changed}")
        if state["average"] and state["visible"].keys() != {d.name for d in districts}:
            raise CheckpointMismatch(f"the state is of another geometry of the {self.role}")
        average = {name: Curvature.from_state(values) for name, values in state["average"].items()}
        side = replace(
            self,
            plan=plan,
            refreshes=state["refreshes"],
            average=average,
            solved={},
            districts=districts,
            visible={name: VisibleAverage(**values) for name, values in state["visible"].items()},
            spectra={},
        )
        solved = {}
        for name, damping in state["damping"].items():
            operator = average[name].operator
            assert operator is not None
            solved[name] = side._solve(name, operator, damping)
        return replace(side, solved=solved, spectra=side._spectra(solved))


def _filled(values: Tensor) -> Tensor:
    """Values of units that no run has reached, as those of the unit that has the largest."""
    return torch.where(values > 0, values, values.max())


def restored_program(own: KnownProgram, state: Mapping[str, Any], role: Role) -> KnownProgram:
    """The program of a state, which may know more branches than the one at hand.

    Args:
        own: what is known of the program at hand.
        state: state of a side.
        role: of the side.

    Returns:
        The program of the state.

    Raises:
        CheckpointMismatch: if the state is of another program.
    """
    saved = BayesNet.from_json(state["net"])
    known = KnownProgram(saved, frozenset(state["runs"]), state["positions"])
    if known.runs < own.runs:  # an earlier state of this program
        changed = _misfits(saved, own.net)
    else:
        changed = _misfits(own.net, saved)
        if len(known.runs) == 1:
            changed |= _misfits(saved, own.net)
    if changed:
        raise CheckpointMismatch(
            f"the state is of another program: {', '.join(sorted(changed))} of the {role} "
            "differ in family or shape"
        )
    return known


def _misfits(part: BayesNet, whole: BayesNet) -> set[str]:
    """Sites and parameters of a network that another one does not have, or not of that kind."""
    families, shapes = _families(whole), _shapes(whole)
    found = {
        name
        for name, family in _families(part).items()
        if not set(family.split(" | ")) <= set(families.get(name, "").split(" | "))
    }
    return found | {name for name, shape in _shapes(part).items() if shape != shapes.get(name)}


def _families(net: BayesNet) -> dict[str, str]:
    return {site.name: site.family for site in net.sites}


def _shapes(net: BayesNet) -> dict[str, tuple[int, ...]]:
    return {
        name: shape
        for block in net.blocks
        for name, shape in zip(block.params, block.shapes, strict=True)
    }


def _same_entries(first: ParamBlock, second: ParamBlock) -> bool:
    return (first.params, first.shapes, first.units, first.structure) == (
        second.params,
        second.shapes,
        second.units,
        second.structure,
    )
