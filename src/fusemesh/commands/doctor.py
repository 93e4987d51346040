"""``fusemesh doctor``: what this machine has, what each backend needs, and what ``auto`` chooses."""

from __future__ import annotations

import argparse
import importlib
import os
import platform
from collections import Counter
from typing import Any

from fusemesh import __version__

from .options import Outcome

NAME = "doctor"
SUMMARY = "what this machine has and what auto chooses"
USAGE = "[--prove | --trace SCRIPT [ARGS]] [options]"
_LIBRARIES = ("triton", "numpy", "safetensors", "tensorboard", "matplotlib", "tqdm")


def _version(name: str) -> str | None:
    """Return the version of an importable library; None if it is absent or broken."""
    try:
        return getattr(importlib.import_module(name), "__version__", "unknown")
    except Exception:  # an installed library may fail with anything, and a doctor must outlive it
        return None


def _devices() -> list[dict[str, Any]]:
    import torch

    devices: list[dict[str, Any]] = [
        {"device": "cpu", "name": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    ]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"sm_{properties.major}{properties.minor}" if torch.version.hip is None else properties.gcnArchName
        devices.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "capability": capability,
                "memory_gib": round(properties.total_memory / 2**30, 1),
            }
        )
    return devices


def _auto(kind: str) -> dict[str, str]:
    """Return the backend that ``auto`` chooses for each operation on a device, by calling it and reading the counts."""
    import torch

    from fusemesh.kernels import backends
    from fusemesh.kernels.attention.decode.api import flash_attention_decode
    from fusemesh.kernels.attention.dense.api import flash_attention
    from fusemesh.kernels.matmul.api import fused_linear
    from fusemesh.kernels.vocab_loss.linear import fused_linear_cross_entropy

    x = torch.zeros(1, 1, 16, 16, device=kind, requires_grad=True)
    cache, lengths = torch.zeros_like(x), torch.ones(1, dtype=torch.int32, device=kind)
    targets = torch.zeros(16, dtype=torch.int64, device=kind)
    chosen = {}
    for operation, counted, run in (
        ("attention", "attention_forward", lambda: flash_attention(x, x, x, causal=True)),
        ("linear", "linear_forward", lambda: fused_linear(x, x[0, 0])),
        ("loss", "vocab_loss_forward", lambda: fused_linear_cross_entropy(x[0, 0], x[0, 0], targets)),
        ("decode", "attention_decode", lambda: flash_attention_decode(x.detach(), cache, cache, cache_lens=lengths)),
    ):
        before = backends.call_counts()
        run()
        after = backends.call_counts()
        ran = [name for (op, name), n in after.items() if op == counted and n > before.get((op, name), 0)]
        chosen[operation] = ran[0]
    return chosen


def _proofs() -> dict[str, Any]:
    """Return what the store of verdicts holds, of all devices and versions."""
    from fusemesh.kernels.proof import store

    shelf = store.default()
    verdicts = shelf.all()
    right = Counter(str(verdict.details.get("device", "unknown")) for verdict in verdicts.values() if verdict.passed)
    wrong = [{"key": key, "reason": x.reason, **x.details} for key, x in verdicts.items() if not x.passed]
    return {"folder": None if shelf.folder is None else str(shelf.folder), "right": dict(right), "wrong": wrong}


def _preferences() -> dict[str, dict[str, Any]]:
    """Return what the tables say by which ``auto`` chooses, by device."""
    from fusemesh.kernels.proof import preferences

    found = {}
    for table in preferences.all_tables():
        choices = Counter(entry["choice"] for entry in table["classes"].values())
        file = str(preferences.path_of(table["device"]))
        found[table["device"]] = {"file": file, "when": table["when"], "choices": dict(choices)}
    return found


def _engine() -> dict[str, Any]:
    from fusemesh.kernels import engine

    reason = engine.why_unavailable()
    if reason is not None:
        return {"available": False, "why_not": reason}
    return {"available": True, **engine.build_info(), "threads": engine.thread_runtime()}


def examine() -> dict[str, Any]:
    """Return everything that ``fusemesh doctor`` reports, as plain values.

    Keys: ``fusemesh``, ``python``, ``platform``, ``torch``, ``libraries`` (version or None), ``devices``, ``backends``
    (device kind to backend to None or why not), ``auto`` (device kind to operation to backend), ``proofs`` (of compiled
    kernels: ``folder``, the number of ``right`` ones by device, and those that are ``wrong``), ``preferences`` (what
    ``fusemesh bench --compare`` has written: by device the file, its date and its numbers of choices), ``engine``,
    ``process_groups`` (which of torch's are built in).
    """
    import torch
    import torch.distributed as dist

    from fusemesh.kernels import backends

    kinds = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    return {
        "fusemesh": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "libraries": {name: _version(name) for name in _LIBRARIES},
        "devices": _devices(),
        "backends": {
            kind: {name: backends.why_unavailable(name, kind) for name in backends.names()} for kind in ("cpu", "cuda")
        },
        "auto": {kind: _auto(kind) for kind in kinds},
        "proofs": _proofs(),
        "preferences": _preferences(),
        "engine": _engine(),
        "process_groups": {
            "gloo": dist.is_available() and dist.is_gloo_available(),
            "nccl": dist.is_available() and dist.is_nccl_available(),
            "mpi": dist.is_available() and dist.is_mpi_available(),
        },
    }


def describe(findings: dict[str, Any]) -> str:
    """Return the findings of :func:`examine` as text."""
    libraries = ", ".join(f"{name} {version or 'absent'}" for name, version in findings["libraries"].items())
    lines = [
        f"fusemesh {findings['fusemesh']}  python {findings['python']}  torch {findings['torch']}  "
        f"{findings['platform']}",
        f"libraries       {libraries}",
    ]
    for device in findings["devices"]:
        details = ", ".join(f"{key} {value}" for key, value in device.items() if key not in ("device", "name"))
        lines.append(f"{device['device']:<15} {device['name']}, {details}")
    if len(findings["devices"]) == 1:
        lines.append("cuda            no GPU that this torch can use")
    engine_found = findings["engine"]
    if engine_found["available"]:
        built = ", ".join(f"{key} {value}" for key, value in engine_found.items() if key != "available")
        lines.append(f"CPU engine      {built}")
    else:
        lines.append(f"CPU engine      absent: {engine_found['why_not']}")
    groups = ", ".join(f"{name} {'yes' if there else 'no'}" for name, there in findings["process_groups"].items())
    lines.append(f"process groups  {groups}")
    lines.append("backends")
    for kind, table in findings["backends"].items():
        if kind == "cuda" and "cuda" not in findings["auto"]:
            continue
        for name, reason in table.items():
            lines.append(f"  {kind:<5} {name:<10} {'yes' if reason is None else f'no: {reason}'}")
    for kind, choice in findings["auto"].items():
        lines.append(f"auto on {kind:<7} " + ", ".join(f"{operation}: {name}" for operation, name in choice.items()))
    proofs = findings["proofs"]
    right = ", ".join(f"{count} kernels right on {device}" for device, count in proofs["right"].items())
    where = f"in {proofs['folder']}" if proofs["folder"] else "in memory: no home folder is known (FUSEMESH_CACHE)"
    lines.append(f"proofs          {right or 'no kernel proven yet'}, {where}")
    for item in proofs["wrong"]:
        lines.append(
            f"  WRONG         {item.get('kernel', item['key'])} on {item.get('device', 'unknown')}: {item['reason']}"
        )
    for device, table in findings["preferences"].items():
        choices = ", ".join(f"{name} in {count} classes" for name, count in table["choices"].items())
        lines.append(f"preferences     {device}: {choices}, measured {table['when']}, {table['file']}")
    return "\n".join(lines)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument(
        "--prove", action="store_true", help="check a standard set of calls by the Triton kernels on each GPU, now"
    )
    parser.add_argument(
        "--trace",
        nargs=argparse.REMAINDER,
        metavar="SCRIPT",
        help="SCRIPT [ARGS]: run a script with PyTorch's attention on FuseMesh, and print which call went where; "
        "its exit status is kept. Everything after it is the script's, --json apart, unless that stands after --",
    )


def run(options: argparse.Namespace) -> Outcome:
    """Examine the machine, prove its kernels, or trace a script."""
    if options.prove:
        from . import proving

        if options.trace is not None:
            raise ValueError("--prove: expected it without --trace, received both; run one after the other")
        return proving.run(quiet=options.json)
    if options.trace is None:
        findings = examine()
        return Outcome(findings, describe(findings))
    options.json = options.json or "--json" in options.trace
    words = [word for word in options.trace if word != "--json"] + options.after_dashes
    if not words:
        raise ValueError("--trace: expected SCRIPT [ARGS], received nothing; name a Python script")
    from . import tracing

    findings = tracing.run(words[0], words[1:], quiet=options.json)
    return Outcome(findings, tracing.describe(findings), findings["exit_status"])
