"""One Transformer (decoder, encoder or encoder-decoder), built from the modules of fusemesh.hybrid.tensor.modules.

The names load their modules on first use: :mod:`fusemesh.transformer.config` is needed where torch is not.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import TransformerConfig as TransformerConfig
    from .model import Transformer as Transformer

_HOME = {"Transformer": "model", "TransformerConfig": "config"}

__all__ = ["Transformer", "TransformerConfig"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
