"""The blackened view: squares of every picture set to black at random, tokens and positions kept.

Source: VPPO (p 0.5, drawn for every response) and PAPO (p 0.6, drawn once for a prompt), squares of 14
pixels; values read in their published code. Departures: PAPO blackens the picture at its original size and
VPPO the one it loads, here squares lie on the resized picture, whose tensor is all that a worker has, so that
a square of 14 pixels is one patch. Both are for images; in a video every temporal patch has squares of its
own. A draw that changes nothing is repeated.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from keytoken.attribution.views.base import Clip, pixel_view
from keytoken.attribution.views.frames import NUM_CHANNELS, seed_of
from keytoken.errors import ConfigurationError
from keytoken.view_config import BlackenedConfig


def blackened(clip: Clip) -> Tensor | None:
    """[N, D] patches of the clip with squares of ``size`` pixels black, each with probability ``p``.

    None for a clip that is black already.

    Raises:
        ConfigurationError: If it is not known how the processor shows a black pixel.
    """
    options, vision = clip.context.options.blackened, clip.context.vision
    if vision.black is None:
        raise ConfigurationError(
            "The view blackened needs the values of a black pixel, which come from the processor in "
            "actor_rollout_ref.model.path, and there is none; use keytoken.method.view.visual=masked."
        )
    # [N, channel, frame, pixel]
    real = clip.patches.unflatten(1, (NUM_CHANNELS, vision.temporal_patch_size, -1))
    black = real.new_tensor(vision.black)[:, None, None].expand_as(real)
    if torch.equal(real, black):
        return None
    key = clip.answer_key if options.per == "response" else clip.prompt_key
    side = math.isqrt(real.shape[-1])
    draws = (
        hidden_pixels(clip.grid.tolist(), side, vision.merge_size, options, seed_of(clip.context.seed, name))
        for name in (f"{key}/{attempt}" for attempt in itertools.count())
    )
    views = (torch.where(hidden[:, None, None].to(real.device), black, real) for hidden in draws)
    return next(view for view in views if not torch.equal(view, real)).flatten(1)


def hidden_pixels(
    grid: Sequence[int], patch_size: int, merge_size: int, options: BlackenedConfig, seed: int
) -> Tensor:
    """Draw squares, and say of each patch which of its pixels lie in one.

    The last squares of a row and of a column are cut off by the edge where their size does not divide it.

    Args:
        grid: Patches T, H, W along time, height and width.
        patch_size: Side of a patch in pixels.
        merge_size: Side of a block of patches that lie together in memory.
        options: Side and probability of a square.
        seed: A seed of 64 bits.

    Returns:
        [T * H * W, patch_size ** 2] bool, patches and pixels in the order of the processor.
    """
    time, height, width = (grid[0], grid[1] * patch_size, grid[2] * patch_size)
    shape = (time, -(-height // options.size), -(-width // options.size))
    # On the CPU, so that every kind of device gives the same squares; torch takes seeds below 2 ** 63.
    generator = torch.Generator().manual_seed(seed >> 1)
    squares = torch.rand(shape, generator=generator) < options.p
    pixels = squares.repeat_interleave(options.size, 1)[:, :height].repeat_interleave(options.size, 2)
    rows, columns = grid[1] // merge_size, grid[2] // merge_size
    blocks = pixels[:, :, :width].reshape(time, rows, merge_size, patch_size, columns, merge_size, patch_size)
    return blocks.permute(0, 1, 4, 2, 5, 3, 6).reshape(-1, patch_size**2)


VIEW = pixel_view("visual", blackened)
