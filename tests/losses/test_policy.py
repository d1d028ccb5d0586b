"""The policy loss against its formula written with loops, in every combination, and cut into parts."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from keytoken.errors import NonFiniteError
from keytoken.losses.denominators import LossTotals, loss_totals
from keytoken.losses.policy import policy_loss
from keytoken.schema import LossConfig

MaskOf = Callable[[list[int], int], torch.Tensor]
Batch = dict[str, Any]
LENGTHS = [7, 1, 12, 4, 9, 3]

UNCLIPPED = {"clip_low": None, "clip_high": None, "dual_clip": None}
OBJECTIVES = {
    "ppo": {},
    "ppo without dual clip": {"dual_clip": None},
    "ppo without clipping": UNCLIPPED,
    "gspo": {"objective": "gspo", "dual_clip": None},
    "gspo without clipping": {"objective": "gspo", **UNCLIPPED},
    "cispo": {"objective": "cispo", "dual_clip": None},
    "cispo without a lower bound": {"objective": "cispo", "dual_clip": None, "clip_low": 1.0},
}
DENOMINATORS = [
    {"level": "response", "normalizer": "all"},
    {"level": "response", "normalizer": "selected"},
    {"level": "response", "normalizer": "constant", "constant_length": 20},
    {"level": "batch", "normalizer": "all"},
    {"level": "batch", "normalizer": "selected"},
]
# gspo is a loss of whole responses, which level=batch contradicts; the configuration refuses the pair.
PAIRS = [
    pytest.param(objective, denominator, id=f"{objective}, {'-'.join(map(str, denominator.values()))}")
    for objective, denominator in itertools.product(("ppo", "gspo", "cispo"), DENOMINATORS)
    if objective != "gspo" or denominator["level"] == "response"
]
TERMS = {
    "KL": {"kl_coef": 0.04},
    "KL over selected tokens": {"kl_coef": 0.04, "mask_kl": True},
    "VPPO's penalty": {"kl_coef": 0.0, "entropy_penalty": 0.06},
    "PAPO's terms": {"entropy_penalty": 0.03, "perception_coef": 0.01},
    "PAPO's terms, bounded": {"perception_coef": 0.01, "perception_clip": 0.2},
}
COMBINATIONS = [
    pytest.param(
        {**denominator, **terms, **objective},
        id=f"{name}, {label}, {'-'.join(map(str, denominator.values()))}",
    )
    for (name, objective), (label, terms), denominator in itertools.product(
        OBJECTIVES.items(), TERMS.items(), DENOMINATORS
    )
    if objective.get("objective") != "gspo" or denominator["level"] == "response"
]


def token_loss(cfg: LossConfig, row: list[dict[str, float]], t: int) -> float:
    """The objective at one token of a response, in Python floats."""
    low = -math.inf if cfg.clip_low is None else 1 - cfg.clip_low
    high = math.inf if cfg.clip_high is None else 1 + cfg.clip_high
    ratio, adv = math.exp(row[t]["log_prob"] - row[t]["old_log_prob"]), row[t]["advantages"]
    if cfg.objective == "gspo":
        ratio = math.exp(sum(each["log_prob"] - each["old_log_prob"] for each in row) / len(row))
    clipped = min(max(ratio, low), high)
    if cfg.objective == "cispo":
        return -clipped * adv * row[t]["log_prob"]
    loss = max(-ratio * adv, -clipped * adv)
    return min(loss, -cfg.dual_clip * adv) if cfg.dual_clip is not None and adv < 0 else loss


def k3(log_prob: float, other: float) -> float:
    return math.exp(other - log_prob) - (other - log_prob) - 1


def loss_by_loops(batch: Batch, cfg: LossConfig) -> float:
    """The docstring's formula, one token at a time."""
    width = range(batch["mask"].shape[1])
    rows = [
        [{n: float(v[i, t]) for n, v in batch.items() if n != "mask"} for t in width if batch["mask"][i, t]]
        for i in range(batch["mask"].shape[0])
    ]
    rows = [row for row in rows if row]
    selected_total = sum(each["weights"] > 0 for row in rows for each in row)
    token_total = sum(len(row) for row in rows)
    total = 0.0
    for row in rows:
        num_selected = sum(each["weights"] > 0 for each in row)
        over_all = len(row) * len(rows) if cfg.level == "response" else token_total
        if cfg.normalizer == "constant":
            over_all = cfg.constant_length * len(rows)
        own = over_all
        if cfg.normalizer == "selected":
            own = num_selected * len(rows) if cfg.level == "response" else selected_total
        for t, each in enumerate(row):
            if each["weights"] > 0:
                total += each["weights"] * token_loss(cfg, row, t) / own
            if each["weights"] > 0 or not cfg.mask_kl:
                kl = k3(each["log_prob"], each["ref_log_prob"])
                total += cfg.kl_coef * kl / (own if cfg.mask_kl else over_all)
            perception = k3(each["log_prob"], each["masked_log_prob"])
            total -= cfg.perception_coef * min(perception, cfg.perception_clip or math.inf) / over_all
            total -= cfg.entropy_penalty * each["log_prob"] / over_all
    return total


@pytest.mark.parametrize("options", COMBINATIONS)
def test_agrees_with_the_formula(
    ragged_mask: MaskOf,
    loss_config: Callable[..., LossConfig],
    random_batch: Callable[..., Batch],
    value_and_gradient: Callable[..., Any],
    options: dict[str, Any],
) -> None:
    cfg = loss_config(**options)
    batch = random_batch(ragged_mask([*LENGTHS, 0], 13), seed=3, dtype=torch.float64)
    batch["weights"][3] = 0.0  # one answer without any selected token
    batch["weights"][0] *= 0.5  # and one with soft weights
    batch["ref_log_prob"] = batch["log_prob"] + 0.1 * batch["ref_log_prob"]  # inside every clamp
    loss, gradient = value_and_gradient(batch, config=cfg)
    assert float(loss) == pytest.approx(loss_by_loops(batch, cfg), rel=1e-12)
    assert bool(torch.isfinite(gradient).all())
    assert not bool(gradient[~batch["mask"]].any())
    unweighted = batch["mask"] & (batch["weights"] == 0)
    assert bool(gradient[unweighted].any()) != cfg.counts_selected_only


@pytest.mark.parametrize(("objective", "denominator"), PAIRS)
@pytest.mark.parametrize("cuts", [[1, 1, 1, 1, 1, 1], [2, 4], [5, 1]], ids=str)
def test_parts_sum_to_the_whole(
    ragged_mask: MaskOf,
    loss_config: Callable[..., LossConfig],
    random_batch: Callable[..., Batch],
    value_and_gradient: Callable[..., Any],
    objective: str,
    denominator: dict[str, Any],
    cuts: list[int],
) -> None:
    """Micro-batches and ranks, whatever their sizes, give the loss and gradient of the whole mini-batch."""
    terms = {"entropy_penalty": 0.06, "perception_coef": 0.02, "dual_clip": None}
    mask_kl = denominator["normalizer"] == "selected"
    cfg = loss_config(**denominator, **terms, objective=objective, mask_kl=mask_kl)
    batch = random_batch(ragged_mask(LENGTHS, 13), seed=5, dtype=torch.float64)
    batch["weights"][1] = 0.0
    loss, gradient = value_and_gradient(batch, config=cfg)
    parts = [
        dict(zip(batch, rows, strict=True))
        for rows in zip(*(v.split(cuts) for v in batch.values()), strict=True)
    ]
    totals = LossTotals(num_responses=0, num_tokens=0, num_selected=0)
    for part in parts:
        totals = totals + loss_totals(part["weights"], part["mask"])
    pieces = [value_and_gradient(part, config=cfg, totals=totals) for part in parts]
    torch.testing.assert_close(sum(piece[0] for piece in pieces), loss, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(torch.cat([piece[1] for piece in pieces]), gradient, rtol=1e-12, atol=1e-14)


def test_the_reported_parts_are_additive(
    ragged_mask: MaskOf, loss_config: Callable[..., LossConfig], random_batch: Callable[..., Batch]
) -> None:
    cfg = loss_config(entropy_penalty=0.06, perception_coef=0.02)
    batch = random_batch(ragged_mask(LENGTHS, 13), seed=7, dtype=torch.float64)
    batch["weights"] = batch["mask"].double()
    batch["weights"][1] = 0.0
    whole = policy_loss(**batch, config=cfg)
    totals = loss_totals(batch["weights"], batch["mask"])
    halves = [
        policy_loss(**{n: v[rows] for n, v in batch.items()}, config=cfg, totals=totals)
        for rows in (slice(0, 2), slice(2, 6))
    ]
    for field in dataclasses.fields(whole):
        total = getattr(halves[0], field.name) + getattr(halves[1], field.name)
        torch.testing.assert_close(total, getattr(whole, field.name), rtol=1e-12, atol=1e-14)
    assert int(whole.num_unselected) == 1
    assert 0.0 < float(whole.clipped_share) < 1.0
    terms = whole.policy_loss + 0.04 * whole.kl_loss + 0.06 * whole.surprise - 0.02 * whole.perception_kl
    torch.testing.assert_close(terms, whole.loss)


@pytest.mark.parametrize(("objective", "denominator"), PAIRS)
def test_nothing_selected_is_a_finite_zero(
    ragged_mask: MaskOf,
    loss_config: Callable[..., LossConfig],
    random_batch: Callable[..., Batch],
    value_and_gradient: Callable[..., Any],
    objective: str,
    denominator: dict[str, Any],
) -> None:
    cfg = loss_config(**denominator, objective=objective, dual_clip=None, mask_kl=True)
    batch = random_batch(ragged_mask([3, 5], 5), seed=1, dtype=torch.float32)
    batch["weights"] = torch.zeros_like(batch["weights"])
    loss, gradient = value_and_gradient(batch, config=cfg)
    assert float(loss) == 0.0
    assert not bool(gradient.any())


@pytest.mark.parametrize("objective", ["ppo", "gspo", "cispo"])
def test_an_unselected_response_leaves_the_others_alone(
    ragged_mask: MaskOf,
    loss_config: Callable[..., LossConfig],
    random_batch: Callable[..., Batch],
    value_and_gradient: Callable[..., Any],
    objective: str,
) -> None:
    """The denominators of the others do not depend on it; it stays in the number of responses."""
    cfg = loss_config(normalizer="selected", mask_kl=True, objective=objective, dual_clip=None)
    batch = random_batch(ragged_mask([3, 5, 4], 5), seed=1, dtype=torch.float64)
    batch["weights"] = batch["mask"].double()
    _, with_it = value_and_gradient(batch, config=cfg)
    batch["weights"][1] = 0.0
    _, without_it = value_and_gradient(batch, config=cfg)
    torch.testing.assert_close(without_it[[0, 2]], with_it[[0, 2]], rtol=0.0, atol=0.0)
    assert bool(with_it[1].any()) and not bool(without_it[1].any())


def test_rollout_weights_scale_the_policy_term(
    ragged_mask: MaskOf, loss_config: Callable[..., LossConfig], random_batch: Callable[..., Batch]
) -> None:
    batch = random_batch(ragged_mask(LENGTHS, 13), seed=2, dtype=torch.float64)
    plain = policy_loss(**batch, config=loss_config())
    rollout_weights = torch.full_like(batch["weights"], 0.5)
    half = policy_loss(**batch, config=loss_config(), rollout_weights=rollout_weights)
    torch.testing.assert_close(half.policy_loss, 0.5 * plain.policy_loss)
    torch.testing.assert_close(half.kl_loss, plain.kl_loss)


@pytest.mark.parametrize("objective", ["ppo", "gspo", "cispo"])
def test_a_huge_ratio_stays_finite(
    ragged_mask: MaskOf,
    loss_config: Callable[..., LossConfig],
    random_batch: Callable[..., Batch],
    value_and_gradient: Callable[..., Any],
    objective: str,
) -> None:
    batch = random_batch(ragged_mask([3, 5], 5), seed=1, dtype=torch.float32, spread=200.0)
    loss, gradient = value_and_gradient(batch, config=loss_config(**UNCLIPPED, objective=objective))
    assert bool(torch.isfinite(loss)) and bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize(
    "name", ["log_prob", "old_log_prob", "ref_log_prob", "masked_log_prob", "advantages", "weights"]
)
def test_a_bad_value_is_named(
    ragged_mask: MaskOf,
    loss_config: Callable[..., LossConfig],
    random_batch: Callable[..., Batch],
    name: str,
) -> None:
    batch = random_batch(ragged_mask([3, 5], 5), seed=1, dtype=torch.float32)
    batch[name][1, 4] = torch.nan
    with pytest.raises(NonFiniteError, match=f"{name}: nan at response 1, token 4"):
        policy_loss(**batch, config=loss_config(perception_coef=0.01))


@pytest.mark.parametrize(
    ("coefficient", "needed", "result"),
    [("kl_coef", "ref_log_prob", "kl_loss"), ("perception_coef", "masked_log_prob", "perception_kl")],
)
def test_a_term_needs_its_log_probs(
    ragged_mask: MaskOf,
    loss_config: Callable[..., LossConfig],
    random_batch: Callable[..., Batch],
    coefficient: str,
    needed: str,
    result: str,
) -> None:
    batch = random_batch(ragged_mask([3, 5], 5), seed=1, dtype=torch.float32)
    del batch[needed]
    with pytest.raises(ValueError, match=f"{coefficient} is above 0 but no {needed}"):
        policy_loss(**batch, config=loss_config(**{coefficient: 0.1}))
    assert float(getattr(policy_loss(**batch, config=loss_config(**{coefficient: 0.0})), result)) == 0.0
