"""What each token's term is multiplied by: its weight over a denominator.

Published methods differ here more than anywhere else. With w the weights, S the tokens with a weight above 0
and o the answer tokens, the policy term of a token of response i is multiplied by

    ===========  ==================  =================  ==================================================
    normalizer   level=response      level=batch        used by
    ===========  ==================  =================  ==================================================
    selected     w / (G abs(S_i))    w / abs(S)         Video-KTR's code (response); 80/20 (batch)
    all          w / (G abs(o_i))    w / abs(o)         Video-KTR's paper (response); VPPO, ToR, DAPO (batch)
    constant     w / (G L)           refused            Dr. GRPO, L = ``constant_length``
    ===========  ==================  =================  ==================================================

G counts the non-empty responses of the mini-batch, and abs(S), abs(o) the tokens of all of it. So a part of
it needs the three counts of the whole (:class:`LossTotals`), which are additive over micro-batches and ranks:
with them the losses of the parts sum to the loss of the whole, exactly, however it is cut.
"""

from __future__ import annotations

import dataclasses

import torch

from keytoken.schema import LossConfig


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LossTotals:
    """Counts over a mini-batch that the denominators of the loss are made of.

    Example:
        Answers of 3, 2 and 0 tokens, of which 1, 0 and 0 are selected:
        ``LossTotals(num_responses=2, num_tokens=5, num_selected=1)``.
    """

    num_responses: float
    num_tokens: float
    num_selected: float

    def __add__(self, other: LossTotals) -> LossTotals:
        return LossTotals(
            num_responses=self.num_responses + other.num_responses,
            num_tokens=self.num_tokens + other.num_tokens,
            num_selected=self.num_selected + other.num_selected,
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Coefficients:
    """Factors of each token's terms, [B, T] each, in the dtype of the weights; 0 in the padding.

    Attributes:
        policy: Of the policy objective; holds the token weight.
        kl: Of the KL to the reference.
        every: Of the terms that count every answer token alike: entropy penalty and perception.
    """

    policy: torch.Tensor
    kl: torch.Tensor
    every: torch.Tensor


def loss_totals(weights: torch.Tensor, mask: torch.Tensor) -> LossTotals:
    """Count a (mini-)batch.

    Args:
        weights: [B, T] float token weights.
        mask: [B, T] bool, answer tokens. Rows without any (padding of a batch) do not count as responses.
    """
    selected = (weights > 0) & mask
    return LossTotals(
        num_responses=float(mask.any(dim=1).sum()),
        num_tokens=float(mask.sum()),
        num_selected=float(selected.sum()),
    )


def token_coefficients(
    weights: torch.Tensor, mask: torch.Tensor, config: LossConfig, totals: LossTotals
) -> Coefficients:
    """The factors of one batch, or of one part of it.

    A selected token is one with a weight above 0: under soft weights ``normalizer=selected`` divides by their
    number, not by the sum of the weights, so that the scale of the weights keeps its meaning. A response
    without a selected token gets policy factors of 0 and stays in the number of responses, so the other
    responses' gradients do not depend on it.

    Args:
        weights: [B, T] float.
        mask: [B, T] bool, answer tokens.
        config: The denominators.
        totals: Counts of the whole mini-batch that this [B, T] is a part of.
    """
    selected = (weights > 0) & mask
    over_all = _one_over_denominator(mask, config, totals.num_responses, totals.num_tokens)
    own = over_all
    if config.normalizer == "selected":
        own = _one_over_denominator(selected, config, totals.num_responses, totals.num_selected)
    every = (mask * over_all).to(weights.dtype)
    return Coefficients(
        policy=(weights.masked_fill(~mask, 0.0) * own).to(weights.dtype),
        kl=(selected * own).to(weights.dtype) if config.mask_kl else every,
        every=every,
    )


def _one_over_denominator(
    counted: torch.Tensor, config: LossConfig, num_responses: float, num_counted: float
) -> torch.Tensor:
    """[B, 1] float64. An empty denominator becomes 1: the terms that it divides are 0."""
    lengths = counted.sum(dim=1, keepdim=True).clamp(min=1).double()
    if config.level == "batch":
        return torch.full_like(lengths, 1.0 / max(num_counted, 1.0))
    if config.normalizer == "constant":
        assert config.constant_length is not None  # refused by LossConfig
        lengths = torch.full_like(lengths, float(config.constant_length))
    return 1.0 / (lengths * max(num_responses, 1.0))
