"""The visible geometry: low-rank solves, estimates from dreams, training, checkpoints, fallback."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import randn
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from states import parameters, same
from torch import Tensor
from torch.distributions import transform_to
from torch.nn.functional import linear

import pyronat
from models.helmholtz import Helmholtz
from models.latent_class import LatentClass
from models.mixture import GaussianMixture
from pyronat import Full, NaturalGradient, NaturalSVI, spectrum, testing, visible
from pyronat.districts import plan_districts
from pyronat.errors import CheckpointMismatch
from pyronat.geometry import Visible
from pyronat.operators import CholeskyFactor, cholesky
from pyronat.plans import make_plan
from pyronat.programs import know
from pyronat.spectrum import MAX_ROWS, Spectrum, VisibleAverage, sketched
from pyronat.steps import ConstantDamping, KLTrustRegion, Momentum, RunningAverage
from pyronat.visible import Dreamer, Measurement, Particles, measure_visible, normalized

EXACT = 1e-9
Z_LIMIT = 5.0

# --- low-rank solves ---------------------------------------------------------------------------

SHAPES = {"a": (2, 3), "b": (1, 4)}
"""Blocks of a small district, `(count, size)`."""

WIDTH = 10


class Problem:
    """A block-diagonal G, its damping Λ, and a visible Fisher between 0 and G.

    With `rank` G has only so many directions in each unit.
    """

    def __init__(self, seed: int = 0, rank: int | None = None, retained: Tensor | None = None):
        self.blocks = {}
        self.damping = {}
        for number, (name, (count, size)) in enumerate(SHAPES.items()):
            root = randn(100 * seed + number, count, size, size)
            root[:, :, size if rank is None else rank :] = 0
            self.blocks[name] = root @ root.mT
            self.damping[name] = torch.linspace(0.1, 0.4, count)
        self.full = torch.block_diag(*(m for some in self.blocks.values() for m in some))
        self.diagonal = torch.cat([
            self.damping[name].repeat_interleave(size) for name, (_, size) in SHAPES.items()
        ]).diag()
        values, vectors = torch.linalg.eigh(self.full)
        root = vectors * values.clamp_min(0).sqrt()
        turn = torch.linalg.qr(randn(seed + 7, WIDTH, WIDTH))[0]
        shares = torch.linspace(0, 1, WIDTH) if retained is None else retained
        self.visible = root @ (turn * shares) @ turn.mT @ root.mT
        self.missing = self.full - self.visible

    @property
    def factors(self) -> dict[str, CholeskyFactor]:
        return {name: cholesky(self.blocks[name], self.damping[name]) for name in SHAPES}

    @property
    def damped(self) -> Tensor:
        return self.full + self.diagonal

    def solved(self, found: Spectrum, vector: Tensor, mixing: float) -> Tensor:
        parts = vector.split([count * size for count, size in SHAPES.values()])
        gradients = {
            name: part.reshape(shape)
            for (name, shape), part in zip(SHAPES.items(), parts, strict=True)
        }
        solution = found.solve(gradients, mixing)
        assert {name: part.shape for name, part in solution.items()} == {
            name: torch.Size(shape) for name, shape in SHAPES.items()
        }
        return torch.cat([solution[name].flatten() for name in SHAPES])


def average(kind: Any, matrix: Tensor | None = None, rows: Tensor | None = None) -> VisibleAverage:
    return VisibleAverage(kind, matrix, rows, math.inf)


def gram_rows(matrix: Tensor) -> Tensor:
    """Rows whose Gram matrix is a given one, some of them zero."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()).mT


MIXINGS = (0.0, 0.01, 0.3, 1.0)
by_mixing = pytest.mark.parametrize("mixing", MIXINGS)
by_rank = pytest.mark.parametrize("rank", [None, 2, 1])


@by_rank
@by_mixing
def test_solve_with_a_visible_matrix(mixing: float, rank: int | None) -> None:
    retained = torch.linspace(0.1, 1, WIDTH)
    problem, vector = Problem(rank=rank, retained=retained), randn(3, WIDTH)
    if rank is not None and mixing == 0:
        vector = problem.visible @ vector
    found = spectrum.spectrum(average("visible", problem.visible), problem.factors)
    assert found.damps_mixed
    matrix = (1 - mixing) * problem.visible + mixing * problem.damped
    if mixing > 0 or rank is None:
        expected = torch.linalg.solve(matrix, vector)
        torch.testing.assert_close(
            problem.solved(found, vector, mixing), expected, rtol=1e-5, atol=1e-6
        )
        wrong = torch.linalg.solve(problem.damped, vector)
        assert mixing == 1 or not torch.allclose(wrong, expected, rtol=1e-2)


@by_rank
@by_mixing
@pytest.mark.parametrize("form", ["matrix", "rows"])
def test_solve_with_missing_information(form: str, mixing: float, rank: int | None) -> None:
    problem, vector = Problem(rank=rank), randn(3, WIDTH)
    if form == "matrix":
        known = average("missing", problem.missing)
    else:
        known = average("missing", rows=gram_rows(problem.missing))
    found = spectrum.spectrum(known, problem.factors)
    assert not found.damps_mixed
    matrix = problem.damped - (1 - mixing) * problem.missing
    expected = torch.linalg.solve(matrix, vector)
    torch.testing.assert_close(
        problem.solved(found, vector, mixing), expected, rtol=1e-4, atol=1e-5
    )
    wrong = torch.linalg.solve(problem.damped - 0.9 * (1 - mixing) * problem.missing, vector)
    assert mixing == 1 or not torch.allclose(wrong, expected, rtol=1e-3)


@by_mixing
def test_solve_with_few_rows(mixing: float) -> None:
    """What no row has looked at keeps the full metric."""
    problem, vector = Problem(), randn(3, WIDTH)
    values, vectors = torch.linalg.eigh(problem.missing)
    rows = (vectors[:, -2:] * values[-2:].sqrt()).mT
    found = spectrum.spectrum(average("missing", rows=rows), problem.factors)
    assert found.directions.shape == (WIDTH, 2)
    identity = found.directions.mT @ found.directions
    torch.testing.assert_close(identity, torch.eye(2), rtol=0, atol=EXACT)
    expected = torch.linalg.solve(problem.damped - (1 - mixing) * rows.mT @ rows, vector)
    torch.testing.assert_close(
        problem.solved(found, vector, mixing), expected, rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("mixing", MIXINGS[1:])
def test_wide_districts_are_solved_with_in_single_precision(
    mixing: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where rows are nearly the same, so that directions are found with large errors."""
    problem, vector = Problem(), randn(3, WIDTH)
    rows = 0.9 * gram_rows(problem.missing)
    rows = torch.cat([rows, 1e-4 * randn(4, 3, WIDTH)])
    half = {
        name: cholesky(matrices.float(), problem.damping[name].float())
        for name, matrices in problem.blocks.items()
    }
    solutions = {}
    for most in (0, 2**18):
        monkeypatch.setattr(spectrum, "_MAX_DOUBLE", most)
        found = spectrum.spectrum(average("missing", rows=rows.float()), half)
        solutions[found.directions.dtype] = problem.solved(found, vector.float(), mixing).double()
    expected = torch.linalg.solve(problem.damped - (1 - mixing) * rows.mT @ rows, vector)
    for solution in (solutions[torch.float32], solutions[torch.float64]):
        assert (solution - expected).norm() < 2e-4 * expected.norm()


def test_nothing_missing_is_the_full_metric() -> None:
    problem, vector = Problem(), randn(3, WIDTH)
    expected = torch.linalg.solve(problem.damped, vector)
    for known in (
        average("missing", torch.zeros(WIDTH, WIDTH)),
        average("missing", rows=torch.zeros(3, WIDTH)),
        average("missing", rows=torch.zeros(0, WIDTH)),
    ):
        found = spectrum.spectrum(known, problem.factors)
        assert found.directions.shape == (WIDTH, 0) and found.missing() == 0
        torch.testing.assert_close(problem.solved(found, vector, 0.0), expected)


def test_spectra_of_expectations_are_clipped() -> None:
    problem, vector = Problem(), randn(3, WIDTH)
    full = torch.linalg.solve(problem.damped, vector)
    too_much = spectrum.spectrum(average("visible", 3 * problem.damped), problem.factors)
    torch.testing.assert_close(problem.solved(too_much, vector, 0.1), full)
    too_little = spectrum.spectrum(average("missing", 3 * problem.damped), problem.factors)
    torch.testing.assert_close(problem.solved(too_little, vector, 0.1), 10 * full)
    assert too_little.missing() == pytest.approx(1.0)
    rows = spectrum.spectrum(
        average("missing", rows=gram_rows(3 * problem.damped)), problem.factors
    )
    torch.testing.assert_close(problem.solved(rows, vector, 0.1), 10 * full)
    # The observed information may be larger than G, and is not clipped.
    observed = spectrum.spectrum(average("observed", 3 * problem.damped), problem.factors)
    torch.testing.assert_close(problem.solved(observed, vector, 0.0), full / 3)


@pytest.mark.parametrize(
    "retained",
    [
        [-0.5, 0.2],
        [-0.01, 3.0],
        [-0.9, 40.0],
        [-3.0, 5.0],
    ],
    ids=str,
)
@pytest.mark.parametrize("mixing", [0.0, 0.1, 1.0])
def test_negative_curvature_leaves_a_descent_direction(
    retained: list[float], mixing: float
) -> None:
    factors = {"a": cholesky(torch.eye(3)[None], torch.zeros(1))}
    found = Spectrum(factors, torch.eye(3)[:, :2], torch.tensor(retained), True)
    if mixing < 1 or found.least_mixing() > 1:
        assert 0 < found.least_mixing() <= 1
    for vector in torch.eye(3):
        (solved,) = found.solve({"a": vector[None]}, mixing)["a"]
        assert vector @ solved > 0
    assert found.stretch(mixing).min() > 0


# --- averages ----------------------------------------------------------------------------------


def test_matrices_are_averaged() -> None:
    first = VisibleAverage("visible", torch.eye(2), None, 100.0)
    second = VisibleAverage("visible", 3 * torch.eye(2), None, 300.0)
    mixed = first.mix(second, 0.25)
    torch.testing.assert_close(mixed.matrix, 1.5 * torch.eye(2))
    assert mixed.num_dreams == pytest.approx(1 / (0.75**2 / 100 + 0.25**2 / 300))
    assert mixed.kind == "visible" and mixed.rows is None


def test_rows_are_averaged() -> None:
    first = VisibleAverage("missing", None, randn(1, 5, 3), 100.0)
    second = VisibleAverage("missing", None, randn(2, 4, 3), 100.0)
    mixed = first.mix(second, 0.25)
    expected = 0.75 * first.rows.mT @ first.rows + 0.25 * second.rows.mT @ second.rows
    torch.testing.assert_close(mixed.rows.mT @ mixed.rows, expected)
    # The running average of equal shares counts all dreams.
    assert first.mix(second, 0.5).num_dreams == pytest.approx(200)


def test_what_cannot_be_averaged_is_replaced() -> None:
    matrix = VisibleAverage("visible", torch.eye(2), None, 100.0)
    for other in (
        VisibleAverage("missing", torch.eye(2), None, 10.0),
        VisibleAverage("missing", None, torch.ones(1, 2), 10.0),
    ):
        assert matrix.mix(other, 0.2) is other
        assert other.mix(matrix, 0.2) is matrix
    again = VisibleAverage("visible", 2 * torch.eye(2), None, 10.0)
    assert matrix.mix(again, 1.0) is again


def test_exact_averages_stay_exact() -> None:
    exact = VisibleAverage("visible", torch.eye(2), None, math.inf)
    assert exact.mix(exact, 0.5).num_dreams >= 1e29


def test_sketches_are_unbiased() -> None:
    rows = randn(1, 3 * MAX_ROWS + 50, 3) * torch.linspace(0, 1, 3 * MAX_ROWS + 50)[:, None]
    expected = rows.mT @ rows
    parts = [(rows[:90] / 2, 2.0), (rows[90:], 1.0)]
    found = torch.stack([
        part.mT @ part for part in (sketched(parts, MAX_ROWS) for _ in range(500))
    ])
    assert sketched(parts, MAX_ROWS).shape == (MAX_ROWS, 3)
    assert found.std(0).min() > 0
    assert testing.z_score(found, expected).abs().max() < Z_LIMIT
    # Negative control: without signs neighbours would add up.
    assert testing.z_score(found, 1.05 * expected).abs().max() > Z_LIMIT
    few = sketched([(rows[:10], 0.5), (rows[10:30], 0.5)], MAX_ROWS)
    torch.testing.assert_close(few.mT @ few, rows[:30].mT @ rows[:30] / 4)


def share(num_rows: int, width: int, signal: float, num_dreams: float | None = None) -> float:
    noise = torch.randn(num_rows, width) / num_rows**0.5
    rows = torch.cat([noise, signal * torch.eye(width)[:1]])
    values = torch.linalg.eigvalsh(rows.mT @ rows)
    squares = rows.square().sum(1)
    return spectrum._signal_share(squares, values, width, num_dreams or num_rows)


def test_few_dreams_are_shrunk_and_many_are_not() -> None:
    assert share(30, 3, 0.0, 9) == 1.0
    assert share(30, 3, 0.0, 8.9) < 1.0
    assert share(20, 2000, 0.0) < 0.1
    assert share(400, 2000, 0.0) == pytest.approx(400 / 2400, abs=0.1)
    assert share(1900, 2000, 0.0) > 0.4


def test_shrinkage_only_takes_missing_information_away() -> None:
    problem = Problem()
    rows = randn(5, 4, WIDTH) / 4
    few = spectrum.spectrum(VisibleAverage("missing", None, rows, 4.0), problem.factors)
    many = spectrum.spectrum(VisibleAverage("missing", None, rows, 400.0), problem.factors)
    assert (few.retained > many.retained - 1e-12).all()
    assert few.retained.min() > many.retained.min() + 1e-3


# --- estimates from dreams ---------------------------------------------------------------------


def param(name: str, *shape: int) -> Tensor:
    return pyro.param(name, lambda: randn(sum(map(ord, name)), *shape))


def measured(
    geometry: Visible, model: Any, guide: Any, *args: Any, seed: int = 0
) -> tuple[Measurement, Dreamer]:
    torch.manual_seed(seed)
    if guide is not None:
        guide(*args)
    poutine.trace(model).get_trace(*args)
    plan = make_plan(know(model, args, {}))
    known = None if guide is None else know(guide, args, {})
    guide_plan = None if known is None else make_plan(known, required=False)
    proposing = known.net if known is not None and geometry.posterior == "guide" else None
    districts = plan_districts(plan.program.net, plan.blocks, proposing)
    dreamer = Dreamer(geometry, plan, guide_plan, model, guide, args, {})
    torch.manual_seed(seed)
    return measure_visible(geometry, plan, districts, dreamer, decay=0.0), dreamer


def gram_of(found: VisibleAverage) -> Tensor:
    if found.matrix is not None:
        return found.matrix
    return found.rows.mT @ found.rows


def bits(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(logits=param("top", 3)).to_event(1))
        logits = linear(z, param("w", 4, 3), param("b", 4))
        pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)


def bits_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        logits = linear(x, param("q.w", 3, 4), param("q.b", 3))
        pyro.sample("z", dist.Bernoulli(logits=logits).to_event(1))


BITS = randn(2, 40, 4).sign().clamp_min(0)

ESTIMATES: dict[str, tuple[Visible, str, bool]] = {
    "direct": (Visible(num_dreams=2000), "visible", True),
    "subtractive": (Visible(num_dreams=2000, estimator="subtractive"), "missing", True),
    "few": (Visible(num_dreams=30), "missing", False),
}


@pytest.mark.parametrize("name", ESTIMATES)
def test_estimators_are_chosen_by_the_number_of_dreams(name: str) -> None:
    geometry, kind, dense = ESTIMATES[name]
    found, _ = measured(geometry, bits, bits_guide, BITS.repeat(10, 1))
    (one,) = found.averages.values()
    assert (one.kind, one.matrix is not None, one.num_dreams) == (kind, dense, geometry.num_dreams)
    assert gram_of(one).shape == (19, 19)
    assert gram_of(one).abs().max() > 0


@pytest.mark.parametrize("estimator", ["direct", "subtractive"])
def test_estimates_lie_around_the_truth(estimator: Any) -> None:
    """Direct ones lie above G_V, subtractive ones near what is missing, within the noise."""
    exact = Visible(posterior="exact", mixing=0.0)
    truth = pyronat.fisher(bits, BITS[:1], geometry=exact)
    (expected,) = truth.visible.values()
    (name,) = truth.visible
    whole = truth._full(name)
    geometry = Visible(num_dreams=20_000, num_particles=30, estimator=estimator)
    found, _ = measured(geometry, bits, bits_guide, BITS[:1].expand(2000, -1).clone())
    estimate = gram_of(found.averages[name]) / 2000
    estimate = estimate if estimator == "direct" else whole - estimate
    error = (estimate - expected).norm() / expected.norm()
    assert error < 0.15
    assert (whole - expected).norm() / expected.norm() > 2 * error


@pytest.mark.parametrize("chunk", [7, 1])
@pytest.mark.parametrize("name", ["direct", "subtractive", "enumerate", "enumerate rows"])
def test_chunks_change_nothing(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    mixture = GaussianMixture()
    x = mixture.sample(mixture.start(1), 30, 0)
    if name in ESTIMATES:
        call: tuple[Any, ...] = (
            replace(ESTIMATES[name][0], num_dreams=100),
            bits,
            bits_guide,
            BITS,
        )
    else:
        dreams = 100 if name == "enumerate" else 20
        estimator: Any = "subtractive" if "rows" in name else "auto"
        geometry = Visible(posterior="enumerate", num_dreams=dreams, estimator=estimator)
        call = (geometry, mixture.model, None, x)
    calls = []
    original = visible.Night.evidence

    def counted(self: Any, part: Any, columns: Any, data: Tensor) -> Any:
        calls.append(len(data))
        return original(self, part, columns, data)

    monkeypatch.setattr(visible.Night, "evidence", counted)
    expected, _ = measured(*call)
    before = len(calls)
    if "rows" in name:
        monkeypatch.setattr(visible._Sum, "_chunk", lambda self, night: chunk)
    else:
        bytes_each = 8 * 19 * 10 if name in ESTIMATES else 8 * 15 * 2
        call = (replace(call[0], memory=chunk * bytes_each), *call[1:])
    found, _ = measured(*call)
    assert len(calls) > 2 * before
    assert max(calls[before:]) == chunk < max(calls[:before])
    for district, one in expected.averages.items():
        torch.testing.assert_close(gram_of(found.averages[district]), gram_of(one))
    assert torch.equal(found.ess, expected.ess)


# --- tables of inputs ---------------------------------------------------------------------------

CODES = torch.tensor(list(itertools.product([0.0, 1.0], repeat=3)))
SHIFT = torch.linspace(-1.0, 1.0, 20).reshape(5, 4)


def coded(x: Tensor, shift: Tensor) -> None:
    """A layer whose inputs are a row of a table for each value of one hidden variable."""
    with pyro.plate("data", len(x)):
        h = pyro.sample("h", dist.Categorical(logits=param("top", 8)))
        logits = linear(CODES.to(x)[h], param("w", 4, 3), param("b", 4)) + shift
        pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)


@pytest.mark.parametrize("shift", [torch.zeros(()), SHIFT], ids=["alike", "shifted"])
def test_enumerated_rows_of_a_table_are_weighted_by_their_posterior(shift: Tensor) -> None:
    """Rows by value lie along another dimension than data, which copy them."""
    x, shift = BITS.repeat(2, 1)[:5], shift.to(BITS)
    options = {"trust_region": KLTrustRegion(model=math.inf), "rejection": None}
    optim = NaturalGradient(geometry=Full("posterior"), lr=1e-9, **options)
    svi = NaturalSVI(
        config_enumerate(coded), lambda *data: None, optim, TraceEnum_ELBO(max_plate_nesting=1)
    )
    svi.step(x, shift)
    inputs = torch.cat([torch.ones(8, 1), CODES], 1).to(x)
    weights = torch.cat([pyro.param("b")[:, None], pyro.param("w")], 1).detach()
    logits = (inputs @ weights.mT)[:, None] + shift  # [values, 1 or data, units]
    joint = dist.Bernoulli(logits=logits).log_prob(x).sum(-1) + pyro.param("top").detach()[:, None]
    information = joint.softmax(0).unsqueeze(-1) * logits.sigmoid() * (-logits).sigmoid()
    expected = torch.einsum("vdu,vi,vj->uij", information, inputs, inputs)
    (name,) = optim.sides["model"].average.keys() - {"top"}
    assert optim.sides["model"].plan.blocks[name].params == ("b", "w")
    assert (optim.sides["model"].average[name].matrix - expected).abs().max() < 1e-6


def test_visible_fisher_of_rows_of_a_table() -> None:
    x, shift = BITS[:1], torch.zeros(()).to(BITS)
    torch.manual_seed(0)
    coded(x, shift)
    oracle, layout = testing.enumerated_visible_fisher(coded, x, shift)
    whole, _ = testing.enumerated_fisher(coded, x, shift)
    geometry = Visible(0, posterior="enumerate", num_dreams=4000, estimator="direct")
    many = x.expand(1000, -1).clone()
    fisher = pyronat.fisher(coded, many, shift, geometry=geometry, num_samples=2)
    places = dict(layout)
    order = torch.cat([
        torch.arange(places[name].start, places[name].stop) for name, _ in fisher.full.slices()
    ])
    expected, whole = (matrix[order][:, order] for matrix in (oracle, whole))
    error = (fisher.dense()[0] / len(many) - expected).norm() / expected.norm()
    assert error < 0.1
    assert (whole - expected).norm() / expected.norm() > 5 * error


# --- effective sample sizes --------------------------------------------------------------------


def mixture_svi(geometry: Visible, guide: Any = None, size: int = 50, **options: Any) -> Any:
    net = GaussianMixture()
    x = net.sample(net.start(1), size, 0)
    options = {"lr": 0.1, **options}
    loss = None if guide == "recognize" else TraceEnum_ELBO(max_plate_nesting=1)
    chosen = net.recognize if guide == "recognize" else net.guide
    return NaturalSVI(net.model, chosen, NaturalGradient(geometry=geometry, **options), loss), x


def test_ess_of_enumerated_posteriors_is_none() -> None:
    svi, x = mixture_svi(Visible(posterior="enumerate"))
    svi.step(x)
    assert svi.info.dream_ess is None
    assert 0 < svi.info.missing <= 1


def test_ess_of_full_geometries_is_none() -> None:
    svi, x = mixture_svi(Visible(mixing=1.0, full=Full("model")), "recognize")
    svi.step(x)
    assert svi.info.dream_ess is None and svi.info.missing is None and svi.info.mixing == 1.0


@pytest.mark.parametrize("count", [2, 7])
def test_ess_of_an_exact_guide_is_the_number_of_particles(count: int) -> None:
    svi, x = mixture_svi(Visible(num_particles=count), "recognize")
    svi.step(x)
    assert svi.info.dream_ess == pytest.approx((count,) * 3)


def test_ess_of_a_poor_guide_lies_between() -> None:
    svi = NaturalSVI(bits, bits_guide, NaturalGradient(geometry=Visible(num_particles=6)))
    svi.step(BITS)
    low, median, high = svi.info.dream_ess
    assert 1 <= low < median < high <= 6
    svi.step(BITS)
    assert not svi.info.refreshed and svi.info.dream_ess == (low, median, high)


def sites(names: str, count: int = 8) -> tuple[Callable[[Tensor], None], Callable[[Tensor], None]]:
    """A program of independent hidden sites without a plate, and a poor guide."""

    def model(x: Tensor) -> None:
        for name in names:
            z = pyro.sample(f"z{name}", dist.Bernoulli(logits=param(f"a{name}", count)).to_event(1))
            logits = 2 * param(f"b{name}", count) * z
            pyro.sample(f"x{name}", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        for name in names:
            logits = param(f"q{name}", count) * x
            pyro.sample(f"z{name}", dist.Bernoulli(logits=logits).to_event(1))

    return model, guide


def test_districts_have_weights_of_their_own() -> None:
    """The joint weights of two districts would have a smaller effective sample size."""
    model, guide = sites("cd")
    geometry = Visible(num_particles=10, num_dreams=20)
    found, dreamer = measured(geometry, model, guide, torch.ones(8))
    assert len(found.averages) == 2 and len(found.ess) == 2 * 20
    districts = plan_districts(dreamer.plan.program.net, dreamer.plan.blocks)
    first, second = (part for district in districts for part in district.parts)
    own, joint = [], []
    for _ in range(20):
        night = dreamer.dream()
        weights = night.weights(first), night.weights(second)
        own += [float(1 / one.square().sum()) for one in weights]
        product = normalized(weights[0].log() + weights[1].log())
        joint.append(float(1 / product.square().sum()))
    means = [sum(some) / len(some) for some in (own, joint)]
    assert means[0] > 1.3 * means[1]
    assert found.ess.mean() > 1.3 * means[1]


def test_deviations_are_debiased() -> None:
    """With equal weights the factor is that of a sample variance."""
    scores = randn(1, 5, 3, 2)
    equal = Particles(scores, torch.full((5, 3), 0.2))
    rows = equal.deviations(debias=True)
    found = torch.einsum("kbp,kbq->bpq", rows, rows)
    expected = torch.stack([torch.cov(scores[:, b].mT) for b in range(3)])
    torch.testing.assert_close(found, expected)
    biased = equal.deviations(debias=False)
    torch.testing.assert_close(torch.einsum("kbp,kbq->bpq", biased, biased), 0.8 * expected)
    one = torch.zeros(5, 3)
    one[2] = 1
    alone = Particles(scores, one)
    assert alone.deviations(debias=True).abs().max() == 0
    torch.testing.assert_close(alone.mean(), scores[2])


def test_signed_deviations_have_the_covariance_of_all() -> None:
    """The mean over all signs is exact."""
    scores, weights = randn(2, 3, 2, 4), randn(3, 3, 2).softmax(0)
    some = Particles(scores, weights)
    for debias in (True, False):
        rows = some.deviations(debias)
        expected = torch.einsum("kbp,kbq->bpq", rows, rows)
        squares = []
        for signs in itertools.product((0, 1), repeat=3):
            flips = torch.tensor(signs).unsqueeze(1).expand(3, 2)
            with mock.patch("torch.randint", return_value=flips):
                row = torch.zeros(2, 4)
                some.add_deviations(row, torch.tensor([1, 0]), 3.0, debias)
            squares.append(torch.einsum("bp,bq->bpq", row, row).flip(0) / 9)
        torch.testing.assert_close(torch.stack(squares).mean(0), expected)
        assert (squares[0] - expected).abs().max() > 0.01


# --- programs ----------------------------------------------------------------------------------


def emission(z: Tensor) -> Tensor:
    return 2 * param("loc", 3)[z]


def stored(name: str, *shape: int) -> Tensor:
    """The present value of a parameter of the model, which a guide reads but does not own."""
    store = pyro.get_param_store()
    return store[name].detach() if name in store else randn(sum(map(ord, name)), *shape)


def log_posterior(x: Tensor, seen: Tensor | bool = True) -> Tensor:
    """log p(z | x) of the mixtures below, up to a constant, `[data, 3]`."""
    likelihood = dist.Normal(2 * stored("loc", 3), 1.0).log_prob(x[:, None])
    prior = stored("top", 3).log_softmax(0)
    return prior + torch.where(torch.as_tensor(seen).reshape(-1, 1), likelihood, 0.0)


DATA = 3 * randn(9, 30)
SEEN = torch.arange(30) % 3 > 0


def mixture(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(logits=param("top", 3)))
        pyro.sample("x", dist.Normal(emission(z), 1.0), obs=x)


def by_identity(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Categorical(logits=log_posterior(x)))


def by_name(x: Tensor, observations: Mapping[str, Tensor] | None = None) -> None:
    x = x if observations is None else observations["x"]
    by_identity(x)


def mixture_of_name(x: Tensor, observations: Any = None) -> None:
    mixture(x + 0.0)


def deaf(x: Tensor, observations: Any = None) -> None:
    """Negative control: looks at the data instead of the dream."""
    by_identity(x)


def masked(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(logits=param("top", 3)))
        with poutine.mask(mask=SEEN.repeat(len(x) // len(SEEN))):
            pyro.sample("x", dist.Normal(emission(z), 1.0), obs=x)


def masked_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample(
            "z", dist.Categorical(logits=log_posterior(x, SEEN.repeat(len(x) // len(SEEN))))
        )


def subsampled(x: Tensor, observations: Any = None) -> None:
    with pyro.plate("data", len(x), subsample_size=12) as rows:
        z = pyro.sample("z", dist.Categorical(logits=param("top", 3)))
        loc = emission(z) + param("each", 30)[rows]
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x[rows])


def subsampled_guide(x: Tensor, observations: Mapping[str, Tensor] | None = None) -> None:
    with pyro.plate("data", len(x), subsample_size=12) as rows:
        seen = x[rows] if observations is None else observations["x"]
        logits = log_posterior(seen - stored("each", 30)[rows])
        pyro.sample("z", dist.Categorical(logits=logits))


def scaled(x: Tensor) -> None:
    with poutine.scale(scale=0.01):
        mixture(x)


def scaled_guide(x: Tensor) -> None:
    with poutine.scale(scale=0.01):
        by_identity(x)


EXACT_GUIDES: dict[str, tuple[Any, Any]] = {
    "identity": (mixture, by_identity),
    "observations": (mixture_of_name, by_name),
    "masked": (masked, masked_guide),
    "subsampled": (subsampled, subsampled_guide),
    "scaled": (scaled, scaled_guide),
}


@pytest.mark.parametrize("name", EXACT_GUIDES)
def test_guides_see_the_dreams(name: str) -> None:
    """The weights of exact guides are equal, whatever way the dreams reach them."""
    model, guide = EXACT_GUIDES[name]
    svi = NaturalSVI(model, guide, NaturalGradient(lr=0.05, geometry=Visible(num_particles=5)))
    losses = [svi.step(DATA) for _ in range(12)]
    assert svi.info.dream_ess == pytest.approx((5.0,) * 3, rel=1e-6)
    assert all(map(math.isfinite, losses)) and svi.info.accepted
    assert 0 < svi.info.missing <= 1
    assert all(bool(value.isfinite().all()) for value in parameters().values())


def test_guides_that_do_not_look_at_dreams_have_unequal_weights() -> None:
    svi = NaturalSVI(mixture_of_name, deaf, NaturalGradient(geometry=Visible(num_particles=5)))
    svi.step(DATA)
    assert svi.info.dream_ess[1] < 4.5


MANY = DATA.repeat(50)


def visible_fisher(model: Any, x: Tensor) -> Tensor:
    geometry = Visible(posterior="enumerate", num_dreams=6000, estimator="direct")
    (found,) = measured(geometry, model, None, x)[0].averages.values()
    return gram_of(found)


def test_masked_data_count_for_nothing() -> None:
    """G_V of a program with masked data is that of the data that are seen."""
    found, whole = visible_fisher(masked, MANY), visible_fisher(mixture, MANY[SEEN.repeat(50)])
    assert (found - whole).norm() < 0.1 * whole.norm()
    assert (visible_fisher(mixture, MANY) - whole).norm() > 0.3 * whole.norm()


def test_subsampled_data_count_for_all() -> None:
    def part(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample=torch.arange(len(x) // 3)):
            z = pyro.sample("z", dist.Categorical(logits=param("top", 3)))
            pyro.sample("x", dist.Normal(emission(z), 1.0), obs=x[: len(x) // 3])

    found, whole = visible_fisher(part, MANY), visible_fisher(mixture, MANY)
    assert (found - whole).norm() < 0.1 * whole.norm()
    assert (visible_fisher(mixture, MANY[:500]) - whole).norm() > 0.3 * whole.norm()


# --- training ----------------------------------------------------------------------------------


def helmholtz(**options: Any) -> tuple[NaturalSVI, Tensor]:
    net = Helmholtz((8, 4, 2))
    pattern = (torch.rand(4, 8, generator=torch.Generator().manual_seed(1)) < 0.5).double()
    x = pattern.repeat(10, 1)
    geometry = options.pop("geometry", Visible(num_particles=5))
    options = {"lr": 0.1, **options}
    return NaturalSVI(net.model, net.guide, NaturalGradient(geometry=geometry, **options)), x


def enumerated(**options: Any) -> tuple[NaturalSVI, Tensor]:
    return mixture_svi(options.pop("geometry", Visible(posterior="enumerate")), **options)


def guided(**options: Any) -> tuple[NaturalSVI, Tensor]:
    return mixture_svi(options.pop("geometry", Visible(num_particles=4)), "recognize", **options)


def in_rows(**options: Any) -> tuple[NaturalSVI, Tensor]:
    """An estimate that is kept as rows, more of them than a sketch has after some refreshes."""
    geometry = Visible(estimator="subtractive", num_dreams=150, num_particles=3)
    net = Helmholtz((30, 20))
    x = torch.rand(50, 30, generator=torch.Generator().manual_seed(1)).round()
    options = {"lr": 0.1, "curvature": RunningAverage(refresh=1), **options}
    geometry = options.pop("geometry", geometry)
    return NaturalSVI(net.model, net.guide, NaturalGradient(geometry=geometry, **options)), x


SETUPS: dict[str, Callable[..., tuple[NaturalSVI, Tensor]]] = {
    "helmholtz": helmholtz,
    "enumerate": enumerated,
    "guide": guided,
    "rows": in_rows,
}
by_setup = pytest.mark.parametrize("setup", SETUPS)


@by_setup
def test_training_lowers_the_loss(setup: str) -> None:
    svi, x = SETUPS[setup]()
    losses = []
    for _ in range(30):
        losses.append(svi.step(x))
        assert svi.info.accepted and math.isfinite(svi.info.kl) and svi.info.cosine > 0
        assert svi.info.mixing == 0.3 and 0 < svi.info.missing <= 1
    assert sum(losses[-5:]) < sum(losses[:5])
    assert all(bool(value.isfinite().all()) for value in parameters().values())


def test_visible_steps_gain_more_than_full_ones() -> None:
    """Where much information is missing the full geometry is too careful."""
    net, gains = LatentClass(), {"visible": 0.0, "full": 0.0}
    geometries = {"visible": Visible(posterior="enumerate"), "full": Full("model")}
    for name, seed in itertools.product(gains, (1, 2, 3)):
        x = net.sample(net.start(3), 200, seed)
        pyro.clear_param_store()
        optim = NaturalGradient(lr=0.5, geometry=geometries[name], momentum=Momentum(0.0))
        svi = NaturalSVI(net.model, net.guide, optim, TraceEnum_ELBO(max_plate_nesting=1))
        losses = [svi.step(x) for _ in range(13)]
        gains[name] += losses[0] - losses[-1]
    assert gains["visible"] > 1.05 * gains["full"] > 0


@by_setup
@pytest.mark.parametrize("steps", [5, 7])
def test_resuming_is_exact_to_the_last_bit(setup: str, steps: int, tmp_path: Path) -> None:
    """At a refresh and between two, after averages of some refreshes."""
    make = SETUPS[setup]
    first, x = make()
    for _ in range(steps):
        first.step(x)
    assert first.optim.sides["model"].visible
    first.optim.save(str(tmp_path / "optim.pt"))
    loaded = torch.load(tmp_path / "optim.pt", weights_only=True)
    assert same(loaded, first.optim.get_state())
    pyro.get_param_store().save(str(tmp_path / "params.pt"))
    random = torch.get_rng_state()
    expected = [first.step(x) for _ in range(6)]
    end, state = parameters(), copy.deepcopy(first.optim.get_state())

    pyro.clear_param_store()
    pyro.get_param_store().set_state(torch.load(tmp_path / "params.pt", weights_only=False))
    second, x = make()
    second.optim.set_state(loaded)
    torch.set_rng_state(random)
    assert [second.step(x) for _ in range(6)] == expected
    assert same(parameters(), end)
    assert same(second.optim.get_state(), state)


def test_resuming_without_the_visible_average_is_not_exact() -> None:
    # Negative control: what has been averaged matters.
    first, x = enumerated()
    for _ in range(7):
        first.step(x)
    state, params = copy.deepcopy(first.optim.get_state()), pyro.get_param_store().get_state()
    params = copy.deepcopy(params)
    random = torch.get_rng_state()
    expected = [first.step(x) for _ in range(3)]
    (name,) = state["sides"]["model"]["visible"]
    state["sides"]["model"]["visible"][name]["matrix"] *= 0.9
    pyro.clear_param_store()
    pyro.get_param_store().set_state(params)
    second, x = enumerated()
    second.optim.set_state(state)
    torch.set_rng_state(random)
    assert [second.step(x) for _ in range(3)] != expected


@pytest.mark.parametrize("bound", [False, True])
@pytest.mark.parametrize(
    ("first", "second"),
    [(Visible(), Full()), (Full(), Visible())],
    ids=["visible to full", "full to visible"],
)
def test_a_state_of_another_geometry_is_refused(first: Any, second: Any, bound: bool) -> None:
    svi, x = guided(geometry=first)
    svi.step(x)
    state = copy.deepcopy(svi.optim.get_state())
    other, x = guided(geometry=second)
    if bound:
        other.step(x)
    before = copy.deepcopy(other.optim.get_state()), parameters()
    with pytest.raises(CheckpointMismatch, match="another geometry of the model"):
        other.optim.set_state(state)
        other.step(x)
    assert same(before[1], parameters())
    if bound:
        assert same(before[0], other.optim.get_state())


def test_mixing_follows_a_schedule() -> None:
    def schedule(step: int) -> float:
        return max(0.0, 1 - step / 3)

    svi, x = enumerated(geometry=Visible(mixing=schedule, posterior="enumerate"))
    found = []
    for _ in range(5):
        svi.step(x)
        found.append(svi.info.mixing)
    assert found == [schedule(step) for step in range(5)]
    assert found[0] == 1.0 and found[-1] == 0.0


@pytest.mark.parametrize("num_dreams", [100, 250])
def test_dreams_leave_random_numbers_alone(num_dreams: int) -> None:
    left = []
    for geometry in (
        Full(),
        Visible(estimator="subtractive", num_dreams=num_dreams, num_particles=3),
    ):
        pyro.clear_param_store()
        torch.manual_seed(0)
        svi, x = in_rows(geometry=geometry)
        for _ in range(3):
            svi.step(x)
        left.append(torch.get_rng_state())
    assert torch.equal(*left)


# --- good and bad guides -----------------------------------------------------------------------


def far_off(x: Tensor) -> None:
    """Proposes one component nearly always."""
    with pyro.plate("data", len(x)):
        logits = torch.tensor([40.0, 0.0, 0.0])
        pyro.sample("z", dist.Categorical(logits=logits))


def first_change(geometry: Any, guide: Any, damping: float = 1e-3) -> Tensor:
    """The first step of the model; its gradient is the same for all geometries."""
    pyro.clear_param_store()
    x = DATA.repeat(10)
    rule = ConstantDamping(0.0, damping)
    optim = NaturalGradient(lr=1e-3, geometry=geometry, damping=rule)
    svi = NaturalSVI(mixture, guide, optim)
    mixture(x)
    names = ("loc", "top")
    before = parameters()
    torch.manual_seed(0)
    svi.step(x)
    after = parameters()
    return torch.cat([(after[name] - before[name]).flatten() for name in names])


@pytest.mark.parametrize("estimator", ["direct", "subtractive"])
def test_a_bad_guide_falls_back_to_the_full_geometry(estimator: Any) -> None:
    options: dict[str, Any] = {"full": Full("exact"), "num_dreams": 3000, "estimator": estimator}

    def compare(guide: Any) -> tuple[float, float]:
        reference = first_change(Full("exact"), guide)
        found = first_change(Visible(mixing=0.1, **options), guide)
        cosine = torch.cosine_similarity(found, reference, dim=0)
        return float(cosine), float(found.norm() / reference.norm())

    cosine, ratio = compare(far_off)
    assert cosine > 0.99 and ratio == pytest.approx(1, abs=0.1)
    cosine, ratio = compare(by_identity)
    assert cosine < 0.97 or ratio > 1.3


# --- observed information ----------------------------------------------------------------------


def latent_class(geometry: Any, **options: Any) -> tuple[LatentClass, NaturalSVI, Tensor]:
    net = LatentClass(2, 5)
    x = net.sample(net.start(3), 80, 1)
    optim = NaturalGradient(geometry=geometry, **options)
    loss = TraceEnum_ELBO(max_plate_nesting=1)
    return net, NaturalSVI(net.model, net.guide, optim, loss), x


def unconstrained_hessian(net: LatentClass, x: Tensor) -> tuple[Tensor, Tensor]:
    """Hessian and gradient of −log p(x) in the flattened leaves, sorted by name."""
    leaves = dict(sorted(parameters().items()))
    sizes = [leaf.numel() for leaf in leaves.values()]

    def loss(flat: Tensor) -> Tensor:
        values = {
            name: transform_to(net.constraints[name])(part.reshape(leaf.shape))
            for (name, leaf), part in zip(leaves.items(), flat.split(sizes), strict=True)
        }
        return -net.log_likelihood(values, x)

    flat = torch.cat([leaf.reshape(-1) for leaf in leaves.values()])
    found: Tensor = torch.autograd.functional.hessian(loss, flat)
    gradient: Tensor = torch.autograd.functional.jacobian(loss, flat)
    return found, gradient


def test_observed_information_is_the_hessian() -> None:
    geometry = Visible(estimator="observed", posterior="enumerate", full=Full("exact"))
    net, svi, x = latent_class(geometry, lr=1e-12)
    net.model(x)
    expected, _ = unconstrained_hessian(net, x)
    svi.step(x)
    side = svi.optim.sides["model"]
    ((name, found),) = side.visible.items()
    leaves = parameters()
    starts, start = {}, 0
    for key in sorted(leaves):
        count = leaves[key].numel()
        starts[key] = torch.arange(start, start + count).reshape(leaves[key].shape)
        start += count
    (district,) = side.districts
    order = torch.cat([side.plan.layouts[b].pack(starts).flatten() for b in district.blocks])
    assert found.kind == "observed" and name == district.name
    torch.testing.assert_close(found.matrix, expected[order][:, order], rtol=0, atol=1e-8)
    # Negative control: the order of the entries matters.
    assert not torch.allclose(found.matrix, expected.flip(0, 1), rtol=1e-3)
    assert svi.info.dream_ess is None


def test_training_with_observed_information() -> None:
    geometry = Visible(mixing=0.3, estimator="observed", posterior="enumerate", full=Full("exact"))
    _, svi, x = latent_class(geometry, lr=0.5)
    losses = [svi.step(x) for _ in range(20)]
    assert losses[-1] < losses[0] - 1
    assert all(map(math.isfinite, losses))


def test_negative_curvature_is_a_descent_direction() -> None:
    """At a saddle point the Hessian is indefinite, also in units of the full geometry."""
    geometry = Visible(mixing=0.0, estimator="observed", posterior="enumerate", full=Full("exact"))
    net, svi, x = latent_class(geometry, lr=1e-3, damping=ConstantDamping(0.0, 1e-2))
    close = {name: value.clone() for name, value in net.initial.items()}
    close["probs"] = x.mean(0) + 0.01 * randn(1, 2, 5)
    net.initial = close
    net.model(x)
    hessian, gradient = unconstrained_hessian(net, x)
    assert torch.linalg.eigvalsh(hessian).min() < -1
    before = parameters()
    first = svi.step(x)
    after = parameters()
    change = torch.cat([(after[name] - before[name]).flatten() for name in sorted(before)])
    (found,) = svi.optim.sides["model"].spectra.values()
    assert found.retained.min() < -0.01 and found.least_mixing() > 0
    assert gradient @ change < 0 and svi.info.cosine > 0
    assert svi.evaluate_loss(x) < first
