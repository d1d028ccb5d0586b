"""VSI-Bench against worked examples and an independent transcription of its mean relative accuracy."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from keytoken.errors import DataError
from keytoken.scoring.benchmarks import get_benchmark, vsibench
from keytoken.scoring.items import Item

TYPES = [*vsibench.LETTER_TYPES, *vsibench.NUMBER_TYPES]


def item(question_type: str, answer: str, item_id: str = "0") -> Item:
    options = ("chair", "table", "sofa", "lamp") if question_type in vsibench.LETTER_TYPES else ()
    return Item(
        benchmark="vsibench",
        item_id=item_id,
        question="How many chairs are there?",
        answer=answer,
        kind="multiple choice" if options else "numerical",
        options=options,
        categories={
            "type": vsibench.LETTER_TYPES.get(question_type, question_type),
            "question_type": question_type,
        },
    )


def row(kind: str, /, **changes: object) -> dict[str, object]:
    letters = kind in vsibench.LETTER_TYPES
    return {
        "id": 17,
        "dataset": "scannet",
        "scene_name": "scene0011_00",
        "question_type": kind,
        "question": "How many chairs are there?",
        "ground_truth": "B" if letters else "4",
        "options": ["A. chair", "B. table", "C. sofa", "D. lamp"] if letters else None,
    } | changes


def transcribed(prediction: float, truth: float, strict: bool) -> float:
    """The official formula once more, threshold by threshold."""
    start, end, interval = 0.5, 0.95, 0.05
    hits = []
    for confidence in np.linspace(start, end, int((end - start) / interval + 2)):
        distance = abs(prediction - truth) / truth
        hits.append(distance < 1 - confidence if strict else distance <= 1 - confidence)
    assert len(hits) == 10
    return float(np.mean(hits))


@pytest.mark.parametrize(
    ("prediction", "truth", "official", "strict"),
    [
        (4.0, 4.0, 1.0, 1.0),
        (15.0, 10.0, 0.1, 0.0),  # off by half: only the threshold 0.5 is kept, and by equality
        (5.0, 10.0, 0.1, 0.0),
        (14.0, 10.0, 0.3, 0.2),  # 0.4 keeps 0.5, 0.45 and, by equality, 0.4
        (9.9, 10.0, 1.0, 1.0),
        (15.1, 10.0, 0.0, 0.0),
        (0.1 + 0.2, 0.3, 1.0, 1.0),
        (0.15, 0.3, 0.1, 0.0),
        (0.15, 0.1 + 0.2, 0.0, 0.0),  # 0.30000000000000004 / 2 is further away than half
        (-4.0, 4.0, 0.0, 0.0),
        (float("nan"), 4.0, 0.0, 0.0),
        (float("inf"), 4.0, 0.0, 0.0),
        (0.0, 0.0, 1.0, 1.0),
        (1e-300, 0.0, 0.0, 0.0),
    ],
)
def test_mean_relative_accuracy_by_hand(
    prediction: float, truth: float, official: float, strict: float
) -> None:
    assert vsibench.mean_relative_accuracy(prediction, truth) == official
    assert vsibench.mean_relative_accuracy(prediction, truth, strict=True) == strict


def test_mean_relative_accuracy_agrees_with_a_transcription_and_with_exact_fractions() -> None:
    rng = np.random.default_rng(0)
    truths = rng.choice([0.1, 0.3, 1.0, 3.0, 7.0, 12.5, 40.0], 3000)
    ratios = rng.choice([0.5, 0.55, 0.6, 0.75, 0.8, 0.95, 1.0, 1.05, 1.2, 1.25, 1.45, 1.5, 2.0], 3000)
    noise = rng.choice([0.0, 0.0, 1e-16, -1e-16, 0.01, -0.02], 3000)
    differs = 0
    for truth, prediction in zip(truths.tolist(), (truths * ratios + noise).tolist(), strict=True):
        values = [vsibench.mean_relative_accuracy(prediction, truth, strict=strict) for strict in (0, 1)]
        assert values == [transcribed(prediction, truth, strict) for strict in (False, True)]
        differs += values[0] != values[1]
        error = abs(Fraction(prediction) - Fraction(truth)) / Fraction(truth)
        tolerances = [Fraction(50 - 5 * step, 100) for step in range(10)]
        if min(abs(error - one) for one in tolerances) > Fraction(1, 10**9):
            assert values[0] == sum(error <= one for one in tolerances) / 10
    assert differs > 50  # the variant was really tried


@pytest.mark.parametrize(
    ("response", "score", "rule"),
    [
        ("4", 1.0, "number"),
        ("4.", 1.0, "number"),
        ("4.0 chairs", 1.0, "number"),
        ("3 m", 0.6, "number"),  # 0.25 keeps 0.5, 0.45, 0.4, 0.35, 0.3 and, by equality, 0.25
        ("3m", 0.0, "unmatched"),
        ("3\nmeters", 0.0, "unmatched"),
        ("two", 0.0, "unmatched"),
        ("1,000", 0.0, "unmatched"),
        ("There are 4", 0.0, "unmatched"),
        ("", 0.0, "unmatched"),
        ("...", 0.0, "unmatched"),
        ("nan", 0.0, "number"),
        ("<think>2 and 2</think><answer>4</answer>", 1.0, "tag"),
        ("<think>2 and 2</think>4", 1.0, "number"),
        ("4" * 1_000_000, 0.0, "number"),
        (". " * 500_000, 0.0, "unmatched"),
    ],
)
def test_numbers(response: str, score: float, rule: str) -> None:
    verdict = vsibench.score(item("object_counting", "4"), response)
    assert (verdict.score, verdict.rule) == (score, rule)


@pytest.mark.parametrize(
    ("response", "score", "rule"),
    [
        ("B", 1.0, "letter"),
        ("b.", 1.0, "letter"),
        ("B. table", 1.0, "letter"),
        ("A", 0.0, "letter"),
        ("(B)", 0.0, "unmatched"),
        ("B) table", 0.0, "unmatched"),
        ("The answer is B", 0.0, "unmatched"),
        ("", 0.0, "unmatched"),
        ("<answer>B</answer>", 1.0, "tag"),
    ],
)
def test_letters(response: str, score: float, rule: str) -> None:
    verdict = vsibench.score(item("route_planning", "B"), response)
    assert (verdict.score, verdict.rule) == (score, rule)


def test_the_variant_strict_scores_equality_lower() -> None:
    strict = get_benchmark("vsibench").variants["strict"]
    assert strict(item("object_counting", "4"), "2").score == 0.0
    assert vsibench.score(item("object_counting", "4"), "2").score == 0.1


def test_the_overall_score_is_the_mean_over_types_with_directions_as_one() -> None:
    """Ragged sizes: 1 easy, 2 medium, 3 hard, 4 distances, 1 count; means by hand."""
    sizes = {
        "object_rel_direction_easy": [1.0],
        "object_rel_direction_medium": [1.0, 0.0],
        "object_rel_direction_hard": [0.0, 0.0, 1.0],
        "object_rel_distance": [1.0, 1.0, 1.0, 0.0],
        "object_counting": [0.3],
    }
    items = [item(kind, "B" if kind != "object_counting" else "4") for kind in sizes for _ in sizes[kind]]
    scores = [score for kind in sizes for score in sizes[kind]]
    by_hand = ((1.0 + 0.5 + 1 / 3) / 3 + 0.75 + 0.3) / 3
    weights = vsibench.weights(items)
    assert sum(weights) == pytest.approx(1.0, abs=1e-12)
    assert np.dot(weights, scores) == pytest.approx(by_hand, abs=1e-12)


def test_all_ten_kinds_of_questions_are_read_in_both_formats(tmp_path: Path) -> None:
    rows = [row(kind, id=number) for number, kind in enumerate(TYPES)]
    lines = tmp_path / "test.jsonl"
    lines.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    table = tmp_path / "test_debiased.parquet"
    pruned = [one | {"pruned": False} for one in rows]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(pruned), table)
    items = vsibench.read([lines])
    assert [one.item_id for one in items] == [str(number) for number in range(10)]
    assert len({one.categories["type"] for one in items}) == 8
    assert items[0].options == ("chair", "table", "sofa", "lamp")
    assert items[0].video == "scannet/scene0011_00.mp4"
    assert [one.kind for one in items].count("numerical") == 4
    from_table = vsibench.read([table])
    assert [one.question for one in from_table] == [one.question for one in items]
    assert {one.categories["subset"] for one in from_table} == {"debiased"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"question_type": "colour"}, "'colour' is not known", id="unknown type"),
        pytest.param({"ground_truth": "many"}, "'many' must be a number", id="truth no number"),
        pytest.param({"ground_truth": "-1"}, "'-1' must be a number", id="truth negative"),
        pytest.param({"ground_truth": None}, "no field ground_truth", id="without answer"),
        pytest.param({"question": " "}, "question is ' '", id="empty question"),
        pytest.param(
            {"question_type": "route_planning", "ground_truth": "B"}, "no field options", id="without options"
        ),
        pytest.param(
            {"question_type": "route_planning", "options": ["A. x", "B. y"], "ground_truth": "C"},
            "'C' is the letter of none",
            id="letter beyond options",
        ),
    ],
)
def test_rows_that_cannot_be_scored_are_refused(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    path = tmp_path / "test.jsonl"
    path.write_text(
        json.dumps(row("object_counting")) + "\n" + json.dumps(row("object_counting", id=18, **changes)),
        encoding="utf-8",
    )
    with pytest.raises(DataError, match=message) as raised:
        vsibench.read([path])
    assert f"{path}: row 1" in str(raised.value)


def test_an_id_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "test.jsonl"
    path.write_text(2 * (json.dumps(row("object_counting")) + "\n"), encoding="utf-8")
    with pytest.raises(DataError, match=r"row 1 has the id '17' of .*row 0"):
        vsibench.read([path])


def test_the_prompt_shows_options_with_letters() -> None:
    assert vsibench.prompt(item("route_planning", "B")).split("\n")[2:7] == [
        "Options:",
        "A. chair",
        "B. table",
        "C. sofa",
        "D. lamp",
    ]
    assert "Options" not in vsibench.prompt(item("object_counting", "4"))
