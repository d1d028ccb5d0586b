"""The shuffled view: the frames of every video in another order, the same one for all answers to a prompt.

They are permuted before the model's temporal patch merges neighbours; ids and positions stay, and with the
ids the times that Qwen3-VL reads in its prompt: the model is told that these frames were seen at those times.

Source: Video-KTR (arXiv 2601.19686). Departure from its published code: an order always changes the clip
(there the identity is drawn once in 24 times for four frames).
"""

from __future__ import annotations

from torch import Tensor

from keytoken.attribution.views.base import Clip, pixel_view
from keytoken.attribution.views.frames import changing_order, permute_frames


def shuffled(clip: Clip) -> Tensor | None:
    """[N, D] patches of the clip with its frames in a seeded order."""
    order = changing_order(clip.frames(), clip.context.seed, clip.prompt_key)
    if order is None:
        return None
    return permute_frames(clip.patches, clip.grid[None], [order], clip.context.vision.temporal_patch_size)


VIEW = pixel_view("temporal", shuffled)
