"""torchcodec: FFmpeg of the system, decoding into tensors.

Its wheels are bound to a release of torch and need FFmpeg's shared libraries, so it is used where it loads
and missing elsewhere, among others beside a CPU-only torch with the wheel of PyPI.
"""

from functools import cache
from pathlib import Path
from typing import Any

from keytoken.data.contract import SamplingContract
from keytoken.data.decoders.base import Decoded, DecoderError, DecoderMissing
from keytoken.data.decoders.index import index_clip
from keytoken.data.part import WHOLE, Span


def decode(path: Path, contract: SamplingContract, span: Span = WHOLE) -> Decoded:
    """Decode the frames that a contract selects.

    Raises:
        DecoderError: torchcodec is missing, cannot read the file, or returns other frames.
        SpanError: the part has no frames.
    """
    video_decoder = _load()
    if isinstance(video_decoder, str):
        raise DecoderMissing(video_decoder)
    index = index_clip(path)
    if index.by_order:
        raise DecoderError("the file has no presentation times to find its frames by")
    numbers, count, fps, note = index.choose(contract, span)
    try:
        reader = video_decoder(str(path), dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact")
        batch = reader.get_frames_at(numbers)
    except (RuntimeError, ValueError, IndexError) as error:
        raise DecoderError(" ".join(str(error).split())[:200]) from error
    expected = [float(index.pts[number] * index.time_base) for number in numbers]
    distance = max(abs(a - b) for a, b in zip(batch.pts_seconds.tolist(), expected, strict=True))
    if not distance < 0.5 / index.fps:
        raise DecoderError(f"torchcodec returned a frame that is {distance:.3f} s from the one asked for")
    return Decoded(batch.data.numpy(), numbers, index.seconds(numbers), fps, count, note)


@cache
def _load() -> Any:
    """torchcodec's decoder class, or why there is none; asked once, since a failing import takes a second."""
    try:
        from torchcodec.decoders import VideoDecoder
    except (ImportError, OSError, RuntimeError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"torchcodec cannot be imported: {first}"
    return VideoDecoder
