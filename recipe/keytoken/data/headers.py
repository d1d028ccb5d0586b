"""Size and length of clips, folders of frames and images from their headers, without decoding them.

The length that a header states is not always what decodes: a truncated file keeps its header, and Matroska
states a duration only. ``frames_from`` says where the number comes from; training counts again when it opens
a clip.

Imports little, since children that may be killed start with it, and nothing later: the time limit of a file
is not for imports.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Any, Literal

import av
from av.stream import Disposition
from PIL import Image, UnidentifiedImageError

from keytoken.data.contract import SamplingContract, resized_shape
from keytoken.data.decoders.folder import RATE_FILE, RATE_MISSING, frame_files, frame_rate
from keytoken.data.part import ROUNDING_S, WHOLE, AnyClip, Part, Span, choose_frames, clip_path
from keytoken.errors import ClipError, DataError

MediaKind = Literal["video", "image"]

_STILL_FORMATS = ("image2", "_pipe", "gif", "apng", "webp")
# What qwen_vl_utils allows an image whose row says nothing, in vision tokens.
_IMAGE_TOKENS = (4, 16384)
_QUICK_BYTES = 64 * 1024
# Part of every Inspection.key: raise it when the same question gets another answer.
_VERSION = 2


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of itself.

    Attributes:
        width: Pixels, as stored; a turned clip is shown with both swapped, which changes no token count.
        height: Pixels, as stored.
        num_frames: Frames of the clip; 1 for an image.
        fps: Average frame rate; 0 for an image, and for a folder of frames without a rate.
        duration_s: Seconds; 0 where there is no rate.
        frames_from: "header", "duration" (times frame rate) or "packets" (counted); "folder" for a folder of
            frames, "image" for an image.
        codec: Name of the codec or image format.
        num_bytes: Size of the file, or of all frames of a folder.
        quick: :func:`quick_hash`.
        sha256: Of the content; empty unless asked for.
        decoded_shape: T, C, H, W of what the model sees of a clip that was decoded as well; else empty.
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
    decoded_shape: tuple[int, ...] = ()


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

    def key(self, clip: AnyClip, kind: MediaKind) -> str:
        """Names the question and the state of the files; equal keys have equal answers."""
        states = [file.stat() for file in _files(clip_path(clip))]
        sizes, changed = sum(state.st_size for state in states), max(state.st_mtime_ns for state in states)
        asked = [kind, self.full, self.contract.digest() if self.contract else ""]
        ends = (clip.start_s, clip.end_s) if isinstance(clip, Part) else WHOLE
        return json.dumps([_VERSION, str(clip_path(clip)), *ends, sizes, changed, len(states), *asked])


def inspect_file(clip: AnyClip, kind: MediaKind, asked: Inspection) -> Header:
    """Read one header.

    Args:
        clip: A file, a folder of frames, or a part of one, which has the header of the whole.
        kind: What it is supposed to be.
        asked: What to find out.

    Raises:
        ClipError: The file is not what it is supposed to be, has no frames, or cannot be opened.
    """
    file = clip_path(clip)
    if kind == "image":
        header = _image_header(file, asked)
    else:
        header = _folder_header(file) if file.is_dir() else _video_header(file)
    return replace(header, sha256=full_hash(file)) if asked.full else header


def num_vision_tokens(header: Header, kind: MediaKind, contract: SamplingContract, span: Span = WHOLE) -> int:
    """Vision tokens that a clip, a part of one, or an image becomes: as decoded, or else from its header.

    Raises:
        DataError: A clip without frame rate, or frames that are too elongated for Qwen2-VL.
        SpanError: No frame lies in the part.
    """
    if kind == "image":
        tile = contract.patch_size * contract.merge_size
        low, high = (count * tile * tile for count in _IMAGE_TOKENS)
        height, width = resized_shape(
            header.height, header.width, replace(contract, min_pixels=low, max_pixels=high)
        )
        return tokens_of_picture(height, width, contract)
    if header.decoded_shape:
        return tokens_of_frames(header.decoded_shape, contract)
    fps = header.fps
    if header.frames_from == "folder" and not fps:
        if span != WHOLE:
            raise DataError(RATE_MISSING)
        fps = contract.fps  # as it is read
    seconds = 1 / fps if fps else 0.0  # choosing refuses a clip without a rate
    # Of a whole clip the number of frames counts alone, and a broken header may state any.
    count = range(header.num_frames)
    times: Sequence[float] = count if span == WHOLE else [number * seconds for number in count]
    frames = len(choose_frames(times, fps, contract, span).numbers)
    height, width = resized_shape(header.height, header.width, contract)
    return tokens_of_frames((frames, 3, height, width), contract)


def ends_late(header: Header, span: Span) -> bool:
    """Whether a part is said to end after the clip does, by its header; it ends with the clip then."""
    seconds = header.num_frames / header.fps if header.fps else inf
    return span[1] != inf and span[1] > seconds + ROUNDING_S


def tokens_of_frames(shape: Sequence[int], contract: SamplingContract) -> int:
    """Vision tokens of frames of that shape, T, C, H, W, resized by the contract."""
    frames, _, height, width = shape
    return frames // contract.temporal_patch_size * tokens_of_picture(height, width, contract)


def tokens_of_picture(height: int, width: int, contract: SamplingContract) -> int:
    """Vision tokens of one resized picture, and of as many frames as make one patch."""
    tile = contract.patch_size * contract.merge_size
    return (height // tile) * (width // tile)


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


def _folder_header(folder: Path) -> Header:
    """Of the first frame; that the others have its size is seen when they are read."""
    try:
        frames, fps = frame_files(folder), frame_rate(folder) or 0.0
    except DataError as problem:
        raise ClipError(f"{folder}: {problem}; repair it or drop the row") from problem
    first = _image_header(frames[0], Inspection())
    size = sum(frame.stat().st_size for frame in frames)
    duration = len(frames) / fps if fps else 0.0
    width, height = first.width, first.height
    return Header(width, height, len(frames), fps, duration, "folder", first.codec, size, quick_hash(folder))


def _is_cover(stream: Any) -> bool:
    """Whether a video stream is the cover picture of a sound file."""
    return bool(stream.disposition & Disposition.attached_pic)


def _duration(container: Any, stream: Any) -> float:
    if stream.duration:
        return float(stream.duration * stream.time_base)
    return container.duration / 1_000_000 if container.duration else 0.0


def quick_hash(path: Path) -> str:
    """Digest of a file's size and of 64 KiB at its start, middle and end; enough to tell clips apart.

    Of a folder of frames: of all sizes, and of its first, middle and last file. Two clips with equal digests
    are nearly surely the same. It cannot show that a file is undamaged: use :func:`full_hash` for that.
    """
    digest = hashlib.blake2b(digest_size=16)
    if path.is_dir():
        files = _files(path)
        digest.update(" ".join(str(file.stat().st_size) for file in files).encode())
        for member in (files[0], files[len(files) // 2], files[-1]):
            digest.update(quick_hash(member).encode())
        return digest.hexdigest()
    size = path.stat().st_size
    digest.update(str(size).encode())
    with path.open("rb") as file:
        for start in (0, max(0, size // 2 - _QUICK_BYTES // 2), max(0, size - _QUICK_BYTES)):
            file.seek(start)
            digest.update(file.read(_QUICK_BYTES))
    return digest.hexdigest()


def full_hash(path: Path) -> str:
    """SHA-256 of a file's content; of a folder of frames, of the names and the SHA-256 of its files."""
    if path.is_dir():
        lines = (f"{full_hash(file)}  {file.name}\n" for file in _files(path))  # as sha256sum writes it
        return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(path: Path) -> list[Path]:
    """A file by itself; of a folder the frames and their rate, which are all that is read of it."""
    if not path.is_dir():
        return [path]
    rate = path / RATE_FILE
    return [*frame_files(path), *([rate] if rate.exists() else [])]
