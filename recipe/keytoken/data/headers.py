"""Size and length of clips and images from their headers, without decoding them.

The length that a header states is not always what decodes: a truncated file keeps its header, and Matroska
states a duration only. ``frames_from`` says where the number comes from; training counts again when it opens
a clip.

Imports little, since children that may be killed start with it, and nothing later: the time limit of a file
is not for imports.
"""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import av
from av.stream import Disposition
from PIL import Image, UnidentifiedImageError

from keytoken.data.contract import SamplingContract, resized_shape, select_frames
from keytoken.errors import ClipError

MediaKind = Literal["video", "image"]

_STILL_FORMATS = ("image2", "_pipe", "gif", "apng", "webp")
# What qwen_vl_utils allows an image whose row says nothing, in vision tokens.
_IMAGE_TOKENS = (4, 16384)
_QUICK_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of itself.

    Attributes:
        width: Pixels, as stored; a turned clip is shown with both swapped, which changes no token count.
        height: Pixels, as stored.
        num_frames: Frames of the clip; 1 for an image.
        fps: Average frame rate; 0 for an image.
        duration_s: Seconds; 0 for an image.
        frames_from: "header", "duration" (times frame rate) or "packets" (counted); "image" for an image.
        codec: Name of the codec or image format.
        num_bytes: Size of the file.
        quick: :func:`quick_hash`.
        sha256: Of the content; empty unless asked for.
    """

    width: int
    height: int
    num_frames: int
    fps: float
    duration_s: float
    frames_from: str
    codec: str
    num_bytes: int
    quick: str
    sha256: str = ""


@dataclass(frozen=True, slots=True)
class Inspection:
    """What is found out of every file.

    Attributes:
        full: Also take the SHA-256.
        contract: Also decode by this contract (:mod:`keytoken.data.prepare.decoding`); None to leave it at
            the header.
    """

    full: bool = False
    contract: SamplingContract | None = None

    def key(self, path: Path, kind: MediaKind) -> str:
        """Names the question and the state of a file; equal keys have equal answers."""
        state = path.stat()
        asked = [kind, self.full, self.contract.digest() if self.contract else ""]
        return json.dumps([str(path), state.st_size, state.st_mtime_ns, *asked])


def inspect_file(path: str, kind: MediaKind, asked: Inspection) -> Header:
    """Read one header.

    Raises:
        ClipError: The file is not what it is supposed to be, has no frames, or cannot be opened.
    """
    file = Path(path)
    header = _image_header(file, asked) if kind == "image" else _video_header(file)
    return replace(header, sha256=full_hash(file)) if asked.full else header


def num_vision_tokens(header: Header, kind: MediaKind, contract: SamplingContract) -> int:
    """Vision tokens that a clip or image becomes, from its header.

    Raises:
        DataError: A clip without frame rate, or frames that are too elongated for Qwen2-VL.
    """
    tile = contract.patch_size * contract.merge_size
    if kind == "image":
        low, high = (count * tile * tile for count in _IMAGE_TOKENS)
        height, width = resized_shape(
            header.height, header.width, replace(contract, min_pixels=low, max_pixels=high)
        )
        return (height // tile) * (width // tile)
    frames = len(select_frames(header.num_frames, header.fps, contract))
    height, width = resized_shape(header.height, header.width, contract)
    return frames // contract.temporal_patch_size * (height // tile) * (width // tile)


def _image_header(path: Path, asked: Inspection) -> Header:
    try:
        with Image.open(path) as image:
            (width, height), codec = image.size, image.format or "image"
            if asked.contract is not None:
                image.load()
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ClipError(f"{path} is no image that can be read; convert it or drop the row") from error
    return Header(width, height, 1, 0.0, 0.0, "image", codec, path.stat().st_size, quick_hash(path))


def _video_header(path: Path) -> Header:
    try:
        with av.open(str(path), metadata_errors="replace") as container:
            name = container.format.name
            if any(name == still or name.endswith(still) for still in _STILL_FORMATS):
                raise ClipError(f"{path} is an image ({name}), and the row calls it a video; correct the row")
            streams = [s for s in container.streams.video if not _is_cover(s)]
            if not streams:
                raise ClipError(f"{path} has no video stream; replace the file or drop the row")
            stream = streams[0]
            fps = float(stream.average_rate or stream.guessed_rate or 0)
            duration = _duration(container, stream)
            frames, origin = stream.frames, "header"
            if not frames and duration and fps:
                frames, origin = round(duration * fps), "duration"
            if not frames:
                frames, origin = sum(packet.size > 0 for packet in container.demux(stream)), "packets"
            codec = stream.codec_context.name
            width, height = stream.codec_context.width, stream.codec_context.height
    except av.FFmpegError as error:
        raise ClipError(
            f"{path} cannot be opened ({error.strerror}); re-encode it or drop the row"
        ) from error
    if frames < 1 or width < 1 or height < 1:
        raise ClipError(f"{path} states {frames} frames of {width}x{height}; re-encode it or drop the row")
    duration = duration or (frames / fps if fps else 0.0)
    size = path.stat().st_size
    return Header(width, height, frames, fps, duration, origin, codec, size, quick_hash(path))


def _is_cover(stream: Any) -> bool:
    """Whether a video stream is the cover picture of a sound file."""
    return bool(stream.disposition & Disposition.attached_pic)


def _duration(container: Any, stream: Any) -> float:
    if stream.duration:
        return float(stream.duration * stream.time_base)
    return container.duration / 1_000_000 if container.duration else 0.0


def quick_hash(path: Path) -> str:
    """Digest of a file's size and of 64 KiB at its start, middle and end; enough to tell clips apart.

    Two clips with equal digests are nearly surely the same file. It cannot show that a file is undamaged: use
    :func:`full_hash` for that.
    """
    digest = hashlib.blake2b(digest_size=16)
    size = path.stat().st_size
    digest.update(str(size).encode())
    with path.open("rb") as file:
        for start in (0, max(0, size // 2 - _QUICK_BYTES // 2), max(0, size - _QUICK_BYTES)):
            file.seek(start)
            digest.update(file.read(_QUICK_BYTES))
    return digest.hexdigest()


def full_hash(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
