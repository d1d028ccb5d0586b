"""A benchmark as a task of lmms-eval, with our prompts and our rules: what the exported ``utils.py`` calls.

lmms-eval reads the task's ``questions.jsonl``, asks the model, hands every document and its responses to
:func:`process` and all results to :func:`aggregate` or :func:`undecided`. What :func:`process` returns stands
in the sample logs as well, so ``keytoken score`` reads them back by their ids.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from keytoken.errors import DataError
from keytoken.scoring.benchmarks import get_benchmark
from keytoken.scoring.items import Item

SCORE, UNDECIDED = "keytoken_score", "keytoken_undecided"

Document = Mapping[str, Any]  # a row of questions.jsonl
Result = Mapping[str, Any]  # what process made of it


def document(item: Item, prompt: str, root: Path | None) -> dict[str, str | None]:
    """The row of a question; the whole question goes along as text, so that all rows have the same fields.

    Args:
        item: The question.
        prompt: What is asked.
        root: Folder of the videos; None if the question names it.
    """
    whole = json.dumps(dataclasses.asdict(item), ensure_ascii=False)
    video = item.video if root is not None or item.video is None else str(Path(item.root) / item.video)
    return {
        "item_id": item.item_id,
        "prompt": prompt,
        "answer": item.answer,
        "video": video,
        "item": whole,
    }


def item_of(doc: Document) -> Item:
    """The question of a row."""
    fields = json.loads(doc["item"])
    for name in ("options", "images"):
        fields[name] = tuple(fields[name])
    return Item(**fields)


def visual(doc: Document, media: str) -> list[str]:
    """Path of the video below the media root, in a list; empty for a question without one.

    Raises:
        DataError: If there is no such file.
    """
    if doc["video"] is None:
        return []
    path = Path(media) / doc["video"]
    if not path.exists():
        raise DataError(
            f"{path} does not exist; export the task again with media_root= the folder of the videos."
        )
    return [str(path)]


def process(benchmark: str, doc: Document, responses: Sequence[str]) -> dict[str, Result]:
    """The verdict on the first response, under the names of the metrics.

    Args:
        benchmark: Name of the benchmark.
        doc: A row of ``questions.jsonl``.
        responses: What lmms-eval gives: responses to one document.
    """
    item = item_of(doc)
    verdict = get_benchmark(benchmark).score(item, responses[0])
    result = dataclasses.asdict(verdict) | {"item_id": item.item_id, "categories": dict(item.categories)}
    return {SCORE: result, UNDECIDED: result}


def aggregate(benchmark: str, results: Sequence[Result]) -> float:
    """The official overall score of the decided answers, in [0, 1]; NaN if none is decided."""
    decided = [result for result in results if result["score"] is not None]
    if not decided:
        return math.nan
    weigh = get_benchmark(benchmark).weights
    weights = [1.0] * len(decided) if weigh is None else weigh([_bare(benchmark, one) for one in decided])
    total = sum(weight * result["score"] for weight, result in zip(weights, decided, strict=True))
    return total / sum(weights)


def undecided(results: Sequence[Result]) -> float:
    """Share of the answers that the rule could not decide."""
    return sum(result["score"] is None for result in results) / len(results)


def _bare(benchmark: str, result: Result) -> Item:
    """As much of a question as the weights need."""
    return Item(
        benchmark=benchmark,
        item_id=result["item_id"],
        question="",
        answer="",
        kind="open",
        categories=result["categories"],
    )
