"""Counterfactual views of a prompt: the inputs of the passes that an answer is scored under.

Two views, both exact and both built from the tensors that the real pass used:

- *masked*: the vision tokens are dropped from the sequence and the M-RoPE positions of the others are kept.
  No query can attend to a dropped token, so the result equals a forward pass whose attention mask hides
  them, at the price of the text alone.
- *shuffled*: the frames are permuted inside the pixel tensor, before the model's temporal patch merges
  neighbours; ids and positions stay.

Source: Video-KTR (arXiv 2601.19686). Departures from its published code: positions may be kept (that code
renumbers the remaining text), and a permutation is never the identity (there 1 of 24 for four frames).

Axes: L tokens of one unpadded sequence, R position rows, V videos, N patches, D values of a patch. verl
carries R = 4 rows, the text position and then the three of M-RoPE; Hugging Face's own R = 3 works as well.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Collection, Sequence
from typing import Literal

import torch

from keytoken.errors import DataError, InertViewError

TEXT_ROW_COUNT = 4  # position rows when the first one numbers the tokens as plain text


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MaskedView:
    """One sequence without its vision tokens.

    Attributes:
        input_ids: [L'] remaining ids.
        position_ids: [R, L'] their positions.
        kept: [L'] index of each remaining token in the original sequence.

    Example:
        ``<start> <pad> <pad> <end> q a`` with two ``<pad>`` dropped: ``kept = tensor([0, 3, 4, 5])``.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    kept: torch.Tensor


def drop_vision_tokens(
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    vision_token_ids: Collection[int],
    prompt_length: int,
    positions: Literal["kept", "compressed"] = "kept",
) -> MaskedView:
    """Build the masked view of one sequence.

    Args:
        input_ids: [L] prompt and answer without padding.
        position_ids: [R, L] positions of the real pass.
        vision_token_ids: Ids of the image and video placeholders. The tokens around them
            (``<|vision_start|>``, ``<|vision_end|>``) are text and stay.
        prompt_length: Only tokens before this index are dropped: a placeholder that the policy sampled
            into its answer is an ordinary answer token and must keep its log-prob.
        positions: ``kept`` leaves the M-RoPE rows of the remaining tokens as they are and renumbers only the
            text row; ``compressed`` numbers all rows 0 to L'-1.

    Raises:
        InertViewError: If the prompt has no vision token; such a prompt has no masked view.
    """
    is_vision = torch.isin(input_ids, input_ids.new_tensor(sorted(vision_token_ids)))
    is_vision[prompt_length:] = False
    kept = (~is_vision).nonzero().squeeze(1)
    if kept.numel() == input_ids.numel():
        raise InertViewError(
            f"The masked view dropped nothing: none of the vision tokens {sorted(vision_token_ids)} is among "
            f"the {prompt_length} prompt tokens. Mark text-only prompts with has_visual=False, or correct "
            "the ids."
        )
    order = torch.arange(kept.numel(), dtype=position_ids.dtype, device=position_ids.device)
    new_positions = position_ids[:, kept].clone()
    if positions == "compressed":
        new_positions[:] = order
    elif position_ids.shape[0] == TEXT_ROW_COUNT:
        new_positions[0] = order
    return MaskedView(input_ids=input_ids[kept], position_ids=new_positions, kept=kept)


def masked_views(
    input_ids: Sequence[torch.Tensor],
    position_ids: Sequence[torch.Tensor],
    vision_token_ids: Collection[int],
    prompt_lengths: Sequence[int],
    has_visual: Sequence[bool],
    positions: Literal["kept", "compressed"] = "kept",
) -> list[MaskedView | None]:
    """The masked views of a batch; None for text-only prompts, which have none.

    Raises:
        InertViewError: If a prompt with ``has_visual`` has no vision token.
    """
    rows = zip(input_ids, position_ids, prompt_lengths, has_visual, strict=True)
    return [
        drop_vision_tokens(ids, pos, vision_token_ids, length, positions) if visual else None
        for ids, pos, length, visual in rows
    ]


def frame_permutation(num_frames: int, seed: int, key: str | int) -> tuple[int, ...] | None:
    """A random order of frames that is never the original one.

    Args:
        num_frames: Frames of the clip.
        seed: Seed of the run.
        key: The prompt, so that all answers to it share one order; the same on every rank and machine.

    Returns:
        Position i of the shuffled clip shows frame ``order[i]``; uniform over all orders but the identity.
        None for fewer than two frames: such a clip has no order and no temporal score, which the caller
        records as ``has_temporal=False``.
    """
    if num_frames < 2:
        return None
    # Python's own hash() differs between processes; a digest does not.
    digest = hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=8).digest()
    generator = random.Random(int.from_bytes(digest, "big"))
    identity = list(range(num_frames))
    order = identity.copy()
    while order == identity:
        generator.shuffle(order)
    return tuple(order)


def permute_frames(
    pixel_values_videos: torch.Tensor,
    video_grid_thw: torch.Tensor,
    orders: Sequence[Sequence[int] | None],
    temporal_patch_size: int = 2,
    num_channels: int = 3,
) -> torch.Tensor:
    """Build the pixels of the shuffled view; equal to running the video processor on permuted frames.

    Patch rows of Qwen2-VL, 2.5-VL and 3-VL are ordered (t, h, w) with t outermost, and the values of a patch
    (channel, frame within the patch, y, x), so single frames can be moved without decoding anything again.

    The processor pads a clip to whole temporal patches by repeating its last frame. An order of the real
    frames, shorter than the padded clip, is continued by repeating its own last entry, as the processor
    would.

    Args:
        pixel_values_videos: [N, D] patches of all videos, one after another.
        video_grid_thw: [V, 3] patches of each video along time, height and width.
        orders: For each video the order of its frames (:func:`frame_permutation`), or None to leave it as is.
        temporal_patch_size: Frames of one patch.
        num_channels: Colour channels.

    Returns:
        [N, D], a new tensor.

    Raises:
        DataError: If grid, pixels and orders do not fit together.
        InertViewError: If an order is the identity, or all are None.
    """
    counts = video_grid_thw.prod(dim=1).tolist()
    if sum(counts) != pixel_values_videos.shape[0] or len(orders) != len(counts):
        raise DataError(
            f"pixel_values_videos has {pixel_values_videos.shape[0]} patches and there are {len(orders)} "
            f"frame orders, but video_grid_thw describes {len(counts)} videos of {counts} patches; pass the "
            "three of one and the same batch."
        )
    if all(order is None for order in orders):
        raise InertViewError(
            f"The shuffled view reorders none of {len(orders)} videos; mark prompts whose clips have one "
            "frame with has_temporal=False and leave them out of this pass."
        )
    clips = list(pixel_values_videos.split(counts))
    for index, order in enumerate(orders):
        if order is not None:
            num_slots = int(video_grid_thw[index, 0]) * temporal_patch_size
            source = _padded_order(order, num_slots, temporal_patch_size, index)
            clips[index] = _reorder(clips[index], source, num_slots, temporal_patch_size, num_channels)
    return torch.cat(clips)


def _padded_order(order: Sequence[int], num_slots: int, temporal_patch_size: int, video: int) -> list[int]:
    """Check an order of real frames and continue it over the frames that the processor repeated."""
    padding = num_slots - len(order)
    if not 0 <= padding < temporal_patch_size or sorted(order) != list(range(len(order))):
        raise DataError(
            f"The frame order {list(order)} does not fit video {video} with {num_slots} frames in its "
            f"patches; pass a permutation of its real frames, {num_slots - temporal_patch_size + 1} to "
            f"{num_slots} of them."
        )
    if list(order) == sorted(order):
        raise InertViewError(
            f"The frame order of video {video} is the identity, so its shuffled view would equal the real "
            "one; draw it with frame_permutation, and give clips of one frame the order None."
        )
    return [*order, *[order[-1]] * padding]


def _reorder(
    clip: torch.Tensor, source: list[int], num_slots: int, temporal_patch_size: int, num_channels: int
) -> torch.Tensor:
    """Move single frames: [t * hw, channel * frame * yx] -> frames first -> index -> back."""
    num_patches = num_slots // temporal_patch_size
    area = _area(clip, temporal_patch_size, num_channels)
    split = clip.view(num_patches, -1, num_channels, temporal_patch_size, area)
    frames = split.permute(0, 3, 1, 2, 4).flatten(0, 1)  # [frame, hw, channel, yx]
    moved = frames[torch.tensor(source, device=clip.device)]
    return moved.unflatten(0, (num_patches, temporal_patch_size)).permute(0, 2, 3, 1, 4).reshape(clip.shape)


def _area(clip: torch.Tensor, temporal_patch_size: int, num_channels: int) -> int:
    """Pixels of one patch in one frame."""
    area, rest = divmod(clip.shape[1], temporal_patch_size * num_channels)
    if rest:
        raise DataError(
            f"A patch has {clip.shape[1]} values, which is not a multiple of {num_channels} channels times "
            f"{temporal_patch_size} frames; pass the processor's own temporal_patch_size."
        )
    return area


def is_static(pixel_values: torch.Tensor, shuffled: torch.Tensor) -> bool:
    """Whether a permutation changed no pixel: all frames of the clip look alike.

    Such a clip truly has no temporal information: its temporal score is 0 and it is counted, not refused.
    An order that is the identity is refused by :func:`permute_frames`.
    """
    return torch.equal(pixel_values, shuffled)
