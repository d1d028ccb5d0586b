"""N11: attention of Qwen2.5-VL over packs that share a prompt.

Breaks: with padding removed verl replaces the attention of Qwen2-VL and Qwen2.5-VL by its own, which drops
   arguments that it does not know and cuts a batch into sequences where the text position is 0. The answers
   of a pack (:mod:`keytoken.prefix`) would see one another; nothing fails, log-probs are wrong.
Where: verl 0.9.1, models/transformers/qwen2_vl.py:252-318, installed by monkey_patch.py:404-412.
Bound: verl==0.9.1.
Does: sends a forward pass that carries a plan to the attention of transformers, any other to verl's.
"""

import functools
from typing import Any

from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLAttention
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLAttention

from keytoken.prefix.attention import HANDS_ON

# Taken when verl's module is imported, and so before its patch.
_STOCK = {kind: kind.forward for kind in (Qwen2VLAttention, Qwen2_5_VLAttention)}


def apply(qwen2_vl: Any) -> None:
    """Replace ``qwen2_vl_attn_forward``, which verl's patch installs."""
    original = qwen2_vl.qwen2_vl_attn_forward

    @functools.wraps(original)
    def attention(self: Any, *args: Any, prefix_plan: Any = None, **kwargs: Any) -> Any:
        if prefix_plan is None:
            return original(self, *args, **kwargs)
        return _STOCK[type(self)](self, *args, prefix_plan=prefix_plan, **kwargs)

    setattr(attention, HANDS_ON, True)
    qwen2_vl.qwen2_vl_attn_forward = attention
