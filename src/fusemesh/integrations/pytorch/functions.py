"""The functions that replace PyTorch's attention functions inside ``fusemesh.accelerate()``.

PyTorch's modules reach attention by four functions, and these four are replaced (:data:`REPLACEMENTS`):

- F.scaled_dot_product_attention: called by users, and by nn.MultiheadAttention that returns no weights;
- F.multi_head_attention_forward: nn.MultiheadAttention, which computes weights by matmuls of its own;
- two in :mod:`fusemesh.compat`: fused inference of nn.MultiheadAttention and nn.TransformerEncoderLayer.

PyTorch goes on deciding which of them a module calls, and its flag for the fused paths (``torch.backends.mha``) is left
as it is. So hooks that switch those paths off do so still, and what nn.TransformerEncoder does around them (padding
taken out before the first layer, and put back as zeros) stays.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F

from fusemesh import compat
from fusemesh.kernels.attention.call.option_checks import checked_dropout, seed_tensor, without_keys
from fusemesh.kernels.attention.call.options import Options
from fusemesh.kernels.attention.call.tensors import autocast
from fusemesh.kernels.attention.call.validation import normalise, wrong
from fusemesh.kernels.attention.dense.api import flash_attention
from fusemesh.kernels.attention.reference import dense as reference

from . import sdpa as torch_sdpa
from .routes import active_backend, automatic_backend, route
from .signatures import FusedAttention, FusedEncoderLayer, MultiHeadAttention


def _scaled_dot_product_attention(original: Any) -> Any:
    def scaled_dot_product_attention(
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        def theirs() -> Any:
            return original(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

        backend = active_backend()
        if backend is None:
            return theirs()
        collecting = _collecting()
        if collecting is not None:
            out, weights = _with_weights(query, key, value, attn_mask, dropout_p, backend)
            collecting.append(weights)
            return out
        dense = all(isinstance(x, torch.Tensor) and not x.is_nested for x in (query, value))
        jagged = isinstance(query, torch.Tensor) and query.is_nested and query.layout == torch.jagged

        def ours() -> Any:
            if jagged and attn_mask is None:
                align = "top_left" if is_causal else None
                options: dict[str, Any] = {"causal": is_causal, "align": align, "scale": scale, "dropout_p": dropout_p}
                return flash_attention(query, key, value, **options, backend=backend)
            options = {"scale": scale, "enable_gqa": enable_gqa, "backend": backend}
            return torch_sdpa.attend(query, key, value, attn_mask, dropout_p, is_causal, **options)

        only_fused = "packed sequences" if jagged else None
        # A nested tensor of strided layout has no shape; ours() refuses it.
        dims = (query.shape[-1], value.shape[-1]) if dense or jagged else (0, 0)
        automatic = automatic_backend(query, dims, dropout_p=dropout_p, mask=attn_mask, only_fused=only_fused)
        tensors = {"query": query, "key": key, "value": value, "attn_mask": attn_mask}
        return route("F.scaled_dot_product_attention", backend, tensors, automatic, ours, theirs)

    return scaled_dot_product_attention


# Where F.multi_head_attention_forward, while it runs without weights, has them collected: see torch_routes.own_backend
# for why there are two.
_own_collecting: ContextVar[list[torch.Tensor] | None] = ContextVar("fusemesh_weights", default=None)
_traced_collecting: list[torch.Tensor] | None = None


def _collecting() -> list[torch.Tensor] | None:
    return _traced_collecting if torch.compiler.is_compiling() else _own_collecting.get()


def _collect_from(run: Callable[[], Any]) -> tuple[Any, list[torch.Tensor]]:
    """Return the result of ``run()``, and the weights of the attention in it."""
    global _traced_collecting
    found: list[torch.Tensor] = []
    if torch.compiler.is_compiling():
        _traced_collecting = found
        try:
            return run(), found
        finally:
            _traced_collecting = None
    token = _own_collecting.set(found)
    try:
        return run(), found
    finally:
        _own_collecting.reset(token)


def _with_weights(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, dropout_p: float, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out [B, H, L, D] and the weights [B, H, L, S], from the log-sum-exp of the same call."""
    q, k, v = autocast(q, k, v)
    head_dim, seed = v.shape[-1], None
    dropout_p = checked_dropout(dropout_p, takes_all=True)
    if dropout_p == 1:
        dropout_p, mask = 0.0, without_keys(q)
    if dropout_p > 0:
        # Drawn here, so that the weights lose what the output does.
        seed = seed_tensor(None, q)
    q, k, v, scale = torch_sdpa.widened(q, k, v, None, backend)
    masks = {"mask": mask} if mask is not None and mask.dtype == torch.bool else {"mask": None, "bias": mask}
    options: dict[str, Any] = {"bias": None, **masks, "dropout_p": dropout_p, "seed": seed, "scale": scale}
    result = flash_attention(q, k, v, **options, return_lse=True, backend=backend)
    out, lse = result
    weights = reference.weights(q, k, lse, normalise(q, k, Options(**options)))
    # Autocast computes the softmax in a dtype of its own, which is that of PyTorch's weights.
    dtype = F.softmax(q.new_zeros(1), -1).dtype
    return out[..., :head_dim], weights.to(dtype)


def _averaged(weights: torch.Tensor, average: bool) -> torch.Tensor:
    return weights.mean(1) if average else weights


def _multi_head_attention_forward(original: Any) -> Any:
    def multi_head_attention_forward(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        call = MultiHeadAttention(*args, **kwargs)

        def theirs() -> Any:
            return original(*call)

        def without_weights() -> Any:
            # The hint means the mask that it comes with, and with weights PyTorch reads the mask.
            given = dict(zip(MultiHeadAttention._fields, call, strict=True))
            return original(**{**given, "need_weights": False, "is_causal": False})

        def ours() -> Any:
            # PyTorch's own checks and projections, with the attention in the middle ours.
            (out, _), found = _collect_from(without_weights)
            if not found:  # F.scaled_dot_product_attention has been replaced once more, by others
                return theirs()
            weights = _averaged(found[0], call.average_attn_weights)
            return out, weights if call.query.dim() == 3 else weights.squeeze(0)

        backend = active_backend()
        if backend is None or not call.need_weights or (call.is_causal and call.attn_mask is None):
            return theirs()
        tensors = {name: getattr(call, name) for name in ("query", "key", "value", "attn_mask")}
        tensors["out_proj"] = call.out_proj_weight
        head_dim = call.embed_dim_to_check // call.num_heads
        automatic = automatic_backend(call.query, (head_dim, head_dim), only_fused="attention weights (need_weights)")
        return route("F.multi_head_attention_forward", backend, tensors, automatic, ours, theirs)

    return multi_head_attention_forward


class _Rows:
    """The rows of a batch of sequences: of [B, L, E] all of them, of a nested tensor those that are not padding.

    Linear layers and norms see the rows alone; attention sees [B, L, ...] and, of a nested tensor, a mask of the
    padding.
    """

    def __init__(self, x: torch.Tensor) -> None:
        self.values = x
        self.seen: torch.Tensor | None = None  # [B, L]
        if x.is_nested:
            parts = x.unbind()
            self._lengths = [part.shape[0] for part in parts]
            self.values = torch.cat(parts)
            # On the host, where a nested tensor has its lengths: nothing waits for the device.
            longest = max(self._lengths, default=0)
            seen = torch.arange(longest) < torch.tensor(self._lengths)[:, None]
            self._places = seen.flatten().nonzero().squeeze(1).to(x.device)
            self.seen = seen.to(x.device)

    def batched(self, x: torch.Tensor) -> torch.Tensor:
        """[B, L, ...] of rows; zeros are the padding."""
        if self.seen is None:
            return x
        return (
            x.new_zeros((self.seen.numel(), x.shape[-1])).index_copy(0, self._places, x).unflatten(0, self.seen.shape)
        )

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """The rows of [B, L, ...]."""
        return x if self.seen is None else x.flatten(0, 1).index_select(0, self._places)

    def like_input(self, x: torch.Tensor) -> torch.Tensor:
        """The rows as what came in: [B, L, E], or nested."""
        return x if self.seen is None else torch.nested.as_nested_tensor(list(x.split(self._lengths)))


def _inference_mask(mask: torch.Tensor | None, mask_type: int | None, rows: _Rows) -> torch.Tensor | None:
    """The mask of the fused inference paths, where True hides, as F.scaled_dot_product_attention takes it.

    0 is [L, S] and 1 [B, S], 2 [B, H, L, S]. A float one is added to the scores, as PyTorch's documentation has it (and
    its modules do in training); its fused encoder layer instead hides whatever is not 0.
    """
    if rows.seen is not None:
        if mask is not None:
            raise wrong("mask", "None with nested tensors", "a mask", "their lengths are the mask")
        return rows.seen[:, None, None, :]
    if mask is None:
        return None
    if mask_type == 1:
        mask = mask[:, None, None, :]
    return ~mask if mask.dtype == torch.bool else mask


def _self_attention(
    rows: _Rows,
    x: torch.Tensor,
    heads: int,
    projections: tuple[Any, Any, Any, Any],
    mask: Any,
    backend: str,
    weigh: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Multi-head attention of the rows x [N, E] or [B, L, E] with themselves; its weights [B, H, L, L] if asked for."""
    in_weight, in_bias, out_weight, out_bias = projections
    qkv = rows.batched(F.linear(x, in_weight, in_bias))
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, -1))
    weights = None
    if weigh:
        out, weights = _with_weights(q, k, v, mask, 0.0, backend)
    else:
        out = torch_sdpa.attend(q, k, v, mask, backend=backend)
    return F.linear(rows.rows(out.transpose(1, 2).flatten(2)), out_weight, out_bias), weights


def _fused_attention(original: Any) -> Any:
    def fused_attention(*args: Any, **kwargs: Any) -> Any:
        call = FusedAttention(*args, **kwargs)
        query, mask = call.query, call.mask
        projections = (call.qkv_weight, call.qkv_bias, call.proj_weight, call.proj_bias)

        def theirs() -> Any:
            return original(*call)

        def ours() -> Any:
            assert backend is not None
            if query is not call.key or call.key is not call.value:
                raise wrong("query, key, value", "one tensor", "several", "the fused path is self-attention")
            if query.is_nested and call.need_weights:
                raise wrong("need_weights", "False with nested tensors", True, "they have no matrix of weights")
            rows = _Rows(query)
            seen = _inference_mask(mask, call.mask_type, rows)
            out, weights = _self_attention(
                rows, rows.values, call.num_head, projections, seen, backend, call.need_weights
            )
            return rows.like_input(out), None if weights is None else _averaged(weights, call.average_attn_weights)

        backend = active_backend()
        if backend is None:
            return theirs()
        head_dim = call.embed_dim // call.num_head
        only_fused = "attention weights (need_weights)" if call.need_weights else None
        automatic = automatic_backend(query, (head_dim, head_dim), mask=mask, only_fused=only_fused)
        tensors = {"query": query, "mask": mask, "qkv_weight": call.qkv_weight}
        return route(compat.FUSED_ATTENTION.shown, backend, tensors, automatic, ours, theirs)

    return fused_attention


def _fused_encoder_layer(original: Any) -> Any:
    def fused_encoder_layer(*args: Any, **kwargs: Any) -> Any:
        call = FusedEncoderLayer(*args, **kwargs)
        projections = (call.qkv_weight, call.qkv_bias, call.proj_weight, call.proj_bias)
        norms = (call.norm_weight_1, call.norm_bias_1, call.norm_weight_2, call.norm_bias_2)
        ffn = (call.ffn_weight_1, call.ffn_bias_1, call.ffn_weight_2, call.ffn_bias_2)

        def theirs() -> Any:
            return original(*call)

        def ours() -> Any:
            rows = _Rows(call.src)
            seen = _inference_mask(call.mask, call.mask_type, rows)

            def normed(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
                return F.layer_norm(x, (call.embed_dim,), weight, bias, call.eps)

            def attended(x: torch.Tensor) -> torch.Tensor:
                assert backend is not None
                return _self_attention(rows, x, call.num_heads, projections, seen, backend, False)[0]

            def fed_forward(x: torch.Tensor) -> torch.Tensor:
                activation = F.gelu if call.use_gelu else F.relu
                return F.linear(activation(F.linear(x, *ffn[:2])), *ffn[2:])

            x = rows.values
            if call.norm_first:
                x = x + attended(normed(x, *norms[:2]))
                x = x + fed_forward(normed(x, *norms[2:]))
            else:
                x = normed(x + attended(x), *norms[:2])
                x = normed(x + fed_forward(x), *norms[2:])
            return rows.like_input(x)

        backend = active_backend()
        if backend is None:
            return theirs()
        head_dim = call.embed_dim // call.num_heads
        automatic = automatic_backend(call.src, (head_dim, head_dim), mask=call.mask)
        tensors = {"src": call.src, "mask": call.mask, "qkv_weight": call.qkv_weight}
        return route(compat.FUSED_ENCODER_LAYER.shown, backend, tensors, automatic, ours, theirs)

    return fused_encoder_layer


# (namespace, name, what makes the replacement of the function that stands there)
REPLACEMENTS: tuple[tuple[Any, str, Callable[[Any], Any]], ...] = (
    (F, "scaled_dot_product_attention", _scaled_dot_product_attention),
    (F, "multi_head_attention_forward", _multi_head_attention_forward),
    (torch, compat.FUSED_ATTENTION.name, _fused_attention),
    (torch, compat.FUSED_ENCODER_LAYER.name, _fused_encoder_layer),
)
