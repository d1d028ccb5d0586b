"""Intervals and tests against independent computations."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from keytoken.errors import DataError
from keytoken.scoring.statistics import bootstrap_mean, mcnemar, paired_bootstrap, wilson


@pytest.mark.parametrize(("right", "count"), [(0, 5), (5, 5), (1, 2), (37, 100), (411, 625)])
def test_wilson_solves_its_equation(right: int, count: int) -> None:
    """Both ends are the shares p for which the observed share lies 1.96 standard errors of p away."""
    found = wilson(right / count, count)
    for end in (found.low, found.high):
        error = 1.959963984540054 * math.sqrt(end * (1 - end) / count)
        assert abs(right / count - end) == pytest.approx(error, abs=1e-12) or end in (0.0, 1.0)
    assert 0.0 <= found.low <= found.value <= found.high <= 1.0


def test_the_bootstrap_against_every_resample() -> None:
    """Three clips have 27 equally likely resamples; the drawn ones must be among them, in their shares."""
    values, clusters = [1.0, 0.0, 1.0, 1.0, 0.0, 0.0], ["x", "x", "y", "y", "y", "z"]
    tops, sizes = {"x": 1.0, "y": 2.0, "z": 0.0}, {"x": 2, "y": 3, "z": 1}
    means = sorted(
        sum(tops[name] for name in (a, b, c)) / sum(sizes[name] for name in (a, b, c))
        for a in "xyz"
        for b in "xyz"
        for c in "xyz"
    )
    found = bootstrap_mean(values, clusters, resamples=20_000)
    assert found.value == 0.5
    assert found.low == pytest.approx(np.quantile(means, 0.025, method="inverted_cdf"))
    assert found.high == pytest.approx(np.quantile(means, 0.975, method="inverted_cdf"))


def test_the_bootstrap_of_many_values_is_the_normal_interval() -> None:
    rng = np.random.default_rng(1)
    values = (rng.random(4000) < 0.3).astype(float).tolist()
    found = bootstrap_mean(values, resamples=4000)
    mean, error = np.mean(values), np.std(values) / math.sqrt(4000)
    assert found.value == pytest.approx(mean)
    # The ends of 4,000 resamples are known to some 3 % of the width.
    assert found.low == pytest.approx(mean - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(mean + 1.96 * error, abs=0.15 * error)


def test_clips_with_equal_answers_widen_the_interval() -> None:
    """Four questions a clip, all answered alike, are as good as one."""
    rng = np.random.default_rng(2)
    clips = (rng.random(100) < 0.5).astype(float)
    values, clusters = np.repeat(clips, 4).tolist(), np.repeat(np.arange(100), 4).tolist()
    apart, together = bootstrap_mean(values), bootstrap_mean(values, clusters)
    once = bootstrap_mean(clips.tolist())
    assert (together.low, together.high) == pytest.approx((once.low, once.high), abs=1e-12)
    assert together.high - together.low > 1.7 * (apart.high - apart.low)


def test_weights() -> None:
    found = bootstrap_mean([1.0, 0.0, 0.0], weights=[2.0, 1.0, 1.0])
    assert found.value == 0.5
    assert bootstrap_mean([1.0, 0.0], weights=[1.0, 0.0]).value == 1.0
    with pytest.raises(DataError, match="weights"):
        bootstrap_mean([1.0, 0.0], weights=[0.0, 0.0])


def test_the_same_scores_give_the_same_interval() -> None:
    values = [float(number % 3 == 0) for number in range(200)]
    assert bootstrap_mean(values) == bootstrap_mean(values)
    assert bootstrap_mean(values) != bootstrap_mean(values, seed=1)


def test_where_there_is_nothing_to_vary() -> None:
    assert bootstrap_mean([1.0] * 5) == wilson(1.0, 5)
    assert bootstrap_mean([0.0] * 4, ["x", "x", "y", "y"]) == wilson(0.0, 2)
    one = bootstrap_mean([1.0, 0.0], ["x", "x"])
    assert (one.value, one.low, one.high) == (0.5, -math.inf, math.inf)
    with pytest.raises(DataError, match="at least one"):
        bootstrap_mean([])


def test_paired_differences_vary_less_than_two_runs() -> None:
    rng = np.random.default_rng(3)
    before = (rng.random(500) < 0.5).astype(float)
    after = before.copy()
    after[:20] = 1.0
    gain = float((after - before).mean())
    found = paired_bootstrap(before.tolist(), after.tolist())
    assert found.value == pytest.approx(gain)
    assert 0.0 < found.low < gain < found.high
    single = bootstrap_mean(before.tolist())
    assert found.high - found.low < 0.5 * (single.high - single.low)
    same = paired_bootstrap([1.0, 0.0], [1.0, 0.0])
    assert (same.value, same.low, same.high) == (0.0, -math.inf, math.inf)


def binomial_two_sided(lost: int, gained: int) -> float:
    """Twice the smaller tail, term by term with fractions."""
    count = lost + gained
    below, term = Fraction(0), Fraction(1, 2**count)
    for number in range(min(lost, gained) + 1):
        below += term
        term = term * (count - number) / (number + 1)
    return min(1.0, float(2 * below))


@pytest.mark.parametrize(
    ("lost", "gained"),
    [(0, 0), (0, 1), (5, 5), (1, 9), (46, 56), (3, 30), (0, 40), (900, 1100), (1200, 1500)],
)
def test_mcnemar(lost: int, gained: int) -> None:
    before = [1.0] * lost + [0.0] * gained + [1.0, 0.0]
    after = [0.0] * lost + [1.0] * gained + [1.0, 0.0]
    found = mcnemar(before, after)
    assert found is not None
    assert (found.lost, found.gained) == (lost, gained)
    assert found.p_value == pytest.approx(binomial_two_sided(lost, gained), rel=1e-12)


def test_mcnemar_against_a_table_by_hand() -> None:
    """1 and 9 of 10: 2 (1 + 10) / 1024."""
    found = mcnemar([1.0] + [0.0] * 9, [0.0] + [1.0] * 9)
    assert found is not None
    assert found.p_value == 22 / 1024


def test_mcnemar_is_for_right_and_wrong_only() -> None:
    assert mcnemar([0.5, 1.0], [1.0, 1.0]) is None
