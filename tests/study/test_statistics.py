import math

import numpy as np
import pytest

from keytoken.study.statistics import (
    holm,
    mean_interval,
    paired_difference,
    paired_t,
    t_quantile,
    t_two_sided,
)

# Two-sided 5 % points of Student's t, from printed tables.
TABLE = {1: 12.7062, 2: 4.30265, 3: 3.18245, 4: 2.77645, 5: 2.57058, 9: 2.26216, 10: 2.22814, 30: 2.04227}


@pytest.mark.parametrize(("degrees", "point"), TABLE.items())
def test_quantiles_of_the_table(degrees: int, point: float) -> None:
    assert t_quantile(degrees) == pytest.approx(point, abs=6e-6 * point)
    assert t_two_sided(point, degrees) == pytest.approx(0.05, abs=2e-6)
    assert t_two_sided(-point, degrees) == t_two_sided(point, degrees)


def test_closed_forms_of_small_degrees() -> None:
    """One degree is Cauchy's distribution, two have a root."""
    for t in (0.0, 0.3, 1.0, 4.0, 50.0):
        assert t_two_sided(t, 1) == pytest.approx(1 - 2 / math.pi * math.atan(t), abs=1e-12)
        assert t_two_sided(t, 2) == pytest.approx(1 - t / math.sqrt(2 + t * t), abs=1e-12)
    assert t_two_sided(1.96, 2001) == pytest.approx(0.0501, abs=2e-4)


def test_paired_test_by_hand() -> None:
    """Differences 1 2 3 4 5: mean 3, variance 2.5, error sqrt(0.5), so t is 4.2426 with 4 degrees."""
    found = paired_t([1, 2, 3, 4, 5])
    half = 2.776445 * math.sqrt(0.5)
    assert found.difference.value == 3
    assert (found.difference.low, found.difference.high) == pytest.approx((3 - half, 3 + half), abs=1e-5)
    # With 4 degrees and x = t^2 / (4 + t^2): p = 1 - sqrt(x) (3 - x) / 2.
    x = 18 / 22
    assert found.p_value == pytest.approx(1 - math.sqrt(x) * (3 - x) / 2, abs=1e-12)
    assert found.count == 5


def test_one_pair_and_equal_pairs() -> None:
    single = paired_t([0.4])
    assert single.p_value == 1 and single.difference.low == -math.inf
    assert paired_t([0.0, 0.0, 0.0]).p_value == 1
    assert paired_t([0.1, 0.1, 0.1]).p_value == 0
    assert mean_interval([2.0, 4.0]).low == pytest.approx(3 - 12.7062, abs=1e-3)


def test_holm_by_hand() -> None:
    """0.01 * 4, 0.02 * 3, 0.03 * 2 raised to the one before, 0.9."""
    found = holm({"d": 0.9, "a": 0.01, "c": 0.03, "b": 0.02})
    assert found == pytest.approx({"d": 0.9, "a": 0.04, "c": 0.06, "b": 0.06})
    assert list(found) == ["d", "a", "c", "b"]
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}


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
