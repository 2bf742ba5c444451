"""Coordinates of single entries, copies of data, and what steps of guides are bound by."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor
from torch.distributions import constraints

import pyronat
from pyronat import Full, NaturalGradient, NaturalSVI, observation
from pyronat.curvature import UnitFactor
from pyronat.elements import ElementFactor
from pyronat.observation import observe
from pyronat.plans import make_plan
from pyronat.programs import know
from pyronat.steps import ConstantDamping, KLTrustRegion, LeverageDamping
from pyronat.tracing import dream

Program = Callable[..., None]
SHAPE = (5, 3)


def positive(name: str, *shape: int) -> Tensor:
    start = torch.linspace(0.5, 2.0, math.prod(shape)).reshape(shape)
    return pyro.param(name, start, constraint=constraints.positive)


def gammas() -> None:
    """Two coordinates and two parameters for each element, the coordinates not orthogonal."""
    shape, mean = positive("shape", *SHAPE), positive("mean", *SHAPE)
    with pyro.plate("rows", 5, dim=-1):
        pyro.sample("z", dist.Gamma(shape, shape / mean).to_event(1))


def betas_in_a_plate() -> None:
    a, b = positive("a", *SHAPE), positive("b", *SHAPE)
    with pyro.plate("columns", 3, dim=-1), pyro.plate("rows", 5, dim=-2):
        pyro.sample("z", dist.Beta(a, b))


def dirichlets() -> None:
    """A row of entries for each element."""
    with pyro.plate("rows", 5):
        pyro.sample("z", dist.Dirichlet(positive("concentration", *SHAPE)))


def normals() -> None:
    loc = pyro.param("loc", torch.zeros(SHAPE))
    with pyro.plate("rows", 5):
        pyro.sample("z", dist.StudentT(positive("df", *SHAPE), loc, 2.0).to_event(1))


def masked() -> None:
    kept = torch.tensor([True, False, True, True, False])
    shape, rate = positive("shape", *SHAPE), positive("rate", *SHAPE)
    with pyro.plate("rows", 5), pyro.poutine.scale(scale=2.0), pyro.poutine.mask(mask=kept):
        pyro.sample("z", dist.Gamma(shape, rate).to_event(1))


def shuffled() -> None:
    """Entries at other places: each unit is one entry of each parameter, in another order."""
    shape, rate = positive("shape", *SHAPE), positive("rate", *SHAPE)
    with pyro.plate("rows", 5):
        pyro.sample("z", dist.Gamma(shape, rate.flip(0)).to_event(1))


def summed() -> None:
    shape, rate = positive("shape", *SHAPE), positive("rate", *SHAPE)
    with pyro.plate("rows", 5):
        pyro.sample("z", dist.Gamma(shape, rate + rate.sum()).to_event(1))


ELEMENTWISE = [gammas, betas_in_a_plate, dirichlets, normals, masked]
OTHERS = [shuffled, summed]


def curvatures(
    program: Program, monkeypatch: pytest.MonkeyPatch, few: int, structure: str = "dense"
) -> tuple[dict[str, Any], set[type]]:
    monkeypatch.setattr(observation, "FEW_COORDINATES", few)
    known, run = know(program, (), {}), dream(program, (), {})
    plan = make_plan(known, structures={"*": structure})  # type: ignore[dict-item]
    factors = observe(run.records, plan, run.params)
    found = {f.block: f.curvature(f.record.base_weights()) for f in factors}
    return found, {type(factor) for factor in factors if not _is_linear(factor)}


def _is_linear(factor: Any) -> bool:
    return isinstance(factor, UnitFactor) and factor.inputs is not None


@pytest.mark.parametrize("structure", ["dense", "diagonal"])
@pytest.mark.parametrize("program", [*ELEMENTWISE, *OTHERS], ids=lambda p: p.__name__)
def test_elements_equal_the_whole_jacobian(
    program: Program, structure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (program, structure) == (summed, "diagonal"):
        structure = "dense"  # the diagonal of a joint block is taken from its rows
    ours, kinds = curvatures(program, monkeypatch, 0, structure)
    reference, plain = curvatures(program, monkeypatch, 10**9, structure)
    assert kinds == ({ElementFactor} if program in ELEMENTWISE else {UnitFactor})
    assert plain == {UnitFactor}
    for name, curvature in ours.items():
        other = reference[name]
        torch.testing.assert_close(curvature.operator.dense(), other.operator.dense())
        torch.testing.assert_close(curvature.leverage, other.leverage)
        torch.testing.assert_close(curvature.reach, other.reach)
        assert torch.equal(curvature.mass, other.mass)
        assert curvature.operator.dense().abs().max() > 0


def latent(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Gamma(2.0, 1.0))
        pyro.sample("x", dist.Poisson(z), obs=x)


def mean_field(x: Tensor) -> None:
    shape, rate = positive("shape", len(x)), positive("rate", len(x))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Gamma(shape, rate))


@pytest.mark.parametrize("few", [0, 10**9])
def test_copies_of_particles_are_measured_once(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observation, "FEW_COORDINATES", few)
    x = torch.tensor([1.0, 3.0, 0.0, 2.0])
    found = []
    for vectorized in (False, True):
        pyro.clear_param_store()
        optim = NaturalGradient(0.0, guide_geometry=Full())
        loss = Trace_ELBO(num_particles=6, vectorize_particles=vectorized, max_plate_nesting=1)
        NaturalSVI(latent, mean_field, optim, loss).step(x)
        (found_here,) = optim.sides["guide"].average.values()
        assert found_here.operator is not None
        found.append(found_here)
    for curvature in found:
        torch.testing.assert_close(curvature.operator.dense(), found[0].operator.dense())
        torch.testing.assert_close(curvature.leverage, found[0].leverage)
        assert float(curvature.mass) == pytest.approx(4.0)


# --- steps of guides -----------------------------------------------------------------------------


def gaussian(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def posterior(x: Tensor) -> None:
    loc = pyro.param("m", torch.tensor(0.0))
    pyro.sample("loc", dist.Normal(loc, positive("s", 1)[0]))


def first_step(**options: Any) -> tuple[NaturalSVI, float]:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    optim = NaturalGradient(1.0, damping=ConstantDamping(0.0), **options)
    svi = NaturalSVI(gaussian, posterior, optim)
    svi.step(torch.full((50,), 9.0))
    assert svi.info is not None
    return svi, svi.info.kl


def test_a_guide_moves_one_nat_at_most() -> None:
    assert first_step()[1] == pytest.approx(1.0)
    assert first_step(trust_region=KLTrustRegion(guide=0.25))[1] == pytest.approx(0.25)
    assert first_step(trust_region=KLTrustRegion(guide=math.inf))[1] > 1000
    # A bound on the whole step comes on top.
    assert first_step(trust_region=KLTrustRegion(0.1))[1] == pytest.approx(0.1)


def test_a_guide_of_local_variables_moves_one_nat_for_each() -> None:
    x = 50.0 * torch.ones(7)
    optim = NaturalGradient(1.0, guide_geometry=Full(), damping=ConstantDamping(0.0))
    svi = NaturalSVI(latent, mean_field, optim)
    svi.step(x)
    assert svi.info is not None and svi.info.kl == pytest.approx(7.0)


def test_global_variables_of_a_guide_are_measured_afresh() -> None:
    svi, _ = first_step(trust_region=KLTrustRegion(guide=0.5))
    for _ in range(5):
        svi.step(torch.full((50,), 9.0))
    assert svi.info is not None and svi.info.refreshed
    average = svi.optim.sides["guide"].average["m"]
    # Exactly that of the scale before the step, which the running average is not.
    scale = svi.optim.sides["guide"].solved["m"].factor
    assert average.matrix is not None
    before = []
    other, _ = first_step(trust_region=KLTrustRegion(guide=0.5))
    for _ in range(5):
        before.append(pyro.param("s").item())
        other.step(torch.full((50,), 9.0))
    assert average.matrix.item() == pytest.approx(before[-1] ** -2)
    assert len({round(value, 6) for value in before}) > 1 and scale.jitter == 0


def test_draws_of_a_guide_are_no_surprise() -> None:
    """The damping of the guide's normal is relative alone; the model's counts surprises."""

    def model(x: Tensor) -> None:
        scale = positive("noise", 1)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, scale), obs=x)

    def guide(x: Tensor) -> None:
        loc = pyro.param("loc", torch.zeros(len(x)))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 0.5))

    rule = LeverageDamping(relative=0.1)
    svi = NaturalSVI(model, guide, NaturalGradient(0.5, guide_geometry=Full(), damping=rule))
    svi.step(torch.linspace(-1, 1, 6))
    for role, surprised in [("guide", False), ("model", True)]:
        side = svi.optim.sides[role]  # type: ignore[index]
        for name, solved in side.solved.items():
            relative = 0.1 * side.average[name].operator.mean_diagonal()  # type: ignore[union-attr]
            assert bool((solved.damping > relative * (1 + 1e-9)).any()) == surprised


def test_the_network_reports_nothing_of_this() -> None:
    net = pyronat.analyze(gammas)
    assert [(b.structure, b.count, b.size, b.exact, b.network) for b in net.blocks] == [
        ("unit", 15, 2, True, False)
    ]
