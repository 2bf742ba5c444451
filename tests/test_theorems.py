"""The theorems that pyronat rests on: each against an oracle, each oracle against a mutant."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from cases import BY_NAME, CASES, Case
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, config_enumerate
from torch import Tensor

import pyronat
from pyronat import testing
from pyronat.testing import Layout

Values = dict[str, Tensor]

EXACT = 1e-12
ZERO = 1e-12


@functools.cache
def full(name: str) -> tuple[Tensor, Layout]:
    case = BY_NAME[name]
    return testing.enumerated_fisher(case.model, *case.args)


@functools.cache
def sitewise(name: str) -> tuple[Tensor, Layout]:
    case = BY_NAME[name]
    return testing.enumerated_sitewise_fisher(case.model, *case.args)


@functools.cache
def visible(name: str) -> tuple[Tensor, Layout]:
    case = BY_NAME[name]
    return testing.enumerated_visible_fisher(case.model, *case.args)


def estimate(case: Case, geometry: Any, **options: Any) -> pyronat.Fisher:
    return pyronat.fisher(case.model, *case.args, geometry=geometry, **options)


def exact(case: Case) -> pyronat.Fisher:
    return estimate(case, pyronat.Full(expectation="exact"))


def agrees(candidate: Tensor, oracle: Tensor) -> bool:
    """The comparison that every implementation has to pass, and every mutant has to fail."""
    return bool((candidate - oracle).abs().max() < EXACT)


def leaves(case: Case) -> Values:
    found = testing.parameters(case.model, *case.args)
    return {name: leaf.detach() for name, leaf in found.items()}


def randn(like: Mapping[str, Tensor], seed: int = 0) -> Values:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(value.shape, generator=generator, dtype=value.dtype)
        for name, value in like.items()
    }


def flat(vector: Mapping[str, Tensor], layout: Layout) -> Tensor:
    return torch.cat([vector[name].reshape(-1) for name, _ in layout])


def unflat(vector: Tensor, layout: Layout, like: Mapping[str, Tensor]) -> Values:
    return {name: vector[where].reshape(like[name].shape) for name, where in layout}


def may_differ_from_zero(net: pyronat.BayesNet, layout: Layout, like: Values) -> Tensor:
    """Entries `[num_params, num_params]` of the Fisher that the blocks do not claim to be zero."""
    units = testing.entry_blocks(net)
    group = torch.cat([
        units.get(name, torch.full(like[name].shape, -1)).reshape(-1) for name, _ in layout
    ])
    return (group[:, None] == group) & (group >= 0)


def district_of_params(net: pyronat.BayesNet, layout: Layout) -> Tensor:
    """Entries of the visible Fisher within one district, or districts that share a parameter."""
    sets = [set(district.params) for district in net.districts if district.params]
    merged: list[set[str]] = []
    for params in sets:
        apart = [other for other in merged if not other & params]
        merged = [*apart, params.union(*(other for other in merged if other & params))]
    total = layout[-1][1].stop
    within = torch.zeros(total, total, dtype=torch.bool)
    for params in merged:
        inside = torch.zeros(total, dtype=torch.bool)
        for name, where in layout:
            inside[where] = name in params
        within |= inside[:, None] & inside
    return within


by_case = pytest.mark.parametrize("case", CASES, ids=str)


# --- structure ---------------------------------------------------------------------------------


@by_case
def test_structure_is_the_known_one(case: Case) -> None:
    net = pyronat.analyze(case.model, *case.args)
    assert {site: net.parents(site) for site in case.parents} == dict(case.parents)
    assert set(net.graph.nodes) == set(case.parents)
    kinds = {site: net.graph.nodes[site]["kind"] for site in net.graph.nodes}
    assert {site for site, kind in kinds.items() if kind == "observed"} == case.observed
    assert {frozenset(district.sites) for district in net.districts} == case.districts


@by_case
def test_blocks_are_the_known_ones(case: Case) -> None:
    net = pyronat.analyze(case.model, *case.args)
    found = {frozenset(block.params): block for block in net.blocks}
    assert set(found) == {block.params for block in case.blocks}
    for known in case.blocks:
        block = found[known.params]
        if known.structure is not None:
            assert (block.structure, block.count, block.size) == (
                known.structure,
                known.count,
                known.size,
            ), known


@by_case
def test_guide_is_analyzed_as_another_program(case: Case) -> None:
    if case.guide is None:
        pytest.skip("nothing is hidden")
    net = pyronat.analyze(case.model, *case.args, guide=case.guide)
    assert {s: net.guide.parents(s) for s in case.guide_parents} == dict(case.guide_parents)


@by_case
def test_entries_outside_the_blocks_are_zero(case: Case) -> None:
    net = pyronat.analyze(case.model, *case.args)
    fisher, layout = full(case.name)
    kept = may_differ_from_zero(net, layout, leaves(case))
    outside = fisher[~kept].abs()
    assert outside.numel() == 0 or outside.max() < ZERO


# --- full geometry -----------------------------------------------------------------------------


@by_case
def test_exact_fisher_is_the_enumerated_one(case: Case) -> None:
    matrix, layout = exact(case).dense()
    oracle, oracle_layout = sitewise(case.name)
    assert list(layout) == oracle_layout
    assert agrees(matrix, oracle)


@by_case
def test_expected_score_is_zero(case: Case) -> None:
    score, _ = testing.expected_score(case.model, *case.args)
    assert score.abs().max() < ZERO


@by_case
def test_divergence_is_half_the_squared_length_to_third_order(case: Case) -> None:
    direction = randn(leaves(case), seed=3)
    for divergence, (metric, layout) in (
        (testing.kl_divergence, full(case.name)),
        (testing.visible_kl_divergence, visible(case.name)),
    ):
        remainders = []
        for size in (0.04, 0.02, 0.01):
            step = {name: size * value for name, value in direction.items()}
            vector = flat(step, layout)
            kl = divergence(case.model, step, *case.args)
            assert kl > 0
            remainders.append(abs((kl - vector @ metric @ vector / 2).item()))
        ratios = [remainders[0] / remainders[1], remainders[1] / remainders[2]]
        assert ratios == pytest.approx([8.0, 8.0], rel=0.25), divergence.__name__


@by_case
def test_solve_inverts_mv_on_the_range(case: Case) -> None:
    operator = exact(case)
    matrix, layout = sitewise(case.name)
    like = leaves(case)
    vector = unflat(matrix @ flat(randn(like), layout), layout, like)
    image = operator.mv(vector)
    torch.testing.assert_close(
        flat(image, layout), matrix @ flat(vector, layout), rtol=EXACT, atol=EXACT
    )
    if torch.linalg.matrix_rank(matrix, rtol=1e-10) == len(matrix):
        solution = operator.solve(image, damping=0.0)
        torch.testing.assert_close(flat(solution, layout), flat(vector, layout))
    damped = operator.solve(vector, damping=1e-3)
    assert all(value.shape == like[name].shape for name, value in damped.items())
    if torch.linalg.matrix_rank(matrix, rtol=1e-10) < len(matrix):
        damping = 1e-9
        image = flat(operator.solve(image, damping=damping), layout)
        torch.testing.assert_close(image, flat(vector, layout), rtol=1e-4, atol=1e-6)


@by_case
def test_heavy_damping_gives_the_gradient_direction(case: Case) -> None:
    _, layout = sitewise(case.name)
    gradient = randn(leaves(case))
    direction = 1e9 * flat(exact(case).solve(gradient, damping=1e9), layout)
    cosine = F.cosine_similarity(direction, flat(gradient, layout), dim=0)
    assert cosine > 1 - 1e-12


def test_fisher_of_duplicated_data_with_halved_scale_is_the_same() -> None:
    case = BY_NAME["regression"]
    twice = [torch.cat([value, value]) for value in case.args]
    model = poutine.scale(case.model, scale=0.5)
    matrix, _ = pyronat.fisher(
        model, *twice, geometry=pyronat.Full(expectation="model"), num_samples=1
    ).dense()
    assert agrees(matrix, sitewise(case.name)[0])


def test_fisher_does_not_depend_on_the_size_of_the_subsample() -> None:
    # The elements of this plate are exchangeable.
    case, geometry = BY_NAME["subsample"], pyronat.Full(expectation="exact")
    for size in (1, 2, 4):
        arguments = torch.zeros(size), torch.arange(size)
        matrix, _ = pyronat.fisher(case.model, *arguments, geometry=geometry).dense()
        assert agrees(matrix, sitewise(case.name)[0])


# --- Monte Carlo -------------------------------------------------------------------------------


def sampled(case: Case, num_samples: int, repeats: int) -> Tensor:
    """Independent estimates `[repeats, num_params, num_params]`."""
    estimates = []
    for seed in range(repeats):
        pyro.set_rng_seed(seed)
        geometry = pyronat.Full(expectation="model")
        estimates.append(estimate(case, geometry, num_samples=num_samples).dense()[0])
    return torch.stack(estimates)


@pytest.mark.parametrize("name", ["sbn", "hmm", "cpt", "subsample", "masked", "tied"])
def test_sampled_fisher_is_unbiased(name: str) -> None:
    oracle, _ = sitewise(name)
    estimates = sampled(BY_NAME[name], num_samples=25, repeats=40)
    z = testing.z_score(estimates, oracle, floor=EXACT)
    # Student's t with 39 degrees of freedom exceeds 6 with a probability of 1e-6.
    assert z.abs().max() < 6


@pytest.mark.parametrize("name", ["hmm", "subsample"])
def test_sampling_error_falls_with_the_root_of_the_number_of_samples(name: str) -> None:
    repeats = 30
    oracle, _ = sitewise(name)
    few, many = (
        (sampled(BY_NAME[name], num_samples, repeats) - oracle).square().mean().sqrt()
        for num_samples in (4, 64)
    )
    # Each log2 has a standard error of up to 1 / (2 ln 2) √(2 / repeats) = 0.19: three of both.
    assert math.log2(few / many) == pytest.approx(2.0, abs=0.8)


# --- visible geometry --------------------------------------------------------------------------


@by_case
def test_visible_geometry_loses_information(case: Case) -> None:
    fisher, _ = full(case.name)
    missing = fisher - visible(case.name)[0]
    assert torch.linalg.eigvalsh(missing).min() > -ZERO
    eigenvalues, vectors = torch.linalg.eigh(fisher)
    kept = eigenvalues > 1e-10
    whiten = vectors[:, kept] / eigenvalues[kept].sqrt()
    ratios = torch.linalg.eigvalsh(whiten.mT @ visible(case.name)[0] @ whiten)
    assert ratios.min() > -EXACT and ratios.max() < 1 + EXACT


@by_case
def test_visible_fisher_is_block_diagonal_over_districts(case: Case) -> None:
    net = pyronat.analyze(case.model, *case.args)
    fisher, layout = visible(case.name)
    outside = fisher[~district_of_params(net, layout)].abs()
    assert outside.numel() == 0 or outside.max() < ZERO


@by_case
def test_a_visible_family_keeps_its_full_block(case: Case) -> None:
    net = pyronat.analyze(case.model, *case.args)
    fully_visible = [set(d.params) for d in net.districts if not d.hidden]
    others = set().union(*(d.params for d in net.districts if d.hidden))
    params = set().union(*fully_visible) - others
    kept = torch.zeros(len(full(case.name)[0]), dtype=torch.bool)
    for name, where in full(case.name)[1]:
        kept[where] = name in params
    difference = (full(case.name)[0] - visible(case.name)[0])[kept]
    assert difference.numel() == 0 or difference.abs().max() < ZERO


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [("hidden_middle", "ph", "pc"), ("chain", "a", "c"), ("sbn", "b0", "W1"), ("bank", "pg", "pz")],
)
def test_visible_fisher_couples_the_nodes_of_a_district(name, first, second) -> None:
    where = dict(visible(name)[1])
    cross = (where[first], where[second])
    assert visible(name)[0][cross].abs().max() > 1e-4
    assert full(name)[0][cross].abs().max() < ZERO


# --- covariance --------------------------------------------------------------------------------

ROTATION = torch.linalg.qr(torch.randn(2, 2, generator=torch.Generator().manual_seed(0)))[0]


def identity(value: Tensor) -> Tensor:
    return value


def bend(value: Tensor) -> Tensor:
    """Smooth and invertible, and mixes the last dimension."""
    rotated = value @ ROTATION.to(value)
    return rotated + rotated**3 / 3


def net_of(chart: Callable[[Tensor], Tensor], point: Values) -> Callable[[Tensor], None]:
    """A net whose weights are `chart` of its parameters."""

    def model(x: Tensor) -> None:
        value = {name: chart(pyro.param(name, start)) for name, start in point.items()}
        a = pyro.sample("a", dist.Bernoulli(logits=value["prior"]).to_event(1))
        b = pyro.sample("b", dist.Bernoulli(logits=F.linear(a, value["W"])).to_event(1))
        pyro.sample("x", dist.Bernoulli(logits=(value["u"] * b).sum()), obs=x)

    return model


def test_direction_is_covariant_under_reparametrization() -> None:
    shapes = {"prior": torch.zeros(2), "W": torch.zeros(2, 2), "u": torch.zeros(2)}
    bent_point = {name: 0.5 * value for name, value in randn(shapes).items()}
    point = {name: bend(value) for name, value in bent_point.items()}
    x, gradient = torch.tensor(1.0), randn(shapes, seed=1)

    def direction(chart, point: Values, gradient: Values) -> Values:
        pyro.clear_param_store()
        fisher = pyronat.fisher(net_of(chart, point), x, geometry=pyronat.Full(expectation="exact"))
        return fisher.solve(gradient, damping=0.0)

    pulled_back = {
        name: torch.autograd.functional.vjp(bend, bent_point[name], gradient[name])[1]
        for name in shapes
    }
    straight = direction(identity, point, gradient)
    bent = direction(bend, bent_point, pulled_back)
    for name in shapes:
        pushed = torch.autograd.functional.jvp(bend, bent_point[name], bent[name])[1]
        torch.testing.assert_close(pushed, straight[name], rtol=0, atol=1e-8)
        assert not torch.allclose(bent[name], straight[name], rtol=1e-2)


def named(names: Mapping[str, str]) -> Callable[[Tensor], None]:
    """A net with a dense and two unit blocks, its sites and parameters called `names`."""

    def model(x: Tensor) -> None:
        prior = pyro.param(names["prior"], lambda: torch.tensor([0.3, -0.5]))
        weight = pyro.param(names["weight"], lambda: torch.tensor([[1.0, -2.0], [0.5, 0.7]]))
        table = pyro.param(names["table"], lambda: torch.tensor([0.9, -1.1]))
        a = pyro.sample(names["a"], dist.Bernoulli(logits=prior).to_event(1))
        b = pyro.sample(names["b"], dist.Bernoulli(logits=F.linear(a, weight)).to_event(1))
        pyro.sample(names["x"], dist.Bernoulli(logits=table[b[0].long()]), obs=x)

    return model


def test_renaming_permutes_the_fisher() -> None:
    plain = {name: name for name in ("prior", "weight", "table", "a", "b", "x")}
    renamed = {
        "prior": "z.1", "weight": "a.9", "table": "m", "a": "site_z", "b": "site_a", "x": "0"
    }  # fmt: skip
    geometry, x = pyronat.Full(expectation="exact"), torch.tensor(0.0)
    matrix, layout = pyronat.fisher(named(plain), x, geometry=geometry).dense()
    other, other_layout = pyronat.fisher(named(renamed), x, geometry=geometry).dense()
    where = dict(other_layout)
    order = torch.cat([torch.arange(len(other))[where[renamed[name]]] for name, _ in layout])
    assert not torch.equal(order, torch.arange(len(other)))
    torch.testing.assert_close(other[order][:, order], matrix, rtol=0, atol=1e-14)


# --- mutants: the comparison above must reject each --------------------------------------------


def states(case: Case) -> list[tuple[Tensor, Values]]:
    """Probability and scaled score of each site, for every state, by Pyro's own log densities."""
    table = []
    params = list(testing.parameters(case.model, *case.args).values())
    for _, trace in testing.enumerate_states(case.model, *case.args):
        trace.compute_log_prob()
        log_prob, scores = torch.zeros(()), {}
        for name in trace.nodes:
            site = trace.nodes[name]
            if name not in case.parents:
                continue
            log_prob = log_prob + site["unscaled_log_prob"].sum().detach()
            gradients = torch.autograd.grad(
                site["log_prob_sum"], params, retain_graph=True, allow_unused=True
            )
            scores[name] = torch.cat([
                torch.zeros_like(param).reshape(-1) if gradient is None else gradient.reshape(-1)
                for param, gradient in zip(params, gradients, strict=True)
            ])
        table.append((log_prob.exp(), scores))
    return table


def test_squared_scale_is_rejected() -> None:
    case = BY_NAME["subsample"]
    mutant = sum(
        prob * torch.outer(score, score)
        for prob, scores in states(case)
        for score in scores.values()
    )
    oracle = sitewise(case.name)[0]
    assert not agrees(mutant, oracle)
    assert not agrees(full(case.name)[0], oracle), "ignoring the scale is wrong as well"
    # Only the sites in the plate, scaled by two, are wrong.
    where = dict(sitewise(case.name)[1])
    for name, factor in {"p": 1.0, "w": 2.0, "v": 2.0, "b": 2.0}.items():
        torch.testing.assert_close(mutant[where[name]], factor * oracle[where[name]])


def test_the_sum_over_states_without_mutation_is_accepted() -> None:
    case = BY_NAME["collider"]
    table = states(case)
    total = sum(prob * torch.outer(s, s) for prob, scores in table for s in scores.values())
    assert agrees(total, sitewise(case.name)[0])


def data_score(case: Case) -> Tensor:
    """Score per datum `[num_data, num_params]` of the regression at its observed values."""
    x, y = case.args
    params = testing.parameters(case.model, *case.args)
    rows = []
    for index in range(len(x)):
        trace = poutine.trace(case.model).get_trace(x[index : index + 1], y[index : index + 1])
        gradients = torch.autograd.grad(trace.log_prob_sum(), list(params.values()))
        rows.append(torch.cat([gradient.reshape(-1) for gradient in gradients]))
    return torch.stack(rows)


def test_empirical_fisher_and_squared_mean_gradient_are_rejected() -> None:
    case = BY_NAME["regression"]
    scores, (oracle, _) = data_score(case), sitewise("regression")
    empirical = scores.mT @ scores
    mean = scores.mean(0)
    assert not agrees(empirical, oracle)
    assert not agrees(len(scores) * torch.outer(mean, mean), oracle)


# --- unit steps that are exact -----------------------------------------------------------------


def test_linear_gaussian_node_reaches_least_squares_in_one_step() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(50, 3), torch.randn(50, 2)

    def model(x: Tensor, y: Tensor) -> None:
        weight = pyro.param("weight", lambda: torch.ones(2, 3))
        bias = pyro.param("bias", lambda: torch.full((2,), -4.0))
        with pyro.plate("data", len(x)):
            fn = dist.Normal(F.linear(x, weight, bias), 0.7).to_event(1)
            pyro.sample("y", fn, obs=y)

    def guide(x: Tensor, y: Tensor) -> None:
        pass

    svi = pyronat.NaturalSVI(model, guide, unit_step(expectation="model"), loss=Trace_ELBO())
    svi.step(x, y)
    inputs = torch.cat([x, torch.ones(50, 1)], -1)
    solution = torch.linalg.lstsq(inputs, y).solution
    found = torch.cat([pyro.param("weight"), pyro.param("bias")[:, None]], -1)
    torch.testing.assert_close(found.detach(), solution.mT, rtol=0, atol=EXACT)


def test_conjugate_gaussian_reaches_its_posterior_in_one_step() -> None:
    # q(z) in natural coordinates (mean / variance, -1 / (2 variance)); prior N(0, 1),
    # x_i ~ N(z, 0.5²). The expected log joint is integrated in closed form.
    x = torch.tensor([1.3, 0.2, -0.4, 2.0])

    def guide() -> None:
        natural = pyro.param("natural", lambda: torch.tensor([2.0, -0.1]))
        variance = -0.5 / natural[1]
        pyro.sample("z", dist.Normal(natural[0] * variance, variance.sqrt()))

    guide()
    natural = pyro.param("natural").unconstrained()
    variance = -0.5 / natural[1]
    mean = natural[0] * variance
    prior = -(mean**2 + variance) / 2
    likelihood = -((x - mean) ** 2 + variance).sum() / (2 * 0.25)
    elbo = prior + likelihood + variance.log() / 2
    (gradient,) = torch.autograd.grad(elbo, natural)
    fisher = pyronat.fisher(guide, geometry=pyronat.Full(expectation="exact"))
    step = fisher.solve({"natural": gradient}, damping=0.0)["natural"]
    precision = 1 + len(x) / 0.25
    posterior = torch.stack([x.sum() / 0.25, torch.tensor(-precision / 2)])
    torch.testing.assert_close(natural.detach() + step, posterior, rtol=0, atol=1e-8)


# --- EM ----------------------------------------------------------------------------------------


def unit_step(expectation: str) -> pyronat.NaturalGradient:
    """A natural gradient without damping, averaging or a trust region."""
    return pyronat.NaturalGradient(
        lr=1.0,
        geometry=pyronat.Full(expectation=expectation),
        damping=pyronat.steps.ConstantDamping(0.0),
        curvature=pyronat.steps.RunningAverage(decay=0.0, refresh=1),
        trust_region=pyronat.steps.KLTrustRegion(model=math.inf),
        momentum=pyronat.steps.Momentum(0.0),
    )


def mixture_data(num_data: int = 200) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    component = torch.multinomial(
        torch.tensor([0.3, 0.4, 0.3]), num_data, replacement=True, generator=generator
    )
    noise = torch.randn(num_data, generator=generator, dtype=torch.float64)
    return torch.tensor([-2.5, 0.0, 2.5], dtype=torch.float64)[component] + noise


START = {
    "weights": torch.tensor([0.5, 0.3], dtype=torch.float64),
    "means": torch.tensor([-1.0, 0.3, 1.5], dtype=torch.float64),
    "variances": torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64),
}


def simplex(weights: Tensor) -> Tensor:
    return torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], -1)


def joint_log_prob(x: Tensor, values: Values) -> Tensor:
    """log p(z, x) `[num_data, num_components]`."""
    scale = values["variances"].sqrt()
    log_prob = torch.distributions.Normal(values["means"], scale).log_prob(x[:, None])
    return log_prob + simplex(values["weights"]).log()


def gradient_norm(x: Tensor, values: Values, fitted: tuple[str, ...]) -> float:
    """Norm of the gradient of the mean log-likelihood."""
    moved = {name: value.detach().clone() for name, value in values.items()}
    free = [moved[name].requires_grad_() for name in fitted]
    loss = joint_log_prob(x, moved).logsumexp(-1).mean()
    return torch.cat(torch.autograd.grad(loss, free)).norm().item()


def em_step(x: Tensor, values: Values, fitted: tuple[str, ...]) -> Values:
    posterior = joint_log_prob(x, values).softmax(-1)
    weights = posterior.mean(0)
    means = (posterior * x[:, None]).mean(0) / weights
    variances = (posterior * (x[:, None] - means) ** 2).mean(0) / weights
    new = {"weights": weights[:-1], "means": means, "variances": variances}
    return {name: new[name] if name in fitted else values[name] for name in values}


def iterations(
    x: Tensor, step: Callable[[Values], Values], fitted: tuple[str, ...], limit: int = 4000
) -> tuple[int, Values]:
    """Steps from the start until the gradient is below 1e-7, and where they end."""
    values = START
    for count in range(limit):
        if gradient_norm(x, values, fitted) < 1e-7:
            return count, values
        values = step(values)
    raise AssertionError(f"not converged in {limit} steps")


def mixture_of(fitted: tuple[str, ...]) -> Callable[[Tensor], None]:
    @config_enumerate
    def model(x: Tensor) -> None:
        values = {
            name: pyro.param(name, start.clone()) if name in fitted else start
            for name, start in START.items()
        }
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(simplex(values["weights"])))
            scale = values["variances"].sqrt()
            pyro.sample("x", dist.Normal(values["means"][z], scale[z]), obs=x)

    return model


def empty_guide(x: Tensor) -> None:
    pass


@pytest.mark.parametrize(
    "fitted",
    [("weights", "means"), ("weights", "means", "variances")],
    ids=["known_variances", "fitted_variances"],
)
def test_natural_gradient_with_posterior_expectation_follows_em(fitted: tuple[str, ...]) -> None:
    # With the posterior expectation, the unit step in (weights, means) is the M-step itself. A
    # variance differs by the square of the step of its mean, which vanishes at the solution.
    x = mixture_data()
    em_count, em_end = iterations(x, lambda values: em_step(x, values, fitted), fitted)
    assert 100 < em_count
    optim = unit_step(expectation="posterior")
    loss = TraceEnum_ELBO(max_plate_nesting=1)
    svi = pyronat.NaturalSVI(mixture_of(fitted), empty_guide, optim, loss=loss)

    def step(values: Values) -> Values:
        svi.step(x)
        return {
            name: pyro.param(name).detach().clone() if name in fitted else value
            for name, value in values.items()
        }

    if "variances" not in fitted:
        first = step(START)
        expected = em_step(x, START, fitted)
        for name in fitted:
            torch.testing.assert_close(first[name], expected[name], rtol=0, atol=EXACT)
        pyro.clear_param_store()
        svi = pyronat.NaturalSVI(
            mixture_of(fitted), empty_guide, unit_step(expectation="posterior"), loss=loss
        )
    count, end = iterations(x, step, fitted)
    assert count == pytest.approx(em_count, rel=0.02)
    for name in fitted:
        torch.testing.assert_close(end[name], em_end[name], rtol=0, atol=1e-4)


def to_mean_coordinates(values: Values) -> Tensor:
    """(π_k for k < K, π_k μ_k, π_k (μ_k² + σ_k²)) `[3 K - 1]`."""
    weights, means = simplex(values["weights"]), values["means"]
    second = weights * (means**2 + values["variances"])
    return torch.cat([values["weights"], weights * means, second])


def from_mean_coordinates(moments: Tensor) -> Values:
    weights, first, second = moments.split([2, 3, 3])
    means = first / simplex(weights)
    variances = second / simplex(weights) - means**2
    return {"weights": weights, "means": means, "variances": variances}


def test_natural_gradient_in_mean_coordinates_is_em() -> None:
    # One datum has the Fisher G, N have N G: the mean of the gradient goes with G.
    x = mixture_data()
    fitted = ("weights", "means", "variances")

    def model(x: Tensor) -> None:
        values = from_mean_coordinates(pyro.param("moments"))
        z = pyro.sample("z", dist.Categorical(simplex(values["weights"])))
        scale = values["variances"].sqrt()
        pyro.sample("x", dist.Normal(values["means"][z], scale[z]), obs=x)

    values = START
    for _ in range(5):
        expected = em_step(x, values, fitted)
        moments = to_mean_coordinates(values).requires_grad_()
        objective = joint_log_prob(x, from_mean_coordinates(moments)).logsumexp(-1).mean()
        (gradient,) = torch.autograd.grad(objective, moments)
        pyro.clear_param_store()
        pyro.param("moments", moments.detach())
        fisher = pyronat.fisher(model, x[0], geometry=pyronat.Full(expectation="exact"))
        step = fisher.solve({"moments": gradient}, damping=0.0)["moments"]
        moved = moments.detach() + step
        torch.testing.assert_close(moved, to_mean_coordinates(expected), rtol=0, atol=1e-9)
        values = from_mean_coordinates(moved)
