"""Programs that branch: every branch is learned as it occurs, and nothing is lost on the way."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import X, param, randn
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from pyro.optim import Adam
from states import parameters, same
from torch import Tensor
from torch.nn.functional import linear

import pyronat
from pyronat import Euclidean, Full, NaturalGradient, NaturalSVI, ReweightedWakeSleep, testing
from pyronat.errors import CheckpointMismatch, NotEnumerable, PyronatError, StructureChanged
from pyronat.graph import BayesNet
from pyronat.programs import KnownProgram, UnknownStructure, know, learn
from pyronat.refresh import Call
from pyronat.steps import Momentum, RunningAverage

Program = Callable[..., Any]


def nothing(*args: Any) -> None:
    pass


def coin(name: str, logit: str, seed: int) -> bool:
    """A sample value that leaves for Python."""
    return bool(pyro.sample(name, dist.Bernoulli(logits=param(logit, seed))).item())


def observe(x: Tensor, loc: Tensor, name: str = "x") -> None:
    with pyro.plate(f"rows of {name}", len(x)):
        pyro.sample(name, dist.Normal(loc, 1.0).to_event(1), obs=x)


def coin_guide(x: Tensor) -> bool:
    return coin("z", "q.z", 20)


# --- programs: each takes two branches -----------------------------------------------------------


def either_net(x: Tensor) -> None:
    """The same sites, the distribution of one from net a or net b."""
    name = "a" if coin("z", "p", 1) else "b"
    observe(x, param(f"{name}.W", 2, 3, 2) @ param(f"{name}.b", 3, 2))


def one_more_site(x: Tensor) -> None:
    loc = param("b", 2, 3)
    if coin("z", "p", 1):
        loc = loc + pyro.sample("w", dist.Normal(param("w.loc", 3, 3), 1.0).to_event(1))
    observe(x, loc)


def one_more_site_guide(x: Tensor) -> None:
    if coin_guide(x):
        pyro.sample("w", dist.Normal(param("q.w", 21, 3), 1.0).to_event(1))


def other_family(x: Tensor) -> None:
    family = dist.Normal if coin("z", "p", 1) else dist.LogNormal
    with pyro.plate("data", len(x)):
        pyro.sample("x", family(param("loc", 2, 3), 1.0).to_event(1), obs=x.exp())


def other_operation(x: Tensor) -> None:
    """Units of `W` in one branch, one dense block in the other."""
    loc = linear(x.flip(1).clone(), param("W", 2, 3, 3), param("b", 3, 3))
    if coin("z", "p", 1):
        loc = linear(loc.tanh(), param("V", 4, 3, 3))
    observe(x.clone(), loc)


def other_event_shape(x: Tensor) -> None:
    """A latent site of two shapes."""
    if coin("z", "p", 1):
        y = pyro.sample("y", dist.Normal(param("y.wide", 2, 3), 1.0).to_event(1))
    else:
        y = pyro.sample("y", dist.Normal(param("y.single", 3), 1.0))
    observe(x, y.expand(3))


def other_event_shape_guide(x: Tensor) -> None:
    if coin_guide(x):
        pyro.sample("y", dist.Normal(param("q.wide", 22, 3), 1.0).to_event(1))
    else:
        pyro.sample("y", dist.Normal(param("q.single", 23), 1.0))


def shared_bias(x: Tensor) -> None:
    name = "W" if coin("z", "p", 1) else "V"
    observe(x.clone(), linear(x.flip(1).clone(), param(name, 2, 3, 3), param("b", 3, 3)))


BRANCHING: dict[str, tuple[Program, Program]] = {
    "either net": (either_net, coin_guide),
    "one more site": (one_more_site, one_more_site_guide),
    "other family": (other_family, coin_guide),
    "other operation": (other_operation, coin_guide),
    "other event shape": (other_event_shape, other_event_shape_guide),
    "shared bias": (shared_bias, coin_guide),
}
by_program = pytest.mark.parametrize("program", BRANCHING)


def trainer(program: str, loss: Any = None, **options: Any) -> NaturalSVI:
    model, guide = BRANCHING[program]
    options.setdefault("lr", 0.02)
    return NaturalSVI(model, guide, NaturalGradient(**options), loss)


def branch(program: Program, value: float) -> Program:
    """The program with its coin on one side."""
    return pyro.poutine.condition(program, data={"z": torch.tensor(value)})


def runs_of(svi: NaturalSVI) -> int:
    return len(svi.optim.sides["model"].plan.program.runs)


@pytest.fixture
def analyses(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Program]]:
    """The programs that were analyzed, one entry for each time."""
    seen: list[Program] = []
    follow = pyronat.programs.follow

    def counted(program: Program, *args: Any) -> Any:
        seen.append(program)
        return follow(program, *args)

    monkeypatch.setattr("pyronat.programs.follow", counted)
    yield seen


# --- training ------------------------------------------------------------------------------------


@by_program
@pytest.mark.parametrize("seed", [0, 1])
def test_training_goes_on_through_all_branches(
    program: str, seed: int, analyses: list[Program]
) -> None:
    pyro.set_rng_seed(seed)
    svi = trainer(program)
    for _ in range(15):
        svi.step(X)
        assert svi.info.accepted
    assert runs_of(svi) == 2
    found = len(analyses)
    known = svi.net
    for _ in range(5):
        svi.step(X)
        assert svi.info.accepted
    assert len(analyses) == found
    assert svi.net == known


@by_program
def test_the_union_is_that_of_both_branches(program: str) -> None:
    model, _ = BRANCHING[program]
    nets = [pyronat.analyze(branch(model, value), X) for value in (0.0, 1.0)]
    svi = trainer(program)
    for _ in range(15):
        svi.step(X)
    assert {site.name for site in svi.net.sites} == {"z"} | {
        site.name for net in nets for site in net.sites
    }
    assert set(svi.net.params) == {"p"} | {name for net in nets for name in net.params}
    for net in nets:
        assert within(net, svi.net)
    # The branches differ, or the rest would show nothing.
    assert know(branch(model, 0.0), (X,), {}).runs != know(branch(model, 1.0), (X,), {}).runs


def within(fine: BayesNet, coarse: BayesNet) -> bool:
    """Whether entries that share a unit in one network do so in the other."""
    one, two = testing.entry_blocks(fine), testing.entry_blocks(coarse)
    if not one.keys() <= two.keys():
        return False
    first = torch.cat([one[name].reshape(-1) for name in sorted(one)])
    second = torch.cat([two[name].reshape(-1) for name in sorted(one)])
    return all(
        len(second[first == unit].unique()) == 1 and bool((second[first == unit] >= 0).all())
        for unit in first[first >= 0].unique()
    )


def test_units_of_a_branch_are_coarsened() -> None:
    """Negative control of `within`, and the block that has to grow."""
    fine = pyronat.analyze(branch(other_operation, 0.0), X)
    coarse = pyronat.analyze(branch(other_operation, 1.0), X)
    assert not within(coarse, fine)
    svi = trainer("other operation")
    for _ in range(15):
        svi.step(X)
    blocks = {block.params: block for block in svi.net.blocks}
    assert (blocks["V", "W", "b"].structure, blocks["V", "W", "b"].size) == ("dense", 21)
    assert not within(svi.net, fine)


def test_a_family_of_two_names() -> None:
    svi = trainer("other family")
    for _ in range(15):
        svi.step(X)
    (site,) = [site for site in svi.net.sites if site.name == "x"]
    assert site.family == "LogNormal | Normal"


def test_a_stochastic_length(analyses: list[Program]) -> None:
    """Sites x0, x1, … of one parameter, as many as a sample value says."""

    def model(x: Tensor) -> None:
        count = pyro.sample("n", dist.Categorical(logits=param("p", 1, 4)))
        for t in range(int(count)):
            pyro.sample(f"x{t}", dist.Normal(param("loc", 2), 1.0), obs=x[t, 0])

    def guide(x: Tensor) -> None:
        pyro.sample("n", dist.Categorical(logits=param("q", 3, 4)))

    svi = NaturalSVI(model, guide, NaturalGradient(lr=0.02))
    for _ in range(30):
        svi.step(X)
        assert svi.info.accepted
    assert {site.name for site in svi.net.sites} == {"n", "x0", "x1", "x2"}
    assert runs_of(svi) == 4
    (block,) = [block for block in svi.net.blocks if block.params == ("loc",)]
    assert set(block.sites) == {"x0", "x1", "x2"}
    # One analysis of the guide, four of the model, whoever takes a branch first.
    assert len(analyses) == 5


def annealed() -> tuple[Program, dict[str, int]]:
    clock = {"step": 0}

    def model(x: Tensor) -> None:
        loc = linear(x.flip(1).clone(), param("W", 2, 3, 3), param("b", 3, 3))
        if clock["step"] >= 5:
            loc = linear(loc.tanh(), torch.ones(3, 3))
        observe(x.clone(), loc)

    return model, clock


def test_a_step_counter_that_switches_the_structure(analyses: list[Program]) -> None:
    model, clock = annealed()
    svi = NaturalSVI(model, nothing, NaturalGradient(lr=0.02))
    for step in range(12):
        clock["step"] = step
        svi.step(X)
        assert svi.info.accepted
        (block,) = svi.net.blocks
        expected = ("unit", 3, 4) if step < 5 else ("dense", 1, 12)
        assert (block.structure, block.count, block.size) == expected, step
    assert analyses.count(model) == 2


@pytest.mark.parametrize("ahead", [True, False])
def test_rows_that_a_python_number_chooses(ahead: bool, analyses: list[Program]) -> None:
    clock = {"step": 0}

    def model(x: Tensor) -> None:
        table = param("W", 1, 4, 3)
        observe(x, table[clock["step"] % 4] if ahead else table[clock["step"] % 4, :] + 0.0)

    # Momentum goes on moving rows that a step does not read.
    svi = NaturalSVI(model, nothing, NaturalGradient(lr=0.02, momentum=Momentum(0.0)))
    for step in range(12):
        clock["step"] = step
        before = parameters()["W"] if step else None
        svi.step(X)
        if before is not None:
            moved = (parameters()["W"] != before).any(1)
            # Entries of a row that this step does not read stay, whatever has been averaged.
            assert moved.nonzero().flatten().tolist() == [step % 4]
    assert analyses.count(model) == 4
    (block,) = svi.net.blocks
    assert block.count * block.size == 12
    assert len(testing.entry_blocks(svi.net)["W"].unique()) == 12


def test_a_sample_value_that_indexes_a_table_is_no_branch(analyses: list[Program]) -> None:
    """`T[z]` with a 0-d z; torch makes a Python number of it, which differs from step to step."""
    seen = set()

    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Categorical(logits=param("p", 1, 6)))
        seen.add(z.tolist() if z.dim() == 0 else None)
        observe(x, param("T", 2, 6, 3)[z])

    def guide(x: Tensor) -> None:
        pyro.sample("z", dist.Categorical(logits=param("q", 3, 6)))

    svi = NaturalSVI(model, guide, NaturalGradient(lr=0.02))
    svi.step(X)
    assert len(analyses) == 2
    for _ in range(15):
        svi.step(X)
    assert len(seen) >= 4
    assert len(analyses) == 2
    assert runs_of(svi) == 1


def test_a_table_that_only_a_later_branch_reads(analyses: list[Program]) -> None:
    """Positions stop to count when a sample value indexes; what was known is known again."""
    mode = {"table": False}

    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Categorical(logits=param("p", 1, 4)))
        fixed = param("W", 2, 4, 3)[1]
        observe(x, fixed + param("T", 3, 4, 3)[z] if mode["table"] else fixed)

    def guide(x: Tensor) -> None:
        pyro.sample("z", dist.Categorical(logits=param("q", 4, 4)))

    svi = NaturalSVI(model, guide, NaturalGradient(lr=0.02))
    for step in range(24):
        mode["table"] = step % 6 >= 3
        svi.step(X)
        assert svi.info.accepted
    # Without the table, with it, and once more without it when positions do not count.
    assert analyses.count(model) <= 3


@pytest.mark.parametrize("geometry", [Full(), Full("posterior"), Euclidean()], ids=str)
def test_rows_that_no_refresh_has_seen_yet_are_trained(geometry: Any) -> None:
    """The batch of a refresh reads some rows of a table, the next batches read others."""
    optim = NaturalGradient(lr=0.05, geometry=geometry)
    svi = NaturalSVI(by_row, nothing, optim)
    for rows in ([0, 1], [2, 3], [0, 2], [1, 3], [2, 3]):
        before = parameters().get("T")
        svi.step(torch.tensor(rows), X[:2])
        assert svi.info.accepted
        if before is not None:
            change = (parameters()["T"] - before).abs().amax(1)
            assert set(change.nonzero().flatten().tolist()) >= set(rows)
            assert change.max() < 3


@pytest.mark.parametrize("geometry", [Full(), Full("posterior"), Euclidean()], ids=str)
def test_rows_that_are_rare_take_no_larger_steps(geometry: Any) -> None:
    """Between two batches that read a row, many refreshes do not see it."""

    def last_change(pause: int) -> float:
        pyro.clear_param_store()
        optim = NaturalGradient(lr=0.05, geometry=geometry, curvature=RunningAverage(refresh=2))
        svi = NaturalSVI(by_row, nothing, optim)
        # The row is read by the first refresh, and then between two refreshes.
        for rows in [[0, 1], [0, 1], *[[2, 3]] * pause, [2, 3], [0, 1]]:
            before = parameters().get("T")
            svi.step(torch.tensor(rows), X[:2])
            assert svi.info.accepted
        return (parameters()["T"] - before)[:2].abs().max().item()

    soon, late = last_change(2), last_change(80)
    assert 0 < late < 20 * soon


def by_row(z: Tensor, x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(param("T", 1, 4, 3)[z], 1.0).to_event(1), obs=x)


# --- losses --------------------------------------------------------------------------------------


@by_program
@pytest.mark.parametrize(
    "loss",
    [lambda: Trace_ELBO(num_particles=4), lambda: ReweightedWakeSleep(4)],
    ids=["elbo", "wake-sleep"],
)
def test_every_particle_on_a_branch_of_its_own(
    program: str, loss: Callable[[], Any], analyses: list[Program]
) -> None:
    svi = trainer(program, loss())
    for _ in range(8):
        svi.step(X)
        assert svi.info.accepted
    assert runs_of(svi) == 2
    found = len(analyses)
    for _ in range(6):
        svi.step(X)
    assert len(analyses) == found <= 4


def plain(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(logits=param("p", 1)))
        loc = param("T", 2, 2, 3)[z.long()]
        pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)


def plain_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Bernoulli(logits=param("q", 3, 3) @ x.T))


LOSSES: dict[str, Callable[[], Any]] = {
    "enumeration": lambda: TraceEnum_ELBO(max_plate_nesting=1),
    "vectorized": lambda: Trace_ELBO(
        num_particles=3, vectorize_particles=True, max_plate_nesting=1
    ),
    "wake-sleep": lambda: ReweightedWakeSleep(3),
    "wake-sleep, vectorized": lambda: ReweightedWakeSleep(
        3, vectorize_particles=True, max_plate_nesting=1
    ),
    "dreams": lambda: ReweightedWakeSleep(3, insomnia=0.5),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("expectation", ["pooled", "model", "posterior"])
def test_losses_that_add_dimensions_need_no_further_analysis(
    loss: str, expectation: Any, analyses: list[Program]
) -> None:
    guide = plain_guide
    if loss == "enumeration":
        guide = pyro.infer.config_enumerate(plain_guide)
    optim = NaturalGradient(lr=0.02, geometry=Full(expectation))
    svi = NaturalSVI(plain, guide, optim, LOSSES[loss]())
    svi.step(X)
    net = svi.net
    assert len(analyses) == len(set(analyses))
    found = len(analyses)
    for _ in range(5):
        svi.step(X)
        assert svi.info.accepted
    assert len(analyses) == found
    assert svi.net == net
    assert net.blocks == pyronat.analyze(plain, X).blocks


def test_a_branch_that_a_loss_with_added_dimensions_takes_later_is_analyzed(
    analyses: list[Program],
) -> None:
    model, mode = switching()
    svi = NaturalSVI(model, nothing, NaturalGradient(lr=0.02), LOSSES["vectorized"]())
    svi.step(X)
    found = len(analyses)
    mode["now"] = "b"
    svi.step(X)
    assert len(analyses) > found
    assert {"a", "b", "c"} == set(svi.net.params)


@by_program
@pytest.mark.parametrize("expectation", ["model", "pooled"])
def test_dreams_take_other_branches_than_the_posterior(program: str, expectation: Any) -> None:
    """The guide stays on one side, dreams do not."""
    model, guide = BRANCHING[program]
    store = pyro.get_param_store()
    guide(X)
    with torch.no_grad():
        store._params["q.z"].fill_(40.0)
    optim = NaturalGradient(
        lr=0.02, geometry=Full(expectation, num_runs=6), exclude=["q.*"], others=Adam({"lr": 0.0})
    )
    svi = NaturalSVI(model, guide, optim)
    for _ in range(7):
        svi.step(X)
        assert svi.info.accepted
    assert len(optim.sides["guide"].plan.program.runs) == 1
    assert runs_of(svi) == 2
    both = {"p"} | {
        name for value in (0.0, 1.0) for name in pyronat.analyze(branch(model, value), X).params
    }
    assert set(svi.net.params) == both


# --- the Fisher information ----------------------------------------------------------------------


def discrete_same_sites() -> None:
    z = pyro.sample("z", dist.Bernoulli(logits=param("p", 1)))
    logits = param("a", 2, 3) if z.item() else param("b", 3, 1).expand(3)
    pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1))


def discrete_deep() -> None:
    z = pyro.sample("z", dist.Bernoulli(logits=param("p", 1)))
    y = pyro.sample("y", dist.Bernoulli(logits=param("a", 2) if z.item() else param("b", 3)))
    logits = param("c", 4, 2) * y if z.item() else param("c", 4, 2).sum() + y
    pyro.sample("x", dist.Bernoulli(logits=logits.expand(2)).to_event(1))


def discrete_other_leaf() -> None:
    """A branch adds a site that no site depends on."""
    z = pyro.sample("z", dist.Bernoulli(logits=param("p", 1)))
    if z.item():
        pyro.sample("y", dist.Bernoulli(logits=param("a", 2)))
    pyro.sample("x", dist.Bernoulli(logits=param("b", 3)))


def discrete_other_parent() -> None:
    """A branch adds a site that another one depends on."""
    z = pyro.sample("z", dist.Bernoulli(logits=param("p", 1)))
    loc = param("b", 3)
    if z.item():
        loc = param("c", 4) * pyro.sample("y", dist.Bernoulli(logits=param("a", 2)))
    pyro.sample("x", dist.Bernoulli(logits=loc))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("model", [discrete_same_sites, discrete_deep, discrete_other_leaf])
def test_exact_fisher_of_a_branching_program(model: Program, seed: int) -> None:
    """Whatever branch the first run takes, as the seed says."""
    pyro.set_rng_seed(seed)
    expected, where = testing.enumerated_fisher(model)
    fisher = pyronat.fisher(model, geometry=Full("exact"))
    found, layout = fisher.dense()
    assert layout == where
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    # Negative control: how often a branch is taken counts.
    with torch.no_grad():
        pyro.get_param_store()._params["p"].add_(1.0)
    rarer, _ = testing.enumerated_fisher(model)
    assert not torch.allclose(rarer, expected, rtol=0, atol=1e-3)
    again = pyronat.fisher(model, geometry=Full("exact")).dense()[0]
    assert torch.allclose(again, rarer, rtol=0, atol=1e-12)


def test_exact_fisher_is_refused_where_a_branch_adds_a_parent() -> None:
    with pytest.raises(NotEnumerable, match="parents of their own"):
        pyronat.fisher(discrete_other_parent, geometry=Full("exact"))


def test_dreamed_fisher_of_a_branching_program() -> None:
    expected, where = testing.enumerated_fisher(discrete_same_sites)
    found, layout = pyronat.fisher(discrete_same_sites, num_samples=200).dense()
    assert layout == where
    scale = expected.diagonal().max()
    assert (found - expected).abs().max() < 0.2 * scale


# --- what learning keeps -------------------------------------------------------------------------


def switching(shared: bool = False) -> tuple[Program, dict[str, str]]:
    """A model whose branch the test chooses; `c` is the same in all branches."""
    mode = {"now": "a"}

    def model(x: Tensor) -> None:
        observe(x, param("c", 1, 3), "y")
        name = mode["now"]
        loc = param(name, 2, 3)
        observe(x, loc + param("shared", 3, 3) if shared else loc)

    return model, mode


def test_blocks_that_did_not_change_keep_their_averages() -> None:
    model, mode = switching()
    svi = NaturalSVI(model, nothing, NaturalGradient(lr=0.02))
    for _ in range(3):
        svi.step(X)
    side = svi.optim.sides["model"]
    before = copy.deepcopy(dict(side.average))
    refreshes = side.refreshes
    mode["now"] = "b"
    net_before = svi.net
    unknown = _unknown(svi, model)
    svi._learn(unknown, Call((X,), {}, ((), ()), 0.0), first=False)
    side = svi.optim.sides["model"]
    assert svi.net != net_before
    assert set(side.plan.blocks) == {"a", "b", "c"}
    assert not side.complete and svi.optim.due
    assert side.refreshes == refreshes
    assert side.average.keys() == side.solved.keys() == before.keys() == {"a", "c"}
    for name in ("a", "c"):
        assert same(side.average[name].state(), before[name].state())
    svi.step(X)
    side = svi.optim.sides["model"]
    assert side.complete and side.refreshes == refreshes + 1
    assert svi.info.refreshed
    # Block a was not read in this step, c was: the average of a is over the steps that read it.
    assert same(side.average["a"].state(), before["a"].state())


def test_blocks_that_changed_lose_their_averages() -> None:
    """Negative control: the blocks of `shared` and `a` are joined by those of `shared` and `b`."""
    model, mode = switching(shared=True)
    svi = NaturalSVI(model, nothing, NaturalGradient(lr=0.02))
    for _ in range(3):
        svi.step(X)
    assert svi.optim.sides["model"].average.keys() == {"a, shared", "c"}
    mode["now"] = "b"
    svi._learn(_unknown(svi, model), Call((X,), {}, ((), ()), 0.0), first=False)
    side = svi.optim.sides["model"]
    assert set(side.plan.blocks) == {"a, b, shared", "c"}
    assert side.average.keys() == side.solved.keys() == {"c"}


def _unknown(svi: NaturalSVI, model: Program) -> UnknownStructure:
    known = svi.optim.sides["model"].plan.program
    trace = pyro.poutine.trace(model).get_trace(X)
    records, params = pyronat.tracing.records_of(trace), pyronat.tracing.params_of(trace)
    with pytest.raises(UnknownStructure) as caught:
        known.check(records, params)
    return caught.value


def test_runs_that_have_been_seen_are_known_by_their_outlines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken: list[None] = []
    made = pyronat.programs.fingerprint
    monkeypatch.setattr(pyronat.programs, "MAX_OUTLINES", 2)
    monkeypatch.setattr(
        pyronat.programs, "fingerprint", lambda *args: taken.append(None) or made(*args)
    )
    runs = []
    for program in (one_more_site, either_net):
        trace = pyro.poutine.trace(program).get_trace(X)
        runs.append((pyronat.tracing.records_of(trace), pyronat.tracing.params_of(trace)))
    known = KnownProgram(BayesNet((), (), ()), frozenset(made(*run) for run in runs))
    for run in runs * 3:
        known.check(*run)
    assert len(taken) == 2
    known = KnownProgram(known.net, frozenset([made(*runs[0])]))
    for _ in range(2):
        known.check(*runs[0])
        with pytest.raises(UnknownStructure):
            known.check(*runs[1])
    assert len(taken) == 2 + 1 + 2


@pytest.mark.parametrize("program", ["either net", "other operation", "shared bias"])
@pytest.mark.parametrize("particles", [1, 3])
def test_the_step_that_learns_a_branch_is_the_step_that_knew_it(
    program: str, particles: int, analyses: list[Program]
) -> None:
    """The same random numbers: the loss, the gradient, and what comes after are equal."""
    model, guide = BRANCHING[program]

    def stepped(values: list[float], seed: int) -> tuple[dict[str, Any], int]:
        """One step of a trainer that knows one branch or both."""
        pyro.clear_param_store()
        with torch.random.fork_rng():
            for value in (0.0, 1.0):
                branch(model, value)(X)
            guide(X)
            known = know(branch(model, values[0]), (X,), {})
            for value in values[1:]:
                known = _both(known, model, value)
            programs = {"model": known, "guide": know(guide, (X,), {})}
        optim = NaturalGradient(lr=0.02)
        svi = NaturalSVI(model, guide, optim, Trace_ELBO(num_particles=particles))
        optim.bind(programs)
        svi._leaves, svi._analyzed = dict(pyro.get_param_store().named_parameters()), True
        analyses.clear()
        pyro.set_rng_seed(seed)
        loss = svi.step(X)
        info = {"loss": loss, "norm": svi.info.grad_norm, "next": torch.rand(3)}
        return {**info, "params": parameters(), "net": svi.net}, len(analyses)

    learned, losses = 0, []
    for seed in range(4):
        knew, none = stepped([0.0, 1.0], seed)
        learns, found = stepped([0.0], seed)
        assert none == 0
        losses.append(knew["loss"])
        assert knew["loss"] == learns["loss"]
        assert torch.equal(knew["next"], learns["next"])
        if found:
            learned += 1
            assert learns["net"] == knew["net"]
            assert learns["norm"] == pytest.approx(knew["norm"], rel=1e-14)
            for name, leaf in knew["params"].items():
                assert torch.allclose(leaf, learns["params"][name], rtol=0, atol=1e-14), name
    # Negative control: branches are learned, and steps on other random numbers are other steps.
    assert learned
    assert len(set(losses)) > 1


def _both(known: KnownProgram, model: Program, value: float) -> KnownProgram:
    trace = pyro.poutine.trace(branch(model, value)).get_trace(X)
    records, params = pyronat.tracing.records_of(trace), pyronat.tracing.params_of(trace)
    unknown = UnknownStructure(known, records, params)
    return learn(unknown, branch(model, value), (X,), {})


# --- who moves ------------------------------------------------------------------------------------

GEOMETRIES: dict[str, Callable[[], NaturalGradient]] = {
    "natural": lambda: NaturalGradient(lr=0.05),
    "scaled adam": lambda: NaturalGradient(lr=0.05, geometry=Euclidean()),
    "others": lambda: NaturalGradient(
        lr=0.05, geometry=Euclidean(), others=pyro.optim.Adam({"lr": 0.01})
    ),
    "momentum": lambda: NaturalGradient(
        lr=0.05, exclude=["a", "b"], others=pyro.optim.SGD({"lr": 1e-3, "momentum": 0.9})
    ),
}


@pytest.mark.parametrize("optimizer", GEOMETRIES)
def test_parameters_that_a_step_does_not_read_stay(optimizer: str) -> None:
    model, mode = switching()
    svi = NaturalSVI(model, nothing, GEOMETRIES[optimizer]())
    for step, now in enumerate("aaabbbababbba"):
        mode["now"] = now
        before = parameters()
        svi.step(X)
        assert svi.info.accepted
        after = parameters()
        if step:
            assert not torch.equal(before["c"], after["c"])
        for name in before.keys() & {"a", "b"}:
            assert torch.equal(before[name], after[name]) == (name != now), (step, name)


@pytest.mark.parametrize("optimizer", GEOMETRIES)
def test_parameters_of_a_later_branch_are_trained_from_then_on(optimizer: str) -> None:
    model, mode = switching()
    svi = NaturalSVI(model, nothing, GEOMETRIES[optimizer]())
    for _ in range(4):
        svi.step(X)
    assert "b" not in pyro.get_param_store().keys()
    mode["now"] = "b"
    initial = randn(2, 3)
    for _ in range(6):
        before = parameters().get("b", initial)
        svi.step(X)
        # The very first step moves it as well.
        assert not torch.equal(before, parameters()["b"])
    assert all(side.complete for side in svi.optim.sides.values())
    goal = X.mean(0)
    assert (parameters()["b"] - goal).norm() < (initial - goal).norm()


# --- checkpoints ---------------------------------------------------------------------------------


def save(svi: NaturalSVI, folder: Path) -> None:
    svi.optim.save(str(folder / "optim.pt"))
    pyro.get_param_store().save(str(folder / "params.pt"))
    torch.save(torch.get_rng_state(), folder / "rng.pt")


def load(svi: NaturalSVI, folder: Path, with_optimizer: bool = True) -> None:
    store = pyro.get_param_store()
    store.set_state(torch.load(folder / "params.pt", weights_only=False))
    if with_optimizer:
        svi.optim.load(str(folder / "optim.pt"))
    torch.set_rng_state(torch.load(folder / "rng.pt"))


OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "natural": dict,
    "scaled adam": lambda: {"geometry": Euclidean()},
    "others": lambda: {"guide_geometry": Euclidean(), "others": Adam({"lr": 0.01})},
}


@pytest.mark.parametrize(
    ("program", "options"),
    [
        *((program, "natural") for program in BRANCHING),
        ("either net", "scaled adam"),
        ("either net", "others"),
        ("one more site", "others"),
    ],
)
def test_resuming_is_exact_though_the_first_batch_takes_one_branch(
    program: str, options: str, tmp_path: Path, analyses: list[Program]
) -> None:
    first = trainer(program, **OPTIONS[options]())
    for _ in range(13):
        first.step(X)
    assert runs_of(first) == 2
    save(first, tmp_path)
    expected = [first.step(X) for _ in range(6)]
    assert runs_of(first) == 2
    end, state = parameters(), copy.deepcopy(first.optim.get_state())

    pyro.clear_param_store()
    pyro.set_rng_seed(77)
    second = trainer(program, **OPTIONS[options]())
    load(second, tmp_path)
    analyses.clear()
    assert [second.step(X) for _ in range(6)] == expected
    # Model and guide once each: the other branch was in the file.
    assert len(analyses) == 2
    assert same(parameters(), end)
    assert same(second.optim.get_state(), state)

    # Negative control: without the optimizer's state the training goes elsewhere.
    pyro.clear_param_store()
    third = trainer(program, **OPTIONS[options]())
    load(third, tmp_path, with_optimizer=False)
    assert [third.step(X) for _ in range(6)] != expected


def test_a_branch_that_the_checkpoint_does_not_know_is_learned(tmp_path: Path) -> None:
    model, mode = switching()
    first = NaturalSVI(model, nothing, NaturalGradient(lr=0.02))
    for now in "aab":
        mode["now"] = now
        first.step(X)
    save(first, tmp_path)
    pyro.clear_param_store()
    second = NaturalSVI(model, nothing, NaturalGradient(lr=0.02))
    load(second, tmp_path)
    for now in "bdad":
        mode["now"] = now
        second.step(X)
        assert second.info.accepted
    assert runs_of(second) == 3


@pytest.mark.parametrize(
    ("other", "when"),
    [
        *((name, "before the first step") for name in BRANCHING if name != "either net"),
        ("other family", "after some steps"),
        ("shared bias", "after some steps"),
    ],
)
def test_a_checkpoint_of_another_program_is_refused(other: str, when: str, tmp_path: Path) -> None:
    first = trainer("either net")
    for _ in range(13):
        first.step(X)
    first.optim.save(str(tmp_path / "optim.pt"))
    pyro.clear_param_store()
    second = trainer(other)
    if when == "after some steps":
        for _ in range(3):
            second.step(X)
    before, state = parameters(), copy.deepcopy(second.optim.get_state())
    with pytest.raises(CheckpointMismatch, match="another program"):
        second.optim.load(str(tmp_path / "optim.pt"))
        second.step(X)
    if when == "after some steps":
        assert same(before, parameters())
        assert same(state, second.optim.get_state())
    # Negative control: the same program takes it.
    pyro.clear_param_store()
    third = trainer("either net")
    third.optim.load(str(tmp_path / "optim.pt"))
    third.step(X)
    assert third.optim.step_count == 14


# --- programs that cannot be repeated ------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_branches_by_pythons_random_numbers_are_repeatable(seed: int) -> None:
    """The generators of Python and numpy are rewound as torch's is."""

    def model(x: Tensor) -> None:
        observe(x, param("a" if random.random() < 0.5 else "b", 2, 3))

    random.seed(seed)
    svi = NaturalSVI(model, nothing, NaturalGradient(lr=0.02))
    for _ in range(15):
        svi.step(X)
        assert svi.info.accepted
    assert runs_of(svi) == 2


def unrepeatable() -> tuple[Program, dict[str, int]]:
    """A program that goes another way at every call, once it is told to."""
    calls = {"count": 0, "on": 0}

    def model(x: Tensor) -> None:
        calls["count"] += calls["on"]
        observe(x, param("c", 1, 3), "y")
        observe(x, param(f"a{calls['count']}", 2, 3))

    return model, calls


@pytest.mark.parametrize("steps", [3, 5])
def test_a_program_that_cannot_be_repeated_changes_nothing(steps: int) -> None:
    """Between two refreshes, and at one."""
    model, calls = unrepeatable()
    svi = NaturalSVI(model, nothing, NaturalGradient(lr=0.02))
    for _ in range(steps):
        svi.step(X)
    before, state = parameters(), copy.deepcopy(svi.optim.get_state())
    calls["on"] = 1
    with pytest.raises(StructureChanged, match=r"same values.*\bx\b"):
        svi.step(X)
    after = parameters()
    # Pyro itself creates the parameters of the branches.
    assert same(before, {name: after[name] for name in before})
    assert same(state, svi.optim.get_state())
    leaves = pyro.get_param_store().named_parameters()
    assert all(leaf.grad is None for _, leaf in leaves)
    calls["on"] = 0
    calls["count"] = 0
    svi.step(X)
    assert svi.info.accepted
    assert not same(before, {name: parameters()[name] for name in before})


@pytest.mark.parametrize("what", ["parameter", "operation", "site"])
def test_a_program_that_cannot_be_repeated_at_first_is_refused(what: str) -> None:
    calls = {"count": 0}

    def model(x: Tensor) -> None:
        calls["count"] += 1
        odd = calls["count"] % 2
        loc = param("a", 1, 3)
        if what == "parameter":
            loc = param(f"b{calls['count']}", 2, 3)
        elif what == "operation":
            loc = loc.tanh() if odd else loc.sigmoid().sum() * loc
        elif odd:
            observe(x, loc, "y")
        observe(x, loc)

    svi = NaturalSVI(model, nothing, NaturalGradient(lr=0.02))
    model(X)
    before = parameters()
    with pytest.raises(PyronatError):
        for _ in range(3):
            svi.step(X)
    if what == "site":
        assert same(before, parameters())


def test_no_end_of_branches_is_refused() -> None:
    calls = {"count": 0, "on": False}

    def model(x: Tensor) -> None:
        loc = param("a", 1, 3)
        for _ in range(calls["count"]):
            loc = loc.tanh()
        observe(x, loc)

    def counting(x: Tensor) -> None:
        # A call of the guide begins an evaluation of the loss.
        calls["count"] += calls["on"]

    svi = NaturalSVI(model, counting, NaturalGradient(lr=0.02))
    svi.step(X)
    before, state = parameters(), copy.deepcopy(svi.optim.get_state())
    calls["on"] = True
    with pytest.raises(StructureChanged, match="32 branches in one step"):
        svi.step(X)
    assert same(before, parameters())
    assert state["step_count"] == svi.optim.step_count
