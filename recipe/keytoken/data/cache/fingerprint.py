"""Content hashes of clips: what a clip is called in the frame cache, wherever it lies.

Hashing a large file takes as long as reading it, so each hash is noted in a small file of its own, with what
the clip looked like then (size, times, inode). A note is written under another name and renamed, so readers
see all of it or nothing; one that cannot be read, or no longer fits, is as good as none.
"""

import contextlib
import hashlib
import json
import os
import stat
import time
import uuid
from pathlib import Path
from typing import Any

from keytoken.data.decoders import image
from keytoken.data.decoders.folder import RATE_FILE

# A file changed this recently may change again within one tick of its file system's clock, unseen.
_SETTLED_S = 2.0
_BLOCK_BYTES = 1 << 20


class Fingerprints:
    """Content hashes, each computed once for a file that stays as it is.

    Args:
        folder: Where the notes lie; made when the first one is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def of(self, source: Path) -> str | None:
        """Hex digest of a clip: of a file's bytes, or of the names and bytes of a folder of frames.

        The file's suffix counts as well, because reading goes by it: some suffixes make a clip an image.

        Returns:
            The digest; None for what is neither, such as a pipe, which must not be opened to find out.

        Raises:
            OSError: It is missing or cannot be read.
        """
        look = _look(source)
        if look is None:
            return None
        name = os.path.abspath(source)
        note = self._note(name)
        known = _read(note)
        if known.get("look") == look:
            return str(known["content"])
        content = _hash(source)
        changed_s = max((int(entry[3]) for entry in look), default=0) / 1e9
        if look == _look(source) and time.time() - changed_s > _SETTLED_S:
            _write(note, {"path": name, "look": look, "content": content})
        return content

    def forget_lost(self, dry_run: bool = False) -> int:
        """Remove the notes about files that are gone; returns how many."""
        lost = 0
        for note in self.folder.glob("??/*.json"):
            if not os.path.exists(_read(note).get("path", "")):
                lost += 1
                if not dry_run:
                    note.unlink(missing_ok=True)
        return lost

    def _note(self, name: str) -> Path:
        digest = hashlib.blake2b(os.fsencode(name), digest_size=16).hexdigest()
        return self.folder / digest[:2] / f"{digest}.json"


def _look(source: Path) -> list[list[int | str]] | None:
    """Name, size, mtime, ctime and inode of each file. Copying tools set an mtime back, nobody a ctime."""
    status = source.stat()
    if stat.S_ISREG(status.st_mode):
        files = {"": status}
    elif stat.S_ISDIR(status.st_mode):
        files = {name: (source / name).stat() for name in _members(source)}
    else:
        return None
    return [
        [name, found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
        for name, found in files.items()
    ]


def _members(folder: Path) -> list[str]:
    """What the reader of such folders looks at, and nothing else that may lie there."""
    names = (name for name in os.listdir(folder) if not name.startswith("."))
    return sorted(n for n in names if Path(n).suffix.lower() in image.SUFFIXES or n == RATE_FILE)


def _hash(source: Path) -> str:
    """A folder is hashed by name, size and bytes of each file, so that no two folders look like one."""
    if not source.is_dir():
        digest = hashlib.blake2b(digest_size=20, person=os.fsencode(source.suffix.lower())[:16])
        _feed(digest, source)
        return digest.hexdigest()
    digest = hashlib.blake2b(digest_size=20, person=b"folder")
    for name in _members(source):
        encoded = os.fsencode(name)
        digest.update(f"{len(encoded)} {(source / name).stat().st_size} ".encode() + encoded)
        _feed(digest, source / name)
    return digest.hexdigest()


def _feed(digest: "hashlib.blake2b", file: Path) -> None:
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)


def _read(note: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(note.read_bytes()))
    except (OSError, ValueError):  # none yet, or cut by a power failure
        return {}


def _write(note: Path, content: dict[str, Any]) -> None:
    """Write a note if that is possible: without it the file is hashed again, which costs time only."""
    partial = note.with_name(f".{note.name}.{uuid.uuid4().hex}.partial")
    with contextlib.suppress(OSError):
        try:
            note.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(content))
            partial.replace(note)
        finally:
            partial.unlink(missing_ok=True)
