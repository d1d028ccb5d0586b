"""What an evaluation depends on, and its reports."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from keytoken.data.contract import SamplingContract
from keytoken.errors import ConfigurationError
from keytoken.evaluation.options import EvaluateOptions
from keytoken.evaluation.report import CONTROL_FILE, write_reports
from keytoken.evaluation.run import evaluate, longest_prompt, model_digest
from keytoken.scoring.benchmarks import get_benchmark
from keytoken.scoring.items import Item, Prediction

HEADER = {
    "model": "m",
    "model_digest": "0123",
    "sampling": {"fps": 2.0},
    "prompt": "official",
    "decoding": {"seed": 0},
}


def test_digest_tells_models_apart(tmp_path: Path) -> None:
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    weights.write_bytes(b"0123")
    config.write_text("{}")
    (tmp_path / "notes.txt").write_text("x")
    os.utime(weights, ns=(1, 1))
    seen = [model_digest(tmp_path)]
    (tmp_path / "notes.txt").write_text("another text")
    assert model_digest(tmp_path) == seen[0]  # no part of the model
    os.utime(weights, ns=(1, 2))
    seen.append(model_digest(tmp_path))
    weights.write_bytes(b"01234")
    os.utime(weights, ns=(1, 2))
    seen.append(model_digest(tmp_path))
    config.write_text("{ }")
    seen.append(model_digest(tmp_path))
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    seen.append(model_digest(tmp_path))
    assert len(set(seen)) == 5


def test_longest_prompt_holds_every_frame() -> None:
    """64 frames in 32 pairs of 256 tokens each, and the words."""
    assert longest_prompt(SamplingContract.preset("eval_64f")) == 32 * 256 + 2048
    assert longest_prompt(SamplingContract.preset("demo")) == 4 * 4 + 2048


def test_lost_model_is_said_first(tmp_path: Path) -> None:
    options = EvaluateOptions(benchmark="demo", model=str(tmp_path / "gone"))
    with pytest.raises(ConfigurationError, match=r"model=.*gone: no such folder"):
        evaluate(options, lambda _: None)


def test_reports_of_every_control(tmp_path: Path) -> None:
    items = [
        Item(
            benchmark="demo",
            item_id=f"i{number}",
            question="q",
            answer="A",
            kind="multiple choice",
            video=f"{number}.mp4",
            categories={"family": "motion"},
        )
        for number in range(6)
    ]
    hits = {"none": 6, "text": 2}
    predictions = [
        Prediction(item_id=f"i{n}", response=f"<answer>{'A' if n < right else 'B'}</answer>", control=control)
        for control, right in reversed(hits.items())
        for n in range(6)
    ]
    extra = Prediction(item_id="i77", response="<answer>A</answer>")
    text = write_reports(tmp_path, get_benchmark("demo"), items, [*predictions, extra], HEADER)
    assert text == (tmp_path / "report.md").read_text()
    assert text.index("Control none") < text.index("Control text") < text.index("Does it still answer?")
    assert "1 answer to another question is in the file" in text
    assert "m (0123)" in text
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert [run["tables"]["all"][0]["score"]["value"] for run in runs] == [1.0, pytest.approx(1 / 3)]
    controls = json.loads((tmp_path / CONTROL_FILE).read_text())
    assert controls[1]["difference"]["value"] == pytest.approx(-2 / 3)


def test_one_control_is_not_compared(tmp_path: Path) -> None:
    item = Item(
        benchmark="demo", item_id="a", question="q", answer="A", kind="multiple choice", video="a.mp4"
    )
    answer = Prediction(item_id="a", response=None, error="ClipError: gone")
    text = write_reports(tmp_path, get_benchmark("demo"), [item], [answer], HEADER)
    assert "Does it still answer?" not in text
    assert "ClipError: gone" in text  # failed samples are listed
    assert "Prompt: official" in text
    text = write_reports(tmp_path, get_benchmark("own"), [item], [answer], {**HEADER, "benchmark": "own"})
    assert "Prompt: as prepared" in text
