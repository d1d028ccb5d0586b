"""VPPO against a transcription of its published code, the whole batch being one micro-batch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from keytoken.attribution.methods import compute_token_weights
from keytoken.attribution.methods.vppo import trajectory_factors
from keytoken.attribution.types import Signals
from keytoken.golden import load_preset


def k3(old: float, blackened: float) -> float:
    d = min(max(blackened - old, -20.0), 20.0)
    return min(max(math.exp(d) - d - 1.0, 0.0), 10.0)


def token_filter(scores: list[float]) -> list[float]:
    """TGF: of one response, the ceil(0.4 len) largest."""
    best = sorted(range(len(scores)), key=lambda t: scores[t], reverse=True)[: math.ceil(0.4 * len(scores))]
    return [float(t in best) for t in range(len(scores))]


def shaping(means: list[float], least: float = 0.9, epsilon: float = 0.0) -> list[float]:
    """TAS: a factor for the advantage of each response; the code's epsilon is 1e-8."""
    spread = max(means) - min(means)
    if spread <= 1e-6:
        return [1.0] * len(means)
    n = [min(max((s - min(means)) / spread, 0.0), 1.0) for s in means]
    most = least + (1.0 - least) / (sum(n) / len(n) + epsilon)
    return [least + x * (most - least) for x in n]


def vppo_loss(
    logp: Tensor, weights: Tensor, kept: Tensor, factor: Tensor, old: Tensor, advantage: Tensor
) -> Tensor:
    """Clip 0.2 and 0.28, dual clip 3, on shaped advantages; the mask in the numerator only; 0.06 (-log p)."""
    shaped, ratio = factor * advantage, (logp - old).exp()
    token = -torch.minimum(ratio * shaped, ratio.clamp(0.8, 1.28) * shaped)
    token = torch.where(shaped < 0, torch.minimum(token, -3.0 * shaped), token)
    return (kept * token).sum() / len(logp) + 0.06 * -logp.mean()


def vppo(
    old: list[float], blackened: list[float], answers: list[list[int]]
) -> tuple[list[float], list[float]]:
    """Mask and factor of every token. An answer without a picture keeps its tokens and its advantage."""
    kept, factor, scores = [1.0] * len(old), [1.0] * len(old), {}
    for number, answer in enumerate(answers):
        if not math.isnan(blackened[answer[0]]):
            scores[number] = [k3(old[t], blackened[t]) for t in answer]
    factors = shaping([sum(own) / len(own) for own in scores.values()])
    for (number, own), each in zip(scores.items(), factors, strict=True):
        for t, keep in zip(answers[number], token_filter(own), strict=True):
            kept[t], factor[t] = keep, each
    return kept, factor


PICTURES = {5: "image", 2: "image", 9: "image", 7: "image"}


@pytest.mark.parametrize("kinds", [PICTURES, None], ids=["as published", "all kinds"])
def test_agrees_with_the_published_code(batch_of: Any, agree: Any, kinds: dict[int, str] | None) -> None:
    batch = batch_of() if kinds is None else batch_of(kinds=kinds)
    batch.signals.logp_masked[0, :2] = batch.signals.logp[0, :2] + torch.tensor([30.0, -30.0])  # both bounds
    old, masked = batch.flat(batch.signals.logp), batch.flat(batch.signals.logp_masked)
    kept, factor = vppo(old.tolist(), masked.tolist(), batch.answers)
    source = batch.transcribed(
        [k * f for k, f in zip(kept, factor, strict=True)],
        vppo_loss,
        kept=torch.tensor(kept, dtype=torch.float64),
        factor=torch.tensor(factor, dtype=torch.float64),
        old=old,
        advantage=batch.advantages(1e-6),
    )
    found = batch.evaluate(load_preset("vppo"))
    agree(found, source)
    if kinds is not None:  # 3 of 7, 2 of 4, 5 of 11 ...: rounded up in every answer
        counts = [int((found.weights[answer] > 0).sum()) for answer in batch.answers]
        assert counts == [3, 2, 5, 2, 4, 3, 2, 4, 1, 4]


def test_shaping_by_hand() -> None:
    """n = 0, 1 and 1/2 with a mean of 1/2, so B = 0.9 + 0.1 / 0.5 = 1.1."""
    factors = trajectory_factors(torch.tensor([0.1, 0.3, 0.2], dtype=torch.float64), 0.9)
    assert factors.tolist() == pytest.approx([0.9, 1.1, 1.0], abs=1e-12)
    # n = 0, 0, 0 and 1: three answers lose a tenth each, and the fourth gets all of it.
    factors = trajectory_factors(torch.tensor([1.0, 1.0, 1.0, 2.0], dtype=torch.float64), 0.9)
    assert factors.tolist() == pytest.approx([0.9, 0.9, 0.9, 1.3], abs=1e-12)


@pytest.mark.parametrize("least", [0.9, 0.5, 1.0])
def test_shaping_keeps_the_mean(least: float) -> None:
    means = torch.rand(17, dtype=torch.float64)
    factors = trajectory_factors(means, least)
    assert float(factors.mean()) == pytest.approx(1.0, abs=1e-12)
    assert factors.tolist() == pytest.approx(shaping(means.tolist(), least), abs=1e-12)
    assert factors.tolist() == pytest.approx(shaping(means.tolist(), least, epsilon=1e-8), abs=1e-7)


@pytest.mark.parametrize(("gap", "shaped"), [(0.9e-6, False), (1.1e-6, True)])
def test_answers_that_depend_alike_are_not_shaped(gap: float, shaped: bool) -> None:
    factors = trajectory_factors(torch.tensor([0.2, 0.2 + gap], dtype=torch.float64), 0.9)
    assert factors.tolist() == pytest.approx([0.9, 1.1] if shaped else [1.0, 1.0], abs=1e-6)


def test_by_hand() -> None:
    """Two answers of 5 and 3 tokens to a picture and one of 2 to a text.

    k3 of differences d: 0 for 0, 1/2 - log(3/2) = 0.0945 for log(3/2), 1 - log 2 = 0.3069 for log 2.
    """
    two, more = math.log(2.0), math.log(1.5)
    d = torch.tensor([[two, 0.0, more, 0.0, 0.0], [0.0, more, 0.0, 9.0, 9.0], [9.0] * 5])
    mask = torch.arange(5) < torch.tensor([[5], [3], [2]])
    signals = Signals(
        logp=torch.full((3, 5), -3.0),
        logp_masked=d - 3.0,
        logp_shuffled=None,
        entropy=torch.zeros(3, 5),
        mask=mask,
        group=torch.tensor([0, 0, 1]),
        has_visual=torch.tensor([True, True, False]),
        has_temporal=torch.zeros(3, dtype=torch.bool),
    )
    found = compute_token_weights(signals, load_preset("vppo"))
    assert found.scores["visual"][0].tolist() == pytest.approx([0.3069, 0.0, 0.0945, 0.0, 0.0], abs=1e-4)
    # Means 0.0803 and 0.0315: n = 1 and 0, their mean 1/2, factors 1.1 and 0.9.
    assert found.weights[0].tolist() == pytest.approx([1.1, 0.0, 1.1, 0.0, 0.0])
    assert found.weights[1, 1].item() == pytest.approx(0.9)
    assert int((found.weights[1] > 0).sum()) == 2  # ceil(1.2); the second one is drawn from two equals
    assert found.weights[2].tolist() == [1.0, 1.0, 0.0, 0.0, 0.0]
