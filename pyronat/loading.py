"""From `FILE.py[:NAME]` to a program that can be run: a model, perhaps a guide, and data.

A file is executed as a script in its folder would be, or as a module of its package. It says what
it has by names: `model`, `guide`, `make_data`, `after_step`; see `CONVENTIONS`. A `registry.py`
lists programs that have no file of their own.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from pyronat.errors import InvalidProgramFile

REGISTRY = "registry.py"
"""File that lists the programs of its folder."""

ZOO = Path("models") / REGISTRY
"""Where programs are looked up that are given by a name alone, from the current folder."""

CONVENTIONS = """\
what a file gives, by the names of its top level:
  model              a Pyro model: a function, a PyroModule, or after FILE.py: the name of another
                     one, of an object with methods model and guide, or of a class of such objects
  guide              its guide, of the same arguments; if there is none, hidden discrete variables
                     are summed out and continuous ones get an AutoNormal
  make_data(seed)    the arguments of both: a tensor, a tuple of them, or a dict by name; with a
                     parameter "size" --size is handed on; needed if the model takes arguments
  after_step()       called after every step, if it is there
A name without .py is a program of the zoo: it is looked up in models/registry.py.
"""


@dataclass(frozen=True)
class Loaded:
    """A program and its data.

    Attributes:
        name: what to call it.
        model: a Pyro model.
        guide: its guide, or None where the file has none.
        args: arguments of both.
        kwargs: keyword arguments of both.
        batch_size: a usual number of data for each step, or None for all of them.
        after_step: called after each step, or None.
        log_likelihood: exact log likelihood of arguments in nats, or None where none is known.
    """

    name: str
    model: Callable[..., Any]
    guide: Callable[..., Any] | None
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int | None = None
    after_step: Callable[[], Any] | None = None
    log_likelihood: Callable[..., Tensor] | None = None

    @property
    def size(self) -> int:
        """Number of data: the length of the first tensor among the arguments, or 1."""
        for value in (*self.args, *self.kwargs.values()):
            if isinstance(value, Tensor) and value.dim():
                return len(value)
        return 1

    def rows(self, index: Any) -> Loaded:
        """The same program with some of its data.

        Args:
            index: of the data, along the first axis of each tensor that is as long as the first
                tensor; all else stays as it is.

        Returns:
            The program.
        """
        size = self.size

        def chosen(value: Any) -> Any:
            per_datum = isinstance(value, Tensor) and value.dim() and len(value) == size
            return value[index] if per_datum else value

        args = tuple(map(chosen, self.args))
        return replace(self, args=args, kwargs={k: chosen(v) for k, v in self.kwargs.items()})


@dataclass(frozen=True)
class Target:
    """What a user has named: a file, and a name in it.

    Attributes:
        path: the file.
        member: the name of a model, an object or an entry of a registry; empty for the usual one.
        guide: the name of the guide; empty for the usual one.
    """

    path: Path
    member: str = ""
    guide: str = ""

    def __str__(self) -> str:
        """The way it is written on a command line."""
        return f"{self.path}:{self.member}" if self.member else str(self.path)


def target_of(text: str, guide: str = "") -> Target:
    """Reads `FILE.py`, `FILE.py:NAME` or the name of a program of the zoo.

    Args:
        text: what was given.
        guide: the name of the guide; empty for the usual one.

    Returns:
        The file and the name in it.

    Raises:
        ValueError: if there is no such file, or no zoo to look the name up in.
    """
    head, _, member = text.rpartition(":")
    path = Path(head if head.endswith(".py") else text)
    if path.suffix == ".py":
        if not path.is_file():
            raise ValueError(f"there is no file {path}")
        return Target(path.resolve(), member if head.endswith(".py") else "", guide)
    if ZOO.is_file():
        return Target(ZOO.resolve(), text, guide)
    raise ValueError(
        f"{text!r} is not a file that ends in .py; names of the zoo are known in a folder that has "
        f"{ZOO}"
    )


def load(target: Target, seed: int, size: int | None = None) -> Loaded:
    """Executes a file and takes its program and data, the same ones for the same seed.

    The file is executed anew each time, so that modules that it makes have their initial weights.
    Call it within `importable`, and seed the global random numbers beforehand.

    Args:
        target: the file and the name in it.
        seed: of the data, and of initial values where a registry takes one.
        size: number of data, or None for the usual one.

    Returns:
        The program.

    Raises:
        InvalidProgramFile: if the file cannot be executed, or lacks something.
    """
    module = execute(target.path)
    entry = None
    listed = target.path.name == REGISTRY
    if target.member and (listed or not _has(module, target.member)):
        entry = _entry(target, module)
    elif not target.member and not hasattr(module, "model"):
        entry = _only_entry(target, module)
    if entry is not None:
        return _from_registry(entry, seed, size)
    return _from_module(target, module, seed, size)


# Files


@contextmanager
def importable(path: Path) -> Generator[None, None, None]:
    """In this context a file can import its neighbors, and what is in the current folder.

    Args:
        path: the file.

    Yields:
        Nothing; the search path is as before afterwards.
    """
    root, _ = _package(path)
    before = list(sys.path)
    sys.path[:] = [str(root), *before, str(Path.cwd())]
    try:
        yield
    finally:
        sys.path[:] = before


def _package(path: Path) -> tuple[Path, list[str]]:
    """The folder to import from, and the packages between it and a file."""
    folder, names = path.resolve().parent, list[str]()
    while (folder / "__init__.py").is_file():
        names.insert(0, folder.name)
        folder = folder.parent
    return folder, names


def execute(path: Path) -> ModuleType:
    """Executes a file under a name that no import has.

    Args:
        path: the file.

    Returns:
        The module.

    Raises:
        InvalidProgramFile: naming the line where it fails.
    """
    _, packages = _package(path)
    name = ".".join([*packages, f"{path.stem} (program)"])
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        sys.modules.pop(name, None)
        raise InvalidProgramFile(
            f"{path}{_where(path, error)}: {type(error).__name__}: {error}"
        ) from error
    return module


def _where(path: Path, error: BaseException) -> str:
    """The last line of a file that an error passed through."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f", line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    return f", line {lines[-1]}" if lines else ""


def _has(module: ModuleType, dotted: str) -> bool:
    try:
        attrgetter(dotted)(module)
    except AttributeError:
        return False
    return True


def _from_module(target: Target, module: ModuleType, seed: int, size: int | None) -> Loaded:
    """A program that a file gives by its names.

    Args:
        target: the file and the name in it.
        module: the file, executed.
        seed: of the data.
        size: number of data, or None.

    Returns:
        The program.

    Raises:
        InvalidProgramFile: if the model takes data that the file does not make.
    """
    model, guide = _programs(target, module)
    args, kwargs, asked = _data(target, module, seed, size)
    if not args and not kwargs and (needed := _needed(model)):
        raise InvalidProgramFile(
            f"{target}: the model takes {', '.join(needed)}, but {target.path.name} has no "
            "make_data; define make_data(seed), which returns a tensor, a tuple of them or a dict"
        )
    after_step = getattr(module, "after_step", None)
    member = f":{target.member}" if target.member else ""
    found = Loaded(target.path.stem + member, model, guide, args, kwargs, after_step=after_step)
    return found if size is None or asked else found.rows(slice(size))


def _programs(target: Target, module: ModuleType) -> tuple[Callable[..., Any], Any]:
    """Model and guide.

    Args:
        target: the file and the names in it.
        module: the file, executed.

    Returns:
        Both; the guide is None where there is none.

    Raises:
        InvalidProgramFile: if there are none that can be called.
    """
    name = target.member or "model"
    found, guide = attrgetter(name)(module), None
    if inspect.isclass(found):
        try:
            found = found()
        except TypeError as error:
            raise InvalidProgramFile(
                f"{target} cannot be made without arguments: {error}"
            ) from error
    if callable(getattr(found, "model", None)):
        found, guide = found.model, getattr(found, "guide", None)
    elif "model" in name and _has(module, name.replace("model", "guide")):
        guide = attrgetter(name.replace("model", "guide"))(module)
    if target.guide:
        if not _has(module, target.guide):
            raise InvalidProgramFile(f"{target.path} has no {target.guide!r} to be the guide")
        guide = attrgetter(target.guide)(module)
        guide = guide() if inspect.isclass(guide) else guide
    for role, program in (("model", found), ("guide", guide)):
        if program is not None and not callable(program):
            kind = type(program).__name__
            raise InvalidProgramFile(f"{target}: the {role} is a {kind}, which cannot be called")
    return found, guide


def _data(
    target: Target, module: ModuleType, seed: int, size: int | None
) -> tuple[tuple[Any, ...], dict[str, Any], bool]:
    """Data of a program.

    Args:
        target: the file.
        module: the same, executed.
        seed: of the data.
        size: number of data, or None.

    Returns:
        Arguments, keyword arguments, and whether the file knows how many data to make.

    Raises:
        InvalidProgramFile: if the file fails to make them.
    """
    make = getattr(module, "make_data", None)
    if make is None:
        return (), {}, False
    takes = inspect.signature(make).parameters
    options: dict[str, Any] = {"seed": seed} if "seed" in takes else {}
    given = [seed] if takes and "seed" not in takes else []
    if size is not None and "size" in takes:
        options["size"] = size
    try:
        data = make(*given, **options)
    except Exception as error:
        where = _where(target.path, error)
        raise InvalidProgramFile(
            f"{target.path}{where}: make_data: {type(error).__name__}: {error}"
        ) from error
    moved = tree_map(_placed, data)
    if isinstance(moved, Mapping):
        return (), dict(moved), "size" in options
    if isinstance(moved, Sequence) and not isinstance(moved, str):
        return tuple(moved), {}, "size" in options
    return (moved,), {}, "size" in options


def _placed(value: Any) -> Any:
    return value.to(torch.get_default_device()) if isinstance(value, Tensor) else value


def _needed(program: Callable[..., Any]) -> list[str]:
    """Arguments that a program cannot be called without."""
    try:
        taken = inspect.signature(getattr(program, "forward", program)).parameters.values()
    except (TypeError, ValueError):
        return []
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in taken if p.default is p.empty and p.kind not in kinds]


# Registries


def _registered(target: Target, module: ModuleType) -> dict[str, Any]:
    """Entries of the registry beside a file that are about it, or of the file if it is one."""
    beside = target.path.with_name(REGISTRY)
    if target.path == beside:
        found: dict[str, Any] = module.programs() if hasattr(module, "programs") else {}
        return found
    if not beside.is_file():
        return {}
    registry, stem = execute(beside), target.path.stem
    entries: dict[str, Any] = registry.programs() if hasattr(registry, "programs") else {}
    return {n: entry for n, entry in entries.items() if getattr(entry, "module", "") == stem}


def _entry(target: Target, module: ModuleType) -> Any:
    """The entry of a name.

    Args:
        target: the file and the name.
        module: the file, executed.

    Returns:
        The entry.

    Raises:
        InvalidProgramFile: listing the names that there are.
    """
    entries = _registered(target, module)
    wanted = _plain(target.member)
    for name, entry in entries.items():
        if _plain(name) == wanted:
            return entry
    raise InvalidProgramFile(
        f"{target.path} has no {target.member!r}; it has: {_listed(entries, module)}"
    )


def _only_entry(target: Target, module: ModuleType) -> Any:
    """The entry of a file that has no model of its own.

    Args:
        target: the file.
        module: the same, executed.

    Returns:
        The entry.

    Raises:
        InvalidProgramFile: if it is not the only one, listing the names that there are.
    """
    entries = _registered(target, module)
    if len(entries) == 1:
        return next(iter(entries.values()))
    raise InvalidProgramFile(
        f"{target.path} has no 'model'; say which of these it is, as {target.path.name}:NAME: "
        f"{_listed(entries, module)}"
    )


def _plain(name: str) -> str:
    return name.replace("_", " ").replace("-", " ").lower()


def _listed(entries: Mapping[str, Any], module: ModuleType) -> str:
    """What a user may have meant: entries of a registry, or what a file defines."""
    own = (
        name
        for name, value in vars(module).items()
        if callable(value)
        and not name.startswith("_")
        and getattr(value, "__module__", "") in {module.__name__, None}
    )
    return ", ".join(entries or own) or "nothing that can be called"


def _from_registry(entry: Any, seed: int, size: int | None) -> Loaded:
    """A program of a registry."""
    made = entry.make(seed)
    args = tuple(tree_map(_placed, entry.make_data(seed, size)))
    return Loaded(
        name=entry.name,
        model=made.model,
        guide=made.guide,
        args=args,
        batch_size=entry.batch_size,
        after_step=getattr(made, "after_step", None),
        log_likelihood=getattr(made, "log_likelihood", None),
    )
