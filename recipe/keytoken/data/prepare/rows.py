"""A prepared question as a row of verl's RL dataset."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from keytoken.data.headers import Header
from keytoken.data.part import AnyClip, Part, entry_of
from keytoken.data.prepare.samples import MULTIPLE_CHOICE, Sample
from keytoken.data.verl_rows import row_schema
from keytoken.scoring.prompts import render, with_options


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A row of the dataset before it is written.

    Attributes:
        sample: The question.
        path: Its clip or image.
        media: The same below the media root: the name that stays when the data move.
        header: What the file says of itself; None if it was not opened.
        num_vision_tokens: Under the sampling contract; None if the file was not opened.
    """

    sample: Sample
    path: Path
    media: str
    header: Header | None
    num_vision_tokens: int | None

    @property
    def clip(self) -> AnyClip:
        """The clip, or the part of it that is meant."""
        span = self.sample.span
        return self.path if span is None else Part(str(self.path), *span)


# videos and images hold paths and no sampling settings: those are the run's, and the same for all rows.
SCHEMA = row_schema(
    video=[("video_start", pa.float64()), ("video_end", pa.float64())],  # null: the clip's own
    image=[("image", pa.string())],
    extra_info=[
        ("index", pa.int64()),
        ("split", pa.string()),
        ("prompt_id", pa.string()),
        ("source_id", pa.string()),
        ("problem_type", pa.string()),
        ("category", pa.string()),
        ("question", pa.string()),
        ("options", pa.list_(pa.string())),
        ("answer_text", pa.string()),
        ("media", pa.string()),
        ("media_kind", pa.string()),
        ("content", pa.string()),
        ("duration_s", pa.float64()),
        ("num_source_frames", pa.int64()),
        ("num_vision_tokens", pa.int64()),
        ("sampling_digest", pa.string()),
        ("decoded", pa.bool_()),
    ],
)


def to_row(
    entry: Entry, index: int, *, split: str, style: str, sampling_digest: str, decoded: bool
) -> dict[str, Any]:
    """The row as verl reads it.

    Args:
        entry: The question with its media.
        index: Position in the dataset.
        split: Name of the split.
        style: Prompt style, see :func:`keytoken.scoring.prompts.render`.
        sampling_digest: Digest of the contract that ``num_vision_tokens`` holds under.
        decoded: Whether the media were decoded under it, and not only their headers read.
    """
    sample, header = entry.sample, entry.header
    video = sample.kind == "video"
    shown: Sequence[str] = () if sample.options_inline else sample.options
    choice = sample.problem_type == MULTIPLE_CHOICE
    question = with_options(sample.question, shown if choice else ())
    text = render(question, sample.problem_type, style)
    answer_text = sample.options[ord(sample.answer) - ord("A")] if choice else sample.answer
    return {
        "data_source": sample.data_source,
        "prompt": [{"role": "user", "content": ("<video>" if video else "<image>") + text}],
        "videos": [entry_of(entry.clip)] if video else [],
        "images": [] if video else [{"image": str(entry.path)}],
        "ability": sample.category or sample.problem_type,
        "reward_model": {"style": "rule", "ground_truth": sample.answer},
        "extra_info": {
            "index": index,
            "split": split,
            "prompt_id": f"{split}-{sample.number:06d}",
            "source_id": sample.item_id,
            "problem_type": sample.problem_type,
            "category": sample.category,
            "question": sample.question,
            "options": list(sample.options),
            "answer_text": answer_text,
            "media": entry.media,
            "media_kind": sample.kind,
            "content": header.quick if header else None,
            "duration_s": header.duration_s if header else None,
            "num_source_frames": header.num_frames if header else None,
            "num_vision_tokens": entry.num_vision_tokens,
            "sampling_digest": sampling_digest,
            "decoded": decoded,
        },
    }
