import json
import time
from pathlib import Path

import pytest

from keytoken.errors import DataError
from keytoken.rewards.answers import (
    ACCURACY_REWARDS,
    MAX_CHARACTERS,
    accuracy,
    free_form,
    multiple_choice,
    numerical,
    ocr,
    regression,
)
from keytoken.rewards.extract import extract_answer, parse_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3", 3.0),
        (" -3.50 ", -3.5),
        ("1,234.5", 1234.5),
        (".5", 0.5),
        ("2.", 2.0),
        ("1e3", 1000.0),
        ("+7", 7.0),
        ("nan", None),
        ("inf", None),
        ("1_000", None),
        ("0x10", None),
        ("3 apples", None),
        ("", None),
        ("__import__('os').getcwd()", None),
        ("9**9**9", None),
        ("1e9999", None),
        ("9" * 65, None),
    ],
)
def test_only_plain_numbers_are_parsed(text: str, number: float | None) -> None:
    assert parse_number(text) == number


@pytest.mark.parametrize(
    ("answer", "reference", "reward"),
    [("B", "B", 1), (" B ", "B", 1), ("b", "B", 0), ("B.", "B", 0), ("B) red", "B", 0), ("", "B", 0)],
)
def test_multiple_choice(answer: str, reference: str, reward: float) -> None:
    assert multiple_choice(answer, reference) == reward


@pytest.mark.parametrize(
    ("answer", "reference", "reward"),
    [
        ("3", "3", 1),
        ("3.0", "3", 0),  # one is written with a point, the other without
        ("3.004", "3.00", 1),
        ("3.006", "3.00", 0),
        ("1,000", "1000.0", 1),  # both have a separator
        ("1,000", "1000", 0),
        ("three", "3", 0),
        ("3", "unknown", 0),
    ],
)
def test_numerical(answer: str, reference: str, reward: float) -> None:
    assert numerical(answer, reference) == reward


@pytest.mark.parametrize(
    ("answer", "reference", "reward"),
    [
        ("the quick fox", "the quick fox", 1),
        ("the slow fox", "the quick fox", 2 / 3),
        ("the fox", "the quick fox", 2 / 3),
        ("a b c d e f g", "x", 0),  # more errors than words
        ("", "", 1),
        ("word", "", 0),
    ],
)
def test_ocr_is_one_minus_word_error_rate(answer: str, reference: str, reward: float) -> None:
    assert ocr(answer, reference) == pytest.approx(reward)


def test_ocr_agrees_with_jiwer() -> None:
    jiwer = pytest.importorskip("jiwer")
    reference = "no entry except for buses and taxis"
    for answer in ("no entry", "no entry except buses or taxis", "entry no for except", "x y z"):
        assert ocr(answer, reference) == pytest.approx(max(0.0, 1 - jiwer.wer(reference, answer)))


def test_free_form_is_the_mean_of_three_f_measures() -> None:
    assert free_form("a dog runs", "a dog runs") == pytest.approx(1.0)
    assert free_form("dogs running", "dog runs") == pytest.approx(1.0)  # stemmed
    assert free_form("zebra", "a dog runs") == 0.0
    # "the cat sat" against "the cat ran": unigrams 2/3, bigrams 1/2, longest subsequence 2/3.
    assert free_form("the cat sat", "the cat ran") == pytest.approx((2 / 3 + 1 / 2 + 2 / 3) / 3)


@pytest.mark.parametrize(
    ("answer", "reference", "reward"),
    [("10", "10", 1), ("9", "10", 0.9), ("25", "10", 0), ("-10", "10", 0), ("ten", "10", 0), ("0", "0", 0)],
)
def test_regression(answer: str, reference: str, reward: float) -> None:
    assert regression(answer, reference) == pytest.approx(reward, abs=1e-8)


def test_every_reward_stays_within_bounds_and_time() -> None:
    hostile = ["", " ", "9" * MAX_CHARACTERS, "a b " * (MAX_CHARACTERS // 4), "(" * MAX_CHARACTERS, "\x00"]
    hostile.append("x" * 10_000_000)
    for problem_type in ACCURACY_REWARDS:
        for answer in hostile:
            for reference in ("B", "3.5", "a b c " * 200):
                started = time.process_time()
                assert 0.0 <= accuracy(answer, reference, problem_type) <= 1.0
                assert time.process_time() - started < 5.0


def test_unknown_problem_type_is_an_error() -> None:
    with pytest.raises(DataError, match=r"'riddle'.*multiple choice"):
        accuracy("B", "B", "riddle")


@pytest.mark.parametrize("model", ["qwen2.5-vl-7b_zeroshot", "videochat-r1"])
def test_published_outputs_get_their_published_scores(model: str, shared_data: Path) -> None:
    """625 real answers each with the scores that their authors published."""
    lines = (shared_data / "predictions" / f"mmvu_{model}.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    assert len(samples) == 625
    rewards = []
    for sample in samples:
        # The authors' extraction, because the model without RL mostly writes no answer tags.
        answer, reference = sample["extracted_answer"], extract_answer(sample["ground_truth"])
        rewards.append(accuracy(answer, reference, sample["question"]["problem_type"]))
        assert rewards[-1] == sample["accuracy_score"], sample["question"]["problem_id"]
    assert 0.1 < sum(rewards) / len(rewards) < 0.9


def test_published_outputs_are_extracted_alike(shared_data: Path) -> None:
    lines = (shared_data / "predictions" / "mmvu_videochat-r1.jsonl").read_text().splitlines()
    for sample in map(json.loads, lines):
        assert extract_answer(sample["model_output"]) == sample["extracted_answer"]
