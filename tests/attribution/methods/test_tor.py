"""ToR against a transcription of its equations 5 to 9, from whole distributions to the loss."""

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
from keytoken.losses.policy import policy_loss
from keytoken_kernels.logprob import truncated_entropy


def nucleus_entropy(log_probs: list[float], top_p: float = 0.95) -> float:
    """Eq. 5: of the most probable tokens that together reach ``top_p``, made to sum to 1."""
    kept: list[float] = []
    for p in sorted(map(math.exp, log_probs), reverse=True):
        if sum(kept) >= top_p:
            break
        kept.append(p)
    return -sum(p / sum(kept) * math.log(p / sum(kept)) for p in kept)


def tor_weights(entropy: list[float], real: list[float], blind: list[float]) -> list[float]:
    """Eq. 6 to 9 over all tokens of the rollout batch; ``blind`` is NaN where there is no picture."""
    score = {t: abs(p - q) for t, (p, q) in enumerate(zip(real, blind, strict=True)) if not math.isnan(q)}

    def top(values: dict[int, float]) -> set[int]:
        return set(sorted(values, key=lambda t: values[t], reverse=True)[: math.ceil(0.3 * len(values))])

    reasoning, perception = top(dict(enumerate(entropy))), top(score)
    return [1.0 if t in reasoning else 0.5 if t in perception else 0.0 for t in range(len(entropy))]


def tor_grpo(logp: Tensor, weights: Tensor, old: Tensor, advantage: Tensor, reference: Tensor) -> Tensor:
    """Weighted GRPO over all response tokens; clip 0.2, dual clip 3, 0.01 times the KL of every token."""
    ratio = (logp - old).exp()
    token = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    token = torch.where(advantage < 0, torch.minimum(token, -3.0 * advantage), token)
    x = reference - logp
    return (weights * token).sum() / len(logp) + 0.01 * (x.exp() - x - 1).sum() / len(logp)


def tor_dapo(logp: Tensor, weights: Tensor, old: Tensor, advantage: Tensor, reference: Tensor) -> Tensor:
    """Weighted DAPO over all response tokens: clip 0.2 and 0.28, no KL."""
    ratio = (logp - old).exp()
    return -(weights * torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)).sum() / len(logp)


def measured(batch: Any) -> Any:
    """The batch with the truncated entropy as the pass over the real input measures it."""
    found = truncated_entropy(batch.distributions.flatten(0, 1), 0.95).view(batch.signals.mask.shape)
    found = found.masked_fill(~batch.signals.mask, torch.nan)
    return dataclasses.replace(batch, signals=dataclasses.replace(batch.signals, truncated_entropy=found))


@pytest.mark.parametrize(("preset", "loss"), [("tor_grpo", tor_grpo), ("tor_dapo", tor_dapo)])
def test_agrees_with_the_equations(batch: Any, agree: Any, preset: str, loss: Any) -> None:
    batch = measured(batch)
    signals = batch.signals
    entropy = [nucleus_entropy(log_probs) for log_probs in batch.flat(batch.distributions).tolist()]
    assert sum(h > 1e-9 for h in entropy) > 0.3 * len(entropy)  # no ties in the set of reasoning tokens
    real, blind = batch.flat(signals.logp), batch.flat(signals.logp_masked)
    weights = tor_weights(entropy, real.tolist(), blind.tolist())
    assert weights.count(1.0) == 20 and 0.5 in weights  # ceil(0.3 * 64)
    source = batch.transcribed(
        weights,
        loss,
        old=real,
        advantage=batch.advantages(1e-6),
        reference=batch.flat(batch.reference),
    )
    agree(batch.evaluate(load_preset(preset)), source)


def by_hand() -> Signals:
    """Two answers, one to a picture and one to a text, of 6 and 4 tokens."""
    return Signals(
        logp=torch.tensor([[-1.0, -1.0, -1.0, -1.0, -1.0, -1.0], [-2.0, -2.0, -2.0, -2.0, 0.0, 0.0]]),
        #                    +2.0  -3.0  +0.1  -0.2   0.0  +0.3
        logp_masked=torch.tensor([[-3.0, 2.0, -1.1, -0.8, -1.0, -1.3], [torch.nan] * 6]),
        logp_shuffled=None,
        entropy=torch.full((2, 6), 9.0),  # the whole distribution's, which is not read
        truncated_entropy=torch.tensor([[0.9, 0.1, 0.0, 0.8, 0.0, 0.0], [0.0, 0.0, 0.7, 0.0, 5.0, 5.0]]),
        mask=torch.tensor([[True] * 6, [True] * 4 + [False] * 2]),
        group=torch.tensor([0, 1]),
        has_visual=torch.tensor([True, False]),
        has_temporal=torch.tensor([False, False]),
    )


def test_by_hand() -> None:
    """10 tokens: reasoning are the 3 of entropy 0.9, 0.8 and 0.7. 6 have a picture: perception are the 2 of
    magnitude 3.0 and 2.0. The first token is in both sets and has the weight of reasoning."""
    method = load_preset("tor_grpo")
    found = compute_token_weights(by_hand(), method)
    assert found.weights.tolist() == [[1.0, 0.5, 0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0, 0.0, 0.0]]
    assert found.masks["visual"][0].tolist() == [True, True, False, False, False, False]
    # Advantages 1 and -1, ratio 1: L = -(1 + 0.5 + 1) / 10 + 1 / 10.
    loss = policy_loss(
        log_prob=by_hand().logp,
        old_log_prob=by_hand().logp,
        advantages=torch.tensor([[1.0], [-1.0]]).expand(2, 6),
        weights=found.weights,
        mask=by_hand().mask,
        config=method.loss,
        ref_log_prob=by_hand().logp,
    ).loss
    assert float(loss) == pytest.approx(-0.15)


def zero_entropies(seed: int) -> Signals:
    """200 tokens in five answers, of which 16 have an entropy above 0."""
    entropy = torch.zeros(5, 40, dtype=torch.float64)
    entropy[::2, 5:20:3] = 0.1 + torch.arange(5)
    entropy[1, 7] = 1e-30
    return Signals(
        logp=entropy - 1.0,
        logp_masked=None,
        logp_shuffled=None,
        entropy=entropy,
        truncated_entropy=entropy,
        mask=torch.ones(5, 40, dtype=torch.bool),
        group=torch.tensor([0, 0, 1, 1, 1]),
        has_visual=torch.zeros(5, dtype=torch.bool),
        has_temporal=torch.zeros(5, dtype=torch.bool),
        seed=seed,
    )


def test_most_entropies_zero() -> None:
    """Exactly 30 %: every positive entropy, and a draw among the zeros that the seed alone decides."""
    method = load_preset("tor_grpo")
    positive = zero_entropies(0).entropy > 0
    assert int(positive.sum()) == 16
    drawn = []
    for seed in range(40):
        selected = compute_token_weights(zero_entropies(seed), method).selected
        assert torch.equal(selected, compute_token_weights(zero_entropies(seed), method).selected)
        assert int(selected.sum()) == 60 and bool(selected[positive].all())
        drawn.append(selected & ~positive)
    assert not torch.equal(drawn[0], drawn[1])
    # 44 of 184 zeros each time: a token is drawn 9.6 times of 40, and none is left out or always in.
    often = torch.stack(drawn).sum(dim=0)[~positive]
    assert int(often.min()) > 0 and int(often.max()) < 25
    answers = torch.stack(drawn).sum(dim=(0, 2)) / (~positive).sum(dim=1)
    assert float(answers.min()) > 0.8 * 40 * 44 / 184  # not in runs of answers


def test_a_quantile_instead_would_keep_every_zero() -> None:
    method = load_preset("tor_grpo")
    assert method.selection is not None
    literal = dataclasses.replace(method, selection=dataclasses.replace(method.selection, rule="quantile"))
    assert bool(compute_token_weights(zero_entropies(0), literal).selected.all())
