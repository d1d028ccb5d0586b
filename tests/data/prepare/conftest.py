"""A folder of small clips, and a short way to prepare a dataset from rows."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from keytoken.data.prepare.build import prepare
from keytoken.data.prepare.ledger import Ledger
from keytoken.data.prepare.settings import PrepareSettings


def write_clip(path: Path, num_frames: int = 8, size: tuple[int, int] = (64, 48), shade: int = 0) -> Path:
    """A clip of grey frames at 8 frames a second; clips of another shade have another content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height = size
        stream.time_base = Fraction(1, 8)
        for number in range(num_frames):
            pixels = np.full((size[1], size[0], 3), (shade * 40 + number) % 256, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for shade, name in enumerate(("one.mp4", "two.mp4", "three.mp4", "deep/four.mp4")):
        write_clip(folder / name, shade=shade)
    Image.new("RGB", (80, 60), "red").save(folder / "photo.png")
    return folder


@pytest.fixture
def media(clip_folder: Path, tmp_path: Path) -> Path:
    """A media root of one's own, with hard links to the clips."""
    root = tmp_path / "media"
    for source in sorted(clip_folder.rglob("*.*")):
        target = root / source.relative_to(clip_folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.hardlink_to(source)
    return root


class Bench:
    """Writes a source and prepares it.

    Attributes:
        out: Folder of the dataset, where a test names no other.
        ledger: Books of the last one.
        source: The file of questions.
    """

    def __init__(self, tmp_path: Path, media: Path) -> None:
        self.tmp_path, self.media = tmp_path, media
        self.out = tmp_path / "out"
        self.source = tmp_path / "source.json"
        self.ledger = Ledger()

    def write(self, name: str, content: str | bytes) -> Path:
        self.source = self.tmp_path / name
        self.source.write_bytes(content if isinstance(content, bytes) else content.encode())
        return self.source

    def csv(self, header: Sequence[str], *rows: Sequence[str]) -> Path:
        self.source = self.tmp_path / "source.csv"
        with self.source.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *rows])
        return self.source

    def json(self, rows: Any) -> Path:
        return self.write("source.json", json.dumps(rows))

    def prepare(self, name: str = "folder", **settings: Any) -> list[dict[str, Any]]:
        given = {"source": str(self.source), "media_root": str(self.media), "out": str(self.out), "jobs": 1}
        given["check"] = "none"  # starts no child; tests of headers ask for them
        folder, self.ledger = prepare(PrepareSettings(name=(name,), **(given | settings)))
        rows: list[dict[str, Any]] = pq.read_table(
            folder / f"{settings.get('split', 'train')}.parquet"
        ).to_pylist()
        return rows

    def reasons(self) -> list[tuple[str, str]]:
        """Place and reason of every row that was set aside."""
        return [(entry.place, entry.reason) for entry in self.ledger.quarantined]


@pytest.fixture
def bench(tmp_path: Path, media: Path) -> Bench:
    return Bench(tmp_path, media)


@pytest.fixture(scope="session")
def make_clip() -> Callable[..., Path]:
    return write_clip
