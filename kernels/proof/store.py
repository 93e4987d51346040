"""Verdicts of compiled kernels, kept in a cache folder and shared by all processes that use it (leaf).

One JSON file holds one verdict, named by the hash of its key and put in place whole. A file that is truncated, altered,
another version's or another key's counts as no verdict, and is written anew. Where nothing can be written, verdicts are
kept in memory. A process asks the disk once for a key that it finds there; from then on a read is a dict's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import env
from . import claim, files

FORMAT = 1
SUFFIXES = (".json", ".tmp", ".lock", ".claim")
KEPT_DAYS = 180.0  # a verdict that is older is proven anew, so that those of old versions do not stay for ever


@dataclass(frozen=True)
class Verdict:
    """What a proof found: whether the kernel is right, why not, and what a report needs (values that JSON holds)."""

    passed: bool
    reason: str = ""
    details: dict[str, Any] = field(default_factory=dict)


class Store:
    """Verdicts by key, any string that names the compiled kernel and everything its result depends on.

    Args:
        folder: where the files are; it is made when the first one is written. None keeps all in memory.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._found: dict[str, Verdict] = {}
        self._ready: bool | None = None  # whether the folder can be written, as far as this process has tried

    def read(self, key: str) -> Verdict | None:
        """Return the verdict on a key, or None."""
        verdict = self._found.get(key)
        if verdict is None and self.folder is not None:
            loaded = _load(self._path(key))
            if loaded is not None and loaded[0] == key:
                verdict = self._found[key] = loaded[1]
        return verdict

    def write(self, key: str, verdict: Verdict) -> None:
        """Keep a verdict, in place of an earlier one."""
        self._found[key] = verdict
        if self._folder_is_ready():
            try:
                files.write(self._path(key), FORMAT, {"key": key, **dataclasses.asdict(verdict)})
            except OSError as error:
                self._memory_only(error)

    @contextlib.contextmanager
    def proving(self, key: str, wait: float = claim.LONGEST) -> Iterator[Verdict | None]:
        """Within the block this thread alone proves ``key``, among all threads and processes with this folder.

        Yields the verdict that another one wrote meanwhile, or None, and then the caller proves and writes. Nobody
        waits longer than ``wait`` seconds, and a process that ends in the block, however it ends, blocks nobody.
        """
        on_disk = self._folder_is_ready()
        path = str(self._path(key).with_suffix(".lock")) if on_disk else f"{id(self)} {key}"
        with claim.claimed(path, on_disk, lambda: self.read(key) is not None, wait):
            yield self.read(key)

    def all(self) -> dict[str, Verdict]:
        """Return every verdict by key, those on disk and those in memory."""
        found = dict(loaded for loaded in map(_load, self._files(".json")) if loaded is not None)
        return {**found, **self._found}

    def forget(self, keys: Collection[str] | None = None) -> int:
        """Remove the verdicts on ``keys``, by default every file of the folder; return how many verdicts there were."""
        there = self.all()
        gone = [key for key in there if keys is None or key in keys]
        paths = self._files() if keys is None else [self._path(key) for key in gone]
        for path in paths if self.folder is not None else ():
            with contextlib.suppress(OSError):
                path.unlink()
        for key in gone:
            self._found.pop(key, None)
        return len(gone)

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{files.hashed(key)}.json"

    def _files(self, *suffixes: str) -> list[Path]:
        """Return the files of this store in the folder, of some kinds or of all."""
        try:
            there = [] if self.folder is None else sorted(self.folder.iterdir())
        except OSError:
            return []
        return [path for path in there if path.suffix in (suffixes or SUFFIXES)]

    def _folder_is_ready(self) -> bool:
        """Make the folder, and clear it of what ended processes left, once; return whether it can be written."""
        if self._ready is None:
            if self.folder is None:
                self._memory_only("no home folder is known")
                return False
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._ready = True
            except OSError as error:
                self._memory_only(error)
                return False
            self._clear()
        return self._ready

    def _clear(self) -> None:
        """Remove verdicts that nobody has proven for long, and the unfinished files of processes that have ended."""
        now = time.time()
        for path in self._files():
            age = 86400 * KEPT_DAYS if path.suffix == ".json" else 2 * claim.LONGEST
            with contextlib.suppress(OSError):
                if now - path.stat().st_mtime > age:
                    path.unlink()

    def _memory_only(self, why: object) -> None:
        """Keep verdicts in memory from now on, and say so once."""
        self._ready = False
        env.logger.info(
            "verdicts on kernels are kept in memory alone, so that each process proves anew: %s; set FUSEMESH_CACHE to "
            "a folder that can be written",
            why,
        )


_default: Store | None = None


def default() -> Store:
    """Return the store of this process: the folder ``proofs`` of the cache folder."""
    global _default
    if _default is None:
        folder = files.cache_folder()
        _default = Store(None if folder is None else folder / "proofs")
    return _default


def _load(path: Path) -> tuple[str, Verdict] | None:
    """Return the key and the verdict that a file holds."""
    found = files.read(path, FORMAT, {"key": str, "passed": bool, "reason": str, "details": dict})
    return None if found is None else (found["key"], Verdict(found["passed"], found["reason"], found["details"]))
