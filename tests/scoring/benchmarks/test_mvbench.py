"""MVBench against worked examples and a transcription of its rule."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from keytoken.errors import DataError
from keytoken.scoring.benchmarks import mvbench
from keytoken.scoring.items import Item

ROW = {
    "video": "ZS9XR.mp4",
    "question": "What happened after the person took the food?",
    "candidates": ["Ate the medicine.", "Tidied up the blanket.", "Put down the cup.", "Took the box."],
    "answer": "Tidied up the blanket.",
    "start": 11.1,
    "end": 19.6,
}


def write(folder: Path, task: str, rows: list[object]) -> Path:
    path = folder / f"{task}.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


@pytest.fixture
def item(tmp_path: Path) -> Item:
    return mvbench.read([write(tmp_path, "action_sequence", [ROW])])[0]


def transcribed(pred: str, right: str) -> bool:
    """The rule of the notebook, for a right letter and any text behind it."""
    first, option = pred.lower().split(" ")[0], f"({right})"
    return first.replace(".", "") in option or option in first


@pytest.mark.parametrize(
    ("response", "score", "extracted"),
    [
        ("B", 1.0, "B"),
        ("b", 1.0, "B"),
        ("B.", 1.0, "B"),
        ("B. Tidied up the blanket.", 1.0, "B"),
        ("(B) Tidied up the blanket.", 1.0, "B"),
        ("B) Tidied up", 1.0, "B"),
        ("B)Tidied up", 1.0, "B"),
        ("(B):Tidied", 1.0, "B"),
        ("\n (B)\nbecause", 1.0, "B"),
        ("A", 0.0, "A"),
        ("(D) Took the box.", 0.0, "D"),
        ("B: Tidied", 0.0, ""),
        ("B, Tidied", 0.0, ""),
        ("Answer: (B)", 0.0, ""),
        ("Tidied up the blanket.", 0.0, ""),
        ("E", 0.0, ""),
        ("", 0.0, ""),
        ("(", 0.0, ""),
        ("...", 0.0, ""),
        ("<think>A or B</think>\n<answer>(B)</answer>", 1.0, "B"),
        ("<think>A or B</think> B", 1.0, "B"),
        ("(" * 1_000_000, 0.0, ""),
    ],
)
def test_answers_by_hand(item: Item, response: str, score: float, extracted: str) -> None:
    verdict = mvbench.score(item, response)
    assert (verdict.score, verdict.extracted) == (score, extracted)


def test_agrees_with_the_notebook_wherever_a_letter_is_named(item: Item) -> None:
    """All words of up to four of these signs, read as the notebook reads them: behind a bracket, or alone."""
    right = 0
    for length in range(1, 5):
        for signs in itertools.product("aBd().: ", repeat=length):
            response = "".join(signs).strip()
            official = transcribed(response, "b") or transcribed("(" + response, "b")
            if not any(sign.isalpha() for sign in response.partition(" ")[0]):
                official = False  # the stated departure
            assert mvbench.score(item, response).score == float(official), response
            right += official
    assert right > 100


def test_every_task_is_read_and_bounded_ones_have_their_span(tmp_path: Path) -> None:
    items = mvbench.read([write(tmp_path, task, [ROW, ROW]) for task in mvbench.TASKS])
    assert len(items) == 40
    assert items[0].item_id == "action_sequence/0"
    assert items[1].item_id == "action_sequence/1"
    assert items[0].video == "star/Charades_v1_480/ZS9XR.mp4"
    assert items[0].answer == "B"
    assert {one.task for one in items if one.span == (11.1, 19.6)} == mvbench.BOUNDED
    assert {one.task for one in items if one.span is None} == set(mvbench.TASKS) - mvbench.BOUNDED
    assert len({one.categories["task"] for one in items}) == 20


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        pytest.param("action_sequenze", {}, "Did you mean 'action_sequence'", id="unknown task"),
        pytest.param("action_count", {"answer": "Ran."}, "'Ran.' is none of the candidates", id="answer"),
        pytest.param("action_count", {"candidates": []}, "two or more texts", id="no candidates"),
        pytest.param("action_count", {"candidates": "AB"}, "two or more texts", id="candidates no list"),
        pytest.param("action_sequence", {"start": 20}, "from start 20 to end 19.6", id="span"),
        pytest.param("action_sequence", {"end": None}, "to end None", id="span open"),
    ],
)
def test_rows_that_cannot_be_scored_are_refused(
    tmp_path: Path, task: str, changes: dict[str, object], message: str
) -> None:
    path = write(tmp_path, task, [ROW | changes])
    with pytest.raises(DataError, match=message) as raised:
        mvbench.read([path])
    assert str(path) in str(raised.value)


def test_the_prompt_is_that_of_the_notebook(item: Item) -> None:
    """The lines that the notebook's own output shows for this question."""
    assert mvbench.prompt(item).split("\n")[1:] == [
        "Question: What happened after the person took the food?",
        "Options:",
        "(A) Ate the medicine.",
        "(B) Tidied up the blanket.",
        "(C) Put down the cup.",
        "(D) Took the box.",
        "Only give the best option.",
    ]
