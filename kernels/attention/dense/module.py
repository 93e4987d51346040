"""MultiheadAttention: the arguments, parameters and state_dict of torch.nn.MultiheadAttention over flash_attention."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ... import compat
from ...autocast import autocast_dtype
from ..call.errors import short
from ..call.option_checks import checked_dropout, seed_tensor, without_keys
from ..call.options import Options
from ..call.place import dropping
from ..call.scalars import as_integer, element
from ..call.score_mods import checked_softcap
from ..call.validation import broadcast_dims, check_flag, check_truth, normalise, window_sides, wrong
from ..reference import dense as reference
from .api import flash_attention


@compat.keep_from_fused_path
class MultiheadAttention(nn.Module):
    """Multi-head attention as torch.nn.MultiheadAttention has it, computed by :func:`fusemesh.flash_attention`.

    ``out = concat_h(attention(query W_q^T, key W_k^T, value W_v^T)) W_o^T`` (Vaswani et al., arXiv:1706.03762), head h
    of the queries with head h // (num_heads / num_kv_heads) of the keys. Arguments before the star, parameters, their
    names, shapes and initial values (same seed, same values) are torch's, so that a state_dict of one loads into the
    other.

    Args:
        embed_dim: E, features of query and output; head dim D = embed_dim / num_heads.
        num_heads: H, heads of the queries.
        dropout: probability with which attention probabilities are dropped, in training mode only; 1 drops all.
        bias: whether the projections have biases.
        add_bias_kv: whether one learnable key and value are appended to the sequence.
        add_zero_attn: whether a key and a value of zeros are appended, after those of ``add_bias_kv``.
        kdim, vdim: features of key and value; None means embed_dim.
        batch_first: inputs and output are [B, S, E] rather than [S, B, E].
        device, dtype: of the parameters.
        num_kv_heads: Hkv, heads of keys and values, a divisor of num_heads (GQA, MQA); None means num_heads. With fewer
            the key and value parts of in_proj_weight, in_proj_bias, k_proj_weight, v_proj_weight, bias_k and bias_v
            have Hkv * D rows.
        window: (left, right), how many keys before and after its own position a query sees; None leaves a side open.
        softcap: c of ``c * tanh(s / c)`` on the scaled scores s, before everything that is added to them.
        alibi_slopes: [H]; ``-slope * |position of query - position of key|`` is added to the scores. A buffer of this
            name, fp32 until ``.to(dtype)`` changes it, and part of the state_dict.
        sinks: whether each head has a learnable logit that joins the denominator of its softmax: the parameter
            ``sinks`` [H], at first 0.
        backend: as :func:`fusemesh.flash_attention` takes it. ``torch`` has no log-sum-exp and so needs
            ``need_weights=False``.

    Raises:
        ValueError: an argument is wrong, or two do not go together: appended keys have no position, and so do not
            combine with window, alibi_slopes or causal.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        num_kv_heads: int | None = None,
        window: tuple[int | None, int | None] | None = None,
        softcap: float | None = None,
        alibi_slopes: torch.Tensor | None = None,
        sinks: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim = _size("embed_dim", embed_dim)
        self.num_heads = num_heads = _size("num_heads", num_heads)
        self.num_kv_heads = num_heads if num_kv_heads is None else _size("num_kv_heads", num_kv_heads)
        self.kdim = embed_dim if kdim is None else _size("kdim", kdim)
        self.vdim = embed_dim if vdim is None else _size("vdim", vdim)
        self.dropout = checked_dropout(dropout, "dropout", takes_all=True)
        self.batch_first, self.add_zero_attn = batch_first, add_zero_attn
        self.window = None if window is None else window_sides(window)
        self.softcap = None if softcap is None else checked_softcap(softcap)
        self.backend = backend
        self._check_arguments(alibi_slopes)
        self.head_dim = embed_dim // num_heads
        kv_dim = self.num_kv_heads * self.head_dim

        def parameter(wanted: bool, *shape: int) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) if wanted else None

        packed = self.kdim == self.vdim == embed_dim
        self.in_proj_weight = parameter(packed, embed_dim + 2 * kv_dim, embed_dim)
        self.q_proj_weight = parameter(not packed, embed_dim, embed_dim)
        self.k_proj_weight = parameter(not packed, kv_dim, self.kdim)
        self.v_proj_weight = parameter(not packed, kv_dim, self.vdim)
        self.in_proj_bias = parameter(bias, embed_dim + 2 * kv_dim)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        self.bias_k = parameter(add_bias_kv, 1, 1, kv_dim)
        self.bias_v = parameter(add_bias_kv, 1, 1, kv_dim)
        self.sinks = parameter(sinks, num_heads)
        if alibi_slopes is not None:
            alibi_slopes = alibi_slopes.detach().to(device=device, dtype=torch.float32, copy=True)
        self.alibi_slopes: torch.Tensor | None
        self.register_buffer("alibi_slopes", alibi_slopes)
        if self._appended and (window is not None or alibi_slopes is not None):
            raise wrong(
                "window, alibi_slopes",
                "None with add_bias_kv or add_zero_attn, because keys that are appended have no position",
                f"window={window}, alibi_slopes={'None' if alibi_slopes is None else 'a tensor'}",
                "use sinks=True in place of the appended keys",
            )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initial values: Xavier's for the projections, zero for their biases and for the sinks."""
        for weight in (self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight):
            if weight is not None:
                nn.init.xavier_uniform_(weight)
        for vector in (self.in_proj_bias, self.out_proj.bias, self.sinks):
            if vector is not None:
                nn.init.zeros_(vector)
        for row in (self.bias_k, self.bias_v):
            if row is not None:
                nn.init.xavier_normal_(row)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        causal: bool = False,
        align: str | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend from query to key and value.

        The output always comes from flash_attention, in memory O(L + S) beside a boolean attn_mask's opposite. Weights
        are another matter: they are a matrix of L x S, and are computed beside it from q, k and the log-sum-exp only
        because ``need_weights`` asks for them (torch's default). Pass ``need_weights=False`` where they are not used.

        Args:
            query: [L, B, E], [B, L, E] with batch_first, or [L, E] without a batch.
            key: [S, B, kdim], [B, S, kdim] or [S, kdim].
            value: [S, B, vdim], [B, S, vdim] or [S, vdim].
            key_padding_mask: [B, S], or [S] without a batch: bool, **True = do not attend** to this key (torch's rule;
                flash_attention's mask is the opposite), or float, added to the scores of the key.
            need_weights: also return the weights.
            attn_mask: [L, S] or [B * H, L, S]: bool, **True = do not attend**, or float, added to the scores. Both
                masks may be given, of either kind, and both have gradients where they are float. Two float ones are
                first added to each other, [B, 1, L, S] or [B, H, L, S].
            average_attn_weights: average the weights over the heads.
            is_causal: torch's hint that attn_mask is the causal mask (query i sees keys 0 to i); needs attn_mask. With
                need_weights=False and without appended keys, attention is then computed as causal and attn_mask is not
                looked at; elsewhere attn_mask is used and the hint is not.
            causal, align: as :func:`fusemesh.flash_attention` takes them; causal needs no attn_mask. With L != S and
                causal, window or alibi_slopes, align must be given.

        Returns:
            output, in the shape of query; and weights [B, L, S], [B, H, L, S] where not averaged, without a batch
            [L, S] or [H, L, S], or None without need_weights. S includes the appended keys. A query that sees no key
            gets the output of zeros, which is out_proj's bias, and weights of zeros, never NaN (torch's are NaN). The
            weights are those that multiply the values: after dropout, as torch's are, and with sinks they sum to less
            than 1.

        Raises:
            ValueError: a shape, dtype or combination of arguments is wrong.
        """
        self._check_inputs(query, key, value, key_padding_mask, attn_mask)
        need_weights = check_truth("need_weights", need_weights)
        average_attn_weights = check_truth("average_attn_weights", average_attn_weights)
        is_causal, causal = check_truth("is_causal", is_causal), check_flag("causal", causal)
        if is_causal and attn_mask is None:
            raise wrong("attn_mask", "the causal mask, with is_causal=True", "None", "pass it, or causal=True instead")
        batched, S = query.dim() == 3, key.shape[-2 if self.batch_first or key.dim() == 2 else 0]
        if causal and self._appended:
            raise wrong("causal", "False with add_bias_kv or add_zero_attn", True, "pass a causal attn_mask instead")
        if is_causal and not need_weights and not self._appended:
            # The hint is defined from the first key, whatever the lengths.
            if not causal:
                causal, align = True, align or "top_left"
            attn_mask = None
        q, k, v = self._project(query, key, value)
        mask, bias = self._mask_and_bias(attn_mask, key_padding_mask, q, S)
        dropout_p = self.dropout if self.training else 0.0
        seed: int | torch.Tensor | None = None
        origin = None
        if dropout_p == 1:
            dropout_p, mask = 0.0, without_keys(q)
        if dropout_p > 0:
            # Where other lengths need an alignment and have none, they are refused, which an origin would hide.
            aligned = causal or self.window is not None or self.alibi_slopes is not None
            if align is not None or q.shape[2] == k.shape[2] or not aligned:
                seed, origin, align = dropping(self, q, k, align)
            # Drawn here, so that the weights lose what the output does.
            seed = seed_tensor(seed, q)
        options: dict[str, Any] = {
            "causal": causal,
            "align": align,
            "origin": origin,
            "window": self.window,
            "mask": mask,
            "bias": bias,
            "alibi_slopes": self.alibi_slopes,
            "softcap": self.softcap,
            "sinks": None if self.sinks is None else _scores_dtype(self.sinks, q),
            "dropout_p": dropout_p,
            "seed": seed,
        }
        result = flash_attention(q, k, v, **options, return_lse=need_weights, backend=self.backend)
        weights = None
        if isinstance(result, tuple):
            out, lse = result
            weights = reference.weights(q, k, lse, normalise(q, k, Options(**options)))
            if average_attn_weights:
                weights = weights.mean(1)
            weights = weights.to(q.dtype)
        else:
            out = result
        output = self.out_proj(out.transpose(1, 2).flatten(2))
        if not batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output if self.batch_first else output.transpose(0, 1), weights

    def extra_repr(self) -> str:
        """The arguments that are not seen in the parameters."""
        heads = f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}"
        return f"{heads}, dropout={self.dropout}, batch_first={self.batch_first}, backend={self.backend!r}"

    @property
    def _appended(self) -> int:
        """Return the number of keys that are appended to the sequence."""
        return (self.bias_k is not None) + self.add_zero_attn

    def _project(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q [B, H, L, D], k and v [B, Hkv, S + appended, D]; views of the projections unless keys are appended."""
        sizes = [self.embed_dim, self.num_kv_heads * self.head_dim, self.num_kv_heads * self.head_dim]
        if self.in_proj_weight is not None and query is key and key is value:
            q, k, v = F.linear(query, self.in_proj_weight, self.in_proj_bias).split(sizes, -1)
        else:
            w: Any = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            w = w if self.in_proj_weight is None else self.in_proj_weight.split(sizes)
            b: Any = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.split(sizes)
            q, k, v = F.linear(query, w[0], b[0]), F.linear(key, w[1], b[1]), F.linear(value, w[2], b[2])

        def heads(x: torch.Tensor, count: int) -> torch.Tensor:
            x = x.unflatten(-1, (count, self.head_dim))
            if x.dim() == 3:
                return x.transpose(0, 1).unsqueeze(0)
            return x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3)

        q, k, v = heads(q, self.num_heads), heads(k, self.num_kv_heads), heads(v, self.num_kv_heads)
        return q, self._append(k, self.bias_k), self._append(v, self.bias_v)

    def _append(self, x: torch.Tensor, row: torch.Tensor | None) -> torch.Tensor:
        """``x`` [B, Hkv, S, D] followed by ``row`` [1, 1, Hkv * D] and, with add_zero_attn, by zeros."""
        parts = [x]
        if row is not None:
            row = row.view(1, self.num_kv_heads, 1, self.head_dim).to(x.dtype)
            parts.append(row.expand(x.shape[0], -1, -1, -1))
        if self.add_zero_attn:
            parts.append(x.new_zeros(x.shape[0], self.num_kv_heads, 1, self.head_dim))
        return torch.cat(parts, 2) if len(parts) > 1 else x

    def _mask_and_bias(
        self, attn_mask: torch.Tensor | None, padding: torch.Tensor | None, q: torch.Tensor, S: int
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """torch's two masks as flash_attention's two: bool (True = attend), and float.

        Where both of torch's are bool, the padding of the keys becomes the float one: it has B * S elements, where a
        mask that combines the two would have B * L * S.
        """
        if attn_mask is not None:
            attn_mask = attn_mask if attn_mask.dim() == 2 else attn_mask.unflatten(0, (q.shape[0], self.num_heads))
        if padding is not None:
            padding = padding.reshape(q.shape[0], 1, 1, S)
            if attn_mask is not None and attn_mask.dtype == padding.dtype == torch.bool:
                padding = q.new_zeros(padding.shape).masked_fill(padding, -math.inf)
        mask = bias = None
        for given in (attn_mask, padding):
            if given is None:
                continue
            if self._appended:
                given = F.pad(given, (0, self._appended))
            if given.dtype == torch.bool:
                for dim in broadcast_dims(given):
                    given = given.narrow(dim, 0, 1)
                mask = ~given
            else:
                given = _scores_dtype(given, q)
                bias = given if bias is None else bias + given
        return mask, bias

    def _check_arguments(self, alibi_slopes: torch.Tensor | None) -> None:
        for name, whole in (("num_heads", "embed_dim"), ("num_kv_heads", "num_heads")):
            part, total = getattr(self, name), getattr(self, whole)
            if total % part != 0:
                raise wrong(name, f"a divisor of {whole}={total}", part, f"change {name} or {whole}")
        if alibi_slopes is not None and tuple(alibi_slopes.shape) != (self.num_heads,):
            shape = tuple(alibi_slopes.shape)
            raise wrong("alibi_slopes", f"shape [H] = ({self.num_heads},)", shape, "one slope for each query head")

    def _check_inputs(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None,
        attn_mask: torch.Tensor | None,
    ) -> None:
        weight = self.q_proj_weight if self.in_proj_weight is None else self.in_proj_weight
        assert weight is not None
        inputs = (("query", query, self.embed_dim), ("key", key, self.kdim), ("value", value, self.vdim))
        for name, x, features in inputs:
            if x.is_nested:
                raise NotImplementedError(f"{name}: nested tensors are not built yet; pad and pass key_padding_mask")
            if x.dim() not in (2, 3) or x.dim() != query.dim():
                remedy = "pass all three with a batch (3 dimensions) or all three without (2)"
                raise wrong(name, "2 or 3 dimensions, as many as query", f"shape {tuple(x.shape)}", remedy)
            if x.shape[-1] != features:
                shape = f"{x.shape[-1]} (shape {tuple(x.shape)})"
                raise wrong(name, f"{features} features", shape, "see embed_dim, kdim and vdim of the constructor")
            if x.dtype != weight.dtype and autocast_dtype(x.device.type) is None:
                raise wrong(name, f"the parameters' dtype {weight.dtype}", x.dtype, "convert it or the module by .to()")
        sequence = -2 if self.batch_first or query.dim() == 2 else 0
        L, S = query.shape[sequence], key.shape[sequence]
        batched = () if query.dim() == 2 else (query.shape[0 if self.batch_first else 1],)
        B = batched[0] if batched else 1
        for name, x, length in (("key", key, S), ("value", value, S)):
            want = (*batched, length) if self.batch_first else (length, *batched)
            if tuple(x.shape[:-1]) != want:
                letters = "batch and length" if self.batch_first else "length and batch"
                remedy = "key and value have query's batch size and one length; see batch_first"
                raise wrong(name, f"{letters} {want}", f"shape {tuple(x.shape)}", remedy)
        masks = (
            ("key_padding_mask", key_padding_mask, [(*batched, S)]),
            ("attn_mask", attn_mask, [(L, S), (B * self.num_heads, L, S)]),
        )
        for name, m, shapes in masks:
            if m is None:
                continue
            # Not ``in``: with lengths that are symbols, torch.compile takes that for a comparison of objects.
            if not any(tuple(m.shape) == shape for shape in shapes):
                expected = " or ".join(f"shape {shape}" for shape in shapes)
                raise wrong(name, expected, tuple(m.shape), "[L, S] and [B * H, L, S] count no appended keys")
            if m.dtype != torch.bool and not m.dtype.is_floating_point:
                raise wrong(name, "bool (True = do not attend) or float", m.dtype, "convert it with .bool()")


def _size(name: str, value: Any) -> int:
    """Return a number of features or heads."""
    number = as_integer(element(value))
    if number is None or number <= 0:
        raise wrong(name, "an int above 0", short(value), "give the number of features or heads")
    return number


def _scores_dtype(x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """``x`` in a dtype that flash_attention takes for what is added to the scores: q's, or fp32."""
    return x if x.dtype in (q.dtype, torch.float32) else x.to(q.dtype)
