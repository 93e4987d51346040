"""Public modules that have moved: their old names still import, with a DeprecationWarning that gives the new one."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

# Old name -> new name. What README, docs and examples have ever imported stands here, and where public classes and
# functions lived: pickles of them name it.
MOVED = {
    "fusemesh.benchmark": "fusemesh.kernels.measure",
    "fusemesh.evaluator": "fusemesh.run.evaluator",
    "fusemesh.generation": "fusemesh.transformer.generation",
    "fusemesh.hybrid.launch": "fusemesh.hybrid.ranks.join",
    "fusemesh.hybrid.tensor_parallel": "fusemesh.hybrid.tensor.modules",
    "fusemesh.hybrid.testing": "fusemesh.hybrid.ranks.testing",
    "fusemesh.integrations.torch_accelerate": "fusemesh.integrations.pytorch.accelerate",
    "fusemesh.integrations.torch_routes": "fusemesh.integrations.pytorch.routes",
    "fusemesh.integrations.torch_sdpa": "fusemesh.integrations.pytorch.sdpa",
    "fusemesh.kernels.attention.api": "fusemesh.kernels.attention.dense.api",
    "fusemesh.kernels.attention.merge": "fusemesh.kernels.attention.dense.merge",
    "fusemesh.kernels.attention.module": "fusemesh.kernels.attention.dense.module",
    "fusemesh.kernels.attention.score_mods": "fusemesh.kernels.attention.call.score_mods",
    "fusemesh.kernels.attention.spec": "fusemesh.kernels.attention.call.spec",
    "fusemesh.kernels.launch": "fusemesh.kernels.runtime.launch",
    "fusemesh.kernels.testing.interpreter": "fusemesh.kernels.runtime.interpreter",
    "fusemesh.metrics": "fusemesh.run.metrics",
    "fusemesh.trainer": "fusemesh.run.trainer",
    "fusemesh.tune": "fusemesh.kernels.measure.tune",
}


class _Redirect(importlib.abc.Loader):
    """Hands out the module of the new name under the old one: both names are one module."""

    def exec_module(self, module: ModuleType) -> None:
        # The import system takes what stands here once this returns.
        sys.modules[module.__name__] = importlib.import_module(MOVED[module.__name__])


class Finder(importlib.abc.MetaPathFinder):
    """Finds the old names; asked after every other finder, so that it hides nothing."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in MOVED:
            return None
        warnings.warn(f"{name} has moved: import {MOVED[name]}", DeprecationWarning, stacklevel=2)
        return importlib.machinery.ModuleSpec(name, _Redirect())


def install() -> None:
    """Make the old names importable in this process. Idempotent."""
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.append(Finder())
