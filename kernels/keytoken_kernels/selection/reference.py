"""The selection in plain torch: any float type, any device, one segment and one signal after the other.

The truth that the kernels are tested against, and what runs where there is no GPU. It may wait for the
device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from keytoken_kernels.selection.types import COUNTS, TOTALS, Rule, Segments, Selection, Signal

# torch.quantile refuses larger inputs: float32 ranks name every element only up to here.
TORCH_QUANTILE_LIMIT = 2**24
# Ratios are whole numbers of these units where they are multiplied by counts, so that nothing is rounded.
UNITS = 10**9


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
) -> Selection:
    """See :func:`keytoken_kernels.selection.api.select`."""
    valid = torch.stack([mask if s.applies is None else mask & s.applies[:, None] for s in signals])
    scores = torch.stack([_score(signal) for signal in signals]).masked_fill(~valid, 0.0)
    hashes = None if row_keys is None else position_hash(row_keys, mask.shape[1], seed)
    selected = torch.zeros_like(valid)
    thresholds = scores.new_full((len(segments), len(signals)), torch.nan)
    for segment, rows in enumerate(_members(segments)):
        for number, signal in enumerate(signals):
            candidates = valid[number, rows]
            kept, threshold = _top(
                scores[number, rows][candidates],
                signal.ratio,
                hashes=None if hashes is None else hashes[rows][candidates],
            )
            selected[number, rows] = candidates.masked_scatter(candidates, kept)
            thresholds[segment, number] = threshold
    if floor is not None:
        selected &= scores >= floor
    weights = _weights(selected, signals)
    response_advantages, advantages = None, None
    if rewards is not None and groups is not None:
        response_advantages = group_advantages(rewards, groups, epsilon, divide_by_std)
        advantages = torch.where(weights != 0, weights * response_advantages[:, None], 0.0)
    counts, totals = _statistics(scores, valid, selected, mask, segments, notable)
    return Selection(
        scores=scores,
        valid=valid,
        selected=selected,
        weights=weights,
        response_advantages=response_advantages,
        advantages=advantages,
        thresholds=thresholds,
        counts=counts,
        totals=totals,
    )


def _members(segments: Segments) -> tuple[Tensor, ...]:
    """The rows of each segment, int64."""
    return segments.rows.long().split(segments.starts.diff().tolist())


def _score(signal: Signal) -> Tensor:
    """[B, T], in float32 unless something is float64: half precision would rank its own rounding."""
    parts = [part for part in (signal.values, signal.baseline) if part is not None]
    dtype = torch.float64 if any(part.dtype == torch.float64 for part in parts) else torch.float32
    score = parts[0].to(dtype)
    if len(parts) > 1:
        score = score - parts[1].to(dtype)
    return score.abs() if signal.absolute else score


def _top(values: Tensor, ratio: float, hashes: Tensor | None) -> tuple[Tensor, Tensor | float]:
    """Which of the scores [N] of one segment are selected, bool [N], and the score that they reach."""
    nothing = torch.zeros_like(values, dtype=torch.bool), torch.nan
    if ratio == 0.0 or len(values) == 0:
        return nothing
    if hashes is None:
        threshold = quantile(values, ratio)
        return values >= threshold, threshold
    kept = kept_count(len(values), ratio)
    if kept == 0 or bool(values.isnan().any()):
        return nothing
    order = hashes.argsort(descending=True)
    best = order[values[order].argsort(descending=True, stable=True)][:kept]
    return nothing[0].index_fill(0, best, True), values[best[-1]]


def quantile(values: Tensor, ratio: float) -> Tensor:
    """The score that the top ``ratio`` of the flat, non-empty ``values`` reach, for any number of them.

    Returns:
        A scalar tensor: ``torch.quantile(values, 1 - ratio)`` up to its size limit; above it the same formula
        with the rank in whole numbers.
    """
    if values.numel() <= TORCH_QUANTILE_LIMIT:
        return torch.quantile(values, 1.0 - ratio)
    if bool(values.isnan().any()):
        return values.new_tensor(torch.nan)
    below, rest = divmod((UNITS - share(ratio, "quantile")) * (values.numel() - 1), UNITS)
    ordered = values.sort().values
    return torch.lerp(ordered[below], ordered[below + (rest > 0)], rest / UNITS)


def kept_count(size: int, ratio: float) -> int:
    """``ratio * size`` rounded up, as VPPO and 80/20 do: a selection in use takes at least one token."""
    return -(-size * share(ratio, "count") // UNITS)


def share(ratio: float, rule: Rule) -> int:
    """The ratio in units: the nearest number; for a count the one below, so that 2/3 of 9 rounds up to 6."""
    return int(ratio * UNITS) if rule == "count" else round(ratio * UNITS)


def position_hash(row_keys: Tensor, width: int, seed: int) -> Tensor:
    """[B, T] int64 in [0, 2^32): different for every position, in an order that the seed shuffles."""
    columns = torch.arange(width, device=row_keys.device)
    return _mix(_mix(row_keys.long()[:, None] << 16 | columns) ^ seed)


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers that spreads every bit over all others (MurmurHash3's finalizer)."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
    return x ^ (x >> 16)


def _weights(selected: Tensor, signals: tuple[Signal, ...]) -> Tensor:
    """float32 [B, T]; the last signal first, so that the first one has the last word."""
    weights = torch.zeros(selected.shape[1:], dtype=torch.float32, device=selected.device)
    for chosen, signal in zip(selected.flip(0), reversed(signals), strict=True):
        weights = weights.masked_fill(chosen, signal.weight)
    return weights


def group_advantages(rewards: Tensor, groups: Segments, epsilon: float, divide_by_std: bool = True) -> Tensor:
    """(r - mean) / (std + epsilon) within each group, with the unbiased standard deviation.

    A group whose rewards are all equal gets exactly 0. A group of one has no baseline: its mean counts as 0
    and its standard deviation as 1.

    Args:
        rewards: [B] float.
        groups: Which rows are compared; on the device of ``rewards``.
        epsilon: Added to the standard deviation.
        divide_by_std: When false ``r - mean``.

    Returns:
        [B], in the type of ``rewards``.
    """
    advantages = torch.empty_like(rewards)
    for rows in _members(groups):
        own = rewards[rows]
        alone = own.numel() == 1
        if not alone and bool((own == own[0]).all()):
            advantages[rows] = 0.0  # the rounded mean may differ from the common value in the last bit
            continue
        mean, std = (0.0, 1.0) if alone else (own.mean(), own.std())
        advantages[rows] = (own - mean) / (std + epsilon) if divide_by_std else own - mean
    return advantages


def _statistics(
    scores: Tensor, valid: Tensor, selected: Tensor, mask: Tensor, segments: Segments, notable: float
) -> tuple[Tensor, Tensor]:
    """The counts and totals of :class:`Selection`."""
    by_token = {
        "valid": valid,
        "selected": selected,
        "non_finite": valid & ~scores.isfinite(),
        "notable": valid & (scores.abs() > notable),
    }
    joined = selected.any(0)
    answers, taken = mask.any(1), joined.any(1)
    by_row = {
        "tokens": mask.sum(1),
        "selected": joined.sum(1),
        "responses": answers,
        "unselected_responses": answers & ~taken,
    }
    per_row = torch.stack([by_token[name].sum(2).T for name in COUNTS], dim=2)  # [B, n, 4]
    whole = torch.stack([by_row[name].long() for name in TOTALS], dim=1)  # [B, 4]
    return _by_segment(per_row, segments), _by_segment(whole, segments)


def _by_segment(per_row: Tensor, segments: Segments) -> Tensor:
    """int32 sums of [B, ...] over the rows of each segment."""
    sums = per_row.new_zeros((len(segments), *per_row.shape[1:]))
    return sums.index_add_(0, segments.number.long(), per_row).int()
