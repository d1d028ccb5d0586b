from pathlib import Path

import numpy as np
import pytest
import torch

from keytoken.data.clips import read_clip
from keytoken.data.contract import SamplingContract
from keytoken.data.decoders import AUTO
from keytoken.demo.render import write_clip

CONTRACT = SamplingContract(fps=2.0, min_frames=4, max_frames=8, min_pixels=56 * 56, max_pixels=112 * 112)


@pytest.fixture
def drawn(tmp_path: Path) -> tuple[Path, np.ndarray]:
    frames = np.random.default_rng(0).integers(0, 256, (8, 56, 56, 3), dtype=np.uint8)
    write_clip(tmp_path / "clip.mp4", frames)
    return tmp_path / "clip.mp4", frames


def test_rendered_clips_come_back_bit_for_bit(drawn: tuple[Path, np.ndarray]) -> None:
    path, frames = drawn
    clip = read_clip(path, CONTRACT)
    assert clip.decoder in AUTO and clip.note == ""
    assert torch.equal(clip.frames, torch.from_numpy(frames).permute(0, 3, 1, 2))
    assert clip.timestamps_s == tuple(index / 2 for index in range(8))
    assert clip.sampled_fps == pytest.approx(2.0)
    assert not clip.is_still


REAL_CLIPS = {
    "av1.mkv": 125,
    "demo_4.mp4": 150,
    "h265.mp4": 10,
    "non_zero_start.mp4": 12,
    "pancake.mkv": 310,
    "real_short.mp4": 240,
    "rotated_90.mov": 3,
    "unordered.mov": 4,
    "video_ktr_example.mp4": 491,
    "vp9_odd_width.mp4": 25,
}


@pytest.mark.parametrize("name", REAL_CLIPS)
def test_real_clips_decode(name: str, shared_data: Path) -> None:
    clip = read_clip(shared_data / "videos" / name, CONTRACT)
    assert clip.decoder in AUTO and clip.note == ""
    assert clip.num_source_frames == REAL_CLIPS[name]
    count, channels, height, width = clip.frames.shape
    assert count == len(clip.timestamps_s) == len(clip.frame_indices) and count % 2 == 0 and channels == 3
    assert height % 28 == width % 28 == 0 and height * width <= 112 * 112
    assert clip.timestamps_s[0] == 0 and list(clip.timestamps_s) == sorted(clip.timestamps_s)
    assert clip.frames.float().std() > 1 or name == "unordered.mov"


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
