"""Scores of single tokens: how much each one depended on the video and on the order of its frames.

Source: Video-KTR (arXiv 2601.19686), definitions of the visual and temporal dependence. The paper takes
absolute differences, the published code signed ones; here the sign is an option.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch

from keytoken.attribution.types import Signals
from keytoken.checks import require_finite
from keytoken.errors import ConfigurationError
from keytoken.schema import SelectionConfig


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """One signal of a batch.

    Attributes:
        values: [B, T] float in nats, 0 where ``valid`` is false.
        valid: [B, T] bool, answer tokens for which the signal exists.
    """

    values: torch.Tensor
    valid: torch.Tensor


def dependence(
    logp: torch.Tensor,
    logp_view: torch.Tensor,
    mask: torch.Tensor,
    applies: torch.Tensor,
    sign: Literal["signed", "absolute"],
    view: str,
) -> Score:
    """Difference of log-probs between the real input and a counterfactual view.

    A view that gives exactly the same log-probs scores 0: whether a view's *input* changed is checked where
    it is built (:mod:`keytoken.attribution.views`), not here.

    Args:
        logp: [B, T] log-probs under the real input, nats.
        logp_view: [B, T] log-probs of the same tokens under the view, nats.
        mask: [B, T] bool, answer tokens.
        applies: [B] bool, responses that the view exists for; other rows of ``logp_view`` are not read.
        sign: "signed" for log p(real) - log p(view), "absolute" for its magnitude.
        view: Name of the view, for messages.

    Raises:
        NonFiniteError: For a NaN or an infinity at an answer token.
    """
    valid = mask & applies[:, None]
    require_finite(logp, valid, "log-probs of the real view")
    require_finite(logp_view, valid, f"log-probs of the {view} view")
    difference = logp - logp_view
    if sign == "absolute":
        difference = difference.abs()
    return Score(values=difference.masked_fill(~valid, 0.0), valid=valid)


def uncertainty(entropy: torch.Tensor, mask: torch.Tensor) -> Score:
    """The entropy of the policy at each answer token; exists for every modality.

    Args:
        entropy: [B, T] in nats.
        mask: [B, T] bool, answer tokens.

    Raises:
        NonFiniteError: For a NaN or an infinity at an answer token.
    """
    require_finite(entropy, mask, "entropy of the real view")
    return Score(values=entropy.masked_fill(~mask, 0.0), valid=mask)


def compute_scores(signals: Signals, config: SelectionConfig) -> dict[str, Score]:
    """Scores of every signal that is switched on, keyed "visual", "temporal", "entropy".

    Images have no temporal score, text has the entropy only.

    Raises:
        ConfigurationError: When a signal is on but its pass did not run.
        NonFiniteError: For a NaN or an infinity at an answer token.
    """
    scores: dict[str, Score] = {}
    passes = (
        ("visual", "masked", config.visual_ratio, signals.logp_masked, signals.has_visual),
        ("temporal", "shuffled", config.temporal_ratio, signals.logp_shuffled, signals.has_temporal),
    )
    for name, view, ratio, logp_view, applies in passes:
        if ratio == 0.0:
            continue
        if logp_view is None:
            if bool(applies.any()):
                raise ConfigurationError(
                    f"keytoken.method.selection.{name}_ratio is {ratio} but the {view} pass did not run; "
                    f"run it, or set {name}_ratio=0."
                )
            logp_view = signals.logp
        scores[name] = dependence(signals.logp, logp_view, signals.mask, applies, config.score_sign, view)
    if config.entropy_ratio > 0.0:
        scores["entropy"] = uncertainty(signals.entropy, signals.mask)
    return scores
