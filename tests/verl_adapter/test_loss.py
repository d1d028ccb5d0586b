"""The loss in verl's data layout against the pure loss on the whole padded batch."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.tensorclass import NonTensorData

from keytoken import fields
from keytoken.losses.denominators import loss_totals
from keytoken.losses.policy import policy_loss
from keytoken.schema import LossConfig
from keytoken.verl_adapter.compat import Metric
from keytoken.verl_adapter.loss import token_weighted_loss

PROMPTS, ANSWERS = (4, 2, 7, 3, 5, 1), (3, 5, 1, 4, 2, 6)
CONFIG = LossConfig(
    normalizer="all",
    level="response",
    mask_kl=False,
    kl_coef=0.04,
    kl_clamp="video_r1",
    clip_low=0.2,
    clip_high=0.2,
)
CONFIGS = {
    "paper": CONFIG,
    "published code": dataclasses.replace(CONFIG, normalizer="selected", mask_kl=True),
    "mean over tokens, no reference": dataclasses.replace(CONFIG, level="batch", kl_coef=0.0, dual_clip=3.0),
    "GSPO": dataclasses.replace(CONFIG, objective="gspo"),
    "CISPO": dataclasses.replace(CONFIG, objective="cispo", level="batch"),
    "constant length": dataclasses.replace(CONFIG, normalizer="constant", constant_length=8),
    "perception and entropy": dataclasses.replace(CONFIG, perception_coef=0.02, entropy_penalty=0.06),
}
WITHOUT_VISION = 4  # the row of an answer to a prompt without image or video


def ragged(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


@pytest.fixture
def batch() -> dict[str, Any]:
    """Ragged answers of random values; the second has no selected token."""
    generator = torch.Generator().manual_seed(2)

    def draw(scale: float = 1.0) -> list[torch.Tensor]:
        return [scale * torch.randn(length, generator=generator) for length in ANSWERS]

    old = [values - 2.0 for values in draw()]
    weights = [(values > 0).float() for values in draw()]
    weights[1].zero_()
    return {
        "new": [values + change for values, change in zip(old, draw(0.3), strict=True)],
        "old_log_probs": old,
        "ref_log_prob": [values + change for values, change in zip(old, draw(0.2), strict=True)],
        "advantages": draw(),
        fields.TOKEN_WEIGHT: weights,
        fields.MASKED_LOG_PROB: [values + change for values, change in zip(old, draw(0.5), strict=True)],
    }


def padded(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def whole(batch: dict[str, Any], config: LossConfig) -> tuple[Any, list[torch.Tensor]]:
    """The pure loss of everything at once, and its gradient by answer."""
    new = [values.clone().requires_grad_() for values in batch["new"]]
    mask = torch.arange(max(ANSWERS)) < torch.tensor(ANSWERS)[:, None]
    masked = list(batch[fields.MASKED_LOG_PROB])
    masked[WITHOUT_VISION] = batch["new"][WITHOUT_VISION]  # nothing to tell apart
    result = policy_loss(
        log_prob=padded(new),
        old_log_prob=padded(batch["old_log_probs"]),
        advantages=padded(batch["advantages"]),
        weights=padded(batch[fields.TOKEN_WEIGHT]),
        mask=mask,
        config=config,
        ref_log_prob=padded(batch["ref_log_prob"]),
        masked_log_prob=padded(masked),
    )
    result.loss.backward()
    return result, [values.grad for values in new]


def in_parts(
    batch: dict[str, Any], config: LossConfig, parts: list[list[int]], num_ranks: int, view: str = "masked"
) -> tuple[float, dict[str, float], list[torch.Tensor]]:
    """Loss, metrics and gradients as verl adds them up: summed over micro-batches, averaged over ranks."""
    mask = torch.arange(max(ANSWERS)) < torch.tensor(ANSWERS)[:, None]
    totals = loss_totals(padded(batch[fields.TOKEN_WEIGHT]), mask)
    counts = torch.tensor([totals.num_responses, totals.num_tokens, totals.num_selected])
    ragged_fields = ("old_log_probs", "ref_log_prob", "advantages", fields.TOKEN_WEIGHT)
    values = {name: batch[name] for name in ragged_fields}
    view_log_prob, applies = fields.view_outputs(view)
    if config.perception_coef > 0.0:  # else no pass has run
        values[view_log_prob] = batch[fields.MASKED_LOG_PROB]
    loss_fn = partial(token_weighted_loss, config=config, view=view)
    new = [values.clone().requires_grad_() for values in batch["new"]]
    total, metrics = torch.zeros(()), {}
    for rows in parts:
        data = TensorDict(
            {
                "prompts": ragged([torch.zeros(PROMPTS[row], dtype=torch.long) for row in rows]),
                "responses": ragged([torch.zeros(ANSWERS[row], dtype=torch.long) for row in rows]),
                "response_mask": ragged([torch.ones(ANSWERS[row], dtype=torch.long) for row in rows]),
                fields.LOSS_TOTALS: counts.expand(len(rows), 3).contiguous(),
                applies: torch.tensor([float(row != WITHOUT_VISION) for row in rows]),
                **{name: ragged([value[row] for row in rows]) for name, value in values.items()},
            },
            batch_size=[len(rows)],
        )
        data["dp_size"] = NonTensorData(num_ranks)
        # verl's model output covers prompt and answer; place L - R - 1 + t holds the log-prob of token t.
        outputs = []
        for row in rows:
            before, after = torch.full((PROMPTS[row] - 1,), torch.nan), torch.full((1,), torch.nan)
            outputs.append(torch.cat([before, new[row], after]))
        loss, part = loss_fn(model_output={"log_probs": ragged(outputs)}, data=data)
        total = total + loss / num_ranks
        for name, metric in part.items():
            assert isinstance(metric, Metric)
            metrics[name] = metrics.get(name, 0.0) + float(metric.aggregate()) / num_ranks
    total.backward()
    return float(total), metrics, [values.grad for values in new]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize(
    ("parts", "num_ranks"),
    [([[0, 1, 2, 3, 4, 5]], 1), ([[0, 1], [2], [3, 4, 5]], 1), ([[0, 4, 1], [5, 2, 3]], 2)],
    ids=["one batch", "three micro-batches", "two ranks"],
)
def test_parts_sum_to_the_whole(
    batch: dict[str, Any], config: LossConfig, parts: list[list[int]], num_ranks: int
) -> None:
    result, gradients = whole(batch, config)
    loss, metrics, part_gradients = in_parts(batch, config, parts, num_ranks)
    assert loss == pytest.approx(float(result.loss), abs=1e-6)
    for mine, wanted in zip(part_gradients, gradients, strict=True):
        torch.testing.assert_close(mine, wanted, atol=1e-6, rtol=1e-5)
    assert metrics == pytest.approx(
        {
            "policy_loss": float(result.policy_loss),
            "kl_loss": float(result.kl_loss),
            "perception_kl": float(result.perception_kl),
            "surprise": float(result.surprise),
            "clipped_share": float(result.clipped_share),
            "old_to_new_kl": float(result.old_to_new_kl),
            "responses_without_selected": sum(not rows.any() for rows in batch[fields.TOKEN_WEIGHT]),
        },
        abs=1e-6,
    )
    assert abs(float(result.policy_loss)) > 1e-3  # else everything would agree


def test_the_perception_term_reads_the_chosen_view(batch: dict[str, Any]) -> None:
    parts = ([[0, 1, 2], [3, 4, 5]], 1)
    config = CONFIGS["perception and entropy"]
    masked, blackened = (in_parts(batch, config, *parts, view=view) for view in ("masked", "blackened"))
    assert masked[0] == blackened[0] and masked[1] == blackened[1]
