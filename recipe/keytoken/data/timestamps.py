"""Videos of Qwen3-VL in a prompt: a block of placeholders for each temporal patch, with its time before it.

Its processor writes ``<0.5 seconds><|vision_start|><|video_pad|>...<|vision_end|>`` for every patch of two
frames, the time being the mean of theirs. vLLM makes the same of one ``<|vision_start|><|video_pad|>
<|vision_end|>``, and expands only the first block of a prompt that has them all. So an engine is sent a
prompt in which each video is one block again, and expands it to the ids that the trainer has.

The times are those of the whole file, also where a part of it is shown (:mod:`keytoken.data.part`).

Two tokenizers may differ in the first time of a video: the processor tokenizes it with the text before it
(`` <`` is one token), vLLM alone. The ids of both sides are vLLM's here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from keytoken.errors import DataError

# A day. Longer clips have longer times than reckoned with, a token for each digit.
_LATEST_S = 99999.9


@dataclass(frozen=True, slots=True)
class Marks:
    """Ids of the tokens that a video consists of."""

    start: int
    pad: int
    end: int

    @classmethod
    def of(cls, processor: Any) -> Marks:
        """From a processor of the family."""
        return cls(processor.vision_start_token_id, processor.video_token_id, processor.vision_end_token_id)


def times_of(metadata: Mapping[str, Any], temporal_patch_size: int) -> list[float]:
    """Seconds from the start of the file at which each temporal patch is shown: the mean of its outer frames.

    Args:
        metadata: ``frames_indices`` and ``fps`` of a video's frames, as in
            :meth:`keytoken.data.clips.Clip.metadata`.
        temporal_patch_size: Frames of a patch; a last patch that is short repeats its last frame.
    """
    numbers = list(metadata["frames_indices"])
    numbers += numbers[-1:] * (-len(numbers) % temporal_patch_size)
    seconds = [number / metadata["fps"] for number in numbers]
    firsts, lasts = seconds[::temporal_patch_size], seconds[temporal_patch_size - 1 :: temporal_patch_size]
    return [(first + last) / 2 for first, last in zip(firsts, lasts, strict=True)]


def stamp(seconds: float, tokenizer: Any) -> list[int]:
    """Ids of a time, tokenized by itself."""
    return tokenizer.encode(_written(seconds), add_special_tokens=False)


def longest_stamp(tokenizer: Any) -> int:
    """Most tokens that a time can have."""
    return len(stamp(_LATEST_S, tokenizer))


def one_block_for_each_video(
    token_ids: Sequence[int],
    grids: Sequence[Sequence[int]],
    times: Sequence[Sequence[float]],
    processor: Any,
) -> list[int]:
    """The prompt to send to an engine, in which each video is one block of one placeholder.

    Example: two patches of one token, ``A <0.5 seconds> S P E <1.5 seconds> S P E B``, become ``A S P E B``.

    Args:
        token_ids: The prompt as the processor made it.
        grids: (t, h, w) of every video in patches, in prompt order.
        times: Seconds of each of its temporal patches.
        processor: A processor of a family with timestamps.

    Raises:
        DataError: the prompt does not hold the videos in this form.
    """
    marks, tokenizer = Marks.of(processor), processor.tokenizer
    ids, sent = list(token_ids), list[int]()
    cursor = 0
    for grid, seconds in zip(grids, times, strict=True):
        first_time = stamp(seconds[0], tokenizer)
        blocks = _blocks(grid, seconds, processor)[len(first_time) :]
        first = _first_block(ids, cursor, marks)
        if first is None or ids[first : first + len(blocks)] != blocks:
            raise _other_form(f"{grid[0]} blocks of placeholders with the times {seconds}")
        sent += _text_before(ids[cursor:first], first_time, seconds[0], tokenizer)
        sent += [marks.start, marks.pad, marks.end]
        cursor = first + len(blocks)
    return [*sent, *ids[cursor:]]


def expanded(
    sent: Sequence[int], grids: Sequence[Sequence[int]], times: Sequence[Sequence[float]], processor: Any
) -> list[int]:
    """What vLLM makes of a prompt in which each video is one block of one placeholder.

    Source: vLLM 0.27.1, ``qwen3_vl.py: Qwen3VLMultiModalProcessor.get_video_repl``.
    """
    marks, ids = Marks.of(processor), list(sent)
    result, cursor = list[int](), 0
    for grid, seconds in zip(grids, times, strict=True):
        first = _first_block(ids, cursor, marks)
        if first is None:
            raise _other_form("a placeholder for each video")
        result += [*ids[cursor:first], *_blocks(grid, seconds, processor)]
        cursor = first + 3
    return [*result, *ids[cursor:]]


def _blocks(grid: Sequence[int], seconds: Sequence[float], processor: Any) -> list[int]:
    """A video with all its times."""
    patches, height, width = grid
    if patches != len(seconds):
        raise _other_form(f"{len(seconds)} temporal patches, and the processor makes {patches}")
    marks = Marks.of(processor)
    pads = [marks.pad] * (height * width // processor.video_processor.merge_size**2)
    stamps = [stamp(second, processor.tokenizer) for second in seconds]
    return [token for time in stamps for token in (*time, marks.start, *pads, marks.end)]


def _other_form(what: str) -> DataError:
    return DataError(
        f"the prompt of a video should hold {what}; the installed transformers makes prompts of another form "
        "for this model: install the locked version (requirements/)"
    )


def _written(seconds: float) -> str:
    return f"<{seconds:.1f} seconds>"


def _first_block(ids: list[int], cursor: int, marks: Marks) -> int | None:
    """Where the next block of a video begins."""
    pairs = zip(ids[cursor:], ids[cursor + 1 :], strict=False)
    found = (number for number, pair in enumerate(pairs, cursor) if pair == (marks.start, marks.pad))
    return next(found, None)


def _text_before(ids: list[int], first_stamp: list[int], seconds: float, tokenizer: Any) -> list[int]:
    """The ids before a video without its first time, which may share a token with the text."""
    length = len(first_stamp)
    if ids[-length:] == first_stamp:
        return ids[:-length]
    written = _written(seconds)
    for begin in range(len(ids) - 1, -1, -1):
        text = tokenizer.decode(ids[begin:])
        if text.endswith(written):
            rest = tokenizer.encode(text.removesuffix(written), add_special_tokens=False)
            return [*ids[:begin], *rest]
    raise _other_form(f"{written!r} before it")
