"""Draws clips and writes them to mp4 files.

The files hold RGB H.264 without loss, so the frames that decord and PyAV decode are bit for bit the
frames that were drawn: the supervised warm start may train on drawn frames without visiting the disk
and still sees exactly what reinforcement learning will decode.
"""

import os
from pathlib import Path

import numpy as np

from keytoken.demo.world import COLORS, FRAME_SIZE, NUM_FRAMES, Body

CLIP_FPS = 2  # also the sampling contract's default rate: all eight frames are seen

_BACKGROUND = 22.0
_NOISE = 6.0  # grey levels
_BAR = 0.36  # half width of the cross's bars, relative to its radius


def draw_clip(bodies: tuple[Body, ...], rng: np.random.Generator) -> np.ndarray:
    """Draw a clip on a dark background with a little noise.

    Args:
        bodies: What to draw, later ones over earlier ones.
        rng: Source of the noise.

    Returns:
        uint8 frames [T, H, W, 3].
    """
    noise = rng.random((NUM_FRAMES, FRAME_SIZE, FRAME_SIZE), dtype=np.float32)
    frames = np.repeat((_BACKGROUND - _NOISE + 2 * _NOISE * noise)[..., None], 3, axis=-1)
    for body in bodies:
        opacity = (_coverage(body) * body.light[:, None, None].astype(np.float32))[..., None]
        frames += opacity * (np.array(COLORS[body.color], dtype=np.float32) - frames)
    return (frames + 0.5).astype(np.uint8)


def _coverage(body: Body) -> np.ndarray:
    """Share of each pixel that the body covers, with edges one pixel soft.

    [T, H, W], or [1, H, W] if the body neither moves nor changes its size.
    """
    still = np.ptp(body.center, axis=0).max() == 0 and np.ptp(body.radius) == 0
    center, radius = (x[:1] if still else x for x in (body.center, body.radius))
    center, radius = center.astype(np.float32), radius.astype(np.float32)[:, None, None]
    grid = np.arange(FRAME_SIZE, dtype=np.float32) + 0.5
    x = grid[None, None, :] - center[:, 0, None, None]
    y = grid[None, :, None] - center[:, 1, None, None]
    if body.shape == "square":
        distance = np.maximum(np.abs(x), np.abs(y)) - 0.9 * radius
    elif body.shape == "circle":
        distance = np.hypot(x, y) - radius
    elif body.shape == "triangle":
        distance = np.maximum(y - 0.8 * radius, np.abs(x) * 0.87 - 0.5 * y - 0.6 * radius)
    else:
        distance = np.minimum(
            np.maximum(np.abs(x) - _BAR * radius, np.abs(y) - radius),
            np.maximum(np.abs(y) - _BAR * radius, np.abs(x) - radius),
        )
    return np.clip(0.5 - distance, 0.0, 1.0)


def write_clip(path: Path, frames: np.ndarray) -> None:
    """Encode frames without loss; the file appears under its name only when it is complete.

    Args:
        path: Where the mp4 file goes; the folder must exist.
        frames: uint8 frames [T, H, W, 3].
    """
    import av

    partial = path.with_suffix(f".{os.getpid()}.partial")
    with av.open(str(partial), "w", format="mp4") as container:
        stream = container.add_stream("libx264rgb", rate=CLIP_FPS)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "rgb24"
        # qp 0 is H.264's lossless mode; one thread keeps the bytes the same on every machine.
        stream.options = {"qp": "0", "preset": "ultrafast", "threads": "1"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    partial.replace(path)
