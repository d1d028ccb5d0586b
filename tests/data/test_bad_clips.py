"""Clips that cannot be used: one clear error for each, an entry in the quarantine, nothing in their place.

The names of the cases are the rows of the table in the documentation.
"""

from __future__ import annotations

import os
import re
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from keytoken.data.clips import read_clip
from keytoken.data.contract import SamplingContract
from keytoken.data.quarantine import scan_rows
from keytoken.errors import ClipError

CONTRACT = SamplingContract(fps=2.0, min_frames=4, max_frames=8, min_pixels=56 * 56, max_pixels=112 * 112)
X264 = "keyint=12:bframes=2:scenecut=0"
SHOWN_FIRST = {"movflags": "faststart"}  # the list of frames stands before the frames

Numbered = Callable[..., Path]
Make = Callable[[Path, Numbered], Path]


def empty(folder: Path, numbered: Numbered) -> Path:
    (folder / "a.mp4").touch()
    return folder / "a.mp4"


def folder_of_text(folder: Path, numbered: Numbered) -> Path:
    (folder / "notes.txt").write_text("frames are elsewhere")
    return folder


def folder_of_frames(folder: Path, sizes: tuple[tuple[int, int], ...] = ((64, 64),) * 4) -> Path:
    for number, size in enumerate(sizes):
        Image.new("RGB", size).save(folder / f"frame_{number}.png")
    return folder


def folder_of_two_sizes(folder: Path, numbered: Numbered) -> Path:
    return folder_of_frames(folder, ((64, 64), (64, 64), (64, 48), (64, 64)))


def folder_with_a_broken_frame(folder: Path, numbered: Numbered) -> Path:
    (folder_of_frames(folder) / "frame_3.png").write_bytes(b"not an image")
    return folder


def folder_with_rate(text: str) -> Make:
    def make(folder: Path, numbered: Numbered) -> Path:
        (folder_of_frames(folder) / "fps.txt").write_text(text)
        return folder

    return make


def text(name: str) -> Make:
    def make(folder: Path, numbered: Numbered) -> Path:
        (folder / name).write_text("<html>404 not found</html>" * 100)
        return folder / name

    return make


def cut(path: Path, share: float) -> Path:
    with path.open("r+b") as file:
        file.truncate(int(path.stat().st_size * share))
    return path


def cut_before_the_list_of_frames(folder: Path, numbered: Numbered) -> Path:
    return cut(numbered("a.mp4"), 0.5)


def cut_image(folder: Path, numbered: Numbered) -> Path:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "a.png")
    return cut(folder / "a.png", 0.5)


def damage(path: Path, numbers: range) -> Path:
    """Overwrite packets in place."""
    with av.open(str(path)) as container:
        places = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    with path.open("r+b") as file:
        for number in numbers:
            file.seek(places[number][0])
            file.write(b"\xff" * places[number][1])
    return path


def damaged_in_the_middle(folder: Path, numbered: Numbered) -> Path:
    return damage(numbered("a.mp4", x264_params=X264), range(14, 20))


def two_sizes(folder: Path, numbered: Numbered) -> Path:
    """Two recordings in one stream, as when a camera was turned."""
    parts = []
    for name, size in (("one.ts", (120, 160)), ("two.ts", (160, 120))):
        with av.open(str(folder / name), "w") as container:
            stream: Any = container.add_stream("libx264", rate=25)
            stream.height, stream.width = size
            for _ in range(20):
                frame = av.VideoFrame.from_ndarray(np.zeros((*size, 3), dtype=np.uint8))
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        parts.append((folder / name).read_bytes())
    (folder / "a.ts").write_bytes(b"".join(parts))
    return folder / "a.ts"


def sound(cover: bool) -> Make:
    def make(folder: Path, numbered: Numbered) -> Path:
        path = folder / "a.mp4"
        with av.open(str(path), "w") as container:
            stream: Any = container.add_stream("aac", rate=16000, layout="mono")
            picture: Any = container.add_stream("mjpeg", rate=1) if cover else None
            if picture is not None:
                picture.height, picture.width, picture.pix_fmt = 64, 64, "yuvj420p"
                picture.disposition = av.stream.Disposition.attached_pic
                frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), dtype=np.uint8))
                container.mux(picture.encode(frame.reformat(format="yuvj420p")))
                container.mux(picture.encode())
            silence = av.AudioFrame.from_ndarray(
                np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
            )
            silence.sample_rate = 16000
            container.mux(stream.encode(silence))
            container.mux(stream.encode())
        return path

    return make


def pipe(folder: Path, numbered: Numbered) -> Path:
    os.mkfifo(folder / "a.mp4")
    return folder / "a.mp4"


def closed_to_us(folder: Path, numbered: Numbered) -> Path:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    path = numbered("a.mp4")
    path.chmod(0)
    return path


def loop_of_links(folder: Path, numbered: Numbered) -> Path:
    (folder / "a.mp4").symlink_to(folder / "b.mp4")
    (folder / "b.mp4").symlink_to(folder / "a.mp4")
    return folder / "a.mp4"


def elongated(folder: Path, numbered: Numbered) -> Path:
    Image.new("RGB", (2010, 10)).save(folder / "a.png")
    return folder / "a.png"


def huge_image(folder: Path, numbered: Numbered) -> Path:
    """A few bytes that ask for 100,000 x 100,000 pixels."""
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    content = bytearray((folder / "a.png").read_bytes())
    content[16:24] = struct.pack(">II", 100_000, 100_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    (folder / "a.png").write_bytes(content)
    return folder / "a.png"


# What is wrong, and what the message says beside the clip's name.
ROWS: dict[str, tuple[Make, str]] = {
    "missing": (lambda folder, numbered: folder / "a.mp4", "no such file; check the dataset's video paths"),
    "empty": (empty, "the file is empty; copy or download it again"),
    "text named mp4": (text("a.mp4"), "Invalid data found"),
    "cut short before its list of frames": (cut_before_the_list_of_frames, "Invalid data found"),
    "damaged in the middle": (damaged_in_the_middle, "damaged or missing, the first at"),
    "frames of two sizes": (two_sizes, "the size of the frames changes"),
    "sound only": (sound(cover=False), "no video stream"),
    "sound with a cover": (sound(cover=True), "no video stream"),
    "pipe": (pipe, "not a file"),
    "device": (lambda folder, numbered: Path("/dev/zero"), "not a file"),
    "no permission": (closed_to_us, "Permission denied"),
    "loop of links": (loop_of_links, "Too many levels of symbolic links"),
    "zero byte in the name": (lambda folder, numbered: folder / "a\0.mp4", "null byte"),
    "name too long": (lambda folder, numbered: folder / ("a" * 300), "File name too long"),
    "folder without images": (folder_of_text, "the folder has no images"),
    "folder of two sizes": (folder_of_two_sizes, "frame_2.png has 64x48 pixels and frame_0.png 64x64"),
    "folder with a broken image": (folder_with_a_broken_frame, "frame_3.png is not an image"),
    "folder with a rate of 0": (folder_with_rate("0"), "frame rate 0"),
    "folder with a rate in words": (folder_with_rate("fast"), "fps.txt says 'fast'"),
    "text named png": (text("a.png"), "not an image"),
    "image cut short": (cut_image, "not an image that can be read"),
    "image of 10 gigapixels": (huge_image, "not an image that can be read"),
    "200 times as wide as high": (elongated, "too elongated"),
}


@pytest.mark.parametrize(("make", "words"), ROWS.values(), ids=ROWS)
def test_an_error_names_the_clip_and_what_is_wrong(
    make: Make, words: str, tmp_path: Path, numbered: Numbered
) -> None:
    path = make(tmp_path, numbered)
    with pytest.raises(ClipError) as caught:
        read_clip(path, CONTRACT)
    message = str(caught.value)
    assert message.startswith(f"clip {path}: ") and words in message
    assert "\n" not in message and ";" in message  # one line, with a remedy


def test_bad_clips_are_set_aside_and_counted(tmp_path: Path, numbered: Numbered) -> None:
    """All of them in one dataset: the good row between them is the one that stays."""
    rows, made = [], []
    for number, (make, words) in enumerate(ROWS.values()):
        (tmp_path / str(number)).mkdir()
        try:
            path = make(tmp_path / str(number), numbered)
        except pytest.skip.Exception:
            continue
        if path.parent == tmp_path and path.is_file():  # drawn by the fixture, which knows one folder
            path = Path(shutil.move(path, tmp_path / str(number) / path.name))
        made.append((str(path), words))
        rows.append({"videos": [{"video": str(path)}]})
    middle = len(rows) // 2
    rows.insert(middle, {"videos": [{"video": str(numbered("good.mp4"))}]})
    scan = scan_rows(rows, CONTRACT, limit_s=60.0)
    assert scan.kept == [middle]
    assert len(scan.quarantined) == len(made) >= 20
    for entry, (path, words) in zip(scan.quarantined, made, strict=True):
        assert entry.path == path and words in entry.reason


def test_the_corrupted_clip_of_the_shared_data(shared_data: Path) -> None:
    with pytest.raises(ClipError, match=r"corrupted\.mp4: cannot be decoded \(.*pyav: .*re-encode"):
        read_clip(shared_data / "videos" / "corrupted.mp4", CONTRACT)


def test_a_clip_cut_short_is_shown_as_far_as_it_goes_and_says_so(
    numbered: Numbered, read_numbers: Callable[[Any], list[int]]
) -> None:
    own_size = SamplingContract(min_pixels=28 * 28, max_pixels=400 * 400)
    path = cut(numbered("a.mp4", container_options=SHOWN_FIRST, x264_params=X264, num_frames=60), 0.8)
    clip = read_clip(path, own_size)
    assert 12 < clip.num_source_frames < 60 and f"{clip.num_source_frames}" in clip.note
    assert clip.frame_indices[-1] == clip.num_source_frames - 1
    assert read_clip(path, own_size).note == clip.note


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.mkv", "libx264"), ("a.webm", "libvpx"), ("a.flv", "libx264")],
    ids=["Matroska cut short", "WebM cut short", "Flash cut short"],
)
def test_a_cut_clip_without_a_list_of_frames_says_so(numbered: Numbered, name: str, codec: str) -> None:
    """Matroska and Flash state a duration alone: 60 frames, five a second."""
    path = numbered(name, codec, rate=5, g="5")
    assert read_clip(path, CONTRACT).note == ""
    clip = read_clip(cut(path, 0.5), CONTRACT)
    assert 10 < clip.num_source_frames < 55
    found = re.search(r"states (\S+) s and holds (\S+) s", clip.note)
    assert found is not None
    seconds = [float(number) for number in found.groups()]  # Flash: from the first packet, 0.4 s earlier
    assert seconds == pytest.approx([12.0, (clip.num_source_frames - 1) / 5], abs=0.7)


def test_a_recording_that_begins_between_keyframes_starts_at_the_first(numbered: Numbered) -> None:
    def late(number: int, packet: Any) -> bool:
        return number >= 5

    clip = read_clip(numbered("a.ts", change=late, x264_params="keyint=12:bframes=0:scenecut=0"), CONTRACT)
    assert clip.num_source_frames == 48 and "48 of 55" in clip.note
    assert clip.timestamps_s[0] == 0.0


def test_a_named_decoder_that_cannot_names_the_others(numbered: Numbered) -> None:
    path = numbered("a.avi")
    contract = SamplingContract(decoder="decord")
    with pytest.raises(ClipError, match=r"decord: .*avi.*decoder=auto \(torchcodec, pyav were not asked\)"):
        read_clip(path, contract)
