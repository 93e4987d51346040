"""Drawings of a run as PNG files: its loss, a confusion matrix, a speed-up. They need matplotlib."""

from __future__ import annotations

import io
import logging
import math
import os
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusemesh.hybrid.outputs import writing

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger("fusemesh")

BITS_PER_BYTE = "bits per byte"
LEGEND = "labels.txt"
_DPI = 120
# Of a matrix: up to how many labels its cells are large, and have numbers; and the most inches of a side.
_LARGE_CELLS, _NUMBERED_CELLS, _LARGEST = 12, 40, 40.0
_LONGEST_LABEL = 32
_LETTER = 0.64  # the width of most, as a share of their size
# Of matplotlib: it has a box for every character.
_NO_FONTS = ("Last Resort",)


def draw_losses(
    lines: Sequence[Mapping[str, Any]],
    output: str | os.PathLike[str],
    *,
    baselines: Mapping[str, float],
    title: str,
    unit: str = BITS_PER_BYTE,
) -> None:
    """Draw the losses of a run's metrics over its steps, beside horizontal lines for the baselines.

    Args:
        lines: the metrics.
        output: the PNG.
        baselines: label to a loss in the same unit.
        title: above the drawing.
        unit: :data:`BITS_PER_BYTE`, or the name of the loss as it is.

    Raises:
        ValueError: matplotlib is not installed.
        OutputError: the PNG cannot be written.
    """
    nats = math.log(2) if unit == BITS_PER_BYTE else 1.0
    with _new_axes(8, 5, [title, *baselines]) as (figure, axes):
        for key, label, color in (("loss", "training", "tab:blue"), ("held_out_loss", "held out", "black")):
            points = [(line["step"], line[key] / nats) for line in lines if key in line]
            # A line of one point would not be seen, and those of a few evaluations are not read between.
            style = "o" if len(points) == 1 or key == "held_out_loss" else "-"
            if points:
                axes.plot(*zip(*points, strict=True), style, label=label, color=color)
        for index, (label, value) in enumerate(baselines.items()):
            axes.axhline(value, linestyle="--", linewidth=1, color=f"C{index + 1}", label=f"{label}: {value:.2f}")
        axes.set(xlabel="step", ylabel=f"loss, {unit}")
        axes.set_xlim(left=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        _set_title(axes, title, 8)
        axes.grid(alpha=0.3)
        axes.legend()
        _save(figure, output)


def draw_matrix(counts: np.ndarray, labels: Sequence[str], output: str | os.PathLike[str], *, title: str) -> None:
    """Draw a confusion matrix: a row for each true label, a column for each predicted one, shares of a row.

    Labels that no installed font can show, that are too long, or too many, are numbered; the file :data:`LEGEND` beside
    the drawing says what the numbers mean.

    Args:
        counts: int64 [labels, labels].
        labels: their names.
        output: the PNG.
        title: above the drawing.

    Raises:
        ValueError: matplotlib is not installed.
        OutputError: a file cannot be written.
    """
    count = len(labels)
    cell = 0.45 if count <= _LARGE_CELLS else 0.32 if count <= _NUMBERED_CELLS else 0.2 if count <= 80 else 0.14
    # In points, of 72 an inch: what stands around the matrix is read with all of it in view, its labels from close by.
    within = min(10.0 if count <= _LARGE_CELLS else 12.0, 0.75 * 72 * cell)
    with _new_axes(4, 4, [title, *labels]) as (figure, axes):
        shown, is_numbered = _shown_labels(labels, Path(output), fits=cell * count < _LARGEST)
        beside = _LETTER * within / 72 * max(map(len, shown))
        side = min(max(4.0, 1.2 + beside + cell * count), _LARGEST)
        around = max(10.0, 1.2 * side)
        figure.set_size_inches(side + 1, side)
        shares = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        # Within the axes, so that it is as tall as the matrix.
        bar = figure.colorbar(image, cax=axes.inset_axes((1.03, 0, 0.03, 1)))
        bar.set_label("share of the row", fontsize=around)
        bar.ax.tick_params(labelsize=around)
        # Of too many labels every k-th.
        ticks = range(0, count, max(1, math.ceil(cell * count / _LARGEST)))
        of_legend = f" (numbers: {LEGEND})" if is_numbered else ""
        axes.set(xticks=ticks, yticks=ticks)
        axes.set_xlabel(f"predicted label{of_legend}", fontsize=around)
        axes.set_ylabel(f"true label{of_legend}", fontsize=around)
        is_long = max(map(len, shown)) > 3
        turned = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if is_long else {}
        names = [shown[tick] for tick in ticks]
        axes.set_xticklabels(names, fontsize=within, parse_math=False, **(turned if cell > 0.4 else {"rotation": 90}))
        axes.set_yticklabels(names, fontsize=within, parse_math=False)
        if count <= _NUMBERED_CELLS:
            _write_counts(axes, counts, shares, min(within, 0.9 * 72 * cell / (_LETTER * len(str(counts.max())))))
        _set_title(axes, title, side, 1.2 * around)
        _save(figure, output)


def draw_speed_up(result: Mapping[str, Any], output: str | os.PathLike[str]) -> None:
    """Draw the speed-up over processes of ``fusemesh scaling``'s result, beside the ideal and the cores' limit.

    Raises:
        ValueError: matplotlib is not installed.
        OutputError: the PNG cannot be written.
    """
    rows = result["rows"]
    x, first = [row["processes"] for row in rows], rows[0]["processes"]
    limit = [min(n, result["cores"]) / min(first, result["cores"]) for n in x]
    title = f"The same job on more processes ({result['machine']['cpu']})"
    with _new_axes(7, 4.5, [title]) as (figure, axes):
        # Wide and pale, so that the lines on it leave it to be seen where they coincide.
        axes.plot(x, [n / first for n in x], color="tab:orange", alpha=0.4, linewidth=7, label="ideal")
        axes.plot(x, limit, "--", color="black", label=f"limit of {result['cores']} cores")
        axes.plot(x, [row["speed_up"] for row in rows], "o-", color="tab:blue", label="measured")
        for row in rows:
            at = (row["processes"], row["speed_up"])
            axes.annotate(f"{row['efficiency']:.0%}", at, textcoords="offset points", xytext=(6, -14))
        axes.margins(x=0.1)
        axes.set_xticks(x)
        axes.set(xlabel="processes", ylabel=f"speed-up over {first}", ylim=(0, None))
        _set_title(axes, title, 7)
        axes.grid(alpha=0.3)
        axes.legend(loc="upper left")
        _save(figure, output)


def fonts_for(text: str) -> tuple[list[str], set[str]]:
    """Return families of installed fonts that together show a text, and the characters that none of them has.

    The default font comes first; others are looked at only where it lacks something.
    """
    from matplotlib import font_manager, rcParams

    default = list(rcParams["font.family"])
    missing = {letter for letter in text if not letter.isspace()}
    missing -= _letters_of(font_manager.findfont(font_manager.FontProperties(family=default)), missing)
    families: list[str] = []
    if missing:
        files = {font.name: font.fname for font in font_manager.fontManager.ttflist if font.style == "normal"}
        has = {
            name: _letters_of(file, missing) for name, file in sorted(files.items()) if not name.startswith(_NO_FONTS)
        }
        while missing and has:
            best = max(has, key=lambda name: len(has[name] & missing))
            if not has[best] & missing:
                break
            families.append(best)
            missing -= has.pop(best)
    return default + families, missing


def _letters_of(file: str, wanted: set[str]) -> set[str]:
    """Return those of the wanted characters that a font file can draw at any size; none of a broken file."""
    from matplotlib import font_manager

    try:
        font = font_manager.get_font(file)
        table = font.get_charmap() if font.scalable else {}
    except (OSError, RuntimeError):
        return set()
    return {letter for letter in wanted if ord(letter) in table}


def _shown_labels(labels: Sequence[str], output: Path, *, fits: bool) -> tuple[list[str], bool]:
    """Return the labels as a drawing can show them, and whether they are numbers, which a file explains."""
    plain = [" ".join(label.split()) for label in labels]
    short = [name if len(name) <= _LONGEST_LABEL else f"{name[: _LONGEST_LABEL - 3]}..." for name in plain]
    _, missing = fonts_for("".join(short))
    if fits and not missing and len(set(short)) == len(short):
        return short, False
    numbers = [str(number) for number in range(1, len(labels) + 1)]
    legend = output.with_name(LEGEND)
    with writing(legend):
        legend.write_text("".join(f"{n}\t{name}\n" for n, name in zip(numbers, plain, strict=True)), encoding="utf-8")
    if missing:
        some = "".join(sorted(missing)[:5])
        logger.warning("%s: labels are numbered as in %s; no installed font has %s", output.name, legend, some)
    return numbers, True


def _write_counts(axes: Any, counts: np.ndarray, shares: np.ndarray, size: float) -> None:
    for row, values in enumerate(counts.tolist()):
        for column, value in enumerate(values):
            if value:
                color = "white" if shares[row, column] > 0.5 else "black"
                axes.text(column, row, value, ha="center", va="center", fontsize=size, color=color)


def _set_title(axes: Any, title: str, inches: float, size: float = 12.0) -> None:
    _, missing = fonts_for(title)
    shown = "".join("?" if letter in missing else letter for letter in title)
    # Letters of a title an inch: Chinese ones are as wide as high.
    lines = textwrap.wrap(shown, int(inches * (9 if shown.isascii() else 6) * 12 / size))
    axes.set_title("\n".join(lines), parse_math=False, fontsize=size)


@contextmanager
def _new_axes(width: float, height: float, texts: Sequence[str]) -> Iterator[tuple[Any, Any]]:
    """Yield a figure without a window and its axes, in fonts that have the letters of the texts."""
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("drawings need matplotlib; install it with: pip install 'fusemesh[app]'") from error
    families, _ = fonts_for("".join(texts))
    with matplotlib.rc_context({"font.family": families}):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure, figure.add_subplot()


def _save(figure: Any, output: str | os.PathLike[str]) -> None:
    """Write the PNG in one piece, so that a full disk leaves no half of one."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=_DPI, format="png", bbox_inches="tight")
    with writing(output):
        try:
            Path(output).write_bytes(drawn.getvalue())
        except OSError:
            Path(output).unlink(missing_ok=True)
            raise
