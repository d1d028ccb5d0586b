"""All decoders show the same frames: those whose numbers were asked for, at their true times.

The truth is in the pixels: every frame shows its own number.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keytoken.data.clips import read_clip
from keytoken.data.contract import SamplingContract
from keytoken.data.decoders import AUTO, DECODERS, Decoded, DecoderError, DecoderMissing
from keytoken.data.part import WHOLE, Span

OWN_SIZE = {"min_pixels": 28 * 28, "max_pixels": 4000 * 4000}
FEW = SamplingContract(fps=2.0, min_frames=4, max_frames=8, **OWN_SIZE)
MANY = SamplingContract(fps=25.0, min_frames=4, max_frames=22, **OWN_SIZE)

X264 = "keyint=12:bframes=3:b-adapt=0:scenecut=0"
X265 = "keyint=12:bframes=3:log-level=none"
# Name of the file and how it is encoded.
WAYS: dict[str, tuple[str, dict[str, str]]] = {
    "H.264, closed groups": ("a.mp4", {"x264_params": X264}),
    "H.264, open groups": ("a.mp4", {"x264_params": f"{X264}:open-gop=1"}),
    "H.264, open groups, Matroska": ("a.mkv", {"x264_params": f"{X264}:open-gop=1"}),
    "H.264, intra refresh": ("a.mp4", {"x264_params": "intra-refresh=1:keyint=12:bframes=0"}),
    "H.264, 4:4:4": ("a.mp4", {"pixels": "yuv444p"}),
    "H.264, 10 bits": ("a.mp4", {"pixels": "yuv420p10le", "x264_params": X264}),
    "H.265, open groups": ("a.mp4", {"codec": "libx265", "x265_params": f"{X265}:open-gop=1"}),
    "H.265, closed groups": ("a.mp4", {"codec": "libx265", "x265_params": f"{X265}:open-gop=0"}),
    "H.265, 10 bits": ("a.mp4", {"codec": "libx265", "pixels": "yuv420p10le", "x265_params": X265}),
    "AV1": ("a.mp4", {"codec": "libsvtav1", "preset": "12", "g": "12"}),
    "VP9, hidden frames": (
        "a.webm",
        {"codec": "libvpx-vp9", "g": "12", "cpu_used": "8", "auto_alt_ref": "1"},
    ),
    "VP8": ("a.webm", {"codec": "libvpx", "g": "12"}),
    "ProRes, 10 bits": ("a.mov", {"codec": "prores_ks", "pixels": "yuv422p10le"}),
    "Motion JPEG": ("a.avi", {"codec": "mjpeg", "pixels": "yuvj420p"}),
    "MPEG-TS": ("a.ts", {"x264_params": X264}),
    "MPEG-TS, MPEG-2": ("a.ts", {"codec": "mpeg2video", "g": "12", "bf": "2"}),
    "MPEG-PS": ("a.mpg", {"codec": "mpeg2video", "g": "12", "bf": "2"}),
    "AVI": ("a.avi", {"x264_params": X264}),
    "AVI, MPEG-4": ("a.avi", {"codec": "mpeg4", "g": "12", "bf": "2"}),
    "Flash": ("a.flv", {"x264_params": X264}),
    "WMV": ("a.wmv", {"codec": "wmv2", "g": "12"}),
}


def decoded_by(decoder: str, path: Path, contract: SamplingContract) -> Decoded | None:
    """None if the decoder says that it cannot; skips if it is not installed."""
    try:
        return DECODERS[decoder](path, contract, WHOLE)
    except DecoderMissing as reason:
        pytest.skip(str(reason))
    except DecoderError:
        return None


@pytest.fixture(autouse=True)
def _quiet_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVT_LOG", "1")


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("way", WAYS)
def test_a_decoder_shows_the_frames_asked_for_or_says_that_it_cannot(
    way: str, decoder: str, numbered: Callable[..., Path], read_numbers: Callable[[Any], list[int]]
) -> None:
    name, options = WAYS[way]
    path = numbered(name, **options)
    for contract in (FEW, MANY):
        decoded = decoded_by(decoder, path, contract)
        if decoded is None:
            assert decoder != "pyav", "PyAV reads everything"
            continue
        assert read_numbers(decoded.frames) == decoded.indices
        assert (decoded.num_source_frames, decoded.fps, decoded.note) == (60, 25.0, "")
        assert decoded.timestamps_s == pytest.approx([number / 25 for number in decoded.indices], abs=1e-3)


def test_decord_itself_shows_other_frames(
    numbered: Callable[..., Path], read_numbers: Callable[[Any], list[int]]
) -> None:
    """Why decord is asked by name only, and reads without seeking: if this fails, it has been repaired."""
    decord = pytest.importorskip("decord")
    generator = np.random.default_rng(1)
    wrong = {}
    for way in ("H.264, open groups", "H.264, intra refresh", "MPEG-TS", "MPEG-PS", "AVI", "WMV"):
        name, options = WAYS[way]
        path = numbered(name, **options)
        wrong[way] = 0
        for _ in range(10):
            asked = sorted(generator.choice(60, 6, replace=False).tolist())
            shown = read_numbers(decord.VideoReader(str(path), num_threads=1).get_batch(asked).asnumpy())
            wrong[way] += sum(one != other for one, other in zip(asked, shown, strict=True))
        path.unlink()
    assert all(wrong.values()), wrong


SHARED = {
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


@pytest.mark.parametrize("decoder", [name for name in DECODERS if name != "pyav"])
@pytest.mark.parametrize("name", SHARED)
def test_decoders_agree_on_real_clips(name: str, decoder: str, shared_data: Path) -> None:
    """Same numbers, same times, and on these clips, of 8 bits, the same pixels."""
    path = shared_data / "videos" / name
    for contract in (FEW, MANY):
        other = decoded_by(decoder, path, contract)
        if other is None:
            assert (name, decoder) == ("av1.mkv", "decord")
            continue
        own = DECODERS["pyav"](path, contract, WHOLE)
        assert own.num_source_frames == other.num_source_frames == SHARED[name]
        assert (own.indices, own.timestamps_s, own.fps) == (other.indices, other.timestamps_s, other.fps)
        assert np.array_equal(own.frames, other.frames)


@pytest.mark.parametrize("decoder", [name for name in DECODERS if name != "pyav"])
@pytest.mark.parametrize("way", ["H.264, 10 bits", "H.265, 10 bits", "ProRes, 10 bits"])
def test_ten_bits_are_reduced_alike(way: str, decoder: str, numbered: Callable[..., Path]) -> None:
    """Releases of FFmpeg round differently, most of all where hard edges of colour are interpolated."""
    name, options = WAYS[way]
    path = numbered(name, **options)
    own, other = DECODERS["pyav"](path, MANY, WHOLE), decoded_by(decoder, path, MANY)
    assert other is not None
    distance = np.abs(own.frames.astype(int) - other.frames)
    assert distance.mean() < 0.3 and distance.max() <= 80  # measured: up to 0.15 and 66


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_variable_rate_is_chosen_by_number_and_timed_truly(
    decoder: str, numbered: Callable[..., Path], read_numbers: Callable[[Any], list[int]]
) -> None:
    times = [number * 40 if number < 30 else 1200 + (number - 30) * 200 for number in range(60)]
    decoded = decoded_by(decoder, numbered("a.mp4", times_ms=times, x264_params=X264), FEW)
    assert decoded is not None
    assert decoded.indices == [0, 8, 17, 25, 34, 42, 51, 59] == read_numbers(decoded.frames)
    assert decoded.timestamps_s == pytest.approx(
        [times[number] / 1000 for number in decoded.indices], abs=1e-3
    )


@pytest.mark.parametrize("decoder", DECODERS)
def test_times_count_from_the_first_frame(decoder: str, numbered: Callable[..., Path]) -> None:
    path = numbered("a.mkv", times_ms=[5000 + number * 40 for number in range(60)])
    decoded = decoded_by(decoder, path, FEW)
    assert decoded is not None
    assert decoded.timestamps_s == pytest.approx([number / 25 for number in decoded.indices], abs=1e-3)


def test_frames_that_an_edit_list_hides_are_no_frames(
    numbered: Callable[..., Path], read_numbers: Callable[[Any], list[int]]
) -> None:
    """A clip that was cut without encoding it again starts before its first shown frame."""

    def shift(number: int, packet: Any) -> bool:
        packet.pts -= 5
        packet.dts -= 5
        return True

    options = {"avoid_negative_ts": "disabled", "use_editlist": "1"}
    path = numbered("a.mp4", change=shift, container_options=options, x264_params="keyint=12:bframes=0")
    decoded = DECODERS["pyav"](path, MANY, WHOLE)
    assert (decoded.num_source_frames, decoded.note) == (55, "")
    assert read_numbers(decoded.frames) == [index + 5 for index in decoded.indices]


CLOCKWISE = {
    90: ([0, 1, -1, 0], (0, -1)),
    180: ([-1, 0, 0, -1], (-1, -1)),
    270: ([0, -1, 1, 0], (-1, 0)),
}


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("degrees", CLOCKWISE)
def test_turned_clips_stand_upright(decoder: str, degrees: int, numbered: Callable[..., Path]) -> None:
    """The matrix of ISO 14496-12 in the track's header says where the red corner at the top left is shown."""
    (a, b, c, d), corner = CLOCKWISE[degrees]
    path = numbered("a.mp4", num_frames=4)
    content = bytearray(path.read_bytes())
    start = content.index(b"tkhd") + 44
    for place, value in zip((0, 1, 3, 4), (a, b, c, d), strict=True):
        content[start + 4 * place : start + 4 * place + 4] = (value * 65536).to_bytes(4, "big", signed=True)
    path.write_bytes(content)
    decoded = decoded_by(decoder, path, FEW)
    assert decoded is not None
    assert decoded.frames.shape[1:3] == ((120, 160) if degrees == 180 else (160, 120))
    reds = {place: int(decoded.frames[0][place][0]) for place in ((0, 0), (0, -1), (-1, 0), (-1, -1))}
    assert reds.pop(corner) > 200
    assert max(reds.values()) < 60


def test_auto_records_who_read_a_clip(numbered: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = numbered("a.mp4")

    def cannot(path: Path, contract: SamplingContract, span: Span) -> Decoded:
        raise DecoderError("not today")

    for first in AUTO:
        monkeypatch.setitem(DECODERS, first, DECODERS["pyav"])
        assert read_clip(path, FEW).decoder == first
        monkeypatch.setitem(DECODERS, first, cannot)
    named = SamplingContract(decoder="decord", **OWN_SIZE)
    assert read_clip(path, named).decoder == "decord"
