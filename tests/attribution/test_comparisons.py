"""Comparisons of two log-probs, their floor and their conditioning on advantages, in Python floats."""

from __future__ import annotations

import dataclasses
import decimal
import math
import statistics
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest
import torch

from keytoken.attribution.methods import compute_token_weights
from keytoken.attribution.scores import COMPARISONS, jsd, k3, probability
from keytoken.attribution.types import Outcomes, Signals, TokenWeights
from keytoken.errors import ConfigurationError
from keytoken.golden import load_preset

Build = Callable[..., Signals]
LOG_2 = math.log(2.0)
GRID = [0.0, 1e-300, 1e-20, 1e-8, 0.01, 0.3, 0.5, 0.9, 1.0 - 1e-9, 1.0]
PAIRS = [(p, q) for p in GRID for q in GRID]


def log_of(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).log()


def true_jsd(log_p: float, log_q: float) -> float:
    """Half of KL(P || M) + KL(Q || M), M = (P + Q) / 2, of two coins that fall on heads with p and q.

    In 100 digits, in which a probability near 1 has a rest.
    """
    with decimal.localcontext() as context:
        context.prec = 100
        p, q = (Decimal(0) if x == -math.inf else Decimal(x).exp() for x in (log_p, log_q))
        total = Decimal(0)
        for a, b in ((p, q), (1 - p, 1 - q)):
            for x in (a, b):
                total += x * (2 * x / (a + b)).ln() if x > 0 else 0
        return float(total / 2)


def coins(p: float, q: float) -> float:
    return true_jsd(math.log(p), math.log(q))


def test_jsd_is_its_definition() -> None:
    p, q = (log_of(list(values)) for values in zip(*PAIRS, strict=True))
    expected = [true_jsd(*pair) for pair in zip(p.tolist(), q.tolist(), strict=True)]
    assert jsd(p, q).tolist() == pytest.approx(expected, abs=1e-15, rel=1e-12)


def test_jsd_is_bounded_symmetric_and_zero_for_equals() -> None:
    draw = torch.Generator().manual_seed(0)
    p, q = -torch.empty(2, 4000, dtype=torch.float64).exponential_(0.05, generator=draw)
    p, q = torch.cat([p, log_of(GRID)]), torch.cat([q, log_of(GRID[::-1])])
    found = jsd(p, q)
    assert float(found.min()) >= 0.0 and float(found.max()) <= LOG_2
    torch.testing.assert_close(found, jsd(q, p), rtol=0.0, atol=1e-15)
    assert not bool(jsd(p, p).any())
    assert jsd(log_of([1.0]), log_of([0.0])).tolist() == pytest.approx([LOG_2], rel=1e-15)


@pytest.mark.parametrize(("log_p", "log_q"), [(-1e-3, -1e-6), (-1e-18, -3e-20), (-1e-40, 0.0)])
def test_jsd_near_certainty_keeps_its_digits(log_p: float, log_q: float) -> None:
    """In the second and third pair p and q are both 1 as floats, and what is left is in their rests."""
    found = jsd(*torch.tensor([[log_p], [log_q]], dtype=torch.float64))
    assert float(found) == pytest.approx(true_jsd(log_p, log_q), rel=1e-9, abs=0.0)


def test_jsd_of_float32_is_that_of_float64() -> None:
    p, q = log_of([0.3, 1.0 - 1e-6, 1e-6]), log_of([0.31, 1.0 - 1e-5, 1e-5])
    found = jsd(p.float(), q.float())
    assert found.dtype == torch.float32
    expected = jsd(p.float().double(), q.float().double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0.0)


def test_k3_and_its_bounds() -> None:
    """x = log(q / p), cut at 20 on both sides, and the estimate at 10."""
    x = [0.0, 0.5, -0.5, 2.5, 2.7, 30.0, -9.0, -11.1, -30.0]
    p = torch.full((len(x),), -40.0, dtype=torch.float64)
    exact = [math.exp(v) - v - 1.0 for v in (0.0, 0.5, -0.5, 2.5)]
    expected = [*exact, 10.0, 10.0, math.exp(-9.0) + 8.0, 10.0, 10.0]
    assert k3(p, p + torch.tensor(x, dtype=torch.float64)).tolist() == pytest.approx(expected, abs=1e-9)


def test_probability_is_the_difference() -> None:
    p, q = (list(values) for values in zip(*PAIRS, strict=True))
    expected = [a - b for a, b in PAIRS]
    assert probability(log_of(p), log_of(q)).tolist() == pytest.approx(expected, abs=1e-15)


def four_tokens(**selection: Any) -> TokenWeights:
    """One answer to a picture: probabilities 0.8, 1e-7, 0.5 and 0.02; without it 0.4, 1e-12, 0.6 and 0.05."""
    p, q = log_of([0.8, 1e-7, 0.5, 0.02]), log_of([0.4, 1e-12, 0.6, 0.05])
    everywhere = torch.ones(1, 4, dtype=torch.bool)
    signals = Signals(
        logp=p[None],
        logp_masked=q[None],
        logp_shuffled=None,
        entropy=torch.zeros(1, 4, dtype=torch.float64),
        mask=everywhere,
        group=torch.tensor([0]),
        has_visual=torch.tensor([True]),
        has_temporal=torch.tensor([False]),
    )
    method = load_preset("video_ktr")
    assert method.selection is not None
    changes = {"rule": "count", "visual_ratio": 0.25, "entropy_ratio": 0.0, "temporal_ratio": 0.0} | selection
    chosen = dataclasses.replace(method.selection, **changes)
    return compute_token_weights(signals, dataclasses.replace(method, selection=chosen))


@pytest.mark.parametrize(
    ("score", "floor", "expected", "chosen"),
    [
        # The log-ratio prefers a token that is negligible with and without the picture ...
        ("difference", 0.0, [LOG_2, 5 * math.log(10.0), math.log(1.2), math.log(2.5)], 1),
        # ... unless what is below 0.1 counts as 0.1.
        ("difference", 0.1, [LOG_2, 0.0, math.log(1.2), 0.0], 0),
        ("difference", 0.03, [LOG_2, 0.0, math.log(1.2), math.log(5 / 3)], 0),
        ("probability", 0.0, [0.4, 1e-7 - 1e-12, 0.1, 0.03], 0),
        ("probability", 0.45, [0.35, 0.0, 0.1, 0.0], 0),
        ("k3", 0.0, [0.5 + LOG_2 - 1, 10.0, 1.2 - math.log(1.2) - 1, 2.5 - math.log(2.5) - 1], 1),
        ("k3", 0.1, [0.5 + LOG_2 - 1, 0.0, 1.2 - math.log(1.2) - 1, 0.0], 0),
        ("jsd", 0.0, [coins(0.8, 0.4), coins(1e-7, 1e-12), coins(0.5, 0.6), coins(0.02, 0.05)], 0),
        ("jsd", 0.1, [coins(0.8, 0.4), 0.0, coins(0.5, 0.6), 0.0], 0),
    ],
)
def test_every_score_by_hand(score: str, floor: float, expected: list[float], chosen: int) -> None:
    found = four_tokens(score=score, probability_floor=floor)
    assert found.scores["visual"][0].tolist() == pytest.approx(expected, abs=1e-9)
    assert found.selected[0].nonzero().flatten().tolist() == [chosen]


@pytest.mark.parametrize("score", ["difference", "probability"])
def test_signed_scores_keep_their_sign(score: str) -> None:
    found = four_tokens(score=score, score_sign="signed", visual_ratio=1.0).scores["visual"][0]
    assert [int(s.sign()) for s in found] == [1, 1, -1, -1]


def test_every_named_score_is_tested() -> None:
    assert set(COMPARISONS) == {"difference", "probability", "k3", "jsd"}


def test_a_negligible_token_can_top_differences_but_not_bounded_scores() -> None:
    """Why there are other scores than the difference: 10^-m against 10^-M."""
    p, q = log_of([1e-9, 0.6]), log_of([1e-14, 0.3])
    assert (p - q).argmax() == 0 and k3(p, q).argmax() == 0
    assert probability(p, q).argmax() == 1 and jsd(p, q).argmax() == 1


REWARDS = [1.0, 0.0, 0.0, 0.5, 0.5, 3.0, 1.0, 2.0]
GROUP = [0, 0, 0, 1, 1, 2, 2, 2]


def conditioned_on(signals: Signals, rewards: list[float] | None, **selection: Any) -> TokenWeights:
    method = load_preset("video_ktr")
    assert method.selection is not None
    changes = {"advantage_conditioned": True, "scope": "batch", "rule": "count"} | selection
    chosen = dataclasses.replace(method.selection, **changes)
    outcomes = None if rewards is None else Outcomes(rewards=torch.tensor(rewards, dtype=torch.float64))
    signals = dataclasses.replace(signals, outcomes=outcomes)
    return compute_token_weights(signals, dataclasses.replace(method, selection=chosen))


def magnitudes() -> list[float]:
    """|A_i| with the unbiased standard deviation and the preset's epsilon of 1e-4."""
    found = []
    for reward, prompt in zip(REWARDS, GROUP, strict=True):
        own = [r for r, g in zip(REWARDS, GROUP, strict=True) if g == prompt]
        found.append(abs(reward - statistics.fmean(own)) / (statistics.stdev(own) + 1e-4))
    return found


@pytest.mark.parametrize("sign", ["absolute", "signed"])
@pytest.mark.parametrize("score", ["difference", "probability"])
def test_scores_times_the_magnitude_of_the_advantage(ragged_signals: Build, sign: str, score: str) -> None:
    """The top 20 % of |A_i| s_{i,t} over the tokens of all answers that teach anything."""
    signals = ragged_signals([9, 5, 7, 8, 6, 3, 12, 4], GROUP, dtype=torch.float64)
    found = conditioned_on(signals, REWARDS, score_sign=sign, score=score)
    assert signals.logp_masked is not None
    valid = [(i, t) for i, t in signals.mask.nonzero().tolist()]
    visual = {}
    for i, t in valid:
        p, q = float(signals.logp[i, t]), float(signals.logp_masked[i, t])
        s = p - q if score == "difference" else math.exp(p) - math.exp(q)
        visual[i, t] = magnitudes()[i] * (abs(s) if sign == "absolute" else s)
    assert {key: float(found.scores["visual"][key]) for key in valid} == pytest.approx(visual, abs=1e-12)
    teaching = [key for key in valid if magnitudes()[key[0]] > 0]
    best = sorted(teaching, key=lambda key: visual[key], reverse=True)[: math.ceil(0.2 * len(teaching))]
    assert set(map(tuple, found.masks["visual"].nonzero().tolist())) == set(best)
    entropy = {key: magnitudes()[key[0]] * float(signals.entropy[key]) for key in valid}
    assert {key: float(found.scores["entropy"][key]) for key in valid} == pytest.approx(entropy, abs=1e-12)
    assert magnitudes()[3] == magnitudes()[4] == 0.0
    for scores in found.scores.values():
        assert not bool(scores[3:5].any())


@pytest.mark.parametrize("scope", ["group", "batch"])
def test_an_answer_that_teaches_nothing_loses_its_tokens(ragged_signals: Build, scope: str) -> None:
    """By the quantile as well, which would keep all of a group whose scores are all 0."""
    signals = ragged_signals([9, 5, 7, 8, 6, 3, 12, 4], GROUP)
    found = conditioned_on(signals, REWARDS, scope=scope, rule="quantile")
    kept = found.selected.sum(dim=1).tolist()
    assert kept[3] == kept[4] == 0 and sum(kept) > 0


def test_conditioning_compares_answers(ragged_signals: Build) -> None:
    with pytest.raises(ConfigurationError, match="scope=group or batch"):
        conditioned_on(ragged_signals([3, 2], [0, 0]), [1.0, 0.0], scope="response")


def test_conditioning_needs_advantages(ragged_signals: Build) -> None:
    with pytest.raises(ConfigurationError, match="advantage_conditioned=true needs the advantages"):
        conditioned_on(ragged_signals([3, 2], [0, 0]), None)
