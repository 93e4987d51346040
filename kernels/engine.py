"""The C++ engine through ctypes: its ABI (csrc/abi/fusemesh.h) in Python, and attention on numpy. Needs no torch.

The engine is one shared library in the folder of ``fusemesh.csrc``, built when the package is installed. It knows
nothing of Python, so that the same file serves every version of Python and PyTorch.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import env

if TYPE_CHECKING:
    import numpy as np

ABI_VERSION = 1
DTYPES = {"float32": 1, "bfloat16": 2, "float16": 3, "bool": 4, "uint8": 4, "int32": 5, "int64": 6}
OPEN = -1  # a side of the window that is open
BOTTOM_RIGHT = 1  # FM_BOTTOM_RIGHT
_Strides = ctypes.c_int64 * 4


class Tensor(ctypes.Structure):
    """``fm_tensor``: address, four strides in elements, dtype. All zero: absent."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("stride", _Strides),
        ("dtype", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    ]


class Attention(ctypes.Structure):
    """``fm_attention``: one call. Every field is described in csrc/abi/fusemesh.h."""

    _fields_ = [
        ("struct_size", ctypes.c_uint32),
        ("abi_version", ctypes.c_uint32),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "kv_heads", "seq_q", "seq_k", "dim", "dim_v")),
        *((name, Tensor) for name in ("q", "k", "v", "out", "lse", "mask", "bias")),
        *((name, Tensor) for name in ("alibi_slopes", "sinks", "cu_seqlens_q", "cu_seqlens_k")),
        *((name, ctypes.c_int64) for name in ("window_left", "window_right")),
        *((name, ctypes.c_int64) for name in ("origin_q", "origin_k", "origin_head", "origin_batch")),
        *((name, ctypes.c_double) for name in ("scale", "softcap", "dropout_p")),
        ("seed", ctypes.c_uint64),
        ("align", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("flags", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
    ]

    def __init__(self, **fields: Any) -> None:
        super().__init__(struct_size=ctypes.sizeof(Attention), abi_version=ABI_VERSION, **fields)


class Gradients(ctypes.Structure):
    """``fm_gradients``: what backward takes besides the call."""

    _fields_ = [
        ("struct_size", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
        *((name, Tensor) for name in ("dout", "dlse", "dq", "dk", "dv", "dbias", "dsink_rows")),
    ]

    def __init__(self, **fields: Any) -> None:
        super().__init__(struct_size=ctypes.sizeof(Gradients), **fields)


class Cache(ctypes.Structure):
    """``fm_cache``: what decode takes besides the call."""

    _fields_ = [
        ("struct_size", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
        *((name, ctypes.c_int64) for name in ("page", "pages", "added")),
        *((name, Tensor) for name in ("cache_lens", "cache_starts", "block_table", "k_new", "v_new")),
    ]

    def __init__(self, **fields: Any) -> None:
        super().__init__(struct_size=ctypes.sizeof(Cache), **fields)


def view(address: int, strides: Sequence[int], dtype: str) -> Tensor:
    """A tensor for the engine: ``address`` of element 0, up to four ``strides`` in elements, name of the dtype."""
    return Tensor(address, _Strides(*strides), DTYPES[dtype])


def library_path() -> Path:
    """Return the path of the engine, if the package was built with it."""
    spec = importlib.util.find_spec("fusemesh.csrc")
    assert spec is not None and spec.submodule_search_locations, "fusemesh.csrc is part of every installation"
    return Path(next(iter(spec.submodule_search_locations)), "libfusemesh.so")


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or why there is none."""
    path = library_path()
    if not path.exists():
        return None, (
            "this installation has no CPU engine, because it was made without a C++ compiler or with "
            "FUSEMESH_NO_ENGINE=1; install g++ or clang++, then install fusemesh again"
        )
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"the CPU engine does not load ({error}); install fusemesh again on this machine"
    version = library.fm_abi_version()
    if version != ABI_VERSION or not hasattr(library, "fm_set_isa"):
        return None, (
            f"the CPU engine at {path} speaks version {version} of its ABI and this Python code {ABI_VERSION}, or it "
            "is older; install fusemesh again"
        )
    library.fm_attention_forward.argtypes = [ctypes.POINTER(Attention)]
    library.fm_attention_backward.argtypes = [ctypes.POINTER(Attention), ctypes.POINTER(Gradients)]
    library.fm_attention_decode.argtypes = [ctypes.POINTER(Attention), ctypes.POINTER(Cache)]
    library.fm_set_isa.argtypes = [ctypes.c_char_p]
    for function in (library.fm_last_error, library.fm_build_info, library.fm_thread_runtime, library.fm_isas):
        function.restype = ctypes.c_char_p
    if env.CPU_ISA and library.fm_set_isa(env.CPU_ISA.encode()):
        expected = library.fm_isas().decode()
        return None, f"FUSEMESH_CPU_ISA: expected one of {expected}, received {env.CPU_ISA!r}; correct or unset it"
    return library, None


if hasattr(os, "register_at_fork"):
    # The library sees forks from when it is loaded on; PyTorch may have had threads before the engine's first call.
    os.register_at_fork(before=_load)


def why_unavailable() -> str | None:
    """Why the engine cannot run in this installation, or None if it can."""
    return _load()[1]


def _library() -> ctypes.CDLL:
    library, reason = _load()
    if library is None:
        raise ValueError(f"backend='cpu' cannot run here: {reason}")
    return library


def build_info() -> dict[str, str]:
    """Return what the engine says of its build: ``version``, ``sources`` (a digest), ``compiler``, ``isa``.

    Raises:
        ValueError: this installation has no engine.
    """
    text = _library().fm_build_info().decode()
    return dict(pair.split("=", 1) for pair in text.split("; "))


def thread_runtime() -> str:
    """``std::thread``, or the path of the OpenMP library of this process (PyTorch's) whose threads the engine borrows.

    Raises:
        ValueError: this installation has no engine.
    """
    return _library().fm_thread_runtime().decode()


def isas() -> tuple[str, ...]:
    """The instruction sets that the engine was built for and this processor runs, best first; the last is ``scalar``.

    Raises:
        ValueError: this installation has no engine.
    """
    return tuple(_library().fm_isas().decode().split(", "))


@contextlib.contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Within the block, calls of all threads run on one of :func:`isas`: for tests and measurements.

    Raises:
        ValueError: this processor or this build has no such instruction set.
    """
    before = build_info()["isa"]
    _raise_for(_library().fm_set_isa(name.encode()))
    try:
        yield
    finally:
        _raise_for(_library().fm_set_isa(before.encode()))


def _raise_for(status: int) -> None:
    if status:
        message = _library().fm_last_error().decode()
        raise {1: ValueError, 2: ValueError, 3: MemoryError}.get(status, RuntimeError)(f"CPU engine: {message}")


def forward(call: Attention) -> None:
    """Run ``fm_attention_forward``. The memory behind the call's addresses must stay alive until this returns.

    Raises:
        ValueError: the engine is absent, or refuses the call; the message is the engine's.
        MemoryError: it could not allocate its scratch memory.
        RuntimeError: it failed otherwise.
    """
    _raise_for(_library().fm_attention_forward(ctypes.byref(call)))


def backward(call: Attention, gradients: Gradients) -> None:
    """Run ``fm_attention_backward``; as :func:`forward`."""
    _raise_for(_library().fm_attention_backward(ctypes.byref(call), ctypes.byref(gradients)))


def decode(call: Attention, cache: Cache) -> None:
    """Run ``fm_attention_decode``; as :func:`forward`."""
    _raise_for(_library().fm_attention_decode(ctypes.byref(call), ctypes.byref(cache)))


def attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    mask: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    scale: float | None = None,
    window: tuple[int | None, int | None] = (None, None),
    origin: tuple[int, int] = (0, 0),
    threads: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """softmax(scale * q k^T + bias) v on float32 numpy arrays of any strides, on the CPU engine, without torch.

    Args:
        q: [B, H, Sq, D].
        k: [B, Hkv, Sk, D]; H is a multiple of Hkv.
        v: [B, Hkv, Sk, Dv].
        mask: bool, broadcastable to [B, H, Sq, Sk]; True = attend.
        bias: float32, broadcastable to [B, H, Sq, Sk].
        scale: 1 / sqrt(D) if None.
        window: (left, right), the keys seen besides the query's own position; None = open. Causal is (None, 0).
        origin: positions of query 0 and key 0.
        threads: at most so many threads; 0 = one for each processor.

    Returns:
        out [B, H, Sq, Dv], zero in rows without a key, and lse [B, H, Sq], the natural log of the softmax's
        denominator, -inf in such rows.

    Raises:
        ValueError: shapes or dtypes do not fit, or the engine is absent.
    """
    import numpy as np

    for name, array in (("q", q), ("k", k), ("v", v)):
        if array.ndim != 4:
            raise ValueError(
                f"{name}: expected 4 dimensions [batch, heads, sequence, dim], received shape {array.shape}"
            )
    batch, heads, seq_q, dim = q.shape
    kv_heads, seq_k, dim_v = k.shape[1], k.shape[2], v.shape[3]
    if k.shape != (batch, kv_heads, seq_k, dim):
        raise ValueError(f"k: expected shape [{batch}, Hkv, Sk, {dim}] to fit q's {q.shape}, received {k.shape}")
    if v.shape != (batch, kv_heads, seq_k, dim_v):
        raise ValueError(
            f"v: expected shape [{batch}, {kv_heads}, {seq_k}, Dv] to fit k's {k.shape}, received {v.shape}"
        )
    out = np.empty((batch, heads, seq_q, dim_v), np.float32)
    lse = np.empty((batch, heads, seq_q), np.float32)
    # Named, because views that broadcast_to makes must outlive the call.
    arrays = {"q": q, "k": k, "v": v, "out": out, "lse": lse}
    for name, given in (("mask", mask), ("bias", bias)):
        if given is not None:
            try:
                arrays[name] = np.broadcast_to(given, (batch, heads, seq_q, seq_k))
            except ValueError:
                expected = [batch, heads, seq_q, seq_k]
                raise ValueError(
                    f"{name}: expected a shape that broadcasts to {expected}, received {given.shape}"
                ) from None
    tensors = {}
    for name, array in arrays.items():
        if array.dtype != (np.bool_ if name == "mask" else np.float32):
            raise ValueError(f"{name}: expected {'bool' if name == 'mask' else 'float32'}, received {array.dtype}")
        if any(stride % array.itemsize for stride in array.strides):
            raise ValueError(
                f"{name}: expected strides in whole elements of {array.itemsize} bytes, received {array.strides}"
            )
        strides = [stride // array.itemsize for stride in array.strides]
        tensors[name] = view(array.ctypes.data, strides, str(array.dtype))
    left, right = (OPEN if side is None else side for side in window)
    call = Attention(
        batch=batch, heads=heads, kv_heads=kv_heads, seq_q=seq_q, seq_k=seq_k, dim=dim, dim_v=dim_v, **tensors
    )
    call.scale = scale if scale is not None else 1 / math.sqrt(dim) if dim else 1.0
    call.window_left, call.window_right = left, right
    call.origin_q, call.origin_k = origin
    call.threads = threads
    forward(call)
    return out, lse
