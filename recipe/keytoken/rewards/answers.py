"""Accuracy rewards of the Video-R1 family, one pure function for each type of problem.

Each takes the model's answer and the reference, both already taken out of their ``<answer>`` tags, and
returns a reward in [0, 1]. The rules are those of Video-R1's published code (tulerfeng/Video-R1,
``grpo.py``, which Video-KTR uses unchanged). Departures, all about answers that code would choke on:
numbers are parsed by a strict pattern, never evaluated, and an answer beyond ``MAX_CHARACTERS`` earns 0,
because ROUGE-L and edit distance take time proportional to the product of both lengths.
"""

import functools
from collections.abc import Callable

from rapidfuzz.distance import Levenshtein
from rouge_score.rouge_scorer import RougeScorer

from keytoken.errors import DataError
from keytoken.rewards.extract import parse_number

MAX_CHARACTERS = 8192
_EPSILON = 1e-9  # of the published regression rule


def multiple_choice(answer: str, reference: str) -> float:
    """1 if both strings are equal, else 0. "B." or "B) red" do not equal "B"."""
    return float(answer.strip() == reference.strip())


def numerical(answer: str, reference: str) -> float:
    """1 if both numbers agree to two decimals and both or neither are written with '.' or ','."""
    if _has_separator(answer) != _has_separator(reference):
        return 0.0
    left, right = parse_number(answer), parse_number(reference)
    return float(left is not None and right is not None and round(left, 2) == round(right, 2))


def ocr(answer: str, reference: str) -> float:
    """1 - word error rate, clipped to [0, 1]; the rate is edits / max(1, reference words)."""
    words = reference.split()
    return max(0.0, 1.0 - Levenshtein.distance(words, answer.split()) / max(1, len(words)))


def free_form(answer: str, reference: str) -> float:
    """Mean F-measure of ROUGE-1, ROUGE-2 and ROUGE-L with stemming."""
    scores = _rouge().score(reference, answer)
    return sum(score.fmeasure for score in scores.values()) / len(scores)


def regression(answer: str, reference: str) -> float:
    """1 - relative error, clipped to [0, 1].

    As published, ``(|error| + 1e-9) / (|reference| + 1e-9)``: a reference of 0 never earns anything.
    """
    left, right = parse_number(answer), parse_number(reference)
    if left is None or right is None:
        return 0.0
    return 1.0 - min(1.0, (abs(left - right) + _EPSILON) / (abs(right) + _EPSILON))


# Add a type: write a function above and name it here by the dataset's ``problem_type``.
ACCURACY_REWARDS: dict[str, Callable[[str, str], float]] = {
    "multiple choice": multiple_choice,
    "numerical": numerical,
    "OCR": ocr,
    "free-form": free_form,
    "regression": regression,
}


def accuracy(answer: str, reference: str, problem_type: str) -> float:
    """Accuracy reward of an answer by the rule of its problem type.

    Args:
        answer: Content of the response's first ``<answer>`` block.
        reference: The right answer.
        problem_type: A key of ``ACCURACY_REWARDS``.

    Returns:
        Reward in [0, 1]; 0 for an empty answer or one beyond ``MAX_CHARACTERS``.

    Raises:
        DataError: If the problem type is unknown. (The published code gives 0, which trains on noise.)
    """
    rule = ACCURACY_REWARDS.get(problem_type)
    if rule is None:
        raise DataError(
            f"problem_type {problem_type!r} has no reward; extra_info needs one of {sorted(ACCURACY_REWARDS)}"
        )
    if not answer or len(answer) > MAX_CHARACTERS:
        return 0.0
    return rule(answer, reference)


def _has_separator(text: str) -> bool:
    return "." in text or "," in text


@functools.cache
def _rouge() -> RougeScorer:
    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
