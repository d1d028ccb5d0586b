"""Group advantages against numpy and against verl."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from keytoken.losses.advantage import group_advantages


def test_agrees_with_numpy_on_interleaved_groups() -> None:
    rewards = torch.randn(12, dtype=torch.float64)
    group = torch.tensor([3, 1, 3, 3, 1, 8, 8, 1, 3, 8, 1, 3])
    ours = group_advantages(rewards, group, 1e-4)
    for member in (1, 3, 8):
        own = rewards[group == member].numpy()
        expected = (own - own.mean()) / (np.std(own, ddof=1) + 1e-4)
        np.testing.assert_allclose(ours[group == member].numpy(), expected, rtol=1e-12)


def test_equal_rewards_give_exactly_zero() -> None:
    rewards = torch.full((8,), 0.1)
    assert float(rewards.mean()) != float(rewards[0])  # float32 rounds it
    assert group_advantages(rewards, torch.zeros(8, dtype=torch.long), 1e-6).tolist() == [0.0] * 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_agrees_with_verl(dtype: torch.dtype) -> None:
    core_algos = pytest.importorskip("verl.trainer.ppo.core_algos")
    rewards = torch.rand(9, dtype=dtype)
    group = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 3])  # the last two prompts have one answer each
    mask = torch.ones(9, 4, dtype=dtype)
    token_rewards = torch.zeros(9, 4, dtype=dtype)
    token_rewards[:, -1] = rewards
    theirs, _ = core_algos.compute_grpo_outcome_advantage(token_rewards, mask, group.numpy())
    ours = group_advantages(rewards, group, 1e-6)
    torch.testing.assert_close(ours, theirs[:, 0], rtol=1e-5, atol=1e-6)
