"""Does it still answer: scores by control, paired by question, and who is left out."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from keytoken.evaluation.controls import as_json, compare_controls, control_section
from keytoken.scoring.benchmarks import get_benchmark
from keytoken.scoring.benchmarks.base import Benchmark
from keytoken.scoring.items import Item, Prediction, Verdict
from keytoken.scoring.score import score_predictions

DEMO = get_benchmark("demo")
RIGHT, WRONG = "<answer>A</answer>", "<answer>B</answer>"


def items(count: int, **fields: Any) -> list[Item]:
    common: dict[str, Any] = {"benchmark": "demo", "question": "q", "answer": "A", "kind": "multiple choice"}
    return [Item(item_id=f"i{n}", video=f"{n}.mp4", **{**common, **fields}) for n in range(count)]


def answers(control: str, hits: list[bool | None], **fields: Any) -> list[Prediction]:
    texts = {True: RIGHT, False: WRONG, None: None}
    return [
        Prediction(item_id=f"i{n}", response=texts[hit], control=control, **fields)
        for n, hit in enumerate(hits)
    ]


def compared(questions: list[Item], predictions: list[Prediction], benchmark: Benchmark = DEMO) -> Any:
    return compare_controls(score_predictions(benchmark, questions, predictions))


def test_scores_and_paired_differences() -> None:
    rng = np.random.default_rng(0)
    real, text = rng.random(200) < 0.7, rng.random(200) < 0.4
    predictions = answers("none", real.tolist()) + answers("text", text.tolist())
    random.Random(0).shuffle(predictions)
    results = compared(items(200), predictions)
    assert [(result.control, result.num_questions) for result in results] == [("none", 200), ("text", 200)]
    assert results[0].score.value == pytest.approx(real.mean())
    assert results[0].difference is None
    difference = results[1].difference
    paired = text.astype(float) - real
    assert difference.value == pytest.approx(paired.mean())
    spread = 1.96 * paired.std() / np.sqrt(200)  # the normal interval, by hand
    assert difference.low == pytest.approx(paired.mean() - spread, abs=0.02)
    assert difference.high == pytest.approx(paired.mean() + spread, abs=0.02)
    # In whatever order the answers came.
    predictions.sort(key=lambda each: (each.item_id, each.control), reverse=True)
    assert compared(items(200), predictions) == results


def test_several_answers_to_a_question_are_one_score() -> None:
    predictions = [
        each
        for sample, hits in enumerate([[True, True, False], [False, True, False]])
        for each in answers("none", hits, decoding="sampled", sample=sample)
    ]
    (result,) = compared(items(3), predictions)
    assert (result.decoding, result.num_questions) == ("sampled", 3)
    assert result.score.value == pytest.approx((0.5 + 1 + 0) / 3)


def test_failed_answers_are_wrong() -> None:
    (result,) = compared(items(4), answers("blank", [True, None, True, None]))
    assert result.score.value == 0.5
    assert result.num_failed == 2
    assert result.difference is None  # nothing to compare with


def test_what_shows_nothing_is_left_out_and_counted() -> None:
    questions = [*items(3), Item(**{**_fields(items(1)[0]), "item_id": "i3", "video": None})]
    results = compared(
        questions, answers("none", [True, True, False, True]) + answers("shuffled", [True] * 4)
    )
    assert [result.num_questions for result in results] == [3, 3]
    assert results[1].difference.value == pytest.approx(1 / 3)
    assert "1 question shows nothing, of 4" in control_section(results, len(questions))
    assert compared(questions[3:], answers("none", [True] * 4)[3:]) == []


def test_what_only_a_judge_can_score_is_not_compared() -> None:
    def judged(item: Item, response: str) -> Verdict:
        return Verdict(None, "", "open") if item.item_id != "i0" else DEMO.score(item, response)

    benchmark = Benchmark(**{**vars(DEMO), "score": judged})
    predictions = answers("none", [True] * 3) + answers("blank", [False] * 3)
    results = compared(items(3), predictions, benchmark)
    assert results[1].difference.value == -1.0  # of the one that the rule decides
    open_only = compared(items(3)[1:], [each for each in predictions if each.item_id != "i0"], benchmark)
    assert [result.score for result in open_only] == [None, None]
    assert open_only[1].difference is None
    assert control_section(open_only, 2).count("undecided") == 2


def test_question_without_an_answer_under_the_control_is_not_compared() -> None:
    predictions = answers("none", [True, False, True, True]) + answers("blank", [True, True])
    results = {result.control: result for result in compared(items(4), predictions)}
    assert results["blank"].num_questions == 2
    assert results["blank"].difference.value == 0.5


def test_section_has_a_line_for_each_control() -> None:
    predictions = [
        each
        for control, hits in (("none", [True] * 6), ("blank", [False, True] * 3), ("text", [False] * 6))
        for each in answers(control, list(hits))
    ]
    results = compared(items(6), predictions)
    rows = [line for line in control_section(results, 6).splitlines() if line.startswith("| greedy")]
    assert [row.split(" | ")[1] for row in rows] == ["with the video", "blank frames", "text alone"]
    assert "0.500 [" in rows[1]
    assert "-0.500 [" in rows[1]
    assert "| 0.25 |" in rows[1]  # three of three changed for the worse: 2 / 2^3
    assert as_json(results)[1]["difference"]["value"] == -0.5
    # All questions changed alike: no interval in the text, no infinity in the JSON.
    assert rows[2].endswith("| -1.000 | 0.0312 |")
    assert as_json(results)[2]["difference"] == {"value": -1.0, "low": None, "high": None}


def _fields(item: Item) -> dict[str, Any]:
    return {name: getattr(item, name) for name in item.__slots__}
