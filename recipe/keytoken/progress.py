"""A progress bar for a run, fed from the metrics file that the run writes.

The training loop runs in another process, possibly on another host; its metrics file is the one thing
that shows progress wherever the loop is. Nothing here can disturb the run.
"""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

POLL_S = 0.5
# What stands behind the bar: a short name and verl's or KeyToken's metric.
SHOWN = (
    ("reward", "critic/score/mean"),
    ("selected", "attribution/selected_share"),
    ("entropy", "actor/entropy"),
    ("s/step", "timing_s/step"),
)


@contextmanager
def progress_bar(metrics_file: Path, total_steps: int | None) -> Iterator[None]:
    """Show a bar while the block runs, moving with each step found in ``metrics_file``."""
    done = threading.Event()
    follower = threading.Thread(target=_follow, args=(metrics_file, total_steps, done), daemon=True)
    follower.start()
    try:
        yield
    finally:
        done.set()
        follower.join(timeout=5)


def _follow(metrics_file: Path, total_steps: int | None, done: threading.Event) -> None:
    with tqdm(total=total_steps, desc="starting the pools", unit="step", dynamic_ncols=True) as bar:
        num_read = 0
        while True:
            finished = done.wait(POLL_S)
            text = metrics_file.read_text() if metrics_file.exists() else ""
            lines = text[: text.rfind("\n") + 1].splitlines()  # a line without its end is still being written
            if lines and not num_read:
                bar.reset(total=total_steps)  # the start does not count into the time of a step
            for line in lines[num_read:]:
                _show(bar, json.loads(line))
            num_read = len(lines)
            if finished:
                return


def _show(bar: tqdm, row: dict[str, Any]) -> None:
    step, metrics = int(row["step"]), row["data"]
    accuracies = _accuracies(metrics)
    if accuracies:
        bar.write(f"step {step}: held-out accuracy " + ", ".join(accuracies))
    if "timing_s/step" in metrics:
        bar.set_description_str("training")
        bar.set_postfix_str(", ".join(f"{name} {metrics[key]:.3g}" for name, key in SHOWN if key in metrics))
        bar.update(max(step - bar.n, 0))


def _accuracies(metrics: dict[str, float]) -> list[str]:
    """``demo_sampled .52`` for ``val-core/demo_sampled/acc/mean@4``."""
    return [
        f"{name.split('/')[1]} {value:.3f}"
        for name, value in metrics.items()
        if name.startswith("val-core/") and "/mean@" in name
    ]
