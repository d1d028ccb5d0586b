"""Folders of frames: images in natural order (frame_2 before frame_10).

Their rate stands in a file ``fps.txt`` beside them, as one number. Without it they are taken for frames at
the contract's own rate, as most folders of frames are made.
"""

import math
import re
from pathlib import Path

import numpy as np

from keytoken.data.contract import SamplingContract
from keytoken.data.decoders import image
from keytoken.data.decoders.base import Decoded, DecoderError
from keytoken.data.part import WHOLE, Span, choose_frames

RATE_FILE = "fps.txt"
RATE_MISSING = (
    "a part in seconds is asked for, and how many frames make a second is not known; write it into "
    f"{RATE_FILE} beside them"
)


def decode(folder: Path, contract: SamplingContract, span: Span = WHOLE) -> Decoded:
    """Read the frames of a folder that a contract selects.

    Args:
        folder: Holds one image for each frame; hidden files and files of other kinds are no frames.
        contract: The sampling contract.
        span: The part of the clip.

    Raises:
        DecoderError: there are no images, one cannot be read, their sizes differ, or a part is asked for and
            no rate given.
        SpanError: the part has no frames.
    """
    files = frame_files(folder)
    rate = frame_rate(folder)
    if rate is None and span != WHOLE:
        raise DecoderError(RATE_MISSING)
    fps = rate or contract.fps
    times = [number / fps for number in range(len(files))]
    numbers, count, fps, note = choose_frames(times, fps, contract, span)
    loaded = {number: image.load_rgb(files[number]) for number in sorted(set(numbers))}
    first = files[numbers[0]].name
    for number, frame in loaded.items():
        if frame.shape != loaded[numbers[0]].shape:
            raise DecoderError(
                f"{files[number].name} has {_size(frame)} pixels and {first} {_size(loaded[numbers[0]])}; "
                "the frames of a clip have one size"
            )
    frames = np.stack([loaded[number] for number in numbers])
    return Decoded(frames, numbers, [times[number] for number in numbers], fps, count, note)


def frame_files(folder: Path) -> list[Path]:
    """The frames of a folder in their order.

    Raises:
        DecoderError: there are none.
    """
    files = [file for file in folder.iterdir() if file.suffix.lower() in image.SUFFIXES]
    files = sorted((file for file in files if not file.name.startswith(".")), key=_natural)
    if not files:
        raise DecoderError("the folder has no images; give a video file or a folder of frames")
    return files


def frame_rate(folder: Path) -> float | None:
    """Frames in a second by the file beside them, or None if there is no such file.

    Raises:
        DecoderError: it holds something else.
    """
    file = folder / RATE_FILE
    if not file.exists():
        return None
    text = file.read_text(encoding="utf-8", errors="replace").strip()
    try:
        rate = float(text)
    except ValueError as problem:
        raise DecoderError(
            f"{file.name} says {text[:40]!r}; it holds one number, frames in a second"
        ) from problem
    if not (math.isfinite(rate) and rate > 0):
        raise DecoderError(f"{file.name} gives the frame rate {text}; it holds a number above 0")
    return rate


def _natural(file: Path) -> list[tuple[int, str]]:
    """Digits compare as numbers, the rest as text."""
    parts = re.findall(r"\d+|\D+", file.name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def _size(frame: np.ndarray) -> str:
    return f"{frame.shape[1]}x{frame.shape[0]}"
