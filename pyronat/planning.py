"""Which curvature is measured of a model and its guide, and who moves what has none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from pyronat.districts import DistrictPlan, plan_districts
from pyronat.errors import UnassignedParameter
from pyronat.families import is_reparametrized
from pyronat.geometry import Euclidean, Full, Geometry, Visible
from pyronat.graph import BayesNet
from pyronat.plans import Plan, make_plan
from pyronat.programs import KnownProgram
from pyronat.sides import Role, Side


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
        shared = {n for n in _reaching(model) & _reaching(guide) if not self._is_excluded(n)}
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
        """The blocks of a program that a geometry measures."""
        excluded = filter(self._is_excluded, program.net.params)
        return make_plan(
            program, excluded, required=bool(geometry.sources), structures=geometry.structures
        )

    def _is_excluded(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.exclude)

    def _guide_geometry(self, net: BayesNet) -> Geometry:
        if self.guide_geometry is not None:
            return self.guide_geometry
        suits = all(is_reparametrized(site.family) for site in net.sites) and all(
            block.structure != "dense" or block.size <= 1024 for block in net.blocks
        )
        return Full() if suits else Euclidean()


def _reaching(net: BayesNet) -> set[str]:
    """Parameters that reach a random site; `pyro.module` may register others along with them."""
    return {name for block in net.blocks for name in block.params}
