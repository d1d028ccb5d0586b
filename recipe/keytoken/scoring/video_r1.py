"""Questions in the form of Video-R1's files, which other projects took over: one object for each question.

Read: tulerfeng/Video-R1 as described by its training and evaluation code, longmalongma/TW-GRPO at 3abc3c3
(``data/evaluation/*.json``). Fields: ``problem_id``, ``problem``, ``problem_type``, ``options`` with their
letters, ``solution`` inside ``<answer>`` tags, ``video`` or ``path``.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from pathlib import PurePosixPath

from keytoken.errors import DataError
from keytoken.rewards.extract import extract_answer, has_answer
from keytoken.scoring.items import Item, Kind
from keytoken.scoring.rows import Row, letters_off, text, texts

KINDS: Mapping[str, Kind] = {
    "multiple choice": "multiple choice",
    "numerical": "numerical",
    "regression": "numerical",
    "free-form": "open",
    "OCR": "open",
}
# A path such as ./Evaluation/MMVU/videos/Art/0.mp4 is below the media root from here on.
_ROOTS = ("videos", "video", "data")


def is_video_r1(row: Row) -> bool:
    """Whether a row has the fields that every file of this form has."""
    return "problem" in row and "solution" in row


def item_of(row: Row, place: str, benchmark: str) -> Item:
    """One question.

    Args:
        row: An object of the file.
        place: File and row, for messages.
        benchmark: Name of the benchmark that the file is of.

    Raises:
        DataError: A field that is missing or has no sense: no options, an answer that is no option.
    """
    kind = KINDS.get(text(row, place, "problem_type"))
    if kind is None:
        raise DataError(f"{place}: problem_type {row['problem_type']!r} is none of {', '.join(KINDS)}.")
    solution = text(row, place, "solution")
    answer = extract_answer(solution) if has_answer(solution) else solution.strip()
    options = letters_off(texts(row, place, "options")) if kind == "multiple choice" else ()
    letters = string.ascii_uppercase[: len(options)]
    if not answer or (options and answer not in tuple(letters)):
        raise DataError(f"{place}: the solution {solution!r} is none of the {len(options)} options.")
    video = below_root(text(row, place, "video", "path"))
    named = {
        "subject": PurePosixPath(video).parent.name.replace("_", " "),
        "task": str(row.get("original_question_type", "")),
    }
    return Item(
        benchmark=benchmark,
        item_id=text(row, place, "problem_id"),
        question=text(row, place, "problem"),
        answer=answer,
        kind=kind,
        options=options,
        video=video,
        categories={"kind": kind} | {key: value for key, value in named.items() if value},
    )


def below_root(path: str) -> str:
    """What of a path, or a URL, lies below its folder of videos: "/MMVU/videos/Art/0.mp4" is "Art/0.mp4"."""
    parts = PurePosixPath(path.replace("\\", "/")).parts
    for root in _ROOTS:
        if root in parts[:-1]:
            last = len(parts) - 1 - parts[::-1].index(root, 1)
            return "/".join(parts[last + 1 :])
    return "/".join(part for part in parts if part not in ("/", ".", ".."))
