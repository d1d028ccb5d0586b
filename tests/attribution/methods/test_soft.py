"""Soft weights against a transcription of their formula, with the loss of Video-KTR's paper."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from keytoken.attribution.methods import compute_token_weights
from keytoken.attribution.types import Signals
from keytoken.golden import load_preset
from keytoken.schema import MethodConfig


def position(scores: list[float]) -> list[float]:
    """(s - min) / (max - min) of one answer; 0 without a score, or where all are equal."""
    low, high = min(scores), max(scores)
    if math.isnan(low) or low == high:
        return [0.0] * len(scores)
    return [(s - low) / (high - low) for s in scores]


def soft_weights(signals: list[list[float]], temperature: float, share: float) -> list[float]:
    """w = (1 - p) + p |o| softmax(u / tau) of one answer, u the mean over its signals."""
    columns = zip(*(position(scores) for scores in signals), strict=True)
    e = [math.exp(sum(column) / len(signals) / temperature) for column in columns]
    return [(1.0 - share) + share * len(e) * each / sum(e) for each in e]


def paper_loss(
    logp: Tensor, weights: Tensor, old: Tensor, advantage: Tensor, reference: Tensor, answers: list[list[int]]
) -> Tensor:
    """1/G sum_i 1/|o_i| sum_t (w (-min(rho A, clip(rho) A)) + 0.04 KL)."""
    ratio, x = (logp - old).exp(), reference - logp
    token = -weights * torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    token = token + 0.04 * (x.exp() - x - 1)
    return torch.stack([token[answer].mean() for answer in answers]).mean()


def annealed(steps: int | None, temperature: float = 0.5) -> MethodConfig:
    options = {"temperature": temperature, "anneal_steps": steps}
    return dataclasses.replace(load_preset("soft"), options=options)


@pytest.mark.parametrize(
    ("temperature", "steps", "step", "share"),
    [(0.5, None, 1, 1.0), (0.1, None, 9, 1.0), (0.5, 10, 3, 0.3), (0.5, 10, 10, 1.0), (0.5, 10, 25, 1.0)],
)
def test_agrees_with_the_formula(
    batch: Any, agree: Any, temperature: float, steps: int | None, step: int, share: float
) -> None:
    signals = dataclasses.replace(batch.signals, step=step)
    batch = dataclasses.replace(batch, signals=signals)
    real = batch.flat(signals.logp)
    flat = [
        (real - batch.flat(signals.logp_masked)).abs().tolist(),
        (real - batch.flat(signals.logp_shuffled)).abs().tolist(),
        batch.flat(signals.entropy).tolist(),
    ]
    weights = [
        weight
        for answer in batch.answers
        for weight in soft_weights([[scores[t] for t in answer] for scores in flat], temperature, share)
    ]
    source = batch.transcribed(
        weights,
        paper_loss,
        old=real,
        advantage=batch.advantages(1e-4),
        reference=batch.flat(batch.reference),
        answers=batch.answers,
    )
    found = batch.evaluate(annealed(steps, temperature))
    agree(found, source)
    for answer in batch.answers:
        assert float(found.weights[answer].mean()) == pytest.approx(1.0, abs=1e-12)


def test_by_hand() -> None:
    """A text with entropies 0, 1 and 2 and tau = 1 / (3 log 2): u = 0, 1/6, 1/3 makes e = 1, sqrt 2, 2.

    Of three signals two do not exist and count as 0.
    """
    nowhere = torch.zeros(1, dtype=torch.bool)
    signals = Signals(
        logp=torch.zeros(1, 4, dtype=torch.float64),
        logp_masked=None,
        logp_shuffled=None,
        entropy=torch.tensor([[0.0, 1.0, 2.0, torch.nan]], dtype=torch.float64),
        mask=torch.tensor([[True, True, True, False]]),
        group=torch.tensor([0]),
        has_visual=nowhere,
        has_temporal=nowhere,
    )
    weights = compute_token_weights(signals, annealed(None, 1.0 / (3.0 * math.log(2.0)))).weights
    total = 1.0 + math.sqrt(2.0) + 2.0
    assert weights[0].tolist() == pytest.approx([3 / total, 3 * math.sqrt(2.0) / total, 6 / total, 0.0])
