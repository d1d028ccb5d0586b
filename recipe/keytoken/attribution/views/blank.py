"""The blank view: every picture one grey, with as many tokens at the same positions as the real one.

Beside the masked view it tells what an answer owes to the picture from what it owes to there being one.

The grey is 0 after normalisation, the mean colour of the pictures that the vision encoder was trained on.

Source: none; an option of this project.
"""

from __future__ import annotations

import torch
from torch import Tensor

from keytoken.attribution.views.base import Clip, pixel_view


def blank(clip: Clip) -> Tensor:
    """[N, D] zeros."""
    return torch.zeros_like(clip.patches)


VIEW = pixel_view("visual", blank)
