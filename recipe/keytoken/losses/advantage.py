"""Group-normalised advantages of GRPO.

Source: DeepSeekMath (arXiv 2402.03300), outcome supervision. The epsilon is a choice of each code base: verl
has 1e-6, Video-R1 and Video-KTR have 1e-4 (``keytoken.method.advantage_epsilon``).
"""

from __future__ import annotations

import torch

from keytoken_kernels import selection


def group_advantages(
    rewards: torch.Tensor, group: torch.Tensor, epsilon: float, divide_by_std: bool = True
) -> torch.Tensor:
    """(r - mean) / (std + epsilon) within each group, with the unbiased standard deviation.

    A group whose rewards are all equal gets exactly 0. A group of one has no baseline: as in verl its mean
    counts as 0 and its standard deviation as 1. The formula stands in
    :func:`keytoken_kernels.selection.group_advantages`, beside the kernel that computes the same.

    Args:
        rewards: [B] float.
        group: [B] integer, equal for answers to the same prompt.
        epsilon: Added to the standard deviation.
        divide_by_std: When false r - mean, as in Dr. GRPO (arXiv 2503.20783).

    Returns:
        [B] float.
    """
    groups = selection.Segments.of(group.cpu()).to(rewards.device)
    return selection.group_advantages(rewards, groups, epsilon, divide_by_std)
