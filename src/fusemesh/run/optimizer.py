"""The optimizer of a run and its learning rate."""

from __future__ import annotations

import math

import torch
from torch import nn

from fusemesh.config import TrainingConfig


def learning_rate(training: TrainingConfig, step: int) -> float:
    """Return the rate of ``step``, which counts from 0: linear warm-up to the peak, then the schedule to the minimum.

    A cosine is there at the last step; a line, whose minimum may be 0, would be at the step after it.
    """
    if step < training.warmup_steps:
        return training.learning_rate * (step + 1) / training.warmup_steps
    is_line = training.schedule == "linear"
    length = max(1, training.steps - (not is_line) - training.warmup_steps)
    progress = min(1.0, (step - training.warmup_steps) / length)
    swing = training.learning_rate - training.min_learning_rate
    left = 1 - progress if is_line else (1 + math.cos(math.pi * progress)) / 2
    return training.min_learning_rate + swing * left


def build_optimizer(model: nn.Module, training: TrainingConfig) -> torch.optim.AdamW:
    """Return AdamW for the model; weight decay leaves out norms and biases (parameters with one dimension)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": training.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=training.learning_rate,
        betas=(training.beta1, training.beta2),
        fused=True,
    )
