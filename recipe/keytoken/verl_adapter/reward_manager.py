"""verl's reward manager, aware of how long the answer really was.

The length bonus of Video-R1 counts the answer's tokens, which text alone does not give away. The published
Video-KTR code counted *selected* tokens there, which put its bonus out of reach. DAPO's penalty for overlong
answers counts them too, and reads the keys of verl's own manager ``dapo``.
"""

import math
from functools import partial
from typing import Any

from keytoken.errors import NonFiniteError
from keytoken.rewards.length import overlong_penalty
from keytoken.verl_adapter.compat import NaiveRewardManager


class LengthAwareRewardManager(NaiveRewardManager):
    """Adds ``extra_info["response_length"]``: tokens of the answer, selected or not.

    With ``reward.reward_kwargs.overlong_buffer_cfg.enable`` it adds the penalty to the reward, and reports
    it as ``overlong_reward``. As in verl this goes for validation as well; ``acc`` is left alone.
    """

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        options = (config.get("reward") or {}).get("reward_kwargs") or {}
        buffer = options.get("overlong_buffer_cfg") or {}
        self.penalty = None
        if buffer.get("enable"):
            self.penalty = partial(
                overlong_penalty,
                max_tokens=options["max_resp_len"],
                buffer=buffer["len"],
                factor=buffer["penalty_factor"],
            )

    async def run_single(self, data: Any) -> dict[str, Any]:
        """Score one answer; ``data`` is verl's DataProto of one trajectory.

        Raises:
            NonFiniteError: the reward is no finite number.
        """
        item = data[-1]
        width = item.batch["responses"].shape[-1]
        info = dict(item.non_tensor_batch.get("extra_info") or {})
        length = info["response_length"] = int(item.batch["attention_mask"][-width:].sum())
        data.non_tensor_batch["extra_info"][-1] = info
        result: dict[str, Any] = await super().run_single(data)
        reward = result["reward_score"]
        if not _is_finite(reward):
            raise NonFiniteError(
                f"The reward of an answer to prompt {item.non_tensor_batch.get('uid')} of data source "
                f"{item.non_tensor_batch.get('data_source')} is {reward!r}: reward.custom_reward_function "
                "must return a finite number for any answer. `keytoken doctor` tries it."
            )
        if self.penalty is not None:
            penalty = self.penalty(length)
            result["reward_score"] += penalty
            result["reward_extra_info"]["overlong_reward"] = penalty
        return result


def _is_finite(reward: Any) -> bool:
    """A number of any library's; words are none, even if they look like one."""
    try:
        return not isinstance(reward, str) and math.isfinite(reward)
    except (TypeError, ValueError):
        return False
