"""Networks with hidden nodes: the referee, EM, and the visible metric beside pseudo-cases."""

from __future__ import annotations

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceEnum_ELBO
from torch import Tensor
from torch.distributions import transform_to

import pyronat
from models import bayes_net
from models.bayes_net import DiscreteNet
from models.hidden_nodes import HiddenNodes
from pyronat import visible

HIDDEN = ("lung", "bronc")


def asia(hidden: tuple[str, ...] = HIDDEN, **options: int) -> HiddenNodes:
    return HiddenNodes(bayes_net.load("asia"), hidden, **options)


def fill(net: HiddenNodes, params: dict[str, Tensor]) -> None:
    pyro.clear_param_store()
    for name, value in params.items():
        pyro.param(name, value.clone(), constraint=net.constraints[name])


@pytest.mark.parametrize("pseudo_cases", [0, 1, 3])
def test_the_referee_is_the_enumerated_loss(pseudo_cases: int) -> None:
    net = asia(pseudo_cases=pseudo_cases)
    x = net.make_data(0, 40)
    params = net.start(5)
    fill(net, params)
    loss = TraceEnum_ELBO(max_plate_nesting=1).loss(net.model, net.guide, x)
    assert loss == pytest.approx(-float(net.log_likelihood(params, x)), rel=1e-12)


def test_the_gradient_is_that_of_the_program() -> None:
    net = asia()
    x = net.make_data(0, 40)
    fill(net, net.start(5))
    loss = TraceEnum_ELBO(max_plate_nesting=1)
    loss.loss_and_grads(net.model, net.guide, x)
    leaves = {
        name: transform_to(net.constraints[name]).inv(value).requires_grad_()
        for name, value in net.start(5).items()
    }
    params = {name: transform_to(net.constraints[name])(leaf) for name, leaf in leaves.items()}
    gradients = torch.autograd.grad(-net.log_likelihood(params, x), list(leaves.values()))
    for name, gradient in zip(leaves, gradients, strict=True):
        torch.testing.assert_close(pyro.param(name).unconstrained().grad, gradient)


def tiny() -> HiddenNodes:
    """A hidden coin before an observed one, with tables of 2 and 2 x 3 states."""
    tables = {
        "h": torch.tensor([0.3, 0.7], dtype=torch.float64, device="cpu"),
        "v": torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.2, 0.6]], dtype=torch.float64, device="cpu"),
    }
    states = {"h": ("0", "1"), "v": ("0", "1", "2")}
    return HiddenNodes(DiscreteNet(states, {"h": (), "v": ("h",)}, tables), ("h",))


def test_em_counts_by_hand() -> None:
    net = tiny()
    x = torch.tensor([[0], [2], [2]])
    params = net.start(1)
    prior, table = params["h.cpt"], params["v.cpt"]
    counts_h, counts_v = torch.ones(2), torch.ones(2, 3)
    for (value,) in x.tolist():
        posterior = prior * table[:, value]
        posterior = posterior / posterior.sum()
        counts_h += posterior
        counts_v[:, value] += posterior
    new = net.em_step(params, x)
    torch.testing.assert_close(new["h.cpt"], counts_h / counts_h.sum())
    torch.testing.assert_close(new["v.cpt"], counts_v / counts_v.sum(-1, keepdim=True))


def test_likelihood_by_hand() -> None:
    net = tiny()
    params = net.start(1)
    probs = params["h.cpt"] @ params["v.cpt"]
    x = torch.tensor([[0], [2]])
    torch.testing.assert_close(net.case_log_likelihood(params, x), probs.log()[x[:, 0]])
    pseudo = sum(
        float(dist.Multinomial(len(row), row).log_prob(torch.ones(len(row))))
        for row in [params["h.cpt"], *params["v.cpt"]]
    )
    total = float(probs.log()[x[:, 0]].sum()) + pseudo
    assert float(net.log_likelihood(params, x)) == pytest.approx(total, rel=1e-12)


def test_em_climbs_to_where_the_gradient_vanishes() -> None:
    net = asia()
    x = net.make_data(0, 200)
    params = net.start(0)
    values = []
    for _ in range(400):
        values.append(float(net.log_likelihood(params, x)))
        params = net.em_step(params, x)
    assert all(new >= old - 1e-9 for old, new in itertools.pairwise(values))
    assert values[-1] > values[0] + 50
    leaves = {
        name: transform_to(net.constraints[name]).inv(value).requires_grad_()
        for name, value in params.items()
    }
    point = {name: transform_to(net.constraints[name])(leaf) for name, leaf in leaves.items()}
    gradients = torch.autograd.grad(net.log_likelihood(point, x), list(leaves.values()))
    assert max(float(gradient.abs().max()) for gradient in gradients) < 1e-2


def test_rows_that_nothing_reaches_stay() -> None:
    net = asia(pseudo_cases=0)
    params = net.start(0)
    x = net.make_data(0, 1)
    new = net.em_step(params, x)
    row = int(x[0, 0])  # the only row of the second table that the case reaches
    second = "tub.cpt"
    assert net.net.parents["tub"] == (net.net.observed(net.hidden)[0],)
    torch.testing.assert_close(new[second][1 - row], params[second][1 - row])
    assert not torch.allclose(new[second][row], params[second][row])


def test_starts_and_data_are_seeded() -> None:
    state = torch.get_rng_state()
    net = asia(seed=3)
    for name, value in net.start(3).items():
        assert torch.equal(value, net.initial[name])
        assert bool(net.constraints[name].check(value).all())
        assert not torch.equal(value, net.start(4)[name])
    x = net.make_data(0, 20)
    assert x.shape == (20, 6) and torch.equal(x, net.make_data(0, 20))
    assert torch.equal(torch.get_rng_state(), state)
    assert not list(pyro.get_param_store())


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="not in the network"):
        asia(("nothing",))
    with pytest.raises(ValueError, match="pseudo_cases"):
        asia(pseudo_cases=-1)
    with pytest.raises(ValueError, match=r"shape \[cases, 6\]"):
        asia().log_likelihood(asia().initial, torch.zeros(3, 2, dtype=torch.long))


# --- the visible metric beside sites that miss nothing -------------------------------------------


def visible_fisher(net: HiddenNodes, x: Tensor, geometry: pyronat.Visible) -> Tensor:
    fisher = pyronat.fisher(net.model, x, geometry=geometry, guide=net.guide, num_samples=1)
    return fisher.dense()[0]


@pytest.mark.parametrize("estimator", ["direct", "subtractive"])
def test_pseudo_cases_keep_their_exact_information(estimator: str) -> None:
    """G_V is that of the cases, estimated, and that of the pseudo-cases, exactly."""
    x = tiny().make_data(0, 500)
    with_pseudo = tiny()
    without = HiddenNodes(with_pseudo.net, ("h",), pseudo_cases=0)
    options = {"posterior": "enumerate", "num_dreams": 500, "estimator": estimator}
    geometry = pyronat.Visible(0.0, **options)
    found = []
    for net in (with_pseudo, without):
        fill(net, net.start(2))
        runs = []
        for seed in range(8):
            torch.manual_seed(seed)
            runs.append(visible_fisher(net, x, geometry))
        found.append(torch.stack(runs))
    expected = torch.block_diag(
        *(
            len(row) * (torch.diag(row) - torch.outer(row, row))
            for row in [with_pseudo.start(2)["h.cpt"], *with_pseudo.start(2)["v.cpt"]]
        )
    )
    difference = found[0] - found[1]
    error = difference.std(0) / math.sqrt(len(difference))
    z_score = (difference.mean(0) - expected) / error.clamp_min(1e-9)
    assert float(z_score.abs().max()) < 5
    assert float(expected.abs().max()) > 0.4


def test_pseudo_cases_need_no_dreams(monkeypatch: pytest.MonkeyPatch) -> None:
    """One run of the model has a dream for every case, though pseudo-cases are there but once."""
    net = asia()
    x = net.make_data(0, 300)
    runs = []
    draw = visible.draw
    monkeypatch.setattr(visible, "draw", lambda *args: runs.append(0) or draw(*args))
    fill(net, net.initial)
    optim = pyronat.NaturalGradient(geometry=pyronat.Visible(posterior="enumerate"))
    svi = pyronat.NaturalSVI(net.model, net.guide, optim, TraceEnum_ELBO(max_plate_nesting=1))
    svi.step(x)
    assert len(runs) == 1


def test_fewer_iterations_than_em() -> None:
    net = HiddenNodes(
        bayes_net.load("child"), ("Grunting", "Sick", "BirthAsphyxia", "Disease", "HypoxiaInO2")
    )
    x, held_out = net.make_data(0, 1000), net.make_data(1, 2000)
    start = params = net.em_step(net.initial, x)

    def judged(params: dict[str, Tensor]) -> float:
        with torch.no_grad():
            return float(net.case_log_likelihood(params, held_out).mean())

    path = []
    for _ in range(400):
        params = net.em_step(params, x)
        path.append(judged(params))
    goal = path[-1] - 1e-3 * abs(path[-1])
    em_steps = next(step for step, value in enumerate(path, 1) if value >= goal)

    fill(net, start)
    geometry = pyronat.Visible(pyronat.steps.LevenbergMarquardt(), posterior="enumerate")
    svi = pyronat.NaturalSVI(
        net.model,
        net.guide,
        pyronat.NaturalGradient(geometry=geometry),
        TraceEnum_ELBO(max_plate_nesting=1),
    )
    step = 0
    while step < em_steps:
        step += 1
        svi.step(x)
        if judged({name: pyro.param(name).detach() for name in net.constraints}) >= goal:
            break
    assert 2 * step < em_steps
