"""The record of backend ``triton``: what its kernels compute (CPU tensors: in the interpreter) and refuse."""

from __future__ import annotations

import functools
import importlib
import importlib.util

import torch

from ... import compat, env
from ...backend_record import Backend, Refusal, Request
from ...runtime import launch
from ..call import score_mods
from ..call.spec import FP8

HEAD_DIMS = (16, 256)  # smallest and largest; of decode's keys and values below
DECODE_HEAD_DIMS = ((16, 576), (16, 512))
MOST_MODS = 3  # softcap, ALiBi and one of the user's


def has_fp8(target: launch.Target) -> bool:
    """Return whether the target multiplies e4m3 as torch.float8_e4m3fn stores it (AMD's gfx942 has another one)."""
    return target.vendor == "interpreter" or (target.vendor == "cuda" and int(target.arch) >= 89)


def _takes_fp8(device: torch.device) -> bool:
    return has_fp8(launch.target_of(device))


compat.assume_constant_result(_takes_fp8)


def _lacks_fences(device: torch.device) -> bool:
    """Return whether Triton compiles kernels for this device without fences that they need; see runtime/fences.py."""
    target = launch.target_of(device)
    if target.vendor != "cuda" or not 100 <= int(target.arch) < 120:
        return False
    from ...runtime import fences

    return bool(fences.LEFT_OUT.value)


compat.assume_constant_result(_lacks_fences)


def _limits(request: Request) -> Refusal | None:
    if request.operation == "linear":
        if request.dtype == torch.float64:
            return Refusal("x", "float32, bfloat16 or float16", request.dtype)
        return None
    if request.operation == "vocab_loss":
        if request.dtype == torch.float64:
            return Refusal("h", "float32, bfloat16 or float16", request.dtype)
        return None
    is_decode = request.operation == "attention_decode"
    if request.dtype == torch.float64:
        return Refusal("q", "float32, bfloat16 or float16", request.dtype)
    limits = DECODE_HEAD_DIMS if is_decode else (HEAD_DIMS, HEAD_DIMS)
    names = ("q", "v_dim" if is_decode else "v")
    for name, size, (low, high) in zip(names, request.head_dims, limits, strict=True):
        if not low <= size <= high:
            return Refusal(name, f"a head dim from {low} to {high}", size)
    if request.dtype == FP8 and not _takes_fp8(request.device):
        return Refusal("q", f"a dtype other than {FP8}, which needs a GPU from sm_89", request.dtype)
    if request.dtype == FP8 and request.needs_grad:
        return Refusal("q", f"a dtype other than {FP8} where a gradient is asked for", request.dtype)
    return _mod_limits(request) or (_decode_limits(request) if is_decode else None)


def _mod_limits(request: Request) -> Refusal | None:
    """The refusal of the call's score mods."""
    spec = request.call.spec
    if len(spec.mods) > MOST_MODS:
        return Refusal("score_mod", f"at most {MOST_MODS} in a chain", spec.mods)
    for name in spec.mods:
        mod = score_mods.get(name)
        if mod.forward is None:
            return Refusal("score_mod", "a mod with a Triton function (forward=)", f"{name!r} without")
        if mod.backward is None and request.needs_grad:
            return Refusal("score_mod", "a mod with a gradient in Triton (backward=)", f"{name!r} without")
    if request.aux_needs_grad:
        return Refusal("score_mod", "aux tensors without gradient", "requires_grad=True")
    return None


def _decode_limits(request: Request) -> Refusal | None:
    """The refusal of head dims for which no tile fits the GPU's shared memory."""
    # While a graph is traced sizes may be symbols; the op will ask again.
    if torch.compiler.is_compiling():
        return None
    from . import decode_tiles

    target = launch.target_of(request.device)
    if target == launch.INTERPRETER:
        return None
    if decode_tiles.fits(target, request.dtype, *request.head_dims, request.is_latent, request.rows):
        return None
    return Refusal(
        "q",
        f"head dims whose tiles fit the {target.shared_memory} bytes of shared memory of {target.name}",
        f"D {request.head_dims[0]}, Dv {request.head_dims[1]}, {request.dtype}",
    )


@functools.cache
def _importable() -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        importlib.import_module("triton")
    except ImportError:
        return False
    return True


def _unavailable(device: torch.device) -> str | None:
    if not _importable():
        return "triton is not installed (pip install triton; Linux only)"
    if device.type == "cpu" and not (env.INTERPRET or launch.takes_any_device() or launch.has_compiled_kernels(device)):
        return (
            "Triton compiles for GPUs and these tensors are on the CPU; to run the kernels in Triton's interpreter "
            "set TRITON_INTERPRET=1 before Python starts"
        )
    if launch.has_compiled_kernels(device) and _lacks_fences(device):
        return (
            "Triton before 3.7.1 leaves fences out of kernels for GPUs of sm_100 to sm_110 (Blackwell); pip install "
            "'triton>=3.7.1'"
        )
    return None


def _automatic(request: Request) -> str | None:
    if not launch.has_compiled_kernels(request.device):
        return None
    return "trusted, FUSEMESH_PROOF=off" if env.PROOF == "off" else "each kernel is proven at its first use"


TRITON = Backend(
    name="triton",
    implementations={
        "attention": "fusemesh.kernels.attention.gpu.dense",
        "attention_varlen": "fusemesh.kernels.attention.gpu.varlen",
        "attention_decode": "fusemesh.kernels.attention.gpu.decode",
        "linear": "fusemesh.kernels.matmul.gpu.linear",
        "vocab_loss": "fusemesh.kernels.vocab_loss.gpu.loss",
    },
    limits=_limits,
    unavailable=_unavailable,
    automatic=_automatic,
    least_head_dim=HEAD_DIMS[0],
    keeps_rest=True,
    proves=launch.has_compiled_kernels,
)
