"""A run small enough for a test: sixty little documents and a model of a few thousand parameters."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from fusemesh import config
from fusemesh.hybrid.checkpoint import together
from fusemesh.run.evaluator import evaluate_rank
from fusemesh.run.trainer import Trainer, train_rank

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


def train_each(cases: list[list[dict[str, Any]]], saved: str) -> list[str]:
    """Of each case, which has a configuration for each rank: the message with which training fails on this rank, and in
    the end that of an evaluation of ``saved`` by the last case."""
    patience, found, rank = together.PATIENCE, [], int(os.environ["RANK"])
    together.PATIENCE = 0.2
    for case in cases:
        try:
            train_rank(case[rank], quiet=True)
            found.append("trained")
        except (ValueError, OSError) as error:
            found.append(str(error))
    try:
        evaluate_rank(saved, cases[-1][rank])
        found.append("evaluated")
    except ValueError as error:
        found.append(str(error))
    together.PATIENCE = patience
    return found


def train_with_a_bad_rank(values: dict[str, Any], bad: int, step: int) -> tuple[str, dict[str, torch.Tensor]]:
    """How training fails, and the weights then, when rank ``bad``'s loss becomes NaN at ``step`` and stays so."""
    train_step, weights = Trainer.train_step, {}

    def poisoned(self: Trainer, current: int) -> Any:
        if current == step and self.world.rank == bad:
            whole = self.model.loss
            self.model.loss = lambda *batch: whole(*batch) * math.nan  # type: ignore[method-assign]
        taken = train_step(self, current)
        for name, parameter in self.model.named_parameters():
            assert isinstance(parameter, DTensor)
            weights[name] = parameter.detach().full_tensor()
        return taken

    Trainer.train_step = poisoned  # type: ignore[method-assign]
    try:
        train_rank(values, quiet=True)
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}", weights
    finally:
        Trainer.train_step = train_step  # type: ignore[method-assign]
    return "trained", weights


def train_with_drift(values: dict[str, Any], bad: int, step: int) -> str:
    """The message with which training fails when a weight of rank ``bad`` changes by itself after ``step``."""
    train_step = Trainer.train_step

    def drifting(self: Trainer, current: int) -> Any:
        taken = train_step(self, current)
        if current == step and self.world.rank == bad:
            weight = self.model.embedding.weight
            assert isinstance(weight, DTensor)
            with torch.no_grad():
                weight.to_local()[5, 7] += 1e-3
        return taken

    Trainer.train_step = drifting  # type: ignore[method-assign]
    try:
        train_rank(values, quiet=True)
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        Trainer.train_step = train_step  # type: ignore[method-assign]
    return "trained"


def evaluate(target: str, values: dict[str, Any]) -> dict[str, Any]:
    return evaluate_rank(target, values)
