"""The factors of the loss, by hand; one case for each row of the table in the module's docstring."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from keytoken.losses.denominators import LossTotals, loss_totals, token_coefficients
from keytoken.schema import LossConfig

# Answers of 3 and 2 tokens and a row of padding. Tokens 0 and 2 of the first are selected, one softly.
MASK = torch.tensor([[True, True, True, False], [True, True, False, False], [False] * 4])
WEIGHTS = torch.tensor([[1.0, 0.0, 0.5, 7.0], [0.0, 0.0, 7.0, 7.0], [7.0] * 4])  # 7: garbage

# level, normalizer: factor of a weight of 1 in each answer, factor of every token in each answer
EXPECTED: dict[tuple[str, str], tuple[list[float], list[float]]] = {
    ("response", "selected"): ([1 / 4, 1 / 2], [1 / 6, 1 / 4]),
    ("response", "all"): ([1 / 6, 1 / 4], [1 / 6, 1 / 4]),
    ("response", "constant"): ([1 / 20, 1 / 20], [1 / 20, 1 / 20]),
    ("batch", "selected"): ([1 / 2, 1 / 2], [1 / 5, 1 / 5]),
    ("batch", "all"): ([1 / 5, 1 / 5], [1 / 5, 1 / 5]),
}


def test_totals() -> None:
    totals = loss_totals(WEIGHTS, MASK)
    assert totals == LossTotals(num_responses=2.0, num_tokens=5.0, num_selected=2.0)
    assert loss_totals(WEIGHTS[:1], MASK[:1]) + loss_totals(WEIGHTS[1:], MASK[1:]) == totals


@pytest.mark.parametrize("mask_kl", [True, False])
@pytest.mark.parametrize(("level", "normalizer"), EXPECTED)
def test_factors_by_hand(
    loss_config: Callable[..., LossConfig], level: str, normalizer: str, mask_kl: bool
) -> None:
    constant: dict[str, Any] = {"constant_length": 10} if normalizer == "constant" else {}
    cfg = loss_config(level=level, normalizer=normalizer, mask_kl=mask_kl, **constant)
    factors = token_coefficients(WEIGHTS, MASK, cfg, loss_totals(WEIGHTS, MASK))
    own, every = EXPECTED[level, normalizer]
    policy = [[own[0], 0.0, own[0] / 2, 0.0], [0.0] * 4, [0.0] * 4]
    all_tokens = [[every[0]] * 3 + [0.0], [every[1]] * 2 + [0.0] * 2, [0.0] * 4]
    selected = [[own[0], 0.0, own[0], 0.0], [0.0] * 4, [0.0] * 4]
    torch.testing.assert_close(factors.policy, torch.tensor(policy))
    torch.testing.assert_close(factors.every, torch.tensor(all_tokens))
    torch.testing.assert_close(factors.kl, torch.tensor(selected if mask_kl else all_tokens))


def test_a_part_uses_the_counts_of_the_whole(loss_config: Callable[..., LossConfig]) -> None:
    cfg = loss_config(level="batch", normalizer="selected")
    totals = LossTotals(num_responses=9.0, num_tokens=50.0, num_selected=8.0)
    factors = token_coefficients(WEIGHTS, MASK, cfg, totals)
    assert factors.policy[0].tolist() == [1 / 8, 0.0, 1 / 16, 0.0]
    assert float(factors.every[1, 0]) == pytest.approx(1 / 50)
