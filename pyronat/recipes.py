"""What a program is trained by where its author does not say: a guide, a loss, a geometry."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from pyro import poutine
from pyro.infer import (
    ELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    config_enumerate,
)
from pyro.infer.autoguide import AutoNormal

from pyronat.errors import InvalidProgramFile
from pyronat.geometry import Euclidean, Full, Geometry, Visible
from pyronat.loading import Loaded
from pyronat.rws import ReweightedWakeSleep
from pyronat.tracing import is_random

LossName: TypeAlias = Literal["auto", "trace", "graph", "mean-field", "enum", "wake-sleep"]

SLEEP_PARTICLES = 10
"""Guide draws for each datum under wake–sleep, unless a user says how many."""


@dataclass(frozen=True)
class Hidden:
    """Hidden sites of a program, as one run shows them.

    Attributes:
        drawn: those that the guide draws.
        discrete: the discrete ones among them.
        enumerated: those that the guide enumerates.
        summed: those that are left to the model, to be summed out.
        unmarked: those among them that the model does not mark to be enumerated.
        undrawn: those that are left to the model and cannot be summed out.
        nesting: depth of the plates of both programs, as Pyro's `max_plate_nesting` counts them.
        local: hidden sites inside a plate.
        outside: sites of the model that lie in no plate, observed ones too.
    """

    drawn: tuple[str, ...]
    discrete: tuple[str, ...]
    enumerated: tuple[str, ...]
    summed: tuple[str, ...]
    unmarked: tuple[str, ...]
    undrawn: tuple[str, ...]
    nesting: int
    local: frozenset[str]
    outside: tuple[str, ...]


@dataclass(frozen=True)
class Recipe:
    """A program with all that its training takes.

    Attributes:
        program: the program, with a guide.
        guide: its guide.
        hidden: its hidden sites.
        loss_name: the loss.
        notes: what was chosen and not asked for, for people.
    """

    program: Loaded
    guide: Callable[..., Any]
    hidden: Hidden
    loss_name: LossName
    notes: tuple[str, ...]

    def loss(self, particles: int | None = None) -> ELBO:
        """The loss.

        Args:
            particles: guide draws; None for the usual number.

        Returns:
            One for `SVI` and `NaturalSVI`.
        """
        if self.loss_name == "wake-sleep":
            return ReweightedWakeSleep(num_particles=particles or SLEEP_PARTICLES)
        kinds: dict[str, Any] = {
            "trace": Trace_ELBO,
            "graph": TraceGraph_ELBO,
            "mean-field": TraceMeanField_ELBO,
            "enum": TraceEnum_ELBO,
        }
        nesting = {"max_plate_nesting": self.hidden.nesting}
        found: ELBO = kinds[self.loss_name](num_particles=particles or 1, **nesting)
        return found

    @property
    def exact(self) -> bool:
        """Whether the loss has no noise: nothing is drawn."""
        return set(self.hidden.drawn) == set(self.hidden.enumerated)

    def geometry(self, name: str, mixing: Any = None) -> Geometry:
        """A geometry by its name.

        Args:
            name: "full", "visible" or "euclidean".
            mixing: share of the full geometry in the visible one, or "auto"; None for the default.

        Returns:
            The geometry.
        """
        if name == "visible":
            options = {} if mixing is None else {"mixing": mixing}
            return Visible(posterior="guide" if self.hidden.drawn else "enumerate", **options)
        return Full() if name == "full" else Euclidean()


def recipe_of(program: Loaded, loss: LossName = "auto") -> Recipe:
    """Completes a program.

    Hidden sites that no guide draws are summed out where they are discrete and have finitely many
    values, else they get an `AutoNormal`. The loss is `TraceEnum_ELBO` where something is summed
    out, `ReweightedWakeSleep` where the guide draws discrete values, else `Trace_ELBO`. Parameters
    are made on the way; random numbers are drawn from the global generator.

    Args:
        program: the program, with or without a guide.
        loss: the loss, or "auto".

    Returns:
        The recipe.

    Raises:
        InvalidProgramFile: if a hidden site can neither be summed out nor has a guide.
    """
    notes: list[str] = []
    guide, model = program.guide, program.model
    if guide is None:
        guide, made = _automatic(program)
        notes.append(made)
    hidden = _hidden(program, guide)
    if hidden.undrawn:
        raise InvalidProgramFile(
            f"{program.name}: {', '.join(hidden.undrawn)} cannot be summed out, and the guide "
            "does not draw them; draw them in the guide (--guide NAME names another one)"
        )
    if hidden.unmarked:
        model = config_enumerate(model, "parallel")
        notes.append(f"summed out, though not marked to be: {', '.join(hidden.unmarked)}")
    found = replace(program, model=model, guide=guide)
    return Recipe(found, guide, hidden, _chosen(loss, hidden), tuple(notes))


def _chosen(loss: LossName, hidden: Hidden) -> LossName:
    if loss != "auto":
        return loss
    if hidden.summed or hidden.enumerated:
        return "enum"
    return "wake-sleep" if hidden.discrete else "trace"


def _automatic(program: Loaded) -> tuple[Callable[..., Any], str]:
    """A guide for a program that has none, and what it is in words."""
    _, every = sites_of(program, _empty)
    sites = [site for site in every if not site["is_observed"]]
    drawn = [site["name"] for site in sites if not site["fn"].support.is_discrete]
    if not drawn:
        summed = "; discrete hidden variables are summed out" if sites else ""
        return _empty, f"there is no guide: took an empty one{summed}"
    model = config_enumerate(program.model, "parallel")
    guide = AutoNormal(poutine.block(model, expose=drawn))
    return guide, f"there is no guide: took AutoNormal for {', '.join(drawn)}"


def _empty(*args: Any, **kwargs: Any) -> None:
    """The guide of a program whose hidden variables are summed out."""


def sites_of(
    program: Loaded, guide: Callable[..., Any]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Sites of the guide, and random sites of the model on its values, as Pyro has them."""
    with torch.no_grad(), poutine.block():
        trace = poutine.trace(guide).get_trace(*program.args, **program.kwargs)
        model = poutine.replay(program.model, trace=trace)
        found = poutine.trace(model).get_trace(*program.args, **program.kwargs)
    of_guide = [site for site in trace.nodes.values() if site["type"] == "sample"]
    return of_guide, [site for site in found.nodes.values() if is_random(site)]


def _hidden(program: Loaded, guide: Callable[..., Any]) -> Hidden:
    """Hidden sites of a program, and who draws them.

    Args:
        program: the program.
        guide: its guide.

    Returns:
        The hidden sites.
    """
    of_guide, sites = sites_of(program, guide)
    latent = [site for site in sites if not site["is_observed"]]
    drawn = [site for site in of_guide if is_random(site)]
    left = [site for site in latent if site["name"] not in _names(of_guide)]
    summed = [site for site in left if site["fn"].has_enumerate_support]
    return Hidden(
        drawn=_names(drawn),
        discrete=_names(site for site in drawn if site["fn"].support.is_discrete),
        enumerated=_names(site for site in drawn if site["infer"].get("enumerate")),
        summed=_names(summed),
        unmarked=_names(site for site in summed if not site["infer"].get("enumerate")),
        undrawn=_names(site for site in left if not site["fn"].has_enumerate_support),
        nesting=max(map(_depth, [*sites, *of_guide]), default=0),
        local=frozenset(site["name"] for site in latent if site["cond_indep_stack"]),
        outside=_names(site for site in sites if not site["cond_indep_stack"]),
    )


def _names(sites: Iterable[dict[str, Any]]) -> tuple[str, ...]:
    return tuple(site["name"] for site in sites)


def _depth(site: dict[str, Any]) -> int:
    return max((-f.dim for f in site["cond_indep_stack"] if f.vectorized), default=0)


def batch_notes(recipe: Recipe, batch_size: int | None) -> list[str]:
    """What to say about training by batches.

    Args:
        recipe: the program.
        batch_size: data in each step, or None for all of them.

    Returns:
        Lines for people.

    Raises:
        InvalidProgramFile: if the guide has parameters for each datum, which batches mix up.
    """
    if batch_size is None or batch_size >= recipe.program.size:
        return []
    hidden = recipe.hidden
    mixed_up = sorted(hidden.local.difference(hidden.summed))
    if isinstance(recipe.guide, AutoNormal) and mixed_up:
        raise InvalidProgramFile(
            f"{recipe.program.name}: AutoNormal has parameters for each datum of "
            f"{', '.join(mixed_up)}, which batches would mix up; write a guide that reads the "
            "data, or let the model subsample with pyro.plate(..., subsample_size=...), or leave "
            "--batch-size out"
        )
    if not hidden.outside:
        return []
    return [
        f"{', '.join(hidden.outside)} lie outside of all plates and count in full in every batch; "
        "let the model subsample with pyro.plate(..., subsample_size=...) if they should not"
    ]
