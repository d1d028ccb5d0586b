import math

import numpy as np
import pytest

from keytoken.demo.statistics import AnswerRecord, compare, paired_difference, wilson
from keytoken.errors import DataError


def test_wilson_against_published_values() -> None:
    """Newcombe 1998, table I (without continuity correction): 81/263, 15/148, 0/20, 1/29."""
    for hits, count, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        estimate = wilson(hits / count, count)
        assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=5e-5)


def test_paired_difference_by_hand() -> None:
    estimate = paired_difference([0, 0, 1, 1], [1, 0, 1, 1])
    half = 1.959964 * math.sqrt(0.25 / 4)  # differences 1, 0, 0, 0: variance 1/4
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((0.25, 0.25 - half, 0.25 + half))


def test_interval_covers_the_truth_with_several_answers_a_prompt() -> None:
    """Answers to one prompt are correlated; about 95 % of the intervals must still cover the truth."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        difficulty = rng.beta(0.5, 0.5, 120)
        before = rng.binomial(4, 0.8 * difficulty) / 4
        after = rng.binomial(4, 0.8 * difficulty + 0.1) / 4
        estimate = paired_difference(before.tolist(), after.tolist())
        covered += estimate.low <= 0.1 <= estimate.high
    assert 0.92 <= covered / 400 <= 0.98


def test_one_prompt_says_nothing() -> None:
    assert paired_difference([0.0], [1.0]).low == -math.inf


def _records(answers: dict[str, list[float]]) -> list[AnswerRecord]:
    return [
        AnswerRecord(prompt, prompt.split("-")[0], hit) for prompt, hits in answers.items() for hit in hits
    ]


def test_families_and_all_are_compared_by_prompt() -> None:
    before = _records({"color-1": [0, 1], "color-2": [0, 0], "text-1": [1, 1]})
    after = _records({"text-1": [1, 1], "color-2": [0, 1], "color-1": [1, 1]})
    color, text, everything = compare(before, after)
    assert (color.family, text.family, everything.family) == ("color", "text", "all")
    assert (color.before.value, color.after.value, color.difference.value) == (0.25, 0.75, 0.5)
    assert (color.num_prompts, color.num_answers) == (2, 8)
    assert text.difference.value == 0 and not text.improved
    assert everything.before.value == pytest.approx(0.5) and color.improved


def test_unpaired_or_empty_evaluations_are_refused() -> None:
    with pytest.raises(DataError, match="color-2"):
        compare(_records({"color-1": [1]}), _records({"color-1": [1], "color-2": [1]}))
    with pytest.raises(DataError, match="empty"):
        compare([], [])
