"""The public functions of attention: contract, validation, choice of backend.

One formula, computed in this order everywhere, for each batch b, query head h and its key head h // (H / Hkv):

    s = scale * q k^T;   s = softcap * tanh(s / softcap);   s = s - slope * |i_q - i_k|;   s = score_mod(s)
    s = s + bias;   s = -inf where mask is False, or causal or window hides the key
    lse = log sum_k exp(s);   p = exp(s - log(exp(lse) + exp(sink)));   out = dropout(p) v

It is the exact attention of Vaswani et al., arXiv:1706.03762, computed by fused backends as in FlashAttention
(Dao et al., arXiv:2205.14135) and FlashAttention-2 (Dao, arXiv:2307.08691), without ever storing the Sq x Sk scores.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ... import compat
from ...backend_record import TRANSFORMS, Backend, Request, implementation, needs_gradient
from ...backends import choose, count
from ..call.option_checks import check_seed
from ..call.options import Call, Options
from ..call.spec import Origin
from ..call.tensors import autocast, has_rest, rest_is_needed, unit_last_stride
from ..call.validation import check_flag, check_qkv, check_saved, normalise, wrong
from .ops import FIELDS


class AttentionGradients(NamedTuple):
    """The results of :func:`attention_backward`; None where there is no such input or it was not asked for."""

    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor
    dbias: torch.Tensor | None
    dsinks: torch.Tensor | None


def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    align: str | None = None,
    window: tuple[int | None, int | None] | None = None,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    softcap: float | None = None,
    score_mod: Any = None,
    sinks: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | torch.Tensor | None = None,
    scale: float | None = None,
    origin: Origin | None = None,
    descale: Any = None,
    return_lse: bool = False,
    deterministic: bool = True,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Scaled-dot-product attention, differentiable in q, k, v and bias; the formula is at the top of this module.

    Args:
        q: [B, H, Sq, D]. Any strides; only a last dimension that is not contiguous is copied, for fused backends.
            Jagged tensors [B, H, j, D] go to :func:`fusemesh.flash_attention_varlen`, and the results are jagged.
        k: [B, Hkv, Sk, D], H a multiple of Hkv (GQA, MQA).
        v: [B, Hkv, Sk, Dv]; Dv may differ from D.
        causal: hide the keys after the query's own position.
        align: where the queries stand among the keys: ``"top_left"`` puts query 0 at key 0, ``"bottom_right"`` the last
            query at the last key. With ``causal`` or ``window`` and Sq != Sk, this or ``origin`` must be given.
        window: (left, right): how many keys before and after its own position a query sees, besides the one at it; None
            leaves a side open. With ``causal`` the right side is 0.
        mask: bool, True = attend, any shape that broadcasts to [B, H, Sq, Sk], any strides. No gradient.
        bias: added to the scores, any shape that broadcasts to [B, H, Sq, Sk], any strides, q's dtype or fp32. Its
            gradient has its own shape. Combines with mask.
        alibi_slopes: [H] or [B, H], ALiBi's; no gradient. Like score_mod it counts positions, and so asks for ``align``
            or ``origin`` where Sq != Sk.
        softcap: scores are limited to (-softcap, softcap) by tanh.
        score_mod: ``mod(*aux, **params)`` with mod from :func:`fusemesh.register_score_mod`.
        sinks: [H], q's dtype or fp32: a logit of each head that takes part in the softmax and has no value; has a
            gradient. lse leaves it out.
        dropout_p: share of the probabilities that are dropped, the others divided by 1 - dropout_p; not in lse.
        seed: of dropout, an int or an int64 tensor on the device with one element: which elements are dropped depends
            on the seed and on positions (``origin``) alone, the same on every backend. None draws one from torch's
            generator.
        scale: factor of q k^T; None means 1 / sqrt(D).
        origin: where element 0 of what was passed stands in the whole (:class:`fusemesh.Origin`), so that a shard
            computes what the whole would: query i stands at origin.q + i, key j at origin.k + j. Not with ``align``.
        descale: for fp8, (q's, k's, v's): numbers, or fp32 tensors of one element or [B, Hkv]; x = descale * fp8(x).
        return_lse: also return the log-sum-exp, through which gradients flow, too.
        deterministic: False allows a faster backward; there is none so far.
        backend: ``reference`` (plain PyTorch, memory Sq * Sk), ``torch`` (F.scaled_dot_product_attention; no window,
            softcap, alibi_slopes, score_mod, sinks, dropout_p, return_lse), ``triton`` (GPUs; the CPU only in Triton's
            interpreter) or ``cpu`` (the C++ engine; no score_mod); one asked for by name runs or raises. ``auto`` takes
            triton on a GPU where that is proven and cpu on CPUs, else torch where it can do the call, else reference,
            and says at INFO which.

    Numbers and flags may be numpy's, numbers and window also tensors, which are read on the host.
    Dtypes: fp32, bf16, fp16, and fp64 on reference and torch; sums run in fp32 (fp64 for fp64). fp8
    (torch.float8_e4m3fn, on GPUs from sm_89) for the forward alone: out is bf16, bias and sinks are bf16 or fp32. Under
    autocast q, k and v are cast as F.scaled_dot_product_attention's are. Triton takes D and Dv from 16 to 256, the
    others any. In bf16 and fp16 on triton a call that autograd records keeps what rounding took from out for its
    backward, 2 bytes an element of out. Same inputs give the same bits. A second backward (create_graph=True) works in
    eager mode; it costs the memory of the reference.

    Returns:
        out [B, H, Sq, Dv] in q's dtype (bf16 for fp8); with return_lse also lse [B, H, Sq], natural log, fp32 (fp64 for
        fp64). A query that sees no key has out 0 and lse -inf, and no gradient comes from it. Sq = 0 and Sk = 0 work.

    Raises:
        ValueError: an argument is wrong, or a backend given by name cannot do the call; before anything runs, with the
            argument's name, what was expected, what was received and what to change.
        NotImplementedError: an argument is right but not built yet; named in the message.
    """
    options = Options(
        causal=causal,
        align=align,
        window=window,
        mask=mask,
        bias=bias,
        alibi_slopes=alibi_slopes,
        softcap=softcap,
        score_mod=score_mod,
        sinks=sinks,
        dropout_p=dropout_p,
        seed=seed,
        scale=scale,
        origin=origin,
        descale=descale,
    )
    check_flag("return_lse", return_lse)
    check_flag("deterministic", deterministic)
    if any(isinstance(x, torch.Tensor) and x.layout == torch.jagged for x in (q, k, v)):
        from ..varlen import jagged

        return jagged.attention(q, k, v, options, return_lse=return_lse, backend=backend)
    q, k, v = autocast(q, k, v)
    check_qkv(q, k, v)
    call = normalise(q, k, options)
    record = _choose(backend, (q, k, v), call, needs_lse=return_lse)
    out, lse, _ = _forward(record, q, k, v, call, rest_is_needed(record, q, k, call))
    return (out, lse) if return_lse else out


def attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    align: str | None = None,
    window: tuple[int | None, int | None] | None = None,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    softcap: float | None = None,
    score_mod: Any = None,
    sinks: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | torch.Tensor | None = None,
    scale: float | None = None,
    origin: Origin | None = None,
    descale: Any = None,
    return_rest: bool = False,
    deterministic: bool = True,
    backend: str = "auto",
) -> tuple[Any, ...]:
    """:func:`flash_attention` without autograd, for those who keep their own tape (ring attention, checkpointing).

    Arguments and errors are those of :func:`flash_attention`, except that backend ``torch`` is refused (it has no
    log-sum-exp) and autocast is not applied.

    Args:
        return_rest: also return what rounding took from out, by which :func:`attention_backward` computes gradients as
            accurate as flash_attention's.

    Returns:
        out [B, H, Sq, Dv] in q's dtype and lse [B, H, Sq]; with return_rest also out's rest, of its shape and dtype, or
        None where out is not rounded to 16 bits, is of fp8, or the backend has none. None of them requires a gradient.
    """
    check_flag("return_rest", return_rest)
    check_qkv(q, k, v)
    check_flag("deterministic", deterministic)
    check_seed(dropout_p, seed)
    options = Options(
        causal=causal,
        align=align,
        window=window,
        mask=mask,
        bias=bias,
        alibi_slopes=alibi_slopes,
        softcap=softcap,
        score_mod=score_mod,
        sinks=sinks,
        dropout_p=dropout_p,
        seed=seed,
        scale=scale,
        origin=origin,
        descale=descale,
    )
    _check_no_gradient("attention_forward", q, k, v, options)
    with torch.no_grad():
        call = normalise(q, k, options)
        record = _choose(backend, (q, k, v), call, needs_lse=True)
        has = return_rest and record.keeps_rest and has_rest(q.dtype)
        out, lse, rest = _forward(record, q, k, v, call, has)
    return (out, lse, rest if has else None) if return_rest else (out, lse)


def attention_backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dlse: torch.Tensor | None = None,
    *,
    out_rest: torch.Tensor | None = None,
    bias_grad: bool = False,
    causal: bool = False,
    align: str | None = None,
    window: tuple[int | None, int | None] | None = None,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    softcap: float | None = None,
    score_mod: Any = None,
    sinks: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | torch.Tensor | None = None,
    scale: float | None = None,
    origin: Origin | None = None,
    descale: Any = None,
    deterministic: bool = True,
    backend: str = "auto",
) -> AttentionGradients:
    """The gradients of :func:`attention_forward`, without autograd.

    With the out and lse of a softmax over more keys than k holds (all shards of a ring), it gives the part of the
    gradients that belongs to these keys; the parts of dq add up.

    Args:
        do: gradient of out, [B, H, Sq, Dv], q's dtype.
        q, k, v, mask, bias and all options: as passed to the forward.
        out, lse: as the forward returned them.
        dlse: gradient of lse, [B, H, Sq], lse's dtype; None means zero.
        out_rest: what rounding took from out, as the forward (or merge_attention) returned it beside out: in bf16 and
            fp16 dq, dk, dbias and dsinks are more accurate with it where the softmax is nearly one-hot.
        bias_grad: also compute the gradient of bias.
        backend: as in :func:`flash_attention`; ``torch`` is refused.

    Returns:
        dq, dk, dv in the shapes and dtypes of q, k, v; dbias in bias's, None without bias_grad; dsinks in sinks', None
        without (in a ring each part computes the whole of it, which counts once). A dimension of bias with stride 0
        (``expand``) counts as one of size 1, and so it has size 1 in dbias.
    """
    check_qkv(q, k, v)
    check_flag("bias_grad", bias_grad)
    check_flag("deterministic", deterministic)
    check_saved(q, v, do, out, lse, dlse, out_rest)
    check_seed(dropout_p, seed)
    if bias_grad and bias is None:
        raise wrong("bias_grad", "False without bias", True, "pass the bias of the forward")
    options = Options(
        causal=causal,
        align=align,
        window=window,
        mask=mask,
        bias=bias,
        alibi_slopes=alibi_slopes,
        softcap=softcap,
        score_mod=score_mod,
        sinks=sinks,
        dropout_p=dropout_p,
        seed=seed,
        scale=scale,
        origin=origin,
        descale=descale,
    )
    _check_no_gradient("attention_backward", q, k, v, options, do, out, lse, dlse, out_rest)
    with torch.no_grad():
        call = normalise(q, k, options)
        record = _choose(backend, (q, k, v), call, needs_lse=True, is_backward=True)
        gradients = _backward(record, (do, q, k, v, out, lse, dlse), out_rest, call, bias_grad)
    dbias = gradients.dbias
    if dbias is not None:
        assert bias is not None
        gradients = gradients._replace(dbias=dbias.reshape(dbias.shape[dbias.dim() - bias.dim() :]))
    return gradients


def _choose(
    backend: str, tensors: tuple[torch.Tensor, ...], call: Call, *, needs_lse: bool, is_backward: bool = False
) -> Backend:
    """The backend that runs; for one given by name, ValueError if it cannot do this call."""
    q, k, v = tensors
    transforms = compat.transforms()
    needs_grad = needs_gradient(*tensors, *call.differentiable)
    if transforms and not needs_grad:  # what no gradient is asked of is the same inside torch.func.grad and outside
        transforms = tuple(name for name in transforms if name != compat.GRADIENT)
    request = Request(
        "attention",
        q.device,
        q.dtype,
        (q.shape[3], v.shape[3]),
        call,
        needs_grad or is_backward,
        needs_lse,
        scores=(*q.shape[:3], k.shape[2]),
        kv_heads=k.shape[1],
        transforms=transforms,
    )
    return choose(backend, request)


def _check_no_gradient(function: str, q: Any, k: Any, v: Any, options: Options, *others: Any) -> None:
    """Raise where torch.func asks a gradient of a function without autograd, which would silently be zero."""
    if compat.GRADIENT not in compat.transforms():
        return
    named = {"q": q, "k": k, "v": v, "bias": options.bias, "sinks": options.sinks}
    named |= dict(zip(("do", "out", "lse", "dlse", "out_rest"), others, strict=False))
    for name, x in named.items():
        if isinstance(x, torch.Tensor) and needs_gradient(x):
            what = TRANSFORMS[compat.GRADIENT]
            remedy = "call flash_attention, which has every derivative, or this one under torch.no_grad()"
            raise wrong(name, f"a tensor without gradient, {function} being without autograd", what, remedy)


def _forward(
    record: Backend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call, keep_rest: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return out, lse and what rounding took from out; the last is None or empty unless it is to be kept."""
    # An argument that is not there leaves exported programs as they are.
    options = {"keep_rest": True} if keep_rest else {}
    if "attention" in record.differentiable:
        count("attention_forward", record.name)
        # Autograd goes through the formula itself, and needs none.
        options = {} if needs_gradient(q, k, v, *call.differentiable) else options
        out, lse, *rest = implementation(record.name, "attention").forward(q, k, v, call, **options)
        return out, lse, rest[0] if rest else None
    q, k, v = (unit_last_stride(x) for x in (q, k, v))
    out, lse, out_rest = torch.ops.fusemesh.attention_forward(q, k, v, *FIELDS.pack(call), record.name, **options)
    return out, lse, out_rest


def _backward(
    record: Backend, tensors: tuple[Any, ...], out_rest: torch.Tensor | None, call: Call, bias_grad: bool
) -> AttentionGradients:
    if "attention" in record.differentiable:
        count("attention_backward", record.name)
        options: dict[str, Any] = {"out_rest": out_rest} if out_rest is not None and record.keeps_rest else {}
        found = implementation(record.name, "attention").backward(*tensors, call, bias_grad=bias_grad, **options)
        return AttentionGradients(*found[:5])
    do, q, k, v, out, lse, dlse = tensors
    do, q, k, v, out = (unit_last_stride(x) for x in (do, q, k, v, out))
    out_rest = None if out_rest is None else unit_last_stride(out_rest)
    dq, dk, dv, dbias, dsinks, _ = torch.ops.fusemesh.attention_backward(
        do, q, k, v, out, lse, dlse, out_rest, *FIELDS.pack(call), bias_grad, False, record.name
    )
    return AttentionGradients(dq, dk, dv, dbias if bias_grad else None, None if call.sinks is None else dsinks)
