"""The frame cache: the same frames as without it, whatever happens to its files, its disk or its writers."""

from __future__ import annotations

import dataclasses
import errno
import logging
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from keytoken.data.cache import fingerprint, frame_file, upkeep
from keytoken.data.cache.frame_file import BrokenEntryError, read_frames, verify_frames, write_frames
from keytoken.data.cache.store import CacheStatistics, FrameCache
from keytoken.data.clips import Clip, read_clip
from keytoken.data.contract import SamplingContract
from keytoken.demo.render import write_clip
from keytoken.errors import ClipError, ConfigurationError, DataError

CONTRACT = SamplingContract(max_frames=8, min_pixels=56 * 56, max_pixels=56 * 56)
LARGE = SamplingContract(max_frames=8, min_pixels=112 * 112, max_pixels=112 * 112)
AS_ROOT = os.geteuid() == 0
REAL_CLIPS = [
    "av1.mkv",
    "demo_4.mp4",
    "h265.mp4",
    "non_zero_start.mp4",
    "real_short.mp4",
    "rotated_90.mov",
    "unordered.mov",
    "vp9_odd_width.mp4",
]


def draw(path: Path, seed: int = 0, size: int = 56) -> str:
    frames = np.random.default_rng(seed).integers(0, 256, (8, size, size, 3), dtype=np.uint8)
    write_clip(path, frames)
    return str(path)


@pytest.fixture
def clip(tmp_path: Path) -> str:
    return draw(tmp_path / "clip.mp4")


@pytest.fixture
def cache(tmp_path: Path) -> FrameCache:
    return FrameCache(tmp_path / "cache")


def files(root: Path) -> list[Path]:
    """Every file below a folder but the index's."""
    return sorted(path for path in root.rglob("*") if path.is_file() and "index" not in path.parts)


def only_file(cache: FrameCache) -> Path:
    (file,) = files(cache.root)
    return file


def assert_same(found: Clip, expected: Clip) -> None:
    assert torch.equal(found.frames, expected.frames)
    for field in dataclasses.fields(Clip):
        if field.name != "frames":
            assert getattr(found, field.name) == getattr(expected, field.name), field.name
    assert found.metadata() == expected.metadata()
    assert (found.frames.dtype, found.frames.is_contiguous()) == (torch.uint8, True)


@pytest.mark.parametrize("contract", [CONTRACT, LARGE], ids=["small", "large"])
def test_the_second_reading_is_the_first_one(
    cache: FrameCache, clip: str, contract: SamplingContract
) -> None:
    expected = read_clip(clip, contract)
    for path in (clip, f"{Path(clip).parent}//./{Path(clip).name}"):
        assert_same(cache.read_through(path, contract), expected)
    size = expected.frames.nbytes
    assert cache.statistics == CacheStatistics(
        hits=1, misses=1, decodes=1, decoded_bytes=size, cached_bytes=size
    )
    assert len(files(cache.root)) == 1


@pytest.mark.parametrize("name", REAL_CLIPS)
def test_real_clips_come_back_exactly(name: str, cache: FrameCache, shared_data: Path) -> None:
    path, contract = str(shared_data / "videos" / name), SamplingContract(max_pixels=200 * 28 * 28)
    expected = read_clip(path, contract)
    cache.read_through(path, contract)
    assert_same(cache.read_through(path, contract), expected)
    assert cache.statistics.hits == 1


def test_mapped_frames_are_private_and_survive_what_others_do(cache: FrameCache, clip: str) -> None:
    """Writable without a warning of torch, picklable, and still there when the entry is pruned."""
    cache.read_through(clip, CONTRACT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one, two = (cache.read_through(clip, CONTRACT).frames for _ in range(2))
        before = two.clone()
        one.fill_(7)
        assert one.numpy().flags.writeable
    assert torch.equal(two, before)
    assert torch.equal(cache.read_through(clip, CONTRACT).frames, before)
    verify_frames(only_file(cache))
    assert torch.equal(pickle.loads(pickle.dumps(two)), before)
    only_file(cache).unlink()
    assert torch.equal(two, before)


def test_a_mapped_clip_keeps_no_file_open(cache: FrameCache, clip: str) -> None:
    """A batch of a thousand prompts must not meet the limit on open files."""
    cache.read_through(clip, CONTRACT)
    before = len(os.listdir("/proc/self/fd"))
    held = [cache.read_through(clip, CONTRACT) for _ in range(20)]
    assert len(os.listdir("/proc/self/fd")) == before
    assert len(held) == cache.statistics.hits


def moved(clip: str, folder: Path) -> str:
    return str(shutil.move(clip, folder / "elsewhere.mp4"))


def copied(clip: str, folder: Path) -> str:
    return str(shutil.copy(clip, folder / "copy.mp4"))


def linked(clip: str, folder: Path) -> str:
    (folder / "link.mp4").symlink_to(clip)
    return str(folder / "link.mp4")


def touched(clip: str, _: Path) -> str:
    os.utime(clip, (1, 1))
    return clip


@pytest.mark.parametrize("change", [moved, copied, linked, touched])
def test_the_same_content_is_the_same_entry(
    cache: FrameCache, clip: str, tmp_path: Path, change: Callable[[str, Path], str]
) -> None:
    expected = cache.read_through(clip, CONTRACT)
    path = change(clip, tmp_path)
    found = cache.read_through(path, CONTRACT)
    assert_same(found, dataclasses.replace(expected, path=path))
    assert (cache.statistics.hits, len(files(cache.root))) == (1, 1)


def test_changed_content_is_another_entry(
    cache: FrameCache, clip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if size and time of change are those of before, as after a copy that preserves times."""
    monkeypatch.setattr(fingerprint, "_SETTLED_S", -1.0)  # what was written a moment ago is trusted
    cache.read_through(clip, CONTRACT)
    status, content = os.stat(clip), bytearray(Path(clip).read_bytes())
    other = Path(draw(tmp_path / "other.mp4", seed=1)).read_bytes()
    assert abs(len(other) - len(content)) < 2000
    with open(clip, "r+b") as file:  # the same inode
        file.write(other[: status.st_size].ljust(status.st_size, b"\0"))
    os.utime(clip, ns=(status.st_atime_ns, status.st_mtime_ns))
    after = os.stat(clip)
    for name in ("st_size", "st_mtime_ns", "st_ino"):
        assert getattr(after, name) == getattr(status, name)
    assert cache.entry(clip, CONTRACT) not in files(cache.root)


def test_a_file_that_changes_while_it_is_decoded_is_not_stored(tmp_path: Path, clip: str) -> None:
    def read(path: str, contract: SamplingContract) -> Clip:
        found = read_clip(path, contract)
        draw(Path(path), seed=1)
        return found

    cache = FrameCache(tmp_path / "cache", read=read)
    cache.read_through(clip, CONTRACT)
    assert files(cache.root) == []
    assert_same(FrameCache(tmp_path / "cache").read_through(clip, CONTRACT), read_clip(clip, CONTRACT))


def test_a_file_is_hashed_once(cache: FrameCache, clip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Path] = []
    genuine = fingerprint._hash
    monkeypatch.setattr(fingerprint, "_hash", lambda path: hashed.append(path) or genuine(path))
    cache.read_through(clip, CONTRACT)
    assert len(hashed) == 2  # written a moment ago, it may change again unseen: once more after decoding
    monkeypatch.setattr(fingerprint, "_SETTLED_S", -1.0)
    for _ in range(3):
        FrameCache(cache.root).read_through(clip, LARGE)
    assert len(hashed) == 3


def test_another_contract_is_another_entry(cache: FrameCache, clip: str) -> None:
    for contract in (CONTRACT, LARGE):
        assert_same(cache.read_through(clip, contract), read_clip(clip, contract))
    assert (cache.statistics.misses, cache.statistics.hits) == (2, 0)
    assert len({file.parts[-3] for file in files(cache.root)}) == 2


def test_a_folder_of_frames_is_one_clip(cache: FrameCache, tmp_path: Path) -> None:
    from PIL import Image

    folder = tmp_path / "frames"
    folder.mkdir()
    for number in range(4):
        Image.new("RGB", (56, 56), (number, 0, 0)).save(folder / f"{number}.png")
    expected = read_clip(folder, CONTRACT)
    assert expected.frames[:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    cache.read_through(str(folder), CONTRACT)
    assert_same(cache.read_through(str(folder), CONTRACT), expected)
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    first = cache.entry(str(folder), CONTRACT)
    for stranger in ("notes.txt", ".hidden.png"):
        (copy / stranger).write_text("no frame")
    assert cache.entry(str(copy), CONTRACT) == first
    (copy / "fps.txt").write_text("8")
    second = cache.entry(str(copy), CONTRACT)
    (copy / "fps.txt").unlink()
    (copy / "3.png").rename(copy / "4.png")
    third = cache.entry(str(copy), CONTRACT)
    assert len({first, second, third}) == 3


def cut(entry: Path) -> None:
    os.truncate(entry, entry.stat().st_size - 1)


def cut_in_the_header(entry: Path) -> None:
    os.truncate(entry, 100)


def emptied(entry: Path) -> None:
    os.truncate(entry, 0)


def grown(entry: Path) -> None:
    with entry.open("ab") as file:
        file.write(b"x")


def zeroed(entry: Path) -> None:
    entry.write_bytes(bytes(entry.stat().st_size))


def header_changed(entry: Path) -> None:
    content = entry.read_bytes()
    entry.write_bytes(content.replace(b'"fps": ', b'"fps": 1', 1)[: len(content)])


def another_file(entry: Path) -> None:
    entry.write_bytes(b"<html>not found</html>" * 500)


BREAKS = [cut, cut_in_the_header, emptied, grown, zeroed, header_changed, another_file]


@pytest.mark.parametrize("damage", BREAKS, ids=lambda damage: damage.__name__.replace("_", " "))
def test_a_broken_entry_is_removed_counted_and_decoded_again(
    cache: FrameCache, clip: str, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    expected = cache.read_through(clip, CONTRACT)
    damage(only_file(cache))
    with caplog.at_level(logging.WARNING):
        assert_same(cache.read_through(clip, CONTRACT), expected)
    assert "removed, the clip is decoded again" in caplog.text
    assert (cache.statistics.broken, cache.statistics.misses, cache.statistics.decodes) == (1, 2, 2)
    verify_frames(only_file(cache))
    cache.read_through(clip, CONTRACT)
    assert cache.statistics.hits == 1


def test_a_flipped_bit_in_the_frames_is_found_by_verifying(cache: FrameCache, clip: str) -> None:
    cache.read_through(clip, CONTRACT)
    entry = only_file(cache)
    with entry.open("r+b") as file:
        file.seek(-1000, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1000, os.SEEK_END)
        file.write(bytes([byte ^ 1]))
    cache.read_through(clip, CONTRACT)
    assert cache.statistics.broken == 0  # reading looks at header and length only
    with pytest.raises(BrokenEntryError, match="checksum"):
        verify_frames(entry)
    assert [problem is None for _, problem in upkeep.verify(upkeep.entries(cache.root))] == [False]
    assert files(cache.root) == []


@pytest.mark.parametrize("what", ["version", "fields"])
def test_an_entry_of_another_version_is_ignored_and_replaced(
    cache: FrameCache, clip: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = read_clip(clip, CONTRACT)
    with monkeypatch.context() as patch:
        if what == "version":
            patch.setattr(frame_file, "VERSION", frame_file.VERSION - 1)
        else:
            patch.setattr(frame_file, "_STORED", frame_file._STORED[1:])
        cache.read_through(clip, CONTRACT)
    with pytest.raises(frame_file.OtherVersionError):
        read_frames(only_file(cache), clip)
    assert upkeep.prune(cache.root, dry_run=True).files == {"other version": 1}
    assert_same(cache.read_through(clip, CONTRACT), expected)
    assert (cache.statistics.hits, cache.statistics.misses, cache.statistics.broken) == (0, 2, 0)
    assert_same(cache.read_through(clip, CONTRACT), expected)
    assert cache.statistics.hits == 1


def write_and_read(root: Path, clip: str, number: int) -> tuple[int, int]:
    """Writes one entry over and over while others do; returns readings and torn ones."""
    cache, torn = FrameCache(root), 0
    expected = read_clip(clip, LARGE)
    entry = cache.entry(clip, LARGE)
    assert entry is not None
    for round_ in range(30):
        if round_ % 3 == number % 3:
            write_frames(entry, expected, LARGE)
        torn += not torch.equal(cache.read_through(clip, LARGE).frames, expected.frames)
        verify_frames(entry)
    return cache.statistics.broken, torn


def test_eight_writers_of_one_entry_tear_nothing(tmp_path: Path, clip: str) -> None:
    context = multiprocessing.get_context("fork")
    with context.Pool(8) as pool:
        tasks = [(tmp_path / "cache", clip, number) for number in range(8)]
        assert pool.starmap(write_and_read, tasks, chunksize=1) == [(0, 0)] * 8
    assert len(files(tmp_path / "cache")) == 1


KILLED = """
import os, signal, sys
from pathlib import Path
import keytoken.data.cache.frame_file as frame_file
from keytoken.data.cache.store import FrameCache
from keytoken.data.contract import SamplingContract
frame_file.os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
contract = SamplingContract(max_frames=8, min_pixels=56 * 56, max_pixels=56 * 56)
FrameCache(Path(sys.argv[1])).read_through(sys.argv[2], contract)
"""


def test_a_writer_that_is_killed_leaves_nothing_that_is_seen(cache: FrameCache, clip: str) -> None:
    """Between the last byte and the rename; what it leaves is pruned after an hour, not before."""
    done = subprocess.run([sys.executable, "-c", KILLED, str(cache.root), clip], timeout=120)
    assert done.returncode == -signal.SIGKILL
    left = only_file(cache)
    assert left.name.endswith(frame_file.PARTIAL_SUFFIX) and left.stat().st_size > 4096
    assert list(upkeep.entries(cache.root)) == []
    assert not cache.has(clip, CONTRACT)
    assert upkeep.prune(cache.root).files.total() == 0
    os.utime(left, (1, 1))
    assert upkeep.prune(cache.root).files == {"left by killed writers": 1}
    assert files(cache.root) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one mebibyte, real if this process may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if (
        not AS_ROOT
        or shutil.which("mount") is None
        or subprocess.run(command, capture_output=True).returncode
    ):
        pytest.skip("a small disk needs root and the right to mount")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_costs_time_only(
    small_disk: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = FrameCache(small_disk)
    clips = [draw(tmp_path / f"{number}.mp4", seed=number, size=224) for number in range(4)]
    large = SamplingContract(max_frames=8, min_pixels=224 * 224, max_pixels=224 * 224)
    with caplog.at_level(logging.WARNING):
        for clip in clips * 2:
            assert_same(cache.read_through(clip, large), read_clip(clip, large))
    assert (cache.statistics.unstored, cache.statistics.broken) == (8, 0)
    assert files(small_disk) == []
    assert len(caplog.records) == 1
    assert "No space left" in caplog.text and "keytoken data cache prune" in caplog.text
    with pytest.raises(DataError, match=r"No space left.*free space") as caught:
        cache.add(clips[0], large)
    assert not isinstance(caught.value, ClipError)


def test_a_limit_of_file_size_is_a_full_disk(cache: FrameCache, clip: str) -> None:
    """The kernel's own refusal in the middle of a write, where no disk can be mounted."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
    try:
        found = cache.read_through(clip, CONTRACT)
        with pytest.raises(DataError, match="File too large"):
            cache.add(clip, CONTRACT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert_same(found, read_clip(clip, CONTRACT))
    assert cache.statistics.unstored == 1
    assert files(cache.root) == []
    cache.read_through(clip, CONTRACT)
    assert cache.read_through(clip, CONTRACT) is not None and cache.statistics.hits == 1


@pytest.fixture
def read_only(cache: FrameCache, clip: str, tmp_path: Path) -> Iterator[Path]:
    """The cache with one entry, mounted read-only as root, without the right to write otherwise."""
    cache.read_through(clip, CONTRACT)
    folders = [path for path in [cache.root, *cache.root.rglob("*")] if path.is_dir()]
    if not AS_ROOT:
        for folder in folders:
            folder.chmod(0o555)
        yield cache.root
        for folder in folders:
            folder.chmod(0o755)
        return
    target = tmp_path / "read_only"
    target.mkdir()
    if subprocess.run(["mount", "--bind", "-o", "ro", str(cache.root), str(target)]).returncode:
        pytest.skip("a read-only folder needs the right to mount, for root writes everywhere else")
    subprocess.run(["mount", "-o", "remount,ro,bind", str(target)], check=True)
    yield target
    subprocess.run(["umount", "-l", str(target)], check=True)


def test_a_read_only_cache_serves_what_it_has(
    read_only: Path, clip: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = FrameCache(read_only)
    other = draw(tmp_path / "other.mp4", seed=1)
    with caplog.at_level(logging.WARNING):
        assert_same(cache.read_through(clip, CONTRACT), read_clip(clip, CONTRACT))
        assert caplog.records == []
        for _ in range(2):
            assert_same(cache.read_through(other, CONTRACT), read_clip(other, CONTRACT))
    assert len(caplog.records) == 1
    assert (cache.statistics.hits, cache.statistics.unstored) == (1, 2)
    with pytest.raises(DataError, match=r"frame cache .*(Read-only|Permission)"):
        cache.add(other, CONTRACT)


def test_the_folder_may_be_a_link_and_must_be_a_folder(tmp_path: Path, clip: str) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    FrameCache(tmp_path / "link").read_through(clip, CONTRACT)
    assert len(files(tmp_path / "real")) == 1
    assert len(list(upkeep.entries(tmp_path / "link"))) == 1
    with pytest.raises(ConfigurationError, match=r"clip\.mp4: is a file"):
        FrameCache(clip)


def missing(folder: Path) -> Path:
    return folder / "gone.mp4"


def empty(folder: Path) -> Path:
    (folder / "empty.mp4").touch()
    return folder / "empty.mp4"


def no_clip(folder: Path) -> Path:
    (folder / "text.mp4").write_text("hello\n" * 100)
    return folder / "text.mp4"


def a_pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe.mp4")
    return folder / "pipe.mp4"


def a_loop_of_links(folder: Path) -> Path:
    (folder / "loop.mp4").symlink_to(folder / "loop.mp4")
    return folder / "loop.mp4"


def an_empty_folder(folder: Path) -> Path:
    (folder / "none.mp4").mkdir()
    return folder / "none.mp4"


def a_zero_byte_in_the_name(folder: Path) -> Path:
    return folder / "a\0b.mp4"


BAD_CLIPS = [missing, empty, no_clip, a_pipe, a_loop_of_links, an_empty_folder, a_zero_byte_in_the_name]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("make", BAD_CLIPS, ids=lambda make: make.__name__.replace("_", " "))
def test_what_cannot_be_read_is_the_readers_error_and_not_stored(
    cache: FrameCache, tmp_path: Path, make: Callable[[Path], Path]
) -> None:
    path = str(make(tmp_path))
    for attempt in (cache.read_through, cache.add):
        with pytest.raises(ClipError, match="clip "):
            attempt(path, CONTRACT)
    assert files(cache.root) == []
    assert cache.statistics == CacheStatistics()


def test_an_entry_that_cannot_be_opened_is_a_miss(
    cache: FrameCache, clip: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As after an error of the disk or of a network file system."""
    expected = cache.read_through(clip, CONTRACT)

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(frame_file.torch, "from_file", fail)
    with caplog.at_level(logging.WARNING):
        assert_same(cache.read_through(clip, CONTRACT), expected)
    assert "Input/output error" in caplog.text
    assert cache.statistics.misses == 2
