"""The parser of answers: by hand, against the published patterns, on random and on hostile strings."""

import itertools
import random
import re
import time
from collections.abc import Iterator

import numpy as np
import pytest

from keytoken.rewards.extract import (
    Reading,
    extract_answer,
    final_text,
    has_answer,
    has_format,
    last_answer,
    leading_yes_no,
    numbers_in,
    parse_number,
    read_letter,
)


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("<think>a</think><answer>B</answer>", "B"),
        ("<answer> B\n</answer>", "B"),
        ("<answer>first</answer> <answer>second</answer>", "first"),
        ("<answer><answer>B</answer>", "<answer>B"),
        ("B", ""),
        ("<answer>B", ""),
        ("B</answer>", ""),
        ("</answer>B<answer>", ""),
        ("<answer></answer>", ""),
        ("", ""),
    ],
)
def test_first_answer_block_counts(response: str, answer: str) -> None:
    assert extract_answer(response) == answer


def test_agrees_with_the_published_patterns_on_random_tag_soup() -> None:
    """The published code's regular expressions are an independent truth on short inputs."""
    published_answer = re.compile(r"<answer>\s*(.*?)\s*</answer>", re.DOTALL)
    published_format = re.compile(r"<think>.*?</think>\s*<answer>.*?</answer>", re.DOTALL)
    pieces = ["<think>", "</think>", "<answer>", "</answer>", " ", "\n", "x", "B"]
    rng = np.random.default_rng(0)
    well_formed = 0
    for _ in range(20_000):
        text = "".join(rng.choice(pieces, int(rng.integers(0, 8))))
        if rng.random() < 0.5:
            text = "<think>" + text + "</answer>"
        found = published_answer.search(text)
        assert extract_answer(text) == (found.group(1).strip() if found else ""), text
        assert has_format(text) == bool(published_format.fullmatch(text)), text
        well_formed += has_format(text)
    assert well_formed > 100


@pytest.mark.parametrize("piece", [" ", "\n", "<answer>", "</think>", "</think> ", "<think>", "</answer>"])
def test_time_is_bounded_on_hostile_responses(piece: str) -> None:
    for start in ("<answer>", "<think>"):
        text = start + piece * (400_000 // len(piece))
        started = time.process_time()
        extract_answer(text), has_format(text), has_format(text + "</answer>")
        assert time.process_time() - started < 1.0


OPTIONS = ("red", "blue", "green and red", "The cat's toy.")


@pytest.mark.parametrize(
    ("text", "value", "rule"),
    [
        ("A", "A", "letter"),
        ("b", "B", "letter"),
        (" C \n", "C", "letter"),
        ("(A)", "A", "letter"),
        ("(b).", "B", "letter"),
        ("[D]", "D", "letter"),
        ("A.", "A", "letter"),
        ("B)", "B", "letter"),
        ("C:", "C", "letter"),
        ("D,", "D", "letter"),
        ("**B**", "B", "letter"),
        ("**B.**", "B", "letter"),
        ("*(C)*", "C", "letter"),
        ("`A`", "A", "letter"),
        ("'B'", "B", "letter"),
        ('"B"', "B", "letter"),
        ("$A$", "A", "letter"),
        ("$\\boxed{A}$", "A", "letter"),
        ("\\boxed{A}", "A", "letter"),
        ("\\boxed{\\text{B}}", "B", "letter"),
        ("\\boxed{\\text{(C)}}.", "C", "letter"),
        ("\\textbf{D}", "D", "letter"),
        ("Option B", "B", "letter"),
        ("option (b)", "B", "letter"),
        ("choice C.", "C", "letter"),
        ("{A}", "A", "letter"),
        ("<A>", "A", "letter"),
        ("\uff21", "A", "letter"),
        ("\uff08\uff22\uff09", "B", "letter"),
        ("\uff23\uff0e", "C", "letter"),
        ("\u3000B\u3000", "B", "letter"),
        ("B\u3002", "B", "letter"),
        ("\u2028B\u2029", "B", "letter"),
        ("\ufeffB", "B", "letter"),
        ("\u200bB\u200b", "B", "letter"),
        ("\u00a0B", "B", "letter"),
        ("### B", "B", "letter"),
        ("So x = 2 and the result is \\boxed{C} as shown", "C", "boxed"),
        ("first \\boxed{A}, no: \\boxed{\\text{B}}", "B", "boxed"),
        ("The answer is A", "A", "stated"),
        ("The answer is: **B**.", "B", "stated"),
        ("Answer: C", "C", "stated"),
        ("ANSWER:(D)", "D", "stated"),
        ("answer B", "B", "stated"),
        ("Therefore, the final answer is: $B", "B", "stated"),
        ("The correct answer should be option (C), because ...", "C", "stated"),
        ("The answer is the correct option B", "B", "stated"),
        ("Answer is A. Wait, the answer is B", "B", "stated"),
        ("Option A is wrong. Answer: D. Option B is wrong too.", "D", "stated"),
        ("answer\uff1aB", "B", "stated"),
        ("A. red", "A", "leading"),
        ("(B) blue", "B", "leading"),
        ("C) green and red", "C", "leading"),
        ("D: the cat's toy", "D", "leading"),
        ("**A. red**\n\nThe footage shows it.", "A", "leading"),
        ("B\n\nBecause it is blue", "B", "leading"),
        ("B.blue", "B", "leading"),
        ("red", "A", "option text"),
        (" Blue. ", "B", "option text"),
        ("green  and\nred", "C", "option text"),
        ("the CAT's toy", "D", "option text"),
        ("I would go with option B here", "B", "named"),
        ("neither option A nor choice C fits", "C", "named"),
        ("E", None, None),
        ("Answer: E", None, None),
        ("The answer is a dog", None, None),
        ("red and blue", None, None),
        ("A dog", None, None),
        ("U.S.", None, None),
        ("AB", None, None),
        ("A and B", None, None),
        ("", None, None),
        ("\u2028", None, None),
        ("***", None, None),
        ("\u0391", None, None),  # a Greek capital alpha is no A
        ("The answer is \u0391", None, None),
    ],
)
def test_awkward_letters(text: str, value: str | None, rule: str | None) -> None:
    found = read_letter(text, options=OPTIONS)
    assert found == (Reading(value, rule) if value and rule else None)


def test_two_options_of_the_same_text_name_nothing() -> None:
    assert read_letter("red", options=("Red", "red.")) is None


def test_letters_are_counted_where_options_have_no_text() -> None:
    assert read_letter("J", count=10) == Reading("J", "letter")
    assert read_letter("K", count=10) is None


@pytest.mark.parametrize(
    ("response", "first", "last", "final"),
    [
        ("<answer>A</answer>", "A", "A", "A"),
        ("<answer>A</answer><answer> B </answer>", "A", "B", "A"),
        ("<answer>A</answer> then <answer>B", "A", "A", "A"),
        ("<think>x</think>\n<answer>\n(C)\n</answer>\n", "(C)", "(C)", "(C)"),
        ("<answer><answer>B</answer></answer>", "<answer>B", "<answer>B", "<answer>B"),
        ("<answer></answer>", "", "", ""),
        ("<answer>B", "", None, "B"),
        ("<answer>A <answer>B", "", None, "B"),
        ("<think>so B</think> B", "", None, "B"),
        ("<think>so B</think>", "", None, "<think>so B</think>"),
        ("<ANSWER>B</ANSWER>", "", None, "<ANSWER>B</ANSWER>"),
        ("< answer>B</ answer>", "", None, "< answer>B</ answer>"),
        ("</answer>B<answer>", "", None, "</answer>B<answer>"),
        ("</answer><answer>B</answer>", "B", "B", "B"),
        ("<answer>B</answer", "", None, "B</answer"),
        ("<answer>A\u2028B</answer>", "A\u2028B", "A\u2028B", "A\u2028B"),
        ("", "", None, ""),
    ],
)
def test_tags(response: str, first: str, last: str | None, final: str) -> None:
    assert extract_answer(response) == first
    assert last_answer(response) == last
    assert final_text(response) == final
    assert has_answer(response) == (last is not None)


def test_last_answer_agrees_with_the_published_pattern() -> None:
    """Video-Holmes takes the last match of this pattern."""
    published = re.compile(r"<answer>\s*(.*?)\s*</answer>", re.DOTALL)
    rng = random.Random(1)
    pieces = ["<answer>", "</answer>", " ", "\n", "x", "B", "<think>"]
    for _ in range(20_000):
        text = "".join(rng.choices(pieces, k=rng.randrange(9)))
        found = published.findall(text)
        assert last_answer(text) == (found[-1].strip() if found else None), text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[("Yes", "yes"), ("yes, it is", "yes"), ("NO.", "no"), ("Not at all", "no"), ("nothing", "no")],
        *[("n", None), ("", None), (" yes", None), ("It is: yes", None), ("ye", None), ("Yeah", None)],
    ],
)
def test_leading_yes_no(text: str, value: str | None) -> None:
    assert leading_yes_no(text) == value


def test_numbers_agree_with_the_published_patterns() -> None:
    """MMMU's three patterns, which take quadratic time, on strings too short to show it."""
    published = [
        r"-?\b\d{1,3}(?:,\d{3})+\b",
        r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
        r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
    ]
    rng = random.Random(2)
    pieces = ["1", "23", "456", ",", ".", "e", "E", "-", "+", " ", "x", "\uff11", "0"]
    seen = 0
    for _ in range(60_000):
        text = "".join(rng.choices(pieces, k=rng.randrange(12)))
        expected = [found for pattern in published for found in re.findall(pattern, text)]
        assert numbers_in(text) == expected, text
        seen += len(expected)
    assert seen > 50_000


PARSERS = (
    extract_answer,
    has_format,
    last_answer,
    final_text,
    lambda text: read_letter(text, options=OPTIONS),
    leading_yes_no,
    parse_number,
    numbers_in,
)


def _soup(count: int) -> Iterator[str]:
    """Random slices of a long random row of tags, letters, numbers, markup and characters from all planes."""
    rng = random.Random(3)
    pieces = ["<answer>", "</answer>", "<think>", "</think>", "\\boxed{", "}", "answer is ", "Option "]
    pieces += ["A", "B", "(", ")", ".", ",", "1", "2e5", "-3.5", "yes", "no", " ", "\n", "**", "red", "$"]
    pieces += ["\u2028", "\uff21", "\u0301", "\x00", "\ud800", "\U0001f600", "\u202e", ":", "\uff1a"]
    row = "".join(rng.choices(pieces, k=400_000))
    for _ in range(count):
        start = int(rng.random() * len(row))
        yield row[start : start + int(rng.random() * 24)]


def test_a_million_random_strings() -> None:
    """Nothing raises, twice the same is the same, and the time is a multiple of looking at each character.

    The multiple was 14 when this was written; a parser that backtracks would need hundreds.
    """
    parsing = scanning = 0.0
    strings = _soup(1_000_000)
    while batch := list(itertools.islice(strings, 50_000)):
        started = time.process_time()
        for parse in PARSERS:
            for entry in batch:
                parse(entry)
        parsing += time.process_time() - started
        started = time.process_time()
        for entry in batch:
            sum(character == "<" for character in entry)
        scanning += time.process_time() - started
        for entry in batch[::100]:
            assert [parse(entry) for parse in PARSERS] == [parse(entry) for parse in PARSERS]
    print(f"parsing {parsing:.1f} s, scanning {scanning:.1f} s, ratio {parsing / scanning:.1f}")
    assert parsing < 50.0 * scanning


HOSTILE = [
    "1",
    "1,",
    "1.",
    "1,111",
    "1e",
    "-",
    "(",
    "\\boxed{",
    "\\boxed{A",
    "answer ",
    "answer is ",
    "option ",
]
HOSTILE += ["*", " ", "\n", "\uff21", "\u0301", "a\u0315\u0300", "<answer>", "<answer></answer>", "</answer>"]
HOSTILE += [
    "</think>",
    "</think> <answer>",
    "A",
    "A ",
    "A.",
    "\\text{",
    "answer:::::::",
    "answer is the correct ",
]


@pytest.mark.parametrize("piece", HOSTILE)
@pytest.mark.parametrize("parser", range(len(PARSERS)))
def test_hostile_strings_of_a_megabyte(piece: str, parser: int) -> None:
    """Ten times the length takes some ten times as long; the bound is relative, so load does not matter."""
    small, large = (piece * (size // len(piece)) for size in (100_000, 1_000_000))
    times = []
    for text in (small, large):
        started = time.process_time()
        PARSERS[parser](text)
        times.append(time.process_time() - started)
    assert times[1] < 40.0 * max(times[0], 0.005), times
