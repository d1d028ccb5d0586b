"""Reads clips: video files, folders of frames, and images.

Who decodes a video file is said by the contract's ``decoder`` and recorded in the result; all decoders show
the same frames (:mod:`keytoken.data.decoders`). A clip that cannot be read raises :class:`ClipError` with
every decoder's reason; it is never replaced by another one, and never shown in part without a note.

Decoding runs in the calling process. Native decoders cannot be interrupted from Python;
:func:`keytoken.data.timed.read_clip_within` decodes in a child process that can be killed.
"""

import logging
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from keytoken.data.contract import SamplingContract, resized_shape
from keytoken.data.decoders import AUTO, DECODERS, Decoded, DecoderError, DecoderMissing, folder, image
from keytoken.data.part import AnyClip, Span, SpanError, clip_path, span_of
from keytoken.errors import ClipError, ConfigurationError, DataError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Clip:
    """The frames of a clip that the model sees.

    Attributes:
        frames: uint8 RGB [T, C, H, W], resized by the contract.
        timestamps_s: Time of each frame in seconds from the first frame of the file, [T].
        frame_indices: Number of each frame in the file, [T].
        fps: Average frame rate of the file, or of the part that was read, where that is another.
        num_source_frames: Frames in the file, or in the part of it that was read.
        decoder: Who read it: a name of :data:`keytoken.data.decoders.DECODERS`, "folder" or "image".
        path: The file or folder.
        note: What is odd about the file, such as that it was cut short; mostly empty.
    """

    frames: torch.Tensor
    timestamps_s: tuple[float, ...]
    frame_indices: tuple[int, ...]
    fps: float
    num_source_frames: int
    decoder: str
    path: str
    note: str = ""

    @property
    def sampled_fps(self) -> float:
        """Frames seen per second of clip; the processor's ``second_per_grid_ts`` follows from it."""
        return len(self.frame_indices) / self.num_source_frames * self.fps

    @property
    def is_still(self) -> bool:
        """Whether there is one frame only, so that no order of frames exists."""
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


def read_clip(path: AnyClip, contract: SamplingContract) -> Clip:
    """Read the frames of a clip that the contract selects, at the contract's size.

    Args:
        path: A local video file, a folder of frames (:mod:`keytoken.data.decoders.folder`), an image, or a
            part of one of them (:mod:`keytoken.data.part`).
        contract: The sampling contract.

    Returns:
        The clip.

    Raises:
        ClipError: The clip is missing, empty or damaged, cannot be decoded, or has no such part.
        ConfigurationError: The contract names a decoder that is not installed.
    """
    source, span = clip_path(path), span_of(path)
    try:
        decoder, decoded = _decode(source, contract, span)
        frames = resize_frames(decoded.frames, contract)
    except ClipError:
        raise
    except SpanError as problem:
        raise ClipError(f"clip {source}: {problem}; correct the start and the end of the part") from problem
    except DataError as problem:
        raise ClipError(f"clip {source}: {problem}; repair it or drop it from the dataset") from problem
    if decoded.note:
        logger.info("clip %s: %s", path, decoded.note)
    return Clip(
        frames=frames,
        timestamps_s=tuple(decoded.timestamps_s),
        frame_indices=tuple(decoded.indices),
        fps=decoded.fps,
        num_source_frames=decoded.num_source_frames,
        decoder=decoder,
        path=str(source),
        note=decoded.note,
    )


def _decode(source: Path, contract: SamplingContract, span: Span) -> tuple[str, Decoded]:
    """Find out what a path is and have it read; returns who read it."""
    status = _status(source)
    try:
        if stat.S_ISDIR(status.st_mode):
            return "folder", folder.decode(source, contract, span)
        if not stat.S_ISREG(status.st_mode):
            raise DecoderError("not a file (a pipe, socket or device)")
        if status.st_size == 0:
            raise ClipError(f"clip {source}: the file is empty; copy or download it again")
        if source.suffix.lower() in image.SUFFIXES:
            return "image", image.decode(source, contract, span)
        return _decode_video(source, contract, span)
    except OSError as problem:
        raise DecoderError(f"cannot be read ({problem.strerror or problem})") from problem


def _status(source: Path) -> os.stat_result:
    try:
        return source.stat()
    except FileNotFoundError as problem:
        raise ClipError(f"clip {source}: no such file; check the dataset's video paths") from problem
    except (OSError, ValueError) as problem:  # a loop of links, a closed folder, a zero byte in the name
        reason = getattr(problem, "strerror", None) or problem
        raise ClipError(
            f"clip {source}: cannot be found ({reason}); check the path and who may read it"
        ) from problem


def _decode_video(source: Path, contract: SamplingContract, span: Span) -> tuple[str, Decoded]:
    names = AUTO if contract.decoder == "auto" else (contract.decoder,)
    failures = []
    for name in names:
        try:
            return name, DECODERS[name](source, contract, span)
        except SpanError:
            raise
        except DecoderMissing as problem:
            if len(names) == 1:
                raise ConfigurationError(
                    f"keytoken.sampling.decoder={name}: {problem}; install it, or set decoder=auto"
                ) from problem
            logger.debug("%s", problem)
        except DataError as problem:
            failures.append(f"{name}: {problem}")
    remedy = "re-encode it or drop it from the dataset"
    if contract.decoder != "auto":
        others = [name for name in DECODERS if name != contract.decoder]
        remedy = f"try keytoken.sampling.decoder=auto ({', '.join(others)} were not asked), or {remedy}"
    raise ClipError(f"clip {source}: cannot be decoded ({'; '.join(failures)}); {remedy}")


def resize_frames(frames: np.ndarray, contract: SamplingContract) -> torch.Tensor:
    """uint8 frames [T, H, W, C] to [T, C, H', W'], bicubic with antialiasing as in qwen_vl_utils."""
    tensor = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)
    shape = resized_shape(tensor.shape[2], tensor.shape[3], contract)
    if shape == tuple(tensor.shape[2:]):
        return tensor.contiguous()
    return torch.nn.functional.interpolate(tensor, size=shape, mode="bicubic", antialias=True).contiguous()
