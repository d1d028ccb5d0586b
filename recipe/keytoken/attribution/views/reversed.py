"""The reversed view: every video played backwards.

A clip that looks the same both ways has no such view. A frame that the processor repeated to fill a patch
counts as a frame of the clip.

Source: none; an option of this project.
"""

from __future__ import annotations

from torch import Tensor

from keytoken.attribution.views.base import Clip, pixel_view


def played_backwards(clip: Clip) -> Tensor:
    """[N, D] patches of the clip with its last frame first."""
    return clip.with_frames(clip.frames().flip(0))


VIEW = pixel_view("temporal", played_backwards)
