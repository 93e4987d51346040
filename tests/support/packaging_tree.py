"""For tests of packaging: the tree, copies of it to build in, and commands that must succeed."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Beside the four folders of code, what a build needs.
BUILD_FILES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "constraints.txt")
FOLDERS = ("src", "kernels", "hybrid", "csrc")


def compiler_found() -> str | None:
    """Return the compiler that setup.py finds here, or None."""
    return next(filter(None, map(shutil.which, ("g++", "c++", "clang++"))), None)


def has_compiler() -> bool:
    """Return whether setup.py finds a compiler here."""
    return compiler_found() is not None


def copy_tree(target: Path) -> Path:
    """Copy what a build needs, and nothing that an earlier one left behind."""
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.tmp", "*.egg-info")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, target / folder, ignore=ignore)
    for name in BUILD_FILES:
        shutil.copy(ROOT / name, target)
    return target


def run(
    *command: str | os.PathLike[str], cwd: Path, timeout: float = 600, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run ``command`` in ``cwd``; if it fails raise AssertionError with all that it printed."""
    variables = {**os.environ, **environment}
    result = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=variables, capture_output=True, text=True, timeout=timeout
    )
    if result.returncode != 0:
        raise AssertionError(f"{command} returned {result.returncode}\n{result.stdout}\n{result.stderr}")
    return result
