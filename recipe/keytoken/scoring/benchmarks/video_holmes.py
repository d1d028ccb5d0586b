"""Video-Holmes: 1,837 questions of seven types about 270 suspense films, six options each.

Read: TencentARC/Video-Holmes, ``evaluate.py`` at 7745c87.

The rule. The content of the last ``<answer>`` block, or the whole response without one, is searched for the
letters A to F in this order: the first letter that stands before a space or a colon, or behind "[", is the
answer; if none does, the first letter that occurs at all. So "B is right, not A " is read as A, and
"Because ..." as B: the official rule, kept. Accuracy for each type and over all questions.

Departure: none. Variant ``named``: the letter that the final answer names
(:func:`keytoken.rewards.extract.read_letter`), which the two examples do not fool.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from keytoken.errors import DataError
from keytoken.rewards.extract import final_text, last_answer, read_letter
from keytoken.scoring.benchmarks.base import Benchmark
from keytoken.scoring.items import UNMATCHED, Item, Verdict
from keytoken.scoring.rows import Row, read_rows, require_unique, text

NAME = "video_holmes"
LETTERS = "ABCDEF"
# Social reasoning, intention and motive chaining, temporal causal inference, timeline analysis, multimodal
# hint reasoning, physical anomaly reasoning, core theme inference.
TYPES = ("SR", "IMC", "TCI", "TA", "MHR", "PAR", "CTI")

# Wording of evaluate.py, kept as it is so that scores can be compared.
PROMPT = (
    "Based on the given video, reason and answer the single-choice question. Provide your reasoning between "
    "the <think> and </think> tags, and then give your final answer between the <answer> and </answer> tags. "
    "The question is: {question}. The options are: {options}. Your answer:"
)


def read(paths: Sequence[Path]) -> list[Item]:
    """Read official question files, a list of objects each.

    Raises:
        DataError: Names the file and the row.
    """
    placed = [row for path in paths for row in read_rows(path)]
    items = [_item(row, place) for place, row in placed]
    require_unique((place, item.item_id) for (place, _), item in zip(placed, items, strict=True))
    return items


def prompt(item: Item) -> str:
    """The official prompt, which asks for reasoning in tags."""
    options = ", ".join(f"{letter}: {option}" for letter, option in zip(LETTERS, item.options, strict=False))
    return PROMPT.replace("{options}", options).replace("{question}", item.question)


def score(item: Item, response: str) -> Verdict:
    """The verdict by the official rule; see the module."""
    tagged = last_answer(response)
    choice = response if tagged is None else tagged
    for forms in (("{} ", "{}:", "[{}"), ("{}",)):
        for letter in LETTERS:
            if any(form.format(letter) in choice for form in forms):
                rule = "letter" if tagged is None else "tag"
                return Verdict(float(letter == item.answer), letter, rule)
    return Verdict(0.0, "", UNMATCHED)


def score_named(item: Item, response: str) -> Verdict:
    """The verdict by the letter that the final answer names; see the module."""
    found = read_letter(final_text(response), options=item.options)
    if found is None:
        return Verdict(0.0, "", UNMATCHED)
    return Verdict(float(found.value == item.answer), found.value, found.rule)


def _item(row: Row, place: str) -> Item:
    kind = text(row, place, "Question Type")
    if kind not in TYPES:
        raise DataError(f"{place}: Question Type {kind!r} is none of {', '.join(TYPES)}.")
    options = row.get("Options")
    if not isinstance(options, Mapping) or not options:
        raise DataError(f"{place}: Options is {options!r}; it must be an object with letters as keys.")
    letters = LETTERS[: len(options)]
    if sorted(options) != list(letters):
        raise DataError(f"{place}: Options have the letters {', '.join(options)}; they must be {letters}.")
    answer = text(row, place, "Answer").strip()
    if answer not in options:
        raise DataError(f"{place}: the Answer {answer!r} is none of the options {letters}.")
    video = text(row, place, "video ID")
    return Item(
        benchmark=NAME,
        item_id=f"{video}/{text(row, place, 'Question ID')}",
        question=text(row, place, "Question"),
        answer=answer,
        kind="multiple choice",
        options=tuple(text(options, f"{place}, Options", letter) for letter in letters),
        video=f"{video}.mp4",
        categories={"type": kind},
    )


BENCHMARK = Benchmark(
    name=NAME,
    title="Video-Holmes",
    source="TencentARC/Video-Holmes, evaluate.py at 7745c87",
    tables=("type",),
    sampling="eval_64f",
    read=read,
    prompt=prompt,
    score=score,
    variants={"named": score_named},
)
