"""A run small enough for a test: sixty little documents and a model of a few thousand parameters."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from fusemesh import config
from fusemesh.evaluator import evaluate_rank
from fusemesh.trainer import Trainer, train_rank

# One kv head, fewer than tp2 has ranks.
SETTINGS = {
    "model.hidden_size": "32",
    "model.num_layers": "2",
    "model.num_heads": "4",
    "model.num_kv_heads": "1",
    "model.intermediate_size": "48",
    "data.sequence_length": "16",
    "training.steps": "6",
    "training.global_batch_size": "8",
    "training.warmup_steps": "2",
    "evaluation.samples": "21",
    "evaluation.batch_size": "4",
    "run.log_every": "2",
    "run.keep_checkpoints": "0",
    "run.device": "cpu",
}


def write_text(folder: Path) -> str:
    """Sixty documents in a new folder, whose path is returned."""
    folder.mkdir()
    for number in range(60):
        lines = [f"line {line} of document {number}: {number * line} is {number} times {line}\n" for line in range(9)]
        (folder / f"{number}.txt").write_text("".join(lines))
    return str(folder)


def settings(text: str, directory: Path, **overrides: str) -> config.Config:
    """The tiny configuration; ``training__steps="3"`` overrides ``training.steps``."""
    dotted = {key.replace("__", "."): value for key, value in overrides.items()}
    return config.load(None, {**SETTINGS, "data.path": text, "run.directory": str(directory), **dotted})


def options(text: str, directory: Path, **overrides: str) -> list[str]:
    """The same as a command line."""
    dotted = {key.replace("__", "."): value for key, value in overrides.items()}
    values = {**SETTINGS, "data.path": text, "run.directory": str(directory), **dotted}
    return [f"--{key}={value}" for key, value in values.items()]


def train(values: dict[str, Any], resume: bool = False) -> dict[str, Any]:
    return train_rank(values, resume, quiet=True)


def train_with_a_bad_rank(values: dict[str, Any], bad: int, step: int) -> str:
    """The message with which training fails on this rank, when rank ``bad``'s loss becomes NaN at ``step``."""
    train_step = Trainer._train_step

    def poisoned(self: Trainer, current: int) -> Any:
        if current == step and self.world.rank == bad:
            whole = self.model.loss
            self.model.loss = lambda *batch: whole(*batch) * math.nan  # type: ignore[method-assign]
        return train_step(self, current)

    Trainer._train_step = poisoned  # type: ignore[method-assign]
    try:
        train_rank(values, quiet=True)
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        Trainer._train_step = train_step  # type: ignore[method-assign]
    return "trained"


def evaluate(target: str, values: dict[str, Any]) -> dict[str, Any]:
    return evaluate_rank(target, values)
