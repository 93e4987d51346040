"""Attention on the C++ engine: torch tensors in, ``fm_attention_forward`` and ``_backward`` (csrc/), torch tensors out.

Everything of the contract but the user's own score mods, fp8 and fp64; sums run in fp32.
"""

from __future__ import annotations

import torch

from ... import engine
from ..call.choice import ENGINE_DTYPES, why_not_engine
from ..call.errors import wrong
from ..call.packed import Packed
from ..call.score_mods import SOFTCAP, split
from ..call.spec import AttentionSpec, empty_laid_out_like

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


def options(
    call: engine.Attention,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    spec: AttentionSpec,
    aux: tuple[torch.Tensor, ...],
    sinks: torch.Tensor | None,
) -> list[torch.Tensor]:
    """Set what all operations share on ``call``; returns tensors that must outlive it.

    Raises:
        ValueError: a score mod that the engine does not compute.
    """
    refusal = why_not_engine(torch.float32, spec.mods)
    if refusal is not None:
        raise wrong(*refusal, "use backend='reference' or backend='auto'")
    kept = []
    shape = (call.batch, call.heads, call.seq_q, call.seq_k)
    for name, tensor in (("mask", mask), ("bias", bias)):
        if tensor is not None:
            setattr(call, name, view(name, tensor.expand(shape)))
    for mod, tensors, numbers in split(spec.mods, aux, spec.params):
        if mod is SOFTCAP:
            call.softcap = numbers[0]
        else:
            call.alibi_slopes = view("alibi_slopes", tensors[0])
    if sinks is not None:
        kept.append(sinks.float())
        call.sinks = engine.view(kept[-1].data_ptr(), (0, kept[-1].stride(0)), "float32")
    call.scale = spec.scale
    call.window_left = engine.OPEN if spec.window_left is None else spec.window_left
    call.window_right = engine.OPEN if spec.window_right is None else spec.window_right
    call.threads = torch.get_num_threads()
    return kept


def _call(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    origin: torch.Tensor | None,
    spec: AttentionSpec,
    aux: tuple[torch.Tensor, ...],
    sinks: torch.Tensor | None,
    seed: torch.Tensor | None,
    packed: Packed | None,
) -> tuple[engine.Attention, list[torch.Tensor]]:
    """The engine's call, and tensors that must outlive it."""
    tensors = {"q": q, "k": k, "v": v, "out": out, "lse": lse}
    for name, tensor in tensors.items():
        dtype = torch.float32 if name == "lse" else q.dtype
        if name == "out" and tensor.dtype == torch.float32:
            continue
        if tensor.dtype != dtype or dtype not in ENGINE_DTYPES:
            expected = f"{dtype if dtype in ENGINE_DTYPES else 'float32, bfloat16 or float16'} with backend 'cpu'"
            raise wrong(name, expected, tensor.dtype, "convert it or choose another backend")
    call = engine.Attention(
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
            getattr(call, name).stride[0] = 0
        call.cu_seqlens_q = view("cu_seqlens_q", packed.cu_q)
        call.cu_seqlens_k = view("cu_seqlens_k", packed.cu_k)
        call.align = engine.BOTTOM_RIGHT if packed.is_bottom_right else 0
    kept = options(call, mask, bias, spec, aux, sinks)
    extra = [0] * 4 if origin is None else origin.tolist()
    call.origin_q, call.origin_k = spec.origin_q + extra[0], spec.origin_k + extra[1]
    call.origin_head, call.origin_batch = spec.origin_head + extra[2], spec.origin_batch + extra[3]
    if spec.dropout_p > 0:
        assert seed is not None
        call.dropout_p, call.seed = spec.dropout_p, int(seed.item()) & (2**64 - 1)
    return call, kept


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    origin: torch.Tensor | None,
    spec: AttentionSpec,
    aux: tuple[torch.Tensor, ...] = (),
    sinks: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
    descale: torch.Tensor | None = None,
    packed: Packed | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp of attention on CPU tensors, on as many threads as PyTorch uses.

    Args:
        q: [B, H, Sq, D], any strides; k [B, Hkv, Sk, D] and v [B, Hkv, Sk, Dv] likewise, H a multiple of Hkv. Packed:
            [1, H, total, D].
        mask: bool, True = attend, and ``bias``, fp32 or q's dtype; 4-D, each dimension 1 or the one of [B, H, Sq, Sk].
        origin: int64 [4], positions added to those of ``spec``.
        aux: the slopes of ALiBi, fp32 [B, H].
        sinks: [H], or None.
        seed: int64, one element, of dropout.
        descale: None; fp8 is not for this engine.
        packed: where sequences lie.

    Returns:
        out [B, H, Sq, Dv] in q's dtype, its memory laid out like q's, and lse [B, H, Sq], fp32; 0 and -inf in rows
        without a key.

    Raises:
        ValueError: a dtype, device or feature that the engine does not take, or no engine in this installation.
    """
    if descale is not None:
        raise wrong("descale", "None with backend 'cpu'", "a tensor", "use backend='reference' or backend='auto'")
    out = empty_laid_out_like(q, v.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if packed is not None and packed.batch == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    call, _kept = _call(q, k, v, out, lse, mask, bias, origin, spec, aux, sinks, seed, packed)
    engine.forward(call)
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
    *,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    origin: torch.Tensor | None,
    spec: AttentionSpec,
    bias_grad: bool,
    aux: tuple[torch.Tensor, ...] = (),
    sinks: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
    packed: Packed | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The gradients, the same bits on every run and any number of threads.

    Args:
        do: gradient of out, [B, H, Sq, Dv].
        out, lse: what :func:`forward` returned; out may also be in fp32.
        dlse: gradient of lse, [B, H, Sq], or None.
        bias_grad: whether dbias is wanted.

    Returns:
        dq, dk, dv in the shapes and dtypes of q, k, v; dbias in bias's, or None where not asked for; dsinks in sinks',
        or None without.

    Raises:
        ValueError: as in :func:`forward`.
    """
    dq, dk, dv = (empty_laid_out_like(x, x.shape[3]) for x in (q, k, v))
    dbias = None
    if bias_grad and bias is not None:
        dbias = torch.zeros(bias.shape, dtype=torch.float32)
    rows = q.new_empty(q.shape[:3], dtype=torch.float32) if sinks is not None else None
    if packed is not None and packed.batch == 0:
        dbias = None if dbias is None else dbias.to(bias.dtype)  # type: ignore[union-attr]
        return dq.zero_(), dk.zero_(), dv.zero_(), dbias, None if sinks is None else torch.zeros_like(sinks)
    call, _kept = _call(q, k, v, out, lse, mask, bias, origin, spec, aux, sinks, seed, packed)
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
        gradients.dbias = view("dbias", dbias.expand(call.batch, call.heads, call.seq_q, call.seq_k))
    engine.backward(call, gradients)
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
