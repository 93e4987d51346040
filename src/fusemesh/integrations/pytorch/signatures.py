"""Arguments of the functions of PyTorch that ``fusemesh.accelerate()`` replaces and that have many, in their order."""

from __future__ import annotations

from typing import NamedTuple

import torch


class MultiHeadAttention(NamedTuple):
    """The arguments of F.multi_head_attention_forward."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    embed_dim_to_check: int
    num_heads: int
    in_proj_weight: torch.Tensor | None
    in_proj_bias: torch.Tensor | None
    bias_k: torch.Tensor | None
    bias_v: torch.Tensor | None
    add_zero_attn: bool
    dropout_p: float
    out_proj_weight: torch.Tensor
    out_proj_bias: torch.Tensor | None
    training: bool = True
    key_padding_mask: torch.Tensor | None = None
    need_weights: bool = True
    attn_mask: torch.Tensor | None = None
    use_separate_proj_weight: bool = False
    q_proj_weight: torch.Tensor | None = None
    k_proj_weight: torch.Tensor | None = None
    v_proj_weight: torch.Tensor | None = None
    static_k: torch.Tensor | None = None
    static_v: torch.Tensor | None = None
    average_attn_weights: bool = True
    is_causal: bool = False


class FusedAttention(NamedTuple):
    """The arguments of :data:`fusemesh.compat.FUSED_ATTENTION`."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    embed_dim: int
    num_head: int
    qkv_weight: torch.Tensor
    qkv_bias: torch.Tensor
    proj_weight: torch.Tensor
    proj_bias: torch.Tensor
    mask: torch.Tensor | None = None
    need_weights: bool = True
    average_attn_weights: bool = True
    mask_type: int | None = None


class FusedEncoderLayer(NamedTuple):
    """The arguments of :data:`fusemesh.compat.FUSED_ENCODER_LAYER`."""

    src: torch.Tensor
    embed_dim: int
    num_heads: int
    qkv_weight: torch.Tensor
    qkv_bias: torch.Tensor
    proj_weight: torch.Tensor
    proj_bias: torch.Tensor
    use_gelu: bool
    norm_first: bool
    eps: float
    norm_weight_1: torch.Tensor
    norm_bias_1: torch.Tensor
    norm_weight_2: torch.Tensor
    norm_bias_2: torch.Tensor
    ffn_weight_1: torch.Tensor
    ffn_bias_1: torch.Tensor
    ffn_weight_2: torch.Tensor
    ffn_bias_2: torch.Tensor
    mask: torch.Tensor | None = None
    mask_type: int | None = None
