"""The model families that KeyToken knows, and all that differs between them: one table.

Qwen2.5-VL shows a video as one block of placeholders, and says when a patch was seen by its temporal
position. Qwen3-VL shows one block for each temporal patch and writes the time before it, as in
``<0.5 seconds><|vision_start|>...<|vision_end|>``; its positions know no time.

To add a family: a line in :data:`FAMILIES`, a tiny model in :mod:`keytoken.demo.model`, and its name in the
tests that are parametrised by family.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from keytoken.data.positions import Grid, mrope_positions
from keytoken.data.timestamps import longest_stamp
from keytoken.errors import ConfigurationError


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What KeyToken has to know of a model family.

    Attributes:
        model_type: Of the model's config.json.
        processor: Name of the class of its processor.
        patch_size: Edge of a vision patch in pixels, where the model's config.json does not say it.
        timestamps: Whether a video is one block of placeholders for each temporal patch, with its time before
            it in words. Otherwise a video is one block, and its time is in the positions.
    """

    model_type: str
    processor: str
    patch_size: int
    timestamps: bool


FAMILIES = (
    Family(model_type="qwen2_5_vl", processor="Qwen2_5_VLProcessor", patch_size=14, timestamps=False),
    Family(model_type="qwen3_vl", processor="Qwen3VLProcessor", patch_size=16, timestamps=True),
)
MODEL_TYPES = tuple(family.model_type for family in FAMILIES)


def family_of(processor: Any) -> Family:
    """The family of a processor.

    Raises:
        ConfigurationError: KeyToken does not know it.
    """
    name = type(processor).__name__
    for family in FAMILIES:
        if family.processor == name:
            return family
    known = " and ".join(family.processor for family in FAMILIES)
    raise ConfigurationError(
        f"model with a {name}: KeyToken computes prompts and positions for models with {known} only; set "
        "actor_rollout_ref.model.path to a Qwen2.5-VL or Qwen3-VL model"
    )


def patch_size_of(model: Path) -> int | None:
    """Edge of a vision patch in pixels, by a model's config.json; None if that is unknown or not there."""
    try:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    for family in FAMILIES:
        if config.get("model_type") == family.model_type:
            return int((config.get("vision_config") or {}).get("patch_size") or family.patch_size)
    return None


def positions_of(
    processor: Any,
    input_ids: Sequence[int],
    features: Mapping[str, Any],
    tokens_per_second: float | None = None,
) -> Tensor:
    """M-RoPE positions of one unpadded sequence, prompt and answer together, by its family's rule.

    A video with timestamps is a row of pictures: each temporal patch is a block of its own, and the text
    between them counts on, as in vLLM (``qwen3_vl.py: get_mrope_input_positions``) and transformers 5.9
    (``modeling_qwen3_vl.py: get_rope_index``).

    Args:
        processor: The model's processor.
        input_ids: L token ids.
        features: The prompt's ``image_grid_thw``, ``video_grid_thw`` and, of a family without timestamps,
            ``second_per_grid_ts``.
        tokens_per_second: Of the model's ``vision_config``; a family with timestamps has none.

    Returns:
        int64 [3, L]: time, height, width.

    Raises:
        ConfigurationError: another model family.
        DataError: a grid has no placeholders in ``input_ids``, or not as many as it needs.
    """
    videos = _grids(features, "video_grid_thw")
    seconds = [float(value) for value in features.get("second_per_grid_ts", ())]
    if family_of(processor).timestamps:
        videos = [(1, height, width) for patches, height, width in videos for _ in range(patches)]
        seconds = [0.0] * len(videos)
    return mrope_positions(
        input_ids,
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
        image_grids=_grids(features, "image_grid_thw"),
        video_grids=videos,
        seconds_per_grid=seconds,
        tokens_per_second=tokens_per_second or 0.0,
        merge_size=processor.image_processor.merge_size,
    )


def words_of_video(processor: Any, num_patches: int) -> int:
    """Most tokens that a video has in a prompt beside its vision tokens: times, ends of blocks."""
    if not family_of(processor).timestamps:
        return 0
    return num_patches * (longest_stamp(processor.tokenizer) + 2) - 2  # one pair stands in the template


def require_one_look(processor: Any) -> None:
    """Check that a pixel looks the same in an image and in a video.

    B8: an engine that normalises videos like images disagrees with the trainer, and neither ids nor grids
    show it. The released Qwen2.5-VL and Qwen3-VL have one mean and one deviation for both.

    Raises:
        ConfigurationError: names the differing field and both values.
    """
    for field in ("image_mean", "image_std", "rescale_factor", "do_normalize"):
        image, video = (
            getattr(side, field, None) for side in (processor.image_processor, processor.video_processor)
        )
        if image != video and list(_listed(image)) != list(_listed(video)):
            raise ConfigurationError(
                f"the processor has {field}={image} for images and {field}={video} for videos, and an engine "
                "may take the one for the other; give both the same in the folder of the model, in "
                "preprocessor_config.json and video_preprocessor_config.json, or in processor_config.json"
            )


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else [value]


def _grids(features: Mapping[str, Any], name: str) -> list[Grid]:
    return [(int(t), int(h), int(w)) for t, h, w in features.get(name, ())]
