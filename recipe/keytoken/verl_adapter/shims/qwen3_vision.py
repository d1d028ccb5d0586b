"""N5 for Qwen3-VL: micro-batches with both images and videos.

Breaks: as in :mod:`keytoken.verl_adapter.shims.vision_free_batch`, the vision tower runs twice on a rank that
   has both kinds and once on the others, so that FSDP ranks' collectives no longer match: a hang, or wrong
   bytes.
Where: verl 0.9.1, models/transformers/qwen3_vl.py:210-250. A micro-batch without either is right there.
Bound: verl==0.9.1.
Does: one run of the tower for both. Its attention stays within each frame and its position embeddings within
   each picture, so they come out as they would alone; the features of deeper layers (deepstack) are shared
   out in the same way.
"""

import functools
from typing import Any

import torch


def apply(qwen3_vl: Any) -> None:
    """Replace ``_get_input_embeds``."""
    original, unpack_visual_output = qwen3_vl._get_input_embeds, qwen3_vl.unpack_visual_output

    @functools.wraps(original)
    def get_input_embeds(
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
    ) -> dict[str, Any]:
        if pixel_values is None or pixel_values_videos is None:
            pixels = (pixel_values, pixel_values_videos)
            return original(model, input_ids, attention_mask, *pixels, image_grid_thw, video_grid_thw)
        assert image_grid_thw is not None and video_grid_thw is not None
        is_image, is_video = (
            input_ids == model.config.image_token_id,
            input_ids == model.config.video_token_id,
        )
        merge = model.config.vision_config.spatial_merge_size**2
        for name, places, grids in (
            ("Image", is_image, image_grid_thw),
            ("Video", is_video, video_grid_thw),
        ):
            num_tokens, num_features = int(places.sum()), int(grids.prod(dim=1).sum()) // merge
            if num_tokens != num_features:
                raise ValueError(
                    f"{name} features and {name.lower()} tokens do not match: tokens: {num_tokens}, features "
                    f"{num_features}"
                )
        embeds = model.get_input_embeddings()(input_ids)
        pixels = torch.cat([pixel_values, pixel_values_videos]).type(model.visual.dtype)
        grid = torch.cat([image_grid_thw, video_grid_thw])
        features, deeper = unpack_visual_output(model.visual(pixels, grid_thw=grid))
        is_vision = is_image | is_video
        # From "all images, all videos" to the order of the tokens.
        order = torch.cat([is_image[is_vision].nonzero(), is_video[is_vision].nonzero()]).squeeze(1).argsort()
        features = features[order].to(embeds.device, embeds.dtype)
        return {
            "inputs_embeds": embeds.masked_scatter(is_vision[..., None].expand_as(embeds), features),
            "attention_mask": None if attention_mask is None else attention_mask.to(embeds.device),
            "visual_pos_masks": is_vision,
            "deepstack_visual_embeds": [level[order] for level in deeper],
        }

    qwen3_vl._get_input_embeds = get_input_embeds
