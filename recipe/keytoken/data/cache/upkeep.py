"""Upkeep of a frame cache: what is in it, whether it is sound, and what can go.

Only files that the cache itself names are looked at, so a wrong folder costs nothing. All of this may run
beside processes that read and write: on a local file system a removed entry stays readable to those who have
mapped it. On a network file system it does not, so prune there when no run uses the cache.
"""

import contextlib
import re
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keytoken.data.cache.fingerprint import Fingerprints
from keytoken.data.cache.frame_file import (
    PARTIAL_SUFFIX,
    BrokenEntryError,
    OtherVersionError,
    read_header,
    verify_frames,
)

INDEX = "index"
SUFFIX = ".frames"

_CONTRACT = re.compile(r"[0-9a-f]{16,64}")
_ENTRY = re.compile(rf"[0-9a-f]{{40}}{re.escape(SUFFIX)}")
_PARTIAL = re.compile(rf"\.[0-9a-f]{{40}}{re.escape(SUFFIX)}\.[0-9a-f]{{32}}{re.escape(PARTIAL_SUFFIX)}")
# A partial file this old was left by a process that was killed.
_ABANDONED_S = 3600.0


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of the cache.

    Attributes:
        path: The file.
        contract: Digest of its sampling contract.
        num_bytes: Its size.
        used_s: When it was last used, in seconds of :func:`time.time`, to the hour.
    """

    path: Path
    contract: str
    num_bytes: int
    used_s: float


@dataclass(slots=True)
class Removed:
    """What pruning removed, or would remove: files and bytes by reason."""

    files: Counter[str] = field(default_factory=Counter)
    num_bytes: Counter[str] = field(default_factory=Counter)

    def add(self, reason: str, num_bytes: int) -> None:
        """Count one file."""
        self.files[reason] += 1
        self.num_bytes[reason] += num_bytes


def is_cache(folder: Path) -> bool:
    """Whether a folder holds what a cache begins with: an index or the folder of a contract."""
    return any((folder / INDEX).glob("[0-9a-f][0-9a-f]")) or any(
        _CONTRACT.fullmatch(below.name) and below.is_dir() for below in folder.glob("*")
    )


def entries(root: Path) -> Iterator[Entry]:
    """The entries of a cache, contract by contract."""
    for path, contract in _files(root, _ENTRY):
        with contextlib.suppress(FileNotFoundError):  # pruned meanwhile
            status = path.stat()
            yield Entry(path, contract, status.st_size, status.st_mtime)


def contract_fields(found: Iterable[Entry]) -> dict[str, Any] | None:
    """The contract of some entries, read from the first one that can be read."""
    for entry in found:
        with contextlib.suppress(OSError, BrokenEntryError, OtherVersionError):
            return read_header(entry.path).contract
    return None


def verify(found: Iterable[Entry]) -> Iterator[tuple[Entry, str | None]]:
    """Read entries in full and compare them with their checksums.

    Yields:
        Each entry, and what is wrong with it or None. An entry that is broken has been removed.
    """
    for entry in found:
        problem = None
        try:
            verify_frames(entry.path)
        except FileNotFoundError:
            continue  # pruned meanwhile
        except OtherVersionError as other:
            problem = f"{other}; it is ignored, and pruning removes it"
        except BrokenEntryError as broken:
            problem = f"{broken}; {_remove(entry.path)}"
        except OSError as unreadable:
            problem = str(unreadable)
        yield entry, problem


def _remove(path: Path) -> str:
    try:
        path.unlink(missing_ok=True)
    except OSError as problem:
        return f"it cannot be removed ({problem})"
    return "removed"


def prune(
    root: Path,
    *,
    unused_s: float | None = None,
    max_bytes: int | None = None,
    keep: Collection[str] | None = None,
    check_headers: bool = True,
    dry_run: bool = False,
    each: Callable[[Iterable[Entry]], Iterable[Entry]] = iter,
) -> Removed:
    """Remove what can go: what no reader would use, what killed writers left, and by choice more.

    Args:
        root: The cache.
        unused_s: Remove entries unused for longer than this.
        max_bytes: Then remove the least recently used ones until the rest is no larger than this.
        keep: Remove entries of all contracts but these, given by their digests.
        check_headers: Open every entry to find those of other versions and broken ones.
        dry_run: Remove nothing.
        each: Wraps the entries while they are looked at, for a progress bar.

    Returns:
        What was removed, or would have been.

    Raises:
        OSError: An entry cannot be removed.
    """
    removed, rest, now = Removed(), [], time.time()

    def remove(path: Path, reason: str, num_bytes: int) -> None:
        removed.add(reason, num_bytes)
        if not dry_run:
            path.unlink(missing_ok=True)

    for path, _ in _files(root, _PARTIAL):
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            if now - status.st_mtime > _ABANDONED_S:
                remove(path, "left by killed writers", status.st_size)
    for entry in each(entries(root)):
        reason = _reason(entry, now, unused_s, keep) or (_fault(entry) if check_headers else None)
        if reason is None:
            rest.append(entry)
        else:
            remove(entry.path, reason, entry.num_bytes)
    if max_bytes is not None:
        excess = sum(entry.num_bytes for entry in rest) - max_bytes
        for entry in sorted(rest, key=lambda entry: entry.used_s):
            if excess <= 0:
                break
            remove(entry.path, "least recently used", entry.num_bytes)
            excess -= entry.num_bytes
    return removed


def forget_lost(root: Path, dry_run: bool = False) -> int:
    """Remove the index's notes about clips that are gone; returns how many."""
    return Fingerprints(root / INDEX).forget_lost(dry_run)


def _reason(entry: Entry, now: float, unused_s: float | None, keep: Collection[str] | None) -> str | None:
    if keep is not None and entry.contract not in keep:
        return "other contract"
    if unused_s is not None and now - entry.used_s > unused_s:
        return "unused"
    return None


def _fault(entry: Entry) -> str | None:
    try:
        read_header(entry.path)
    except OtherVersionError:
        return "other version"
    except BrokenEntryError:
        return "broken"
    except OSError:  # removed meanwhile, or not ours to read: then a reader says so
        return None
    return None


def _files(root: Path, name: re.Pattern[str]) -> Iterator[tuple[Path, str]]:
    """Files of the cache's own layout whose names match, and the contract in whose folder they lie."""
    if not root.is_dir():
        return
    for contract in sorted(root.iterdir()):
        if not _CONTRACT.fullmatch(contract.name) or contract.is_symlink() or not contract.is_dir():
            continue
        for folder in sorted(contract.glob("[0-9a-f][0-9a-f]")):
            yield from (
                (file, contract.name) for file in sorted(folder.iterdir()) if name.fullmatch(file.name)
            )
