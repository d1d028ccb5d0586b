"""From scores to a selection: the top share of each signal within a scope, joined over the signals.

Source: Video-KTR (arXiv 2601.19686), hard selection of the top r percent of each signal and their union.
The rule for ties follows the published code: every token at or above the linearly interpolated
(1 - ratio) quantile is kept, so equal scores at the threshold are kept together.
Departure: an optional floor in nats. Where most scores are rounding noise around 0, a quantile alone keeps
noise; the share of tokens above ``NOTABLE_NATS`` is always reported to make that visible.
"""

from __future__ import annotations

from typing import Literal

import torch

from keytoken.attribution.scores import Score

# Scores below this are mostly noise: a log-prob difference of 0.05 is a change of probability by 5 percent.
NOTABLE_NATS = 0.05
# torch.quantile refuses larger inputs: float32 ranks name every element only up to here.
TORCH_QUANTILE_LIMIT = 2**24


def quantile(values: torch.Tensor, q: float) -> torch.Tensor:
    """The linearly interpolated quantile of a flat, non-empty tensor, for any number of elements.

    Args:
        values: [N] float.
        q: In [0, 1].

    Returns:
        A scalar tensor of the same dtype. Equal to ``torch.quantile`` up to its size limit; above it the
        same formula with the rank in float64.
    """
    if values.numel() <= TORCH_QUANTILE_LIMIT:
        return torch.quantile(values, q)
    return _sorted_quantile(values, q)


def _sorted_quantile(values: torch.Tensor, q: float) -> torch.Tensor:
    ordered = values.sort().values
    rank = q * (ordered.numel() - 1)
    below = int(rank)
    above = min(below + 1, ordered.numel() - 1)
    return torch.lerp(ordered[below], ordered[above], rank - below)


def segment_ids(scope: Literal["response", "group", "batch"], group: torch.Tensor) -> torch.Tensor:
    """[B] integer: rows with equal ids share one quantile. ``group`` is [B], equal for one prompt."""
    if scope == "response":
        return torch.arange(group.numel(), device=group.device)
    if scope == "group":
        return group
    return torch.zeros_like(group)


def select_top(
    score: Score, segments: torch.Tensor, ratio: float, floor: float | None = None
) -> torch.Tensor:
    """Keep the top share of the valid tokens of each segment.

    Args:
        score: Values and validity, [B, T].
        segments: [B] integer, see :func:`segment_ids`.
        ratio: Share in [0, 1]. 0 selects nothing, 1 everything that is valid.
        floor: A kept token also needs a score of at least this many nats.

    Returns:
        [B, T] bool. Segments without a valid token select nothing.
    """
    selected = torch.zeros_like(score.valid)
    if ratio == 0.0:
        return selected
    values = score.values if score.values.dtype == torch.float64 else score.values.float()
    for segment in segments.unique():
        rows = segments == segment
        valid = score.valid[rows]
        candidates = values[rows][valid]
        if candidates.numel() > 0:
            selected[rows] = valid & (values[rows] >= quantile(candidates, 1.0 - ratio))
    return selected if floor is None else selected & (values >= floor)


def union(masks: dict[str, torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
    """[B, T] bool: answer tokens that at least one signal selected."""
    joined = torch.zeros_like(mask)
    for selected in masks.values():
        joined = joined | selected
    return joined & mask


def selection_metrics(
    scores: dict[str, Score],
    masks: dict[str, torch.Tensor],
    ratios: dict[str, float],
    selected: torch.Tensor,
    mask: torch.Tensor,
) -> dict[str, float]:
    """Statistics of a selection, all shares in [0, 1].

    Returns:
        ``attribution/selected_share``: selected answer tokens (union of the signals).
        ``attribution/unselected_response_share``: non-empty responses without any selected token.
        For each signal, of the tokens that it exists for:
        ``attribution/<signal>/coverage``: answer tokens that the signal exists for. Where it is 0 the
        following three are left out.
        ``.../selected_share``: tokens that it selected.
        ``.../notable_share``: tokens with |score| above :data:`NOTABLE_NATS`.
        ``.../excess_share``: selected_share minus the ratio asked for: above 0 through ties at the threshold
        and short segments, below 0 through the floor.
    """
    answers = mask.any(dim=1)
    metrics = {
        "attribution/selected_share": _share(selected, mask),
        "attribution/unselected_response_share": _share(answers & ~selected.any(dim=1), answers),
    }
    for name, score in scores.items():
        prefix = f"attribution/{name}"
        metrics[f"{prefix}/coverage"] = _share(score.valid, mask)
        if bool(score.valid.any()):
            share = _share(masks[name], score.valid)
            metrics[f"{prefix}/selected_share"] = share
            metrics[f"{prefix}/notable_share"] = _share(score.values.abs() > NOTABLE_NATS, score.valid)
            metrics[f"{prefix}/excess_share"] = share - ratios[name]
    return metrics


def _share(part: torch.Tensor, whole: torch.Tensor) -> float:
    """|part and whole| / |whole|, 0 for an empty whole."""
    return float((part & whole).sum()) / max(int(whole.sum()), 1)
