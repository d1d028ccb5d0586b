import json
from pathlib import Path

import pytest

from keytoken.demo.report import plot_curves, read_metrics, write_report
from keytoken.demo.run import read_answers
from keytoken.demo.statistics import AnswerRecord
from keytoken.errors import DataError

ROWS = [
    {"step": step, "data": {"critic/score/mean": step / 4, "actor/grad_norm": 1.0, "unrelated": 3}}
    for step in (2, 1, 3)
]


def _records(hits: list[int], decoding: str) -> list[AnswerRecord]:
    return [AnswerRecord(f"p{i}", ("color", "text")[i % 2], hit, decoding) for i, hit in enumerate(hits)]


def test_report_holds_table_numbers_and_curves(tmp_path: Path) -> None:
    before = _records([0] * 30 + [1] * 10, "sampled") + _records([0, 1, 0, 1], "greedy")
    after = _records([1] * 30 + [1] * 10, "sampled") + _records([0, 1, 0, 1], "greedy")
    text = write_report(tmp_path / "run", before, after, ROWS)
    assert (tmp_path / "run" / "table.md").read_text() == text
    row = next(line for line in text.splitlines() if "sampled" in line and "| all" in line)
    assert "0.250 [" in row and "1.000 [" in row and "+0.750 [" in row and row.rstrip(" |").endswith("*")
    greedy = next(line for line in text.splitlines() if "greedy" in line and "| all" in line)
    assert "+0.000 [" in greedy and "*" not in greedy
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["sampled"][-1]["difference"]["value"] == pytest.approx(0.75)
    assert (tmp_path / "run" / "learning_curves.png").read_bytes().startswith(b"\x89PNG")


def test_panels_without_data_are_left_out(tmp_path: Path) -> None:
    assert plot_curves(tmp_path / "a.png", ROWS) == ["training reward", "gradient norm"]
    assert plot_curves(tmp_path / "b.png", [{"step": 1, "data": {}}]) == []
    assert not (tmp_path / "b.png").exists()


def test_metrics_of_verls_file_logger_are_read(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert read_metrics(tmp_path / "metrics.jsonl") == ROWS


def test_unpaired_answers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        write_report(tmp_path, _records([1, 0], "sampled"), _records([1], "sampled"), [])


def test_an_answer_may_hold_what_looks_like_the_end_of_a_line(tmp_path: Path) -> None:
    """verl writes answers as they are; str.splitlines() would cut them at these characters."""
    row = {
        "prompt_id": "p",
        "family": "color",
        "acc": 1.0,
        "decoding": "greedy",
        "output": "a\u2028b\x85c\x0bd",
    }
    file = tmp_path / "0.jsonl"
    file.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_answers(file) == [AnswerRecord("p", "color", 1.0, "greedy")]
