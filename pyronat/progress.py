"""How far a training is, for people: a bar on a terminal, a few lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from pyronat.reports import StepInfo

LINES = 10
"""Lines of a whole training where there is no bar."""


class Progress(Protocol):
    """Shows how far a training is; a context."""

    def __enter__(self) -> Progress:
        """Begins."""

    def __exit__(self, *error: object) -> None:
        """Ends."""

    def show(self, step: int, words: Mapping[str, str]) -> None:
        """Shows a step.

        Args:
            step: steps that have been taken, this one among them.
            words: what to say of it, by name.
        """


def progress(total: int, done: int = 0, quiet: bool = False) -> Progress:
    """What shows how far a training is.

    A bar of tqdm (extra `cli`) where standard error is a terminal, else lines of text.

    Args:
        total: steps in all.
        done: steps that were taken before.
        quiet: whether to show nothing.

    Returns:
        A context, to be shown each step.
    """
    if quiet:
        return Lines(total, every=0)
    bar = _tqdm() if sys.stderr.isatty() else None
    return Lines(total) if bar is None else Bar(bar, total, done)


def _tqdm() -> Callable[..., Any] | None:
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    found: Callable[..., Any] = tqdm
    return found


def words_of(info: StepInfo, data: int) -> dict[str, str]:
    """Loss, divergence and effective sample size of a step, for people.

    Args:
        info: the step.
        data: data in it, by which the loss is divided.

    Returns:
        Words by name.
    """
    found = {"loss": f"{info.loss / data:.5g}", "KL": f"{info.kl:.2g}"}
    if info.ess is not None:
        found["ESS"] = f"{info.ess:.2f}"
    if info.mixing < 1:
        found["mixing"] = f"{info.mixing:.2g}"
    if not info.accepted:
        found["rejected"] = str(info.rejected)
    return found


class Bar:
    """A bar of tqdm.

    Args:
        tqdm: the class.
        total: steps in all.
        done: steps that were taken before.
    """

    def __init__(self, tqdm: Callable[..., Any], total: int, done: int) -> None:
        self._bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True)

    def show(self, step: int, words: Mapping[str, str]) -> None:
        """Shows a step.

        Args:
            step: steps that have been taken.
            words: what to say of it, by name.
        """
        self._bar.set_postfix(words, refresh=False)
        self._bar.update(step - self._bar.n)

    def __enter__(self) -> Bar:
        """The bar."""
        return self

    def __exit__(self, *error: object) -> None:
        """Leaves the bar as it is at the end."""
        self._bar.close()


class Lines:
    """Lines of text on standard error.

    Args:
        total: steps in all.
        every: steps between lines, 0 for none; by default there are `LINES` in all.
    """

    def __init__(self, total: int, every: int | None = None) -> None:
        self._total = total
        self._every = -(-total // LINES) if every is None else every

    def show(self, step: int, words: Mapping[str, str]) -> None:
        """Shows a step, if it is its turn.

        Args:
            step: steps that have been taken.
            words: what to say of it, by name.
        """
        if self._every and (step % self._every == 0 or step == self._total):
            text = "  ".join(f"{name} {value}" for name, value in words.items())
            print(f"step {step} of {self._total}  {text}", file=sys.stderr)

    def __enter__(self) -> Lines:
        """The same."""
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing to do."""
