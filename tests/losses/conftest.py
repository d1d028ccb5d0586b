"""Batches and configurations that the tests of the losses share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from keytoken.losses.policy import policy_loss
from keytoken.schema import LossConfig

Batch = dict[str, Any]


@pytest.fixture
def loss_config() -> Callable[..., LossConfig]:
    """A loss with every option of PPO on; ``loss_config(name=value)`` changes some."""

    def build(**changes: Any) -> LossConfig:
        values = {"normalizer": "all", "level": "response", "mask_kl": False, "kl_coef": 0.04}
        values |= {"kl_clamp": "verl", "clip_low": 0.2, "clip_high": 0.3, "dual_clip": 3.0}
        return LossConfig(**(values | changes))  # type: ignore[arg-type]

    return build


@pytest.fixture
def random_batch() -> Callable[..., Batch]:
    """Log-probs far enough apart to reach every clip; NaN in the padding."""

    def build(mask: torch.Tensor, seed: int, dtype: torch.dtype, spread: float = 0.6) -> Batch:
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
            "masked_log_prob": log_prob + draw(),
        }

    return build


@pytest.fixture
def value_and_gradient() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """The loss of a batch and its gradient with respect to ``log_prob``."""

    def evaluate(batch: Batch, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = batch["log_prob"].clone().requires_grad_()
        loss = policy_loss(**(batch | {"log_prob": leaf}), **kwargs).loss
        (gradient,) = torch.autograd.grad(loss, leaf)
        return loss.detach(), gradient

    return evaluate
