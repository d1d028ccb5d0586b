"""Selection within a scope, against an independent one written with numpy, token by token."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch

from keytoken.attribution.selection import segment_ids, select_by, select_tokens
from keytoken.attribution.types import Outcomes, Signals, TokenWeights
from keytoken.golden import load_preset
from keytoken.schema import MethodConfig
from keytoken_kernels.selection import Signal

MaskOf = Callable[[list[int], int], torch.Tensor]


def signals_of(values: torch.Tensor, mask: torch.Tensor, group: list[int]) -> Signals:
    """A batch of texts, whose only score is the entropy."""
    nowhere = torch.zeros(len(mask), dtype=torch.bool)
    return Signals(
        logp=values,
        logp_masked=None,
        logp_shuffled=None,
        entropy=values.masked_fill(~mask, torch.nan),
        mask=mask,
        group=torch.tensor(group),
        has_visual=nowhere,
        has_temporal=nowhere,
    )


def method_of(**selection: object) -> MethodConfig:
    """The published method with other values of its selection."""
    method = load_preset("video_ktr_official")
    assert method.selection is not None
    return dataclasses.replace(method, selection=dataclasses.replace(method.selection, **selection))  # type: ignore[arg-type]


def by_entropy(
    signals: Signals, scope: str, ratio: float, floor: float | None = None, impl: str = "auto"
) -> TokenWeights:
    method = method_of(scope=scope, visual_ratio=0.0, temporal_ratio=0.0, entropy_ratio=ratio, floor=floor)
    return select_tokens(signals, method, impl)  # type: ignore[arg-type]


def select_by_hand(values: torch.Tensor, mask: torch.Tensor, segments: list[int], ratio: float) -> np.ndarray:
    """The definition, in float64: a token is kept if it reaches the quantile of its segment."""
    scores, valid = values.double().numpy(), mask.numpy()
    kept = np.zeros(valid.shape, dtype=bool)
    for i in range(valid.shape[0]):
        peers = [scores[j, t] for j, t in np.argwhere(valid) if segments[j] == segments[i]]
        for t in np.flatnonzero(valid[i]):
            kept[i, t] = scores[i, t] >= np.quantile(peers, 1.0 - ratio, method="linear")
    return kept


@pytest.mark.parametrize("scope", ["response", "group", "batch"])
@pytest.mark.parametrize("ratio", [0.13, 0.2, 0.37, 0.71])
def test_every_scope_agrees_with_the_definition(ragged_mask: MaskOf, scope: str, ratio: float) -> None:
    mask = ragged_mask([7, 1, 12, 4, 9, 3], 14)
    values = torch.randn(mask.shape, dtype=torch.float64)
    group = [5, 5, 2, 2, 2, 9]
    by_hand = {"response": list(range(6)), "group": group, "batch": [0] * 6}[scope]
    found = by_entropy(signals_of(values, mask, group), scope, ratio)
    np.testing.assert_array_equal(found.selected.numpy(), select_by_hand(values, mask, by_hand, ratio))
    assert torch.equal(found.masks["entropy"], found.selected)


def test_segments_of_the_scopes() -> None:
    group = torch.tensor([4, 4, 7])
    assert [segment_ids(scope, group).tolist() for scope in ("response", "group", "batch")] == [  # type: ignore[arg-type]
        [0, 1, 2],
        [4, 4, 7],
        [0, 0, 0],
    ]


def test_share_matches_the_ratio_on_many_distinct_scores() -> None:
    mask = torch.ones(8, 500, dtype=torch.bool)
    kept = by_entropy(signals_of(torch.randn(8, 500), mask, [0] * 8), "batch", 0.2)
    assert int(kept.selected.sum()) == 800  # rank 0.8 * 3999 = 3199.2: the values above it


def test_everything_and_empty_segments(ragged_mask: MaskOf) -> None:
    mask = ragged_mask([3, 0, 5], 6)
    signals = signals_of(torch.randn(3, 6), mask, [0, 0, 0])
    assert torch.equal(by_entropy(signals, "response", 1.0).selected, mask)
    assert not bool(by_entropy(signals, "response", 0.5).selected[1].any())


def test_ties_at_the_threshold_are_kept_together() -> None:
    signals = signals_of(torch.tensor([[0.0] * 9 + [1.0]]), torch.ones(1, 10, dtype=torch.bool), [0])
    assert int(by_entropy(signals, "batch", 0.1).selected.sum()) == 1  # rank 8.1: threshold 0.1
    assert int(by_entropy(signals, "batch", 0.2).selected.sum()) == 10  # rank 7.2: threshold 0


def test_the_floor_removes_noise_that_the_quantile_keeps() -> None:
    signals = signals_of(torch.tensor([[0.0] * 9 + [1.0]]), torch.ones(1, 10, dtype=torch.bool), [0])
    assert int(by_entropy(signals, "batch", 0.2, floor=0.05).selected.sum()) == 1


def test_half_precision_scores_are_ranked_in_float32() -> None:
    values, mask = torch.randn(2, 50).bfloat16(), torch.ones(2, 50, dtype=torch.bool)
    half, wide = (by_entropy(signals_of(v, mask, [0, 0]), "batch", 0.2) for v in (values, values.float()))
    assert torch.equal(half.selected, wide.selected)


def test_the_kernels_agree_with_the_reference(ragged_mask: MaskOf) -> None:
    pytest.importorskip("triton")
    mask = ragged_mask([5, 1, 4], 6)
    signals = signals_of(torch.randn(3, 6), mask, [0, 0, 1])
    signals = dataclasses.replace(signals, outcomes=Outcomes(rewards=torch.tensor([1.0, 0.0, 2.0])))
    plain, fast = (by_entropy(signals, "group", 0.4, impl=impl) for impl in ("reference", "triton"))
    assert torch.equal(plain.selected, fast.selected)
    assert (plain.metrics.pop("kernels/impl"), fast.metrics.pop("kernels/impl")) == (0.0, 1.0)
    assert plain.metrics == fast.metrics
    assert plain.advantages is not None and fast.advantages is not None
    torch.testing.assert_close(plain.advantages, fast.advantages, rtol=1e-6, atol=1e-6)


def test_advantages_come_with_outcomes_only(ragged_mask: MaskOf) -> None:
    signals = signals_of(torch.randn(4, 3), ragged_mask([3, 1, 2, 3], 3), [1, 0, 1, 0])
    assert by_entropy(signals, "batch", 0.5).advantages is None
    rewards = torch.tensor([1.0, 0.0, 3.0, 0.0])
    found = by_entropy(dataclasses.replace(signals, outcomes=Outcomes(rewards=rewards)), "batch", 0.5)
    assert found.advantages is not None
    std = 2.0**0.5  # of 1 and 3, unbiased
    assert found.advantages.tolist() == pytest.approx([-1 / (std + 1e-4), 0.0, 1 / (std + 1e-4), 0.0])
    plain = Outcomes(rewards=rewards, divide_by_std=False)
    found = by_entropy(dataclasses.replace(signals, outcomes=plain), "batch", 0.5)
    assert found.advantages is not None and found.advantages.tolist() == [-1.0, 0.0, 1.0, 0.0]


def test_a_batch_moves_as_a_whole_except_its_prompts(ragged_mask: MaskOf) -> None:
    signals = signals_of(torch.randn(2, 3), ragged_mask([3, 1], 3), [0, 1])
    signals = dataclasses.replace(signals, outcomes=Outcomes(rewards=torch.zeros(2), divide_by_std=False))
    moved = signals.to(torch.device("meta"))
    assert moved.group is signals.group
    assert moved.outcomes is not None and moved.outcomes.rewards.is_meta and not moved.outcomes.divide_by_std
    assert moved.logp.is_meta and moved.entropy.is_meta and moved.mask.is_meta and moved.logp_masked is None
    assert moved.has_visual.is_meta and moved.has_temporal.is_meta
    result = by_entropy(signals, "batch", 0.5).to(torch.device("meta"))
    assert result.weights.is_meta and result.selected.is_meta and result.metrics
    assert result.masks["entropy"].is_meta and result.scores["entropy"].is_meta
    assert result.advantages is not None and result.advantages.is_meta


def test_metrics_by_hand(ragged_mask: MaskOf) -> None:
    mask = ragged_mask([4, 2, 0], 4)  # two answers, and one empty one that counts nowhere
    signals = signals_of(torch.zeros(3, 4), mask, [0, 0, 0])
    visual = Signal(
        values=torch.tensor([[0.9, -0.2, 0.04, 0.0], [9.0, 9.0, 9.0, 9.0], [0.0] * 4]),
        applies=torch.tensor([True, False, False]),
        ratio=0.2,
    )
    temporal = dataclasses.replace(visual, applies=torch.zeros(3, dtype=torch.bool))
    found = select_by(
        {"visual": visual, "temporal": temporal}, signals, method_of(scope="batch"), "reference"
    )
    assert found.weights.tolist() == [[1.0, 0.0, 0.0, 0.0], [0.0] * 4, [0.0] * 4]
    assert found.metrics == pytest.approx(
        {
            "attribution/selected_share": 1 / 6,
            "attribution/unselected_response_share": 1 / 2,
            "attribution/visual/coverage": 4 / 6,
            "attribution/visual/selected_share": 1 / 4,
            "attribution/visual/notable_share": 2 / 4,
            "attribution/visual/excess_share": 0.05,
            "attribution/temporal/coverage": 0.0,
            "kernels/impl": 0.0,
        }
    )
