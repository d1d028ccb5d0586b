"""Video-Holmes against worked examples and a transcription of its cascade."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

from keytoken.errors import DataError
from keytoken.scoring.benchmarks import video_holmes
from keytoken.scoring.items import Item

ROW = {
    "video ID": "abc",
    "Question ID": 3,
    "Question Type": "TCI",
    "Question": "Why?",
    "Options": {letter: f"option {letter}" for letter in "ABCDEF"},
    "Answer": "B",
    "Explanation": "",
}


def read(folder: Path, rows: object) -> list[Item]:
    path = folder / "test.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return video_holmes.read([path])


@pytest.fixture
def item(tmp_path: Path) -> Item:
    return read(tmp_path, [ROW])[0]


@pytest.mark.parametrize(
    ("response", "letter", "rule"),
    [
        ("<answer>B</answer>", "B", "tag"),
        ("<answer>A</answer> no <answer>B</answer>", "B", "tag"),  # the last block
        ("<answer>B: because of A</answer>", "B", "tag"),
        ("<answer>B is right, not A </answer>", "B", "tag"),  # the end of a block is stripped
        ("B is right, not A ", "A", "letter"),  # the order of the letters decides, not that of the text
        ("[C]", "C", "letter"),
        ("Because", "B", "letter"),
        ("x", "", "unmatched"),
        ("", "", "unmatched"),
        ("G", "", "unmatched"),
        ("<answer></answer> B", "", "unmatched"),
    ],
)
def test_by_hand(item: Item, response: str, letter: str, rule: str) -> None:
    verdict = video_holmes.score(item, response)
    assert (verdict.extracted, verdict.rule) == (letter, rule)
    assert verdict.score == float(letter == "B")


def test_agrees_with_the_transcription(item: Item) -> None:
    rng = random.Random(0)
    pieces = ["<answer>", "</answer>", *"ABCDEFG", " ", ":", "[", "]", "x", "\n", "."]
    for _ in range(8_000):
        text = "".join(rng.choices(pieces, k=rng.randrange(10)))
        blocks = re.findall(r"<answer>\s*(.*?)\s*</answer>", text, re.DOTALL)
        choice = blocks[-1].strip() if blocks else text
        marked = [letter for letter in "ABCDEF" if re.search(rf"{letter}[ :]|\[{letter}", choice)]
        bare = [letter for letter in "ABCDEF" if letter in choice]
        assert video_holmes.score(item, text).extracted == ([*marked, *bare] or [""])[0], text


def test_the_named_variant_is_not_fooled(item: Item) -> None:
    rule = video_holmes.BENCHMARK.variants["named"]
    assert rule(item, "<answer>B is right, not A</answer>").rule == "unmatched"
    assert rule(item, "<answer>B. option B, not A </answer>").extracted == "B"
    assert rule(item, "Because").score == 0.0


def test_item_and_prompt(item: Item) -> None:
    assert (item.item_id, item.video, item.categories) == ("abc/3", "abc.mp4", {"type": "TCI"})
    assert "The question is: Why?. The options are: A: option A, B: option B," in video_holmes.prompt(item)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"Options": {}}, "Options"),
        ({"Options": {"A": "x", "C": "y"}}, "must be AB"),
        ({"Answer": "G"}, "none of the options"),
        ({"Answer": None}, "no field Answer"),
        ({"Question Type": "XX"}, "none of SR"),
    ],
)
def test_broken_rows(tmp_path: Path, change: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path, [{**ROW, **change}])


def test_the_same_question_twice(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="abc/3"):
        read(tmp_path, [ROW, ROW])
