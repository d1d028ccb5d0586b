import json
from pathlib import Path
from typing import Any

import pytest

from keytoken.demo.curves import plot_curves, read_metrics

ROWS = [
    {"step": step, "data": {"critic/score/mean": step / 4, "actor/grad_norm": 1.0, "unrelated": 3}}
    for step in (2, 1, 3)
]


def test_panels_without_data_are_left_out(tmp_path: Path) -> None:
    assert plot_curves(tmp_path / "a.png", ROWS) == ["training reward", "gradient norm"]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert plot_curves(tmp_path / "b.png", [{"step": 1, "data": {}}]) == []
    assert not (tmp_path / "b.png").exists()


def test_metrics_of_verls_file_logger_are_read(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert read_metrics(tmp_path / "metrics.jsonl") == ROWS


def test_lines_are_named_in_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from matplotlib.axes import Axes

    plot, labels = Axes.plot, []

    def watch(self: Axes, *values: Any, label: str, **style: Any) -> Any:
        labels.append(label)
        return plot(self, *values, label=label, **style)

    monkeypatch.setattr(Axes, "plot", watch)
    names = [f"val-{part}/acc/mean@1" for part in ("core/demo_greedy_blank", "core/demo_greedy", "aux/mmvu")]
    shares = ["attribution/selected_share", "attribution/visual/selected_share"]
    plot_curves(tmp_path / "a.png", [{"step": 1, "data": dict.fromkeys([*names, *shares], 0.5)}])
    assert labels == ["mmvu", "greedy", "greedy blank", "all", "visual"]
