"""One clip of the frame cache as a file: a header of whole pages, then the frames as raw bytes.

Layout, all numbers little-endian::

    8 bytes   b"KTFRAMES"
    4 bytes   where the frames begin, a multiple of 4096, so that they can be mapped into memory
    4 bytes   CRC-32 of everything between here and there
    JSON      version, contract, shape, checksum of the frames, and the clip's other fields; then zeros
    frames    uint8 RGB [T, C, H, W]

A file is complete or not there: it is written under another name in the same folder, flushed to the disk and
renamed. It is never changed afterwards, so processes may map it while another one writes it once more.
"""

import dataclasses
import hashlib
import json
import os
import struct
import uuid
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from keytoken.data.clips import Clip
from keytoken.data.contract import SamplingContract
from keytoken.errors import DataError

# Raise it when the layout changes, or when read_clip gives other frames for the same file and contract.
VERSION = 2  # 2: the rate of a part at a variable rate, and the note on a cut Matroska file
PARTIAL_SUFFIX = ".partial"  # of a file that is being written

_MAGIC = b"KTFRAMES"
_START = struct.Struct("<8sII")
_PAGE = 4096
# Of a clip everything is stored but the frames, which follow, and the path, which is the reader's.
_STORED = sorted(field.name for field in dataclasses.fields(Clip) if field.name not in ("frames", "path"))


class BrokenEntryError(DataError):
    """A file of the cache that is cut, changed or no such file."""


class OtherVersionError(DataError):
    """A file of the cache that another version of this code wrote."""


@dataclass(frozen=True, slots=True)
class Header:
    """What stands before the frames.

    Attributes:
        contract: Fields of the sampling contract.
        shape: T, C, H, W.
        checksum: Hex digest of the frames.
        fields: The clip's other fields.
        offset: Where the frames begin.
    """

    contract: dict[str, Any]
    shape: tuple[int, int, int, int]
    checksum: str
    fields: dict[str, Any]
    offset: int


def write_frames(target: Path, clip: Clip, contract: SamplingContract) -> int:
    """Store a clip.

    Args:
        target: The file; its folder is made if need be. A file of that name is replaced.
        clip: The clip.
        contract: The contract by which it was read.

    Returns:
        Bytes of the file.

    Raises:
        OSError: The disk is full or cannot be written; nothing is left behind.
    """
    frames = clip.frames.contiguous().numpy()
    fields = {name: getattr(clip, name) for name in _STORED}
    content = {
        "version": VERSION,
        "contract": asdict(contract),
        "shape": list(frames.shape),
        "checksum": _checksum(clip.frames),
        "fields": fields,
    }
    text = json.dumps(content).encode()
    offset = -(-(_START.size + len(text)) // _PAGE) * _PAGE
    text = text.ljust(offset - _START.size, b"\0")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f".{target.name}.{uuid.uuid4().hex}{PARTIAL_SUFFIX}"
    try:
        with partial.open("xb") as file:
            file.write(_START.pack(_MAGIC, offset, zlib.crc32(text)) + text)
            file.write(frames.data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return offset + frames.nbytes


def read_frames(source: Path, path: str) -> Clip:
    """The clip of a file. Its frames are mapped: pages are read when touched, shared between processes.

    The mapping is private: whoever writes into the frames changes a copy of that page, never the file.

    Args:
        source: The file of the cache.
        path: The clip's own path, for :attr:`Clip.path`.

    Raises:
        FileNotFoundError: There is no such file.
        BrokenEntryError: It is cut, or its header was changed.
        OtherVersionError: Another version of this code wrote it.
        OSError: It cannot be read.
    """
    mapped = _map(source)
    header = _header_of(mapped, source)
    fields = {name: _frozen(value) for name, value in header.fields.items()}
    return Clip(frames=mapped[header.offset :].view(header.shape), path=path, **fields)


def read_header(source: Path) -> Header:
    """The header of a file; errors as in :func:`read_frames`."""
    return _header_of(_map(source), source)


def verify_frames(source: Path) -> None:
    """Compare the frames of a file with their checksum; errors as in :func:`read_frames`."""
    mapped = _map(source)
    header = _header_of(mapped, source)
    if _checksum(mapped[header.offset :]) != header.checksum:
        raise BrokenEntryError(f"{source}: the frames differ from their checksum")


def _map(source: Path) -> torch.Tensor:
    """All bytes of a file, [N]. torch's mapping keeps no file open, unlike that of the standard library."""
    size = source.stat().st_size
    if size < _PAGE:
        raise BrokenEntryError(f"{source}: {size} bytes are less than a header")
    try:
        return torch.from_file(str(source), shared=False, size=size, dtype=torch.uint8)
    except RuntimeError as problem:  # torch's only kind of error
        if not source.exists():
            raise FileNotFoundError(str(source)) from problem  # removed a moment ago
        raise OSError(str(problem)) from problem


def _header_of(mapped: torch.Tensor, source: Path) -> Header:
    magic, offset, crc = _START.unpack(bytes(mapped[: _START.size].numpy()))
    if magic != _MAGIC or not 0 < offset <= len(mapped) or offset % _PAGE:
        raise BrokenEntryError(f"{source}: it does not begin as a file of the frame cache")
    text = bytes(mapped[_START.size : offset].numpy())
    if zlib.crc32(text) != crc:
        raise BrokenEntryError(f"{source}: the header was changed")
    content = json.loads(text.rstrip(b"\0"))
    if content["version"] != VERSION or sorted(content["fields"]) != _STORED:
        raise OtherVersionError(f"{source}: written by another version")
    frames, channels, height, width = content["shape"]
    if len(mapped) != offset + frames * channels * height * width:
        raise BrokenEntryError(f"{source}: {len(mapped)} bytes are not what its header says; it was cut")
    return Header(
        content["contract"], (frames, channels, height, width), content["checksum"], content["fields"], offset
    )


def _checksum(frames: torch.Tensor) -> str:
    return hashlib.blake2b(frames.contiguous().numpy().data, digest_size=16).hexdigest()


def _frozen(value: Any) -> Any:
    """JSON has no tuples; a clip's sequences are tuples."""
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value
