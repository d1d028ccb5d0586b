"""MMVU: 1,000 expert questions about 27 subjects, 625 of them multiple choice, 375 open.

Read: yale-nlp/MMVU, ``acc_evaluation.py`` and ``utils/constant.py`` at fd27d75, ``utils/eval_utils.py`` at
f5bc479; longmalongma/TW-GRPO, ``src/eval/eval_general_videor1.py`` and ``eval_general_zeroshot.py`` at
3abc3c3.

The authors let a language model compare every answer, letters too, so there is no official rule for letters.
Multiple choice: the letter that the final answer names (:func:`keytoken.rewards.extract.read_letter`), where
a judge would see it as well: "B", "(B)", "B. red", "the answer is B", the text of the option.
Open questions have no rule: their score is None until a judge decides.

Variant ``exact``: Video-R1's rule, by which the Video-R1 family publishes this benchmark. The content of the
first ``<answer>`` block, or without one the letters after "answer", or the whole response, has to be the
letter and nothing else.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from pathlib import Path

from keytoken.errors import DataError
from keytoken.rewards.extract import extract_answer, final_text, has_answer, read_letter
from keytoken.scoring.benchmarks.base import Benchmark
from keytoken.scoring.items import UNMATCHED, Item, Verdict
from keytoken.scoring.rows import Row, read_rows, require_unique, text
from keytoken.scoring.video_r1 import below_root, is_video_r1, item_of

NAME = "mmvu"
NEEDS_JUDGE = "open question"
KINDS = {"multiple-choice": "multiple choice", "open-ended": "open"}
# The authors' disciplines, each with its subjects (paper, figure 2).
_DISCIPLINES: Mapping[str, str] = {
    "Science": "Astronomy, Biology, Chemistry, Electromagnetism, Geography, Materials Science, Mechanics, "
    "Modern Physics, Neurobiology, Thermodynamics",
    "Healthcare": "Basic Medicine, Clinical Medicine, Dentistry, Pharmacy, Preventive Medicine",
    "Humanities and social science": "Art, Economics, History, Law, Literature, Management",
    "Engineering": "Biomedical Engineering, Civil Engineering, Computer Science, Electrical Engineering, "
    "Electronics and Communication, Mechanical Engineering",
}
DISCIPLINE_OF = {name: key for key, names in _DISCIPLINES.items() for name in names.split(", ")}

# Wording of utils/constant.py (direct output), kept as it is so that scores can be compared.
INSTRUCTIONS = {
    "multiple choice": "Do not generate any intermediate reasoning process. Answer directly with the option "
    "letter from the given choices.",
    "open": "Do not generate any intermediate reasoning process. Directly output the final short answer.",
}
_STATED = re.compile(r"(?:answer|Answer|ANSWER)[:\s]\s{0,8}([A-Z])(?![A-Z\w])")


def read(paths: Sequence[Path]) -> list[Item]:
    """Read the official questions, or those in Video-R1's form.

    Raises:
        DataError: Names the file and the row.
    """
    placed = [row for path in paths for row in read_rows(path)]
    items = [item(row, place) for place, row in placed]
    require_unique((place, one.item_id) for (place, _), one in zip(placed, items, strict=True))
    return items


def item(row: Row, place: str) -> Item:
    """One question of either form.

    Raises:
        DataError: A field that is missing or has no sense.
    """
    if is_video_r1(row):
        found = item_of(row, place, NAME)
        subject, categories = found.categories.get("subject", ""), dict(found.categories)
        categories["discipline"] = _discipline(subject, place)
        return Item(**{name: getattr(found, name) for name in found.__slots__} | {"categories": categories})
    kind = KINDS.get(text(row, place, "question_type"))
    if kind is None:
        raise DataError(f"{place}: question_type {row['question_type']!r} is none of {', '.join(KINDS)}.")
    metadata = row.get("metadata")
    if not isinstance(metadata, Mapping):
        raise DataError(f"{place}: metadata is {metadata!r}; it must be an object with the subject.")
    subject = text(metadata, f"{place}, metadata", "subject")
    options = _choices(row, place) if kind == "multiple choice" else ()
    answer = text(row, place, "answer").strip()
    if options and answer not in tuple(string.ascii_uppercase[: len(options)]):
        raise DataError(f"{place}: the answer {answer!r} is none of the {len(options)} choices.")
    return Item(
        benchmark=NAME,
        item_id=text(row, place, "id"),
        question=text(row, place, "question"),
        answer=answer,
        kind="multiple choice" if options else "open",
        options=options,
        video=below_root(text(row, place, "video")),
        categories={"kind": kind, "subject": subject, "discipline": _discipline(subject, place)},
    )


def prompt(item: Item) -> str:
    """The official prompt for direct answers."""
    options = [f"{letter}: {option}" for letter, option in zip(string.ascii_uppercase, item.options)]  # noqa: B905
    return "\n".join(["", f"Question: {item.question}", *options, "", INSTRUCTIONS[item.kind], ""])


def score(item: Item, response: str) -> Verdict:
    """The verdict by the letter; None for an open question. See the module."""
    answer = final_text(response)
    if item.kind == "open":
        return Verdict(None, answer, NEEDS_JUDGE)
    found = read_letter(answer, options=item.options)
    if found is None:
        return Verdict(0.0, "", UNMATCHED)
    rule = "tag" if has_answer(response) and found.rule == "letter" else found.rule
    return Verdict(float(found.value == item.answer), found.value, rule)


def score_exact(item: Item, response: str) -> Verdict:
    """The verdict by Video-R1's rule for letters; None for an open question. See the module."""
    if item.kind == "open":
        return Verdict(None, final_text(response), NEEDS_JUDGE)
    if has_answer(response):
        answer, rule = extract_answer(response), "tag"
    elif found := _STATED.search(response):
        answer, rule = found[1], "stated"
    else:
        answer, rule = response.strip(), "letter"
    if answer not in tuple(string.ascii_uppercase):
        return Verdict(0.0, "", UNMATCHED)
    return Verdict(float(answer == item.answer), answer, rule)


def _choices(row: Row, place: str) -> tuple[str, ...]:
    choices = row.get("choices")
    if not isinstance(choices, Mapping) or len(choices) < 2:
        raise DataError(f"{place}: choices is {choices!r}; a multiple-choice question needs two or more.")
    letters = string.ascii_uppercase[: len(choices)]
    if sorted(choices) != list(letters):
        raise DataError(f"{place}: choices have the letters {', '.join(choices)}; they must be {letters}.")
    return tuple(text(choices, f"{place}, choices", letter) for letter in letters)


def _discipline(subject: str, place: str) -> str:
    if subject not in DISCIPLINE_OF:
        raise DataError(f"{place}: the subject {subject!r} is none of the 27 of MMVU.")
    return DISCIPLINE_OF[subject]


BENCHMARK = Benchmark(
    name=NAME,
    title="MMVU",
    source="yale-nlp/MMVU at f5bc479 (judge), letters as a judge would read them",
    tables=("kind", "discipline", "subject"),
    sampling="eval_64f",
    read=read,
    prompt=prompt,
    score=score,
    variants={"exact": score_exact},
    item=item,
)
