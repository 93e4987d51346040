"""Metrics of a run: written as they come to ``metrics.jsonl`` and TensorBoard, and read back."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusemesh.hybrid.outputs import writing
from fusemesh.run.drawing import BITS_PER_BYTE, draw_losses

logger = logging.getLogger("fusemesh")

# The key that names the folder, for errors.
OUT = "run.directory"


class MetricsWriter:
    """Appends metrics to ``metrics.jsonl``, one JSON object a line, and to TensorBoard's files where it is installed.

    Args:
        folder: the run's.
        first_step: steps after this one are written again: what an earlier run wrote of them is dropped.
    """

    def __init__(self, folder: Path, first_step: int = 0) -> None:
        path = self.path = folder / "metrics.jsonl"
        kept = [line for line in read_metrics(folder) if line["step"] <= first_step] if first_step else []
        with writing(path, what=OUT):
            # In one piece: where the disk is full, those of the earlier run stay.
            unfinished = path.with_name(f".unfinished-{path.name}")
            unfinished.write_text("".join(f"{json.dumps(line)}\n" for line in kept), encoding="utf-8")
            unfinished.replace(path)
            self.file = path.open("a", encoding="utf-8")
        self.board: Any = None
        self._excepthook = threading.excepthook
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            logger.warning("TensorBoard is not installed (pip install 'fusemesh[app]'); metrics go to %s alone", path)
        else:
            self.board_path = folder / "tensorboard"
            threading.excepthook = self._quiet_about_board
            try:
                with writing(self.board_path, what=OUT):
                    self.board = SummaryWriter(str(self.board_path), purge_step=first_step + 1 if first_step else None)
            except BaseException:
                threading.excepthook = self._excepthook
                raise

    def _append(self, line: Mapping[str, Any]) -> None:
        with writing(self.path, what=OUT):
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        """Write values as of ``step``; None is left out."""
        present = {name: value for name, value in values.items() if value is not None}
        self._append({"step": step, **present})
        if self.board is not None:
            with writing(self.board_path, what=OUT):
                for name, value in present.items():
                    self.board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close."""
        try:
            with writing(self.path, what=OUT):
                self.file.close()
        finally:
            self._close_board()

    def _close_board(self) -> None:
        if self.board is None:
            return
        try:
            with writing(self.board_path, what=OUT):
                self.board.close()
        finally:
            threading.excepthook = self._excepthook

    def _quiet_about_board(self, failure: threading.ExceptHookArgs) -> None:
        """Print how a thread ended, but for a full disk seen by TensorBoard's, which comes as an error of ours."""
        if not (issubclass(failure.exc_type, OSError) and type(failure.thread).__module__.startswith("tensorboard")):
            self._excepthook(failure)


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
    folder: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    baselines: Mapping[str, float],
    title: str,
    unit: str = BITS_PER_BYTE,
) -> None:
    """Draw the losses of the run in ``folder``; arguments and errors are those of :func:`drawing.draw_losses`."""
    draw_losses(read_metrics(folder), output, baselines=baselines, title=title, unit=unit)
