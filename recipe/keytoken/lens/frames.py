"""The frames of prompts as small pictures inside the page, and the order in which a view shows them."""

import base64
import dataclasses
import io
from collections.abc import Callable, Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from keytoken.attribution.views.frames import changing_order
from keytoken.data.contract import SamplingContract
from keytoken.data.part import AnyClip
from keytoken.data.timed import read_clip_within
from keytoken.errors import KeyTokenError

HEIGHT = 96  # pixels of a frame in the page; smaller ones stay as they are
MAX_FRAMES = 16  # shown of one clip
JPEG_QUALITY = 82
LIMIT_S = 60.0  # for reading one clip; a decoder that hangs costs its frames, not the page


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Strip:
    """The frames of one clip as they are shown.

    Attributes:
        path: The clip.
        frames: Data URLs of the frames shown.
        times: Seconds of each.
        aspect: Width of a frame over its height.
        order: Position i of the view shows frame ``order[i]`` of these; None if there is no such order here.
        note: What is missing, or the number of frames if not all are shown; mostly empty.
    """

    path: str
    frames: tuple[str, ...] = ()
    times: tuple[float, ...] = ()
    aspect: float = 1.0
    order: tuple[int, ...] | None = None
    note: str = ""


def strip_of(
    clip: AnyClip, prompt_id: str, number: int, about: Mapping[str, Any], viewed: bool = True
) -> Strip:
    """Read a clip as training did; a clip that cannot be read gives a strip that says why.

    Args:
        clip: The clip.
        prompt_id: The prompt; with the clip's number it names the draw of the order.
        number: The clip's number within the prompt.
        about: Of the export: ``sampling``, ``shuffle_seed`` and ``method``.
        viewed: Whether training made the temporal view of the prompt; without it no order was ever shown.
    """
    name, sampling = str(clip), about.get("sampling")
    if sampling is None:
        return Strip(path=name, note="The export does not say how clips became frames.")
    try:
        seen = read_clip_within(clip, SamplingContract.from_mapping(sampling), LIMIT_S)
    except KeyTokenError as problem:
        return Strip(path=name, note=f"No frames: {problem}")
    view = ((about.get("method") or {}).get("view") or {}).get("temporal", "shuffled")
    seed = about.get("shuffle_seed")
    order = None
    if viewed and seed is not None and view in ORDERS:
        order = ORDERS[view](seen.frames, int(seed), f"{prompt_id}/{number}")
    shown, note = list(range(len(seen.frames))), seen.note
    if len(shown) > MAX_FRAMES:
        shown = [round(i * (len(shown) - 1) / (MAX_FRAMES - 1)) for i in range(MAX_FRAMES)]
        without = ", without the order of the view" if viewed else ""
        note = f"{MAX_FRAMES} of {len(seen.frames)} frames are shown{without}. {note}"
        order = None
    return Strip(
        path=name,
        frames=tuple(data_url(seen.frames[index]) for index in shown),
        times=tuple(round(seen.timestamps_s[index], 3) for index in shown),
        aspect=round(seen.frames.shape[3] / seen.frames.shape[2], 4),
        order=order,
        note=note.strip(),
    )


def _shuffled(frames: Tensor, seed: int, key: str) -> tuple[int, ...] | None:
    return changing_order(frames, seed, key)


def _tubelets(frames: Tensor, seed: int, key: str) -> tuple[int, ...] | None:
    if len(frames) % 2:
        return None
    order = changing_order(frames.unflatten(0, (-1, 2)), seed, key)
    return None if order is None else tuple(frame for unit in order for frame in (2 * unit, 2 * unit + 1))


def _reversed(frames: Tensor, seed: int, key: str) -> tuple[int, ...] | None:
    return tuple(reversed(range(len(frames))))


def _frozen(frames: Tensor, seed: int, key: str) -> tuple[int, ...] | None:
    return (0,) * len(frames)


# By the name of the view behind the temporal signal.
ORDERS: dict[str, Callable[[Tensor, int, str], tuple[int, ...] | None]] = {
    "shuffled": _shuffled,
    "tubelets": _tubelets,
    "reversed": _reversed,
    "frozen": _frozen,
}


def data_url(frame: Tensor) -> str:
    """A uint8 frame [C, H, W] as a JPEG, at most :data:`HEIGHT` pixels high."""
    image = Image.fromarray(frame.permute(1, 2, 0).contiguous().to(torch.uint8).numpy())
    if image.height > HEIGHT:
        image = image.resize((max(1, round(image.width * HEIGHT / image.height)), HEIGHT))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
