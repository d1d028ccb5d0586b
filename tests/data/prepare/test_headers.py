"""Lengths and sizes from headers, in children that may hang or crash."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from keytoken.data.clips import read_clip
from keytoken.data.contract import SamplingContract
from keytoken.data.headers import (
    Header,
    Inspection,
    full_hash,
    inspect_file,
    num_vision_tokens,
    quick_hash,
)
from keytoken.data.part import Part
from keytoken.data.prepare.inspection import inspect_all
from keytoken.errors import ClipError, DataError

CONTRACT = SamplingContract.preset("video_r1_16f")
CLIPS = (
    "av1.mkv",
    "demo_4.mp4",
    "h265.mp4",
    "non_zero_start.mp4",
    "pancake.mkv",
    "real_short.mp4",
    "rotated_90.mov",
    "unordered.mov",
    "video_ktr_example.mp4",
    "vp9_odd_width.mp4",
)


@pytest.mark.parametrize("name", CLIPS)
def test_a_header_tells_the_length_and_the_tokens_of_a_clip(shared_data: Path, name: str) -> None:
    """As training counts tokens after decoding: time patches x rows x columns of merged patches."""
    path = shared_data / "videos" / name
    header = inspect_file(str(path), "video", Inspection())
    clip = read_clip(path, CONTRACT)
    frames, _, height, width = clip.frames.shape
    assert num_vision_tokens(header, "video", CONTRACT) == frames // 2 * (height // 28) * (width // 28)
    assert abs(header.num_frames - clip.num_source_frames) <= (header.frames_from == "duration")
    assert header.fps == pytest.approx(clip.fps, rel=1e-3)


@pytest.mark.parametrize("size", [(80, 60), (640, 480), (20, 20), (9000, 3000), (57, 1100)])
def test_the_tokens_of_an_image_are_those_of_the_loader(tmp_path: Path, size: tuple[int, int]) -> None:
    from qwen_vl_utils import fetch_image

    path = tmp_path / "image.png"
    Image.new("RGB", size).save(path)
    header = inspect_file(str(path), "image", Inspection())
    width, height = fetch_image({"image": str(path)}, image_patch_size=14).size
    assert num_vision_tokens(header, "image", CONTRACT) == (width // 28) * (height // 28)


def test_a_clip_of_one_pixel_row_has_no_size_for_the_model() -> None:
    header = Header(4000, 8, 10, 5.0, 2.0, "header", "h264", 1, "")
    with pytest.raises(DataError, match="too elongated"):
        num_vision_tokens(header, "video", CONTRACT)


def test_an_absurd_length_is_counted_at_once() -> None:
    header = Header(64, 48, 10**15, 5.0, 2e14, "header", "h264", 1, "")
    few = num_vision_tokens(dataclasses.replace(header, num_frames=1000), "video", CONTRACT)
    assert num_vision_tokens(header, "video", CONTRACT) == few > 0


BAD = {
    "text named mp4": (lambda path, clips: path.write_text("no video"), "video", "cannot be opened"),
    "image called a video": (
        lambda path, clips: path.write_bytes((clips / "photo.png").read_bytes()),
        "video",
        "is an image",
    ),
    "video called an image": (
        lambda path, clips: path.write_bytes((clips / "one.mp4").read_bytes()),
        "image",
        "no image",
    ),
    "video cut before its index": (
        lambda path, clips: path.write_bytes((clips / "one.mp4").read_bytes()[:200]),
        "video",
        "cannot be opened",
    ),
    "empty": (lambda path, clips: path.touch(), "video", "cannot be opened"),
}


@pytest.mark.parametrize(
    ("make", "kind", "message"), [pytest.param(*row, id=name) for name, row in BAD.items()]
)
def test_files_that_are_not_what_the_row_says(
    tmp_path: Path, clip_folder: Path, make: Callable[[Path, Path], object], kind: Any, message: str
) -> None:
    path = tmp_path / "bad.mp4"
    make(path, clip_folder)
    with pytest.raises(ClipError, match=message):
        inspect_file(str(path), kind, Inspection())


def test_sound_without_pictures(tmp_path: Path) -> None:
    import av
    import numpy as np

    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(ClipError, match="no video stream"):
        inspect_file(str(path), "video", Inspection())


def test_a_file_that_hangs_costs_its_limit_and_the_others_go_on(clip_folder: Path, tmp_path: Path) -> None:
    """Opening a pipe that nobody writes to blocks for ever."""
    pipe = tmp_path / "pipe.mp4"
    os.mkfifo(pipe)
    files = [(pipe, "video"), (clip_folder / "one.mp4", "video")]
    found = inspect_all(files, Inspection(), jobs=1, limit_s=5.0)
    assert list(found) == files
    assert "within 5 s" in str(found[files[0]])
    assert isinstance(found[files[1]], Header)


def test_a_stopped_run_goes_on_where_it_was(clip_folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    cache = tmp_path / "headers.jsonl"
    files = [(clip_folder / name, "video") for name in ("one.mp4", "two.mp4")]
    first = inspect_all(files[:1], Inspection(), jobs=1, limit_s=60, cache=cache)
    with cache.open("a") as file:
        file.write('{"key": "cut off')
    second = inspect_all(files, Inspection(), jobs=1, limit_s=60, cache=cache)
    assert second[files[0]] == first[files[0]]
    # Nothing is left to start a child for.
    monkeypatch.setattr("keytoken.data.prepare.inspection.ClipProcess", None)
    assert inspect_all(files, Inspection(), jobs=1, limit_s=60, cache=cache) == second


def test_a_changed_file_is_read_again(clip_folder: Path, tmp_path: Path, make_clip: Any) -> None:
    cache, path = tmp_path / "headers.jsonl", tmp_path / "clip.mp4"
    lengths = []
    for num_frames in (8, 12):
        make_clip(path, num_frames)
        found = inspect_all([(path, "video")], Inspection(), jobs=1, limit_s=60, cache=cache)
        lengths.append(found[path, "video"].num_frames)
    assert lengths == [8, 12]


def test_a_file_that_goes_away_meanwhile_costs_itself(clip_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "no frames").mkdir()  # any more
    bad = [(tmp_path / "gone.mp4", "video"), (tmp_path / "no frames", "video")]
    files = [*bad, (clip_folder / "one.mp4", "video")]
    found = inspect_all(files, Inspection(), jobs=1, limit_s=60)
    assert all("cannot be opened any more" in str(found[file]) for file in bad)
    assert isinstance(found[files[2]], Header)


def test_hashes(clip_folder: Path, tmp_path: Path) -> None:
    import hashlib

    content = (clip_folder / "one.mp4").read_bytes()
    copy, other = tmp_path / "copy.mp4", tmp_path / "other.mp4"
    copy.write_bytes(content)
    other.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert quick_hash(copy) == quick_hash(clip_folder / "one.mp4") != quick_hash(other)
    assert full_hash(copy) == hashlib.sha256(content).hexdigest()


def test_headers_in_the_dataset(bench: Any, clip_folder: Path) -> None:
    bench.json([{"video": "one.mp4", "question": "Who?", "answer": "a dog"}])
    (row,) = bench.prepare("folder", check="headers", sampling="demo", checksums="full")
    info = row["extra_info"]
    assert (info["num_source_frames"], info["duration_s"]) == (8, 1.0)
    clip = read_clip(bench.media / "one.mp4", SamplingContract.preset("demo")).frames.shape
    assert info["num_vision_tokens"] == clip[0] // 2 * (clip[2] // 28) * (clip[3] // 28)
    assert info["sampling_digest"] == SamplingContract.preset("demo").digest()
    checksums = json.loads((bench.out / "checksums.json").read_text())
    content = (clip_folder / "one.mp4").read_bytes()
    assert checksums["media"]["one.mp4"] == {
        "bytes": len(content),
        "quick": quick_hash(clip_folder / "one.mp4"),
        "sha256": full_hash(clip_folder / "one.mp4"),
    }


def test_decoding_finds_what_a_header_hides(bench: Any, shared_data: Path) -> None:
    (bench.media / "corrupted.mp4").symlink_to(bench.media / "real.mp4")
    (bench.media / "real.mp4").write_bytes((shared_data / "videos/corrupted.mp4").read_bytes())
    rows = [{"video": name, "question": "Who?", "answer": "a dog"} for name in ("one.mp4", "corrupted.mp4")]
    bench.json(rows)
    assert len(bench.prepare("folder", check="headers")) == 2
    assert len(bench.prepare("folder", check="decode", overwrite=True)) == 1
    assert bench.reasons() == [("entry 1", "media unreadable")]


def test_a_clip_that_was_decoded_is_counted_by_its_frames(bench: Any, tmp_path: Path, make_clip: Any) -> None:
    """The header of a cut file states the length that it had. The second run remembers."""
    content = make_clip(tmp_path / "whole.mkv", 160).read_bytes()
    cut = bench.media / "cut.mkv"
    cut.write_bytes(content[: len(content) * 3 // 10])
    frames, _, height, width = read_clip(cut, CONTRACT).frames.shape
    true = frames // 2 * (height // 28) * (width // 28)
    bench.json([{"video": "cut.mkv", "question": "Who?", "answer": "a dog"}])
    counts = {}
    for check in ("headers", "decode", "decode"):
        (row,) = bench.prepare("folder", check=check, overwrite=True)
        counts[check] = row["extra_info"]["num_vision_tokens"]
        assert row["extra_info"]["decoded"] == (check == "decode")
        source = "decoded media" if check == "decode" else "headers"
        assert f"Counted from {source} under" in (bench.out / "report.md").read_text()
    assert counts["decode"] == true < counts["headers"]


def test_parts_that_print_alike_are_asked_for_apart(clip_folder: Path) -> None:
    path = str(clip_folder / "one.mp4")
    parts = (Part(path), Part(path, 1234.5671), Part(path, 1234.5673), Part(path, 0.0, 1234.5673))
    assert len({Inspection().key(part, "video") for part in parts}) == 4
