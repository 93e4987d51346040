"""Attention on the C++ engine: torch tensors in, ``fm_attention_forward`` (csrc/), torch tensors out; no gradients."""

from __future__ import annotations

import torch

from .. import engine
from ..engine import why_unavailable as why_unavailable
from .spec import AttentionSpec, empty_laid_out_like


def _check(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    if tensor.device.type != "cpu":
        raise ValueError(
            f"{name}: backend 'cpu' expected a CPU tensor, received one on {tensor.device}; move it or choose another"
        )
    if tensor.dtype != dtype:
        raise ValueError(
            f"{name}: backend 'cpu' expected {dtype}, received {tensor.dtype}; convert it or choose another"
        )


def _view(tensor: torch.Tensor) -> engine.Tensor:
    return engine.view(tensor.data_ptr(), tensor.stride(), str(tensor.dtype).removeprefix("torch."))


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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp of attention on CPU tensors, on as many threads as PyTorch uses.

    Args:
        q: [B, H, Sq, D] float32, any strides; k [B, Hkv, Sk, D] and v [B, Hkv, Sk, Dv] likewise, H a multiple of Hkv.
        mask: bool, True = attend, and ``bias``: float32; 4-D, each dimension 1 or the one of [B, H, Sq, Sk].
        origin: int64 [4], of which positions of query 0 and key 0 count here, added to those of ``spec``.
        aux, sinks, seed, descale: not for this engine yet.

    Returns:
        out [B, H, Sq, Dv], its memory laid out like q's, and lse [B, H, Sq], float32; 0 and -inf in rows without a key.

    Raises:
        ValueError: a dtype, device or feature that the engine does not take, or no engine in this installation.
    """
    unknown = [name for name, there in (("score_mod", spec.mods), ("dropout_p", spec.dropout_p)) if there]
    unknown += ["sinks"] if sinks is not None else []
    if unknown:
        raise ValueError(
            f"{unknown[0]}: backend 'cpu' expected none, received one; use backend='reference' or backend='auto'"
        )
    batch, heads, seq_q, dim = q.shape
    kv_heads, seq_k, dim_v = k.shape[1], k.shape[2], v.shape[3]
    out = empty_laid_out_like(q, dim_v)
    lse = q.new_empty(batch, heads, seq_q)
    tensors = {"q": q, "k": k, "v": v, "out": out, "lse": lse}
    if mask is not None:
        tensors["mask"] = mask.expand(batch, heads, seq_q, seq_k)
    if bias is not None:
        tensors["bias"] = bias.expand(batch, heads, seq_q, seq_k)
    for name, tensor in tensors.items():
        _check(name, tensor, torch.bool if name == "mask" else torch.float32)
    call = engine.Attention(
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        seq_q=seq_q,
        seq_k=seq_k,
        dim=dim,
        dim_v=dim_v,
        scale=spec.scale,
        window_left=engine.OPEN if spec.window_left is None else spec.window_left,
        window_right=engine.OPEN if spec.window_right is None else spec.window_right,
        threads=torch.get_num_threads(),
        **{name: _view(tensor) for name, tensor in tensors.items()},
    )
    extra_q, extra_k = (0, 0) if origin is None else (int(position) for position in origin[:2].tolist())
    call.origin_q, call.origin_k = spec.origin_q + extra_q, spec.origin_k + extra_k
    engine.forward(call)
    return out, lse
