"""One answer as a picture, for a paper or a report: its tokens, coloured by three signals, and the frames."""

import base64
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from keytoken.errors import DataError
from keytoken.lens.frames import Strip, strip_of
from keytoken.lens.page import question_of
from keytoken.lens.read import SIGNALS, Answer, Export
from keytoken.lens.scale import PART, top_of
from keytoken.lens.write import writing

MAX_TOKENS = 600
COLUMNS = 134  # characters of a line
MARKS = {"visual": "#0072b2", "temporal": "#d55e00", "entropy": "#009e73"}


def find_answer(export: Export, name: str | None, others: Sequence[Export] = ()) -> Answer:
    """The answer called ``PROMPT/NUMBER``, or by its place in the file from 0; None for the first one.

    Args:
        export: Where it is looked for.
        name: What it is called.
        others: Other steps of the run, to be named if it is in one of them.

    Raises:
        DataError: there is no such answer.
    """
    names = {f"{answer.prompt_id}/{answer.number}": answer for answer in export.answers}
    if not names:
        raise DataError(f"{export.file}: holds no answers, so there is none to draw")
    if name is None:
        return export.answers[0]
    if name.isdigit() and int(name) < len(export.answers):
        return export.answers[int(name)]
    if name not in names:
        raise DataError(
            f"--answer {name}: not in {export.file}; it holds {len(names)}, such as {next(iter(names))} "
            f"(prompt/number), or give a place from 0 to {len(names) - 1}{_elsewhere(name, others)}"
        )
    return names[name]


def _elsewhere(name: str, others: Sequence[Export]) -> str:
    """Which other steps there are, and which of them has the answer."""
    if not others:
        return ""
    here = [
        other.step
        for other in others
        if any(f"{answer.prompt_id}/{answer.number}" == name for answer in other.answers)
    ]
    if here:
        return f". Step {here[0]} has it: --step {here[0]}"
    return f". Other steps with exports (--step N): {', '.join(str(other.step) for other in others)}"


def write_image(export: Export, answer: Answer, target: Path) -> Path:
    """Draw an answer as a PNG; returns the file.

    Raises:
        DataError: the file cannot be written.
    """
    drawn = png_of(export, answer)
    with writing(target):
        target.write_bytes(drawn)
    return target


def png_of(export: Export, answer: Answer) -> bytes:
    """An answer of an export as a PNG, its signals on the scales of the export."""
    signals = [name for name in SIGNALS if name in answer.values]
    strips = [
        strip_of(clip, answer.prompt_id, number, export.about, answer.applies["temporal"])
        for number, clip in enumerate(answer.clips or ())
    ]
    pictures = [strip for strip in strips if strip.frames]
    lines = lines_of(answer.texts[:MAX_TOKENS])
    block = 0.24 * len(lines) + 0.35  # inches of one signal
    height = 0.75 + 1.25 * len(pictures) + block * max(len(signals), 1)
    figure = Figure(figsize=(10, height), dpi=150)
    top = height - 0.3
    _write(figure, 0.15, top, f"{export.run}, step {export.step}, {answer.prompt_id}/{answer.number}", height)
    _write(
        figure,
        0.15,
        top - 0.22,
        _printable(" ".join(question_of(answer.prompt).split()))[:130],
        height,
        size=8.5,
    )
    top -= 0.4
    for strip in pictures:
        _draw_strip(figure, strip, top, height)
        top -= 1.25
    for name in signals:
        _draw_signal(figure, answer, name, top_of(export, name), lines, top, height)
        top -= block
    if len(answer.texts) > MAX_TOKENS or not answer.texts:
        what = f"the first {MAX_TOKENS} of {len(answer.texts)} tokens" if answer.texts else "(no tokens)"
        _write(figure, 0.15, 0.08, what, height, size=7.5)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    return buffer.getvalue()


def lines_of(texts: tuple[str, ...]) -> list[list[tuple[int, int, str]]]:
    """Tokens on lines of :data:`COLUMNS` characters: of each (number, column, text without line breaks)."""
    lines: list[list[tuple[int, int, str]]] = [[]]
    column = 0
    for number, text in enumerate(texts):
        shown = _printable(text.replace("\n", "")) or "·"
        if column and column + len(shown) > COLUMNS:
            lines.append([])
            column = 0
        shown = shown[:COLUMNS]
        lines[-1].append((number, column, shown))
        column += len(shown)
        if "\n" in text:
            lines.append([])
            column = 0
    return [line for line in lines if line] or [[]]


def _printable(text: str) -> str:
    """What cannot be seen becomes a box; a formula's dollar is only a dollar."""
    return "".join(c if c.isprintable() else "▯" for c in text)


def _write(figure: Figure, x: float, y: float, text: str, height: float, **options: Any) -> None:
    style: dict[str, Any] = {"size": 9.5, "color": "#1b1f24", "va": "center", "parse_math": False}
    figure.text(x / 10, y / height, text, **{**style, **options})


def _draw_strip(figure: Figure, strip: Strip, top: float, height: float) -> None:
    """The frames as they are, and below in the order of the view."""
    orders = [("real", tuple(range(len(strip.frames)))), *([("view", strip.order)] if strip.order else [])]
    for row, (name, order) in enumerate(orders):
        _write(figure, 0.15, top - 0.32 - 0.58 * row, name, height, size=7.5)
        for place, source in enumerate(order[:16]):
            encoded = strip.frames[source].split(",", 1)[1]
            picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))))
            box = (0.06 + 0.058 * place, (top - 0.58 - 0.58 * row) / height, 0.055, 0.52 / height)
            axes = figure.add_axes(box)
            axes.imshow(picture)
            axes.axis("off")


def _draw_signal(
    figure: Figure,
    answer: Answer,
    name: str,
    largest: float,
    lines: list[list[tuple[int, int, str]]],
    top: float,
    height: float,
) -> None:
    values = np.abs(answer.values[name])
    colours = matplotlib.colormaps["viridis_r"]
    chosen = answer.selected.get(name)
    title = (
        f"{name}: colours from 0 to {largest:.3g}, where {PART:.0%} of this step's lie (square-root scale)"
    )
    _write(figure, 0.15, top - 0.1, title, height, size=8, color=MARKS[name])
    for row, line in enumerate(lines):
        y = top - 0.33 - 0.24 * row
        for number, column, text in line:
            part = math.sqrt(min(values[number] / largest, 1.0)) if np.isfinite(values[number]) else 0.0
            fill = (*colours(part)[:3], min(1.0, part * 1.2))
            dark = 0.299 * fill[0] + 0.587 * fill[1] + 0.114 * fill[2] < 0.5 and fill[3] > 0.5
            box = {"facecolor": fill, "edgecolor": "none", "pad": 1.2}
            if chosen is not None and chosen[number]:
                box |= {"edgecolor": MARKS[name], "linewidth": 1.0}
            x = 0.15 + 0.0705 * (column + len(text) - len(text.lstrip()))
            ink = "white" if dark else "#1b1f24"
            _write(figure, x, y, text.strip(), height, size=8, color=ink, family="monospace", bbox=box)
