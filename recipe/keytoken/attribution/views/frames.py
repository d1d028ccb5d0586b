"""Frames inside a pixel tensor: taken out, put back, reordered.

Patch rows of Qwen2-VL, 2.5-VL and 3-VL are ordered (t, h, w) with t outermost, height and width in blocks of
the patches that become one token; the values of a patch are ordered (channel, frame within the patch, y, x).
So single frames can be moved without decoding anything again.

The processor pads a clip to whole temporal patches by repeating its last frame; the tensor does not say
whether it did.

Axes: N patches, D values of a patch, F frames, P patches of one frame, A pixels of a patch in one frame.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Sequence

import torch
from torch import Tensor

from keytoken.errors import DataError, InertViewError

NUM_CHANNELS = 3


def split_frames(
    patches: Tensor, num_temporal_patches: int, temporal_patch_size: int, num_channels: int = NUM_CHANNELS
) -> Tensor:
    """[F, P, channel, A] frames of one clip [N, D].

    Raises:
        DataError: If a patch does not divide into frames and channels.
    """
    area, rest = divmod(patches.shape[1], temporal_patch_size * num_channels)
    if rest:
        raise DataError(
            f"A patch has {patches.shape[1]} values, which is not a multiple of {num_channels} channels "
            f"times {temporal_patch_size} frames; pass the processor's own temporal_patch_size."
        )
    split = patches.view(num_temporal_patches, -1, num_channels, temporal_patch_size, area)
    return split.permute(0, 3, 1, 2, 4).flatten(0, 1)


def join_frames(frames: Tensor, temporal_patch_size: int) -> Tensor:
    """[N, D] patches of one clip; the inverse of :func:`split_frames`."""
    split = frames.unflatten(0, (-1, temporal_patch_size))
    return split.permute(0, 2, 3, 1, 4).flatten(2).flatten(0, 1)


def appearances(units: Tensor) -> list[int]:
    """For every frame or tubelet [F, ...] the index of the first one that looks exactly like it.

    Example: frames that show A, B, A, A have [0, 1, 0, 0].
    """
    first: list[int] = []
    for index, unit in enumerate(units):
        same = (seen for seen in sorted(set(first)) if torch.equal(units[seen], unit))
        first.append(next(same, index))
    return first


def seed_of(seed: int, key: str | int) -> int:
    """A seed of 64 bits from a seed and a name; the same in every process and on every machine."""
    # Python's own hash() differs between processes; a digest does not.
    digest = hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def step_seed(run_seed: int, step: int) -> int:
    """Seed of what a method draws in one step: the upper 63 of the 64 bits of BLAKE2b("<run_seed>/<step>").

    The same after a restart, whatever was drawn before.
    """
    return seed_of(run_seed, step) >> 1


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
    generator = random.Random(seed_of(seed, key))
    identity = list(range(num_frames))
    order = identity.copy()
    while order == identity:
        generator.shuffle(order)
    return tuple(order)


def changing_order(units: Tensor, seed: int, key: str) -> tuple[int, ...] | None:
    """A seeded order of frames or tubelets that changes the picture; None if all look alike.

    An order that only exchanges equal frames (a still moment, or a last frame repeated to fill its patch)
    would score the real input again, so another one is drawn.

    Args:
        units: [F, ...] frames or tubelets of one clip.
        seed: Seed of the run.
        key: Names the clip, the same on every rank.
    """
    looks = appearances(units)
    if max(looks, default=0) == 0:
        return None
    drawn = (frame_permutation(len(looks), seed, f"{key}/{attempt}") for attempt in itertools.count())
    return next(order for order in drawn if order is not None and [looks[i] for i in order] != looks)


def permute_frames(
    pixel_values_videos: Tensor,
    video_grid_thw: Tensor,
    orders: Sequence[Sequence[int] | None],
    temporal_patch_size: int = 2,
    num_channels: int = NUM_CHANNELS,
) -> Tensor:
    """Move the frames of videos; equal to running the video processor on permuted frames.

    An order of the real frames, shorter than the padded clip, is continued by repeating its own last entry,
    as the processor would.

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
            num_patches = int(video_grid_thw[index, 0])
            source = _padded_order(order, num_patches * temporal_patch_size, temporal_patch_size, index)
            frames = split_frames(clips[index], num_patches, temporal_patch_size, num_channels)
            clips[index] = join_frames(frames[source], temporal_patch_size)
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
