"""The theorems of the visible geometry: the library against sums over all states of random nets."""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import networkx as nx
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceEnum_ELBO, config_enumerate
from states import parameters, same
from torch import Tensor

import pyronat
from models.helmholtz import Helmholtz
from models.latent_class import LatentClass
from pyronat import Full, NaturalGradient, NaturalSVI, Visible, testing
from pyronat.visible import Particles, normalized

EXACT = 1e-12
ORACLE = Visible(mixing=0, posterior="exact")
SHAPES = [(6, 1), (6, 2), (7, 1), (7, 2), (8, 1), (8, 2), (8, 3), (9, 3), (9, 4)]
SHAPES += [(10, 2), (11, 3), (12, 1), (12, 4)]
"""Nodes, and districts with hidden ones."""
GUIDES = ["exact", "noisy", "factorized", "tempered", "uniform", "bad", "inverse"]


@dataclass(frozen=True, eq=False)
class Net:
    """Binary nodes in topological order, each a logistic regression on its parents."""

    parents: tuple[tuple[int, ...], ...]
    hidden: tuple[int, ...]
    weights: tuple[Tensor, ...]  # of each node's parents, its bias last

    @property
    def visible(self) -> tuple[int, ...]:
        return tuple(node for node in range(len(self.parents)) if node not in self.hidden)

    @property
    def districts(self) -> list[set[int]]:
        """Families that share a hidden node belong together."""
        families = nx.empty_graph(len(self.parents))
        for node in self.hidden:
            nx.add_path(families, [node, *(k for k, p in enumerate(self.parents) if node in p)])
        return list(nx.connected_components(families))

    @property
    def hidden_districts(self) -> list[set[int]]:
        return [district for district in self.districts if district & set(self.hidden)]

    @functools.cached_property
    def table(self) -> Table:
        return Table(self)

    def data(self, *size: int) -> list[Tensor]:
        return [torch.zeros(size) for _ in self.visible]

    @property
    def model(self) -> Callable[..., None]:
        """A Pyro program with a site for each node; its arguments are the visible values."""

        def model(*data: Tensor) -> None:
            observed, values = dict(zip(self.visible, data, strict=True)), []
            with pyro.plate_stack("data", data[0].shape):
                for node, parents in enumerate(self.parents):
                    weight = pyro.param(f"w{node:02d}", self.weights[node].clone())
                    logits = weight[-1] + sum(weight[i] * values[p] for i, p in enumerate(parents))
                    fn = dist.Bernoulli(logits=logits)
                    values.append(pyro.sample(f"x{node}", fn, obs=observed.get(node)))

        return model

    def guide(self, probs: Tensor) -> Callable[..., None]:
        """A Pyro program with given probabilities of hidden states by visible ones `[H, V]`."""

        def guide(*data: Tensor) -> None:
            seen = prefix = torch.zeros_like(data[0], dtype=torch.long)
            for value in data:
                seen = 2 * seen + value.long()
            with pyro.plate_stack("data", data[0].shape):
                for number, node in enumerate(self.hidden):
                    mass = probs.reshape(2**number, 2, -1, probs.shape[1]).sum(2)
                    chance = (mass[:, 1] / mass.sum(1))[prefix, seen]
                    value = pyro.sample(f"x{node}", dist.Bernoulli(chance))
                    prefix = 2 * prefix + value.long()

        return guide


class Table:
    """A net in all its states, in plain torch: H hidden states, V visible ones, P parameters."""

    def __init__(self, net: Net) -> None:
        shape = 2 ** len(net.hidden), 2 ** len(net.visible)
        states = torch.tensor(list(itertools.product((0.0, 1.0), repeat=len(net.parents))))
        x = torch.empty_like(states)
        x[:, [*net.hidden, *net.visible]] = states
        log_joint, scores, owner = torch.zeros(len(x)), [], []
        for node, (parents, weight) in enumerate(zip(net.parents, net.weights, strict=True)):
            inputs = torch.cat([x[:, list(parents)], torch.ones(len(x), 1)], 1)
            chance = torch.sigmoid(inputs @ weight)
            log_joint += torch.where(x[:, node] == 1, chance, 1 - chance).log()
            scores.append((x[:, node] - chance)[:, None] * inputs)
            owner += [node] * len(weight)
        self.owner = torch.tensor(owner)  # node of each parameter
        self.bits = states.reshape(*shape, -1)[:, 0, : len(net.hidden)]  # [H, hidden]
        self.log_joint = log_joint.reshape(shape)
        self.seen = self.log_joint.exp().sum(0)  # p(v)
        self.posterior = self.log_joint.exp() / self.seen
        self.score = torch.cat(scores, 1).reshape(*shape, -1)
        self.visible_score = torch.einsum("hv,hvp->vp", self.posterior, self.score)  # s_V
        self.full = outer(self.log_joint.exp().flatten(), self.score.flatten(0, 1))
        self.visible = outer(self.seen, self.visible_score)


def outer(probs: Tensor, rows: Tensor) -> Tensor:
    """Expected outer product of rows `[states, P]`."""
    return rows.mT @ (probs[:, None] * rows)


def make_net(choice: random.Random, size: int, hidden: tuple[int, ...], most: int = 3) -> Net:
    """A random net with up to `most` parents for each node."""
    parents = []
    for node in range(size):
        count = choice.randint(min(node, 1), min(node, most))
        parents.append(tuple(sorted(choice.sample(range(node), count))))
    weights = [torch.tensor([choice.gauss(0, 1.2) for _ in range(len(p) + 1)]) for p in parents]
    return Net(tuple(parents), hidden, tuple(weights))


@functools.cache
def random_net(seed: int, size: int, districts: int | None = None) -> Net:
    """A random net whose hidden nodes have children, with so many districts of hidden ones."""
    choice = random.Random(f"{seed} {size} {districts}")
    while True:
        hidden = sorted(choice.sample(range(size), choice.randint(districts or 1, size // 2)))
        net = make_net(choice, size, tuple(hidden), most=2 if (districts or 0) > 2 else 3)
        fertile = set(hidden) <= set(itertools.chain(*net.parents))
        if fertile and districts in {None, len(net.hidden_districts)}:
            return net


@functools.cache
def layered(hidden: int = 4, visible: int = 4, seed: int = 0) -> Net:
    """A random net whose first nodes are hidden, all in one district."""
    choice = random.Random(seed)
    while True:
        net = make_net(choice, hidden + visible, tuple(range(hidden)))
        if len(net.districts) == 1:
            return net


def fisher(net: Net, geometry: Visible, *size: int, guide: Any = None) -> pyronat.VisibleFisher:
    data = net.data(*size)
    return pyronat.fisher(net.model, *data, geometry=geometry, guide=guide, num_samples=1)


def shares(table: Table, matrix: Tensor) -> Tensor:
    """Eigenvalues of G⁻¹ M, ascending."""
    inverse = torch.linalg.cholesky(table.full).inverse()
    return torch.linalg.eigvalsh(inverse @ matrix @ inverse.mT)


# --- enumeration -------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "districts"), SHAPES)
def test_visible_fisher_is_exact_and_local(size: int, districts: int) -> None:
    net = random_net(0, size, districts)
    table, owner = net.table, net.table.owner
    known = pyronat.analyze(net.model, *net.data()).districts
    sites = {frozenset(f"x{node}" for node in district) for district in net.districts}
    assert {frozenset(district.sites) for district in known} == sites
    assert sum(1 for district in known if district.hidden) == districts
    found, layout = fisher(net, ORACLE).dense()
    assert [name for name, _ in layout] == [f"w{node:02d}" for node in range(size)]
    assert (found - table.visible).abs().max() < 1e-10
    if size < 10:
        oracle, names = testing.enumerated_visible_fisher(net.model, *net.data())
        assert names == layout
        assert (found - oracle).abs().max() < 1e-10
        assert (oracle - table.visible).abs().max() < EXACT
    across = torch.ones_like(found, dtype=torch.bool)
    for district in net.districts:
        inside = torch.isin(owner, torch.tensor(sorted(district)))
        across &= ~(inside[:, None] & inside)
        if district & set(net.hidden):
            between = table.visible[inside[:, None] & inside & (owner[:, None] != owner)]
            assert between.abs().max() > 1e-5, "hiding ties the families of a district"
    assert (table.visible * across).abs().max() < EXACT
    assert (found * across == 0).all()


def test_hiding_loses_information() -> None:
    for seed in range(200):
        net = random_net(seed, 6 + seed % 3)
        table = net.table
        assert torch.linalg.eigvalsh(table.full - table.visible).min() > -EXACT
        retained = shares(table, table.visible)
        assert -1e-10 < retained.min() and retained.max() < 1 + 1e-10
        if seed < 20:
            pyro.clear_param_store()
            found = fisher(net, ORACLE)
            assert (found.dense()[0] - table.visible).abs().max() < 1e-10
            assert all(0 <= direction.missing <= 1 for direction in found.missing_information())


# --- the sandwich theorem ----------------------------------------------------------------------


def guides(table: Table) -> dict[str, Tensor]:
    """Probabilities of hidden states by visible ones `[H, V]`, from good to misleading."""
    logits = table.posterior.log()
    means = table.bits.mT @ table.posterior
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(2, *logits.shape, generator=generator, dtype=logits.dtype)
    return {
        "exact": table.posterior,
        "noisy": (logits + 0.5 * noise[0]).softmax(0),
        "factorized": (table.bits @ means.logit()).softmax(0),
        "tempered": (0.3 * logits).softmax(0),
        "uniform": torch.zeros_like(logits).softmax(0),
        "bad": (2 * noise[1]).softmax(0),
        "inverse": (-logits).softmax(0),
    }


def all_particles(table: Table, guide: Tensor, num: int, own: bool = True) -> Any:
    """p, v and particles of all (v, h₁, …), h₁ ~ p(h|v) if `own`, all others ~ q(h|v)."""
    hidden, visible = (torch.arange(count) for count in guide.shape)
    *draws, seen = torch.cartesian_prod(*[hidden] * num, visible).unbind(1)
    probs = table.seen[seen] * (table.posterior if own else guide)[draws[0], seen]
    for draw in draws[1:]:
        probs = probs * guide[draw, seen]
    log_weights = (table.log_joint - guide.log())[torch.stack(draws), seen]
    return probs, seen, Particles(table.score[torch.stack(draws), seen], normalized(log_weights))


def expected_mean(table: Table, probs: Tensor, seen: Tensor, particles: Particles) -> Tensor:
    """E[ŝ | v] `[V, P]`."""
    zeros = torch.zeros_like(table.visible_score)
    return zeros.index_add(0, seen, probs[:, None] * particles.mean()) / table.seen[:, None]


@functools.cache
def expected_outer(net: Net, name: str, num: int = 2) -> Tensor:
    """E[ŝ ŝᵀ] `[P, P]`."""
    probs, _, particles = all_particles(net.table, guides(net.table)[name], num)
    return outer(probs, particles.mean())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", GUIDES)
def test_sandwich(name: str, seed: int) -> None:
    table = layered(seed=seed).table
    probs, seen, particles = all_particles(table, guides(table)[name], 2)
    assert probs.sum() == pytest.approx(1.0, abs=EXACT)
    mean = expected_mean(table, probs, seen, particles)
    assert (mean - table.visible_score).abs().max() < EXACT
    second = outer(probs, particles.mean())
    assert torch.linalg.eigvalsh(second - table.visible).min() > -EXACT
    assert torch.linalg.eigvalsh(table.full - second).min() > -EXACT
    rows = particles.deviations(debias=False)
    scatter = outer(probs.repeat(len(rows)), rows.flatten(0, 1))
    assert (scatter - (table.full - second)).abs().max() < EXACT


@pytest.mark.parametrize("name", ["uniform", "bad", "inverse"])
def test_no_sandwich_without_the_own_hidden_values_of_a_dream(name: str) -> None:
    table = layered().table
    probs, seen, particles = all_particles(table, guides(table)[name], 2, own=False)
    mean = expected_mean(table, probs, seen, particles)
    assert (mean - table.visible_score).abs().max() > 0.1
    assert shares(table, outer(probs, particles.mean())).max() > 1.5


@pytest.mark.parametrize("num", [2, 3])
def test_exact_posterior_draws_average_the_geometries(num: int) -> None:
    net = layered(3, 3)
    expected = torch.lerp(net.table.visible, net.table.full, 1 / num)
    assert (expected_outer(net, "exact", num) - expected).abs().max() < EXACT
    assert (expected_outer(net, "uniform", num) - expected).abs().max() > 1e-3


# --- the same through Pyro programs ------------------------------------------------------------


def estimates(net: Net, guide: Tensor | None, geometry: Visible, repeats: int, size: int) -> Tensor:
    """Independent estimates for one datum `[repeats, P, P]`."""
    found, program = [], None if guide is None else net.guide(guide)
    for seed in range(repeats):
        pyro.set_rng_seed(seed)
        found.append(fisher(net, geometry, size, guide=program).dense()[0] / size)
    return torch.stack(found)


def sampling(estimator: str, num_dreams: int, posterior: str = "guide", num: int = 10) -> Visible:
    """Estimates of G_V from dreams, the subtractive one from the exact G."""
    full = Full("model" if estimator == "direct" else "exact")
    return Visible(0.0, num, num_dreams, posterior=posterior, estimator=estimator, full=full)


@pytest.mark.parametrize("num", [2, 3])
def test_exact_guide_averages_the_geometries(num: int) -> None:
    table = (net := layered(3, 3)).table
    found = estimates(net, table.posterior, sampling("direct", 600, num=num), 20, 800)
    expected = torch.lerp(table.visible, table.full, 1 / num)
    # Student's t with 19 degrees of freedom exceeds 7 with a probability of 1e-6.
    assert testing.z_score(found, expected, floor=EXACT).abs().max() < 7
    for wrong in (table.visible, table.full):
        assert testing.z_score(found, wrong, floor=EXACT).abs().max() > 20


@pytest.mark.parametrize("name", ["uniform", "inverse"])
def test_misleading_guides_stay_within_the_sandwich(name: str) -> None:
    table = (net := layered(3, 3)).table
    found = estimates(net, guides(table)[name], sampling("direct", 1000, num=2), 20, 600)
    middle = expected_outer(net, name)
    assert testing.z_score(found, middle, floor=EXACT).abs().max() < 7
    assert testing.z_score(found, table.visible, floor=EXACT).abs().max() > 20
    for sign, bound in ((1, table.visible), (-1, table.full)):
        # Directions that are chosen without looking at the estimates.
        vectors, gap = torch.linalg.eigh(middle - bound).eigenvectors, sign * (found - bound)
        along = torch.einsum("pi,rpq,qi->ri", vectors, gap, vectors)
        error = along.std(0) / math.sqrt(len(along))
        assert (along.mean(0) + 4 * error > -EXACT).all()


@pytest.mark.parametrize("seed", range(3))
def test_without_information_in_the_guide_the_geometry_is_the_full_one(seed: int) -> None:
    table = (net := layered(seed=seed)).table
    missing = shares(table, table.full - table.visible)
    draws = {"exact": table.posterior, "opposite": (-4 * table.posterior.log()).softmax(0)}
    found, geometry = {}, sampling("subtractive", 4000, num=2)
    for name, probs in draws.items():
        found[name] = shares(table, table.full - estimates(net, probs, geometry, 1, 4000)[0])
        assert found[name].min() > -1e-10 and found[name].max() < 1 + 1e-10
    # Measured: 0.95 to 0.98 of the missing information with the one, below 0.01 with the other.
    assert found["exact"].sum() > 0.9 * missing.sum()
    assert found["opposite"].sum() < 0.02 * missing.sum() and found["opposite"].max() < 0.2


@pytest.mark.parametrize("estimator", ["direct", "subtractive"])
def test_error_falls_with_the_root_of_the_number_of_dreams(estimator: str) -> None:
    net, errors = layered(2, 3), []
    for count in (100, 400, 1600):
        found = estimates(net, None, sampling(estimator, count, "enumerate"), 20, count)
        errors.append((found - net.table.visible).square().mean().sqrt().log())
    assert -0.6 < (errors[2] - errors[0]) / math.log(16) < -0.4
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize(("per_entry", "chosen"), [(9.5, "subtractive"), (10.5, "direct")])
def test_auto_chooses_by_the_number_of_dreams(per_entry: float, chosen: str) -> None:
    net = layered(2, 3)
    count = int(per_entry * len(net.table.owner))
    found, geometry = {}, sampling(chosen, count, "enumerate")
    for name in ("auto", "direct", "subtractive"):
        found[name] = estimates(net, None, replace(geometry, estimator=name), 1, count)
    assert {name for name in found if torch.equal(found[name], found["auto"])} == {"auto", chosen}


# --- steps and missing information -------------------------------------------------------------


def trained(geometry: Any) -> dict[str, Tensor]:
    """Parameters of a small Helmholtz machine after some steps."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    machine, data = Helmholtz((6, 4, 3)), torch.rand(20, 6).round()
    loss = pyronat.ReweightedWakeSleep(num_particles=5)
    svi = NaturalSVI(machine.model, machine.guide, NaturalGradient(geometry=geometry), loss=loss)
    for _ in range(12):
        svi.step(data)
    return parameters()


def test_mixing_one_is_the_full_geometry_bit_for_bit() -> None:
    full = trained(Full())
    assert same(trained(Visible(mixing=1.0)), full)
    assert not same(trained(Visible(mixing=0.1)), full)


@pytest.mark.parametrize("mixing", [0.1, 0.5])
def test_step_solves_the_mixed_geometry(mixing: float) -> None:
    net = layered(2, 3)
    data = [value.contiguous() for value in torch.eye(3)[[0, 0, 1, 2, 2, 2, 1]].unbind(1)]
    exact, undamped = Visible(mixing, posterior="exact"), pyronat.steps.ConstantDamping(0.0)
    free = pyronat.steps.KLTrustRegion(model=math.inf)
    optim = NaturalGradient(lr=1.0, geometry=exact, damping=undamped, trust_region=free)
    loss, guide = TraceEnum_ELBO(max_plate_nesting=1), lambda *data: None
    NaturalSVI(config_enumerate(net.model), guide, optim, loss=loss).step(*data)
    change = torch.cat([pyro.param(f"w{k:02d}").detach() - w for k, w in enumerate(net.weights)])
    pyro.clear_param_store()
    full, _ = testing.enumerated_fisher(net.model, *net.data())
    visible, _ = testing.enumerated_visible_fisher(net.model, *net.data())
    seen = (torch.stack(data, 1) @ torch.tensor([4.0, 2.0, 1.0])).long()
    ascent = net.table.visible_score[seen].mean(0)
    expected = torch.linalg.solve(torch.lerp(visible, full, mixing), ascent)
    assert (change - expected).abs().max() < 1e-8
    assert (change - torch.linalg.solve(full, ascent)).abs().max() > 1e-2


@pytest.mark.parametrize("seed", range(3))
def test_missing_information_solves_the_generalized_eigenproblem(seed: int) -> None:
    net = random_net(seed, 7, 1)
    full, _ = testing.enumerated_fisher(net.model, *net.data())
    visible, layout = testing.enumerated_visible_fisher(net.model, *net.data())
    found = fisher(net, ORACLE).missing_information()
    assert len(found) == sum(len(net.weights[node]) for node in net.hidden_districts[0])
    expected = 1 - torch.linalg.eigvals(torch.linalg.solve(full, visible)).real
    missing = [direction.missing for direction in found] + [0.0] * (len(full) - len(found))
    assert (torch.tensor(missing) - expected.sort(descending=True).values).abs().max() < 1e-9
    for direction in found:
        vector = torch.cat([direction.vector[name].reshape(-1) for name, _ in layout])
        assert vector @ full @ vector == pytest.approx(1.0, abs=1e-9)
        residual = visible @ vector - (1 - direction.missing) * full @ vector
        assert residual.abs().max() < 1e-9


def test_rate_of_em_is_the_missing_information() -> None:
    machine = LatentClass(num_classes=2, num_items=4)
    weights = torch.tensor([0.25, 0.75])
    probs = torch.tensor([[0.75, 0.75, 0.75, 0.5], [0.25, 0.25, 0.5, 0.25]])
    truth = {"weights": weights, "probs": probs}
    # All patterns have probabilities in multiples of 4⁻⁵: data of that size are the model itself.
    patterns = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 4)
    log_probs = torch.stack([machine.log_likelihood(truth, row[None]) for row in patterns])
    counts = 4**5 * log_probs.exp()
    assert (counts - counts.round()).abs().max() < 1e-9
    data = patterns.repeat_interleave(counts.round().long(), 0)
    values, errors = {"weights": torch.tensor([0.3, 0.7]), "probs": probs + 0.02}, []
    for _ in range(500):
        values = machine.em_step(values, data)
        errors.append(torch.cat([(values[name] - truth[name]).flatten() for name in truth]).norm())
    rate = (errors[-1] / errors[-51]) ** (1 / 50)
    assert errors[-1] < 1e-4
    machine.initial = truth
    found = pyronat.fisher(machine.model, patterns[:1], geometry=ORACLE).missing_information()
    assert len(found) == 9 and found[0].missing > 0.95
    assert 1 - rate == pytest.approx(1 - found[0].missing, rel=1e-2)
