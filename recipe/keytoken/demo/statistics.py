"""Accuracies before and after training, with intervals, for each question family."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from keytoken.errors import DataError

Z_95 = 1.959963984540054  # standard normal quantile of a two-sided 95 % interval


@dataclass(frozen=True)
class AnswerRecord:
    """One scored answer to a held-out prompt.

    Attributes:
        prompt_id: Which prompt; pairs the answers before training with those after it.
        family: Question family of the prompt.
        correct: Accuracy reward in [0, 1].
        decoding: "sampled" (temperature 1) or "greedy".
    """

    prompt_id: str
    family: str
    correct: float
    decoding: str = "sampled"


@dataclass(frozen=True)
class Estimate:
    """A value with the ends of its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class FamilyResult:
    """Accuracies of one family.

    Attributes:
        family: The family, or "all".
        num_prompts: Held-out prompts.
        num_answers: Answers, before and after together.
        before: Accuracy before training, Wilson interval.
        after: Accuracy after training, Wilson interval.
        difference: After minus before, from the paired differences of the prompts.
    """

    family: str
    num_prompts: int
    num_answers: int
    before: Estimate
    after: Estimate
    difference: Estimate

    @property
    def improved(self) -> bool:
        """Whether the whole interval of the difference lies above zero."""
        return self.difference.low > 0


def wilson(share: float, count: int) -> Estimate:
    """Wilson's 95 % score interval of a share of ``count`` independent trials.

    Raises:
        DataError: If there are no trials.
    """
    if count < 1:
        raise DataError("an accuracy needs at least one answer")
    z2 = Z_95**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z_95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return Estimate(share, max(0.0, centre - half), min(1.0, centre + half))


def paired_difference(before: Sequence[float], after: Sequence[float]) -> Estimate:
    """Mean of after - before over prompts with a 95 % interval, normal approximation.

    Each prompt is one observation however many answers it has, so answers to one prompt need not be
    independent. A single prompt has an infinite interval.

    Args:
        before: Mean accuracy of each prompt before training.
        after: The same prompts after training.
    """
    differences = [right - left for left, right in zip(before, after, strict=True)]
    count = len(differences)
    mean = sum(differences) / count
    if count < 2:
        return Estimate(mean, -math.inf, math.inf)
    variance = sum((difference - mean) ** 2 for difference in differences) / (count - 1)
    half = Z_95 * math.sqrt(variance / count)
    return Estimate(mean, mean - half, mean + half)


def compare(before: Iterable[AnswerRecord], after: Iterable[AnswerRecord]) -> list[FamilyResult]:
    """Compare two evaluations of the same prompts.

    The Wilson intervals count prompts, not answers: with several answers a prompt they are a little too
    wide, never too narrow.

    Args:
        before: Answers before training, one or more for each prompt.
        after: Answers after training to the same prompts.

    Returns:
        One result for each family in alphabetical order, then one for "all".

    Raises:
        DataError: If the two evaluations do not cover the same prompts.
    """
    before, after = list(before), list(after)
    left, right = _by_prompt(before), _by_prompt(after)
    if left.keys() != right.keys():
        odd = sorted(left.keys() ^ right.keys())
        raise DataError(
            f"{len(odd)} prompts were evaluated only once (first: {odd[0]}); evaluate the same file twice"
        )
    if not left:
        raise DataError("no answers to compare; was the held-out file empty?")
    family_of = {record.prompt_id: record.family for record in before}
    families = [*sorted(set(family_of.values())), "all"]
    results = []
    for family in families:
        prompts = [prompt for prompt in left if family in (family_of[prompt], "all")]
        means_before = [_mean(left[prompt]) for prompt in prompts]
        means_after = [_mean(right[prompt]) for prompt in prompts]
        results.append(
            FamilyResult(
                family,
                len(prompts),
                sum(len(left[prompt]) + len(right[prompt]) for prompt in prompts),
                wilson(_mean(means_before), len(prompts)),
                wilson(_mean(means_after), len(prompts)),
                paired_difference(means_before, means_after),
            )
        )
    return results


def _by_prompt(records: Iterable[AnswerRecord]) -> dict[str, list[float]]:
    grouped: dict[str, list[float]] = defaultdict(list)
    for record in records:
        grouped[record.prompt_id].append(record.correct)
    return grouped


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
