"""FuseMesh: fused attention and parallel matmuls, placed on a mesh of devices.

Importing this package imports neither torch nor triton; the public names below load their modules on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import _moved

__version__ = "0.1.0"

_moved.install()

# public name -> module that holds it
_PUBLIC = {
    "flash_attention": "fusemesh.kernels.attention.dense.api",
    "attention_forward": "fusemesh.kernels.attention.dense.api",
    "attention_backward": "fusemesh.kernels.attention.dense.api",
    "flash_attention_varlen": "fusemesh.kernels.attention.varlen.api",
    "flash_attention_decode": "fusemesh.kernels.attention.decode.api",
    "merge_attention": "fusemesh.kernels.attention.dense.merge",
    "MultiheadAttention": "fusemesh.kernels.attention.dense.module",
    "Origin": "fusemesh.kernels.attention.call.spec",
    "ScoreMod": "fusemesh.kernels.attention.call.score_mods",
    "register_score_mod": "fusemesh.kernels.attention.call.score_mods",
    "check_score_mod": "fusemesh.kernels.attention.score_mod_check",
    "fused_linear": "fusemesh.kernels.matmul.api",
    "fused_linear_cross_entropy": "fusemesh.kernels.vocab_loss.linear",
    "use_backend": "fusemesh.kernels.backends",
    "emulate": "fusemesh.kernels.emulator",
    "accelerate": "fusemesh.integrations.pytorch.accelerate",
    "install": "fusemesh.integrations.pytorch.accelerate",
    "uninstall": "fusemesh.integrations.pytorch.accelerate",
    "Layout": "fusemesh.hybrid.layout",
    "parallelize": "fusemesh.hybrid.apply",
    "whole_state_dict": "fusemesh.hybrid.placed",
    "Transformer": "fusemesh.transformer",
    "TransformerConfig": "fusemesh.transformer",
    "generate": "fusemesh.transformer.generation",
    "Sampling": "fusemesh.transformer.generation",
}

__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:
    from fusemesh.hybrid.apply import parallelize as parallelize
    from fusemesh.hybrid.layout import Layout as Layout
    from fusemesh.hybrid.placed import whole_state_dict as whole_state_dict
    from fusemesh.integrations.pytorch.accelerate import accelerate as accelerate
    from fusemesh.integrations.pytorch.accelerate import install as install
    from fusemesh.integrations.pytorch.accelerate import uninstall as uninstall
    from fusemesh.kernels.attention.call.score_mods import ScoreMod as ScoreMod
    from fusemesh.kernels.attention.call.score_mods import register_score_mod as register_score_mod
    from fusemesh.kernels.attention.call.spec import Origin as Origin
    from fusemesh.kernels.attention.decode.api import flash_attention_decode as flash_attention_decode
    from fusemesh.kernels.attention.dense.api import attention_backward as attention_backward
    from fusemesh.kernels.attention.dense.api import attention_forward as attention_forward
    from fusemesh.kernels.attention.dense.api import flash_attention as flash_attention
    from fusemesh.kernels.attention.dense.merge import merge_attention as merge_attention
    from fusemesh.kernels.attention.dense.module import MultiheadAttention as MultiheadAttention
    from fusemesh.kernels.attention.score_mod_check import check_score_mod as check_score_mod
    from fusemesh.kernels.attention.varlen.api import flash_attention_varlen as flash_attention_varlen
    from fusemesh.kernels.backends import use_backend as use_backend
    from fusemesh.kernels.emulator import emulate as emulate
    from fusemesh.kernels.matmul.api import fused_linear as fused_linear
    from fusemesh.kernels.vocab_loss.linear import fused_linear_cross_entropy as fused_linear_cross_entropy
    from fusemesh.transformer import Transformer as Transformer
    from fusemesh.transformer import TransformerConfig as TransformerConfig
    from fusemesh.transformer.generation import Sampling as Sampling
    from fusemesh.transformer.generation import generate as generate


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'fusemesh' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
