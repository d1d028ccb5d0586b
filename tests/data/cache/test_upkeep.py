"""What pruning removes, by which rule, and what it never touches."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from keytoken.data.cache import frame_file, upkeep
from keytoken.data.cache.store import FrameCache
from keytoken.data.clips import Clip
from keytoken.data.contract import SamplingContract

ONE, TWO = SamplingContract(max_frames=8), SamplingContract(max_frames=16)
HOUR, DAY = 3600.0, 86400.0
SIZE = 4096 + 4 * 3 * 28 * 28  # header and frames of one entry


def read(path: str, contract: SamplingContract) -> Clip:
    frames = torch.full((4, 3, 28, 28), int(Path(path).stem), dtype=torch.uint8)
    return Clip(
        frames=frames,
        timestamps_s=(0.0, 0.5, 1.0, 1.5),
        frame_indices=(0, 1, 2, 3),
        fps=2.0,
        num_source_frames=4,
        decoder="test",
        path=path,
    )


class Filled:
    """A cache with clips 0 to 3 by contract ONE, last used so many days ago, and clip 0 by TWO, used now."""

    def __init__(self, folder: Path) -> None:
        self.cache = FrameCache(folder / "cache", read=read)
        self.clips = [str(folder / f"{number}.mp4") for number in range(4)]
        for number, clip in enumerate(self.clips):
            Path(clip).write_text(clip)
            self.cache.read_through(clip, ONE)
            self.set_used(clip, number * DAY)
        self.cache.read_through(self.clips[0], TWO)

    def entry(self, clip: str, contract: SamplingContract = ONE) -> Path:
        entry = self.cache.entry(clip, contract)
        assert entry is not None
        return entry

    def set_used(self, clip: str, ago_s: float) -> None:
        then = time.time() - ago_s
        os.utime(self.entry(clip), (then, then))

    def left(self) -> list[str]:
        one = [f"{number}" for number, clip in enumerate(self.clips) if self.cache.has(clip, ONE)]
        return one + ["two"] * self.cache.has(self.clips[0], TWO)


@pytest.fixture
def filled(tmp_path: Path) -> Filled:
    return Filled(tmp_path)


RULES: dict[str, tuple[dict[str, Any], list[str], dict[str, int]]] = {
    "no rule": ({}, ["0", "1", "2", "3", "two"], {}),
    "unused for a day and a half": ({"unused_s": 1.5 * DAY}, ["0", "1", "two"], {"unused": 2}),
    "larger than three entries": ({"max_bytes": 3 * SIZE}, ["0", "1", "two"], {"least recently used": 2}),
    "one byte too large": ({"max_bytes": 5 * SIZE - 1}, ["0", "1", "2", "two"], {"least recently used": 1}),
    "just large enough": ({"max_bytes": 5 * SIZE}, ["0", "1", "2", "3", "two"], {}),
    "no bytes": ({"max_bytes": 0}, [], {"least recently used": 5}),
    "other contracts": ({"keep": {TWO.digest()}}, ["two"], {"other contract": 4}),
    "both contracts kept": ({"keep": {ONE.digest(), TWO.digest()}}, ["0", "1", "2", "3", "two"], {}),
    "age, then size": (
        {"unused_s": 2.5 * DAY, "max_bytes": 3 * SIZE},
        ["0", "1", "two"],
        {"unused": 1, "least recently used": 1},
    ),
}


@pytest.mark.parametrize(("rule", "left", "removed"), RULES.values(), ids=RULES)
def test_rules(filled: Filled, rule: dict[str, Any], left: list[str], removed: dict[str, int]) -> None:
    planned = upkeep.prune(filled.cache.root, **rule, dry_run=True)
    assert filled.left() == ["0", "1", "2", "3", "two"]
    found = upkeep.prune(filled.cache.root, **rule)
    assert filled.left() == left
    assert found.files == planned.files == removed
    assert found.num_bytes == {reason: count * SIZE for reason, count in removed.items()}


def test_reading_an_entry_makes_it_a_recent_one(filled: Filled) -> None:
    filled.cache.read_through(filled.clips[3], ONE)
    upkeep.prune(filled.cache.root, unused_s=HOUR)
    assert filled.left() == ["0", "3", "two"]


def test_use_is_noted_once_in_an_hour(filled: Filled) -> None:
    """A write to the file system for every reading would be too many."""
    filled.set_used(filled.clips[0], HOUR / 2)
    before = filled.entry(filled.clips[0]).stat().st_mtime
    filled.cache.read_through(filled.clips[0], ONE)
    assert filled.entry(filled.clips[0]).stat().st_mtime == before


def test_broken_and_foreign_versions_go(filled: Filled, monkeypatch: pytest.MonkeyPatch) -> None:
    os.truncate(filled.entry(filled.clips[0]), 5000)
    with monkeypatch.context() as patch:
        patch.setattr(frame_file, "VERSION", 0)
        frame_file.write_frames(filled.entry(filled.clips[1]), read(filled.clips[1], ONE), ONE)
    assert upkeep.prune(filled.cache.root).files == {"broken": 1, "other version": 1}
    assert filled.left() == ["2", "3", "two"]


def test_nothing_else_is_ever_touched(filled: Filled, tmp_path: Path) -> None:
    root = filled.cache.root
    folder = filled.entry(filled.clips[0]).parent
    linked = tmp_path / "linked" / "ab"
    linked.mkdir(parents=True)
    strangers = [
        root / "readme.txt",
        root / "0123456789abcdef.frames",
        folder / "notes.frames",
        folder / f".{'0' * 40}.frames.partial",
        linked / f"{'0' * 40}.frames",
    ]
    for stranger in strangers:
        stranger.write_text("mine")
        os.utime(stranger, (1, 1))
    (root / ("f" * 16)).symlink_to(linked.parent)
    upkeep.prune(root, unused_s=0.0, max_bytes=0, keep={"none"})
    assert filled.left() == []
    assert all(stranger.read_text() == "mine" for stranger in strangers)


def test_notes_of_lost_clips_are_forgotten(filled: Filled, monkeypatch: pytest.MonkeyPatch) -> None:
    from keytoken.data.cache import fingerprint

    monkeypatch.setattr(fingerprint, "_SETTLED_S", -1.0)
    for clip in filled.clips:
        filled.cache.has(clip, ONE)
    Path(filled.clips[0]).unlink()

    def notes() -> int:
        return len(list((filled.cache.root / "index").rglob("*.json")))

    assert notes() == 4
    assert upkeep.forget_lost(filled.cache.root, dry_run=True) == 1
    assert notes() == 4
    assert upkeep.forget_lost(filled.cache.root) == 1
    assert notes() == 3


def test_a_limit_is_kept_while_a_run_writes(tmp_path: Path) -> None:
    """Two caches on one folder, as two processes have: each may exceed the limit by a twentieth."""
    limit = 20 * SIZE
    caches = [FrameCache(tmp_path / "cache", max_bytes=limit, read=read) for _ in range(2)]
    sizes = []
    for number in range(60):
        clip = tmp_path / f"{number}.mp4"
        clip.write_text(str(number))
        caches[number % 2].read_through(str(clip), ONE)
        sizes.append(sum(entry.num_bytes for entry in upkeep.entries(tmp_path / "cache")))
    assert max(sizes) <= limit * (1 + 2 / 20)
    assert sizes[-1] > limit - 3 * SIZE
