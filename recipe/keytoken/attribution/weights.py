"""Token weights without a selection, and what methods make weights of: scores on a common scale, shares."""

from __future__ import annotations

import math

import torch

from keytoken.attribution.types import TokenWeights


def keep_all(mask: torch.Tensor) -> TokenWeights:
    """Weight 1 for every answer token, without any signal. ``mask`` is [B, T] bool."""
    return TokenWeights(
        weights=mask.to(torch.float32),
        selected=mask.clone(),
        masks={},
        scores={},
        metrics={"attribution/selected_share": float(bool(mask.any()))},
    )


def share_metrics(weights: torch.Tensor, mask: torch.Tensor) -> dict[str, float]:
    """The statistics of a selection that say nothing of signals, for weights that were changed afterwards.

    Args:
        weights: [B, T] float.
        mask: [B, T] bool, answer tokens.

    Returns:
        ``attribution/selected_share`` and ``attribution/unselected_response_share``, as
        :func:`keytoken.attribution.selection.selection_metrics` defines them.
    """
    selected, answers = weights > 0, mask.any(dim=1)
    unselected = answers & ~selected.any(dim=1)
    return {
        "attribution/selected_share": float(selected.sum()) / max(float(mask.sum()), 1.0),
        "attribution/unselected_response_share": float(unselected.sum()) / max(float(answers.sum()), 1.0),
    }


def between_extremes(
    scores: torch.Tensor, mask: torch.Tensor, group: torch.Tensor | None = None
) -> torch.Tensor:
    """Where a score lies between the smallest (0) and the largest (1) of its answer, or of its group.

    Args:
        scores: [B, T] float, finite inside the mask.
        mask: [B, T] bool, answer tokens.
        group: [B] integer: rows with equal ids share their extremes; None for every answer by itself.

    Returns:
        [B, T], 0 in the padding and where all scores are equal.
    """
    low = scores.masked_fill(~mask, math.inf).amin(dim=1)
    high = scores.masked_fill(~mask, -math.inf).amax(dim=1)
    if group is not None:
        number = torch.unique(group, return_inverse=True)[1].to(mask.device)
        size = int(number.max()) + 1 if len(number) else 0
        low = low.new_zeros(size).scatter_reduce_(0, number, low, "amin", include_self=False)[number]
        high = high.new_zeros(size).scatter_reduce_(0, number, high, "amax", include_self=False)[number]
    spread = (high - low)[:, None]
    return torch.where(mask & (spread > 0), (scores - low[:, None]) / spread.where(spread > 0, 1.0), 0.0)
