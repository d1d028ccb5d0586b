"""What the trainer reads from verl's configuration; its steps run in tests/e2e."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from tensordict import TensorDict
from transfer_queue import KVBatchMeta

from keytoken.schema import OrderBonusConfig
from keytoken.verl_adapter import order
from keytoken.verl_adapter import trainer as trainers
from keytoken.verl_adapter.trainer import AttributionSteps, _reward_field


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


class Stop(Exception):
    """Ends a step where the test has seen enough."""


class VerlsTrainer:
    """Stands where verl's trainer stands below ours."""

    def _fetch_one_gen_batch(self) -> TensorDict:
        return TensorDict({"index": torch.arange(2)}, batch_size=2)

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        raise Stop(dict(metrics))


def trainer(order_bonus: OrderBonusConfig | None) -> Any:
    built = object.__new__(type("Trainer", (AttributionSteps, VerlsTrainer), {}))
    built.keytoken = SimpleNamespace(method=SimpleNamespace(order_bonus=order_bonus))
    built.config = OmegaConf.create({"actor_rollout_ref": {"rollout": {"n": 4}}})
    built.global_steps = 3
    return built


def test_prompts_of_a_step_ask_for_shuffled_answers_if_the_method_does() -> None:
    plain = trainer(None)._fetch_one_gen_batch()
    asking = trainer(OrderBonusConfig())._fetch_one_gen_batch()
    assert plain["uid"] == asking["uid"] == ["0000003-00000", "0000003-00001"]
    assert order.SHUFFLED_ANSWERS not in plain.keys()  # noqa: SIM118 - a TensorDict is no dict
    assert asking[order.SHUFFLED_ANSWERS] == [2, 2]


def test_rewards_are_raised_before_advantages_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainers.order, "raise_rewards", lambda batch, config: {"bonus": config.bonus})
    batch = KVBatchMeta(partition_id="train", keys=[], tags=[])
    for bonus, seen in ((OrderBonusConfig(bonus=0.5), {"bonus": 0.5}), (None, {})):
        with pytest.raises(Stop) as stopped:
            trainer(bonus)._compute_advantage(batch, {})
        assert stopped.value.args == (seen,)
