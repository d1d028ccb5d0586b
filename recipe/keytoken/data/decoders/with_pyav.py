"""PyAV: FFmpeg in its own wheel. It reads everything, and every frame says which one it is."""

from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from keytoken.data.contract import SamplingContract
from keytoken.data.decoders.base import Decoded, DecoderError
from keytoken.data.decoders.index import ClipIndex, count_frames, decoded_frames, index_clip, open_video
from keytoken.data.part import WHOLE, Span


def decode(path: Path, contract: SamplingContract, span: Span = WHOLE) -> Decoded:
    """Decode the frames that a contract selects, starting from the keyframes before them.

    Raises:
        DecoderError: the file cannot be opened or is damaged.
        SpanError: the part has no frames.
    """
    index = index_clip(path)
    numbers, count, fps, note = index.choose(contract, span)
    frames = _fetch(path, [index.pts[number] for number in numbers], index)
    if frames is None:
        # The file is damaged, or a keyframe is none: see which frames come out from the first one on.
        index = count_frames(path, index)
        numbers, count, fps, note = index.choose(contract, span)
        frames = _fetch(path, [index.pts[number] for number in numbers], index)
    if frames is None:
        raise DecoderError("decoding the file twice gave different frames")
    return Decoded(frames, numbers, index.seconds(numbers), fps, count, note)


def _fetch(path: Path, times: list[int], index: ClipIndex) -> np.ndarray | None:
    """Frames [T, H, W, C] at presentation times, or None if one of them does not come out whole."""
    wanted = sorted(set(times))
    with open_video(path) as (container, stream):
        found = _by_seeking(container, stream, wanted, index)
    if len(found) < len(wanted):
        return None
    sizes = {frame.shape for frame in found.values()}
    if len(sizes) > 1:
        raise DecoderError(f"the size of the frames changes within the file: {sorted(sizes)}")
    return np.stack([found[time] for time in times])


def _by_seeking(container: Any, stream: Any, wanted: list[int], index: ClipIndex) -> dict[int, np.ndarray]:
    """Wanted frames by time; a seek wherever a keyframe lies between the last frame and the next one wanted.

    It ends at the first damage within the listed frames: what comes after it may refer to what is missing.
    """
    found: dict[int, np.ndarray] = {}
    listed = set(index.pts)
    position = -1 if index.by_order else None  # of the last frame that came out
    frames = _listed(container, stream, index, listed)
    for goal in wanted:
        at = bisect_right(index.keyframes, goal)
        start = index.keyframes[at - 1] if at else None
        if start is not None and (position is None or position < start):
            container.seek(start, stream=stream, backward=True)
            frames = _listed(container, stream, index, listed)
        while position is None or position < goal:
            time, frame, _ = next(frames, (None, None, "the end"))
            if frame is None:
                return found
            position = time
            if time == goal:
                found[time] = _upright(frame)
    return found


def _listed(
    container: Any, stream: Any, index: ClipIndex, listed: set[int]
) -> Iterator[tuple[Any, Any, str]]:
    """Without what was found before to lie outside of the clip's frames, such as the rest of a cut packet."""
    return (event for event in decoded_frames(container, stream, index) if event[0] in listed)


def _upright(frame: Any) -> np.ndarray:
    """RGB [H, W, C]; phones store turned frames with a rotation tag, which PyAV leaves to us."""
    return np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90) % 4)
