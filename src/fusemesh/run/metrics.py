"""Metrics of a run: written as they come to ``metrics.jsonl`` and TensorBoard; read back and drawn."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger("fusemesh")


class MetricsWriter:
    """Appends metrics to ``metrics.jsonl``, one JSON object a line, and to TensorBoard's files where it is installed.

    Args:
        folder: the run's.
        first_step: steps after this one are written again: what an earlier run wrote of them is dropped.
    """

    def __init__(self, folder: Path, first_step: int = 0) -> None:
        path = folder / "metrics.jsonl"
        kept = [line for line in read_metrics(folder) if line["step"] <= first_step] if first_step else []
        self.file = path.open("w", encoding="utf-8")
        for line in kept:
            self._append(line)
        self.board: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            logger.warning("TensorBoard is not installed (pip install 'fusemesh[app]'); metrics go to %s alone", path)
        else:
            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1 if first_step else None)

    def _append(self, line: Mapping[str, Any]) -> None:
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        """Write values as of ``step``; None is left out."""
        present = {name: value for name, value in values.items() if value is not None}
        self._append({"step": step, **present})
        if self.board is not None:
            for name, value in present.items():
                self.board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close."""
        self.file.close()
        if self.board is not None:
            self.board.close()


def read_metrics(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the lines of a run's ``metrics.jsonl``, without a last line that a crash cut short."""
    path = Path(folder) / "metrics.jsonl"
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def draw_loss_curve(
    folder: str | os.PathLike[str], output: str | os.PathLike[str], *, baselines: Mapping[str, float], title: str
) -> None:
    """Draw a run's loss in bits per byte over its steps as a PNG, beside horizontal lines for the baselines.

    Args:
        folder: the run's.
        output: the PNG.
        baselines: label to bits per byte.
        title: above the drawing.

    Raises:
        ValueError: matplotlib is not installed.
    """
    lines = read_metrics(folder)
    figure, axes = _figure(8, 5)
    for key, label, style in (("loss", "training", "-"), ("held_out_loss", "held out", "o")):
        points = [(line["step"], line[key] / math.log(2)) for line in lines if key in line]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, color="tab:blue" if key == "loss" else "black")
    for index, (label, value) in enumerate(baselines.items()):
        axes.axhline(value, linestyle="--", linewidth=1, color=f"C{index + 1}", label=f"{label}: {value:.2f}")
    axes.set(xlabel="step", ylabel="bits per byte", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(output, dpi=120)


def draw_matrix(counts: np.ndarray, labels: Sequence[str], output: str | os.PathLike[str], *, title: str) -> None:
    """Draw a confusion matrix as a PNG: rows are what texts are, columns what they were taken for, shares of a row.

    Args:
        counts: int64 [labels, labels].
        labels: their names.
        output: the PNG.
        title: above the drawing.

    Raises:
        ValueError: matplotlib is not installed.
    """
    size = max(4.0, 1.5 + 0.45 * len(labels))
    figure, axes = _figure(size + 1, size)
    shares = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="share of the row", fraction=0.046)
    axes.set(xticks=range(len(labels)), yticks=range(len(labels)), xlabel="taken for", ylabel="is", title=title)
    is_long = max(map(len, labels)) > 3
    axes.set_xticklabels(labels, rotation=45 if is_long else 0, ha="right" if is_long else "center")
    axes.set_yticklabels(labels)
    for row, values in enumerate(counts.tolist()):
        for column, value in enumerate(values):
            if value:
                dark = shares[row, column] > 0.5
                axes.text(column, row, value, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    figure.savefig(output, dpi=120)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    """Return a figure without a window, and its axes."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("drawings need matplotlib; install it with: pip install 'fusemesh[app]'") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()
