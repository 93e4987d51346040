"""Fine-tuning of small folders: a plain loop of transformers to compare with, and what runs in ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from fusemesh import config
from fusemesh.config import Config
from fusemesh.hybrid.data import BatchOrder
from fusemesh.run.evaluator import evaluate_rank
from fusemesh.run.optimizer import build_optimizer, learning_rate
from fusemesh.run.settings import load_config
from fusemesh.run.trainer import train_rank
from fusemesh.tasks.registry import build_task

SETTINGS = {
    "data.sequence_length": "16",
    # Texts are windows of one stream, as a plain loop sees them; tests of packing say so.
    "data.packing": "false",
    "training.steps": "4",
    "training.global_batch_size": "8",
    "training.learning_rate": "1e-2",
    "evaluation.samples": "13",
    "evaluation.batch_size": "4",
    "run.log_every": "1",
    "run.keep_checkpoints": "0",
    "run.device": "cpu",
}


def settings(folder: Path, text: str, directory: Path, **overrides: str) -> Config:
    """The configuration of a run; ``training__steps="3"`` overrides ``training.steps``."""
    dotted = {key.replace("__", "."): value for key, value in overrides.items()}
    own = {"model.pretrained": str(folder), "data.path": text, "run.directory": str(directory)}
    return load_config(None, {**SETTINGS, **own, **dotted})


def plain(configured: Config, **changed: Any) -> tuple[list[float], float, torch.nn.Module]:
    """The losses of all steps, the held-out loss and the model of the same training by transformers and torch alone.

    Args:
        changed: of from_pretrained.
    """
    dtype = getattr(torch, configured.training.dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(configured.model.pretrained, dtype=dtype, **changed)
    model.train()
    task, training = build_task(configured), configured.training
    order = BatchOrder(len(task.train), training.global_batch_size, seed=training.seed)
    optimizer = build_optimizer(model, training)
    losses = []
    for step in range(training.steps):
        batch = task.train.batch(order.step(step))
        loss = summed_loss(model, batch) / (batch.targets >= 0).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(training, step)
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    batch = task.held_out.batch(range(min(configured.evaluation.samples, len(task.held_out))))
    with torch.no_grad():
        held_out = summed_loss(model, batch).item() / (batch.targets >= 0).sum()
    return losses, float(held_out), model


def summed_loss(model: Any, batch: Any) -> torch.Tensor:
    """The cross entropy of a batch, from logits in the model's dtype."""
    logits = model(torch.from_numpy(batch.tokens), use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.from_numpy(batch.targets).flatten(), reduction="sum"
    )


def train(values: dict[str, Any], resume: bool = False) -> dict[str, Any]:
    """One rank's part of a run."""
    return train_rank(values, resume, quiet=True)


def evaluate(target: str, values: dict[str, Any]) -> dict[str, Any]:
    """One rank's part of an evaluation."""
    return evaluate_rank(target, values)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a Hugging Face folder."""
    from safetensors.torch import load_file

    return {name: x for file in sorted(folder.glob("*.safetensors")) for name, x in load_file(file).items()}


def as_values(configured: Config, **overrides: str) -> dict[str, Any]:
    """The configuration as ranks are given it."""
    dotted = {key.replace("__", "."): value for key, value in overrides.items()}
    return config.as_dict(load_config(None, dotted, base=config.as_dict(configured)))
