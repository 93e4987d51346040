"""Progress of a run: results of its steps, their metrics, and the progress bar."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from fusemesh.config import TrainingConfig
from fusemesh.hybrid import checkpoint, consistency
from fusemesh.run.evaluator import Evaluation
from fusemesh.run.metrics import MetricsWriter
from fusemesh.run.optimizer import learning_rate


@dataclass
class StepResult:
    """Results of a step, kept on the device until metrics are due: reading them at once would stall a GPU."""

    step: int
    targets: int  # of all replicas
    report: torch.Tensor  # fp64 [2]: summed loss of all replicas; on how many ranks a number is not finite
    norm: torch.Tensor | None  # of the gradient before clipping


class StepMetrics:
    """Collects the results of steps and writes their metrics when they are due; ``folder`` is the run's."""

    def __init__(
        self,
        training: TrainingConfig,
        tokens_per_step: int,
        writer: MetricsWriter | None,
        bar: Any,
        diagnose: Callable[[int], str],
        folder: Path,
    ) -> None:
        self.training, self.tokens_per_step, self.writer, self.bar = training, tokens_per_step, writer, bar
        self.diagnose, self.folder = diagnose, folder
        self.pending: list[StepResult] = []
        self.since = time.perf_counter()
        self.last_loss: float | None = None

    def add(self, step: StepResult) -> None:
        self.pending.append(step)
        if self.bar is not None:
            self.bar.update(1)

    def flush(self) -> None:
        """Read the pending steps; every rank calls it, at the same steps.

        Raises:
            NonFiniteError: naming the first bad step, and the rank and parameter where it went wrong.
        """
        if not self.pending:
            return
        losses = []
        for item in self.pending:
            report = item.report.tolist()
            if report[1]:
                saved = last_checkpoint(self.folder)
                again = (
                    "no checkpoint has been saved. Start again"
                    if saved is None
                    else f"no checkpoint holds it. Resume from {saved} (--resume)"
                )
                raise consistency.NonFiniteError(
                    f"step {item.step + 1}: a number is not finite, and was born {self.diagnose(item.step)}. The "
                    f"weights are those before the step, and {again} with a lower training.learning_rate, or a "
                    "training.clip_norm above 0"
                )
            losses.append(report[0] / item.targets)
        last = self.pending[-1]
        norm = last.norm.full_tensor() if isinstance(last.norm, DTensor) else last.norm
        now = time.perf_counter()
        values = {
            "loss": sum(losses) / len(losses),
            "learning_rate": learning_rate(self.training, last.step),
            "gradient_norm": None if norm is None else norm.item(),
            "tokens_per_s": len(losses) * self.tokens_per_step / (now - self.since),
        }
        self.pending, self.last_loss = [], values["loss"]
        if self.writer is not None:
            self.writer.write(last.step + 1, values)
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {values['loss']:.3f}, {values['tokens_per_s']:.0f} tokens/s")
        self.since = time.perf_counter()

    def write_evaluation(self, step: int, evaluation: Evaluation) -> None:
        if self.writer is not None:
            values = {"loss": evaluation.loss, **evaluation.metrics}
            self.writer.write(step, {f"held_out_{name}": value for name, value in values.items()})
        self.since = time.perf_counter()


class _Lines:
    """Shows progress where no bar can be drawn: a line whenever metrics are due."""

    def __init__(self, first: int, steps: int) -> None:
        self.done, self.steps = first, steps

    def update(self, steps: int) -> None:
        self.done += steps

    def set_postfix_str(self, text: str) -> None:
        print(f"step {self.done} of {self.steps}: {text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        pass


def last_checkpoint(folder: Path) -> str | None:
    """Return the name of the last checkpoint of the run in ``folder``; None if it has saved none."""
    saved = checkpoint.all_checkpoints(folder / "checkpoints")
    return saved[-1].name if saved else None


def progress_bar(first: int, steps: int, wanted: bool) -> Any:
    """Return a progress bar if stderr is a terminal; elsewhere, where it would fill a log file, lines; None if neither
    is wanted."""
    if not wanted:
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        tqdm = None
    if tqdm is None or not sys.stderr.isatty():
        return _Lines(first, steps)
    return tqdm(total=steps, initial=first, unit="step", file=sys.stderr, dynamic_ncols=True)
