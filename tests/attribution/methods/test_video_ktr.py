"""Video-KTR against transcriptions of its paper's formula and of what its published code computes instead."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from keytoken.attribution.methods import compute_token_weights
from keytoken.attribution.types import Signals
from keytoken.golden import load_preset


def union(signals: list[list[float]], scopes: list[list[int]]) -> list[float]:
    """1 for what reaches the 80 % quantile of a signal within its scope, by any signal; NaN is no score."""
    kept: set[int] = set()
    for scores in signals:
        for scope in scopes:
            valid = [t for t in scope if not math.isnan(scores[t])]
            if valid:
                threshold = np.quantile([scores[t] for t in valid], 0.8)
                kept |= {t for t in valid if scores[t] >= threshold}
    return [float(t in kept) for t in range(len(signals[0]))]


def paper_loss(
    logp: Tensor, weights: Tensor, old: Tensor, advantage: Tensor, reference: Tensor, answers: list[list[int]]
) -> Tensor:
    """1/G sum_i 1/|o_i| sum_t m min(rho A, clip(rho) A); plus 0.04 times the KL, as GRPO has it."""
    total = torch.tensor(0.0, dtype=torch.float64)
    for answer in answers:
        ratio = (logp[answer] - old[answer]).exp()
        gain = torch.minimum(ratio * advantage[answer], ratio.clamp(0.8, 1.2) * advantage[answer])
        x = reference[answer] - logp[answer]
        total = total + (-weights[answer] * gain + 0.04 * (x.exp() - x - 1)).sum() / len(answer)
    return total / len(answers)


def code_loss(
    logp: Tensor, weights: Tensor, advantage: Tensor, reference: Tensor, answers: list[list[int]]
) -> Tensor:
    """mean_i sum_t m (-rho A + 0.04 KL) / sum_t m with rho = 1; 0 where the code would divide 0 by 0."""
    total = torch.tensor(0.0, dtype=torch.float64)
    for answer in answers:
        ratio = (logp[answer] - logp[answer].detach()).exp()
        x = (reference[answer] - logp[answer]).clamp(-10.0, 10.0)
        token = -ratio * advantage[answer] + 0.04 * (x.exp() - x - 1)
        if float(weights[answer].sum()) > 0:
            total = total + (weights[answer] * token).sum() / weights[answer].sum()
    return total / len(answers)


def scores_of(batch: Any) -> tuple[list[float], list[float], list[float]]:
    """Visual and temporal differences, and the entropy of the whole distribution."""
    real, entropy = batch.flat(batch.signals.logp), batch.flat(batch.signals.entropy)
    visual = real - batch.flat(batch.signals.logp_masked)
    temporal = real - batch.flat(batch.signals.logp_shuffled)
    return visual.tolist(), temporal.tolist(), entropy.tolist()


def test_agrees_with_the_paper(batch: Any, agree: Any) -> None:
    """Magnitudes, the top of each answer, 1/|o_i|."""
    visual, temporal, entropy = scores_of(batch)
    magnitudes = [[abs(s) for s in visual], [abs(s) for s in temporal], entropy]
    source = batch.transcribed(
        union(magnitudes, batch.answers),
        paper_loss,
        old=batch.flat(batch.signals.logp),
        advantage=batch.advantages(1e-4),
        reference=batch.flat(batch.reference),
        answers=batch.answers,
    )
    agree(batch.evaluate(load_preset("video_ktr")), source)


@pytest.mark.parametrize("far", [False, True], ids=["", "reference far away"])
def test_agrees_with_the_code(batch: Any, agree: Any, far: bool) -> None:
    """Signed scores, the top of all answers to a prompt, 1/|S_i|, and a KL of selected tokens only."""
    batch = batch.on_policy()
    if far:  # beyond the code's bound of 10 on log(reference / policy)
        batch.reference[0, :3] += 14.0
    group = batch.flat(batch.signals.group).tolist()
    prompts = [[t for t, own in enumerate(group) if own == prompt] for prompt in set(group)]
    weights = union(list(scores_of(batch)), prompts)
    assert any(not any(weights[t] for t in answer) for answer in batch.answers)  # 0/0 in the code
    source = batch.transcribed(
        weights,
        code_loss,
        advantage=batch.advantages(1e-4),
        reference=batch.flat(batch.reference),
        answers=batch.answers,
    )
    agree(batch.evaluate(load_preset("video_ktr_official")), source)


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        # 20 % of 6 tokens: both rules take what reaches the second largest of six, for rank 0.8 * 5 = 4.
        ("video_ktr", [[1, 1, 0, 0, 1, 0], [1, 0, 1, 0, 1, 0]]),
        # 20 % of 12 tokens: rank 0.8 * 11 = 8.8, between the third and the fourth largest: three of each.
        ("video_ktr_official", [[1, 1, 0, 0, 1, 0], [1, 0, 1, 0, 0, 0]]),
    ],
)
def test_by_hand(preset: str, expected: list[list[int]]) -> None:
    """Two answers to one picture: paper and code differ in sign and scope.

    Visual differences   3.0 -2.0  0.1  0.2  0.0  0.3   and   0.4  0.1  0.5  0.0  -0.6  0.2
    Entropies            0.1  0.8  0.2  0.0  0.9  0.3   and   0.7  0.1  0.6  0.2   0.4  0.0
    """
    visual = torch.tensor([[3.0, -2.0, 0.1, 0.2, 0.0, 0.3], [0.4, 0.1, 0.5, 0.0, -0.6, 0.2]])
    everywhere = torch.ones(2, 6, dtype=torch.bool)
    signals = Signals(
        logp=torch.full((2, 6), -4.0),
        logp_masked=-4.0 - visual,
        logp_shuffled=None,
        entropy=torch.tensor([[0.1, 0.8, 0.2, 0.0, 0.9, 0.3], [0.7, 0.1, 0.6, 0.2, 0.4, 0.0]]),
        mask=everywhere,
        group=torch.tensor([4, 4]),
        has_visual=everywhere[:, 0],
        has_temporal=~everywhere[:, 0],
    )
    assert compute_token_weights(signals, load_preset(preset)).weights.tolist() == expected
