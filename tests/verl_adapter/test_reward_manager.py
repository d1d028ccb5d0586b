"""The reward sees the real length of an answer, through verl's own data layout."""

import asyncio
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from tensordict import TensorDict
from verl import DataProto
from verl.experimental.reward_loop.reward_manager.dapo import DAPORewardManager

from keytoken.errors import NonFiniteError
from keytoken.verl_adapter.reward_manager import LengthAwareRewardManager

MAX_LENGTH = 20


class Tokenizer:
    def decode(self, ids, skip_special_tokens):
        return " ".join(str(int(token)) for token in ids)


def answer_of(length: int) -> DataProto:
    """One trajectory as verl's reward loop gets it: two prompt tokens, ``length`` of the answer, padding."""
    responses = torch.arange(5, 5 + MAX_LENGTH)[None]
    attention_mask = (torch.arange(2 + MAX_LENGTH) < 2 + length).long()[None]
    objects = {
        "data_source": "test",
        "reward_model": {"ground_truth": "A"},
        "extra_info": {"problem_type": "multiple choice"},
    }
    return DataProto(
        batch=TensorDict({"responses": responses, "attention_mask": attention_mask}, batch_size=1),
        non_tensor_batch={name: np.array([value], dtype=object) for name, value in objects.items()},
    )


def score(manager: type, config: Any, compute_score: Any, length: int) -> dict[str, Any]:
    async def run() -> dict[str, Any]:
        return await manager(config, Tokenizer(), compute_score).run_single(answer_of(length))

    return asyncio.run(run())


def test_the_reward_is_told_the_real_length():
    seen = {}

    def compute_score(data_source, solution_str, ground_truth, extra_info):
        seen.update(extra_info, text=solution_str)
        return {"score": 1.0}

    result = score(LengthAwareRewardManager, {}, compute_score, length=3)
    assert result == {"reward_score": 1.0, "reward_extra_info": {"score": 1.0}}
    assert seen["response_length"] == 3
    assert seen["text"] == "5 6 7"
    assert seen["problem_type"] == "multiple choice"


def overlong(enable: bool) -> Any:
    buffer = {"enable": enable, "len": 8, "penalty_factor": 0.5, "log": True}
    return OmegaConf.create(
        {"reward": {"reward_kwargs": {"max_resp_len": MAX_LENGTH, "overlong_buffer_cfg": buffer}}}
    )


@pytest.mark.parametrize("length", range(1, MAX_LENGTH + 1))
def test_the_penalty_is_that_of_verls_manager(length):
    def compute_score(data_source, solution_str, ground_truth, extra_info):
        return {"score": 0.75, "acc": 1.0}

    ours = score(LengthAwareRewardManager, overlong(True), compute_score, length)
    theirs = score(DAPORewardManager, overlong(True), compute_score, length)
    assert ours["reward_score"] == pytest.approx(float(theirs["reward_score"]), abs=1e-6)
    assert ours["reward_score"] == pytest.approx(0.75 - 0.5 * max(0, length - 12) / 8)
    assert ours["reward_extra_info"]["acc"] == 1.0
    theirs_alone = float(theirs["reward_extra_info"]["overlong_reward"])
    assert ours["reward_extra_info"]["overlong_reward"] == pytest.approx(theirs_alone, abs=1e-6)


def test_no_penalty_unless_it_is_enabled():
    def compute_score(data_source, solution_str, ground_truth, extra_info):
        return 0.75

    result = score(LengthAwareRewardManager, overlong(False), compute_score, MAX_LENGTH)
    assert result == {"reward_score": 0.75, "reward_extra_info": {"acc": 0.75}}


@pytest.mark.parametrize(
    "reward", [float("nan"), float("inf"), None, "1.0", np.float32("nan"), torch.tensor([1.0, 2.0])]
)
def test_a_reward_that_is_no_finite_number_ends_the_run(reward):
    """An error of KeyToken's own, which ends a run at once (test_agent_loop.py)."""
    with pytest.raises(NonFiniteError, match=r"an answer to prompt .* of data source test is"):
        score(LengthAwareRewardManager, {}, lambda **_: {"score": reward}, length=3)


@pytest.mark.parametrize("reward", [0, True, np.float32(0.5), torch.tensor(0.5)])
def test_numbers_of_all_libraries_are_rewards(reward):
    assert score(LengthAwareRewardManager, {}, lambda **_: {"score": reward}, 3)["reward_score"] == reward
