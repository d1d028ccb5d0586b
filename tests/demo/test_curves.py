import json
from pathlib import Path

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
