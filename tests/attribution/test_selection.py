"""Selection against an independent one written with numpy, token by token."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from keytoken.attribution import selection
from keytoken.attribution.scores import Score
from keytoken.attribution.selection import quantile, segment_ids, select_top, selection_metrics, union

MaskOf = Callable[[list[int], int], torch.Tensor]


def select_by_hand(score: Score, segments: list[int], ratio: float) -> np.ndarray:
    """The definition, in float64: a token is kept if it reaches the quantile of its segment."""
    values, valid = score.values.double().numpy(), score.valid.numpy()
    kept = np.zeros(valid.shape, dtype=bool)
    for i in range(valid.shape[0]):
        peers = [values[j, t] for j, t in np.argwhere(valid) if segments[j] == segments[i]]
        for t in np.flatnonzero(valid[i]):
            kept[i, t] = values[i, t] >= np.quantile(peers, 1.0 - ratio, method="linear")
    return kept


def random_score(mask: torch.Tensor, seed: int, dtype: torch.dtype = torch.float64) -> Score:
    values = torch.randn(mask.shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return Score(values=values.masked_fill(~mask, 0.0), valid=mask)


@pytest.mark.parametrize("scope", ["response", "group", "batch"])
@pytest.mark.parametrize("ratio", [0.13, 0.2, 0.37, 0.71])
def test_every_scope_agrees_with_the_definition(ragged_mask: MaskOf, scope: str, ratio: float) -> None:
    score = random_score(ragged_mask([7, 1, 12, 4, 9, 3], 14), seed=int(100 * ratio))
    group = [5, 5, 2, 2, 2, 9]
    by_hand = {"response": list(range(6)), "group": group, "batch": [0] * 6}[scope]
    segments = segment_ids(scope, torch.tensor(group))  # type: ignore[arg-type]
    np.testing.assert_array_equal(
        select_top(score, segments, ratio).numpy(), select_by_hand(score, by_hand, ratio)
    )


def test_share_matches_the_ratio_on_many_distinct_scores() -> None:
    score = random_score(torch.ones(8, 500, dtype=torch.bool), seed=1, dtype=torch.float32)
    kept = select_top(score, segment_ids("batch", torch.zeros(8, dtype=torch.long)), 0.2)
    assert int(kept.sum()) == 800  # rank 0.8 * 3999 = 3199.2: the values above it


def test_ratio_limits_and_empty_segments(ragged_mask: MaskOf) -> None:
    score = random_score(ragged_mask([3, 0, 5], 6), seed=2)
    segments = segment_ids("response", torch.zeros(3, dtype=torch.long))
    assert not bool(select_top(score, segments, 0.0).any())
    assert torch.equal(select_top(score, segments, 1.0), score.valid)
    assert not bool(select_top(score, segments, 0.5)[1].any())


def test_ties_at_the_threshold_are_kept_together() -> None:
    values = torch.tensor([[0.0] * 9 + [1.0]])
    score = Score(values=values, valid=torch.ones(1, 10, dtype=torch.bool))
    assert int(select_top(score, torch.tensor([0]), 0.1).sum()) == 1  # rank 8.1: threshold 0.1
    assert int(select_top(score, torch.tensor([0]), 0.2).sum()) == 10  # rank 7.2: threshold 0


def test_the_floor_removes_noise_that_the_quantile_keeps() -> None:
    values = torch.tensor([[0.0] * 9 + [1.0]])
    score = Score(values=values, valid=torch.ones(1, 10, dtype=torch.bool))
    assert int(select_top(score, torch.tensor([0]), 0.2, floor=0.05).sum()) == 1


def test_half_precision_scores_are_ranked_in_float32() -> None:
    score = random_score(torch.ones(2, 50, dtype=torch.bool), seed=3, dtype=torch.bfloat16)
    wide = Score(values=score.values.float(), valid=score.valid)
    segments = torch.zeros(2, dtype=torch.long)
    assert torch.equal(select_top(score, segments, 0.2), select_top(wide, segments, 0.2))


@pytest.mark.parametrize("size", [1, 2, 3, 10, 101, 4097])
def test_the_large_quantile_equals_torch(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(size, dtype=torch.float64)
    for q in (0.0, 0.1, 0.3, 0.5, 0.77, 0.8, 1.0):
        expected = torch.quantile(values, q)
        monkeypatch.setattr(selection, "TORCH_QUANTILE_LIMIT", 0)
        torch.testing.assert_close(quantile(values, q), expected, rtol=1e-14, atol=1e-14)
        monkeypatch.undo()


def test_torch_really_refuses_more_than_the_limit() -> None:
    over = torch.zeros(selection.TORCH_QUANTILE_LIMIT + 1)
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(over, 0.5)
    over[-1] = 3.0
    assert float(quantile(over, 1.0)) == 3.0


def test_union_stays_inside_the_mask(ragged_mask: MaskOf) -> None:
    mask = ragged_mask([1, 3], 3)
    first = torch.tensor([[True, True, False], [False, False, False]])
    second = torch.tensor([[False, False, False], [False, True, False]])
    assert union({"visual": first, "entropy": second}, mask).tolist() == [[1, 0, 0], [0, 1, 0]]


def test_metrics_by_hand(ragged_mask: MaskOf) -> None:
    mask = ragged_mask([4, 2, 0], 4)  # two answers, and one empty one that counts nowhere
    visual = Score(
        values=torch.tensor([[0.9, -0.2, 0.04, 0.0], [0.0, 0.0, 0.0, 0.0], [0.0] * 4]),
        valid=mask & torch.tensor([[True], [False], [False]]),
    )
    temporal = Score(values=torch.zeros(3, 4), valid=torch.zeros(3, 4, dtype=torch.bool))
    masks = {
        "visual": torch.tensor([[1, 0, 0, 0], [0] * 4, [0] * 4]).bool(),
        "temporal": torch.zeros(3, 4).bool(),
    }
    metrics = selection_metrics(
        {"visual": visual, "temporal": temporal},
        masks,
        {"visual": 0.2, "temporal": 0.2},
        union(masks, mask),
        mask,
    )
    assert metrics == pytest.approx(
        {
            "attribution/selected_share": 1 / 6,
            "attribution/unselected_response_share": 1 / 2,
            "attribution/visual/coverage": 4 / 6,
            "attribution/visual/selected_share": 1 / 4,
            "attribution/visual/notable_share": 2 / 4,
            "attribution/visual/excess_share": 0.05,
            "attribution/temporal/coverage": 0.0,
        }
    )
