"""The record of backend ``cpu``: what the C++ engine computes, and what it refuses."""

from __future__ import annotations

import torch

from ... import engine
from ...backend_record import Backend, Refusal, Request

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MODS = ("softcap", "alibi")  # in the order in which the engine applies them


def _limits(request: Request) -> Refusal | None:
    if request.operation == "linear":  # PyTorch's, in any dtype
        return None
    if request.dtype not in DTYPES:
        return Refusal("q", "float32, bfloat16 or float16", request.dtype)
    others = [name for name in request.call.spec.mods if name not in MODS]
    if others:
        return Refusal("score_mod", "softcap and alibi_slopes alone", repr(others[0]))
    return None


def _unavailable(device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"the cpu engine takes CPU tensors, these are on {device.type}"
    return engine.why_unavailable()


def _automatic(request: Request) -> str | None:
    return "the C++ engine" if request.device.type == "cpu" and request.operation != "linear" else None


CPU = Backend(
    name="cpu",
    implementations={
        "attention": "fusemesh.kernels.attention.engine.dense",
        "attention_varlen": "fusemesh.kernels.attention.engine.varlen",
        "attention_decode": "fusemesh.kernels.attention.engine.decode",
    },
    limits=_limits,
    unavailable=_unavailable,
    automatic=_automatic,
    # So that one name serves a whole model on CPU tensors; the engine has no product of matrices.
    instead={"linear": "torch"},
)
