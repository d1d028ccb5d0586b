"""The token-weighted policy loss.

    L = sum_{i,t} c_{i,t} J_{i,t}  +  beta  sum_{i,t} k_{i,t} KL_{i,t}
        -  eta  sum_{i,t} e_{i,t} log p_{i,t}  -  gamma sum_{i,t} e_{i,t} D_{i,t}

J is the objective (:mod:`keytoken.losses.objectives`), KL the divergence from a reference policy and D that
from the masked view (:mod:`keytoken.losses.divergence`). The factors c (with the token weights in it), k and
e hold every denominator (:mod:`keytoken.losses.denominators`); a sum over e is a mean over all answer tokens.
"""

from __future__ import annotations

import dataclasses

import torch

from keytoken.checks import require_finite
from keytoken.losses.denominators import LossTotals, loss_totals, token_coefficients
from keytoken.losses.divergence import k3_estimate, perception_divergence
from keytoken.losses.objectives import MAX_LOG_RATIO, OBJECTIVES
from keytoken.schema import LossConfig

__all__ = ["LossTotals", "PolicyLoss", "k3_estimate", "loss_totals", "policy_loss", "token_coefficients"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PolicyLoss:
    """The loss and its parts. All are additive: sum them over micro-batches and ranks.

    Attributes:
        loss: Scalar with a gradient: all terms with their coefficients.
        policy_loss: The policy term, detached.
        kl_loss: The KL term before kl_coef, detached, in nats; 0 without a reference.
        perception_kl: The perception term before perception_coef, detached, in nats; 0 if it is off.
        surprise: -mean log p of the answer tokens, before entropy_penalty, detached, in nats.
        clipped_share: Share of the selected tokens whose ratio was cut by clip_low or clip_high.
        old_to_new_kl: k1 estimate of KL(old policy || current policy) over all answer tokens, nats.
        num_unselected: Non-empty responses without a selected token, which add 0 to the policy term.
    """

    loss: torch.Tensor
    policy_loss: torch.Tensor
    kl_loss: torch.Tensor
    perception_kl: torch.Tensor
    surprise: torch.Tensor
    clipped_share: torch.Tensor
    old_to_new_kl: torch.Tensor
    num_unselected: torch.Tensor


def policy_loss(
    *,
    log_prob: torch.Tensor,
    old_log_prob: torch.Tensor,
    advantages: torch.Tensor,
    weights: torch.Tensor,
    mask: torch.Tensor,
    config: LossConfig,
    ref_log_prob: torch.Tensor | None = None,
    masked_log_prob: torch.Tensor | None = None,
    rollout_weights: torch.Tensor | None = None,
    totals: LossTotals | None = None,
) -> PolicyLoss:
    """The loss of one batch, or of one part of it.

    The entropy penalty, eta times -mean log p, is VPPO's (0.06) and one of PAPO's two: it makes what was
    sampled more likely. Over the samples of the current policy its gradient is 0 in expectation, so it acts
    through the finite sample and the later updates of a batch. PAPO adds the same for the masked view, which
    its code scores without a gradient: a constant, left out here.

    Args:
        log_prob: [B, T] current policy, with a gradient, nats. Padding may hold anything, as everywhere.
        old_log_prob: [B, T] policy that the ratio is taken against.
        advantages: [B, T].
        weights: [B, T] token weights, see :class:`keytoken.attribution.types.TokenWeights`.
        mask: [B, T] bool, answer tokens.
        config: Objective, clipping, denominators and the weights of the terms.
        ref_log_prob: [B, T] reference policy; needed if ``config.kl_coef`` is above 0.
        masked_log_prob: [B, T] log-probs without the video; needed if ``config.perception_coef`` is above 0.
            Where it equals ``log_prob`` the perception term and its gradient are 0.
        rollout_weights: [B, T] importance weights between rollout engine and trainer, multiplied into the
            policy term; None for none.
        totals: Counts of the whole mini-batch; None if this is the whole.

    Raises:
        ValueError: If a term is on and the log-probs that it needs were not given.
        NonFiniteError: For a NaN or an infinity at an answer token.
    """
    ref_log_prob = _clean(ref_log_prob, mask, "ref_log_prob", "kl_coef", config.kl_coef)
    masked_log_prob = _clean(
        masked_log_prob, mask, "masked_log_prob", "perception_coef", config.perception_coef
    )
    require_finite(weights, mask, "token weights")
    log_prob = _without_padding(log_prob, mask, "log_prob")
    old_log_prob = _without_padding(old_log_prob, mask, "old_log_prob")
    advantages = _without_padding(advantages, mask, "advantages")
    totals = loss_totals(weights, mask) if totals is None else totals
    factors = token_coefficients(weights, mask, config, totals)

    token_loss, clipped = OBJECTIVES[config.objective](log_prob, old_log_prob, advantages, mask, config)
    if rollout_weights is not None:
        token_loss = token_loss * rollout_weights.masked_fill(~mask, 0.0)
    policy_term = (factors.policy * token_loss).sum()
    surprise = -(factors.every * log_prob).sum()
    kl = perception = torch.zeros_like(surprise)
    if ref_log_prob is not None:
        kl = (factors.kl * k3_estimate(log_prob, ref_log_prob, config.kl_clamp)).sum()
    if masked_log_prob is not None:
        divergence = perception_divergence(log_prob, masked_log_prob, config.perception_clip)
        perception = (factors.every * divergence).sum()

    loss = policy_term + config.kl_coef * kl
    loss = loss + config.entropy_penalty * surprise - config.perception_coef * perception
    selected = (weights > 0) & mask
    moved = (log_prob - old_log_prob).detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return PolicyLoss(
        loss=loss,
        policy_loss=policy_term.detach(),
        kl_loss=kl.detach(),
        perception_kl=perception.detach(),
        surprise=surprise.detach(),
        clipped_share=(clipped & selected).sum() / max(totals.num_selected, 1.0),
        old_to_new_kl=-moved.sum() / max(totals.num_tokens, 1.0),
        num_unselected=(mask.any(dim=1) & ~selected.any(dim=1)).sum(),
    )


def _without_padding(values: torch.Tensor, mask: torch.Tensor, name: str) -> torch.Tensor:
    """Zeros in the padding, before any exp(): garbage there reaches neither the loss nor the gradient."""
    require_finite(values, mask, name)
    return values.masked_fill(~mask, 0.0)


def _clean(
    values: torch.Tensor | None, mask: torch.Tensor, name: str, key: str, coefficient: float
) -> torch.Tensor | None:
    """The log-probs of a term without their padding; None if the term is off."""
    if coefficient == 0.0:
        return None
    if values is None:
        raise ValueError(f"keytoken.method.loss.{key} is above 0 but no {name} was given; pass it.")
    return _without_padding(values, mask, name)
