"""A clip, or a part of one in seconds: what a dataset row or a question names.

A row says it as qwen_vl_utils reads it: ``{"video": path, "video_start": 2.0, "video_end": 4.0}``
with either end left out, if wanted.

The rule is that of qwen_vl_utils: the part has all frames from the first one at or after the start to the
last one at or before the end, frames are chosen from them as from a clip of their number, and their times
and numbers stay those of the whole file. Qwen2.5-VL sees no start: its positions follow from the distance
between frames alone, which comes from the frames of the part and their rate. Qwen3-VL reads the times, which
are those of the whole file.

Departures: frames are found by their own times and not by number and average rate, which is the same at a
constant rate and right at a variable one, where a part also has a rate of its own. A part with one frame is
shown as a still and not refused. An end beyond the clip is taken for the clip's end, as there, and noted in
:attr:`keytoken.data.clips.Clip.note`.
"""

import os
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from keytoken.data.contract import SamplingContract, select_frames
from keytoken.errors import ClipError, DataError

ROUNDING_S = 0.5e-3  # of times in files that count milliseconds
_SAME_RATE = 0.01  # a part that is so close to the file's rate has that rate

Span: TypeAlias = tuple[float, float]  # from and to, seconds from the first frame
WHOLE: Span = (0.0, inf)


class SpanError(DataError):
    """A part in which a clip has no frames."""


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a clip.

    Attributes:
        path: The clip.
        start_s: Seconds from the clip's first frame.
        end_s: Likewise; infinite for the clip's end.
    """

    path: str
    start_s: float = 0.0
    end_s: float = inf

    def __str__(self) -> str:
        start, end = (f"{second:.3f}".rstrip("0").rstrip(".") for second in (self.start_s, self.end_s))
        return f"{self.path} ({start} s to {'its end' if self.end_s == inf else f'{end} s'})"


AnyClip: TypeAlias = str | os.PathLike[str] | Part


class Chosen(NamedTuple):
    """Frames chosen from a clip or a part of it.

    Attributes:
        numbers: Their numbers in the file.
        num_frames: Frames they were chosen from.
        fps: Average rate of these; the file's, but where the part's differs from it.
        note: What is odd about the part; mostly empty.
    """

    numbers: list[int]
    num_frames: int
    fps: float
    note: str


def clip_path(clip: AnyClip) -> Path:
    """The file or folder."""
    return Path(clip.path if isinstance(clip, Part) else clip)


def span_of(clip: AnyClip) -> Span:
    """The part that is meant, ``WHOLE`` for all of the clip.

    Raises:
        ClipError: It ends before it starts, or starts before the clip.
    """
    if not isinstance(clip, Part):
        return WHOLE
    if not 0.0 <= clip.start_s < clip.end_s:  # also NaN
        raise ClipError(
            f"clip {clip.path}: a part from {clip.start_s:g} s to {clip.end_s:g} s; the start is 0 or more "
            "and the end after it, correct them"
        )
    return clip.start_s, clip.end_s


def named_clip(entry: Mapping[str, Any]) -> str | Part:
    """What an entry with ``video``, and if wanted ``video_start`` and ``video_end``, names.

    Raises:
        DataError: The path is no text, or an end no number.
    """
    path = entry.get("video")
    if not isinstance(path, str):
        raise DataError(f"a video given as {type(path).__name__} is not supported; give the path of a file")
    path = path.removeprefix("file://")
    ends = {name: entry.get(name) for name in ("video_start", "video_end")}
    for name, value in ends.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise DataError(f"clip {path}: {name} is {value!r}; give seconds as a number, or leave it out")
    start, end = ends.values()
    if start is None and end is None:
        return path
    return Part(path, 0.0 if start is None else float(start), inf if end is None else float(end))


def entry_of(clip: AnyClip) -> dict[str, Any]:
    """The entry that names a clip, the reverse of :func:`named_clip`."""
    entry: dict[str, Any] = {"video": str(clip_path(clip))}
    if isinstance(clip, Part):
        entry |= {"video_start": clip.start_s} if clip.start_s else {}
        entry |= {"video_end": clip.end_s} if clip.end_s != inf else {}
    return entry


def choose_frames(times_s: Sequence[float], fps: float, contract: SamplingContract, span: Span) -> Chosen:
    """Choose the frames that the model sees of a part of a clip; see the module for the rule.

    Args:
        times_s: Time of each frame in seconds from the first one, ascending.
        fps: Average frame rate of the file.
        contract: The sampling contract.
        span: The part.

    Raises:
        SpanError: No frame lies in the part.
    """
    if span == WHOLE or not fps > 0:  # refused there
        return Chosen(select_frames(len(times_s), fps, contract), len(times_s), fps, "")
    start, end = span
    first = bisect_left(times_s, start - ROUNDING_S)
    after = bisect_right(times_s, end + ROUNDING_S)
    if first == len(times_s):
        raise SpanError(
            f"the part starts at {start:g} s, after the last frame, which is at {times_s[-1]:.3f} s"
        )
    if first >= after:
        raise SpanError(
            f"no frame lies between {start:g} s and {end:g} s; the nearest ones are at "
            f"{times_s[first - 1]:.3f} s and {times_s[first]:.3f} s"
        )
    own_fps = _own_rate(times_s[after - 1] - times_s[first], after - first, fps)
    numbers = select_frames(after - first, own_fps, contract, first=first)
    clip_end = times_s[-1] + 1 / fps
    late = end > clip_end + ROUNDING_S and end != inf
    note = f"the part asked for ends at {end:g} s, the clip at {clip_end:.2f} s" if late else ""
    return Chosen(numbers, after - first, own_fps, note)


def _own_rate(seconds: float, num_frames: int, fps: float) -> float:
    """Average rate of so many frames, the first and the last so far apart, or ``fps`` but for rounding."""
    expected = (num_frames - 1) / fps
    if abs(seconds - expected) <= max(_SAME_RATE * expected, 2 * ROUNDING_S):
        return fps
    return (num_frames - 1) / seconds
