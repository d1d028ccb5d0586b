"""What the trainer reads from verl's configuration; its steps run in tests/e2e."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from keytoken.verl_adapter.trainer import _reward_field


@pytest.mark.parametrize(
    ("estimator", "kl_in_reward", "field"),
    [
        ("keytoken_grpo", False, "rm_scores"),
        ("keytoken_grpo", True, "token_level_rewards"),  # verl writes them with the KL taken off
        ("rloo", False, None),
        ("reinforce_plus_plus", True, None),
    ],
)
def test_rewards_are_read_for_the_own_estimator_only(
    estimator: str, kl_in_reward: bool, field: str | None
) -> None:
    algorithm = OmegaConf.create({"adv_estimator": estimator, "use_kl_in_reward": kl_in_reward})
    assert _reward_field(algorithm) == field
