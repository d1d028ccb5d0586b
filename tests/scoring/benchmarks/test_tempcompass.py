"""TempCompass's four tasks against worked examples and transcriptions of the official rules."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from keytoken.errors import DataError
from keytoken.scoring.benchmarks import tempcompass
from keytoken.scoring.items import Item

CHOICE = {"question": "What is he doing?\nA. running\nB. walking\nC. sitting", "answer": "B. walking"}
YES_NO = {"question": "Is he walking?", "answer": "yes"}
CAPTION = {
    "question": "Which caption matches the video better?\nCaption A: A man runs.\nCaption B: A man walks.",
    "answer": "Caption B: A man walks.",
}
CAPTIONING = {
    "question": "Describe it.\nInformation A: {'action': 'running'}\nGenerated Caption:",
    "answer": "A. running",
}


def read(folder: Path, *rows: object, aspect: str = "action") -> list[Item]:
    path = folder / "questions.json"
    path.write_text(json.dumps({"123": {aspect: list(rows)}}), encoding="utf-8")
    return tempcompass.read([path])


def verdict(folder: Path, row: object, response: str) -> tuple[float | None, str, str]:
    found = tempcompass.score(read(folder, row)[0], response)
    return found.score, found.extracted, found.rule


@pytest.mark.parametrize(
    ("response", "score", "extracted"),
    [
        ("B. walking", 1.0, "B"),
        ("B", 1.0, "B"),
        ("A", 0.0, "A"),
        ("D", 0.0, "D"),
        ("B.", 1.0, "B"),
        ("B) walking", 1.0, "B"),
        ("A. B. walking", 0.0, "A"),
        ("B</s>", 1.0, "B"),
        ("<think>A.</think><answer>B</answer>", 1.0, "B"),
        ("**B. walking**", None, ""),
        ("b", None, ""),
        ("B: walking", None, ""),
        ("(B)", None, ""),
        ("walking", None, ""),
        (" B", None, ""),
        ("E", None, ""),
        ("", None, ""),
    ],
)
def test_multiple_choice(tmp_path: Path, response: str, score: float | None, extracted: str) -> None:
    found = verdict(tmp_path, CHOICE, response)
    assert found[:2] == (score, extracted)
    assert (found[2] == "unmatched") == (score is None)


@pytest.mark.parametrize(
    ("response", "score"),
    [("yes", 1.0), ("Yes, he is", 1.0), ("YES", 1.0), ("no", 0.0), ("Nothing", 0.0), ("He is", None)],
)
def test_yes_no(tmp_path: Path, response: str, score: float | None) -> None:
    assert verdict(tmp_path, YES_NO, response)[0] == score


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("Caption B: A man walks.", 1.0),
        ("Caption B", 1.0),
        ("Caption B.", 1.0),
        ("A man walks.", 1.0),
        ("b) A man walks.", 1.0),
        ("Caption A", 0.0),
        ("A man runs.", 0.0),
        ("B", None),
        ("A man walks", None),
        ("caption b", None),
        ("Caption B: A man runs.", None),
    ],
)
def test_caption_matching(tmp_path: Path, response: str, score: float | None) -> None:
    assert verdict(tmp_path, CAPTION, response)[0] == score


def test_captioning_needs_a_judge(tmp_path: Path) -> None:
    assert verdict(tmp_path, CAPTIONING, "A man runs.") == (None, "A man runs.", "caption")


def transcribed(row: dict[str, str], said: str) -> int | None:
    """The official rules of multiple choice and caption matching, in this order of tests."""
    said = said.replace("</s>", "")
    if row is CHOICE:
        if said == row["answer"]:
            return 1
        if said in ["A", "B", "C", "D"]:
            return int(said == row["answer"][0])
        for mark in ".)":
            if any(said.startswith(letter + mark) for letter in "ABCD"):
                return int(said.split(mark)[0] == row["answer"][0])
        return None
    lines = row["question"].split("\n")[1:]
    chosen = None
    for line in lines:
        chosen = line if line == said else chosen
    for line in lines:
        sentence = line.split(": ")[1]
        if sentence == said or (") " in said and sentence == said.split(") ")[1]):
            chosen = sentence
    for line in lines:
        chosen = line.split(": ")[0] if line.split(": ")[0] in (said, said.replace(".", "")) else chosen
    if chosen is None:
        return None
    return int(chosen in (row["answer"], row["answer"].split(":")[0], row["answer"].split(": ")[1]))


@pytest.mark.parametrize("row", [CHOICE, CAPTION], ids=["multi-choice", "caption matching"])
def test_agrees_with_the_transcription(tmp_path: Path, row: dict[str, str]) -> None:
    item = read(tmp_path, row)[0]
    rng = random.Random(0)
    pieces = ["A", "B", "C", ".", ")", " ", "</s>", "walking", "Caption A", "Caption B", ": ", "A man walks."]
    pieces += ["A man runs.", "b) ", "B. walking"]
    decided = 0
    for _ in range(8_000):
        text = "".join(rng.choices(pieces, k=rng.randrange(5)))
        assert tempcompass.score(item, text).score == transcribed(row, text), text
        decided += transcribed(row, text) is not None
    assert decided > 500


def test_items_and_prompts(tmp_path: Path) -> None:
    items = read(tmp_path, CHOICE, YES_NO, CAPTION, CAPTIONING)
    assert [item.item_id for item in items] == [
        "123/multi-choice/action/0",
        "123/yes_no/action/1",
        "123/caption_matching/action/2",
        "123/captioning/action/3",
    ]
    assert tempcompass.prompt(items[0]) == f"{CHOICE['question']}\nPlease directly give the best option:"
    assert tempcompass.prompt(items[1]) == "Is he walking?\nPlease answer yes or no:"
    assert tempcompass.prompt(items[2]).startswith(CAPTION["question"])
    assert tempcompass.prompt(items[3]) == CAPTIONING["question"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "What?", "answer": "B. walking"}, "no options"),
        ({**CHOICE, "answer": "D. flying"}, "none of the options"),
        ({**CHOICE, "answer": "maybe"}, "form of none"),
        ({**CAPTION, "answer": "Caption B: A man flies."}, "none of the captions"),
        ({"question": "What?"}, "no field answer"),
        ("text", "must be an object"),
    ],
)
def test_broken_rows(tmp_path: Path, row: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path, row)


def test_an_unknown_aspect(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="sped"):
        read(tmp_path, YES_NO, aspect="sped")
