"""The command line: `pyronat inspect FILE.py` and `pyronat train FILE.py`."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pyronat.analysis import analyze
from pyronat.checkpoints import put, read, stored
from pyronat.comparison import METHODS, RATES, Comparison, best_rows, json_lines, table
from pyronat.errors import CheckpointMismatch, PyronatError
from pyronat.inspection import DREAMS, Missing, missing_information
from pyronat.loading import CONVENTIONS, Target, importable, target_of
from pyronat.recipes import Recipe, batch_notes
from pyronat.training import Batches, Files, Settings, evaluate, start, train

INTERRUPTED = 130
"""Exit code of a training that was ended by an interrupt, as shells have it."""

LOSSES = ("auto", "trace", "graph", "mean-field", "enum", "wake-sleep")

_EXAMPLES = """\
examples:
  pyronat inspect model.py                        sites, blocks, districts
  pyronat inspect model.py --spectrum             and why EM is slow here
  pyronat inspect model.py --plot net.png --heatmap fisher.png
  pyronat train model.py --steps 500 --plot curve.png
  pyronat train model.py --epochs 20 --batch-size 100 --checkpoint run.pt --metrics run.jsonl
  pyronat train model.py --epochs 20 --batch-size 100 --checkpoint run.pt --resume
  pyronat train model.py --compare adam,full,visible --plot comparison.png

exit codes: 0 done, 1 the program cannot be trained or read, as the message says, 2 wrong usage,
130 interrupted (after a whole step, with its checkpoint written)
"""


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
    parser = make_parser()
    try:
        options = parser.parse_args(argv)
        with _environment(options):
            done: int = options.command(options, parser)
            return done
    except SystemExit as end:  # argparse has printed what is wrong
        return int(end.code or 0)
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
    _check_folders(parser, options.plot, options.heatmap)
    _check_pictures(options.plot, options.heatmap)
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
    if options.compare and options.plot is None:
        options.plot = Path(f"{target.path.stem}-comparison.png")
    _check_pictures(options.plot)
    with importable(target.path):
        recipe = start(target, options.seed, options.size, options.loss)
        settings = _settings(options, recipe)
        _say(recipe.notes)
        _say(batch_notes(recipe, settings.batch_size, _outside(recipe)))
        if options.compare:
            return _compare(options, target, settings)
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
    if found.undone:
        print("the last step was taken back: it was worse on all data")
    if found.infos:
        seconds = sum(info.seconds for info in found.infos)
        print(f"seconds: {seconds:.2f}, {1000 * seconds / len(found.infos):.1f} ms per step")
    for name in ("checkpoint", "metrics", "plot"):
        if getattr(options, name) is not None:
            print(f"{name}: {getattr(options, name)}")
    if options.plot is not None:
        from pyronat import plot

        batch = min(settings.batch_size or data, data)
        plot.training(found.infos, options.plot, data=batch, title=recipe.program.name)
    if found.interrupted:
        print("interrupted; --resume goes on from the checkpoint", file=sys.stderr)
    return INTERRUPTED if found.interrupted else 0


def _compare(options: argparse.Namespace, target: Target, settings: Settings) -> int:
    def begin(seed: int) -> Recipe:
        return start(target, seed, options.size, options.loss)

    comparison = Comparison(options.compare, settings, options.rates, options.seeds)
    runs = comparison.run(begin, options.quiet)
    rows = best_rows(runs)
    print("\n".join(table(rows, options.rates)))
    if options.metrics is not None:
        options.metrics.write_text(json_lines(runs))
    if any(row.error is None for row in rows):
        from pyronat import plot

        plot.comparison(rows, options.plot, title=target.member or target.path.stem)
        print(f"\npicture: {options.plot}")
    return 0 if any(row.error is None for row in rows) else 1


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
    if options.compare and (options.checkpoint or options.resume):
        parser.error("--compare trains several times and keeps no checkpoint")
    if options.resume and options.checkpoint is None:
        parser.error("--resume goes on from the file of --checkpoint, which is missing")
    _check_folders(parser, options.checkpoint, options.metrics, options.plot)
    if options.resume and not options.checkpoint.exists():
        print(f"there is no {options.checkpoint} yet: from the beginning", file=sys.stderr)
        return
    for path in (options.checkpoint, options.metrics):
        if path is not None and path.exists() and not options.resume:
            if not options.overwrite:
                parser.error(f"{path} is there already: --resume goes on, --overwrite begins anew")
            path.unlink()


def _check_pictures(*paths: Path | None) -> None:
    """Says before the work, not after it, that pictures cannot be drawn."""
    if any(path is not None for path in paths):
        from pyronat.drawing import need_matplotlib

        need_matplotlib()


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


def _outside(recipe: Recipe) -> list[str]:
    """Random sites of the model that lie in no plate."""
    program = recipe.program
    net = analyze(program.model, *program.args, **program.kwargs)
    return [site.name for site in net.sites if not site.plates]


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
    )
    per_epoch = Batches(recipe.program, size, options.seed).per_epoch
    steps = options.steps or math.ceil((options.epochs or 0) * per_epoch) or 200
    return replace(given, steps=steps)


# The parser


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="pyronat",
        description="Natural gradients for Pyro programs: see the structure of one, train it.",
        epilog=_EXAMPLES + "\n" + CONVENTIONS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_inspect(commands)
    _add_train(commands)
    return parser


def _add(commands: Any, name: str, about: str, command: Callable[..., int]) -> Any:
    """A command with the options that all have."""
    parser = commands.add_parser(
        name,
        help=about,
        description=about[0].upper() + about[1:] + ".",
        epilog=CONVENTIONS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=command)
    add = parser.add_argument
    add("file", metavar="FILE.py[:NAME]", help="a file with a Pyro program, see below")
    add("--guide", metavar="NAME", default="", help="name of the guide in the file")
    add("--size", type=_positive, metavar="N", help="number of data; by default the usual one")
    add("--seed", type=int, default=0, metavar="N", help="of data, start and samples (0)")
    add("--device", type=_device, default="cpu", help="cpu, cuda, cuda:1, … (cpu)")
    add("--double", action="store_true", help="double precision")
    add("--threads", type=_positive, metavar="N", help="of torch; 1 is best for small programs")
    add("--traceback", action="store_true", help="with errors, where in the code they are from")
    return parser


def _add_inspect(commands: Any) -> None:
    about = "print the structure of a program: sites, blocks of its Fisher information, districts"
    parser = _add(commands, "inspect", about, inspect_command)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="as JSON")
    form.add_argument("--dot", action="store_true", help="the graph in the language of Graphviz")
    add = parser.add_argument
    add("--plot", type=Path, metavar="OUT", help="draw the network into a picture file")
    add("--blanket", metavar="SITE", help="whose Markov blanket is to stand out there")
    add("--spectrum", action="store_true", help="measure which information hiding takes away")
    add("--heatmap", type=Path, metavar="OUT", help="draw the Fisher information, full and visible")
    add("--dreams", type=_positive, default=DREAMS, metavar="N", help=f"behind both ({DREAMS})")
    add("--checkpoint", type=Path, metavar="FILE", help="at the parameters of this training")


def _add_train(commands: Any) -> None:
    parser = _add(commands, "train", "train a program by natural gradients", train_command)
    add = parser.add_argument
    add("--geometry", choices=METHODS[1:], default="full", help="metric of the model (full)")
    kinds = ("full", "euclidean")
    add("--guide-geometry", choices=kinds, help="metric of the guide; by default what suits it")
    add(
        "--mixing", type=_mixing, metavar="SHARE", help="of the full in the visible metric, or auto"
    )
    add("--loss", choices=LOSSES, default="auto", help="by default what the hidden variables need")
    add("--particles", type=_positive, metavar="N", help="guide draws for each step")
    add("--lr", type=_rate, default=0.3, metavar="RATE", help="at the first step (0.3)")
    add("--schedule", choices=("linear", "constant"), default="linear", help="of the rate (linear)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=_positive, metavar="N", help="number of steps (200)")
    length.add_argument("--epochs", type=_rate, metavar="N", help="or how often to see all data")
    add("--batch-size", type=_positive, metavar="N", help="data for each step; by default all")
    add("--checkpoint", type=Path, metavar="FILE", help="keep all that training depends on here")
    add("--save-every", type=_positive, default=100, metavar="N", help="steps between (100)")
    add("--resume", action="store_true", help="go on from the checkpoint, as if never stopped")
    add("--overwrite", action="store_true", help="begin anew where checkpoint or metrics are there")
    add("--metrics", type=Path, metavar="FILE", help="a line of JSON for each step, or each run")
    add("--plot", type=Path, metavar="OUT", help="draw the course of the training")
    add("--quiet", "-q", action="store_true", help="no progress")
    group = parser.add_argument_group("comparison")
    names = ",".join(METHODS)
    add = group.add_argument
    add("--compare", type=_methods, metavar="LIST", help=f"some of {names}: a table and a picture")
    add("--rates", type=_rates, default=RATES, metavar="LIST", help="Adam's; the best one counts")
    add("--seeds", type=_positive, default=1, metavar="N", help="runs of each method (1)")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"at least 1 is needed, not {text}")
    return value


def _rate(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"a positive number is needed, not {text}")
    return value


def _mixing(text: str) -> float | str:
    if text == "auto":
        return text
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"a share between 0 and 1 is needed, not {text}")
    return value


def _rates(text: str) -> tuple[float, ...]:
    return tuple(map(_rate, text.split(",")))


def _methods(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    if unknown := set(names) - set(METHODS):
        raise argparse.ArgumentTypeError(
            f"there is no {', '.join(sorted(unknown))}; there are {', '.join(METHODS)}"
        )
    return names


def _device(text: str) -> str:
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{text} is not there: {error}") from error
    return text
