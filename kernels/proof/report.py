"""What names a verdict and what a report of a wrong kernel holds: device, versions, and how to see it again."""

from __future__ import annotations

import functools
import hashlib
import json
import platform
import warnings
from pathlib import Path
from typing import Any

import torch

from ..runtime import launch
from . import store


@functools.cache
def source() -> str:
    """Return a hash of the Python source of this floor: launchers, kernels, references and proofs."""
    root, found = Path(__file__).resolve().parent.parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        found.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:16]


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions that results depend on: Triton, torch, the GPU's driver."""
    import triton

    driver = ""
    for path in ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version"):
        try:
            driver = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()[0].strip()
            break
        except (OSError, IndexError):
            continue
    runtime = torch.version.cuda or torch.version.hip or "none"
    found = {"triton": triton.__version__, "torch": torch.__version__, "runtime": runtime, "driver": driver}
    return {**found, "python": platform.python_version()}


def key(executor: launch.Executor, name: str) -> str:
    """Return the store's key of a verdict on the compiled kernel ``name`` on a device."""
    found = versions()
    parts = (executor.name, executor.target.name, found["triton"], found["torch"], found["driver"], source(), name)
    return " | ".join(parts)


def details(executor: launch.Executor, call: Any, seen: launch.Seen) -> dict[str, Any]:
    """Return what a reader of a verdict wants to know besides it."""
    return {
        "kernel": seen.name,
        "constants": {name: str(getattr(value, "value", value)) for name, value in seen.constants.items()},
        "operation": call.operation,
        "device": executor.name,
        "target": executor.target.name,
        "versions": versions(),
        "call": [_described(x) for x in call.arguments],
    }


def _described(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        found = [str(x.dtype).removeprefix("torch."), list(x.shape), list(x.stride())]
        return [*found, x.data_ptr() % 16] if x.data_ptr() % 16 else found
    if isinstance(x, (list, tuple)):
        return [_described(part) for part in x]
    return x


def warn(executor: launch.Executor, call: Any, why: str, verdict: store.Verdict | None) -> None:
    """Warn that kernels give wrong results on a device, with everything that a bug report needs."""
    about = {} if verdict is None else verdict.details
    again = json.dumps([call.operation, about.get("call", [])], default=str)
    constants = ", ".join(f"{name}={value}" for name, value in about.get("constants", {}).items())
    told = ", ".join(f"{name} {version}" for name, version in versions().items())
    warnings.warn(
        f"{call.operation}: wrong results on {executor.name} ({executor.target.name}), so that backend='auto' does not "
        f"use these kernels there. Please report it with this text. {why}. Constants: "
        f"{constants}. Versions: {told}. To see it again: "
        f"FUSEMESH_PROOF=always python -m fusemesh.kernels.proof {again!r}",
        stacklevel=2,
    )
