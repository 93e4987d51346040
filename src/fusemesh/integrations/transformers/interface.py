"""``attn_implementation="fusemesh"`` for Hugging Face models, transformers 4.57 and later.

    from fusemesh.integrations import transformers as fusemesh_transformers
    fusemesh_transformers.register()
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="fusemesh")

Two functions are registered under the name: the attention, and the function that makes its masks. Without the second,
transformers hands every layer None for a mask, and padding is silently attended to.

What a mask of None means is the contract between the two. It is returned for plain causal and sliding-window masks
without padding whose last query stands at the last key, and for bidirectional ones that hide nothing; the attention
then takes causality from the layer, the window from the ``sliding_window`` that the layer passes, and aligns the
queries to the last key. Everything else is a boolean mask, which is then the whole truth: causal and window are in it.

A model that computes attention itself (no attention interface) cannot be routed, and is refused where it is built:
``register()`` wraps ``PreTrainedModel.get_correct_attn_implementation``, transformers' own check of the name. Which
models have the interface depends on the version: BERT from transformers 5.0, T5 from 5.15, decoders such as Llama,
Mistral, Gemma 2, GPT-2 and gpt-oss in 4.57 already. Of a model made of several, the parts that have it are routed; one
that has not is refused if it asks for a mask, and else runs as it always does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fusemesh import compat
from fusemesh.kernels.attention.call.errors import short
from fusemesh.kernels.attention.call.option_checks import checked_dropout, checked_scale, without_keys
from fusemesh.kernels.attention.call.place import dropping, makes_no_mask
from fusemesh.kernels.attention.call.scalars import as_integer, element
from fusemesh.kernels.attention.call.score_mods import checked_softcap
from fusemesh.kernels.attention.call.tensors import has_values
from fusemesh.kernels.attention.call.validation import check_truth, wrong
from fusemesh.kernels.attention.dense.api import flash_attention

from . import models as transformers_models
from .packed import in_dtype_of, packed_attention

# Layer types whose masks transformers makes with create_sliding_window_causal_mask.
_SLIDING = ("sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention")
# What a layer may pass that would change the result and is not computed here.
_REFUSED = {
    "head_mask": "use attn_implementation='eager'",
    "sinks": "sinks of every query are not supported, those of a head (s_aux) are; use attn_implementation='eager'",
    "block_indices": "sparse attention is not supported; use attn_implementation='eager'",
}


def register(name: str = "fusemesh") -> None:
    """Make ``attn_implementation=name`` known to transformers: the attention and its mask function. Idempotent.

    The backend is that of ``fusemesh.use_backend(...)``, FUSEMESH_BACKEND, or chosen automatically.

    Raises:
        ImportError: transformers is not installed, or older than 4.57.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise ImportError(
            "fusemesh.integrations.transformers.register() needs transformers 4.57 or later: "
            f"pip install 'transformers>=4.57' ({error})"
        ) from error
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, attention_mask)
    transformers_models.check_when_built(name)


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Return one layer's attention, as transformers calls it.

    Args:
        module: the layer; its ``is_causal`` (True where it has none) counts unless ``is_causal`` is given.
        query: [B, H, Sq, D].
        key, value: [B, Hkv, Sk, D], heads not repeated.
        attention_mask: None (see the top of this module), bool with True = attend, or floating and added to the scores;
            broadcasts to [B, H, Sq, Sk] after its last dimension is cut to Sk.
        dropout: probability of dropping an attention weight; the layer passes 0 outside training.
        scaling: factor of query key^T; None means 1 / sqrt(D).
        sliding_window: how many keys a query sees, its own included.
        softcap: c of c * tanh(s / c) on the scores (Gemma 2).
        kwargs: ``cu_seq_lens_q``, ``cu_seq_lens_k``, ``max_length_q`` and ``max_length_k``: bounds of sequences that
            share rows, as for flash-attn, where there is no mask; what else layers pass changes nothing.
        s_aux: [H], one more logit in each softmax's denominator, with a gradient (gpt-oss).
        position_bias: added to the scores, broadcasts to [B, H, Sq, Sk], with a gradient (T5).

    Returns:
        [B, Sq, H, Dv] and None: the weights are never computed.

    Raises:
        ValueError: the layer slides and does not say so, asks for weights, or passes something unsupported.
    """
    _refuse(kwargs)
    sq, sk = query.shape[2], key.shape[2]
    causal = check_truth("is_causal", _layer_is_causal(module) if is_causal is None else is_causal)
    dropout_p = checked_dropout(element(dropout), "dropout", takes_all=True)
    mask = bias = None
    window = None
    if attention_mask is None:
        if causal:
            window = _window(module, sliding_window, sk)
        causal = causal and sq > 1  # the one query of a decoding step stands at the last key and sees all
    else:
        causal = False
        attention_mask = attention_mask[..., :sk]
        if attention_mask.dtype == torch.bool:
            mask = attention_mask
        else:
            bias = attention_mask
    packed = kwargs.get("cu_seq_lens_q") if attention_mask is None else None
    if packed is not None and position_bias is None:
        options: dict[str, Any] = {
            "window": window,
            "softcap": softcap,
            "sinks": s_aux,
            "scale": scaling,
            "dropout_p": dropout_p,
        }
        return packed_attention(module, (query, key, value), kwargs, causal=causal, **options), None
    if attention_mask is None and makes_no_mask():
        raise wrong(
            "cu_seq_lens_q",
            "the bounds of the documents of each row",
            f"none in {type(module).__name__}",
            "the model's code does not pass them on to its attention; train without packing (data.packing = false)",
        )
    if position_bias is not None:
        position_bias = position_bias[..., :sk]
        bias = position_bias if bias is None else bias + position_bias
    if query.shape[0] != key.shape[0]:  # learned queries with a batch of 1
        batch = max(query.shape[0], key.shape[0])
        query, key, value = (x.expand(batch, -1, -1, -1) for x in (query, key, value))
    if dropout_p == 1:
        dropout_p, mask = 0.0, without_keys(query)
    align = "bottom_right" if causal or window is not None else None
    seed = origin = None
    if dropout_p > 0:
        # A rank's heads and samples drop what they would in one process.
        seed, origin, align = dropping(module, query, key, align)
    out = flash_attention(
        query,
        key,
        value,
        causal=causal,
        align=align,
        origin=origin,
        window=window,
        mask=mask,
        bias=in_dtype_of(query, bias),
        softcap=None if softcap is None else checked_softcap(element(softcap)),
        sinks=in_dtype_of(query, s_aux),
        dropout_p=dropout_p,
        seed=seed,
        scale=checked_scale(element(scaling), query, "scaling"),
    )
    assert isinstance(out, torch.Tensor)
    return out.transpose(1, 2).contiguous(), None


def attention_mask(
    *,
    batch_size: int,
    kv_length: int,
    mask_function: Callable[..., Any] | None = None,
    q_length: int | None = None,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    cache_position: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    config: Any = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """Return the mask of one kind of layer: None where :func:`attention` can do without, else bool [B, 1, Sq, Sk].

    Called by transformers with the arguments of its ``sdpa_mask``: positions q_offset to q_offset + q_length (4.57:
    ``cache_position`` [Sq]) see positions kv_offset to kv_offset + kv_length where ``mask_function(b, h, q, k)`` says
    so and ``attention_mask`` [B, positions] holds no padding.

    ``local_size`` alone is no proof of a sliding window, since chunked attention sets it, too; so whether the mask is
    what its absence would mean is asked of mask_function itself, at O(Sq + Sk) places.

    Raises:
        ValueError: the model computes attention by itself, so it would take None for "hide nothing".
    """
    transformers_models.refuse_by_config(config)
    if makes_no_mask():
        return None
    function: Callable[..., Any] = compat.causal_mask_function() if mask_function is None else mask_function
    positions: dict[str, Any] = {"kv_length": kv_length, "kv_offset": kv_offset}
    if cache_position is not None:
        positions["cache_position"] = cache_position
        q_length, q_offset = cache_position.shape[0], cache_position[0]
    else:
        positions.update(q_length=q_length, q_offset=q_offset)
    assert q_length is not None
    if (
        (allow_is_causal_skip or allow_is_bidirectional_skip)
        and not use_vmap
        and 0 not in (batch_size, q_length, kv_length)
    ):
        device = kwargs.get("device", "cpu") if cache_position is None else cache_position.device
        span = _Span(batch_size, q_length, kv_length, kv_offset, device, attention_mask)
        if allow_is_causal_skip:
            skips = _is_causal(span, q_offset, function, local_size, config)
        else:
            skips = _hides_nothing(span, q_offset, function)
        if skips:
            return None
    if cache_position is None:
        positions["use_vmap"] = use_vmap
    return compat.boolean_mask(
        batch_size=batch_size,
        mask_function=function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
        config=config,
        **positions,
        **kwargs,
    )


class _Span:
    """The queries and keys of one mask, and its padding."""

    def __init__(
        self,
        batch_size: int,
        q_length: int,
        kv_length: int,
        kv_offset: int,
        device: torch.device | str,
        padding: torch.Tensor | None,
    ) -> None:
        self.batch_size, self.q_length, self.kv_length, self.kv_offset = batch_size, q_length, kv_length, kv_offset
        self.device, self.padding = device, padding

    def can_read(self) -> bool:
        """Return whether masks can be read: not while compiling, on meta, and of fake tensors."""
        return has_values(torch.empty(0, device=self.device))

    def has_padding(self) -> bool:
        """Return whether a key is padding; True where the tensor cannot be read."""
        if self.padding is None:
            return False
        end = self.kv_offset + self.kv_length
        if not has_values(self.padding) or self.padding.dim() != 2 or self.padding.shape[1] < end:
            return True
        return not bool(self.padding[:, self.kv_offset : end].all())

    def values(self, mask_function: Callable[..., Any], q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """Return mask_function of the pairs (q[i], k[i]), for every element of the batch; [B or 1, 1, 1, N]."""
        batch = torch.arange(self.batch_size, device=self.device)[:, None, None, None]
        head = torch.zeros((1, 1, 1, 1), dtype=torch.int64, device=self.device)
        return mask_function(batch, head, q[None, None, None, :], k[None, None, None, :])


def _is_causal(
    span: _Span,
    q_offset: int | torch.Tensor,
    mask_function: Callable[..., Any],
    local_size: int | None,
    config: Any,
) -> bool:
    """Return whether this mask is causal, or sliding with a window of local_size, unpadded, aligned to the last key."""
    can_read = span.can_read()
    if not can_read and isinstance(q_offset, torch.Tensor):
        return False
    first_q, last_k = int(q_offset), span.kv_offset + span.kv_length - 1
    if first_q + span.q_length - 1 != last_k or span.has_padding():
        return False
    if mask_function is compat.causal_mask_function():
        return True
    if not can_read:  # go by the layers that a config can have
        window = getattr(config, "sliding_window", None)
        return local_size is not None and window == local_size and not getattr(config, "attention_chunk_size", None)
    window = span.kv_length if local_size is None else local_size
    q = torch.arange(first_q, last_k + 1, device=span.device)
    k = torch.arange(span.kv_offset, last_k + 1, device=span.device)
    # Of every query the keys at both edges of its window, and the middle; of the first and the last query every key.
    near = [(q, at.clamp(span.kv_offset, last_k)) for at in (q - window, q - window + 1, q - window // 2, q, q + 1)]
    pairs = [*near, (q[:1].expand_as(k), k), (q[-1:].expand_as(k), k)]
    hides = last_k - window >= span.kv_offset
    if hides:
        if window == 1:  # a window of 1 and a chunk of 1 are the same mask, of which the attention sees only one
            return False
        # A single query at the end of a chunk sees what it would through a window. The place that tells them apart:
        pairs.append((torch.full_like(q[:1], window), torch.ones_like(q[:1])))
    q, k = (torch.cat(x) for x in zip(*pairs, strict=True))
    return bool((span.values(mask_function, q, k) == (k <= q) & (k > q - window)).all())


def _hides_nothing(span: _Span, q_offset: int | torch.Tensor, mask_function: Callable[..., Any]) -> bool:
    """Return whether every query sees every key, by the first and the last of both."""
    if span.has_padding():
        return False
    if mask_function is compat.bidirectional_mask_function():
        return True
    if not span.can_read():
        return False
    q = torch.arange(span.q_length, device=span.device) + q_offset
    k = torch.arange(span.kv_length, device=span.device) + span.kv_offset
    pairs = [(q, x.expand_as(q)) for x in (k[:1], k[-1:])] + [(x.expand_as(k), k) for x in (q[:1], q[-1:])]
    q, k = (torch.cat(x) for x in zip(*pairs, strict=True))
    return bool(span.values(mask_function, q, k).all())


def _layer_is_causal(module: torch.nn.Module) -> bool:
    """Return whether a layer is causal; a config can turn a decoder into an encoder whose layers still say they are."""
    return (
        getattr(module, "is_causal", True) and getattr(getattr(module, "config", None), "is_causal", True) is not False
    )


def _window(module: torch.nn.Module, passed: Any, sk: int) -> tuple[int, None] | None:
    """Return flash_attention's (left, right) if the window hides one of the sk keys, else None."""
    if passed is None:
        own = _own_window(module)
        if own is not None and own < sk:
            raise wrong(
                "sliding_window",
                f"the window of {own} keys that {type(module).__name__}'s config asks for, because the mask is None",
                f"None, with {sk} keys",
                "the model's code does not pass it on to its attention; use attn_implementation='sdpa' for this model",
            )
        return None
    window = as_integer(element(passed))
    if window is None or window < 1:
        raise wrong("sliding_window", "an int above 0 or None", short(passed), "it counts the query's own key")
    return (window - 1, None) if window < sk else None


def _own_window(module: torch.nn.Module) -> int | None:
    """Return the window for which transformers makes this layer's mask, or None if the layer does not slide."""
    config = getattr(module, "config", None)
    window = as_integer(element(getattr(module, "sliding_window", None) or getattr(config, "sliding_window", None)))
    if window is None:
        return None
    kind = getattr(module, "layer_type", None) or getattr(module, "attention_type", None)
    types, index = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    if not isinstance(kind, str) and types is not None and isinstance(index, int) and index < len(types):
        kind = types[index]
    if isinstance(kind, str):
        return window if kind in _SLIDING else None
    if getattr(module, "is_sliding", None) is not None:
        return window if module.is_sliding else None
    return window if getattr(config, "use_sliding_window", True) else None


def _refuse(kwargs: dict[str, Any]) -> None:
    for name, remedy in _REFUSED.items():
        if kwargs.get(name) is not None:
            raise wrong(name, "None", type(kwargs[name]).__name__, remedy)
    if kwargs.get("output_attentions"):
        raise wrong(
            "output_attentions", "False", True, "fused attention has no weights; use attn_implementation='eager'"
        )
