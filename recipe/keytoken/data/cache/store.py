"""The frame cache: each clip is decoded once for a sampling contract, whoever asks and from wherever.

An entry is found by what the clip holds, not by where it lies (a hash of its bytes and, of a part of a clip,
of its ends), and by the contract::

    <root>/<contract digest>/<first two digits>/<content hash>.frames    see keytoken.data.cache.frame_file
    <root>/index/...                                                     see keytoken.data.cache.fingerprint

There are no locks. Two processes that miss the same entry both decode and both write it; the later rename
wins, with the same bytes. An entry that is cut or has a broken header is removed, counted and decoded again.

A cache is a convenience: if it cannot be written (disk full, quota, read-only), the decoded clip is used, the
case is counted, and the first one is logged with its remedy.

An entry's time of change is when it was last used, to the hour: the cache sets it itself, because file
systems are often mounted without times of access. Pruning goes by it (:mod:`keytoken.data.cache.upkeep`).
"""

import contextlib
import functools
import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from keytoken.data.cache.fingerprint import Fingerprints
from keytoken.data.cache.frame_file import (
    BrokenEntryError,
    OtherVersionError,
    read_frames,
    read_header,
    write_frames,
)
from keytoken.data.cache.upkeep import INDEX, SUFFIX, prune
from keytoken.data.clips import Clip, read_clip
from keytoken.data.contract import SamplingContract
from keytoken.data.part import AnyClip, Part, clip_path
from keytoken.errors import ClipError, ConfigurationError, DataError

logger = logging.getLogger(__name__)

Read = Callable[[AnyClip, SamplingContract], Clip]
Shape = tuple[int, int, int, int]  # T, C, H, W

_STAMP_INTERVAL_S = 3600.0
# With a limit, the size is taken again whenever this share of it was written since.
_LIMIT_PARTS = 20


@dataclass(slots=True)
class CacheStatistics:
    """What this process has read.

    Attributes:
        hits: Clips found in the cache.
        misses: Clips not found, or found broken.
        decodes: Clips decoded, misses or not cached at all.
        decoded_bytes: Their frames, in bytes.
        cached_bytes: The frames of the hits.
        broken: Entries removed because they were cut or changed.
        unstored: Clips decoded that could not be stored.
    """

    hits: int = 0
    misses: int = 0
    decodes: int = 0
    decoded_bytes: int = 0
    cached_bytes: int = 0
    broken: int = 0
    unstored: int = 0

    def add(self, other: "CacheStatistics") -> None:
        """Count what another one counted."""
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)


class FrameCache:
    """Clips by way of the cache.

    Args:
        root: The cache's folder, made when the first entry is written; may be shared by processes and, on a
            common file system, by machines.
        max_bytes: Entries beyond this are removed, least recently used first; None for no limit. Several
            writers may exceed it by a twentieth each.
        read: What decodes a clip that is not there.

    Attributes:
        statistics: What this object has read.

    Raises:
        ConfigurationError: ``root`` is a file.
    """

    def __init__(
        self, root: str | os.PathLike[str], max_bytes: int | None = None, read: Read = read_clip
    ) -> None:
        self.root = Path(root).expanduser()
        if os.path.exists(self.root) and not os.path.isdir(self.root):
            raise ConfigurationError(f"frame cache {self.root}: is a file; name a folder")
        self.max_bytes = max_bytes
        self.statistics = CacheStatistics()
        self._read = read
        self._fingerprints = Fingerprints(self.root / INDEX)
        self._lock = threading.Lock()
        self._unmeasured_bytes = max_bytes or 0  # written since the size was taken; at first, anything
        self._warned = False

    def read_through(self, path: AnyClip, contract: SamplingContract) -> Clip:
        """A clip, from the cache or decoded and stored.

        Args:
            path: The clip, or a part of one.
            contract: The sampling contract.

        Returns:
            What :func:`keytoken.data.clips.read_clip` returns, tensor by tensor. Frames from the cache are
            mapped; writing into them changes a private copy.

        Raises:
            ClipError: The clip cannot be read. A cache that cannot be written raises nothing.
        """
        return self.fetch(path, contract)[0]

    def fetch(self, path: AnyClip, contract: SamplingContract) -> tuple[Clip, CacheStatistics]:
        """As :meth:`read_through`, with the counts of this one clip."""
        counts = CacheStatistics()
        entry = self.entry(path, contract)
        clip = None if entry is None else self._load(entry, path, counts)
        if clip is None:
            clip = self._decode(path, contract, counts)
            # A file that changed meanwhile would be stored under the name of what it was.
            if entry is not None and entry == self.entry(path, contract):
                try:
                    self.store(entry, clip, contract)
                except OSError as problem:
                    counts.unstored += 1
                    self._warn(problem)
        with self._lock:
            self.statistics.add(counts)
        return clip, counts

    def add(self, path: AnyClip, contract: SamplingContract) -> int:
        """Decode and store a clip that the cache does not have.

        Returns:
            Bytes written; 0 if it was there.

        Raises:
            ClipError: The clip cannot be read.
            DataError: The cache cannot be written.
        """
        if self.has(path, contract):
            return 0
        entry = self.entry(path, contract)
        clip = self._read(path, contract)
        if entry is None or entry != self.entry(path, contract):
            raise ClipError(f"clip {path}: is no file, or is being written; add it when it is complete")
        try:
            return self.store(entry, clip, contract)
        except OSError as problem:
            raise DataError(
                f"frame cache {self.root}: {problem}; free space (keytoken data cache prune), see to its "
                "permissions or name another folder; the same command then goes on with the rest"
            ) from problem

    def has(self, path: AnyClip, contract: SamplingContract) -> bool:
        """Whether a clip would be a hit."""
        entry = self.entry(path, contract)
        with contextlib.suppress(OSError, BrokenEntryError, OtherVersionError):
            if entry is not None:
                read_header(entry)
                return True
        return False

    def entry(self, path: AnyClip, contract: SamplingContract) -> Path | None:
        """Where a clip's entry is or would be; None for what cannot be hashed, which reading will explain."""
        try:
            content = self._fingerprints.of(clip_path(path))
        except (OSError, ValueError):  # ValueError: a zero byte in the name
            return None
        if content is None:
            return None
        if isinstance(path, Part):
            text = f"{content} {float(path.start_s)!r} {float(path.end_s)!r}"
            content = hashlib.blake2b(text.encode(), digest_size=20, person=b"part").hexdigest()
        return self.root / contract.digest() / content[:2] / f"{content}{SUFFIX}"

    def store(self, entry: Path, clip: Clip, contract: SamplingContract) -> int:
        """Write an entry, keep to the limit, and return the bytes written.

        Raises:
            OSError: The disk is full or cannot be written.
        """
        written = write_frames(entry, clip, contract)
        due = False
        if self.max_bytes is not None:
            with self._lock:
                self._unmeasured_bytes += written
                due = self._unmeasured_bytes > self.max_bytes // _LIMIT_PARTS
                self._unmeasured_bytes = 0 if due else self._unmeasured_bytes
        if due:
            prune(self.root, max_bytes=self.max_bytes, check_headers=False)
        return written

    def _load(self, entry: Path, path: AnyClip, counts: CacheStatistics) -> Clip | None:
        try:
            clip = read_frames(entry, str(clip_path(path)))  # as read_clip writes it
        except (FileNotFoundError, OtherVersionError):
            counts.misses += 1
            return None
        except BrokenEntryError as problem:
            logger.warning("%s; removed, the clip is decoded again", problem)
            counts.misses += 1
            counts.broken += 1
            with contextlib.suppress(OSError):
                entry.unlink()
            return None
        except OSError as problem:
            counts.misses += 1
            self._warn(problem)
            return None
        counts.hits += 1
        counts.cached_bytes += clip.frames.nbytes
        _stamp(entry)
        return clip

    def _decode(self, path: AnyClip, contract: SamplingContract, counts: CacheStatistics) -> Clip:
        clip = self._read(path, contract)
        counts.decodes += 1
        counts.decoded_bytes += clip.frames.nbytes
        return clip

    def _warn(self, problem: OSError) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "frame cache %s: %s. Clips are decoded without it, which costs time only. Free space "
                "(keytoken data cache prune), or see to its permissions. Said once; later cases are counted.",
                self.root,
                problem,
            )


@functools.cache
def frame_cache(root: str) -> FrameCache:
    """The cache of a folder, one for this process."""
    return FrameCache(root)


def clip_shape(path: AnyClip, contract: SamplingContract, root: str | None) -> Shape:
    """Shape of a clip's frames, which are read by way of the cache in ``root`` if there is one."""
    read = read_clip if root is None else frame_cache(root).read_through
    frames, channels, height, width = read(path, contract).frames.shape
    return frames, channels, height, width


def add_clip(path: AnyClip, contract: SamplingContract, root: str) -> int:
    """:meth:`FrameCache.add` for the cache of a folder."""
    return frame_cache(root).add(path, contract)


def _stamp(entry: Path) -> None:
    """Note that an entry was used; a cache that cannot be written keeps its old times."""
    with contextlib.suppress(OSError):
        if time.time() - entry.stat().st_mtime > _STAMP_INTERVAL_S:
            os.utime(entry)
