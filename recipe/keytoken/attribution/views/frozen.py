"""The frozen view: the first frame of every video in all places, so that nothing moves.

Source: none; an option of this project.
"""

from __future__ import annotations

from torch import Tensor

from keytoken.attribution.views.base import Clip, pixel_view


def frozen(clip: Clip) -> Tensor:
    """[N, D] patches of a clip that shows its first frame only."""
    frames = clip.frames()
    return clip.with_frames(frames[:1].expand_as(frames))


VIEW = pixel_view("temporal", frozen)
