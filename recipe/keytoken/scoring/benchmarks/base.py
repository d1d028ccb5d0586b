"""What a benchmark is: how its question files are read, what is asked, and by which rule an answer counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keytoken.scoring.items import Item, Verdict
from keytoken.scoring.prompts import OFFICIAL, render, with_options

ScoreRule = Callable[[Item, str], Verdict]


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One benchmark by its official rules.

    Attributes:
        name: What a user writes, the key in the registry.
        title: What a report calls it.
        source: Repository or paper whose rule this is, with the commit or date that was read.
        tables: Categories of the items that get a table, in this order.
        sampling: Preset of the sampling contract for evaluation.
        read: Reads official question files; raises DataError that names file and row.
        prompt: Text of the question with its options and the official instruction; neither system prompt nor
            ``<video>`` tag.
        score: The official rule; must end on any text, in time linear in its length.
        variants: Named departures from the official rule.
        weights: Weights of the items, in their order, of which the official overall score is the weighted
            mean (and the mean of a group that of its items); None where all items weigh the same.
        item: One question that a file of predictions carries in Video-R1's form, from its object and its
            place; None if there are no such files of this benchmark.
        compared: Sentences on two runs, from the scores before and after by (category, group).
    """

    name: str
    title: str
    source: str
    tables: tuple[str, ...]
    sampling: str
    read: Callable[[Sequence[Path]], list[Item]]
    prompt: Callable[[Item], str]
    score: ScoreRule
    variants: Mapping[str, ScoreRule] = field(default_factory=dict)
    weights: Callable[[Sequence[Item]], list[float]] | None = None
    item: Callable[[Mapping[str, Any], str], Item] | None = None
    compared: Callable[[Mapping[tuple[str, str], tuple[float, float]]], list[str]] | None = None


def question_text(benchmark: Benchmark, item: Item, style: str) -> str:
    """The text of a question in a style of :mod:`keytoken.scoring.prompts`; "official" is its own wording.

    Raises:
        ConfigurationError: There is no such style.
    """
    if style == OFFICIAL:
        return benchmark.prompt(item)
    return render(with_options(item.question, item.options), item.kind, style, others=(OFFICIAL,))
