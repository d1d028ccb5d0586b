"""What no preset may depend on: order, padding, cuts of a batch, and the seed where nothing is tied."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from importlib import resources
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from keytoken.attribution.methods import compute_token_weights
from keytoken.attribution.selection import segment_ids
from keytoken.attribution.types import Signals
from keytoken.compose import groups
from keytoken.golden import load_preset
from keytoken.losses.advantage import group_advantages
from keytoken.losses.policy import LossTotals, loss_totals, policy_loss
from keytoken.schema import LossConfig, MethodConfig

# Options under which a method's weights are all 1; of the others, a selection of everything makes them so.
NEUTRAL: dict[str, dict[str, Any]] = {
    "vppo": {"least_factor": 1.0},
    "tw_grpo": {"alpha": 1.0},
    "soft": {"anneal_steps": 10},  # at step 0
}


@pytest.fixture(params=groups()["method"])
def method(request: pytest.FixtureRequest) -> MethodConfig:
    if request.param != "dr_grpo":
        return load_preset(request.param)
    # Its longest answer is the dataset's, which is not known here.
    text = resources.files("keytoken_configs").joinpath("method/dr_grpo.yaml").read_text(encoding="utf-8")
    values = yaml.safe_load(text)["keytoken"]["method"]
    values["loss"]["constant_length"] = 16
    return MethodConfig.from_mapping(values, "keytoken.method")


@pytest.fixture
def distinct(batch: Any) -> Any:
    """A batch in which no two scores are equal, and with all measures."""
    signals = batch.signals
    draw = torch.Generator().manual_seed(1)
    by_position = torch.rand(max(signals.group.tolist()) + 1, signals.mask.shape[1], generator=draw)
    measures = {
        "truncated_entropy": signals.entropy.sqrt(),
        "disagreement": by_position.double()[signals.group].masked_fill(~signals.mask, torch.nan),
    }
    return dataclasses.replace(batch, signals=dataclasses.replace(signals, **measures))


@pytest.fixture
def tied(distinct: Any) -> Any:
    """The same with scores of 0, 1 and 2 only: whole numbers, so that equal differences are equal."""
    signals = distinct.signals

    def whole(values: Tensor) -> Tensor:
        return values.round().clamp(-2.0, 2.0)

    changes = {
        "logp": 0.0 * signals.logp - 2.0,  # NaN where it was
        "logp_masked": whole(signals.logp_masked - signals.logp) - 2.0,
        "logp_shuffled": whole(signals.logp_shuffled - signals.logp) - 2.0,
        "entropy": whole(signals.entropy),
        "truncated_entropy": whole(signals.truncated_entropy),
    }
    return dataclasses.replace(distinct, signals=dataclasses.replace(signals, **changes))


def on_rows(signals: Signals, change: Callable[[Tensor], Tensor]) -> Signals:
    """The signals with every tensor, each of which has a row an answer, changed alike."""
    values = {field.name: getattr(signals, field.name) for field in dataclasses.fields(signals)}
    changed = {name: change(value) for name, value in values.items() if isinstance(value, Tensor)}
    return dataclasses.replace(signals, **changed)


def seeded(signals: Signals, seed: int) -> Signals:
    return dataclasses.replace(signals, seed=seed)


def has_draws(method: MethodConfig) -> bool:
    return method.selection is not None and (method.selection.rule == "count" or method.control == "random")


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_the_order_of_answers_does_not_matter(method: MethodConfig, distinct: Any, tied: Any) -> None:
    """Weights move with their answers, ties included: a draw knows an answer by its key."""
    order = torch.tensor([6, 2, 9, 0, 4, 1, 8, 3, 7, 5])
    for signals in (distinct.signals, tied.signals):
        before = compute_token_weights(signals, method)
        after = compute_token_weights(on_rows(signals, lambda value: value[order]), method)
        assert torch.equal(after.selected, before.selected[order])
        close(after.weights, before.weights[order])


def test_padding_does_not_matter(method: MethodConfig, distinct: Any, tied: Any) -> None:
    """Five more positions of NaN, and two answers without tokens: to a known prompt and to a new one."""

    def padded(value: Tensor) -> Tensor:
        if value.ndim == 2:
            fill: Any = False if value.dtype == torch.bool else torch.nan
            return torch.nn.functional.pad(value, (0, 5, 0, 2), value=fill)
        if value.dtype == torch.bool:
            return torch.cat([value, torch.tensor([True, True])])
        return torch.cat([value, torch.tensor([5, 77])])

    for signals in (distinct.signals, tied.signals):
        rows, width = signals.mask.shape
        # Their keys, 77 and 78, are none of the batch's.
        longer = on_rows(signals, padded)
        longer = dataclasses.replace(longer, row_keys=torch.cat([signals.row_keys, torch.tensor([77, 78])]))
        found = compute_token_weights(longer, method).weights
        close(found[:rows, :width], compute_token_weights(signals, method).weights)
        assert not bool(found[rows:].any()) and not bool(found[:, width:].any())


def test_a_seed_changes_ties_and_draws_only(method: MethodConfig, distinct: Any, tied: Any) -> None:
    plain = compute_token_weights(seeded(distinct.signals, 0), method).weights
    changed = [compute_token_weights(seeded(distinct.signals, seed), method).weights for seed in range(1, 4)]
    assert any(not torch.equal(plain, other) for other in changed) == (method.control == "random")
    results = [compute_token_weights(seeded(tied.signals, seed), method) for seed in range(4)]
    differs = any(not torch.equal(results[0].weights, other.weights) for other in results[1:])
    assert differs == has_draws(method)
    if method.selection is None:
        return
    segments = segment_ids(method.selection.scope, tied.signals.group)
    for name, scores in results[0].scores.items():
        for other in results[1:]:
            moved = results[0].masks[name] ^ other.masks[name]
            for segment in segments.unique():
                rows = segments == segment
                assert len(scores[rows][moved[rows]].unique()) <= 1  # all of one score, that at the threshold


def base_of(config: LossConfig) -> LossConfig:
    """The loss without anything that tells selected tokens from others."""
    normalizer = "all" if config.normalizer == "selected" else config.normalizer
    return dataclasses.replace(config, normalizer=normalizer, mask_kl=False)


def loss_and_gradient(
    batch: Any, method: MethodConfig, weights: Tensor, config: LossConfig, dtype: torch.dtype, **more: Any
) -> tuple[Tensor, Tensor]:
    advantages = group_advantages(batch.rewards, batch.signals.group, method.advantage_epsilon)
    given = {
        "old_log_prob": batch.signals.logp,
        "advantages": advantages[:, None].expand(batch.signals.mask.shape),
        "ref_log_prob": batch.reference,
        "masked_log_prob": batch.reference + 0.3,
    }
    rows = more.pop("rows", slice(None))
    leaf = batch.current[rows].to(dtype).requires_grad_()
    value = policy_loss(
        log_prob=leaf,
        weights=weights[rows].to(dtype),
        mask=batch.signals.mask[rows],
        config=config,
        **{name: tensor[rows].to(dtype) for name, tensor in given.items()},
        **more,
    ).loss
    return value.detach(), torch.autograd.grad(value, leaf)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_of_ones_are_the_base_loss(method: MethodConfig, batch_of: Any, dtype: torch.dtype) -> None:
    """Bit for bit: the method runs, with a selection of everything."""
    batch = batch_of(kinds=dict.fromkeys((5, 2, 9, 7), "video"))
    entropy, selection = batch.signals.entropy, method.selection
    signals = dataclasses.replace(batch.signals, truncated_entropy=entropy, disagreement=entropy, step=0)
    if selection is not None:
        everything = {
            f"{name}_{field}": 1.0
            for name in ("visual", "temporal", "entropy")
            for field in ("ratio", "weight")
            if getattr(selection, f"{name}_ratio") > 0.0
        }
        selection = dataclasses.replace(selection, **everything)  # type: ignore[arg-type]
    neutral = dataclasses.replace(
        method,
        selection=selection,
        options={**method.options, **NEUTRAL.get(method.name, {})},
        control="none" if method.control == "inverse" else method.control,
    )
    weights = compute_token_weights(signals, neutral).weights
    assert torch.equal(weights, batch.signals.mask.to(weights.dtype))
    ones = batch.signals.mask.double()
    found = loss_and_gradient(batch, method, weights, method.loss, dtype)
    base = loss_and_gradient(batch, method, ones, base_of(method.loss), dtype)
    assert torch.equal(found[0], base[0]) and torch.equal(found[1], base[1])


@pytest.mark.parametrize("cuts", [[1] * 10, [3, 7], [6, 1, 3]], ids=str)
def test_a_batch_may_be_cut(method: MethodConfig, distinct: Any, cuts: list[int]) -> None:
    """Micro-batches with the counts of the whole sum to its loss, and their gradients are its gradient."""
    weights = compute_token_weights(distinct.signals, method).weights
    whole, gradient = loss_and_gradient(distinct, method, weights, method.loss, torch.float64)
    parts = [slice(sum(cuts[:n]), sum(cuts[: n + 1])) for n in range(len(cuts))]
    mask = distinct.signals.mask
    totals = LossTotals(num_responses=0, num_tokens=0, num_selected=0)
    for rows in parts:
        totals = totals + loss_totals(weights[rows], mask[rows])
    pieces = [
        loss_and_gradient(distinct, method, weights, method.loss, torch.float64, rows=rows, totals=totals)
        for rows in parts
    ]
    close(torch.stack([piece[0] for piece in pieces]).sum(), whole)
    close(torch.cat([piece[1] for piece in pieces]), gradient)
