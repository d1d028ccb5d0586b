import numpy as np
import pytest

from keytoken.demo.world import FAMILIES, LETTERS, VIDEO_FAMILIES, make_question
from keytoken.rewards.score import compute_score


@pytest.mark.parametrize("family", FAMILIES)
def test_questions_are_well_formed(family: str) -> None:
    rng = np.random.default_rng(0)
    letters = set()
    for _ in range(80):
        question = make_question(family, rng)
        assert len(set(question.options)) == 4 and question.answer in question.options
        assert question.answer in question.caption.split()
        assert bool(question.bodies) == (family in VIDEO_FAMILIES)
        assert question.prompt.endswith(f"D {question.options[3]}")
        info = {"problem_type": "multiple choice"}
        assert compute_score("demo", question.response, question.letter, info)["score"] == 2.0
        letters.add(question.letter)
    assert letters == set(LETTERS)


@pytest.mark.parametrize("family", FAMILIES)
def test_same_seed_same_question(family: str) -> None:
    left, right = (make_question(family, np.random.default_rng([3, 1])) for _ in range(2))
    assert (left.prompt, left.response) == (right.prompt, right.response)


def test_the_answer_of_an_order_question_is_seen_first() -> None:
    question = make_question("order", np.random.default_rng(0))
    first = next(body for body in question.bodies if body.light[0] == 1)
    assert first.color == question.answer and first.light[-1] == 0


def test_sums_are_right() -> None:
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    rng = np.random.default_rng(0)
    for _ in range(50):
        left, _, right, _, total = make_question("text", rng).caption.split()
        assert words.index(left) + words.index(right) == words.index(total)
