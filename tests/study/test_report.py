"""What a report says, from made-up runs whose differences are known by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from keytoken.scoring.statistics import Estimate
from keytoken.study.analysis import ALL, GREEDY, SAMPLED, analyse, by_family
from keytoken.study.config import StudyConfig, parse_study
from keytoken.study.evaluation import Evaluation
from keytoken.study.report import write_report
from keytoken.study.runs import RunResult
from keytoken.study.summary import interval, summarise

PROMPTS = 20  # two families of ten, ten samples of each prompt: one right answer is half a point


def study_of(arms: Sequence[str], seeds: Sequence[int]) -> StudyConfig:
    section = {"world": "standard", "warm_start": "w", "seeds": list(seeds), "arms": list(arms)}
    return parse_study(
        {
            "name": "made",
            "lr": 1e-3,
            "steps": 2,
            "arms": {arm: {"method": "all", "title": arm.upper()} for arm in arms},
            "warm_starts": {"w": {}},
            "sections": {"one": section},
        }
    )


def made(arm: str, seed: int, right: int) -> RunResult:
    """A run with so many right sampled answers, dealt out from the first prompt on; five greedy ones."""
    full, rest = divmod(right, 5)
    sampled = [5] * full + [rest] + [0] * (PROMPTS - full - 1)
    families = ["count"] * 10 + ["text"] * 10
    found = Evaluation(families, sampled, [1] * 5 + [0] * 15, 5, 1.0, 20.0)
    steps: dict[str, list[float | None]] = {"accuracy": [0.5, 0.6], "entropy": [0.2, None]}
    cost = {"train_wall_s": 2.0, "train_cpu_s": 1.0}
    return RunResult("one", arm, seed, "", {"test": found}, steps if arm != "start" else {}, cost, {})


def runs_of(right: Mapping[str, Sequence[int]]) -> list[RunResult]:
    return [made(arm, seed, each) for arm, values in right.items() for seed, each in enumerate(values)]


RIGHT = {
    "start": [40, 41, 39, 40, 40],
    "grpo": [50, 52, 48, 51, 49],
    "random": [44, 45, 43, 45, 43],
    "better": [60, 63, 57, 61, 59],
    "same": [52, 50, 49, 52, 47],
}


def test_accuracies_and_paired_differences_by_hand() -> None:
    (section,) = analyse(study_of([*RIGHT][1:], range(5)), runs_of(RIGHT))
    grpo, same = section.arms["grpo"], section.arms["same"]
    assert grpo.accuracy["test", SAMPLED, ALL].value == pytest.approx(0.5)
    assert grpo.accuracy["test", GREEDY, ALL] == Estimate(0.25, 0.25, 0.25)
    # Ten prompts of a family have fifty answers: all right in the first, none in the second.
    assert grpo.by_seed["test", SAMPLED, "count"][2] == pytest.approx(48 / 50)
    assert section.families == ["count", "text", ALL]
    # same - grpo in points: 2 -2 1 1 -2, mean 0, variance 14 / 4.
    test = same.comparisons["grpo"].test
    half = 2.776445 * math.sqrt(14 / 4 / 5) / 100
    assert test.difference.value == pytest.approx(0)
    assert (test.difference.low, test.difference.high) == pytest.approx((-half, half), abs=1e-6)
    assert test.p_value == pytest.approx(1) and test.count == 5
    # better - grpo: 10 11 9 10 10, error sqrt(0.5 / 5), t = 31.6; random - grpo: -6 -7 -5 -6 -6.
    better, random = (section.arms[arm].comparisons["grpo"] for arm in ("better", "random"))
    t = 10 / math.sqrt(0.5 / 5)
    x = t * t / (4 + t * t)
    assert better.test.p_value == pytest.approx(1 - math.sqrt(x) * (3 - x) / 2, abs=1e-9)
    assert better.adjusted == pytest.approx(3 * better.test.p_value)
    assert (better.verdict, random.verdict, same.comparisons["grpo"].verdict) == (1, -1, 0)
    # By prompt: better has ten more right answers on average, all of them on two prompts.
    assert better.by_prompt.value == pytest.approx(0.1) and better.by_prompt.low < 0.1
    assert "grpo" not in grpo.comparisons and "start" in grpo.comparisons


def summary_of(right: Mapping[str, Sequence[int]]) -> str:
    study = study_of([arm for arm in right if arm != "start"], range(len(next(iter(right.values())))))
    return " ".join(summarise(study, analyse(study, runs_of(right)), lambda arm: arm.upper()))


def test_sentences_follow_the_numbers() -> None:
    text = summary_of(RIGHT)
    assert "40.0 % of the sampled and 25.0 % of the greedy answers are right" in text
    assert "GRPO raises sampled accuracy (+10.0 [" in text
    assert "Better than GRPO after Holm's correction: BETTER (+10.0 [" in text
    assert "Worse than GRPO after Holm's correction: RANDOM (-6.0 [" in text
    assert "No evidence of a difference from GRPO: SAME." in text
    assert "Better than RANDOM" in text and "with 5 seeds" in text
    turned = summary_of({arm: [100 - each for each in values] for arm, values in RIGHT.items()})
    assert "GRPO lowers sampled accuracy (-10.0 [" in turned
    assert "Better than GRPO after Holm's correction: RANDOM" in turned


def test_without_differences_every_sentence_says_so() -> None:
    noise = [[50, 52, 48], [51, 50, 50], [49, 53, 48], [50, 49, 52]]
    text = summary_of(dict(zip(("start", "grpo", "random", "same"), noise, strict=True)))
    assert "There is no evidence that GRPO changes sampled accuracy" in text
    assert "No evidence of a difference from GRPO: RANDOM and SAME." in text
    assert "Better" not in text and "Worse" not in text and "raises" not in text


def test_one_seed_claims_nothing() -> None:
    text = summary_of({arm: values[:1] for arm, values in RIGHT.items()})
    assert "one seed" in text and "Better" not in text and "raises" not in text


def test_seeds_that_only_one_arm_has_are_left_out_of_the_pairs() -> None:
    runs = [*runs_of(RIGHT), made("better", 7, 5)]
    (section,) = analyse(study_of([*RIGHT][1:], [*range(5), 7]), runs)
    assert section.arms["better"].comparisons["grpo"].test.count == 5
    assert len(section.arms["better"].runs) == 6


def test_families_of_an_evaluation() -> None:
    found = Evaluation(["a", "b", "a"], [2, 1, 0], [1, 1, 0], 2, 1.0, 9.0)
    assert by_family(found, SAMPLED) == {"a": 0.5, "b": 0.5, ALL: 0.5}
    assert by_family(found, GREEDY) == {"a": 0.5, "b": 1.0, ALL: pytest.approx(2 / 3)}


def test_interval_of_one_seed() -> None:
    assert interval(Estimate(0.5, -math.inf, math.inf)) == "50.0 [one seed]"
    assert interval(Estimate(0.012, -0.001, 0.025), "+") == "+1.2 [-0.1, +2.5]"


def test_report_files(tmp_path: Path) -> None:
    study = study_of([*RIGHT][1:], range(5))
    path = write_report(tmp_path, study, runs_of(RIGHT))
    lines = path.read_text().splitlines()
    row: Any = next(line for line in lines if line.startswith("| BETTER | 5 |"))
    assert "60.0 [" in row and "+10.0 [" in row and "**better**" in row
    tables = [line for line in lines if line.startswith("|")]
    assert all(line.count("|") >= 4 for line in tables)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["one"]["arms"]["better"]["comparisons"]["grpo"]["verdict"] == 1
    csv = (tmp_path / "results.csv").read_text().splitlines()
    assert sum(line.startswith("one,better,minus") for line in csv) == 3
