"""Tries every clip of a dataset before training and sets aside the rows whose clips cannot be read.

Each clip is decoded in a child process under a time limit: native decoders cannot be interrupted from
Python, a child can be killed. Clips that pass are later decoded in-process. Rows are dropped, counted
and listed with their reasons; no row is ever given another clip.
"""

import functools
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from keytoken.data.cache.store import Shape, clip_shape
from keytoken.data.child import ClipProcess
from keytoken.data.contract import SamplingContract
from keytoken.data.part import Part, named_clip
from keytoken.errors import ClipError, DataError


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
    """

    kept: list[int]
    quarantined: list[Quarantined]
    shapes: dict[str | Part, Shape]


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
) -> Scan:
    """Try each clip of each row once.

    Args:
        rows: Dataset rows.
        contract: The sampling contract.
        video_key: Column with the clips.
        limit_s: Seconds allowed for one clip.
        cache: Folder of a frame cache, which has all readable clips afterwards; None for none.

    Returns:
        What was found.
    """
    found: dict[str | Part, Shape | ClipError] = {}
    kept: list[int] = []
    quarantined: list[Quarantined] = []
    with ClipProcess(functools.partial(clip_shape, contract=contract, root=cache), limit_s) as probe:
        for number, row in enumerate(tqdm(rows, desc="checking clips", unit="row", mininterval=1.0)):
            for path in named_clips(row, video_key):
                if path not in found:
                    found[path] = _probe(probe, path)
                outcome = found[path]
                if isinstance(outcome, ClipError):
                    quarantined.append(Quarantined(number, str(path), str(outcome)))
                    break
            else:
                kept.append(number)
    shapes = {path: outcome for path, outcome in found.items() if not isinstance(outcome, ClipError)}
    return Scan(kept, quarantined, shapes)


def _probe(probe: ClipProcess[Shape], path: str | Part) -> Shape | ClipError:
    try:
        return probe.run(path)
    except ClipError as problem:
        return problem


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
