"""What a step reports: `StepInfo`, and a log of it in lines of JSON."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import torch
from torch import Tensor

from pyronat.optim import NaturalGradient
from pyronat.proposals import Proposal
from pyronat.shaping import measured
from pyronat.sides import Role, Side
from pyronat.spectrum import Spectrum
from pyronat.steps import RetainedShare
from pyronat.trials import Trial


@dataclass(frozen=True)
class StepInfo:
    """What one step did.

    Attributes:
        step: number of the step, from 0.
        loss: in nats.
        accepted: whether the parameters were changed.
        rejected: why they were not: "loss", "gradient" or "step" for what was not finite, "gain"
            where an adaptive rule found no step that gains; or None.
        undone: earlier steps that were taken back in this call, before this one (0 or 1).
        factor: on the whole step; less than 1 after steps were taken back.
        rejections: steps in a row whose loss, gradient or step was not finite, this one included.
        lr: learning rate.
        kl: ½ ΔᵀGΔ of the step Δ of the natural blocks in nats, summed over what the loss sums over.
        grad_norm: Euclidean norm of the gradient of the natural blocks.
        natural_norm: √(gᵀ(G + λ)⁻¹g) of the natural blocks.
        cosine: of the angle between gradient and natural gradient.
        damping: mean λ over units.
        jitter: largest diagonal added to factor a block, beyond the damping.
        mixing: share of the full geometry in the metric of the model; 1 for `Full`.
        missing: largest share of information that hiding takes away in any direction, as the
            metric has it, or None where no visible geometry was measured.
        tries: steps that were tried; more than 1 where an adaptive rule undid some, or where a
            longer one left the support of a parameter.
        ess: mean effective sample size of the importance weights, or None.
        dream_ess: 10 %, 50 % and 90 % quantiles of the effective sample size of the particles of
            each dream at the last refresh, or None.
        refreshed: whether curvature was measured.
        momentum: share β of the step before that this one carries on, see `steps.Momentum`; the
            larger one of model and guide.
        signal: share of signal in the guide's gradients, see `steps.Shrinkage`, or None.
        seconds: wall-clock time of the step, without callbacks.
    """

    step: int
    loss: float
    accepted: bool
    rejected: str | None
    rejections: int
    factor: float
    lr: float
    kl: float
    grad_norm: float
    natural_norm: float
    cosine: float
    damping: float
    jitter: float
    mixing: float
    missing: float | None
    tries: int
    ess: float | None
    dream_ess: tuple[float, float, float] | None
    refreshed: bool
    momentum: float = 0.0
    signal: float | None = None
    undone: int = 0
    seconds: float = math.nan


Report: TypeAlias = Callable[[int, float], StepInfo]
"""Steps that were taken back, and seconds → the report. It holds what the step was made with."""


def describe(
    optim: NaturalGradient,
    sides: Mapping[Role, Side],
    trial: Trial,
    loss: float,
    samples: tuple[float | None, Tensor | None],
    refreshed: bool,
    rejections: int,
) -> Report:
    """The report of a step that is not yet committed, made when it is asked for.

    Args:
        optim: the optimizer.
        sides: curvature that the step was made with.
        trial: what came of the gradient.
        loss: in nats.
        samples: effective sample sizes, of the loss's importance weights and of each dream.
        refreshed: whether curvature was measured.
        rejections: steps in a row that were not finite.

    Returns:
        Earlier steps that were taken back in the same call, and seconds → the report.
    """
    rule, lr = optim.mixing(trial.used), optim.step_length(trial.used)
    step, factor, (ess, dream_ess) = optim.step_count, optim.watch.factor, samples
    if trial.proposal is not None:
        trial = replace(trial, proposal=_with_metric(trial.proposal, sides))

    def report(undone: int, seconds: float) -> StepInfo:
        scalars = {} if trial.proposal is None else measured(trial.proposal, sides).scalars
        spectra = list(sides["model"].spectra.values()) if trial.proposal is not None else []
        return StepInfo(
            step=step,
            loss=loss,
            accepted=trial.accepted,
            rejected=_reason(trial, loss),
            rejections=rejections,
            factor=factor,
            lr=lr,
            **_numbers(scalars),
            jitter=_jitter(sides),
            mixing=_mixing(rule, spectra),
            missing=max((some.missing() for some in spectra), default=None),
            tries=trial.tries,
            ess=None if ess is None else float(ess),
            dream_ess=_quantiles(dream_ess),
            refreshed=refreshed,
            signal=float(scalars["signal"]) if "signal" in scalars else None,
            undone=undone,
            seconds=seconds,
        )

    return report


def _with_metric(proposal: Proposal, sides: Mapping[Role, Side]) -> Proposal:
    """What a report reads of a step, which is kept until then: changes that have a divergence."""
    natural = {name for side in sides.values() if side.natural for name in side.plan.owner()}
    changes = {name: change for name, change in proposal.changes.items() if name in natural}
    return Proposal(changes, {}, proposal.scalars)


def _numbers(scalars: Mapping[str, Tensor]) -> dict[str, float]:
    """What describes a step, in one transfer; NaN where there is none."""
    names = ("kl", "grad_norm", "natural_norm", "cosine", "damping", "momentum")
    if not scalars:
        return {**dict.fromkeys(names, math.nan), "momentum": 0.0}
    zero = torch.zeros_like(scalars["kl"])
    values = torch.stack([scalars.get(name, zero).to(zero) for name in names])
    return dict(zip(names, values.tolist(), strict=True))


def _jitter(sides: Mapping[Role, Side]) -> float:
    """The largest jitter of all factors."""
    factors = (block.factor for side in sides.values() for block in side.solved.values())
    return max((factor.jitter for factor in factors), default=0.0)


def _mixing(rule: float | RetainedShare, spectra: Sequence[Spectrum]) -> float:
    """ρ, the smallest of all districts where a rule chooses it; 1 where there are none."""
    if isinstance(rule, float):
        return rule
    return min((some.mixing_by(rule) for some in spectra), default=1.0)


def _reason(trial: Trial, loss: float) -> str | None:
    """Why a step was not taken."""
    if trial.accepted:
        return None
    if trial.proposal is None:
        return "gradient" if math.isfinite(loss) else "loss"
    return "gain" if trial.finite else "step"


def _quantiles(ess: Tensor | None) -> tuple[float, float, float] | None:
    if ess is None or not len(ess):
        return None
    shares = torch.tensor([0.1, 0.5, 0.9], dtype=ess.dtype, device=ess.device)
    low, median, high = ess.quantile(shares).tolist()
    return low, median, high


class JSONLines:
    """A callback of `NaturalSVI` that writes the report of every step as a line of JSON.

    Each line is one object with the fields of `StepInfo`, in strict JSON: what is not finite is
    null. A line is handed to the operating system at once, in one piece. A file that is there
    already is appended to; a last line that was cut off, as by a killed process, is removed. Where
    training resumes from a checkpoint that is older than the end of the log, the steps between are
    in the log twice, and the later line counts.

    Args:
        path: the file; its folder must be there.

    Raises:
        OSError: if the file cannot be written.

    Example:
        >>> import json, pathlib, tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> path = pathlib.Path(folder.name) / "log.jsonl"
        >>> with JSONLines(path) as log:
        ...     pass  # svi = NaturalSVI(model, guide, optim, loss, callbacks=[log]); svi.step(x)
        >>> [json.loads(line) for line in path.read_text().splitlines()]
        []
        >>> folder.cleanup()
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._file: BinaryIO = open(self.path, "a+b", buffering=0)
        self._file.truncate(_whole(self._file))

    def __call__(self, info: StepInfo, svi: object = None) -> None:
        """Writes a line.

        Args:
            info: the report of a step.
            svi: ignored.

        Raises:
            ValueError: if the log has been closed.
        """
        fields = {name: _strict(value) for name, value in vars(info).items()}
        self._file.write(json.dumps(fields, allow_nan=False).encode() + b"\n")

    def close(self) -> None:
        """Closes the file; closing twice is no error."""
        self._file.close()

    def __enter__(self) -> JSONLines:
        """The log itself, closed at the end."""
        return self

    def __exit__(self, *error: object) -> None:
        """Closes the file."""
        self.close()


def _whole(file: BinaryIO) -> int:
    """Bytes up to the end of the last whole line."""
    position = file.seek(0, os.SEEK_END)
    while position > 0:
        start = max(0, position - 65536)
        file.seek(start)
        found = file.read(position - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        position = start
    return 0


def _strict(value: Any) -> Any:
    """A value as strict JSON has it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, tuple):
        return [_strict(item) for item in value]
    return value
