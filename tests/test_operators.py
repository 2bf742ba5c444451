"""Layouts, block matrices, and the ladder of jitters."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyronat.errors import NotPositiveDefinite
from pyronat.operators import (
    JITTERS,
    AxesLayout,
    BlockMatrix,
    CholeskyFactor,
    EntriesLayout,
    add_parts,
    cholesky,
)


def spd(count: int, size: int) -> Tensor:
    root = torch.randn(count, size, size)
    return root @ root.mT + 0.1 * torch.eye(size)


# --- layout ------------------------------------------------------------------------------------

LAYOUTS = {
    "unit": AxesLayout(("W", "b"), ((3, 2), (3,)), ((0,), (0,))),
    "transposed": AxesLayout(("W", "b"), ((2, 3), (3,)), ((1,), (0,))),
    "two orientations": AxesLayout(("V", "W", "b"), ((3, 3), (3, 3), (3,)), ((1,), (0,), (0,))),
    "dense": AxesLayout(("W", "b", "c"), ((3, 2), (3,), ()), ((), (), ())),
    "every entry": AxesLayout(("p",), ((2, 2, 2),), ((0, 1, 2),)),
    "middle axis": AxesLayout(("p", "q"), ((2, 3, 4), (3, 2)), ((1,), (0,))),
    "outer axes": AxesLayout(("p", "q"), ((2, 3, 4), (2, 4)), ((0, 2), (0, 1))),
    "scalar": AxesLayout(("p",), ((),), ((),)),
    "listed": EntriesLayout(("W", "b"), ((2, 2), (2,)), ((0, 5), (1, 4), (2, 3))),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_round_trip(name: str) -> None:
    layout = LAYOUTS[name]
    values = {n: torch.randn(shape) for n, shape in zip(layout.names, layout.shapes, strict=True)}
    packed = layout.pack(values)
    entries = sum(value.numel() for value in values.values())
    assert packed.shape == (layout.count, entries // layout.count)
    unpacked = layout.unpack(packed)
    assert list(unpacked) == list(layout.names)
    for key, value in values.items():
        assert torch.equal(unpacked[key], value)
    vectors = torch.randn_like(packed)
    assert torch.equal(layout.pack(layout.unpack(vectors)), vectors)
    numbers = torch.randn(layout.count)
    spread = layout.spread(numbers)
    wide = layout.unpack(numbers.unsqueeze(1).expand_as(packed))
    assert all(torch.equal(spread[key].expand_as(value), value) for key, value in wide.items())


def test_rows_of_a_layout_are_units() -> None:
    weight, bias = torch.arange(6.0).reshape(3, 2), torch.tensor([10.0, 11.0, 12.0])
    packed = LAYOUTS["unit"].pack({"W": weight, "b": bias})
    assert packed.tolist() == [[0, 1, 10], [2, 3, 11], [4, 5, 12]]
    flipped = LAYOUTS["transposed"].pack({"W": weight.reshape(2, 3), "b": bias})
    assert flipped.tolist() == [[0, 3, 10], [1, 4, 11], [2, 5, 12]]


def test_unpacking_a_square_matrix_minds_its_orientation() -> None:
    vectors = torch.randn(3, 3)
    straight = AxesLayout(("W",), ((3, 3),), ((0,),)).unpack(vectors)["W"]
    turned = AxesLayout(("W",), ((3, 3),), ((1,),)).unpack(vectors)["W"]
    assert torch.equal(straight, turned.mT) and not torch.equal(straight, turned)


@pytest.mark.parametrize("name", LAYOUTS)
def test_positions_say_where_entries_come_from(name: str) -> None:
    layout = LAYOUTS[name]
    values = {n: torch.randn(shape) for n, shape in zip(layout.names, layout.shapes, strict=True)}
    flat = torch.cat([values[n].reshape(-1) for n in layout.names])
    assert torch.equal(flat[layout.positions()], layout.pack(values))


def test_layout_of_a_part() -> None:
    # Entries outside the block are zero, and blocks that share parameters add up.
    first = EntriesLayout(("w",), ((5,),), ((0, 2), (3, 1)))
    second = EntriesLayout(("w",), ((5,),), ((4,),))
    values = {"w": torch.arange(1.0, 6.0)}
    parts = [layout.unpack(layout.pack(values))["w"] for layout in (first, second)]
    assert parts[0].tolist() == [1, 2, 3, 4, 0] and parts[1].tolist() == [0, 0, 0, 0, 5]
    total: dict[str, Tensor] = {}
    for part in parts:
        add_parts(total, {"w": part})
    assert torch.equal(total["w"], values["w"])


# --- products and solutions --------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 4])
def test_product(count: int) -> None:
    matrix, vectors = spd(count, 3), torch.randn(count, 3)
    expected = torch.einsum("uij,uj->ui", matrix, vectors)
    torch.testing.assert_close(BlockMatrix(matrix).mv(vectors), expected)
    torch.testing.assert_close(BlockMatrix(matrix).quadratic(vectors), (vectors * expected).sum())
    diagonal = torch.stack([matrix[:, i, i] for i in range(3)]).mean(0)
    torch.testing.assert_close(BlockMatrix(matrix).mean_diagonal(), diagonal)


@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_solution_without_jitter(damping: float) -> None:
    matrix, vectors = spd(4, 5), torch.randn(4, 5)
    dampings = damping * torch.arange(4.0)
    factor = BlockMatrix(matrix).factor(dampings)
    assert isinstance(factor, CholeskyFactor) and not factor.jitter
    damped = matrix + dampings[:, None, None] * torch.eye(5)
    expected = torch.linalg.solve(damped, vectors.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(factor.solve(vectors), expected)
    if damping:
        wrong = torch.linalg.solve(matrix, vectors.unsqueeze(-1)).squeeze(-1)
        assert not torch.allclose(factor.solve(vectors), wrong)


def singular(count: int, size: int) -> Tensor:
    """Indefinite in the last digit, as a product of rounded numbers is."""
    root = torch.randn(count, size, 1)
    return root @ root.mT - 1e-14 * torch.eye(size)


def test_singular_matrices_get_jitter() -> None:
    matrix, vectors = singular(3, 4), torch.randn(3, 4)
    factor = cholesky(matrix, torch.zeros(3))
    unit = matrix.diagonal(dim1=1, dim2=2).mean(-1)
    assert factor.jitter == pytest.approx(JITTERS[1] * float(unit.max()))
    shifted = matrix + (JITTERS[1] * unit)[:, None, None] * torch.eye(4)
    expected = torch.linalg.solve(shifted, vectors.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(factor.solve(vectors), expected, rtol=1e-6, atol=0)


def test_healthy_matrices_get_no_jitter_beside_a_singular_one() -> None:
    matrix = torch.cat([spd(1, 3), singular(1, 3)])
    factor = cholesky(matrix, torch.zeros(2))
    torch.testing.assert_close(factor.lower[0] @ factor.lower[0].mT, matrix[0], rtol=0, atol=1e-13)
    assert factor.jitter > 0


@pytest.mark.parametrize("rung", range(1, len(JITTERS)))
def test_every_rung_of_the_ladder(rung: int) -> None:
    # The smallest eigenvalue lies between this rung and the one below.
    below = JITTERS[rung - 1] if rung > 1 else 1e-9
    negative = -((below * JITTERS[rung]) ** 0.5)
    matrix = torch.diag(torch.tensor([1.0, 1.0, 1.0, negative]))[None]
    factor = cholesky(matrix, torch.zeros(1))
    assert factor.jitter == pytest.approx(JITTERS[rung] * float(matrix[0].diagonal().mean()))


def test_indefinite_matrices_are_refused() -> None:
    matrix = torch.stack([torch.eye(2), torch.diag(torch.tensor([1.0, -0.1]))])
    with pytest.raises(NotPositiveDefinite, match="1 of 2 matrices of size 2"):
        cholesky(matrix, torch.zeros(2))
    assert not cholesky(matrix, torch.tensor([0.0, 0.2])).jitter


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_matrices_that_are_not_finite_are_refused(bad: float) -> None:
    matrix = torch.eye(2)[None].clone()
    matrix[0, 1, 1] = bad
    with pytest.raises(NotPositiveDefinite, match="not finite"):
        cholesky(matrix, torch.ones(1))


def test_numbers_whose_sum_is_not_finite_are_accepted() -> None:
    matrix = torch.full((4, 1, 1), 0.5 * torch.finfo(torch.float64).max)
    assert not bool(torch.isfinite(matrix.sum()))
    torch.testing.assert_close(cholesky(matrix, torch.zeros(4)).lower, matrix.sqrt())


def test_damping_leaves_the_matrix_alone() -> None:
    matrix = singular(3, 4)
    before = matrix.clone()
    assert cholesky(matrix, torch.ones(3)).lower.shape == before.shape
    assert torch.equal(matrix, before)


def test_slightly_indefinite_in_single_precision() -> None:
    low = torch.float32
    root = torch.linalg.qr(torch.randn(40, 40)).Q
    eigenvalues = torch.cat([torch.full((39,), 1.0), torch.tensor([-5e-5])])
    matrix = (root * eigenvalues @ root.mT).to(low)[None]
    factor = cholesky(matrix, torch.zeros(1, dtype=low))
    assert factor.jitter > 0
    vectors = torch.randn(1, 40, dtype=low)
    assert factor.solve(vectors).dtype == low and factor.solve(vectors).isfinite().all()


def test_single_precision_fails_where_double_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    # A factorization that never succeeds in single precision is repeated in double.
    attempts = []
    original = torch.linalg.cholesky_ex

    def failing(matrix: Tensor) -> tuple[Tensor, Tensor]:
        attempts.append(matrix.dtype)
        lower, info = original(matrix)
        return (lower, torch.ones_like(info)) if matrix.dtype == torch.float32 else (lower, info)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", failing)
    matrix, vectors = spd(2, 3).float(), torch.randn(2, 3).float()
    factor = cholesky(matrix, torch.zeros(2, dtype=torch.float32))
    assert attempts == [torch.float32] * len(JITTERS) + [torch.float64]
    assert factor.lower.dtype == torch.float64 and not factor.jitter
    expected = torch.linalg.solve(matrix.double(), vectors.double().unsqueeze(-1)).squeeze(-1)
    assert factor.solve(vectors).dtype == torch.float32
    torch.testing.assert_close(factor.solve(vectors), expected.float())


def test_zero_block() -> None:
    matrix = torch.cat([torch.zeros(1, 3, 3), spd(1, 3)])
    factor = cholesky(matrix, torch.tensor([0.5, 0.5]))
    vectors = torch.ones(2, 3)
    torch.testing.assert_close(factor.solve(vectors)[0], 2 * torch.ones(3))
    undamped = cholesky(torch.zeros(1, 3, 3), torch.zeros(1))
    # Nothing is known about such a block: its solution may be large, the zero vector stays zero.
    assert undamped.solve(torch.zeros(1, 3)).abs().max() == 0


def test_damping_is_per_matrix() -> None:
    matrix = torch.zeros(2, 1, 1)
    factor = cholesky(matrix, torch.tensor([1.0, 4.0]))
    assert factor.solve(torch.ones(2, 1)).flatten().tolist() == [1.0, 0.25]
