"""B5, N5: micro-batches of Qwen2-VL or Qwen2.5-VL without any image or video, and with both kinds.

Breaks, without pixels: so that every FSDP rank runs the vision tower, verl feeds it a dummy image and adds
   0.0 times the result's mean; transformers 5 returns an output object there, which has no ``mean``. The
   masked view is such a batch, and so is any batch of text rows.
Breaks, with images and videos: the tower runs twice on that rank and once on the others. FSDP gathers its
   parameters once for each run, so the ranks' collectives no longer match: a hang, or wrong bytes.
Where: verl 0.9.1, models/transformers/qwen2_vl.py:342-391, the first with transformers>=5.
Bound: verl==0.9.1.
Does: one run of the tower in every micro-batch on every rank. The tower's attention stays within each frame,
   so images and videos that pass through it together come out as they would alone.
"""

import functools
from typing import Any

import torch

_DUMMY_GRID = (1, 4, 4)  # an image of 4 x 4 patches, the least that merges into whole tokens


def apply(qwen2_vl: Any) -> None:
    """Replace ``_get_input_embeds``."""
    unpack_visual_output = qwen2_vl.unpack_visual_output

    @functools.wraps(qwen2_vl._get_input_embeds)
    def get_input_embeds(
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        embeds = model.get_input_embeddings()(input_ids)
        kinds: tuple[Any, ...] = (
            ("image", model.config.image_token_id, pixel_values, image_grid_thw),
            ("video", model.config.video_token_id, pixel_values_videos, video_grid_thw),
        )
        present = [(name, token, pixels, grid) for name, token, pixels, grid in kinds if pixels is not None]
        if attention_mask is not None:
            attention_mask = attention_mask.to(embeds.device)
        if not present:
            pixels, grid = _dummy_image(model, embeds)
            features, _ = unpack_visual_output(model.visual(pixels, grid_thw=grid))
            return embeds + 0.0 * features.mean(), attention_mask
        pixels = torch.cat([pixels for _, _, pixels, _ in present]).type(model.visual.dtype)
        grid = torch.cat([grid for *_, grid in present])
        features, _ = unpack_visual_output(model.visual(pixels, grid_thw=grid))
        merge = model.config.vision_config.spatial_merge_size**2
        counts = [int(grid.prod(dim=1).sum()) // merge for *_, grid in present]
        for (name, token, _, _), own in zip(present, features.split(counts), strict=True):
            embeds = _place(embeds, input_ids == token, own, name)
        return embeds, attention_mask

    qwen2_vl._get_input_embeds = get_input_embeds


def _dummy_image(model: Any, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    vision = model.config.vision_config
    patch_dim = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    grid = torch.tensor([_DUMMY_GRID], device=like.device)
    return torch.zeros((int(grid.prod()), patch_dim), dtype=like.dtype, device=like.device), grid


def _place(embeds: torch.Tensor, places: torch.Tensor, features: torch.Tensor, name: str) -> torch.Tensor:
    """Put features where their placeholder tokens are; the same error as verl's where counts differ."""
    num_tokens = int(places.sum())
    if num_tokens != features.shape[0]:
        raise ValueError(
            f"{name.capitalize()} features and {name} tokens do not match: tokens: {num_tokens}, features "
            f"{features.shape[0]}"
        )
    return embeds.masked_scatter(
        places[..., None].expand_as(embeds), features.to(embeds.device, embeds.dtype)
    )
