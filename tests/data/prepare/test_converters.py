"""One worked row for every converter, and the forms that people write by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from keytoken.data.prepare import CONVERTERS, get_converter
from keytoken.errors import ConfigurationError, DataError
from keytoken.rewards.score import compute_score
from keytoken.scoring.prompts import render

VIDEO_R1 = {
    "problem_id": 2,
    "problem": "What appears on the screen?",
    "data_type": "video",
    "problem_type": "multiple choice",
    "options": ["A. A dog", "B. A map"],
    "process": "",
    "solution": "<answer>B</answer>",
    "path": "./deep/four.mp4",
    "data_source": "LLaVA-Video-178K/30_60_s",
}
HOLMES = {
    "video ID": "one",
    "Question ID": 4,
    "Question Type": "TCI",
    "Question": "Why does he leave?",
    "Options": {"A": "Fear", "B": "Hunger", "C": "Sleep"},
    "Answer": "C",
    "Explanation": "He yawns.",
}
TINY = {
    "problem": "What does the girl do?\nOptions:\nA. jumps.\nB. reads.\nC. eats.",
    "solution": "<answer>B</answer>",
    "video_filename": "./deep/four.mp4",
}


def test_video_r1(bench: Any) -> None:
    bench.json([VIDEO_R1])
    (row,) = bench.prepare("video_r1")
    question = "What appears on the screen?\nOptions:\nA. A dog\nB. A map"
    assert row["prompt"] == [{"role": "user", "content": "<video>" + render(question, "multiple choice")}]
    path = str(bench.media.resolve() / "deep/four.mp4")
    assert row["videos"] == [{"video": path, "video_start": None, "video_end": None}]
    assert row["images"] == []
    assert row["reward_model"] == {"style": "rule", "ground_truth": "B"}
    assert row["data_source"] == "LLaVA-Video-178K/30_60_s"
    info = row["extra_info"]
    assert (info["problem_type"], info["source_id"], info["media"]) == (
        "multiple choice",
        "2",
        "deep/four.mp4",
    )
    assert (info["options"], info["answer_text"]) == (["A dog", "A map"], "A map")


@pytest.mark.parametrize(
    ("problem_type", "solution"),
    [("numerical", "3.5"), ("regression", "12"), ("OCR", "EXIT"), ("free-form", "a red bus")],
)
def test_video_r1_other_types_and_images(bench: Any, problem_type: str, solution: str) -> None:
    image = VIDEO_R1 | {"problem_type": problem_type, "solution": f"<answer>{solution}</answer>"}
    bench.json([image | {"data_type": "image", "path": "photo.png", "options": []}])
    (row,) = bench.prepare("video_r1")
    assert row["prompt"][0]["content"] == "<image>" + render("What appears on the screen?", problem_type)
    assert (row["videos"], row["images"]) == ([], [{"image": str(bench.media.resolve() / "photo.png")}])
    scores = compute_score(
        "x",
        f"<think>.</think><answer>{solution}</answer>",
        row["reward_model"]["ground_truth"],
        row["extra_info"],
    )
    assert scores["acc"] == pytest.approx(1.0)


def test_video_r1_paths_that_begin_with_a_slash_lie_below_the_media_root(bench: Any) -> None:
    inside = str(bench.media.resolve() / "one.mp4")
    bench.json([VIDEO_R1 | {"path": "/deep/four.mp4"}, VIDEO_R1 | {"path": inside}])
    assert [row["extra_info"]["media"] for row in bench.prepare("video_r1")] == ["deep/four.mp4", "one.mp4"]


def test_a_placeholder_in_a_question_is_taken_out_and_counted(bench: Any) -> None:
    """verl would look for a second video behind it."""
    bench.json([VIDEO_R1 | {"problem": "<video>\nWhat appears?"}])
    (row,) = bench.prepare("video_r1")
    assert row["prompt"][0]["content"].count("<video>") == 1
    assert bench.ledger.notes["placeholder such as <image> removed from the question"] == 1


def test_video_holmes(bench: Any) -> None:
    bench.json([HOLMES])
    (row,) = bench.prepare("video_holmes")
    assert row["extra_info"]["media"] == "one.mp4"
    assert (row["extra_info"]["source_id"], row["extra_info"]["category"]) == ("one/4", "TCI")
    assert (row["ability"], row["reward_model"]["ground_truth"]) == ("TCI", "C")
    assert "\nA. Fear\nB. Hunger\nC. Sleep\n" in row["prompt"][0]["content"]


def test_tinyllava_video_r1_leaves_the_options_where_they_are(bench: Any) -> None:
    bench.write("source.jsonl", json.dumps(TINY) + "\n")
    (row,) = bench.prepare("tinyllava_video_r1")
    assert row["prompt"][0]["content"] == "<video>" + render(TINY["problem"], "multiple choice")
    assert row["prompt"][0]["content"].count("Options:") == 1
    assert (row["reward_model"]["ground_truth"], row["extra_info"]["answer_text"]) == ("B", "reads.")


FORMS = [
    pytest.param(
        ["video", "question", "answer"], ["one.mp4", "How many?", "3"], "numerical", "3", id="number"
    ),
    pytest.param(
        ["video", "question", "answer"], ["one.mp4", "Who?", "a dog"], "free-form", "a dog", id="text"
    ),
    pytest.param(
        [" VIDEO ", "Question", "Answer", "Options"],
        ["one.mp4", "Which?", "blue", "red | blue"],
        "multiple choice",
        "B",
        id="header in other case with blanks, options apart by |",
    ),
    pytest.param(
        ["video_path", "question", "correct-answer", "choices"],
        ["one.mp4", "Which?", "b", "A. red | B. blue"],
        "multiple choice",
        "B",
        id="lettered options, small letter",
    ),
    pytest.param(
        ["path", "question", "answer", "options"],
        ["photo.png", "Which?", "(A)", '["red", "blue"]'],
        "multiple choice",
        "A",
        id="image by its suffix, options as JSON",
    ),
    pytest.param(
        ["video", "question", "answer", "option_a", "Option B", "option c"],
        ["one.mp4", "Which?", "C", "red", "blue", "3.5"],
        "multiple choice",
        "C",
        id="a column for every option",
    ),
    pytest.param(
        ["video", "question", "answer", "a", "b"],
        ["one.mp4", "Which?", "B. blue", "red", "blue"],
        "multiple choice",
        "B",
        id="columns named by letters, answer with letter and text",
    ),
    pytest.param(
        ["video", "question", "answer", "problem type"],
        ["one.mp4", "Read it", "EXIT", "ocr"],
        "OCR",
        "EXIT",
        id="type in small letters",
    ),
    pytest.param(
        ["video", "question", "answer", "options"],
        ["one.mp4", "Which vitamin?", "A", "B|A"],
        "multiple choice",
        "B",
        id="an option whose text is the letter of another",
    ),
]


@pytest.mark.parametrize(("header", "cells", "problem_type", "answer"), FORMS)
def test_folder(bench: Any, header: list[str], cells: list[str], problem_type: str, answer: str) -> None:
    bench.csv(header, cells)
    (row,) = bench.prepare("folder")
    assert (row["extra_info"]["problem_type"], row["reward_model"]["ground_truth"]) == (problem_type, answer)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        pytest.param("a.csv", "video;question;answer\none.mp4;What, then?;a dog\n", id="semicolons"),
        pytest.param("a.tsv", "video\tquestion\tanswer\none.mp4\tWhat, then?\ta dog\n", id="tabs"),
        pytest.param(
            "a.csv", '\ufeffvideo,question,answer\r\none.mp4,"What, then?",a dog\r\n', id="BOM and CRLF"
        ),
        pytest.param(
            "a.jsonl", '{"video": "one.mp4", "question": "What, then?", "answer": "a dog"}', id="JSON Lines"
        ),
        pytest.param(
            "a.json", '[{"video": "one.mp4", "question": "What, then?", "answer": "a dog"}]', id="JSON list"
        ),
        pytest.param("a.csv", 'video,question,answer\n\none.mp4,"What, then?",a dog\n,,\n', id="empty lines"),
        pytest.param(
            "a.csv", 'video,question,answer\none.mp4,"What,\nthen?",a dog\n', id="a line feed within a cell"
        ),
    ],
)
def test_folder_reads_what_people_and_spreadsheets_write(bench: Any, name: str, content: str) -> None:
    bench.write(name, content)
    (row,) = bench.prepare("folder")
    assert row["extra_info"]["question"].split() == ["What,", "then?"]
    assert row["extra_info"]["answer_text"] == "a dog"


def test_a_folder_is_as_good_as_the_one_table_in_it(bench: Any) -> None:
    (bench.media / "questions.csv").write_text("video,question,answer\none.mp4,Who?,a dog\n")
    bench.source = bench.media
    assert len(bench.prepare("folder", media_root=None)) == 1
    (bench.media / "more.csv").write_text("video,question,answer\n")
    with pytest.raises(DataError, match=r"found more\.csv, questions\.csv; name the file"):
        bench.prepare("folder", media_root=None, out=str(bench.tmp_path / "other"))


def test_an_encoding_can_be_named(bench: Any) -> None:
    bench.write("a.csv", "video,question,answer\none.mp4,Où?,à gauche\n".encode("cp1252"))
    (row,) = bench.prepare("folder", encoding="cp1252")
    assert row["extra_info"]["answer_text"] == "à gauche"


def test_limit_and_split(bench: Any) -> None:
    bench.csv(["video", "question", "answer"], *[["one.mp4", f"Number {n}?", str(n)] for n in range(9)])
    rows = bench.prepare("folder", limit=4, split="val")
    assert [row["extra_info"]["prompt_id"] for row in rows] == [f"val-{n:06d}" for n in range(4)]
    assert bench.ledger.num_read == 4


def test_a_misspelt_converter_names_the_closest() -> None:
    assert get_converter("video_r1") is CONVERTERS["video_r1"]
    with pytest.raises(ConfigurationError, match="Did you mean 'video_holmes'"):
        get_converter("video_homes")


def test_every_row_of_the_mmvu_file_is_read_and_set_aside_without_its_videos(
    bench: Any, shared_data: Path
) -> None:
    """625 real rows in Video-R1 form, none of their videos at hand."""
    bench.source = shared_data / "benchmarks/mmvu_mc_video_r1_format.json"
    with pytest.raises(DataError, match=r"none of its 625 rows can be used: media missing \(625\)"):
        bench.prepare("video_r1")
    lines = (bench.tmp_path / "out.failed/quarantine.jsonl").read_text().splitlines()
    assert len(lines) == 625
    first = json.loads(lines[0])
    assert (first["id"], first["path"], first["reason"]) == (
        "1",
        "/MMVU/videos/Chemistry/0.mp4",
        "media missing",
    )
    assert not bench.out.exists()


def test_every_row_of_the_mmvu_file_is_converted_with_videos_in_their_places(
    bench: Any, shared_data: Path, clip_folder: Path
) -> None:
    bench.source = shared_data / "benchmarks/mmvu_mc_video_r1_format.json"
    raw = json.loads(bench.source.read_text())
    for video in {row["video"] for row in raw}:
        target = bench.media / video.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.hardlink_to(clip_folder / "one.mp4")
    rows = bench.prepare("video_r1")
    assert len(rows) + len(bench.ledger.quarantined) + len(bench.ledger.copies) == 625
    by_id = {row["extra_info"]["source_id"]: row for row in rows}
    for entry in raw:
        row = by_id.get(str(entry["problem_id"]))
        if row is not None:
            assert f"<answer>{row['reward_model']['ground_truth']}</answer>" == entry["solution"]
            assert "\n".join(entry["options"]) in row["prompt"][0]["content"]


def test_the_video_holmes_examples_are_converted(bench: Any, shared_data: Path, clip_folder: Path) -> None:
    bench.source = shared_data / "benchmarks/video_holmes_example_RSmjqss0XKQ.json"
    (bench.media / "RSmjqss0XKQ.mp4").hardlink_to(clip_folder / "one.mp4")
    rows = bench.prepare("video_holmes")
    raw = json.loads(bench.source.read_text())
    assert [row["reward_model"]["ground_truth"] for row in rows] == [entry["Answer"] for entry in raw]
    assert [row["extra_info"]["answer_text"] for row in rows] == [
        entry["Options"][entry["Answer"]].strip() for entry in raw
    ]
