"""Size and length of clips and images from their headers, without decoding them, in parallel children.

The length that a header states is not always what decodes: a truncated file keeps its header, and Matroska
states a duration only. ``frames_from`` says where the number comes from; training counts again when it opens
a clip. ``check=decode`` reads every clip as training would.

A header can hang a demuxer as a frame can hang a decoder, so files are opened in child processes that are
killed when they take too long.
"""

import functools
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from keytoken.data.child import ClipProcess
from keytoken.data.contract import SamplingContract, resized_shape, select_frames
from keytoken.data.prepare.media import full_hash, quick_hash
from keytoken.data.prepare.samples import MediaKind
from keytoken.errors import ClipError

_STILL_FORMATS = ("image2", "_pipe", "gif", "apng", "webp")
# What qwen_vl_utils allows an image whose row says nothing, in vision tokens.
_IMAGE_TOKENS = (4, 16384)


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
        quick: :func:`~keytoken.data.prepare.media.quick_hash`.
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
        contract: Also decode by this contract; None to leave it at the header.
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
        ClipError: The file is not what the row says, has no frames, or cannot be opened or decoded.
    """
    file, decode = Path(path), asked.contract is not None
    header = _image_header(file, decode) if kind == "image" else _video_header(file)
    if asked.contract is not None and kind == "video":
        from keytoken.data.clips import read_clip  # brings torch along

        read_clip(file, asked.contract)
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


def _image_header(path: Path, decode: bool) -> Header:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            (width, height), codec = image.size, image.format or "image"
            if decode:
                image.load()
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ClipError(f"{path} is no image that can be read; convert it or drop the row") from error
    return Header(width, height, 1, 0.0, 0.0, "image", codec, path.stat().st_size, quick_hash(path))


def _video_header(path: Path) -> Header:
    import av

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
    from av.stream import Disposition

    return bool(stream.disposition & Disposition.attached_pic)


def _duration(container: Any, stream: Any) -> float:
    if stream.duration:
        return float(stream.duration * stream.time_base)
    return container.duration / 1_000_000 if container.duration else 0.0


def inspect_all(
    files: Sequence[tuple[Path, MediaKind]],
    asked: Inspection,
    *,
    jobs: int,
    limit_s: float,
    cache: Path | None = None,
) -> dict[tuple[Path, MediaKind], Header | str]:
    """Inspect every file once.

    Args:
        files: Each file once for what it is supposed to be.
        asked: What to find out.
        jobs: Children at work at a time.
        limit_s: Seconds allowed for one file.
        cache: A file that remembers headers from run to run, and lets an interrupted run go on; a file that
            failed is tried again.

    Returns:
        The header of each file, or why there is none, in the order of ``files``.
    """
    known = _remembered(cache)
    keys = {file: asked.key(*file) for file in files}
    found: dict[tuple[Path, MediaKind], Header | str] = {
        file: known[key] for file, key in keys.items() if key in known
    }
    unknown = [file for file in files if file not in found]
    with _children(asked, limit_s) as call, _notebook(cache) as remember, ThreadPoolExecutor(jobs) as pool:
        futures: dict[Future[Header | str], tuple[Path, MediaKind]] = {
            pool.submit(call, *file): file for file in unknown
        }
        try:
            for future in tqdm(as_completed(futures), "media", len(futures), unit="file", mininterval=1.0):
                file, result = futures[future], future.result()
                found[file] = result
                if isinstance(result, Header):
                    remember(keys[file], result)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return {file: found[file] for file in files}


@contextmanager
def _children(asked: Inspection, limit_s: float) -> Iterator[Callable[[Path, MediaKind], Header | str]]:
    """A function that inspects a file in a child of the calling thread."""
    own = threading.local()
    with ExitStack() as started:

        def call(path: Path, kind: MediaKind) -> Header | str:
            children = own.__dict__
            if kind not in children:
                work = functools.partial(inspect_file, kind=kind, asked=asked)
                children[kind] = started.enter_context(ClipProcess(work, limit_s))
            try:
                header: Header = children[kind].run(str(path))
            except ClipError as error:
                return str(error)
            return header

        yield call


def _remembered(cache: Path | None) -> Mapping[str, Header]:
    """Headers of earlier runs; a line that was cut when one was stopped is left out."""
    headers: dict[str, Header] = {}
    if cache is not None and cache.is_file():
        with cache.open(encoding="utf-8") as lines:
            for line in lines:
                try:
                    entry = json.loads(line)
                    headers[entry["key"]] = Header(**entry["header"])
                except (json.JSONDecodeError, TypeError, KeyError):
                    continue
    return headers


@contextmanager
def _notebook(cache: Path | None) -> Iterator[Callable[[str, Header], None]]:
    """A function that appends a header to the cache; each line is out of our hands when it returns."""
    if cache is None:
        yield lambda key, header: None
        return
    cache.parent.mkdir(parents=True, exist_ok=True)
    with cache.open("a", encoding="utf-8", buffering=1) as file:
        file.write("\n")  # ends a line that was cut

        def remember(key: str, header: Header) -> None:
            file.write(json.dumps({"key": key, "header": asdict(header)}) + "\n")

        yield remember
