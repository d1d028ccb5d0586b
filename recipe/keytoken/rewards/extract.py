"""The one parser of answers: tags, option letters, numbers, yes and no.

Training rewards and benchmark scores read responses with these functions and with nothing else. They are
plain searches whose time is linear in the length of the text, whatever the text: no evaluation, no regular
expression with two unbounded parts that can share characters, no signals. They never raise on a string.

Tags follow Video-R1: the first ``<answer>`` block counts, and a response is well-formed if it is one
``<think>`` block followed by one ``<answer>`` block and nothing else. The equivalent lazy regular expressions
take quadratic time on hostile answers.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass

_OPEN, _CLOSE = "<answer>", "</answer>"
_THOUGHT_END = "</think>"
_SEAM = re.compile(r"</think>\s*<answer>")

_MAX_NUMBER_CHARACTERS = 64
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?")
# MMMU's three patterns of numbers, in its order. The look-behinds change no match: a run of digits that fails
# at its first digit fails at the others too, and trying them all would take quadratic time.
_NUMBER_PATTERNS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?(?<!\d)\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:(?<!\d)\d+\.\d+|\.\d+|(?<!\d)\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)

# Full-width forms, U+FF01 to U+FF5E, are ASCII shifted by 0xFEE0. Not unicodedata.normalize, whose time is
# quadratic in the length of a run of combining marks.
_NARROW = {code + 0xFEE0: code for code in range(0x21, 0x7F)} | {0x3000: 0x20, 0x3002: 0x2E}
_DECORATION = string.whitespace + "\u2028\u2029\u200b\u00a0\ufeff*_`\"'$#~"
_MAX_BARE_CHARACTERS = 64  # "\\boxed{\\text{(B)}}." and the like; anything longer is a sentence

_WRAPPER = r"(?:\\(?:boxed|text|textbf|mathbf|mathrm)\{|[(\[{<*_`\"'$])"
_BARE = re.compile(
    rf"(?:{_WRAPPER}|\s){{0,8}}(?:(?:option|choice)\s{{1,4}})?{_WRAPPER}{{0,8}}"
    r"([A-Z])[)\]}>.,:;!*_`\"'$\s]{0,12}",
    re.IGNORECASE,
)
_LEADING = re.compile(r"[(\[]?([A-Z])(?:[)\].:]|[ \t]{0,8}\n)")
_GAP = r"[\s:=*_`\"'$]{0,8}"
_STATED = re.compile(
    rf"(?i:\banswers?\b){_GAP}(?i:(?:is|was|would\sbe|should\sbe|must\sbe)\b)?{_GAP}"
    rf"(?i:(?:the\s)?(?:correct\s)?(?:option|choice)\b)?{_GAP}{_WRAPPER}{{0,4}}([A-Z])(?![\w'\u2019])"
)
_NAMED = re.compile(rf"(?i:\b(?:option|choice)\b){_GAP}{_WRAPPER}{{0,4}}([A-Z])(?![\w'\u2019])")
_BOX = "\\boxed{"


@dataclass(frozen=True, slots=True)
class Reading:
    """What was read from a text.

    Attributes:
        value: The letter of an option.
        rule: "letter" for a letter alone, "boxed", "stated" for "the answer is B", "leading" for "B. red",
            "option text", "named" for "option B".
    """

    value: str
    rule: str


def extract_answer(response: str) -> str:
    """Content of the first ``<answer>`` block, stripped; empty if there is none."""
    _, opened, rest = response.partition(_OPEN)
    answer, closed, _ = rest.partition(_CLOSE)
    return answer.strip() if opened and closed else ""


def has_format(response: str) -> bool:
    """Whether the whole response matches ``<think>.*?</think>\\s*<answer>.*?</answer>``.

    As in Video-R1, tags inside the blocks are not looked at, and whitespace around the response is not
    allowed.
    """
    if not (response.startswith("<think>") and response.endswith(_CLOSE)):
        return False
    return _SEAM.search(response, len("<think>")) is not None


def has_answer(response: str) -> bool:
    """Whether the response has a closed ``<answer>`` block, be it empty."""
    start = response.find(_OPEN)
    return start >= 0 and response.find(_CLOSE, start + len(_OPEN)) >= 0


def last_answer(response: str) -> str | None:
    """Content of the last of the ``<answer>`` blocks that follow each other, stripped; None without any.

    A block goes from a tag to the next closing tag, so a tag inside a block opens nothing.
    """
    found, position = None, 0
    while True:
        start = response.find(_OPEN, position)
        end = response.find(_CLOSE, start + len(_OPEN)) if start >= 0 else -1
        if end < 0:
            return found
        found = response[start + len(_OPEN) : end].strip()
        position = end + len(_CLOSE)


def final_text(response: str) -> str:
    """The part of a response that holds its answer, stripped.

    The first ``<answer>`` block; without one what follows an ``<answer>`` tag that was never closed, as in a
    response cut at its length; without one what follows the last ``</think>``; without one everything.
    """
    if has_answer(response):
        return extract_answer(response)
    for tag in (_OPEN, _THOUGHT_END):
        _, found, rest = response.rpartition(tag)
        if found and rest.strip():
            return rest.strip()
    return response.strip()


def read_letter(text: str, count: int = 26, options: Sequence[str] = ()) -> Reading | None:
    """The option that a text names, by the first of these forms that it has.

    A letter alone ("B", "(b)", "**B.**", full-width, in LaTeX), ``\\boxed{B}``, the last "answer is B" or
    "answer: B", a letter that leads ("B. red", "B)"), the text of exactly one option and nothing else, the
    last "option B". Letters beyond the options do not count.

    Args:
        text: An answer, without its tags.
        count: Number of options; ``options`` win where they are given.
        options: Texts of the options without letters.

    Returns:
        The letter in upper case and the form; None if the text has none of the forms.
    """
    letters = string.ascii_uppercase[: len(options) or count]
    plain = text if text.isascii() else text.translate(_NARROW)
    plain = plain.strip(_DECORATION)
    if letter := _bare_letter(plain, letters):
        return Reading(letter, "letter")
    _, boxed, rest = plain.rpartition(_BOX)
    if boxed and (letter := _bare_letter(rest[:_MAX_BARE_CHARACTERS].partition("}")[0], letters)):
        return Reading(letter, "boxed")
    if letter := _last_match(_STATED, plain, letters):
        return Reading(letter, "stated")
    leading = _LEADING.match(plain)
    if leading and leading[1] in letters:
        return Reading(leading[1], "leading")
    if letter := _letter_of_text(plain, options):
        return Reading(letter, "option text")
    if letter := _last_match(_NAMED, plain, letters):
        return Reading(letter, "named")
    return None


def leading_yes_no(text: str) -> str | None:
    """ "yes" or "no" if the text begins with it, in any case; "not", "nothing" and "none" begin with "no"."""
    start = text[:3].lower()
    if start == "yes":
        return "yes"
    return "no" if start.startswith("no") else None


def parse_number(text: str) -> float | None:
    """A decimal number with optional thousands commas, or None if the text is anything else."""
    text = text.strip()
    if len(text) > _MAX_NUMBER_CHARACTERS:
        return None
    text = text.replace(",", "")
    return float(text) if _NUMBER.fullmatch(text) else None


def numbers_in(text: str) -> list[str]:
    """Every number in a text as it is written: those with thousands commas, then scientific, then plain.

    As in MMMU's evaluation, whose three patterns overlap: "1e5.0" gives "1e5" and ".0".
    """
    return [found for pattern in _NUMBER_PATTERNS for found in pattern.findall(text)]


def _bare_letter(text: str, letters: str) -> str:
    if not text or len(text) > _MAX_BARE_CHARACTERS:
        return ""
    found = _BARE.fullmatch(text)
    letter = found[1].upper() if found else ""
    return letter if letter and letter in letters else ""


def _last_match(pattern: re.Pattern[str], text: str, letters: str) -> str:
    letter = ""
    for found in pattern.finditer(text):
        if found[1] in letters:
            letter = found[1]
    return letter


def _letter_of_text(text: str, options: Sequence[str]) -> str:
    wanted = _comparable(text)
    same = [index for index, option in enumerate(options) if _comparable(option) == wanted]
    return string.ascii_uppercase[same[0]] if wanted and len(same) == 1 else ""


def _comparable(text: str) -> str:
    return " ".join(text.casefold().split()).strip(_DECORATION + ".,;:!?")
