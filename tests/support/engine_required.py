"""For tests of the C++ engine: skips a module where there cannot be one, and fails it where there should be."""

from __future__ import annotations

import shutil

import pytest

from fusemesh.kernels import engine

# What `auto` takes on a CPU for calls that the engine and PyTorch's kernel both compute.
AUTO = "torch" if engine.why_unavailable() else "cpu"


def require_engine() -> None:
    """Call at the head of a module that needs the engine."""
    reason = engine.why_unavailable()
    if reason is None:
        return
    if any(shutil.which(name) for name in ("g++", "c++", "clang++")):
        pytest.fail(f"a C++ compiler is here, but {reason} (pip install --no-deps -e .)", pytrace=False)
    pytest.skip(f"no C++ compiler on this machine: {reason}", allow_module_level=True)
