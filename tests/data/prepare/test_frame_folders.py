"""Clips that are folders of frames, and questions about parts of clips: what a prepared row says of them."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from keytoken.data.cache.build import build, find_clips
from keytoken.data.cache.store import FrameCache
from keytoken.data.clips import read_clip
from keytoken.data.contract import SamplingContract
from keytoken.data.headers import Inspection, full_hash, inspect_file, num_vision_tokens, quick_hash
from keytoken.data.part import Part, named_clip
from keytoken.errors import DataError

CONTRACT = SamplingContract.preset("video_r1_16f")
NUM_FRAMES = 9


def write_frames(folder: Path, rate: str | None = "3", size: tuple[int, int] = (80, 60)) -> Path:
    folder.mkdir(parents=True)
    for number in range(NUM_FRAMES):
        Image.new("RGB", size, (number * 20,) * 3).save(folder / f"frame_{number}.png")
    (folder / "notes.txt").write_text("no frame")
    if rate is not None:
        (folder / "fps.txt").write_text(rate)
    return folder


def tokens_after_decoding(clip: Any, contract: SamplingContract = CONTRACT) -> int:
    frames, _, height, width = read_clip(clip, contract).frames.shape
    return frames // 2 * (height // 28) * (width // 28)


@pytest.mark.parametrize("rate", ["3", "30", None])
def test_a_folder_of_frames_is_a_clip(bench: Any, rate: str | None) -> None:
    folder = write_frames(bench.media / "walk", rate)
    bench.csv(("path", "question", "answer"), ("walk", "Who?", "a dog"), ("one.mp4", "Who?", "a dog"))
    row, other = bench.prepare("folder", check="decode", checksums="full")
    (entry,) = row["videos"]
    assert entry == {"video": str(folder.resolve()), "video_start": None, "video_end": None}
    info = row["extra_info"]
    assert (info["media"], info["media_kind"], info["num_source_frames"]) == ("walk", "video", NUM_FRAMES)
    assert info["duration_s"] == (0.0 if rate is None else NUM_FRAMES / int(rate))
    assert info["num_vision_tokens"] == tokens_after_decoding(folder)
    assert info["content"] == quick_hash(folder) != other["extra_info"]["content"]
    frames = [*sorted(folder.glob("*.png")), *folder.glob("fps.txt")]
    sums = subprocess.run(  # an independent truth
        ["sha256sum", *(file.name for file in frames)], cwd=folder, capture_output=True, check=True
    ).stdout
    checksums = json.loads((bench.out / "checksums.json").read_text())["media"]["walk"]
    assert checksums["sha256"] == hashlib.sha256(sums).hexdigest()
    assert checksums["bytes"] == sum(file.stat().st_size for file in folder.glob("*.png"))
    assert "folder" in (bench.out / "report.md").read_text()


def test_the_hashes_see_a_changed_frame_and_nothing_that_is_not_read(tmp_path: Path) -> None:
    folder = write_frames(tmp_path / "a")
    asked = Inspection()
    seen = [(quick_hash(folder), full_hash(folder), asked.key(folder, "video"))]
    (folder / "notes.txt").write_text("another text")
    assert (quick_hash(folder), full_hash(folder), asked.key(folder, "video")) == seen[0]
    Image.new("RGB", (80, 60), "red").save(folder / "frame_0.png")
    seen.append((quick_hash(folder), full_hash(folder), asked.key(folder, "video")))
    (folder / "fps.txt").write_text("12")
    seen.append((quick_hash(folder), full_hash(folder), asked.key(folder, "video")))
    (folder / "frame_8.png").unlink()
    seen.append((quick_hash(folder), full_hash(folder), asked.key(folder, "video")))
    assert all(len(set(values)) == 4 for values in zip(*seen, strict=True))


def test_folders_that_are_no_clips_are_set_aside(bench: Any, tmp_path: Path) -> None:
    write_frames(bench.media / "fast", "fast")
    mixed = write_frames(bench.media / "mixed")
    Image.new("RGB", (64, 64)).save(mixed / "frame_8.png")
    leak = write_frames(bench.media / "leak")
    secret = tmp_path / "secret.png"
    Image.new("RGB", (80, 60)).save(secret)
    (leak / "frame_3.png").unlink()
    (leak / "frame_3.png").symlink_to(secret)
    rate = write_frames(bench.media / "rate", None)
    (tmp_path / "secret.txt").write_text("25")
    (rate / "fps.txt").symlink_to(tmp_path / "secret.txt")
    (bench.media / "bare").mkdir()
    names = ("one.mp4", "bare", "leak", "rate", "fast", "mixed")
    bench.csv(("video", "question", "answer"), *((name, "Who?", "a dog") for name in names))
    (row,) = bench.prepare("folder", check="decode")
    assert row["extra_info"]["media"] == "one.mp4"
    found = {entry.path: (entry.reason, entry.detail) for entry in bench.ledger.quarantined}
    assert found["bare"][0] == "media is no file" and "no images" in found["bare"][1]
    assert found["leak"][0] == "path outside media_root" and str(secret) in found["leak"][1]
    assert found["rate"][0] == "path outside media_root" and "secret.txt" in found["rate"][1]
    assert found["fast"][0] == "media unreadable" and "fps.txt says 'fast'" in found["fast"][1]
    assert found["mixed"][0] == "media unreadable" and "frame_8.png has 64x64" in found["mixed"][1]


def test_a_cache_is_built_of_folders_and_parts(bench: Any, tmp_path: Path) -> None:
    write_frames(bench.media / "walk")
    header = ("video", "question", "answer", "start", "end")
    rows = (("walk", "Who?", "a dog", "", ""), ("walk", "Who?", "a cat", "1", "2"))
    bench.csv(header, *rows, ("one.mp4", "Who?", "a dog", "0.25", ""))
    bench.prepare("folder", check="decode")
    clips = find_clips([str(bench.out / "train.parquet")])
    folder, one = (str((bench.media / name).resolve()) for name in ("walk", "one.mp4"))
    assert clips == [folder, Part(folder, 1.0, 2.0), Part(one, 0.25)]
    built = build(clips, CONTRACT, tmp_path / "cache", jobs=1, limit_s=60.0)
    assert (built.num_stored, built.failures) == (3, {})
    cache = FrameCache(tmp_path / "cache")
    assert all(cache.has(clip, CONTRACT) for clip in clips)


def test_parts_are_counted_and_read_as_parts(bench: Any) -> None:
    """One second of frames, eight a second: two questions on two parts are no copies of each other."""
    write_frames(bench.media / "walk")
    header = ("video", "question", "answer", "start", "end")
    parts = (("", ""), ("0.25", "0.75"), ("0.5", ""), ("", "0.25"))
    bench.csv(
        header, *(("one.mp4", "Who?", "a dog", *part) for part in parts), ("walk", "Who?", "x", "1", "2")
    )
    rows = bench.prepare("folder", check="decode", sampling="demo")
    assert len(rows) == 5 and not bench.ledger.copies
    clips = [named_clip(row["videos"][0]) for row in rows]
    path = str((bench.media / "one.mp4").resolve())
    assert clips[:4] == [path, Part(path, 0.25, 0.75), Part(path, 0.5), Part(path, 0.0, 0.25)]
    counts = [row["extra_info"]["num_vision_tokens"] for row in rows]
    assert counts == [tokens_after_decoding(clip, SamplingContract.preset("demo")) for clip in clips]
    assert len(set(counts)) > 1


@pytest.mark.parametrize("check", ["headers", "decode"])
def test_parts_that_a_clip_does_not_have_are_set_aside(bench: Any, check: str) -> None:
    write_frames(bench.media / "still", None)
    header = ("video", "question", "answer", "start", "end")
    late, unknown = ("one.mp4", "Who?", "a dog", "2", "3"), ("still", "Who?", "a dog", "0", "1")
    bench.csv(header, ("one.mp4", "Who?", "a dog", "", ""), late, unknown)
    assert len(bench.prepare("folder", check=check)) == 1
    first, second = bench.ledger.quarantined
    assert "after the last frame" in first.detail and "correct the start and the end" in first.detail
    assert "write it into fps.txt" in second.detail
    assert (first.reason, second.reason) == ("part outside of the clip", "media unusable")
    assert first.detail.startswith(str(bench.media / "one.mp4")) and "clip clip" not in first.detail


def test_a_header_and_a_decoder_name_a_fault_alike(bench: Any, make_clip: Callable[..., Path]) -> None:
    """The same rows with the same reasons in the same words, whichever of the two looks."""
    write_frames(bench.media / "still", None)
    make_clip(bench.media / "wide.mp4", size=(1024, 4))
    (bench.media / "text.mp4").write_text("no video")
    header = ("video", "question", "answer", "start", "end")
    bad = (("still", "0", "1"), ("one.mp4", "2", "3"), ("one.mp4", "0.3", "0.31"), ("wide.mp4", "", ""))
    rows = ((*name, "", "") if len(name) == 1 else name for name in (*bad, ("text.mp4",), ("two.mp4",)))
    bench.csv(header, *((name, "Who?", "a dog", *part) for name, *part in rows))
    found = []
    for check in ("headers", "decode"):
        assert len(bench.prepare("folder", check=check, overwrite=True)) == 1
        found.append([(each.place, each.reason, each.detail) for each in bench.ledger.quarantined])
    assert found[0] == found[1] and len(found[0]) == 5


@pytest.mark.parametrize("check", ["headers", "decode"])
def test_a_part_that_ends_after_its_clip_is_noted_and_kept(bench: Any, check: str) -> None:
    """The clip lasts 1 s."""
    header = ("video", "question", "answer", "start", "end")
    parts = ("0.5", "9"), ("0.25", "1.0"), ("0.25", ""), ("0.75", "3")
    bench.csv(header, *(("one.mp4", "Who?", "a dog", *part) for part in parts))
    assert len(bench.prepare("folder", check=check)) == 4
    note = "end of the part after the end of the clip, where it ends then"
    assert bench.ledger.notes[note] == 2
    assert f"| {note} | 2 |" in (bench.out / "report.md").read_text()


@pytest.mark.parametrize(
    ("check", "note"),
    [
        ("headers", "clips not decoded (check=decode does)"),
        ("none", "media not opened (check=headers or check=decode does)"),
        ("decode", None),
    ],
)
def test_a_report_says_what_was_not_looked_at(bench: Any, check: str, note: str | None) -> None:
    bench.json([{"video": "one.mp4", "question": "Who?", "answer": "a dog"}])
    bench.prepare("folder", check=check)
    notes = [text for text in bench.ledger.notes if "check=" in text]
    assert notes == ([] if note is None else [note])
    assert (note or "| rows |") in (bench.out / "report.md").read_text()


def test_a_clip_without_a_rate_has_no_parts(tmp_path: Path) -> None:
    header = inspect_file(write_frames(tmp_path / "a", None), "video", Inspection())
    assert (header.num_frames, header.fps, header.duration_s) == (NUM_FRAMES, 0.0, 0.0)
    with pytest.raises(DataError, match=r"fps\.txt"):
        num_vision_tokens(header, "video", CONTRACT, (0.0, 1.0))
