"""Networks between sites: every way to hold their block, against Jacobians of `torch.func`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro import poutine
from torch import Tensor, nn

import pyronat
import pyronat.optim as optimizers
from pyronat import (
    Full,
    NaturalGradient,
    NaturalSVI,
    blocks,
    datum_rows,
    eigenvectors,
    observation,
    plans,
    testing,
)
from pyronat.autograd import SampleGate
from pyronat.blocks import CHOICES
from pyronat.errors import BlockTooLarge, UnsupportedProgram, UnsupportedStructure
from pyronat.factored import Rows, operator_from
from pyronat.families import groups
from pyronat.kronecker import Kronecker
from pyronat.layers import find_layers
from pyronat.programs import know
from pyronat.tracing import dream

EXACT = 1e-8
DATA = 7


class Convolution(nn.Module):
    """Strides, padding, then a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 3, 3, stride=2, padding=1)
        self.last = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)).flatten(1))


class Recurrent(nn.Module):
    """One recurrent weight has a use at each time."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRU(2, 3, batch_first=True)
        self.last = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.cell(x)[0][:, -1])


class Heads(nn.Module):
    """Location and scale from one trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(4, 5)
        self.loc, self.scale = nn.Linear(5, 2), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.trunk(x))
        return torch.cat([self.loc(hidden), F.softplus(self.scale(hidden)) + 0.1], 1)


class Attention(nn.Module):
    """Self-attention over three tokens; bilinear in its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Normalized(nn.Module):
    """A layer norm between two linear maps, one of them written with `@`."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(0.5 * torch.randn(4, 5))
        self.shift = nn.Parameter(torch.randn(5))
        self.norm = nn.LayerNorm(5)
        self.last = nn.Linear(5, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.silu(self.norm(x @ self.first + self.shift)))


@dataclass(frozen=True)
class Net:
    """A network with inputs; twice as many outputs where it has two heads."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    factored: bool = True
    heads: bool = False


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3), nn.ReLU(), nn.Linear(3, 2))


NETS = {
    "mlp": Net(perceptron, (4,)),
    "conv": Net(Convolution, (2, 4, 4)),
    "gru": Net(Recurrent, (4, 2)),
    "two heads": Net(Heads, (4,), heads=True),
    "attention": Net(Attention, (3, 4)),
    "layer norm": Net(Normalized, (4,), factored=False),
}


def program(net: nn.Module, x: Tensor, heads: bool = False) -> None:
    pyro.module("net", net)
    with pyro.plate("data", len(x)):
        out = net(x)
        if heads:
            loc, scale = out.chunk(2, 1)
            pyro.sample("y", dist.Normal(loc, scale).to_event(1))
        else:
            pyro.sample("y", dist.Bernoulli(logits=out).to_event(1))


def oracle(net: nn.Module, x: Tensor, heads: bool = False) -> Tensor:
    """Σ_n J_nᵀ F_n J_n, the Jacobian of each datum by itself, parameters sorted by name."""
    params = {name: p.detach() for name, p in sorted(net.named_parameters())}

    def one(values: Mapping[str, Tensor], row: Tensor) -> Tensor:
        return torch.func.functional_call(net, dict(values), (row.unsqueeze(0),)).squeeze(0)

    if isinstance(net, (Recurrent, Attention)):  # whose kernels `vmap` cannot batch
        names, leaves = list(params), tuple(params.values())
        each = [
            torch.autograd.functional.jacobian(
                lambda *v, row=row: one(dict(zip(names, v, strict=True)), row), leaves
            )
            for row in x
        ]
        jacobians = {n: torch.stack(p) for n, p in zip(names, zip(*each, strict=True), strict=True)}
    else:
        jacobians = torch.func.vmap(torch.func.jacrev(one), (None, 0))(params, x)
    parts = [jacobians[name].reshape(len(x), -1, p.numel()) for name, p in params.items()]
    jacobian = torch.cat(parts, 2)
    out = net(x).detach()
    if heads:
        scale = out.chunk(2, 1)[1]
        weights = torch.cat([scale**-2, 2 * scale**-2], 1)
    else:
        weights = out.sigmoid() * (1 - out.sigmoid())
    return torch.einsum("ncp,nc,ncq->pq", jacobian, weights, jacobian)


def measured(net: nn.Module, x: Tensor, structure: str, heads: bool = False) -> Any:
    geometry = Full("model", structure={"*": structure})  # type: ignore[dict-item]
    return pyronat.fisher(program, net, x, heads, geometry=geometry, num_samples=1)


@pytest.fixture
def always_factored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observation, "FEW_COORDINATES", 0)


def close(ours: Tensor, reference: Tensor) -> bool:
    return bool((ours - reference).norm() <= EXACT * reference.norm())


# --- the exact path ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("factored", [True, False])
def test_exact_path_equals_vmap_of_jacrev(
    name: str, factored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, net = NETS[name], NETS[name].make()
    x = torch.randn(DATA, *case.shape)
    monkeypatch.setattr(observation, "FEW_COORDINATES", 0 if factored else 10**9)
    used = []
    monkeypatch.setattr(
        observation,
        "_factored_jacobian",
        lambda *args, real=observation._factored_jacobian: used.append(real(*args)) or used[-1],
    )
    fisher = measured(net, x, "dense", case.heads)
    ours, _ = fisher.dense()
    reference = oracle(net, x, case.heads)
    assert close(ours, reference)
    assert not close(ours + 1e-6 * reference.abs().max(), reference)
    assert {part is not None for part in used} == {factored and case.factored}
    assert all(block.exact for block in fisher.net.blocks)


@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_exact_path_equals_enumeration(name: str, always_factored: None) -> None:
    case, net = NETS[name], NETS[name].make()
    x = torch.randn(3, *case.shape)
    reference, _ = testing.enumerated_fisher(program, net, x)
    assert close(measured(net, x, "dense").dense()[0], reference)


@pytest.mark.parametrize("structure", ["dual", "cg"])
@pytest.mark.parametrize("name", NETS)
def test_rows_hold_the_same_matrix(name: str, structure: str) -> None:
    case, net = NETS[name], NETS[name].make()
    x = torch.randn(DATA, *case.shape)
    fisher = measured(net, x, structure, case.heads)
    reference = oracle(net, x, case.heads)
    assert close(fisher.dense()[0], reference)
    vector = {n: torch.randn_like(p) for n, p in pyro.get_param_store().named_parameters()}
    flat = torch.cat([vector[n].reshape(-1) for n, _ in fisher.slices()])
    solution = fisher.solve(vector, damping=1e-2)
    ours = torch.cat([solution[n].reshape(-1) for n, _ in fisher.slices()])
    expected = torch.linalg.solve(reference + 1e-2 * torch.eye(len(flat)), flat)
    assert close(ours, expected)
    product = fisher.mv(vector)
    assert close(torch.cat([product[n].reshape(-1) for n, _ in fisher.slices()]), reference @ flat)


def test_diagonal_is_the_diagonal() -> None:
    net, x = perceptron(), torch.randn(DATA, 4)
    fisher = measured(net, x, "diagonal")
    reference = oracle(net, x)
    assert close(fisher.dense()[0], reference.diagonal().diag())
    assert [block.structure for block in fisher.net.blocks] == ["diagonal"]
    assert not fisher.net.blocks[0].exact


def test_mixtures_are_unbiased(monkeypatch: pytest.MonkeyPatch) -> None:
    # Rows that mix the coordinates of a datum: right on average, not by themselves.
    monkeypatch.setattr(observation, "MAX_ROWS", DATA)  # one mixture for each datum
    net, x = NETS["two heads"].make(), torch.randn(DATA, 4)
    reference = oracle(net, x, heads=True)
    draws = torch.stack([measured(net, x, "dual", True).dense()[0] for _ in range(150)])
    error = draws.std(0) / len(draws) ** 0.5
    assert (draws.std(0) > 1e-3 * reference.abs().max()).any()
    scores = (draws.mean(0) - reference) / error.clamp_min(1e-9 * reference.abs().max())
    assert scores.abs().max() < 5
    assert (scores + 0.3 * reference / error.clamp_min(1e-12)).abs().max() > 5


# --- Kronecker factors ---------------------------------------------------------------------------


def layer_blocks(matrix: Tensor, fisher: Any) -> Tensor:
    """A matrix without what couples parameters of different layers."""
    layer_of = {
        name: number
        for number, layer in enumerate(fisher.net.blocks[0].layers)
        for name in layer.params
    }
    owner = torch.cat([
        torch.full((place.stop - place.start,), layer_of[name]) for name, place in fisher.slices()
    ])
    return matrix * (owner.unsqueeze(1) == owner)


@pytest.mark.parametrize("structure", ["kronecker", "kfac"])
def test_kronecker_is_exact_for_one_datum(structure: str) -> None:
    net, x = perceptron(), torch.randn(1, 4)
    fisher = measured(net, x, structure)
    reference = layer_blocks(oracle(net, x), fisher)
    assert close(fisher.dense()[0], reference)


@pytest.mark.parametrize("structure", ["kronecker", "kfac"])
def test_kronecker_is_exact_for_a_deep_linear_network(structure: str) -> None:
    # What flows back does not depend on the datum, where F does not either.
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2, bias=False))

    def linear(net: nn.Module, x: Tensor, heads: bool = False) -> None:
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(net(x), 0.5).to_event(1))

    x = torch.randn(DATA, 4)
    geometry = Full("model", structure={"*": structure})  # type: ignore[dict-item]
    fisher = pyronat.fisher(linear, net, x, geometry=geometry, num_samples=1)
    dense = pyronat.fisher(linear, net, x, geometry=Full("model"), num_samples=1)
    reference = layer_blocks(dense.dense()[0], fisher)
    assert close(fisher.dense()[0], reference)
    assert [(b.structure, b.exact) for b in fisher.net.blocks] == [(structure, False)]
    assert "no" in str(fisher.net).split("exact")[1]


@pytest.mark.parametrize("name", ["mlp", "conv", "gru", "two heads"])
def test_kronecker_is_an_approximation_elsewhere(name: str) -> None:
    case, net = NETS[name], NETS[name].make()
    x = torch.randn(DATA, *case.shape)
    reference = oracle(net, x, case.heads)
    errors = {}
    for structure in ("kronecker", "kfac", "diagonal"):
        fisher = measured(net, x, structure, case.heads)
        errors[structure] = float((fisher.dense()[0] - reference).norm() / reference.norm())
        assert not any(block.exact for block in fisher.net.blocks)
    assert 1e-3 < errors["kronecker"] <= errors["kfac"] * (1 + EXACT) < errors["diagonal"]


def test_corrected_eigenvalues_are_second_moments() -> None:
    net, x = perceptron(), torch.randn(DATA, 4)
    fisher = measured(net, x, "kronecker")
    reference = oracle(net, x)
    for name, block in fisher.blocks.items():
        assert isinstance(block, Kronecker) and block.rows is not None
        places = dict(fisher.slices())
        layout = fisher.layouts[name]
        index = fisher.positions()[name].reshape(-1)
        own = reference[index][:, index]
        basis = block._eigen
        vectors = torch.kron(basis.left, basis.right)
        moments = (vectors.mT @ own @ vectors).diagonal()
        torch.testing.assert_close(basis.values.reshape(-1), moments)
        assert places and layout.count == len(basis.left)


def random_kronecker(corrected: bool) -> Kronecker:
    flowing, inputs = torch.randn(9, 3), torch.randn(9, 4)
    rows = (flowing.unsqueeze(1), inputs.unsqueeze(1)) if corrected else None
    return Kronecker(inputs.mT @ inputs / 9, flowing.mT @ flowing, torch.tensor(9.0), rows)


@pytest.mark.parametrize("corrected", [True, False])
def test_kronecker_solver(corrected: bool) -> None:
    block = random_kronecker(corrected)
    damping = block.usable(torch.tensor([0.1, 0.4, 2.0]))
    x = torch.randn(3, 4)
    matrix = block.dense()[0] + torch.diag(damping.repeat_interleave(4))
    expected = torch.linalg.solve(matrix, x.reshape(-1)).reshape(3, 4)
    torch.testing.assert_close(block.factor(damping).solve(x), expected)
    torch.testing.assert_close(block.mv(x), (block.dense()[0] @ x.reshape(-1)).reshape(3, 4))
    torch.testing.assert_close(block.quadratic(x), x.reshape(-1) @ block.dense()[0] @ x.reshape(-1))
    assert set(block.state()) == {"form", "inputs", "outputs", "mass", "rows"}, "nothing cached"
    undamped = torch.linalg.solve(block.dense()[0], x.reshape(-1)).reshape(3, 4)
    torch.testing.assert_close(block.factor(torch.zeros(3)).solve(x), undamped)


def wide_kronecker(units: int, fan_in: int, rows: int) -> Kronecker:
    """Factors whose spectra fall, of data with several rows each."""
    flowing = torch.randn(30, rows, units) * torch.logspace(0, -2, units)
    inputs = torch.randn(30, rows, fan_in) * torch.logspace(0, -2, fan_in)
    first, second = flowing.flatten(0, 1), inputs.flatten(0, 1)
    mean = second.mT @ second / len(second)
    return Kronecker(mean, first.mT @ first, torch.tensor(30.0), (flowing, inputs))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("units, fan_in", [(9, 12), (5, 12), (12, 5)])
def test_wide_factors_are_held_by_leading_eigenvectors(
    units: int, fan_in: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = wide_kronecker(units, fan_in, rows)
    complete = exact.dense()[0]
    monkeypatch.setattr(blocks, "COMPLETE", 5)
    monkeypatch.setattr(blocks, "LEADING", 4)
    monkeypatch.setattr(eigenvectors, "_SPARE", 1)
    monkeypatch.setattr(eigenvectors, "_ROUNDS", 30)
    block = replace(exact)  # without what has been computed
    matrix, x = block.dense()[0], torch.randn(units, fan_in)
    # By hand: the mean of second moments over all that two orthogonal projections leave.
    summed = torch.einsum("nru,nrf->nuf", *block.rows)
    expected = torch.zeros_like(matrix)
    for left in parts_of(block.outputs):
        for right in parts_of(block.inputs):
            moment = (left @ summed @ right).square().sum()
            entries = left.trace() * right.trace()
            expected += moment / entries * torch.kron(left, right)
    torch.testing.assert_close(matrix, expected)
    torch.testing.assert_close(matrix.trace(), complete.trace())
    assert (matrix - complete).norm() > 1e-4 * matrix.norm(), "an approximation"
    damping = block.usable(torch.full((units,), 0.1))
    damped = matrix + 0.1 * torch.eye(len(matrix))
    solution = torch.linalg.solve(damped, x.reshape(-1)).reshape(units, fan_in)
    torch.testing.assert_close(block.factor(damping).solve(x), solution)
    torch.testing.assert_close(block.quadratic(x), x.reshape(-1) @ matrix @ x.reshape(-1))


def parts_of(matrix: Tensor) -> list[Tensor]:
    """Projections on the eigenvectors that are taken of a factor, and on what they leave."""
    vectors = torch.linalg.eigh(matrix).eigenvectors
    size = len(matrix)
    taken = blocks.num_eigenvectors(size)
    each = [torch.outer(column, column) for column in vectors[:, size - taken :].mT]
    rest = vectors[:, : size - taken]
    return [*each, rest @ rest.mT] if taken < size else each


def test_averages_of_kronecker_factors() -> None:
    one, two = random_kronecker(False), random_kronecker(False)
    mixed = one.lerp(replace(two, mass=3 * two.mass), 0.25)
    torch.testing.assert_close(mixed.outputs, 0.75 * one.outputs + 0.25 * two.outputs)
    torch.testing.assert_close(mixed.inputs, 0.5 * one.inputs + 0.5 * two.inputs)
    assert torch.equal(one.lerp(two.zeros(), 0.0).inputs, one.inputs)
    total = one + replace(two, inputs=one.inputs)
    torch.testing.assert_close(
        total.dense(), torch.kron(one.outputs + two.outputs, one.inputs)[None]
    )


def test_averages_of_rows_keep_the_newest() -> None:
    net, x = perceptron(), torch.randn(DATA, 4)
    (one,) = measured(net, x, "dual").blocks.values()
    (two,) = measured(net, torch.randn(DATA, 4), "dual").blocks.values()
    assert isinstance(one, Rows) and isinstance(two, Rows)
    mixed = one.lerp(two, 0.25)
    torch.testing.assert_close(mixed.dense(), 0.75 * one.dense() + 0.25 * two.dense())
    vector = torch.randn(1, mixed.dense().shape[-1])
    expected = (vector @ mixed.dense()[0] @ vector.mT).squeeze()
    torch.testing.assert_close(mixed.quadratic(vector), expected)
    few = replace(one, max_rows=two.num_rows).lerp(replace(two, max_rows=two.num_rows), 0.25)
    assert few.num_rows == two.num_rows
    torch.testing.assert_close(few.mean_diagonal(), mixed.mean_diagonal())
    assert close(few.dense() / few.mean_diagonal(), two.dense() / two.mean_diagonal())


@pytest.mark.parametrize("structure", sorted(CHOICES - {"shared"}))
def test_operators_survive_a_checkpoint(structure: str) -> None:
    net, x = perceptron(), torch.randn(DATA, 4)
    for block in measured(net, x, structure).blocks.values():
        again = operator_from(block.state())
        assert torch.equal(again.dense(), block.dense())


# --- which data are told apart -------------------------------------------------------------------


def test_data_that_a_network_mixes_are_not_taken_apart(
    always_factored: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x)
            return self.last(torch.tanh(hidden - hidden.mean(0)))

    net, x = Mixing(), torch.randn(DATA, 4)
    params = {name: p.detach() for name, p in sorted(net.named_parameters())}

    def out(*values: Tensor) -> Tensor:
        return torch.func.functional_call(net, dict(zip(params, values, strict=True)), (x,))

    parts = torch.autograd.functional.jacobian(out, tuple(params.values()))
    jacobian = torch.cat([part.reshape(2 * DATA, -1) for part in parts], 1)
    p = net(x).sigmoid().detach().reshape(-1)
    reference = jacobian.mT @ (jacobian * (p * (1 - p)).unsqueeze(1))
    for structure in ("dense", "dual"):
        assert close(measured(net, x, structure).dense()[0], reference)
    # Negative control: taken apart as if the data were separate, it is another matrix.
    with monkeypatch.context() as patch:
        patch.setattr(datum_rows, "_agrees", lambda *args: True)
        assert not close(measured(net, x, "dense").dense()[0], reference)

    def masked(net: nn.Module, x: Tensor) -> None:
        with poutine.mask(mask=torch.arange(DATA) > 2):
            program(net, x)

    kronecker = Full("model", structure={"*": "kronecker"})
    with pytest.raises(UnsupportedProgram, match="'y' have weights"):
        pyronat.fisher(masked, net, x, geometry=kronecker, num_samples=1)
    pyronat.fisher(program, net, x, geometry=kronecker, num_samples=1)


def test_rows_of_a_layer_are_checked() -> None:
    net, x = perceptron(), torch.randn(DATA, 4)
    known = know(program, (net, x), {})
    run = dream(program, (net, x), {})
    (record,) = run.records
    (group,) = groups(record.distribution.base_dist)
    gate = SampleGate([])
    data = datum_rows.data_of(record, group)
    columns = datum_rows.all_columns(data, group, datum_rows.fisher_root(data, group))
    layers = find_layers(group.coordinates, ())
    assert {tuple(layer.leaf.shape) for layer in layers} == {
        tuple(shape) for block in known.net.blocks for shape in block.shapes
    }
    assert all(rows.order for rows in datum_rows.layer_rows(layers, columns, gate))
    # A use that the taps do not show.
    halved = [
        replace(la, taps=tuple(replace(t, inputs=t.inputs / 2) for t in la.taps)) for la in layers
    ]
    broken = datum_rows.layer_rows(halved, columns, gate)
    assert not any(rows.order or rows.complete for rows in broken)


def test_a_weight_with_another_use_is_no_layer() -> None:
    weight, other = torch.randn(3, 2, requires_grad=True), torch.randn(2, 2, requires_grad=True)
    x = torch.randn(5, 2)
    twice = torch.tanh(x @ other.T) @ other.T
    assert len(find_layers([twice], ())[0].taps) == 2  # two uses that are both seen
    tied = torch.tanh(x @ weight.T) @ weight  # units are rows in one, columns in the other
    assert find_layers([tied], ()) == []
    product = weight @ weight.T  # the first factor's use is not
    assert find_layers([product], ()) == []
    scaled = F.linear(x, other) * other.sum()
    assert find_layers([scaled], ()) == []
    assert [layer.leaf is other for layer in find_layers([F.linear(x, other)], ())] == [True]


# --- scales, masks, weights ----------------------------------------------------------------------


@pytest.mark.parametrize("structure", ["dense", "dual", "kronecker"])
def test_scale_and_mask(structure: str, always_factored: None) -> None:
    net, x = perceptron(), torch.randn(DATA, 4)
    kept = torch.arange(DATA) < 4
    part = measured(net, x[kept], structure).dense()[0]

    def changed(net: nn.Module, x: Tensor, heads: bool = False) -> None:
        with poutine.scale(scale=3.0), poutine.mask(mask=kept):
            program(net, x)

    geometry = Full("model", structure={"*": structure})  # type: ignore[dict-item]
    ours = pyronat.fisher(changed, net, x, geometry=geometry, num_samples=1).dense()[0]
    assert close(ours, 3 * part)
    assert not close(ours, 9 * part)


def test_elements_masked_in_the_distribution() -> None:
    net, x = perceptron(), torch.randn(DATA, 4)
    shown = torch.rand(DATA, 2) < 0.6

    def masked(net: nn.Module, x: Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=net(x)).mask(shown).to_event(1))

    dense = pyronat.fisher(masked, net, x, geometry=Full("model"), num_samples=1).dense()[0]
    rows = Full("model", structure={"*": "dual"})
    assert close(pyronat.fisher(masked, net, x, geometry=rows, num_samples=1).dense()[0], dense)


@pytest.mark.parametrize("vectorized", [True, False])
@pytest.mark.parametrize("structure", ["dense", "dual", "kronecker"])
def test_particles_average(vectorized: bool, structure: str) -> None:
    """The curvature of an amortized guide does not depend on how particles are drawn."""
    encoder = NETS["two heads"].make()
    x = torch.randn(DATA, 4)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x[:, 0])

    def guide(x: Tensor) -> None:
        pyro.module("net", encoder)
        with pyro.plate("data", len(x)):
            loc, scale = encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    geometry = Full(structure={"*": structure})  # type: ignore[dict-item]
    optim = NaturalGradient(0.0, guide_geometry=geometry)
    loss = pyro.infer.Trace_ELBO(num_particles=3, vectorize_particles=vectorized)
    svi = NaturalSVI(model, guide, optim, loss)
    svi.step(x)
    side = optim.sides["guide"]
    reference = oracle(encoder, x, heads=True)
    if structure == "kronecker":
        one = measured(encoder, x, structure, heads=True).blocks
        names = {name.replace("net$$$", ""): name for name in one}
        assert len(names) == len(side.average)
        for name, curvature in side.average.items():
            assert curvature.operator is not None
            assert close(curvature.operator.dense(), one[name].dense())
    else:
        (curvature,) = side.average.values()
        assert curvature.operator is not None
        assert close(curvature.operator.dense()[0], reference)


# --- choices -------------------------------------------------------------------------------------


def wide(x: Tensor) -> nn.Module:
    return nn.Sequential(nn.Linear(x.shape[1], 70), nn.Tanh(), nn.Linear(70, 30))


def test_large_networks_are_held_in_kronecker_factors() -> None:
    x = torch.randn(5, 4)
    net = wide(x)
    (block,) = pyronat.analyze(program, net, x).blocks
    assert (block.structure, block.exact) == ("kronecker", False)
    assert [layer.params for layer in block.layers] == [
        ("net$$$0.bias", "net$$$0.weight"),
        ("net$$$2.bias", "net$$$2.weight"),
    ]
    pyro.clear_param_store()
    (small,) = pyronat.analyze(program, perceptron(), x).blocks
    assert (small.structure, small.exact) == ("dense", True)


def test_a_user_chooses_by_name() -> None:
    x = torch.randn(5, 4)
    net = perceptron()
    encoder = NETS["two heads"].make()

    def model(x: Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            logits = net(torch.cat([z, z], -1))
            pyro.sample("y", dist.Bernoulli(logits=logits).to_event(1), obs=(x[:, :2] > 0).double())

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, scale = encoder(x).chunk(2, 1)
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    optim = NaturalGradient(
        geometry=Full(structure={"net$$$2*": "kfac"}),
        guide_geometry=Full(structure={"*": "dual", "*.weight": "diagonal"}),
    )
    svi = NaturalSVI(model, guide, optim, pyro.infer.Trace_ELBO())
    svi.step(x)
    assert svi.net is not None and svi.net.guide is not None
    assert [block.structure for block in svi.net.blocks] == ["kfac"]
    assert [block.structure for block in svi.net.guide.blocks] == ["diagonal"]
    assert "kfac" in str(svi.net) and "diagonal" in str(svi.net)


def test_impossible_choices_are_refused() -> None:
    def units(x: Tensor) -> None:
        weight = pyro.param("weight", torch.zeros(3, 4))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=F.linear(x, weight)).to_event(1))

    def joint(x: Tensor) -> None:
        a, b = pyro.param("a", torch.ones(2)), pyro.param("b", torch.ones(2))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal((a * b).sum() * x[:, 0], 1.0))

    x = torch.randn(5, 4)
    for model, structure in [(units, "dual"), (units, "kronecker"), (joint, "kronecker")]:
        geometry = Full("model", structure={"*": structure})  # type: ignore[dict-item]
        with pytest.raises(UnsupportedStructure, match="weight|a, b"):
            pyronat.fisher(model, x, geometry=geometry, num_samples=1)
    with pytest.raises(ValueError, match="structure is one of"):
        Full(structure={"*": "sparse"})  # type: ignore[dict-item]
    dense = pyronat.fisher(units, x, geometry=Full("model", structure={"*": "dense"}))
    assert [block.structure for block in dense.net.blocks] == ["unit"]


def test_too_large_a_choice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "MAX_FORMED_SIZE", 10)
    with pytest.raises(BlockTooLarge, match=r"59 entries, at most 10 .*dual"):
        measured(perceptron(), torch.randn(3, 4), "dense")


def test_the_visible_geometry_refuses_factored_blocks() -> None:
    net = wide(torch.zeros(1, 2))

    def model(x: Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.full((2,), 0.5)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=net(z)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        logits = pyro.param("logits", torch.zeros(2))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=logits).to_event(1))

    svi = NaturalSVI(model, guide, NaturalGradient(geometry=pyronat.Visible()))
    with pytest.raises(BlockTooLarge, match="visible geometry needs it dense"):
        svi.step(torch.zeros(4, 30))


# --- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", ["dense", "kronecker", "kfac", "dual", "cg", "diagonal"])
def test_every_structure_trains(structure: str) -> None:
    torch.manual_seed(1)
    teacher, net = perceptron(), perceptron()
    x = torch.randn(200, 4)
    y = torch.bernoulli((3 * teacher(x)).sigmoid()).detach()

    def model(x: Tensor, y: Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=net(x)).to_event(1), obs=y)

    geometry = Full(structure={"*": structure})  # type: ignore[dict-item]
    svi = NaturalSVI(model, lambda x, y: None, NaturalGradient(0.3, geometry=geometry))
    losses = [svi.step(x, y) for _ in range(30)]
    assert losses[-1] < 0.95 * losses[0]
    assert svi.info is not None and svi.info.accepted and svi.info.kl <= 0.003 * 200 + 1e-9


@pytest.mark.parametrize("structure", ["kronecker", "dual"])
def test_resuming_is_exact(structure: str, tmp_path: Any) -> None:
    torch.manual_seed(1)
    x = torch.randn(40, 4)
    y = torch.bernoulli(torch.full((40, 2), 0.3))
    start = perceptron().state_dict()

    def train(steps: int, resume: bool) -> tuple[list[float], Tensor]:
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        net = perceptron()
        net.load_state_dict(start)

        def model(x: Tensor, y: Tensor) -> None:
            pyro.module("net", net)
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Bernoulli(logits=net(x)).to_event(1), obs=y)

        geometry = Full(structure={"*": structure})  # type: ignore[dict-item]

        def fresh() -> NaturalSVI:
            return NaturalSVI(model, lambda x, y: None, NaturalGradient(0.3, geometry=geometry))

        svi, losses = fresh(), []
        for step in range(steps):
            if resume and step == steps // 2:
                svi.optim.save(str(tmp_path / "state"))
                svi = fresh()
                svi.optim.load(str(tmp_path / "state"))
            losses.append(svi.step(x, y))
        return losses, net[0].weight.detach().clone()

    plain, resumed = train(14, False), train(14, True)
    assert plain[0] == resumed[0] and torch.equal(plain[1], resumed[1])


def test_networks_move_within_their_trust_region() -> None:
    net, x = perceptron(), torch.randn(50, 4)
    y = torch.bernoulli(torch.full((50, 2), 0.9))

    def model(x: Tensor, y: Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=net(x)).to_event(1), obs=y)

    for bound in (1e-4, 1e-2):
        pyro.clear_param_store()
        region = pyronat.steps.KLTrustRegion(network=bound)
        svi = NaturalSVI(model, lambda x, y: None, NaturalGradient(1.0, trust_region=region))
        svi.step(x, y)
        assert svi.info is not None
        assert svi.info.kl == pytest.approx(50 * bound)


@pytest.mark.parametrize("width", [2, 64, 160])
def test_the_bound_of_networks_grows_with_wide_data(width: int) -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, width))

    def model(x: Tensor, y: Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=net(x)).to_event(1), obs=y)

    x, y = torch.randn(50, 3), torch.ones(50, width)
    svi = NaturalSVI(model, lambda x, y: None, NaturalGradient(1.0))
    svi.step(x, y)
    assert svi.info is not None
    assert svi.info.kl == pytest.approx(50 * 0.003 * max(width / 64, 1))


def test_what_is_large_is_measured_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    def units(x: Tensor, y: Tensor) -> None:
        weight = pyro.param("weight", torch.zeros(2, 4))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=F.linear(x, weight)).to_event(1), obs=y)

    net = perceptron()

    def network(x: Tensor, y: Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=net(x)).to_event(1), obs=y)

    x, y = torch.randn(5, 4), torch.ones(5, 2)
    asked = pyronat.steps.RunningAverage(0.5, 3)
    for model, given, entries, *periods in [
        (units, None, 2 * 4**2, 5, 40),
        (units, None, 2 * 4**2 - 1, 20, None),
        (network, None, 10**6, 20, 80),
        (network, asked, 10**6, 3, None),
    ]:
        monkeypatch.setattr(optimizers, "LARGE", entries)
        optim = NaturalGradient(curvature=given)
        NaturalSVI(model, lambda x, y: None, optim).step(x, y)
        assert [optim.curvature.refresh, optim.curvature.longest] == periods
