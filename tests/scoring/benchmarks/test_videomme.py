"""Video-MME against worked examples: its rule, its two formats of questions, its subtitles."""

from __future__ import annotations

import itertools
import json
import random
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from keytoken.errors import DataError
from keytoken.scoring.benchmarks import get_benchmark, videomme
from keytoken.scoring.items import Item
from keytoken.scoring.predictions import read_predictions
from keytoken.scoring.score import score_predictions, tables

OPTIONS = ["A. Apples.", "B. Candles.", "C. Berries.", "D. The same number."]
FLAT = {
    "video_id": "001",
    "duration": "short",
    "domain": "Knowledge",
    "sub_category": "Humanity & History",
    "url": "https://www.youtube.com/watch?v=fFjv93ACGo8",
    "videoID": "fFjv93ACGo8",
    "question_id": "001-1",
    "task_type": "Counting Problem",
    "question": "Which decoration is there most of?",
    "options": OPTIONS,
    "answer": "C",
}
ONE = {
    "question_id": "001-1",
    "task_type": "Counting Problem",
    "question": "Which decoration is there most of?",
    "choices": OPTIONS,
    "answer": "C",
    "response": "C. Berries.",
}
NESTED = {
    "video_id": "001",
    "duration_category": "short",
    "video_category": "Knowledge",
    "video_subcategory": "Humanity & History",
    "questions": [ONE, ONE | {"question_id": "001-2"}, ONE | {"question_id": "001-3"}],
}


def write(folder: Path, rows: list[object]) -> Path:
    path = folder / "questions.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


@pytest.fixture
def item(tmp_path: Path) -> Item:
    return videomme.read([write(tmp_path, [FLAT])])[0]


def transcribed(response: str) -> str:
    """The script's extraction once more, with its strings as Python joins them."""
    response = response.strip()
    for phrase in [
        "The best answer is",
        "The correct answer is",
        "The answer is",
        "The answer",
        "The best option is" + "The correct option is",
        "Best answer:" + "Best option:",
    ]:
        response = response.replace(phrase, "")
    found = re.search("[ABCD]", response)
    return found[0] if found else ""


@pytest.mark.parametrize(
    ("response", "score", "extracted"),
    [
        ("C", 1.0, "C"),
        ("C. Berries.", 1.0, "C"),
        ("(C)", 1.0, "C"),
        ("The best answer is C", 1.0, "C"),
        ("The best answer is: D", 0.0, "D"),
        ("The best option is C", 1.0, "C"),
        ("Answer: C. Berries.", 0.0, "A"),  # its own capital, as officially
        ("Best answer: C", 0.0, "B"),
        ("c", None, ""),
        ("berries", None, ""),
        ("", None, ""),
        ("E", None, ""),
        ("<think>A or D? Candles.</think><answer>C</answer>", 1.0, "C"),
        ("<think>A or D? Candles.</think>\nC", 1.0, "C"),
        ("The answer" * 100_000, None, ""),
        ("The answer" * 100_000 + " C", 1.0, "C"),
    ],
)
def test_answers_by_hand(item: Item, response: str, score: float | None, extracted: str) -> None:
    verdict = videomme.score(item, response)
    assert (verdict.score, verdict.extracted) == (score, extracted)


def test_an_unmatched_answer_does_not_count_but_is_wrong_by_the_variant(item: Item) -> None:
    assert videomme.score(item, "berries").score is None
    variant = get_benchmark("videomme").variants["unmatched_wrong"]
    assert variant(item, "berries").score == 0.0
    assert variant(item, "berries").rule == "unmatched"
    assert variant(item, "C").score == 1.0


def test_agrees_with_a_transcription_on_random_responses(item: Item) -> None:
    pieces = ["The best answer is", "The answer", "Best answer:", "Best option:", "The best option is", " is"]
    pieces += ["The correct option is", " ", "C", "D", "a", "(", ".", "x y z", "The correct answer is"]
    random.seed(0)
    read = 0
    for _ in range(20_000):
        response = "".join(random.choices(pieces, k=random.randint(0, 6)))
        official = transcribed(response)
        verdict = videomme.score(item, response)
        assert verdict.extracted == official, response
        assert verdict.score == (None if not official else float(official == "C"))
        read += bool(official)
    assert 1_000 < read < 19_000


def test_both_formats_hold_the_same_question(tmp_path: Path, item: Item) -> None:
    table = tmp_path / "test.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([FLAT, FLAT | {"question_id": "001-2"}]), table)
    flat = videomme.read([table])
    nested = videomme.read([write(tmp_path, [NESTED])])
    assert [one.item_id for one in nested] == ["001-1", "001-2", "001-3"]
    assert flat[0] == item
    assert flat[0].video == "fFjv93ACGo8.mp4"
    assert nested[0].video == "001.mp4"
    for one in (flat[0], nested[0]):
        assert one.options == ("Apples.", "Candles.", "Berries.", "The same number.")
        assert one.categories == {
            "duration": "short",
            "domain": "Knowledge",
            "sub_category": "Humanity & History",
            "task_type": "Counting Problem",
        }


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        pytest.param([FLAT | {"answer": "E"}], "the answer 'E'", id="letter beyond options"),
        pytest.param([FLAT | {"options": OPTIONS[:3]}], "3 options", id="three options"),
        pytest.param([FLAT | {"options": None}], "no field options or choices", id="no options"),
        pytest.param([FLAT | {"duration": "tiny"}], "duration 'tiny'", id="duration"),
        pytest.param([NESTED | {"questions": {}}], "must be a list of objects", id="questions no list"),
        pytest.param([NESTED, NESTED], "has the id '001-1'", id="given twice"),
        pytest.param(["text"], "every row must be an object", id="row no object"),
        pytest.param([], "holds no rows", id="empty"),
    ],
)
def test_rows_that_cannot_be_scored_are_refused(tmp_path: Path, rows: list[object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        videomme.read([write(tmp_path, rows)])


SRT = """1
00:00:01,000 --> 00:00:03,500
<font color="white" size=".72c">Hi guys,</font>

2
00:00:03,500 --> 00:01:00,000
<font color="white" size=".72c">this is</font>
a wreath.

3
01:00:00.250 --> 01:00:02.000
Bye.
"""


def test_subtitles_at_the_times_of_the_frames(tmp_path: Path, item: Item) -> None:
    path = tmp_path / "001.srt"
    path.write_text(SRT, encoding="utf-8-sig", newline="\r\n")
    subtitles = videomme.read_subtitles(path)
    assert [(one.start, one.end, one.text) for one in subtitles] == [
        (1.0, 3.5, "Hi guys,"),
        (3.5, 60.0, "this is a wreath."),
        (3600.25, 3602.0, "Bye."),
    ]
    assert videomme.at_times(subtitles, [0.0, 5.0, 6.0, 100.0]) == ["this is a wreath."]
    assert videomme.at_times(subtitles, [3.5]) == ["this is a wreath."]  # the end of an entry is not its own
    assert videomme.at_times(subtitles, [3601.0, 1.0]) == ["Hi guys,", "Bye."]
    plain = videomme.prompt(item).split("\n")
    with_speech = videomme.prompt(item, videomme.at_times(subtitles, [2.0])).split("\n")
    assert with_speech == ["This video's subtitles are listed below:", "Hi guys,", *plain]
    assert plain[1:] == ["Which decoration is there most of?", *OPTIONS, "The best answer is:"]


def test_subtitles_without_times_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "001.srt"
    path.write_text("1\nsoon\nHi\n", encoding="utf-8")
    with pytest.raises(DataError, match="entry 1: 'soon' must be two times"):
        videomme.read_subtitles(path)
    with pytest.raises(DataError, match="No such file"):
        videomme.read_subtitles(tmp_path / "none.srt")


def test_hostile_subtitles_take_linear_time(tmp_path: Path) -> None:
    path = tmp_path / "001.srt"
    path.write_text("1\n00:00:01,000 --> 00:00:02,000\n" + "<" * 1_000_000, encoding="utf-8")
    assert len(videomme.read_subtitles(path)[0].text) == 1_000_000


def test_ids_of_all_durations_are_kept_apart(tmp_path: Path) -> None:
    rows = [
        FLAT | {"question_id": f"{video:03d}-{number}", "duration": duration}
        for video, duration in enumerate(videomme.DURATIONS)
        for number in range(3)
    ]
    items = videomme.read([write(tmp_path, rows)])
    assert [one.categories["duration"] for one in items] == list(
        itertools.chain.from_iterable([duration] * 3 for duration in videomme.DURATIONS)
    )


def test_the_template_of_outputs_is_scored_as_it_is(tmp_path: Path) -> None:
    """Four answers by hand: right, wrong, unmatched, failed. The unmatched one is in no accuracy."""
    responses = ["C. Berries.", "B", "berries", None]
    asked = [ONE | {"question_id": f"001-{n}", "response": text} for n, text in enumerate(responses)]
    path = write(
        tmp_path, [NESTED | {"questions": asked[:2]}, NESTED | {"video_id": "002", "questions": asked[2:]}]
    )
    benchmark = get_benchmark("videomme")
    file = read_predictions(path, benchmark)
    assert file.format == "video-mme"
    assert file.items is not None
    scores = score_predictions(benchmark, file.items, file.predictions)[0]
    assert [one.verdict.score for one in scores.answers] == [1.0, 0.0, None, 0.0]
    row = tables(scores)[0].rows[0]
    assert row.score is not None
    assert row.score.value == pytest.approx(1 / 3)
    assert (row.items, row.unmatched, row.failed) == (4, 1, 1)
    with pytest.raises(DataError, match="give benchmark=videomme"):
        read_predictions(path, get_benchmark("mmvu"))
    asked[0].pop("response")
    with pytest.raises(DataError, match="question 0 has no field response"):
        read_predictions(write(tmp_path, [NESTED | {"questions": asked}]), benchmark)
