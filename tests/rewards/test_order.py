"""The reward of order, worked by hand."""

from __future__ import annotations

import random

import pytest

from keytoken.rewards.order import order_bonuses
from keytoken.schema import OrderBonusConfig

CONFIG = OrderBonusConfig()


def one_prompt(
    accuracies: list[float], shuffled: list[float], config: OrderBonusConfig = CONFIG
) -> list[float]:
    """Bonuses of one group whose first answers have a shuffled one beside them."""
    beside = [*shuffled, *[None] * (len(accuracies) - len(shuffled))]
    return order_bonuses(accuracies, beside, ["p"] * len(accuracies), config).bonuses


@pytest.mark.parametrize(
    ("accuracies", "shuffled", "bonuses"),
    [
        # Ordered 1/2, shuffled 1/2: at least 0.8 of it. The two right answers get the bonus.
        ([1, 1, 0, 0], [1, 0], [0.3, 0.3, 0, 0]),
        # Ordered 1/4 against 1/2: below 0.4.
        ([1, 0, 0, 0], [1, 0], [0, 0, 0, 0]),
        # Ordered 3/8 against 1/2: still below 0.4, so the factor is not 0.7.
        ([1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 0, 0], [0] * 8),
        # Ordered 1/2 against 5/8, of which 0.8 is 1/2: reached exactly.
        ([1, 0], [1.0, 0.25], [0.3, 0]),
        # Ordered 3/5 against 3/4: 0.8 * 0.75 is above 0.6 by rounding alone.
        ([1, 1, 1, 0, 0], [1, 1, 1, 0], [0.3, 0.3, 0.3, 0, 0]),
        # Shuffled answers all wrong: any right answer gets it.
        ([0, 0, 0, 1], [0, 0], [0, 0, 0, 0.3]),
        # All wrong on both sides: 0 is not less than 0, but nobody is right.
        ([0, 0, 0, 0], [0, 0], [0, 0, 0, 0]),
        # Partial accuracies: 0.1 is not above 0.1, 0.11 is; (0.1 + 0.11) / 2 is at least 0.8 * 0.1.
        ([0.1, 0.11], [0.1], [0, 0.3]),
        # All right on both sides.
        ([1, 1], [1], [0.3, 0.3]),
        # A text prompt, an image, a clip that shows one picture.
        ([1, 1, 0], [], [0, 0, 0]),
        ([], [], []),
    ],
)
def test_worked_cases(accuracies: list[float], shuffled: list[float], bonuses: list[float]) -> None:
    assert one_prompt(accuracies, shuffled) == bonuses


def test_every_number_is_an_option() -> None:
    accuracies, shuffled = [1.0, 0.6, 0.4, 0.0], [1.0, 0.0]  # means 1/2 and 1/2
    assert one_prompt(accuracies, shuffled, OrderBonusConfig(bonus=1.5)) == [1.5, 1.5, 1.5, 0]
    assert one_prompt(accuracies, shuffled, OrderBonusConfig(min_accuracy=0.5)) == [0.3, 0.3, 0, 0]
    assert one_prompt(accuracies, shuffled, OrderBonusConfig(threshold=1.0)) == [0.3, 0.3, 0.3, 0]
    assert one_prompt(accuracies, shuffled, OrderBonusConfig(threshold=1.01)) == [0, 0, 0, 0]


# Prompt a: 2/3 against 1, below 0.8. Prompt b: 1/2 against 0, due. Prompt c: 0 against 0, nobody right.
# Prompt d has no shuffled answers, prompt e one only, as if the session of the other had failed: 1 against 1.
BATCH = [
    ("a", 1.0, 1.0, 0.0),
    ("b", 0.0, 0.0, 0.0),
    ("d", 1.0, None, 0.0),
    ("a", 1.0, 1.0, 0.0),
    ("b", 1.0, 0.0, 0.3),
    ("c", 0.0, 0.0, 0.0),
    ("e", 1.0, None, 0.3),
    ("a", 0.0, None, 0.0),
    ("d", 0.0, None, 0.0),
    ("e", 1.0, 1.0, 0.3),
]


def test_a_ragged_batch() -> None:
    group, accuracies, shuffled, bonuses = zip(*BATCH, strict=True)
    result = order_bonuses(accuracies, shuffled, group, CONFIG)
    assert result.bonuses == list(bonuses)
    assert result.metrics == {
        "reward/order_bonus_share": 2 / 4,  # b and e of a, b, c and e
        "reward/ordered_accuracy": pytest.approx((2 / 3 + 1 / 2 + 0 + 1) / 4),
        "reward/shuffled_accuracy": (1 + 0 + 0 + 1) / 4,
    }


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_a_batch_does_not_matter(seed: int) -> None:
    rows = random.Random(seed).sample(BATCH, len(BATCH))
    group, accuracies, shuffled, bonuses = zip(*rows, strict=True)
    assert order_bonuses(accuracies, shuffled, group, CONFIG).bonuses == list(bonuses)


def test_a_batch_without_videos_has_no_metrics() -> None:
    result = order_bonuses([1.0, 0.0], [None, None], ["a", "a"], CONFIG)
    assert result.bonuses == [0.0, 0.0]
    assert result.metrics == {}


def test_lists_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        order_bonuses([1.0, 0.0], [1.0], ["a", "a"], CONFIG)
