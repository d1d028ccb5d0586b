"""The policy loss against verl, against its formula written with loops, and cut into parts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from keytoken.errors import NonFiniteError
from keytoken.golden import load_preset
from keytoken.losses.policy import LossTotals, k3_estimate, loss_totals, policy_loss, token_coefficients
from keytoken.schema import LossConfig

MaskOf = Callable[[list[int], int], torch.Tensor]
LENGTHS = [7, 1, 12, 4, 9, 3]


def config(**changes: Any) -> LossConfig:
    values = {"normalizer": "all", "level": "response", "mask_kl": False, "kl_coef": 0.04, "kl_clamp": "verl"}
    values |= {"clip_low": 0.2, "clip_high": 0.3, "dual_clip": 3.0}
    return LossConfig(**(values | changes))  # type: ignore[arg-type]


def random_batch(mask: torch.Tensor, seed: int, dtype: torch.dtype, spread: float = 0.6) -> dict[str, Any]:
    """Log-probs far enough apart to reach every clip; NaN in the padding."""
    generator = torch.Generator().manual_seed(seed)

    def draw() -> torch.Tensor:
        return torch.randn(mask.shape, generator=generator, dtype=dtype).masked_fill(~mask, torch.nan)

    log_prob = draw() - 2.0
    return {
        "log_prob": log_prob,
        "old_log_prob": log_prob + spread * draw(),
        "advantages": draw()[:, :1].expand(mask.shape).clone(),
        "ref_log_prob": log_prob + 2.0 * draw(),
        "weights": (torch.rand(mask.shape, generator=generator) < 0.4).to(dtype),
        "mask": mask,
    }


def value_and_gradient(batch: dict[str, Any], **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = batch["log_prob"].clone().requires_grad_()
    loss = policy_loss(**(batch | {"log_prob": leaf}), **kwargs).loss
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


def loss_by_loops(batch: dict[str, Any], cfg: LossConfig) -> float:
    """The docstring's formula, one token at a time, in Python floats."""
    policy, kl, rows = 0.0, 0.0, 0
    selected_total = int(((batch["weights"] > 0) & batch["mask"]).sum())
    token_total = int(batch["mask"].sum())
    for i in range(batch["mask"].shape[0]):
        tokens = [t for t in range(batch["mask"].shape[1]) if batch["mask"][i, t]]
        rows += bool(tokens)
        chosen = [t for t in tokens if batch["weights"][i, t] > 0]
        for t in tokens:
            get = {name: float(batch[name][i, t]) for name in batch if name != "mask"}
            own = chosen if cfg.normalizer == "selected" else tokens
            total = selected_total if cfg.normalizer == "selected" else token_total
            ratio, adv = math.exp(get["log_prob"] - get["old_log_prob"]), get["advantages"]
            loss = -ratio * adv
            if cfg.clip_low is not None and cfg.clip_high is not None:
                loss = max(loss, -min(max(ratio, 1 - cfg.clip_low), 1 + cfg.clip_high) * adv)
            if cfg.dual_clip is not None and adv < 0:
                loss = min(loss, -cfg.dual_clip * adv)
            x = get["ref_log_prob"] - get["log_prob"]
            k3 = math.exp(x) - x - 1
            over_own = len(own) if cfg.level == "response" else total
            over_all = len(tokens) if cfg.level == "response" else token_total
            if t in chosen:
                policy += get["weights"] * loss / over_own
            if not cfg.mask_kl:
                kl += k3 / over_all
            elif t in chosen:
                kl += k3 / over_own
    scale = rows if cfg.level == "response" else 1
    return (policy + cfg.kl_coef * kl) / scale


@pytest.mark.parametrize("normalizer", ["selected", "all"])
@pytest.mark.parametrize("level", ["response", "batch"])
@pytest.mark.parametrize("mask_kl", [True, False])
@pytest.mark.parametrize(
    "clip", [{}, {"dual_clip": None}, {"clip_low": None, "clip_high": None, "dual_clip": None}]
)
def test_agrees_with_the_formula(
    ragged_mask: MaskOf, normalizer: str, level: str, mask_kl: bool, clip: dict[str, None]
) -> None:
    cfg = config(normalizer=normalizer, level=level, mask_kl=mask_kl, **clip)
    batch = random_batch(ragged_mask([*LENGTHS, 0], 13), seed=3, dtype=torch.float64)
    batch["weights"][3] = 0.0  # one answer without any selected token
    batch["weights"][0] *= 0.5  # and one with soft weights
    batch["ref_log_prob"] = batch["log_prob"] + 0.1 * batch["ref_log_prob"]  # inside every clamp
    loss, gradient = value_and_gradient(batch, config=cfg)
    assert float(loss) == pytest.approx(loss_by_loops(batch, cfg), rel=1e-12)
    assert bool(torch.isfinite(gradient).all())
    assert not bool(gradient[~batch["mask"]].any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("level", ["response", "batch"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_equals_stock_verl_with_weights_of_one(
    ragged_mask: MaskOf, dtype: torch.dtype, level: str, seed: int
) -> None:
    """The preset ``grpo`` is verl's GRPO: policy loss, dual clip, KL loss and gradient."""
    core_algos = pytest.importorskip("verl.trainer.ppo.core_algos")
    from verl.workers.config import ActorConfig

    preset = load_preset("grpo")
    assert preset.loss.level == "batch"
    cfg = dataclasses.replace(preset.loss, level=level)
    mode = {"batch": "token-mean", "response": "seq-mean-token-mean"}[level]
    actor = ActorConfig(
        strategy="fsdp2",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio_low=cfg.clip_low,
        clip_ratio_high=cfg.clip_high,
        clip_ratio_c=cfg.dual_clip,
    )
    batch = random_batch(ragged_mask(LENGTHS, 14), seed, dtype, spread=1.2)
    batch["advantages"][2] = -1.0  # a long answer that reaches the dual clip
    batch = {name: value if name == "mask" else value.nan_to_num(0.0) for name, value in batch.items()}
    batch["weights"] = batch["mask"].to(dtype)
    batch["ref_log_prob"][0, 0] += 30.0  # beyond both clamps of verl's estimator

    leaf = batch["log_prob"].clone().requires_grad_()
    policy, metrics = core_algos.compute_policy_loss_vanilla(
        old_log_prob=batch["old_log_prob"],
        log_prob=leaf,
        advantages=batch["advantages"],
        response_mask=batch["mask"],
        loss_agg_mode=mode,
        config=actor,
    )
    kl = core_algos.kl_penalty(leaf, batch["ref_log_prob"], "low_var_kl")
    theirs = policy + cfg.kl_coef * core_algos.agg_loss(kl, batch["mask"], mode)
    (their_gradient,) = torch.autograd.grad(theirs, leaf)

    assert metrics["actor/pg_clipfrac"] > 0.1 and metrics["actor/pg_clipfrac_lower"] > 0.0
    ours, gradient = value_and_gradient(batch, config=cfg)
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, their_gradient, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("normalizer", ["selected", "all"])
@pytest.mark.parametrize("level", ["response", "batch"])
@pytest.mark.parametrize("cuts", [[1, 1, 1, 1, 1, 1], [2, 4], [5, 1]])
def test_parts_sum_to_the_whole(ragged_mask: MaskOf, normalizer: str, level: str, cuts: list[int]) -> None:
    """Micro-batches and ranks, whatever their sizes, give the loss and gradient of the whole mini-batch."""
    cfg = config(normalizer=normalizer, level=level, mask_kl=normalizer == "selected")
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


def test_the_reported_parts_are_additive(ragged_mask: MaskOf) -> None:
    batch = random_batch(ragged_mask(LENGTHS, 13), seed=7, dtype=torch.float64)
    batch["weights"] = batch["mask"].double()
    batch["weights"][1] = 0.0
    whole = policy_loss(**batch, config=config())
    totals = loss_totals(batch["weights"], batch["mask"])
    halves = [
        policy_loss(**{n: v[rows] for n, v in batch.items()}, config=config(), totals=totals)
        for rows in (slice(0, 2), slice(2, 6))
    ]
    for field in dataclasses.fields(whole):
        total = getattr(halves[0], field.name) + getattr(halves[1], field.name)
        torch.testing.assert_close(total, getattr(whole, field.name), rtol=1e-12, atol=1e-14)
    assert int(whole.num_unselected) == 1
    assert 0.0 < float(whole.clipped_share) < 1.0


@pytest.mark.parametrize("normalizer", ["selected", "all"])
@pytest.mark.parametrize("level", ["response", "batch"])
def test_nothing_selected_is_a_finite_zero(ragged_mask: MaskOf, normalizer: str, level: str) -> None:
    cfg = config(normalizer=normalizer, level=level, mask_kl=True)
    batch = random_batch(ragged_mask([3, 5], 5), seed=1, dtype=torch.float32)
    batch["weights"] = torch.zeros_like(batch["weights"])
    loss, gradient = value_and_gradient(batch, config=cfg)
    assert float(loss) == 0.0
    assert not bool(gradient.any())


def test_an_unselected_response_leaves_the_others_alone(ragged_mask: MaskOf) -> None:
    """The denominators of the others do not depend on it; it stays in the number of responses."""
    cfg = config(normalizer="selected", mask_kl=True)
    batch = random_batch(ragged_mask([3, 5, 4], 5), seed=1, dtype=torch.float64)
    batch["weights"] = batch["mask"].double()
    _, with_it = value_and_gradient(batch, config=cfg)
    batch["weights"][1] = 0.0
    _, without_it = value_and_gradient(batch, config=cfg)
    torch.testing.assert_close(without_it[[0, 2]], with_it[[0, 2]], rtol=0.0, atol=0.0)
    assert not bool(without_it[1].any())


def test_coefficients_by_hand() -> None:
    mask = torch.tensor([[True, True, True, False], [True, True, False, False]])
    weights = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    totals = loss_totals(weights, mask)
    assert totals == LossTotals(num_responses=2.0, num_tokens=5.0, num_selected=2.0)
    official = config(normalizer="selected", mask_kl=True)
    paper = config(normalizer="all", mask_kl=False)
    policy, kl = token_coefficients(weights, mask, official, totals)
    assert policy.tolist() == kl.tolist() == [[0.25, 0.0, 0.25, 0.0], [0.0] * 4]
    policy, kl = token_coefficients(weights, mask, paper, totals)
    torch.testing.assert_close(policy, torch.tensor([[1 / 6, 0.0, 1 / 6, 0.0], [0.0] * 4]))
    torch.testing.assert_close(kl, torch.tensor([[1 / 6] * 3 + [0.0], [1 / 4, 1 / 4, 0.0, 0.0]]))


def test_k3_clamps() -> None:
    x = torch.tensor([0.0, 1.0, 5.0, 15.0, -30.0], dtype=torch.float64)
    zero = torch.zeros_like(x)
    verl = k3_estimate(zero, x, "verl").tolist()
    video_r1 = k3_estimate(zero, x, "video_r1").tolist()
    exact = [math.exp(v) - v - 1 for v in (0.0, 1.0, 5.0)]
    assert verl == pytest.approx([*exact[:2], 10.0, 10.0, 10.0])
    assert video_r1 == pytest.approx([*exact, math.exp(10) - 11, math.exp(-10) + 9])


def test_rollout_weights_scale_the_policy_term(ragged_mask: MaskOf) -> None:
    batch = random_batch(ragged_mask(LENGTHS, 13), seed=2, dtype=torch.float64)
    plain = policy_loss(**batch, config=config())
    half = policy_loss(**batch, config=config(), rollout_weights=torch.full_like(batch["weights"], 0.5))
    torch.testing.assert_close(half.policy_loss, 0.5 * plain.policy_loss)
    torch.testing.assert_close(half.kl_loss, plain.kl_loss)


def test_a_huge_ratio_stays_finite(ragged_mask: MaskOf) -> None:
    batch = random_batch(ragged_mask([3, 5], 5), seed=1, dtype=torch.float32, spread=200.0)
    cfg = config(clip_low=None, clip_high=None, dual_clip=None)
    loss, gradient = value_and_gradient(batch, config=cfg)
    assert bool(torch.isfinite(loss)) and bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize("name", ["log_prob", "old_log_prob", "ref_log_prob", "advantages", "weights"])
def test_a_bad_value_is_named(ragged_mask: MaskOf, name: str) -> None:
    batch = random_batch(ragged_mask([3, 5], 5), seed=1, dtype=torch.float32)
    batch[name][1, 4] = torch.nan
    with pytest.raises(NonFiniteError, match=f"{name}: nan at response 1, token 4"):
        policy_loss(**batch, config=config())


def test_a_kl_needs_a_reference(ragged_mask: MaskOf) -> None:
    batch = random_batch(ragged_mask([3, 5], 5), seed=1, dtype=torch.float32)
    del batch["ref_log_prob"]
    with pytest.raises(ValueError, match="kl_coef is above 0"):
        policy_loss(**batch, config=config())
    assert float(policy_loss(**batch, config=config(kl_coef=0.0)).kl_loss) == 0.0
