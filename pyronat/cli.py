"""The command line: `pyronat inspect FILE.py` and `pyronat train FILE.py`."""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import math
import sys
import warnings
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pyronat.analysis import analyze
from pyronat.arguments import make_parser
from pyronat.checkpoints import put, read, stored
from pyronat.comparison import (
    TWO_RATES,
    Comparison,
    best_rows,
    guide_params,
    json_lines,
    table,
)
from pyronat.drawing import check_pictures
from pyronat.errors import (
    CheckpointMismatch,
    PyronatError,
    PyronatWarning,
    UnsupportedProgram,
)
from pyronat.inspection import Missing, missing_information
from pyronat.loading import Target, importable, target_of
from pyronat.predictive import predictions
from pyronat.recipes import Recipe, batch_notes
from pyronat.training import Batches, Files, Settings, evaluate, start, train

INTERRUPTED = 130
"""Exit code of a training that was ended by an interrupt, as shells have it."""


def run() -> None:
    """The command `pyronat`."""
    sys.exit(main())


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: its arguments; by default those of the process.

    Returns:
        The exit code.

    Raises:
        PyronatError: with `--traceback`; otherwise its message is printed.
    """
    parser = make_parser(inspect_command, train_command)
    try:
        options = parser.parse_args(argv)
        with _environment(options), _heard(options.verbose):
            done: int = options.command(options, parser)
            return done
    except SystemExit as end:  # argparse has printed what is wrong
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        print("pyronat: interrupted", file=sys.stderr)
        return INTERRUPTED
    except PyronatError as error:
        if options.traceback:
            raise
        print(f"pyronat: {type(error).__name__}: {error}", file=sys.stderr)
        return 1


@contextmanager
def _environment(options: argparse.Namespace) -> Generator[None, None, None]:
    """Device, precision and threads as asked for; afterwards as before."""
    before = torch.get_default_device(), torch.get_default_dtype(), torch.get_num_threads()
    try:
        torch.set_default_device(options.device)
        if options.double:
            torch.set_default_dtype(torch.float64)
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        yield
    finally:
        torch.set_default_device(before[0])
        torch.set_default_dtype(before[1])
        torch.set_num_threads(before[2])


@contextmanager
def _heard(verbose: int) -> Generator[None, None, None]:
    """In this context warnings of the package are notes, and its log is on standard error."""
    log, handler = logging.getLogger("pyronat"), logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    before = log.level
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("default", PyronatWarning)
        usual = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(category, PyronatWarning):
                _say([str(message)])
            else:
                usual(message, category, *where, **more)

        warnings.showwarning = show
        if verbose:
            stack.callback(log.setLevel, before)
            stack.callback(log.removeHandler, handler)
            log.setLevel(logging.INFO if verbose == 1 else logging.DEBUG)
            log.addHandler(handler)
        yield


# Commands


def inspect_command(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Reports the structure of a program.

    Args:
        options: what was asked for.
        parser: reports wrong usage.

    Returns:
        The exit code.
    """
    target = _target(options, parser)
    if options.checkpoint is not None and not options.checkpoint.is_file():
        parser.error(f"there is no checkpoint {options.checkpoint}")
    if options.blanket is not None and options.plot is None:
        parser.error("--blanket is of the picture of --plot, which is missing")
    _check_folders(parser, options.plot, options.heatmap)
    _check_pictures(parser, options.plot, options.heatmap)
    with importable(target.path):
        recipe = start(target, options.seed, options.size)
        _say(recipe.notes)
        if options.checkpoint is not None:
            _take_parameters(options.checkpoint, recipe)
        program = recipe.program
        guide = recipe.guide if recipe.hidden.drawn else None
        net = analyze(program.model, *program.args, guide=guide, **program.kwargs)
        missing = None
        if options.spectrum or options.heatmap is not None:
            missing = missing_information(recipe, options.dreams)
    _print_structure(options, net, missing)
    if options.plot is not None:
        net.plot(options.plot, blanket_of=options.blanket)
    if options.heatmap is not None and missing is not None:
        from pyronat import plot

        plot.fisher_blocks(missing.fisher, options.heatmap)
    return 0


def _print_structure(options: argparse.Namespace, net: Any, missing: Missing | None) -> None:
    if options.json:
        content = json.loads(net.to_json())
        if missing is not None:
            content["missing_information"] = missing.as_list()
        print(json.dumps(content, indent=2))
    elif options.dot:
        print(net.to_dot())
    else:
        print(net)
        if missing is not None:
            print("\n".join(["", *missing.report()]))


def train_command(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Trains a program, or compares methods on it.

    Args:
        options: what was asked for.
        parser: reports wrong usage.

    Returns:
        The exit code.
    """
    target = _target(options, parser)
    _check_files(options, parser)
    _check_pictures(parser, options.plot, options.samples)
    with importable(target.path):
        recipe = start(target, options.seed, options.size, options.loss)
        settings = _settings(options, recipe)
        _say(recipe.notes)
        _say(batch_notes(recipe, settings.batch_size))
        for path in (options.checkpoint, options.metrics):
            if path is not None and not options.resume:
                path.unlink(missing_ok=True)
        if options.compare:
            return _compare(options, target, settings, _methods(options.compare, recipe))
        return _train(options, recipe, settings)


def _train(options: argparse.Namespace, recipe: Recipe, settings: Settings) -> int:
    files = Files(options.checkpoint, options.save_every, options.resume, options.metrics)
    before = evaluate(recipe, settings)
    found = train(recipe, settings, files, options.quiet)
    after, optim = evaluate(recipe, settings), found.svi.optim
    loss, data = type(found.svi.loss).__name__, recipe.program.size
    judged = "exact" if recipe.program.log_likelihood is not None else loss
    print(f"{recipe.program.name}: {loss}, {data} data, {settings.geometry} geometry")
    print(f"steps: {optim.step_count}" + (f", {found.done} before" if found.done else ""))
    print(f"loss: {before:.5g} at the start, {after:.5g} now (nats per datum, {judged}, all data)")
    averaged = found.svi.averaged if settings.averaging else nullcontext
    if settings.averaging:
        with averaged():
            print(f"averaged: {evaluate(recipe, settings):.5g}")
    if found.undone:
        print("the last step was taken back: things were better before")
    if found.infos:
        seconds = sum(info.seconds for info in found.infos)
        print(f"seconds: {seconds:.2f}, {1000 * seconds / len(found.infos):.1f} ms per step")
    for name in ("checkpoint", "metrics", "plot", "samples"):
        if getattr(options, name) is not None:
            print(f"{name}: {getattr(options, name)}")
    if options.plot is not None:
        from pyronat import plot

        batch = min(settings.batch_size or data, data)
        plot.training(found.infos, options.plot, data=batch, title=recipe.program.name)
    if options.samples is not None:
        from pyronat import plot

        with averaged():
            panels = {one.name: one.panels for one in predictions(recipe, options.seed)}
        plot.samples(panels, options.samples, title=recipe.program.name)
    if found.interrupted and files.checkpoint is not None:
        print("interrupted; --resume goes on from the checkpoint", file=sys.stderr)
    return INTERRUPTED if found.interrupted else 0


def _methods(asked: tuple[str, ...], recipe: Recipe) -> tuple[str, ...]:
    """The methods that were asked for, without those that a program has no use for.

    Args:
        asked: the methods.
        recipe: the program.

    Returns:
        Those that it can be trained by.

    Raises:
        UnsupportedProgram: if there are none.
    """
    if TWO_RATES not in asked or guide_params(recipe):
        return asked
    left = tuple(method for method in asked if method != TWO_RATES)
    why = "the guide has no parameters of its own, to have a rate of their own"
    if not left:
        raise UnsupportedProgram(
            f"{recipe.program.name}: {why}; leave {TWO_RATES} out of --compare"
        )
    _say([f"{TWO_RATES} is left out: {why}"])
    return left


def _compare(
    options: argparse.Namespace, target: Target, settings: Settings, methods: tuple[str, ...]
) -> int:
    def begin(seed: int) -> Recipe:
        return start(target, seed, options.size, options.loss)

    comparison = Comparison(methods, settings, options.rates, options.seeds)
    runs = comparison.run(begin, options.quiet)
    rows = best_rows(runs)
    print("\n".join(table(rows, options.rates)))
    if options.metrics is not None:
        options.metrics.write_text(json_lines(runs))
    if all(row.error is not None for row in rows):
        return 1
    path = options.plot or Path(f"{target.path.stem}-comparison.png")
    if options.plot is None and importlib.util.find_spec("matplotlib") is None:
        _say(["there is no picture, for want of matplotlib: pip install 'pyronat[cli]'"])
        return 0
    from pyronat import plot

    plot.comparison(rows, path, title=target.member or target.path.stem)
    print(f"\npicture: {path}")
    return 0


# What commands share


def _target(options: argparse.Namespace, parser: argparse.ArgumentParser) -> Target:
    try:
        return target_of(options.file, options.guide)
    except ValueError as error:
        parser.error(str(error))


def _check_folders(parser: argparse.ArgumentParser, *paths: Path | None) -> None:
    for path in paths:
        if path is not None and not path.resolve().parent.is_dir():
            parser.error(f"there is no folder {path.parent} to write {path.name} to")


def _check_files(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuses options that exclude each other, and files that would be lost."""
    one = (options.checkpoint, options.resume, options.samples, options.average)
    if options.compare and any(one):
        parser.error("--compare trains several times: no checkpoint, no samples, no average")
    if options.resume and options.checkpoint is None:
        parser.error("--resume goes on from the file of --checkpoint, which is missing")
    paths = (options.checkpoint, options.metrics, options.plot, options.samples)
    _check_folders(parser, *paths)
    if options.resume and not options.checkpoint.exists():
        print(f"there is no {options.checkpoint} yet: from the beginning", file=sys.stderr)
        return
    for path in (options.checkpoint, options.metrics):
        kept = path is not None and path.exists() and not options.resume
        if kept and not options.overwrite:
            parser.error(f"{path} is there already: --resume goes on, --overwrite begins anew")


def _check_pictures(parser: argparse.ArgumentParser, *paths: Path | None) -> None:
    """Says before the work, not after it, that pictures cannot be drawn."""
    asked = [path for path in paths if path is not None]
    if asked:
        try:
            check_pictures(*asked)
        except ValueError as error:
            parser.error(str(error))


def _take_parameters(path: Path, recipe: Recipe) -> None:
    """Gives a program the parameters of a checkpoint.

    Args:
        path: the checkpoint.
        recipe: the program.

    Raises:
        CheckpointMismatch: if it has other parameters.
    """
    state = read(path, map_location=torch.get_default_device())
    names, saved = set(stored()), state.get("parameters", {})
    if not isinstance(saved, dict) or names != set(saved):
        differ = ", ".join(sorted(names ^ set(saved))[:5])
        raise CheckpointMismatch(
            f"{path} is not of {recipe.program.name}: the parameters {differ} differ"
        )
    put(saved)


def _say(notes: Sequence[str]) -> None:
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def _settings(options: argparse.Namespace, recipe: Recipe) -> Settings:
    """How to train, with the program's own batch size where none was given."""
    size = options.batch_size or recipe.program.batch_size
    given = Settings(
        steps=options.steps or 1,
        lr=options.lr,
        decays=options.schedule == "linear",
        geometry=options.geometry,
        guide_geometry=options.guide_geometry,
        mixing=options.mixing,
        batch_size=size,
        particles=options.particles,
        seed=options.seed,
        averaging=options.average,
    )
    per_epoch = Batches(recipe.program, size, options.seed).per_epoch
    steps = options.steps or math.ceil((options.epochs or 0) * per_epoch) or 200
    return replace(given, steps=steps)
