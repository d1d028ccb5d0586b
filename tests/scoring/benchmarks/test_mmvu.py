"""MMVU's letters by hand, by both rules, and its broken rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from keytoken.errors import DataError
from keytoken.scoring.benchmarks import mmvu
from keytoken.scoring.items import Item

ROW = {
    "id": "validation_1",
    "video": "https://example.org/resolve/main/videos/Art/0.mp4",
    "question_type": "multiple-choice",
    "metadata": {"subject": "Art"},
    "question": "Which?",
    "choices": {"A": "red", "B": "blue", "C": "green", "D": "black", "E": "white"},
    "answer": "B",
}
VIDEO_R1 = {
    "problem_id": 7,
    "problem": "Which?",
    "problem_type": "multiple choice",
    "options": ["A. red", "B. blue"],
    "solution": "<answer>B</answer>",
    "video": "/MMVU/videos/Civil_Engineering/3.mp4",
}


def read(folder: Path, rows: object) -> list[Item]:
    path = folder / "questions.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return mmvu.read([path])


@pytest.mark.parametrize(
    ("response", "read_as", "exactly"),
    [
        ("B", "B", "B"),
        ("<answer>B</answer>", "B", "B"),
        ("<answer>A</answer><answer>B</answer>", "A", "A"),
        ("<answer>B. blue</answer>", "B", ""),
        ("<answer>(B)</answer>", "B", ""),
        ("<answer>blue</answer>", "B", ""),
        ("<answer>F</answer>", "", "F"),
        ("<answer></answer>", "", ""),
        ("So the answer: B", "B", "B"),
        ("Therefore, the final answer is: B", "B", ""),
        ("<think>A</think>\n\\boxed{B}", "B", ""),
        ("I do not know", "", ""),
        ("", "", ""),
    ],
)
def test_letters(tmp_path: Path, response: str, read_as: str, exactly: str) -> None:
    (item,) = read(tmp_path, [ROW])
    for rule, letter in ((mmvu.score, read_as), (mmvu.score_exact, exactly)):
        verdict = rule(item, response)
        assert (verdict.extracted, verdict.score) == (letter, float(letter == "B"))
        assert (verdict.rule == "unmatched") == (not letter)


def test_open_questions_wait_for_a_judge(tmp_path: Path) -> None:
    (item,) = read(tmp_path, [{**ROW, "question_type": "open-ended", "answer": "Dolly zoom"}])
    assert item.options == ()
    for rule in (mmvu.score, mmvu.score_exact):
        verdict = rule(item, "<answer>Dolly zoom</answer>")
        assert (verdict.score, verdict.extracted) == (None, "Dolly zoom")


def test_both_forms(tmp_path: Path) -> None:
    (official,), (other,) = read(tmp_path, [ROW]), read(tmp_path, [VIDEO_R1])
    assert (official.video, official.categories["discipline"]) == (
        "Art/0.mp4",
        "Humanities and social science",
    )
    assert (other.video, other.options) == ("Civil_Engineering/3.mp4", ("red", "blue"))
    assert (other.item_id, other.categories["subject"]) == ("7", "Civil Engineering")
    assert "\nQuestion: Which?\nA: red\nB: blue\n" in mmvu.prompt(other)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**ROW, "choices": {}}, "needs two or more"),
        ({**ROW, "choices": None}, "needs two or more"),
        ({**ROW, "choices": {"A": "red", "C": "blue"}}, "must be AB"),
        ({**ROW, "answer": "F"}, "none of the 5"),
        ({**ROW, "answer": ""}, "answer"),
        ({**ROW, "metadata": None}, "metadata"),
        ({**ROW, "metadata": {"subject": "Cooking"}}, "none of the 27"),
        ({**ROW, "question_type": "essay"}, "none of multiple-choice"),
        ({**VIDEO_R1, "options": []}, "two or more"),
        ({**VIDEO_R1, "solution": "<answer>C</answer>"}, "none of the 2 options"),
        ({**VIDEO_R1, "problem_type": "riddle"}, "riddle"),
    ],
)
def test_broken_rows(tmp_path: Path, row: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path, [row])
