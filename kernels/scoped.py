"""Values that hold within a block, also for code under torch.compile (leaf)."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


class Scoped(Generic[T]):
    """A value that :meth:`use` sets for a block, in this thread and in tasks started from it.

    torch.compile traces no context variable, but guards on an attribute: what it compiles reads ``traced``, one for all
    threads, and is compiled again for another value.
    """

    def __init__(self, name: str, default: T) -> None:
        self._own: contextvars.ContextVar[T] = contextvars.ContextVar(name, default=default)
        self.traced = default

    def get(self) -> T:
        """Return the value of the innermost block."""
        return self.traced if torch.compiler.is_compiling() else self._own.get()

    @contextlib.contextmanager
    def use(self, value: T) -> Iterator[None]:
        """Within the block :meth:`get` returns ``value``."""
        token, outer = self._own.set(value), self.traced
        self.traced = value
        try:
            yield
        finally:
            self._own.reset(token)
            self.traced = outer
