"""Order statistics of segments that do not fit into one program: histograms of digits, the highest first.

The programs of one launch each count the digits of their own rows and write the counts to a place of their
own. Those of the next launch add them up, all of them alike, pick the digit that holds the rank, and count
the next digit of the keys that share all digits so far. Nothing is zeroed beforehand, nothing is added
atomically, and no program waits for another one.

    pass    0, 1, 2   digits of 11, 11 and 10 bits of the keys
    pass    3, 4, 5   the same of the hashes of the tokens whose key is the threshold's (rule="count")
    after   the last  the programs that apply the thresholds finish the work, in :func:`finished_cut`
"""
# mypy: disallow-untyped-defs=False
# (the arguments of kernels are typed by the launch)

import triton
import triton.language as tl

from keytoken_kernels.selection.keys import (
    EXCLUDED,
    kept_count,
    load_hashes,
    load_keys,
    of_signal,
    quantile_cut,
    quantile_rank,
    tile,
    to_score,
)

BINS = 2048  # of the wider digits; histograms lie this far apart
_BINS = tl.constexpr(BINS)
_NAN_BIN = tl.constexpr(0xFFC00000 >> 21)  # first digit of NaN and of no number
# What a pass leaves for the next one: the digits so far, the rank among the keys that share them, the number
# of valid tokens, and whether there is nothing to select.
STATE = 4
_STATE = tl.constexpr(STATE)


@triton.jit
def _sum_of_chunks(histogram, num_chunks, BINS: tl.constexpr):
    """[BINS] counts of one segment and signal over all its chunks, four loads in flight."""
    digit = tl.arange(0, BINS)
    total = tl.zeros([BINS], tl.int32)
    for chunk in range(0, num_chunks, 4):
        member = chunk + tl.arange(0, 4)
        place = histogram + member[:, None] * _BINS + digit[None, :]
        total += tl.sum(tl.load(place, mask=(member < num_chunks)[:, None], other=0), axis=0)
    return total


@triton.jit
def _digit_of_rank(counts, rank):
    """The digit of the key at ``rank``, and its rank among the keys with that digit."""
    upto = tl.cumsum(counts, axis=0)
    below = upto <= rank
    return tl.sum(below.to(tl.int32)), rank - tl.max(tl.where(below, upto, 0))


@triton.jit
def _first_state(counts, q, share, COUNT: tl.constexpr, FLOAT_RANKS: tl.constexpr):
    """Number of valid tokens, rank of the threshold among them, and whether there is none, from pass 0."""
    size = tl.sum(counts)
    broken = tl.sum(tl.where(tl.arange(0, _BINS) >= _NAN_BIN, counts, 0))
    void = ((size == 0) | (broken != 0) | (share == 0)).to(tl.int32)
    if COUNT:
        kept = kept_count(size, share)
        rank = size - kept
        void = void | (kept == 0).to(tl.int32)
    else:
        rank = quantile_rank(size, q, share, FLOAT_RANKS)[0]
    return size, rank, void


@triton.jit
def _advance(
    histogram,
    state,
    num_chunks,
    q,
    share,
    PASS: tl.constexpr,
    COUNT: tl.constexpr,
    FLOAT_RANKS: tl.constexpr,
):
    """Take in the digits that pass ``PASS - 1`` counted; ``state`` is what it found in turn.

    Returns:
        Counts of the digits, prefix with the new digit (uint32), rank, size and void.
    """
    # Digits of 11, 11 and 10 bits; a new series starts without a prefix.
    counts = _sum_of_chunks(histogram, num_chunks, 1024 if PASS % 3 == 0 else 2048)
    if PASS == 1:
        size, rank, void = _first_state(counts, q, share, COUNT, FLOAT_RANKS)
    else:
        rank = tl.load(state + 1)
        size = tl.load(state + 2)
        void = tl.load(state + 3)
    digit, rank = _digit_of_rank(counts, rank)
    prefix = digit.to(tl.uint32)
    if PASS % 3 != 1:
        prefix = prefix | (tl.load(state).to(tl.uint32, bitcast=True) << (10 if PASS % 3 == 0 else 11))
    return counts, prefix, rank, size, void


@triton.jit
def _digits(stream, candidate, prefix, LEVEL: tl.constexpr):
    """The digits [R, C] of one level, and which keys share all digits before."""
    if LEVEL == 0:
        digit = stream >> 21
    elif LEVEL == 1:
        digit = (stream >> 10) & 2047
        candidate = candidate & ((stream >> 21) == prefix)
    else:
        digit = stream & 1023
        candidate = candidate & ((stream >> 10) == prefix)
    return digit.to(tl.int32), candidate


@triton.jit
def clear_counts(counts, totals, segment, which, NUM: tl.constexpr):
    """Zero the counts of one segment and signal; the programs of the last launch add to them."""
    column = tl.arange(0, 4)
    tl.store(counts + (segment * NUM + which) * 4 + column, tl.zeros([4], tl.int32))
    if which == 0:
        tl.store(totals + segment * 4 + column, tl.zeros([4], tl.int32))


@triton.jit
def _histogram_of(slot, PASS: tl.constexpr, num_slots, num_chunks):
    """Offset of the first chunk's histogram; passes use two sets in turn."""
    return (((PASS % 2) * num_slots + slot) * num_chunks).to(tl.int64) * _BINS


# fmt: off
@triton.jit(do_not_specialize=("seed", "share0", "share1", "share2", "rows_per_chunk"))
def digit_kernel(
    values0, baseline0, applies0, values1, baseline1, applies1, values2, baseline2, applies2,
    mask, rows, starts, row_keys, width, rows_per_chunk,
    q0, q1, q2, share0, share1, share2, seed,
    histograms, minima, states, counts, totals,
    NUM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ABSOLUTE: tl.constexpr,
    COUNT: tl.constexpr, PASS: tl.constexpr, FLOAT_RANKS: tl.constexpr,
):
    """Grid (segments, signals, chunks): one pass of the search over a chunk of the rows of a segment."""
    segment, which, chunk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_slots, num_chunks = tl.num_programs(0) * NUM, tl.num_programs(2)
    slot = segment * NUM + which
    state = states + (PASS * num_slots + slot) * _STATE
    prefix = tl.full((), 0, tl.uint32)
    if PASS == 0:
        if chunk == 0:
            clear_counts(counts, totals, segment, which, NUM)
    else:
        q, share = of_signal(which, q0, q1, q2), of_signal(which, share0, share1, share2)
        before = histograms + _histogram_of(slot, PASS - 1, num_slots, num_chunks)
        _counts, prefix, rank, size, void = _advance(
            before, state - num_slots * _STATE, num_chunks, q, share, PASS, COUNT, FLOAT_RANKS
        )
        if chunk == 0:
            tl.store(state, prefix.to(tl.int32, bitcast=True))
            tl.store(state + 1, rank)
            tl.store(state + 2, size)
            tl.store(state + 3, void)
    cut = prefix
    if PASS > 3:
        cut = tl.load(states + (3 * num_slots + slot) * _STATE).to(tl.uint32, bitcast=True)

    signals = (
        (values0, baseline0, applies0), (values1, baseline1, applies1), (values2, baseline2, applies2)
    )
    total = tl.zeros([_BINS], tl.int32)
    least = tl.full((), 0xFFFFFFFF, tl.uint32)
    last = tl.load(starts + segment + 1)
    begin = tl.load(starts + segment) + chunk * rows_per_chunk
    last = tl.minimum(last, begin + rows_per_chunk)
    for place in range(begin, last, ROWS):
        for start in range(0, width, COLUMNS):
            row, _exists, column, at, inside = tile(rows, place, last, start, width, ROWS, COLUMNS)
            key = load_keys(which, signals, mask, row, at, inside, ABSOLUTE)
            stream, candidate = key, key != EXCLUDED
            if PASS > 2:
                stream, candidate = load_hashes(row_keys, row, column, seed), key == cut
            digit, candidate = _digits(stream, candidate, prefix, PASS % 3)
            if tl.max(candidate.to(tl.int32)) > 0:  # late passes find nothing in most tiles
                flat = candidate.reshape([ROWS * COLUMNS])
                total += tl.histogram(digit.reshape([ROWS * COLUMNS]), _BINS, flat)
            if PASS == 2:
                least = tl.minimum(least, tl.min(tl.where((key >> 10) > prefix, key, EXCLUDED)))
    tl.store(
        histograms + _histogram_of(slot, PASS, num_slots, num_chunks) + chunk * _BINS + tl.arange(0, _BINS),
        total,
    )
    if PASS == 2:
        tl.store(minima + slot * num_chunks + chunk, least.to(tl.int32, bitcast=True))
# fmt: on


@triton.jit
def finished_cut(
    search, slot, num_slots, num_chunks, q, share, COUNT: tl.constexpr, FLOAT_RANKS: tl.constexpr
):
    """Threshold, its key and its hash cut of one segment and signal, from what the last pass counted.

    ``search`` holds histograms, minima and states.
    """
    LAST: tl.constexpr = 5 if COUNT else 2
    histogram = search[0] + _histogram_of(slot, LAST, num_slots, num_chunks)
    state = search[2] + (LAST * num_slots + slot) * _STATE
    counts, low, rank, size, void = _advance(
        histogram, state, num_chunks, q, share, LAST + 1, COUNT, FLOAT_RANKS
    )
    if COUNT:
        key = tl.load(search[2] + (3 * num_slots + slot) * _STATE).to(tl.uint32, bitcast=True)
        threshold = tl.where(void != 0, float("nan"), to_score(key))
        cut = tl.where(void != 0, EXCLUDED, key)
        hash_cut = low
    else:
        rest = quantile_rank(size, q, share, FLOAT_RANKS)[1]
        digit = tl.arange(0, 1024)
        own = (low & 1023).to(tl.int32)
        equal = tl.sum(tl.where(digit == own, counts, 0))
        # The next key above: it differs in the last digit, or it lies above all that share the first two.
        above = tl.min(tl.where((digit > own) & (counts > 0), digit, 1024))
        same = (low ^ own.to(tl.uint32)) | above.to(tl.uint32)
        chunk = tl.arange(0, 64)
        other = tl.load(search[1] + slot * num_chunks + chunk, mask=chunk < num_chunks, other=-1)
        other = tl.min(other.to(tl.uint32, bitcast=True))
        high = tl.where((rest > 0.0) & (rank + 1 >= equal), tl.where(above < 1024, same, other), low)
        threshold, cut = quantile_cut(low, high, rest, void != 0)
        hash_cut = tl.full((), 0, tl.uint32)
    return threshold, cut, hash_cut
