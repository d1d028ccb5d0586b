"""VSI-Bench: spatial questions about indoor scans, scored by letters and by mean relative accuracy (MRA).

Read: vision-x-nyu/thinking-in-space, ``lmms_eval/tasks/vsibench/utils.py`` at e6a72f3; the same rules in
lmms-eval at 78ef58a; for the subsets, ``create_pq.py`` of the data set nyu-visionx/VSI-Bench (November
2026).

The rules. What counts is the first word of the response, cut at the first space, without trailing full
stops. A letter has to equal the right one but for case. A number p for the truth t earns the share of the
ten thresholds c = 0.5, 0.55, ..., 0.95 with ``|p - t| / t <= 1 - c``, all in float64; a word that is no
number earns nothing ("two", "1,000" and "3m" are none, "3 m" is 3). Each of ten types of questions has its
mean; the three degrees of relative direction are averaged into one type; the overall score is the mean of
the eight.

Departures: reasoning is not read, only an ``<answer>`` block or what follows ``</think>``, where there is
one (:func:`keytoken.rewards.extract.final_text`), without the whitespace around it. A truth of 0, for
which the script divides by zero, has a relative error of 0 for the answer 0 and an infinite one otherwise.
Types without any question are left out of the mean; the script fails without all three directions.

Variant ``strict``: ``<`` instead of ``<=``, as in copies of the rule; it differs where the relative error
*is* a threshold, such as 0.5.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from keytoken.errors import DataError
from keytoken.rewards.extract import final_text, has_answer
from keytoken.scoring.benchmarks.base import Benchmark
from keytoken.scoring.items import UNMATCHED, Item, Verdict
from keytoken.scoring.rows import Row, letters_off, read_rows, require_unique, text, texts

# The ten kinds of questions, and the type that the official tables count each of them to.
LETTER_TYPES = {
    "object_rel_direction_easy": "object_rel_direction",
    "object_rel_direction_medium": "object_rel_direction",
    "object_rel_direction_hard": "object_rel_direction",
    "object_rel_distance": "object_rel_distance",
    "route_planning": "route_planning",
    "obj_appearance_order": "obj_appearance_order",
}
NUMBER_TYPES = ("object_abs_distance", "object_counting", "object_size_estimation", "room_size_estimation")
TOLERANCES = 1.0 - np.linspace(0.5, 0.95, 10)  # float64, as the official script computes them

# Wording of the official script, kept as it is so that scores can be compared.
FRAMES = "These are frames of a video."
ASK_NUMBER = "Please answer the question using a single word or phrase."
ASK_LETTER = "Answer with the option's letter from the given choices directly."


def mean_relative_accuracy(prediction: float, truth: float, *, strict: bool = False) -> float:
    """Share of the ten tolerances 0.5, 0.45, ..., 0.05 that the relative error keeps within.

    Args:
        prediction: The number of the answer; NaN and infinities earn 0.
        truth: The right number, at least 0.
        strict: Whether an error that equals a tolerance is outside of it.
    """
    error = abs(prediction - truth)
    if error > 0.0:
        error = error / truth if truth > 0.0 else math.inf
    within = error < TOLERANCES if strict else error <= TOLERANCES
    return int(within.sum()) / len(TOLERANCES)


def read(paths: Sequence[Path]) -> list[Item]:
    """Read ``test.jsonl``, or a Parquet file of the whole set or of its debiased or pruned part.

    Raises:
        DataError: Names the file and the row.
    """
    placed = [row for path in paths for row in read_rows(path)]
    items = [_item(row, place) for place, row in placed]
    require_unique((place, item.item_id) for (place, _), item in zip(placed, items, strict=True))
    return items


def prompt(item: Item) -> str:
    """Question, options if there are any, and the official instruction."""
    if item.kind == "numerical":
        return "\n".join((FRAMES, item.question, ASK_NUMBER))
    options = [f"{chr(ord('A') + index)}. {option}" for index, option in enumerate(item.options)]
    return "\n".join((FRAMES, item.question, "Options:", *options, ASK_LETTER))


def score(item: Item, response: str, *, strict: bool = False) -> Verdict:
    """The verdict by the official rule; see the module."""
    answer = final_text(response)
    word = answer.split(" ", 1)[0].rstrip(".").strip()
    if item.kind == "numerical":
        number = _number(word)
        if number is None:
            return Verdict(0.0, "", UNMATCHED)
        rule = "tag" if has_answer(response) else "number"
        return Verdict(mean_relative_accuracy(number, float(item.answer), strict=strict), word, rule)
    if len(word) != 1 or not word.isalpha():
        return Verdict(0.0, "", UNMATCHED)
    return Verdict(
        float(word.lower() == item.answer.lower()), word.upper(), "tag" if has_answer(response) else "letter"
    )


def weights(items: Sequence[Item]) -> list[float]:
    """Weights of which the overall score is the mean over types; they sum to 1."""
    sizes = Counter(item.categories["question_type"] for item in items)
    parts = Counter(LETTER_TYPES.get(name, name) for name in sizes)
    return [
        1.0 / (len(parts) * parts[item.categories["type"]] * sizes[item.categories["question_type"]])
        for item in items
    ]


def _item(row: Row, place: str) -> Item:
    kind = text(row, place, "question_type")
    if kind not in LETTER_TYPES and kind not in NUMBER_TYPES:
        known = ", ".join((*LETTER_TYPES, *NUMBER_TYPES))
        raise DataError(f"{place}: question_type {kind!r} is not known; there are {known}.")
    options: tuple[str, ...] = ()
    answer = text(row, place, "ground_truth").strip()
    if kind in LETTER_TYPES:
        options = letters_off(texts(row, place, "options"))
        if answer not in [chr(ord("A") + index) for index in range(len(options))]:
            raise DataError(f"{place}: ground_truth {answer!r} is the letter of none of the options.")
    elif (truth := _number(answer)) is None or not 0.0 <= truth < math.inf:
        raise DataError(f"{place}: ground_truth {answer!r} must be a number of at least 0.")
    categories = {"type": LETTER_TYPES.get(kind, kind), "question_type": kind}
    if "pruned" in row:
        categories["subset"] = "pruned" if row["pruned"] else "debiased"
    folder = text(row, place, "dataset")
    return Item(
        benchmark="vsibench",
        item_id=text(row, place, "id"),
        question=text(row, place, "question"),
        answer=answer,
        kind="multiple choice" if options else "numerical",
        options=options,
        video=f"{folder}/{text(row, place, 'scene_name')}.mp4",
        categories=categories,
    )


def _number(word: str) -> float | None:
    """What Python's float reads, as officially: "nan" and "1e3" are numbers, "1,000" is none."""
    try:
        return float(word)
    except ValueError:
        return None


BENCHMARK = Benchmark(
    name="vsibench",
    title="VSI-Bench",
    source="vision-x-nyu/thinking-in-space at e6a72f3",
    tables=("type", "question_type", "subset"),
    sampling="eval_64f",
    read=read,
    prompt=prompt,
    score=score,
    variants={"strict": functools.partial(score, strict=True)},
    weights=weights,
)
