"""PAPO against a transcription of its published code: a term of the loss, with weights of 1."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from keytoken.golden import load_preset


def perception(logp: Tensor, masked: Tensor) -> Tensor:
    """KL_prcp of every token; a prompt without a picture (NaN) has none."""
    x = (masked.where(~masked.isnan(), logp.detach()) - logp).clamp(-20.0, 20.0)
    return (x.exp() - x - 1.0).clamp(-10.0, 10.0)


def papo_grpo(
    logp: Tensor, weights: Tensor, old: Tensor, advantage: Tensor, reference: Tensor, masked: Tensor
) -> Tensor:
    """Token means of: GRPO clipped at 0.2 and 0.3, 0.01 KL, -0.02 KL_prcp, and 0.05 (-log p) for 7B.

    The same 0.05 for the masked view is a constant in the published code, and left out.
    """
    ratio = (logp - old).exp()
    token = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.3) * advantage)
    token = torch.where(advantage < 0, torch.minimum(token, -3.0 * advantage), token)
    x = (reference - logp).clamp(-20.0, 20.0)
    kl = (x.exp() - x - 1.0).clamp(-10.0, 10.0)
    return (token + 0.01 * kl - 0.02 * perception(logp, masked) - 0.05 * logp).mean()


def papo_dapo(
    logp: Tensor, weights: Tensor, old: Tensor, advantage: Tensor, reference: Tensor, masked: Tensor
) -> Tensor:
    """DAPO, without KL to a reference: -0.01 KL_prcp and 0.03 (-log p)."""
    ratio = (logp - old).exp()
    token = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)
    return (token - 0.01 * perception(logp, masked) - 0.03 * logp).mean()


@pytest.mark.parametrize(("preset", "loss"), [("papo_grpo", papo_grpo), ("papo_dapo", papo_dapo)])
@pytest.mark.parametrize("far", [0.0, 6.0, -6.0, 25.0])
def test_agrees_with_the_published_code(batch: Any, agree: Any, preset: str, loss: Any, far: float) -> None:
    """``far`` moves masked and reference log-probs of some tokens beyond the bounds of 10 and 20."""
    signals = batch.signals
    signals.logp_masked[0, 1:4] = batch.current[0, 1:4] + far
    batch.reference[3, :2] = batch.current[3, :2] + far
    source = batch.transcribed(
        [1.0] * len(batch.flat(signals.logp)),
        loss,
        old=batch.flat(signals.logp),
        advantage=batch.advantages(1e-6),
        reference=batch.flat(batch.reference),
        masked=batch.flat(signals.logp_masked),
    )
    agree(batch.evaluate(load_preset(preset)), source)


def test_the_perception_term_alone(batch: Any) -> None:
    """Its gradient at a token is -gamma (1 - q / p) / N: it raises what the picture made likelier."""
    method = load_preset("papo_grpo")
    with_term = batch.evaluate(method).gradient
    without = dataclasses.replace(method, loss=dataclasses.replace(method.loss, perception_coef=0.0))
    found = with_term - batch.evaluate(without).gradient
    p, q = batch.flat(batch.current).exp(), batch.flat(batch.signals.logp_masked).exp()
    x = (q / p).log()
    inside = x.isnan() | (x.exp() - x - 1.0 < 10.0)  # beyond its bound the estimate has no gradient
    expected = (-0.02 * (1.0 - q / p) / len(p)).nan_to_num(0.0) * inside
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert 0 < int((~inside).sum()) < len(p)


@pytest.mark.parametrize("preset", ["papo_grpo", "papo_dapo"])
def test_all_tokens_weigh_the_same(batch: Any, preset: str) -> None:
    assert torch.equal(batch.weigh(load_preset(preset)).weights, batch.signals.mask.float())
