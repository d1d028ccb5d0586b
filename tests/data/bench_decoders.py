"""Decoder against decoder, in one run: ``python tests/data/bench_decoders.py DIR [ROUNDS [PRESET ...]]``.

For every clip of a folder, the decoders and the child process of ``read_clip_within`` take turns; the table
has the median of PyAV in milliseconds and the others as multiples of it. All are timed by the processor's
clock, the child's work by the child's clock and ours together, so that other load does not change them. The
last row is the median of each column.
"""

from __future__ import annotations

import multiprocessing
import statistics
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from keytoken.data.clips import read_clip
from keytoken.data.contract import SamplingContract
from keytoken.data.decoders import DECODERS, DecoderMissing
from keytoken.data.timed import read_clip_within
from keytoken.errors import ClipError, ConfigurationError

PRESETS = ("video_r1_16f", "eval_64f")
LIMIT_S = 120.0
CHILD = "child"


def columns() -> list[str]:
    """Decoders that are installed."""
    names = []
    for name, decode in DECODERS.items():
        try:
            decode(Path("no such file"), SamplingContract())
        except DecoderMissing:
            continue
        except (OSError, ValueError):
            names.append(name)
    return names


def cpu_seconds() -> float:
    """Processor time of this process and of its children, in nanosecond steps."""
    # Linux names the clock of another process by its number: (~pid << 3) | 2, see clock_getcpuclockid(3).
    children = [time.clock_gettime(~child.pid << 3 | 2) for child in multiprocessing.active_children()]
    return time.process_time() + sum(children)


def measure(path: Path, contract: SamplingContract, names: list[str], rounds: int) -> dict[str, float]:
    """Median seconds of each reader; a decoder that cannot read the clip has none."""
    readers = {}
    for name in names:
        named = replace(contract, decoder=name)
        try:
            read_clip(path, named)
        except (ClipError, ConfigurationError):
            continue
        readers[name] = partial(read_clip, path, named)
    if "pyav" not in readers:
        return {}
    readers[CHILD] = partial(read_clip_within, path, replace(contract, decoder="pyav"), LIMIT_S)
    times: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(rounds + 1):  # the first round starts the child and is not counted
        for name, read in readers.items():
            start = cpu_seconds()
            read()
            times[name].append(cpu_seconds() - start)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def report(folder: Path, contract: SamplingContract, rounds: int) -> None:
    """Print the table of one contract."""
    names = columns()
    others = [name for name in names if name != "pyav"]
    ratios: dict[str, list[float]] = {name: [] for name in [*others, CHILD]}
    print(f"{'':28}{'pyav ms':>9}" + "".join(f"{name:>12}" for name in ratios))
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        found = measure(path, contract, names, rounds)
        if not found:
            print(f"{path.name[:27]:28}{'not read':>9}")
            continue
        row = {name: found[name] / found["pyav"] for name in others if name in found}
        row[CHILD] = found[CHILD] / found["pyav"]
        for name, ratio in row.items():
            ratios[name].append(ratio)
        cells = "".join(f"{row[name]:>12.2f}" if name in row else f"{'-':>12}" for name in ratios)
        print(f"{path.name[:27]:28}{found['pyav'] * 1000:>9.1f}{cells}")
    medians = "".join(f"{statistics.median(v):>12.2f}" if v else f"{'-':>12}" for v in ratios.values())
    print(f"{'median':28}{'':>9}{medians}")


def main(words: list[str]) -> int:
    if not words or not Path(words[0]).is_dir():
        print(__doc__)
        return 2
    torch.set_num_threads(1)
    rounds = int(words[1]) if len(words) > 1 else 5
    for name in words[2:] or PRESETS:
        print(f"\nsampling={name}")
        report(Path(words[0]), SamplingContract.preset(name), rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
