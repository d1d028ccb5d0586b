"""Which frames a video file has: their times and their order, read from its packets without decoding them.

Every decoder counts frames in its own way, and so frame 100 of one is not always frame 100 of another. Here
the count is made once: packets sorted by presentation time, without those that an edit list leaves out. It
costs reading the file, no decoding. Selection goes by the number of a frame and the average rate, the rule of
qwen_vl_utils also for a variable rate; the times are the true ones. A part has a rate of its own there.

Files without usable presentation times, all AVI files among them, are counted by decoding them; their frames
are known by their order alone. Files that list frames which do not come out are counted again by decoding: if
only the first or the last ones are missing (a file that was cut short, a recording that begins in the middle
of a group of pictures), the others are its frames and a note says so. So it does where a file states a much
longer duration than its frames have, the only sign of a cut in Matroska and Flash. Damage in between makes
the clip unusable, if a frame that is shown depends on it; other frames are not looked at.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from keytoken.data.contract import SamplingContract
from keytoken.data.decoders.base import DecoderError
from keytoken.data.part import WHOLE, Chosen, Span, choose_frames

_WITHOUT_TIMES = {"avi"}  # FFmpeg guesses times for its packets, wrongly where frames are reordered
# In the header; of other files FFmpeg guesses it from what is there.
_STATE_DURATION = {"matroska,webm", "flv", "asf"}
# Less than this at the end is no sign of a cut: the last frame's duration, or sound that goes on a moment.
_LEAST_MISSING_S, _LEAST_MISSING = 1.0, 0.05


@dataclass(frozen=True, slots=True)
class ClipIndex:
    """The frames of a video file in order of presentation.

    Attributes:
        pts: Presentation time of each frame in units of ``time_base``, [N], ascending.
        time_base: Seconds in a unit.
        fps: Average frame rate.
        keyframes: Presentation times at which decoding can start, ascending.
        container: FFmpeg's name of the file format.
        by_order: The file has no times: ``pts`` counts the frames as they come out of a decoder.
        note: What is odd about the file; mostly empty.
    """

    pts: tuple[int, ...]
    time_base: Fraction
    fps: float
    keyframes: tuple[int, ...]
    container: str
    by_order: bool = False
    note: str = ""

    def seconds(self, numbers: list[int]) -> list[float]:
        """Times of frames in seconds from the first one."""
        return [float((self.pts[number] - self.pts[0]) * self.time_base) for number in numbers]

    def choose(self, contract: SamplingContract, span: Span) -> Chosen:
        """The frames that a contract selects from a part of the clip; the note also says what is odd here.

        Raises:
            SpanError: the part has no frames.
        """
        numbers = list(range(len(self.pts)))
        times = numbers if span == WHOLE else self.seconds(numbers)
        chosen = choose_frames(times, self.fps, contract, span)
        return chosen._replace(note="; ".join(filter(None, (self.note, chosen.note))))


@contextmanager
def open_video(path: Path) -> Iterator[tuple[Any, Any]]:
    """Open a file with PyAV: the container and its video stream, which decodes on one thread.

    Raises:
        DecoderError: FFmpeg cannot open it, or it has no video.
    """
    import av
    from av.stream import Disposition

    try:
        # Titles in other encodings than UTF-8 are no reason to refuse a clip.
        with av.open(str(path), metadata_errors="replace") as container:
            stream: Any = container.streams.best("video")
            if stream is None or stream.disposition & Disposition.attached_pic:
                raise DecoderError("the file has no video stream")
            stream.codec_context.thread_count = 1  # loaders run many decoders beside each other
            yield container, stream
    except av.FFmpegError as error:
        raise DecoderError(error.strerror or str(error)) from error


def index_clip(path: Path) -> ClipIndex:
    """Find out which frames a file has.

    Raises:
        DecoderError: the file cannot be opened, has no video, no frames or no frame rate.
    """
    with open_video(path) as (container, stream):
        rate = stream.average_rate or stream.guessed_rate
        declared, base, name = stream.frames, stream.time_base, container.format.name
        listed = stream.index_entries
        last = listed[len(listed) - 1] if declared and len(listed) else None
        cut = last is not None and last.pos + last.size > path.stat().st_size
        stated_s = (container.duration or 0) / 1_000_000 if name in _STATE_DURATION else 0.0
        times, keyframes = [], []
        for packet in container.demux(stream):
            if packet.size and not packet.is_discard:
                times.append(packet.pts)
                if packet.is_keyframe:
                    keyframes.append(packet.pts)
    if not times:
        raise DecoderError("the file has no frames")
    if not rate:
        raise DecoderError("the file has no frame rate, so its frames cannot be chosen by time")
    if name in _WITHOUT_TIMES or None in times or len(set(times)) < len(times):
        index = ClipIndex((), 1 / Fraction(rate), float(rate), (), name, by_order=True)
        return count_frames(path, index)
    note = f"the file was cut short: of {declared} frames it holds {len(times)}" if cut else ""
    pts = tuple(sorted(times))
    return ClipIndex(
        pts, base, float(rate), tuple(sorted(keyframes)), name, note=note or _missing_end(stated_s, pts, base)
    )


def _missing_end(stated_s: float, pts: tuple[int, ...], base: Fraction) -> str:
    """A note if a file that lists no frames holds much less than its header states.

    The header's duration is that of the longest stream, so sound may outlast the frames of a whole file.
    """
    held_s = float(max(pts[-1], pts[-1] - pts[0]) * base)
    if stated_s - held_s <= max(_LEAST_MISSING_S, _LEAST_MISSING * stated_s):
        return ""
    return (
        f"the file was cut short, or ends in sound alone: it states {stated_s:.1f} s and holds {held_s:.1f} s"
    )


def count_frames(path: Path, index: ClipIndex) -> ClipIndex:
    """Find out by decoding which of the listed frames a file really has; if none are listed, all it has.

    Raises:
        DecoderError: frames are missing in the middle, or all are.
    """
    found, damaged, reason = set(), set(), ""
    with open_video(path) as (container, stream):
        for time, frame, error in decoded_frames(container, stream, index):
            if frame is not None:
                found.add(time)
            elif time is not None:
                damaged.add(time)
            reason = reason or error
    reason = f" ({reason})" if reason else ""
    if not found - damaged:
        raise DecoderError(f"no frame can be decoded{reason}")
    pts = tuple(sorted(found - damaged))
    missing = sorted(damaged.union(index.pts) - set(pts))
    gap = [time for time in missing if pts[0] < time < pts[-1]]
    if gap:
        seconds = float((gap[0] - pts[0]) * index.time_base)
        raise DecoderError(f"{len(gap)} frames are damaged or missing, the first at {seconds:.2f} s{reason}")
    note = f"{len(pts)} of {len(pts) + len(missing)} listed frames can be decoded{reason}" if missing else ""
    notes = "; ".join(filter(None, (index.note, note)))
    return replace(index, pts=pts, keyframes=(), note=notes)


def decoded_frames(container: Any, stream: Any, index: ClipIndex) -> Iterator[tuple[Any, Any | None, str]]:
    """Decode to the end and past damage, from wherever the container stands.

    Yields:
        Time as in ``index.pts``, the frame, and "" for each that is whole; else time, None and the reason.
    """
    import av

    number = 0  # of the frames that came out, for files that have no times
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except av.FFmpegError as error:
            yield number if index.by_order else packet.pts, None, error.strerror or str(error)
            number += 1
            continue
        for frame in frames:
            time = number if index.by_order else frame.pts
            yield (time, None, "a damaged frame") if frame.is_corrupt else (time, frame, "")
            number += 1
