"""A step of every measured run as a picture: which pool is busy with what, and when."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from keytoken.bench.figures import Measured

DPI = 110
LANES = ("all", "attribution", "actor", "rollout")


class Span(NamedTuple):
    """Something that a pool does in a step."""

    name: str
    lane: str
    start: float
    seconds: float


def spans(measured: Measured) -> list[Span]:
    """The parts of the median step, in the order in which a step without overlap of steps makes them.

    The passes of the attribution group begin with the old log-probs, which then wait for them.
    """
    seconds = {name.strip(): value or 0.0 for name, value in measured.seconds.items()}
    now = seconds["sampling"]
    waited = seconds["of it waiting for attribution"]
    found = [
        Span("sampling", "rollout", 0.0, now),
        Span("old log-probs", "actor", now, seconds["old log-probs"] - waited),
        Span("views", "attribution", now, seconds["attribution passes, beside it"]),
    ]
    now += seconds["old log-probs"]
    for name, lane in (
        ("reference log-probs", "actor"),
        ("advantages and selection", "all"),
        ("actor update", "actor"),
        ("weight sync", "all"),
    ):
        found.append(Span(name, lane, now, seconds[name]))
        now += seconds[name]
    found.append(Span("other", "all", now, max(0.0, seconds["whole step"] - now)))
    return [span for span in found if span.seconds > 0.0]


def draw(measured: Mapping[str, Measured], path: Path) -> None:
    """Write the picture, a row for each run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.7 * len(measured) + 0.6), layout="constrained")
    rows = figure.subplots(len(measured), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, figures) in zip(rows, measured.items(), strict=True):
        _draw_step(axes, spans(figures))
        axes.set_title(f"{name}: {figures.seconds['whole step']:.1f} s a step", fontsize=9, loc="left")
    rows[-1].set_xlabel("seconds, medians of warm steps")
    figure.savefig(path, dpi=DPI)


def _draw_step(axes: Any, step: list[Span]) -> None:
    whole = max(span.start + span.seconds for span in step)
    for span in step:
        lane = LANES.index(span.lane)
        axes.barh(lane, span.seconds, left=span.start, height=0.7, edgecolor="white", color=f"C{lane}")
        if span.seconds > 0.06 * whole:
            middle = span.start + span.seconds / 2
            axes.text(middle, lane, span.name, ha="center", va="center", fontsize=7)
    axes.set_yticks(range(len(LANES)), LANES, fontsize=8)
