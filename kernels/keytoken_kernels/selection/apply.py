"""From thresholds to results: selections, weights, advantages and counts of the rows of one tile.

Legend: ``R`` rows and ``C`` tokens of a tile, ``N`` signals, rounded up to a power of two. Everything here
runs inside kernels.
"""
# mypy: disallow-untyped-defs=False
# (the arguments of kernels are typed by the launch)

import triton
import triton.language as tl

from keytoken_kernels.selection.keys import EXCLUDED, load_hashes, load_keys, to_score


@triton.jit
def row_advantages(groups, row, epsilon, widest, DIVIDE: tl.constexpr):
    """Group-normalised advantages [R], as :func:`keytoken_kernels.selection.reference.group_advantages`.

    ``groups`` holds rewards, rows, starts and number. The sums are in float64: what rewards that differ
    little have in common must not drown the difference. Divisions and roots are not: they would be calls.
    """
    rewards = groups[0]
    members = groups[1]
    number = tl.load(groups[3] + row)
    begin = tl.load(groups[2] + number)
    size = tl.load(groups[2] + number + 1) - begin
    first = tl.load(rewards + tl.load(members + begin)).to(tl.float64)
    total = tl.zeros_like(first)
    alike = size > 1
    for place in range(widest):
        reward = tl.load(rewards + tl.load(members + begin + place, mask=place < size, other=0)).to(
            tl.float64
        )
        total += tl.where(place < size, reward, 0.0)
        alike = alike & ((reward == first) | (place >= size))
    share = (1.0 / size.to(tl.float32)).to(tl.float64)
    share = share * (2.0 - share * size)  # Newton's step to 1 / size in float64
    mean = tl.where(size > 1, total * share, 0.0)
    squares = tl.zeros_like(first)
    for place in range(widest):
        reward = tl.load(rewards + tl.load(members + begin + place, mask=place < size, other=0)).to(
            tl.float64
        )
        squares += tl.where(place < size, (reward - mean) * (reward - mean), 0.0)
    advantage = (tl.load(rewards + row).to(tl.float64) - mean).to(tl.float32)
    if DIVIDE:
        variance = squares.to(tl.float32) / tl.maximum(size - 1, 1).to(tl.float32)
        advantage = advantage / (tl.where(size > 1, tl.sqrt(variance), 1.0) + epsilon)
    return tl.where(alike, 0.0, advantage)


@triton.jit
def _selected(key, cut, hash_cut, hashes, floor, COUNT: tl.constexpr):
    """Which keys [R, C] reach the cut, and the hash cut where they are equal to it, and the floor."""
    reaches = key >= cut
    if COUNT:
        reaches = reaches & ((key != cut) | (hashes >= hash_cut))
    return reaches & (key != EXCLUDED) & (to_score(key) >= floor)


@triton.jit
def _both(one, other):
    """Two counts of a tile in one reduction: the first in the lower, the second in the upper half."""
    return tl.sum(one.to(tl.int64) + (other.to(tl.int64) << 32))


@triton.jit
def _add(target, number, inside, ATOMIC: tl.constexpr):
    """Add to a count that other programs add to as well, or write it; whole numbers sum in any order."""
    if ATOMIC:
        tl.atomic_add(target, number, mask=inside, sem="relaxed")
    else:
        tl.store(target, number, mask=inside)


@triton.jit
def apply_cuts(
    tokens,  # signals, mask, row_keys
    row,
    exists,
    width,
    cuts,
    hash_cuts,
    rules,  # weights of the signals, floor, notable, seed
    advantage,
    outputs,  # scores, valid, selected, weights, advantages, size of one plane
    counts,
    totals,
    NUM: tl.constexpr,
    COLUMNS: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    COUNT: tl.constexpr,
    ATOMIC: tl.constexpr,
):
    """Write everything that belongs to the rows ``row`` [R] of one segment, from left to right."""
    signal = tl.arange(0, cuts.shape[0])
    valid_selected = tl.zeros_like(signal).to(tl.int64)
    odd_notable = tl.zeros_like(signal).to(tl.int64)
    row_tokens = tl.zeros_like(row)
    row_selected = tl.zeros_like(row)
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = exists[:, None] & (column < width)[None, :]
        at = row[:, None] * width + column[None, :]
        hashes = load_hashes(tokens[2], row, column, rules[3]) if COUNT else None
        weight = tl.zeros(at.shape, tl.float32)
        for which in tl.static_range(NUM):
            key = load_keys(which, tokens[0], tokens[1], row, at, inside, ABSOLUTE)
            cut = tl.sum(tl.where(signal == which, cuts, 0))
            hash_cut = tl.sum(tl.where(signal == which, hash_cuts, 0))
            chosen = _selected(key, cut, hash_cut, hashes, rules[1], COUNT)
            weight = tl.where(chosen & (weight == 0.0), rules[0][which], weight)
            valid = key != EXCLUDED
            score = tl.where(valid, to_score(key), 0.0)
            plane = which * outputs[5] + at
            tl.store(outputs[0] + plane, score, mask=inside)
            tl.store(outputs[1] + plane, valid.to(tl.int8), mask=inside)
            tl.store(outputs[2] + plane, chosen.to(tl.int8), mask=inside)
            size = tl.abs(score)
            odd = (size < float("inf")) == 0  # also true of NaN
            valid_selected += tl.where(signal == which, _both(valid, chosen), 0)
            odd_notable += tl.where(signal == which, _both(odd, size > rules[2]), 0)
        tl.store(outputs[3] + at, weight, mask=inside)
        if advantage is not None:
            product = tl.where(weight != 0.0, weight * advantage[:, None], 0.0)
            tl.store(outputs[4] + at, product, mask=inside)
        answer = tl.load(tokens[1] + at, mask=inside, other=0) != 0
        row_tokens += tl.sum(answer.to(tl.int32), axis=1)
        row_selected += tl.sum((weight != 0.0).to(tl.int32), axis=1)
    _count_signals(counts, signal, valid_selected, odd_notable, NUM, ATOMIC)
    _count_rows(totals, row_tokens, row_selected, ATOMIC)


@triton.jit
def _count_signals(counts, signal, valid_selected, odd_notable, NUM: tl.constexpr, ATOMIC: tl.constexpr):
    """The four columns of each signal of one segment."""
    exists = signal < NUM
    _add(counts + signal * 4, valid_selected.to(tl.int32), exists, ATOMIC)
    _add(counts + signal * 4 + 1, (valid_selected >> 32).to(tl.int32), exists, ATOMIC)
    _add(counts + signal * 4 + 2, odd_notable.to(tl.int32), exists, ATOMIC)
    _add(counts + signal * 4 + 3, (odd_notable >> 32).to(tl.int32), exists, ATOMIC)


@triton.jit
def _count_rows(totals, row_tokens, row_selected, ATOMIC: tl.constexpr):
    """The four totals of one segment."""
    column = tl.arange(0, 4)
    answers = row_tokens > 0
    missed = answers & (row_selected == 0)
    number = tl.where(column == 0, tl.sum(row_tokens), tl.sum(row_selected))
    number = tl.where(column == 2, tl.sum(answers.to(tl.int32)), number)
    number = tl.where(column == 3, tl.sum(missed.to(tl.int32)), number)
    _add(totals + column, number, column < 4, ATOMIC)
