"""Files of the cache folder: JSON with a format and a digest, put in place whole; a damaged one is none (leaf)."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import env

LARGEST = 1 << 22  # bytes; a larger file is not ours


def cache_folder() -> Path | None:
    """Return FUSEMESH_CACHE, else XDG_CACHE_HOME/fusemesh, else ~/.cache/fusemesh; None without a home folder.

    It need not exist. A relative XDG_CACHE_HOME is ignored, as its specification says.
    """
    if env.CACHE:
        return Path(os.path.abspath(os.path.expanduser(env.CACHE)))
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):
        base = os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base, "fusemesh") if os.path.isabs(base) else None


def hashed(name: str) -> str:
    """Return a file name for any text."""
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:40]


def read(path: Path, form: int, types: Mapping[str, type]) -> dict[str, Any] | None:
    """Return what :func:`write` wrote; None for a file that is absent, damaged, of another format or of other types."""
    try:
        file = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # a pipe would wait for its writer
        with open(file, "rb") as stream:
            found = json.loads(stream.read(LARGEST))
        if found.pop("format") != form or found.pop("digest") != _digest(json.dumps(found)):
            return None
        return found if all(isinstance(found[name], of) for name, of in types.items()) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def write(path: Path, form: int, content: dict[str, Any]) -> None:
    """Write a file and put it in place whole, so that no reader sees a part of it; values that JSON lacks as text.

    Raises:
        OSError: it cannot be written; nothing of it is left.
    """
    body = json.dumps(content, default=str)
    text = json.dumps({"format": form, "digest": _digest(body), **json.loads(body)}, indent=1) + "\n"
    unfinished = path.with_name(f"{path.stem}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
    try:
        with open(unfinished, "x", encoding="utf-8") as stream:
            stream.write(text)
        os.replace(unfinished, path)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise


def _digest(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()
