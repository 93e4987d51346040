"""The record of backend ``cpu``: what the C++ engine computes, and what it refuses."""

from __future__ import annotations

import torch

from ... import engine
from ...backend_record import Backend, Refusal, Request
from ...runtime import launch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MODS = ("softcap", "alibi")  # in the order in which the engine applies them
# As csrc/abi/check.cpp has them.
MOST_DIM = 2**24
SOFTCAPS = (1e-37, 1e38)


def _limits(request: Request) -> Refusal | None:
    if request.operation in CPU.instead:  # PyTorch's, in any dtype
        return None
    if request.dtype not in DTYPES:
        return Refusal("q", "float32, bfloat16 or float16", request.dtype)
    if max(request.head_dims) > MOST_DIM:
        return Refusal("q", f"head dims of at most {MOST_DIM}", max(request.head_dims))
    others = [name for name in request.call.spec.mods if name not in MODS]
    if others:
        return Refusal("score_mod", "softcap and alibi_slopes alone", repr(others[0]))
    if request.call.spec.mods[:1] == ("softcap",):
        low, high = SOFTCAPS
        cap = request.call.spec.params[0]
        if not low < cap < high:
            return Refusal("softcap", f"a number between {low:g} and {high:g}", cap, f"softcap is {cap:g}")
    return None


def _unavailable(device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"the cpu engine takes CPU tensors, these are on {device.type}"
    return engine.why_unavailable()


def _automatic(request: Request) -> str | None:
    if request.device.type != "cpu" or launch.has_compiled_kernels(request.device):
        return None
    return None if request.operation in CPU.instead else "the C++ engine"


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
    instead={"linear": "torch", "vocab_loss": "torch"},
)
