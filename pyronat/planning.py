"""Which curvature is measured of a model and its guide, and who moves what has none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from glob import escape
from typing import Any

from pyronat.blocks import ParamBlock, Structure
from pyronat.districts import DistrictPlan, plan_districts
from pyronat.errors import CheckpointMismatch, UnassignedParameter, UnknownName
from pyronat.families import is_reparametrized
from pyronat.geometry import Euclidean, Full, Geometry, Visible
from pyronat.graph import BayesNet
from pyronat.plans import Plan, make_plan
from pyronat.programs import KnownProgram
from pyronat.sides import Role, Side, restored_program
from pyronat.steps import PerName

WIDE = 2**20
"""Entries of the matrices of all units of a layer, above which they share a basis by default."""


@dataclass(frozen=True)
class Planner:
    """Plans the curvature of programs.

    Attributes:
        geometry: metric of the model.
        guide_geometry: metric of the guide, or None for the one that suits it.
        exclude: patterns of parameters without a metric.
    """

    geometry: Geometry
    guide_geometry: Geometry | None
    exclude: tuple[str, ...]

    def sides(self, programs: Mapping[Role, KnownProgram]) -> dict[Role, Side]:
        """The sides of programs, with nothing measured yet.

        Args:
            programs: the model and its guide.

        Returns:
            Their sides.

        Raises:
            UnassignedParameter: if model and guide share a parameter.
        """
        model, guide = programs["model"].net, programs["guide"].net
        shared = {n for n in _reaching(model) & _reaching(guide) if not self.excludes(n)}
        if shared:
            raise UnassignedParameter(
                f"{', '.join(sorted(shared))} is used by model and guide, which have separate "
                "geometries; leave it to another optimizer with exclude=[...]"
            )
        sides = {}
        for role, program in programs.items():
            geometry = self.geometry if role == "model" else self._guide_geometry(program.net)
            plan = self.plan(program, geometry)
            districts = self.districts(plan, geometry, guide)
            sides[role] = Side(role, geometry, plan, districts=districts)
        return sides

    def districts(
        self, plan: Plan, geometry: Geometry, guide: BayesNet | None
    ) -> tuple[DistrictPlan, ...]:
        """Districts of a visible geometry; none where its mixing is 1, which is the full one."""
        if not isinstance(geometry, Visible) or geometry.mixing == 1:
            return ()
        proposing = guide if geometry.posterior == "guide" else None
        return plan_districts(plan.net, plan.blocks, proposing)

    def plan(self, program: KnownProgram, geometry: Geometry) -> Plan:
        """The blocks of a program that a geometry measures, wide layers in one basis each."""
        excluded = filter(self.excludes, program.net.params)
        wide = _in_one_basis(program.net.blocks) if geometry.sources else {}
        structures = {**wide, **geometry.structures}
        return make_plan(program, excluded, required=bool(geometry.sources), structures=structures)

    def restored(self, sides: Mapping[Role, Side], states: Mapping[str, Any]) -> dict[Role, Side]:
        """Sides with the averages of their states; those of no state are a start.

        Args:
            sides: model and guide.
            states: what `Side.state` returned, by role, or nothing.

        Returns:
            The sides.

        Raises:
            CheckpointMismatch: if the states are of other sides or programs.
        """
        if not states:
            start: dict[str, Any] = {"average": {}, "solved": {}, "visible": {}, "spectra": {}}
            return {role: replace(side, refreshes=0, **start) for role, side in sides.items()}
        if set(states) != set(sides):
            raise CheckpointMismatch(
                f"the state has sides {sorted(states)}, the program {sorted(sides)}"
            )
        programs = {
            role: restored_program(side.plan.program, states[role], role)
            for role, side in sides.items()
        }
        found = {}
        for role, side in sides.items():
            plan = self.plan(programs[role], side.geometry)
            districts = self.districts(plan, side.geometry, programs["guide"].net)
            found[role] = side.restored(states[role], plan, districts)
        return found

    def excludes(self, name: str) -> bool:
        """Whether a parameter is left to another optimizer by its name."""
        return any(fnmatchcase(name, pattern) for pattern in self.exclude)

    def _guide_geometry(self, net: BayesNet) -> Geometry:
        if self.guide_geometry is not None:
            return self.guide_geometry
        suits = all(is_reparametrized(site.family) for site in net.sites) and all(
            block.structure != "dense" or block.size <= 1024 for block in net.blocks
        )
        return Full() if suits else Euclidean()


def check_names(lr: PerName, sides: Mapping[Role, Side], has_others: bool) -> None:
    """Refuses factors of the learning rate that are for no parameter.

    Args:
        lr: the learning rate.
        sides: model and guide.
        has_others: whether sides without a metric go to another optimizer.

    Raises:
        UnknownName: if there are any.
    """
    moved = {n for s in sides.values() if s.natural or not has_others for n in s.plan.owner()}
    if unmatched := lr.unmatched(moved):
        there = sorted(moved | {name for side in sides.values() for name in side.net.params})
        raise UnknownName(
            f"{', '.join(map(repr, unmatched))} in lr=PerName(...) match no parameter of a natural "
            f"step or of the scaled Adam; `others` have rates of their own. There are: "
            f"{', '.join(there)}"
        )


def _in_one_basis(blocks: Iterable[ParamBlock]) -> dict[str, Structure]:
    """The structure of layers of linear units whose own matrices would be dear, by parameter."""
    return {
        escape(block.params[0]): "shared"
        for block in blocks
        if block.structure == "unit" and all(block.linear)
        if block.count > 1 and block.matrix_entries > WIDE
    }


def _reaching(net: BayesNet) -> set[str]:
    """Parameters that reach a random site; `pyro.module` may register others along with them."""
    return {name for block in net.blocks for name in block.params}
