"""Two runs on the same questions: paired differences with intervals, and McNemar's exact test."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from keytoken.errors import DataError
from keytoken.scoring.items import Item
from keytoken.scoring.score import ALL, Scores, cluster, item_scores, weights_of
from keytoken.scoring.statistics import Estimate, McNemar, mcnemar, paired_bootstrap


@dataclass(frozen=True, slots=True)
class Difference:
    """The second run against the first one on the questions of a group.

    Attributes:
        category: The category, or "all".
        name: The group, or "all".
        items: Questions that are decided in both runs.
        before: Score of the first run on them.
        after: Score of the second run.
        difference: after - before, paired, with the bootstrap's 95 % interval.
        test: McNemar's test; None where scores lie between 0 and 1, as means of several samples do.
    """

    category: str
    name: str
    items: int
    before: float
    after: float
    difference: Estimate
    test: McNemar | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """All differences, and what could not be compared.

    Attributes:
        rows: First that of all questions, then those of the groups.
        only_before: Ids of the questions that only the first run has decided.
        only_after: Ids of those that only the second run has decided.
    """

    rows: Sequence[Difference]
    only_before: Sequence[str]
    only_after: Sequence[str]


def compare(before: Scores, after: Scores) -> Comparison:
    """Compare two runs on the questions that are decided in both.

    Raises:
        DataError: If they have none in common.
    """
    first, second = item_scores(before.answers), item_scores(after.answers)
    items = {answer.item.item_id: answer.item for answer in after.answers}
    common = [item for item_id, item in items.items() if item_id in first and item_id in second]
    if not common:
        raise DataError("the two runs have no decided question in common; are they of the same benchmark?")
    groups: dict[tuple[str, str], list[Item]] = defaultdict(list)
    for item in common:
        groups[ALL, ALL].append(item)
        for category in after.benchmark.tables:
            if category in item.categories:
                groups[category, item.categories[category]].append(item)
    order = [ALL, *after.benchmark.tables]
    keys = sorted(groups, key=lambda key: (order.index(key[0]), key[1]))
    rows = []
    for category, name in keys:
        members = groups[category, name]
        left, right = ([scores[item.item_id] for item in members] for scores in (first, second))
        weights = weights_of(after.benchmark, members)
        rows.append(
            Difference(
                category=category,
                name=name,
                items=len(members),
                before=_mean(left, weights),
                after=_mean(right, weights),
                difference=paired_bootstrap(left, right, [cluster(item) for item in members], weights),
                test=mcnemar(left, right),
            )
        )
    return Comparison(rows, sorted(first.keys() - second.keys()), sorted(second.keys() - first.keys()))


def _mean(scores: Sequence[float], weights: Sequence[float] | None) -> float:
    heavy = weights or [1.0] * len(scores)
    return sum(weight * score for weight, score in zip(heavy, scores, strict=True)) / sum(heavy)
