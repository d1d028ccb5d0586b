"""verl's reward manager, telling the reward function how long the answer really was.

The length bonus of Video-R1 counts the answer's tokens, which text alone does not give away. The published
Video-KTR code counted *selected* tokens there, which put its bonus out of reach.
"""

from typing import Any

from keytoken.verl_adapter.compat import NaiveRewardManager


class LengthAwareRewardManager(NaiveRewardManager):
    """Adds ``extra_info["response_length"]``: tokens of the answer, selected or not."""

    async def run_single(self, data: Any) -> dict[str, Any]:
        """Score one answer; ``data`` is verl's DataProto of one trajectory."""
        item = data[-1]
        width = item.batch["responses"].shape[-1]
        info = dict(item.non_tensor_batch.get("extra_info") or {})
        info["response_length"] = int(item.batch["attention_mask"][-width:].sum())
        data.non_tensor_batch["extra_info"][-1] = info
        return await super().run_single(data)
