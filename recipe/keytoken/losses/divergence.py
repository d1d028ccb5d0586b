"""Divergences from the log-probs of sampled tokens: to the reference policy, and between two views."""

from __future__ import annotations

import torch

# (bound of log(other / policy), bound of the estimate), see LossConfig.kl_clamp
KL_CLAMPS: dict[str, tuple[float, float | None]] = {"verl": (20.0, 10.0), "video_r1": (10.0, None)}


def k3_estimate(log_prob: torch.Tensor, other_log_prob: torch.Tensor, clamp: str) -> torch.Tensor:
    """exp(x) - x - 1 with x = log(other / policy): an estimate of KL(policy || other) at each token, nats.

    Source: Schulman, joschu.net/blog/kl-approx.html.

    Args:
        log_prob: [B, T] current policy.
        other_log_prob: [B, T] the other distribution, such as the reference policy.
        clamp: A key of :data:`KL_CLAMPS`.
    """
    bound, estimate_bound = KL_CLAMPS[clamp]
    x = (other_log_prob - log_prob).clamp(-bound, bound)
    estimate = x.exp() - x - 1.0
    return estimate if estimate_bound is None else estimate.clamp(-estimate_bound, estimate_bound)


def perception_divergence(
    log_prob: torch.Tensor, masked_log_prob: torch.Tensor, bound: float | None
) -> torch.Tensor:
    """How far a token's probability moves when the video is masked, nats: PAPO's perception term.

        min(k3, bound),  x = log p(o_t | masked) - log p_theta(o_t | real), clamped to +-20, k3 to +-10

    Source: PAPO (arXiv 2507.06448) and its code. The masked side is scored once, before the update, and has
    no gradient. The gradient through the real side, 1 - p_masked / p, is in expectation that of
    KL(masked || real), the reverse of the divergence that k3 estimates.

    Left out of PAPO's options: the mask over the top share of tokens by this value, and the annealing of
    the term to 0.

    Args:
        log_prob: [B, T] current policy on the real input, with a gradient.
        masked_log_prob: [B, T] the same tokens without the video, or with part of it.
        bound: Largest value at one token, beyond which it has no gradient; None for k3's own bound.
    """
    estimate = k3_estimate(log_prob, masked_log_prob.detach(), "verl")
    return estimate if bound is None else estimate.clamp(max=bound)
