"""The bar shows what the metrics file says, and never more."""

import io
import json
from pathlib import Path

from tqdm import tqdm

from keytoken import progress


def row(step: int, **metrics: float) -> dict:
    return {"step": step, "data": metrics}


def test_a_training_step_moves_the_bar_to_its_number():
    with tqdm(total=10, file=io.StringIO()) as bar:
        progress._show(bar, row(3, **{"timing_s/step": 2.0, "critic/score/mean": 1.25}))
        assert bar.n == 3
        assert "reward 1.25" in bar.postfix and "s/step 2" in bar.postfix
        progress._show(bar, row(3, **{"timing_s/step": 2.0}))
        assert bar.n == 3


def test_an_evaluation_is_a_line_of_its_own(capsys):
    with tqdm(total=10, file=io.StringIO()) as bar:
        progress._show(bar, row(0, **{"val-core/demo_greedy/acc/mean@1": 0.5, "val-aux/x/acc/mean@1": 0.1}))
        assert bar.n == 0
    assert "step 0: held-out accuracy demo_greedy 0.500" in capsys.readouterr().out


def test_it_follows_a_file_that_appears_later(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "POLL_S", 0.01)
    metrics = tmp_path / "metrics.jsonl"
    with progress.progress_bar(metrics, 2):
        lines = [json.dumps(row(step, **{"timing_s/step": 1.0})) for step in (1, 2)]
        metrics.write_text("\n".join(lines) + "\n")
    assert "2/2" in capsys.readouterr().err
