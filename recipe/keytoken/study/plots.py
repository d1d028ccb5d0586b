"""The plots of a section: accuracies with their seeds, and learning curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from keytoken.study import analysis
from keytoken.study.analysis import ALL, SAMPLED, ArmResult, SectionResult
from keytoken.study.config import START, StudyConfig

# Panel of the learning curves: title, metric of a step, factor.
CURVES = (
    ("accuracy of the training answers, %", "accuracy", 100.0),
    ("entropy, nats a token", "entropy", 1.0),
    ("gradient norm before clipping", "grad_norm", 1.0),
    ("tokens with a weight, %", "attribution/selected_share", 100.0),
)
WINDOW = 5  # steps of the running mean
DPI = 110


def draw(
    folder: Path, study: StudyConfig, section: SectionResult, title_of: Callable[[str], str]
) -> list[str]:
    """Draw the plots of a section; returns the names of the files below ``folder``."""
    trained = {name: arm for name, arm in section.arms.items() if name != START}
    if not trained:
        return []
    names = [f"{section.name}_accuracy.png", f"{section.name}_differences.png", f"{section.name}_curves.png"]
    _accuracies(folder / names[0], section, title_of)
    others = [o for o in dict.fromkeys((study.baseline, study.control)) if _compared(trained, o)]
    if others:
        _differences(folder / names[1], trained, others, title_of)
    _curves(folder / names[2], trained, title_of)
    return [names[0], *(names[1:2] if others else []), names[2]]


def _accuracies(path: Path, section: SectionResult, title_of: Callable[[str], str]) -> None:
    """Sampled accuracy of every arm: seeds as dots, mean and interval in front of them."""
    key = (section.split, SAMPLED, ALL)
    figure, (axes,) = _figure(1, width=6.5, height=0.8 + 0.32 * len(section.arms))
    for place, arm in enumerate(section.arms.values()):
        dots = [100 * value for value in arm.by_seed[key].values()]
        axes.plot(dots, [place] * len(dots), ".", color="0.6")
        _bar(axes, arm.accuracy[key], place)
    _named(axes, [title_of(name) for name in section.arms])
    axes.set_xlabel(f"sampled accuracy on {section.split!r}, % (dots: seeds; 95 % t-intervals)")
    figure.savefig(path, dpi=DPI)


def _differences(
    path: Path, arms: dict[str, ArmResult], others: Sequence[str], title_of: Callable[[str], str]
) -> None:
    """Paired differences from the baseline and from the control."""
    figure, panels = _figure(len(others), width=5.2, height=0.9 + 0.32 * len(arms))
    for axes, other in zip(panels, others, strict=True):
        compared = _compared(arms, other)
        for place, arm in enumerate(compared):
            _bar(axes, arm.comparisons[other].test.difference, place)
        axes.axvline(0.0, color="0.4", linewidth=0.8)
        _named(axes, [title_of(arm.arm) for arm in compared])
        axes.set_xlabel(f"minus {title_of(other)}, points of sampled accuracy")
    figure.savefig(path, dpi=DPI)


def _curves(path: Path, arms: dict[str, ArmResult], title_of: Callable[[str], str]) -> None:
    figure, panels = _figure(len(CURVES), width=5.0, height=3.6, columns=2)
    styles = ("-", "--", ":")
    for axes, (title, metric, factor) in zip(panels, CURVES, strict=False):
        for number, (name, arm) in enumerate(arms.items()):
            values = _smooth([factor * value for value in analysis.curve(arm, metric)])
            steps = range(1, len(values) + 1)
            axes.plot(steps, values, styles[number // 10 % 3], label=title_of(name), linewidth=1.1)
        axes.set_title(f"{title} (mean of {WINDOW} steps)", fontsize=9)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", fontsize=8, ncols=5)
    figure.savefig(path, dpi=DPI)


def _compared(arms: dict[str, ArmResult], other: str) -> list[ArmResult]:
    return [arm for arm in arms.values() if other in arm.comparisons]


def _smooth(values: Sequence[float]) -> list[float]:
    """Running mean over the last ``WINDOW`` steps."""
    parts = (values[max(0, end - WINDOW) : end] for end in range(1, len(values) + 1))
    return [math.fsum(part) / len(part) for part in parts]


def _bar(axes: Any, estimate: Any, place: int) -> None:
    axes.plot(100 * estimate.value, place, "o", color="C0", markersize=4)
    if math.isfinite(estimate.low):
        axes.plot([100 * estimate.low, 100 * estimate.high], [place, place], "-", color="C0", linewidth=1.4)


def _named(axes: Any, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)


def _figure(panels: int, *, width: float, height: float, columns: int = 2) -> tuple[Any, list[Any]]:
    """A figure that needs no display, and its axes in reading order."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    across = min(columns, panels)
    down = -(-panels // across)
    figure = Figure(figsize=(width * across, height * down), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(down, across, squeeze=False).flatten())
