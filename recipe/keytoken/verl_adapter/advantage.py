"""The advantage estimator ``keytoken_grpo``: GRPO with the method's own epsilon.

verl's ``grpo`` adds 1e-6 to the standard deviation and offers no key for it (verl 0.9.1,
trainer/ppo/ray_trainer.py:235-246); the published Video-KTR code adds 1e-4.

A method that selects tokens computes the same advantages once more, in the kernel that weighs the tokens.
Those are what the actor is trained on, and :func:`require_same` compares them with the estimator's.
"""

from functools import partial

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from keytoken.attribution.types import Signals
from keytoken.errors import KernelError
from keytoken.losses.advantage import group_advantages
from keytoken.verl_adapter.compat import ADV_ESTIMATOR_REGISTRY, register_adv_est

NAME = "keytoken_grpo"
# Eight units in the last place of float32: what two orders of summation may differ by.
ROUNDING = 1e-6


def install_estimator(epsilon: float) -> None:
    """Make verl's ``algorithm.adv_estimator=keytoken_grpo`` stand for GRPO with this epsilon.

    verl hands an estimator the ``algorithm`` block only, and the epsilon belongs to the method; so the
    trainer binds it, in the process that computes the advantages. A second trainer in the same process
    replaces the binding, which verl's own registration would refuse.
    """
    ADV_ESTIMATOR_REGISTRY.pop(NAME, None)
    register_adv_est(NAME)(partial(grpo_advantages, epsilon=epsilon))


def grpo_advantages(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: np.ndarray,
    config: DictConfig,
    *,
    epsilon: float,
) -> tuple[Tensor, Tensor]:
    """Group-normalised rewards, the same for every token of an answer.

    Departure from verl's ``grpo``: a group whose rewards are all equal gets exactly 0, where verl divides
    a rounding error by epsilon.

    Args:
        token_level_rewards: [B, T] float, summed over the answer.
        response_mask: [B, T], 1 on answer tokens.
        index: [B] prompt ids; answers with the same id form a group.
        config: verl's ``algorithm`` block; ``norm_adv_by_std_in_grpo=false`` leaves out the division.
        epsilon: Added to the standard deviation of a group.

    Returns:
        Advantages [B, T] and returns [B, T], which are the same thing here.
    """
    group = torch.from_numpy(np.unique(index.astype(str), return_inverse=True)[1])
    with torch.no_grad():
        advantages = group_advantages(
            token_level_rewards.sum(dim=-1),
            group.to(token_level_rewards.device),
            epsilon,
            divide_by_std=config.get("norm_adv_by_std_in_grpo", True),
        )
        broadcast = advantages[:, None] * response_mask
    return broadcast, broadcast


def require_same(found: Tensor, estimated: Tensor, signals: Signals) -> float:
    """Compare the advantages of the selection with those of the estimator.

    The rounding of a group's mean is divided by its standard deviation, which may be small: the bound grows
    with the largest ratio of an advantage to its reward's distance from the mean.

    Args:
        found: [B] by the selection.
        estimated: [B, T] by the estimator, 0 outside the response mask.
        signals: mask, prompts and outcomes.

    Returns:
        The largest difference. NaN if the estimator's are not finite, which the loss refuses by itself.

    Raises:
        KernelError: they differ by more than rounding explains.
    """
    outcomes = signals.outcomes
    if outcomes is None or estimated.numel() == 0:
        return 0.0
    gap = float((found[:, None] * signals.mask - estimated).abs().max())
    if not bool(estimated.isfinite().all()):
        return gap
    distance = group_advantages(outcomes.rewards, signals.group, 0.0, divide_by_std=False).abs()
    growth = torch.where(distance > 0, estimated.abs().amax(dim=1) / distance, 0.0).max()
    bound = ROUNDING * (1.0 + float(outcomes.rewards.abs().max())) * (1.0 + float(growth))
    if not gap <= bound:
        raise KernelError(
            f"The advantages of the selection differ from those of algorithm.adv_estimator={NAME} by "
            f"{gap:.3g}, where rounding explains {bound:.3g}. One of them is wrong: train with "
            "keytoken.kernels.impl=reference, and report this with the rewards of the batch."
        )
    return gap
