"""Effect handlers around model and guide: the sites, parameters and Fisher information they leave.

The reference is the Hessian of the divergences of all sites at the values of the loss's own trace.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from measured import (
    Program,
    divergence_hessian,
    latent_values,
    leaves_of,
    matrix_of,
    sizes_of,
    still_step,
)
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.infer.reparam import (
    HaarReparam,
    LocScaleReparam,
    NeuTraReparam,
    StudentTReparam,
    SymmetricStableReparam,
    TransformReparam,
)
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import Tensor
from torch.distributions import constraints

import pyronat
from pyronat import Euclidean, Full, NaturalGradient, NaturalSVI
from pyronat.errors import StructureChanged, UnassignedParameter, UnsupportedProgram

EXACT = 1e-10


def randn(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


X = randn(1, 6) + 1


def positive(name: str, value: float) -> Tensor:
    return pyro.param(name, torch.tensor(value), constraint=constraints.positive)


def number(name: str, value: float) -> Tensor:
    return pyro.param(name, torch.tensor(value))


def check(model: Program, *args: Any, guide: Program | None = None, loss: Any = None) -> NaturalSVI:
    """One step measures what the reference says, for the model and for the guide."""
    guide = AutoNormal(model) if guide is None else guide
    svi = still_step(model, guide, *args, loss=loss)
    traces = svi.loss.traces
    for role, program, trace in zip(("model", "guide"), (model, guide), traces, strict=True):
        if not leaves_of(poutine.trace(program).get_trace(*args)):
            continue
        values = latent_values(trace)
        reference, leaves = divergence_hessian(program, values, *args)
        found = matrix_of(svi, role, sizes_of(leaves))
        torch.testing.assert_close(found, reference, rtol=1e-9, atol=1e-9)
    return svi


def trains(model: Program, *args: Any, guide: Program | None = None, steps: int = 60) -> None:
    pyro.clear_param_store()
    guide = AutoNormal(model) if guide is None else guide
    svi = NaturalSVI(model, guide, NaturalGradient(0.05), Trace_ELBO(num_particles=4))
    losses = [svi.step(*args) for _ in range(steps)]
    assert sum(losses[-10:]) < sum(losses[:10])


def sites(svi: NaturalSVI) -> dict[str, str]:
    return {site.name: site.kind for site in svi.net.sites}


# --- reparametrization --------------------------------------------------------------------------


def hierarchy(x: Tensor) -> None:
    loc, scale = number("loc", 0.5), positive("scale", 1.5)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(loc, scale))
        pyro.sample("x", dist.Normal(z, positive("noise", 0.7)), obs=x)


def log_normal(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.LogNormal(number("loc", 0.2), positive("scale", 0.5)))
        pyro.sample("x", dist.Normal(z, positive("noise", 0.7)), obs=x)


def transformed(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        base = dist.Normal(number("loc", 0.2), positive("scale", 0.5))
        fn = dist.TransformedDistribution(base, [dist.transforms.ExpTransform()])
        z = pyro.sample("z", fn)
        pyro.sample("x", dist.Normal(z, positive("noise", 0.7)), obs=x)


def heavy(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.StudentT(5.0, number("loc", 0.2), positive("scale", 0.5)))
        pyro.sample("x", dist.Normal(z, 0.7), obs=x)


def stable(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Stable(1.5, 0.0, positive("scale", 0.5), number("loc", 0.2)))
        pyro.sample("x", dist.Normal(z, positive("noise", 0.7)), obs=x)


def walk(x: Tensor) -> None:
    scale = positive("scale", 0.8)
    z = pyro.sample("z", dist.Normal(torch.zeros(4), scale).to_event(1))
    pyro.sample("x", dist.Normal(z, positive("noise", 0.7)).to_event(1), obs=x[:4])


REPARAMETRIZED: dict[str, tuple[Program, Callable[[], Any], dict[str, str]]] = {
    "centered at 0": (
        hierarchy,
        lambda: LocScaleReparam(0.0),
        {"z_decentered": "latent", "x": "observed"},
    ),
    "centered at 0.3": (
        hierarchy,
        lambda: LocScaleReparam(0.3),
        {"z_decentered": "latent", "x": "observed"},
    ),
    "learned centering": (
        hierarchy,
        LocScaleReparam,
        {"z_decentered": "latent", "x": "observed"},
    ),
    "transform": (transformed, TransformReparam, {"z_base": "latent", "x": "observed"}),
    "Student t": (
        heavy,
        StudentTReparam,
        {"z": "latent", "z_gamma": "latent", "x": "observed"},
    ),
    "symmetric stable": (
        stable,
        SymmetricStableReparam,
        {"z": "latent", "z_uniform": "latent", "z_exponential": "latent", "x": "observed"},
    ),
    "Haar": (walk, lambda: HaarReparam(dim=-1), {"z_haar": "latent", "x": "observed"}),
}


@pytest.mark.parametrize("name", REPARAMETRIZED)
def test_reparametrized_sites_are_those_that_are_measured(name: str) -> None:
    program, strategy, expected = REPARAMETRIZED[name]
    model = poutine.reparam(program, config={"z": strategy()})
    svi = check(model, X)
    assert sites(svi) == expected
    assert "z" in {site.name for site in pyronat.analyze(program, X).sites}
    trains(model, X)


def test_a_flow_of_a_trained_guide_reparametrizes() -> None:
    def model(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
        spread = pyro.sample("spread", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, spread), obs=x)

    trained = AutoMultivariateNormal(model)
    svi = NaturalSVI(model, trained, NaturalGradient(0.1))
    for _ in range(50):
        svi.step(X)
    trained.requires_grad_(False)
    neutral = NeuTraReparam(trained).reparam(model)
    pyro.clear_param_store()
    guide = AutoNormal(neutral)
    svi = check(neutral, X, guide=guide)
    assert [s.kind for s in svi.net.sites if s.name.endswith("shared_latent")] == ["latent"]


# --- lift, condition, do, block, uncondition, substitute ----------------------------------------


def test_a_lifted_parameter_is_a_site() -> None:
    model = poutine.lift(hierarchy, prior={"loc": dist.Normal(0.0, 1.0)})
    svi = check(model, X)
    assert sites(svi) == {"loc": "latent", "z": "latent", "x": "observed"}
    assert set(svi.net.params) == {"scale", "noise"}
    assert svi.net.parents("z") == {"loc"}
    trains(model, X)
    # Negative control.
    pyro.clear_param_store()
    assert "loc" in pyronat.analyze(hierarchy, X).params


def test_a_conditioned_site_is_observed() -> None:
    model = poutine.condition(hierarchy, data={"z": 2 * X})
    svi = check(model, X, guide=lambda x: None)
    assert sites(svi) == {"z": "observed", "x": "observed"}
    names = sorted(svi.net.params)
    found = matrix_of(svi, "model", dict.fromkeys(names, 1))
    # loc, then logarithms of noise and scale
    expected = {"loc": len(X) / 1.5**2, "noise": 2 * len(X), "scale": 2 * len(X)}
    torch.testing.assert_close(found, torch.diag(torch.tensor([expected[n] for n in names])))


def test_an_intervention_cuts_what_follows_from_the_site() -> None:
    def chain(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(number("top", 0.3), 1.0))
            b = pyro.sample("b", dist.Normal(number("slope", 0.5) * a, 1.0))
            pyro.sample("x", dist.Normal(b, positive("noise", 0.7)), obs=x)

    model = poutine.do(chain, data={"b": torch.ones(len(X))})
    svi = check(model, X)
    # The site itself stays, what follows from it does not.
    assert sites(svi) == {"a": "latent", "b": "latent", "x": "observed"}
    assert svi.net.parents("x") == frozenset() and svi.net.parents("b") == {"a"}
    a = svi.loss.traces[0].nodes["a"]["value"].detach()
    found = matrix_of(svi, "model", {"noise": 1, "slope": 1, "top": 1})
    expected = torch.stack([torch.tensor(12.0), a.square().sum(), torch.tensor(6.0)])
    torch.testing.assert_close(found, torch.diag(expected))
    # Negative control.
    pyro.clear_param_store()
    assert pyronat.analyze(chain, X).parents("x") == {"b"}


def test_a_hidden_parameter_is_named() -> None:
    hidden = poutine.block(hierarchy, hide=["loc"])
    svi = NaturalSVI(hidden, AutoNormal(hierarchy), NaturalGradient())
    with pytest.raises(UnsupportedProgram, match=r"'z' .* parameter 'loc', .* poutine.block"):
        svi.step(X)


def test_a_hidden_site_is_noise() -> None:
    """What hides a random site leaves randomness that no site accounts for; it still runs."""
    model = poutine.block(hierarchy, hide=["z"])
    svi = NaturalSVI(model, lambda x: None, NaturalGradient(0.1))
    losses = [svi.step(X) for _ in range(40)]
    assert sites(svi) == {"x": "observed"}
    assert set(svi.net.params) == {"loc", "noise", "scale"}
    assert sum(losses[-10:]) < sum(losses[:10])
    owners = svi.optim.assignment(["loc", "noise", "scale"])
    assert set(owners.values()) == {"natural"}


@pytest.mark.filterwarnings("ignore:Found vars in model but not guide")
def test_an_unconditioned_model_samples_its_data() -> None:
    model = poutine.uncondition(hierarchy)
    svi = check(model, X, guide=AutoNormal(poutine.block(hierarchy, hide=["x"])))
    assert sites(svi) == {"z": "latent", "x": "latent"}


def test_a_substituted_parameter_is_a_constant() -> None:
    model = poutine.substitute(hierarchy, data={"scale": torch.tensor(2.0)})
    svi = check(model, X)
    assert ("scale", "requires no gradient") in svi.net.without_fisher
    (block,) = [block for block in svi.net.blocks if "loc" in block.params]
    assert block.params == ("loc",)
    # The value that was put in counts.
    sizes = {"loc": 1, "noise": 1}
    torch.testing.assert_close(matrix_of(svi, "model", sizes)[0, 0], torch.tensor(len(X) / 4))


# --- scale, mask, obs_mask ----------------------------------------------------------------------


def test_scales_multiply_and_masks_drop() -> None:
    seen = torch.tensor([True, True, False, True, False, True])
    weight = torch.tensor([1.0, 2.0, 3.0, 0.5, 1.0, 1.0])

    def model(x: Tensor) -> None:
        with poutine.scale(scale=3.0), pyro.plate("data", len(x)):
            with poutine.scale(scale=weight), poutine.mask(mask=seen):
                z = pyro.sample("z", dist.Normal(number("loc", 0.5), 2.0))
            pyro.sample("x", dist.Normal(z, positive("noise", 0.7)).mask(seen), obs=x)

    def guide(x: Tensor) -> None:
        loc = pyro.param("q.loc", torch.zeros(len(x)))
        with poutine.scale(scale=3.0), pyro.plate("data", len(x)):
            with poutine.scale(scale=weight), poutine.mask(mask=seen):
                pyro.sample("z", dist.Normal(loc, 0.5))

    svi = check(model, X, guide=guide)
    found = matrix_of(svi, "model", {"loc": 1, "noise": 1})
    counted = 3 * float((weight * seen).sum()) / 4
    torch.testing.assert_close(
        found, torch.diag(torch.tensor([counted, 3 * 2.0 * int(seen.sum())]))
    )
    proposed = matrix_of(svi, "guide", {"q.loc": 6})
    torch.testing.assert_close(proposed, torch.diag(3 * weight * seen / 0.25))


def test_missing_values_are_a_site_of_their_own() -> None:
    seen = torch.tensor([True, False, True, True, False, True])

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            noise = positive("noise", 0.7)
            pyro.sample("x", dist.Normal(number("loc", 0.5), noise), obs=x, obs_mask=seen)

    svi = check(model, X)
    assert sites(svi) == {"x_observed": "observed", "x_unobserved": "latent"}
    found = matrix_of(svi, "model", {"loc": 1, "noise": 1})
    # Both halves count in the loss, each where its mask is on.
    torch.testing.assert_close(found, torch.diag(torch.tensor([6 / 0.49, 12.0])))


# --- modules ------------------------------------------------------------------------------------


class Bayesian(PyroModule):
    """A random slope, a parameter, and a plain layer."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = PyroSample(dist.Normal(0.0, 1.0))
        self.noise = PyroParam(torch.tensor(0.7), constraints.positive)
        self.layer = PyroModule[torch.nn.Linear](2, 1)
        self.layer.bias = PyroSample(dist.Normal(0.0, 3.0).expand([1]).to_event(1))
        self.layer.double()

    def forward(self, x: Tensor, y: Tensor) -> None:
        slope, noise = self.slope, self.noise
        loc = self.layer(x).squeeze(-1) + slope * x[:, 0]
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(loc, noise), obs=y)


def test_modules_with_random_attributes() -> None:
    x, y = randn(3, 8, 2), randn(4, 8)
    model = Bayesian()
    svi = check(model, x, y)
    assert sites(svi) == {"slope": "latent", "layer.bias": "latent", "y": "observed"}
    assert set(svi.net.params) == {"noise", "layer.weight"}
    assert svi.net.parents("y") == {"slope", "layer.bias"}
    found = matrix_of(svi, "model", {"layer.weight": 2, "noise": 1})
    torch.testing.assert_close(found[:2, :2], x.T @ x / 0.49)


def test_a_registered_module_is_measured() -> None:
    x, y = randn(3, 8, 2), randn(4, 8)
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))
    net.double()

    def model(x: Tensor, y: Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(net(x).squeeze(-1), 0.5), obs=y)

    svi = check(model, x, y, guide=lambda x, y: None)
    assert all(name.startswith("net$$$") for name in svi.net.params)
    assert len(svi.net.params) == 4


def test_a_module_that_is_not_registered_is_named() -> None:
    net = torch.nn.Linear(2, 1).double()

    def model(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(net(x).squeeze(-1), 0.5), obs=y)

    svi = NaturalSVI(model, lambda x, y: None, NaturalGradient())
    with pytest.raises(UnsupportedProgram, match=r"site 'y' .* pyro.module"):
        svi.step(randn(3, 8, 2), randn(4, 8))


def test_a_module_of_the_guide_may_be_registered_by_the_model() -> None:
    """As in stock SVI, which trains what either of them shows to Pyro."""
    torch.manual_seed(0)
    encoder = torch.nn.Linear(1, 1).double()

    def model(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, positive("noise", 0.7)), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x.unsqueeze(-1)).squeeze(-1), 0.5))

    svi = still_step(model, guide, X)
    inputs = torch.stack([torch.ones(len(X)), X], 1)  # bias, weight
    found = matrix_of(svi, "guide", {"encoder$$$bias": 1, "encoder$$$weight": 1})
    torch.testing.assert_close(found, inputs.mT @ inputs / 0.25)
    before = encoder.weight.detach().clone()
    NaturalSVI(model, guide, NaturalGradient(0.1)).step(X)
    assert not torch.equal(encoder.weight, before)


def test_a_parameter_that_neither_registers_is_named() -> None:
    """It is in Pyro's store from elsewhere, so that no step of this program would train it."""
    net = torch.nn.Linear(2, 1).double()
    pyro.module("net", net)

    def model(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(net(x).squeeze(-1), 0.5), obs=y)

    svi = NaturalSVI(model, lambda x, y: None, NaturalGradient())
    with pytest.raises(UnsupportedProgram, match=r"site 'y' .* 'net\$\$\$.* pyro.module"):
        svi.step(randn(3, 8, 2), randn(4, 8))


def test_a_model_without_parameters_need_not_be_simulated() -> None:
    """A site that reads the data from the arguments is no obstacle where nothing is measured."""

    def model(x: Tensor) -> None:
        drift = pyro.sample("drift", dist.Normal(0.0, 1.0))
        for time in range(1, len(x)):
            pyro.sample(f"x{time}", dist.Normal(x[time - 1] + drift, 1.0), obs=x[time])

    svi = NaturalSVI(model, AutoNormal(model), NaturalGradient(0.1))
    losses = [svi.step(X) for _ in range(40)]
    assert sum(losses[-10:]) < sum(losses[:10])

    # Negative control: with a parameter, it is.
    def learned(x: Tensor) -> None:
        for time in range(1, len(x)):
            pyro.sample(
                f"x{time}", dist.Normal(x[time - 1] + number("drift", 0.0), 1.0), obs=x[time]
            )

    svi = NaturalSVI(learned, lambda x: None, NaturalGradient(0.1))
    with pytest.raises(
        UnsupportedProgram, match=r"reads the data .* Full\(expectation='posterior'\)"
    ):
        svi.step(X)


def test_a_module_used_by_model_and_guide_is_named() -> None:
    net = torch.nn.Linear(1, 1).double()

    def model(x: Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(net(z.unsqueeze(-1)).squeeze(-1), 1.0), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(net(x.unsqueeze(-1)).squeeze(-1), 1.0))

    svi = NaturalSVI(model, guide, NaturalGradient())
    with pytest.raises(UnassignedParameter, match=r"net\$\$\$.* exclude"):
        svi.step(X)
    # The way out.
    svi = NaturalSVI(model, guide, NaturalGradient(exclude=["net*"]))
    assert isinstance(svi.step(X), float)


# --- plates -------------------------------------------------------------------------------------


def sequential(x: Tensor) -> None:
    loc = number("loc", 0.5)
    for i in pyro.plate("data", len(x)):
        z = pyro.sample(f"z{i}", dist.Normal(loc, 1.5))
        pyro.sample(f"x{i}", dist.Normal(z, positive("noise", 0.7)), obs=x[i])


def vectorized(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(number("loc", 0.5), 1.5))
        pyro.sample("x", dist.Normal(z, positive("noise", 0.7)), obs=x)


def sequential_guide(x: Tensor) -> None:
    for i in pyro.plate("data", len(x)):
        pyro.sample(f"z{i}", dist.Normal(number(f"q{i}", 0.1 * i), 0.5))


def test_sequential_and_vectorized_plates_have_one_fisher() -> None:
    sizes = {"loc": 1, "noise": 1}
    first = matrix_of(check(sequential, X, guide=sequential_guide), "model", sizes)
    pyro.clear_param_store()
    second = matrix_of(check(vectorized, X), "model", sizes)
    torch.testing.assert_close(first, second)
    assert float(first.diagonal().min()) > 0


def test_a_sequential_subsample_stands_for_all() -> None:
    def model(x: Tensor) -> None:
        for i in pyro.plate("data", len(x), subsample=torch.tensor([1, 4])):
            pyro.sample(f"x{i}", dist.Normal(number("loc", 0.5), 1.5), obs=x[i])

    svi = check(model, X, guide=lambda x: None)
    found = matrix_of(svi, "model", {"loc": 1})
    torch.testing.assert_close(found, torch.tensor([[len(X) / 1.5**2]]))


def test_nested_plates_with_a_subsample() -> None:
    data = randn(5, 4, 6)

    def model(x: Tensor) -> None:
        columns = pyro.plate("columns", 6, subsample_size=3, dim=-1)
        rows = pyro.plate("rows", 4, dim=-2)
        loc = pyro.param("loc", torch.zeros(4, 1))
        with rows:
            shift = pyro.sample("shift", dist.Normal(loc, 1.0))
        with rows, columns as index:
            pyro.sample("x", dist.Normal(shift, positive("noise", 0.7)), obs=x[:, index])

    def guide(x: Tensor) -> None:
        with pyro.plate("rows", 4, dim=-2):
            pyro.sample("shift", dist.Normal(pyro.param("q", torch.zeros(4, 1)), 0.5))

    svi = still_step(model, guide, data)
    found = matrix_of(svi, "model", {"loc": 4, "noise": 1})
    torch.testing.assert_close(found, torch.diag(torch.tensor([1.0] * 4 + [2.0 * 24])))


# --- deterministic, factor ----------------------------------------------------------------------


def test_a_deterministic_site_carries_what_it_is_made_of() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(number("loc", 0.5), 1.0))
            twice = pyro.deterministic("twice", number("factor", 2.0) * z)
            pyro.sample("x", dist.Normal(twice, 1.0), obs=x)

    svi = check(model, X)
    assert sites(svi) == {"z": "latent", "x": "observed"}
    assert svi.net.parents("x") == {"z"}
    z = svi.loss.traces[0].nodes["z"]["value"].detach()
    found = matrix_of(svi, "model", {"factor": 1, "loc": 1})
    torch.testing.assert_close(
        found, torch.diag(torch.stack([z.square().sum(), torch.tensor(6.0)]))
    )


def regularized(x: Tensor) -> None:
    loc = number("loc", 0.5)
    pyro.factor("penalty", -0.5 * (loc - 3).square())
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def test_a_factor_counts_in_the_gradient_alone() -> None:
    """Its parameters keep the Fisher information of the random sites that they reach."""
    optim = NaturalGradient(0.3, geometry=Full("posterior"))
    svi = NaturalSVI(regularized, lambda x: None, optim)
    assert svi.net is None
    for _ in range(200):
        svi.step(X)
    assert sites(svi) == {"x": "observed"}
    optimum = float((X.sum() + 3) / (len(X) + 1))
    assert float(pyro.param("loc").detach()) == pytest.approx(optimum, abs=1e-6)
    assert float(X.mean()) != pytest.approx(optimum, abs=0.05)


# --- infer --------------------------------------------------------------------------------------


def discrete(x: Tensor) -> None:
    means = pyro.param("means", torch.tensor([-1.0, 1.0]))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(logits=pyro.param("logits", torch.zeros(2))))
        pyro.sample("x", dist.Normal(means[z], 1.0), obs=x)


@pytest.mark.parametrize("how", ["infer", "config_enumerate", "infer_config"])
def test_ways_to_ask_for_enumeration_agree(how: str) -> None:
    def marked(x: Tensor) -> None:
        means = pyro.param("means", torch.tensor([-1.0, 1.0]))
        with pyro.plate("data", len(x)):
            fn = dist.Categorical(logits=pyro.param("logits", torch.zeros(2)))
            z = pyro.sample("z", fn, infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(means[z], 1.0), obs=x)

    model = {
        "infer": lambda: marked,
        "config_enumerate": lambda: config_enumerate(discrete),
        "infer_config": lambda: poutine.infer_config(
            discrete, lambda site: {"enumerate": "parallel"} if site["name"] == "z" else {}
        ),
    }[how]()
    svi = still_step(model, lambda x: None, X, loss=TraceEnum_ELBO(max_plate_nesting=1))
    found = matrix_of(svi, "model", {"logits": 2, "means": 2})
    means = torch.tensor([-1.0, 1.0])
    posterior = (-0.5 * (X.unsqueeze(-1) - means).square()).softmax(-1).sum(0)
    torch.testing.assert_close(found[2:, 2:], torch.diag(posterior))
    prior = len(X) * torch.tensor([[0.25, -0.25], [-0.25, 0.25]])
    torch.testing.assert_close(found[:2, :2], prior)


def test_a_guide_under_handlers() -> None:
    """Scaled, and reparametrized by hand under `infer_config`."""

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("q", torch.zeros(len(x))), 0.5))

    wrapped = poutine.scale(poutine.infer_config(guide, lambda site: {}), scale=2.0)
    svi = still_step(poutine.scale(hierarchy, scale=2.0), wrapped, X)
    found = matrix_of(svi, "guide", {"q": 6})
    torch.testing.assert_close(found, 2 * torch.eye(6) / 0.25)


def test_the_euclidean_geometry_needs_no_handler() -> None:
    model = poutine.reparam(stable, config={"z": SymmetricStableReparam()})
    optim = NaturalGradient(0.02, geometry=Euclidean(), guide_geometry=Euclidean())
    svi = NaturalSVI(model, AutoNormal(model), optim, Trace_ELBO(num_particles=4))
    losses = [svi.step(X) for _ in range(60)]
    assert sum(losses[-10:]) < sum(losses[:10])


def test_programs_do_not_share_an_optimizer() -> None:
    optim = NaturalGradient(0.1)
    first = NaturalSVI(hierarchy, AutoNormal(hierarchy), optim)
    first.step(X)
    second = NaturalSVI(regularized, lambda x: None, optim)
    with pytest.raises(UnsupportedProgram, match="another model .* of its own"):
        second.step(X)
    # Negative control: the same programs may be taken up again.
    again = NaturalSVI(hierarchy, first.guide, optim)
    assert isinstance(again.step(X), float)


def test_random_subsamples_of_a_sequential_plate_are_refused() -> None:
    def model(x: Tensor) -> None:
        for i in pyro.plate("data", len(x), subsample_size=2):
            pyro.sample(f"x{i}", dist.Normal(number("loc", 0.5), 1.5), obs=x[i])

    svi = NaturalSVI(model, lambda x: None, NaturalGradient(0.1))
    with pytest.raises(StructureChanged, match="random subsample .* vectorized"):
        for _ in range(30):
            svi.step(randn(1, 40))


def test_probabilities_whose_logits_were_asked_for_are_one_structure() -> None:
    """What a distribution has computed on demand before it is expanded changes nothing."""
    asked: list[bool] = []

    def model(x: Tensor) -> None:
        probs = pyro.param("probs", torch.tensor([0.3, 0.7]), constraint=constraints.simplex)
        fn = dist.Categorical(probs)
        asked.append(len(asked) % 2 == 0)
        if asked[-1]:
            _ = fn.logits
        with pyro.plate("data", len(x)):
            pyro.sample("x", fn, obs=x)

    svi = NaturalSVI(model, lambda x: None, NaturalGradient(0.3))
    data = torch.tensor([0, 1, 1, 1])
    for _ in range(60):
        svi.step(data)
    assert len(set(asked)) == 2
    assert len(svi.optim.sides["model"].plan.program.runs) == 1
    torch.testing.assert_close(
        pyro.param("probs").detach(), torch.tensor([0.25, 0.75]), atol=0.05, rtol=0
    )
