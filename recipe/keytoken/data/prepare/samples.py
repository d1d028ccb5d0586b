"""One question on its way into a dataset, and the checks of what it says.

A converter reads a row of its source into a :class:`Draft`; :func:`checked` turns the draft into a
:class:`Sample` that the reward can score, or says why it cannot be one. A row that fails is never repaired in
silence: what was inferred or removed is noted, and the notes are counted in the report.
"""

import re
import string
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from keytoken.block import unknown_name
from keytoken.data.headers import MediaKind
from keytoken.data.part import Span
from keytoken.errors import DataError
from keytoken.rewards.answers import ACCURACY_REWARDS, MAX_CHARACTERS, parse_number

MULTIPLE_CHOICE = "multiple choice"
NUMERICAL = "numerical"
FREE_FORM = "free-form"
_WITH_NUMBER = (NUMERICAL, "regression")
_THOUSANDS = re.compile(r"[-+]?[1-9]\d{0,2}(,\d{3})+(\.\d*)?")
_LETTERS = string.ascii_uppercase
# verl cuts prompts at these, one for each clip or image of the row; the writer puts in the one that belongs.
_PLACEHOLDER = re.compile(r"<(?:video|image|audio)>")
# Tokens of Qwen's chat template: in a question they would end the turn or pose as frames.
_SPECIAL = re.compile(
    r"<\|(?:im_start|im_end|endoftext|vision_start|vision_end|vision_pad|video_pad|image_pad)\|>"
)
_LETTERED = re.compile(r"\s*(?:\(([A-Za-z])\)|([A-Za-z])\s?[.):])\s*(.*)", re.DOTALL)
_EDGES = string.whitespace + ".?!:;,\"'"


class RowProblem(DataError):
    """Why one row cannot be used.

    Attributes:
        reason: A few words that the report counts by.
        detail: What is wrong in this row, and the remedy.
        media: The clip or image that the row names; empty where that is not known yet.
        item_id: Likewise its id.
    """

    media = item_id = ""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


@contextmanager
def naming(media: str, item_id: str = "") -> Iterator[None]:
    """What is found wrong with a row inside says of which medium and id it is."""
    try:
        yield
    except RowProblem as problem:
        problem.media, problem.item_id = media, item_id
        raise


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """What a source says of one question, unchecked.

    Attributes:
        media: Path of the clip or image as the source writes it.
        kind: "video" or "image".
        question: With or without the options in it.
        answer: A letter, the text of an option, a number or a text; ``<answer>`` tags are taken off.
        options: In the order of the source, with or without letters; empty if the source gives none.
        problem_type: Empty if the source does not say.
        item_id: Empty if the source gives none.
        data_source: Which collection the row comes from.
        category: The source's own grouping, such as Video-Holmes' question type.
        span: From and to in seconds, if the question is about a part of the clip; None for all of it.
        options_inline: The question already lists the options; the prompt does not list them again.
        slash_is_root: A path that starts with a slash is meant from the media root.
    """

    media: str
    kind: MediaKind
    question: str
    answer: str
    options: tuple[str, ...] = ()
    problem_type: str = ""
    item_id: str = ""
    data_source: str = ""
    category: str = ""
    span: Span | None = None
    options_inline: bool = False
    slash_is_root: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample(Draft):
    """A checked question: options without letters, the answer as the reward expects it.

    Attributes:
        number: Position of the row in the source, from 0.
        place: Where that is, for people: "line 12".
        notes: What was inferred or removed, in the words that the report counts by.
    """

    number: int
    place: str
    notes: tuple[str, ...] = ()


def checked(draft: Draft, number: int, place: str) -> Sample:
    """Check a draft and bring it into the form that the reward expects.

    Raises:
        RowProblem: The row cannot be used.
    """
    notes: list[str] = []
    question = draft.question.strip()
    if _PLACEHOLDER.search(question):
        question = _PLACEHOLDER.sub("", question).strip()
        notes.append("placeholder such as <image> removed from the question")
    if not question:
        raise RowProblem("empty question", "the question is empty; write one or drop the row")
    special = _SPECIAL.search(" ".join((question, *draft.options)))
    if special:
        raise RowProblem("special tokens", f"the question holds {special[0]!r}; remove it from the text")
    answer = draft.answer.strip()
    if draft.span is not None and not 0 <= draft.span[0] < draft.span[1]:  # also NaN
        start, end = draft.span
        raise RowProblem(
            "part of no length",
            f"the part goes from {start:g} s to {end:g} s; the start is 0 or more and the end after it",
        )
    if not answer:
        raise RowProblem("empty answer", "the answer is empty; write one or drop the row")
    if len(answer) > MAX_CHARACTERS:
        raise RowProblem(
            "answer too long",
            f"the answer has {len(answer)} characters, and rewards read {MAX_CHARACTERS}; shorten it",
        )
    options = without_letters(draft.options)
    problem_type = draft.problem_type
    if not problem_type:
        problem_type = _inferred(answer, options)
        notes.append(f"problem type inferred: {problem_type}")
    _check_options(problem_type, options)
    if problem_type == MULTIPLE_CHOICE:
        answer = letter_of(answer, options)
    elif problem_type in _WITH_NUMBER and parse_number(answer) is None:
        raise RowProblem(
            "answer is no number",
            f"the answer {answer[:40]!r} is no number, which {problem_type!r} needs; correct one of the two",
        )
    elif problem_type in _WITH_NUMBER and "," in answer and not _THOUSANDS.fullmatch(answer):
        raise RowProblem(
            "answer with a decimal comma",
            f"rewards read {answer[:40]!r} as {parse_number(answer):g}; write a point before decimals, and "
            "commas between thousands only, or say by its problem type that it is no number",
        )
    fields = {name: getattr(draft, name) for name in Draft.__dataclass_fields__}
    fields |= {"question": question, "answer": answer, "options": options, "problem_type": problem_type}
    return Sample(**fields, number=number, place=place, notes=tuple(notes))


def without_letters(options: Sequence[str]) -> tuple[str, ...]:
    """Option texts without leading letters, if every one has the letter of its place.

    Example: ``("A. red", "B. blue")`` and ``("(a) red", "(b) blue")`` give ``("red", "blue")``;
    ``("A. Lincoln", "G. Washington")`` stays as it is.
    """
    matches = [_LETTERED.fullmatch(option) for option in options]
    letters = "".join((match[1] or match[2]).upper() for match in matches if match)
    if len(letters) == len(options) <= len(_LETTERS) and _LETTERS.startswith(letters):
        return tuple(match[3].strip() for match in matches if match)
    return tuple(option.strip() for option in options)


def letter_of(answer: str, options: Sequence[str]) -> str:
    """The letter of the right option, from a letter, a lettered option or the text of an option.

    Text wins over letter where both could be meant: with the options ``("B", "A")`` the answer "A" is the
    second one.

    Raises:
        RowProblem: It is none of the options, or the text of several of them.
    """
    texts = [normalized(option) for option in options]
    same = [index for index, text in enumerate(texts) if text == normalized(answer)]
    if len(same) == 1:
        return _LETTERS[same[0]]
    known = _LETTERS[: len(options)]
    bare = answer.strip(" .():").upper()
    if len(bare) == 1 and bare in known and not same:
        return bare
    lettered = _LETTERED.fullmatch(answer)
    if lettered and (lettered[1] or lettered[2]).upper() in known and not same:
        letter = (lettered[1] or lettered[2]).upper()
        if normalized(lettered[3]) == texts[known.index(letter)]:
            return letter
    several = "the text of several of the options" if same else "none of the options"
    raise RowProblem(
        "answer not among the options",
        f"the answer {answer[:60]!r} is {several}, {known[0]} to {known[-1]}; write the letter of one",
    )


def normalized(text: str) -> str:
    """Text for comparisons: one form of each character, no case, single blanks, no marks at the ends."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).strip(_EDGES)


def _inferred(answer: str, options: Sequence[str]) -> str:
    if options:
        return MULTIPLE_CHOICE
    return NUMERICAL if parse_number(answer) is not None else FREE_FORM


def _check_options(problem_type: str, options: Sequence[str]) -> None:
    if problem_type not in ACCURACY_REWARDS:
        what = unknown_name(f"problem type {problem_type!r}", problem_type, ACCURACY_REWARDS, "types")
        raise RowProblem("unknown problem type", what)
    if problem_type != MULTIPLE_CHOICE:
        return
    if len(options) < 2:
        raise RowProblem(
            "options missing", f"a multiple choice question with {len(options)} options; give two or more"
        )
    if len(options) > len(_LETTERS):
        raise RowProblem("too many options", f"{len(options)} options run out of letters; give 26 at most")
    if not all(options):
        raise RowProblem(
            "empty option", f"option {_LETTERS[options.index('')]} is empty; write it or drop it"
        )
