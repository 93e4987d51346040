"""Which backend is the faster one on this device, as `fusemesh bench --compare` has measured it for classes of calls.

A table in the cache folder holds the choices, for one device by name and one set of versions; without one, and for a
class that it does not have, nothing is preferred. Nothing is measured here.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .. import compat
from ..backend_record import Request, needs_gradient
from ..runtime import launch
from . import files

FORMAT = 1
PACKAGES = ("fusemesh", "torch", "triton")
HEAD_DIMS = (64, 128, 256)  # a class takes the head dims above the one before
LENGTHS = ((512, 1024), (2048, 4096), (8192, 1 << 62))  # of keys: what is measured, and where the next class begins
LAYER_ROWS = ((16, 64), (256, 1024), (4096, 1 << 62))  # of a linear layer
DECODE_ROWS = ((1, 2), (8, 16), (16, 1 << 62))  # that share a key head
SIZES = (("few", 1 << 17), ("many", 1 << 62))  # queries of all heads and samples together
LEAST_FEATURES = 1024  # of a linear layer

_tables: dict[str, dict[str, str]] = {}  # the choices on each device, by its name
_are_there: bool | None = None  # whether any table is; None: not looked for yet


def prefers(request: Request) -> str | None:
    """Return the backend that was the fastest for calls of this class on this device; None where nothing is known."""
    if not _is_known(request.device):
        return None
    name = class_of(request)
    return None if name is None else _choice(request.device, name)


def _is_known(device: torch.device) -> bool:
    """Return whether there is a table of the device."""
    global _are_there
    if _are_there is None:
        _are_there = bool(_files())
    return _are_there and bool(_choices(device))


def _choice(device: torch.device, name: str) -> str | None:
    return _choices(device).get(name)


def _choices(device: torch.device) -> dict[str, str]:
    """Return the choice of each class on a device."""
    executor = launch.executor_of(device)
    if executor is None:
        return {}
    if executor.name not in _tables:
        table = read(executor.name) or {"classes": {}}
        _tables[executor.name] = {name: entry["choice"] for name, entry in table["classes"].items()}
    return _tables[executor.name]


# torch.compile takes the answers as constants: the table is read once in a process.
for _function in (_is_known, _choice):
    compat.assume_constant_result(_function)


def forget_what_was_read() -> None:
    """Let the next call read the tables again."""
    global _are_there
    _are_there = None
    _tables.clear()


def class_of(request: Request) -> str | None:
    """Return the class of a call, as the table names it; None for a call of no class that is measured."""
    if request.operation == "linear":
        return None if request.layer is None else _class_of_linear(request)
    if request.operation not in ("attention", "attention_decode") or not request.scores:
        return None
    if max(request.head_dims) > HEAD_DIMS[-1]:
        return None
    dtype, (batch, heads, queries, keys) = _name(request.dtype), request.scores
    head_dim = next(d for d in HEAD_DIMS if max(request.head_dims) <= d)
    length = _bucket(keys, LENGTHS)
    if request.operation == "attention_decode":
        rows = _bucket(request.rows, DECODE_ROWS)
        return None if None in (length, rows) else f"decode {dtype} D{head_dim} S{length} rows{rows}"
    call, spec = request.call, request.call.spec
    shifted = call.origin is not None or spec.origin_q != spec.origin_k
    is_near = compat.is_known(keys <= 4 * queries) and compat.is_known(queries <= 4 * keys)
    size = _bucket(batch * heads * queries, SIZES)
    if not is_near or None in (length, size) or (shifted and spec.window_right is not None):
        return None
    causal = "full" if spec.window_right is None else "causal"
    words = ["attention", _mode(request.needs_grad), dtype, f"D{head_dim}", f"S{length}", str(size), causal]
    if call.mask is not None:
        words.append("padding" if compat.is_known(call.mask.shape[2] == 1) else "mask")
    if call.bias is not None:
        words += ["constant"] * (request.needs_grad and not call.bias.requires_grad)
        words.append("bias of keys" if compat.is_known(call.bias.shape[2] == 1) else "bias")
    return " ".join(words + ["grouped"] * compat.is_known(heads > request.kv_heads))


def _class_of_linear(request: Request) -> str | None:
    x, w, bias, w_up, activation = request.layer
    if min(w.shape) < LEAST_FEATURES:
        return None
    rows = _bucket(x.numel() // x.shape[-1], LAYER_ROWS)
    if rows is None:
        return None
    form = f"{'gated ' if w_up is not None else ''}{activation or 'plain'}"
    return f"linear {_mode(needs_gradient(x, w, bias, w_up))} {_name(request.dtype)} M{rows} {form}"


def _mode(is_training: bool) -> str:
    return "training" if is_training else "inference"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _bucket(size: int, classes: tuple[tuple[Any, int], ...]) -> Any:
    """Return the name of the class of a size; None for a symbol of a traced graph that may be of several."""
    for name, end in classes:
        if compat.is_known(size < end):
            return name
        if not compat.is_known(size >= end):
            return None
    return None


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
    table = None if path is None else _load(path)
    return table if table is not None and table["device"] == device else None


def all_tables() -> list[dict[str, Any]]:
    """Return the tables of all devices for the versions that run now."""
    found = map(_load, _files())
    return [table for table in found if table is not None and table == read(table["device"])]


def _load(path: Path) -> dict[str, Any] | None:
    types = {"device": str, "versions": dict, "when": str, "classes": dict}
    table = files.read(path, FORMAT, types)
    if table is None or table["versions"] != _versions():
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
