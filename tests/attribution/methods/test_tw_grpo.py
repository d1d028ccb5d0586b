"""TW-GRPO against a transcription of its published code, from whole distributions to the loss."""

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
from keytoken_kernels.head.disagreement import Groups, disagreement, positions_of


def disagreements(answers: list[list[list[float]]]) -> list[float]:
    """D_t of one prompt from the [len, V] log-probs of its answers; one that has ended is uniform."""
    size = len(answers[0][0])
    found = []
    for t in range(max(map(len, answers))):
        rows = [answer[t] if t < len(answer) else [-math.log(size)] * size for answer in answers]
        total = 0.0
        for column in zip(*rows, strict=True):
            mean = sum(column) / len(rows)
            for log_p in column:
                d = min(max(mean - log_p, -11.0), 11.0)
                total += math.exp(d) - d - 1.0
        found.append(total / len(rows))
    return found


def weights_of(d: list[float], alpha: float) -> list[float]:
    """From 1 to alpha by position, with the code's 1e-8."""
    return [1.0 + (alpha - 1.0) * (each - min(d)) / (max(d) - min(d) + 1e-8) for each in d]


def tw_loss(logp: Tensor, weights: Tensor, advantage: Tensor) -> Tensor:
    """sum w L / sum |o_i| with the ratio p / sg[p] = 1; the published script has no KL."""
    ratio = (logp - logp.detach()).exp()
    return (weights * -ratio * advantage).sum() / len(logp)


def measured(batch: Any) -> Any:
    """The batch with the disagreement as the pass over the real input measures it."""
    log_probs = batch.flat(batch.distributions)
    found = torch.full(log_probs.shape[:1], torch.nan, dtype=torch.float64)
    groups = Groups(batch.signals.mask.sum(dim=1), batch.signals.group)
    for part in positions_of(groups, max_rows=16):
        found[part.rows] = disagreement(log_probs[part.rows], part.answers)[:, None]
    grid = torch.full(batch.signals.mask.shape, torch.nan, dtype=torch.float64)
    grid[batch.signals.mask] = found
    return dataclasses.replace(batch, signals=dataclasses.replace(batch.signals, disagreement=grid))


def with_alpha(alpha: float) -> MethodConfig:
    return dataclasses.replace(load_preset("tw_grpo"), options={"alpha": alpha})


ONE_PROMPT = {"group": [3] * 5, "lengths": [7, 4, 11, 1, 9], "kinds": {3: "video"}}


@pytest.mark.parametrize("alpha", [1.4, 1.7])
@pytest.mark.parametrize("prompts", [ONE_PROMPT, {}], ids=["one prompt, as on one device", "four prompts"])
def test_agrees_with_the_published_code(
    batch_of: Any, agree: Any, alpha: float, prompts: dict[str, Any]
) -> None:
    batch = measured(batch_of(**prompts)).on_policy()
    log_probs, group = batch.flat(batch.distributions).tolist(), batch.signals.group.tolist()
    weights = [0.0] * len(log_probs)
    for prompt in set(group):
        own = [answer for answer, g in zip(batch.answers, group, strict=True) if g == prompt]
        by_position = weights_of(disagreements([[log_probs[t] for t in answer] for answer in own]), alpha)
        for answer in own:
            for position, t in enumerate(answer):
                weights[t] = by_position[position]
        assert min(by_position) == 1.0 and max(by_position) == pytest.approx(alpha)
    source = batch.transcribed(weights, tw_loss, advantage=batch.advantages(1e-4))
    agree(batch.evaluate(with_alpha(alpha)), source)


def test_the_preset_is_the_published_script() -> None:
    method = load_preset("tw_grpo")
    assert method.options == {"alpha": 1.7} and method.loss.kl_coef == 0.0


def test_by_hand() -> None:
    """Two answers of 3 and 2 tokens that disagree by 2, 6 and 4: weights 1, 1.5 and 1.25 at alpha = 1.5.

    The other prompt's single answer disagrees with nobody.
    """
    mask = torch.arange(3) < torch.tensor([[3], [2], [2]])
    nowhere = torch.zeros(3, dtype=torch.bool)
    signals = Signals(
        logp=torch.zeros(3, 3),
        logp_masked=None,
        logp_shuffled=None,
        entropy=torch.zeros(3, 3),
        mask=mask,
        group=torch.tensor([8, 8, 1]),
        has_visual=nowhere,
        has_temporal=nowhere,
        disagreement=torch.tensor([[2.0, 6.0, 4.0], [2.0, 6.0, torch.nan], [0.0, 0.0, torch.nan]]),
    )
    weights = compute_token_weights(signals, with_alpha(1.5)).weights
    assert weights.tolist() == [[1.0, 1.5, 1.25], [1.0, 1.5, 0.0], [1.0, 1.0, 0.0]]
