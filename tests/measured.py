"""What a step measures, as one matrix, and the slow reference: Hessians of divergences.

The reference runs the program on the values of the trace that the loss made, as constants, and
differentiates torch's closed-form divergences twice, or averages outer products of scores.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.infer import ELBO, Trace_ELBO
from torch import Tensor
from torch.distributions import Distribution, kl_divergence

from pyronat import Full, NaturalGradient, NaturalSVI
from pyronat.steps import ConstantDamping, RunningAverage

Program = Callable[..., Any]


class Recorded(Trace_ELBO):
    """A `Trace_ELBO` that keeps its last pair of traces."""

    traces: tuple[poutine.Trace, poutine.Trace]

    def _get_trace(self, *args: Any) -> Any:
        self.traces = super()._get_trace(*args)
        return self.traces


def still_step(
    model: Program, guide: Program, *args: Any, loss: ELBO | None = None, **options: Any
) -> NaturalSVI:
    """One step of length 0 that measures both programs, model parents from the posterior."""
    options = {"geometry": Full("posterior"), "guide_geometry": Full(), **options}
    optim = NaturalGradient(
        lr=0.0,
        damping=ConstantDamping(1.0),
        curvature=RunningAverage(decay=0.0, refresh=1),
        **options,
    )
    svi = NaturalSVI(model, guide, optim, Recorded() if loss is None else loss)
    svi.step(*args)
    assert svi.info is not None and svi.info.accepted
    return svi


def matrix_of(svi: NaturalSVI, role: Any, sizes: Mapping[str, int]) -> Tensor:
    """The measured curvature `[P, P]`, parameters in the order of their names.

    Args:
        svi: after a step.
        role: "model" or "guide".
        sizes: number of entries of each parameter; those without a block get zeros.
    """
    side = svi.optim.sides[role]
    names = sorted(sizes)
    starts = dict(
        zip(names, torch.tensor([0, *(sizes[n] for n in names)]).cumsum(0).tolist(), strict=False)
    )
    total = sum(sizes.values())
    found = torch.zeros(total, total)
    for name, curvature in side.average.items():
        block = side.plan.blocks[name]
        index = {
            param: torch.arange(starts[param], starts[param] + sizes[param]).reshape(shape)
            for param, shape in zip(block.params, block.shapes, strict=True)
        }
        for entries, matrix in zip(
            side.plan.layouts[name].pack(index), curvature.matrix, strict=True
        ):
            found[entries.unsqueeze(1), entries] = matrix
    return found


def leaves_of(trace: poutine.Trace) -> dict[str, Tensor]:
    """Unconstrained leaves that a program reads, each tensor once, sorted by name."""
    found = {
        name: site["value"].unconstrained()
        if hasattr(site["value"], "unconstrained")
        else site["value"]
        for name, site in trace.nodes.items()
        if site["type"] == "param"
    }
    unique = {id(leaf): name for name, leaf in sorted(found.items())}
    return {name: found[name] for name in sorted(unique.values()) if found[name].requires_grad}


def hessian(value: Tensor, leaves: Mapping[str, Tensor]) -> Tensor:
    """Second derivatives `[P, P]` of a scalar."""
    tensors = list(leaves.values())
    first = torch.autograd.grad(
        value, tensors, create_graph=True, allow_unused=True, materialize_grads=True
    )
    rows = []
    for entry in torch.cat([part.reshape(-1) for part in first]):
        if not entry.requires_grad:
            rows.append(torch.zeros(sum(map(Tensor.numel, tensors))))
            continue
        second = torch.autograd.grad(
            entry, tensors, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        rows.append(torch.cat([part.reshape(-1) for part in second]))
    return torch.stack(rows)


def replayed(program: Program, values: Mapping[str, Tensor], *args: Any) -> poutine.Trace:
    """A run of a program on given values, whose histories are cut."""
    constants = {name: value.detach() for name, value in values.items()}
    # Conditioned sites keep their values, whatever the program would have drawn.
    return poutine.trace(poutine.condition(program, data=constants)).get_trace(*args)


def detached(distribution: Distribution) -> Distribution:
    """The same distribution with constant parameters."""
    found = copy.copy(distribution)
    for name, part in vars(found).items():
        if isinstance(part, Tensor):
            vars(found)[name] = part.detach()
        elif isinstance(part, Distribution):
            vars(found)[name] = detached(part)
    return found


def divergence_hessian(
    program: Program, values: Mapping[str, Tensor], *args: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """Σ_sites ∇² KL(p_θ(site given its parents) ‖ p_θ+ε(site given its parents)), parents fixed.

    Returns:
        The Hessian `[P, P]`, and the leaves by name.
    """
    moved = replayed(program, values, *args)
    total = torch.zeros(())
    for site in moved.nodes.values():
        if not is_random(site):
            continue
        divergence = kl_divergence(detached(site["fn"]), site["fn"])
        if site["mask"] is not None:
            divergence = divergence * site["mask"]
        total = total + (divergence * site["scale"]).sum()
    leaves = leaves_of(moved)
    return hessian(total, leaves), leaves


def is_random(site: Mapping[str, Any]) -> bool:
    """Whether a node of a trace is drawn from a distribution with a density."""
    if site["type"] != "sample":
        return False
    inner: Any = site["fn"]
    while hasattr(inner, "base_dist"):
        inner = inner.base_dist
    return type(inner).__name__ not in {"_Subsample", "Delta", "Unit"}


def latent_values(trace: poutine.Trace) -> dict[str, Tensor]:
    """Values of all random sites of a trace."""
    return {name: site["value"] for name, site in trace.nodes.items() if is_random(site)}


def sizes_of(leaves: Mapping[str, Tensor]) -> dict[str, int]:
    return {name: leaf.numel() for name, leaf in leaves.items()}
