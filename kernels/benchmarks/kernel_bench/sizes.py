"""How large everything is: the full sizes of a GPU, those of a CPU, and tiny ones for tests and memcheck."""

from __future__ import annotations

from dataclasses import dataclass

import torch

TEMPERATURE = 1.0  # of timed calls: cut-cross-entropy has no other
GATE_TEMPERATURE = 0.9
NUM_SETS = 3
GROUP = 8  # answers to one prompt
ANSWER_SHARE, SELECTED_SHARE = 0.2, 0.45  # of the worked example


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """One set of sizes.

    Attributes:
        vocabulary: V of the timed cases.
        hidden: H of the timed cases.
        dtype: Hidden states and weight of the head.
        tokens: Five numbers of rows, ascending: nominally 2k, 4k, 8k, 16k, 32k.
        batches: B of the timed selections, ascending.
        width: T of the timed selections.
        gate_vocabulary: V of the gates.
        gate_hidden: H of the gates.
        gate_rows: Rows of the gates, at most 256 (their truth is float64 and dense).
        gate_batch: B of the gates of the selection, a multiple of GROUP.
        gate_width: T of the gates of the selection.
        copied: Bytes that are copied to find the bandwidth.
        seconds: How long to measure a case of ordinary importance.
    """

    vocabulary: int
    hidden: int
    dtype: torch.dtype
    tokens: tuple[int, int, int, int, int]
    batches: tuple[int, ...]
    width: int
    gate_vocabulary: int
    gate_hidden: int
    gate_rows: int
    gate_batch: int
    gate_width: int
    copied: int
    seconds: float


# Qwen2.5-VL-7B's vocabulary and width. The gates of the selection reach all three plans of its launches:
# sequences of 1,024 tokens, groups of 8,192, a batch of 65,536.
GPU = Sizes(
    vocabulary=151_936,
    hidden=3584,
    dtype=torch.bfloat16,
    tokens=(2048, 4096, 8192, 16_384, 32_768),
    batches=(64, 512),
    width=1024,
    gate_vocabulary=151_936,
    gate_hidden=3584,
    gate_rows=128,
    gate_batch=64,
    gate_width=1024,
    copied=4 << 30,
    seconds=4.0,
)
# The same vocabulary, little else: everything within a minute on two cores.
CPU = Sizes(
    vocabulary=151_936,
    hidden=256,
    dtype=torch.float32,
    tokens=(32, 32, 32, 32, 40),
    batches=(64,),
    width=1024,
    gate_vocabulary=5003,
    gate_hidden=64,
    gate_rows=42,
    gate_batch=16,
    gate_width=96,
    copied=64 << 20,
    seconds=1.0,
)
SMALL = Sizes(
    vocabulary=1003,
    hidden=128,
    dtype=torch.float32,
    tokens=(8, 12, 16, 24, 40),
    batches=(8, 16),
    width=48,
    gate_vocabulary=1003,
    gate_hidden=32,
    gate_rows=21,
    gate_batch=16,
    gate_width=48,
    copied=1 << 20,
    seconds=0.05,
)
# For compute-sanitizer, which slows everything down: still every plan of the selection, and 16-bit operands.
MEMCHECK = Sizes(
    vocabulary=1003,
    hidden=128,
    dtype=torch.bfloat16,
    tokens=(8, 12, 16, 24, 40),
    batches=(8,),
    width=48,
    gate_vocabulary=9001,
    gate_hidden=128,
    gate_rows=21,
    gate_batch=32,
    gate_width=1024,
    copied=1 << 20,
    seconds=0.05,
)
