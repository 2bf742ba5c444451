"""What a trained program makes of its data: observed values, and others drawn in their place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from pyro import poutine
from torch import Tensor

from pyronat.recipes import Recipe, sites_of
from pyronat.tracing import own_random_numbers, run_on

DATA, DRAWN = "data", "drawn"

SPELLED = 4
"""Sites up to which the name of several of them names all."""


@dataclass(frozen=True)
class Prediction:
    """An observed site, or several of the same shape, and draws of the program in their place.

    Attributes:
        name: of the site.
        data: observed values `[data, *event]`; masked ones are NaN.
        drawn: drawn ones, of the same shape.
    """

    name: str
    data: Tensor
    drawn: Tensor

    @property
    def panels(self) -> Mapping[str, Tensor]:
        """Both, by what to call them."""
        return {DATA: self.data, DRAWN: self.drawn}


def predictions(recipe: Recipe, seed: int = 0) -> tuple[Prediction, ...]:
    """Draws the observed sites of a program as often as there are data.

    Hidden sites outside of all plates, as the weights of a regression, are drawn by the guide where
    it has them, all others by the model: what is seen are new data, not reconstructions. Pyro's
    parameters and the random numbers of training are left alone.

    Args:
        recipe: the program.
        seed: of the draws.

    Returns:
        One entry for each observed site with an entry for each datum; where there is no such site,
        for all others, with all entries in a line. Sites that have the same shape, as those of a
        chain or of a network of categories, are joined to one entry, in their order.
    """
    program, hidden = recipe.program, recipe.hidden
    with torch.no_grad(), own_random_numbers(seed):
        of_guide, sites = sites_of(program, recipe.guide)
        shared = {s["name"]: s["value"] for s in of_guide if s["name"] not in hidden.local}
        with poutine.block():
            run = run_on(program.model, program.args, program.kwargs, shared)
    values = {record.name: record.value for record in run.records}
    pairs = {
        site["name"]: (_masked(site["value"], site), _masked(values[site["name"]], site))
        for site in sites
        if site["is_observed"] and site["name"] in values
    }
    found = {
        name: [_by_datum(value, program.size) for value in both] for name, both in pairs.items()
    }
    known = {n: (d, w) for n, (d, w) in found.items() if d is not None and w is not None}
    return _joined(known or {n: (d.reshape(-1), w.reshape(-1)) for n, (d, w) in pairs.items()})


def _masked(value: Tensor, site: Mapping[str, object]) -> Tensor:
    """Values, NaN where they do not count."""
    mask = site["mask"]
    value = value.to(torch.promote_types(value.dtype, torch.get_default_dtype()))
    if not isinstance(mask, Tensor):
        return value
    mask = mask.reshape(*mask.shape, *[1] * (value.dim() - mask.dim()))
    return torch.where(mask, value, torch.nan)


def _by_datum(value: Tensor, size: int) -> Tensor | None:
    """A value with its data along the first axis, or None where it has no axis of them."""
    axes = [axis for axis, length in enumerate(value.shape) if length == size]
    if size == 1 or not axes:
        return None
    rows = value.movedim(axes[0], 0)
    return rows.reshape(size, *(length for length in rows.shape[1:] if length > 1))


def _joined(pairs: Mapping[str, tuple[Tensor, Tensor]]) -> tuple[Prediction, ...]:
    """Predictions; those of one shape `[data]` or `[data, size]` as one `[data, sites, size]`."""
    groups: dict[object, list[str]] = {}
    for name, (data, _) in pairs.items():
        groups.setdefault(data.shape if data.dim() <= 2 else name, []).append(name)
    found = []
    for names in groups.values():
        if len(names) == 1:
            found.append(Prediction(names[0], *pairs[names[0]]))
            continue
        data, drawn = (
            torch.stack(
                [pairs[name][kind].reshape(len(pairs[name][kind]), -1) for name in names], 1
            )
            for kind in (0, 1)
        )
        short = names if len(names) <= SPELLED else [names[0], names[1], "…", names[-1]]
        found.append(Prediction(", ".join(short), data, drawn))
    return tuple(found)
