"""Scores as 32-bit integers that sort as the scores do, and order statistics of blocks of them.

Legend: ``N`` signals of a block, ``E`` its tokens. Everything here runs inside kernels.
"""
# mypy: disallow-untyped-defs=False
# (the arguments of kernels are typed by the launch)

import triton
import triton.language as tl

from keytoken_kernels.selection import reference

# Above every key of a number: no score; and the one key of all NaNs.
EXCLUDED = tl.constexpr(0xFFFFFFFF)
NAN_KEY = tl.constexpr(0xFFC00000)
SIGN = tl.constexpr(0x80000000)
UNITS = tl.constexpr(reference.UNITS)


@triton.jit
def to_key(score, valid):
    """uint32 keys in the order of float32 scores: -inf first, 0.0 and -0.0 equal, NaN behind +inf."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.uint32, bitcast=True)
    key = tl.where(bits >= SIGN, bits ^ 0xFFFFFFFF, bits | SIGN)  # ~bits overflows in the interpreter
    key = tl.where(score == score, key, NAN_KEY)
    return tl.where(valid, key, EXCLUDED)


@triton.jit
def to_score(key):
    """The float32 score of a key; NaN for the keys of none."""
    bits = tl.where(key >= SIGN, key ^ SIGN, key ^ 0xFFFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def position_hash(row_key, column, seed):
    """uint32, as :func:`keytoken_kernels.selection.reference.position_hash`."""
    position = (row_key.to(tl.uint32) << 16) | column.to(tl.uint32)
    return _mix(_mix(position) ^ seed.to(tl.uint32))


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def kth_key(keys, rank):
    """The key at ``rank`` [N] (from 0) in each row of ``keys`` [N, E] if it were sorted.

    One bit at a time from the top: a bit stays if no more than ``rank`` keys lie below what it gives.
    """
    found = tl.zeros_like(rank).to(tl.uint32)
    bit = tl.full((), 0x80000000, tl.uint32)
    for _ in range(32):
        candidate = found | bit
        below = tl.sum((keys < candidate[:, None]).to(tl.int32), axis=1)
        found = tl.where(below <= rank, candidate, found)
        bit = bit >> 1
    return found


@triton.jit
def quantile_rank(size, q, share, FLOAT_RANKS: tl.constexpr):
    """Rank of the (1 - ratio) quantile among ``size`` scores: its whole part and what is left.

    ``q`` is 1 - ratio and ``share`` the ratio in units. Up to FLOAT_RANKS scores this is torch.quantile's
    arithmetic in float32, above it exact.
    """
    last = tl.maximum(size - 1, 0)
    rank = q * last.to(tl.float32)
    low = rank.to(tl.int32)
    rest = rank - low.to(tl.float32)
    product = last.to(tl.int64) * UNITS - last.to(tl.int64) * share
    exact_low = product // UNITS
    exact_rest = (product - exact_low * UNITS).to(tl.float32) / UNITS
    exact = size > FLOAT_RANKS
    return tl.where(exact, exact_low.to(tl.int32), low), tl.where(exact, exact_rest, rest)


@triton.jit
def kept_count(size, share):
    """Number of tokens that ``rule="count"`` keeps: ratio times size, rounded up."""
    return ((size.to(tl.int64) * share + (UNITS - 1)) // UNITS).to(tl.int32)


@triton.jit
def interpolate(low, high, rest):
    """low + rest (high - low), in the two branches that torch has."""
    step = high - low
    return tl.where(rest < 0.5, low + rest * step, high - step * (1.0 - rest))


@triton.jit
def quantile_cut(low, high, rest, void):
    """Threshold and the key that selected tokens reach; NaN and no key where nothing may be selected."""
    threshold = tl.where(void, float("nan"), interpolate(to_score(low), to_score(high), rest))
    return threshold, to_key(threshold, threshold == threshold)


@triton.jit
def find_cuts(keys, hashes, q, share, COUNT: tl.constexpr, FLOAT_RANKS: tl.constexpr):
    """What the selected tokens of each row of ``keys`` [N, E] reach.

    Returns:
        [N] threshold as a score, key of that score, and the least hash for tokens at exactly that key.
    """
    size = tl.sum((keys != EXCLUDED).to(tl.int32), axis=1)
    broken = tl.max((keys == NAN_KEY).to(tl.int32), axis=1)
    void = (size == 0) | (broken != 0) | (share == 0)
    if COUNT:
        kept = kept_count(size, share)
        void = void | (kept == 0)
        low = kth_key(keys, size - kept)
        ties = keys == low[:, None]
        below = tl.sum((keys < low[:, None]).to(tl.int32), axis=1)
        hash_cut = kth_key(tl.where(ties, hashes[None, :], EXCLUDED), size - kept - below)
        threshold = tl.where(void, float("nan"), to_score(low))
        cut = tl.where(void, EXCLUDED, low)
    else:
        rank, rest = quantile_rank(size, q, share, FLOAT_RANKS)
        low = kth_key(keys, rank)
        upto = tl.sum((keys <= low[:, None]).to(tl.int32), axis=1)
        above = tl.min(tl.where(keys > low[:, None], keys, EXCLUDED), axis=1)
        high = tl.where((rest > 0.0) & (upto < rank + 2), above, low)
        threshold, cut = quantile_cut(low, high, rest, void)
        hash_cut = tl.zeros_like(cut)
    return threshold, cut, hash_cut


@triton.jit
def of_signal(which, first, second, third):
    """The number that belongs to signal ``which``; a block of numbers for a block of signals."""
    return tl.where(which == 0, first, tl.where(which == 1, second, third))


@triton.jit
def tile(rows, first, last, start, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A block of tokens: the rows at places ``first`` to ``last``, the columns from ``start``.

    Returns:
        Rows [R] and whether they exist, columns [C], and offsets [R, C] and whether they lie inside.
    """
    place = first + tl.arange(0, ROWS)
    exists = place < last
    row = tl.load(rows + place, mask=exists, other=0)
    column = start + tl.arange(0, COLUMNS)
    at = row[:, None] * width + column[None, :]
    return row, exists, column, at, exists[:, None] & (column < width)[None, :]


@triton.jit
def load_keys(which, signals, mask, row, at, inside, ABSOLUTE: tl.constexpr):
    """Keys of signal ``which`` at the offsets ``at`` [R, C]; EXCLUDED where it has no score.

    ``signals`` holds (values, baseline, applies) three times; bit i of ABSOLUTE says that signal i is a
    magnitude. ``which`` may be known at run time only.
    """
    answer = tl.load(mask + at, mask=inside, other=0) != 0
    if which == 0:
        key = _keys_of(signals[0], answer, row, at, (ABSOLUTE & 1) != 0)
    elif which == 1:
        key = _keys_of(signals[1], answer, row, at, (ABSOLUTE & 2) != 0)
    else:
        key = _keys_of(signals[2], answer, row, at, (ABSOLUTE & 4) != 0)
    return key


@triton.jit
def _keys_of(signal, valid, row, at, ABSOLUTE: tl.constexpr):
    """Reads values and baseline where they are valid only: what stands in padding reaches nothing."""
    values = signal[0]
    baseline = signal[1]
    applies = signal[2]
    if applies is not None:
        valid = valid & (tl.load(applies + row) != 0)[:, None]
    score = tl.load(values + at, mask=valid, other=0.0).to(tl.float32)
    if baseline is not None:
        score = score - tl.load(baseline + at, mask=valid, other=0.0).to(tl.float32)
    if ABSOLUTE:
        score = tl.abs(score)
    return to_key(score, valid)


@triton.jit
def load_hashes(row_keys, row, column, seed):
    """Hashes [R, C] of the positions of a tile."""
    return position_hash(tl.load(row_keys + row)[:, None], column[None, :], seed)
