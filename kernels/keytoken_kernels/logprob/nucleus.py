"""Entropy of the nucleus (the top-p part) of a distribution, without sorting the vocabulary.

The nucleus is every token above some probability and, of the tokens of exactly that probability, as many as
are needed to reach ``top_p``. With d the base-2 exponent of a token relative to the most probable one, the
threshold lies above ``-log2(V / (1 - top_p)) - 1``: together, all tokens below that hold less than half of
``1 - top_p``. So the kernel keeps a bracket of d, ``[low, high)``, in which the threshold lies: the mass
above ``high`` is less than what is wanted, the mass above ``low`` is not. Each reading of the row splits it
into BINS parts and keeps one of them, until all tokens in the bracket are equally probable. What is still
missing from the mass above it, divided by their probability, is the number of them in the nucleus.

Widths are powers of two, so that every threshold is exact and no token falls between two brackets. A bracket
of at most 2^-18 is not split again: the tokens in it differ by less than 3e-6 of their probability.
"""
# mypy: disallow-untyped-defs=False, disable-error-code=assignment
# (kernels are written in Triton's language; a launch types their arguments)

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from keytoken_kernels.logprob.reference import MASS_SLACK
from keytoken_kernels.logprob.tiles import (
    LN_2,
    NUM_WARPS,
    Tile,
    at_least_0,
    exponent,
    row_totals,
    source_row,
    tile_offsets,
)

LANES = 512  # a lane has BINS + 2 accumulators: two lanes per thread need 64 to 80 registers, four 128
BINS = tl.constexpr(8)
FINEST = tl.constexpr(2.0**-18)
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def _split(row, vocab, scale, top, high, above, width, wanted, LANES: tl.constexpr, VEC: tl.constexpr):
    """One reading of a row for the bracket ``[high - width, high)``, ``above`` being the mass above it.

    Returns the upper end of the part that holds the threshold, the mass above that end, the sum of 2^d d
    above ``high``, and the lowest and highest exponent in the bracket.
    """
    offsets = tile_offsets(LANES, VEC)
    step = width / BINS
    masses = ()  # Triton knows concatenation of tuples, but no starred element
    for _ in tl.static_range(BINS - 1):
        masses = masses + (tl.zeros([LANES], tl.float32),)  # noqa: RUF005
    weighted = tl.zeros([LANES], tl.float32)
    lowest = tl.full([LANES], INFINITY, tl.float32)
    highest = tl.full([LANES], -INFINITY, tl.float32)
    for start in range(0, vocab, LANES * VEC):
        inside = start + offsets < vocab
        x = tl.load(row + start + offsets, mask=inside, other=float("-inf")).to(tl.float32)
        d = exponent(x, scale, top)
        e = tl.exp2(d)
        grown = ()
        for part in tl.static_range(BINS - 1):
            counts = d >= high - (part + 1) * step
            grown = grown + (masses[part] + tl.sum(tl.where(counts, e, 0.0), 1),)  # noqa: RUF005
        masses = grown
        weighted += tl.sum(tl.where(d >= high, e * d, 0.0), 1)
        among = (d >= high - width) & (d < high)
        lowest = tl.minimum(lowest, tl.min(tl.where(among, d, INFINITY), 1))
        highest = tl.maximum(highest, tl.max(tl.where(among, d, -INFINITY), 1))
    narrowed = high
    for part in tl.static_range(BINS - 1):
        mass = tl.sum(masses[part], 0)
        short = mass < wanted
        narrowed = tl.where(short, high - (part + 1) * step, narrowed)
        above = tl.where(short, mass, above)
    return narrowed, above, tl.sum(weighted, 0), tl.min(lowest, 0), tl.max(highest, 0)


@triton.jit
def kernel(
    logits,
    rows,
    entropy,
    row_stride,
    num_rows,
    vocab,
    scale,
    share,
    widest,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
):
    """One program per output row."""
    item = tl.program_id(0)
    row, exists = source_row(rows, item, num_rows)
    start = logits + row * row_stride
    top, total, weighted = row_totals(start, vocab, scale, LANES, VEC)
    wanted = total * share

    width = widest * BINS
    next_high = tl.full([], 1.0, tl.float32)  # above every exponent: they are at most 0 up to rounding
    next_above = tl.full([], 0.0, tl.float32)
    above = next_above
    lowest = -next_high
    highest = next_high
    while (lowest < highest) & (width > FINEST):
        high, above, width = next_high, next_above, width / BINS
        next_high, next_above, weighted, lowest, highest = _split(
            start, vocab, scale, top, high, above, width, wanted, LANES, VEC
        )

    d = 0.5 * (lowest + highest)
    e = tl.exp2(d)
    rest = tl.ceil((wanted - above) / e) * e
    mass = above + rest
    found = at_least_0((tl.log2(mass) - (weighted + rest * d) / mass) * LN_2)
    # NaN by itself where a row holds NaN (wanted is NaN) or banned tokens only (nothing is in the bracket).
    tl.store(entropy + item, tl.where(exists, found, float("nan")))


def truncated_entropy(logits: Tensor, top_p: float, temperature: float, rows: Tensor | None) -> Tensor:
    """See :func:`keytoken_kernels.logprob.truncated_entropy`."""
    count, vocab = (logits if rows is None else rows).shape[0], logits.shape[1]
    entropy = torch.empty(count, dtype=torch.float32, device=logits.device)
    share = top_p * (1 - MASS_SLACK)
    if count:
        with torch.cuda.device_of(logits):
            kernel[(count,)](
                logits,
                rows,
                entropy,
                logits.stride(0),
                *logits.shape,
                math.log2(math.e) / temperature,
                share,
                2.0 ** math.ceil(math.log2(math.log2(vocab / (1 - share)) + 2)),
                *Tile.of(logits.dtype, LANES),
                num_warps=NUM_WARPS,
            )
    return entropy
