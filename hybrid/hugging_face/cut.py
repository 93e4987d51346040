"""Fused projections of Hugging Face models, cut into plain linear layers that tp can split.

The layers stand where the model's own stood and are called as those were. Their parameters have other names and shapes
than those on disk, and say by ``sources`` where they come from.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ..tensor.fused import FusedColumns
from .sources import Source


def cut_gpt2(model: nn.Module) -> None:
    """Cut c_attn into query, key and value, and store every Conv1D's weight as torch.nn.Linear does, [out, in]."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "c_attn") and not isinstance(module.c_attn, FusedColumns):
            # Cross attention has its queries in q_attn.
            parts = ("key", "value") if hasattr(module, "q_attn") else ("query", "key", "value")
            sizes = dict.fromkeys(parts, module.split_size)
            module.c_attn = _fused(f"{name}.c_attn", module.c_attn, sizes, module.head_dim)  # type: ignore[arg-type]
        for child in ("q_attn", "c_proj", "c_fc"):
            plain = getattr(module, child, None)
            if isinstance(plain, nn.Module) and not isinstance(plain, nn.Linear):
                setattr(module, child, _linear(f"{name}.{child}", plain))


def cut_phi3(model: nn.Module) -> None:
    """Cut qkv_proj into query, key and value, and gate_up_proj into gate and up."""
    for name, module in list(model.named_modules()):
        plain = getattr(module, "qkv_proj", None)
        if isinstance(plain, nn.Module) and not isinstance(plain, FusedColumns):
            head: int = module.head_dim  # type: ignore[assignment]
            keys = module.num_key_value_heads * head  # type: ignore[operator]
            sizes = {"query": module.config.num_attention_heads * head, "key": keys, "value": keys}  # type: ignore[union-attr]
            module.qkv_proj = _fused(f"{name}.qkv_proj", plain, sizes, head)
        plain = getattr(module, "gate_up_proj", None)
        if isinstance(plain, nn.Module) and not isinstance(plain, FusedColumns):
            wide = module.config.intermediate_size  # type: ignore[union-attr]
            module.gate_up_proj = _fused(f"{name}.gate_up_proj", plain, {"gate": wide, "up": wide}, None)


def _fused(name: str, plain: nn.Module, sizes: Mapping[str, int], head_dim: int | None) -> FusedColumns:
    """Return the layers of ``sizes`` into which the outputs of ``plain`` are cut, in its place."""
    transposed, start, parts, sources = _is_transposed(name, plain), 0, {}, {}
    for part, size in sizes.items():
        parts[part] = _part(plain, start, size, transposed)
        for own in ("weight", "bias"):
            if getattr(plain, own) is not None:
                dim = 1 if transposed and own == "weight" else 0
                sources[f"{part}.{own}"] = Source(own, dim, start, size, transposed and own == "weight")
        start += size
    whole = plain.weight.shape[1 if transposed else 0]  # type: ignore[index, union-attr]
    if start != whole:
        raise ValueError(
            f"model: expected {start} output features of {name}, {dict(sizes)}, received {whole}; use a config that "
            "fits the weights"
        )
    made = FusedColumns(parts, head_dim).train(plain.training)
    made.sources = sources  # type: ignore[assignment]
    return made


def _linear(name: str, plain: nn.Module) -> nn.Linear:
    """Return the layer that computes as ``plain``, a Conv1D, and stores the transpose of its weight."""
    if not _is_transposed(name, plain):
        raise _unknown(name, plain)
    made = _part(plain, 0, plain.weight.shape[1], True)  # type: ignore[index, union-attr, arg-type]
    made.sources = {"weight": Source("weight", transposed=True)}  # type: ignore[assignment]
    return made.train(plain.training)


@torch.no_grad()
def _part(plain: nn.Module, start: int, size: int, transposed: bool) -> nn.Linear:
    """Return a layer with a copy of the rows [start, start + size) of the outputs of ``plain``."""
    weight, bias = plain.weight, plain.bias
    assert isinstance(weight, nn.Parameter)
    own = weight.narrow(1, start, size).t() if transposed else weight.narrow(0, start, size)
    with torch.device("meta"):
        made = nn.Linear(own.shape[1], size, bias=bias is not None)
    # A view would keep the whole alive, and look like a tied weight.
    made.weight = nn.Parameter(own.clone(memory_format=torch.contiguous_format), weight.requires_grad)
    if isinstance(bias, nn.Parameter):
        made.bias = nn.Parameter(bias.narrow(0, start, size).clone(), bias.requires_grad)
    return made


def _is_transposed(name: str, plain: nn.Module) -> bool:
    """Return whether ``plain`` is transformers' Conv1D, with a weight [in, out], and not torch.nn.Linear."""
    if type(plain).forward is nn.Linear.forward:
        return False
    # Nothing is imported of transformers; a wrapper such as LoRA's has another name, and no nf.
    if type(plain).__name__ == "Conv1D" and isinstance(getattr(plain, "nf", None), int):
        return True
    raise _unknown(name, plain)


def _unknown(name: str, plain: nn.Module) -> ValueError:
    return ValueError(
        f"model: expected a plain Conv1D or torch.nn.Linear at {name!r}, which is cut for tp, received "
        f"{type(plain).__name__}; use fsdp in the place of tp, which takes wrappers such as LoRA's"
    )
