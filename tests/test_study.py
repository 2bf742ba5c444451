"""`pyronat.fisher` as an operator: its parts agree, and it refuses what it cannot do."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import BY_NAME, CASES, Case
from pyro import poutine
from torch import Tensor

import pyronat
from pyronat import Euclidean, Full
from pyronat.errors import NotEnumerable, UnsupportedProgram
from pyronat.testing import parameters, z_score

EXACT = 1e-10
by_case = pytest.mark.parametrize("case", CASES, ids=str)


def exact(case: Case) -> pyronat.Fisher:
    return pyronat.fisher(case.model, *case.args, geometry=Full("exact"))


def vector_of(case: Case, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    leaves = parameters(case.model, *case.args)
    return {
        name: torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype)
        for name, leaf in leaves.items()
    }


def flat(vector: dict[str, Tensor], slices: list[tuple[str, slice]]) -> Tensor:
    return torch.cat([vector[name].reshape(-1) for name, _ in slices])


# --- one operator ------------------------------------------------------------------------------


@by_case
def test_product_solution_and_dense_matrix_agree(case: Case) -> None:
    fisher = exact(case)
    dense, slices = fisher.dense()
    vector = vector_of(case, 1)
    assert torch.allclose(dense, dense.T, rtol=0, atol=EXACT)
    assert float(torch.linalg.eigvalsh(dense).min()) > -EXACT
    product = fisher.mv(vector)
    assert torch.allclose(flat(product, slices), dense @ flat(vector, slices), rtol=0, atol=EXACT)
    assert {name: value.shape for name, value in product.items()} == {
        name: value.shape for name, value in vector.items()
    }
    for damping in (1e-3, 0.5):
        solution = fisher.solve(vector, damping=damping)
        shifted = dense + damping * torch.eye(len(dense))
        expected = torch.linalg.solve(shifted, flat(vector, slices))
        assert torch.allclose(flat(solution, slices), expected, rtol=1e-8, atol=1e-8)
    # Negative control: another damping is another solution.
    other = fisher.solve(vector, damping=0.6)
    assert not torch.allclose(flat(other, slices), expected, rtol=1e-3, atol=1e-3)


@by_case
def test_columns_of_the_dense_matrix_are_products(case: Case) -> None:
    fisher = exact(case)
    dense, slices = fisher.dense()
    zero = {name: torch.zeros_like(value) for name, value in vector_of(case, 1).items()}
    for name, where in slices:
        unit = dict(zero)
        unit[name] = torch.zeros_like(zero[name])
        unit[name].view(-1)[0] = 1.0
        column = flat(fisher.mv(unit), slices)
        assert torch.allclose(column, dense[:, where.start], rtol=0, atol=EXACT)


@by_case
def test_parameters_are_sorted_by_name_without_gaps(case: Case) -> None:
    fisher = exact(case)
    dense, slices = fisher.dense()
    leaves = parameters(case.model, *case.args)
    assert [name for name, _ in slices] == sorted(leaves)
    start = 0
    for name, where in slices:
        assert (where.start, where.stop) == (start, start + leaves[name].numel())
        start = where.stop
    assert dense.shape == (start, start)
    assert list(fisher.mv(vector_of(case, 1))) == sorted(leaves)


def test_a_missing_part_of_a_vector_is_refused() -> None:
    case = BY_NAME["sbn"]
    vector = vector_of(case, 1)
    del vector["b1"]
    with pytest.raises(KeyError, match="b1"):
        exact(case).mv(vector)


# --- expectations ------------------------------------------------------------------------------


def latent(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(pyro.param("top", torch.tensor(0.3)), 1.0))
        loc = pyro.param("w", torch.tensor(2.0)) * z
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def posterior_guide(x: Tensor) -> None:
    """The exact posterior of `latent` at its first parameters: all weights are equal."""
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal((0.3 + 2 * x) / 5, 5**-0.5))


def poor_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 5, 1.0))


X = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64).repeat(50)


def slope(**options: Any) -> Tensor:
    return pyronat.fisher(latent, X, **options).blocks["w"].matrix[0, 0, 0]


def test_the_model_expectation_is_that_of_dreams() -> None:
    """E z² = 1 + 0.3² for each of the data."""
    samples = torch.stack([slope(num_samples=4) for _ in range(30)])
    assert float(z_score(samples, torch.tensor(len(X) * 1.09)).abs()) < 4.5
    assert float(z_score(samples, torch.tensor(len(X) * 1.0)).abs()) > 4.5


@pytest.mark.parametrize(
    ("guide", "num_samples"), [(posterior_guide, 4), (poor_guide, 80)], ids=["exact", "weighted"]
)
def test_the_posterior_expectation_is_weighted_to_the_posterior(
    guide: Any, num_samples: int
) -> None:
    """Σ_n E[z²|x_n], also from a poor guide, whose bias is small at many particles."""
    truth = (0.2 + ((0.3 + 2 * X) / 5) ** 2).sum()
    options = {"geometry": Full("posterior"), "guide": guide, "num_samples": num_samples}
    samples = torch.stack([slope(**options) for _ in range(8)])
    assert samples.mean().item() == pytest.approx(truth.item(), rel=0.03)
    if guide is posterior_guide:
        assert float(z_score(samples, truth).abs()) < 4.5
    # Negative control: the model's expectation is another one.
    assert abs(samples.mean().item() / (len(X) * 1.09) - 1) > 0.06


def test_the_pooled_expectation_is_the_mean_of_both() -> None:
    shared = {"guide": posterior_guide, "num_samples": 40}
    pooled, model, posterior = (
        slope(geometry=Full(kind), **shared).item() for kind in ("pooled", "model", "posterior")
    )
    assert pooled == pytest.approx((model + posterior) / 2, rel=0.05)
    assert abs(model / posterior - 1) > 0.06


@pytest.mark.parametrize("kind", ["posterior", "pooled"])
def test_a_posterior_needs_a_guide(kind: Any) -> None:
    with pytest.raises(UnsupportedProgram, match="guide="):
        pyronat.fisher(latent, X, geometry=Full(kind))


def test_exact_needs_discrete_parents() -> None:
    with pytest.raises(NotEnumerable, match=r"'z' \(Normal\).*expectation='model'"):
        pyronat.fisher(latent, X, geometry=Full("exact"))


def test_euclidean_has_no_fisher() -> None:
    with pytest.raises(UnsupportedProgram, match=r"Euclidean\(\).*Full"):
        pyronat.fisher(latent, X, geometry=Euclidean())


def test_more_samples_are_more_exact() -> None:
    case = BY_NAME["sbn"]
    truth = exact(case).dense()[0]

    def error(num_samples: int) -> float:
        runs = [
            pyronat.fisher(case.model, *case.args, num_samples=num_samples).dense()[0]
            for _ in range(8)
        ]
        return float((torch.stack(runs) - truth).square().sum((1, 2)).mean().sqrt())

    ratio = error(4) / error(64)
    assert 2.5 < ratio < 6.5  # √16 = 4


def test_a_guide_can_be_studied_by_itself() -> None:
    case = BY_NAME["sbn"]
    fisher = pyronat.fisher(case.guide, *case.args, geometry=Full("exact"))
    assert [name for name, _ in fisher.dense()[1]] == ["q.W1", "q.W2", "q.b1", "q.b2"]


# --- what counts -------------------------------------------------------------------------------


def masked(x: Tensor, mask: Any, scale: float = 1.0) -> None:
    table = pyro.param("table", torch.tensor([0.3, -1.0, 2.0]))
    with pyro.plate("data", 3), poutine.scale(scale=scale), poutine.mask(mask=mask):
        pyro.sample("x", dist.Normal(table, 0.5), obs=x)


@pytest.mark.parametrize("kind", ["model", "exact"])
@pytest.mark.parametrize(
    "mask", [torch.tensor([True, False, True]), torch.zeros(3).bool(), True, False], ids=str
)
def test_masked_elements_do_not_count(mask: Any, kind: Any) -> None:
    fisher = pyronat.fisher(masked, torch.zeros(3), mask, geometry=Full(kind), num_samples=2)
    expected = torch.diag(4.0 * torch.as_tensor(mask).double().expand(3))
    assert torch.allclose(fisher.dense()[0], expected, rtol=0, atol=EXACT)


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_scale_counts(scale: float) -> None:
    fisher = pyronat.fisher(masked, torch.zeros(3), True, scale, num_samples=2)
    assert torch.allclose(fisher.dense()[0], scale * 4.0 * torch.eye(3), rtol=0, atol=EXACT)


def test_study_leaves_parameters_alone() -> None:
    case = BY_NAME["sbn"]
    before = {
        name: leaf.detach().clone() for name, leaf in parameters(case.model, *case.args).items()
    }
    pyronat.fisher(case.model, *case.args, num_samples=3)
    after = dict(pyro.get_param_store().named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(leaf.grad is None for leaf in after.values())
