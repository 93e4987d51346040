"""Run a function on N ranks of this machine, over gloo, and hear from every one of them: for tests.

    with RankPool(4, env={"FUSEMESH_BACKEND": "reference"}) as pool:
        results = pool.run(check_something, argument)          # check_something(world, argument) on ranks 0 to 3
        results = pool.run(check_something, argument, ranks=2)  # the same processes, a world of two

The processes start once and serve every call, so that a test file pays for their imports once. Each call has a process
group of its own, so that meshes of any layout and world size can follow each other.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .. import compat
from .join import distributed
from .local import LocalRanks, RankError

__all__ = ["RankError", "RankPool"]

# A rank has about 8 of its own, and 15 for each mesh.
_MANY_THREADS = 80


class RankPool:
    """``nproc`` waiting ranks. Use as a context manager.

    Args:
        nproc: the largest world that :meth:`run` can make.
        env: environment variables of the ranks, in force before they import torch or fusemesh: TRITON_INTERPRET and
            FUSEMESH_BACKEND are read at import. OMP_NUM_THREADS is 1 unless it stands here.
        timeout: seconds after which a call ends its ranks and names those that had not returned.
    """

    def __init__(self, nproc: int, env: Mapping[str, str] | None = None, *, timeout: float = 120.0) -> None:
        self.timeout = timeout
        self._ranks = LocalRanks(nproc, {"OMP_NUM_THREADS": "1", **(env or {})})

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *_: Any) -> None:
        self._ranks.close()

    def run(
        self, fn: Callable[..., Any], *args: Any, ranks: int | None = None, timeout: float | None = None
    ) -> list[Any]:
        """``fn(world, *args)`` on every rank, or the first ``ranks``, in a process group of the call's own.

        ``fn`` is imported by name in the ranks, so it stands at the top level of an importable module; results travel
        by pickle.

        Returns:
            The results in rank order.

        Raises:
            RankError: with the traceback of every rank that raised, and the stack of every rank that hung.
        """
        return self._ranks.call(_in_group, fn, args, ranks=ranks, timeout=timeout or self.timeout)

    def call(
        self, fn: Callable[..., Any], *args: Any, ranks: int | None = None, timeout: float | None = None
    ) -> list[Any]:
        """``fn(*args)`` as :meth:`run` runs it, but for the process group, which ``fn`` makes if it needs one."""
        return self._ranks.call(_alone, fn, args, ranks=ranks, timeout=timeout or self.timeout)


def _alone(fn: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    _free_old_groups()
    return fn(*args)


def _in_group(fn: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    _free_old_groups()
    with distributed("cpu") as world:
        return fn(world, *args)


def _free_old_groups() -> None:
    """Free the process groups of earlier calls, once there are many.

    DTensor remembers how it planned an operation, and with that the mesh: worth having for calls on the same layout.
    But every mesh's groups keep threads that look for messages a hundred times a second.
    """
    tasks = Path("/proc/self/task")
    if not tasks.is_dir() or len(list(tasks.iterdir())) < _MANY_THREADS:
        return
    compat.clear_dtensor_caches()
    gc.collect()
