"""``fusemesh doctor --trace``: run a script with PyTorch's attention on FuseMesh, and report where each call went."""

from __future__ import annotations

import contextlib
import os
import runpy
import sys
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from fusemesh.integrations.pytorch import routes as torch_routes
from fusemesh.integrations.pytorch.accelerate import accelerate
from fusemesh.kernels import backends

SHAPES_SHOWN = 3


def run(script: str, arguments: Sequence[str], *, quiet: bool = False) -> dict[str, Any]:
    """Run a script as ``python script arguments`` would, within ``fusemesh.accelerate()``.

    Args:
        quiet: send what the script and its libraries write to stdout to stderr.

    Returns:
        ``script``; ``exit_status``; ``error``, the exception that ended the script, if one did; ``fusemesh``, how often
        each op ran on each backend; ``calls``, one entry for each function of PyTorch and where its calls went:
        ``function``, ``backend`` (None: PyTorch's own), ``reason`` (why PyTorch's own), ``calls``, ``shapes``
        (``arguments`` by name, ``calls``; most frequent first).

    Raises:
        ValueError: there is no such file.
    """
    path = Path(script)
    if not path.is_file():
        raise ValueError(f"--trace: expected a Python script, received {script!r}, which is no file; check the path")
    taken: dict[torch_routes.Route, Counter[tuple[tuple[str, str], ...]]] = {}

    def note(route: torch_routes.Route, tensors: dict[str, Any]) -> None:
        shapes = tuple((name, _shape(x)) for name, x in tensors.items() if x is not None)
        taken.setdefault(route, Counter())[shapes] += 1

    before = backends.call_counts()
    with _stdout_on_stderr() if quiet else contextlib.nullcontext(), accelerate(), torch_routes.observe(note):
        status, error = _run_as_main(path, arguments)
    after = backends.call_counts()
    return {
        "script": script,
        "exit_status": status,
        **({} if error is None else {"error": error}),
        "fusemesh": [
            {"op": op, "backend": name, "calls": count - before.get((op, name), 0)}
            for (op, name), count in after.items()
            if count > before.get((op, name), 0)
        ],
        "calls": [
            {
                **route._asdict(),
                "calls": sum(shapes.values()),
                "shapes": [{"arguments": dict(shape), "calls": count} for shape, count in shapes.most_common()],
            }
            for route, shapes in sorted(taken.items(), key=lambda item: -sum(item[1].values()))
        ],
    }


def describe(findings: dict[str, Any]) -> str:
    """Return the findings of :func:`run` as text."""
    lines = [f"{findings['script']}  exit status {findings['exit_status']}"]
    if "error" in findings:
        lines.append(f"ended by        {findings['error']}")
    ours = ", ".join(f"{x['op']} {x['backend']} {x['calls']}" for x in findings["fusemesh"])
    lines.append(f"FuseMesh's ops  {ours or 'none ran'}")
    if not findings["calls"]:
        lines.append("no call of PyTorch's attention functions was seen (compiled graphs run without being counted)")
    for call in findings["calls"]:
        where = f"fusemesh, {call['backend']}" if call["backend"] else f"PyTorch: {call['reason']}"
        lines.append(f"{call['calls']:>8} x {call['function']}  ->  {where}")
        for shape in call["shapes"][:SHAPES_SHOWN]:
            shown = ", ".join(f"{name} {text}" for name, text in shape["arguments"].items())
            lines.append(f"{shape['calls']:>12} x {shown}")
        if len(call["shapes"]) > SHAPES_SHOWN:
            lines.append(f"{'':>12}   and {len(call['shapes']) - SHAPES_SHOWN} other shapes")
    return "\n".join(lines)


def _shape(x: Any) -> str:
    if not isinstance(x, torch.Tensor):
        return type(x).__name__
    dtype = str(x.dtype).removeprefix("torch.")
    if x.is_nested:
        return f"nested, {x.size(0)} sequences, {dtype}"
    return f"{list(x.shape)} {dtype}"


def _run_as_main(path: Path, arguments: Sequence[str]) -> tuple[int, str | None]:
    """Run a script; return the exit status that it would have had, and the exception that ended it."""
    argv, folder = sys.argv, str(path.resolve().parent)
    sys.argv = [str(path), *arguments]
    sys.path.insert(0, folder)
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0, None
        print(end.code, file=sys.stderr)
        return 1, None
    except Exception as error:
        traceback.print_exc()
        return 1, f"{type(error).__name__}: {error}"
    finally:
        sys.argv = argv
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)
    return 0, None


@contextlib.contextmanager
def _stdout_on_stderr() -> Iterator[None]:
    """Send what is written to stdout to stderr, by Python and by everything else in this process and its children."""
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        sys.stdout.flush()
        os.dup2(saved, 1)
        os.close(saved)
