"""Controls: as many tokens elsewhere, the other tokens, and all tokens."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from keytoken.attribution.methods import compute_token_weights
from keytoken.golden import load_preset
from keytoken.schema import MethodConfig

SELECTING = ["video_ktr", "video_ktr_official", "tor_grpo", "high_entropy", "vppo", "soft"]


def controlled(preset: str, control: str) -> MethodConfig:
    return dataclasses.replace(load_preset(preset), control=control)  # type: ignore[arg-type]


@pytest.fixture
def batch(batch_of: Any) -> Any:
    """Answers of up to 40 tokens, where a permutation that changes nothing does not happen by chance."""
    lengths = [30, 25, 40, 22, 35, 28, 20, 38, 1, 33]
    batch = batch_of(lengths=lengths)
    entropy = (batch.signals.entropy - 1.0).clamp(min=0.0)
    return dataclasses.replace(batch, signals=dataclasses.replace(batch.signals, truncated_entropy=entropy))


@pytest.mark.parametrize("preset", SELECTING)
def test_random_keeps_the_weights_of_every_answer(batch: Any, preset: str) -> None:
    """The same weights at other tokens, drawn anew with every seed."""
    plain = batch.weigh(load_preset(preset)).weights
    drawn = batch.weigh(controlled(preset, "random"))
    assert torch.equal(plain.sort(dim=1).values, drawn.weights.sort(dim=1).values)
    assert not bool(drawn.weights[~batch.signals.mask].any())
    assert torch.equal(drawn.selected, drawn.weights > 0)
    for answer in batch.answers:
        here, there = batch.flat(plain)[answer], batch.flat(drawn.weights)[answer]
        assert len(set(here.tolist())) == 1 or not torch.equal(here, there)
    again = batch.weigh(controlled(preset, "random")).weights
    assert torch.equal(drawn.weights, again)
    signals = dataclasses.replace(batch.signals, seed=4)
    other = compute_token_weights(signals, controlled(preset, "random")).weights
    assert not torch.equal(drawn.weights, other)


def test_random_prefers_no_token(batch: Any) -> None:
    """Over 100 seeds every token of an answer is as likely, whatever the method thinks of it."""
    method = controlled("video_ktr", "random")
    often = torch.zeros(batch.signals.mask.shape, dtype=torch.float64)
    for seed in range(100):
        often += compute_token_weights(dataclasses.replace(batch.signals, seed=seed), method).weights
    for answer in batch.answers:
        own = batch.flat(often)[answer] / 100
        share = float(own.mean())
        allowed = 5.0 * (share * (1.0 - share) / 100) ** 0.5  # standard deviations
        assert float((own - share).abs().max()) <= allowed + 1e-12


@pytest.mark.parametrize("preset", SELECTING)
def test_inverse_is_the_complement(batch: Any, preset: str) -> None:
    plain = batch.weigh(load_preset(preset)).weights
    found = batch.weigh(controlled(preset, "inverse"))
    assert torch.equal(found.weights > 0, batch.signals.mask & (plain == 0))
    assert set(found.weights.unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(found.selected, found.weights > 0)
    share = int((plain > 0).sum()) / int(batch.signals.mask.sum())
    assert found.metrics["attribution/selected_share"] == pytest.approx(1.0 - share)


@pytest.mark.parametrize(
    ("preset", "control"), [("random", "random"), ("inverse", "inverse"), ("all", "none")]
)
def test_the_presets_differ_from_video_ktr_in_the_weights_only(batch: Any, preset: str, control: str) -> None:
    """So that their losses compare: same loss, same views, same scores."""
    method, paper = load_preset(preset), load_preset("video_ktr")
    if preset == "all":
        assert method == dataclasses.replace(paper, selection=None)
        assert torch.equal(batch.weigh(method).weights, batch.signals.mask.float())
    else:
        assert method == dataclasses.replace(paper, control=control)
