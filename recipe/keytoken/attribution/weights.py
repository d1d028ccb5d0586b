"""From a selection to token weights: what multiplies each token's policy loss."""

from __future__ import annotations

import torch

from keytoken.attribution.types import TokenWeights


def hard_weights(selected: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Weight 1 for selected answer tokens, 0 elsewhere.

    Args:
        selected: [B, T] bool.
        mask: [B, T] bool, answer tokens.

    Returns:
        [B, T] float32.
    """
    return (selected & mask).to(torch.float32)


def keep_all(mask: torch.Tensor) -> TokenWeights:
    """Weight 1 for every answer token, without any signal. ``mask`` is [B, T] bool."""
    return TokenWeights(
        weights=mask.to(torch.float32),
        selected=mask.clone(),
        masks={},
        scores={},
        metrics={"attribution/selected_share": float(bool(mask.any()))},
    )
