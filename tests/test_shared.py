"""Units in one basis: what is kept, what is approximated, and training with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import pyronat
from pyronat import blocks, eigenvectors, planning
from pyronat.blocks import Structure
from pyronat.errors import NotPositiveDefinite, UnsupportedStructure
from pyronat.factored import operator_from
from pyronat.operators import BlockMatrix, Whitener
from pyronat.shared import SharedUnits
from pyronat.unit_rows import MAX_ROWS, UnitRows, gram
from tests.machines import machine, trained
from tests.states import parameters, same

UNITS, SIZE = 4, 3


def random_units(rows: int = 7) -> SharedUnits:
    return SharedUnits(UnitRows(torch.rand(rows, UNITS), torch.randn(rows, SIZE)))


def exact(shared: SharedUnits) -> Tensor:
    return gram(shared.rows.weights, shared.rows.inputs)


def test_traces_and_the_sum_over_units_are_kept() -> None:
    shared = random_units()
    found, reference = shared.dense(), exact(shared)
    torch.testing.assert_close(found.sum(0), reference.sum(0))
    traces = reference.diagonal(dim1=1, dim2=2).mean(1)
    torch.testing.assert_close(found.diagonal(dim1=1, dim2=2).mean(1), traces)
    torch.testing.assert_close(shared.mean_diagonal(), traces)
    assert (found - reference).abs().max() > 0.01 * reference.abs().max(), "nothing is lost"


def test_proportional_weights_lose_nothing() -> None:
    weights = torch.rand(7, 1) * torch.rand(UNITS)
    shared = SharedUnits(UnitRows(weights, torch.randn(7, SIZE)))
    torch.testing.assert_close(shared.dense(), exact(shared))


def test_orthogonal_inputs_lose_nothing() -> None:
    inputs = torch.linalg.qr(torch.randn(SIZE, SIZE)).Q
    shared = SharedUnits(UnitRows(torch.rand(SIZE, UNITS), inputs))
    torch.testing.assert_close(shared.dense(), exact(shared))


def test_values_are_the_best_diagonal_in_the_basis() -> None:
    shared = random_units()
    rotated = shared.basis.mT @ exact(shared) @ shared.basis
    torch.testing.assert_close(shared.values, rotated.diagonal(dim1=1, dim2=2))
    eye = torch.eye(SIZE)
    torch.testing.assert_close(shared.basis.mT @ shared.basis, eye)
    total = shared.basis.mT @ exact(shared).sum(0) @ shared.basis
    assert (total - torch.diag(total.diagonal())).abs().max() < 1e-12 * total.abs().max()


def test_products_and_solutions() -> None:
    shared, vectors = random_units(), torch.randn(UNITS, SIZE)
    dense = shared.dense()
    torch.testing.assert_close(shared.mv(vectors), BlockMatrix(dense).mv(vectors))
    torch.testing.assert_close(shared.quadratic(vectors), BlockMatrix(dense).quadratic(vectors))
    damping = torch.rand(UNITS)
    factor = shared.factor(damping)
    expected = BlockMatrix(dense).factor(damping).solve(vectors)
    assert not factor.jitter
    torch.testing.assert_close(factor.solve(vectors), expected)
    swapped = shared.factor(damping.flip(0)).solve(vectors)
    assert not torch.allclose(swapped, expected), "each unit has a damping of its own"


def test_a_root_of_the_damped_matrices() -> None:
    shared, damping = random_units(), torch.rand(UNITS)
    factor = shared.factor(damping)
    eye = torch.eye(SIZE).unsqueeze(1).expand(SIZE, UNITS, SIZE)  # [rows, units, size]
    inverse = factor.whiten(eye).permute(1, 2, 0)  # L⁻¹ [units, size, size]
    damped = shared.dense() + torch.diag_embed(damping.unsqueeze(1).expand(UNITS, SIZE))
    torch.testing.assert_close(inverse @ damped @ inverse.mT, torch.eye(SIZE).expand_as(damped))
    torch.testing.assert_close(factor.unwhiten(eye).permute(1, 2, 0), inverse.mT)
    assert isinstance(factor, Whitener) and factor.shape == (UNITS, SIZE)


def test_singular_units_get_jitter_and_unknown_ones_stay() -> None:
    shared = SharedUnits(UnitRows(torch.tensor([[1.0, 0.0]]), torch.randn(1, SIZE)))
    factor = shared.factor(torch.zeros(2))
    largest = float(shared.mean_diagonal().max())
    assert factor.jitter == pytest.approx(1e-7 * largest)
    solved = factor.solve(torch.ones(2, SIZE))
    assert solved.isfinite().all() and solved[0].abs().max() > 0 and not solved[1].any()


def test_what_is_not_finite_is_refused() -> None:
    shared = random_units()
    shared.rows.inputs[0, 0] = torch.nan
    with pytest.raises(NotPositiveDefinite, match="not finite"):
        shared.factor(torch.ones(UNITS))


def test_sums_and_averages() -> None:
    one, two = random_units(), random_units(2)
    torch.testing.assert_close(exact(one + two), exact(one) + exact(two))
    mixed = one.lerp(two, 0.25)
    torch.testing.assert_close(exact(mixed), 0.75 * exact(one) + 0.25 * exact(two))
    assert not exact(one.zeros()).any()
    torch.testing.assert_close((one + two.zeros()).dense(), one.dense())


def test_many_rows_are_compressed_without_a_change() -> None:
    many, one = random_units(MAX_ROWS * SIZE + 1), random_units(1)
    mixed = many.lerp(one, 0.0)
    assert len(mixed.rows.inputs) == SIZE + 1
    torch.testing.assert_close(mixed.dense(), many.dense())
    few = random_units(MAX_ROWS * SIZE).lerp(one, 0.5)
    assert len(few.rows.inputs) == MAX_ROWS * SIZE + 1


def test_a_compact_operator_keeps_its_eigenvectors_alone() -> None:
    many = random_units(MAX_ROWS * SIZE + 1)
    compact = many.compact()
    for found in (compact.basis, compact.rows.inputs):
        assert found.untyped_storage().data_ptr() == many.basis.untyped_storage().data_ptr()
    for found in (compact.values, compact.rows.weights):
        assert found.untyped_storage().data_ptr() == many.values.untyped_storage().data_ptr()
    assert torch.equal(compact.values, many.values) and compact.compact().rows is compact.rows
    few = random_units(MAX_ROWS * SIZE)
    assert few.compact().rows is few.rows, "rows are worth more than their eigenvectors"
    grown = compact.lerp(few, 0.5)
    assert not grown.rows.compressed and len(grown.rows.inputs) == (MAX_ROWS + 1) * SIZE
    assert torch.equal((compact + few.zeros()).rows.weights, compact.rows.weights)


WIDE = 12


@pytest.fixture
def few_eigenvectors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of units with more than 5 entries 4 eigenvectors are taken, found to the last digits."""
    monkeypatch.setattr(blocks, "COMPLETE", 5)
    monkeypatch.setattr(blocks, "LEADING", 4)
    monkeypatch.setattr(eigenvectors, "_SPARE", 1)
    monkeypatch.setattr(eigenvectors, "_ROUNDS", 60)


def wide_units(rows: int = 30) -> SharedUnits:
    inputs = torch.randn(rows, WIDE) * torch.logspace(0, -2, WIDE)
    return SharedUnits(UnitRows(torch.rand(rows, UNITS), inputs))


@pytest.mark.usefixtures("few_eigenvectors")
def test_of_wide_units_the_leading_eigenvectors_are_taken() -> None:
    shared = wide_units()
    reference = exact(shared)
    vectors = torch.linalg.eigh(reference.sum(0)).eigenvectors
    own = (vectors.mT @ reference @ vectors).diagonal(dim1=1, dim2=2)
    own[:, :-4] = own[:, :-4].mean(1, keepdim=True)
    expected = (vectors * own.unsqueeze(1)) @ vectors.mT
    assert shared.basis.shape == (WIDE, 4) and shared.values.shape == (UNITS, 5)
    torch.testing.assert_close(shared.dense(), expected)
    traces = reference.diagonal(dim1=1, dim2=2).mean(1)
    torch.testing.assert_close(shared.mean_diagonal(), traces)
    torch.testing.assert_close(expected.diagonal(dim1=1, dim2=2).mean(1), traces)
    assert (expected - reference).norm() > 0.01 * reference.norm(), "an approximation"


@pytest.mark.usefixtures("few_eigenvectors")
def test_products_roots_and_solutions_of_wide_units() -> None:
    shared, vectors, damping = wide_units(), torch.randn(UNITS, WIDE), torch.rand(UNITS)
    dense = BlockMatrix(shared.dense())
    torch.testing.assert_close(shared.mv(vectors), dense.mv(vectors))
    torch.testing.assert_close(shared.quadratic(vectors), dense.quadratic(vectors))
    factor = shared.factor(damping)
    torch.testing.assert_close(factor.solve(vectors), dense.factor(damping).solve(vectors))
    assert factor.shape == (UNITS, WIDE)
    several = torch.randn(WIDE, UNITS, 3).permute(2, 1, 0)  # rows in another order in memory
    twice = factor.unwhiten(factor.whiten(several))
    expected = torch.stack([factor.solve(some) for some in several])
    torch.testing.assert_close(twice, expected)


@pytest.mark.usefixtures("few_eigenvectors")
def test_averages_of_wide_units_are_kept_by_their_leading_eigenvectors() -> None:
    many, new = wide_units(MAX_ROWS * WIDE + 1), wide_units(3)
    compact = many.compact()
    assert compact.rows.inputs.shape == (4, WIDE) and compact.rows.rest is not None
    torch.testing.assert_close(compact.dense(), many.dense())
    torch.testing.assert_close(compact.mean_diagonal(), many.mean_diagonal())
    mixed = compact.lerp(new, 0.25)
    assert len(mixed.rows.inputs) == 4 + 3
    torch.testing.assert_close(mixed.rows.gram(), 0.75 * many.dense() + 0.25 * exact(new))
    total = (compact + compact).rows.gram()
    torch.testing.assert_close(total, 2 * many.dense())
    again = operator_from(compact.state())
    assert torch.equal(again.dense(), compact.dense())
    damping = torch.zeros(UNITS)
    assert compact.factor(damping).solve(torch.randn(UNITS, WIDE)).isfinite().all()


def test_a_long_average_keeps_traces_and_sum() -> None:
    average = random_units(20)
    reference = exact(average)
    for _ in range(30):
        new = random_units(20)
        average, reference = average.lerp(new, 0.2), 0.8 * reference + 0.2 * exact(new)
    assert len(average.rows.inputs) <= MAX_ROWS * SIZE + 20
    torch.testing.assert_close(average.dense().sum(0), reference.sum(0))
    torch.testing.assert_close(average.mean_diagonal(), reference.diagonal(dim1=1, dim2=2).mean(1))


def test_a_state_gives_it_back() -> None:
    shared = random_units()
    assert shared.values.isfinite().all()  # what is cached is no part of the state
    state = shared.state()
    assert set(state) == {"form", "weights", "inputs", "rest", "compressed"}
    again = operator_from(state)
    assert torch.equal(again.dense(), shared.dense())
    compact = random_units(MAX_ROWS * SIZE + 1).compact()
    again = operator_from(compact.state())
    assert torch.equal(again.basis, compact.basis) and torch.equal(again.values, compact.values)


# --- programs ------------------------------------------------------------------------------------

SHARED = pyronat.Full("model", structure={"*": "shared"})


def test_the_metric_of_a_program() -> None:
    net, x = machine()

    def of(geometry: pyronat.Full) -> Any:
        pyro.set_rng_seed(1)
        return pyronat.fisher(net.model, x, geometry=geometry, num_samples=500)

    full, shared = (
        of(pyronat.Full("model")),
        of(pyronat.Full("model", structure={"layer*": "shared"})),
    )
    for name, block in shared.blocks.items():
        other = full.blocks[name]
        if name.startswith("layer"):
            assert isinstance(block, SharedUnits)
        torch.testing.assert_close(block.dense().sum(0), other.dense().sum(0))
        torch.testing.assert_close(block.mean_diagonal(), other.mean_diagonal())
    top = next(name for name in shared.blocks if name.startswith("layer1"))
    error = (shared.blocks[top].dense() - full.blocks[top].dense()).norm()
    assert 0 < error < 0.1 * full.blocks[top].dense().norm()


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("structure", ["shared", "cg"])
def test_training_is_as_good_as_with_matrices(
    structure: Structure, few: bool, request: pytest.FixtureRequest
) -> None:
    if few:
        request.getfixturevalue("few_eigenvectors")
    held = pyronat.Full(structure={"layer*": structure})
    finals = {}
    for name, geometry in (("unit", pyronat.Full()), (structure, held)):
        svi, net, x = trained(geometry, 40)
        assert svi.info is not None and svi.info.accepted
        finals[name] = -float(net.exact_log_likelihood(x).mean())
    planned = svi.optim.sides["model"].plan.blocks
    assert structure in {block.structure for block in planned.values()}
    start = -float(trained(held, 0)[1].exact_log_likelihood(x).mean())
    assert finals[structure] < finals["unit"] + 0.1 * (start - finals["unit"])


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("structure", ["shared", "cg"])
def test_resuming_is_exact(
    structure: Structure, few: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if few:
        request.getfixturevalue("few_eigenvectors")
    held = pyronat.Full(structure={"layer*": structure})

    def train(resume: bool) -> dict[str, Tensor]:
        svi, _, x = trained(held, 8)
        if resume:
            svi.optim.save(str(tmp_path / "optim.pt"))
            optim = pyronat.NaturalGradient(lr=0.3, geometry=held)
            svi = pyronat.NaturalSVI(svi.model, svi.guide, optim, svi.loss)
            svi.optim.load(str(tmp_path / "optim.pt"))
        for _ in range(8):
            svi.step(x)
        return parameters()

    assert same(train(False), train(True))


def test_the_report_says_so() -> None:
    svi, _, _ = trained(pyronat.Full(structure={"layer*": "shared"}), 1)
    assert svi.net is not None
    (layer,) = [block for block in svi.net.blocks if block.name.startswith("layer1")]
    assert layer.structure == "shared" and not layer.exact
    assert layer.matrix_entries == 16 * 9 + 9**2 < 16 * 9**2
    assert layer.factor_flops == 9**3
    assert "shared" in str(svi.net)


WIDEST = {"layer1": "shared", "layer2": "unit", "top": "unit"}


@pytest.mark.parametrize("geometry", [pyronat.Full(), pyronat.Visible()])
@pytest.mark.parametrize("asked", [{}, {"*": "dense"}])
def test_wide_layers_share_a_basis_unless_told_otherwise(
    geometry: pyronat.Full | pyronat.Visible, asked: dict[str, Any], monkeypatch: Any
) -> None:
    """In training; the Fisher information that is asked for stays exact."""
    monkeypatch.setattr(planning, "WIDE", 16 * 9**2 - 1)
    full = pyronat.Full(structure=asked)
    visible = isinstance(geometry, pyronat.Visible)
    svi, net, x = trained(pyronat.Visible(full=full) if visible else full, 1)
    assert svi.net is not None
    found = {block.params[0].partition(".")[0]: block.structure for block in svi.net.blocks}
    assert found == (dict.fromkeys(WIDEST, "unit") if asked else WIDEST)
    assert svi.optim.curvature.refresh == (5 if asked else 20)
    exact = pyronat.fisher(net.model, x, geometry=pyronat.Full("model"))
    assert all(isinstance(block, BlockMatrix) for block in exact.blocks.values())


def test_visible_steps_on_shared_units() -> None:
    """As long as that of exact blocks where nothing is lost; and something is lost by hand."""

    def step(structure: dict[str, Any], spread: float) -> Tensor:
        def deep(x: Tensor) -> None:
            weight = pyro.param("w", torch.linspace(-1, 1, 6).reshape(3, 2))
            # Logits that differ by units are Fisher weights that are not proportional.
            shift = spread * torch.tensor([-1.0, 0.0, 1.0])
            with pyro.plate("data", len(x)):
                h = pyro.sample("h", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                logits = F.linear(h, weight) + shift
                law = dist.Normal(logits, 1.0) if not spread else dist.Bernoulli(logits=logits)
                pyro.sample("x", law.to_event(1), obs=x)

        def guide(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("h", dist.Normal(torch.zeros(2), 1.0).to_event(1))

        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        full = pyronat.Full(structure=structure)
        optim = pyronat.NaturalGradient(lr=0.1, geometry=pyronat.Visible(full=full))
        svi = pyronat.NaturalSVI(deep, guide, optim, pyronat.ReweightedWakeSleep(5))
        before = torch.linspace(-1, 1, 6).reshape(3, 2)
        svi.step((torch.rand(50, 3) < 0.5).double())
        assert svi.info is not None and svi.info.missing is not None and svi.info.missing > 0.1
        return pyro.param("w").detach() - before

    torch.testing.assert_close(step({"w": "shared"}, 0.0), step({}, 0.0))
    lossy, exact = step({"w": "shared"}, 2.0), step({}, 2.0)
    assert 1e-6 < (lossy - exact).norm() < 0.3 * exact.norm()


def network(x: Tensor) -> None:
    first = pyro.param("first", lambda: torch.randn(3, 2))
    last = pyro.param("last", lambda: torch.randn(2, 3))
    inputs = torch.linspace(-1, 1, 2 * len(x)).reshape(-1, 2)
    with pyro.plate("data", len(x)):
        logits = F.linear(torch.tanh(F.linear(inputs, first)), last)
        pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)


def table(x: Tensor) -> None:
    probs = pyro.param(
        "probs", lambda: torch.full((2, 2), 0.5), constraint=dist.constraints.simplex
    )
    with pyro.plate("data", len(x)):
        h = pyro.sample("h", dist.Bernoulli(torch.tensor(0.5)))
        pyro.sample("x", dist.Categorical(probs[h.long()]), obs=x[:, 0])


@pytest.mark.parametrize("program", [network, table])
def test_only_linear_units_share_a_basis(program: Any) -> None:
    x = (torch.rand(10, 2) < 0.5).double()
    with pytest.raises(UnsupportedStructure, match="linear units"):
        pyronat.fisher(program, x, geometry=SHARED)
    assert pyronat.fisher(program, x, geometry=pyronat.Full("model")).blocks
