"""Values that hold within a block, also for code under torch.compile (leaf)."""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Iterator
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


class _Block(Generic[T]):
    """One block that has begun and not ended."""

    def __init__(self, value: T) -> None:
        self.value = value


class Scoped(Generic[T]):
    """A value that :meth:`use` sets for a block, in this thread and in tasks started from it.

    torch.compile traces no context variable, but guards on an attribute: what it compiles reads ``traced``, one for all
    threads, and is compiled again for another value. It is the value of the block that began last of those that have
    not ended: blocks of several threads may end in any order.
    """

    def __init__(self, name: str, default: T) -> None:
        self._own: contextvars.ContextVar[T] = contextvars.ContextVar(name, default=default)
        self._default = default
        self._blocks: list[_Block[T]] = []
        self._changing = threading.Lock()
        self.traced = default

    def get(self) -> T:
        """Return the value of the innermost block."""
        return self.traced if torch.compiler.is_compiling() else self._own.get()

    @contextlib.contextmanager
    def use(self, value: T) -> Iterator[None]:
        """Within the block :meth:`get` returns ``value``."""
        token, block = self._own.set(value), _Block(value)
        with self._changing:
            self._blocks.append(block)
            self.traced = value
        try:
            yield
        finally:
            self._own.reset(token)
            with self._changing:
                self._blocks.remove(block)
                self.traced = self._blocks[-1].value if self._blocks else self._default
