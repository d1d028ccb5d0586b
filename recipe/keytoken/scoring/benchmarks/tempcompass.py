"""TempCompass: four tasks about five temporal aspects of 410 clips.

Read: llyx97/TempCompass, ``eval_multi-choice.py``, ``eval_yes_no.py`` and ``eval_caption_matching.py`` at
75361fd, ``eval_captioning.py`` and ``utils/eval_utils.py`` at 3cdb5d4, ``run_qwen2_vl.py`` at 93642a9.

The rules, after ``</s>`` is taken out. Multiple choice: the answer is the right option with its letter, or a
letter from A to D alone, or begins with one and "." or ")". Yes/no: it begins with "yes" or "no" in any
case, so "Nothing" is a no. Caption matching: it is an option with its name, or its sentence alone (also
behind ") "), or its name alone, full stops aside. Captioning has no rule. What a rule cannot read is
*unmatched*: the official script asks a language model then, or counts it as wrong with ``--disable_llm``.
Here its score is None, and the report says both: the score of what the rules decided, and the score with all
others wrong.

Departures: an ``<answer>`` block, or what follows ``</think>``, is read in place of the whole response where
there is one; a caption with a second ": " is one caption, where the script compares the part between them.

The rules need the question as it was asked, so the question of caption matching and captioning keeps its
options; ``options`` are those of multiple choice. Categories: ``task``, ``aspect``, and with the official
``meta_info.json`` among the files also ``type``, the finer aspect.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from keytoken.errors import DataError
from keytoken.rewards.extract import final_text, has_answer, leading_yes_no
from keytoken.scoring.benchmarks.base import Benchmark
from keytoken.scoring.items import UNMATCHED, Item, Kind, Verdict
from keytoken.scoring.rows import Row, read_document, text

NAME = "tempcompass"
NEEDS_JUDGE = "caption"
ASPECTS = ("action", "direction", "speed", "order", "attribute_change")
KIND_OF: Mapping[str, Kind] = {
    "multi-choice": "multiple choice",
    "yes_no": "yes/no",
    "caption_matching": "caption matching",
    "captioning": "captioning",
}
_LETTERS = "ABCD"  # more are not read by the script
_OPTION = re.compile(r"\s{0,4}([A-Z])\.\s{0,4}(.*)")
_CAPTION = re.compile(r"(?:Caption|Sentence|Option) [AB12]: ")
_CAPTION_TASK = "Generated Caption:"

# Wording of run_qwen2_vl.py, kept as it is so that scores can be compared.
INSTRUCTIONS = {
    "multi-choice": "\nPlease directly give the best option:",
    "yes_no": "\nPlease answer yes or no:",
    "caption_matching": "\nPlease directly give the best option:",
    "captioning": "",
}


def read(paths: Sequence[Path]) -> list[Item]:
    """Read official question files, one for each task, and ``meta_info.json`` if it is among them.

    Raises:
        DataError: Names the file, the clip, the aspect and the number of the question.
    """
    items: dict[str, Item] = {}
    documents = {path: read_document(path) for path in paths}
    types = {path: document for path, document in documents.items() if is_meta_info(document)}
    finer = {clip: entry["eval_dim"] for document in types.values() for clip, entry in document.items()}
    for path, document in documents.items():
        if path in types:
            continue
        for place, key, row in walk(document, str(path)):
            item = item_of(row, place, key, finer)
            if item.item_id in items:
                raise DataError(f"{place}: the id {item.item_id!r} occurs twice; give every file once.")
            items[item.item_id] = item
    if not items:
        raise DataError(f"{', '.join(map(str, paths))}: no questions; give the files of the tasks.")
    return list(items.values())


def is_meta_info(document: Any) -> bool:
    """Whether a document is the official ``meta_info.json``."""
    return isinstance(document, Mapping) and any(
        isinstance(entry, Mapping) and isinstance(entry.get("eval_dim"), Mapping)
        for entry in document.values()
    )


def walk(document: Any, where: str) -> Iterator[tuple[str, tuple[str, str, int], Row]]:
    """Every question of a nested document: its place, (clip, aspect, number) and its object.

    Raises:
        DataError: If the document is not clips, aspects and lists of objects.
    """
    if not isinstance(document, Mapping) or not document:
        raise DataError(f"{where} holds {str(document)[:60]!r}; it must be an object of clips.")
    for clip, aspects in document.items():
        if not isinstance(aspects, Mapping):
            raise DataError(
                f"{where}: clip {clip} is {str(aspects)[:60]!r}; it must be an object of aspects."
            )
        for aspect, rows in aspects.items():
            if aspect not in ASPECTS or not isinstance(rows, list):
                known = ", ".join(ASPECTS)
                raise DataError(f"{where}: clip {clip} has {str(aspect)[:60]!r}; known are lists by {known}.")
            for number, row in enumerate(rows):
                place = f"{where}: clip {clip}, {aspect} {number}"
                if not isinstance(row, Mapping):
                    raise DataError(f"{place} is {str(row)[:60]!r}; every question must be an object.")
                yield place, (clip, aspect, number), row


def item_of(row: Row, place: str, key: tuple[str, str, int], finer: Mapping[str, Any]) -> Item:
    """One question.

    Args:
        row: Its object, with "question" and "answer" (or "gt-answer").
        place: For messages.
        key: Clip, aspect and number, of which the id is made.
        finer: ``eval_dim`` of every clip of the meta information; may be empty.

    Raises:
        DataError: If the answer has the form of no task, or is no option of the question.
    """
    clip, aspect, number = key
    clip = clip.removesuffix(".mp4").removesuffix(".jpg")
    question, answer = text(row, place, "question"), text(row, place, "answer", "gt-answer")
    task = _task_of(question, answer, place)
    options: tuple[str, ...] = ()
    if task == "multi-choice":
        question, options, answer = _split(question, answer, place)
    kind = (finer.get(clip, {}).get(aspect) or {}).get("type") or (
        "order" if finer and aspect == "order" else ""
    )
    return Item(
        benchmark=NAME,
        item_id=f"{clip}/{task}/{aspect}/{number}",
        question=question,
        answer=answer,
        kind=KIND_OF[task],
        options=options,
        video=f"{clip}.mp4",
        task=task,
        categories={"task": task, "aspect": aspect} | ({"type": kind} if kind else {}),
    )


def prompt(item: Item) -> str:
    """The official prompt of the item's task."""
    return "\n".join([item.question, *_lettered(item.options)]) + INSTRUCTIONS[item.task]


def score(item: Item, response: str) -> Verdict:
    """The verdict by the rule of the item's task; None if the rule cannot read the answer. See the module."""
    answer = (final_text(response) if has_answer(response) or "</think>" in response else response).replace(
        "</s>", ""
    )
    found = _RULES[item.task](item, answer)
    if found is None:
        return Verdict(None, answer if item.task == "captioning" else "", _UNDECIDED[item.task])
    right, extracted = found
    return Verdict(float(right), extracted, "tag" if has_answer(response) else "official rule")


def _multi_choice(item: Item, answer: str) -> tuple[bool, str] | None:
    if answer == _lettered(item.options)[string.ascii_uppercase.index(item.answer)]:
        return True, item.answer
    if answer[:1] in tuple(_LETTERS) and (len(answer) == 1 or answer[1] in ".)"):
        return answer[0] == item.answer, answer[0]
    return None


def _yes_no(item: Item, answer: str) -> tuple[bool, str] | None:
    found = leading_yes_no(answer)
    return None if found is None else (found == item.answer, found)


def _caption_matching(item: Item, answer: str) -> tuple[bool, str] | None:
    options = [line.partition(": ") for line in item.question.split("\n")[1:]]
    behind = answer.split(") ")[1] if ") " in answer else answer
    chosen = None  # a later option wins over an earlier one, a name over a sentence
    for name, colon, sentence in options:
        if answer == f"{name}{colon}{sentence}":
            chosen = answer
    for _, _, sentence in options:
        if sentence in (answer, behind):
            chosen = sentence
    for name, _, _ in options:
        if name in (answer, answer.replace(".", "")):
            chosen = name
    name, _, sentence = item.answer.partition(": ")
    return None if chosen is None else (chosen in (item.answer, name, sentence), chosen)


_RULES = {
    "multi-choice": _multi_choice,
    "yes_no": _yes_no,
    "caption_matching": _caption_matching,
    "captioning": lambda item, answer: None,
}
_UNDECIDED = dict.fromkeys(KIND_OF, UNMATCHED) | {"captioning": NEEDS_JUDGE}


def _task_of(question: str, answer: str, place: str) -> str:
    if answer in ("yes", "no"):
        return "yes_no"
    if _CAPTION_TASK in question:
        return "captioning"
    if _CAPTION.match(answer):
        if answer not in question.split("\n")[1:]:
            raise DataError(f"{place}: the answer {answer!r} is none of the captions of the question.")
        return "caption_matching"
    if _OPTION.match(answer):
        return "multi-choice"
    raise DataError(f"{place}: the answer {answer!r} has the form of none of {', '.join(KIND_OF)}.")


def _split(question: str, answer: str, place: str) -> tuple[str, tuple[str, ...], str]:
    """Question, options and letter of the right one."""
    first, *lines = question.split("\n")
    found = [_OPTION.fullmatch(line) for line in lines]
    options = tuple(match[2].strip() for match in found if match)
    letters = "".join(match[1] for match in found if match)
    if len(options) < 2 or len(options) != len(lines) or letters != string.ascii_uppercase[: len(options)]:
        raise DataError(f"{place}: the question {question!r} has no options A, B, ..., one a line.")
    if answer not in _lettered(options):
        raise DataError(f"{place}: the answer {answer!r} is none of the options.")
    return first, options, answer[0]


def _lettered(options: Sequence[str]) -> list[str]:
    return [f"{letter}. {option}" for letter, option in zip(string.ascii_uppercase, options, strict=False)]


BENCHMARK = Benchmark(
    name=NAME,
    title="TempCompass",
    source="llyx97/TempCompass, eval_*.py at 75361fd",
    tables=("task", "aspect", "type"),
    sampling="eval_64f",
    read=read,
    prompt=prompt,
    score=score,
)
