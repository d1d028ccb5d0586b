"""Images as clips: a still is a clip of one frame, an animated GIF, WebP or PNG one of several."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, ImageSequence

from keytoken.data.contract import SamplingContract
from keytoken.data.decoders.base import Decoded, DecoderError
from keytoken.data.part import WHOLE, Span, choose_frames

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
_DEFAULT_SECONDS = 0.1  # browsers show a frame without a duration for that long
_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def decode(path: Path, contract: SamplingContract, span: Span = WHOLE) -> Decoded:
    """Decode the frames of an image that a contract selects; a still has the contract's frame rate.

    Raises:
        DecoderError: the file is no image, or a damaged one.
        SpanError: the part has no frames.
    """
    try:
        with Image.open(path) as image:
            durations, frames = [], []
            for frame in ImageSequence.Iterator(image):
                frames.append(_rgb(frame))  # loads it; a WebP frame has no duration before
                durations.append(float(frame.info.get("duration") or 0) / 1000 or _DEFAULT_SECONDS)
    except _ERRORS as error:
        raise DecoderError(f"not an image that can be read ({error})") from error
    times = np.cumsum([0.0, *durations])
    fps = len(frames) / float(times[-1]) if len(frames) > 1 else contract.fps
    numbers, count, fps, note = choose_frames(times[:-1].tolist(), fps, contract, span)
    seconds = [float(times[number]) for number in numbers]
    return Decoded(np.stack([frames[number] for number in numbers]), numbers, seconds, fps, count, note)


def load_rgb(path: Path) -> np.ndarray:
    """One still image, upright: uint8 [H, W, C].

    Raises:
        DecoderError: the file is no image, or a damaged one.
    """
    try:
        with Image.open(path) as image:
            return _rgb(image)
    except _ERRORS as error:
        raise DecoderError(f"{path.name} is not an image that can be read ({error})") from error


def _rgb(image: Image.Image) -> np.ndarray:
    """Turned as the camera says; what is transparent becomes white, as in qwen_vl_utils."""
    upright = ImageOps.exif_transpose(image)
    if upright.has_transparency_data:
        layer = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return np.asarray(upright.convert("RGB"))
