"""The k3 estimate and PAPO's perception term, by the formula in Python floats."""

from __future__ import annotations

import math

import pytest
import torch

from keytoken.losses.divergence import k3_estimate, perception_divergence

X = (0.0, 0.5, 1.0, 5.0, 15.0, 25.0, -3.0, -30.0)


def test_k3_clamps() -> None:
    x = torch.tensor([0.0, 1.0, 5.0, 15.0, -30.0], dtype=torch.float64)
    zero = torch.zeros_like(x)
    verl = k3_estimate(zero, x, "verl").tolist()
    video_r1 = k3_estimate(zero, x, "video_r1").tolist()
    exact = [math.exp(v) - v - 1 for v in (0.0, 1.0, 5.0)]
    assert verl == pytest.approx([*exact[:2], 10.0, 10.0, 10.0])
    assert video_r1 == pytest.approx([*exact, math.exp(10) - 11, math.exp(-10) + 9])


@pytest.mark.parametrize("bound", [None, 0.2, 30.0])
def test_perception_by_hand(bound: float | None) -> None:
    """x = log masked / real; clamps of 20 and 10 of the published code, then the option's bound."""
    log_prob = torch.full((1, len(X)), -2.0, dtype=torch.float64, requires_grad=True)
    masked = torch.tensor([[-2.0 + x for x in X]], dtype=torch.float64, requires_grad=True)
    values = perception_divergence(log_prob, masked, bound)
    exact, slopes = [], []
    for x in X:
        clamped = min(max(x, -20.0), 20.0)
        raw = math.exp(clamped) - clamped - 1
        limit = min(10.0, bound if bound is not None else math.inf)
        exact.append(min(raw, limit))
        slopes.append(1 - math.exp(x) if raw < limit and abs(x) < 20.0 else 0.0)  # 1 - q / p
    assert values[0].tolist() == pytest.approx(exact, rel=1e-9)
    values.sum().backward()
    assert log_prob.grad is not None and log_prob.grad[0].tolist() == pytest.approx(slopes, rel=1e-9)
    assert masked.grad is None  # scored before the update
