"""Run Python source in a new interpreter: for what depends on the environment or on what is imported first."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

# Python as it would be if triton had never been installed: no finder knows it, so that importing it fails, and looking
# for it finds nothing.
WITHOUT_TRITON = """
import sys

class _Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            return None
        return self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [_Without(finder) for finder in sys.meta_path]
"""


def run(code: str, *, preamble: str = "", env: dict[str, str] | None = None, timeout: float = 120) -> str:
    """Standard output of ``code`` (dedented, after ``preamble``); AssertionError with its stderr if it fails.

    FUSEMESH_* and TRITON_INTERPRET are not inherited: only ``env`` sets them.
    """
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("FUSEMESH_") and name != "TRITON_INTERPRET"
    }
    result = subprocess.run(
        [sys.executable, "-c", preamble + textwrap.dedent(code)],
        env={**inherited, "OMP_NUM_THREADS": "1", **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert result.returncode == 0, f"exit {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result.stdout
