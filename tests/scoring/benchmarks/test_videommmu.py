"""Video-MMMU against worked examples and a transcription of MMMU's rules."""

from __future__ import annotations

import json
import random
import re
import time
from pathlib import Path

import pytest

from keytoken.errors import DataError
from keytoken.scoring.benchmarks import videommmu
from keytoken.scoring.items import Item

ROW = {
    "id": "dev_Biology_3",
    "question": "Which sugar?",
    "options": ["aldose", "ketose", "glucose from milk", "none"],
    "answer": "B",
    "question_type": "multiple-choice",
}


def read(folder: Path, rows: object) -> list[Item]:
    path = folder / "track.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return videommmu.read([path])


@pytest.fixture
def choice(tmp_path: Path) -> Item:
    return read(tmp_path, {"Adaptation": {"0": ROW}})[0]


@pytest.fixture
def open_item(tmp_path: Path) -> Item:
    row = {**ROW, "options": [], "answer": "242110.62", "question_type": "open"}
    return read(tmp_path, {"Adaptation": {"0": row}})[0]


@pytest.mark.parametrize(
    ("response", "letter", "rule"),
    [
        ("B", "B", "letter"),
        ("B.", "B", "letter"),
        ("(B)", "B", "letter"),
        ("<think>A. or B.</think><answer>B</answer>", "B", "tag"),
        ("A. is wrong, so B. is right", "B", "letter"),
        ("B: ketose, not A: aldose", "A", "letter"),  # the last one counts
        ("A. aldose; B: ketose", "A", "letter"),  # a full stop wins over a colon
        ("(A) or (B) or (A)", "A", "letter"),
        ("I take B here", "B", "letter"),
        ("it is a kind of sugar called Ketose", "B", "option text"),
        ("aldose first and later on ketose maybe", "B", "option text"),
        ("ketose", "", "unmatched"),  # five words or fewer
        ("", "", "unmatched"),
        ("b", "", "unmatched"),
        ("E", "", "unmatched"),
    ],
)
def test_letters_by_hand(choice: Item, response: str, letter: str, rule: str) -> None:
    verdict = videommmu.score(choice, response)
    assert (verdict.extracted, verdict.rule) == (letter, rule)
    assert verdict.score == float(letter == "B")


def transcribed_choice(response: str, options: list[str]) -> str:
    """MMMU's steps one after the other, as they are described in the module."""
    for mark in [",", ".", "!", "?", ";", ":", "'"]:
        response = response.strip(mark)
    response = " " + response + " "
    letters = [chr(65 + number) for number in range(len(options))]
    stop = [letter for letter in letters if letter + "." in response]
    colon = [letter for letter in letters if letter + ":" in response]
    if stop or colon:
        pool, form = stop + colon, "%s." if stop else "%s:"
    elif pool := [letter for letter in letters if "(" + letter + ")" in response]:
        form = "(%s)"
    elif pool := [letter for letter in letters if letter + " " in response]:
        form = " %s "
    elif len(response.split()) > 5:
        text = response.lower()
        pool = [letter for letter, option in zip(letters, options, strict=True) if option.lower() in text]
        if not pool:
            return ""
        return max(pool, key=lambda letter: text.rfind(options[ord(letter) - 65].lower()))
    else:
        return ""
    if len(pool) == 1:
        return pool[0]
    return max(pool, key=lambda letter: response.rfind(form % letter))  # the first of equal ones, as argmax


def test_letters_agree_with_the_transcription() -> None:
    rng = random.Random(0)
    options = ["aldose", "ketose", "blue", "red and blue"]
    pieces = ["A", "B", "C", "D", "E", ".", ":", "(", ")", " ", "\n", "aldose", "Ketose", "red and ", "blue"]
    pieces += ["the ", "is ", "'", "!", ","]
    found = 0
    for _ in range(10_000):
        text = "".join(rng.choices(pieces, k=rng.randrange(14)))
        letter, _ = videommmu.read_choice(text, options)
        assert letter == transcribed_choice(text, options), text
        found += bool(letter)
    assert found > 2_000


@pytest.mark.parametrize(
    ("answer", "response", "right"),
    [
        ("242110.62", "242110.62", True),
        ("242110.62", "The total is 242,110.62", True),
        ("242110.62", "The total is 242,110.62 dollars", False),  # read as 242,110 and 110.62, as officially
        ("242110.62", "The total is 242,110.619", True),  # two decimals
        ("242110.62", "242110.6", False),
        ("4", "So x = 4", True),
        ("4", "x = 4\nCheck: it is 5", False),  # "=" counts in the last line only
        ("4", "Four", False),
        ("0.3", "0.3", True),
        ("0.3", ".3", False),  # full stops are taken off both ends, as officially
        ("1000", "1e3", True),
        ("-5", "The answer is -5.", True),
        ("5", "The answer is -5.", False),
        ("Dolly zoom", "It is called a dolly zoom shot", True),
        ("A", "so the answer is a", True),
        ("['24/7', '3.429']", "3.429", False),  # the list is one text, as officially
        ("4", "", False),
        ("4", "<think>5</think><answer>4</answer>", True),
        ("4", "nan", False),
    ],
)
def test_open_answers_by_hand(tmp_path: Path, answer: str, response: str, right: bool) -> None:
    row = {**ROW, "options": [], "answer": answer, "question_type": "open"}
    item = read(tmp_path, {"Adaptation": {"0": row}})[0]
    verdict = videommmu.score(item, response)
    assert verdict.score == float(right), verdict


def transcribed_open(response: str, gold: str) -> bool:
    """MMMU's steps for open answers, with its own regular expressions."""

    def normal(said: str) -> list[float | str]:
        said = said.strip()
        try:
            return [round(float(said.replace(",", "")), 2)]
        except ValueError:
            said = said.lower()
            return [" " + said, said + " "] if len(said) == 1 else [said]

    marks = [
        "could be ",
        "so ",
        "is ",
        "thus ",
        "therefore ",
        "final ",
        "answer ",
        "result ",
        "are ",
        "in total ",
        "total ",
        "identify ",
    ]
    marks += ["recognize ", "calculated as ", "counted as ", "measured as ", "observed as ", "concluded as "]
    marks += [
        "found to be ",
        "equals ",
        "determined to be ",
        "number of ",
        "value is ",
        "adds up to ",
        "have ",
        "has ",
    ]
    marks = [mark if mark.endswith(" ") else mark + " " for mark in marks]
    text = response.strip().strip(".").lower()
    lines = re.split(r"\.\s(?=[A-Z])|\n", text)
    keys = []
    for line in lines:
        if line is lines[-1]:
            marks.append("=")
        short = None
        for mark in marks:
            if mark in line:
                end = line.split(mark)[-1].strip()
                if not short or len(end) < len(short):
                    short = end
        if short and short not in [":", ",", ".", "!", "?", ";", "'"]:
            keys.append(short)
    keys = keys or [text]
    said = list(keys)
    for key in keys:
        said += re.findall(r"-?\b\d{1,3}(?:,\d{3})+\b", key)
        said += re.findall(r"-?\d+(?:\.\d+)?[eE][+-]?\d+", key)
        said += re.findall(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])", key)
    truths = normal(gold)
    for value in [value for one in said for value in normal(one)]:
        if isinstance(value, str):
            if any(isinstance(truth, str) and truth in value for truth in truths):
                return True
        elif value in truths:
            return True
    return False


def test_open_answers_agree_with_the_transcription(open_item: Item) -> None:
    rng = random.Random(1)
    pieces = ["is ", "the ", "so ", "= ", "=", "4", "12", ".5", "1,234", "2e3", "-", " ", "\n", ". ", "The "]
    pieces += ["total ", "blue", "A", "equals ", "number of ", "$", ",", ":"]
    right = 0
    for _ in range(2_000):
        text = "".join(rng.choices(pieces, k=rng.randrange(1, 12))).strip()
        for gold in ("4", "0.5", "1234", "blue", "a"):
            item = Item(**{name: getattr(open_item, name) for name in open_item.__slots__} | {"answer": gold})
            expected = transcribed_open(text, gold) if text else False
            assert bool(videommmu.score(item, text).score) == expected, (text, gold)
            right += expected
    assert right > 300


@pytest.mark.parametrize("piece", ["1", "is ", "is 1,111", "=\n", "A.", "(", "1e", "ketose"])
def test_time_is_bounded(choice: Item, open_item: Item, piece: str) -> None:
    text = piece * (1_000_000 // len(piece))
    started = time.process_time()
    videommmu.score(choice, text), videommmu.score(open_item, text)
    assert time.process_time() - started < 20.0


def test_prompts(tmp_path: Path) -> None:
    rows = {"0": ROW}
    seen = [read(tmp_path, {track: rows})[0] for track in ("Perception", "Adaptation")]
    assert videommmu.prompt(seen[0]).endswith(
        "D. none\nPlease directly output the option letter/data as the answer."
    )
    assert (
        "The image for this question is at the end of the video.\nWhich sugar?\nA. aldose"
        in videommmu.prompt(seen[1])
    )
    lettered = {**ROW, "options": ["A. x", "B. y"]}
    assert "\nA. x\nB. y\n" in videommmu.prompt(read(tmp_path, {"Perception": {"0": lettered}})[0])


def test_knowledge_gain() -> None:
    assert videommmu.knowledge_gain(0.4, 0.55) == pytest.approx(0.25)
    assert videommmu.knowledge_gain(0.4, 0.1) == pytest.approx(-0.5)
    assert videommmu.knowledge_gain(1.0, 1.0) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": "E"}, "none of the 4 options"),
        ({"options": []}, "without options"),
        ({"options": "aldose"}, "must be a list of texts"),
        ({"id": "dev_Astrology_3"}, "none of the 30"),
        ({"question": ""}, "question"),
    ],
)
def test_broken_rows(tmp_path: Path, change: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path, {"Adaptation": {"0": {**ROW, **change}}})


def test_an_unknown_track(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Perception, Comprehension, Adaptation"):
        read(tmp_path, {"Adaption": {"0": ROW}})
