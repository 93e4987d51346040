"""The small files of a Hugging Face folder: copied byte for byte, and config.json with only what changed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

CONFIG = "config.json"
# The folder, in that of a run, of the small files of the folder that its model came from.
KEPT = "pretrained"
# Weights of any kind, and what training leaves beside them.
_WEIGHTS = (
    *("safetensors", "bin", "pt", "pth", "h5", "msgpack", "onnx", "gguf", "ckpt", "ot", "npz", "pkl", "incomplete"),
    *("tflite", "mlmodel", "lock"),
)
_OTHERS = re.compile(r"\.|.*\.index(\..*)?\.json$|README|fusemesh\.json$|trainer_state\.json$|all_results\.json$")
_FOLDERS = ("additional_chat_templates",)
# Set by transformers while it reads or runs a model, or decided by the export.
_NOT_COMPARED = {"dtype", "torch_dtype", "transformers_version", "architectures", "_name_or_path", "use_cache"}
# Of no meaning to a model of spans, some of which change them when they are built.
_LABELS = {"id2label", "label2id", "num_labels"}
_DTYPE_KEYS = ("dtype", "torch_dtype")


def small_files(folder: Path) -> list[Path]:
    """Return the files of a folder that an export copies, relative to it: those of the tokenizer, licences, and so on.

    Left out are config.json, weights and their indices, the model card, hidden files and what training leaves.
    """
    found = [
        path.relative_to(folder)
        for place in (folder, *(folder / name for name in _FOLDERS))
        if place.is_dir()
        for path in sorted(place.iterdir())
        if path.is_file() and not _OTHERS.match(path.name) and path.name.rpartition(".")[2] not in _WEIGHTS
    ]
    return [path for path in found if path != Path(CONFIG)]


def copy_small_files(folder: Path, target: Path, *, config: bool = False) -> None:
    """Copy a folder's small files byte for byte, with config.json or without it."""
    for path in [*small_files(folder), *([Path(CONFIG)] if config else [])]:
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / path, target / path)


def config_text(folder: Path) -> str:
    """Return the text of a folder's config.json."""
    with (folder / CONFIG).open(encoding="utf-8", newline="") as file:
        return file.read()


def check_small_files(folder: Path) -> None:
    """Raise ValueError unless there is a folder of small files."""
    if not folder.is_dir():
        raise ValueError(
            f"small_files: expected the folder of the tokenizer's and other small files, received {str(folder)!r}, "
            "which is none; give the folder that has them"
        )


def write(place: Path, small: Path, config: str, dtype: torch.dtype | None) -> None:
    """Write the documents of an export: the small files of a folder, and config.json, in another dtype or not."""
    copy_small_files(small, place)
    text = config if dtype is None else with_dtype(config, dtype)
    (place / CONFIG).write_text(text, encoding="utf-8", newline="")


def architecture_of(model: Any) -> str:
    """Return the name of a Hugging Face model's class, of which a placed model's own is derived."""
    return type(model).__name__.removeprefix("FSDP")


def changed_config(text: str, model: Any) -> str:
    """Return the text of the config.json that a model was made from, with what is different in the model.

    The rest stays byte for byte, ``transformers_version`` too.
    """
    before = json.loads(text)
    changes: dict[str, Any] = {}
    architectures = before.get("architectures")
    if architectures is not None and architectures != [architecture_of(model)]:
        changes["architectures"] = [architecture_of(model)]
    # Both as this version of transformers reads them, so that defaults and new names of keys are no differences.
    now, then = _plain(model.config), _plain(type(model.config).from_dict(json.loads(text)))
    left_out = _NOT_COMPARED | (_LABELS if architecture_of(model).endswith("ForQuestionAnswering") else set())
    for key in now.keys() | then.keys():
        if key not in left_out and now.get(key) != then.get(key):
            changes[key] = now.get(key)
    return edited(text, dict(sorted(changes.items())))


def _plain(config: Any) -> dict[str, Any]:
    """Return a config's values as JSON has them."""
    found: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return found


def with_dtype(text: str, dtype: torch.dtype) -> str:
    """Return the text of a config.json with another dtype, under the key that it has."""
    name = str(dtype).removeprefix("torch.")
    before = json.loads(text)
    keys = [key for key in _DTYPE_KEYS if key in before] or [_DTYPE_KEYS[0]]
    return edited(text, {key: name for key in keys if before.get(key) != name})


def edited(text: str, changes: Mapping[str, Any]) -> str:
    """Return the text of a JSON object with other values of some keys; everything else stays byte for byte."""
    spans, last = _spans(text)
    indent = re.match(r"\s*\{(\s*)", text)
    space = indent[1] if indent else ""
    added = ""
    replaced: list[tuple[int, int, str]] = []
    for key, value in changes.items():
        lines = json.dumps(value, ensure_ascii=False, indent=_width(space))
        lines = lines.replace("\n", space) if "\n" in space else lines
        if key in spans:
            replaced.append((*spans[key], lines))
        else:
            added += f"{',' if spans or added else ''}{space if spans or added else ''}{json.dumps(key)}: {lines}"
    for begin, end, new in sorted([*replaced, *([(last, last, added)] if added else [])], reverse=True):
        text = text[:begin] + new + text[end:]
    return text


def _width(space: str) -> int | None:
    """Return by how much a text whose first key follows ``space`` is indented; None: it stands in one line."""
    return len(space.rpartition("\n")[2]) if "\n" in space else None


def _spans(text: str) -> tuple[dict[str, tuple[int, int]], int]:
    """Return where the value of each key of a JSON object stands in its text, and where the last one ends."""
    decoder = json.JSONDecoder()
    last = text.index("{") + 1
    at = _next(text, last)
    found = {}
    while text[at] == '"':
        key, at = decoder.raw_decode(text, at)
        begin = _next(text, _next(text, at) + 1)
        _, last = decoder.raw_decode(text, begin)
        found[key] = (begin, last)
        at = _next(text, last)
        if text[at] == ",":
            at = _next(text, at + 1)
    return found, last


def _next(text: str, at: int) -> int:
    """Return where the next character that is no space stands."""
    while text[at].isspace():
        at += 1
    return at


def keep_small_files(folder: Path, run: Path) -> Path:
    """Copy a folder's small files and config.json into a run's folder, for an export when the folder may be gone.

    Returns:
        Where they are; those of an earlier start of the run are replaced.
    """
    kept = run / KEPT
    if kept.absolute() != folder.absolute():
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir(parents=True)
        copy_small_files(folder, kept, config=True)
    return kept
