"""A prompt as an engine takes it: made in one place, for training's rollout and for evaluation.

Both put the same conversation through verl's own builder of prompts (chat template and the model's
processor, one placeholder for each vision token) and send what :func:`pack_prompt` makes of the result. So
token ids, frames with their metadata and the arguments of the engine's processor cannot differ between them.

B7: of a Qwen3-VL video prompt, which has a block of placeholders for each temporal patch, vLLM expands the
first block and leaves the others as they are; verl 0.9.1 sends it so. Here it is sent one block for each
video (:mod:`keytoken.data.timestamps`), and what it makes of that is what the trainer gets.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from keytoken.data.families import family_of, require_one_look
from keytoken.data.timestamps import expanded, one_block_for_each_video, times_of
from keytoken.errors import ConfigurationError


@dataclasses.dataclass(frozen=True, slots=True)
class PreparedPrompt:
    """A prompt as the rollout engine and the trainer take it, made once for a group of answers.

    Attributes:
        token_ids: Prompt ids, one placeholder for each vision token.
        engine_ids: What the engine is sent and expands to ``token_ids``.
        images: Images for the engine, or None.
        videos: (frames, metadata) pairs for the engine, or None.
        features: The processor's pixel tensors and grids for the trainer; empty for a text prompt.
        processor_kwargs: What the engine passes on to its own processor.
    """

    token_ids: list[int]
    engine_ids: list[int]
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
        ConfigurationError: the processor resized frames that the sampling contract had sized, or shows a
            pixel of a video otherwise than one of an image; KeyToken does not know the model's family.
        DataError: the prompt of a video has another form than vLLM gives it.
    """
    for name in ("attention_mask", "mm_token_type_ids"):
        features.pop(name, None)
    engine_kwargs, engine_ids = dict(processor_kwargs), token_ids
    if videos:
        grids, metadata = features["video_grid_thw"], [video_metadata for _, video_metadata in videos]
        require_one_look(processor)
        require_one_resize(videos, grids, processor.video_processor)
        engine_kwargs |= {"do_sample_frames": False}
        if family_of(processor).timestamps:
            patch = processor.video_processor.temporal_patch_size
            times = [times_of(of_video, patch) for of_video in metadata]
            engine_ids = one_block_for_each_video(token_ids, grids.tolist(), times, processor)
            token_ids = expanded(engine_ids, grids.tolist(), times, processor)
        else:
            # vLLM drops the metadata of a (frames, metadata) pair for Qwen2.5-VL, and assumes 24 frames a
            # second.
            engine_kwargs |= {"video_metadata": metadata}
    if "image_grid_thw" in features:
        # verl's flops counter reads the lengths of the images' patch sequences.
        grids = features["image_grid_thw"]
        features["images_seqlens"] = torch.repeat_interleave(grids[:, 1] * grids[:, 2], grids[:, 0])
    return PreparedPrompt(token_ids, engine_ids, images, videos, features, engine_kwargs)


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
                "sampling contract within them, or widen the bounds in the model's processor configuration"
            )
