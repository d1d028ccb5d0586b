"""Comparisons over few seeds: Student's t without further packages, and Holm's correction.

The unit is a seed. Two arms with the same seed saw the same prompts and the same noise, so their difference
is one paired observation; n seeds give n of them. A seed stands for the luck of the order of prompts and of
sampling, given one warm start and one set of test prompts: the intervals say nothing about others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from keytoken.scoring.statistics import Z_95, Estimate

LEVEL = 0.95
_STEPS = 200  # of a bisection: far below what a float can tell apart


@dataclass(frozen=True, slots=True)
class PairedTest:
    """The mean of paired differences.

    Attributes:
        difference: Mean with its 95 % interval; infinite for a single pair.
        p_value: Two-sided, that a mean this far from 0 comes about if there is no difference; 1 for a single
            pair, which says nothing.
        count: Pairs.
    """

    difference: Estimate
    p_value: float
    count: int


def t_two_sided(t: float, degrees: int) -> float:
    """Probability that Student's t with an integer number of degrees of freedom lies beyond +-|t|.

    Source: Abramowitz and Stegun 26.7.3 and 26.7.4, finite sums.
    """
    if math.isinf(t):
        return 0.0
    theta = math.atan(abs(t) / math.sqrt(degrees))
    cosine, sine = math.cos(theta), math.sin(theta)
    odd = degrees % 2 == 1
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for power in range(1 if odd else 0, degrees - 1, 2):
        total += term
        term *= cosine**2 * (power + 1) / (power + 2)
    within = 2.0 / math.pi * (theta + sine * total) if odd else sine * total
    return min(max(1.0 - within, 0.0), 1.0)


def t_quantile(degrees: int, level: float = LEVEL) -> float:
    """The t beyond which, on both sides together, 1 - level of the distribution lies."""
    low, high = 0.0, 1.0
    while t_two_sided(high, degrees) > 1.0 - level:
        high *= 2.0
    for _ in range(_STEPS):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if t_two_sided(middle, degrees) > 1.0 - level else (low, middle)
    return high


def mean_interval(values: Sequence[float]) -> Estimate:
    """Mean with the 95 % t-interval; infinite for a single value."""
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return Estimate(mean, -math.inf, math.inf)
    half = t_quantile(count - 1) * _standard_error(values, mean)
    return Estimate(mean, mean - half, mean + half)


def paired_t(differences: Sequence[float]) -> PairedTest:
    """Student's paired t-test on the differences of pairs."""
    estimate = mean_interval(differences)
    count = len(differences)
    if count < 2:
        return PairedTest(estimate, 1.0, count)
    error = _standard_error(differences, estimate.value)
    if error == 0.0:
        return PairedTest(estimate, float(estimate.value == 0.0), count)
    return PairedTest(estimate, t_two_sided(estimate.value / error, count - 1), count)


def paired_difference(before: Sequence[float], after: Sequence[float]) -> Estimate:
    """Mean of after - before over prompts with a 95 % interval, normal approximation.

    Each prompt is one observation however many answers it has, so answers to one prompt need not be
    independent. A single prompt has an infinite interval.

    Args:
        before: Mean accuracy of each prompt by one arm.
        after: The same prompts by another one.
    """
    differences = [right - left for left, right in zip(before, after, strict=True)]
    mean = math.fsum(differences) / len(differences)
    if len(differences) < 2:
        return Estimate(mean, -math.inf, math.inf)
    half = Z_95 * _standard_error(differences, mean)
    return Estimate(mean, mean - half, mean + half)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down adjustment: reject below 0.05, and one false rejection among all has at most 5 %.

    Source: Holm 1979. The i-th smallest of m is multiplied by m - i + 1; none falls below the one before it.
    """
    adjusted, largest = {}, 0.0
    ordered = sorted(p_values, key=lambda name: p_values[name])
    for rank, name in enumerate(ordered):
        largest = max(largest, min(1.0, p_values[name] * (len(ordered) - rank)))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def _standard_error(values: Sequence[float], mean: float) -> float:
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return math.sqrt(variance / len(values))
