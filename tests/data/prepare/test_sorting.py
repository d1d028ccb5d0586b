"""Copies, contradictions, repeated ids, and overlap with test sets."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from keytoken.data.prepare.overlap import video_name
from keytoken.errors import DataError

ROW = {"video": "one.mp4", "question": "Which color?", "answer": "A", "options": ["red", "blue"]}


def prepared(bench: Any, *changes: dict[str, Any], **settings: Any) -> list[str]:
    """Places of the rows that stay."""
    bench.json([{**ROW, **change} for change in changes])
    rows = bench.prepare("folder", **settings)
    return [f"entry {int(row['extra_info']['prompt_id'][-6:])}" for row in rows]


def test_a_copy_is_dropped_and_the_first_stays(bench: Any) -> None:
    assert prepared(bench, {}, {"question": " which  COLOR "}, {"video": "two.mp4"}) == ["entry 0", "entry 2"]
    assert bench.ledger.copies == [("entry 1", "entry 0")]


def test_one_file_under_two_paths_is_one_file(bench: Any) -> None:
    (bench.media / "alias.mp4").symlink_to("one.mp4")
    assert prepared(bench, {}, {"video": "deep/../one.mp4"}, {"video": "alias.mp4"}) == ["entry 0"]


def test_a_part_that_is_the_whole_clip_is_the_clip(bench: Any) -> None:
    assert prepared(bench, {}, {"start": 0}, {"start": 0.0, "answer": "A"}, {"end": 0.5}) == [
        "entry 0",
        "entry 3",
    ]


def test_options_in_another_order_are_no_copy_and_no_contradiction(bench: Any) -> None:
    """The right letter moves with its text."""
    assert prepared(bench, {}, {"options": ["blue", "red"], "answer": "B"}) == ["entry 0", "entry 1"]
    assert bench.ledger.notes["the same question again with its options in another order"] == 1


def test_contradicting_answers_are_all_set_aside(bench: Any) -> None:
    kept = prepared(bench, {}, {"video": "two.mp4"}, {"answer": "B"}, {"options": ["blue", "red"]})
    assert kept == ["entry 1"]
    assert bench.reasons() == [(f"entry {n}", "contradicting answers") for n in (0, 2, 3)]


def test_other_options_make_another_question(bench: Any) -> None:
    assert len(prepared(bench, {}, {"options": ["green", "grey"]})) == 2


def test_free_answers_contradict_by_their_words(bench: Any) -> None:
    kept = prepared(
        bench,
        {"options": None, "answer": "Red."},
        {"options": None, "answer": "red"},
        {"options": None, "answer": "blue", "video": "two.mp4"},
        {"options": None, "answer": "4", "video": "two.mp4"},  # a number: another type, another question
    )
    assert kept == ["entry 0", "entry 2", "entry 3"]


def test_a_copy_may_repeat_the_id(bench: Any) -> None:
    assert prepared(bench, {"id": "7"}, {"id": "7"}) == ["entry 0"]
    assert (len(bench.ledger.copies), bench.ledger.quarantined) == (1, [])


def test_published_sets_may_number_their_parts_separately(bench: Any) -> None:
    bench.json(
        [
            {
                "problem_id": 1,
                "problem": question,
                "data_type": "video",
                "problem_type": "free-form",
                "solution": "a dog",
                "path": "one.mp4",
            }
            for question in ("Who?", "What?")
        ]
    )
    assert len(bench.prepare("video_r1")) == 2
    assert bench.ledger.notes["id of an earlier row"] == 1


def test_inline_options_in_another_order_are_a_variant(bench: Any) -> None:
    first = {"problem": "Which?\nOptions:\nA. x\nB. y", "solution": "A", "video_filename": "one.mp4"}
    second = {**first, "problem": "Which?\nOptions:\nA. y\nB. x", "solution": "B"}
    wrong = {**second, "solution": "A", "video_filename": "two.mp4"}
    bench.json([first, second, wrong])
    assert len(bench.prepare("tinyllava_video_r1")) == 3
    bench.json([first, {**second, "solution": "A"}, wrong])
    assert len(bench.prepare("tinyllava_video_r1", overwrite=True)) == 1


@pytest.mark.parametrize(
    ("video", "name"),
    [
        ("https://www.youtube.com/watch?v=RSmjqss0XKQ&t=3", "RSmjqss0XKQ"),
        ("https://youtu.be/RSmjqss0XKQ", "RSmjqss0XKQ"),
        ("videos/RSmjqss0XKQ.mp4", "RSmjqss0XKQ"),
        ("./NextQA/NExTVideo/1006/8968804598.mp4", "8968804598"),
        ("/MMVU/videos/Chemistry/0.mp4", "chemistry/0"),
        ("https://huggingface.co/d/resolve/main/videos/Chemistry/0.mp4", "chemistry/0"),
        ("clevrer/video_10009.mp4", "clevrer/video_10009"),
        ("a\\b\\long_name.mkv", "long_name"),
        ("0.mp4", ""),  # says nothing: never an overlap
        ("v1.2_take", "v1.2_take"),
    ],
)
def test_what_a_video_is_called(video: str, name: str) -> None:
    assert video_name(video) == name


@pytest.fixture
def test_set(bench: Any) -> Path:
    """A prepared test set on the clip "two.mp4"."""
    bench.json([{**ROW, "video": "two.mp4", "question": "What is left?", "options": ["a cup", "a hat"]}])
    bench.prepare("folder", out=str(bench.tmp_path / "test_set"), split="test", check="headers")
    return bench.tmp_path / "test_set/test.parquet"


def overlaps(bench: Any) -> list[tuple[str, str]]:
    return [(each.place, each.shared) for each in bench.ledger.overlaps]


CLEAN = {"video": "one.mp4"}
SAME_VIDEO = {"video": "two.mp4", "question": "And now?"}
SAME_QUESTION = {"video": "three.mp4", "question": "what is LEFT", "options": ["a hat", "a cup"]}
SAME_WORDS = {"video": "three.mp4", "question": "What is left?"}  # with other options


def test_overlap_by_video_and_by_question(bench: Any, test_set: Path) -> None:
    settings = {"against": (str(test_set),), "overlap": "drop"}
    kept = prepared(bench, CLEAN, SAME_VIDEO, SAME_QUESTION, SAME_WORDS, **settings)
    assert kept == ["entry 0", "entry 3"]
    assert overlaps(bench) == [("entry 1", "video"), ("entry 2", "question")]
    assert bench.ledger.num_overlapping == 2


def test_official_files_and_prepared_ones_may_both_be_parquet(bench: Any, test_set: Path) -> None:
    settings = {"against": (f"own:{test_set}",), "overlap": "drop"}
    assert prepared(bench, CLEAN, SAME_VIDEO, **settings) == ["entry 0"]
    with pytest.raises(DataError, match=r"^gone\.parquet does not exist"):
        prepared(bench, CLEAN, against=("videomme:gone.parquet",), out=str(bench.tmp_path / "other"))


def test_overlap_by_content_under_another_name(bench: Any, test_set: Path) -> None:
    (bench.media / "renamed_to_something.mp4").hardlink_to(bench.media / "two.mp4")
    settings = {"against": (str(test_set),), "overlap": "keep", "check": "headers"}
    assert len(prepared(bench, CLEAN, {"video": "renamed_to_something.mp4"}, **settings)) == 2
    assert overlaps(bench) == [("entry 1", "content")]
    assert (bench.out / "overlap.jsonl").read_text().count("\n") == 1


def test_overlap_stops_unless_somebody_decides(bench: Any, test_set: Path) -> None:
    with pytest.raises(DataError, match=r"1 of 2 rows are in a test set .* overlap=drop .* overlap=keep"):
        prepared(bench, CLEAN, SAME_VIDEO, against=(str(test_set),))
    assert not bench.out.exists()
    (line,) = (bench.tmp_path / "out.failed/overlap.jsonl").read_text().splitlines()
    assert json.loads(line)["media"] == "two.mp4"
    prepared(bench, CLEAN, SAME_VIDEO, against=(str(test_set),), overlap="drop")
    assert not (bench.tmp_path / "out.failed").exists()


def test_overlap_with_an_official_question_file(bench: Any, shared_data: Path, clip_folder: Path) -> None:
    """Video-Holmes' examples of its test set, taken for training."""
    file = shared_data / "benchmarks/video_holmes_example_RSmjqss0XKQ.json"
    (bench.media / "RSmjqss0XKQ.mp4").hardlink_to(clip_folder / "one.mp4")
    bench.source = file
    settings = {"against": (f"video_holmes:{file}",), "overlap": "keep"}
    rows = bench.prepare("video_holmes", **settings)
    assert len(rows) == 8
    assert [shared for _, shared in overlaps(bench)] == ["video and question"] * 8


def test_mmvu_in_video_r1_form_overlaps_with_mmvu(bench: Any, shared_data: Path, clip_folder: Path) -> None:
    """The same 625 questions from two publishers: every one is found.

    In 21 of them one publisher has "video" wherever the other has "path" ("the videoogens", "tangentially to
    the video"): another wording on the same video.
    """
    bench.source = shared_data / "benchmarks/mmvu_mc_video_r1_format.json"
    for video in {row["video"] for row in json.loads(bench.source.read_text())}:
        target = bench.media / video.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.hardlink_to(clip_folder / "one.mp4")
    against = f"mmvu:{shared_data / 'benchmarks/mmvu_validation_official.json'}"
    rows = bench.prepare("video_r1", against=(against,), overlap="keep")
    assert len(rows) == 625
    assert Counter(shared for _, shared in overlaps(bench)) == {"video and question": 604, "video": 21}
