import pytest

from keytoken.rewards.length import group_length_bonuses, length_bonus


@pytest.mark.parametrize(
    ("num_tokens", "accuracy", "bonus"),
    [(319, 1, 0), (320, 1, 1), (512, 1, 1), (513, 1, 0), (400, 0.1, 0), (400, 0.11, 1), (0, 1, 0)],
)
def test_bounds_are_inclusive_and_wrong_answers_earn_nothing(
    num_tokens: int, accuracy: float, bonus: float
) -> None:
    assert length_bonus(num_tokens, accuracy) == bonus


def test_a_group_needs_two_right_answers() -> None:
    assert group_length_bonuses([400, 400, 400], [1, 0, 0]) == [0, 0, 0]
    assert group_length_bonuses([400, 100, 400], [1, 1, 0]) == [1, 0, 0]
