"""The folder of a pretrained model, checked before ranks start: its files, the versions, and its class for a task."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusemesh.hybrid.hugging_face.exports import documents

if TYPE_CHECKING:
    from fusemesh.hybrid.hugging_face.folder import Folder

KEY = "model.pretrained"
LEAST_VERSION = (5, 20)
# The small files of a run's folder, beside its checkpoints: config.json, tokenizer, chat template.
KEPT = documents.KEPT
# Encoders that transformers also has as decoders: config.json says which one a folder is.
_ENCODERS = ("bert", "roberta")
# Of each task transformers' auto class, and the mapping by which that finds a configuration's class.
AUTO_CLASSES = {
    "language_model": ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING"),
    "text_classification": ("AutoModelForSequenceClassification", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING"),
    "question_answering": ("AutoModelForQuestionAnswering", "MODEL_FOR_QUESTION_ANSWERING_MAPPING"),
    "translation": ("AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING"),
}
CLASSIFIER = "ForSequenceClassification"
# The task that the head of a folder's architecture was trained for, by the end of its name.
_HEADS = {
    "ForCausalLM": "language_model",
    "LMHeadModel": "language_model",
    CLASSIFIER: "text_classification",
    "ForQuestionAnswering": "question_answering",
    "ForConditionalGeneration": "translation",
    "MTModel": "translation",
}


def read(path: str) -> Folder:
    """Return index and headers of a folder's weights.

    Raises:
        ValueError: there is no such folder, or it is none that can be loaded; names the file and the remedy.
    """
    from fusemesh.hybrid.hugging_face.folder import read_folder

    try:
        return read_folder(Path(path).expanduser())
    except ValueError as error:
        raise ValueError(f"{KEY}: {error}") from error


def stored_dtype(path: str) -> str:
    """Return the dtype of the computation that suits the weights of a folder: bfloat16 where most are."""
    return "bfloat16" if str(read(path).dtype) == "torch.bfloat16" else "float32"


def check_version() -> None:
    """Check that transformers is there in a version that this use needs.

    Raises:
        ValueError: it is not.
    """
    wanted = ".".join(map(str, LEAST_VERSION))
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            f"{KEY}: expected transformers {wanted} or later, which is not installed; pip install "
            f"'transformers>={wanted}'"
        ) from error
    found = tuple(int(part) for part in transformers.__version__.split(".")[:2] if part.isdigit())
    if found < LEAST_VERSION:
        raise ValueError(
            f"{KEY}: expected transformers {wanted} or later, received {transformers.__version__}; pip install "
            f"'transformers>={wanted}' (models of older versions run through "
            "fusemesh.integrations.transformers.register() and fusemesh.parallelize())"
        )


def config_of(path: str) -> Any:
    """Return transformers' configuration of a folder; callers leave it as it is.

    Raises:
        ValueError: transformers is missing or too old, or does not know the model.
    """
    try:
        stat = Path(path, "config.json").stat()
    except OSError:
        raise ValueError(
            f"{KEY}: expected a folder with config.json, received {path!r}; give the folder that save_pretrained() or "
            "`hf download` wrote"
        ) from None
    return _config_of(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=4)
def _config_of(path: str, changed: int, size: int) -> Any:
    check_version()
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, local_files_only=True)
    except Exception as error:
        # Whatever a config that is damaged, or of a newer version, raises.
        text = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"{KEY}: {str(Path(path, 'config.json'))!r} cannot be used by transformers: {text}") from error


def generation_config_of(path: str) -> Any:
    """Return transformers' GenerationConfig of a folder: its generation_config.json, or what config.json says of it.

    Raises:
        ValueError: the file cannot be used.
    """
    from transformers import GenerationConfig

    config = config_of(path)
    file = Path(path, "generation_config.json")
    if not file.is_file():
        return GenerationConfig.from_model_config(config)
    try:
        return GenerationConfig.from_pretrained(path, local_files_only=True)
    except Exception as error:
        # Whatever a file that is damaged, or of a newer version, raises.
        text = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"{KEY}: {str(file)!r} cannot be used by transformers: {text}") from error


def task_of_class(name: str) -> str:
    """Return the task of the head of a class of transformers, by its name; "" where it has none of ours."""
    return next((task for end, task in _HEADS.items() if name.endswith(end)), "")


def own_task(config: Any) -> str:
    """Return the task of the head that a configuration's architecture has; of one that names none, its family's.

    Raises:
        ValueError: its architecture has no head, and its family, of encoders, several.
    """
    made = (list(getattr(config, "architectures", None) or []) or [""])[0]
    own = task_of_class(made)
    if not made and config.model_type not in (*_ENCODERS, "distilbert"):
        own = "translation" if getattr(config, "is_encoder_decoder", False) else "language_model"
    if not own:
        raise ValueError(
            f"--task: expected {', '.join(AUTO_CLASSES)} of a model whose config.json names no head under "
            f"architectures, received none for {made or config.model_type!r}"
        )
    return own


def check_task(config: Any, path: str, task: str) -> None:
    """Check that a folder's model can be trained for a task.

    Args:
        config: transformers' own; path: of the folder.

    Raises:
        ValueError: transformers has no class of it for the task, or its head is another task's.
    """
    import transformers

    made = (list(getattr(config, "architectures", None) or []) or [""])[0]
    own = task_of_class(made)
    advice = f"; its own task is {own}" if own and own != task else ""
    auto, mapping = AUTO_CLASSES[task]
    if type(config) not in getattr(transformers, mapping):
        raise ValueError(
            f"{KEY}: expected a model that transformers has as {auto} for task {task}, received {path!r} of model_type "
            f"{config.model_type!r}, which it has not{advice}"
        )
    if task != "language_model":
        return
    if config.model_type in _ENCODERS and not getattr(config, "is_decoder", False):
        raise ValueError(
            f"{KEY}: expected a model whose tokens see only those before them for task {task}, received {path!r}, "
            f"{made or config.model_type} without is_decoder, whose tokens see those behind them, too; use task "
            "text_classification or question_answering, or a decoder"
        )
    if own and own != task:
        raise ValueError(
            f"{KEY}: expected a model with the head of task {task}, received {path!r}, a {made}, whose head is another"
            f"{advice}"
        )


def fingerprint(path: str) -> dict[str, Any]:
    """Return what tells this folder's model from another: the headers of its weights and its small files, hashed.

    Of small files alone, as a run has kept them, those.
    """
    digest = hashlib.sha256()
    for file in [Path("config.json"), *documents.small_files(Path(path))]:
        content = Path(path, file).read_bytes()
        digest.update(f"{file}\0{len(content)}\0".encode())
        digest.update(content)
    found: dict[str, Any] = {"small_files": digest.hexdigest()}
    if any(Path(path).glob("*.safetensors")):
        tensors = read(path).tensors
        entries = [
            (name, tensors[name].file, str(tensors[name].dtype), tensors[name].shape) for name in sorted(tensors)
        ]
        found["tensors"] = len(entries)
        found["headers"] = hashlib.sha256(json.dumps(entries).encode()).hexdigest()
    return found


def kept_in(checkpoints: str | os.PathLike[str]) -> Path | None:
    """Return the small files that a run has kept beside its checkpoints, as a folder; None if there is none."""
    found = Path(checkpoints, documents.KEPT)
    return found if (found / documents.CONFIG).is_file() else None
