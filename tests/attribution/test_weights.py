"""Weights without a selection are the mask."""

from __future__ import annotations

import torch

from keytoken.attribution.weights import keep_all

MASK = torch.tensor([[True, True, False], [True, False, False]])


def test_keep_all_is_the_mask() -> None:
    kept = keep_all(MASK)
    assert kept.weights.tolist() == [[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]]
    assert torch.equal(kept.selected, MASK)
    assert kept.metrics == {"attribution/selected_share": 1.0}
