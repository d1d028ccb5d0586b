"""B4: a policy that samples vision tokens.

Breaks: a sampled ``<|vision_start|>`` or placeholder has no image or video behind it; transformers'
``get_rope_index`` runs out of grids (StopIteration), verl's own helper out of tokens (IndexError), and
the forward pass finds more placeholders than features.
Where: transformers 5.9.0, models/qwen2_5_vl/modeling_qwen2_5_vl.py:1066; verl 0.9.1,
models/transformers/qwen2_vl.py (``get_rope_index``) and :355-375.
Bound: verl==0.9.1, which masks the logits of the image and video placeholders, not of the others.
Does: adds the remaining vision tokens to the list whose logits verl's vLLM worker sets to -inf
(workers/rollout/vllm_rollout/vllm_async_server.py, ``monkey_patch_model``). What gets through
all the same is cut off and counted in :mod:`keytoken.verl_adapter.agent_loop`.
"""

import functools
from typing import Any

VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")


def vision_token_ids(processor: Any) -> list[int]:
    """Ids of all vision tokens that the processor's tokenizer has; empty for a text model."""
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None:
        return []
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[token] for token in VISION_TOKENS if token in vocabulary]


def apply(rollout_utils: Any) -> None:
    """Extend ``get_vision_placeholder_token_ids``."""
    original = rollout_utils.get_vision_placeholder_token_ids

    @functools.wraps(original)
    def banned_ids(processor: Any) -> list[int]:
        return sorted({*original(processor), *vision_token_ids(processor)})

    rollout_utils.get_vision_placeholder_token_ids = banned_ids
