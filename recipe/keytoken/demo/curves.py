"""Learning curves of a run, from the metrics that verl's file logger writes."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# Title of a panel and the metrics of verl that belong into it; "line" is what its legend says of one. A panel
# without data is left out.
PANELS = (
    ("training reward", r"critic/score/mean"),
    ("held-out accuracy", r"val-(?:core|aux)/(?:demo_)?(?P<line>.*)/acc/mean@\d+"),
    ("entropy (nats)", r"actor/entropy(_loss)?"),
    ("gradient norm", r"actor/grad_norm"),
    ("response length (tokens)", r"response_length/mean"),
    ("share of tokens selected", r"attribution/(?:(?P<line>\w+)/)?selected_share"),
)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics file of verl's file logger, one JSON object a line."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def plot_curves(path: Path, metrics_rows: Iterable[dict[str, Any]]) -> list[str]:
    """Plot the metrics named in ``PANELS`` over training steps.

    Args:
        path: PNG file to write.
        metrics_rows: Rows of verl's file logger.

    Returns:
        Titles of the panels that had data. Without any, no file is written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = sorted(metrics_rows, key=lambda row: row["step"])
    panels = []
    for title, pattern in PANELS:
        keys = {key for row in rows for key in row["data"]}
        lines = {key: found for key in sorted(keys) if (found := re.fullmatch(pattern, key))}
        if lines:
            panels.append((title, {key: _label(found) for key, found in lines.items()}))
    if not panels:
        return []
    columns = min(3, len(panels))
    num_rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.9 * num_rows), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(num_rows, columns, squeeze=False).flatten()
    for axes, (title, labels) in zip(grid, panels, strict=False):
        for key, label in labels.items():
            points = [(row["step"], row["data"][key]) for row in rows if key in row["data"]]
            axes.plot(*zip(*points, strict=True), marker=".", label=label)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if len(labels) > 1:
            axes.legend(fontsize=7)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    figure.savefig(path, dpi=120)
    return [title for title, _ in panels]


def _label(metric: re.Match[str]) -> str:
    """What a legend says of a metric: ``greedy blank``, ``visual``; ``all`` of a union of others."""
    return (metric.groupdict().get("line") or "all").replace("_", " ")
