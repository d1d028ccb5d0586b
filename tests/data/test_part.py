"""Parts of clips: the frames between two seconds, whoever decodes them, and nothing where there are none."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from math import inf, nan
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from keytoken.data.cache.store import FrameCache
from keytoken.data.clips import Clip, read_clip
from keytoken.data.contract import SamplingContract
from keytoken.data.decoders import DECODERS, DecoderMissing
from keytoken.data.part import WHOLE, Part, choose_frames, entry_of, named_clip
from keytoken.data.timed import read_clip_within
from keytoken.errors import ClipError, DataError

OWN_SIZE = {"min_pixels": 28 * 28, "max_pixels": 4000 * 4000}
ALL = SamplingContract(fps=1000.0, max_frames=1000, **OWN_SIZE)
FEW = SamplingContract(fps=2.0, min_frames=4, max_frames=8, **OWN_SIZE)
X264 = "keyint=12:bframes=3:b-adapt=0:scenecut=0:open-gop=1"

Numbered = Callable[..., Path]
Read = Callable[[Any], list[int]]


@pytest.fixture(params=DECODERS)
def decoder(request: pytest.FixtureRequest) -> str:
    """Each decoder that is installed."""
    try:
        DECODERS[request.param](Path("nowhere.mp4"), FEW, WHOLE)
    except DecoderMissing as reason:
        pytest.skip(str(reason))
    except (DataError, OSError):
        pass
    return str(request.param)


def named(contract: SamplingContract, decoder: str) -> SamplingContract:
    return dataclasses.replace(contract, decoder=decoder)


SPANS = [(0.0, 1.0), (0.5, 1.9), (0.41, 0.83), (1.0, inf), (2.2, 2.4), (0.0, inf), (1.99, 2.01)]


@pytest.mark.parametrize("span", SPANS, ids=str)
def test_a_part_is_a_slice_of_the_whole_clip(
    span: tuple[float, float], decoder: str, numbered: Numbered, read_numbers: Read
) -> None:
    """60 frames, 25 a second; frame n is shown at n / 25 s and says n."""
    path = numbered("a.mp4", x264_params=X264)
    whole = read_clip(path, named(ALL, decoder))
    inside = [number for number in range(60) if span[0] <= number / 25 <= span[1]]
    for contract in (ALL, FEW):
        part = read_clip(Part(str(path), *span), named(contract, decoder))
        chosen = list(part.frame_indices)
        assert set(chosen) <= set(inside) and chosen[0] == inside[0]
        assert chosen[-1] == inside[-1] or len(inside) == 1
        assert part.num_source_frames == len(inside) and part.note == ""
        assert read_numbers(part.frames.permute(0, 2, 3, 1)) == chosen
        assert torch.equal(part.frames, whole.frames[chosen])
        assert part.timestamps_s == tuple(whole.timestamps_s[number] for number in chosen)
        assert (part.decoder, part.path, part.fps) == (decoder, str(path), whole.fps)


def test_the_rule_is_that_of_qwen_vl_utils() -> None:
    """An independent truth: at a constant rate, whatever the part."""
    pytest.importorskip("keytoken.demo")  # makes torchvision importable beside CPU torch
    from qwen_vl_utils.vision_process import calculate_video_frame_range, smart_nframes

    rng = np.random.default_rng(3)
    compared = 0
    for _ in range(400):
        total, fps = int(rng.integers(8, 900)), float(rng.choice([8, 24000 / 1001, 25, 30]))
        start, end = sorted(rng.uniform(0, total / fps * 1.1, 2).tolist())
        times = [number / fps for number in range(total)]
        near = min(abs(time - edge) for time in times for edge in (start, end))
        if near < 2e-3:
            continue  # there a rounding decides
        try:
            first, last, count = calculate_video_frame_range(
                {"video_start": start, "video_end": end}, total, fps
            )
            wanted = smart_nframes({"fps": 2.0, "min_frames": 4, "max_frames": 16}, count, fps)
        except ValueError:
            continue  # fewer frames than it takes
        expected = torch.linspace(first, last, wanted, dtype=torch.float64).round().long().tolist()
        chosen = choose_frames(times, fps, SamplingContract(max_frames=16), (start, end))
        assert chosen.numbers == expected and chosen.num_frames == count
        compared += 1
    assert compared > 200


def test_what_the_model_is_told_of_a_part(numbered: Numbered) -> None:
    """As qwen_vl_utils: numbers of the whole file, and as many frames as the part has."""
    part = read_clip(Part(str(numbered("a.mp4")), 0.8, 2.0), FEW)
    assert part.metadata() | {"video_backend": ""} == {
        "fps": 25.0,
        "frames_indices": [20, 30, 40, 50],
        "total_num_frames": 31,
        "duration": 31 / 25,
        "video_backend": "",
    }
    assert part.sampled_fps == pytest.approx(4 / 31 * 25)


def test_a_variable_rate_is_cut_by_true_times(decoder: str, numbered: Numbered, read_numbers: Read) -> None:
    times = [number * 40 if number < 30 else 1200 + (number - 30) * 200 for number in range(60)]
    path = numbered("a.mp4", times_ms=times, x264_params=X264)
    part = read_clip(Part(str(path), 1.1, 2.7), named(ALL, decoder))
    assert list(part.frame_indices) == [28, 29, 30, 31, 32, 33, 34, 35, 36, 37]
    assert read_numbers(part.frames.permute(0, 2, 3, 1)) == list(part.frame_indices)


def test_a_part_at_a_variable_rate_has_its_own_rate(decoder: str, numbered: Numbered) -> None:
    """30 frames a second for two seconds, then one: the file's average says nothing about either."""
    times = [
        round(number * 1000 / 30) if number < 60 else 2000 + (number - 60) * 1000 for number in range(90)
    ]
    path = str(numbered("a.mp4", times_ms=times, num_frames=90, x264_params=X264))
    contract = SamplingContract(fps=2.0, min_frames=4, max_frames=16, **OWN_SIZE)
    whole, fast, slow = (
        read_clip(clip, named(contract, decoder)) for clip in (path, Part(path, 0, 1.99), Part(path, 10, 29))
    )
    assert whole.fps < 4
    assert (len(fast.frame_indices), fast.num_source_frames) == (4, 60)
    assert fast.sampled_fps == pytest.approx(2.0, rel=0.01)
    assert fast.metadata()["duration"] == pytest.approx(2.0, rel=0.01)
    assert (len(slow.frame_indices), slow.num_source_frames) == (16, 20)
    assert slow.sampled_fps == pytest.approx(16 / 20, rel=0.01)
    assert slow.metadata()["duration"] == pytest.approx(20.0, rel=0.01)


def test_rounded_times_are_no_rate_of_their_own() -> None:
    """Times in whole milliseconds, as Matroska has them, two frames of 23.976 a second: 41 or 42 ms."""
    fps = 24000 / 1001
    times = [round(number / fps, 3) for number in range(240)]
    for first in range(0, 200, 7):
        for count in (1, 2, 3, 30):
            span = (times[first], times[first + count - 1] + 0.01)
            assert choose_frames(times, fps, FEW, span).fps == fps


BAD = {
    "a part that ends before it starts": ((2.0, 1.0), "from 2 s to 1 s"),
    "a part without length": ((1.0, 1.0), "from 1 s to 1 s"),
    "a part that starts before the clip": ((-1.0, 1.0), "from -1 s"),
    "a part that starts at no number": ((nan, 1.0), "from nan s"),
    "a part after the clip": ((3.0, 4.0), "starts at 3 s, after the last frame, which is at 2.360 s"),
    "a part between two frames": ((1.01, 1.03), "no frame lies between 1.01 s and 1.03 s"),
}


@pytest.mark.parametrize(("span", "words"), BAD.values(), ids=BAD)
def test_parts_that_cannot_be(
    span: tuple[float, float], words: str, decoder: str, numbered: Numbered
) -> None:
    path = numbered("a.mp4")
    with pytest.raises(ClipError) as caught:
        read_clip(Part(str(path), *span), named(FEW, decoder))
    message = str(caught.value)
    assert message.startswith(f"clip {path}: ") and words in message and "correct" in message


def test_an_end_beyond_the_clip_is_noted(numbered: Numbered) -> None:
    path = str(numbered("a.mp4"))
    part = read_clip(Part(path, 2.0, 9.0), ALL)
    assert part.frame_indices[-1] == 59 and part.note == "the part asked for ends at 9 s, the clip at 2.40 s"
    assert read_clip(Part(path, 2.0, 2.4), ALL).note == ""


def test_parts_of_folders_and_images(tmp_path: Path) -> None:
    folder = tmp_path / "frames"
    folder.mkdir()
    for number in range(9):
        Image.new("RGB", (56, 56), (number * 20,) * 3).save(folder / f"{number}.png")
    part = Part(str(folder), 1.0, 2.0)
    with pytest.raises(
        ClipError, match=r"how many frames make a second is not known; write it into fps\.txt"
    ):
        read_clip(part, ALL)
    (folder / "fps.txt").write_text("3")
    clip = read_clip(part, ALL)
    assert clip.frame_indices == (3, 4, 5, 6) and clip.timestamps_s == (1.0, 4 / 3, 5 / 3, 2.0)
    assert clip.frames[:, 0, 0, 0].tolist() == [60, 80, 100, 120]
    with pytest.raises(ClipError, match="after the last frame"):
        read_clip(Part(str(folder / "0.png"), 1.0, 2.0), ALL)


def same(one: Clip, other: Clip) -> bool:
    fields = [field.name for field in dataclasses.fields(Clip) if field.name != "frames"]
    return torch.equal(one.frames, other.frames) and all(
        getattr(one, name) == getattr(other, name) for name in fields
    )


def test_the_cache_keeps_parts_apart(numbered: Numbered, tmp_path: Path) -> None:
    path = str(numbered("a.mp4"))
    clips = [path, Part(path, 0.0, 1.0), Part(path, 0.5, 1.0), Part(path, 0.5), Part(path, 0.0, 1.5)]
    cache = FrameCache(tmp_path / "cache")
    for count, clip in enumerate(clips):
        assert not cache.has(clip, FEW)
        assert same(cache.read_through(clip, FEW), read_clip(clip, FEW))
        assert cache.has(clip, FEW) and (cache.statistics.hits, cache.statistics.misses) == (0, count + 1)
    again = FrameCache(tmp_path / "cache")
    assert all(same(again.read_through(clip, FEW), read_clip(clip, FEW)) for clip in clips)
    assert (again.statistics.hits, again.statistics.misses) == (5, 0)
    whole = numbered("b.mp4")  # the same bytes elsewhere
    assert again.has(Part(str(whole), 0.5, 1.0), FEW)


def test_a_child_reads_parts(numbered: Numbered) -> None:
    part = Part(str(numbered("a.mp4")), 0.5, 1.0)
    assert same(read_clip_within(part, FEW, 60.0), read_clip(part, FEW))
    with pytest.raises(ClipError, match="correct the start and the end"):
        read_clip_within(dataclasses.replace(part, start_s=5.0, end_s=6.0), FEW, 60.0)


def test_entries_of_rows() -> None:
    assert named_clip({"video": "file:///a.mp4", "video_start": None}) == "/a.mp4"
    entries: list[dict[str, Any]] = [
        {"video": "a.mp4"},
        {"video": "a.mp4", "video_start": 2.0},
        {"video": "a.mp4", "video_end": 4.5},
        {"video": "a.mp4", "video_start": 2.0, "video_end": 4.5},
    ]
    clips = [named_clip(entry) for entry in entries]
    assert clips == ["a.mp4", Part("a.mp4", 2.0), Part("a.mp4", 0.0, 4.5), Part("a.mp4", 2.0, 4.5)]
    assert [entry_of(clip) for clip in clips] == entries
    assert [str(clip) for clip in clips[1:]] == [
        "a.mp4 (2 s to its end)",
        "a.mp4 (0 s to 4.5 s)",
        "a.mp4 (2 s to 4.5 s)",
    ]
    for value in ("00:02", True):
        with pytest.raises(DataError, match=r"a\.mp4: video_start is .*seconds as a number"):
            named_clip({"video": "a.mp4", "video_start": value})
