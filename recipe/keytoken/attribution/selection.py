"""From scores to a selection: the top share of each signal within a scope, joined over the signals.

Source: Video-KTR (arXiv 2601.19686), hard selection of the top r percent of each signal and their union.
The rule for ties follows the published code: every token at or above the linearly interpolated
(1 - ratio) quantile is kept, so equal scores at the threshold are kept together.
Departure: an optional floor in nats. Where most scores are rounding noise around 0, a quantile alone keeps
noise; the share of tokens above ``NOTABLE_NATS`` is always reported to make that visible.

Thresholds, selections and their counts come from :func:`keytoken_kernels.selection.select`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch

from keytoken.attribution.scores import refuse_non_finite
from keytoken.attribution.types import Signals, TokenWeights
from keytoken_kernels.dispatch import Impl, resolve
from keytoken_kernels.selection import Segments, Selection, Signal, select
from keytoken_kernels.selection.api import DEFAULT_NOTABLE as NOTABLE_NATS
from keytoken_kernels.selection.api import OP

Scope = Literal["response", "group", "batch"]


def segment_ids(scope: Scope, group: torch.Tensor) -> torch.Tensor:
    """[B] integer: rows with equal ids share one quantile. ``group`` is [B], equal for one prompt."""
    if scope == "response":
        return torch.arange(group.numel(), device=group.device)
    if scope == "group":
        return group
    return torch.zeros_like(group)


def select_tokens(
    chosen: Mapping[str, Signal],
    signals: Signals,
    *,
    scope: Scope,
    floor: float | None,
    advantage_epsilon: float,
    impl: Impl,
) -> TokenWeights:
    """Select by every signal and join: a token has the weight of the first signal that selects it.

    Args:
        chosen: The signals in use by name, in the order of their precedence.
        signals: Mask, prompts, and outcomes if advantages are wanted.
        scope: The tokens that share a quantile: one response, all responses to a prompt, or the batch.
        floor: A kept token also needs a score of at least this many nats.
        advantage_epsilon: Added to the standard deviation of a group's rewards.
        impl: Implementation of the kernels.

    Raises:
        NonFiniteError: For a NaN or an infinity at an answer token.
    """
    outcomes = signals.outcomes
    found = select(
        list(chosen.values()),
        signals.mask,
        Segments.of(segment_ids(scope, signals.group)),
        floor=floor,
        rewards=None if outcomes is None else outcomes.rewards,
        groups=None if outcomes is None else Segments.of(signals.group),
        epsilon=advantage_epsilon,
        divide_by_std=outcomes is None or outcomes.divide_by_std,
        notable=NOTABLE_NATS,
        impl=impl,
    )
    if bool(found.count("non_finite").any()):
        refuse_non_finite(chosen, signals.mask)
    metrics = selection_metrics(found, {name: signal.ratio for name, signal in chosen.items()})
    metrics["kernels/impl"] = float(resolve(OP, impl, signals.mask.device) == "triton")
    return TokenWeights(
        weights=found.weights,
        selected=found.weights > 0,
        masks=dict(zip(chosen, found.selected, strict=True)),
        scores=dict(zip(chosen, found.scores, strict=True)),
        metrics=metrics,
        advantages=found.response_advantages,
    )


def selection_metrics(found: Selection, ratios: Mapping[str, float]) -> dict[str, float]:
    """Statistics of a selection, all shares in [0, 1].

    Args:
        found: The selection.
        ratios: The share that each signal was asked for, by name, in the order of the signals.

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
    tokens, selected, responses, unselected = found.totals.sum(dim=0).tolist()
    metrics = {
        "attribution/selected_share": selected / max(tokens, 1),
        "attribution/unselected_response_share": unselected / max(responses, 1),
    }
    for (name, ratio), counts in zip(ratios.items(), found.counts.sum(dim=0).tolist(), strict=True):
        valid, chosen, _, notable = counts
        prefix = f"attribution/{name}"
        metrics[f"{prefix}/coverage"] = valid / max(tokens, 1)
        if valid:
            metrics[f"{prefix}/selected_share"] = chosen / valid
            metrics[f"{prefix}/notable_share"] = notable / valid
            metrics[f"{prefix}/excess_share"] = chosen / valid - ratio
    return metrics
