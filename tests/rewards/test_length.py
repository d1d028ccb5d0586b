import pytest

from keytoken.rewards.length import group_length_bonuses, length_bonus, overlong_penalty


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


@pytest.mark.parametrize(
    ("num_tokens", "penalty"),
    [(1, 0.0), (16384, 0.0), (16385, -1 / 4096), (18432, -0.5), (20480, -1.0), (30000, -1.0)],
)
def test_overlong_penalty_of_dapo(num_tokens: int, penalty: float) -> None:
    """The numbers of its paper: 16384 tokens expected, 4096 more of soft punishment."""
    assert overlong_penalty(num_tokens, max_tokens=20480, buffer=4096) == pytest.approx(penalty)
    assert overlong_penalty(num_tokens, 20480, 4096, factor=0.5) == pytest.approx(0.5 * penalty)
