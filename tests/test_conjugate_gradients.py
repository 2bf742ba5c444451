"""Conjugate gradients, and units that are solved with by them: oracles, controls, training."""

from __future__ import annotations

import pyro
import pytest
import torch
from torch import Tensor

import pyronat
from examples.benchmarks.solvers import make_layer, units
from pyronat import conjugate_gradients as module
from pyronat.conjugate_gradients import (
    UNITS_TOLERANCE,
    IterativeUnits,
    IterativeUnitsSolver,
    conjugate_gradients,
)
from pyronat.errors import BlockTooLarge, NotPositiveDefinite
from pyronat.factored import operator_from
from pyronat.operators import BlockMatrix, Whitener
from pyronat.shared import SharedUnits
from pyronat.study import Fisher
from pyronat.unit_rows import MAX_ROWS, UnitRows, gram
from tests.machines import machine, trained

UNITS, SIZE = 4, 3
LAYERS = pyronat.Full(structure={"layer*": "cg"})


def random_units(rows: int = 7) -> IterativeUnits:
    return IterativeUnits(UnitRows(torch.rand(rows, UNITS), torch.randn(rows, SIZE)))


# --- many systems at once ------------------------------------------------------------------------


def systems(count: int = 5, size: int = 12) -> tuple[Tensor, Tensor]:
    """Positive definite matrices of condition numbers from 1 to 10⁴, and right-hand sides."""
    bases = torch.linalg.qr(torch.randn(count, size, size)).Q
    exponents = torch.linspace(0, 4, count).unsqueeze(1) * torch.linspace(-1, 0, size)
    matrices = (bases * (10**exponents).unsqueeze(1)) @ bases.mT
    return matrices, torch.randn(count, size)


def solved(matrices: Tensor, right: Tensor, tolerance: float) -> Tensor:
    return conjugate_gradients(BlockMatrix(matrices).mv, lambda r: r, right, tolerance)


def test_solutions_of_many_systems() -> None:
    matrices, right = systems()
    expected = torch.linalg.solve(matrices, right)
    torch.testing.assert_close(solved(matrices, right, 1e-10), expected)
    rough = solved(matrices, right, 0.3)
    assert (rough - expected).norm() > 1e-2 * expected.norm()


def test_the_tolerance_is_the_error_where_the_preconditioner_is_nearly_the_matrix() -> None:
    matrices, right = systems()
    root, noise = torch.linalg.cholesky(matrices), torch.randn_like(matrices)
    within = torch.eye(matrices.shape[-1]) + 0.5 * noise @ noise.mT / noise.shape[-1]
    nearby = BlockMatrix(root @ within @ root.mT)
    factor = nearby.factor(torch.zeros(len(matrices)))
    expected = torch.linalg.solve(matrices, right)
    for tolerance in (0.1, 0.01, 0.001):
        found = conjugate_gradients(BlockMatrix(matrices).mv, factor.solve, right, tolerance)
        wrong = float(BlockMatrix(matrices).quadratic(found - expected))
        assert (wrong / float((expected * right).sum())) ** 0.5 < 2 * tolerance


def test_wherever_it_ends_the_gain_of_the_model_is_half_the_slope() -> None:
    matrices, right = systems()
    rough = solved(matrices, right, 0.3)
    slopes = (rough * right).sum(1)
    torch.testing.assert_close((rough * BlockMatrix(matrices).mv(rough)).sum(1), slopes)


def test_a_system_of_zeros_stays_at_zero() -> None:
    matrices, right = systems()
    matrices[0], right[0] = 0, 0
    found = solved(matrices, right, 1e-10)
    assert not found[0].any()
    torch.testing.assert_close(found[1:], torch.linalg.solve(matrices[1:], right[1:]))
    assert not solved(matrices, torch.zeros_like(right), 1e-10).any()


def test_what_does_not_converge_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_ITERATIONS", 3)
    with pytest.raises(NotPositiveDefinite, match="not converged in 3 iterations"):
        solved(*systems(), 1e-10)


def test_what_is_not_finite_does_not_keep_it() -> None:
    matrices, right = systems()
    right[0, 0] = torch.nan
    assert not solved(matrices, right, 1e-10).isfinite().all()


# --- units ---------------------------------------------------------------------------------------


def test_products_are_those_with_the_matrices() -> None:
    units, vectors = random_units(), torch.randn(UNITS, SIZE)
    dense = BlockMatrix(gram(units.rows.weights, units.rows.inputs))
    torch.testing.assert_close(units.dense(), dense.matrix)
    torch.testing.assert_close(units.mv(vectors), dense.mv(vectors))
    torch.testing.assert_close(units.quadratic(vectors), dense.quadratic(vectors))
    torch.testing.assert_close(units.mean_diagonal(), dense.mean_diagonal())


def test_solutions(monkeypatch: pytest.MonkeyPatch) -> None:
    units, vectors, damping = random_units(), torch.randn(UNITS, SIZE), torch.rand(UNITS)
    factor = units.factor(damping)
    assert not factor.jitter and not isinstance(factor, Whitener)
    expected = BlockMatrix(units.dense()).factor(damping).solve(vectors)
    assert (factor.solve(vectors) - expected).norm() < 0.1 * expected.norm()
    monkeypatch.setattr(module, "UNITS_TOLERANCE", 1e-10)
    torch.testing.assert_close(factor.solve(vectors), expected)
    swapped = units.factor(damping.flip(0)).solve(vectors)
    assert not torch.allclose(swapped, expected), "each unit has a damping of its own"


def test_singular_units_get_jitter_and_unknown_ones_stay() -> None:
    units = IterativeUnits(UnitRows(torch.tensor([[1.0, 0.0]]), torch.randn(1, SIZE)))
    factor = units.factor(torch.zeros(2))
    assert factor.jitter == pytest.approx(1e-7 * float(units.mean_diagonal().max()))
    solution = factor.solve(torch.ones(2, SIZE))
    assert solution.isfinite().all() and solution[0].abs().max() > 0 and not solution[1].any()


def test_sums_and_averages() -> None:
    one, two = random_units(), random_units(2)
    torch.testing.assert_close((one + two).dense(), one.dense() + two.dense())
    mixed = one.lerp(two, 0.25)
    torch.testing.assert_close(mixed.dense(), 0.75 * one.dense() + 0.25 * two.dense())
    assert not one.zeros().dense().any()
    torch.testing.assert_close((one + two.zeros()).dense(), one.dense())


def test_of_many_rows_the_newest_are_kept() -> None:
    many = random_units(MAX_ROWS * SIZE + 5)
    compact, newest = many.compact(), (MAX_ROWS - 1) * SIZE
    assert len(compact.rows.inputs) == MAX_ROWS * SIZE and compact.rows.compact(3) is compact.rows
    assert torch.equal(compact.rows.inputs[-newest:], many.rows.inputs[-newest:])
    assert torch.equal(compact.rows.weights[-newest:], many.rows.weights[-newest:])
    torch.testing.assert_close(compact.mean_diagonal(), many.mean_diagonal())
    torch.testing.assert_close(compact.dense().sum(0), many.dense().sum(0))
    assert (compact.dense() - many.dense()).norm() > 1e-3 * many.dense().norm(), "nothing is lost"
    exact = SharedUnits(many.rows).dense() - many.dense()
    assert (compact.dense() - many.dense()).norm() < exact.norm()


def test_a_long_average_keeps_traces_and_sum() -> None:
    average = random_units(20)
    reference = average.dense()
    for _ in range(30):
        new = random_units(20)
        average, reference = average.lerp(new, 0.2), 0.8 * reference + 0.2 * new.dense()
    assert len(average.rows.inputs) <= MAX_ROWS * SIZE + 20
    torch.testing.assert_close(average.dense().sum(0), reference.sum(0))
    torch.testing.assert_close(average.mean_diagonal(), reference.diagonal(dim1=1, dim2=2).mean(1))


def test_a_state_gives_it_back() -> None:
    units = random_units()
    assert units.rows.values.isfinite().all()  # what is cached is no part of the state
    state = units.state()
    assert set(state) == {"form", "weights", "inputs", "rest", "compressed"}
    again = operator_from(state)
    assert isinstance(again, IterativeUnits) and torch.equal(again.dense(), units.dense())


@pytest.mark.usefixtures("single_precision")
@pytest.mark.parametrize("phase", ["early", "late"])
@pytest.mark.parametrize("shape", [(100, 65, 64), (1000, 101, 200), (200, 201, 784)])
def test_a_tenth_of_the_norm_within_ten_pairs_of_products(
    shape: tuple[int, int, int], phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In pairs by operations, 4 · data · size · units; preconditioning is 4 · size² · units."""
    layer = make_layer(shape, phase)
    system = units(layer)
    nearby = system.error(system.factored("shared")())
    products, product = 0, IterativeUnits.mv

    def counted(self: IterativeUnits, vectors: Tensor) -> Tensor:
        nonlocal products
        products += 1
        return product(self, vectors)

    monkeypatch.setattr(IterativeUnits, "mv", counted)
    error = system.error(system.factored("cg")())
    assert error < 0.1 and (phase == "early" or nearby > 2 * error)
    assert products + (products + 1) * shape[1] / shape[0] <= 10
    assert 0.5 * error < UNITS_TOLERANCE


# --- programs ------------------------------------------------------------------------------------


def test_the_metric_of_a_program_is_exact() -> None:
    net, x = machine()

    def of(geometry: pyronat.Full) -> Fisher:
        pyro.set_rng_seed(1)
        return pyronat.fisher(net.model, x, geometry=geometry, num_samples=500)

    full = of(pyronat.Full("model"))
    rows = of(pyronat.Full("model", structure={"layer*": "cg"}))
    for name, block in rows.blocks.items():
        assert isinstance(block, IterativeUnits) == name.startswith("layer")
        torch.testing.assert_close(block.dense(), full.blocks[name].dense())


def test_a_training_solves_by_them() -> None:
    svi, _, _ = trained(LAYERS, 3)
    assert svi.info is not None and svi.info.accepted
    solved = svi.optim.sides["model"].solved
    layers = [block.factor for name, block in solved.items() if name.startswith("layer")]
    assert layers and all(isinstance(factor, IterativeUnitsSolver) for factor in layers)


def test_the_visible_geometry_refuses_it() -> None:
    net, x = machine()
    geometry = pyronat.Visible(full=LAYERS)
    svi = pyronat.NaturalSVI(
        net.model,
        net.guide,
        pyronat.NaturalGradient(geometry=geometry),
        pyronat.ReweightedWakeSleep(5),
    )
    with pytest.raises(BlockTooLarge, match="'cg'"):
        svi.step(x)
