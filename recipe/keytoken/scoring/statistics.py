"""Intervals of scores and tests of differences: Wilson, the bootstrap over clips, McNemar's exact test.

Questions about one clip are answered from the same frames, so their scores go together. The bootstrap draws
clips, each with all its questions; where every clip has one question that is the ordinary bootstrap. Its
intervals are percentiles of seeded resamples: the same scores give the same interval on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from keytoken.errors import DataError

Z_95 = 1.959963984540054  # standard normal quantile of a two-sided 95 % interval
RESAMPLES = 2000  # an end of an interval is then known to some 2 % of its width
_CHUNK = 4_000_000  # drawn numbers at a time: 32 MB


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with the ends of its 95 % interval; infinite ends where there is nothing to tell them from."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class McNemar:
    """McNemar's exact test on questions that were answered twice.

    Attributes:
        lost: Right the first time, wrong the second.
        gained: Wrong the first time, right the second.
        p_value: Two-sided, that a split at least as uneven comes about if both are equally likely.
    """

    lost: int
    gained: int
    p_value: float


def wilson(share: float, count: int) -> Estimate:
    """Wilson's 95 % score interval of a share of ``count`` independent trials.

    Raises:
        DataError: If there are no trials.
    """
    if count < 1:
        raise DataError("a share needs at least one answer; were there any predictions?")
    z2 = Z_95**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z_95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return Estimate(share, max(0.0, centre - half), min(1.0, centre + half))


def bootstrap_mean(
    values: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    weights: Sequence[float] | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """(Weighted) mean with the 2.5 and 97.5 percentiles of the means of resampled clusters.

    Args:
        values: Scores, [N].
        clusters: [N] what is drawn together, such as the clip; None if every value is drawn alone.
        weights: [N] of the mean; None if all weigh the same.
        resamples: How often all clusters are drawn, with replacement.
        seed: Of the draws.

    Returns:
        The estimate. One cluster has an infinite interval. Values that are all 0 or all 1 leave the bootstrap
        nothing to vary; they get Wilson's interval of as many trials as there are clusters.

    Raises:
        DataError: If there are no values, or weights that sum to nothing.
    """
    scores = np.asarray(values, dtype=np.float64)
    if scores.size == 0:
        raise DataError("a mean needs at least one score; were there any predictions?")
    heavy = np.ones_like(scores) if weights is None else np.asarray(weights, dtype=np.float64)
    if not heavy.sum() > 0.0:
        raise DataError("the weights of the scores sum to nothing; give some of them a weight above 0.")
    numbers = _numbered(clusters) if clusters is not None else np.arange(scores.size)
    count = int(numbers.max()) + 1
    top = np.bincount(numbers, heavy * scores, minlength=count)
    bottom = np.bincount(numbers, heavy, minlength=count)
    mean = float(top.sum() / bottom.sum())
    if np.all(scores == scores[0]) and scores[0] in (0.0, 1.0):
        return wilson(float(scores[0]), count)
    if count < 2:
        return Estimate(mean, -math.inf, math.inf)
    means = _resampled(top, bottom, resamples, seed)
    low, high = np.percentile(means, (2.5, 97.5))
    return Estimate(mean, float(low), float(high))


def paired_bootstrap(
    before: Sequence[float],
    after: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    weights: Sequence[float] | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Mean of after - before with its interval: both scores of a question are drawn together.

    Args:
        before: Scores of the first run, [N].
        after: Those of the second run on the same questions, in the same order.
        clusters: See :func:`bootstrap_mean`.
        weights: See :func:`bootstrap_mean`.
        resamples: See :func:`bootstrap_mean`.
        seed: See :func:`bootstrap_mean`.

    Raises:
        DataError: If there are no scores.
    """
    differences = [right - left for left, right in zip(before, after, strict=True)]
    if differences and all(difference == differences[0] for difference in differences):
        return Estimate(differences[0], -math.inf, math.inf)
    return bootstrap_mean(differences, clusters, weights, resamples=resamples, seed=seed)


def mcnemar(before: Sequence[float], after: Sequence[float]) -> McNemar | None:
    """McNemar's exact test; None unless every score is 0 or 1.

    Source: McNemar 1947 in its exact form, a sign test on the questions whose verdict changed. The p-value
    is computed with whole numbers. The test takes questions for independent, also those about one clip.
    """
    pairs = list(zip(before, after, strict=True))
    if not all(score in (0.0, 1.0) for pair in pairs for score in pair):
        return None
    lost = sum(left > right for left, right in pairs)
    gained = sum(left < right for left, right in pairs)
    changed = lost + gained
    tail = sum(math.comb(changed, number) for number in range(min(lost, gained) + 1))
    # Python divides whole numbers of any size; the quotient is a float.
    return McNemar(lost, gained, min(1.0, 2 * tail / 2**changed))


def _numbered(clusters: Sequence[Hashable]) -> np.ndarray:
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters], dtype=np.int64)


def _resampled(top: np.ndarray, bottom: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    means = []
    at_once = max(1, _CHUNK // top.size)
    for start in range(0, resamples, at_once):
        drawn = rng.integers(0, top.size, (min(at_once, resamples - start), top.size))
        sums = bottom[drawn].sum(axis=1)
        # A draw of nothing but weightless clusters has no mean; it says as little as no draw.
        kept = sums > 0.0
        means.append(top[drawn[kept]].sum(axis=1) / sums[kept])
    return np.concatenate(means)
