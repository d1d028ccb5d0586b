"""Selection by the reference and by every launch plan, against torch.quantile, numpy and float64."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from keytoken_kernels.selection import COUNTS, TOTALS, Segments, Selection, Signal, reference, select

# The plans of triton.py, forced on tiny batches by moving their limits.
PLANS = {
    "reference": {},
    "fused": {},
    "resident": {"fused": 0, "tile": 64},
    "radix": {"fused": 0, "resident": 0, "tile": 32, "chunks": 5},
}
SCOPES = ("response", "group", "batch")
RESULTS = [field.name for field in dataclasses.fields(Selection)]
# The interpreter takes a tenth of a second for a program, so the slower plans run fewer of the cases.
CASES = {"reference": 150, "fused": 40, "resident": 9, "radix": 9}

Run = Callable[..., Selection]

# numpy says what it thinks of inf - inf, which is NaN here as in torch.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


@pytest.fixture
def run_plan(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> Run:
    """``select`` by a plan, on the device of the tests; results on the CPU."""

    def run(
        plan: str, signals: list[Signal], mask: torch.Tensor, segments: Segments, **options: Any
    ) -> Selection:
        if plan == "reference":
            return select(signals, mask, segments, impl="reference", **options)
        kernels = pytest.importorskip("keytoken_kernels.selection.triton")
        limits = kernels.Limits(**PLANS[plan])
        moved = [
            dataclasses.replace(
                signal,
                **{
                    name: tensor.to(device)
                    for name in ("values", "baseline", "applies")
                    if (tensor := getattr(signal, name)) is not None
                },
            )
            for signal in signals
        ]
        options |= {name: options[name].to(device) for name in ("rewards",) if options.get(name) is not None}
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "select", functools.partial(kernels.select, limits=limits))
            found = select(moved, mask.to(device), segments, impl="triton", **options)
        return Selection(
            **{name: None if (t := getattr(found, name)) is None else t.cpu() for name in RESULTS}
        )

    return run


def segments_of(scope: str, size: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """Ids [size]; groups are interleaved and of unequal size."""
    if scope == "response":
        return torch.arange(size) * 3 + 1
    if scope == "batch":
        return torch.full((size,), 7)
    return torch.randint(0, max(size // 3, 1) + 1, (size,), generator=generator)


def ragged(lengths: list[int], width: int) -> torch.Tensor:
    return torch.arange(width) < torch.tensor(lengths)[:, None]


class Case:
    """A random batch: ragged rows, padding of NaN, three signals that meet in ties, infinities and NaN."""

    def __init__(self, seed: int, scope: str | None = None, plain: bool = False) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        size, self.width = self.whole(1, 8), self.whole(1, 24)
        lengths = torch.randint(0, self.width + 1, (size,), generator=self.generator)
        self.mask = torch.arange(self.width) < lengths[:, None]
        if seed % 4 == 0:  # masks with holes are legal as well
            self.mask &= torch.rand(self.mask.shape, generator=self.generator) < 0.7
        self.scope = scope or SCOPES[seed % 3]
        self.ids = segments_of(self.scope, size, self.generator)
        self.signals = [self.signal(number, plain) for number in range(1 + self.whole(0, 2))]
        self.groups = segments_of("group", size, self.generator)
        self.rewards = (torch.rand(size, generator=self.generator) * 4).round() / 4

    def whole(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def scores(self, plain: bool) -> torch.Tensor:
        values = torch.randn(self.mask.shape, generator=self.generator) * 10.0 ** self.whole(-3, 3)
        kind = 0 if plain else self.whole(0, 5)
        if kind == 1:
            values = values.sign() * 0.5  # hardly any values but ties
        elif kind == 2:
            values = torch.where(torch.rand(values.shape, generator=self.generator) < 0.7, 0.0, values)
        elif kind in (3, 4):
            odd = {3: (torch.inf, -torch.inf), 4: (torch.inf, torch.nan)}[kind]
            for value in odd:
                values[torch.rand(values.shape, generator=self.generator) < 0.1] = value
        elif kind == 5:
            values = -values.abs() * torch.tensor([0.0, 1.0])[torch.arange(self.width) % 2]  # -0.0 among them
        return values.masked_fill(~self.mask, torch.nan)

    def signal(self, number: int, plain: bool) -> Signal:
        applies = torch.rand(len(self.mask), generator=self.generator) < 0.7
        share = self.whole(0, 9)
        return Signal(
            values=self.scores(plain),
            baseline=self.scores(plain) if self.whole(0, 1) else None,
            absolute=bool(self.whole(0, 1)),
            applies=applies if self.whole(0, 1) else None,
            ratio=[0.0, 1.0, 0.2, 0.3, 0.45, 0.71, 0.05, 0.5, 0.2, 0.25][share],
            weight=[1.0, 0.5, 0.25][number],
        )

    def score(self, number: int) -> torch.Tensor:
        signal = self.signals[number]
        score = signal.values if signal.baseline is None else signal.values - signal.baseline
        return score.abs() if signal.absolute else score

    def valid(self, number: int) -> torch.Tensor:
        applies = self.signals[number].applies
        return self.mask if applies is None else self.mask & applies[:, None]

    def parts(self, number: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """For each segment its valid places [B, T] and their scores."""
        for segment in self.ids.unique():
            places = self.valid(number) & (self.ids == segment)[:, None]
            yield places, self.score(number)[places]


def by_quantile(case: Case, number: int) -> torch.Tensor:
    """What torch.quantile selects, segment by segment."""
    expected = torch.zeros_like(case.mask)
    ratio = case.signals[number].ratio
    for places, scores in case.parts(number):
        if len(scores) and ratio > 0:
            expected[places] = scores >= torch.quantile(scores, 1.0 - ratio)
    return expected


@pytest.mark.parametrize("plan", PLANS)
def test_quantile_selects_what_torch_quantile_selects(plan: str, run_plan: Run) -> None:
    compared = 0
    for seed in range(CASES[plan]):
        case = Case(seed)
        found = run_plan(plan, case.signals, case.mask, Segments.of(case.ids))
        for number in range(len(case.signals)):
            expected, valid = by_quantile(case, number), case.valid(number)
            assert torch.equal(found.selected[number], expected), (seed, number)
            assert torch.equal(found.valid[number], valid), (seed, number)
            score = case.score(number).masked_fill(~valid, 0.0)
            torch.testing.assert_close(found.scores[number], score, rtol=0, atol=0, equal_nan=True)
            for part, (_, scores) in enumerate(case.parts(number)):
                _check_threshold(found.thresholds[part, number], scores, case.signals[number].ratio)
                compared += 1
    assert compared > 3 * CASES[plan]


def _check_threshold(threshold: torch.Tensor, scores: torch.Tensor, ratio: float) -> None:
    if len(scores) == 0 or ratio == 0.0:
        assert threshold.isnan()
    else:
        expected = torch.quantile(scores, 1.0 - ratio)
        torch.testing.assert_close(threshold, expected, rtol=1e-6, atol=1e-30, equal_nan=True)


def mix(x: np.ndarray) -> np.ndarray:
    """MurmurHash3's finalizer in numpy's own 32-bit arithmetic."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(2246822507)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(3266489909)
    return x ^ (x >> np.uint32(16))


def by_count(case: Case, number: int, seed: int, row_keys: list[int]) -> np.ndarray:
    """The exact count in numpy and Python's fractions, one token after the other."""
    expected = np.zeros(tuple(case.mask.shape), dtype=bool)
    ratio = Fraction(str(case.signals[number].ratio))
    scores = case.score(number).numpy()
    for places, values in case.parts(number):
        if bool(values.isnan().any()):
            continue
        tokens = [tuple(place) for place in places.nonzero().tolist()]
        hashes = mix(mix(np.array([row_keys[i] << 16 | t for i, t in tokens], np.uint32)) ^ np.uint32(seed))
        best = sorted(zip(tokens, hashes, strict=True), key=lambda pair: (-scores[pair[0]], -int(pair[1])))
        for token, _ in best[: math.ceil(ratio * len(tokens))]:
            expected[token] = True
    return expected


@pytest.mark.parametrize("plan", PLANS)
def test_count_selects_exactly_so_many_and_breaks_ties_by_hash(plan: str, run_plan: Run) -> None:
    for seed in range(CASES[plan] // 2):
        case = Case(seed)
        keys = torch.randperm(60000, generator=case.generator)[: len(case.mask)]
        dice = case.whole(0, 2**32 - 1)
        options = {"rule": "count", "seed": dice, "row_keys": keys}
        found = run_plan(plan, case.signals, case.mask, Segments.of(case.ids), **options)
        for number in range(len(case.signals)):
            expected = by_count(case, number, dice, keys.tolist())
            np.testing.assert_array_equal(
                found.selected[number].numpy(), expected, err_msg=f"{seed} {number}"
            )


@pytest.mark.parametrize("plan", [plan for plan in PLANS if plan != "reference"])
@pytest.mark.parametrize("rule", ["quantile", "count"])
def test_kernels_agree_with_the_reference_in_everything(plan: str, rule: str, run_plan: Run) -> None:
    for seed in range(100, 100 + CASES[plan] // 4 + 1):
        case = Case(seed)
        options = {
            "rule": rule,
            "floor": 0.1 if seed % 3 == 0 else None,
            "rewards": case.rewards,
            "groups": Segments.of(case.groups),
            "epsilon": 1e-4,
            "divide_by_std": seed % 2 == 0,
        }
        arguments = (case.signals, case.mask, Segments.of(case.ids))
        found, expected = (run_plan(name, *arguments, **options) for name in (plan, "reference"))
        for name in RESULTS:
            close = {"rtol": 2e-6, "atol": 1e-6} if "advantage" in name else {"rtol": 1e-6, "atol": 0.0}
            one, other = getattr(found, name), getattr(expected, name)
            torch.testing.assert_close(one, other, **close, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("plan", PLANS)
def test_the_same_tokens_are_lucky_wherever_their_row_stands(plan: str, run_plan: Run) -> None:
    """All scores equal: only the hash decides. Another seed decides otherwise."""
    mask = ragged([9, 4, 12, 7], 12)
    signal = Signal(values=torch.zeros(4, 12), ratio=0.5)
    order, keys = torch.tensor([2, 0, 3, 1]), torch.tensor([11, 5, 900, 0])

    def chosen(rows: torch.Tensor, seed: int) -> torch.Tensor:
        options = {"rule": "count", "seed": seed, "row_keys": keys[rows]}
        return run_plan(
            plan, [signal], mask[rows], Segments.of(torch.zeros(4)[rows].int()), **options
        ).selected[0]

    first = chosen(torch.arange(4), 3)
    assert int(first.sum()) == 16
    assert torch.equal(chosen(order, 3), first[order])
    assert not torch.equal(chosen(torch.arange(4), 4), first)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("scope", SCOPES)
def test_permuting_rows_permutes_everything(plan: str, scope: str, run_plan: Run) -> None:
    case = Case(31, scope)
    order = torch.randperm(len(case.mask), generator=case.generator)
    keys = torch.arange(len(case.mask))

    def run(rows: torch.Tensor, rule: str) -> Selection:
        signals = [
            dataclasses.replace(
                signal,
                values=signal.values[rows],
                baseline=None if signal.baseline is None else signal.baseline[rows],
                applies=None if signal.applies is None else signal.applies[rows],
            )
            for signal in case.signals
        ]
        options = {"rule": rule, "row_keys": keys[rows], "rewards": case.rewards[rows]}
        groups = Segments.of(case.groups[rows])
        return run_plan(plan, signals, case.mask[rows], Segments.of(case.ids[rows]), groups=groups, **options)

    for rule in ("quantile", "count"):
        plain, moved = run(keys, rule), run(order, rule)
        for name in ("scores", "valid", "selected"):
            assert torch.equal(getattr(plain, name)[:, order].nan_to_num(), getattr(moved, name).nan_to_num())
        assert torch.equal(plain.weights[order], moved.weights)
        torch.testing.assert_close(plain.advantages[order], moved.advantages, rtol=1e-6, atol=1e-6)
        for name in ("thresholds", "counts", "totals"):
            torch.testing.assert_close(
                getattr(plain, name), getattr(moved, name), rtol=0, atol=0, equal_nan=True
            )


@pytest.mark.parametrize("plan", PLANS)
def test_padding_changes_nothing(plan: str, run_plan: Run) -> None:
    case = Case(8, "group")
    width = case.mask.shape[1]

    def widened(tensor: torch.Tensor | None) -> torch.Tensor | None:
        filler = False if tensor is not None and tensor.dtype == torch.bool else torch.nan
        return None if tensor is None else torch.nn.functional.pad(tensor, (0, 19), value=filler)

    signals = [
        dataclasses.replace(signal, values=widened(signal.values), baseline=widened(signal.baseline))
        for signal in case.signals
    ]
    for rule in ("quantile", "count"):
        narrow = run_plan(plan, case.signals, case.mask, Segments.of(case.ids), rule=rule)
        wide = run_plan(plan, signals, widened(case.mask), Segments.of(case.ids), rule=rule)
        for name in ("scores", "valid", "selected", "weights"):
            assert torch.equal(
                getattr(narrow, name).nan_to_num(), getattr(wide, name)[..., :width].nan_to_num()
            )
            assert not bool(getattr(wide, name)[..., width:].any())
        for name in ("thresholds", "counts", "totals"):
            torch.testing.assert_close(
                getattr(narrow, name), getattr(wide, name), rtol=0, atol=0, equal_nan=True
            )


@pytest.mark.parametrize("plan", PLANS)
def test_the_first_signal_gives_the_weight(plan: str, run_plan: Run) -> None:
    """ToR by hand: reasoning tokens count 1, perception tokens that are not reasoning ones 0.5."""
    entropy = torch.tensor([[4.0, 3.0, 2.0, 1.0, 0.0, 0.0], [0.0, 0.5, 0.0, 0.0, 0.0, 0.0]])
    visual = torch.tensor([[0.0, 9.0, 0.0, 8.0, 0.0, 0.0], [0.0, 0.0, -7.0, 0.0, 0.0, 0.0]])
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 3:] = False
    signals = [
        Signal(values=entropy, ratio=1 / 3, weight=1.0),  # 3 of 9
        Signal(values=visual, absolute=True, ratio=1 / 3, weight=0.5),
    ]
    together = Segments.of(torch.zeros(2, dtype=torch.long))
    found = run_plan(plan, signals, mask, together, rule="count", notable=7.0)
    assert found.weights.tolist() == [[1.0, 1.0, 1.0, 0.5, 0, 0], [0, 0, 0.5, 0, 0, 0]]
    assert dict(zip(TOTALS, found.totals[0].tolist(), strict=True)) == {
        "tokens": 9,
        "selected": 5,
        "responses": 2,
        "unselected_responses": 0,
    }
    assert dict(zip(COUNTS, found.counts[0, 1].tolist(), strict=True)) == {
        "valid": 9,
        "selected": 3,
        "non_finite": 0,
        "notable": 2,  # above 7
    }


def advantages_in_float64(rewards: np.ndarray, ids: np.ndarray, epsilon: float, by_std: bool) -> np.ndarray:
    expected = np.zeros(len(rewards))
    for group in np.unique(ids):
        own = rewards[ids == group].astype(np.float64)
        mean, std = (own.mean(), own.std(ddof=1)) if len(own) > 1 else (0.0, 1.0)
        value = (own - mean) / (std + epsilon) if by_std else own - mean
        expected[ids == group] = 0.0 if len(own) > 1 and (own == own[0]).all() else value
    return expected


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("by_std", [True, False])
def test_advantages_against_float64(plan: str, by_std: bool, run_plan: Run) -> None:
    """Interleaved groups of one to five, one of equal rewards that float32 cannot name, one of large ones."""
    ids = torch.tensor([4, 1, 4, 2, 1, 4, 3, 2, 4, 2, 4, 5, 5])
    rewards = torch.tensor([0.5, 0.1, 1.7, 0.1, 0.1, 0.0, 0.3, 0.1, 1.0, 0.1, 0.25, 1000.25, 1000.5])
    mask = ragged([3, 0, 2, 5, 4, 1, 2, 3, 3, 2, 1, 2, 2], 5)
    weight_of = Signal(values=torch.randn(13, 5), ratio=0.6, weight=0.5)
    options = {"rewards": rewards, "groups": Segments.of(ids), "epsilon": 1e-4, "divide_by_std": by_std}
    found = run_plan(plan, [weight_of], mask, Segments.of(torch.zeros(13).int()), **options)
    expected = advantages_in_float64(rewards.numpy(), ids.numpy(), 1e-4, by_std)
    assert found.response_advantages is not None and found.advantages is not None
    np.testing.assert_allclose(found.response_advantages.numpy(), expected, rtol=2e-6, atol=1e-6)
    assert found.response_advantages[[3, 7, 9, 1, 4]].tolist() == [0.0] * 5
    tokens = found.weights.double().numpy() * expected[:, None]
    np.testing.assert_allclose(found.advantages.numpy(), tokens, rtol=2e-6, atol=1e-6)
    assert set(found.weights.unique().tolist()) == {0.0, 0.5}


@pytest.mark.parametrize("plan", PLANS)
def test_a_reward_of_nan_reaches_its_group_and_no_other(plan: str, run_plan: Run) -> None:
    rewards, ids = torch.tensor([1.0, torch.nan, 1.0, 0.0, 2.0]), torch.tensor([0, 0, 0, 1, 1])
    signal = Signal(values=torch.zeros(5, 2), ratio=1.0)
    mask, segments = torch.ones(5, 2, dtype=torch.bool), Segments.of(torch.arange(5))
    found = run_plan(plan, [signal], mask, segments, rewards=rewards, groups=Segments.of(ids))
    assert found.response_advantages is not None
    assert found.response_advantages.isnan().tolist() == [True, True, True, False, False]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("rule", ["quantile", "count"])
def test_degenerate_batches(plan: str, rule: str, run_plan: Run) -> None:
    """No row, no token, nothing but padding, and a single token."""
    for size, width in ((0, 3), (3, 0), (2, 3), (1, 1)):
        mask = torch.zeros(size, width, dtype=torch.bool) if size != 1 else torch.ones(1, 1, dtype=torch.bool)
        signal = Signal(values=torch.full((size, width), 0.25), ratio=0.6)
        ids = torch.zeros(size, dtype=torch.long)
        options = {"rewards": torch.ones(size), "groups": Segments.of(ids)}
        found = run_plan(plan, [signal], mask, Segments.of(ids), rule=rule, **options)
        assert torch.equal(found.selected[0], mask)
        assert int(found.totals.sum()) == (3 if size == 1 else 0)  # one token, selected, in one response
        assert found.response_advantages is not None
        expected = [1.0 / (1.0 + 1e-6)] if size == 1 else [0.0] * size
        assert found.response_advantages.tolist() == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("plan", PLANS)
def test_nan_selects_nothing_in_its_segment_and_is_counted(plan: str, run_plan: Run) -> None:
    values = torch.tensor([[3.0, torch.nan, 1.0], [5.0, 4.0, torch.inf], [2.0, 1.0, 0.0]])
    signal = Signal(values=values, ratio=1 / 3)
    for rule, second in (("quantile", [False, False, True]), ("count", [False, False, True])):
        found = run_plan(plan, [signal], torch.ones(3, 3).bool(), Segments.of(torch.arange(3)), rule=rule)
        assert found.selected[0].tolist() == [[False] * 3, second, [True, False, False]]
        assert found.count("non_finite")[:, 0].tolist() == [1, 1, 0]
        assert found.total("unselected_responses").tolist() == [1, 0, 0]
        assert found.thresholds[:, 0].isnan().tolist() == [True, False, False]


@pytest.mark.parametrize("plan", [plan for plan in PLANS if plan != "reference"])
@pytest.mark.usefixtures("poisoned_memory")
def test_every_place_is_written(plan: str, run_plan: Run) -> None:
    """Memory that nobody has written holds NaN, and the largest whole number."""
    case = Case(14, "group", plain=True)
    options = {"rewards": case.rewards, "groups": Segments.of(case.groups)}
    arguments = (case.signals, case.mask, Segments.of(case.ids))
    for rule in ("quantile", "count"):
        found, expected = (run_plan(name, *arguments, rule=rule, **options) for name in (plan, "reference"))
        for name in RESULTS:
            one, other = getattr(found, name), getattr(expected, name)
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, equal_nan=name == "thresholds")


@pytest.mark.parametrize("plan", [plan for plan in PLANS if plan != "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_subtracted_in_float32(plan: str, dtype: torch.dtype, run_plan: Run) -> None:
    values, baseline = (torch.randn(3, 10).to(dtype) for _ in range(2))
    signal = Signal(values=values, baseline=baseline, ratio=0.3)
    found = run_plan(plan, [signal], torch.ones(3, 10).bool(), Segments.of(torch.zeros(3).int()))
    difference = values.float() - baseline.float()
    assert torch.equal(found.scores[0], difference)
    assert torch.equal(found.selected[0], difference >= torch.quantile(difference.flatten(), 1.0 - 0.3))


@pytest.mark.parametrize("plan", PLANS)
def test_views_with_gaps_between_rows_are_read_in_place(plan: str, run_plan: Run) -> None:
    wide = torch.randn(4, 20)
    signal = Signal(values=wide[:, ::2], baseline=wide.T.contiguous().T[:, 1::2], ratio=0.4)
    mask = torch.ones(20, 4).bool().T[:, :10]
    found = run_plan(plan, [signal], mask, Segments.of(torch.arange(4)))
    assert torch.equal(found.scores[0], wide[:, ::2] - wide[:, 1::2])


def test_the_reference_keeps_float64() -> None:
    """Differences that float32 cannot see decide."""
    values = 1.0 + torch.arange(10, dtype=torch.float64)[None] * 1e-12
    found = select(
        [Signal(values=values, ratio=0.2)], torch.ones(1, 10).bool(), Segments.of(torch.zeros(1).int())
    )
    assert found.scores.dtype == found.thresholds.dtype == torch.float64
    assert found.selected[0, 0].tolist() == [False] * 8 + [True] * 2


@pytest.mark.parametrize("size", [1, 2, 3, 10, 101, 4097])
def test_the_large_quantile_equals_torch(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(size, dtype=torch.float64)
    for ratio in (0.0, 0.1, 0.23, 0.2, 0.5, 0.7, 0.9, 1.0):
        expected = torch.quantile(values, 1.0 - ratio)
        monkeypatch.setattr(reference, "TORCH_QUANTILE_LIMIT", 0)
        torch.testing.assert_close(reference.quantile(values, ratio), expected, rtol=1e-14, atol=1e-14)
        monkeypatch.undo()


def test_torch_really_refuses_more_than_the_limit() -> None:
    over = torch.zeros(reference.TORCH_QUANTILE_LIMIT + 1)
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(over, 0.5)
    over[-1] = 3.0
    assert float(reference.quantile(over, 1e-9)) > 0.0
    assert float(reference.quantile(over, 0.5)) == 0.0


@pytest.mark.parametrize("plan", ["fused", "resident", "radix"])
def test_ranks_beyond_float32_agree_with_the_reference(
    plan: str, run_plan: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same formula for more than 2^24 tokens, on fewer: the limit is moved in both."""
    monkeypatch.setattr(reference, "TORCH_QUANTILE_LIMIT", 2)
    monkeypatch.setitem(PLANS, plan, {**PLANS[plan], "float_ranks": 2})
    for seed in range(3):
        case = Case(seed, plain=True)
        arguments = (case.signals, case.mask, Segments.of(case.ids))
        found, expected = (run_plan(name, *arguments) for name in (plan, "reference"))
        assert torch.equal(found.selected, expected.selected)
        torch.testing.assert_close(found.thresholds, expected.thresholds, rtol=1e-6, atol=0, equal_nan=True)


def test_the_largest_number_of_32_bit_ranks() -> None:
    assert reference.kept_count(2**31 - 1, 1.0) == 2**31 - 1
    assert [reference.kept_count(5, ratio) for ratio in (0.0, 0.1, 0.3, 0.7, 0.5, 0.6)] == [0, 1, 2, 4, 3, 3]
    assert [reference.kept_count(9, part / 9) for part in range(10)] == list(range(10))


LAUNCHES = [
    ("fused", "quantile", 1),
    ("fused", "count", 1),
    ("resident", "quantile", 2),
    ("resident", "count", 2),
]
LAUNCHES += [("radix", "quantile", 4), ("radix", "count", 7)]


@pytest.mark.parametrize(("plan", "rule", "expected"), LAUNCHES)
def test_launches_are_few_and_nobody_waits(
    plan: str, rule: str, expected: int, run_plan: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels are replaced by a counter: whatever is read from a tensor now would stall a GPU."""
    from torch.utils._python_dispatch import TorchDispatchMode

    kernels = pytest.importorskip("keytoken_kernels.selection.triton")
    launched: list[str] = []

    class Counter:
        """Counts launches, and refuses arguments that the compiler would refuse."""

        def __init__(self, name: str, kernel: Any) -> None:
            self.name, self.arguments = name, set(kernel.arg_names)

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            assert all(size > 0 for size in grid)
            return self.launch

        def launch(self, **given: Any) -> None:
            assert set(given) - {"num_warps", "enable_fp_fusion", "maxnreg"} == self.arguments
            launched.append(self.name)

    class NoReading(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert "_local_scalar_dense" not in str(func) and "nonzero" not in str(func), func
            return func(*args, **(kwargs or {}))

    for module, name in (
        (kernels, "fused_kernel"),
        (kernels, "threshold_kernel"),
        (kernels, "apply_kernel"),
        (kernels.radix, "digit_kernel"),
    ):
        monkeypatch.setattr(module, name, Counter(name, getattr(module, name)))
    case = Case(6, "group")
    segments, groups = Segments.of(case.ids), Segments.of(case.groups)
    with NoReading():
        run_plan(plan, case.signals, case.mask, segments, rule=rule, rewards=case.rewards, groups=groups)
    assert len(launched) == expected
    assert launched[-1] == ("fused_kernel" if plan == "fused" else "apply_kernel")


def bad_calls() -> Iterator[tuple[dict[str, Any], str]]:
    """Changes to a good call, and what the message must say."""
    values, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    signal = functools.partial(Signal, values=values, ratio=0.2)
    ids = Segments.of(torch.zeros(2, dtype=torch.long))
    yield {"mask": mask.int()}, "mask must be bool"
    yield {"mask": mask[0]}, "mask must be bool"
    yield {"signals": []}, "1 to 3 signals"
    yield {"signals": [signal()] * 4}, "1 to 3 signals"
    yield (
        {"signals": [signal(), signal(values=values[:, :2])]},
        r"signal 1: values must have the shape \[2, 3\]",
    )
    yield {"signals": [signal(values=values.int())]}, "signal 0: values must hold floats"
    yield {"signals": [signal(baseline=values[:1])]}, "signal 0: baseline must have the shape"
    yield {"signals": [signal(baseline=values.to("meta"))]}, "baseline is on meta and the mask on cpu"
    yield {"signals": [signal(applies=mask)]}, "signal 0: applies must have the shape"
    yield {"signals": [signal(applies=torch.ones(2))]}, "applies must be bool"
    yield {"signals": [signal(ratio=1.2)]}, r"ratio must lie in \[0, 1\]; got 1.2"
    yield {"signals": [signal(ratio=float("nan"))]}, "ratio must lie"
    yield {"signals": [signal(weight=0.0)]}, "weight must be above 0"
    yield {"rule": "top"}, "rule must be"
    yield {"segments": Segments.of(torch.zeros(3).int())}, "segments hold 3 rows and the mask 2"
    yield {"floor": float("nan")}, "floor must be finite"
    yield {"epsilon": -1.0}, "epsilon must be finite"
    yield {"rewards": torch.zeros(2)}, "rewards and groups go together"
    yield {"groups": ids}, "rewards and groups go together"
    yield {"rewards": torch.zeros(3), "groups": ids}, "rewards must have the shape"
    yield {"rewards": torch.zeros(2).int(), "groups": ids}, "rewards must hold floats"
    yield {"rewards": torch.zeros(2), "groups": Segments.of(torch.zeros(3).int())}, "groups hold 3 rows"
    yield {"rule": "count", "row_keys": torch.tensor([1, 1])}, "all be different"
    yield {"rule": "count", "row_keys": torch.tensor([1, 65536])}, "row_keys must lie in"
    yield {"rule": "count", "row_keys": torch.tensor([-1, 0])}, "row_keys must lie in"
    yield {"rule": "count", "row_keys": torch.tensor([1.0, 2.0])}, "row_keys must be integers"
    yield {"rule": "count", "row_keys": torch.tensor([1])}, "row_keys must be integers"
    yield {"impl": "cuda"}, "impl must be one of"


@pytest.mark.parametrize(("changes", "message"), list(bad_calls()))
def test_bad_input_is_named(changes: dict[str, Any], message: str) -> None:
    call: dict[str, Any] = {
        "signals": [Signal(values=torch.zeros(2, 3), ratio=0.2)],
        "mask": torch.ones(2, 3, dtype=torch.bool),
        "segments": Segments.of(torch.zeros(2, dtype=torch.long)),
    }
    select(**call)
    with pytest.raises(ValueError, match=message):
        select(**(call | changes))


def test_what_the_kernels_cannot_take_is_named() -> None:
    pytest.importorskip("keytoken_kernels.selection.triton")
    mask, segments = torch.ones(1, 3, dtype=torch.bool), Segments.of(torch.zeros(1).int())
    double = Signal(values=torch.zeros(1, 3, dtype=torch.float64), ratio=0.2)
    with pytest.raises(ValueError, match=r"got torch.float64. .*impl='reference'"):
        select([double], mask, segments, impl="triton")
    huge = torch.zeros(1, 1, dtype=torch.bool).expand(2**16, 2**15)
    values = torch.zeros(1, 1).expand(2**16, 2**15)
    many = Segments.of(torch.zeros(2**16, dtype=torch.long))
    with pytest.raises(ValueError, match="32-bit offsets"):
        select([Signal(values=values, ratio=0.2)], huge, many, impl="triton")
    wide = torch.zeros(1, 1, dtype=torch.bool).expand(1, 2**16 + 1)
    with pytest.raises(ValueError, match="rule='count' takes up to 65536"):
        select([Signal(values=wide.float(), ratio=0.2)], wide, segments, rule="count")


@pytest.mark.parametrize("ids", [torch.zeros(2), torch.zeros(2, 2).int(), torch.zeros(2).int().to("meta")])
def test_segments_need_integers_on_the_cpu(ids: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"integers \[B\] on the CPU"):
        Segments.of(ids)
