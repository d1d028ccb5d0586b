"""Video-MMMU: 300 lectures, three questions each: perception, comprehension, adaptation.

Read: the README of EvolvingLMMs-Lab/VideoMMMU at 035f279, which names lmms-eval as the evaluation;
EvolvingLMMs-Lab/lmms-eval, ``tasks/videommmu/utils.py`` at 2bb5e98, ``_default_template_yaml`` at 394bb49 and
``tasks/_task_utils/mmmu_mcq_utils.py`` at 00fa502.

Letters, where the question has options: punctuation is taken off both ends; every letter with "." or ":"
behind it is a candidate; without any those in round brackets, without any those before a space, and without
any, in responses of more than five words, those whose option the response repeats. Of several candidates the
one that is found last, in its form, counts. Open questions, of which adaptation has 20: of every line what
follows the last "is", "equals", "answer", ..., and all numbers in it, are compared with the truth, numbers to
two decimals, words by containment. Lines are split at line ends only: the script also splits sentences, but
at a capital, and only after all capitals are gone. A truth that is written as a list stays the text it is.

The overall score is the mean over all questions; the knowledge gain is :func:`knowledge_gain`.

Departures: reasoning is not read, only an ``<answer>`` block or what follows ``</think>``, where there is
one; an empty response is wrong, where the script leaves it out of the mean.
"""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from keytoken.errors import DataError
from keytoken.rewards.extract import final_text, has_answer, numbers_in
from keytoken.scoring.benchmarks.base import Benchmark
from keytoken.scoring.items import UNMATCHED, Item, Verdict
from keytoken.scoring.rows import Placed, Row, read_document, read_rows, require_unique, text
from keytoken.scoring.video_r1 import item_of

NAME = "videommmu"
TRACKS = ("Perception", "Comprehension", "Adaptation")
MAX_SHOWN = 200  # characters of what was read from an open answer
_PUNCTUATION = ",.!?;:'"
_MIN_WORDS = 6
# Behind the last of these stands what an open answer says; "=" counts in the last line only.
_INDICATORS = (
    *("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ", "are ", "in total "),
    *("total ", "identify ", "recognize ", "calculated as ", "counted as ", "measured as ", "observed as "),
    *("concluded as ", "found to be ", "equals ", "determined to be ", "number of ", "value is "),
    *("adds up to ", "have ", "has "),
)
# lmms-eval's names of the disciplines, which are also the folders of the videos.
_DISCIPLINES: Mapping[str, str] = {
    "Art": "Art Art_Theory Design Music",
    "Business": "Accounting Economics Finance Manage Marketing",
    "Science": "Biology Chemistry Geography Math Physics",
    "Medicine": "Basic_Medical_Science Clinical_Medicine Diagnostics_and_Laboratory_Medicine Pharmacy "
    "Public_Health",
    "Humanities": "History Literature Sociology Psychology",
    "Engineering": "Agriculture Architecture_and_Engineering Computer_Science Electronics Energy_and_Power "
    "Materials Mechanical_Engineering",
}
DISCIPLINE_OF = {name: key for key, names in _DISCIPLINES.items() for name in names.split()}

# Wording of lmms-eval's template, kept as it is so that scores can be compared.
DIRECTLY = "Please directly output the option letter/data as the answer."
LEARN = f"{DIRECTLY} You should watch and learn the video content. Then apply what you learned to "
IMAGE_AT_END = "The image for this question is at the end of the video.\n"


def read(paths: Sequence[Path]) -> list[Item]:
    """Read the official files, one for each track, or lists of rows with a field ``track``.

    Raises:
        DataError: Names the file and the row.
    """
    placed = [row for path in paths for row in _rows(path)]
    items = [_item(row, place) for place, row in placed]
    require_unique((place, item.item_id) for (place, _), item in zip(placed, items, strict=True))
    return items


def prompt(item: Item) -> str:
    """The official prompt of the item's track."""
    question = "\n".join([item.question, *_lettered(item.options)])
    if item.task != "Adaptation":
        return f"{question}\n{DIRECTLY}"
    kind = "multi-choice" if item.options else "open-ended"
    return f"{LEARN}answer the following {kind} question. {IMAGE_AT_END}{question}"


def score(item: Item, response: str) -> Verdict:
    """The verdict by MMMU's rules for letters or for open answers; see the module."""
    answer = final_text(response)
    if not item.options:
        return _score_open(item, answer)
    letter, rule = read_choice(answer, item.options)
    if has_answer(response) and rule == "letter":
        rule = "tag"
    return Verdict(float(letter == item.answer), letter, rule)


def knowledge_gain(before: float, after: float) -> float | None:
    """The share of what was wrong without the lecture that is right with it, on the track Adaptation.

    Args:
        before: Accuracy in [0, 1] on the questions and their images alone.
        after: Accuracy with the lecture.

    Returns:
        (after - before) / (1 - before); None if nothing was wrong before.
    """
    return (after - before) / (1.0 - before) if before < 1.0 else None


def compared(scores: Mapping[tuple[str, str], tuple[float, float]]) -> list[str]:
    """What two runs say of the knowledge gain, if both answered the track Adaptation."""
    if ("track", "Adaptation") not in scores:
        return []
    gain = knowledge_gain(*scores["track", "Adaptation"])
    said = "cannot be said, nothing was wrong before" if gain is None else f"{100 * gain:+.1f} %"
    return [f"Knowledge gain, if the earlier run saw the questions and their images alone: {said}."]


def read_choice(response: str, options: Sequence[str]) -> tuple[str, str]:
    """The letter that a response names, and how: MMMU's rule as it is changed for this benchmark.

    Args:
        response: The answer.
        options: Texts of the options.

    Returns:
        Letter and "letter" or "option text"; ("", "unmatched") if none is found.
    """
    for mark in _PUNCTUATION:
        response = response.strip(mark)
    response = f" {response} "
    letters = string.ascii_uppercase[: len(options)]
    for forms in (("{}.", "{}:"), ("({})",), ("{} ",)):
        found = [(form, letter) for form in forms for letter in letters if form.format(letter) in response]
        if not found:
            continue
        # Of letters before a space the last one counts that has a space on its other side as well.
        form = " {} " if forms == ("{} ",) else found[0][0]
        places = [response.rfind(form.format(letter)) for _, letter in found]
        chosen = found[places.index(max(places))][1] if len(found) > 1 else found[0][1]
        return chosen, "letter"
    if len(response.split()) >= _MIN_WORDS:
        lower = response.lower()
        places = [lower.rfind(option.lower()) for option in options]
        if max(places) >= 0:
            return letters[places.index(max(places))], "option text"
    return "", UNMATCHED


def _score_open(item: Item, answer: str) -> Verdict:
    if not answer:
        return Verdict(0.0, "", UNMATCHED)
    said = key_parts(answer)
    candidates = {
        value
        for part in [*said, *(number for part in said for number in numbers_in(part))]
        for value in _values(part)
    }
    truths = _values(item.answer)
    right = any(
        any(isinstance(truth, str) and truth in found for truth in truths)
        if isinstance(found, str)
        else found in truths
        for found in candidates
    )
    return Verdict(float(right), " | ".join(said)[:MAX_SHOWN], "open")


def key_parts(response: str) -> list[str]:
    """Of every line the shortest end behind an indicator, in lower case; the whole response without any."""
    lines = response.strip().strip(".").lower().split("\n")
    parts = []
    for number, line in enumerate(lines):
        indicators = (*_INDICATORS, "=") if number == len(lines) - 1 else _INDICATORS
        shortest = ""
        for indicator in indicators:
            if indicator in line:
                end = line.rpartition(indicator)[2].strip()
                if not shortest or len(end) < len(shortest):
                    shortest = end
        if shortest and shortest not in tuple(":,.!?;'"):
            parts.append(shortest)
    return parts or [response.strip().strip(".").lower()]


def _values(said: str) -> list[str | float]:
    """A number to two decimals, or the text in lower case; a single character with a space on either side."""
    said = said.strip()
    try:
        return [round(float(said.replace(",", "")), 2)]
    except ValueError:
        lower = said.lower()
    return [f" {lower}", f"{lower} "] if len(lower) == 1 else [lower]


def _rows(path: Path) -> Iterator[Placed]:
    if path.suffix.lower() in (".jsonl", ".parquet"):
        yield from read_rows(path)
        return
    document = read_document(path)
    if isinstance(document, list):
        yield from read_rows(path)
        return
    if not isinstance(document, Mapping) or not document:
        raise DataError(f"{path} holds {str(document)[:60]!r}; it must be an object of tracks.")
    for track, rows in document.items():
        if track not in TRACKS or not isinstance(rows, Mapping):
            raise DataError(f"{path} has the key {track!r}; it must be one of {', '.join(TRACKS)}.")
        for key, row in rows.items():
            place = f"{path}: {track} {key}"
            if not isinstance(row, Mapping):
                raise DataError(f"{place} is {str(row)[:60]!r}; every question must be an object.")
            yield place, {**row, "track": track}


def _item(row: Row, place: str) -> Item:
    name, track = text(row, place, "id"), text(row, place, "track")
    if track not in TRACKS:
        raise DataError(f"{place}: the track {track!r} is none of {', '.join(TRACKS)}.")
    subject = "_".join(name.split("_")[1:-1])
    if subject not in DISCIPLINE_OF:
        raise DataError(f"{place}: the id {name!r} names the subject {subject!r}, which is none of the 30.")
    options = row.get("options")
    if not isinstance(options, (list, tuple)) or not all(isinstance(option, str) for option in options):
        raise DataError(f"{place}: options is {options!r}; it must be a list of texts, empty if it is open.")
    answer = text(row, place, "answer").strip()
    letters = string.ascii_uppercase[: len(options)]
    if not options and row.get("question_type") == "multiple-choice":
        raise DataError(f"{place} is a multiple-choice question without options; fetch the file again.")
    if options and answer not in tuple(letters):
        raise DataError(f"{place}: the answer {answer!r} is none of the {len(options)} options.")
    return Item(
        benchmark=NAME,
        item_id=f"{track}/{name}",
        question=text(row, place, "question"),
        answer=answer,
        kind="multiple choice" if options else "open",
        options=tuple(options),
        video=f"{DISCIPLINE_OF[subject]}/{name}.mp4",
        task=track,
        categories={
            "track": track,
            "discipline": DISCIPLINE_OF[subject],
            "subject": subject.replace("_", " "),
        },
    )


def _lettered(options: Sequence[str]) -> list[str]:
    """Options with letters, unless the file has put them there already."""
    pairs = list(zip(string.ascii_uppercase, options, strict=False))
    if all(option.startswith(f"{letter}.") for letter, option in pairs):
        return list(options)
    return [f"{letter}. {option}" for letter, option in pairs]


BENCHMARK = Benchmark(
    name=NAME,
    title="Video-MMMU",
    source="EvolvingLMMs-Lab/lmms-eval, tasks/videommmu at 2bb5e98",
    tables=("track", "discipline", "subject"),
    sampling="eval_64f",
    read=read,
    prompt=prompt,
    score=score,
    item=partial(item_of, benchmark=NAME),
    compared=compared,
)
