"""Reports of steps: callbacks, and the log in lines of JSON."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from programs import X, guide, model
from states import parameters, same
from torch import Tensor

from pyronat import (
    Full,
    JSONLines,
    NaturalGradient,
    NaturalSVI,
    ReweightedWakeSleep,
    StepInfo,
    shaping,
)
from pyronat.errors import InvalidData, NonFiniteStep
from pyronat.steps import KLTrustRegion, LevenbergMarquardt, PerName


def training(*callbacks: Callable[..., Any], **options: Any) -> NaturalSVI:
    return NaturalSVI(model, guide, NaturalGradient(lr=0.05, **options), callbacks=callbacks)


def lines(path: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no strict JSON")

    text = path.read_text()
    assert not text or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


# --- callbacks ---------------------------------------------------------------------------------


def test_callbacks_see_every_step_after_it_was_taken() -> None:
    seen: list[tuple[StepInfo, int, dict[str, Tensor]]] = []
    order: list[str] = []

    def first(info: StepInfo, svi: NaturalSVI) -> None:
        order.append("first")
        assert svi.info is info
        seen.append((info, svi.optim.step_count, parameters()))

    svi = training(first, lambda info, svi: order.append("second"))
    losses = [svi.step(X) for _ in range(7)]
    assert [info.loss for info, _, _ in seen] == losses
    assert [info.step for info, _, _ in seen] == list(range(7))
    assert [count for _, count, _ in seen] == list(range(1, 8))
    assert same(seen[-1][2], parameters())
    assert not same(seen[-2][2], parameters())
    assert order == ["first", "second"] * 7


@pytest.mark.parametrize("fails_at", [0, 3, 5])
def test_what_a_callback_raises_ends_a_step_that_has_been_taken(fails_at: int) -> None:
    """Training goes on as if nothing had happened."""

    class Stop(Exception):
        pass

    def stop(info: StepInfo, svi: NaturalSVI) -> None:
        if info.step == fails_at:
            raise Stop

    def trained(*callbacks: Callable[..., Any]) -> tuple[list[float], dict[str, Tensor], Any]:
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        svi, losses = training(*callbacks), []
        for step in range(8):
            if callbacks and step == fails_at:
                with pytest.raises(Stop):
                    svi.step(X)
                assert svi.optim.step_count == step + 1
                assert svi.info is not None and svi.info.accepted
                losses.append(svi.info.loss)
            else:
                losses.append(svi.step(X))
            leaves = pyro.get_param_store().named_parameters()
            assert all(leaf.grad is None for _, leaf in leaves)
        return losses, parameters(), svi.optim.get_state()

    assert same(trained(stop), trained())


def test_rejected_steps_are_told_with_the_reason_and_counted() -> None:
    reports: list[StepInfo] = []
    svi = training(lambda info, svi: reports.append(info))
    svi.step(X)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            svi.step(1e200 * X)
        with pytest.raises(NonFiniteStep):
            svi.step(1e200 * X)
    svi.step(X)
    assert [info.rejected for info in reports] == [None, "loss", "loss", "loss", None]
    assert [info.rejections for info in reports] == [0, 1, 2, 3, 0]
    assert [info.accepted for info in reports] == [True, False, False, False, True]


def test_a_step_without_gain_is_no_broken_one() -> None:
    """Under an adaptive rule that accepts nothing."""
    rule = LevenbergMarquardt(rejected=math.inf, max_tries=2)
    svi = training(damping=rule, geometry=Full("posterior"))
    svi.step(X)
    assert svi.info is not None
    assert (svi.info.rejected, svi.info.rejections, svi.info.accepted) == ("gain", 0, False)


# --- lines of JSON -----------------------------------------------------------------------------


def test_every_step_is_one_line_of_strict_json(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    reports: list[StepInfo] = []
    with JSONLines(path) as log:
        svi = training(log, lambda info, svi: reports.append(info))
        for step in range(3):
            svi.step(X)
            assert len(lines(path)) == step + 1  # at once
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            svi.step(1e200 * X)
    found = lines(path)
    assert [set(line) for line in found] == [{field.name for field in fields(StepInfo)}] * 4
    for line, info in zip(found[:3], reports, strict=False):
        assert line == vars(info)
    assert not math.isfinite(reports[3].loss)
    assert found[3]["loss"] is None and found[3]["kl"] is None
    assert found[3]["rejected"] == "loss"


def test_quantiles_are_lists(tmp_path: Path) -> None:
    with JSONLines(tmp_path / "log.jsonl") as log:
        info = training().step(X) and None
        assert info is None
        svi = training()
        svi.step(X)
        assert svi.info is not None
        report = vars(svi.info) | {"dream_ess": (1.0, math.nan, 3.0)}
        log(StepInfo(**report))
    assert lines(tmp_path / "log.jsonl")[0]["dream_ess"] == [1.0, None, 3.0]


def test_a_log_goes_on_where_it_ended(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    for steps in (2, 0, 3):
        pyro.clear_param_store()
        with JSONLines(path) as log:
            svi = training(log)
            for _ in range(steps):
                svi.step(X)
    assert [line["step"] for line in lines(path)] == [0, 1, 0, 1, 2]


@pytest.mark.parametrize("torn", [b'{"step": 2, "lo', b"x" * 200_000, b""], ids=len)
@pytest.mark.parametrize("steps", [0, 2])
def test_a_line_that_was_cut_off_is_removed(steps: int, torn: bytes, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with JSONLines(path) as log:
        svi = training(log)
        for _ in range(steps):
            svi.step(X)
    with path.open("ab") as file:
        file.write(torn)
    with JSONLines(path) as log:
        svi.callbacks = [log]
        svi.step(X)
    assert [line["step"] for line in lines(path)] == list(range(steps + 1))


def test_a_closed_log_refuses_and_the_step_stands(tmp_path: Path) -> None:
    log = JSONLines(tmp_path / "log.jsonl")
    svi = training(log)
    svi.step(X)
    log.close()
    log.close()
    with pytest.raises(ValueError, match="closed"):
        svi.step(X)
    assert svi.optim.step_count == 2
    with pytest.raises(OSError):
        JSONLines(tmp_path / "nowhere" / "log.jsonl")


# --- cost --------------------------------------------------------------------------------------


@pytest.mark.parametrize("radius", [math.inf, 0.01])
@pytest.mark.parametrize("lr", [0.05, PerName(0.05, {"W": 2.0})], ids=["one rate", "by name"])
def test_a_divergence_is_computed_once_where_it_is_wanted(
    lr: Any, radius: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the radius at each step, else by who reads the report."""
    found: list[Tensor] = []
    original = shaping._divergence

    def counted(*args: Any) -> Tensor:
        found.append(original(*args))
        return found[-1]

    monkeypatch.setattr(shaping, "_divergence", counted)
    optim = NaturalGradient(lr, trust_region=KLTrustRegion(radius))
    svi = NaturalSVI(model, guide, optim)
    steps = 4
    for _ in range(steps):
        svi.step(X)
    assert len(found) == (steps if radius < 1 else 0)
    assert svi.info is not None and svi.info is svi.info
    assert len(found) == (steps if radius < 1 else 1)
    assert svi.info.kl == pytest.approx(min(radius, float(found[-1])))
    svi.step(X)
    assert len(found) == (steps + 1 if radius < 1 else 1)


def test_reports_that_are_read_late_are_those_of_their_step() -> None:
    """The step's curvature and changes are its own, whatever comes after."""
    early, late = [], []
    for kept, read in ((early, True), (late, False)):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi = NaturalSVI(model, guide, NaturalGradient(0.05))
        for _ in range(7):
            svi.step(X)
            kept.append(svi.info if read else svi._info)
    read_late = [info() for info in late]
    assert [replace(info, seconds=0.0) for info in read_late] == [
        replace(info, seconds=0.0) for info in early
    ]


# --- completeness ------------------------------------------------------------------------------


def test_reports_are_complete() -> None:
    loss = ReweightedWakeSleep(4)
    svi = NaturalSVI(model, guide, NaturalGradient(lr=0.05), loss)
    svi.step(X)
    assert svi.info is not None
    missing = {name for name, value in vars(svi.info).items() if value is None}
    assert missing == {"missing", "dream_ess", "rejected"}
    assert 1 <= svi.info.ess <= 4
    finite = [value for value in vars(svi.info).values() if isinstance(value, float)]
    assert len(finite) >= 10 and all(map(math.isfinite, finite))


def test_data_that_hold_nan_are_told_before_they_are_refused() -> None:
    reports: list[StepInfo] = []
    svi = training(lambda info, svi: reports.append(info))
    x = X.clone()
    svi.step(x)
    x[0, 0] = torch.nan
    with pyro.validation_enabled(False), pytest.raises(InvalidData), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        svi.step(x)
    assert [info.rejected for info in reports] == [None, "loss"]
