"""B5, N5: a micro-batch of Qwen2-VL or Qwen2.5-VL without any image or video.

Breaks: so that every FSDP rank runs the vision tower, verl feeds it a dummy image and adds 0.0 times
the result's mean; transformers 5 returns an output object there, which has no ``mean``. The masked view
is such a batch, and so is any batch of text rows.
Where: verl 0.9.1, models/transformers/qwen2_vl.py:384-391, with transformers>=5.
Bound: verl==0.9.1.
Does: the same, with the tensor taken out of the output object.
"""

import functools
from typing import Any

import torch

_DUMMY_PATCHES = 16  # one image of 4 x 4 patches, the least that merges into whole tokens


def apply(qwen2_vl: Any) -> None:
    """Repair ``_get_input_embeds`` for batches without pixels."""
    original = qwen2_vl._get_input_embeds
    unpack_visual_output = qwen2_vl.unpack_visual_output

    @functools.wraps(original)
    def get_input_embeds(
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if pixel_values is not None or pixel_values_videos is not None:
            return original(
                model,
                input_ids,
                attention_mask,
                pixel_values,
                pixel_values_videos,
                image_grid_thw,
                video_grid_thw,
            )
        embeds = model.get_input_embeddings()(input_ids)
        vision = model.config.vision_config
        patch_dim = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        pixels = torch.zeros((_DUMMY_PATCHES, patch_dim), dtype=embeds.dtype, device=embeds.device)
        grid = torch.tensor([[1, 4, 4]], device=embeds.device)
        features, _ = unpack_visual_output(model.visual(pixels, grid_thw=grid))
        if attention_mask is not None:
            attention_mask = attention_mask.to(embeds.device)
        return embeds + 0.0 * features.mean(), attention_mask

    qwen2_vl._get_input_embeds = get_input_embeds
