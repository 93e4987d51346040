"""Configuration of a run: typed, from a TOML file and the command line; this module imports neither numpy nor torch.

One rule joins the two: what the file calls ``steps`` under ``[training]``, the command line calls ``--training.steps``;
the command line wins. The resolved configuration is saved with the run and can be loaded again.
"""

from __future__ import annotations

import dataclasses
import json
import os
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusemesh.hybrid.outputs import writing
from fusemesh.hybrid.pipeline_options import SCHEDULES
from fusemesh.spelling import suggestion
from fusemesh.tasks.names import TASKS
from fusemesh.transformer.config import TransformerConfig, check_sizes, user_fields

DTYPES = ("float32", "bfloat16", "float64")
_DTYPE_NAMES = {
    **dict.fromkeys(("fp32", "f32", "float"), "float32"),
    **dict.fromkeys(("fp64", "f64", "double"), "float64"),
    **dict.fromkeys(("fp16", "f16", "half"), "float16"),
    "bf16": "bfloat16",
}
# Names on the command line of the most used keys, beside their own, where a model is trained.
SHORT_NAMES = {
    "training.steps": "--steps",
    "training.global_batch_size": "--batch-size",
    "training.learning_rate": "--lr",
    "run.directory": "--out",
}
SCHEDULES_OF_RATE = ("cosine", "linear")
RECOMPUTE = ("none", "full")
DEVICES = ("auto", "cpu", "cuda")
BACKENDS = ("auto", "reference", "torch", "cpu", "triton")


def _doc(default: Any, text: str, *, least: float | None = None, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"doc": text, "least": least, "choices": choices})


def _model_section() -> type:
    """Return the section of the model's sizes: the fields of the Transformer's configuration that are the user's."""
    made = [
        (name, kind, _doc(default, meta["doc"], least=meta["least"])) for name, kind, default, meta in user_fields()
    ]
    doc = "folder of a Hugging Face model to fine-tune, with its tokenizer, in the place of a new model of these sizes"
    made.insert(0, ("pretrained", str, _doc("", doc)))
    section = dataclasses.make_dataclass("ModelConfig", made, frozen=True, namespace={"__doc__": "The model's shape."})
    # So that it can be pickled.
    section.__module__ = __name__
    return section


if TYPE_CHECKING:

    @dataclass(frozen=True)
    class ModelConfig(TransformerConfig):
        """Some of the same fields, all with a default, and the folder of a pretrained model."""

        pretrained: str = ""

        def __init__(self, **sizes: Any) -> None: ...
else:
    ModelConfig = _model_section()


@dataclass(frozen=True)
class DataConfig:
    """The text."""

    path: str = _doc(
        "",
        "a file of records (.csv, .tsv, .jsonl, .json, or text with tabs; also .gz), for a language model a text file "
        "or a folder of them, for a pretrained one also .jsonl, .tokens, or 'A:3 B:1'; empty: the task's own corpus",
    )
    held_out: str = _doc("", "what to evaluate on, as data.path; empty: one in 16 of the records of data.path, by hash")
    columns: str = _doc("", "names of the columns that hold a record, in the task's order; empty: the task's names")
    encoding: str = _doc("", "of these files, such as gb18030 or cp1252; empty: UTF-8, or as a byte order mark says")
    sequence_length: int = _doc(
        0,
        "tokens (bytes, of a question words) per sample, of source and target each; longer texts are cut; 0: chosen "
        "from the data, as it is for a data.path where nothing is given",
        least=0,
    )
    packing: bool = _doc(
        True,
        "texts and records of a pretrained language model share samples, and none sees another; false: texts are "
        "windows of one stream, and each record has a sample of its own",
    )


@dataclass(frozen=True)
class TrainingConfig:
    """The optimisation."""

    steps: int = _doc(300, "optimizer steps", least=1)
    global_batch_size: int = _doc(32, "samples per step over all ranks", least=1)
    accumulation: int = _doc(1, "micro-batches that each rank's part of a step is cut into", least=1)
    learning_rate: float = _doc(3e-3, "peak of AdamW's learning rate", least=0.0)
    min_learning_rate: float = _doc(3e-4, "where the schedule ends; lower for a peak below it", least=0.0)
    schedule: str = _doc("cosine", "by which the learning rate falls from its peak", choices=SCHEDULES_OF_RATE)
    warmup_steps: int = _doc(20, "steps over which the learning rate rises linearly", least=0)
    weight_decay: float = _doc(0.1, "decoupled, of matrices only", least=0.0)
    beta1: float = _doc(0.9, "AdamW's decay of the mean gradient", least=0.0)
    beta2: float = _doc(0.95, "AdamW's decay of the mean squared gradient", least=0.0)
    clip_norm: float = _doc(1.0, "gradients are scaled down to this norm; 0: never", least=0.0)
    dtype: str = _doc("float32", "of compute; parameters stay float32 unless float64", choices=DTYPES)
    recompute: str = _doc(
        "none", "full: keep each block's input alone, and compute the block again in the backward", choices=RECOMPUTE
    )
    seed: int = _doc(0, "of weights and data order", least=0)

    def __post_init__(self) -> None:
        if isinstance(self.dtype, str):
            object.__setattr__(self, "dtype", dtype_name(self.dtype))
        if self.dtype == "float16":
            raise ValueError(
                "training.dtype: expected bfloat16, float32 or float64, received float16, whose small gradients become "
                "0 unless the loss is scaled, which is not built; use bfloat16"
            )


@dataclass(frozen=True)
class PipelineConfig:
    """The pipeline's micro-batches, schedule and stages; ignored without pp."""

    microbatches: int = _doc(
        0, "parts of a rank's batch in training; 0: chosen, four for each rank of pp if legal", least=0
    )
    schedule: str = _doc("1f1b", "in which order the stages take them", choices=SCHEDULES)
    virtual_stages: int = _doc(1, "stages on each rank; more than 1 with interleaved1f1b", least=1)


@dataclass(frozen=True)
class EvaluationConfig:
    """The held-out evaluation."""

    batch_size: int = _doc(16, "samples per rank and forward pass", least=1)
    samples: int = _doc(0, "held-out samples used, from the first on; 0: all", least=0)
    num_beams: int = _doc(4, "beams of a translation's search; 1: greedy", least=1)
    every: int = _doc(0, "steps between evaluations while training; 0: only at the end", least=0)


@dataclass(frozen=True)
class RunConfig:
    """Folder, device, backend and intervals of the run."""

    directory: str = _doc("runs/latest", "everything that the run writes")
    device: str = _doc("auto", "auto: GPUs where there are any", choices=DEVICES)
    backend: str = _doc("auto", "of the kernels", choices=BACKENDS)
    sequence_parallel: bool = _doc(True, "with tp: also shard activations along the sequence between the matmuls")
    threads: int = _doc(1, "CPU threads per rank; 0: torch's choice", least=0)
    log_every: int = _doc(10, "steps between metrics", least=1)
    checkpoint_every: int = _doc(0, "steps between checkpoints; 0: only at the end", least=0)
    check_replicas_every: int = _doc(100, "steps between comparisons of replicated parameters; 0: never", least=0)
    record_samples: bool = _doc(False, "each rank writes the samples that it consumed to samples/")
    keep_checkpoints: int = _doc(2, "newest checkpoints kept; 0: all", least=0)
    export: bool = _doc(True, "with model.pretrained: at the end write the model as a Hugging Face folder, model/")


@dataclass(frozen=True)
class Config:
    """All keys of a run; ``layout`` says how it is spread over ranks.

    Raises:
        ValueError: a value that cannot work, named by its key, with what is legal.
    """

    task: str = _doc("language_model", "task to train for", choices=TASKS)
    layout: str = _doc("single", 'degrees of the axes: "single", "dp4", "pp2 x fsdp2"; auto: the first of the plan')
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        for key, spec in fields_of(Config).items():
            _check(key, spec, get(self, key))
        training = self.training
        check_sizes(self.model, "model.")
        if training.global_batch_size % training.accumulation:
            raise ValueError(
                f"training.global_batch_size: expected a multiple of training.accumulation = {training.accumulation}, "
                f"received {training.global_batch_size}"
            )
        for name in ("beta1", "beta2"):
            if getattr(training, name) >= 1:
                raise ValueError(f"training.{name}: expected below 1, received {getattr(training, name)}")


def dtype_name(text: str) -> str:
    """Return the name of a dtype by which we know it: bf16, torch.bfloat16 and BFloat16 are bfloat16."""
    plain = text.strip().lower().removeprefix("torch.")
    name = _DTYPE_NAMES.get(plain, plain)
    return name if name in (*DTYPES, "float16") else text


@dataclass(frozen=True)
class Field:
    """One key of the configuration: its type, default, meaning and bounds."""

    type: type
    default: Any
    doc: str
    least: float | None
    choices: tuple[str, ...] | None


def fields_of(section: type, prefix: str = "") -> dict[str, Field]:
    """Return every dotted key of a configuration class."""
    hints = typing.get_type_hints(section)
    result: dict[str, Field] = {}
    for item in dataclasses.fields(section):
        key = f"{prefix}{item.name}"
        if dataclasses.is_dataclass(hints[item.name]):
            result.update(fields_of(hints[item.name], f"{key}."))
        else:
            meta = item.metadata
            result[key] = Field(hints[item.name], item.default, meta["doc"], meta["least"], meta["choices"])
    return result


def get(config: Config, key: str) -> Any:
    """Return the value of a dotted key."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _check(key: str, spec: Field, value: Any) -> None:
    # bool is an int to isinstance, but never what a number's key means.
    if not isinstance(value, spec.type) or (spec.type is not bool and isinstance(value, bool)):
        raise ValueError(f"{key}: expected {spec.type.__name__}, received {value!r} ({type(value).__name__})")
    if spec.choices is not None and value not in spec.choices:
        guess = suggestion(str(value), spec.choices)
        raise ValueError(f"{key}: expected one of {spec.choices}, received {value!r}{guess}")
    number: Any = value
    # Written so that nan fails too.
    if spec.least is not None and not (spec.least <= number < float("inf")):
        raise ValueError(f"{key}: expected a number of at least {spec.least}, received {value!r}")


def _parse(key: str, spec: Field, text: str) -> Any:
    """Return a command-line value as the key's type."""
    if spec.type is str:
        return text
    if spec.type is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"--{key}: expected true or false, received {text!r}")
        return text.lower() == "true"
    try:
        return spec.type(text)
    except ValueError:
        kind = "a whole number" if spec.type is int else "a number"
        raise ValueError(f"--{key}: expected {kind}, received {text!r}") from None


def _is_size(key: str) -> bool:
    """Return whether a key is a size of a new model."""
    return key.startswith("model.") and key != "model.pretrained"


def _build(values: Mapping[str, Any]) -> Config:
    """Return a configuration from dotted keys, with defaults for the rest."""
    known = fields_of(Config)
    if values.get("model.pretrained"):
        sizes = [key for key in values if _is_size(key) and key in known]
        if sizes:
            raise ValueError(
                f"{sizes[0]}: expected nothing with model.pretrained, whose config.json has the sizes, received "
                f"{values[sizes[0]]!r}; leave {' and '.join(sizes)} out"
            )
    for key in values:
        if key not in known:
            short = {name.lstrip("-").replace("-", "_"): full for full, name in SHORT_NAMES.items()}
            meant = short.get(key.rpartition(".")[2].replace("-", "_"), key)
            guess = suggestion(meant, known) or f"; the keys are: {', '.join(known)}"
            raise ValueError(f"{key}: not a key of the configuration{guess}")
    sections: dict[str, Any] = {}
    for key, value in values.items():
        # TOML writes 1 where a float is meant, and nobody is misled by it.
        if known[key].type is float and type(value) is int:
            value = float(value)
        section, _, name = key.rpartition(".")
        if section:
            sections.setdefault(section, {})[name] = value
        else:
            sections[name] = value
    hints = typing.get_type_hints(Config)
    return Config(**{k: hints[k](**v) if dataclasses.is_dataclass(hints[k]) else v for k, v in sections.items()})


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    sections = {hint for hint, kind in typing.get_type_hints(Config).items() if dataclasses.is_dataclass(kind)}
    result: dict[str, Any] = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if key in sections:
            if not isinstance(value, Mapping):
                raise ValueError(f"{key}: expected a section [{key}], received {value!r}")
            result.update(_flatten(value, f"{key}."))
        else:
            result[key] = value
    return result


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        import tomllib  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        try:
            import tomli as tomllib  # type: ignore[import-not-found, no-redef, unused-ignore]
        except ImportError as error:
            raise ValueError(
                f"config: reading {str(path)!r} on Python 3.10 needs tomli: pip install 'fusemesh[app]'"
            ) from error
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"config: expected a TOML file, received {str(path)!r}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"config: {str(path)!r} is not valid TOML: {error}") from error


def load(
    path: str | os.PathLike[str] | None = None,
    overrides: Mapping[str, str] | None = None,
    *,
    base: Mapping[str, Any] | None = None,
    defaults: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
) -> Config:
    """Return the configuration of a file with command-line values over it.

    A task's own defaults are not among them: see :func:`fusemesh.run.settings.load_config`.

    Args:
        path: a TOML file; None for the defaults.
        overrides: dotted key to text, as ``{"training.steps": "100"}``.
        base: a configuration as :func:`as_dict` gives it, beneath the file.
        defaults: given the values by dotted key, more such values, which stand beneath all others.

    Raises:
        ValueError: an unknown key or an illegal value, named by its key; or the file cannot be read.
    """
    values = _flatten(base or {})
    if path is not None:
        values.update(_flatten(_read_toml(Path(path))))
    known = fields_of(Config)
    is_given = "training.min_learning_rate" in {**values, **(overrides or {})}
    for key, text in (overrides or {}).items():
        values[key] = _parse(key, known[key], text) if key in known else text
    if defaults is not None:
        values = {**defaults(values), **values}
    return _with_falling_rate(_build(values), is_given)


def _with_falling_rate(config: Config, is_given: bool) -> Config:
    """Return the configuration with a minimum of the learning rate below its peak, unless the user gave the minimum."""
    training = config.training
    if is_given or training.min_learning_rate < training.learning_rate:
        return config
    lower = dataclasses.replace(training, min_learning_rate=training.learning_rate / 10)
    return dataclasses.replace(config, training=lower)


def as_dict(config: Config) -> dict[str, Any]:
    """Return nested plain values, as JSON, TOML and the ``base`` of :func:`load` hold them.

    Of a pretrained model its folder alone, which has the sizes.
    """
    found = dataclasses.asdict(config)
    if config.model.pretrained:
        found["model"] = {"pretrained": config.model.pretrained}
    return found


def to_toml(config: Config) -> str:
    """Return the configuration as TOML, which :func:`load` reads back to an equal one."""
    tree = as_dict(config)
    # JSON writes strings, numbers and booleans as TOML does.
    lines = [f"{k} = {json.dumps(v, ensure_ascii=False)}" for k, v in tree.items() if not isinstance(v, dict)]
    for section, values in tree.items():
        if isinstance(values, dict):
            lines += ["", f"[{section}]", *(f"{k} = {json.dumps(v, ensure_ascii=False)}" for k, v in values.items())]
    return "\n".join(lines) + "\n"


def save(config: Config, path: str | os.PathLike[str]) -> None:
    """Write the configuration as TOML."""
    with writing(path):
        Path(path).write_text(to_toml(config), encoding="utf-8")
