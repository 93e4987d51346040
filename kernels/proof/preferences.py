"""Which backend is the faster one on this device, as `fusemesh bench --compare` has measured it for classes of calls.

A table in the cache folder holds the choices, for one device by name and one set of versions; without one, and for a
class that it does not have, nothing is preferred. Nothing is measured here, and nothing while a graph is traced, whose
sizes may be symbols.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..backend_record import Request, needs_gradient
from ..runtime import launch
from . import files

FORMAT = 1
PACKAGES = ("fusemesh", "torch", "triton")
HEAD_DIMS = (64, 128, 256)  # a class takes the head dims above the one before
LENGTHS = ((512, 1024), (2048, 4096), (8192, 1 << 62))  # of keys: what is measured, and where the next class begins
LAYER_ROWS = ((16, 64), (256, 1024), (4096, 1 << 62))  # of a linear layer
DECODE_ROWS = ((1, 2), (8, 16), (16, 1 << 62))  # that share a key head
MANY_QUERIES = 1 << 17  # of all heads and samples together
LEAST_FEATURES = 1024  # of a linear layer

_tables: dict[str, dict[str, str]] = {}  # the choices on each device, by its name
_are_there: bool | None = None  # whether any table is; None: not looked for yet


def prefers(request: Request) -> str | None:
    """Return the backend that was the fastest for calls of this class on this device; None where nothing is known."""
    global _are_there
    if torch.compiler.is_compiling():
        return None
    if _are_there is None:
        _are_there = bool(_files())
    if not _are_there:
        return None
    executor = launch.executor_of(request.device)
    if executor is None:
        return None
    choices = _tables.get(executor.name)
    if choices is None:
        table = read(executor.name) or {"classes": {}}
        choices = _tables[executor.name] = {name: entry["choice"] for name, entry in table["classes"].items()}
    return choices.get(class_of(request) or "") if choices else None


def forget_what_was_read() -> None:
    """Let the next call read the tables again."""
    global _are_there
    _are_there = None
    _tables.clear()


def class_of(request: Request) -> str | None:
    """Return the class of a call, as the table names it; None for a call of no class that is measured."""
    if request.operation == "linear":
        return _class_of_linear(request)
    if request.operation not in ("attention", "attention_decode") or max(request.head_dims) > HEAD_DIMS[-1]:
        return None
    dtype, (batch, heads, queries, keys) = _name(request.dtype), request.scores
    head_dim = next(d for d in HEAD_DIMS if max(request.head_dims) <= d)
    length = _bucket(keys, LENGTHS)
    if request.operation == "attention_decode":
        return f"decode {dtype} D{head_dim} S{length} rows{_bucket(request.rows, DECODE_ROWS)}"
    call, spec = request.call, request.call.spec
    shifted = call.origin is not None or spec.origin_q != spec.origin_k
    if not keys <= 4 * queries <= 16 * keys or (shifted and spec.window_right is not None):
        return None
    size = "many" if batch * heads * queries >= MANY_QUERIES else "few"
    causal = "full" if spec.window_right is None else "causal"
    words = ["attention", _mode(request.needs_grad), dtype, f"D{head_dim}", f"S{length}", size, causal]
    if call.mask is not None:
        words.append("mask" if call.mask.shape[2] > 1 else "padding")
    if call.bias is not None:
        words += ["constant"] * (request.needs_grad and not call.bias.requires_grad)
        words.append("bias" if call.bias.shape[2] > 1 else "bias of keys")
    return " ".join(words + ["grouped"] * (heads > request.kv_heads))


def _class_of_linear(request: Request) -> str | None:
    x, w, bias, w_up, activation = request.layer
    if min(w.shape) < LEAST_FEATURES:
        return None
    rows = _bucket(x.numel() // x.shape[-1], LAYER_ROWS)
    form = f"{'gated ' if w_up is not None else ''}{activation or 'plain'}"
    return f"linear {_mode(needs_gradient(x, w, bias, w_up))} {_name(request.dtype)} M{rows} {form}"


def _mode(is_training: bool) -> str:
    return "training" if is_training else "inference"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _bucket(size: int, classes: tuple[tuple[int, int], ...]) -> int:
    """Return the measured size of the class of a size."""
    return next(measured for measured, end in classes if size < end)


def folder() -> Path | None:
    """Return the folder of the tables; None without a cache folder."""
    cache = files.cache_folder()
    return None if cache is None else cache / "preferences"


def path_of(device: str) -> Path | None:
    """Return the file of a device's table, for the versions that run now; None without a cache folder."""
    there = folder()
    return None if there is None else there / f"{files.hashed(f'{device} {_versions()}')}.json"


def read(device: str) -> dict[str, Any] | None:
    """Return the table of a device: ``device``, ``versions``, ``when`` and ``classes``, or None.

    A class has ``choice``, a backend's name, and ``ms``, the milliseconds of each backend.
    """
    path = path_of(device)
    types = {"device": str, "versions": dict, "when": str, "classes": dict}
    table = None if path is None else files.read(path, FORMAT, types)
    if table is None or table["device"] != device or table["versions"] != _versions():
        return None
    entries = table["classes"].values()
    return table if all(isinstance(x, dict) and isinstance(x.get("choice"), str) for x in entries) else None


def write(device: str, classes: dict[str, dict[str, Any]]) -> Path:
    """Write the table of a device in place of an earlier one, and return where.

    Raises:
        OSError: it cannot be written.
    """
    path = path_of(device)
    assert path is not None, "the caller looks for a cache folder first"
    path.parent.mkdir(parents=True, exist_ok=True)
    when = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    files.write(path, FORMAT, {"device": device, "versions": _versions(), "when": when, "classes": classes})
    forget_what_was_read()
    return path


def forget() -> list[str]:
    """Remove the tables of all devices and versions, damaged ones too; return their files."""
    forget_what_was_read()
    removed = []
    for path in _files():
        with contextlib.suppress(OSError):
            path.unlink()
            removed.append(str(path))
    return removed


def _files() -> list[Path]:
    """Return the files of all tables."""
    there = folder()
    try:
        return [] if there is None else sorted(path for path in there.iterdir() if path.suffix == ".json")
    except OSError:
        return []


@functools.cache
def _versions() -> dict[str, str]:
    """Return the versions on which speed depends."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "unknown"
    return {**found, "cuda": str(torch.version.cuda or torch.version.hip)}
