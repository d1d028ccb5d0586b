"""Fills a frame cache before a run: finds the clips of some sources and decodes them in killable children."""

import functools
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from keytoken.data.cache.store import add_clip
from keytoken.data.child import clip_processes
from keytoken.data.contract import SamplingContract
from keytoken.data.decoders import image
from keytoken.data.part import Part
from keytoken.data.quarantine import named_clips
from keytoken.errors import ClipError, DataError

# Files of a folder that are taken for clips; everything else in it is left alone.
CLIP_SUFFIXES = frozenset(
    {".mp4", ".mkv", ".mov", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".flv", ".wmv"}
)


@dataclass(slots=True)
class Built:
    """What a build did.

    Attributes:
        num_stored: Clips decoded and stored.
        num_present: Clips that were there before, or whose content another clip of this build has.
        num_bytes: Bytes written.
        failures: Clips that cannot be read, with the reasons, in the order of the clips.
    """

    num_stored: int = 0
    num_present: int = 0
    num_bytes: int = 0
    failures: dict[str | Part, str] = field(default_factory=dict)


def find_clips(sources: Sequence[str], video_key: str = "videos") -> list[str | Part]:
    """The clips of some sources, and parts of clips that datasets name, each once, in order.

    Args:
        sources: Datasets (.parquet), lists (.txt, one path a line, relative to the list), folders (searched
            to any depth) and clips.
        video_key: Column of a dataset with the clips.

    Raises:
        DataError: A source is missing, is of another kind, or has no clips.
    """
    found: dict[str | Part, None] = {}
    for source in sources:
        clips = list(_clips_of(Path(source).expanduser(), video_key))
        if not clips:
            raise DataError(f"{source}: has no clips; {_hint(Path(source).expanduser())}{_KINDS}")
        found.update(dict.fromkeys(clips))
    return list(found)


def build(
    clips: Sequence[str | Part], contract: SamplingContract, root: Path, *, jobs: int, limit_s: float
) -> Built:
    """Store clips that the cache does not have. Interrupted, it goes on where it was when it is run again.

    Args:
        clips: Paths, or parts of clips.
        contract: The sampling contract.
        root: The cache.
        jobs: Clips decoded at once, each in a process of its own.
        limit_s: Seconds allowed for one clip.

    Raises:
        DataError: The cache cannot be written; what was stored stays.
    """
    built = Built()
    work = functools.partial(add_clip, contract=contract, root=str(root))
    with clip_processes(work, limit_s, jobs) as submit:
        futures = {submit(clip): clip for clip in clips}
        finished = as_completed(futures)
        for future in tqdm(finished, total=len(clips), desc="caching clips", unit="clip", mininterval=1.0):
            outcome = future.result()
            if isinstance(outcome, ClipError):
                built.failures[futures[future]] = str(outcome)
            else:
                built.num_stored += outcome > 0
                built.num_present += outcome == 0
                built.num_bytes += outcome
    built.failures = {clip: built.failures[clip] for clip in clips if clip in built.failures}
    return built


def write_failures(target: Path, failures: dict[str | Part, str]) -> None:
    """List the clips that cannot be read, one JSON object a line, replacing an earlier list."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    lines = (json.dumps({"path": str(clip), "reason": reason}) + "\n" for clip, reason in failures.items())
    partial.write_text("".join(lines), encoding="utf-8")
    partial.replace(target)


_KINDS = "give a .parquet dataset, a .txt list of paths, a folder of clips, or a clip"


def _hint(source: Path) -> str:
    """What to do with a folder that is itself a clip."""
    if not (source.is_dir() and any(file.suffix.lower() in image.SUFFIXES for file in source.iterdir())):
        return ""
    return "a folder of frames is named by a row of a dataset or a line of a .txt list; "


def _clips_of(source: Path, video_key: str) -> Iterator[str | Part]:
    if source.is_dir():
        yield from (str(path) for path in sorted(source.rglob("*")) if path.suffix.lower() in CLIP_SUFFIXES)
    elif not source.exists():
        raise DataError(f"{source}: no such file or folder; {_KINDS}")
    elif source.suffix == ".parquet":
        yield from _clips_of_dataset(source, video_key)
    elif source.suffix == ".txt":
        text = source.read_text(encoding="utf-8", errors="surrogateescape").removeprefix("\ufeff")
        yield from (str(source.parent / line.strip()) for line in text.split("\n") if line.strip())
    elif source.suffix.lower() in CLIP_SUFFIXES:
        yield str(source)
    else:
        raise DataError(f"{source}: is of no known kind; {_KINDS}")


def _clips_of_dataset(source: Path, video_key: str) -> Iterator[str | Part]:
    try:
        file = pq.ParquetFile(source)
        if video_key not in file.schema_arrow.names:
            raise DataError(
                f"{source}: has no column {video_key!r} but {', '.join(file.schema_arrow.names)}; "
                "set video_key=NAME"
            )
        number = 0
        for batch in file.iter_batches(columns=[video_key]):
            for row in batch.to_pylist():
                try:
                    yield from named_clips(row, video_key)
                except DataError as problem:
                    raise DataError(f"{source}: row {number}: {problem}") from problem
                number += 1
    except (OSError, pa.ArrowException) as problem:
        raise DataError(f"{source}: cannot be read as Parquet ({problem}); write it again") from problem
