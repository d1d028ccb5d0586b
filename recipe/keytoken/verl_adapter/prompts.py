"""A prompt as an engine takes it: made in one place, for training's rollout and for evaluation.

Both put the same conversation through verl's own builder of prompts (chat template and the model's
processor, one placeholder for each vision token) and send what :func:`pack_prompt` makes of the result. So
token ids, frames with their metadata and the arguments of the engine's processor cannot differ between them.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from keytoken.errors import ConfigurationError


@dataclasses.dataclass(frozen=True, slots=True)
class PreparedPrompt:
    """A prompt as the rollout engine and the trainer take it, made once for a group of answers.

    Attributes:
        token_ids: Prompt ids, one placeholder for each vision token.
        images: Images for the engine, or None.
        videos: (frames, metadata) pairs for the engine, or None.
        features: The processor's pixel tensors and grids for the trainer; empty for a text prompt.
        processor_kwargs: What the engine passes on to its own processor.
    """

    token_ids: list[int]
    images: list[Any] | None
    videos: list[Any] | None
    features: dict[str, torch.Tensor]
    processor_kwargs: dict[str, Any]


def pack_prompt(
    token_ids: list[int],
    images: list[Any] | None,
    videos: list[Any] | None,
    features: dict[str, Any],
    processor: Any,
    processor_kwargs: Mapping[str, Any],
) -> PreparedPrompt:
    """A prompt from what verl's builder made of a conversation.

    Args:
        token_ids: Prompt ids of the builder.
        images: The conversation's images, or None.
        videos: Its (frames, metadata) pairs, or None.
        features: What the processor returned beside the ids; taken over and changed.
        processor: The model's processor.
        processor_kwargs: The run's own arguments for the engine's processor.

    Raises:
        ConfigurationError: the processor resized frames that the sampling contract had sized.
    """
    for name in ("attention_mask", "mm_token_type_ids"):
        features.pop(name, None)
    engine_kwargs = dict(processor_kwargs)
    if videos:
        require_one_resize(videos, features["video_grid_thw"], processor.video_processor)
        metadata = [video_metadata for _, video_metadata in videos]
        # vLLM drops the metadata of a (frames, metadata) pair for Qwen2.5-VL and assumes 24 frames a second.
        engine_kwargs |= {"video_metadata": metadata, "do_sample_frames": False}
    if "image_grid_thw" in features:
        # verl's flops counter reads the lengths of the images' patch sequences.
        grids = features["image_grid_thw"]
        features["images_seqlens"] = torch.repeat_interleave(grids[:, 1] * grids[:, 2], grids[:, 0])
    return PreparedPrompt(token_ids, images, videos, features, engine_kwargs)


def require_one_resize(videos: Sequence[Any], grids: torch.Tensor, video_processor: Any) -> None:
    """Check that the processor left the contract's frames at their size.

    Raises:
        ConfigurationError: names both sizes and the processor's bounds.
    """
    for (frames, _), grid in zip(videos, grids.tolist(), strict=True):
        size = (grid[1] * video_processor.patch_size, grid[2] * video_processor.patch_size)
        if size != tuple(frames.shape[-2:]):
            raise ConfigurationError(
                f"frames of {tuple(frames.shape[-2:])} pixels were resized to {size} by the processor, whose "
                f"bounds are {dict(video_processor.size)}; choose min_pixels and max_pixels of the "
                "sampling contract within them"
            )
