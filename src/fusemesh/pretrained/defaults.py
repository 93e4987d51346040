"""Defaults of a run that fine-tunes a pretrained model, in the place of those that train a new one from scratch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_STEPS = 300  # of a run, where nobody says how many
_WARM_UP = 10  # one step in so many
FINE_TUNING: Mapping[str, Any] = {
    "training.learning_rate": 2e-5,
    "training.min_learning_rate": 0.0,
    "training.schedule": "linear",
    "training.weight_decay": 0.01,
}
MOST_TOKENS = 1024  # of a sample, where nobody says how many


def fine_tuning_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the defaults of fine-tuning by dotted key, given the values of the configuration that are known.

    The computation's dtype follows the weights on disk: bfloat16 for folders of bfloat16, float32 for others. The beams
    of a translation are those that the folder's generation_config.json asks for, 1 where it does not say.

    Raises:
        ValueError: the dtype is not given and the folder cannot be read; names the remedy.
    """
    found = dict(FINE_TUNING)
    steps = values.get("training.steps", _STEPS)
    if isinstance(steps, int):
        found["training.warmup_steps"] = max(1, steps // _WARM_UP)
    path = str(values["model.pretrained"])
    if "training.dtype" not in values:
        from .folder import stored_dtype

        found["training.dtype"] = stored_dtype(path)
    if values.get("task") == "translation" and "evaluation.num_beams" not in values:
        from .folder import generation_config_of

        found["evaluation.num_beams"] = generation_config_of(path).num_beams or 1
    return found


def say_defaults(training: Any, sequence_length: int) -> str:
    """Return in a line with which settings a pretrained model is trained, the user's own among them."""
    warmup = f"{training.warmup_steps} step{'' if training.warmup_steps == 1 else 's'} of warm-up"
    return (
        f"fine-tuning: learning rate {training.learning_rate:g}, {warmup}, then "
        f"{training.schedule} to {training.min_learning_rate:g} at step {training.steps}; weight decay "
        f"{training.weight_decay:g}; {sequence_length} tokens a sample, {training.global_batch_size} samples a step; "
        f"{training.dtype} compute, {'float64' if training.dtype == 'float64' else 'float32'} weights; each is a key: "
        "--training.learning_rate and so on"
    )
