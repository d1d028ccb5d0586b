import re
import time

import numpy as np
import pytest

from keytoken.rewards.extract import extract_answer, has_format


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
