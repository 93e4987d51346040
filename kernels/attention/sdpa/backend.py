"""The record of backend ``torch``: what PyTorch's own kernels compute of this, and what they refuse."""

from __future__ import annotations

from ...backend_record import Backend, Refusal, Request
from ..call.spec import FP8


def inexpressible(request: Request) -> str | None:
    """Return what F.scaled_dot_product_attention cannot express of a call of attention, or None if it can do it."""
    call, spec = request.call, request.call.spec
    if request.dtype == FP8:
        return "fp8"
    if request.needs_lse:
        return "the log-sum-exp (return_lse)"
    if spec.window_left is not None or spec.window_right not in (None, 0):
        return "window"
    if spec.mods:
        return f"score mods {spec.mods}"
    if call.sinks is not None:
        return "sinks"
    if spec.dropout_p > 0:
        return "dropout by seed (dropout_p)"
    if call.bias is not None and call.bias.dtype != request.dtype and request.device.type != "cpu":
        return f"bias of {call.bias.dtype} beside q of {request.dtype}"
    return None


def _limits(request: Request) -> Refusal | None:
    if request.operation in ("linear", "vocab_loss"):
        return None
    what = inexpressible(request)
    if what is None:
        return None
    return Refusal(
        "backend",
        "a backend that can do this call",
        f"'torch', whose F.scaled_dot_product_attention does not express {what}",
        f"PyTorch's kernel does not express {what}",
    )


def _automatic(request: Request) -> str | None:
    if request.operation == "vocab_loss":
        return f"PyTorch's products in chunks on {request.device.type}"
    if request.transforms and request.operation != "linear":  # as large as the reference there, and with less of it
        return None
    if request.operation == "linear":
        on_cpu = request.device.type == "cpu"
        return "PyTorch's matmul is the fast one on a CPU" if on_cpu else f"PyTorch's matmul on {request.device.type}"
    return f"PyTorch's kernel on {request.device.type}"


TORCH = Backend(
    name="torch",
    implementations={
        "attention": "fusemesh.kernels.attention.sdpa.dense",
        "linear": "fusemesh.kernels.matmul.torch_linear",
        "vocab_loss": "fusemesh.kernels.vocab_loss.chunked",
    },
    limits=_limits,
    automatic=_automatic,
    # Of the loss the formula under a transform, the chunks elsewhere.
    differentiable=frozenset({"attention", "linear", "vocab_loss"}),
)
