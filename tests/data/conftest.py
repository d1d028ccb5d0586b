"""Clips whose frames show their own number, encoded in every way that puts frames out of order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

HEIGHT, WIDTH, BITS = 120, 160, 7

Draw = Callable[..., Path]


def draw(number: int) -> np.ndarray:
    """A frame with its number as a row of black and white blocks, and a red corner at the top left."""
    frame = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    for bit in range(BITS):
        frame[40:80, 10 + 20 * bit : 25 + 20 * bit] = 255 * (number >> bit & 1)
    frame[:24, :24] = (250, 0, 0)
    return frame


def numbers_of(frames: Any) -> list[int]:
    """What the blocks say, of uint8 frames [T, H, W, C]."""
    blocks = [np.asarray(frames)[:, 60, 17 + 20 * bit].mean(axis=-1) > 128 for bit in range(BITS)]
    return [int(number) for number in sum(block.astype(int) << bit for bit, block in enumerate(blocks))]


@pytest.fixture
def read_numbers() -> Callable[[Any], list[int]]:
    return numbers_of


@pytest.fixture
def numbered(tmp_path: Path) -> Draw:
    """Writes ``num_frames`` numbered frames to a file of that name; packets can be changed before muxing."""

    def write(
        name: str,
        codec: str = "libx264",
        *,
        num_frames: int = 60,
        pixels: str = "yuv420p",
        rate: int = 25,
        times_ms: Sequence[int] | None = None,
        change: Callable[[int, Any], bool] = lambda number, packet: True,
        container_options: dict[str, str] | None = None,
        **options: str,
    ) -> Path:
        path = tmp_path / name
        settings = {key.replace("_", "-"): value for key, value in options.items()}
        packets = 0
        with av.open(str(path), "w", options=container_options or {}) as container:
            stream: Any = container.add_stream(codec, rate=rate, options=settings)
            stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, pixels
            stream.codec_context.thread_count = 1
            if times_ms is not None:
                stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
            for number in [*range(num_frames), None]:
                frame = None
                if number is not None:
                    frame = av.VideoFrame.from_ndarray(draw(number), format="rgb24").reformat(format=pixels)
                    if times_ms is not None:
                        frame.pts, frame.time_base = times_ms[number], Fraction(1, 1000)
                for packet in stream.encode(frame):
                    if change(packets, packet):
                        container.mux(packet)
                    packets += 1
        return path

    return write
