"""Counterfactual views of a prompt: the inputs of the passes that an answer is scored under.

Every view is built from the tensors that the real pass used, so both passes see the same clip, decoded and
resized once. A view is a pure function of input and seed, the same on every rank, and says which inputs have
it: text has none, an image no temporal one, and an input that would not change has not that view.

To add one:

1. write ``attribution/views/<name>.py`` with a function and its ``VIEW``; most change the pixels of one clip
   at a time (:func:`keytoken.attribution.views.base.pixel_view`);
2. add it to ``VIEWS`` below;
3. add ``tests/attribution/views/test_<name>.py``, which compares it with the processor on changed frames.

``keytoken.method.view.visual=<name>`` or ``temporal=<name>`` uses it. CONTRIBUTING.md has a whole example.
"""

from __future__ import annotations

from keytoken.attribution.views import blackened, blank, frozen, masked, reversed, shuffled, tubelets
from keytoken.attribution.views.base import ModelInput, View, ViewContext, VisionFormat, shows_one_picture
from keytoken.attribution.views.frames import frame_permutation, permute_frames
from keytoken.attribution.views.masked import MaskedView, drop_vision_tokens, masked_views

__all__ = [
    "VIEWS",
    "MaskedView",
    "ModelInput",
    "View",
    "ViewContext",
    "VisionFormat",
    "drop_vision_tokens",
    "frame_permutation",
    "masked_views",
    "permute_frames",
    "shows_one_picture",
]

VIEWS: dict[str, View] = {
    "masked": masked.VIEW,
    "blank": blank.VIEW,
    "blackened": blackened.VIEW,
    "shuffled": shuffled.VIEW,
    "tubelets": tubelets.VIEW,
    "reversed": reversed.VIEW,
    "frozen": frozen.VIEW,
}
