"""From scores to a selection: the top share of each signal within a scope, joined over the signals.

Source: Video-KTR (arXiv 2601.19686), hard selection of the top r percent of each signal and their union.
Two rules: ``quantile`` follows the published code, where every token at or above the linearly interpolated
(1 - ratio) quantile is kept, so that equal scores at the threshold are kept together; ``count`` keeps exactly
ceil(ratio n) tokens and breaks ties by a seeded draw, which scores that are mostly 0 need.
Departure: an optional floor in nats. Where most scores are rounding noise around 0, a quantile alone keeps
noise; the share of tokens above the floor, or above ``NOTABLE_NATS``, is always reported to make that
visible.

Thresholds, selections and their counts come from :func:`keytoken_kernels.selection.select`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal

import torch

from keytoken.attribution.scores import conditioned, dependence, refuse_non_finite, uncertainty
from keytoken.attribution.types import Signals, TokenWeights
from keytoken.attribution.weights import keep_all
from keytoken.errors import ConfigurationError
from keytoken.schema import MethodConfig, SelectionConfig
from keytoken_kernels.dispatch import Impl, resolve
from keytoken_kernels.selection import Segments, Selection, Signal, group_advantages, select
from keytoken_kernels.selection.api import DEFAULT_NOTABLE as NOTABLE_NATS
from keytoken_kernels.selection.api import OP

Scope = Literal["response", "group", "batch"]
# The signals, in the order in which they are reported.
MAKERS: dict[str, Callable[[Signals, SelectionConfig], Signal]] = {
    "visual": partial(dependence, "visual"),
    "temporal": partial(dependence, "temporal"),
    "entropy": uncertainty,
}


def segment_ids(scope: Scope, group: torch.Tensor) -> torch.Tensor:
    """[B] integer: rows with equal ids share one quantile. ``group`` is [B], equal for one prompt."""
    if scope == "response":
        return torch.arange(group.numel(), device=group.device)
    if scope == "group":
        return group
    return torch.zeros_like(group)


def select_tokens(
    signals: Signals, config: MethodConfig, impl: Impl, order: Sequence[str] = tuple(MAKERS)
) -> TokenWeights:
    """Select by every signal that ``config.selection`` switches on, and join; all tokens without a selection.

    Args:
        signals: Log-probs, entropies, mask and prompts, and outcomes if advantages are wanted.
        config: The method; its ``selection`` holds the shares, the scope and the scores.
        impl: Implementation of the kernels.
        order: The signals by precedence: a token has the weight of the first one that selects it.

    Raises:
        ConfigurationError: When a signal is on but what it is made of was not measured.
        NonFiniteError: For a NaN or an infinity at an answer token.
    """
    selection = config.selection
    if selection is None:
        return keep_all(signals.mask)
    switched_on = [name for name in order if getattr(selection, f"{name}_ratio") > 0.0]
    chosen = {name: MAKERS[name](signals, selection) for name in switched_on}
    return select_by(chosen, signals, config, impl)


def select_by(
    chosen: Mapping[str, Signal], signals: Signals, config: MethodConfig, impl: Impl
) -> TokenWeights:
    """The same for signals that a method made itself; the first one that selects a token gives its weight.

    Args:
        chosen: One to three signals by name, in the order of their precedence.
        signals: See :func:`select_tokens`.
        config: The method; its ``selection`` is set, and only scope, rule, floor and conditioning are read.
        impl: Implementation of the kernels.

    Raises:
        ConfigurationError: When scores are to be multiplied by advantages that somebody else computes.
        NonFiniteError: For a NaN or an infinity at an answer token.
    """
    selection, outcomes = config.selection, signals.outcomes
    assert selection is not None
    if selection.advantage_conditioned:
        chosen = _by_advantage(chosen, signals, config.advantage_epsilon)
    found = select(
        list(chosen.values()),
        signals.mask,
        Segments.of(segment_ids(selection.scope, signals.group)),
        rule=selection.rule,
        floor=selection.floor,
        seed=signals.seed,
        row_keys=signals.row_keys,
        rewards=None if outcomes is None else outcomes.rewards,
        groups=None if outcomes is None else Segments.of(signals.group),
        epsilon=config.advantage_epsilon,
        divide_by_std=outcomes is None or outcomes.divide_by_std,
        notable=NOTABLE_NATS if selection.floor is None else selection.floor,
        impl=impl,
    )
    if bool(found.count("non_finite").any()):
        refuse_non_finite(chosen, signals)
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


def _by_advantage(chosen: Mapping[str, Signal], signals: Signals, epsilon: float) -> dict[str, Signal]:
    """Every score multiplied by the magnitude of its answer's advantage."""
    outcomes = signals.outcomes
    if outcomes is None:
        raise ConfigurationError(
            "keytoken.method.selection.advantage_conditioned=true needs the advantages of "
            "algorithm.adv_estimator=keytoken_grpo; set that, or advantage_conditioned=false."
        )
    groups = Segments.of(signals.group).to(outcomes.rewards.device)
    magnitudes = group_advantages(outcomes.rewards, groups, epsilon, outcomes.divide_by_std).abs()
    return {name: conditioned(signal, magnitudes) for name, signal in chosen.items()}


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
        ``.../notable_share``: tokens with |score| above the floor, above :data:`NOTABLE_NATS` without one.
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
