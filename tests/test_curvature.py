"""Factors of blocks: unit path against dense path, weights, leverage, reach, changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from cases import BY_NAME, CASES, Case, value
from pyro import poutine
from torch import Tensor
from torch.distributions import constraints

import pyronat
from pyronat import plans as module
from pyronat import testing, unit_rows
from pyronat.blocks import UnitAxes
from pyronat.curvature import Curvature, mix, total_curvature
from pyronat.errors import BlockTooLarge, StructureChanged, UnsupportedDistribution
from pyronat.expectation import dream_curvature, exact_curvature
from pyronat.graph import BayesNet
from pyronat.observation import observe
from pyronat.operators import BlockMatrix
from pyronat.plans import Plan, make_plan
from pyronat.programs import KnownProgram, UnknownStructure, know, with_all_branches
from pyronat.tracing import Run, dream, params_of, records_of
from pyronat.unit_rows import gram
from pyronat.weights import spread_weights

EXACT = 1e-12


def planned(model: Callable[..., Any], *args: Any, **options: Any) -> tuple[BayesNet, Plan, Run]:
    known, run = know(model, args, {}), dream(model, args, {})
    return known.net, make_plan(known, **options), run


def forced_dense(plan: Plan) -> Plan:
    """The same blocks, each as one matrix over all entries."""
    blocks = tuple(
        replace(
            block,
            structure="dense",
            count=1,
            size=block.count * block.size,
            linear=(False,) * len(block.factors),
            units=UnitAxes(((),) * len(block.params)),
        )
        for block in plan.program.net.blocks
    )
    return make_plan(replace(plan.program, net=replace(plan.program.net, blocks=blocks)))


def full_matrix(curvature: dict[str, Curvature], plan: Plan) -> Tensor:
    """All blocks in the entries of the parameters, sorted by block, then parameter, row-major."""
    matrices = []
    for name in sorted(plan.blocks):
        layout, matrix = plan.layouts[name], curvature[name].matrix
        assert matrix is not None
        size = layout.count * matrix.shape[-1]
        columns = []
        for entry in torch.eye(size).split(1):
            product = (matrix @ entry.reshape(layout.count, -1, 1)).squeeze(-1)
            columns.append(torch.cat([v.reshape(-1) for v in layout.unpack(product).values()]))
        order = torch.cat([
            v.reshape(-1)
            for v in layout.unpack(torch.arange(size).reshape(layout.count, -1)).values()
        ])
        matrices.append(torch.stack(columns)[order])
    return torch.block_diag(*matrices)


def of_run(run: Run, plan: Plan) -> dict[str, Curvature]:
    return total_curvature(
        (factor, factor.record.base_weights()) for factor in observe(run.records, plan, run.params)
    )


def layered(x: Tensor) -> None:
    """Linear layers in several orientations, families and plates."""
    first = pyro.param("first", lambda: torch.randn(2, 3))
    second = pyro.param("second", lambda: torch.randn(4, 3))
    bias = pyro.param("bias", lambda: torch.randn(4))
    scale = pyro.param("scale", lambda: torch.rand(4) + 0.5, constraint=constraints.positive)
    counts = pyro.param("counts", lambda: torch.randn(4, 2))
    with pyro.plate("data", len(x)):
        h = pyro.sample("h", dist.Bernoulli(logits=x @ first).to_event(1))
        y = pyro.sample("y", dist.Normal(F.linear(h, second, bias).tanh(), scale).to_event(1))
        rate = F.softplus(y @ counts) + 0.1
        pyro.sample("n", dist.Poisson(rate).to_event(1), obs=torch.ones(len(x), 2))


def heteroscedastic(x: Tensor) -> None:
    """Loc and scale are two functions of the same units: two groups in each block."""
    weight, bias = (
        pyro.param("weight", lambda: torch.randn(2, 2)),
        pyro.param("bias", torch.ones(2)),
    )
    with pyro.plate("data", len(x)):
        h = F.linear(x, weight, bias)
        pyro.sample("y", dist.Normal(h, F.softplus(h) + 0.1).to_event(1))


def repeated(x: Tensor) -> None:
    """Units expanded over a plate of repetitions, and a bias over both plates."""
    weight, bias = (
        pyro.param("weight", lambda: torch.randn(3, 2)),
        pyro.param("bias", torch.ones(3)),
    )
    with pyro.plate("repetitions", 4, dim=-2), pyro.plate("data", len(x), dim=-1):
        pyro.sample("y", dist.Bernoulli(logits=F.linear(x, weight).sigmoid()).to_event(1))
        pyro.sample("z", dist.Poisson(bias.exp()).to_event(1))


PROGRAMS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    **{case.name: (case.model, case.args) for case in CASES},
    "layered": (layered, (torch.linspace(-1, 2, 10, dtype=torch.float64).reshape(5, 2),)),
    "heteroscedastic": (heteroscedastic, (value(7, 5, 2),)),
    "repeated": (repeated, (value(7, 5, 2),)),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_unit_path_equals_dense_path(name: str) -> None:
    model, args = PROGRAMS[name]
    _, plan, run = planned(model, *args)
    dense = forced_dense(plan)
    assert all(block.structure == "dense" for block in dense.blocks.values())
    ours, reference = full_matrix(of_run(run, plan), plan), full_matrix(of_run(run, dense), dense)
    torch.testing.assert_close(ours, reference, rtol=0, atol=EXACT)
    assert reference.abs().max() > 0


def test_layered_has_unit_blocks_of_both_orientations() -> None:
    net, plan, _ = planned(*PROGRAMS["layered"][:1], *PROGRAMS["layered"][1])
    found = {block.params: (block.structure, block.count, block.size) for block in net.blocks}
    assert found == {
        ("first",): ("unit", 3, 2),
        ("bias", "second"): ("unit", 4, 4),
        ("scale",): ("unit", 4, 1),
        ("counts",): ("unit", 2, 4),
    }
    assert plan.layouts["first"].axes == plan.layouts["counts"].axes == ((1,),)


def test_wrong_orientation_is_seen() -> None:
    # Negative control of the comparison of paths.
    model, args = PROGRAMS["layered"]
    _, plan, run = planned(model, *args)
    flipped = {
        name: replace(layout, shapes=((3, 2),), axes=((0,),)) if name == "first" else layout
        for name, layout in plan.layouts.items()
    }
    dense = forced_dense(plan)
    wrong = full_matrix(of_run(run, plan), replace(plan, layouts=flipped))
    assert (wrong - full_matrix(of_run(run, dense), dense)).abs().max() > 1e-3


def test_batch_as_large_as_the_fan_in() -> None:
    def model(x: Tensor) -> None:
        weight = pyro.param("weight", lambda: torch.randn(3, 3))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=F.linear(x, weight)).to_event(1))

    x = torch.randn(3, 3)
    _, plan, run = planned(model, x)
    dense = forced_dense(plan)
    ours, reference = of_run(run, plan), of_run(run, dense)
    torch.testing.assert_close(
        full_matrix(ours, plan), full_matrix(reference, dense), rtol=0, atol=EXACT
    )
    assert full_matrix(ours, plan)[0, 1].abs() > 1e-6


# --- weights -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["subsample", "masked", "regression", "sbn", "constrained"])
def test_exact_curvature_equals_the_scaled_oracle(name: str) -> None:
    case = BY_NAME[name]
    oracle, layout = testing.enumerated_sitewise_fisher(case.model, *case.args)
    geometry = pyronat.Full(expectation="exact")
    dense, where = pyronat.fisher(case.model, *case.args, geometry=geometry).dense()
    assert where == layout
    torch.testing.assert_close(dense, oracle, rtol=0, atol=1e-10)


def scaled(factor: float) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        w, b = pyro.param("w", torch.tensor([0.4, -1.0])), pyro.param("b", torch.tensor(0.2))
        with poutine.scale(scale=factor), pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=x @ w + b))

    return model


def test_scale_is_linear() -> None:
    x = torch.randn(7, 2)
    matrices = {}
    for factor in (1.0, 3.0):
        _, plan, run = planned(scaled(factor), x)
        matrices[factor] = full_matrix(of_run(run, plan), plan)
    torch.testing.assert_close(matrices[3.0], 3 * matrices[1.0], rtol=EXACT, atol=0)
    assert not torch.allclose(matrices[3.0], 9 * matrices[1.0])


def minibatch(x: Tensor, indices: Tensor | None = None) -> None:
    """Covariates of a plate of 8, of which the indices are seen."""
    weight = pyro.param("weight", torch.tensor([[0.4, -1.0], [0.3, 0.9]]))
    with pyro.plate("data", len(x), subsample=indices) as rows:
        logits = F.linear(x[rows], weight)
        pyro.sample("y", dist.Bernoulli(logits=logits).to_event(1))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_subsamples_are_unbiased(size: int) -> None:
    # The mean over a partition of the data is the Fisher of all data, whatever the batch size.
    x = torch.randn(8, 2)
    _, plan, run = planned(minibatch, x)
    whole = full_matrix(of_run(run, plan), plan)
    parts = []
    for indices in torch.arange(8).split(size):
        part = dream(minibatch, (x, indices), {})
        assert {float(torch.as_tensor(record.scale)) for record in part.records} == {8 / size}
        parts.append(full_matrix(of_run(part, plan), plan))
    mean = torch.stack(parts).mean(0)
    torch.testing.assert_close(mean, whole, rtol=0, atol=EXACT)
    # The square of the scale is not.
    assert not torch.allclose(8 / size * mean, whole, rtol=0.1)
    assert size == 1 or not torch.allclose(parts[0], whole, rtol=0.01)


def test_masks_drop_elements() -> None:
    x = torch.randn(6, 2)
    mask = torch.tensor([True, False, True, True, False, False])

    def model(x: Tensor, mask: Tensor) -> None:
        weight = pyro.param("weight", torch.tensor([[0.4, -1.0], [0.3, 0.9]]))
        with pyro.plate("data", len(x)), poutine.mask(mask=mask):
            pyro.sample("y", dist.Bernoulli(logits=F.linear(x, weight)).to_event(1))

    def inside(x: Tensor, mask: Tensor) -> None:
        weight = pyro.param("weight", torch.tensor([[0.4, -1.0], [0.3, 0.9]]))
        with pyro.plate("data", len(x)):
            fn = dist.Bernoulli(logits=F.linear(x, weight)).mask(mask[:, None]).to_event(1)
            pyro.sample("y", fn)

    def of(program: Callable[..., None], x: Tensor, mask: Tensor) -> Tensor:
        _, plan, run = planned(program, x, mask)
        return full_matrix(of_run(run, plan), plan)

    masked, everything = of(model, x, mask), of(model, x, torch.ones_like(mask))
    torch.testing.assert_close(masked, of(model, x[mask], torch.ones(3, dtype=torch.bool)))
    torch.testing.assert_close(masked, of(inside, x, mask))
    assert not torch.allclose(masked, everything)
    torch.testing.assert_close(masked + of(model, x, ~mask), everything)
    assert of(model, x, torch.zeros_like(mask)).abs().max() == 0


WRAPPED: dict[str, Callable[[Any, Tensor], Any]] = {
    "plain": lambda base, mask: base,
    "independent": lambda base, mask: base.to_event(1),
    "independent of all": lambda base, mask: base.to_event(2),
    "masked": lambda base, mask: base.mask(mask),
    "masked by number": lambda base, mask: base.mask(False),
    "masked inside": lambda base, mask: base.mask(mask).to_event(1),
    "masked outside": lambda base, mask: base.to_event(1).mask(mask[:, 0]),
    "expanded": lambda base, mask: dist.torch_distribution.ExpandedDistribution(base, (4, 2, 3)),
    "expanded inside": lambda base, mask: dist.torch_distribution.ExpandedDistribution(
        base, (4, 2, 3)
    ).to_event(2),
    "all": lambda base, mask: (
        dist.torch_distribution
        .ExpandedDistribution(base.mask(mask), (4, 2, 3))
        .to_event(1)
        .mask(mask[:, 0])
    ),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_weights_reach_the_base_distribution(name: str) -> None:
    # ∂/∂loc of Σ w log p of a unit normal one standard deviation away is the weight itself.
    loc = torch.zeros(2, 3, requires_grad=True)
    mask = torch.tensor([[True, False, True], [False, True, True]])
    distribution = WRAPPED[name](dist.Normal(loc, 1.0), mask)
    weights = torch.rand(distribution.batch_shape) + 0.1
    ones = torch.ones(distribution.shape())
    total = (weights * distribution.log_prob(ones)).sum() + 0 * loc.sum()
    (expected,) = torch.autograd.grad(total, loc)
    torch.testing.assert_close(spread_weights(weights, distribution), expected)


# --- formulas by hand --------------------------------------------------------------------------


def test_gram_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, inputs = torch.rand(7, 2), torch.randn(7, 3)
    expected = torch.einsum("nu,ni,nj->uij", weights, inputs, inputs)
    torch.testing.assert_close(gram(weights, inputs), expected)
    monkeypatch.setattr(unit_rows, "_CHUNK_ELEMENTS", 18)
    torch.testing.assert_close(gram(weights, inputs), expected)
    monkeypatch.setattr(unit_rows, "_CHUNK_ELEMENTS", 1)
    torch.testing.assert_close(gram(weights, inputs), expected)
    assert gram(weights[:0], inputs[:0]).abs().max() == 0


@pytest.mark.parametrize("size", [31, 32, 33, 64, 100, 193, 201])
def test_gram_in_strips(size: int) -> None:
    weights, inputs = torch.rand(5, 3), torch.randn(5, size)
    expected = torch.einsum("nu,ni,nj->uij", weights, inputs, inputs)
    found = gram(weights, inputs)
    torch.testing.assert_close(found, expected)
    assert torch.equal(found, found.mT)
    assert gram(weights[:0], inputs[:0]).shape == found.shape


def leverage_model(scale: float) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        weight = pyro.param("weight", torch.tensor([[0.4, -1.0], [0.3, 0.9]]))
        with poutine.scale(scale=scale), pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=F.linear(x, weight)).to_event(1))

    return model


X = torch.tensor([[1.0, 2.0], [3.0, -4.0]], dtype=torch.float64)


@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_leverage_and_reach_of_units_by_hand(scale: float) -> None:
    # w_ref = 1/4; E‖a‖² = (5 + 25) / 2; E‖a‖₁ = (3 + 7) / 2.
    _, plan, run = planned(leverage_model(scale), X)
    found = of_run(run, plan)["weight"]
    torch.testing.assert_close(found.leverage, torch.full((2,), 0.25 * 15 * scale))
    torch.testing.assert_close(found.reach, torch.full((2,), 2 * 0.5 * 5.0))


@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_leverage_and_reach_of_dense_blocks_by_hand(scale: float) -> None:
    # The units together: a datum has two coordinates, squared norms add, the larger reach counts.
    _, unit_plan, run = planned(leverage_model(scale), X)
    plan = forced_dense(unit_plan)
    found = of_run(run, plan)["weight"]
    per_unit = 0.25 * 15 * scale
    units_per_datum = found.leverage / per_unit
    torch.testing.assert_close(units_per_datum, torch.full((1,), 2.0))
    torch.testing.assert_close(found.reach, torch.full((1,), 2 * 0.5 * 5.0))


def test_leverage_with_a_slope_by_hand() -> None:
    # θ = 0.3 z: squared slope 0.09 in the leverage, 0.3 in the reach.
    def model(x: Tensor) -> None:
        weight = pyro.param("weight", torch.zeros(1, 2))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=0.3 * F.linear(x, weight)).to_event(1))

    _, plan, run = planned(model, X)
    found = of_run(run, plan)["weight"]
    torch.testing.assert_close(found.leverage, torch.tensor([0.25 * 15 * 0.09]))
    torch.testing.assert_close(found.reach, torch.tensor([2 * 0.5 * 5 * 0.3]))


def test_leverage_of_an_unbounded_family_by_hand() -> None:
    # A normal of standard deviation 2: w_ref is its Fisher weight 1/4.
    def model(x: Tensor) -> None:
        weight = pyro.param("weight", torch.zeros(1, 2))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(F.linear(x, weight), 2.0).to_event(1))

    _, plan, run = planned(model, X)
    found = of_run(run, plan)["weight"]
    torch.testing.assert_close(found.leverage, torch.tensor([0.25 * 15]))
    torch.testing.assert_close(found.reach, torch.tensor([2 * 0.5 * 5.0]))


def test_leverage_ignores_masked_data() -> None:
    def model(x: Tensor) -> None:
        weight = pyro.param("weight", torch.zeros(1, 2))
        with pyro.plate("data", len(x)), poutine.mask(mask=torch.tensor([True, False])):
            pyro.sample("y", dist.Bernoulli(logits=F.linear(x, weight)).to_event(1))

    _, plan, run = planned(model, X)
    found = of_run(run, plan)["weight"]
    torch.testing.assert_close(found.leverage, torch.tensor([0.25 * 5]))
    torch.testing.assert_close(found.reach, torch.tensor([3.0]))


def test_curvatures_add_and_mix() -> None:
    one = Curvature(BlockMatrix(torch.eye(2)[None]), torch.tensor([1.0]), torch.tensor([4.0]))
    two = Curvature(BlockMatrix(3 * torch.eye(2)[None]), torch.tensor([2.0]), torch.tensor([3.0]))
    total = one + two
    assert total.matrix is not None and torch.equal(total.matrix, 4 * torch.eye(2)[None])
    assert total.leverage.tolist() == [2.0] and total.reach.tolist() == [4.0]
    mixed = mix({"a": one, "b": one}, {"a": two, "c": two}, 0.25)
    assert mixed["a"].matrix is not None
    torch.testing.assert_close(mixed["a"].matrix, 1.5 * torch.eye(2)[None])
    torch.testing.assert_close(mixed["a"].leverage, torch.tensor([1.25]))
    # A block that one of them has not reached: no information there, but the known leverage.
    for name, known, share in (("b", one, 0.75), ("c", two, 0.25)):
        found = mixed[name]
        assert found.matrix is not None and known.matrix is not None
        torch.testing.assert_close(found.matrix, share * known.matrix)
        assert torch.equal(found.leverage, known.leverage) and torch.equal(found.reach, known.reach)
    assert torch.equal(mix({"a": one}, {"a": two}, 0.0)["a"].leverage, one.leverage)
    partly = Curvature(None, torch.tensor([0.0, 2.0]), torch.tensor([1.0, 0.0]))
    mixed_units = partly.mix(
        Curvature(None, torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.0])), 0.5
    )
    assert mixed_units.leverage.tolist() == [3.0, 3.0] and mixed_units.reach.tolist() == [2.0, 4.0]


def test_without_matrix() -> None:
    model, args = PROGRAMS["layered"]
    _, plan, run = planned(model, *args)
    factors = observe(run.records, plan, run.params)
    pairs = [(factor, factor.record.base_weights()) for factor in factors]
    with_matrix, without = total_curvature(pairs), total_curvature(pairs, with_matrix=False)
    assert with_matrix.keys() == without.keys() == plan.blocks.keys()
    for name, curvature in without.items():
        assert curvature.matrix is None
        assert torch.equal(curvature.leverage, with_matrix[name].leverage)
        assert torch.equal(curvature.reach, with_matrix[name].reach)


def test_factors_hold_no_graph() -> None:
    model, args = PROGRAMS["layered"]
    _, plan, run = planned(model, *args)
    for curvature in of_run(run, plan).values():
        assert curvature.matrix is not None and not curvature.matrix.requires_grad
        assert not curvature.leverage.requires_grad and not curvature.reach.requires_grad
    assert all(leaf.grad is None for leaf in run.params.values())


def test_matrices_are_symmetric_and_positive() -> None:
    for name, (model, args) in PROGRAMS.items():
        pyro.clear_param_store()
        _, plan, run = planned(model, *args)
        for curvature in of_run(run, plan).values():
            assert curvature.matrix is not None
            torch.testing.assert_close(curvature.matrix, curvature.matrix.mT, msg=name)
            assert torch.linalg.eigvalsh(curvature.matrix).min() > -1e-10, name
            assert (curvature.leverage >= 0).all() and (curvature.reach >= 0).all(), name


@pytest.mark.parametrize("case", [BY_NAME["sbn"], BY_NAME["chain"], BY_NAME["hmm"]], ids=str)
def test_dreams_agree_with_enumeration(case: Case) -> None:
    def exact(known: KnownProgram) -> Tensor:
        plan = make_plan(known)
        return full_matrix(exact_curvature(case.model, case.args, {}, plan), plan)

    known = know(case.model, case.args, {})
    plan = make_plan(known)
    truth = with_all_branches(known, case.model, case.args, {}, exact)
    draws = torch.stack([
        full_matrix(dream_curvature(case.model, case.args, {}, plan, num_runs=4), plan)
        for _ in range(60)
    ])
    assert testing.z_score(draws, truth).abs().max() < 5
    assert testing.z_score(draws, 1.5 * truth).abs().max() > 5


# --- refusals ----------------------------------------------------------------------------------


class Switch:
    """A program that is another at its second run."""

    def __init__(self, change: str = "") -> None:
        self.change = change

    def __call__(self, x: Tensor) -> None:
        weight = pyro.param("weight", torch.zeros(2, 2))
        other = pyro.param("other", torch.zeros(2, 2))
        inputs = x * 1.0
        if self.change == "parameter":
            weight = other
        logits = F.linear(inputs, weight)
        if self.change == "nonlinear":
            logits = logits * logits[:1]
        if self.change == "units":
            logits = F.linear(inputs, weight)[:, :1]
        family = dist.Bernoulli(logits=logits)
        if self.change == "family":
            family = dist.Normal(logits, 1.0)
        with pyro.plate("data", len(x)):
            if self.change != "missing":
                pyro.sample("y", family.to_event(1))
            pyro.sample("z", dist.Bernoulli(logits=F.linear(x, other)).to_event(1))
            if self.change == "more":
                pyro.sample("extra", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("family", r"y \(Bernoulli\), y \(Normal\)"),
        ("missing", r"y \(Bernoulli\)"),
        ("more", r"extra \(Normal\)"),
        ("nonlinear", r"y \(Bernoulli\)"),
        ("parameter", r"y \(Bernoulli\)"),
    ],
)
def test_changes_are_refused(change: str, message: str) -> None:
    program, x = Switch(), torch.randn(5, 2)
    _, plan, run = planned(program, x)
    assert set(of_run(run, plan)) == {"weight", "other"}
    program.change = change
    changed = dream(program, (x,), {})
    with pytest.raises(UnknownStructure, match=message):
        plan.program.check(changed.records, {**run.params, **changed.params})


@pytest.mark.parametrize("change", ["nonlinear", "units"])
def test_linear_units_that_are_none_anymore_are_refused(change: str) -> None:
    program, x = Switch(), torch.randn(5, 2)
    _, plan, run = planned(program, x)
    program.change = change
    changed = dream(program, (x,), {})
    with pytest.raises(StructureChanged, match="'y' is no longer a layer of 2 linear units of w"):
        observe(changed.records, plan, {**run.params, **changed.params})


def test_other_batches_are_no_change() -> None:
    program = Switch()
    _, plan, _ = planned(program, torch.randn(5, 2))
    for size in (1, 2, 9):
        run = dream(program, (torch.randn(size, 2),), {})
        plan.program.check(run.records, run.params)
        assert set(of_run(run, plan)) == {"weight", "other"}


def test_gates_are_removed() -> None:
    # After observing, gradients flow through sample values as before.
    def guide() -> None:
        loc = pyro.param("loc", torch.zeros(2))
        z = pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))
        pyro.sample("w", dist.Normal(z * pyro.param("k", torch.ones(2)), 1.0).to_event(1))

    _, plan, _ = planned(guide)
    trace = poutine.trace(guide).get_trace()
    curvature = total_curvature(
        (factor, factor.record.base_weights())
        for factor in observe(records_of(trace), plan, params_of(trace))
    )
    z = trace.nodes["z"]["value"].detach()
    matrix = curvature["k"].matrix
    assert matrix is not None
    torch.testing.assert_close(matrix[:, 0, 0], z**2)
    loc = pyro.param("loc")
    (gradient,) = torch.autograd.grad(trace.nodes["w"]["value"].sum(), loc)
    assert gradient.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    "limit, value, message, excluded",
    [
        ("MAX_FORMED_SIZE", 2, r"of tb has 3 entries, at most 2", "tb"),
        ("MAX_JACOBIAN_ENTRIES", 11, r"tc has 12 entries that are not linear", "tc"),
    ],
)
def test_large_blocks_are_refused(
    monkeypatch: pytest.MonkeyPatch, limit: str, value: int, message: str, excluded: str
) -> None:
    monkeypatch.setattr(module, limit, value)
    case = BY_NAME["cpt"]
    known = know(case.model, case.args, {})
    with pytest.raises(BlockTooLarge, match=message):
        dream_curvature(case.model, case.args, {}, make_plan(known))
    with pytest.raises(BlockTooLarge, match=message):
        pyronat.fisher(case.model, *case.args, geometry=pyronat.Full("model"))
    plan = make_plan(known, excluded=[excluded])
    assert set(plan.blocks) == {"ta", "tb", "tc", "td"} - {excluded}


def test_unit_blocks_may_be_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_DENSE_SIZE", 5)
    case = BY_NAME["sbn"]
    _, plan, _ = planned(case.model, *case.args)
    assert plan.blocks["W0, b0"].size * plan.blocks["W0, b0"].count == 12


def test_excluding_one_parameter_leaves_out_its_block() -> None:
    case = BY_NAME["sbn"]
    _, plan, run = planned(case.model, *case.args, excluded=["W0"])
    assert set(plan.blocks) == {"b2", "W1, b1"}
    assert plan.owner() == {"b2": "b2", "W1": "W1, b1", "b1": "W1, b1"}
    assert set(of_run(run, plan)) == set(plan.blocks)


class Implicit(dist.Normal):
    """A distribution that can be sampled, but has no density."""

    def log_prob(self, value: Tensor) -> Tensor:
        raise NotImplementedError


def test_blocks_without_a_score_are_refused_unless_excluded() -> None:
    def model() -> None:
        p, q = pyro.param("p", torch.zeros(())), pyro.param("q", torch.zeros(()))
        pyro.sample("z", Implicit(p, 1.0))
        pyro.sample("x", dist.Normal(q, 1.0))

    known, run = know(model, (), {}), dream(model, (), {})
    with pytest.raises(UnsupportedDistribution, match=r"z \(Implicit\); leave p to another"):
        make_plan(known)
    plan = make_plan(known, excluded=["p"])
    assert set(of_run(run, plan)) == {"q"}


@pytest.mark.parametrize("geometry", [pyronat.Full(), pyronat.Visible()], ids=["full", "visible"])
def test_parameters_of_two_types_are_trained(geometry: pyronat.Full | pyronat.Visible) -> None:
    def model(x: Tensor, y: Tensor) -> None:
        weight = pyro.param("weight", torch.zeros(2, 3, dtype=torch.float32))
        loadings = pyro.param("loadings", torch.ones(2, dtype=torch.float64))
        scale = pyro.param("scale", torch.ones((), dtype=torch.float32))
        with pyro.plate("data", len(x)):
            logits = torch.nn.functional.linear(x.float(), weight)
            h = pyro.sample("h", dist.Bernoulli(logits=logits).to_event(1))
            pyro.sample("y", dist.Normal(h.double() @ loadings, scale.double().exp()), obs=y)

    def guide(x: Tensor, y: Tensor) -> None:
        logits = pyro.param("logits", torch.zeros(2, dtype=torch.float32))
        with pyro.plate("data", len(x)):
            pyro.sample("h", dist.Bernoulli(logits=logits).expand([2]).to_event(1))

    x, y = torch.randn(20, 3, dtype=torch.float64), torch.randn(20, dtype=torch.float64)
    svi = pyronat.NaturalSVI(
        model,
        guide,
        pyronat.NaturalGradient(0.1, geometry),
        pyronat.ReweightedWakeSleep(num_particles=5),
    )
    losses = [svi.step(x, y) for _ in range(15)]
    assert losses[-1] < losses[0]
    types = {name: value.dtype for name, value in pyro.get_param_store().items()}
    assert types == {
        "weight": torch.float32,
        "loadings": torch.float64,
        "scale": torch.float32,
        "logits": torch.float32,
    }
