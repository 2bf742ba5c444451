"""Scores of families and of single data against autograd, and posteriors against Bayes by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from programs import randn
from pyro import poutine
from test_families import ROWS, Row
from torch import Tensor
from torch.distributions import constraints

from models.hmm import DiscreteHMM
from models.mixture import GaussianMixture
from pyronat import families, testing
from pyronat.curvature import UnitFactor as Factor
from pyronat.dreams import Dream, draw, posterior_marginals
from pyronat.errors import UnsupportedDistribution
from pyronat.families import groups, score
from pyronat.importance import DatumPlates
from pyronat.observation import observe_units
from pyronat.plans import Plan, make_plan
from pyronat.programs import know
from pyronat.records import Run, SiteRecord
from pyronat.scores import BlockColumns, DatumScores, Slots, datum_scores, element_weights
from pyronat.tracing import dream

EXACT = 1e-10
Z_LIMIT = 5.0


def number(name: str, *shape: int, seed: int | None = None) -> Tensor:
    """A parameter that its name determines."""
    seed = sum(map(ord, name)) if seed is None else seed
    return pyro.param(name, lambda: 0.7 * randn(seed, *shape))


# --- families ----------------------------------------------------------------------------------


def in_leaves(distribution: Any, value: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    """Scores of all groups, pulled back to the user's leaves."""
    total = [torch.zeros_like(leaf) for leaf in leaves]
    for group in groups(distribution):
        found = score(distribution, group.name, value)
        assert found.shape == (*distribution.batch_shape, group.size)
        assert not found.requires_grad
        wide = torch.broadcast_tensors(*group.coordinates)
        parts = found.split(group.size // len(wide), -1)
        weights = [part.reshape(one.shape) for part, one in zip(parts, wide, strict=True)]
        attached = [pair for pair in zip(wide, weights, strict=True) if pair[0].requires_grad]
        pulled = torch.autograd.grad(
            [one for one, _ in attached],
            leaves,
            [weight for _, weight in attached],
            retain_graph=True,
            allow_unused=True,
        )
        total = [a if b is None else a + b for a, b in zip(total, pulled, strict=True)]
    return total


@pytest.mark.parametrize("module", [torch.distributions, pyro.distributions], ids=["torch", "pyro"])
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_score_is_the_gradient_in_the_users_coordinates(row: Row, module: Any) -> None:
    leaves = [leaf.requires_grad_() for leaf in row.values().values()]
    distribution = row.make(module)(**dict(zip(row.params, leaves, strict=True)))
    value = distribution.sample()
    expected = torch.autograd.grad(distribution.log_prob(value).sum(), leaves, retain_graph=True)
    found = in_leaves(distribution, value, leaves)
    torch.testing.assert_close(found, list(expected), rtol=0, atol=EXACT)
    # Negative control: another value has another score.
    other = distribution.sample()
    while torch.equal(other, value):
        other = distribution.sample()
    different = in_leaves(distribution, other, leaves)
    pairs = zip(found, different, strict=True)
    assert max(float((a - b).abs().max()) for a, b in pairs) > 1e-6


COORDINATES = {
    ("Bernoulli", "logits"),
    ("Beta", "concentration1"),
    ("Binomial", "logits"),
    ("Exponential", "rate"),
    ("Gamma", "concentration"),
    ("LogNormal", "loc"),
    ("MultivariateNormal", "scale_tril"),
    ("Normal", "loc"),
    ("Poisson", "rate"),
}
"""Families and stored tensors that are their coordinates themselves."""

DIRECT = [row for row in ROWS if any((row.family, name) in COORDINATES for name in row.params)]


@pytest.mark.parametrize("row", DIRECT, ids=str)
def test_score_is_the_slope_of_the_log_density(row: Row) -> None:
    """By central differences in every entry of every coordinate, without autograd."""
    make, values = row.make(pyro.distributions), row.values()
    plain = make(**values)
    batch = plain.batch_shape
    wide = {
        name: value.expand(*batch, *value.shape[value.dim() - event :]).clone()
        for name, value in values.items()
        for event in [plain.arg_constraints[name].event_dim]
    }
    distribution = make(**{name: value.clone().requires_grad_() for name, value in wide.items()})
    value = distribution.sample()
    step = 1e-5
    for group in groups(distribution):
        found = score(distribution, group.name, value)
        columns = []
        for name in group.name.split(", "):
            flat = wide[name].reshape(*batch, -1)
            for entry in range(flat.shape[-1]):
                ends = []
                for sign in (1, -1):
                    moved = flat.clone()
                    moved[..., entry] += sign * step
                    changed = {**wide, name: moved.reshape(wide[name].shape)}
                    if name == "scale_tril" and not wide[name].reshape(len(flat), -1)[0, entry]:
                        changed = wide
                    ends.append(make(**changed).log_prob(value))
                columns.append((ends[0] - ends[1]) / (2 * step))
        expected = torch.stack(columns, -1)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_the_closed_forms_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    # Negative control: a wrong sign in the closed form of Beta is seen.
    row = next(row for row in ROWS if row.family == "Beta")
    original, fixed = families.FAMILIES["Beta"]

    def mutant(d: Any) -> tuple[Any, ...]:
        (group,) = original(d)
        closed = group.closed_score
        return (replace(group, closed_score=lambda x: tuple(-part for part in closed(x))),)

    monkeypatch.setitem(families.FAMILIES, "Beta", (mutant, fixed))
    with pytest.raises(AssertionError):
        test_score_is_the_gradient_in_the_users_coordinates(row, pyro.distributions)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_covariance_of_the_score_is_the_fisher(row: Row) -> None:
    leaves = {name: value.requires_grad_() for name, value in row.values().items()}
    distribution = row.make(pyro.distributions)(**leaves)
    if distribution.has_enumerate_support:
        values = distribution.enumerate_support()
        probabilities = distribution.log_prob(values).exp().detach()
    else:
        values, probabilities = distribution.sample((20_000,)), None
    wide = distribution.expand((len(values), *distribution.batch_shape))
    for group in groups(distribution):
        found = score(wide, group.name, values.expand(wide.shape()))
        outer = found.unsqueeze(-1) * found.unsqueeze(-2)
        if probabilities is None:
            scores = testing.z_score(found, torch.zeros_like(found[0]))
            assert scores.abs().max() < Z_LIMIT
            scores = testing.z_score(outer, group.fisher)
            assert scores.abs().max() < Z_LIMIT
            assert testing.z_score(outer, 1.3 * group.fisher).abs().max() > Z_LIMIT
        else:
            # Logits of categories are redundant: the mean of the score need not vanish.
            mean = (probabilities.unsqueeze(-1) * found).sum(0)
            second = (probabilities[..., None, None] * outer).sum(0)
            covariance = second - mean.unsqueeze(-1) * mean.unsqueeze(-2)
            torch.testing.assert_close(covariance, group.fisher, rtol=0, atol=EXACT)


def test_score_of_fixed_coordinates_is_zero() -> None:
    rate = torch.tensor([0.5, 2.0], requires_grad=True)
    distribution = dist.Gamma(torch.tensor([1.0, 3.0]), rate)
    found = score(distribution, "concentration, rate", torch.tensor([0.7, 0.2]))
    assert found[:, 0].tolist() == [0.0, 0.0]
    assert found[:, 1].tolist() == pytest.approx([1 / 0.5 - 0.7, 3 / 2.0 - 0.2])


# --- scores of data ----------------------------------------------------------------------------

N, M = 6, 3
INPUTS = randn(5, N, 2)
CODES = torch.tensor([0, 2, 1, 1, 0, 2])
MASK = torch.tensor([True, False, True, True, False, True])
ENTRIES_MASK = torch.arange(N * M).reshape(N, M) % 3 > 0


def linear_layer() -> None:
    with pyro.plate("data", N):
        logits = F.linear(INPUTS, number("w", M, 2), number("b", M))
        pyro.sample("y", dist.Bernoulli(logits=logits).to_event(1))


def network() -> None:
    with pyro.plate("data", N):
        hidden = F.linear(INPUTS, number("w1", 4, 2), number("b1", 4)).tanh()
        pyro.sample("y", dist.Normal(hidden @ number("w2", 4, M), 0.7).to_event(1))


def unit_scale() -> None:
    """Loc and scale are functions of the same units."""
    with pyro.plate("data", N):
        h = F.linear(INPUTS, number("w", 2, 2), number("b", 2))
        pyro.sample("y", dist.Normal(h, F.softplus(h) + 0.1).to_event(1))


def two_plates() -> None:
    with pyro.plate("rows", 4, dim=-2), pyro.plate("data", N, dim=-1):
        logits = number("r", 4, 1) + number("c", N)
        pyro.sample("y", dist.Bernoulli(logits=logits))
        pyro.sample("z", dist.Poisson(number("p").exp()))


def shared() -> None:
    weight = number("w", M, 2)
    with pyro.plate("data", N):
        y = pyro.sample("y", dist.Bernoulli(logits=F.linear(INPUTS, weight)).to_event(1))
        pyro.sample("z", dist.Normal(F.linear(y[:, :2] + 0.5, weight), 1.0).to_event(1))


def local() -> None:
    with pyro.plate("data", N):
        z = pyro.sample("z", dist.Normal(number("local", N), 1.0))
        pyro.sample("x", dist.Normal(number("loc", M) * z[:, None], 1.0).to_event(1))


def lookup() -> None:
    with pyro.plate("data", N):
        z = pyro.sample("z", dist.Categorical(logits=number("top", M)))
        pyro.sample("x", dist.Bernoulli(logits=number("table", M, 4)[z]).to_event(1))
        pyro.sample("n", dist.Poisson(number("rate", M)[CODES].exp()))


def constrained() -> None:
    probs = pyro.param("probs", torch.full((M,), 1 / M), constraint=constraints.simplex)
    scale = pyro.param("scale", torch.tensor(0.8), constraint=constraints.positive)
    with pyro.plate("data", N):
        z = pyro.sample("z", dist.Categorical(probs))
        pyro.sample("x", dist.Normal(number("loc", M)[z], scale))


def families_of_many() -> None:
    with pyro.plate("data", N):
        tril = pyro.param("tril", torch.eye(2), constraint=constraints.lower_cholesky)
        pyro.sample("m", dist.MultivariateNormal(INPUTS @ number("a", 2, 2), scale_tril=tril))
        rate = (INPUTS @ number("gw", 2)).exp()
        pyro.sample("g", dist.Gamma(number("k").exp(), rate))
        pyro.sample("b", dist.Beta(number("b1").exp(), rate))
        pyro.sample("o", dist.OneHotCategorical(logits=INPUTS @ number("ow", 2, M)))
        pyro.sample("n", dist.Binomial(5, logits=INPUTS @ number("q", 2)))


def joined() -> None:
    """Events over two dimensions of units."""
    with pyro.plate("data", N):
        loc = number("loc", 2, M) + INPUTS[:, :, None]
        pyro.sample("y", dist.Normal(loc, number("s", M).exp()).to_event(2))


def masked_distribution() -> None:
    with pyro.plate("data", N):
        logits = F.linear(INPUTS, number("w", M, 2))
        pyro.sample("y", dist.Bernoulli(logits=logits).mask(ENTRIES_MASK).to_event(1))


def masked_sites() -> None:
    with pyro.plate("data", N), poutine.mask(mask=MASK):
        logits = F.linear(INPUTS, number("w", M, 2))
        pyro.sample("y", dist.Bernoulli(logits=logits).to_event(1))
        pyro.sample("z", dist.Bernoulli(logits=number("b")))


def scaled() -> None:
    with poutine.scale(scale=7.0), pyro.plate("data", N):
        pyro.sample("y", dist.Bernoulli(logits=F.linear(INPUTS, number("w", M, 2))).to_event(1))


def scaled_by_datum() -> None:
    with pyro.plate("data", N), poutine.scale(scale=torch.arange(1.0, N + 1)):
        pyro.sample("y", dist.Bernoulli(logits=INPUTS @ number("w", 2)))


def subsampled() -> None:
    with pyro.plate("data", 4 * N, subsample=torch.arange(N)):
        pyro.sample("y", dist.Bernoulli(logits=F.linear(INPUTS, number("w", M, 2))).to_event(1))


def steps() -> None:
    """Several sites for each datum, one after the other."""
    with pyro.plate("data", N):
        z = torch.zeros(N)
        for t in range(3):
            z = pyro.sample(f"z{t}", dist.Bernoulli(logits=number("a") * z + number("b")))


def nested() -> None:
    """Several elements of each datum, one of them subsampled."""
    with pyro.plate("data", N, dim=-1):
        z = pyro.sample("z", dist.Bernoulli(logits=number("top")))
        with (
            pyro.plate("items", 8, subsample=torch.arange(4), dim=-3),
            pyro.plate("parts", 2, dim=-2),
        ):
            pyro.sample("y", dist.Normal(number("w") * z + number("b", 2, 1), 1.0))


@dataclass(frozen=True)
class Program:
    """A program, and the plates whose elements are the data."""

    model: Callable[[], None]
    plates: tuple[str, ...] = ("data",)

    def __str__(self) -> str:
        return "-".join([self.model.__name__, *self.plates])


PROGRAMS = (
    Program(linear_layer),
    Program(linear_layer, ()),
    Program(network),
    Program(unit_scale),
    Program(two_plates),
    Program(two_plates, ("rows",)),
    Program(two_plates, ("rows", "data")),
    Program(two_plates, ()),
    Program(shared),
    Program(local),
    Program(lookup),
    Program(constrained),
    Program(families_of_many),
    Program(joined),
    Program(masked_distribution),
    Program(masked_sites),
    Program(scaled),
    Program(scaled_by_datum),
    Program(subsampled),
    Program(subsampled, ()),
    Program(steps),
    Program(nested),
)
by_program = pytest.mark.parametrize("program", PROGRAMS, ids=str)


@dataclass(frozen=True)
class Observed:
    """One run, its factors, and where its data are."""

    run: Run
    plan: Plan
    factors: list[Factor]
    columns: BlockColumns
    plates: DatumPlates
    sizes: tuple[int, ...]

    @property
    def num_data(self) -> int:
        return int(torch.Size(self.sizes).numel())

    def slots(self, numbers: Tensor | None = None) -> Slots:
        numbers = torch.arange(self.num_data) if numbers is None else numbers
        return Slots(self.plates, numbers.reshape(self.sizes), int(numbers.max()) + 1)

    def scores(self, slots: Slots) -> Tensor:
        weighted = [(factor, element_weights(factor.record)) for factor in self.factors]
        return datum_scores(weighted, slots, self.columns)

    def by_autograd(self) -> Tensor:
        """∇ of the log-probability of each datum, elements weighted by √scale."""
        rows = []
        for datum in torch.arange(self.num_data).reshape(self.sizes).flatten():
            position = torch.unravel_index(datum, self.sizes) if self.sizes else ()
            total = sum(self._log_prob(record, position) for record in self.run.records)
            found = torch.autograd.grad(
                total, list(self.run.params.values()), retain_graph=True, materialize_grads=True
            )
            gradients = dict(zip(self.run.params, found, strict=True))
            packed = {name: self.plan.layouts[name].pack(gradients) for name in self.columns.blocks}
            rows.append(self.columns.join(packed))
        return torch.stack(rows)

    def _log_prob(self, record: SiteRecord, position: Sequence[Tensor]) -> Tensor:
        log_prob = record.distribution.log_prob(record.value)
        log_prob = log_prob * torch.as_tensor(record.scale).sqrt()
        if record.mask is not None:
            log_prob = log_prob * torch.as_tensor(record.mask)
        log_prob = log_prob.expand(record.distribution.batch_shape)
        for plate, index in zip(self.plates.plates, position, strict=True):
            log_prob = log_prob.select(plate.dim, int(index))
        return log_prob.sum()


def observed(program: Program) -> Observed:
    known = know(program.model, (), {})
    run = dream(program.model, (), {})
    plan = make_plan(known)
    named = {plate.name: plate for record in run.records for plate in record.plates}
    plates = sorted((named[name] for name in program.plates), key=lambda plate: plate.dim)
    shape = run.records[0].distribution.batch_shape
    return Observed(
        run=run,
        plan=plan,
        factors=observe_units(run.records, plan, run.params),
        columns=BlockColumns(plan.blocks),
        plates=DatumPlates(tuple(replace(plate, scale=1.0) for plate in plates)),
        sizes=tuple(shape[plate.dim] for plate in plates),
    )


@by_program
def test_scores_of_data_are_gradients_of_their_log_probability(program: Program) -> None:
    found = observed(program)
    scores, expected = found.scores(found.slots()), found.by_autograd()
    assert scores.shape == (found.num_data, found.columns.width)
    torch.testing.assert_close(scores, expected, rtol=0, atol=EXACT)
    assert expected.abs().max() > 1e-3
    if found.num_data > 1:
        # Negative control: the data differ.
        assert (scores.flip(0) - expected).abs().max() > 1e-3


@by_program
def test_data_can_be_left_out_and_reordered(program: Program) -> None:
    found = observed(program)
    whole = found.scores(found.slots())
    torch.manual_seed(3)
    chosen = torch.randperm(found.num_data)[: max(found.num_data // 2, 1)]
    numbers = torch.full((found.num_data,), -1)
    numbers[chosen] = torch.arange(len(chosen))
    part = found.scores(found.slots(numbers))
    torch.testing.assert_close(part, whole[chosen], rtol=0, atol=EXACT)
    nothing = found.scores(Slots(found.plates, torch.full(found.sizes, -1), 0))
    assert nothing.shape == (0, found.columns.width)


@by_program
def test_sums_over_runs_are_those_of_their_scores(program: Program) -> None:
    found = observed(program)
    factors = [(f, element_weights(f.record)) for f in found.factors]
    runs = DatumScores([factors, factors], found.slots(), found.columns)
    torch.manual_seed(4)
    coefficients = torch.randn(2, found.num_data)
    expected = coefficients.sum(0).unsqueeze(1) * found.scores(found.slots())
    torch.testing.assert_close(runs.combined(coefficients), expected, rtol=1e-9, atol=EXACT)
    assert len(runs) == len(list(runs)) == 2
    none = Slots(found.plates, torch.full(found.sizes, -1), 0)
    assert not len(replace(runs, slots=none).combined(coefficients[:, :0]))


def test_scores_of_blocks_are_columns_of_all() -> None:
    found = observed(Program(lookup))
    whole = found.columns.split(found.scores(found.slots()))
    for name, block in found.plan.blocks.items():
        columns = BlockColumns({name: block})
        factors = [(f, element_weights(f.record)) for f in found.factors if f.block == name]
        torch.testing.assert_close(
            columns.split(datum_scores(factors, found.slots(), columns))[name], whole[name]
        )
    torch.testing.assert_close(found.columns.join(whole), found.scores(found.slots()))


@pytest.mark.parametrize("factor", [4.0, 0.25])
def test_squares_of_scores_count_as_the_loss_does(factor: float) -> None:
    def program() -> None:
        with poutine.scale(scale=factor):
            linear_layer()

    torch.manual_seed(0)
    plain = observed(Program(linear_layer))
    torch.manual_seed(0)
    weighted = observed(Program(program))
    expected = factor**0.5 * plain.scores(plain.slots())
    torch.testing.assert_close(weighted.scores(weighted.slots()), expected)


def test_the_mask_of_a_program_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    # Negative control of the programs with masks and scales.
    monkeypatch.setattr(
        "pyronat.records.SiteRecord.base_weights",
        lambda self: torch.ones(self.distribution.batch_shape),
    )
    for model in (masked_sites, scaled, scaled_by_datum, subsampled):
        pyro.clear_param_store()
        found = observed(Program(model))
        assert (found.scores(found.slots()) - found.by_autograd()).abs().max() > 1e-3


def test_a_distribution_that_data_share_is_refused() -> None:
    def program() -> None:
        base = dist.Bernoulli(logits=number("b"))
        with pyro.plate("data", N):
            pyro.sample("y", dist.torch_distribution.ExpandedDistribution(base, (N,)))

    found = observed(Program(program))
    with pytest.raises(UnsupportedDistribution, match=r"'y'.*data.*expand"):
        found.scores(found.slots())
    everything = Slots(DatumPlates(()), torch.tensor(0), 1)
    expected = replace(found, plates=DatumPlates(()), sizes=()).by_autograd()
    torch.testing.assert_close(found.scores(everything), expected)


WRAPPED: dict[str, Callable[[Any, Tensor], Any]] = {
    "plain": lambda base, mask: base,
    "independent": lambda base, mask: base.to_event(1),
    "masked": lambda base, mask: base.mask(mask),
    "masked inside": lambda base, mask: base.mask(mask).to_event(1),
    "masked outside": lambda base, mask: base.to_event(1).mask(mask[:, 0]),
    "twice": lambda base, mask: base.mask(mask).to_event(1).mask(mask[:, 0]),
}


@pytest.mark.parametrize("name", sorted(WRAPPED))
def test_wrappers_of_a_site(name: str) -> None:
    mask = torch.tensor([[True, False, True], [False, True, True]])

    def program() -> None:
        base = dist.Bernoulli(logits=number("b", 2, M))
        distribution = WRAPPED[name](base, mask)
        dim = -len(distribution.batch_shape)
        with pyro.plate("data", 2, dim=dim):
            if dim == -2:
                with pyro.plate("units", M, dim=-1):
                    pyro.sample("y", distribution)
            else:
                pyro.sample("y", distribution)

    found = observed(Program(program))
    torch.testing.assert_close(found.scores(found.slots()), found.by_autograd())


def test_a_site_that_is_masked_altogether_says_nothing() -> None:
    def program() -> None:
        with pyro.plate("data", 2):
            pyro.sample("y", dist.Bernoulli(logits=number("b", 2)).mask(False))

    found = observed(Program(program))
    assert found.scores(found.slots()).abs().max() == 0


# --- posteriors --------------------------------------------------------------------------------


def gaussian_log_prob(x: Tensor, loc: Tensor) -> Tensor:
    return -0.5 * (x - loc) ** 2 - 0.5 * torch.log(torch.tensor(2 * torch.pi))


def night(model: Callable[..., Any], *args: Any) -> Dream:
    return draw(model, args, {})


def mixture(n: int) -> None:
    with pyro.plate("data", n):
        z = pyro.sample("z", dist.Categorical(logits=number("top", M)))
        pyro.sample("x", dist.Normal(2 * number("loc", M)[z], 1.0), obs=torch.zeros(n))


def mixture_posterior(x: Tensor) -> Tensor:
    """p(z | x) `[components, data]`."""
    log_joint = number("top", M).log_softmax(0)[:, None] + gaussian_log_prob(
        x, 2 * number("loc", M)[:, None]
    )
    return (log_joint - log_joint.logsumexp(0)).exp().detach()


def test_posterior_of_a_mixture() -> None:
    found = night(mixture, N)
    weights = posterior_marginals(mixture, (N,), {}, found).weights
    expected = mixture_posterior(found.values["x"])
    assert found.visible == {"x"} and weights.keys() == {"z", "x"}
    torch.testing.assert_close(weights["z"], expected)
    torch.testing.assert_close(weights["x"], expected)
    # Negative control: the data of the program are others than those of the dream.
    assert (mixture_posterior(torch.zeros(N)) - expected).abs().max() > 1e-2


def wrapped_in_scale(n: int) -> None:
    with poutine.scale(scale=9.0):
        mixture(n)


def in_subsample(n: int) -> None:
    with pyro.plate("data", 10 * n, subsample_size=n) as rows:
        z = pyro.sample("z", dist.Categorical(logits=number("top", M)))
        loc = 2 * number("loc", M)[z] + number("each", 10 * n)[rows]
        pyro.sample("x", dist.Normal(loc, 1.0), obs=torch.zeros(n))


def scaled_emission(n: int) -> None:
    with pyro.plate("data", n):
        z = pyro.sample("z", dist.Categorical(logits=number("top", M)))
        with poutine.scale(scale=0.1):
            pyro.sample("x", dist.Normal(2 * number("loc", M)[z], 1.0), obs=torch.zeros(n))


@pytest.mark.parametrize("model", [wrapped_in_scale, in_subsample, scaled_emission])
def test_scales_do_not_change_the_posterior(model: Callable[[int], None]) -> None:
    found = night(model, N)
    marginals = posterior_marginals(model, (N,), {}, found)
    x = found.values["x"]
    if model is in_subsample:
        assert found.subsamples["data"].shape == (N,)
        x = x - number("each", 10 * N)[found.subsamples["data"]].detach()
    expected = mixture_posterior(x)
    torch.testing.assert_close(marginals.weights["z"], expected)
    torch.testing.assert_close(marginals.weights["x"], expected)
    scales = {record.name: torch.as_tensor(record.scale) for record in marginals.run.records}
    originals = {record.name: torch.as_tensor(record.scale) for record in found.run.records}
    assert scales == originals and any(float(scale) != 1 for scale in scales.values())


def test_masked_elements_say_nothing() -> None:
    def model(n: int) -> None:
        with pyro.plate("data", n):
            z = pyro.sample("z", dist.Categorical(logits=number("top", M)))
            with poutine.mask(mask=MASK):
                pyro.sample("x", dist.Normal(2 * number("loc", M)[z], 1.0), obs=torch.zeros(n))

    found = night(model, N)
    weights = posterior_marginals(model, (N,), {}, found).weights
    expected = mixture_posterior(found.values["x"])
    prior = number("top", M).softmax(0).detach()[:, None].expand(-1, N)
    torch.testing.assert_close(weights["z"], torch.where(MASK, expected, prior))
    torch.testing.assert_close(weights["x"] * MASK, expected * MASK)


def test_posterior_of_two_hidden_sites() -> None:
    def model(n: int) -> None:
        with pyro.plate("data", n):
            a = pyro.sample("a", dist.Categorical(logits=number("A", M)))
            b = pyro.sample("b", dist.Bernoulli(logits=number("B", M)[a]))
            loc = 2 * number("X", M, 2)[a, b.long()]
            pyro.sample("x", dist.Normal(loc, 1.0), obs=torch.zeros(n))
            pyro.sample("y", dist.Normal(number("Y", 2)[b.long()], 1.0), obs=torch.zeros(n))

    found = night(model, N)
    weights = posterior_marginals(model, (N,), {}, found).weights
    x, y = found.values["x"], found.values["y"]
    log_b = torch.stack([F.logsigmoid(-number("B", M)), F.logsigmoid(number("B", M))])
    log_joint = (
        (number("A", M).log_softmax(0) + log_b)[..., None]
        + gaussian_log_prob(x, 2 * number("X", M, 2).T[..., None])
        + gaussian_log_prob(y, number("Y", 2)[:, None, None])
    ).detach()
    expected = (log_joint - log_joint.logsumexp((0, 1))).exp()
    torch.testing.assert_close(weights["a"], expected.sum(0))
    torch.testing.assert_close(weights["b"], expected)
    torch.testing.assert_close(weights["x"], expected)
    torch.testing.assert_close(weights["y"].squeeze(1), expected.sum(1))


def test_posterior_of_a_markov_chain() -> None:
    net = DiscreteHMM(3, 4, 5)
    x = net.make_data(0, 7)
    found = night(net.model, x)
    weights = posterior_marginals(net.model, (x,), {}, found).weights
    values, steps = found.values, sorted(found.visible)
    hidden = sorted(values.keys() - found.visible)
    assert len(hidden) == len(steps) == 5
    initial, transition, emission = (net.initial[k] for k in ("initial", "transition", "emission"))
    symbols = torch.stack([values[name] for name in steps])
    grid = torch.cartesian_prod(*[torch.arange(3)] * 5)
    joint = initial[grid[:, 0]].log()[:, None] + emission[grid[:, 0]][:, symbols[0]].log()
    for t in range(1, 5):
        step = transition[grid[:, t - 1], grid[:, t]].log()[:, None]
        joint = joint + step + emission[grid[:, t]][:, symbols[t]].log()
    posterior = joint.softmax(0).reshape(*[3] * 5, 7)
    for t, name in enumerate(hidden):
        pair = posterior.sum([s for s in range(5) if s not in {t - 1, t}])
        # Pyro enumerates neighbours in two dimensions, by turns.
        found_pair = weights[name].squeeze()
        orders = (pair, pair.transpose(0, 1)) if t else (pair,)
        assert any(torch.allclose(found_pair, order) for order in orders), name
        single = posterior.sum([s for s in range(5) if s != t])
        torch.testing.assert_close(weights[steps[t]].squeeze(), single)


def posterior_scores(model: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Dream, Any]:
    """Posterior means of scores by datum, as rows of gradients by parameter."""
    found = night(model, *args)
    plan = make_plan(know(model, args, {}))
    marginals = posterior_marginals(model, args, {}, found)
    factors = observe_units(marginals.run.records, plan, marginals.run.params)
    columns = BlockColumns(plan.blocks)
    plate = found.run.records[0].plates[0]
    size = found.run.records[0].distribution.batch_shape[plate.dim]
    slots = Slots(DatumPlates((replace(plate, scale=1.0),)), torch.arange(size), size)
    weighted = [(f, marginals.weights[f.record.name]) for f in factors]
    parts = columns.split(datum_scores(weighted, slots, columns))
    rows = []
    for datum in range(size):
        row: dict[str, Tensor] = {}
        for name, part in parts.items():
            for param, value in plan.layouts[name].unpack(part[datum]).items():
                row[param] = row.get(param, 0) + value
        rows.append(row)
    return found, rows


@pytest.mark.parametrize("net", [GaussianMixture(), DiscreteHMM(2, 3, 4)], ids=["mixture", "hmm"])
def test_posterior_scores_are_gradients_of_the_likelihood(net: Any) -> None:
    """Fisher's identity, for each datum: Σ_h p(h|v) ∇ log p(v, h) = ∇ log p(v)."""
    x = net.sample(net.start(1), N, 2) if hasattr(net, "sample") else net.make_data(2, N)
    found, rows = posterior_scores(net.model, (x,))
    visible = [found.values[name] for name in sorted(found.visible)]
    data = visible[0] if len(visible) == 1 else torch.stack(visible, -1)
    store = pyro.get_param_store()
    for datum, row in enumerate(rows):
        values = {name: store[name] for name in net.constraints}
        total = net.log_likelihood(values, data[datum : datum + 1])
        leaves = dict(store.named_parameters())
        found_grad = torch.autograd.grad(total, list(leaves.values()))
        for name, expected in zip(leaves, found_grad, strict=True):
            torch.testing.assert_close(row[name], expected, rtol=0, atol=1e-9)
