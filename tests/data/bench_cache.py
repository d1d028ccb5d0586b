"""Cached against uncached reading, in one run: ``python tests/data/bench_cache.py DIR [ROUNDS [PRESET...]]``.

A cached reading includes everything that training would wait for: the look at the clip, the note of its hash,
the header, and a copy of all frames. Cached and uncached readings of a clip take turns. Files are warm in the
page cache for both, and times are those of the processor, so that other load does not change them.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from keytoken.data.cache import fingerprint
from keytoken.data.cache.store import FrameCache
from keytoken.data.clips import Clip, read_clip
from keytoken.data.contract import SamplingContract
from keytoken.errors import ClipError

PRESETS = ("demo", "video_r1_16f", "eval_64f")


def seconds(read: Callable[[], Clip]) -> float:
    start = time.process_time()
    read().frames.clone()  # every page
    return time.process_time() - start


def measure(
    path: str, contract: SamplingContract, root: Path, rounds: int
) -> tuple[float, float, float, int]:
    """Medians of uncached, cached and first (decoded and stored) readings in seconds, and bytes."""
    cache = FrameCache(root)
    first = seconds(lambda: cache.read_through(path, contract))
    pairs = [
        (seconds(lambda: read_clip(path, contract)), seconds(lambda: cache.read_through(path, contract)))
        for _ in range(rounds)
    ]
    uncached, cached = (statistics.median(column) for column in zip(*pairs, strict=True))
    assert cache.statistics.hits == rounds
    return uncached, cached, first, read_clip(path, contract).frames.nbytes


def main(folder: str, rounds: int = 5, presets: Sequence[str] = PRESETS) -> None:
    torch.set_num_threads(1)
    fingerprint._SETTLED_S = -1.0  # clips copied a moment ago count as any others
    print(f"{'ms of CPU, medians':<26}{'MiB':>7}{'uncached':>10}{'cached':>9}{'ratio':>8}{'first':>9}")
    for preset in presets:
        contract, ratios = SamplingContract.preset(preset), []
        with tempfile.TemporaryDirectory() as root:
            for path in sorted(Path(folder).iterdir()):
                try:
                    uncached, cached, first, size = measure(str(path), contract, Path(root), rounds)
                except ClipError:
                    continue
                ratios.append(uncached / cached)
                times = f"{1e3 * uncached:>10.1f}{1e3 * cached:>9.2f}{ratios[-1]:>8.0f}{1e3 * first:>9.1f}"
                print(f"{path.name:<26}{size / 2**20:>7.2f}{times}")
        print(f"{preset}: median ratio {statistics.median(ratios):.0f} over {len(ratios)} clips\n")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:3]), *filter(None, [sys.argv[3:]]))
