"""Pictures of numbers: the Fisher information, the course of a training, methods, samples."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

from pyronat.comparison import Row
from pyronat.drawing import BLUE, COLORS, GRAY, GREEN, ORANGE, PURPLE, VERMILION, figure
from pyronat.errors import BlockTooLarge, UnsupportedProgram
from pyronat.reports import StepInfo
from pyronat.study import Fisher, VisibleFisher

METHOD_COLORS = {
    "adam": ORANGE,
    "two-rate": VERMILION,
    "full": BLUE,
    "visible": GREEN,
    "euclidean": PURPLE,
}

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

_SMALLEST_SIDE = 4
"""Pixels along the side of the smallest vector that is drawn as a square image."""

_ACROSS, _SHEET = 20, 60
"""Images in a line, and the most that are drawn of one kind."""

_FRAME = 0.12
"""Gray of the frame of an image, between white and black."""

_ROWS = 400
"""Data that are drawn of one kind, in heat maps and scatter plots."""

_CATEGORIES = 20
"""Different whole numbers up to which there is a bar for each."""


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
            label = f"{row.method}, rate {row.rates}" + (" (failed)" if row.error else "")
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


def samples(
    sites: Mapping[str, Mapping[str, Tensor]], path: str | os.PathLike[str], title: str = ""
) -> None:
    """Draws values of sites, such as data and what a program makes of them, beside each other.

    What has the pixels of a square, as a vector of 64, or two axes is drawn as images; one number
    for each datum as histograms; two as points; anything else as heat maps, with a row for each
    datum, sorted along the direction in which the first kind varies most. NaN stays white.

    Args:
        sites: for each site, values `[data, *event]` by what they are.
        path: the picture file; its ending says in which format.
        title: above it.

    Raises:
        UnsupportedProgram: if there is nothing to draw.
    """
    shown = {
        name: {kind: values.detach().cpu().double() for kind, values in kinds.items()}
        for name, kinds in sites.items()
        if all(values.numel() for values in kinds.values())
    }
    if not shown:
        raise UnsupportedProgram("there are no observed sites whose values could be drawn")
    heights = [_height(kinds) for kinds in shown.values()]
    with figure(path, (8.4, sum(heights) + 0.5)) as drawn:
        parts = drawn.subfigures(len(shown), 1, height_ratios=heights, squeeze=False)[:, 0]
        for part, (name, kinds) in zip(parts, shown.items(), strict=True):
            first = next(iter(kinds.values()))
            if _side(first):
                _images(part, name, kinds)
            elif first.dim() == 1:
                _histograms(part.subplots(), name, kinds)
            elif math.prod(first.shape[1:]) == 2 and not _whole(first):
                _points(part, name, kinds)
            else:
                _rows(part, name, kinds)
        drawn.suptitle(title)


def _side(values: Tensor) -> tuple[int, int] | None:
    """Height and width of an image of each datum, or None if they are no images."""
    event = values.shape[1:]
    if len(event) == 2 and min(event) >= _SMALLEST_SIDE:
        return event[0], event[1]
    side = math.isqrt(math.prod(event))
    square = len(event) == 1 and side**2 == event[0] and side >= _SMALLEST_SIDE
    return (side, side) if square else None


def _whole(values: Tensor) -> bool:
    """Whether values are a few whole numbers."""
    return bool((values == values.round()).all()) and len(values.unique()) <= _CATEGORIES


def _height(kinds: Mapping[str, Tensor]) -> float:
    """Inches of the picture of a site."""
    first = next(iter(kinds.values()))
    if (side := _side(first)) is None:
        return 3.2
    lines = sum(math.ceil(min(len(v), _SHEET) / _ACROSS) for v in kinds.values())
    return 0.3 * len(kinds) + 8.0 / _ACROSS * side[0] / side[1] * lines


def _images(part: Any, name: str, kinds: Mapping[str, Tensor]) -> None:
    """Draws sheets of images, one below the other, with one scale of gray."""
    first = next(iter(kinds.values()))
    height, width = _side(first) or (1, 1)
    low, high = first[first.isfinite()].min().item(), first[first.isfinite()].max().item()
    lines = [math.ceil(min(len(values), _SHEET) / _ACROSS) for values in kinds.values()]
    grid = part.subplots(len(kinds), 1, squeeze=False, height_ratios=lines)[:, 0]
    for axes, (kind, values), count in zip(grid, kinds.items(), lines, strict=True):
        tiles = values[:_SHEET].reshape(-1, height, width)
        for value in (low + _FRAME * (high - low), torch.nan):
            tiles = torch.nn.functional.pad(tiles, (1, 1, 1, 1), value=value)
        blank = tiles.new_full((count * _ACROSS - len(tiles), *tiles.shape[1:]), torch.nan)
        sheet = torch.cat([tiles, blank]).unflatten(0, (count, _ACROSS)).transpose(1, 2)
        shown = sheet.flatten(2, 3).flatten(0, 1).numpy()
        axes.imshow(shown, cmap="gray_r", vmin=low, vmax=high, interpolation="nearest")
        axes.set_title(f"{name}: {kind}", loc="left")
        axes.set_axis_off()


def _histograms(axes: Any, name: str, kinds: Mapping[str, Tensor]) -> None:
    """Draws how often values occur, as shares or densities."""
    finite = {kind: values[values.isfinite()] for kind, values in kinds.items()}
    every = torch.cat(list(finite.values()))
    whole = _whole(every)
    if whole:
        width = 0.8 / len(kinds)
        for number, (kind, values) in enumerate(finite.items()):
            places, counts = values.unique(return_counts=True)
            shift = width * (number - (len(kinds) - 1) / 2)
            heights = (counts / len(values)).tolist()
            options = {"width": width, "color": COLORS[number], "label": kind}
            axes.bar((places + shift).tolist(), heights, **options)
        axes.set_xticks(every.unique().tolist())
    else:
        low, high = every.quantile(0.005).item(), every.quantile(0.995).item()
        for number, (kind, values) in enumerate(finite.items()):
            bins = min(_BARS, max(6, round(2 * math.sqrt(len(values)))))
            options = {"bins": bins, "range": (low, high), "density": True, "label": kind}
            axes.hist(values.tolist(), histtype="step", color=COLORS[number], **options)
    axes.set_xlabel(name)
    axes.set_ylabel("share" if whole else "density")
    axes.legend()


def _points(part: Any, name: str, kinds: Mapping[str, Tensor]) -> None:
    """Draws pairs of numbers as points, on the same axes."""
    grid = part.subplots(1, len(kinds), sharex=True, sharey=True, squeeze=False)[0]
    for number, (axes, (kind, values)) in enumerate(zip(grid, kinds.items(), strict=True)):
        xs, ys = values[:_ROWS].reshape(-1, 2).T.tolist()
        axes.scatter(xs, ys, s=6, color=COLORS[number], alpha=0.6, linewidths=0)
        axes.set_title(f"{name}: {kind}")


def _rows(part: Any, name: str, kinds: Mapping[str, Tensor]) -> None:
    """Draws a row for each datum, sorted, with one scale of color."""
    first = next(iter(kinds.values()))
    first = first.reshape(len(first), -1)
    known = first.nan_to_num()
    main = torch.linalg.svd(known - known.mean(0), full_matrices=False).Vh[0]
    finite = first[first.isfinite()]
    low, high = finite.quantile(0.01).item(), finite.quantile(0.99).item()
    grid = part.subplots(1, len(kinds), sharex=True, squeeze=False)[0]
    for axes, (kind, values) in zip(grid, kinds.items(), strict=True):
        rows = values.reshape(len(values), -1)[:_ROWS]
        order = (rows.nan_to_num() @ main).argsort()
        options = {"aspect": "auto", "cmap": "Blues", "vmin": low, "vmax": high}
        image = axes.imshow(rows[order].numpy(), interpolation="nearest", **options)
        axes.set_title(f"{_short(name, 30)}: {kind}")
        axes.set_yticks([])
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(visible=False)
    part.colorbar(image, ax=list(grid), shrink=0.8)
