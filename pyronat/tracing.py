"""The border with Pyro: runs programs and hands out plain records of their sites.

No Pyro message leaves this module.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import pyro
import torch
from pyro import poutine
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.messenger import Messenger
from pyro.util import get_rng_state, set_rng_state
from torch import Tensor
from torch.distributions import transform_to
from torch.distributions.constraints import real
from torch.utils._pytree import tree_leaves

from pyronat.autograd import leaves
from pyronat.buffers import kept_buffers
from pyronat.dataflow import Dataflow
from pyronat.families import peel
from pyronat.records import Plate, Run, SiteRecord
from pyronat.wrappers import clear_caches, distribution_tensors

Program: TypeAlias = Callable[..., Any]
"""A model or a guide."""

_STATES = "enumerated states"

ADDED_PLATES = frozenset({
    _STATES,
    "num_particles_vectorized",
    "num_sleep_particles_vectorized",
})
"""Plates that are not the program's own."""


def is_random(site: Mapping[str, Any]) -> bool:
    """Whether a Pyro node is a random variable: not a subsample, deterministic or factor."""
    if site["type"] != "sample" or type(site["fn"]).__name__ == "_Subsample":
        return False
    if site["infer"].get("_deterministic"):
        return False
    return type(peel(site["fn"])).__name__ not in {"Delta", "Unit"}


def records_of(trace: poutine.Trace) -> tuple[SiteRecord, ...]:
    """Records of the random variables in a trace."""
    return tuple(_record(site) for site in trace.nodes.values() if is_random(site))


def scored_records_of(trace: poutine.Trace) -> tuple[SiteRecord, ...]:
    """Records of all sites with a log-probability: random variables, factors and densities."""
    return tuple(_record(site) for site in trace.nodes.values() if site["type"] == "sample")


def _record(site: Mapping[str, Any]) -> SiteRecord:
    return SiteRecord(
        name=site["name"],
        distribution=site["fn"],
        value=site["value"],
        observed=site["is_observed"],
        scale=site["scale"],
        mask=site["mask"],
        plates=tuple(
            Plate(frame.name, frame.dim, (frame.full_size or frame.size) / max(frame.size, 1))
            for frame in site["cond_indep_stack"]
            if frame.vectorized
        ),
        log_prob=site.get("unscaled_log_prob"),
        enumeration_dim=site["infer"].get("_enumerate_dim"),
        num_values=site["infer"].get("_enum_total"),
        num_samples=site["infer"].get("num_samples"),
    )


def params_of(trace: poutine.Trace) -> dict[str, Tensor]:
    """Unconstrained parameter leaves in a trace by name, sorted.

    A leaf that is registered under several names is one parameter, of the last name.
    """
    found = {}
    for name, site in trace.nodes.items():
        if site["type"] == "param":
            value = site["value"]
            found[name] = value.unconstrained() if hasattr(value, "unconstrained") else value
    names = {id(leaf): name for name, leaf in sorted(found.items())}
    return {name: leaf for name, leaf in sorted(found.items()) if names[id(leaf)] == name}


def _run_of(trace: poutine.Trace) -> Run:
    """A run whose sample values are constants.

    Its parameters are those that the program registers, and those in Pyro's store that it uses
    though another program has registered them.
    """
    records, params = records_of(trace), params_of(trace)
    known = {id(leaf) for leaf in params.values()}
    tensors = [t for record in records for t in distribution_tensors(record.distribution)]
    used = {id(leaf) for leaf in leaves(tensors, ())} - known
    if used:
        stored = pyro.get_param_store().named_parameters()
        params |= {name: leaf for name, leaf in stored if id(leaf) in used}
    return Run(records, dict(sorted(params.items())))


def stored_parameters() -> frozenset[str]:
    """Names of all parameters in Pyro's store."""
    return frozenset(pyro.get_param_store().keys())


def stored_leaves() -> dict[str, Tensor]:
    """Unconstrained leaves of all parameters in Pyro's store, by name."""
    return dict(pyro.get_param_store().named_parameters())


def inside_support(params: Mapping[str, Tensor]) -> bool:
    """Whether constrained parameters are finite and their coordinates can be got back.

    They cannot where exp has overflowed or become 0, or a probability has become exactly 0. All of
    these take coordinates far from 0, so that others need not be looked at.

    Args:
        params: unconstrained leaves by name.

    Returns:
        Whether they are.
    """
    constraints = pyro.get_param_store()._constraints
    held = {n: p.detach() for n, p in params.items() if n in constraints and p.numel()}
    held = {n: p for n, p in held.items() if not isinstance(constraints[n], type(real))}
    if not held:
        return True
    sizes = torch.stack([leaf.abs().max().double().cpu() for leaf in held.values()]).tolist()
    for size, (name, leaf) in zip(sizes, held.items(), strict=True):
        if not size < -math.log(torch.finfo(leaf.dtype).tiny) / 2:
            transform = transform_to(constraints[name])
            value = transform(leaf)
            try:
                back = transform.inv(value)
            except (NotImplementedError, RuntimeError, ValueError):
                back = value
            if not bool(torch.isfinite(value).all() & torch.isfinite(back).all()):
                return False
    return True


def data_count(records: Sequence[SiteRecord]) -> float:
    """Number of data that a loss counts.

    Args:
        records: of a run of the model.

    Returns:
        The largest number of elements of an outermost plate of observed sites, or the number of
        observed values that are in no plate, if that is larger; as often as the loss counts them.
    """
    largest, single = 0.0, 0.0
    for record in records:
        if not record.observed:
            continue
        scale = record.scale
        if isinstance(scale, Tensor):
            scale = float(scale.double().mean())
        plates = [plate for plate in record.plates if plate.name not in ADDED_PLATES]
        if plates:
            dim = plates[0].dim - len(record.distribution.event_shape)
            size = record.value.shape[dim] if -dim <= record.value.dim() else 1
            largest = max(largest, size * scale)
        else:
            single += record.value.numel() * scale
    count = max(largest, single)
    return count if 0 < count < math.inf else 1.0


def create_parameters(
    model: Program,
    guide: Program,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    within: Messenger,
) -> None:
    """Creates the parameters of model and guide as a first evaluation of a loss would.

    Random numbers are used up only if there are new ones.

    Args:
        model: the model.
        guide: its guide.
        args: arguments of both.
        kwargs: their keyword arguments.
        within: sees the parameters first.
    """
    stored, before = stored_parameters(), get_rng_state()
    try:
        with torch.random.fork_rng(), poutine.block(), torch.no_grad(), kept_buffers(), within:
            guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
            poutine.replay(model, trace=guide_trace)(*args, **kwargs)
            after = random_state(), get_rng_state()
    except BaseException:
        set_rng_state(before)
        raise
    set_rng_state(before if stored == stored_parameters() else after[1])
    if stored != stored_parameters():
        set_random_state(after[0])


def guide_messenger(program: Program) -> GuideMessenger | None:
    """The guide that runs its model along with itself, as an `AutoMessenger` does, or None."""
    unwrapped = poutine.unwrap(program)
    return unwrapped if isinstance(unwrapped, GuideMessenger) else None


def by_itself(program: Program) -> Program:
    """The program without the observed sites of a model that it runs along with itself."""
    if guide_messenger(program) is None:
        return program
    return poutine.block(program, hide_fn=_is_observed)  # type: ignore[no-any-return]


def _is_observed(message: Mapping[str, Any]) -> bool:
    return message["type"] == "sample" and bool(message["is_observed"])


def stored_names() -> dict[int, str]:
    """Names of all parameters in Pyro's store, by the identity of their unconstrained leaves."""
    return {id(leaf): name for name, leaf in pyro.get_param_store().named_parameters()}


class _Outermost(Messenger):
    """Decides a site's value last, when its distribution is already expanded by the plates."""

    def __init__(self, visit: Callable[[dict[str, Any]], None]) -> None:
        super().__init__()
        self._visit = visit

    def _pyro_sample(self, message: dict[str, Any]) -> None:
        if is_random(message):
            self._visit(message)


class FreshTransforms(Messenger):
    """In this context transforms of distributions forget what they have computed before it.

    They know values by identity, and would give back inverses by parameters of earlier steps.
    """

    def __init__(self) -> None:
        super().__init__()
        self._met: set[int] = set()

    def _pyro_sample(self, message: dict[str, Any]) -> None:
        clear_caches(message["fn"], self._met)


def _set_value(message: dict[str, Any], value: Tensor) -> None:
    message["value"] = value
    message["done"] = True


def _draw_constant(message: dict[str, Any]) -> None:
    """Samples a latent site as a constant: nothing flows back through its value."""
    if not message["is_observed"] and message["value"] is None:
        with torch.no_grad():
            _set_value(message, message["fn"]().detach())


@contextmanager
def quietly() -> Generator[None, None, None]:
    """Without Pyro's validation, whose checks read values, and without its warnings."""
    with ExitStack() as stack:
        stack.enter_context(pyro.validation_enabled(False))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(torch.enable_grad())
        stack.enter_context(poutine.block())
        yield


@contextmanager
def repeatable() -> Generator[Callable[[], None], None, None]:
    """Yields a function that rewinds all random numbers; they are undisturbed afterwards.

    So are the buffers of modules.

    Yields:
        A function that sets the generators of torch, numpy and Python back to where they were.
    """
    with torch.random.fork_rng(), kept_buffers():
        state = get_rng_state()
        try:
            yield lambda: set_rng_state(state)
        finally:
            set_rng_state(state)


def set_seed(seed: int) -> None:
    """Seeds the generators of torch, numpy and Python, those of devices in use alone."""
    # Python and numpy have the same generator.
    twister, (*keys, position) = random.Random(seed).getstate(), random.Random(~seed).getstate()[1]
    _set_torch_seed(seed)
    state = {"random": twister, "numpy": ("MT19937", keys, position)}
    set_rng_state({"torch": torch.random.get_rng_state(), **state})


def _set_torch_seed(seed: int) -> None:
    """Seeds the generators of torch.

    For devices that are not in use `torch.manual_seed` notes the seed with the whole call stack,
    which takes as long as a small network.
    """
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    torch.random.set_rng_state(torch.Generator("cpu").manual_seed(seed).get_state())


def run_constant(
    program: Program,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    values: Mapping[str, Tensor],
) -> Run:
    """Runs a program with the values of some latent sites given; sample values are constants.

    Args:
        program: model or guide.
        args: its arguments.
        kwargs: its keyword arguments.
        values: value `[*batch, *event]` by site.

    Returns:
        The run; observed sites keep their data.
    """

    def visit(message: dict[str, Any]) -> None:
        _give(message, values)
        _draw_constant(message)

    with _Outermost(visit):
        trace = poutine.trace(by_itself(program)).get_trace(*args, **kwargs)
    return _run_of(trace)


def run_followed(
    program: Program,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    values: Mapping[str, Tensor],
    flow: Dataflow,
    see: Callable[[SiteRecord], None],
) -> None:
    """Runs a program while a dataflow follows its tensors.

    Args:
        program: model or guide.
        args: its arguments.
        kwargs: its keyword arguments.
        values: value `[*batch, *event]` by latent site; the others are drawn.
        flow: follows the operations of the program, those of its samplers excepted.
        see: is called at every random site, before the program goes on with the site's value; the
            value of the record is a constant in memory of its own.
    """

    def visit(message: dict[str, Any]) -> None:
        with flow.paused():
            _give(message, values)
            _draw_constant(message)
            _set_value(message, message["value"].detach().clone())
        see(_record(message))

    with _Outermost(visit), torch.backends.mkldnn.flags(enabled=False), flow.active():
        by_itself(program)(*args, **kwargs)


def _give(message: dict[str, Any], values: Mapping[str, Tensor]) -> None:
    if not message["is_observed"] and message["name"] in values:
        _set_value(message, values[message["name"]])


def unconditioned(program: Program) -> Program:
    """The program with its observed sites sampled."""
    return poutine.uncondition(program)  # type: ignore[no-any-return]


def dream(program: Program, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Run:
    """Runs a program forward, observed sites sampled too; sample values are constants.

    Args:
        program: model or guide.
        args: its arguments, which give the sizes of its plates.
        kwargs: its keyword arguments.

    Returns:
        The run; its distributions carry the graph of the parameters.
    """
    with quietly():
        return run_on(program, args, kwargs, {})


def run_on(
    program: Program,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    values: Mapping[str, Tensor],
) -> Run:
    """Runs a program forward with the values of some sites given, all others sampled.

    Args:
        program: model or guide.
        args: its arguments.
        kwargs: its keyword arguments.
        values: value `[*batch, *event]` by site.

    Returns:
        The run; sample values are constants.
    """

    def visit(message: dict[str, Any]) -> None:
        if message["name"] in values:
            _set_value(message, values[message["name"]])
        _draw_constant(message)

    with _Outermost(visit):
        trace = poutine.trace(unconditioned(by_itself(program))).get_trace(*args, **kwargs)
    return _run_of(trace)


class _Watched(Tensor):
    """Indices of a plate that remember whether anything was computed from them."""

    uses: list[str]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Notes every use but questions for the size."""
        name = getattr(func, "__name__", "")
        if name not in {"size", "__len__", "__get__", "dim"}:
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, _Watched):
                    leaf.uses.append(name)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


class OneElement(Messenger):
    """In this context plates have their first element alone, scaled to stand for all.

    Args:
        plates: names of the plates; those whose subsample the program chooses stay as they are.
    """

    def __init__(self, plates: frozenset[str]) -> None:
        super().__init__()
        self._plates = plates
        self._uses: list[str] = []

    def _pyro_sample(self, message: dict[str, Any]) -> None:
        if message["name"] in self._plates and type(message["fn"]).__name__ == "_Subsample":
            indices = torch.zeros(1, dtype=torch.int64).as_subclass(_Watched)
            indices.uses = self._uses
            _set_value(message, indices)

    @property
    def told_apart(self) -> bool:
        """Whether the program has used an index, so that elements may differ."""
        return bool(self._uses)


def in_plate(program: Program, size: int, dim: int) -> Program:
    """The program inside one more plate, leftmost."""
    return pyro.plate(_STATES, size, dim=dim)(program)  # type: ignore[no-any-return]


def fixed_values(values: Mapping[str, Tensor], observed: bool = False) -> Messenger:
    """In this context some random sites have given values.

    Args:
        values: value `[*batch, *event]` by site.
        observed: whether these sites then count as observed.

    Returns:
        The context.
    """

    def visit(message: dict[str, Any]) -> None:
        if message["name"] not in values:
            return
        if observed:
            # Not done yet: Pyro's enumeration has a note to make.
            message["value"], message["is_observed"] = values[message["name"]], True
        else:
            _set_value(message, values[message["name"]])

    return _Outermost(visit)


def constant_samples() -> Messenger:
    """In this context sample values are constants: nothing flows back through them."""
    return _Outermost(_draw_constant)


@contextmanager
def own_random_numbers(seed: int) -> Generator[None, None, None]:
    """Runs programs on random numbers of their own; the caller's streams are not disturbed.

    Nor are the buffers of modules.
    """
    state = get_rng_state()
    with torch.random.fork_rng(), kept_buffers():
        set_seed(seed)
        try:
            yield
        finally:
            set_rng_state(state)


@contextmanager
def own_torch_numbers(seed: int) -> Generator[None, None, None]:
    """As `own_random_numbers`, for what draws from torch alone; those of numpy and Python stay."""
    with torch.random.fork_rng():
        _set_torch_seed(seed)
        yield


def random_state() -> list[Tensor]:
    """States of torch's generators: the processor's, then those of the GPUs in use."""
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [torch.random.get_rng_state(), *gpus]


def set_random_state(state: Sequence[Tensor]) -> None:
    """Takes a state of `random_state`."""
    torch.random.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state_all(list(state[1:]))
