"""What every decoder returns, and how it says that it cannot."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np

from keytoken.data.contract import SamplingContract
from keytoken.data.part import Span
from keytoken.errors import DataError


class DecoderError(DataError):
    """A decoder that cannot read a file, or could read it only with frames other than those asked for."""


class DecoderMissing(DecoderError):
    """A decoder whose package is not installed or does not load."""


@dataclass(frozen=True, slots=True)
class Decoded:
    """The frames that a contract selects, at their own size.

    Attributes:
        frames: uint8 RGB [T, H, W, C], upright.
        indices: Number of each frame in order of presentation, [T].
        timestamps_s: Time of each frame in seconds from the first frame of the file, [T].
        fps: Average frame rate of the file, or of the part of it, where that is another.
        num_source_frames: Frames in the file, or in the part of it that was asked for.
        note: What the user should know about the file, such as that it was cut short; mostly empty.
    """

    frames: np.ndarray
    indices: list[int]
    timestamps_s: list[float]
    fps: float
    num_source_frames: int
    note: str = ""


Decode: TypeAlias = Callable[[Path, SamplingContract, Span], Decoded]
