"""Rows that say the same, and rows that contradict each other.

Two rows ask the same if they name the same file, or part of it, and the same question (case, blanks and marks
at its ends do not count) with the same options, in whatever order. Then either

* everything agrees, also the order of the options: a copy. The first stays, the others are dropped.
* the right answer agrees and the order of the options differs: a variant. Both stay and are counted.
* the right answers differ: a contradiction. None of them stays, since nobody knows which is right.

The same question with other options asks something else, and stays.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from keytoken.data.prepare.samples import MULTIPLE_CHOICE, RowProblem, Sample, normalized

Located = tuple[Sample, Path]


@dataclass(slots=True)
class Sorted:
    """What became of the rows.

    Attributes:
        kept: In the order given.
        copies: Dropped rows, with the row that stays.
        refused: Rows that cannot stay, with the problem of each.
        num_variants: Kept rows that ask a kept question again with the options in another order.
        num_repeated_ids: Kept rows whose id an earlier row has, where the source allows it.
    """

    kept: list[Located] = field(default_factory=list)
    copies: list[tuple[Sample, Sample]] = field(default_factory=list)
    refused: list[tuple[Sample, RowProblem]] = field(default_factory=list)
    num_variants: int = 0
    num_repeated_ids: int = 0


def sort_out(rows: Sequence[Located], unique_ids: bool) -> Sorted:
    """Set copies, contradictions and repeated ids apart.

    Args:
        rows: Checked rows with their files.
        unique_ids: Whether a row with the id of an earlier one is refused, unless it is a copy of it.
    """
    result = Sorted()
    groups: dict[tuple[object, ...], list[Located]] = {}
    for row in rows:
        groups.setdefault(_asked(*row), []).append(row)
    dropped: set[int] = set()
    for group in groups.values():
        dropped |= _sort_group([sample for sample, _ in group], result)
    owners: dict[str, Sample] = {}
    for sample, path in rows:
        if sample.number in dropped:
            continue
        owner = owners.setdefault(sample.item_id, sample) if sample.item_id else sample
        if owner is not sample and unique_ids:
            what = f"the id {sample.item_id!r} is that of {owner.place} already; give every row its own"
            result.refused.append((sample, RowProblem("repeated id", what)))
            continue
        result.num_repeated_ids += owner is not sample
        result.kept.append((sample, path))
    return result


def _sort_group(group: list[Sample], result: Sorted) -> set[int]:
    """Sort rows that ask the same; returns the numbers of those that do not stay."""
    if len(group) == 1:
        return set()
    if len({_meant(sample) for sample in group}) > 1:
        places = " and ".join(sample.place for sample in group[:4]) + (
            " and others" if len(group) > 4 else ""
        )
        for sample in group:
            detail = f"{places} ask the same of {sample.media} and give different answers; keep the right one"
            result.refused.append((sample, RowProblem("contradicting answers", detail)))
        return {sample.number for sample in group}
    first: dict[tuple[str, ...], Sample] = {}
    dropped = set()
    for sample in group:
        stays = first.setdefault(sample.options, sample)
        if stays is not sample:
            result.copies.append((sample, stays))
            dropped.add(sample.number)
    result.num_variants += len(first) - 1
    return dropped


def _asked(sample: Sample, path: Path) -> tuple[object, ...]:
    """What a row asks, apart from the order of its options."""
    question = normalized(sample.question)
    if sample.options_inline:  # the text ends in the options, whose order does not count
        question = question.partition("options:")[0]
    return str(path), sample.span, question, sample.problem_type, frozenset(sample.options)


def _meant(sample: Sample) -> str:
    """The right answer, apart from its letter."""
    if sample.problem_type == MULTIPLE_CHOICE:
        return sample.options[ord(sample.answer) - ord("A")]
    return normalized(sample.answer)
