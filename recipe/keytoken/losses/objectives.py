"""The policy objectives: what one answer token adds to the loss, before weights and denominators.

An objective is a function ``(log_prob, old_log_prob, advantages, mask, config) -> (loss, clipped)``, [B, T]
each, with zeros in the padding. ``loss`` is multiplied by the token weights and divided by the denominator
afterwards (:mod:`keytoken.losses.denominators`), so a weight always scales the finished term of its token: no
objective changes a ratio or a bound because of a weight. ``clipped`` says where a bound cut the ratio.

With weights of 1 each equals verl's function of the same name (verl 0.9.1, trainer/ppo/core_algos.py) under
the ``loss_agg_mode`` that goes with the denominator:

    ==========  ==========  ===========================
    level       normalizer  verl
    ==========  ==========  ===========================
    batch       all         ``token-mean``
    response    all         ``seq-mean-token-mean``
    response    constant    ``seq-mean-token-sum-norm``
    ==========  ==========  ===========================
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from keytoken.schema import LossConfig

MAX_LOG_RATIO = 20.0  # exp(20) is finite in every float type but float16; verl has the same bound
MAX_LOG_SEQUENCE_RATIO = 10.0  # verl's bound for gspo

TokenLoss = tuple[torch.Tensor, torch.Tensor]
Objective = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, LossConfig], TokenLoss]


def ppo(
    log_prob: torch.Tensor,
    old_log_prob: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    config: LossConfig,
) -> TokenLoss:
    """max(-rho A, -clip(rho, 1 - low, 1 + high) A), bounded by -c A where A < 0 if ``dual_clip`` is set.

    Source: PPO (arXiv 1707.06347), dual clip (arXiv 1912.09729). rho is the ratio of the token. A weight of
    0 takes the token out of the update; its neighbours do not notice.

    Denominators: GRPO's paper has level=response; verl's default, and DAPO (arXiv 2503.14476), have
    level=batch, where DAPO's formula counts the tokens of one group and verl those of the mini-batch.
    """
    ratio = _token_ratio(log_prob, old_log_prob)
    plain = -advantages * ratio
    bounded = -advantages * _clip(ratio, config)
    loss = torch.maximum(plain, bounded)
    if config.dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(-advantages * config.dual_clip, loss), loss)
    return loss, bounded > plain


def gspo(
    log_prob: torch.Tensor,
    old_log_prob: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    config: LossConfig,
) -> TokenLoss:
    """PPO's clip on one ratio for the whole response, in the token form of GSPO (arXiv 2507.18071).

        s_i = exp(mean_t log rho_{i,t}),   r_{i,t} = sg[s_i] p_{i,t} / sg[p_{i,t}],   sg: no gradient

    r equals s_i at every token and its gradient is s_i times that of log p_{i,t}: with weights of 1 the mean
    over t is the paper's sequence objective, in value and gradient. The mean inside s_i runs over all tokens
    of the response, whatever their weights: s_i measures how far the policy has moved. A weight then says how
    much of the response's update goes through its token, and clipping takes all tokens of a response or none.

    Denominators: the paper's, a mean over responses of the mean over |o_i| tokens, is level=response with
    normalizer=all; level=batch is refused (:class:`keytoken.schema.LossConfig`).
    """
    length = mask.sum(dim=1, keepdim=True).clamp(min=1)
    sequence = (log_prob - old_log_prob).sum(dim=1, keepdim=True) / length
    log_ratio = log_prob - log_prob.detach() + sequence.detach()
    ratio = log_ratio.clamp(max=MAX_LOG_SEQUENCE_RATIO).exp()
    plain = -advantages * ratio
    bounded = -advantages * _clip(ratio, config)
    return torch.maximum(plain, bounded), bounded > plain


def cispo(
    log_prob: torch.Tensor,
    old_log_prob: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    config: LossConfig,
) -> TokenLoss:
    """-sg[clip(rho, 1 - low, 1 + high)] A log p: CISPO of MiniMax-M1 (arXiv 2506.13585).

    The bound limits how much a token counts, and no bound takes its gradient away: what does so here is a
    weight of 0 alone. Only the gradient has a meaning; the value changes with log p even where A averages 0.

    Denominators: the paper divides by all tokens of the group, which is level=batch with the mini-batch in
    the place of the group, as in verl.
    """
    ratio = _token_ratio(log_prob, old_log_prob).detach()
    bounded = _clip(ratio, config)
    return -bounded * advantages * log_prob, bounded != ratio


# Add one: write a function above, name it here and in keytoken.schema.LossConfig.objective.
OBJECTIVES: dict[str, Objective] = {"ppo": ppo, "gspo": gspo, "cispo": cispo}


def _token_ratio(log_prob: torch.Tensor, old_log_prob: torch.Tensor) -> torch.Tensor:
    return (log_prob - old_log_prob).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def _clip(ratio: torch.Tensor, config: LossConfig) -> torch.Tensor:
    if config.clip_low is None or config.clip_high is None:
        return ratio
    return ratio.clamp(1.0 - config.clip_low, 1.0 + config.clip_high)
