"""Clips of 8 frames in several codecs; every frame shows its own number, as the place of a bright bar.

Run as a module it writes one of them: ``python -m keytoken.doctor.tiny_clips CODEC PATH``.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np

from keytoken.doctor.child import run_child

# Codec: encoders that write it, the first one that exists is taken; container.
CODECS: dict[str, tuple[tuple[str, ...], str]] = {
    "h264": (("libx264", "libopenh264"), "mp4"),
    "hevc": (("libx265",), "mp4"),
    "vp9": (("libvpx-vp9",), "webm"),
    "av1": (("libsvtav1", "libaom-av1"), "mp4"),
}
NUM_FRAMES, BAR, _HEIGHT = 8, 28, 112  # the contract leaves frames of this size as they are
RATE = 8
_DARK, _BRIGHT = 40, 220
_LIMIT_S = 60.0


def write_clips(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """Write a clip of every codec, in a child: encoders print what they do, and may crash.

    Returns:
        Their paths by codec, and the codecs that nothing here writes.
    """
    clips = {codec: folder / f"{codec}.{container}" for codec, (_, container) in CODECS.items()}
    for codec, path in clips.items():
        if run_child(["-m", "keytoken.doctor.tiny_clips", codec, str(path)], _LIMIT_S).error:
            path.unlink(missing_ok=True)
    return {c: p for c, p in clips.items() if p.exists()}, [c for c, p in clips.items() if not p.exists()]


def write_clip(codec: str, path: str) -> None:
    """Write one clip by the first encoder of its codec that is here; none if there is none."""
    encoder = next((name for name in CODECS[codec][0] if _exists(name)), None)
    if encoder is not None:
        _write(Path(path), encoder)


def _exists(encoder: str) -> bool:
    import av  # in the child, where a broken one does no harm

    try:
        av.codec.Codec(encoder, "w")
    except av.codec.codec.UnknownCodecError:
        return False
    return True


def _write(path: Path, encoder: str) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(encoder, rate=RATE)
        stream.width, stream.height, stream.pix_fmt = NUM_FRAMES * BAR, _HEIGHT, "yuv420p"
        for number in range(NUM_FRAMES):
            picture = np.full((_HEIGHT, NUM_FRAMES * BAR, 3), _DARK, dtype=np.uint8)
            picture[:, number * BAR : (number + 1) * BAR] = _BRIGHT
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


if __name__ == "__main__":
    write_clip(*sys.argv[1:])
