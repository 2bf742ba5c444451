"""A training from a file, as the command line runs it: batches, checkpoints, interrupts."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import torch

from pyronat.infer import NaturalSVI
from pyronat.loading import Loaded, Target, load
from pyronat.optim import NaturalGradient
from pyronat.progress import progress, words_of
from pyronat.recipes import LossName, Recipe, recipe_of
from pyronat.reports import JSONLines, StepInfo
from pyronat.steps import Constant, LinearDecay, PolyakRuppert, Schedule
from pyronat.tracing import own_random_numbers

EVALUATION_PARTICLES = 10
"""Guide draws of an evaluation."""

CHUNK = 10
"""Batches that are evaluated at once."""


@dataclass(frozen=True)
class Settings:
    """How to train.

    Attributes:
        steps: number of steps.
        lr: learning rate at the first step.
        decays: whether the rate decays linearly over the steps.
        geometry: "full", "visible" or "euclidean".
        guide_geometry: "full" or "euclidean", or None for what suits the guide.
        mixing: share of the full geometry in the visible one, or "auto"; None for the default.
        batch_size: data for each step, or None for all of them.
        particles: guide draws for each step, or None for the usual number.
        seed: of data, initial values, order of the data and all samples.
        averaging: whether an average of the iterates is kept.
    """

    steps: int
    lr: float = 0.3
    decays: bool = True
    geometry: str = "full"
    guide_geometry: str | None = None
    mixing: float | str | None = None
    batch_size: int | None = None
    particles: int | None = None
    seed: int = 0
    averaging: bool = False

    def schedule(self, lr: float) -> Schedule:
        """The learning rate over the steps.

        Args:
            lr: that of the first step.

        Returns:
            From step number to rate.
        """
        return LinearDecay(lr, self.steps) if self.decays else Constant(lr)


@dataclass(frozen=True)
class Files:
    """Files that a training writes.

    Attributes:
        checkpoint: all that it depends on, or None.
        save_every: steps between checkpoints.
        resume: whether to go on from the checkpoint.
        metrics: a line of JSON for each step, or None.
    """

    checkpoint: Path | None = None
    save_every: int = 100
    resume: bool = False
    metrics: Path | None = None


def start(target: Target, seed: int, size: int | None = None, loss: LossName = "auto") -> Recipe:
    """Empties Pyro's parameter store and makes a program with its parameters, by seed alone.

    Args:
        target: the file.
        seed: the seed; random numbers that follow are seeded with it again.
        size: number of data, or None for the usual one.
        loss: the loss.

    Returns:
        The program.
    """
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    program = load(target, seed, size)
    pyro.set_rng_seed(seed)
    recipe = recipe_of(program, loss)
    pyro.set_rng_seed(seed)
    return recipe


class Batches:
    """The batch of each step, whatever steps came before: every epoch has an order of its own.

    Args:
        program: the program with all its data.
        batch_size: data for each step, or None for all of them.
        seed: of the orders.
    """

    def __init__(self, program: Loaded, batch_size: int | None, seed: int) -> None:
        self._program, self._seed = program, seed
        self._size = program.size if batch_size is None else min(batch_size, program.size)
        self.per_epoch = -(-program.size // self._size)
        """Steps in which each datum is used once."""
        self._epoch, self._order = -1, torch.arange(0)

    def __call__(self, step: int) -> Loaded:
        """The program with the data of a step.

        Args:
            step: number of the step, from 0.

        Returns:
            The program.
        """
        if self._size == self._program.size:
            return self._program
        epoch, place = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator("cpu").manual_seed(1_000_003 * self._seed + epoch)
            self._order = torch.randperm(self._program.size, generator=generator, device="cpu")
            self._epoch = epoch
        index = self._order[place * self._size : (place + 1) * self._size]
        return self._program.rows(index.to(torch.get_default_device()))


def natural(
    recipe: Recipe,
    settings: Settings,
    geometry: str,
    callbacks: Sequence[Callable[[StepInfo, NaturalSVI], None]] = (),
) -> NaturalSVI:
    """A `NaturalSVI` for a program.

    Args:
        recipe: the program.
        settings: how to train it.
        geometry: "full", "visible" or "euclidean"; the last one also of the guide, unless the
            settings say otherwise.
        callbacks: called after each step.

    Returns:
        The training.
    """
    of_guide = settings.guide_geometry or ("euclidean" if geometry == "euclidean" else None)
    optim = NaturalGradient(
        settings.schedule(settings.lr),
        recipe.geometry(geometry, settings.mixing),
        None if of_guide is None else recipe.geometry(of_guide),
        seed=settings.seed,
        averaging=PolyakRuppert() if settings.averaging else None,
    )
    loss = recipe.loss(settings.particles)
    return NaturalSVI(recipe.program.model, recipe.guide, optim, loss, callbacks)


def train(recipe: Recipe, settings: Settings, files: Files, quiet: bool = False) -> Training:
    """Trains a program.

    Args:
        recipe: the program, as `start` made it.
        settings: how to train it.
        files: what to write.
        quiet: whether to show no progress.

    Returns:
        What came of it. An interrupt ends it after a whole step; otherwise the data, or the first
        `CHUNK` batches of them, judge the last one.
    """
    program, infos = recipe.program, list[StepInfo]()
    batches = Batches(program, settings.batch_size, settings.seed)
    svi = natural(recipe, settings, settings.geometry, [lambda info, svi: infos.append(info)])
    resumed = files.resume and files.checkpoint is not None and files.checkpoint.exists()
    if resumed and files.checkpoint is not None:
        svi.load(files.checkpoint, map_location=torch.get_default_device())
    optim = svi.optim
    done = optim.step_count
    log = None if files.metrics is None else JSONLines(files.metrics)
    with progress(settings.steps, done, quiet) as shown, interrupts() as interrupted:
        while optim.step_count < settings.steps and not interrupted:
            batch = batches(optim.step_count)
            svi.step(*batch.args, **batch.kwargs)
            if program.after_step is not None:
                program.after_step()
            if log is not None:
                log(infos[-1])
            shown.show(optim.step_count, words_of(infos[-1], batch.size))
            if files.checkpoint is not None and optim.step_count % files.save_every == 0:
                svi.save(files.checkpoint)
    undone = False
    if infos and not interrupted:
        judging = next(iter(_parts(program, settings)))
        undone = svi.settle(*judging.args, **judging.kwargs)
    if files.checkpoint is not None:
        svi.save(files.checkpoint)
    if log is not None:
        log.close()
    return Training(svi, tuple(infos), done, bool(interrupted), undone)


@dataclass(frozen=True)
class Training:
    """What came of a training.

    Attributes:
        svi: the training.
        infos: reports of its steps.
        done: steps that a checkpoint had taken before.
        interrupted: whether it was ended by an interrupt.
        undone: whether the last step was taken back, as things were better before.
    """

    svi: NaturalSVI
    infos: tuple[StepInfo, ...]
    done: int
    interrupted: bool
    undone: bool


@contextmanager
def interrupts() -> Generator[list[int], None, None]:
    """In this context a first interrupt from the keyboard is noted, and a second one is raised.

    Yields:
        A list, which is empty until then.
    """
    noted: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: Any) -> None:
        noted.append(number)
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


def evaluate(recipe: Recipe, settings: Settings) -> float:
    """Loss at the present parameters over all data, with random numbers of its own.

    It is minus the exact log likelihood where a program has one, else the loss with
    `EVALUATION_PARTICLES`, or more where a training has more.

    Args:
        recipe: the program.
        settings: how it is trained; with batches, some of them are evaluated at once.

    Returns:
        Nats per datum.
    """
    program = recipe.program
    with torch.no_grad(), own_random_numbers(0):
        if program.log_likelihood is not None:
            return -float(program.log_likelihood(*program.args)) / program.size
        particles = None
        if not recipe.exact:
            particles = max(EVALUATION_PARTICLES, settings.particles or 1)
        loss, total = recipe.loss(particles), 0.0
        for part in _parts(program, settings):
            total += float(loss.loss(program.model, recipe.guide, *part.args, **part.kwargs))
        return total / program.size


def _parts(program: Loaded, settings: Settings) -> Iterator[Loaded]:
    """All data, in parts of `CHUNK` batches where it is trained by batches.

    Yields:
        The program with each part.
    """
    at_once = program.size if settings.batch_size is None else CHUNK * settings.batch_size
    if at_once >= program.size:
        yield program
        return
    for first in range(0, program.size, at_once):
        yield program.rows(slice(first, first + at_once))
