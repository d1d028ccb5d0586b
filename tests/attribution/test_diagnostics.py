"""Diagnostics against autograd on real logits, and against counting by hand."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from keytoken.attribution import diagnostics
from keytoken.attribution.methods import compute_token_weights
from keytoken.attribution.methods.controls import at_random
from keytoken.attribution.types import Signals, TokenWeights
from keytoken.golden import load_preset
from keytoken.losses.denominators import loss_totals, token_coefficients
from keytoken.losses.policy import policy_loss
from keytoken.schema import LossConfig

LENGTHS, GROUP, VOCABULARY = [5, 1, 7, 0, 3, 4], [0, 0, 0, 1, 1, 1], 11
ADVANTAGES = torch.tensor([1.3, -0.7, 0.2, 0.9, -1.1, 0.0], dtype=torch.float64)
# Every denominator and every objective; the other terms are off, for the closed form is of the policy term.
PRESETS = ("video_ktr", "video_ktr_official", "tor_grpo", "high_entropy", "cispo", "gspo", "grpo")
LOSSES = {
    name: dataclasses.replace(load_preset(name).loss, kl_coef=0.0, entropy_penalty=0.0) for name in PRESETS
} | {
    "constant": dataclasses.replace(
        load_preset("grpo").loss, kl_coef=0.0, normalizer="constant", level="response", constant_length=9
    )
}


@dataclasses.dataclass
class Policy:
    """Logits of a batch, and the signals that follow from them."""

    logits: Tensor
    labels: Tensor
    signals: Signals

    def gradient(self, weights: Tensor, loss: LossConfig) -> Tensor:
        """[B, T, V] by autograd through the loss that the actor is trained with."""
        logits = self.logits.clone().requires_grad_()
        log_prob = logits.log_softmax(-1).gather(-1, self.labels[..., None]).squeeze(-1)
        result = policy_loss(
            log_prob=log_prob,
            old_log_prob=log_prob.detach(),
            advantages=ADVANTAGES[:, None].expand_as(log_prob),
            weights=weights.double(),
            mask=self.signals.mask,
            config=loss,
        )
        return torch.autograd.grad(result.loss, logits)[0]


@pytest.fixture
def policy(ragged_signals: Callable[..., Signals]) -> Policy:
    """Distributions from nearly uniform to nearly certain; NaN in the padding of every signal."""
    plain = ragged_signals(LENGTHS, GROUP, dtype=torch.float64)
    draw = torch.Generator().manual_seed(3)
    shape = (*plain.mask.shape, VOCABULARY)
    spread = torch.linspace(0.1, 9.0, plain.mask.numel(), dtype=torch.float64).view(*plain.mask.shape, 1)
    logits = spread * torch.randn(shape, generator=draw, dtype=torch.float64)
    labels = torch.randint(0, VOCABULARY, shape[:2], generator=draw)
    log_probs = logits.log_softmax(-1)

    def padded(values: Tensor) -> Tensor:
        return values.masked_fill(~plain.mask, torch.nan)

    signals = dataclasses.replace(
        plain,
        logp=padded(log_probs.gather(-1, labels[..., None]).squeeze(-1)),
        entropy=padded(torch.special.entr(log_probs.exp()).sum(-1)),
        collision=padded(log_probs.exp().square().sum(-1)),
        row_keys=torch.arange(len(LENGTHS)),
        seed=5,
    )
    return Policy(logits, labels, signals)


def advantages_of(policy: Policy) -> Tensor:
    return ADVANTAGES[:, None].expand(policy.signals.mask.shape).masked_fill(~policy.signals.mask, torch.nan)


def coefficients_of(mask: Tensor, loss: LossConfig) -> diagnostics.Coefficients:
    return lambda weights: token_coefficients(weights, mask, loss, loss_totals(weights, mask)).policy


def soft_weights(mask: Tensor) -> Tensor:
    """General weights: zeros, halves, and others up to 2."""
    weights = 2.0 * torch.rand(mask.shape, generator=torch.Generator().manual_seed(1)).double()
    weights[weights < 0.7] = 0.0
    weights[(weights > 0.7) & (weights < 1.0)] = 0.5
    return weights * mask


def chosen(weights: Tensor) -> TokenWeights:
    return TokenWeights(weights=weights, selected=weights > 0, masks={}, scores={}, metrics={})


@pytest.mark.parametrize("name", LOSSES)
def test_norms_of_tokens_are_those_of_autograd(policy: Policy, name: str) -> None:
    mask, loss = policy.signals.mask, LOSSES[name]
    for weights in (mask.double(), soft_weights(mask)):
        found = diagnostics.token_gradient_norms(
            policy.signals, weights, advantages_of(policy), coefficients_of(mask, loss)
        )
        wanted = policy.gradient(weights, loss).norm(dim=-1)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
        assert (found > 0).sum() == ((weights > 0) & (ADVANTAGES != 0)[:, None]).sum()


@pytest.mark.parametrize("name", LOSSES)
def test_norms_and_cosines_of_sets_are_those_of_autograd(policy: Policy, name: str) -> None:
    signals, loss = policy.signals, LOSSES[name]
    result = chosen(soft_weights(signals.mask))
    found = diagnostics.gradient_metrics(
        signals, result, advantages_of(policy), coefficients_of(signals.mask, loss)
    )
    full = policy.gradient(signals.mask, loss).flatten()

    def compared(weights: Tensor) -> dict[str, float]:
        own = policy.gradient(weights, loss).flatten()
        cosine = float(torch.dot(own, full) / (own.norm() * full.norm()))
        share = int((weights > 0).sum()) / sum(LENGTHS)
        return {"norm": float(own.norm()), "cosine": cosine, "token_share": share}

    wanted = {"full/norm": float(full.norm())}
    for key, weights in (("selected", result.weights), ("unselected", signals.mask & ~result.selected)):
        wanted |= {f"{key}/{measure}": value for measure, value in compared(weights).items()}
    shuffled = [diagnostics._drawn(signals, result, draw) for draw in range(diagnostics.NUM_DRAWS)]
    draws = [compared(weights) for weights in shuffled]
    for measure in ("norm", "cosine", "token_share"):
        wanted[f"random/{measure}"] = statistics.fmean(draw[measure] for draw in draws)
    wanted["random/cosine_spread"] = statistics.pstdev(draw["cosine"] for draw in draws)
    assert found == pytest.approx(
        {f"diagnostics/gradient/{key}": value for key, value in wanted.items()}, rel=1e-9, abs=1e-12
    )


def test_a_mask_has_the_root_of_its_share_as_cosine(policy: Policy) -> None:
    """Masks with one denominator: both cosines are legs of a right triangle."""
    mask = policy.signals.mask
    result = chosen((soft_weights(mask) > 0).double())
    found = diagnostics.gradient_metrics(
        policy.signals, result, advantages_of(policy), coefficients_of(mask, LOSSES["tor_grpo"])
    )
    selected, unselected, full = (
        found[f"diagnostics/gradient/{key}"] for key in ("selected/norm", "unselected/norm", "full/norm")
    )
    assert found["diagnostics/gradient/selected/cosine"] == pytest.approx(selected / full, rel=1e-12)
    assert selected**2 + unselected**2 == pytest.approx(full**2, rel=1e-12)
    cosines = (found[f"diagnostics/gradient/{key}/cosine"] for key in ("selected", "unselected"))
    assert sum(cosine**2 for cosine in cosines) == pytest.approx(1.0, rel=1e-12)


def test_random_sets_are_drawn_anew_and_have_the_size_of_the_selection(policy: Policy) -> None:
    result = chosen(soft_weights(policy.signals.mask))
    draws = [diagnostics._drawn(policy.signals, result, draw) for draw in range(diagnostics.NUM_DRAWS)]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(draws, 2))
    control = at_random(result, policy.signals).weights
    for draw in draws:
        assert torch.equal(draw.sort(dim=1).values, result.weights.sort(dim=1).values)
        assert not torch.equal(draw, control)


def test_the_norm_of_certain_and_of_uniform_distributions() -> None:
    """Certain: no gradient. Uniform over V: sqrt(1 - 1/V). Certain of another token: sqrt 2."""
    logp = torch.tensor([0.0, -math.log(8.0), -200.0])
    collision = torch.tensor([1.0, 1 / 8, 1.0])
    found = diagnostics.unit_gradient_norm(logp, collision)
    assert found.tolist() == pytest.approx([0.0, math.sqrt(7 / 8), math.sqrt(2.0)], abs=1e-7)


def test_rounding_of_float32_does_not_make_norms_of_nothing() -> None:
    """A collision that came out below p^2 counts as p^2."""
    logp = torch.tensor([-1e-4, -1e-3, -0.5], dtype=torch.float32)
    collision = (2 * logp).exp() * (1 - 1e-6)
    norms = diagnostics.unit_gradient_norm(logp, collision)
    assert norms.tolist() == pytest.approx((1 - logp.double().exp()).tolist(), rel=1e-9)


def test_gradients_that_are_zero_have_no_cosine(policy: Policy) -> None:
    """All rewards of all groups equal."""
    nothing = torch.zeros(policy.signals.mask.shape)
    coefficients = coefficients_of(policy.signals.mask, LOSSES["grpo"])
    result = chosen(soft_weights(policy.signals.mask))
    found = diagnostics.gradient_metrics(policy.signals, result, nothing, coefficients)
    assert {key for key in found if key.endswith("norm")} == {
        f"diagnostics/gradient/{name}/norm" for name in ("full", "selected", "unselected", "random")
    }
    assert all(value == 0.0 for key, value in found.items() if key.endswith("norm"))
    assert not any("cosine" in key for key in found)


def test_a_selection_of_nothing_and_of_everything(policy: Policy) -> None:
    mask, coefficients = policy.signals.mask, coefficients_of(policy.signals.mask, LOSSES["tor_grpo"])
    for weights, there, missing in (
        (mask * 0.0, "unselected", ("selected", "random")),
        (mask * 1.0, "selected", ("unselected",)),
    ):
        found = diagnostics.diagnose(policy.signals, chosen(weights), advantages_of(policy), coefficients)
        assert found[f"diagnostics/gradient/{there}/cosine"] == pytest.approx(1.0, rel=1e-12)
        assert not any(f"gradient/{name}/" in key for key in found for name in missing)
        assert found["diagnostics/answers/gini"] == 0.0
        assert all(math.isfinite(value) for value in found.values())


def test_without_collisions_there_are_no_gradients(policy: Policy) -> None:
    plain = dataclasses.replace(policy.signals, collision=None)
    coefficients = coefficients_of(plain.mask, LOSSES["grpo"])
    found = diagnostics.diagnose(plain, chosen(soft_weights(plain.mask)), advantages_of(policy), coefficients)
    assert found and not any("gradient" in key for key in found)


@pytest.mark.parametrize("lengths", [[4], [0, 0], [1, 1]])
def test_small_batches(ragged_signals: Callable[..., Signals], lengths: list[int]) -> None:
    signals = ragged_signals(lengths, [0] * len(lengths), dtype=torch.float64)
    signals = dataclasses.replace(signals, collision=(2 * signals.logp).exp(), logp=signals.logp)
    result = compute_token_weights(signals, load_preset("video_ktr"))
    found = diagnostics.diagnose(
        signals,
        result,
        torch.ones(signals.mask.shape),
        coefficients_of(signals.mask, LOSSES["video_ktr"]),
        right=torch.ones(len(lengths), dtype=torch.bool),
        classes=[["word"] * length for length in lengths],
    )
    assert all(math.isfinite(value) for value in found.values())
    assert not any(key.endswith(("wrong", "difference", "low", "high")) for key in found)


def flags(*rows: str) -> Tensor:
    return torch.tensor([[mark == "x" for mark in row] for row in rows])


def test_overlap_by_hand() -> None:
    masks = {
        "visual": flags("xx..", "x..."),
        "temporal": flags(".xx.", "x..."),
        "entropy": flags("...x", "x..."),
    }
    assert diagnostics.overlap_metrics(masks) == {
        "diagnostics/overlap/entropy_temporal": 1 / 4,
        "diagnostics/overlap/entropy_visual": 1 / 4,
        "diagnostics/overlap/temporal_visual": 2 / 4,
        "diagnostics/venn/entropy": 1 / 5,
        "diagnostics/venn/temporal": 1 / 5,
        "diagnostics/venn/visual": 1 / 5,
        "diagnostics/venn/entropy_temporal": 0.0,
        "diagnostics/venn/entropy_visual": 0.0,
        "diagnostics/venn/temporal_visual": 1 / 5,
        "diagnostics/venn/entropy_temporal_visual": 1 / 5,
    }


def test_overlap_against_sets() -> None:
    draw = torch.Generator().manual_seed(0)
    masks = {
        name: torch.rand(9, 30, generator=draw) < share
        for name, share in (("a", 0.5), ("b", 0.2), ("c", 0.3))
    }
    sets = {name: set(map(tuple, mask.nonzero().tolist())) for name, mask in masks.items()}
    found = diagnostics.overlap_metrics(masks)
    for one, other in itertools.combinations(sets, 2):
        jaccard = len(sets[one] & sets[other]) / len(sets[one] | sets[other])
        assert found[f"diagnostics/overlap/{one}_{other}"] == jaccard
    union = set.union(*sets.values())
    for place in ("a", "b_c", "a_b_c"):
        members = place.split("_")
        cell = {t for t in union if [name for name in sets if t in sets[name]] == members}
        assert found[f"diagnostics/venn/{place}"] == len(cell) / len(union)
    assert sum(value for key, value in found.items() if "venn" in key) == pytest.approx(1.0)


def test_signals_that_select_nothing_overlap_nowhere() -> None:
    nothing = flags("...", "...")
    assert diagnostics.overlap_metrics({}) == {}
    assert diagnostics.overlap_metrics({"visual": nothing, "entropy": nothing}) == {}
    assert diagnostics.overlap_metrics({"visual": flags("x..", "...")}) == {"diagnostics/venn/visual": 1.0}


def gini_by_pairs(values: list[float]) -> float:
    pairs = sum(abs(a - b) for a in values for b in values)
    return pairs / (2 * len(values) * sum(values))


@pytest.mark.parametrize(
    ("values", "wanted"),
    [([0.3] * 5, 0.0), ([0.0, 0.0, 0.0, 0.7], 3 / 4), ([1.0, 3.0], 1 / 4), ([0.4], 0.0), ([0.0, 0.0], 0.0)],
)
def test_gini_of_known_cases(values: list[float], wanted: float) -> None:
    assert diagnostics.gini(torch.tensor(values)) == pytest.approx(wanted, abs=1e-7)


def test_gini_against_all_pairs() -> None:
    values = torch.rand(37, generator=torch.Generator().manual_seed(4)).double() ** 3
    assert diagnostics.gini(values) == pytest.approx(gini_by_pairs(values.tolist()), rel=1e-12)


def test_shares_of_answers_leave_empty_ones_out() -> None:
    mask, selected = flags("xxxx", "xx..", "....", "xxx."), flags("x...", "....", "....", "xxx.")
    shares = diagnostics.selected_shares(selected, mask)
    assert shares[:2].tolist() == [0.25, 0.0] and math.isnan(shares[2]) and shares[3] == 1.0
    assert diagnostics.concentration_metrics(selected, mask) == pytest.approx(
        {
            "diagnostics/answers/gini": gini_by_pairs([0.25, 0.0, 1.0]),
            "diagnostics/answers/lowest_share": 0.0,
            "diagnostics/answers/median_share": 0.25,
            "diagnostics/answers/highest_share": 1.0,
        }
    )
    assert diagnostics.concentration_metrics(flags("..."), flags("...")) == {}


@pytest.mark.parametrize(
    ("token", "name"),
    [
        (" red", "color"),
        ("B", "letter"),
        (" a", "letter"),
        ("dog", "word"),
        ("it's", "word"),
        ("x2", "word"),
        ("的", "word"),
        ("é", "word"),
        ("42", "digits"),
        ("3.5", "digits"),
        (" .", "punctuation"),
        ("</", "punctuation"),
        ("<>", "punctuation"),
        ("<", "punctuation"),
        ("</think>", "special"),
        ("<|im_end|>", "special"),
        ("\n\n", "space"),
        ("", "space"),
        ("\ufffd", "fragment"),
        ("a\ufffd", "fragment"),
    ],
)
def test_classes_of_tokens(token: str, name: str) -> None:
    assert diagnostics.word_class(token, {"red": "color"}) == name


def test_a_known_word_comes_before_the_rule() -> None:
    assert diagnostics.word_class(" two") == "word"
    assert diagnostics.word_class(" two", {"two": "number", "<b>": "tag"}) == "number"
    assert diagnostics.word_class("<b>", {"<b>": "tag"}) == "tag"


def test_words_by_hand() -> None:
    mask, selected, visual = flags("xxx.", "xx.."), flags("x.x.", "x..."), flags("x...", "....")
    result = dataclasses.replace(chosen(selected.double()), masks={"visual": visual})
    classes = [["color", "word", "word"], ["word", "color"]]
    found = diagnostics.word_metrics(classes, result, mask)
    assert found == {
        "diagnostics/words/color/token_share": 2 / 5,
        "diagnostics/words/color/selected_share": 1 / 2,
        "diagnostics/words/color/visual_share": 1 / 2,
        "diagnostics/words/word/token_share": 3 / 5,
        "diagnostics/words/word/selected_share": 2 / 3,
        "diagnostics/words/word/visual_share": 0.0,
    }
    with pytest.raises(ValueError, match="one class"):
        diagnostics.word_metrics([["word"], ["word"]], result, mask)


def outcomes(signals: Signals, result: TokenWeights, right: list[bool]) -> dict[str, float]:
    found = diagnostics.outcome_metrics(signals, result, torch.tensor(right))
    return {key.removeprefix("diagnostics/outcomes/"): value for key, value in found.items()}


def test_outcomes_against_statistics_of_answers(ragged_signals: Callable[..., Signals]) -> None:
    """One answer is empty and one is text: neither has a visual score."""
    signals = ragged_signals([5, 2, 7, 0, 3, 4, 6], [0, 0, 0, 0, 1, 1, 1], dtype=torch.float64)
    has_visual = torch.tensor([True, True, True, True, False, True, True])
    signals = dataclasses.replace(signals, has_visual=has_visual)
    result = compute_token_weights(signals, load_preset("video_ktr"))
    right = [True, False, True, True, True, False, False]
    found = outcomes(signals, result, right)

    def answers(scores: Tensor, exists: list[int]) -> dict[bool, list[float]]:
        means = {i: statistics.fmean(scores[i][signals.mask[i]].tolist()) for i in exists}
        return {kind: [value for i, value in means.items() if right[i] is kind] for kind in (True, False)}

    logp, masked = signals.logp, signals.logp_masked
    assert masked is not None
    for name, scores, exists in (
        ("visual", (logp - masked).abs(), [0, 1, 2, 5, 6]),
        ("entropy", signals.entropy, [0, 1, 2, 4, 5, 6]),
        ("selected", result.selected.double(), [0, 1, 2, 4, 5, 6]),
    ):
        side = answers(scores, exists)
        difference = statistics.fmean(side[True]) - statistics.fmean(side[False])
        error = math.sqrt(sum(statistics.variance(values) / len(values) for values in side.values()))
        wanted = {
            "right": statistics.fmean(side[True]),
            "wrong": statistics.fmean(side[False]),
            "difference": difference,
            "low": difference - 1.96 * error,
            "high": difference + 1.96 * error,
        }
        assert {key: found[f"{name}/{key}"] for key in wanted} == pytest.approx(wanted, rel=1e-4)


def test_outcomes_with_too_few_answers(ragged_signals: Callable[..., Signals]) -> None:
    signals = ragged_signals([3, 3, 3], [0, 0, 0])
    result = compute_token_weights(signals, load_preset("high_entropy"))
    all_right = outcomes(signals, result, [True] * 3)
    assert set(all_right) == {"selected/right", "entropy/right"}
    one_wrong = outcomes(signals, result, [True, False, True])
    assert {key.partition("/")[2] for key in one_wrong} == {"right", "wrong", "difference"}


@pytest.mark.parametrize(
    "preset", ["video_ktr", "tor_grpo", "soft", "tw_grpo", "vppo", "grpo", "random", "inverse"]
)
def test_every_method_can_be_diagnosed(policy: Policy, preset: str) -> None:
    method, signals = load_preset(preset), policy.signals
    result: Any = compute_token_weights(signals, method)
    found = diagnostics.diagnose(
        signals,
        result,
        advantages_of(policy),
        coefficients_of(signals.mask, method.loss),
        right=ADVANTAGES > 0,
        classes=[["word"] * length for length in LENGTHS],
    )
    assert all(math.isfinite(value) for value in found.values())
    assert 0.0 < found["diagnostics/gradient/selected/cosine"] <= 1.0 + 1e-12
    assert found["diagnostics/words/word/token_share"] == 1.0
