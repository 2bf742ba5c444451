"""Steps that are taken back: which, how exactly, and that nothing ends in NaN."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import X, guide, model
from pyro.distributions import constraints
from pyro.infer import Trace_ELBO
from pyro.optim import Adam
from states import parameters, same
from test_checkpoints import loss_of
from torch import Tensor
from torch.distributions import transform_to

from models.registry import programs
from pyronat import Euclidean, Full, NaturalGradient, NaturalSVI, StepInfo, infer
from pyronat.errors import AveragesInPlace, Diverged, InvalidData, NonFiniteStep, PyronatError
from pyronat.rejection import Rejection, Watch
from pyronat.steps import ConstantDamping, KLTrustRegion, LevenbergMarquardt, PolyakRuppert
from pyronat.tracing import data_count, records_of

PROGRAMS = programs()


# --- the rule ----------------------------------------------------------------------------------


def watched(rule: Rejection, losses: list[float]) -> Watch:
    watch = Watch()
    for loss in losses:
        watch = rule.seen(watch, loss)
    return watch


@pytest.mark.parametrize(
    ("losses", "value", "expected"),
    [
        ([], 1e9, False),
        ([], math.nan, True),
        ([3.0], 3.9, False),
        ([3.0], 4.1, True),
        ([3.0], math.inf, True),
        ([9.0, 7.0, 5.0, 4.0, 3.5, 3.2, 3.1], 3.4, False),
        ([3.0, 3.1, 2.9, 3.0, 3.2, 2.8], 4.5, True),
        # as noisy as that
        ([3.0, 6.0, 2.0, 7.0, 1.0, 5.0, 3.0, 8.0], 9.5, False),
        ([3.0, 6.0, 2.0, 7.0, 1.0, 5.0, 3.0, 8.0], 24.0, True),
    ],
)
def test_losses_are_suspected(losses: list[float], value: float, expected: bool) -> None:
    rule = Rejection()
    assert rule.suspects(watched(rule, losses), value) == expected


@pytest.mark.parametrize(
    ("after", "before", "expected"),
    [
        (13.0, 3.0, True),
        (13.0, 12.9, False),  # a hard batch
        (13.0, 14.0, False),
        (13.0, 7.0, True),
        (13.0, 9.0, False),
        (math.nan, 3.0, True),
        (math.inf, 3.0, True),
        (math.nan, math.nan, False),
        (13.0, math.nan, False),
    ],
)
def test_steps_are_blamed(after: float, before: float, expected: bool) -> None:
    rule = Rejection()
    assert rule.blames(watched(rule, [3.0] * 6), after, before) == expected


def test_the_running_moments_are_those_of_the_losses() -> None:
    """Noise around a trend: half the mean square of differences is its variance, z below 4."""
    generator = torch.Generator("cpu").manual_seed(0)
    noise = 0.3 * torch.randn(400, generator=generator, device="cpu", dtype=torch.float64)
    losses = (50 - 0.05 * torch.arange(400, device="cpu") + noise).tolist()
    rule = Rejection(decay=0.995)
    watch = watched(rule, losses)
    # half squared differences have variance 3 σ⁴ with their neighbors
    error = 0.09 * math.sqrt(3 / 200)
    assert abs(watch.variance - 0.09) < 4 * error
    assert watch.best == watch.mean < losses[0]
    assert watched(Rejection(), [2.0] * 9).mean == 2.0


@pytest.mark.parametrize("spread", [0.05, 0.3, 3.0])
def test_ordinary_noise_is_never_blamed(spread: float) -> None:
    """Independent losses, and a step that changes them by a tenth of their spread."""
    generator = torch.Generator("cpu").manual_seed(1)
    rule, suspected = Rejection(deviations=3.0), 0
    for _ in range(20):
        draws = torch.randn(500, 2, generator=generator, device="cpu", dtype=torch.float64)
        watch = Watch()
        for noise, moved in (spread * draws).tolist():
            value = 5 + noise
            if rule.suspects(watch, value):
                suspected += 1
                assert not rule.blames(watch, value, value - 0.1 * moved)
                watch = rule.anew(watch, value)
            else:
                watch = rule.kept(rule.seen(watch, value))
        assert watch.factor == 1
    assert suspected <= {0.05: 0, 0.3: 50, 3.0: 500}[spread]
    assert (suspected > 0) == (spread > 0.1)


def test_the_factor_halves_and_recovers() -> None:
    rule = Rejection(patience=3)
    watch = rule.shorter(rule.shorter(Watch()))
    assert (watch.factor, watch.undone) == (0.25, 2)
    factors = []
    for _ in range(8):
        watch = rule.kept(watch)
        factors.append(watch.factor)
    assert factors == [0.25, 0.25, 0.5, 0.5, 0.5, 1, 1, 1]
    assert watch.undone == 0


@pytest.mark.parametrize(
    "options",
    [{"rise": 0.0}, {"share": 1.5}, {"max_undone": 0}, {"patience": 0}, {"decay": 1.0}],
    ids=str,
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="out of its range"):
        Rejection(**options)


# --- taking back -------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "natural": {},
    "scaled adam": {"guide_geometry": Euclidean()},
    "others": {"guide_geometry": Euclidean(), "others": Adam({"lr": 0.01})},
    "averages": {"averaging": PolyakRuppert()},
}


def jump(at: int, rate: float = 3000.0) -> Callable[[int], float]:
    """A schedule with one step that is far too long."""
    return lambda step: rate if step == at else 0.05


FIRM = ConstantDamping(0.0, 0.05)
"""Damping that does not grow with the rate, and hides a long step."""

FREE = KLTrustRegion(network=math.inf, guide=math.inf, model=math.inf)
"""The bounds on steps per datum keep long ones harmless as well."""


def jumping(at: int = 3, **options: Any) -> NaturalSVI:
    return NaturalSVI(
        model,
        guide,
        NaturalGradient(jump(at), damping=FIRM, trust_region=FREE, **options),
        Trace_ELBO(num_particles=3),
    )


@pytest.mark.parametrize("name", OPTIONS)
def test_a_step_is_taken_back_to_the_last_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    svi = jumping(**OPTIONS[name])
    seen: list[Any] = []
    taken = infer.taken

    def spy(*args: Any) -> Any:
        seen.append((parameters(), svi.optim.moving_state()))
        return taken(*args)

    monkeypatch.setattr(infer, "taken", spy)
    losses = [svi.step(X) for _ in range(4)]
    assert len(seen) == 4
    assert not same(parameters(), seen[3][0])
    losses.append(svi.step(X))
    assert svi.info is not None
    assert (svi.info.undone, svi.info.factor, svi.info.accepted) == (1, 0.5, True)
    assert (svi.info.step, svi.optim.step_count) == (4, 5)
    assert same(seen[4], seen[3])
    # The call goes on with its own batch and random numbers, at the parameters before the step.
    assert max(losses) == losses[0]
    svi.step(X)
    assert svi.info.undone == 0


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("harmful", [True, False])
def test_the_last_step_is_settled(name: str, harmful: bool) -> None:
    """Taken back to the last bit where it did harm; a good one, the control, stands."""
    svi = jumping(3 if harmful else 99, **OPTIONS[name])
    for _ in range(3):
        svi.step(X)
    before = parameters(), svi.optim.moving_state()
    svi.step(X)
    after, random = (parameters(), svi.optim.moving_state()), torch.get_rng_state()
    assert not same(after, before)
    assert svi.settle(X) == harmful
    assert same((parameters(), svi.optim.moving_state()), before if harmful else after)
    assert torch.equal(torch.get_rng_state(), random) and svi.optim.step_count == 4
    assert not svi.settle(X)
    assert math.isfinite(svi.step(X))
    assert svi.info is not None and svi.info.factor == (0.5 if harmful else 1.0)


def test_the_last_step_of_a_checkpoint_is_settled(tmp_path: Path) -> None:
    svi = jumping()
    for _ in range(3):
        svi.step(X)
    before = parameters()
    svi.step(X)
    svi.save(tmp_path / "state")
    pyro.clear_param_store()
    other = jumping()
    other.load(tmp_path / "state")
    assert not same(parameters(), before)
    assert other.settle(X) and same(parameters(), before)
    assert math.isfinite(other.step(X))


def test_what_cannot_be_settled() -> None:
    svi = jumping(averaging=PolyakRuppert())
    assert not svi.settle(X)
    svi.step(X)
    after = parameters()
    with warnings.catch_warnings(), pyro.validation_enabled(False):
        warnings.simplefilter("ignore")
        with pytest.raises(InvalidData, match="nan before it.*evaluate_loss"):
            svi.settle(X * math.nan)
    with svi.averaged(), pytest.raises(AveragesInPlace):
        svi.settle(X)
    assert same(parameters(), after)
    with pytest.raises(ValueError, match=r"Rejection\(\)"):
        jumping(rejection=None).settle(X)


@pytest.mark.parametrize("at", [0, 3])
def test_a_scheduler_that_has_stepped_since_goes_on(at: int) -> None:
    """The moments are those before the step, the rate is that of the new epoch."""
    arguments = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.01}, "gamma": 0.5}
    others = pyro.optim.ExponentialLR(arguments)
    svi = jumping(at, guide_geometry=Euclidean(), others=others)
    for _ in range(at):
        svi.step(X)
    counts = [float(s.optimizer.state[p]["step"]) for p, s in others.optim_objs.items()]
    svi.step(X)
    others.step()
    svi.step(X)
    assert svi.info is not None and svi.info.undone == 1
    for single in others.optim_objs.values():
        state = single.optimizer.state_dict()
        assert state["param_groups"][0]["lr"] == 0.005
        assert state["state"][0]["step"] == at + 1
        assert single.state_dict()["last_epoch"] == 1
    assert all(count == at for count in counts)


def test_without_the_rule_the_step_stands() -> None:
    """Negative control."""
    svi = jumping(rejection=None)
    losses = [svi.step(X) for _ in range(4)]
    try:
        losses.append(svi.step(X))
    except NonFiniteStep:
        return
    assert not losses[4] < 10 * losses[0]


@pytest.mark.parametrize("outlier", [30.0, 1e3])
def test_a_hard_batch_is_no_reason_and_the_random_numbers_go_on(outlier: float) -> None:
    """Suspected but not to blame: the training is the one without the rule, to the last bit."""

    def trained(**options: Any) -> tuple[list[float], dict[str, Tensor], Tensor]:
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi = NaturalSVI(model, guide, NaturalGradient(lr=0.02, **options))
        losses = []
        for step in range(8):
            losses.append(svi.step(X * outlier if step == 7 else X))
            assert svi.info is not None
            assert (svi.info.undone, svi.info.factor) == (0, 1.0)
        assert svi.optim.watch.count == (0 if options else 1)  # the statistics begin anew
        return losses, parameters(), torch.rand(3)

    first, second = trained(), trained(rejection=None)
    assert first[0][7] > 10 * first[0][6]
    assert same(first, second)


def test_a_step_out_of_a_domain_is_taken_back() -> None:
    """The scale has no constraint of its own, and a long step makes it negative."""
    pyro.param("scale", torch.tensor(1.5))

    def model(x: Tensor) -> None:
        scale = pyro.param("scale")
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, scale), obs=x)

    svi = NaturalSVI(model, lambda x: None, NaturalGradient(lr=0.05))
    x = 0.1 * X[:, 0]
    undone = []
    for step in range(6):
        if step == 3:
            # As if the last step had been a longer one.
            with torch.no_grad():
                pyro.param("scale").fill_(-1.0)
        assert math.isfinite(svi.step(x))
        assert svi.info is not None
        undone.append(svi.info.undone)
        assert pyro.param("scale").item() > 0
    assert undone == [0, 0, 0, 1, 0, 0]


@pytest.mark.parametrize("name", ["natural", "others"])
def test_many_in_a_row_end_in_an_error_with_the_last_good_parameters(name: str) -> None:
    svi = NaturalSVI(
        model,
        guide,
        NaturalGradient(
            1e9, damping=FIRM, geometry=Full("posterior"), trust_region=FREE, **OPTIONS[name]
        ),
    )
    svi.evaluate_loss(X)
    before = parameters()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(Diverged, match=r"7 steps in a row.*last good step\. Lower lr"):
            for _ in range(20):
                svi.step(X)
    assert same(before, parameters())
    assert svi.optim.step_count == 7
    # The way out that the message names.
    svi.optim.lr = lambda step: 0.05
    assert math.isfinite(svi.step(X))
    assert svi.info is not None and svi.info.accepted


def test_the_factor_is_on_every_kind_of_step() -> None:
    """Half of the change of natural gradients, of the scaled Adam and of other optimizers."""

    def change(factor: float, **options: Any) -> dict[str, Tensor]:
        pyro.clear_param_store()
        model(X)
        guide(X)
        before = parameters()
        pyro.set_rng_seed(0)
        optim = NaturalGradient(lr=0.05, **options)
        optim.watch = Watch(factor=factor)
        NaturalSVI(model, guide, optim).step(X)
        return {name: value - before[name] for name, value in parameters().items()}

    for options in (
        {},
        {"guide_geometry": Euclidean()},
        {"guide_geometry": Euclidean(), "others": Adam({"lr": 0.01})},
    ):
        whole, half = change(1.0, **options), change(0.5, **options)
        for name in whole:
            assert torch.allclose(half[name], whole[name] / 2, rtol=1e-9, atol=1e-15), name


def test_an_adaptive_rule_grows_more_cautious() -> None:
    rule = LevenbergMarquardt(initial=0.1)
    svi = NaturalSVI(model, guide, NaturalGradient(geometry=Full("posterior"), damping=rule))
    for _ in range(6):
        svi.step(X)
    caution = svi.optim.caution
    good = parameters()
    with torch.no_grad():
        pyro.get_param_store()._params["W"].fill_(1e3)  # a step that only other data regret
    svi.step(X)
    assert svi.info is not None
    assert svi.info.undone == 1
    assert svi.optim.caution != caution
    assert all(bool((value.abs() < 100).all()) for value in parameters().values())
    assert good.keys() == parameters().keys()


def test_parameters_that_start_anew_are_not_taken_back() -> None:
    """After `clear_param_store` the loss is what it was at the start, and that is meant."""

    def fresh_model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            loc = pyro.param("loc", lambda: torch.tensor(50.0))
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    svi = NaturalSVI(fresh_model, lambda x: None, NaturalGradient(lr=0.5, trust_region=FREE))
    for _ in range(30):
        svi.step(X[:, 0])
    assert abs(pyro.param("loc").item()) < 1
    pyro.clear_param_store()
    svi.step(X[:, 0])
    assert svi.info is not None and svi.info.undone == 0
    assert pyro.param("loc").item() > 10


def test_a_checkpoint_remembers_where_the_last_step_came_from(tmp_path: Path) -> None:
    svi = jumping(**OPTIONS["scaled adam"])
    for _ in range(4):
        svi.step(X)
    svi.save(tmp_path / "checkpoint.pt")

    def go_on(svi: NaturalSVI) -> Any:
        infos: list[StepInfo] = []
        svi.callbacks = [lambda info, svi: infos.append(info)]
        losses = [svi.step(X) for _ in range(4)]
        return losses, [info.undone for info in infos], parameters(), svi.optim.get_state()

    expected = go_on(svi)
    assert expected[1] == [1, 0, 0, 0]
    pyro.clear_param_store()
    svi = jumping(**OPTIONS["scaled adam"])
    svi.load(tmp_path / "checkpoint.pt")
    assert same(go_on(svi), expected)


# --- supports ----------------------------------------------------------------------------------

SUPPORTS: dict[str, Any] = {
    "exp": (constraints.positive, torch.ones(3)),
    "softplus": (constraints.softplus_positive, torch.ones(3)),
    "softmax": (constraints.simplex, torch.ones(3) / 3),
    "cholesky": (constraints.lower_cholesky, torch.eye(3)),
}


def free_model(constraint: Any, start: Tensor, strength: float) -> Callable[[], None]:
    """A program whose gradient drives a parameter to where its transform overflows."""

    def model() -> None:
        value = pyro.param("value", start, constraint=constraint)
        leaf = value.unconstrained()
        pull = (strength * leaf).sum()
        pyro.sample("x", dist.Normal(pull, 1.0), obs=torch.tensor(1e6))
        pyro.sample("y", dist.Normal(value.sum(), 1e9), obs=torch.tensor(0.0))

    return model


@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["up", "down"])
@pytest.mark.parametrize("name", SUPPORTS)
def test_parameters_stay_in_their_support(name: str, sign: float) -> None:
    constraint, start = SUPPORTS[name]
    if name == "softmax":
        strength = sign * torch.tensor([1.0, -1.0, 0.0])
    else:
        strength = torch.tensor(sign)

    def end(rejection: Rejection | None) -> tuple[Tensor, NaturalSVI]:
        pyro.clear_param_store()
        program = free_model(constraint, start, strength)
        others = pyro.optim.SGD({"lr": 1.0})
        optim = NaturalGradient(exclude=["value"], others=others, rejection=rejection)
        svi = NaturalSVI(program, lambda: None, optim)
        svi.step()
        return pyro.param("value").detach(), svi

    value, svi = end(Rejection())
    assert svi.info is not None and svi.info.accepted
    overflows = not (name == "softplus" and sign > 0)
    assert (svi.info.tries > 1) == overflows
    assert bool(torch.isfinite(value).all())
    back = transform_to(constraint).inv(value)
    assert bool(torch.isfinite(back).all())
    assert bool(constraint.check(value).all())
    broken, _ = end(None)
    if overflows:
        back = transform_to(constraint).inv(broken)
        assert not bool(torch.isfinite(broken).all() & torch.isfinite(back).all())


# --- the number of data ------------------------------------------------------------------------


@pytest.mark.parametrize("particles", [1, 4])
@pytest.mark.parametrize(
    ("size", "subsample", "scale"), [(20, None, 1.0), (20, 5, 1.0), (20, None, 0.05)]
)
def test_data_are_counted_as_the_loss_counts_them(
    particles: int, size: int, subsample: int | None, scale: float
) -> None:
    def program() -> None:
        with pyro.plate("data", size, subsample_size=subsample) as index:
            with pyro.poutine.scale(scale=scale):
                pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1), obs=X[index])

    inside = pyro.plate("num_particles_vectorized", particles, dim=-2)(program)
    trace = pyro.poutine.trace(inside if particles > 1 else program).get_trace()
    assert data_count(records_of(trace)) == pytest.approx(size * scale)


def test_without_plates_values_are_counted() -> None:
    def program() -> None:
        pyro.sample("x", dist.Normal(torch.zeros(20, 3), 1.0).to_event(2), obs=X)
        for step in range(5):
            pyro.sample(f"y_{step}", dist.Normal(0.0, 1.0), obs=X[0, 0])

    trace = pyro.poutine.trace(program).get_trace()
    assert data_count(records_of(trace)) == 65


def test_without_data_there_is_one() -> None:
    trace = pyro.poutine.trace(lambda: pyro.sample("x", dist.Normal(0.0, 1.0))).get_trace()
    assert data_count(records_of(trace)) == 1


# --- rates that are far too large --------------------------------------------------------------


def far_too_fast(name: str, steps: int, **options: Any) -> tuple[str, float, float]:
    """What becomes of a training at 500 times the default rate: outcome, first and last loss."""
    program = PROGRAMS[name]
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    trainable, data = program.make(0), program.make_data(0, 60)
    svi = NaturalSVI(
        trainable.model, trainable.guide, NaturalGradient(50.0, **options), loss_of(program)
    )
    first = svi.evaluate_loss(*data) / len(data[0])
    outcome = "trained"
    try:
        for _ in range(steps):
            svi.step(*data)
            trainable.after_step()
        # The last step has not been judged yet.
        svi.optim.lr = lambda step: 0.0
        svi.step(*data)
    except PyronatError as error:
        outcome = type(error).__name__
    return outcome, first, svi.evaluate_loss(*data) / len(data[0])


FAST = [
    "mixture",
    "latent class",
    "noisy-or",
    "experts",
    "factor analysis",
    "ppca",
    "linear Gaussian",
    "state space",
    "fvsbn",
    "helmholtz",
    "bars",
    "linear regression",
    "cancer",
    "asia",
]


@pytest.mark.parametrize("name", FAST)
def test_a_rate_that_is_far_too_large_does_not_end_in_nan(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outcome, first, last = far_too_fast(name, 12)
    assert outcome in {"trained", "Diverged"}
    assert last < first + 2
    store = pyro.get_param_store()
    for key, leaf in store.named_parameters():
        value = store[key].detach()
        assert bool(torch.isfinite(leaf).all() & torch.isfinite(value).all()), key
        assert bool(store._constraints[key].check(value).all()), key


@pytest.mark.parametrize("name", ["factor analysis", "state space", "noisy-or"])
def test_without_the_rule_it_does(name: str) -> None:
    """Negative control."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            _, first, last = far_too_fast(name, 12, rejection=None, trust_region=FREE)
        except (RuntimeError, ValueError):
            return
    assert not last < first + 10
