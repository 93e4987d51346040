"""The model of a folder as transformers' own class, on meta: our attention in it, fused projections cut, trainable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fusemesh.hybrid.hugging_face.families import prepare
from fusemesh.hybrid.hugging_face.stages import as_trainable
from fusemesh.hybrid.hugging_face.ties import untie, untie_as_saved
from fusemesh.integrations.transformers import register

from .folder import AUTO_CLASSES, config_of, read

_OURS = "fusemesh"  # of attn_implementation


def build(
    path: str, task: str, *, dtype: torch.dtype, untied: Sequence[str] | None = None, **changed: Any
) -> tuple[Any, list[str]]:
    """Return the model of a folder for a task, on meta, as every layout has it before it is placed.

    Args:
        dtype: of the parameters, whatever the folder's is.
        untied: names that the configuration ties and the folder's files do not; None: those files say.
        changed: of the configuration, such as the labels of a new head.

    Returns:
        The model, and the names that are untied.
    """
    import transformers

    register(_OURS)
    config = config_of(path).__class__.from_pretrained(path, local_files_only=True, **changed)
    # Not a gradient's concern, and copied at every layer.
    config.use_cache = False
    with torch.device("meta"):
        model = getattr(transformers, AUTO_CLASSES[task][0]).from_config(config, attn_implementation=_OURS, dtype=dtype)
    prepare(model)
    if untied is None:
        untied = untie_as_saved(model, read(path))
    else:
        untie(model, untied)
    return as_trainable(model), list(untied)


def sizes_of(config: Any) -> dict[str, int]:
    """Return those sizes of a transformers configuration that a layout must fit, by their names here."""
    heads = _first(config, "num_attention_heads", "encoder_attention_heads")
    found = {
        "num_layers": _blocks(config),
        "num_heads": heads,
        "num_kv_heads": _first(config, "num_key_value_heads") or heads,
        "intermediate_size": _first(config, "intermediate_size", "encoder_ffn_dim", "n_inner", "hidden_dim", "d_ff"),
    }
    return {name: value for name, value in found.items() if value is not None}


def _blocks(config: Any) -> int | None:
    """Return the number of blocks, of an encoder-decoder those of both."""
    if getattr(config, "is_encoder_decoder", False):
        pairs = [("encoder_layers", "decoder_layers"), ("num_layers", "num_decoder_layers")]
        both = next(names for names in pairs if _first(config, names[0]) is not None)
        return sum(_first(config, name) or 0 for name in both)
    return _first(config, "num_hidden_layers")


def _first(config: Any, *names: str) -> int | None:
    found = (getattr(config, name, None) for name in names)
    return next((value for value in found if isinstance(value, int)), None)


def longest(config: Any) -> int | None:
    """Return the most tokens that a model has positions for; None where it sets no end (T5's relative ones)."""
    most = _first(config, "max_position_embeddings", "n_positions")
    if most is not None and config.model_type in _BEHIND_PADDING:
        most -= (config.pad_token_id or 0) + 1
    return most


# Their positions begin behind the padding token's number.
_BEHIND_PADDING = ("roberta",)
