"""The table as a picture: how many times faster passes are, and what a step then takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from prefix_bench.steps import PLAIN, SEPARATE, SHARED, steps_of

DPI = 110
Case = dict[str, Any]


def _times(kind: str) -> Callable[[Case], float]:
    return lambda case: case["seconds"][f"{kind}_separate"] / case["seconds"][f"{kind}_shared"]


def _share(way: str) -> Callable[[Case], float]:
    def share(case: Case) -> float:
        steps = steps_of(case["seconds"])
        return steps[way] / steps[PLAIN]

    return share


def draw(report: dict[str, Any], path: Path) -> None:
    """Write the picture of the cases whose two ways agree; nothing if there are none."""
    from matplotlib.figure import Figure

    cases = [case for case in report["cases"] if case["agree"]]
    if not cases:
        return
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    axes = figure.subplots(1, 3)
    _lines(axes[0], cases, _times("score"), "scoring: separate / shared")
    _lines(axes[1], cases, _times("update"), "forward and backward: separate / shared")
    _lines(axes[2], cases, _share(SHARED), "a step of Video-KTR / of stock GRPO")
    _lines(axes[2], cases, _share(SEPARATE), axes[2].get_title(), linestyle=":")
    axes[2].axhline(1.0, color="black", linewidth=0.8)
    for each in axes:  # last: from here on a line that is higher would be cut off
        each.set_ylim(bottom=0.0)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    device = report["about"]["device"]
    figure.suptitle(f"One prompt for a whole group, {device}; dotted: separate prompts", fontsize=10)
    figure.savefig(path, dpi=DPI)


def _lines(axes: Any, cases: list[Case], value: Callable[[Case], float], title: str, **style: Any) -> None:
    prompts = sorted({case["prompt"] for case in cases})
    for number, prompt in enumerate(prompts):
        own = [case for case in cases if case["prompt"] == prompt]
        sizes, values = [case["size"] for case in own], [value(case) for case in own]
        label = f"prompt of {prompt:,} tokens"
        axes.plot(sizes, values, marker="o", color=f"C{number}", label=label, **style)
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("answers to a prompt", fontsize=8)
    axes.set_xticks(sorted({case["size"] for case in cases}))
