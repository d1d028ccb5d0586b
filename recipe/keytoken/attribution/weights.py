"""Token weights without a selection: what multiplies each token's policy loss."""

from __future__ import annotations

import torch

from keytoken.attribution.types import TokenWeights


def keep_all(mask: torch.Tensor) -> TokenWeights:
    """Weight 1 for every answer token, without any signal. ``mask`` is [B, T] bool."""
    return TokenWeights(
        weights=mask.to(torch.float32),
        selected=mask.clone(),
        masks={},
        scores={},
        metrics={"attribution/selected_share": float(bool(mask.any()))},
    )
