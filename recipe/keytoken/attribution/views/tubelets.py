"""The tubelet view: temporal patches in another order, the frames inside each of them together.

Beside the shuffled view it tells what an answer owes to the order of moments from what it owes to motion
between neighbouring frames, which a tubelet keeps.

Source: none; an option of this project.
"""

from __future__ import annotations

from torch import Tensor

from keytoken.attribution.views.base import Clip, pixel_view
from keytoken.attribution.views.frames import changing_order


def tubelets(clip: Clip) -> Tensor | None:
    """[N, D] patches of the clip with its tubelets in a seeded order, one for all answers to a prompt."""
    units = clip.tubelets()
    order = changing_order(units, clip.context.seed, clip.prompt_key)
    return None if order is None else units[list(order)].flatten(0, 1)


VIEW = pixel_view("temporal", tubelets)
