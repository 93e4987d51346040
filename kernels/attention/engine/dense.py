"""Attention on the C++ engine: torch tensors in, ``fm_attention_forward`` and ``_backward`` (csrc/), torch tensors out.

Everything of the contract but the user's own score mods, fp8 and fp64; sums run in fp32.
"""

from __future__ import annotations

import torch

from ... import engine
from ...backend_record import Request
from ..call.errors import wrong
from ..call.options import Call
from ..call.packed import check_contents
from ..call.score_mods import SOFTCAP, split
from ..call.tensors import empty_laid_out_like
from .backend import CPU

_NAMES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.bool: "bool",
    torch.int32: "int32",
    torch.int64: "int64",
}


def view(name: str, tensor: torch.Tensor) -> engine.Tensor:
    """A tensor of up to four dimensions for the engine; one without elements is absent."""
    dtype = _NAMES.get(tensor.dtype)
    if dtype is None or not tensor.is_cpu:
        received = f"{tensor.dtype} on {tensor.device}"
        raise wrong(name, "a CPU tensor of a dtype that backend 'cpu' has", received, "convert it or choose another")
    if tensor.numel() == 0:
        return engine.Tensor()
    return engine.view(tensor.data_ptr(), tensor.stride(), dtype)


def check_limits(q: torch.Tensor, v: torch.Tensor, call: Call, *, needs_grad: bool = False) -> None:
    """Raise ValueError unless the engine computes the call, and packed sequences lie within the tensors."""
    dims = (q.shape[-1], v.shape[-1])
    CPU.check(Request("attention", q.device, q.dtype, dims, call, needs_grad))
    if call.packed is not None:
        check_contents(call.packed, q.shape[2], v.shape[2])


def set_options(target: engine.Attention, call: Call) -> list[torch.Tensor]:
    """Set on ``target`` what all operations share of ``call``, and return tensors that must outlive it."""
    kept = []
    shape = (target.batch, target.heads, target.seq_q, target.seq_k)
    spec = call.spec
    for name, tensor in (("mask", call.mask), ("bias", call.bias)):
        if tensor is not None:
            setattr(target, name, view(name, tensor.expand(shape)))
    for mod, tensors, numbers in split(spec.mods, call.aux, spec.params):
        if mod is SOFTCAP:
            target.softcap = numbers[0]
        else:
            target.alibi_slopes = view("alibi_slopes", tensors[0])
    if call.sinks is not None:
        kept.append(call.sinks.float())
        target.sinks = engine.view(kept[-1].data_ptr(), (0, kept[-1].stride(0)), "float32")
    target.scale = spec.scale
    target.window_left = engine.OPEN if spec.window_left is None else spec.window_left
    target.window_right = engine.OPEN if spec.window_right is None else spec.window_right
    target.threads = torch.get_num_threads()
    return kept


def _describe(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, call: Call
) -> tuple[engine.Attention, list[torch.Tensor]]:
    """Return the call as the engine takes it, and tensors that must outlive it."""
    tensors = {"q": q, "k": k, "v": v, "out": out, "lse": lse}
    for name, tensor in tensors.items():
        dtype = torch.float32 if name == "lse" else q.dtype
        if name == "out" and tensor.dtype == torch.float32:
            continue
        if tensor.dtype != dtype:
            raise wrong(name, f"{dtype} with backend 'cpu'", tensor.dtype, "convert it or choose another backend")
    packed = call.packed
    target = engine.Attention(
        batch=q.shape[0] if packed is None else packed.batch,
        heads=q.shape[1],
        kv_heads=k.shape[1],
        seq_q=q.shape[2] if packed is None else packed.max_q,
        seq_k=k.shape[2] if packed is None else packed.max_k,
        dim=q.shape[3],
        dim_v=v.shape[3],
        **{name: view(name, tensor) for name, tensor in tensors.items()},
    )
    if packed is not None:
        for name in tensors:
            getattr(target, name).stride[0] = 0
        target.cu_seqlens_q = view("cu_seqlens_q", packed.cu_q)
        target.cu_seqlens_k = view("cu_seqlens_k", packed.cu_k)
        target.align = engine.BOTTOM_RIGHT if packed.is_bottom_right else 0
    kept = set_options(target, call)
    spec = call.spec
    extra = [0] * 4 if call.origin is None else call.origin.tolist()
    target.origin_q, target.origin_k = spec.origin_q + extra[0], spec.origin_k + extra[1]
    target.origin_head, target.origin_batch = spec.origin_head + extra[2], spec.origin_batch + extra[3]
    if spec.dropout_p > 0:
        assert call.seed is not None
        target.dropout_p, target.seed = spec.dropout_p, int(call.seed.item()) & (2**64 - 1)
    return target, kept


def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp of attention on CPU tensors, on as many threads as PyTorch uses.

    Args:
        q: [B, H, Sq, D], any strides; k [B, Hkv, Sk, D] and v [B, Hkv, Sk, Dv] likewise, H a multiple of Hkv. Packed:
            [1, H, total, D].
        call: everything else.

    Returns:
        out [B, H, Sq, Dv] in q's dtype, its memory laid out like q's, and lse [B, H, Sq], fp32; 0 and -inf in rows
        without a key.

    Raises:
        ValueError: the call is beyond the limits of the engine, there is no engine in this installation, or packed
            sequences lie beyond the tensors or are longer than was said.
    """
    check_limits(q, v, call)
    packed = call.packed
    out = empty_laid_out_like(q, v.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if packed is not None and packed.batch == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    target, _kept = _describe(q, k, v, out, lse, call)
    engine.forward(target)
    if packed is not None:
        for rows in _padding(packed.cu_q, q.shape[2]):
            out[:, :, rows] = 0
            lse[:, :, rows] = -torch.inf
    return out, lse


def backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dlse: torch.Tensor | None,
    call: Call,
    *,
    bias_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The gradients, the same bits on every run and any number of threads.

    Args:
        do: gradient of out, [B, H, Sq, Dv].
        q, k, v, call: as :func:`forward` takes them.
        out, lse: the results of :func:`forward`; out may also be in fp32.
        dlse: gradient of lse, [B, H, Sq], or None.
        bias_grad: whether dbias is wanted.

    Returns:
        dq, dk, dv in the shapes and dtypes of q, k, v; dbias in bias's, or None where not asked for; dsinks in sinks',
        or None without.

    Raises:
        ValueError: as in :func:`forward`.
    """
    check_limits(q, v, call, needs_grad=True)
    bias, sinks, packed = call.bias, call.sinks, call.packed
    dq, dk, dv = (empty_laid_out_like(x, x.shape[3]) for x in (q, k, v))
    dbias = None
    if bias_grad and bias is not None:
        dbias = torch.zeros(bias.shape, dtype=torch.float32)
    rows = q.new_empty(q.shape[:3], dtype=torch.float32) if sinks is not None else None
    if packed is not None and packed.batch == 0:
        dbias = None if dbias is None else dbias.to(bias.dtype)  # type: ignore[union-attr]
        return dq.zero_(), dk.zero_(), dv.zero_(), dbias, None if sinks is None else torch.zeros_like(sinks)
    target, _kept = _describe(q, k, v, out, lse, call)
    dlse = None if dlse is None else dlse.float()
    gradients = engine.Gradients()
    tensors = {"dout": do, "dlse": dlse, "dq": dq, "dk": dk, "dv": dv, "dsink_rows": rows}
    for name, tensor in tensors.items():
        if tensor is not None:
            there = view(name, tensor)
            if packed is not None:
                there.stride[0] = 0
            setattr(gradients, name, there)
    if dbias is not None:
        gradients.dbias = view("dbias", dbias.expand(target.batch, target.heads, target.seq_q, target.seq_k))
    engine.backward(target, gradients)
    if packed is not None:
        for cu, filled in ((packed.cu_q, [dq, *([] if rows is None else [rows])]), (packed.cu_k, [dk, dv])):
            for padding in _padding(cu, filled[0].shape[2]):
                for x in filled:
                    x[:, :, padding] = 0
    dsinks = None
    if rows is not None:
        assert sinks is not None
        dsinks = rows.sum((0, 2)).to(sinks.dtype)
    if dbias is not None:
        assert bias is not None
        dbias = dbias.to(bias.dtype)
    return dq, dk, dv, dbias, dsinks


def _padding(cu: torch.Tensor, total: int) -> list[slice]:
    """The rows that belong to no sequence, where there are any."""
    first, last = int(cu[0]), int(cu[-1])
    return [rows for rows in (slice(0, first), slice(last, total)) if rows.start < rows.stop]
