"""decord, for comparison with runs that used it; see the package's docstring for why it is not the default.

Its seeks return other frames than asked for, so here it reads from the first frame on and never seeks, and
only files of the kinds whose order it keeps. That makes it the slowest of the three.
"""

from pathlib import Path

import numpy as np

from keytoken.data.contract import SamplingContract
from keytoken.data.decoders.base import Decoded, DecoderError, DecoderMissing
from keytoken.data.decoders.index import index_clip
from keytoken.data.part import WHOLE, Span

_ORDERLY = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"}


def decode(path: Path, contract: SamplingContract, span: Span = WHOLE) -> Decoded:
    """Decode the frames that a contract selects.

    Raises:
        DecoderError: decord cannot read the file, or not in the right order.
        SpanError: the part has no frames.
    """
    try:
        import decord
        from decord._ffi.base import DECORDLimitReachedError
    except (ImportError, OSError) as error:
        raise DecoderMissing(f"decord cannot be imported: {error}") from error
    index = index_clip(path)
    if index.container not in _ORDERLY or index.by_order:
        raise DecoderError(f"decord returns frames of {index.container} files in another order")
    numbers, count, fps, note = index.choose(contract, span)
    decord.logging.set_level(decord.logging.QUIET)
    try:
        # RuntimeError: what VideoReader raises for a file that it cannot even open.
        reader = decord.VideoReader(str(path), num_threads=1)
        times = reader.get_frame_timestamp(range(len(reader)))[:, 0]
        expected = index.seconds(list(range(len(index.pts))))
        if len(times) != len(expected) or np.abs(times - times[0] - expected).max() > 0.5 / index.fps:
            raise DecoderError(
                f"decord sees {len(times)} frames where the file has {len(expected)}, or other times"
            )
        wanted = set(numbers)
        kept = {}
        for number in range(numbers[-1] + 1):
            frame = reader.next()
            if number in wanted:
                kept[number] = frame.asnumpy()
    except (decord.DECORDError, DECORDLimitReachedError, RuntimeError, StopIteration) as error:
        raise DecoderError(_last_line(error)) from error
    frames = np.stack([kept[number] for number in numbers])
    return Decoded(frames, numbers, index.seconds(numbers), fps, count, note)


def _last_line(error: Exception) -> str:
    """The reason at the end of decord's stack dump, on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reasons = [line for line in lines if not line.startswith(("[bt]", "Stack trace"))]
    return (reasons or [type(error).__name__])[-1][:200]
