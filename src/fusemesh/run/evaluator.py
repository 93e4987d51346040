"""Held-out loss and metrics: over all ranks of any layout, or of a merged model in one process; one answer for all."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fusemesh.config import Config
from fusemesh.hybrid.data import evaluation_batches
from fusemesh.hybrid.data_parallel import sum_over_replicas
from fusemesh.run.agreement import same_data
from fusemesh.run.fingerprint import evaluated, fingerprint
from fusemesh.run.setup import Share, joined, load_file
from fusemesh.run.setup import checkpoint_of as checkpoint_of  # public here
from fusemesh.tasks.base import IGNORED, Batch, Dataset, Task
from fusemesh.tasks.windows import Windows

logger = logging.getLogger("fusemesh")


@dataclass(frozen=True)
class Evaluation:
    """loss: mean, nats per target; metrics: of the task; targets, samples: how many it is the mean of; seconds: wall
    time; predictions: int64 [samples, width], if the task's metrics are of them."""

    loss: float
    metrics: dict[str, float]
    targets: int
    samples: int
    seconds: float
    predictions: np.ndarray | None = field(default=None, repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for reports, without the predictions."""
        return {
            "loss": self.loss,
            **self.metrics,
            "targets": self.targets,
            "samples": self.samples,
            "seconds": round(self.seconds, 3),
        }


def held_out_samples(config: Config, samples: Dataset) -> int:
    """Return the number of held-out samples that an evaluation takes; of records in windows, that of records."""
    there = samples.records if isinstance(samples, Windows) else len(samples)
    return min(config.evaluation.samples or there, there)


def _windows_of(samples: Dataset, count: int) -> int:
    """Return the number of samples that the first ``count`` are, or as records have for windows."""
    return samples.windows_of(count) if isinstance(samples, Windows) else count


def on_device(batch: Batch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Return tokens, targets and further inputs of a batch as tensors."""
    inputs = {name: torch.from_numpy(values).to(device) for name, values in batch.inputs.items()}
    return torch.from_numpy(batch.tokens).to(device), torch.from_numpy(batch.targets).to(device), inputs


@torch.no_grad()
def evaluate(model: Any, task: Task, share: Share) -> Evaluation:
    """Return the mean loss and the task's metrics on the held-out samples, the same on every rank; all of them call it.

    Each replica takes its share of the samples. Sums are taken in fp64 over targets and divided once, so that the
    layout enters only through the rounding of the losses themselves; metrics are of all replicas' predictions together.
    """
    began = time.perf_counter()
    training = model.training
    model.eval()
    samples, batch_size = task.held_out, task.config.evaluation.batch_size
    count = held_out_samples(task.config, samples)
    windows = _windows_of(samples, count)
    total = torch.zeros((), dtype=torch.float64, device=share.device)
    for indices, valid in evaluation_batches(windows, batch_size, share.replicas, share.replica):
        tokens, targets, inputs = on_device(samples.batch(indices), share.device)
        targets[valid:] = IGNORED
        total += model.loss(tokens, targets, **inputs).double()
    if share.mesh is not None:
        total = sum_over_replicas(total, share.mesh)
    predictions = predict(model, task, samples, count, batch_size, share) if task.metric else None
    model.train(training)
    targets_counted = samples.targets_in(range(windows))
    loss = total.item() / targets_counted
    metrics = task.score(loss, predictions, count)
    return Evaluation(loss, metrics, targets_counted, count, time.perf_counter() - began, predictions)


def predict(model: Any, task: Task, samples: Dataset, count: int, batch_size: int, share: Share) -> np.ndarray:
    """Return the task's predictions for the first ``count`` samples, int64 [count, width], the same on every rank.

    Each replica computes its share.
    """
    if isinstance(samples, Windows):
        return predict_scored(model, task, samples, count, batch_size, share)[0]
    return _of_all(lambda batch: (task.predict(model, batch, share.device),), samples, count, batch_size, share)[0]


@torch.no_grad()
def predict_scored(
    model: Any, task: Task, samples: Dataset, count: int, batch_size: int, share: Share
) -> tuple[np.ndarray, np.ndarray]:
    """Return predictions as :func:`predict` does, and their scores, fp64 [count, n]."""
    windows = _windows_of(samples, count)
    found, scores = _of_all(
        lambda batch: task.predict_scored(model, batch, share.device), samples, windows, batch_size, share
    )
    return samples.joined(found, scores) if isinstance(samples, Windows) else (found, scores)


def _of_all(
    compute: Callable[[Batch], Sequence[torch.Tensor]], samples: Dataset, count: int, batch_size: int, share: Share
) -> list[np.ndarray]:
    """Return what ``compute`` makes of the first ``count`` samples, a row each; each replica computes its share."""
    found: list[torch.Tensor] = []
    for indices, valid in evaluation_batches(count, batch_size, share.replicas, share.replica):
        own = compute(samples.batch(indices))
        if not found:
            found = [x.new_zeros((count, x.shape[1])) for x in own]
        rows = torch.from_numpy(indices[:valid]).to(share.device)
        for whole, part in zip(found, own, strict=True):
            whole[rows] = part[:valid]
    # Each row is filled in by one replica.
    return [(x if share.mesh is None else sum_over_replicas(x, share.mesh)).cpu().numpy() for x in found]


def evaluate_file(path: str | os.PathLike[str], config: Config, verify: bool = True) -> dict[str, Any]:
    """Evaluate a merged file in this process alone: no process group, no mesh, the plain model.

    Args:
        verify: compare the file with its checksum first.

    Returns:
        :meth:`Evaluation.as_dict` with ``step`` and ``layout``.
    """
    task, model, state = load_file(path, config, verify=verify)
    _say_cuts(task)
    result = evaluate(model, task, Share(next(model.parameters()).device))
    return {"task": config.task, "step": state["step"], "layout": "single", **result.as_dict(), **_cuts(task)}


def evaluate_rank(target: str, values: dict[str, Any], verify: bool = True) -> dict[str, Any]:
    """One rank's part of evaluating a run, a checkpoint or a merged file in the configured layout.

    Args:
        target: see :func:`fusemesh.run.setup.config_of`.
        values: the configuration, as ``config.as_dict`` gives it.
        verify: compare what is read with its checksums first.

    Returns:
        The same on every rank: :meth:`Evaluation.as_dict` with ``step`` and ``layout``.
    """
    with joined(values, {"model": Path(target).name}) as run:
        same_data(evaluated(run.config), fingerprint)
        loaded = run.load(target, verify=verify)
        task, step = loaded.task, loaded.state["step"]
        if run.world.is_first:
            _say_cuts(task)
        result = evaluate(loaded.model, task, run.share(loaded.mesh))
    return {"task": run.config.task, "step": step, "layout": str(run.layout), **result.as_dict(), **_cuts(task)}


def _say_cuts(task: Task) -> None:
    if text := task.say_cuts("held_out"):
        logger.warning("%s", text)


def _cuts(task: Task) -> dict[str, Any]:
    found = task.cuts("held_out")
    return {"cut": found} if found else {}
