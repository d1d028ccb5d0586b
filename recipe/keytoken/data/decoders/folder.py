"""Folders of frames: images in natural order (frame_2 before frame_10).

Their rate stands in a file ``fps.txt`` beside them, as one number. Without it they are taken for frames at
the contract's own rate, as most folders of frames are made.
"""

import re
from pathlib import Path

import numpy as np

from keytoken.data.contract import SamplingContract, select_frames
from keytoken.data.decoders import image
from keytoken.data.decoders.base import Decoded, DecoderError

RATE_FILE = "fps.txt"


def decode(folder: Path, contract: SamplingContract) -> Decoded:
    """Read the frames of a folder that a contract selects.

    Args:
        folder: Holds one image for each frame; hidden files and files of other kinds are no frames.
        contract: The sampling contract.

    Raises:
        DecoderError: there are no images, one cannot be read, or their sizes differ.
    """
    files = [file for file in folder.iterdir() if file.suffix.lower() in image.SUFFIXES]
    files = sorted((file for file in files if not file.name.startswith(".")), key=_natural)
    if not files:
        raise DecoderError("the folder has no images; give a video file or a folder of frames")
    fps = _rate(folder / RATE_FILE, contract.fps)
    numbers = select_frames(len(files), fps, contract)
    loaded = {number: image.load_rgb(files[number]) for number in sorted(set(numbers))}
    first = files[numbers[0]].name
    for number, frame in loaded.items():
        if frame.shape != loaded[numbers[0]].shape:
            raise DecoderError(
                f"{files[number].name} has {_size(frame)} pixels and {first} {_size(loaded[numbers[0]])}; "
                "the frames of a clip have one size"
            )
    frames = np.stack([loaded[number] for number in numbers])
    return Decoded(frames, numbers, [number / fps for number in numbers], fps, len(files))


def _rate(file: Path, default: float) -> float:
    if not file.exists():
        return default
    text = file.read_text(encoding="utf-8", errors="replace").strip()
    try:
        return float(text)
    except ValueError as problem:
        raise DecoderError(
            f"{file.name} says {text[:40]!r}; it holds one number, frames in a second"
        ) from problem


def _natural(file: Path) -> list[tuple[int, str]]:
    """Digits compare as numbers, the rest as text."""
    parts = re.findall(r"\d+|\D+", file.name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def _size(frame: np.ndarray) -> str:
    return f"{frame.shape[1]}x{frame.shape[0]}"
