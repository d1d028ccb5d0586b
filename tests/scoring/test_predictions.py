"""Every format of prediction files, told apart by what it holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from keytoken.scoring.benchmarks import BENCHMARKS, get_benchmark
from keytoken.scoring.files import PredictionFile
from keytoken.scoring.predictions import read_predictions
from keytoken.scoring.score import score_predictions, tables

QUESTION = {
    "problem_id": 3967,
    "problem": "What elements contribute to the illusion?",
    "data_type": "video",
    "problem_type": "multiple choice",
    "options": ["A. A car.", "B. Music.", "C. A toy.", "D. Colour."],
    "solution": "<answer>A</answer>",
}
MVBENCH = {
    **QUESTION,
    "video": "/MVBench/FunQA_test/test/test_magic/M_Z_30.mp4",
    "original_question_type": "",
}
VIDEOMME = {
    **QUESTION,
    "video": "/videoMME/data/fFjv93ACGo8.mp4",
    "videoID": "fFjv93ACGo8",
    "question_id": "001-1",
    "question": "What elements contribute to the illusion?",
    "answer": "A",
    "duration": "short",
    "domain": "Knowledge",
    "sub_category": "Humanity & History",
    "task_type": "Counting Problem",
}
MMVU = {**QUESTION, "video": "./Evaluation/MMVU/videos/Modern_Physics/6.mp4"}


def read(path: Path, text: str, benchmark: str) -> PredictionFile:
    path.write_text(text, encoding="utf-8")
    return read_predictions(path, get_benchmark(benchmark))


def of_lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("benchmark", "question", "item_id", "video", "categories"),
    [
        (
            "mmvu",
            MMVU,
            "3967",
            "Modern_Physics/6.mp4",
            {"subject": "Modern Physics", "discipline": "Science"},
        ),
        ("mvbench", MVBENCH, "3967", "MVBench/FunQA_test/test/test_magic/M_Z_30.mp4", {}),
        ("videomme", VIDEOMME, "001-1", "fFjv93ACGo8.mp4", {"duration": "short", "domain": "Knowledge"}),
        ("videomme", MMVU, "3967", "Modern_Physics/6.mp4", {}),
        ("videommmu", MMVU, "3967", "Modern_Physics/6.mp4", {}),
    ],
)
def test_outputs_in_video_r1_s_form(
    tmp_path: Path,
    benchmark: str,
    question: dict[str, Any],
    item_id: str,
    video: str,
    categories: dict[str, str],
) -> None:
    """The same question in each of the three ways in which it comes."""
    output = {**question, "output": "<think>x</think><answer>A</answer>", "reward": 1.0}
    lines = {"question": question, "model_output": output["output"], "accuracy_score": 1.0}
    for text, form in (
        (of_lines([lines]), "tw-grpo"),
        (json.dumps([output], indent=2), "video-r1"),
        (json.dumps({"results": [output]}), "video-r1"),
        (json.dumps({"results": [output], "final_acc": [{"mean_acc": 1.0}]}, indent=2), "video-r1"),
    ):
        file = read(tmp_path / "predictions.json", text, benchmark)
        assert file.format == form
        assert file.items is not None
        (item,), (prediction,) = file.items, file.predictions
        assert (item.item_id, item.video, item.answer) == (item_id, video, "A")
        assert item.options == ("A car.", "Music.", "A toy.", "Colour.")
        assert categories.items() <= item.categories.items()
        assert (prediction.item_id, prediction.published_score) == (item_id, 1.0)
        (scores,) = score_predictions(get_benchmark(benchmark), file.items, file.predictions)
        assert scores.answers[0].verdict.score == 1.0
        assert tables(scores)[0].rows[0].items == 1


def test_our_own(tmp_path: Path) -> None:
    head = {"keytoken": "predictions", "version": 1, "benchmark": "mmvu", "model": "runs/x"}
    rows = [
        {"item_id": "1", "response": "A\u2028B", "benchmark": "mmvu"},
        {"item_id": "1", "response": "B", "sample": 1, "decoding": "sampled", "control": "blank"},
        {"item_id": "2", "response": None, "error": "no frames"},
    ]
    file = read(tmp_path / "p.jsonl", of_lines([head, *rows]), "mmvu")
    assert (file.format, file.items, file.header["model"]) == ("keytoken", None, "runs/x")
    assert [(one.item_id, one.response, one.sample, one.control, one.error) for one in file.predictions] == [
        ("1", "A\u2028B", 0, "none", ""),
        ("1", "B", 1, "blank", ""),
        ("2", None, 0, "none", "no frames"),
    ]


@pytest.mark.parametrize("names", [("item_id", "response"), ("id", "prediction"), ("question_id", "output")])
def test_plain_rows(tmp_path: Path, names: tuple[str, str]) -> None:
    """As the official scripts of MMVU write them, among others."""
    rows = [{names[0]: f"validation_{number}", names[1]: "B", "other": 1} for number in range(2)]
    for text in (of_lines(rows), json.dumps(rows), json.dumps(rows, indent=4)):
        file = read(tmp_path / "p.json", text, "mmvu")
        assert (file.format, [one.item_id for one in file.predictions]) == (
            "plain",
            ["validation_0", "validation_1"],
        )


def test_the_names_of_responses_in_tempcompass(tmp_path: Path) -> None:
    for name in ("prediction", "response", "video-llm-prediction"):
        answer = "gt-answer" if name.startswith("video") else "answer"
        row = {"question": "Is it fast?", answer: "yes", name: "Yes"}
        file = read(tmp_path / "p.json", json.dumps({"12.mp4": {"speed": [row]}}), "tempcompass")
        assert (file.format, file.predictions[0].response) == ("tempcompass", "Yes")
        assert file.predictions[0].item_id == "12/yes_no/speed/0"


def test_every_benchmark_is_named_as_it_is_registered() -> None:
    for name, benchmark in BENCHMARKS.items():
        assert benchmark.name == name
        assert benchmark.title and benchmark.source and benchmark.tables
