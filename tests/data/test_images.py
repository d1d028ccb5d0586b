"""Folders of frames, stills and animated images as clips."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from keytoken.data.clips import read_clip
from keytoken.data.contract import SamplingContract

OWN_SIZE = SamplingContract(fps=2.0, min_frames=4, max_frames=8, min_pixels=28 * 28, max_pixels=400 * 400)


def greys(clip_frames: np.ndarray) -> list[int]:
    """The value of frames of one grey, uint8 [T, C, H, W]."""
    return [int(value) for value in np.asarray(clip_frames)[:, 0, 0, 0]]


def picture(value: int) -> Image.Image:
    return Image.fromarray(np.full((56, 84, 3), value, dtype=np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve frames of one grey each, whose names are not in order as text, and files that are no frames."""
    frames = tmp_path / "clip"
    frames.mkdir()
    for number in range(12):
        picture(number).save(frames / f"frame_{number}.png")
    (frames / "notes.txt").write_text("no frame")
    (frames / ".frame_5.png").write_bytes(b"left behind by an editor")
    return frames


def test_frames_of_a_folder_are_in_natural_order(folder: Path) -> None:
    clip = read_clip(folder, OWN_SIZE)
    assert (clip.decoder, clip.num_source_frames, clip.fps) == ("folder", 12, 2.0)
    assert list(clip.frame_indices) == greys(clip.frames.numpy()) == [0, 2, 3, 5, 6, 8, 9, 11]
    assert clip.timestamps_s == tuple(number / 2.0 for number in clip.frame_indices)
    assert clip.frames.shape == (8, 3, 56, 84)


def test_a_folder_may_say_its_rate(folder: Path) -> None:
    """Twelve frames at 4 a second are 3 seconds, of which 2 frames a second are taken."""
    (folder / "fps.txt").write_text("4\n")
    clip = read_clip(folder, OWN_SIZE)
    assert (clip.fps, len(clip.frame_indices)) == (4.0, 6)
    assert clip.timestamps_s[-1] == 11 / 4.0
    assert clip.sampled_fps == pytest.approx(2.0)


def test_a_still_is_a_clip_of_one_frame(tmp_path: Path) -> None:
    picture(90).save(tmp_path / "a.png")
    clip = read_clip(tmp_path / "a.png", OWN_SIZE)
    assert clip.is_still and clip.decoder == "image"
    assert (clip.frame_indices, clip.timestamps_s, greys(clip.frames.numpy())) == (
        (0, 0),
        (0.0, 0.0),
        [90, 90],
    )


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_an_animated_image_has_its_own_times(suffix: str, tmp_path: Path) -> None:
    frames = [picture(20 * number) for number in range(10)]
    path = tmp_path / f"a.{suffix}"
    durations = [100] * 5 + [300] * 5
    lossless = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, **lossless)
    clip = read_clip(path, OWN_SIZE)
    assert (clip.decoder, clip.num_source_frames) == ("image", 10)
    assert clip.fps == pytest.approx(10 / 2.0)
    assert greys(clip.frames.numpy()) == [20 * number for number in clip.frame_indices]
    starts = np.cumsum([0, *durations[:-1]]) / 1000
    assert clip.timestamps_s == pytest.approx([starts[number] for number in clip.frame_indices])


def test_photos_stand_upright_and_transparency_is_white(tmp_path: Path) -> None:
    pixels = np.zeros((56, 84, 3), dtype=np.uint8)
    pixels[:28, :28] = (250, 0, 0)
    turned = Image.Exif()
    turned[0x0112] = 6  # shown a quarter clockwise: the corner at the top left comes to the top right
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=turned)
    frame = read_clip(tmp_path / "a.png", OWN_SIZE).frames[0]
    assert frame.shape == (3, 84, 56)
    assert frame[0, 0, -1] == 250 and frame[0, 0, 0] == frame[0, -1, -1] == 0

    Image.new("RGBA", (56, 56), (0, 0, 0, 0)).save(tmp_path / "b.png")
    assert greys(read_clip(tmp_path / "b.png", OWN_SIZE).frames.numpy()) == [255, 255]
