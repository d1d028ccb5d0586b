"""Each objective against verl's function of the same name, and what token weights do to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args, get_type_hints

import pytest
import torch

from keytoken.golden import load_preset
from keytoken.losses.objectives import OBJECTIVES
from keytoken.losses.policy import policy_loss
from keytoken.schema import LossConfig

MaskOf = Callable[[list[int], int], torch.Tensor]
Batch = dict[str, Any]
LENGTHS = [7, 1, 12, 4, 9, 3]
CONSTANT = 20
# How verl names what normalizer and level say.
MODES = {
    ("batch", "all"): "token-mean",
    ("response", "all"): "seq-mean-token-mean",
    ("response", "constant"): "seq-mean-token-sum-norm",
}
# Clips around ratios that random log-probs reach; one of cispo is its preset's, open below.
CASES: dict[str, dict[str, Any]] = {
    "ppo": {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0},
    "gspo": {"clip_low": 0.2, "clip_high": 0.3},
    "cispo": {"clip_low": 0.2, "clip_high": 0.3},
    "cispo open below": {"clip_low": 1.0, "clip_high": 0.2},
}
COMBINATIONS = [
    pytest.param(case, level, normalizer, id=f"{case}, {mode}")
    for case in CASES
    for (level, normalizer), mode in MODES.items()
    if case != "gspo" or level == "response"
]
VERL = {"ppo": "vanilla", "gspo": "gspo", "cispo": "cispo"}


@pytest.fixture
def whole_batch(ragged_mask: MaskOf, random_batch: Callable[..., Batch]) -> Callable[..., Batch]:
    """Every token has a weight of 1; the padding holds zeros, which verl needs."""

    def build(seed: int, dtype: torch.dtype) -> Batch:
        batch = random_batch(ragged_mask(LENGTHS, 14), seed, dtype, spread=1.2)
        batch["advantages"][2] = -1.0  # a long answer that reaches the dual clip
        batch = {name: value if name == "mask" else value.nan_to_num(0.0) for name, value in batch.items()}
        return batch | {"weights": batch["mask"].to(dtype)}

    return build


def verl_loss(batch: Batch, cfg: LossConfig, leaf: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
    """verl's policy loss, and its KL loss where the configuration has one."""
    core_algos = pytest.importorskip("verl.trainer.ppo.core_algos")
    from verl.workers.config import ActorConfig

    actor = ActorConfig(
        strategy="fsdp2",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio_low=cfg.clip_low,
        clip_ratio_high=cfg.clip_high,
        clip_ratio_c=cfg.dual_clip or 3.0,
    )
    actor.global_batch_info["loss_scale_factor"] = cfg.constant_length
    mode = MODES[cfg.level, cfg.normalizer]
    loss, metrics = core_algos.get_policy_loss_fn(VERL[cfg.objective])(
        old_log_prob=batch["old_log_prob"],
        log_prob=leaf,
        advantages=batch["advantages"],
        response_mask=batch["mask"],
        loss_agg_mode=mode,
        config=actor,
    )
    kl = core_algos.kl_penalty(leaf, batch["ref_log_prob"], "low_var_kl")
    info = actor.global_batch_info
    return loss + cfg.kl_coef * core_algos.agg_loss(kl, batch["mask"], mode, **info), metrics


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(("case", "level", "normalizer"), COMBINATIONS)
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_verl_with_weights_of_one(
    whole_batch: Callable[..., Batch],
    value_and_gradient: Callable[..., Any],
    dtype: torch.dtype,
    case: str,
    level: Any,
    normalizer: Any,
    seed: int,
) -> None:
    objective: Any = case.split()[0]
    cfg = LossConfig(
        objective=objective,
        level=level,
        normalizer=normalizer,
        constant_length=CONSTANT if normalizer == "constant" else None,
        mask_kl=False,
        kl_coef=0.04,
        kl_clamp="verl",
        **CASES[case],
    )
    batch = whole_batch(seed, dtype)
    batch["ref_log_prob"][0, 0] += 30.0  # beyond both clamps of verl's estimator
    leaf = batch["log_prob"].clone().requires_grad_()
    theirs, metrics = verl_loss(batch, cfg, leaf)
    (their_gradient,) = torch.autograd.grad(theirs, leaf)
    ours, gradient = value_and_gradient(batch, config=cfg)
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, their_gradient, rtol=1e-6, atol=1e-6)

    clipped_share = float(policy_loss(**batch, config=cfg).clipped_share)
    assert clipped_share == pytest.approx(metrics["actor/pg_clipfrac"], abs=1e-6) and clipped_share > 0.1
    assert objective != "ppo" or metrics["actor/pg_clipfrac_lower"] > 0.0


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_preset_grpo_is_verls_grpo(
    whole_batch: Callable[..., Batch], value_and_gradient: Callable[..., Any], seed: int
) -> None:
    cfg = load_preset("grpo").loss
    batch = whole_batch(seed, torch.float32)
    leaf = batch["log_prob"].clone().requires_grad_()
    theirs, _ = verl_loss(batch, cfg, leaf)
    (their_gradient,) = torch.autograd.grad(theirs, leaf)
    ours, gradient = value_and_gradient(batch, config=cfg)
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, their_gradient, rtol=1e-6, atol=1e-6)


def test_a_gspo_ratio_beyond_the_bound_of_verl(
    whole_batch: Callable[..., Batch],
    loss_config: Callable[..., LossConfig],
    value_and_gradient: Callable[..., Any],
) -> None:
    """Its logarithm is cut at 10; with a negative advantage nothing else bounds it."""
    cfg = loss_config(objective="gspo", dual_clip=None, kl_coef=0.0)
    batch = whole_batch(0, torch.float64)
    batch["old_log_prob"][2] -= 15.0
    leaf = batch["log_prob"].clone().requires_grad_()
    theirs, _ = verl_loss(batch, cfg, leaf)
    (their_gradient,) = torch.autograd.grad(theirs, leaf)
    ours, gradient = value_and_gradient(batch, config=cfg)
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-12, atol=0.0)
    torch.testing.assert_close(gradient, their_gradient, rtol=1e-12, atol=0.0)
    assert not bool(gradient[2].any()) and float(ours) > 1000.0


def test_gspo_is_the_objective_of_sequences(
    whole_batch: Callable[..., Batch],
    loss_config: Callable[..., LossConfig],
    value_and_gradient: Callable[..., Any],
) -> None:
    """The paper's equation 5, differentiated as it stands: mean over responses of the clipped s_i A_i."""
    cfg = loss_config(objective="gspo", dual_clip=None, kl_coef=0.0)
    batch = whole_batch(4, torch.float64)
    leaf = batch["log_prob"].clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for i, length in enumerate(LENGTHS):
        s = ((leaf[i, :length] - batch["old_log_prob"][i, :length]).sum() / length).exp()
        advantage = batch["advantages"][i, 0]
        total = total - torch.minimum(s * advantage, s.clamp(0.8, 1.3) * advantage) / len(LENGTHS)
    (by_sequences,) = torch.autograd.grad(total, leaf)
    loss, gradient = value_and_gradient(batch, config=cfg)
    torch.testing.assert_close(loss, total.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient, by_sequences, rtol=1e-12, atol=1e-14)


def test_cispo_keeps_the_gradient_of_what_it_clips(loss_config: Callable[..., LossConfig]) -> None:
    """By hand: ratios 2 and 0.5, bounds 0.8 and 1.3, advantage 3, mean over two tokens."""
    cfg = loss_config(objective="cispo", dual_clip=None, kl_coef=0.0)
    log_prob = torch.log(torch.tensor([[0.4, 0.2]], dtype=torch.float64)).requires_grad_()
    result = policy_loss(
        log_prob=log_prob,
        old_log_prob=torch.log(torch.tensor([[0.2, 0.4]], dtype=torch.float64)),
        advantages=torch.full((1, 2), 3.0, dtype=torch.float64),
        weights=torch.ones(1, 2, dtype=torch.float64),
        mask=torch.ones(1, 2, dtype=torch.bool),
        config=cfg,
    )
    result.loss.backward()
    assert log_prob.grad is not None
    torch.testing.assert_close(log_prob.grad, torch.tensor([[-1.95, -1.2]], dtype=torch.float64))
    assert float(result.clipped_share) == 1.0


@pytest.mark.parametrize("objective", ["ppo", "gspo", "cispo"])
def test_a_weight_scales_its_token_and_no_other(
    whole_batch: Callable[..., Batch],
    loss_config: Callable[..., LossConfig],
    value_and_gradient: Callable[..., Any],
    objective: str,
) -> None:
    """Ratios and bounds do not depend on weights, not even the ratio of a whole response."""
    cfg = loss_config(objective=objective, dual_clip=None, kl_coef=0.0)
    batch = whole_batch(1, torch.float64)
    generator = torch.Generator().manual_seed(9)
    scale = torch.rand(batch["mask"].shape, generator=generator, dtype=torch.float64)
    scale[:, 3] = 0.0
    _, plain = value_and_gradient(batch, config=cfg)
    _, weighted = value_and_gradient(batch | {"weights": scale * batch["mask"]}, config=cfg)
    torch.testing.assert_close(weighted, plain * scale, rtol=1e-12, atol=0.0)
    assert bool(plain.any())


def test_the_schema_names_every_objective() -> None:
    assert set(get_args(get_type_hints(LossConfig)["objective"])) == set(OBJECTIVES) == set(VERL)
