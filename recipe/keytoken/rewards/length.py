"""Length bonus of Video-R1: a small reward for right answers of moderate length.

The length is the number of response tokens that the policy produced. Video-KTR's published code counts
selected tokens instead, because its mask has been overwritten by then; see ``num_tokens``.
"""

from collections.abc import Sequence

MIN_TOKENS = 320
MAX_TOKENS = 512
_MIN_ACCURACY = 0.1  # an answer counts as right above this


def length_bonus(num_tokens: int, accuracy: float) -> float:
    """1 if a right answer has 320 to 512 tokens, else 0; the weight is applied elsewhere.

    Args:
        num_tokens: Real length of the response in tokens, whatever a method selects of them.
        accuracy: Its accuracy reward.
    """
    return float(accuracy > _MIN_ACCURACY and MIN_TOKENS <= num_tokens <= MAX_TOKENS)


def group_length_bonuses(num_tokens: Sequence[int], accuracies: Sequence[float]) -> list[float]:
    """Bonuses of one group by the full published rule: none unless two or more answers are right."""
    if sum(accuracy > _MIN_ACCURACY for accuracy in accuracies) < 2:
        return [0.0] * len(accuracies)
    return [length_bonus(*pair) for pair in zip(num_tokens, accuracies, strict=True)]
