"""The strip of frames against what the passes are given."""

from __future__ import annotations

import base64
import io
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from keytoken.attribution.views.base import Clip, ViewContext, VisionFormat
from keytoken.attribution.views.shuffled import shuffled
from keytoken.attribution.views.tubelets import tubelets
from keytoken.data import child
from keytoken.data.clips import read_clip
from keytoken.data.contract import SamplingContract
from keytoken.data.decoders import AUTO, DECODERS, Decoded
from keytoken.data.part import Span
from keytoken.demo.render import draw_clip, write_clip
from keytoken.demo.rows import split_question
from keytoken.demo.tokenizer import DEMO_CONTRACT, build_processor, build_tokenizer
from keytoken.lens import frames as lens_frames
from keytoken.lens.frames import MAX_FRAMES, strip_of

ABOUT = {"shuffle_seed": 5, "sampling": {"fps": 2.0, "min_frames": 4, "max_frames": 8}}
PIXELS = {"min_pixels": 56 * 56, "max_pixels": 56 * 56}


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    question, rng = split_question("train", 0, 0)  # something moves
    write_clip(tmp_path / "clip.mp4", draw_clip(question.bodies, rng))
    return tmp_path / "clip.mp4"


def pictures(frames: tuple[str, ...]) -> list[np.ndarray]:
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1])))) for url in frames]


@pytest.mark.parametrize(("view", "make"), [("shuffled", shuffled), ("tubelets", tubelets)])
def test_the_order_is_that_of_the_view(clip: Path, view: str, make: object) -> None:
    """The pixels of the pass, made by the view, are those of the frames in the order that the page shows."""
    about = {
        "shuffle_seed": 5,
        "sampling": {**ABOUT["sampling"], **PIXELS},
        "method": {"view": {"temporal": view}},
    }
    strip = strip_of(str(clip), "0000003-00001", 0, about)
    assert strip.order is not None and list(strip.order) != sorted(strip.order)
    processor = build_processor(build_tokenizer())
    frames = read_clip(clip, DEMO_CONTRACT).frames

    def patches(video: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        made = processor.video_processor(videos=[video], do_sample_frames=False, return_tensors="pt")
        return made["pixel_values_videos"], made["video_grid_thw"][0]

    pixels, grid = patches(frames)
    context = ViewContext(vision=VisionFormat(token_ids=(1, 2), temporal_patch_size=2), seed=5)
    viewed = make(
        Clip(patches=pixels, grid=grid, prompt_key="0000003-00001/0", answer_key="", context=context)
    )  # type: ignore[operator]
    torch.testing.assert_close(viewed, patches(frames[list(strip.order)])[0])


def test_no_order_is_shown_that_training_never_made(clip: Path) -> None:
    about = {"shuffle_seed": 5, "sampling": {**ABOUT["sampling"], **PIXELS}}
    strip = strip_of(str(clip), "p", 0, about, viewed=False)
    assert strip.order is None and len(strip.frames) == 8 and strip.note == ""


def hanging(path: Path, contract: SamplingContract, span: Span) -> Decoded:
    time.sleep(600)
    raise AssertionError


def test_a_decoder_that_hangs_costs_the_frames_only(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "_START_METHOD", "fork")  # only so a child has this decoder
    for name in AUTO:
        monkeypatch.setitem(DECODERS, name, hanging)
    monkeypatch.setattr(lens_frames, "LIMIT_S", 0.5)
    strip = strip_of(str(clip), "p", 0, {"shuffle_seed": 0, "sampling": {"fps": 7.0, **PIXELS}})
    assert strip.frames == () and "not decoded within 0.5 s" in strip.note


def test_frames_are_the_clips_own(clip: Path) -> None:
    strip = strip_of(str(clip), "p", 0, {"shuffle_seed": 0, "sampling": {**ABOUT["sampling"], **PIXELS}})
    frames = read_clip(clip, DEMO_CONTRACT)
    assert strip.times == tuple(round(time, 3) for time in frames.timestamps_s) and strip.note == ""
    for shown, frame in zip(pictures(strip.frames), frames.frames, strict=True):
        expected = frame.permute(1, 2, 0).numpy().astype(int)
        assert np.abs(shown.astype(int) - expected).mean() < 6.0  # a JPEG


def test_long_clips_are_shown_in_part(tmp_path: Path) -> None:
    frames = torch.zeros(40, 64, 64, 3, dtype=torch.uint8)
    frames[:, :, :, 0] = torch.arange(40)[:, None, None] * 6
    folder = tmp_path / "frames"
    folder.mkdir()
    for number, frame in enumerate(frames):
        Image.fromarray(frame.numpy()).save(folder / f"{number:03d}.png")
    about = {"shuffle_seed": 0, "sampling": {"fps": 30.0, "min_frames": 40, "max_frames": 40, **PIXELS}}
    strip = strip_of(str(folder), "p", 0, about)
    assert len(strip.frames) == MAX_FRAMES and strip.order is None
    assert strip.note.startswith("16 of 40 frames are shown")


def test_what_cannot_be_shown_is_said(tmp_path: Path) -> None:
    assert "no such file" in strip_of(str(tmp_path / "a.mp4"), "p", 0, ABOUT).note
    (tmp_path / "b.mp4").write_text("no video")
    assert "cannot be decoded" in strip_of(str(tmp_path / "b.mp4"), "p", 0, ABOUT).note
    assert "does not say" in strip_of(str(tmp_path / "a.mp4"), "p", 0, {}).note
    assert "unknown" in strip_of("a.mp4", "p", 0, {"sampling": {"frames": 3}}).note.lower()
