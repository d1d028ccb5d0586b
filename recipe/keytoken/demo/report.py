"""The demo's last page: a table of accuracies before and after training, and learning curves."""

import io
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from keytoken.demo.statistics import AnswerRecord, Estimate, FamilyResult, compare

# Title of a panel and the metrics of verl that belong into it. A panel without data is left out.
PANELS = (
    ("training reward", r"critic/score/mean"),
    ("held-out accuracy", r"val-(core|aux)/.*/acc/mean@\d+"),
    ("entropy (nats)", r"actor/entropy(_loss)?"),
    ("gradient norm", r"actor/grad_norm"),
    ("response length (tokens)", r"response_length/mean"),
    ("share of tokens selected", r"attribution/(\w+/)?selected_share"),
)


def write_report(
    run_dir: Path,
    before_records: Sequence[AnswerRecord],
    after_records: Sequence[AnswerRecord],
    metrics_rows: Sequence[dict[str, Any]],
) -> str:
    """Write ``table.md``, ``results.json`` and ``learning_curves.png`` into a run folder.

    Args:
        run_dir: The run folder; created if needed.
        before_records: Held-out answers before training, of one or more kinds of decoding.
        after_records: Held-out answers after training, of the same kinds.
        metrics_rows: Rows of verl's file logger, ``{"step": ..., "data": {...}}``.

    Returns:
        The table as text, ready to print.

    Raises:
        DataError: If the answers before and after do not cover the same prompts.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    decodings = sorted({record.decoding for record in [*before_records, *after_records]})
    results = {
        decoding: compare(_of(before_records, decoding), _of(after_records, decoding))
        for decoding in decodings
    }
    text = render_table(results)
    (run_dir / "table.md").write_text(text)
    content = {decoding: [asdict(result) for result in families] for decoding, families in results.items()}
    (run_dir / "results.json").write_text(json.dumps(content, indent=2) + "\n")
    plot_curves(run_dir / "learning_curves.png", metrics_rows)
    return text


def render_table(results: dict[str, list[FamilyResult]]) -> str:
    """A Markdown table: one row for each family and kind of decoding."""
    table = Table(box=box.MARKDOWN)
    for column in ("answers", "family", "prompts", "before", "after", "difference"):
        table.add_column(column, justify="right" if column == "prompts" else "left", no_wrap=True)
    for decoding, families in results.items():
        for result in families:
            table.add_row(
                decoding,
                result.family,
                str(result.num_prompts),
                _interval(result.before),
                _interval(result.after),
                _interval(result.difference, sign="+") + (" *" if result.improved else ""),
            )
    console = Console(file=io.StringIO(), width=120)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    lines = [line.rstrip() for line in console.file.getvalue().splitlines() if line.strip()]
    note = "Brackets: 95 % intervals (Wilson; differences paired by prompt). *: interval above zero."
    return "\n".join([*lines, "", note, ""])


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
        keys = sorted({key for row in rows for key in row["data"] if re.fullmatch(pattern, key)})
        if keys:
            panels.append((title, keys))
    if not panels:
        return []
    columns = min(3, len(panels))
    num_rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.9 * num_rows), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(num_rows, columns, squeeze=False).flatten()
    for axes, (title, keys) in zip(grid, panels, strict=False):
        for key in keys:
            points = [(row["step"], row["data"][key]) for row in rows if key in row["data"]]
            axes.plot(*zip(*points, strict=True), marker=".", label=key)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if len(keys) > 1:
            axes.legend(fontsize=6)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    figure.savefig(path, dpi=120)
    return [title for title, _ in panels]


def _of(records: Iterable[AnswerRecord], decoding: str) -> list[AnswerRecord]:
    return [record for record in records if record.decoding == decoding]


def _interval(estimate: Estimate, sign: str = "") -> str:
    return f"{estimate.value:{sign}.3f} [{estimate.low:{sign}.3f}, {estimate.high:{sign}.3f}]"
