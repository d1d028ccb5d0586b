"""The token-weighted, clipped policy loss with an optional KL to a reference policy.

    L = sum_{i,t} c_{i,t} max(-rho A, -clip(rho, 1 - low, 1 + high) A)  +  beta sum_{i,t} k_{i,t} KL_{i,t}

The coefficients c (with the token weights in it) and k hold every denominator. They need three counts of
the whole mini-batch (:class:`LossTotals`), which are additive over micro-batches and ranks: with the counts
of the whole, the losses of the parts sum to the loss of the whole, exactly, however it is cut.

Sources: PPO (arXiv 1707.06347), dual clip (arXiv 1912.09729), k3 (Schulman, joschu.net/blog/kl-approx.html).
With weights of 1 it equals verl's ``compute_policy_loss_vanilla`` plus ``low_var_kl``.
"""

from __future__ import annotations

import dataclasses

import torch

from keytoken.checks import require_finite
from keytoken.schema import LossConfig

MAX_LOG_RATIO = 20.0  # exp(20) is finite in every float type but float16; verl has the same bound
# (bound of log(ref / policy), bound of the estimate), see LossConfig.kl_clamp
KL_CLAMPS: dict[str, tuple[float, float | None]] = {"verl": (20.0, 10.0), "video_r1": (10.0, None)}


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
class PolicyLoss:
    """The loss and its parts. All are additive: sum them over micro-batches and ranks.

    Attributes:
        loss: Scalar with a gradient: policy term plus kl_coef times KL.
        policy_loss: The policy term, detached.
        kl_loss: The KL term before kl_coef, detached, in nats; 0 without a reference.
        clipped_share: Share of the selected tokens whose ratio was cut by clip_low or clip_high.
        old_to_new_kl: k1 estimate of KL(old policy || current policy) over all answer tokens, nats.
        num_unselected: Non-empty responses without a selected token, which add 0 to the policy term.
    """

    loss: torch.Tensor
    policy_loss: torch.Tensor
    kl_loss: torch.Tensor
    clipped_share: torch.Tensor
    old_to_new_kl: torch.Tensor
    num_unselected: torch.Tensor


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
) -> tuple[torch.Tensor, torch.Tensor]:
    """What each token's policy loss and KL are multiplied by; the weights and all denominators are inside.

    A selected token is one with a weight above 0: under soft weights ``normalizer=selected`` divides by their
    number, not by the sum of the weights, so that the scale of the weights keeps its meaning. A response
    without a selected token gets coefficients of 0 and stays in the number of responses, so the other
    responses' gradients do not depend on it.

    Args:
        weights: [B, T] float.
        mask: [B, T] bool, answer tokens.
        config: The denominators.
        totals: Counts of the whole mini-batch that this [B, T] is a part of.

    Returns:
        Coefficients of the policy term and of the KL term, [B, T] each, in the dtype of ``weights``.
    """
    selected = (weights > 0) & mask
    over_all = _reciprocal_denominator(mask, config.level, totals.num_responses, totals.num_tokens)
    over_selected = _reciprocal_denominator(selected, config.level, totals.num_responses, totals.num_selected)
    own = over_selected if config.normalizer == "selected" else over_all
    policy = weights.masked_fill(~mask, 0.0) * own
    kl = selected * own if config.mask_kl else mask * over_all
    return policy.to(weights.dtype), kl.to(weights.dtype)


def _reciprocal_denominator(
    counted: torch.Tensor, level: str, num_responses: float, num_counted: float
) -> torch.Tensor:
    """[B, 1] float: 1 over the denominator of each row. Empty denominators become 1: their terms are 0."""
    if level == "response":
        return 1.0 / (counted.sum(dim=1, keepdim=True).clamp(min=1).double() * max(num_responses, 1.0))
    return torch.full_like(counted[:, :1], 1.0 / max(num_counted, 1.0), dtype=torch.float64)


def k3_estimate(log_prob: torch.Tensor, ref_log_prob: torch.Tensor, clamp: str) -> torch.Tensor:
    """exp(x) - x - 1 with x = log(ref / policy): an estimate of KL(policy || reference) at each token, nats.

    Args:
        log_prob: [B, T] current policy.
        ref_log_prob: [B, T] reference policy.
        clamp: A key of :data:`KL_CLAMPS`.
    """
    bound, estimate_bound = KL_CLAMPS[clamp]
    x = (ref_log_prob - log_prob).clamp(-bound, bound)
    estimate = x.exp() - x - 1.0
    return estimate if estimate_bound is None else estimate.clamp(-estimate_bound, estimate_bound)


def _clipped_objective(
    ratio: torch.Tensor, advantages: torch.Tensor, config: LossConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of each token and whether clip_low or clip_high cut it, [B, T] each."""
    plain = -advantages * ratio
    if config.clip_low is None or config.clip_high is None:
        return plain, torch.zeros_like(plain, dtype=torch.bool)
    clipped = -advantages * ratio.clamp(1.0 - config.clip_low, 1.0 + config.clip_high)
    loss = torch.maximum(plain, clipped)
    if config.dual_clip is not None:
        bounded = torch.minimum(-advantages * config.dual_clip, loss)
        loss = torch.where(advantages < 0, bounded, loss)
    return loss, clipped > plain


def policy_loss(
    *,
    log_prob: torch.Tensor,
    old_log_prob: torch.Tensor,
    advantages: torch.Tensor,
    weights: torch.Tensor,
    mask: torch.Tensor,
    config: LossConfig,
    ref_log_prob: torch.Tensor | None = None,
    rollout_weights: torch.Tensor | None = None,
    totals: LossTotals | None = None,
) -> PolicyLoss:
    """The loss of one batch, or of one part of it.

    Args:
        log_prob: [B, T] current policy, with a gradient, nats. Padding may hold anything.
        old_log_prob: [B, T] policy that the ratio is taken against.
        advantages: [B, T].
        weights: [B, T] token weights, see :class:`keytoken.attribution.types.TokenWeights`.
        mask: [B, T] bool, answer tokens.
        config: Clipping, denominators and KL.
        ref_log_prob: [B, T] reference policy; needed if ``config.kl_coef`` is above 0.
        rollout_weights: [B, T] importance weights between rollout engine and trainer, multiplied into the
            policy term; None for none.
        totals: Counts of the whole mini-batch; None if this is the whole.

    Raises:
        ValueError: If a KL is asked for and there is no reference.
        NonFiniteError: For a NaN or an infinity at an answer token.
    """
    if config.kl_coef > 0.0 and ref_log_prob is None:
        raise ValueError("keytoken.method.loss.kl_coef is above 0 but no ref_log_prob was given; pass it.")
    require_finite(log_prob, mask, "log_prob")
    require_finite(old_log_prob, mask, "old_log_prob")
    require_finite(advantages, mask, "advantages")
    require_finite(weights, mask, "token weights")
    totals = loss_totals(weights, mask) if totals is None else totals
    policy_coef, kl_coef = token_coefficients(weights, mask, config, totals)

    # Padding is replaced before exp(), so that garbage in it reaches neither the loss nor the gradient.
    log_prob = log_prob.masked_fill(~mask, 0.0)
    log_ratio = (log_prob - old_log_prob.masked_fill(~mask, 0.0)).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    token_loss, clipped = _clipped_objective(log_ratio.exp(), advantages.masked_fill(~mask, 0.0), config)
    if rollout_weights is not None:
        token_loss = token_loss * rollout_weights.masked_fill(~mask, 0.0)
    policy_term = (policy_coef * token_loss).sum()

    kl_term = torch.zeros_like(policy_term)
    if config.kl_coef > 0.0 and ref_log_prob is not None:
        require_finite(ref_log_prob, mask, "ref_log_prob")
        kl = k3_estimate(log_prob, ref_log_prob.masked_fill(~mask, 0.0), config.kl_clamp)
        kl_term = (kl_coef * kl).sum()

    selected = (weights > 0) & mask
    return PolicyLoss(
        loss=policy_term + config.kl_coef * kl_term,
        policy_loss=policy_term.detach(),
        kl_loss=kl_term.detach(),
        clipped_share=(clipped & selected).sum() / max(totals.num_selected, 1.0),
        old_to_new_kl=-(log_ratio.detach() * mask).sum() / max(totals.num_tokens, 1.0),
        num_unselected=(mask.any(dim=1) & ~selected.any(dim=1)).sum(),
    )
