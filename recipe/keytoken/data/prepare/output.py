"""Writes a prepared dataset: all of it appears under its name at once, or nothing does.

Files are written into a hidden folder beside the target, brought to the disk and renamed. What a killed run
leaves behind is such a hidden folder (``.NAME.partial-...``), which nothing reads and anybody may delete.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from keytoken.data.contract import SamplingContract
from keytoken.data.headers import full_hash
from keytoken.data.prepare.ledger import Ledger
from keytoken.data.prepare.report import as_json, as_markdown
from keytoken.data.prepare.rows import SCHEMA, to_row
from keytoken.data.prepare.settings import PrepareSettings
from keytoken.errors import ConfigurationError, DataError

_BATCH_ROWS = 1024
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_SIGN = "checksums.json"  # a folder without it was not written here


def check_target(out: Path, overwrite: bool) -> None:
    """Refuse a target that is there already, before any work is done.

    Raises:
        ConfigurationError: It exists, or is not a dataset that may be replaced.
    """
    if out.exists() and not out.is_dir():
        raise ConfigurationError(f"out={out} is a file; name a folder that does not exist yet")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not overwrite:
        raise ConfigurationError(
            f"out={out} exists; name another folder, or pass overwrite=true to replace the dataset in it"
        )
    if not (out / _SIGN).is_file():
        raise ConfigurationError(
            f"out={out} was not written by `keytoken data prepare` and is not replaced; name another folder"
        )


def write_dataset(
    out: Path,
    source: Path,
    ledger: Ledger,
    settings: PrepareSettings,
    contract: SamplingContract,
    failure: str | None,
) -> Path:
    """Write dataset, reports, quarantine and checksums; of a failed run the reports, into ``OUT.failed``.

    Args:
        out: Folder of the dataset.
        source: The file of questions.
        ledger: Where every row went.
        settings: The words of the command.
        contract: What vision tokens were counted by.
        failure: Why there will be no dataset; None if there will.

    Returns:
        The folder.

    Raises:
        DataError: The run failed, or the disk is full.
    """
    target = out.with_name(f"{out.name}.failed") if failure else out
    try:
        with _new_folder(target, replace=settings.overwrite or failure is not None) as folder:
            checksums: dict[str, Any] = {"source": {"file": str(source), "sha256": full_hash(source)}}
            if not failure:
                dataset = folder / f"{settings.split}.parquet"
                _write_rows(dataset, ledger, settings, contract)
                checksums["output"] = {"file": dataset.name, "sha256": full_hash(dataset)}
            checksums["media"] = _media_checksums(ledger)
            _write_lines(folder / "quarantine.jsonl", (asdict(entry) for entry in ledger.quarantined))
            if settings.against:
                _write_lines(folder / "overlap.jsonl", (asdict(each) for each in ledger.overlaps))
            facts = as_json(ledger, settings, contract, source)
            (folder / "report.json").write_text(_json(facts), encoding="utf-8")
            (folder / "report.md").write_text(as_markdown(facts), encoding="utf-8")
            (folder / _SIGN).write_text(_json(checksums), encoding="utf-8")
    except OSError as error:
        if error.errno in _FULL:
            raise DataError(
                f"{target}: the disk is full, or over a quota; nothing was left there. Make room, or choose "
                "another out="
            ) from error
        raise DataError(f"{target} cannot be written ({error}); choose another out=") from error
    if failure:
        raise DataError(f"{failure}. The report is in {target}")
    shutil.rmtree(out.with_name(f"{out.name}.failed"), ignore_errors=True)  # of an earlier try
    return target


@contextmanager
def _new_folder(target: Path, replace: bool) -> Iterator[Path]:
    """A folder to write to, which becomes the target when the block ends without an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    partial.mkdir()
    try:
        yield partial
        for file in [*partial.iterdir(), partial]:
            _sync(file)
        old = target.with_name(f".{target.name}.old-{os.getpid()}")
        if replace and target.exists():
            target.rename(old)
        try:
            partial.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
        _sync(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_rows(path: Path, ledger: Ledger, settings: PrepareSettings, contract: SamplingContract) -> None:
    fields: dict[str, Any] = {
        "split": settings.split,
        "style": settings.style,
        "sampling_digest": contract.digest(),
        "decoded": settings.check == "decode",
    }
    with pq.ParquetWriter(path, SCHEMA) as writer:
        for start in range(0, len(ledger.entries), _BATCH_ROWS):
            rows = [
                to_row(entry, index, **fields)
                for index, entry in enumerate(ledger.entries[start : start + _BATCH_ROWS], start=start)
            ]
            writer.write_table(pa.Table.from_pylist(rows, schema=SCHEMA))


def _media_checksums(ledger: Ledger) -> dict[str, dict[str, Any]]:
    checksums = {}
    for entry in ledger.entries:
        if entry.header is not None:
            parts = {"bytes": entry.header.num_bytes, "quick": entry.header.quick}
            if entry.header.sha256:
                parts["sha256"] = entry.header.sha256
            checksums[entry.media] = parts
    return dict(sorted(checksums.items()))


def _write_lines(path: Path, entries: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for entry in entries:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")


def _json(content: Any) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"
