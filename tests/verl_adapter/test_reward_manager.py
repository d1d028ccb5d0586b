"""The reward sees the real length of an answer, through verl's own data layout."""

import asyncio

import numpy as np
import torch
from tensordict import TensorDict
from verl import DataProto

from keytoken.verl_adapter.reward_manager import LengthAwareRewardManager


class Tokenizer:
    def decode(self, ids, skip_special_tokens):
        return " ".join(str(int(token)) for token in ids)


def test_the_reward_is_told_the_real_length():
    seen = {}

    def compute_score(data_source, solution_str, ground_truth, extra_info):
        seen.update(extra_info, text=solution_str)
        return {"score": 1.0}

    responses = torch.tensor([[5, 6, 7, 0, 0]])
    attention_mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0]])  # two prompt tokens, three of the answer
    objects = {
        "data_source": "test",
        "reward_model": {"ground_truth": "A"},
        "extra_info": {"problem_type": "multiple choice"},
    }
    data = DataProto(
        batch=TensorDict({"responses": responses, "attention_mask": attention_mask}, batch_size=1),
        non_tensor_batch={name: np.array([value], dtype=object) for name, value in objects.items()},
    )

    async def score():
        manager = LengthAwareRewardManager(config={}, tokenizer=Tokenizer(), compute_score=compute_score)
        return await manager.run_single(data)

    result = asyncio.run(score())
    assert result["reward_score"] == 1.0
    assert seen["response_length"] == 3
    assert seen["text"] == "5 6 7"
    assert seen["problem_type"] == "multiple choice"
