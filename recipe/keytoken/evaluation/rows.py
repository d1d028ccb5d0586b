"""From questions to what is asked: which answers are wanted, with which seeds, in which conversation."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from keytoken.data.part import AnyClip, Part, entry_of
from keytoken.errors import ClipError, DataError
from keytoken.scoring.items import Item, Prediction

# A benchmark may name its videos without the ending that the downloaded files have.
VIDEO_ENDINGS = (".mp4", ".mkv", ".webm", ".avi", ".mov")


class SampleKey(NamedTuple):
    """What sets an answer apart from all others of an evaluation."""

    item_id: str
    control: str
    decoding: str
    sample: int


@dataclass(frozen=True, slots=True)
class Job:
    """A question and the answers that are still wanted; its media are read once for all of them."""

    item: Item
    keys: tuple[SampleKey, ...]


def plan(
    items: Iterable[Item], controls: Sequence[str], answers: Mapping[str, int], done: Iterable[SampleKey] = ()
) -> list[Job]:
    """The answers that are wanted and not there yet, question by question.

    Args:
        items: The questions.
        controls: What is done to the picture.
        answers: Kinds of decoding, each with the number of answers to a question.
        done: Answers that are there already.

    Returns:
        One job for each question that lacks an answer.
    """
    there = set(done)
    jobs = []
    for item in items:
        wanted = (
            SampleKey(item.item_id, control, decoding, sample)
            for control in controls
            for decoding, count in answers.items()
            for sample in range(count)
        )
        keys = tuple(key for key in wanted if key not in there)
        if keys:
            jobs.append(Job(item, keys))
    return jobs


def key_of(prediction: Prediction) -> SampleKey:
    """The key of an answer that has been given."""
    return SampleKey(prediction.item_id, prediction.control, prediction.decoding, prediction.sample)


def sample_seed(seed: int, key: SampleKey) -> int:
    """The sampling seed of one answer: the same whatever was asked before it, together with it or after it.

    Returns:
        A non-negative 63-bit integer.
    """
    text = f"{seed}|{key.item_id}|{key.control}|{key.decoding}|{key.sample}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def conversation(
    text: str, videos: Sequence[AnyClip] = (), images: Sequence[Path] = ()
) -> list[dict[str, Any]]:
    """One question as verl's dataset builds it from a training row: the media, then the text."""
    if not (videos or images):
        return [{"role": "user", "content": text}]
    media: list[dict[str, Any]] = [{"type": "video", **entry_of(clip)} for clip in videos]
    media += [{"type": "image", "image": str(path)} for path in images]
    return [{"role": "user", "content": [*media, {"type": "text", "text": text}]}]


def media_of(item: Item, root: Path | None) -> tuple[list[AnyClip], list[Path]]:
    """Videos, or the parts of them that are meant, and images of a question.

    Args:
        item: The question.
        root: Folder of the media; None for that which the question names itself, if it does.

    Raises:
        DataError: there is no root, a path leads out of it, or there is no such file.
    """
    root = root or (Path(item.root) if item.root else None)
    if root is None:
        if item.video or item.images:
            raise DataError(f"{item.item_id}: has a video or images; give media_root=FOLDER, where they lie")
        return [], []
    videos: list[AnyClip] = []
    if item.video:
        path = media_path(root, item.video, VIDEO_ENDINGS)
        videos.append(path if item.span is None else Part(str(path), *item.span))
    return videos, [media_path(root, name) for name in item.images]


def media_path(root: Path, name: str, endings: Sequence[str] = ()) -> Path:
    """A file below the media root; ``endings`` are tried where the name alone is no file.

    Raises:
        DataError: the path leads out of the root, also by a symbolic link.
        ClipError: no such file.
    """
    # A frame folder is as good as a file: reading says what is wrong with it.
    candidates = [root / name, *(root / f"{name}{ending}" for ending in endings)]
    found = next((path for path in candidates if path.exists()), None)
    inside = root.resolve()
    if not (found or candidates[0]).resolve().is_relative_to(inside):
        raise DataError(
            f"{name}: leads out of the media root {root}; name media by their path below it, and let "
            "media_root be the folder that holds the files themselves"
        )
    if found is None:
        tried = f" (nor with {', '.join(endings)})" if endings else ""
        raise ClipError(f"{name}: no such file below the media root {root}{tried}; check media_root")
    return found
