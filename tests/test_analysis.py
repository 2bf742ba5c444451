"""`pyronat.analyze` on the table of nets, and on what people do with Pyro."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from cases import BY_NAME, CASES, Block, Case
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoLowRankMultivariateNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import Tensor, nn
from torch.distributions import constraints

import pyronat
from pyronat import testing
from pyronat.blocks import ParamBlock
from pyronat.errors import UnsupportedDistribution, UnsupportedProgram
from pyronat.graph import BayesNet


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def parents_of(net: BayesNet) -> dict[str, frozenset[str]]:
    return {site.name: net.parents(site.name) for site in net.sites}


def matches(expected: Block, found: ParamBlock) -> bool:
    return (
        expected.params == frozenset(found.params)
        and expected.structure in {None, found.structure}
        and expected.count in {None, found.count}
        and expected.size in {None, found.size}
    )


# --- the table ---------------------------------------------------------------------------------


def test_sites_and_parents(case: Case) -> None:
    net = pyronat.analyze(case.model, *case.args)
    assert parents_of(net) == dict(case.parents)
    assert {site.name for site in net.sites if site.kind == "observed"} == case.observed
    assert {site.kind for site in net.sites} <= {"observed", "latent"}


def test_edges_are_those_of_tensors(case: Case) -> None:
    # No program of the table lets a value leave for Python, nor reads its data as an argument.
    net = pyronat.analyze(case.model, *case.args)
    assert {edge.kind for edge in net.edges} <= {"data"}
    assert all(site.reads_data == () for site in net.sites)


def test_blocks(case: Case) -> None:
    net = pyronat.analyze(case.model, *case.args)
    assert {frozenset(block.params) for block in net.blocks} == {b.params for b in case.blocks}
    for expected in case.blocks:
        (found,) = [block for block in net.blocks if frozenset(block.params) == expected.params]
        assert matches(expected, found), f"expected {expected}, found {found}"
        assert found.exact
    assert net.without_fisher == ()


def test_blocks_own_every_entry_once(case: Case) -> None:
    net = pyronat.analyze(case.model, *case.args)
    names = [name for block in net.blocks for name in block.params]
    assert sorted(names) == list(net.params)
    sizes = {name: leaf.numel() for name, leaf in pyro.get_param_store().named_parameters()}
    for block in net.blocks:
        assert block.count * block.size == sum(sizes[name] for name in block.params)
        assert {site for site, _ in block.factors} == set(block.sites)


def test_districts(case: Case) -> None:
    net = pyronat.analyze(case.model, *case.args)
    assert frozenset(frozenset(d.sites) for d in net.districts) == case.districts
    latent = {site.name for site in net.sites if site.kind == "latent"}
    for district in net.districts:
        assert set(district.hidden) == latent & set(district.sites)


def test_guide(case: Case) -> None:
    if case.guide is None:
        assert pyronat.analyze(case.model, *case.args).guide is None
        return
    net = pyronat.analyze(case.model, *case.args, guide=case.guide)
    assert net.guide is not None
    assert parents_of(net.guide) == dict(case.guide_parents)
    assert parents_of(net) == dict(case.parents)


def test_analysis_is_reproducible(case: Case) -> None:
    first = pyronat.analyze(case.model, *case.args, guide=case.guide)
    for seed in (1, 2):
        pyro.set_rng_seed(seed)
        again = pyronat.analyze(case.model, *case.args, guide=case.guide)
        assert again == first and hash(again) == hash(first)
        assert again.to_json() == first.to_json()


def test_random_numbers_are_left_alone(case: Case) -> None:
    state = torch.random.get_rng_state()
    pyronat.analyze(case.model, *case.args, guide=case.guide)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_parameters_are_left_alone(case: Case) -> None:
    testing.parameters(case.model, *case.args)
    store = pyro.get_param_store()
    before = {name: (leaf, leaf.detach().clone()) for name, leaf in store.named_parameters()}
    pyronat.analyze(case.model, *case.args)
    after = dict(store.named_parameters())
    assert after.keys() == before.keys()
    for name, (leaf, value) in before.items():
        assert after[name] is leaf and torch.equal(leaf, value) and leaf.grad is None


def test_arguments_are_left_alone(case: Case) -> None:
    before = [argument.clone() for argument in case.args]
    pyronat.analyze(case.model, *case.args, guide=case.guide)
    assert all(torch.equal(a, b) for a, b in zip(case.args, before, strict=True))


def test_tied_layer_is_one_joint_block() -> None:
    case = BY_NAME["tied"]
    net = pyronat.analyze(case.model, *case.args)
    (block,) = [block for block in net.blocks if "W" in block.params]
    assert block.sites == ("x", "y")


# --- first analysis ----------------------------------------------------------------------------


def test_parameters_are_created_once() -> None:
    made = []

    def initial() -> Tensor:
        made.append(1)
        return torch.randn(2)

    def model() -> None:
        p = pyro.param("p", initial)
        pyro.sample("z", dist.Bernoulli(logits=p).to_event(1))

    pyronat.analyze(model)
    value = pyro.param("p").detach().clone()
    pyronat.analyze(model)
    model()
    assert len(made) == 1
    assert torch.equal(pyro.param("p"), value)


def test_first_analysis_with_random_initial_values_leaves_the_generator() -> None:
    def model() -> None:
        p = pyro.param("p", lambda: torch.randn(2))
        pyro.sample("z", dist.Bernoulli(logits=p).to_event(1))

    state = torch.random.get_rng_state()
    pyronat.analyze(model)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_plates_keep_working() -> None:
    case = BY_NAME["subsample"]
    x = case.args[0]

    def model(x: Tensor) -> None:
        p = pyro.param("p", torch.zeros(()))
        with pyro.plate("data", 6, subsample_size=3) as indices:
            pyro.sample("x", dist.Bernoulli(logits=p).expand([3]), obs=x[indices % 3])

    net = pyronat.analyze(model, x)
    assert net.sites[0].plates == ("data",) and net.sites[0].shape == (3,)
    trace = poutine.trace(model).get_trace(x)
    assert float(trace.nodes["x"]["scale"]).as_integer_ratio() == (2, 1)
    assert [frame.dim for frame in trace.nodes["x"]["cond_indep_stack"]] == [-1]


def test_sequential_plates_and_nested_plates() -> None:
    def model() -> None:
        p = pyro.param("p", torch.zeros(()))
        outer, inner = pyro.plate("outer", 2, dim=-2), pyro.plate("inner", 3, dim=-1)
        with outer, inner:
            z = pyro.sample("z", dist.Bernoulli(logits=p))
        for i in pyro.plate("loop", 2):
            pyro.sample(f"x{i}", dist.Normal(z[i].sum(), 1.0))

    net = pyronat.analyze(model)
    assert {site.name: set(site.plates) for site in net.sites} == {
        "z": {"outer", "inner"},
        "x0": set(),
        "x1": set(),
    }
    assert net.parents("x0") == net.parents("x1") == {"z"}


# --- edges -------------------------------------------------------------------------------------


def autoregressive(x: Tensor) -> None:
    """Reads the data from its argument instead of the sampled values."""
    b = pyro.param("b", torch.tensor(0.2))
    w = pyro.param("w", torch.tensor(0.7))
    for time in range(len(x)):
        before = x[time - 1] if time else torch.zeros(())
        pyro.sample(f"x{time}", dist.Normal(w * before + b, 1.0), obs=x[time])


def autoregressive_by_values(x: Tensor) -> None:
    b = pyro.param("b", torch.tensor(0.2))
    w = pyro.param("w", torch.tensor(0.7))
    before = torch.zeros(())
    for time in range(len(x)):
        before = pyro.sample(f"x{time}", dist.Normal(w * before + b, 1.0), obs=x[time])


def test_autoregressive_data_are_edges() -> None:
    x = torch.tensor([0.3, -0.1, 0.9])
    net = pyronat.analyze(autoregressive, x)
    assert parents_of(net) == {"x0": frozenset(), "x1": {"x0"}, "x2": {"x1"}}
    assert {site.name: site.reads_data for site in net.sites} == {
        "x0": (),
        "x1": ("x0",),
        "x2": ("x1",),
    }


def test_autoregressive_values_are_plain_edges() -> None:
    x = torch.tensor([0.3, -0.1, 0.9])
    net = pyronat.analyze(autoregressive_by_values, x)
    assert parents_of(net) == {"x0": frozenset(), "x1": {"x0"}, "x2": {"x1"}}
    assert all(site.reads_data == () for site in net.sites)


def test_site_may_not_read_its_own_data() -> None:
    # A teacher-forced site whose distribution reads the data it scores.
    def model(x: Tensor) -> None:
        p = pyro.param("p", torch.zeros(()))
        pyro.sample("x", dist.Normal(p * x, 1.0), obs=x)

    net = pyronat.analyze(model, torch.ones(3))
    assert net.sites[0].reads_data == ("x",)
    assert net.parents("x") == frozenset()


def item_branch() -> None:
    z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)))
    loc = 1.0 if z.item() > 0.5 else -1.0
    pyro.sample("x", dist.Normal(loc, 1.0))


def truth_branch() -> None:
    z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)))
    pyro.sample("x", dist.Normal(1.0 if z else -1.0, 1.0))


def numpy_branch() -> None:
    z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)))
    pyro.sample("x", dist.Normal(float(z.numpy()), 1.0))


def list_index() -> None:
    z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)))
    pyro.sample("x", dist.Normal([-1.0, 1.0][int(z)], 1.0))


@pytest.mark.parametrize("model", [item_branch, truth_branch, numpy_branch, list_index])
def test_values_that_leave_for_python_are_control_edges(model: Callable[[], None]) -> None:
    net = pyronat.analyze(model)
    assert net.parents("x") == {"z"}
    assert [edge.kind for edge in net.edges] == ["control"]


def detached() -> Tensor:
    z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)))
    return z.detach() * 2.0 + 0.1


def compared() -> Tensor:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    return (z > 0).to(torch.float64)


def indexed() -> Tensor:
    z = pyro.sample("z", dist.Categorical(torch.ones(3)))
    return torch.tensor([1.0, 2.0, 3.0])[z]


def written() -> Tensor:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    buffer = torch.zeros(2)
    buffer[1] = z
    return buffer.sum()


def without_gradient() -> Tensor:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with torch.no_grad():
        return z * 2.0


@pytest.mark.parametrize("read", [detached, compared, indexed, written, without_gradient])
def test_edges_that_autograd_does_not_see(read: Callable[[], Tensor]) -> None:
    def model() -> None:
        loc = read()
        pyro.sample("x", dist.Normal(loc, 1.0))
        pyro.sample("y", dist.Normal(0.0, 1.0))

    net = pyronat.analyze(model)
    assert net.parents("x") == {"z"}
    assert net.parents("y") == frozenset()
    assert {edge.kind for edge in net.edges} == {"data"}


def test_scale_and_mask() -> None:
    # A mask computed from a value is a dependence too.
    def model() -> None:
        z = pyro.sample("z", dist.Bernoulli(torch.full((2,), 0.5)).to_event(1))
        with poutine.mask(mask=z > 0.5):
            pyro.sample("x", dist.Normal(torch.zeros(2), 1.0))

    assert pyronat.analyze(model).parents("x") == {"z"}


def test_deterministic_factor_and_delta_sites_are_ignored() -> None:
    def model() -> None:
        p = pyro.param("p", torch.tensor(0.3))
        z = pyro.sample("z", dist.Normal(p, 1.0))
        twice = pyro.deterministic("twice", 2 * z)
        pyro.factor("penalty", -(z**2))
        fixed = pyro.sample("fixed", dist.Delta(twice + 1))
        pyro.sample("x", dist.Normal(fixed, 1.0), obs=torch.tensor(0.1))

    net = pyronat.analyze(model)
    assert [site.name for site in net.sites] == ["z", "x"]
    assert net.parents("x") == {"z"}
    assert [block.params for block in net.blocks] == [("p",)]


# --- parameters --------------------------------------------------------------------------------


def test_unregistered_parameter_is_refused() -> None:
    layer = nn.Linear(2, 3)

    def model() -> None:
        h = pyro.sample("h", dist.Bernoulli(torch.full((2,), 0.5)).to_event(1))
        pyro.sample("reading", dist.Bernoulli(logits=layer(h)).to_event(1))

    with pytest.raises(UnsupportedProgram, match=r"site 'reading'.*shape \(3,.*pyro.module"):
        pyronat.analyze(model)
    layer.requires_grad_(False)
    assert pyronat.analyze(model).blocks == ()


def test_registered_parameter_beside_an_unregistered_one() -> None:
    layer = nn.Linear(2, 3, bias=False)

    def model() -> None:
        bias = pyro.param("bias", torch.zeros(3))
        pyro.sample("x", dist.Bernoulli(logits=layer(torch.ones(2)) + bias).to_event(1))

    with pytest.raises(UnsupportedProgram, match="site 'x'"):
        pyronat.analyze(model)


class Twice(dist.Normal):
    """A user's family, known by its samples and its density alone."""

    def log_prob(self, value: Tensor) -> Tensor:
        return super().log_prob(value) + torch.zeros(())


def test_family_without_closed_form_gives_an_inexact_block() -> None:
    def model() -> None:
        p, q = pyro.param("p", torch.tensor(0.3)), pyro.param("q", torch.tensor(0.1))
        z = pyro.sample("z", Twice(p, q.exp()))
        pyro.sample("x", dist.Normal(z, pyro.param("s", torch.ones(()))), obs=torch.tensor(0.0))

    net = pyronat.analyze(model)
    exact = {block.params: block.exact for block in net.blocks}
    assert exact == {("p", "q"): False, ("s",): True}
    assert {factor for block in net.blocks for factor in block.factors} == {
        ("z", "score"),
        ("x", "scale"),
    }
    dense, slices = pyronat.fisher(model, geometry=pyronat.Full("model"), num_samples=150).dense()
    assert [name for name, _ in slices] == ["p", "q", "s"]
    # 9,600 values: the standard errors are about 1.5 % and 4 %.
    torch.testing.assert_close(dense[0, 0], torch.tensor(-0.2).exp(), rtol=0.08, atol=0)
    torch.testing.assert_close(dense[1, 1], torch.tensor(2.0), rtol=0.16, atol=0)
    assert abs(dense[0, 1]) < 0.15


def test_family_without_parameters_is_no_block() -> None:
    def model() -> None:
        z = pyro.sample("z", Twice(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, pyro.param("s", torch.ones(()))), obs=torch.tensor(0.0))

    net = pyronat.analyze(model)
    assert [(block.params, block.exact) for block in net.blocks] == [(("s",), True)]
    assert net.parents("x") == {"z"}


def test_inexact_block_spreads_through_shared_parameters() -> None:
    def model() -> None:
        p = pyro.param("p", torch.tensor(0.3))
        pyro.sample("z", Twice(p, 1.0))
        pyro.sample("x", dist.Normal(p, 1.0), obs=torch.tensor(0.0))

    (block,) = pyronat.analyze(model).blocks
    assert not block.exact and block.sites == ("z", "x")


def test_parameters_of_a_moving_support_have_no_fisher() -> None:
    def model() -> None:
        high = pyro.param("high", torch.tensor(2.0))
        z = pyro.sample("z", dist.Uniform(0.0, high))
        pyro.sample("x", dist.Normal(z, pyro.param("s", torch.ones(()))), obs=torch.tensor(0.0))

    net = pyronat.analyze(model)
    assert net.without_fisher == (("high", "z (Uniform) has no Fisher information"),)
    assert [block.params for block in net.blocks] == [("s",)]
    assert "without a Fisher: high (z (Uniform) has no Fisher information)" in str(net)

    def both() -> None:
        high = pyro.param("high", torch.tensor(2.0))
        pyro.sample("z", dist.Uniform(0.0, high))
        pyro.sample("x", dist.Normal(0.0, high), obs=torch.tensor(0.0))

    with pytest.raises(UnsupportedDistribution, match=r"'high' .* z \(Uniform\)"):
        pyronat.analyze(both)


def test_parameters_without_a_fisher_are_reported() -> None:
    def model() -> None:
        pyro.param("unused", torch.zeros(2))
        frozen = pyro.param("frozen", torch.zeros(()))
        frozen.unconstrained().requires_grad_(False)
        pyro.factor("penalty", pyro.param("weight", torch.ones(())))
        pyro.sample("x", dist.Normal(frozen, pyro.param("s", torch.ones(()))))

    net = pyronat.analyze(model)
    assert dict(net.without_fisher) == {
        "unused": "reaches no random site",
        "weight": "reaches no random site",
        "frozen": "requires no gradient",
    }
    assert "without a Fisher: unused" in str(net)


def test_loc_and_scale_are_orthogonal() -> None:
    def model() -> None:
        loc = pyro.param("loc", torch.zeros(3))
        scale = pyro.param("scale", torch.ones(3), constraint=constraints.positive)
        pyro.sample("x", dist.Normal(loc, scale).to_event(1))

    net = pyronat.analyze(model)
    assert [(b.params, b.structure, b.count) for b in net.blocks] == [
        (("loc",), "unit", 3),
        (("scale",), "unit", 3),
    ]


def test_gamma_coordinates_are_one_group() -> None:
    def model() -> None:
        a = pyro.param("a", torch.ones(3), constraint=constraints.positive)
        b = pyro.param("b", torch.ones(3), constraint=constraints.positive)
        pyro.sample("x", dist.Gamma(a, b).to_event(1))

    (block,) = pyronat.analyze(model).blocks
    assert block.params == ("a", "b")
    assert (block.structure, block.count, block.size) == ("unit", 3, 2)


def test_one_scalar_parameter_for_two_groups_joins_them() -> None:
    def model() -> None:
        p = pyro.param("p", torch.tensor(0.3))
        q = pyro.param("q", torch.tensor(0.3))
        pyro.sample("x", dist.Normal(p + q, p.exp()))

    (block,) = pyronat.analyze(model).blocks
    assert block.params == ("p", "q")
    assert block.factors == (("x", "loc"), ("x", "scale"))


def test_batch_as_large_as_the_fan_in_is_no_table_of_biases() -> None:
    # A matrix with as many entries as the coordinates is a weight all the same.
    def model(x: Tensor) -> None:
        weight = pyro.param("weight", torch.eye(3))
        with pyro.plate("data", 3):
            pyro.sample("y", dist.Bernoulli(logits=F.linear(x, weight)).to_event(1))

    (block,) = pyronat.analyze(model, torch.randn(3, 3)).blocks
    assert (block.structure, block.count, block.size) == ("unit", 3, 3)


# --- modules and guides ------------------------------------------------------------------------


def test_module() -> None:
    encoder = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3))

    def model(x: Tensor) -> None:
        net = pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=net(x)).to_event(1))

    (block,) = pyronat.analyze(model, torch.randn(5, 2)).blocks
    assert block.structure == "dense" and block.size == 4 * 3 + 3 * 5
    assert block.params[0] == "encoder$$$0.bias"


class Bayesian(PyroModule):
    """Prior weights are sampled; the noise is a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = PyroModule[nn.Linear](2, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))
        self.noise = PyroParam(torch.tensor(1.0), constraint=constraints.positive)

    def forward(self, x: Tensor, y: Tensor) -> None:
        mean = self.linear(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, self.noise), obs=y)


def test_pyro_module_with_sampled_weights() -> None:
    net = pyronat.analyze(Bayesian(), torch.randn(4, 2), torch.randn(4))
    assert net.parents("y") == {"linear.weight"}
    assert {block.params for block in net.blocks} == {("linear.bias",), ("noise",)}


def gaussian(x: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    w = pyro.sample("w", dist.Gamma(2.0, 1.0))
    pyro.sample("x", dist.Normal(z.sum() * w, 1.0), obs=x)


def test_auto_normal() -> None:
    guide = AutoNormal(gaussian)
    net = pyronat.analyze(gaussian, torch.tensor(0.3), guide=guide).guide
    assert net is not None
    assert {block.params for block in net.blocks} == {
        ("AutoNormal.locs.z",),
        ("AutoNormal.scales.z",),
        ("AutoNormal.locs.w",),
        ("AutoNormal.scales.w",),
    }
    assert all(block.exact and block.structure == "unit" for block in net.blocks)
    assert all(net.parents(site.name) == frozenset() for site in net.sites)


def test_auto_guides_that_have_no_family() -> None:
    net = pyronat.analyze(gaussian, torch.tensor(0.3), guide=AutoDelta(gaussian)).guide
    assert net is not None and net.sites == () and len(net.without_fisher) == 2
    guide = AutoLowRankMultivariateNormal(gaussian)
    low_rank = pyronat.analyze(gaussian, torch.tensor(0.3), guide=guide).guide
    assert low_rank is not None and [block.exact for block in low_rank.blocks] == [True, True]


def test_keyword_arguments_reach_both_programs() -> None:
    def model(*, scale: float) -> None:
        pyro.sample("z", dist.Normal(pyro.param("p", torch.zeros(())), scale))

    def guide(*, scale: float) -> None:
        pyro.sample("z", dist.Normal(pyro.param("q", torch.zeros(())), scale))

    net = pyronat.analyze(model, guide=guide, scale=2.0)
    assert net.params == ("p",) and net.guide is not None and net.guide.params == ("q",)


def test_errors_of_the_program_are_the_programs() -> None:
    def model() -> None:
        raise KeyError("mine")

    state = torch.random.get_rng_state()
    with pytest.raises(KeyError, match="mine"):
        pyronat.analyze(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert pyro.infer.util.is_validation_enabled()


def test_effects_around_the_analysis_see_nothing() -> None:
    with poutine.trace() as outer:
        pyronat.analyze(gaussian, torch.tensor(0.3))
    assert not any(site["type"] == "sample" for site in outer.trace.nodes.values())


def test_gradient_mode_of_the_caller_does_not_matter() -> None:
    case = BY_NAME["sbn"]
    expected = pyronat.analyze(case.model, *case.args)
    with torch.no_grad():
        assert pyronat.analyze(case.model, *case.args) == expected
        assert not torch.is_grad_enabled()


def test_report_names_everything(case: Case) -> None:
    net = pyronat.analyze(case.model, *case.args, guide=case.guide)
    text = str(net)
    content: dict[str, Any] = json.loads(net.to_json())
    for name in [*case.parents, *net.params]:
        assert name in text
    assert [site["name"] for site in content["sites"]] == [site.name for site in net.sites]
    assert len(content["blocks"]) == len(case.blocks)
