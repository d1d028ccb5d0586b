"""Sample logs of lmms-eval: lines with its fields, matched to the questions of every benchmark."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from keytoken.errors import DataError
from keytoken.scoring.benchmarks import get_benchmark
from keytoken.scoring.items import Item, Prediction
from keytoken.scoring.predictions import read_predictions
from keytoken.scoring.score import align, score_predictions

OPTIONS = ("red", "green", "blue", "white")


def item(benchmark: str, item_id: str, question: str, answer: str = "B", **changes: Any) -> Item:
    made = Item(
        benchmark=benchmark,
        item_id=item_id,
        question=question,
        answer=answer,
        kind="multiple choice",
        options=OPTIONS,
        video=item_id,
        categories={"aspect": "action", "type": "object_counting", "question_type": "object_counting"},
    )
    return replace(made, **changes)


def line(doc_id: int, asked: Item, target: str, record: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A sample as lmms-eval 0.5 and 0.6 write it."""
    prompt = "\n".join([asked.question, *(f"A. {option}" for option in asked.options)])
    return {
        "doc_id": doc_id,
        "target": target,
        "filtered_resps": ["B"],
        "doc_hash": "0" * 64,
        "prompt_hash": "0" * 64,
        "target_hash": "0" * 64,
        "input": f"{prompt}\nAnswer with the option's letter.",
        **record,
        **changes,
    }


def read(tmp_path: Path, benchmark: str, items: list[Item], lines: list[dict[str, Any]]) -> list[Prediction]:
    path = tmp_path / "20250101_samples_task.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in lines), encoding="utf-8")
    file = read_predictions(path, get_benchmark(benchmark))
    assert file.format == "lmms-eval"
    return align(file, items)


VIDEOMME = [item("videomme", "001-1", "What colour is it?"), item("videomme", "001-2", "Which one?", "C")]
CASES: dict[str, tuple[list[Item], list[dict[str, Any]], list[float | None]]] = {
    "videomme": (
        VIDEOMME,
        [
            line(
                0,
                VIDEOMME[1],
                "C",
                {
                    "videomme_perception_score": {
                        "question_id": "001-2",
                        "duration": "short",
                        "pred_answer": "B",
                        "answer": "C",
                    }
                },
            ),
            line(
                1,
                VIDEOMME[0],
                "B",
                {
                    "videomme_perception_score": {
                        "question_id": "001-1",
                        "pred_answer": "B",
                        "answer": "B",
                        "score": 1.0,
                    }
                },
            ),
        ],
        [0.0, 1.0],
    ),
    "mvbench": (
        [
            item("mvbench", "action_count/0", "How often?"),
            item("mvbench", "moving_count/0", "How many move?"),
            item("mvbench", "moving_count/1", "How many move?"),
        ],
        [
            line(
                number,
                item("mvbench", "x", question),
                "green",
                {"mvbench_accuracy": {"pred_answer": "B", "gt_answer": "B", "score": 1}},
            )
            for number, question in ((1, "How many move?"), (0, "How many move?"), (0, "How often?"))
        ],
        [1.0, 1.0, 1.0],
    ),
    "vsibench": (
        [
            item("vsibench", "17", "How many chairs?", "4", kind="numerical", options=()),
            item("vsibench", "18", "Where is it?"),
        ],
        [
            line(
                0,
                item("vsibench", "17", "How many chairs?", options=()),
                "4",
                {"vsibench_score": {"id": 17, "ground_truth": "4", "MRA:.5:.95:.05": 0.6}},
                filtered_resps=["3"],
            ),
            line(
                1,
                item("vsibench", "18", "Where is it?"),
                "B",
                {
                    "vsibench_overall": {"id": 18, "accuracy": 1.0},
                    "route_planning_accuracy": {"id": 18, "accuracy": 1.0},
                },
            ),
        ],
        [0.6, 1.0],
    ),
    "mmvu": (
        [item("mmvu", "validation_3", "Which one?")],
        [
            line(
                0,
                item("mmvu", "validation_3", "Which one?"),
                "B",
                {"accuracy": {"question_id": "validation_3", "category": "Art", "correct": 1}},
            )
        ],
        [1.0],
    ),
    "videommmu": (
        [
            item("videommmu", "Perception/dev_Biology_3", "How many atoms?"),
            item("videommmu", "Adaptation/dev_Biology_3", "Which acid?"),
        ],
        [
            line(
                0,
                item("videommmu", "x", question),
                "B",
                {
                    "mmmu_acc": {
                        "id": "dev_Biology_3",
                        "subdomain": "Biology",
                        "question_type": "multiple-choice",
                        "answer": "B",
                        "parsed_pred": read_as,
                    }
                },
            )
            for question, read_as in (("Which acid?", "B"), ("How many atoms?", "C"))
        ],
        [1.0, 0.0],
    ),
    "tempcompass": (
        [
            item("tempcompass", f"123/multi-choice/action/{number}", "What happens?", video="123.mp4")
            for number in range(2)
        ],
        [
            line(
                number,
                item("tempcompass", "x", "What happens?"),
                "B. green",
                {
                    "avg_accuracy": {"video_id": "123", "dim": "action", "rating": rating},
                    "action_accuracy": {"video_id": "123", "dim": "action", "rating": rating},
                },
            )
            for number, rating in ((0, 1), (1, -1))
        ],
        [1.0, None],
    ),
    "video_holmes": (
        [item("video_holmes", "RSm/1", "Who is it?"), item("video_holmes", "RSm/2", "Why?")],
        [
            line(
                number,
                item("video_holmes", "x", question),
                "B",
                {
                    "video_holmes_accuracy": {"score": 1, "question_type": "SR"},
                    "video_holmes_SR": {"score": 1, "question_type": "SR"},
                },
            )
            for number, question in ((1, "Why?"), (0, "Who is it?"))
        ],
        [1.0, 1.0],
    ),
}
# The questions of CASES in the order of the lines.
ORDER = {
    "videomme": ["001-2", "001-1"],
    "mvbench": ["moving_count/1", "moving_count/0", "action_count/0"],
    "vsibench": ["17", "18"],
    "mmvu": ["validation_3"],
    "videommmu": ["Adaptation/dev_Biology_3", "Perception/dev_Biology_3"],
    "tempcompass": ["123/multi-choice/action/0", "123/multi-choice/action/1"],
    "video_holmes": ["RSm/2", "RSm/1"],
}


@pytest.mark.parametrize("benchmark", CASES)
def test_samples_find_their_questions_and_keep_their_scores(tmp_path: Path, benchmark: str) -> None:
    items, lines, scores = CASES[benchmark]
    predictions = read(tmp_path, benchmark, items, lines)
    assert [one.item_id for one in predictions] == ORDER[benchmark]
    assert [one.published_score for one in predictions] == scores
    assert [one.response for one in predictions] == [one["filtered_resps"][0] for one in lines]
    assert {one.decoding for one in predictions} == {"greedy"}


def test_the_file_s_own_scores_are_set_against_ours(tmp_path: Path) -> None:
    """A log of VSI-Bench from 0.7, which reads number words: ours does not."""
    items, lines, _ = CASES["vsibench"]
    lines = [
        lines[0] | {"filtered_resps": "four", "vsibench_score": {"id": 17, "MRA:.5:.95:.05": 1.0}},
        lines[1],
    ]
    predictions = read(tmp_path, "vsibench", items, lines)
    scores = score_predictions(get_benchmark("vsibench"), items, predictions)[0]
    assert [one.item.item_id for one in scores.differing] == ["17"]
    assert scores.differing[0].verdict.score == 0.0


@pytest.mark.parametrize(
    ("fields", "responses"),
    [
        pytest.param({"filtered_resps": ["B"]}, ["B"], id="0.5"),
        pytest.param(
            {"resps": [["<think>x</think>B"]], "filtered_resps": ["B"]}, ["<think>x</think>B"], id="0.6 tags"
        ),
        pytest.param({"filtered_resps": "B"}, ["B"], id="0.7"),
        pytest.param(
            {"resps": ["<think>x</think>B"], "filtered_resps": "B"}, ["<think>x</think>B"], id="0.7 tags"
        ),
        pytest.param({"filtered_resps": ["B", "C", "B"]}, ["B", "C", "B"], id="repeats"),
        pytest.param({"filtered_resps": ""}, [""], id="empty"),
    ],
)
def test_responses_of_every_release_are_read(
    tmp_path: Path, fields: dict[str, Any], responses: list[str]
) -> None:
    items, lines, _ = CASES["videomme"]
    sample = {key: value for key, value in lines[1].items() if key != "filtered_resps"} | fields
    predictions = read(tmp_path, "videomme", items, [sample])
    assert [one.response for one in predictions] == responses
    several = len(responses) > 1
    assert [one.sample for one in predictions] == list(range(len(responses)))
    assert {one.decoding for one in predictions} == {"sampled" if several else "greedy"}
    assert {one.published_score for one in predictions} == {None if several else 1.0}


def test_a_log_of_an_exported_task_is_matched_by_its_ids(tmp_path: Path) -> None:
    items = CASES["mvbench"][0]
    record = {"keytoken_score": {"item_id": "moving_count/1", "score": 1.0, "rule": "letter"}}
    predictions = read(tmp_path, "mvbench", items, [line(7, items[2], "B", record)])
    assert [(one.item_id, one.published_score) for one in predictions] == [("moving_count/1", 1.0)]


def change(index: int, **changes: Any) -> Callable[[list[dict[str, Any]]], list[dict[str, Any]]]:
    return lambda lines: [one | changes if number == index else one for number, one in enumerate(lines)]


@pytest.mark.parametrize(
    ("benchmark", "spoil", "message"),
    [
        pytest.param("videomme", change(1, target="D"), "line 2: sample 1 .*fits none", id="other target"),
        pytest.param(
            "videomme", change(1, input="Another?"), "line 2: sample 1 .*fits none", id="other prompt"
        ),
        pytest.param("videomme", change(0, filtered_resps=3), "resps is '3'", id="no text"),
        pytest.param("videomme", change(0, filtered_resps=[]), r"resps is '\[\]'", id="no response"),
        pytest.param("mmvu", lambda _: CASES["videomme"][1], "is a sample of videomme", id="other benchmark"),
        pytest.param("mmvu", change(0, accuracy=1.0), "is no sample of mmvu", id="record no object"),
        pytest.param(
            "mmvu",
            change(0, accuracy={"question_id": "validation_3", "correct": "yes"}),
            "own score is 'yes'",
            id="score no number",
        ),
        pytest.param(
            "videomme", lambda lines: [*lines, lines[0]], "1 question is answered twice", id="twice"
        ),
        pytest.param("demo", lambda lines: lines, "known for videomme, .*not for demo", id="demo"),
    ],
)
def test_logs_that_cannot_be_matched_are_refused(
    tmp_path: Path,
    benchmark: str,
    spoil: Callable[[list[dict[str, Any]]], list[dict[str, Any]]],
    message: str,
) -> None:
    items, lines, _ = CASES.get(benchmark, CASES["videomme"])
    with pytest.raises(DataError, match=message):
        read(tmp_path, benchmark, items, spoil(lines))


def test_a_sample_that_fits_questions_of_two_tasks_is_refused(tmp_path: Path) -> None:
    items, lines, _ = CASES["mvbench"]
    twin = replace(items[0], item_id="action_antonym/0", video="other")
    with pytest.raises(DataError, match="fits the questions action_count/0, action_antonym/0"):
        read(tmp_path, "mvbench", [*items, twin], lines)


def test_options_in_another_order_are_another_question(tmp_path: Path) -> None:
    asked = item("tempcompass", "123/multi-choice/action/0", "What happens?")
    turned = replace(
        asked, item_id="123/multi-choice/action/1", options=("white", "green", "blue", "red"), answer="B"
    )
    record = {"avg_accuracy": {"video_id": "123", "dim": "action", "rating": 1}}
    sample = line(0, turned, "B. green", record)
    assert read(tmp_path, "tempcompass", [asked, turned], [sample])[0].item_id == turned.item_id
