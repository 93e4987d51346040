"""Folders that cannot be loaded, each refused by name with what to do, before any rank starts."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

# What transformers' own classes of these models read; keys that a type must have, and those that it may have.
_SCALED = ({"factor"}, set[str]())
ROPE_TYPES: dict[str, tuple[set[str], set[str]]] = {
    "default": (set(), set()),
    "linear": _SCALED,
    "dynamic": _SCALED,
    "yarn": (
        {"factor"},
        {
            *("original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
            *("mscale", "mscale_all_dim", "truncate"),
        },
    ),
    "longrope": (
        {"short_factor", "long_factor"},
        {"original_max_position_embeddings", "attention_factor", "factor"},
    ),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}, set()),
    "proportional": (set(), {"factor"}),
}
_OF_EVERY_TYPE = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_ROPE_KEYS = {"rope_parameters", "rope_scaling", "rope_theta", "rope_local_base_freq"}
# Whose classes read these keys and no others; the rest read keys of their own, and check them.
_ROTARY = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3")
_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention", "linear_attention"}
_OLDER_WEIGHTS = ("pytorch_model*.bin", "*.bin", "*.pt", "*.pth", "*.ckpt", "tf_model.h5", "*.msgpack", "*.gguf")
_MODALITIES = ("vision_config", "audio_config", "text_config", "speech_config", "image_config", "thinker_config")


def find_folder(path: str | os.PathLike[str]) -> Path:
    """Return the folder at ``path``.

    Raises:
        ValueError: there is none; the message says how to fetch a name of the hub.
    """
    found = Path(path)
    if found.is_dir():
        return found
    if found.exists():
        raise ValueError(f"{found}: expected a folder, received a file; give the folder it is in, {found.parent}")
    name = os.fspath(path)
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not name.startswith("."):
        target = name.rpartition("/")[2]
        raise ValueError(
            f"{name}: expected a folder on this machine, received what is none; if it is a model's name on the hub, "
            f"fetch it by `hf download {name} --local-dir {target}` and give {target}"
        )
    raise ValueError(f"{name}: expected a folder, received a path at which there is none; check its spelling")


def check_config(config: Mapping[str, Any], folder: Path) -> None:
    """Raise ValueError if a model of this config.json cannot be loaded: code, modalities, quantisation, rope."""
    name = folder / "config.json"
    if config.get("auto_map"):
        code = sorted(str(value) for value in dict(config["auto_map"]).values())
        raise ValueError(
            f"{name}: expected a class of transformers, received custom code ({', '.join(code)}), which is not run; "
            "if transformers has this architecture by now, convert the folder with its class and remove auto_map: "
            + _convert(config, folder)
        )
    parts = [key for key in _MODALITIES if config.get(key)]
    if parts:
        text = config.get("text_config")
        kind = text.get("model_type") if isinstance(text, Mapping) else None
        of = f"; its text part is a {kind!r}" if kind else ""
        raise ValueError(
            f"{name}: expected a model of text alone, received one of several modalities ({', '.join(parts)}){of}; "
            "save its language model as a folder of its own by the class of that alone, as for Gemma 3: "
            + _convert({"architectures": ["Gemma3ForCausalLM"]}, folder)
        )
    quantised = config.get("quantization_config") or config.get("compression_config")
    if quantised:
        method = quantised.get("quant_method", "?") if isinstance(quantised, Mapping) else quantised
        raise ValueError(
            f"{name}: expected weights in floating point, received quantised ones (quant_method {method!r}); give the "
            "folder of the model that they were made of"
        )
    if not isinstance(config.get("model_type"), str):
        raise ValueError(
            f"{name}: expected a model_type, such as 'llama', received {config.get('model_type')!r}; give the folder "
            "that save_pretrained() or `hf download` has written"
        )
    check_rope(config, str(name))


def check_rope(config: Mapping[str, Any], name: str) -> None:
    """Raise ValueError if the positions of this config are of a type, or have a key, that is not known."""
    if config.get("model_type") not in _ROTARY:
        return
    keys = [key for key, x in config.items() if key.startswith("rope_") and key not in _ROPE_KEYS and x is not None]
    if keys:
        raise ValueError(
            f"{name}: expected keys of rotary positions out of {', '.join(sorted(_ROPE_KEYS))}, received {keys[0]!r}, "
            "which transformers' class would ignore; remove it if the model does without"
        )
    for key in ("rope_parameters", "rope_scaling"):
        rope = config.get(key)
        if rope is None:
            continue
        if not isinstance(rope, Mapping):
            raise ValueError(
                f"{name}: expected an object at {key!r}, received {rope!r}; take config.json from the model's folder"
            )
        layers = {*_LAYER_TYPES, *(config.get("layer_types") or ())}
        nested = {kind: value for kind, value in rope.items() if kind in layers}
        strange = [kind for kind in rope if kind not in nested] if nested else []
        if strange and not set(strange) <= _OF_EVERY_TYPE:
            raise ValueError(
                f"{name}: expected {key} by types of layers ({', '.join(sorted(nested))}), received {strange[0]!r} "
                "beside them; remove it if the model does without"
            )
        for kind, value in nested.items() or {"": rope}.items():
            if value is not None:
                _check_rope_of(config, value, f"{name}: {key}" + (f".{kind}" if kind else ""))


def _check_rope_of(config: Mapping[str, Any], rope: Any, name: str) -> None:
    """Raise ValueError if one set of rope parameters is not known whole."""
    if not isinstance(rope, Mapping):
        raise ValueError(f"{name}: expected an object, received {rope!r}; take config.json from the model's own folder")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if config.get("model_type") == "phi3" and kind in ("su", "yarn"):
        kind = "longrope"  # as Phi3Config reads old folders
    if kind not in ROPE_TYPES:
        raise ValueError(
            f"{name}: expected a rope_type out of {', '.join(ROPE_TYPES)}, received {kind!r}; a model with other "
            "positions would compute others than it was trained with: use a transformers that has it, and its own class"
        )
    needed, also = ROPE_TYPES[kind]
    lacking = sorted(needed - set(rope) - {key for key in needed if config.get(key) is not None})
    if lacking:
        raise ValueError(
            f"{name}: expected {', '.join(sorted(needed))} for rope_type {kind!r}, received no {', '.join(lacking)}; "
            "take config.json from the model's own folder"
        )
    unknown = [key for key, x in rope.items() if key not in needed | also | _OF_EVERY_TYPE and x is not None]
    if unknown:
        raise ValueError(
            f"{name}: expected keys out of {', '.join(sorted(needed | also | _OF_EVERY_TYPE))} for rope_type {kind!r}, "
            f"received {unknown[0]!r}, which transformers would ignore; remove it if the model does without"
        )


def refuse_without_index(
    folder: Path, config: Mapping[str, Any], present: list[str], *, index: str, single: str
) -> NoReturn:
    """Raise ValueError for a folder without an index and without a single file: other formats, files left over."""
    if present:
        raise ValueError(
            f"{folder}: expected {single}, or {index} beside several files, received {', '.join(present[:4])}"
            f"{', ...' if len(present) > 4 else ''} without an index, which says where each tensor is; fetch it too "
            f"(`hf download NAME {index} --local-dir {folder}`)"
            + (f", or rename the file to {single} if it is the whole model" if len(present) == 1 else "")
        )
    others = sorted({path.name for pattern in _OLDER_WEIGHTS for path in folder.glob(pattern)})
    others = [other for other in others if other not in ("training_args.bin", "optimizer.pt", "scheduler.pt")]
    if others:
        raise ValueError(
            f"{folder}: expected *.safetensors, received weights in {', '.join(others[:3])} alone; convert them once "
            "by: " + _convert(config, folder)
        )
    raise ValueError(
        f"{folder}: expected {single}, or {index} and the files it names, received no weights; fetch them by "
        f"`hf download NAME --local-dir {folder}`"
    )


def _convert(config: Mapping[str, Any], folder: Path) -> str:
    """Return the command that saves a folder anew with transformers, tokenizer included."""
    kinds = config.get("architectures")
    kind = kinds[0] if isinstance(kinds, list) and kinds and isinstance(kinds[0], str) else "AutoModelForCausalLM"
    old = os.fspath(folder)
    new = old.rstrip("/") + "-safetensors"
    return (
        f'python -c "from transformers import AutoTokenizer as T, {kind} as M; '
        f"[x.from_pretrained('{old}').save_pretrained('{new}') for x in (M, T)]\""
    )
