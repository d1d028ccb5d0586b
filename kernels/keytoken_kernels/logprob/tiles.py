"""What the kernels of this operator share: the shape of a tile and one reading of a row.

A tile is ``[LANES, VEC]``: VEC contiguous elements per lane, 16 bytes of them, so that a lane loads with one
instruction. A thread owns several whole lanes, hence reductions over VEC stay inside a thread, and each lane
keeps accumulators of its own until the end of the row: the loop has no barrier and no shuffle.
"""
# mypy: disallow-untyped-defs=False
# (kernels are written in Triton's language; a launch types their arguments)

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from keytoken_kernels.logprob import reference

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
BANNED = tl.constexpr(reference.BANNED)

LANES = 1024
NUM_WARPS = 8


class Tile(NamedTuple):
    """Compile-time shape of a tile."""

    LANES: int
    VEC: int

    @classmethod
    def of(cls, dtype: torch.dtype, lanes: int | None = None) -> Tile:
        """One 128-bit load per lane; LANES lanes unless told otherwise."""
        return cls(lanes or LANES, 16 // dtype.itemsize)


@triton.jit
def tile_offsets(LANES: tl.constexpr, VEC: tl.constexpr):
    """``[LANES, VEC]`` offsets of a tile's elements, contiguous within a lane."""
    return tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]


@triton.jit
def exponent(x, scale, reference):
    """``x * scale - reference``, rounded once; at least BANNED, and NaN where x is NaN."""
    return tl.maximum(tl.fma(x, scale, -reference), BANNED, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def at_least_0(x):
    """Removes the rounding by which a result may fall short of its bound; NaN stays NaN."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def source_row(rows, item, num_rows):
    """Row of the logits for an output row, and whether it exists (if not: row 0, which must not be used)."""
    row = item.to(tl.int64)
    if rows is not None:
        row = tl.load(rows + item)
    exists = (row >= 0) & (row < num_rows)
    return tl.where(exists, row, 0), exists


@triton.jit
def _absorb(x, scale, highest, total, weighted):
    """Add a tile to every lane's maximum, sum of 2^d and sum of 2^d d, with d relative to the maximum."""
    risen = tl.maximum(highest, tl.max(x, 1) * scale)
    d = exponent(x, scale, risen[:, None])
    e = tl.exp2(d)
    shift = highest - risen
    fade = tl.exp2(shift)
    weighted = fade * (weighted + total * shift) + tl.sum(e * d, 1)
    total = fade * total + tl.sum(e, 1)
    return risen, total, weighted


@triton.jit
def row_totals(row, vocab, scale, LANES: tl.constexpr, VEC: tl.constexpr):
    """Maximum m of ``x * scale``, sum of ``2^(x * scale - m)``, and that sum weighted with its exponents."""
    offsets = tile_offsets(LANES, VEC)
    highest = tl.full([LANES], BANNED, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    weighted = tl.zeros([LANES], tl.float32)
    whole = vocab // (LANES * VEC) * (LANES * VEC)
    for start in range(0, whole, LANES * VEC):
        x = tl.load(row + start + offsets).to(tl.float32)
        highest, total, weighted = _absorb(x, scale, highest, total, weighted)
    if whole < vocab:
        inside = whole + offsets < vocab
        x = tl.load(row + whole + offsets, mask=inside, other=float("-inf")).to(tl.float32)
        highest, total, weighted = _absorb(x, scale, highest, total, weighted)
    top = tl.max(highest, 0)
    shift = highest - top
    fade = tl.exp2(shift)
    return top, tl.sum(fade * total, 0), tl.sum(fade * (weighted + total * shift), 0)
