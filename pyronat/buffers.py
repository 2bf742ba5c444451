"""What modules keep besides parameters, as BatchNorm its running means."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parameter import is_lazy


class Buffers:
    """The buffers of all modules that have run, as they were before."""

    def __init__(self) -> None:
        self._noted: dict[tuple[int, str], tuple[torch.nn.Module, Tensor, Tensor]] = {}

    def note(self, module: torch.nn.Module, inputs: Any) -> None:
        """Copies the buffers of a module that is about to run for the first time.

        Args:
            module: the module, without those in it.
            inputs: ignored.
        """
        for name, buffer in module._buffers.items():
            key = id(module), name
            if buffer is None or key in self._noted:
                continue
            if not is_lazy(buffer):
                self._noted[key] = module, buffer, buffer.detach().clone()

    def restore(self) -> None:
        """Puts all of them back, behind the back of autograd: a graph may have saved some."""
        for (_, name), (module, buffer, value) in self._noted.items():
            buffer.data.copy_(value)
            module._buffers[name] = buffer


@contextmanager
def noted_buffers() -> Generator[Buffers, None, None]:
    """Yields the buffers of the modules that run in this context."""
    buffers = Buffers()
    hook = register_module_forward_pre_hook(buffers.note)
    try:
        yield buffers
    finally:
        hook.remove()


@contextmanager
def kept_buffers() -> Generator[None, None, None]:
    """In this context modules may run, and afterwards their buffers are as before.

    Yields:
        Nothing.
    """
    with noted_buffers() as buffers:
        try:
            yield
        finally:
            buffers.restore()
