"""Pictures of numbers: the Fisher information, the course of a training, a comparison."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

from pyronat.comparison import Row
from pyronat.drawing import BLUE, COLORS, GRAY, GREEN, ORANGE, PURPLE, figure
from pyronat.errors import BlockTooLarge, UnsupportedProgram
from pyronat.reports import StepInfo
from pyronat.study import Fisher, VisibleFisher

METHOD_COLORS = {"adam": ORANGE, "full": BLUE, "visible": GREEN, "euclidean": PURPLE}

MAX_ENTRIES = 4000
"""Parameter entries of the largest Fisher information that is drawn."""

FLOOR = 1e-4
"""Smallest excess of a loss that is drawn, as a share of that at the start."""

_WINDOWS, _LEAST_WINDOW = 20, 5
"""Steps of a training for each step of the window of its running mean, and its least number."""

_RATE = "learning rate × factor"

_SHARES = frozenset({"mixing", "largest missing information", "momentum"})
"""What is between 0 and 1."""

_NOISY = 0.1
"""Share of steps that rise above which a curve is called noisy."""

_FAR = 20
"""A curve is cut off where it is so many times as far above its lowest as most of it."""

_WIDE = 10
"""Range above which an axis is logarithmic."""

_BARS = 40
"""Bars that are told apart by lines."""


def fisher_blocks(fisher: Fisher | VisibleFisher, path: str | os.PathLike[str]) -> None:
    """Draws the Fisher information with entries in the order of its blocks.

    What is shown is |G_ij| / √(G_ii G_jj) with the diagonal of the full one in both, so that the
    visible diagonal shows which information is left; and the shares of missing information.

    Args:
        fisher: the Fisher information; of a visible one, full and visible are drawn side by side.
        path: the picture file; its ending says in which format.

    Raises:
        UnsupportedProgram: if there are no parameters.
        BlockTooLarge: if there are more than `MAX_ENTRIES` parameter entries.
    """
    full = fisher.full if isinstance(fisher, VisibleFisher) else fisher
    size = full.slices()[-1][1].stop if full.slices() else 0
    if not size:
        raise UnsupportedProgram("the model has no parameters with a Fisher information to draw")
    if size > MAX_ENTRIES:
        raise BlockTooLarge(
            f"the Fisher information has {size} × {size} entries, at most {MAX_ENTRIES} parameter "
            "entries are drawn; make the program smaller"
        )
    order, bounds = _order(full)
    matrix = full.dense()[0]
    scale = matrix.diagonal().clamp(min=0).sqrt()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    panels = {"full system: G": matrix}
    shares: list[float] = []
    if isinstance(fisher, VisibleFisher):
        panels["visible units: G_V"] = fisher.dense()[0]
        shares = [direction.missing for direction in fisher.missing_information()]
    count = len(panels) + bool(shares)
    with figure(path, (4.4 * count + 0.8, 4.4)) as drawn:
        drawn.get_layout_engine().set(w_pad=0.12)
        grid = drawn.subplots(1, count, squeeze=False)[0]
        for axes, (title, values) in zip(grid, panels.items(), strict=False):
            shown = (values / scale / scale.unsqueeze(1)).abs()[order][:, order]
            image = _heat_map(axes, shown, bounds, title)
        drawn.colorbar(
            image, ax=list(grid[: len(panels)]), shrink=0.8, label="|G_ij| / √(G_ii G_jj)"
        )
        if shares:
            _spectrum(grid[-1], shares)


def _order(full: Fisher) -> tuple[Tensor, list[tuple[str, int, int]]]:
    """Entries ordered by block and unit, and where each block begins and ends."""
    found, bounds, start = [], [], 0
    for name, places in sorted(full.positions().items()):
        entries = places.reshape(-1).cpu()
        found.append(entries)
        bounds.append((name, start, start + len(entries)))
        start += len(entries)
    return torch.cat(found), bounds


def _heat_map(axes: Any, values: Tensor, bounds: Sequence[tuple[str, int, int]], title: str) -> Any:
    """Draws a matrix, white where it is zero, with lines between the blocks of parameters."""
    from matplotlib.colors import PowerNorm

    shown = values.detach().cpu().clamp(max=1).double().numpy()
    image = axes.imshow(shown, cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    for _, _, stop in bounds[:-1]:
        for line in (axes.axhline, axes.axvline):
            line(stop - 0.5, color="#888888", linewidth=0.5)
    large = [bound for bound in bounds if bound[2] - bound[1] >= len(values) / 40]
    axes.set_yticks([(start + stop - 1) / 2 for _, start, stop in large])
    axes.set_yticklabels([_short(name) for name, _, _ in large])
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(True)
    axes.set_title(title)
    return image


def _short(name: str, length: int = 18) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def _spectrum(axes: Any, shares: Sequence[float]) -> None:
    """Draws shares of missing information, sorted."""
    edge = "white" if len(shares) <= _BARS else GREEN
    axes.bar(range(1, len(shares) + 1), shares, width=1.0, color=GREEN, edgecolor=edge)
    axes.set_ylim(0, 1)
    axes.set_title("missing information")
    axes.set_xlabel("direction")
    axes.set_ylabel("share (EM's factor per iteration)")


def training(
    infos: Sequence[StepInfo], path: str | os.PathLike[str], data: int = 1, title: str = ""
) -> None:
    """Draws the course of a training.

    Args:
        infos: the report of each step.
        path: the picture file; its ending says in which format.
        data: data in each step, by which the loss is divided.
        title: above it.
    """
    known = [(name, take) for name, take in _traces(infos) if any(map(take, infos))]
    steps = [info.step + 1 for info in infos]
    seconds = torch.tensor([info.seconds for info in infos]).cumsum(0).tolist()
    rows = 1 + math.ceil(len(known) / 4)
    with figure(path, (11.0, 2.4 * rows + 0.4)) as drawn:
        losses = [info.loss / data for info in infos]
        grid = drawn.add_gridspec(rows, 4)
        for column, (line, label) in enumerate(((steps, "step"), (seconds, "seconds"))):
            axes = drawn.add_subplot(grid[0, 2 * column : 2 * column + 2])
            _curve(axes, line, losses)
            axes.set_xlabel(label)
            axes.set_ylabel("loss (nats per datum)")
        for number, (name, take) in enumerate(known):
            axes = drawn.add_subplot(grid[1 + number // 4, number % 4])
            points = [(s, v) for s, v in zip(steps, map(take, infos), strict=True) if _is_shown(v)]
            xs, ys = [point[0] for point in points], [point[1] for point in points]
            axes.plot(xs, ys, color=COLORS[number % len(COLORS)], linewidth=1.0)
            if name in _SHARES:
                axes.set_ylim(-0.04, 1.04)
            elif name != _RATE and ys and min(ys) > 0 and max(ys) > _WIDE * min(ys):
                axes.set_yscale("log")
            axes.set_title(name)
            axes.set_xlabel("step")
        drawn.suptitle(title)


def _traces(
    infos: Sequence[StepInfo],
) -> list[tuple[str, Callable[[StepInfo], float | None]]]:
    """What is drawn of each step beside its loss, where there is any of it."""
    mixes = any(info.mixing < 1 for info in infos)
    return [
        ("KL of a step (nats)", lambda info: info.kl),
        ("damping", lambda info: info.damping),
        ("effective sample size", lambda info: info.ess),
        ("… of dreams, median", lambda info: None if not info.dream_ess else info.dream_ess[1]),
        ("mixing", lambda info: info.mixing if mixes else None),
        ("largest missing information", lambda info: info.missing),
        ("momentum", lambda info: info.momentum),
        (_RATE, lambda info: info.lr * info.factor),
    ]


def _is_shown(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def _curve(axes: Any, xs: Sequence[float], ys: Sequence[float]) -> None:
    """Draws a curve, with its running mean if it is noisy, without what is far above the rest."""
    values = torch.tensor(ys, dtype=torch.float64, device="cpu")
    width = max(_LEAST_WINDOW, len(ys) // _WINDOWS)
    noisy = len(ys) > width and (values.diff() > 0).double().mean().item() > _NOISY
    axes.plot(xs, ys, color=BLUE, alpha=0.35 if noisy else 1.0, linewidth=1.0 if noisy else 1.6)
    if noisy:
        means = values.unfold(0, width, 1).mean(-1)
        axes.plot(xs[width // 2 : width // 2 + len(means)], means, color=BLUE)
    finite = values[values.isfinite()]
    if len(finite) > 1:
        low, most = finite.min().item(), finite.quantile(0.98).item()
        high = min(finite.max().item(), low + _FAR * (most - low))
        margin = 0.05 * (high - low) or 1.0
        axes.set_ylim(low - margin, high + margin)


def comparison(rows: Sequence[Row], path: str | os.PathLike[str], title: str = "") -> None:
    """Draws how far each method is above the lowest loss that any has found.

    Args:
        rows: the methods at their best rates.
        path: the picture file; its ending says in which format.
        title: above it.
    """
    good = [run for row in rows for run in row.runs if run.losses]
    lowest = min(min(run.losses) for run in good)
    start = max(run.losses[0] for run in good)
    floor = FLOOR * max(start - lowest, 1e-12)
    with figure(path, (9.0, 3.8)) as drawn:
        left, right = drawn.subplots(1, 2, sharey=True)
        for row in rows:
            color = METHOD_COLORS.get(row.method, GRAY)
            label = f"{row.method}, rate {row.rate:g}" + (" (failed)" if row.error else "")
            for run in row.runs:
                excess = [max(loss - lowest, floor) for loss in run.losses]
                options = {"color": color, "label": label, "marker": ".", "markersize": 4}
                left.plot(run.steps, excess, **options)
                right.plot(run.seconds, excess, **options)
                label = ""
        left.set_yscale("log")
        left.set_ylim(floor / 1.5, None)
        left.set_ylabel(f"loss above {lowest:.5g} (nats per datum)")
        left.set_xlabel("steps")
        right.set_xlabel("seconds of the steps")
        left.legend()
        drawn.suptitle(title)
