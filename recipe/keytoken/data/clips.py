"""Reads clips: decord first, PyAV for what decord cannot read.

decord carries an old FFmpeg without AV1, PyAV a recent one; where both read a file, their frames are
the same. Which one read a clip is recorded in the result. A clip that neither can read raises
:class:`ClipError` with both reasons; it is never replaced by another one.

Decoding runs in the calling process. Native decoders cannot be interrupted from Python, so a file that
might hang them is first tried in a child process: see :mod:`keytoken.data.quarantine`.
"""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from keytoken.data.contract import SamplingContract, resized_shape, select_frames
from keytoken.errors import ClipError, DataError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Clip:
    """The frames of a clip that the model sees.

    Attributes:
        frames: uint8 RGB [T, C, H, W], resized by the contract.
        timestamps_s: Time of each frame in seconds from the first frame of the file, [T].
        frame_indices: Number of each frame in the file, [T].
        fps: Average frame rate of the file.
        num_source_frames: Frames in the file.
        decoder: "decord" or "pyav".
        path: The file.
    """

    frames: torch.Tensor
    timestamps_s: tuple[float, ...]
    frame_indices: tuple[int, ...]
    fps: float
    num_source_frames: int
    decoder: str
    path: str

    @property
    def sampled_fps(self) -> float:
        """Frames seen per second of clip; the processor's ``second_per_grid_ts`` follows from it."""
        return len(self.frame_indices) / self.num_source_frames * self.fps

    @property
    def is_still(self) -> bool:
        """Whether the file has one frame only, so that no order of frames exists."""
        return self.num_source_frames == 1

    def metadata(self) -> dict[str, Any]:
        """Video metadata as transformers' and vLLM's processors take it."""
        return {
            "fps": self.fps,
            "frames_indices": list(self.frame_indices),
            "total_num_frames": self.num_source_frames,
            "duration": self.num_source_frames / self.fps,
            "video_backend": self.decoder,
        }


@dataclass(frozen=True)
class _Decoded:
    """What a decoder returns: uint8 RGB frames [T, H, W, C] and where they come from."""

    frames: np.ndarray
    timestamps_s: list[float]
    indices: list[int]
    fps: float
    num_source_frames: int


def read_clip(path: str | os.PathLike[str], contract: SamplingContract) -> Clip:
    """Read the frames of a clip that the contract selects, at the contract's size.

    Args:
        path: A local video file.
        contract: The sampling contract.

    Returns:
        The clip.

    Raises:
        ClipError: If the file is missing, empty or cannot be decoded.
    """
    source = Path(path)
    if not source.is_file():
        raise ClipError(f"clip {source}: no such file; check the dataset's video paths")
    if source.stat().st_size == 0:
        raise ClipError(f"clip {source}: the file is empty; copy or download it again")
    failures = []
    for name, decode in _DECODERS.items():
        try:
            decoded = decode(source, contract)
            break
        except _decoder_errors(name) as error:
            failures.append(f"{name}: {_last_line(error)}")
            logger.debug("%s cannot read %s", name, source, exc_info=True)
    else:
        raise ClipError(
            f"clip {source}: cannot be decoded ({'; '.join(failures)}); "
            "re-encode it or drop it from the dataset"
        )
    return Clip(
        frames=_resize(decoded.frames, contract),
        timestamps_s=tuple(decoded.timestamps_s),
        frame_indices=tuple(decoded.indices),
        fps=decoded.fps,
        num_source_frames=decoded.num_source_frames,
        decoder=name,
        path=str(source),
    )


def _decode_decord(path: Path, contract: SamplingContract) -> _Decoded:
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    reader = decord.VideoReader(str(path), num_threads=1)
    fps = float(reader.get_avg_fps())
    indices = select_frames(len(reader), fps, contract)
    frames = reader.get_batch(indices).asnumpy()
    times = reader.get_frame_timestamp(range(len(reader)))[:, 0]
    return _Decoded(frames, [float(times[i] - times[0]) for i in indices], indices, fps, len(reader))


def _decode_pyav(path: Path, contract: SamplingContract) -> _Decoded:
    """Decode twice: containers lie about their length, so the first pass counts the frames."""
    import av

    with av.open(str(path)) as container:
        if not container.streams.video:
            raise DataError("the file has no video stream")
        rate = container.streams.video[0].average_rate
        times = [frame.time or 0.0 for frame in container.decode(video=0)]
    indices = select_frames(len(times), float(rate or 0), contract)
    wanted, kept = set(indices), {}
    with av.open(str(path)) as container:
        for index, frame in enumerate(container.decode(video=0)):
            if index in wanted:
                # Phones store turned frames with a rotation tag; decord applies it, PyAV leaves it to us.
                turns = round(frame.rotation / 90) % 4
                kept[index] = np.rot90(frame.to_ndarray(format="rgb24"), turns)
    frames = np.stack([kept[index] for index in indices])
    seconds = [times[index] - times[0] for index in indices]
    return _Decoded(frames, seconds, indices, float(rate or 0), len(times))


_DECODERS = {"decord": _decode_decord, "pyav": _decode_pyav}


def _decoder_errors(name: str) -> tuple[type[Exception], ...]:
    """The exceptions by which a decoder says that it cannot read a file."""
    if name == "decord":
        from decord import DECORDError
        from decord._ffi.base import DECORDLimitReachedError

        # RuntimeError: what VideoReader raises for a file that it cannot even open.
        return (DECORDError, DECORDLimitReachedError, RuntimeError, DataError)
    import av

    return (av.FFmpegError, DataError)


def _last_line(error: Exception) -> str:
    """The reason at the end of a decoder's stack dump, on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reasons = [line for line in lines if not line.startswith(("[bt]", "Stack trace"))]
    return (reasons or [type(error).__name__])[-1][:200]


def _resize(frames: np.ndarray, contract: SamplingContract) -> torch.Tensor:
    """uint8 frames [T, H, W, C] to [T, C, H', W'], bicubic with antialiasing as in qwen_vl_utils."""
    tensor = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)
    shape = resized_shape(tensor.shape[2], tensor.shape[3], contract)
    if shape == tuple(tensor.shape[2:]):
        return tensor.contiguous()
    return torch.nn.functional.interpolate(tensor, size=shape, mode="bicubic", antialias=True).contiguous()
