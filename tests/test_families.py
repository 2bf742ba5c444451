"""Every family in every parametrisation, against sums and integrals of the log density."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro.distributions
import pytest
import torch
import torch.distributions
from torch import Tensor

from pyronat import testing
from pyronat.errors import PyronatError, UnsupportedDistribution
from pyronat.families import FAMILIES, Group, family_of, groups, peel


@dataclass(frozen=True)
class Row:
    """A family with the parameters a user stores, `[*batch, *event]`."""

    family: str
    params: Mapping[str, Any]
    fixed: Mapping[str, Any] | None = None
    tolerance: float = 1e-9

    def __str__(self) -> str:
        return "-".join([self.family, *self.params])

    def make(self, module: Any) -> Callable[..., Any]:
        fixed = {k: torch.as_tensor(v) for k, v in (self.fixed or {}).items()}
        return lambda **params: getattr(module, self.family)(**params, **fixed)

    def values(self) -> dict[str, Tensor]:
        return {name: torch.tensor(v, dtype=torch.float64) for name, v in self.params.items()}


PROBS, LOGITS = [0.2, 0.7], [-1.3, 0.4]
ROWS_OF_PROBS = [[0.2, 0.5, 0.3], [0.1, 0.8, 0.1]]
ROWS_OF_LOGITS = [[0.3, -1.0, 0.2], [2.0, 0.1, -0.7]]
TRIL = [[1.2, 0.0, 0.0], [-0.4, 0.7, 0.0], [0.3, 0.5, 1.9]]
SYMMETRIC = [[2.0, 0.4, -0.3], [0.4, 1.5, 0.2], [-0.3, 0.2, 0.8]]
LOC = [[0.3, -1.2, 0.5], [1.0, 0.0, 2.0]]

ROWS = (
    Row("Bernoulli", {"probs": PROBS}),
    Row("Bernoulli", {"logits": LOGITS}),
    Row("Binomial", {"probs": PROBS}, {"total_count": 5}),
    Row("Binomial", {"logits": LOGITS}, {"total_count": 1}),
    Row("Categorical", {"probs": ROWS_OF_PROBS}),
    Row("Categorical", {"logits": ROWS_OF_LOGITS}),
    # Unnormalized probabilities: torch normalizes them, the chain rule has to know.
    Row("Categorical", {"probs": [[2.0, 5.0, 3.0], [0.1, 0.8, 0.4]]}),
    Row("OneHotCategorical", {"probs": ROWS_OF_PROBS}),
    Row("OneHotCategorical", {"logits": ROWS_OF_LOGITS}),
    Row("OneHotCategoricalStraightThrough", {"probs": ROWS_OF_PROBS}),
    Row("OneHotCategoricalStraightThrough", {"logits": ROWS_OF_LOGITS}),
    Row("Normal", {"loc": [0.3, -2.0], "scale": [0.5, 1.7]}, tolerance=1e-6),
    # One scale for all elements: its weights add up.
    Row("Normal", {"loc": [0.3, -2.0], "scale": 0.6}, tolerance=1e-6),
    Row("LogNormal", {"loc": [0.3, -0.2], "scale": [0.5, 0.7]}, tolerance=1e-6),
    Row("Poisson", {"rate": [0.4, 6.0]}),
    Row("Exponential", {"rate": [0.4, 6.0]}, tolerance=1e-6),
    Row("Gamma", {"concentration": [2.5, 4.0], "rate": [0.6, 3.0]}, tolerance=1e-6),
    Row("Gamma", {"concentration": [2.5, 4.0], "rate": 1.5}, tolerance=1e-6),
    Row("Beta", {"concentration1": [2.5, 1.5], "concentration0": [0.9, 3.0]}, tolerance=1e-6),
    Row("MultivariateNormal", {"loc": LOC, "scale_tril": TRIL}),
    Row("MultivariateNormal", {"loc": LOC, "covariance_matrix": SYMMETRIC}),
    Row("MultivariateNormal", {"loc": LOC, "precision_matrix": SYMMETRIC}),
    Row("MultivariateNormal", {"loc": [0.1], "scale_tril": [[[0.7]], [[1.9]]]}),
)
MODULES = (torch.distributions, pyro.distributions)


def flat_coordinates(group: Group) -> Tensor:
    """Coordinates of each batch element `[num_batch, size]`."""
    each = group.size // len(group.coordinates)
    wide = torch.broadcast_tensors(*group.coordinates)
    return torch.cat([coordinate.reshape(-1, each) for coordinate in wide], 1)


def pulled_back(make: Callable[..., Any], values: Mapping[str, Tensor]) -> Tensor:
    """Σ_groups Jᵀ F J in the entries of the user's parameters."""
    names, tensors = list(values), tuple(values.values())
    size = sum(value.numel() for value in tensors)
    total = torch.zeros(size, size)
    found = groups(peel(make(**values)))
    for index, group in enumerate(found):

        def coordinates(*moved: Tensor, index: int = index) -> Tensor:
            distribution = peel(make(**dict(zip(names, moved, strict=True))))
            return flat_coordinates(groups(distribution)[index])

        parts = torch.autograd.functional.jacobian(coordinates, tensors)
        jacobian = torch.cat([part.reshape(*part.shape[:2], -1) for part in parts], 2)
        fisher = group.fisher.reshape(-1, group.size, group.size)
        assert len(fisher) == len(jacobian), "one Fisher matrix for each batch element"
        total += (jacobian.mT @ fisher @ jacobian).sum(0)
    return total


@pytest.mark.parametrize("module", MODULES, ids=["torch", "pyro"])
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_fisher_in_the_users_coordinates(row: Row, module: Any) -> None:
    make, values = row.make(module), row.values()
    oracle = testing.family_fisher(make, values)
    ours = pulled_back(make, values)
    tolerance = row.tolerance * float(oracle.abs().max())
    torch.testing.assert_close(ours, oracle, rtol=0, atol=tolerance)
    # The comparison is sharp enough to see one percent in one entry.
    mutant = ours.clone()
    mutant[0, 0] *= 1.01
    assert (mutant - oracle).abs().max() > tolerance


def test_every_family_has_a_row() -> None:
    assert {row.family for row in ROWS} == {family.__name__ for family in FAMILIES}


PARAMETRISATIONS = {
    "Bernoulli": {"probs", "logits"},
    "Binomial": {"probs", "logits"},
    "Categorical": {"probs", "logits"},
    "OneHotCategorical": {"probs", "logits"},
    "OneHotCategoricalStraightThrough": {"probs", "logits"},
    "MultivariateNormal": {"scale_tril", "covariance_matrix", "precision_matrix"},
}


@pytest.mark.parametrize("family", sorted(PARAMETRISATIONS))
def test_every_parametrisation_has_a_row(family: str) -> None:
    covered = {name for row in ROWS if row.family == family for name in row.params}
    arguments = set(getattr(torch.distributions, family).arg_constraints) - {"loc", "total_count"}
    assert PARAMETRISATIONS[family] == arguments
    assert covered - {"loc"} == arguments


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_groups_are_well_formed(row: Row) -> None:
    leaves = {name: value.requires_grad_() for name, value in row.values().items()}
    distribution = row.make(pyro.distributions)(**leaves)
    found = groups(distribution)
    assert len({group.name for group in found}) == len(found)
    for group in found:
        assert group.fisher.shape[:-2] == distribution.batch_shape
        assert not group.fisher.requires_grad
        assert any(coordinate.requires_grad for coordinate in group.coordinates)
        assert torch.linalg.eigvalsh(group.fisher).min() > -1e-12
        torch.testing.assert_close(group.fisher, group.fisher.mT)
        assert group.scalar == (group.size == 1 and not distribution.event_shape)
        if group.bound is not None:
            diagonal = group.fisher.diagonal(dim1=-2, dim2=-1).amax(-1)
            assert (diagonal <= torch.as_tensor(group.bound) + 1e-15).all()


@pytest.mark.parametrize(
    "distribution",
    [
        torch.distributions.Bernoulli(probs=torch.tensor(0.5)),
        torch.distributions.Binomial(torch.tensor(7), probs=torch.tensor(0.5)),
        torch.distributions.Categorical(probs=torch.tensor([0.5, 0.5, 0.0])),
    ],
    ids=lambda distribution: type(distribution).__name__,
)
def test_bound_is_attained(distribution: Any) -> None:
    (group,) = groups(distribution)
    largest = group.fisher.diagonal(dim1=-2, dim2=-1).amax(-1)
    expected = torch.as_tensor(group.bound, dtype=torch.float64).expand_as(largest)
    torch.testing.assert_close(largest.double(), expected, rtol=1e-6, atol=0)


def test_off_diagonal_entries_matter() -> None:
    # Negative control: Gamma coordinates are not orthogonal, so they are one group.
    row = next(row for row in ROWS if row.family == "Gamma")
    oracle = testing.family_fisher(row.make(torch.distributions), row.values())
    assert (oracle - oracle.diagonal().diag()).abs().max() > 0.1
    assert len(groups(row.make(torch.distributions)(**row.values()))) == 1


# --- wrappers ----------------------------------------------------------------------------------


def test_peel_removes_all_wrappers() -> None:
    base = pyro.distributions.Normal(torch.zeros(2, 3), 1.0)
    one = torch.tensor([True, False])
    other = torch.tensor([[True], [True]])
    wrapped = base.to_event(1).mask(one).expand_by([2]).mask(other)
    assert type(peel(wrapped)) is pyro.distributions.Normal
    assert peel(base) is base


def test_peel_keeps_the_graph_through_expansion() -> None:
    logits = torch.zeros(3, requires_grad=True)
    expanded = pyro.distributions.Bernoulli(logits=logits).expand_by([4]).to_event(1)
    (group,) = groups(peel(expanded))
    assert group.coordinates[0].shape == group.fisher.shape[:-2] == (4, 3)
    (gradient,) = torch.autograd.grad(group.coordinates[0].sum(), logits)
    assert gradient.tolist() == [4.0] * 3


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_expanded_families_repeat_their_fisher(row: Row) -> None:
    distribution = row.make(pyro.distributions)(**row.values())
    expanded = distribution.expand((4, *distribution.batch_shape))
    for plain, wide in zip(groups(distribution), groups(peel(expanded)), strict=True):
        torch.testing.assert_close(wide.fisher, plain.fisher.expand(wide.fisher.shape))
        assert wide.fisher.shape[0] == 4


# --- refusals ----------------------------------------------------------------------------------


class Subclassed(pyro.distributions.Normal):
    """A user's subclass, whose density may be another."""

    def log_prob(self, value: Tensor) -> Tensor:
        return 2 * super().log_prob(value)


class Plain(torch.distributions.Bernoulli):
    """A user's subclass that changes nothing, which is not known here."""


UNSUPPORTED = {
    "StudentT": pyro.distributions.StudentT(torch.tensor(3.0)),
    "Laplace": torch.distributions.Laplace(0.0, 1.0),
    "Dirichlet": pyro.distributions.Dirichlet(torch.ones(3)),
    "Chi2": torch.distributions.Chi2(torch.tensor(3.0)),
    "HalfNormal": pyro.distributions.HalfNormal(1.0),
    "Geometric": pyro.distributions.Geometric(torch.tensor(0.3)),
    "ZeroInflatedPoisson": pyro.distributions.ZeroInflatedPoisson(
        torch.tensor(2.0), gate=torch.tensor(0.3)
    ),
    "BetaBinomial": pyro.distributions.BetaBinomial(torch.tensor(2.0), torch.tensor(2.0), 3),
    "NegativeBinomial": pyro.distributions.NegativeBinomial(3, torch.tensor(0.3)),
    "ContinuousBernoulli": torch.distributions.ContinuousBernoulli(torch.tensor(0.3)),
    "TransformedDistribution": torch.distributions.TransformedDistribution(
        torch.distributions.Normal(0.0, 1.0), [torch.distributions.transforms.TanhTransform()]
    ),
    "Subclassed": Subclassed(0.0, 1.0),
    "Plain": Plain(torch.tensor(0.3)),
    # Missing elements have no density, so the closed form of the whole would be too large.
    "NanMaskedNormal": pyro.distributions.NanMaskedNormal(torch.zeros(2), torch.ones(2)),
    "NanMaskedMultivariateNormal": pyro.distributions.NanMaskedMultivariateNormal(
        torch.zeros(2), torch.eye(2)
    ),
}


@pytest.mark.parametrize("name", sorted(UNSUPPORTED))
def test_unsupported_families_are_refused(name: str) -> None:
    distribution = UNSUPPORTED[name]
    assert family_of(distribution) is None
    with pytest.raises(UnsupportedDistribution) as error:
        groups(distribution)
    assert str(error.value).startswith(name)
    for family in FAMILIES:
        assert family.__name__ in str(error.value)
    assert isinstance(error.value, PyronatError)


def test_learnable_total_count_is_refused() -> None:
    count = torch.tensor(3.0, requires_grad=True)
    learnable = torch.distributions.Binomial(count, probs=torch.tensor(0.3), validate_args=False)
    with pytest.raises(UnsupportedDistribution, match="total_count of Binomial"):
        groups(learnable)
    groups(torch.distributions.Binomial(count.detach(), probs=torch.tensor(0.3)))


def test_number_of_trials_may_differ_between_elements() -> None:
    counts = torch.tensor([1.0, 4.0])
    p = torch.tensor([0.3, 0.8])
    (group,) = groups(pyro.distributions.Binomial(counts, probs=p))
    torch.testing.assert_close(group.fisher[:, 0, 0], counts * p * (1 - p))
    torch.testing.assert_close(group.bound, counts / 4)
