"""Layer: application. Drawings of a run: fonts, labels, legends; and outputs that cannot be written."""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import re
import resource
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fusemesh import config
from fusemesh.hybrid.checkpoint import MARKER
from fusemesh.hybrid.consistency import NonFiniteError
from fusemesh.hybrid.outputs import OutputError
from fusemesh.run import drawing
from fusemesh.run.metrics import MetricsWriter, draw_loss_curve
from fusemesh.run.progress import StepMetrics, StepResult

CHINESE = ["正面", "负面"]


@pytest.fixture
def axes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The axes of each drawing that is saved."""
    kept, save = [], drawing._save

    def keep(figure: Any, output: Any) -> None:
        with warnings.catch_warnings():
            # A letter that no font has is a warning of matplotlib's.
            warnings.simplefilter("error")
            save(figure, output)
        kept.append(figure.axes[0])

    monkeypatch.setattr(drawing, "_save", keep)
    return kept


@pytest.fixture
def chinese_font(tmp_path: Path) -> Iterator[str]:
    """The name of an installed font that has the characters of the labels, each as an empty box."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen
    from matplotlib import font_manager

    letters = sorted(set("".join(CHINESE)))
    names = [".notdef", *(f"uni{ord(letter):04X}" for letter in letters)]
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for point in ((0, 700), (700, 700), (700, 0)):
        pen.lineTo(point)
    pen.closePath()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(letter): name for letter, name in zip(letters, names[1:], strict=True)})
    builder.setupGlyf(dict.fromkeys(names, pen.glyph()))
    builder.setupHorizontalMetrics(dict.fromkeys(names, (800, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Boxes", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(tmp_path / "boxes.ttf")
    before = list(font_manager.fontManager.ttflist)
    font_manager.fontManager.addfont(tmp_path / "boxes.ttf")
    yield "Boxes"
    font_manager.fontManager.ttflist[:] = before


def drawn_labels(axes: Any) -> tuple[list[str], list[str]]:
    return tuple([label.get_text() for label in axis.get_ticklabels()] for axis in (axes.yaxis, axes.xaxis))


def test_labels_that_no_font_has_are_numbered(
    axes: list[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = drawing._letters_of
    # Whatever fonts this machine has.
    monkeypatch.setattr(drawing, "_letters_of", lambda file, wanted: installed(file, wanted) - set("正负面"))
    with caplog.at_level(logging.WARNING, "fusemesh"):
        drawing.draw_matrix(np.eye(2, dtype=int), CHINESE, tmp_path / "a.png", title="12 texts of 正.csv")
    assert drawn_labels(axes[0]) == (["1", "2"], ["1", "2"])
    assert (tmp_path / "labels.txt").read_text(encoding="utf-8") == "1\t正面\n2\t负面\n"
    assert axes[0].get_ylabel() == "true label (numbers: labels.txt)" and axes[0].get_title() == "12 texts of ?.csv"
    (record,) = caplog.records
    assert "labels are numbered as in" in record.message and "正" in record.message


def test_a_font_is_chosen_that_has_the_labels(axes: list[Any], chinese_font: str, tmp_path: Path) -> None:
    families, missing = drawing.fonts_for("".join(CHINESE))
    assert not missing and len(families) == 2
    drawing.draw_matrix(np.eye(2, dtype=int), CHINESE, tmp_path / "a.png", title="12 texts")
    assert drawn_labels(axes[0]) == (CHINESE, CHINESE) and not (tmp_path / "labels.txt").exists()
    assert axes[0].yaxis.get_ticklabels()[0].get_fontfamily() == families
    assert (axes[0].get_ylabel(), axes[0].get_xlabel()) == ("true label", "predicted label")


def test_labels_of_any_kind(axes: list[Any], tmp_path: Path) -> None:
    """What matplotlib takes for a formula, long ones, those that would look alike, and very many."""
    odd = ["$x_1$ \\frac", "_hidden", "two\nlines", "long " * 20]
    drawing.draw_matrix(np.eye(4, dtype=int), odd, tmp_path / "a.png", title="$\\foo$ 50%")
    assert drawn_labels(axes[0])[0] == ["$x_1$ \\frac", "_hidden", "two lines", "long long long long long long..."[:32]]
    drawing.draw_matrix(np.eye(2, dtype=int), ["a" * 40 + "b", "a" * 40 + "c"], tmp_path / "b.png", title="")
    assert drawn_labels(axes[1])[0] == ["1", "2"]
    many = [f"class {n}" for n in range(41)]
    drawing.draw_matrix(np.eye(41, dtype=int), many, tmp_path / "c.png", title="")
    assert drawn_labels(axes[2])[1] == many and not axes[2].texts and len(axes[0].texts) == 4


def test_the_bar_of_a_matrix_is_as_tall_and_its_print_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    axes: list[Any] = []
    monkeypatch.setattr(drawing, "_save", lambda figure, _: axes.append(figure.axes[0]))
    names = [f"a name of class {n}" for n in range(40)]
    drawing.draw_matrix(np.eye(40, dtype=int) * 100, names, tmp_path / "a.png", title="texts")
    (drawn,) = axes
    drawn.figure.draw_without_rendering()
    bar = next(image.colorbar.ax for image in drawn.images)
    assert bar.get_window_extent().height == pytest.approx(drawn.get_window_extent().height, rel=0.01)
    assert bar.get_window_extent().y0 == pytest.approx(drawn.get_window_extent().y0, abs=1)
    # Seen at a width of 1000 points, a letter has some.
    seen = 1000 / (drawn.figure.get_size_inches()[0] * 72)
    sizes = [text.get_fontsize() for text in (*drawn.texts, *drawn.get_yticklabels(), drawn.title, drawn.yaxis.label)]
    assert min(sizes) * seen > 7 and drawn.yaxis.label.get_fontsize() * seen > 10
    # No label is cut off, nor upon the next one.
    heights = [label.get_window_extent() for label in drawn.get_yticklabels()]
    assert all(upper.y0 >= lower.y1 for upper, lower in itertools.pairwise(heights))


def test_the_loss_is_drawn_in_its_unit(axes: list[Any], tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 9, "loss": 0.5}\n{"step": 9, "held_out_loss": 0.75}\n')
    for unit, factor in (("nats per target", 1.0), ("bits per byte", 1 / np.log(2))):
        draw_loss_curve(tmp_path, tmp_path / "loss.png", baselines={"always": 2.0}, title="t", unit=unit)
        training, held_out, baseline = axes[-1].lines
        assert training.get_ydata() == pytest.approx([0.5 * factor])
        assert held_out.get_ydata() == pytest.approx([0.75 * factor])
        # One point has no line.
        assert training.get_marker() == held_out.get_marker() == "o" and list(baseline.get_ydata()) == [2.0, 2.0]
        assert axes[-1].get_ylabel() == f"loss, {unit}"


@pytest.mark.parametrize("cores", [2, 4])
def test_the_ideal_is_labelled_and_seen(cores: int, axes: list[Any], tmp_path: Path) -> None:
    rows = [{"processes": n, "speed_up": n * 0.8, "efficiency": 0.8} for n in (1, 2, 4)]
    drawing.draw_speed_up({"rows": rows, "cores": cores, "machine": {"cpu": "c"}}, tmp_path / "s.png")
    ideal, limit, _ = axes[0].lines
    assert [line.get_label() for line in axes[0].lines] == ["ideal", f"limit of {cores} cores", "measured"]
    assert list(ideal.get_ydata()) == [1, 2, 4] and list(limit.get_ydata()) == [1, 2, min(4, cores)]
    # Where the two coincide the ideal shows on both sides of the limit.
    assert ideal.get_linewidth() > 3 * limit.get_linewidth()


@pytest.fixture
def small_files() -> Iterator[None]:
    """Files of more than 300 bytes cannot be written in this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_metrics_that_cannot_be_written(small_files: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    hook = threading.excepthook
    writer = MetricsWriter(tmp_path)
    with pytest.raises(OutputError) as found:
        for step in range(1, 99):
            writer.write(step, {"loss": 1.0})
    # TensorBoard's file may be too large before.
    expected = (
        rf"run\.directory: cannot write '{tmp_path}/(metrics\.jsonl|tensorboard)': the file would exceed the limit .*"
    )
    assert re.fullmatch(expected, str(found.value))
    with contextlib.suppress(OutputError):
        writer.close()
    assert threading.excepthook is hook and "Traceback" not in capfd.readouterr().err


def test_a_full_disk_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = MetricsWriter(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(writer, "file", SimpleNamespace(write=full, close=full))
        for write in (lambda: writer.write(1, {"loss": 1.0}), writer.close):
            with pytest.raises(
                OutputError, match=r"run\.directory: cannot write '.*metrics\.jsonl': no space is left .* free"
            ):
                write()
    writer.file.close()
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OutputError, match=r"cannot write '.*config\.toml': no space is left on the device \(.* free\)"):
        config.save(config.Config(), tmp_path / "config.toml")


def test_a_drawing_that_cannot_be_written_leaves_no_half(small_files: None, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"cannot write '.*a\.png': the file would exceed the limit"):
        drawing.draw_matrix(np.eye(2, dtype=int), ["a", "b"], tmp_path / "a.png", title="t")
    assert not (tmp_path / "a.png").exists()


def test_a_number_that_is_not_finite_says_what_to_go_on_from(tmp_path: Path) -> None:
    metrics = StepMetrics(config.TrainingConfig(), 1, None, None, lambda step: "on rank 0", tmp_path)
    metrics.add(StepResult(4, 1, torch.tensor([1.0, 1.0]), None))
    with pytest.raises(NonFiniteError, match=r"no checkpoint has been saved\. Start again with a lower") as found:
        metrics.flush()
    assert "--resume" not in str(found.value)
    (tmp_path / "checkpoints" / "step-00000003").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-00000003" / MARKER).touch()
    with pytest.raises(NonFiniteError, match=r"Resume from step-00000003 \(--resume\) with a lower"):
        metrics.flush()
