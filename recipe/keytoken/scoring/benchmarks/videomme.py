"""Video-MME: 2,700 multiple-choice questions about 900 videos, short, medium and long.

Read: BradyFU/Video-MME, ``evaluation/eval_your_results.py`` at 4e7566d, the template of outputs at 5a90af9
and e9f6a2d (two sets of names of the same fields); the README of MME-Benchmarks/Video-MME at 120729e
(prompt, subtitles); for the Parquet file of lmms-lab/Video-MME, lmms-eval's task at 0696573.

The rule. Six phrases are cut out wherever they occur ("The best answer is", "The correct answer is", "The
answer is", "The answer", and two that a missing comma in the script has glued together from four), and the
first of the capitals A, B, C, D in what is left is the answer: "Answer: C" reads A, because of its own
capital. An answer without any of the four is *unmatched* and does not count at all: the script's
accuracies are those of the answered questions. Departure: reasoning is not read, only an ``<answer>``
block or what follows ``</think>``, where there is one.

Variant ``unmatched_wrong`` counts them as wrong, as lmms-eval does.

Subtitles are an option of the prompt: those at the times of the sampled frames (:func:`at_times`), each
once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from keytoken.errors import DataError
from keytoken.rewards.extract import final_text, has_answer
from keytoken.scoring.benchmarks.base import Benchmark
from keytoken.scoring.items import UNMATCHED, Item, Verdict
from keytoken.scoring.rows import Placed, Row, letters_off, read_rows, require_unique, text, texts
from keytoken.scoring.video_r1 import item_of

DURATIONS = ("short", "medium", "long")
_CUT = (
    "The best answer is",
    "The correct answer is",
    "The answer is",
    "The answer",
    "The best option isThe correct option is",
    "Best answer:Best option:",
)
_LETTER = re.compile("[ABCD]")
_TIMES = re.compile(r"(\d{1,4}):(\d{2}):(\d{2})[,.](\d{1,3})")
_MARKUP = re.compile(r"<[^<>]*>")

# Wording of the README, kept as it is so that scores can be compared.
SUBTITLES = "This video's subtitles are listed below:"
INSTRUCTION = (
    "Select the best answer to the following multiple-choice question based on the video. "
    "Respond with only the letter (A, B, C, or D) of the correct option."
)
ASK = "The best answer is:"


@dataclass(frozen=True, slots=True)
class Subtitle:
    """One line of speech: from and to in seconds, and what is said."""

    start: float
    end: float
    text: str


def read(paths: Sequence[Path]) -> list[Item]:
    """Read the Parquet file (one question a row) or the template of outputs (three questions a video).

    Raises:
        DataError: Names the file and the row.
    """
    placed = [question for path in paths for row in read_rows(path) for question in questions(*row)]
    items = [official_item(row, place) for place, row in placed]
    require_unique((place, item.item_id) for (place, _), item in zip(placed, items, strict=True))
    return items


def questions(place: str, row: Row) -> list[Placed]:
    """The questions of a row, each with the fields of its video: one, or those of the official template.

    Raises:
        DataError: If the row has a field ``questions`` that is not a list of objects.
    """
    if "questions" not in row:
        return [(place, row)]
    nested = row["questions"]
    if not isinstance(nested, list) or not nested or not all(isinstance(one, dict) for one in nested):
        raise DataError(f"{place}: questions is {str(nested)[:60]!r}; it must be a list of objects.")
    video = {key: value for key, value in row.items() if key != "questions"}
    return [(f"{place}, question {number}", video | one) for number, one in enumerate(nested)]


def prompt(item: Item, subtitles: Sequence[str] | None = None) -> str:
    """The official prompt.

    Args:
        item: The question.
        subtitles: What is said at the sampled frames, for the setting with subtitles; None for that without.
    """
    said = [] if subtitles is None else [SUBTITLES, *subtitles]
    options = [f"{letter}. {option}" for letter, option in zip("ABCD", item.options, strict=True)]
    return "\n".join((*said, INSTRUCTION, item.question, *options, ASK))


def score(item: Item, response: str) -> Verdict:
    """The verdict by the official rule; see the module."""
    answer = final_text(response)
    for phrase in _CUT:
        answer = answer.replace(phrase, "")
    found = _LETTER.search(answer)
    if found is None:
        return Verdict(None, "", UNMATCHED)
    return Verdict(float(found[0] == item.answer), found[0], "tag" if has_answer(response) else "letter")


def score_all(item: Item, response: str) -> Verdict:
    """The official rule, but an unmatched answer is wrong."""
    verdict = score(item, response)
    return verdict if verdict.score is not None else replace(verdict, score=0.0)


def read_subtitles(path: Path) -> list[Subtitle]:
    """Read an ``.srt`` file; markup such as ``<font ...>`` is taken off, lines of one entry are joined.

    Raises:
        DataError: Names the file and the entry without times.
    """
    try:
        entries = path.read_text(encoding="utf-8-sig").replace("\r\n", "\n").split("\n\n")
    except OSError as problem:
        raise DataError(f"{path}: {problem.strerror}; give the path of an .srt file.") from problem
    except UnicodeDecodeError as problem:
        raise DataError(f"{path} is not UTF-8 (byte {problem.start}); convert it to UTF-8.") from problem
    subtitles = []
    for number, entry in enumerate(entries, start=1):
        lines = entry.strip().split("\n")
        if len(lines) < 3:  # an entry without words
            continue
        times = _TIMES.findall(lines[1])
        if len(times) != 2:
            raise DataError(
                f"{path}, entry {number}: {lines[1][:60]!r} must be two times, 00:00:01,000 --> ..."
            )
        words = _MARKUP.sub("", " ".join(lines[2:])).strip()
        subtitles.append(Subtitle(_seconds(times[0]), _seconds(times[1]), words))
    return subtitles


def at_times(subtitles: Iterable[Subtitle], times: Sequence[float]) -> list[str]:
    """What is said while the frames are shown, in order, each entry once.

    Args:
        subtitles: Entries of a file.
        times: Seconds of the sampled frames.
    """
    return [one.text for one in subtitles if one.text and any(one.start <= time < one.end for time in times)]


def _seconds(parts: tuple[str, str, str, str]) -> float:
    hours, minutes, seconds, fraction = parts
    return int(hours) * 3600 + int(minutes) * 60 + int(seconds) + int(fraction) / 10 ** len(fraction)


def official_item(row: Row, place: str) -> Item:
    """One question with the fields of its video, of either format (:func:`questions`).

    Raises:
        DataError: A field that is missing or has no sense.
    """
    duration = text(row, place, "duration", "duration_category")
    if duration not in DURATIONS:
        raise DataError(f"{place}: duration {duration!r} must be one of {', '.join(DURATIONS)}.")
    options = letters_off(texts(row, place, "options", "choices"))
    answer = text(row, place, "answer").strip()
    if len(options) != 4 or answer not in tuple("ABCD"):
        raise DataError(
            f"{place}: {len(options)} options and the answer {answer!r}; it must be 4 and a letter."
        )
    return Item(
        benchmark="videomme",
        item_id=text(row, place, "question_id"),
        question=text(row, place, "question"),
        answer=answer,
        kind="multiple choice",
        options=options,
        video=f"{text(row, place, 'videoID', 'video_id')}.mp4",
        categories={
            "duration": duration,
            "domain": text(row, place, "domain", "video_category"),
            "sub_category": text(row, place, "sub_category", "video_subcategory", "video_sub_category"),
            "task_type": text(row, place, "task_type"),
        },
    )


def _carried(row: Row, place: str) -> Item:
    """A question in Video-R1's form; some of these files have the official fields as well."""
    return official_item(row, place) if "duration" in row else item_of(row, place, "videomme")


BENCHMARK = Benchmark(
    name="videomme",
    title="Video-MME",
    source="BradyFU/Video-MME, evaluation/eval_your_results.py at 4e7566d",
    tables=("duration", "domain", "sub_category", "task_type"),
    sampling="eval_64f",
    read=read,
    prompt=prompt,
    score=score,
    variants={"unmatched_wrong": score_all},
    item=_carried,
)
