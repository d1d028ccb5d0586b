import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from keytoken.data import clips
from keytoken.data.clips import read_clip
from keytoken.data.contract import SamplingContract
from keytoken.demo.render import write_clip
from keytoken.errors import ClipError

CONTRACT = SamplingContract(fps=2.0, min_frames=4, max_frames=8, min_pixels=56 * 56, max_pixels=112 * 112)
NATIVE = SamplingContract(fps=2.0, min_frames=4, max_frames=8, min_pixels=28 * 28, max_pixels=2000 * 2000)


@pytest.fixture
def drawn(tmp_path: Path) -> tuple[Path, np.ndarray]:
    frames = np.random.default_rng(0).integers(0, 256, (8, 56, 56, 3), dtype=np.uint8)
    write_clip(tmp_path / "clip.mp4", frames)
    return tmp_path / "clip.mp4", frames


def test_rendered_clips_come_back_bit_for_bit(drawn: tuple[Path, np.ndarray]) -> None:
    path, frames = drawn
    clip = read_clip(path, CONTRACT)
    assert clip.decoder == "decord"
    assert torch.equal(clip.frames, torch.from_numpy(frames).permute(0, 3, 1, 2))
    assert clip.timestamps_s == tuple(index / 2 for index in range(8))
    assert clip.sampled_fps == pytest.approx(2.0)
    assert not clip.is_still


def test_both_decoders_see_the_same_frames(drawn: tuple[Path, np.ndarray]) -> None:
    path, frames = drawn
    for decode in (clips._decode_decord, clips._decode_pyav):
        assert np.array_equal(decode(path, CONTRACT).frames, frames)


REAL_CLIPS = {
    "av1.mkv": ("pyav", 125),
    "demo_4.mp4": ("decord", 150),
    "h265.mp4": ("decord", 10),
    "non_zero_start.mp4": ("decord", 12),
    "pancake.mkv": ("decord", 310),
    "real_short.mp4": ("decord", 240),
    "rotated_90.mov": ("decord", 3),
    "unordered.mov": ("decord", 4),
    "video_ktr_example.mp4": ("decord", 491),
    "vp9_odd_width.mp4": ("decord", 25),
}


@pytest.mark.parametrize("name", REAL_CLIPS)
def test_real_clips_decode(name: str, shared_data: Path) -> None:
    decoder, total = REAL_CLIPS[name]
    clip = read_clip(shared_data / "videos" / name, CONTRACT)
    assert (clip.decoder, clip.num_source_frames) == (decoder, total)
    count, channels, height, width = clip.frames.shape
    assert count == len(clip.timestamps_s) == len(clip.frame_indices) and count % 2 == 0 and channels == 3
    assert height % 28 == width % 28 == 0 and height * width <= 112 * 112
    assert clip.timestamps_s[0] == 0 and list(clip.timestamps_s) == sorted(clip.timestamps_s)
    assert clip.frames.float().std() > 1 or name == "unordered.mov"


@pytest.mark.parametrize("name", ["demo_4.mp4", "non_zero_start.mp4", "rotated_90.mov", "vp9_odd_width.mp4"])
def test_decoders_agree_on_real_clips(name: str, shared_data: Path) -> None:
    """Same frames, same turn of rotated clips, same clock of clips that do not start at zero."""
    path = shared_data / "videos" / name
    left, right = clips._decode_decord(path, NATIVE), clips._decode_pyav(path, NATIVE)
    assert np.array_equal(left.frames, right.frames)
    assert left.indices == right.indices
    assert left.timestamps_s == pytest.approx(right.timestamps_s, abs=1e-4)


def test_corrupted_clip_gives_one_clear_error(shared_data: Path) -> None:
    pattern = r"corrupted\.mp4: cannot be decoded \(decord: .*; pyav: .*re-encode"
    with pytest.raises(ClipError, match=pattern) as info:
        read_clip(shared_data / "videos" / "corrupted.mp4", CONTRACT)
    assert "\n" not in str(info.value)


def test_missing_and_empty_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ClipError, match=r"nowhere\.mp4: no such file"):
        read_clip(tmp_path / "nowhere.mp4", CONTRACT)
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(ClipError, match=r"empty\.mp4: the file is empty"):
        read_clip(tmp_path / "empty.mp4", CONTRACT)


def test_truncated_and_foreign_files_are_refused(drawn: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    truncated = tmp_path / "truncated.mp4"
    shutil.copy(drawn[0], truncated)
    with truncated.open("r+b") as handle:
        handle.truncate(truncated.stat().st_size // 2)
    (tmp_path / "text.mp4").write_text("not a video" * 100)
    for path in (truncated, tmp_path / "text.mp4"):
        with pytest.raises(ClipError, match="cannot be decoded"):
            read_clip(path, CONTRACT)


def test_one_frame_fills_one_temporal_patch_and_says_so(tmp_path: Path) -> None:
    write_clip(tmp_path / "still.mp4", np.full((1, 56, 56, 3), 90, dtype=np.uint8))
    clip = read_clip(tmp_path / "still.mp4", CONTRACT)
    assert clip.is_still and clip.frame_indices == (0, 0)
    assert torch.equal(clip.frames[0], clip.frames[1])


def test_resizing_keeps_flat_colours_and_reaches_the_contract(tmp_path: Path) -> None:
    write_clip(tmp_path / "wide.mp4", np.full((4, 100, 400, 3), (200, 30, 90), dtype=np.uint8))
    clip = read_clip(tmp_path / "wide.mp4", CONTRACT)
    assert clip.frames.shape == (4, 3, 56, 224)
    assert (clip.frames.float().mean(dim=(0, 2, 3)) - torch.tensor([200.0, 30.0, 90.0])).abs().max() < 1
