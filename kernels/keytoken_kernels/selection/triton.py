"""Triton kernels of the selection, and their launches. README.md has the plan and its costs.

A launch is planned from the width of the batch and the rows of the largest segment, which the CPU knows:

    up to  4,096 tokens of a segment   one kernel does everything, a segment in the registers of one program
    up to 16,384                       a program for each segment and signal, then all rows in parallel
    more                               three passes over digits (radix.py), then all rows in parallel
"""
# mypy: disallow-untyped-defs=False
# (the arguments of kernels are typed by the launch)

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from keytoken_kernels.cases import CompiledCase
from keytoken_kernels.selection import compiled, radix, reference
from keytoken_kernels.selection.apply import apply_cuts, row_advantages
from keytoken_kernels.selection.keys import find_cuts, load_hashes, load_keys, of_signal, tile
from keytoken_kernels.selection.types import COUNTS, TOTALS, Rule, Segments, Selection, Signal

NARROWEST = 16  # columns of a tile: fewer would only multiply the variants to compile


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Where one plan ends and the next begins; tests make them small.

    Attributes:
        fused: Tokens of a segment that one program selects, weighs and counts.
        resident: Tokens of a segment of which one program finds a threshold.
        tile: Tokens that a program holds at a time where it walks over its rows.
        chunks: Programs among which the rows of a larger segment are divided, at most 64.
        float_ranks: Up to so many tokens ranks are float32, as in torch.quantile.
    """

    fused: int = 4096
    resident: int = 16384
    tile: int = 2048
    chunks: int = 32
    float_ranks: int = reference.TORCH_QUANTILE_LIMIT


# Numbers that differ from step to step: kernels are not compiled anew for the value 1 or for multiples of 16.
VARYING = ("seed", "share0", "share1", "share2", "rows_per_chunk", "group_widest")


# fmt: off
@triton.jit(do_not_specialize=VARYING)
def fused_kernel(
    values0, baseline0, applies0, values1, baseline1, applies1, values2, baseline2, applies2,
    mask, rows, starts, row_keys, width,
    q0, q1, q2, share0, share1, share2, weight0, weight1, weight2, floor, notable, seed,
    rewards, group_rows, group_starts, group_number, epsilon, group_widest,
    scores, valid, selected, weights, advantages, plane,
    thresholds, counts, totals, response_advantages,
    NUM: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ABSOLUTE: tl.constexpr, COUNT: tl.constexpr, DIVIDE: tl.constexpr, FLOAT_RANKS: tl.constexpr,
):
    """Grid (segments): a whole segment in the registers of one program."""
    segment = tl.program_id(0)
    first, last = tl.load(starts + segment), tl.load(starts + segment + 1)
    row, exists, column, at, inside = tile(rows, first, last, 0, width, ROWS, COLUMNS)
    signals = (
        (values0, baseline0, applies0), (values1, baseline1, applies1), (values2, baseline2, applies2)
    )
    signal = tl.arange(0, PADDED)
    keys = tl.full([PADDED, ROWS * COLUMNS], 0xFFFFFFFF, tl.uint32)
    for which in tl.static_range(NUM):
        key = load_keys(which, signals, mask, row, at, inside, ABSOLUTE)
        keys = tl.where((signal == which)[:, None], key.reshape([1, ROWS * COLUMNS]), keys)
    hashes = load_hashes(row_keys, row, column, seed).reshape([ROWS * COLUMNS]) if COUNT else None
    threshold, cuts, hash_cuts = find_cuts(
        keys, hashes, of_signal(signal, q0, q1, q2), of_signal(signal, share0, share1, share2),
        COUNT, FLOAT_RANKS,
    )
    tl.store(thresholds + segment * NUM + signal, threshold, mask=signal < NUM)
    advantage = None
    if rewards is not None:
        groups = (rewards, group_rows, group_starts, group_number)
        advantage = row_advantages(groups, row, epsilon, group_widest, DIVIDE)
        tl.store(response_advantages + row, advantage, mask=exists)
    apply_cuts(
        (signals, mask, row_keys), row, exists, width, cuts, hash_cuts,
        ((weight0, weight1, weight2), floor, notable, seed), advantage,
        (scores, valid, selected, weights, advantages, plane),
        counts + segment * NUM * 4, totals + segment * 4,
        NUM, COLUMNS, ABSOLUTE, COUNT, False,
    )


@triton.jit(do_not_specialize=VARYING)
def threshold_kernel(
    values0, baseline0, applies0, values1, baseline1, applies1, values2, baseline2, applies2,
    mask, rows, starts, row_keys, width, q0, q1, q2, share0, share1, share2, seed,
    thresholds, cuts, hash_cuts, counts, totals,
    NUM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ABSOLUTE: tl.constexpr,
    COUNT: tl.constexpr, FLOAT_RANKS: tl.constexpr,
):
    """Grid (segments, signals): one threshold, of a segment that fits into the registers of one program."""
    segment, which = tl.program_id(0), tl.program_id(1)
    radix.clear_counts(counts, totals, segment, which, NUM)
    first, last = tl.load(starts + segment), tl.load(starts + segment + 1)
    row, _exists, column, at, inside = tile(rows, first, last, 0, width, ROWS, COLUMNS)
    signals = (
        (values0, baseline0, applies0), (values1, baseline1, applies1), (values2, baseline2, applies2)
    )
    keys = load_keys(which, signals, mask, row, at, inside, ABSOLUTE).reshape([1, ROWS * COLUMNS])
    hashes = load_hashes(row_keys, row, column, seed).reshape([ROWS * COLUMNS]) if COUNT else None
    signal = which + tl.arange(0, 1)
    threshold, cut, hash_cut = find_cuts(
        keys, hashes, of_signal(signal, q0, q1, q2), of_signal(signal, share0, share1, share2),
        COUNT, FLOAT_RANKS,
    )
    slot = segment * NUM + signal
    tl.store(thresholds + slot, threshold)
    tl.store(cuts + slot, cut.to(tl.int32, bitcast=True))
    tl.store(hash_cuts + slot, hash_cut.to(tl.int32, bitcast=True))


@triton.jit(do_not_specialize=VARYING)
def apply_kernel(
    values0, baseline0, applies0, values1, baseline1, applies1, values2, baseline2, applies2,
    mask, rows, starts, row_keys, width, rows_per_chunk,
    q0, q1, q2, share0, share1, share2, weight0, weight1, weight2, floor, notable, seed,
    rewards, group_rows, group_starts, group_number, epsilon, group_widest,
    scores, valid, selected, weights, advantages, plane,
    thresholds, counts, totals, response_advantages,
    cuts, hash_cuts, histograms, minima, states,
    NUM: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ABSOLUTE: tl.constexpr, COUNT: tl.constexpr, DIVIDE: tl.constexpr, RADIX: tl.constexpr,
    FLOAT_RANKS: tl.constexpr,
):
    """Grid (segments, chunks): apply what earlier launches found to a chunk of a segment's rows."""
    segment, chunk = tl.program_id(0), tl.program_id(1)
    signal = tl.arange(0, PADDED)
    slot = segment * NUM + signal
    if RADIX:
        own_cuts = tl.full([PADDED], 0xFFFFFFFF, tl.uint32)
        own_hash_cuts = tl.zeros([PADDED], tl.uint32)
        search = (histograms, minima, states)
        for which in tl.static_range(NUM):
            threshold, cut, hash_cut = radix.finished_cut(
                search, segment * NUM + which, tl.num_programs(0) * NUM, tl.num_programs(1),
                of_signal(which, q0, q1, q2), of_signal(which, share0, share1, share2), COUNT, FLOAT_RANKS,
            )
            own_cuts = tl.where(signal == which, cut, own_cuts)
            own_hash_cuts = tl.where(signal == which, hash_cut, own_hash_cuts)
            if chunk == 0:
                tl.store(thresholds + segment * NUM + which, threshold)
    else:
        own_cuts = tl.load(cuts + slot, mask=signal < NUM, other=-1).to(tl.uint32, bitcast=True)
        own_hash_cuts = tl.load(hash_cuts + slot, mask=signal < NUM, other=0).to(tl.uint32, bitcast=True)
    signals = (
        (values0, baseline0, applies0), (values1, baseline1, applies1), (values2, baseline2, applies2)
    )
    begin = tl.load(starts + segment) + chunk * rows_per_chunk
    last = tl.minimum(tl.load(starts + segment + 1), begin + rows_per_chunk)
    for first in range(begin, last, ROWS):
        place = first + tl.arange(0, ROWS)
        exists = place < last
        row = tl.load(rows + place, mask=exists, other=0)
        advantage = None
        if rewards is not None:
            groups = (rewards, group_rows, group_starts, group_number)
            advantage = row_advantages(groups, row, epsilon, group_widest, DIVIDE)
            tl.store(response_advantages + row, advantage, mask=exists)
        apply_cuts(
            (signals, mask, row_keys), row, exists, width, own_cuts, own_hash_cuts,
            ((weight0, weight1, weight2), floor, notable, seed), advantage,
            (scores, valid, selected, weights, advantages, plane),
            counts + segment * NUM * 4, totals + segment * 4,
            NUM, COLUMNS, ABSOLUTE, COUNT, True,
        )
# fmt: on


def select(
    signals: tuple[Signal, ...],
    mask: Tensor,
    segments: Segments,
    *,
    rule: Rule,
    floor: float | None,
    seed: int,
    row_keys: Tensor | None,
    rewards: Tensor | None,
    groups: Segments | None,
    epsilon: float,
    divide_by_std: bool,
    notable: float,
    limits: Limits = Limits(),
) -> Selection:
    """See :func:`keytoken_kernels.selection.api.select`; ``limits`` chooses the plan."""
    found = _empty_selection(len(signals), mask, len(segments), rewards)
    if len(mask) == 0:
        return found
    search = {
        **_signal_arguments(signals, rule),
        "mask": _bytes(mask),
        "rows": segments.rows,
        "starts": segments.starts,
        "row_keys": row_keys,
        "width": mask.shape[1],
        "seed": seed - 2**32 if seed >= 2**31 else seed,  # the same 32 bits
        "counts": found.counts,
        "totals": found.totals,
        "NUM": len(signals),
        "COUNT": rule == "count",
        "FLOAT_RANKS": limits.float_ranks,
    }
    result = {
        **_reward_arguments(rewards, groups, epsilon, divide_by_std),
        **{f"weight{i}": signals[min(i, len(signals) - 1)].weight for i in range(3)},
        "floor": float("-inf") if floor is None else floor,
        "notable": notable,
        "scores": found.scores,
        "valid": _bytes(found.valid),
        "selected": _bytes(found.selected),
        "weights": found.weights,
        "advantages": found.advantages,
        "plane": mask.numel(),
        "thresholds": found.thresholds,
        "response_advantages": found.response_advantages,
        "PADDED": triton.next_power_of_2(len(signals)),
    }
    _launch(search, result, len(segments), segments.widest, limits)
    return found


def _launch(
    search: dict[str, Any], result: dict[str, Any], num_segments: int, widest: int, limits: Limits
) -> None:
    """Choose the plan and launch it: 1, 2 or 4 kernels; 7 for ``rule="count"`` in large segments."""
    rows, columns = triton.next_power_of_2(widest), _columns(search["width"])
    if rows * columns <= limits.fused:
        fused_kernel[(num_segments,)](**search, **result, **_block(rows, columns))
        return
    tile_columns = min(columns, limits.tile)
    block = _block(min(rows, limits.tile // tile_columns), tile_columns)
    if rows * columns <= limits.resident:
        rows_per_chunk = block["ROWS"]
        found = _find_thresholds(search, result["thresholds"], num_segments, _block(rows, columns))
    else:
        rows_per_chunk = max(triton.cdiv(widest, limits.chunks), block["ROWS"])
        found = _count_digits(
            search, num_segments, triton.cdiv(widest, rows_per_chunk), rows_per_chunk, block
        )
    apply_kernel[(num_segments, triton.cdiv(widest, rows_per_chunk))](
        **search, **result, **found, **block, rows_per_chunk=rows_per_chunk
    )


def _find_thresholds(
    search: dict[str, Any], thresholds: Tensor, num_segments: int, block: dict[str, Any]
) -> dict[str, Any]:
    """Launch the search for segments that fit into a program; returns where the results lie."""
    cuts = thresholds.new_empty((2, *thresholds.shape), dtype=torch.int32)
    found = {"cuts": cuts[0], "hash_cuts": cuts[1]}
    threshold_kernel[(num_segments, search["NUM"])](**search, **found, **block, thresholds=thresholds)
    return {**found, "histograms": None, "minima": None, "states": None, "RADIX": False}


def _count_digits(
    search: dict[str, Any], num_segments: int, num_chunks: int, rows_per_chunk: int, block: dict[str, Any]
) -> dict[str, Any]:
    """Launch the passes over the digits; returns where the results lie."""
    num_slots, num_passes = num_segments * search["NUM"], 6 if search["COUNT"] else 3

    def places(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=search["mask"].device)

    found = {
        "histograms": places(2, num_slots, num_chunks, radix.BINS),
        "minima": places(num_slots, num_chunks),
        "states": places(num_passes, num_slots, radix.STATE),
    }
    for number in range(num_passes):
        radix.digit_kernel[(num_segments, search["NUM"], num_chunks)](
            **search, **found, **block, rows_per_chunk=rows_per_chunk, PASS=number
        )
    return {**found, "cuts": None, "hash_cuts": None, "RADIX": True}


def _columns(width: int) -> int:
    return max(NARROWEST, triton.next_power_of_2(width))


def _block(rows: int, columns: int) -> dict[str, Any]:
    """Size of a block of tokens, and how it is launched."""
    return {
        "ROWS": rows,
        "COLUMNS": columns,
        # Products are rounded before they are added, as torch rounds them: equal to the last bit.
        "enable_fp_fusion": False,
        **compiled.warps(max(4, min(16, rows * columns // 256))),  # eight tokens to a thread
    }


def _bytes(flags: Tensor) -> Tensor:
    return flags.contiguous().view(torch.int8)


def _signal_arguments(signals: tuple[Signal, ...], rule: Rule) -> dict[str, Any]:
    """Three signals for the kernels; the last one stands in for those that are missing."""
    arguments: dict[str, Any] = {"ABSOLUTE": sum(signal.absolute << i for i, signal in enumerate(signals))}
    for i in range(3):
        signal = signals[min(i, len(signals) - 1)]
        arguments |= {
            f"values{i}": signal.values.contiguous(),
            f"baseline{i}": None if signal.baseline is None else signal.baseline.contiguous(),
            f"applies{i}": None if signal.applies is None else _bytes(signal.applies),
            f"q{i}": 1.0 - signal.ratio,
            f"share{i}": reference.share(signal.ratio, rule),
        }
    return arguments


def _reward_arguments(
    rewards: Tensor | None, groups: Segments | None, epsilon: float, divide_by_std: bool
) -> dict[str, Any]:
    return {
        "rewards": None if rewards is None else rewards.contiguous(),
        "group_rows": None if groups is None else groups.rows,
        "group_starts": None if groups is None else groups.starts,
        "group_number": None if groups is None else groups.number,
        "group_widest": 0 if groups is None else groups.widest,
        "epsilon": epsilon,
        "DIVIDE": divide_by_std,
    }


def _empty_selection(num_signals: int, mask: Tensor, num_segments: int, rewards: Tensor | None) -> Selection:
    """Room for the results; the kernels write every place."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=mask.device)

    return Selection(
        scores=empty(num_signals, *mask.shape),
        valid=empty(num_signals, *mask.shape, dtype=torch.bool),
        selected=empty(num_signals, *mask.shape, dtype=torch.bool),
        weights=empty(*mask.shape),
        response_advantages=None if rewards is None else empty(len(mask)),
        advantages=None if rewards is None else empty(*mask.shape),
        thresholds=empty(num_segments, num_signals),
        counts=empty(num_segments, num_signals, len(COUNTS), dtype=torch.int32),
        totals=empty(num_segments, len(TOTALS), dtype=torch.int32),
    )


def compiled_cases() -> tuple[CompiledCase, ...]:
    """What is compiled ahead of time and checked for spills and registers."""
    return tuple(compiled.cases(fused_kernel, threshold_kernel, radix.digit_kernel, apply_kernel))
