"""The demo's table: accuracies before and after by family and decoding, and what the controls say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from keytoken.demo.validation import HeldOutAnswer
from keytoken.errors import DataError
from keytoken.evaluation.before_after import changes, report, score_answers, write_table
from keytoken.scoring.benchmarks import get_benchmark
from keytoken.scoring.items import Item
from keytoken.scoring.score import Scores

RIGHT, WRONG = "<think>x</think><answer>A</answer>", "<think>x</think><answer>B</answer>"


def item(number: int) -> Item:
    family = ("color", "text")[number % 2]
    return Item(
        benchmark="demo",
        item_id=f"p{number}",
        question="what color is it ?",
        options=("red", "green", "blue", "yellow"),
        answer="A",
        kind="multiple choice",
        video=f"{number}.mp4" if family == "color" else None,
        categories={"family": family},
    )


ITEMS = [item(number) for number in range(40)]


def answers(hits: list[int], decoding: str, control: str = "none") -> list[HeldOutAnswer]:
    return [
        HeldOutAnswer(one.item_id, one.categories["family"], hit, decoding, control, RIGHT if hit else WRONG)
        for one, hit in zip(ITEMS, hits, strict=False)
        if control == "none" or one.video
    ]


def scored(*parts: list[HeldOutAnswer]) -> list[Scores]:
    return score_answers(get_benchmark("demo"), ITEMS, [answer for part in parts for answer in part])


def row_of(text: str, *cells: str) -> list[str]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    return next(row for row in rows if all(cell in row for cell in cells))


def test_table_holds_families_controls_and_numbers(tmp_path: Path) -> None:
    half = [0, 0, 1, 1] * 10
    before = scored(
        answers([0] * 30 + [1] * 10, "sampled"), answers(half, "greedy"), answers(half, "greedy", "blank")
    )
    after = scored(
        answers([1] * 40, "sampled"), answers(half, "greedy"), answers([0] * 40, "greedy", "blank")
    )
    text = write_table(tmp_path, before, after)
    assert (tmp_path / "table.md").read_text() == text
    sampled = row_of(text, "sampled", "all")
    assert sampled[2] == "40" and sampled[3].startswith("0.250 [") and sampled[4].startswith("1.000 [")
    assert sampled[5].startswith("+0.750 [") and sampled[5].endswith("*")
    assert row_of(text, "greedy", "color")[2] == "20"
    assert not row_of(text, "greedy", "all")[5].endswith("*")
    # Before training blank frames cost nothing; after it every answer about a clip is lost with them.
    blank = row_of(text, "blank frames")
    assert (
        blank[1] == "20"
        and blank[2].startswith("0.500 -> +0.000 [")
        and blank[3].startswith("0.000 -> -0.500 [")
    )
    found = json.loads((tmp_path / "results.json").read_text())
    by_name = {(one["decoding"], one["family"]): one for one in found["changes"]}
    assert by_name["sampled", "all"]["difference"]["value"] == pytest.approx(0.75)
    assert [one["control"] for one in found["controls"]["after"]] == ["none", "blank", "none"]


def test_several_answers_to_a_prompt_are_one_observation() -> None:
    twice = [*answers([1] * 40, "sampled"), *answers([0] * 40, "sampled")]
    (everything,) = [one for one in changes(scored(twice), scored(twice)) if one.family == "all"]
    assert everything.prompts == 40 and everything.before.value == 0.5 and everything.difference.value == 0.0
    assert not everything.improved


def test_validations_of_different_prompts_are_refused() -> None:
    with pytest.raises(DataError, match=r"2 prompts were validated only once, such as p2"):
        changes(scored(answers([1, 0, 1, 1], "greedy")), scored(answers([1, 0], "greedy")))
    with pytest.raises(DataError, match=r"before: greedy; after: sampled"):
        changes(scored(answers([1], "greedy")), scored(answers([1], "sampled")))


def test_a_reward_that_is_not_the_benchmarks_rule_is_refused() -> None:
    wrong = HeldOutAnswer("p0", "color", 1.0, "greedy", "none", WRONG)
    with pytest.raises(DataError, match=r"p0: training gave .* the accuracy 1, the benchmark's rule gives 0"):
        scored([wrong])


def test_one_validation_is_no_comparison(tmp_path: Path) -> None:
    (tmp_path / "validation").mkdir()
    (tmp_path / "validation" / "0.jsonl").touch()
    with pytest.raises(DataError, match=r"holds 1 evaluations.*val_before_train"):
        report(tmp_path)
