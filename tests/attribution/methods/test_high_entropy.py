"""80/20 against a transcription of its published code, and TRL's variant of it, which our options can say."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from keytoken.attribution.methods import compute_token_weights
from keytoken.attribution.types import Signals
from keytoken.golden import load_preset
from keytoken.schema import MethodConfig


def most_uncertain(entropy: list[float]) -> list[float]:
    """1 for the ceil(0.2 N) largest of all N response tokens, here of one micro-batch that is the batch."""
    order = sorted(range(len(entropy)), key=lambda t: entropy[t], reverse=True)
    kept = order[: math.ceil(0.2 * len(entropy))]
    return [float(t in kept) for t in range(len(entropy))]


def published_loss(logp: Tensor, weights: Tensor, old: Tensor, advantage: Tensor) -> Tensor:
    """The mean of PPO's clipped loss over the selected tokens; clip 0.2 and 0.28, dual clip 10, no KL."""
    ratio = (logp - old).exp()
    token = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)
    token = torch.where(advantage < 0, torch.minimum(token, -10.0 * advantage), token)
    return token[weights > 0].mean()


def trl_loss(logp: Tensor, weights: Tensor, old: Tensor, advantage: Tensor, reference: Tensor) -> Tensor:
    """TRL's: masked policy term and KL of every token, both over all tokens."""
    ratio = (logp - old).exp()
    token = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    x = reference - logp
    return (weights * token + 0.04 * (x.exp() - x - 1)).sum() / len(logp)


def far(batch: Any) -> Any:
    """The batch with a ratio above 10 at an uncertain token of a negative advantage."""
    entropy = batch.signals.entropy.masked_fill(~batch.signals.mask, -1.0)
    losing = int(batch.rewards.argmin())
    batch.current[losing, int(entropy[losing].argmax())] += 4.0
    return batch


def test_agrees_with_the_published_code(batch: Any, agree: Any) -> None:
    batch = far(batch)
    weights = most_uncertain(batch.flat(batch.signals.entropy).tolist())
    assert sum(weights) == 13  # ceil(0.2 * 64)
    old, advantage = batch.flat(batch.signals.logp), batch.advantages(1e-6)
    losing = (advantage < 0) & ((batch.flat(batch.current) - old).exp() > 10.0)
    assert bool((torch.tensor(weights) > 0)[losing].any())  # the dual clip has an effect
    agree(
        batch.evaluate(load_preset("high_entropy")),
        batch.transcribed(weights, published_loss, old=old, advantage=advantage),
    )


def as_in_trl() -> MethodConfig:
    method = load_preset("high_entropy")
    assert method.selection is not None
    loss = {"normalizer": "all", "mask_kl": False, "kl_coef": 0.04, "clip_high": 0.2, "dual_clip": None}
    return dataclasses.replace(
        method,
        selection=dataclasses.replace(method.selection, rule="quantile"),
        loss=dataclasses.replace(method.loss, **loss),  # type: ignore[arg-type]
    )


def test_the_options_can_say_what_trl_does(batch: Any, agree: Any) -> None:
    """A quantile over all ranks' tokens, and a denominator of all tokens."""
    entropy = batch.flat(batch.signals.entropy).numpy()
    source = batch.transcribed(
        (entropy >= np.quantile(entropy, 0.8)).astype(float).tolist(),
        trl_loss,
        old=batch.flat(batch.signals.logp),
        advantage=batch.advantages(1e-6),
        reference=batch.flat(batch.reference),
    )
    agree(batch.evaluate(as_in_trl()), source)


def test_by_hand() -> None:
    """11 tokens in answers to two prompts: the ceil(2.2) = 3 most uncertain, all of one answer."""
    entropy = torch.tensor([[0.5, 0.1, 2.0, 0.6, 1.0, 0.2, 0.3], [0.4, 0.45, 0.0, 0.05, 9.0, 9.0, 9.0]])
    nowhere = torch.zeros(2, dtype=torch.bool)
    signals = Signals(
        logp=-entropy,
        logp_masked=None,
        logp_shuffled=None,
        entropy=entropy,
        mask=torch.arange(7) < torch.tensor([[7], [4]]),
        group=torch.tensor([0, 1]),
        has_visual=nowhere,
        has_temporal=nowhere,
    )
    weights = compute_token_weights(signals, load_preset("high_entropy")).weights
    assert weights.tolist() == [[0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0], [0.0] * 7]
