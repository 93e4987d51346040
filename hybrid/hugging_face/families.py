"""Families of Hugging Face models: how their projections are cut, and how tp splits them.

A model's is told by ``model.config.model_type``. Its head may be any: those of vocabularies are split, others whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from .. import compat
from ..tensor.modules import ColumnParallelLinear
from . import tables
from .cut import cut_gpt2, cut_phi3
from .plans import translated_plan


@dataclass(frozen=True)
class Family:
    """What is known of a family.

    Args:
        name: of transformers' folder of its models.
        model_types: of its configs.
        table: how tp splits it; None: as its config's own plan says, which splits the heads.
        cut: replaces fused projections; see :func:`prepare`.
        query: from an attention module to the layer that computes its queries.
        counts: numbers of an attention module that are in proportion to its heads, and that its forward reads.
    """

    name: str
    model_types: tuple[str, ...]
    table: tables.FamilyTable | None = None
    cut: Callable[[nn.Module], None] = lambda model: None
    query: str = ""
    counts: tuple[str, ...] = ()


FAMILIES = (
    Family("llama", ("llama",)),
    Family("qwen2", ("qwen2",)),
    Family("qwen3", ("qwen3",)),
    Family("mistral", ("mistral",)),
    Family("gemma2", ("gemma2",)),
    Family("gemma3", ("gemma3_text",)),
    Family("phi3", ("phi3",), tables.PHI3, cut_phi3, "qkv_proj.query"),
    Family("gpt2", ("gpt2",), tables.GPT2, cut_gpt2, "c_attn.value", ("num_heads", "split_size")),
    Family("bert", ("bert",), tables.BERT, query="query", counts=("num_attention_heads", "all_head_size")),
    Family("roberta", ("roberta",), tables.ROBERTA, query="query", counts=("num_attention_heads", "all_head_size")),
    Family("distilbert", ("distilbert",), tables.DISTILBERT, query="q_lin", counts=("n_heads", "dim")),
    Family("t5", ("t5",), tables.T5, query="q", counts=("n_heads", "inner_dim")),
    Family("marian", ("marian",), tables.BART, query="q_proj", counts=("num_heads",)),
    Family("bart", ("bart",), tables.BART, query="q_proj", counts=("num_heads",)),
)
_BY_TYPE = {model_type: family for family in FAMILIES for model_type in family.model_types}


def find_family(model: nn.Module) -> Family | None:
    """Return the family of a Hugging Face model; None where it is none, or of another family."""
    return _BY_TYPE.get(getattr(getattr(model, "config", None), "model_type", ""))


def prepare(model: nn.Module) -> None:
    """Cut the fused projections of ``model`` into plain linear layers, in place; nothing if that is done, or needless.

    Names and shapes in the state dict then differ from those on disk:
    :func:`fusemesh.hybrid.hugging_face.sources.sources_of` says how.

    Raises:
        ValueError: a fused projection is not the family's own module, but, say, a wrapper.
    """
    family = find_family(model)
    if family is not None:
        family.cut(model)


def tensor_table(model: nn.Module) -> dict[str, str] | None:
    """Return how tp splits a model of a family, :func:`prepare`-d or not: patterns of names and styles.

    The styles are those of :mod:`fusemesh.hybrid.tensor.table`. Patterns of other sizes of the family are among them.

    Raises:
        ValueError: the family's own plan has a style that is not known.
    """
    family = find_family(model)
    if family is None:
        return None
    if family.table is None:
        return translated_plan(model)
    base = getattr(model, "base_model_prefix", "")
    prefix = f"{base}." if base and hasattr(model, base) else ""
    return {**{prefix + name: style for name, style in family.table.base.items()}, **family.table.around}


def has_table(model: nn.Module) -> bool:
    """Return whether :func:`tensor_table` has one, or the model brings a plan along."""
    family = find_family(model)
    return (family is not None and family.table is not None) or bool(compat.hugging_face_plan(model))


def share_heads(model: nn.Module, ranks: int) -> None:
    """Tell each attention module of ``model`` whose columns are split over ``ranks`` how many heads are a rank's."""
    family = find_family(model)
    if family is None or not family.query:
        return
    for attention in model.modules():
        query: Any = attention
        for name in family.query.split("."):
            query = getattr(query, name, None)
        if isinstance(query, ColumnParallelLinear) and query.num_heads is not None:
            for name in family.counts:
                setattr(attention, name, getattr(attention, name) // ranks)
            if family.name == "phi3":
                _share_phi3(attention, ranks)


def _share_phi3(attention: Any, ranks: int) -> None:
    """Its forward slices queries by the number of heads in its config, and keys by its own."""
    heads, keys = attention.config.num_attention_heads // ranks, max(1, attention.num_key_value_heads // ranks)
    attention.config = RankConfig(attention.config, num_attention_heads=heads, num_key_value_heads=keys)
    attention.num_key_value_heads, attention.num_key_value_groups = keys, heads // keys


class RankConfig:
    """A config of which some numbers are a rank's; all others are the whole model's, as they are when they are read."""

    def __init__(self, config: Any, **own: int) -> None:
        vars(self).update(own, _whole=config)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what copying asks for, before there is a config
            raise AttributeError(name)
        return getattr(vars(self)["_whole"], name)
