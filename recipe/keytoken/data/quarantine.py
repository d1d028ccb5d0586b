"""Tries every clip of a dataset before training and sets aside the rows whose clips cannot be read.

Each clip is decoded in a child process under a time limit: native decoders cannot be interrupted from
Python, a child can be killed. Clips that pass are later decoded in-process. Rows are dropped, counted
and listed with their reasons; no row is ever given another clip.
"""

import json
import multiprocessing
import multiprocessing.connection
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from keytoken.data.clips import read_clip
from keytoken.data.contract import SamplingContract
from keytoken.errors import ClipError, DataError

_START_LIMIT_S = 120.0  # for the child's imports, on a loaded machine
_START_METHOD = "spawn"  # a fork would copy the threads' locks of a training process


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


class ClipProbe:
    """Decodes clips in a child process that is killed when it takes too long. A context manager.

    Args:
        contract: The sampling contract.
        limit_s: Seconds allowed for one clip.
    """

    def __init__(self, contract: SamplingContract, limit_s: float) -> None:
        self.contract = contract
        self.limit_s = limit_s
        self._process: Any = None
        self._pipe: multiprocessing.connection.Connection[Any, Any] | None = None

    def __enter__(self) -> "ClipProbe":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def failure(self, path: str) -> str | None:
        """Why a clip cannot be read, or None if it can."""
        pipe = self._start()
        pipe.send(path)
        try:
            if pipe.poll(self.limit_s):
                answer: str | None = pipe.recv()
                return answer
        except EOFError:
            self._stop()
            return f"clip {path}: the decoder crashed; re-encode the clip or drop it from the dataset"
        self._stop()
        return f"clip {path}: not decoded within {self.limit_s:g} s; re-encode it or raise the limit"

    def _start(self) -> "multiprocessing.connection.Connection[Any, Any]":
        if self._pipe is None:
            context: Any = multiprocessing.get_context(_START_METHOD)
            self._pipe, child_end = context.Pipe()
            self._process = context.Process(target=_serve, args=(child_end, self.contract), daemon=True)
            self._process.start()
            child_end.close()
            if not self._pipe.poll(_START_LIMIT_S):
                self._stop()
                raise DataError(f"the clip decoder did not start within {_START_LIMIT_S:g} s")
            self._pipe.recv()
        return self._pipe

    def _stop(self) -> None:
        if self._pipe is not None:
            self._pipe.close()
            self._process.kill()
            self._process.join()
            self._pipe = self._process = None


def _serve(pipe: "multiprocessing.connection.Connection[Any, Any]", contract: SamplingContract) -> None:
    """The child: answers each path with None or a reason, until the parent hangs up."""
    pipe.send("ready")
    while True:
        try:
            path = pipe.recv()
        except EOFError:
            return
        try:
            read_clip(path, contract)
        except ClipError as error:
            pipe.send(str(error))
        else:
            pipe.send(None)


def clip_paths(row: dict[str, Any], video_key: str = "videos") -> list[str]:
    """Paths of a row's clips; empty for a text-only row.

    Raises:
        DataError: If an entry is neither a path nor a mapping with the key "video".
    """
    paths = []
    for entry in row.get(video_key) or ():
        path = entry.get("video") if isinstance(entry, dict) else entry
        if not isinstance(path, str):
            raise DataError(
                f"column {video_key!r} holds {type(path).__name__}; "
                "give a path or a mapping with the key 'video'"
            )
        paths.append(path.removeprefix("file://"))
    return paths


def scan_rows(
    rows: Iterable[dict[str, Any]],
    contract: SamplingContract,
    *,
    video_key: str = "videos",
    limit_s: float = 60.0,
) -> tuple[list[int], list[Quarantined]]:
    """Try each clip of each row once.

    Args:
        rows: Dataset rows.
        contract: The sampling contract.
        video_key: Column with the clips.
        limit_s: Seconds allowed for one clip.

    Returns:
        Numbers of the rows to keep, and the rows set aside.
    """
    known: dict[str, str | None] = {}
    kept: list[int] = []
    quarantined: list[Quarantined] = []
    with ClipProbe(contract, limit_s) as probe:
        for number, row in enumerate(tqdm(rows, desc="checking clips", unit="row", mininterval=1.0)):
            for path in clip_paths(row, video_key):
                if path not in known:
                    known[path] = probe.failure(path)
                reason = known[path]
                if reason is not None:
                    quarantined.append(Quarantined(number, path, reason))
                    break
            else:
                kept.append(number)
    return kept, quarantined


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
    kept, quarantined = scan_rows(table.to_pylist(), contract, video_key=video_key, limit_s=limit_s)
    _write_lines(quarantine_file, quarantined)
    if not kept:
        raise DataError(
            f"{source}: none of its {table.num_rows} rows has a readable clip; "
            f"the reasons are in {quarantine_file}"
        )
    partial = kept_file.with_suffix(f".{os.getpid()}.partial")
    pq.write_table(table.take(pa.array(kept)), partial)
    partial.replace(kept_file)
    return quarantined


def _write_lines(path: Path, quarantined: Sequence[Quarantined]) -> None:
    path.write_text("".join(json.dumps(asdict(row)) + "\n" for row in quarantined))
