"""Rewards of length: Video-R1's bonus for right answers of moderate length, DAPO's penalty for overlong ones.

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


def overlong_penalty(num_tokens: int, max_tokens: int, buffer: int, factor: float = 1.0) -> float:
    """What an answer loses for its length: 0, then a straight line down to -factor at ``max_tokens``.

    Source: DAPO (arXiv 2503.14476), equation 13 with factor 1. Beyond ``max_tokens`` an answer loses no more
    than that, as in the paper; verl's code follows the line further down.

    Args:
        num_tokens: Real length of the response in tokens.
        max_tokens: Length at which the whole penalty is due.
        buffer: Tokens before ``max_tokens`` over which the penalty grows; at least 1.
        factor: The whole penalty, at least 0.
    """
    excess = num_tokens - (max_tokens - buffer)
    return -factor * min(excess / buffer, 1.0) if excess > 0 else 0.0
