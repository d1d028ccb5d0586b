"""Tries every clip of a dataset before training and sets aside the rows whose clips cannot be read.

Each clip is decoded in a child process under a time limit: native decoders cannot be interrupted from
Python, a child can be killed. Clips that pass are later decoded in-process. Rows are dropped, counted
and listed with their reasons; no row is ever given another clip.
"""

import functools
import json
import os
from collections.abc import Container, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from keytoken.data.cache.store import Shape, clip_shape
from keytoken.data.child import clip_processes
from keytoken.data.contract import SamplingContract
from keytoken.data.headers import quick_hash
from keytoken.data.part import Part, clip_path, named_clip
from keytoken.errors import ClipError, DataError

_MOST_JOBS = 8
_CLIPS_FOR_A_CHILD = 64  # a child's imports take as long as decoding about so many short clips


@dataclass(frozen=True)
class Quarantined:
    """A row that was set aside.

    Attributes:
        row: Its number in the dataset.
        path: The clip that cannot be read.
        reason: Why not.
    """

    row: int
    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class Scan:
    """What a scan found.

    Attributes:
        kept: Numbers of the rows whose clips can all be read.
        quarantined: The others, with their reasons.
        shapes: T, C, H, W of the frames of each clip, or part of one, that can be read.
        unchanged: Numbers of the known rows that were kept undecoded, since their clips are as they were.
    """

    kept: list[int]
    quarantined: list[Quarantined]
    shapes: dict[str | Part, Shape]
    unchanged: frozenset[int] = frozenset()


def named_clips(row: dict[str, Any], video_key: str = "videos") -> list[str | Part]:
    """A row's clips or parts of clips; none for a text-only row.

    Raises:
        DataError: If an entry is neither a path nor a mapping with the key "video".
    """
    entries = row.get(video_key) or ()
    try:
        return [named_clip(entry if isinstance(entry, dict) else {"video": entry}) for entry in entries]
    except DataError as problem:
        raise DataError(f"column {video_key!r}: {problem}") from problem


def scan_rows(
    rows: Iterable[dict[str, Any]],
    contract: SamplingContract,
    *,
    video_key: str = "videos",
    limit_s: float = 60.0,
    cache: str | None = None,
    jobs: int | None = None,
    known: Container[int] = (),
) -> Scan:
    """Try each clip of each row once.

    Args:
        rows: Dataset rows.
        contract: The sampling contract.
        video_key: Column with the clips.
        limit_s: Seconds allowed for one clip.
        cache: Folder of a frame cache, which has all readable clips afterwards; None for none.
        jobs: Clips decoded at once, each in a process of its own; None for one a core, at most 8,
            and fewer for few clips.
        known: Numbers of rows whose clips were decoded before. A row with one clip that has the content its
            ``extra_info`` says is not decoded again; all others are.

    Returns:
        What was found.
    """
    kept: list[int] = []
    quarantined: list[Quarantined] = []
    clips_of: dict[int, list[str | Part]] = {}
    contents: dict[int, str | None] = {}
    for number, row in enumerate(rows):
        try:
            clips_of[number] = named_clips(row, video_key)
        except DataError as problem:
            quarantined.append(Quarantined(number, str(row.get(video_key)), str(problem)))
            continue
        if number in known:
            contents[number] = (row.get("extra_info") or {}).get("content")
    unchanged = _unchanged(clips_of, contents)
    wanted = dict.fromkeys(
        clip for number, clips in clips_of.items() if number not in unchanged for clip in clips
    )
    found = _decoded(list(wanted), contract, limit_s, cache, jobs)
    for number, clips in clips_of.items():
        for clip in clips if number not in unchanged else ():
            if isinstance(reason := found[clip], ClipError):
                quarantined.append(Quarantined(number, str(clip), str(reason)))
                break
        else:
            kept.append(number)
    quarantined.sort(key=lambda row: row.row)
    shapes = {clip: outcome for clip, outcome in found.items() if not isinstance(outcome, ClipError)}
    return Scan(kept, quarantined, shapes, unchanged)


def _decoded(
    clips: list[str | Part], contract: SamplingContract, limit_s: float, cache: str | None, jobs: int | None
) -> dict[str | Part, Shape | ClipError]:
    """The shape of each clip, or why there is none."""
    found: dict[str | Part, Shape | ClipError] = {}
    if not clips:
        return found
    if jobs is None:
        jobs = min(os.cpu_count() or 1, _MOST_JOBS, -(-len(clips) // _CLIPS_FOR_A_CHILD))
    work = functools.partial(clip_shape, contract=contract, root=cache)
    with clip_processes(work, limit_s, jobs) as submit:
        futures = {submit(clip): clip for clip in clips}
        finished = as_completed(futures)
        for future in tqdm(finished, total=len(clips), desc="checking clips", unit="clip", mininterval=1.0):
            found[futures[future]] = future.result()
    return found


def _unchanged(
    clips_of: Mapping[int, Sequence[str | Part]], contents: Mapping[int, str | None]
) -> frozenset[int]:
    """Numbers of the rows whose clips have the content that the rows say, as when they were prepared."""
    paths = dict.fromkeys(clip_path(clip) for number in contents for clip in clips_of[number])
    with ThreadPoolExecutor(_MOST_JOBS) as pool:  # they wait for the file system
        hashed = tqdm(pool.map(_content, paths), "comparing clips", len(paths), unit="clip", mininterval=1.0)
        found = dict(zip(paths, hashed, strict=True))
    return frozenset(
        number
        for number, content in contents.items()
        if all(content and found[clip_path(clip)] == content for clip in clips_of[number])
    )


def _content(path: Path) -> str | None:
    """A clip's quick hash; None if there is none, which decoding it will explain."""
    try:
        return quick_hash(path) if path.is_dir() or path.is_file() else None
    except (OSError, ValueError, DataError):  # closed to us; a zero byte in the name; a folder without frames
        return None


def scan_parquet(
    source: Path,
    contract: SamplingContract,
    *,
    kept_file: Path,
    quarantine_file: Path,
    video_key: str = "videos",
    limit_s: float = 60.0,
) -> list[Quarantined]:
    """Split a dataset into readable rows (parquet) and a quarantine list (one JSON object a line).

    Args:
        source: Parquet file.
        contract: The sampling contract.
        kept_file: Where the readable rows go, unchanged and in order.
        quarantine_file: Where the list of rows set aside goes; written even if it is empty.
        video_key: Column with the clips.
        limit_s: Seconds allowed for one clip.

    Returns:
        The rows set aside.

    Raises:
        DataError: If no row is left.
    """
    table = pq.read_table(source)
    scan = scan_rows(table.to_pylist(), contract, video_key=video_key, limit_s=limit_s)
    _write_lines(quarantine_file, scan.quarantined)
    if not scan.kept:
        raise DataError(
            f"{source}: none of its {table.num_rows} rows has a readable clip; "
            f"the reasons are in {quarantine_file}"
        )
    partial = kept_file.with_suffix(f".{os.getpid()}.partial")
    pq.write_table(table.take(pa.array(scan.kept)), partial)
    partial.replace(kept_file)
    return scan.quarantined


def _write_lines(path: Path, quarantined: Sequence[Quarantined]) -> None:
    path.write_text("".join(json.dumps(asdict(row)) + "\n" for row in quarantined))
