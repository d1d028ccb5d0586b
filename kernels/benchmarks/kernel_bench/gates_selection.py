"""Gates of the selection: equal to ``torch.quantile`` on the same scores, exact counts, advantages, bits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction

import torch
from torch import Tensor

from kernel_bench import inputs
from kernel_bench.operators import Operators
from kernel_bench.sizes import Sizes
from kernel_bench.verdicts import Verdict, holds, largest_error, same_bits, within
from keytoken_kernels.selection import Selection

EPSILON = 1e-6  # the default of select
ADVANTAGE_ERROR = 2e-5


def selected_sets(operators: Operators, sizes: Sizes, device: torch.device) -> Iterator[Verdict]:
    """Which tokens, and everything that is written beside them, at every scope."""
    for number, scope in enumerate(inputs.SCOPES):
        name = f"K2 {scope} scope"
        given = _inputs(sizes, device, scope, seed=10 + number)
        found = _select(operators, given)
        yield holds(f"{name}: scores", ~_same(found.scores, _scores(given)))
        expected, thresholds = _expected(found.scores, given)
        yield holds(f"{name}: selected as by torch.quantile", found.selected != expected)
        yield holds(f"{name}: thresholds", ~torch.isclose(found.thresholds, thresholds, equal_nan=True))
        yield holds(f"{name}: weights", found.weights != _weights(expected, given))
        yield from _advantages(name, found, given)
        yield from _counts(name, found, given)


def selected_bits(operators: Operators, sizes: Sizes, device: torch.device) -> Iterator[Verdict]:
    """Two runs, and the rows in another order, give the same bits."""
    for number, scope in enumerate(inputs.SCOPES):
        given = _inputs(sizes, device, scope, seed=20 + number)
        for rule in ("quantile", "count"):
            name = f"K2 {scope} scope, {rule}"
            found, again = (_select(operators, given, rule=rule, row_keys=given.row_keys) for _ in range(2))
            yield same_bits(f"{name}: two runs, same bits", _written(found), _written(again))
            order = torch.randperm(len(given.mask), generator=torch.Generator().manual_seed(number))
            moved = given.permuted(order)
            other = _select(operators, moved, rule=rule, row_keys=moved.row_keys)
            there = order.to(device)
            yield same_bits(
                f"{name}: rows permuted, same bits",
                [other.selected, other.weights],
                [found.selected[:, there], found.weights[there]],
            )


def exact_counts(operators: Operators, sizes: Sizes, device: torch.device) -> Iterator[Verdict]:
    """The rule ``count``: as many as asked for, none of them below one that was left out."""
    for number, scope in enumerate(inputs.SCOPES):
        given = _inputs(sizes, device, scope, seed=30 + number)
        found = _select(operators, given, rule="count")
        wrong = 0
        for rows in _members(given.segment_ids, device):
            for signal in range(len(given.signals)):
                valid = found.valid[signal, rows]
                scores, chosen = found.scores[signal, rows][valid], found.selected[signal, rows][valid]
                kept = 0 if scores.isnan().any() else math.ceil(Fraction(str(inputs.RATIO)) * len(scores))
                wrong += int(chosen.sum()) != kept
                if 0 < kept < len(scores):
                    wrong += bool(scores[chosen].min() < scores[~chosen].max())
        yield holds(f"K2 {scope} scope, count: exactly the best", wrong)


def _inputs(sizes: Sizes, device: torch.device, scope: str, seed: int) -> inputs.SelectionInputs:
    generator = inputs.generator_of(device, seed)
    return inputs.selection_inputs(sizes.gate_batch, sizes.gate_width, scope, generator, hard=True)


def _select(operators: Operators, given: inputs.SelectionInputs, **options: object) -> Selection:
    return operators.select(
        given.signals, given.mask, given.segments, rewards=given.rewards, groups=given.groups, **options
    )


def _scores(given: inputs.SelectionInputs) -> Tensor:
    scores = []
    for signal in given.signals:
        score = signal.values if signal.baseline is None else signal.values - signal.baseline
        scores.append(score.abs() if signal.absolute else score)
    return torch.stack(scores).where(given.mask, 0.0)


def _expected(scores: Tensor, given: inputs.SelectionInputs) -> tuple[Tensor, Tensor]:
    """Selected [n, B, T] and thresholds [S, n] by torch.quantile, one segment and signal after the other."""
    selected = torch.zeros_like(scores, dtype=torch.bool)
    members = _members(given.segment_ids, scores.device)
    thresholds = scores.new_full((len(members), len(scores)), torch.nan)
    for segment, rows in enumerate(members):
        for signal, ratio in enumerate(each.ratio for each in given.signals):
            values = scores[signal, rows][given.mask[rows]]
            if len(values):
                thresholds[segment, signal] = torch.quantile(values, 1 - ratio)
            reached = scores[signal, rows] >= thresholds[segment, signal]
            selected[signal, rows] = reached & given.mask[rows]
    return selected, thresholds


def _members(ids: Tensor, device: torch.device) -> list[Tensor]:
    return [(ids == each).nonzero().squeeze(1).to(device) for each in ids.unique()]


def _weights(selected: Tensor, given: inputs.SelectionInputs) -> Tensor:
    weights = torch.zeros(given.mask.shape, device=selected.device)
    for chosen, signal in zip(selected, given.signals, strict=True):
        weights = torch.where(chosen & (weights == 0), signal.weight, weights)
    return weights


def _advantages(name: str, found: Selection, given: inputs.SelectionInputs) -> Iterator[Verdict]:
    rewards = given.rewards.double()
    expected = torch.zeros_like(rewards)
    for rows in _members(given.group_ids, rewards.device):
        own = rewards[rows]
        if len(own) == 1:
            expected[rows] = own / (1.0 + EPSILON)
        elif bool((own != own[0]).any()):
            expected[rows] = (own - own.mean()) / (own.std() + EPSILON)
    assert found.advantages is not None and found.response_advantages is not None
    error = largest_error(found.response_advantages, expected)
    yield within(f"{name}: advantages of answers", error, ADVANTAGE_ERROR)
    masked = found.weights.double() * expected[:, None]
    yield within(f"{name}: masked advantages", largest_error(found.advantages, masked), ADVANTAGE_ERROR)


def _counts(name: str, found: Selection, given: inputs.SelectionInputs) -> Iterator[Verdict]:
    wrong = 0
    for segment, rows in enumerate(_members(given.segment_ids, found.weights.device)):
        valid, selected = given.mask[rows].sum(), found.selected[:, rows].sum((1, 2))
        wrong += int((found.count("valid")[segment] != valid).sum())
        wrong += int((found.count("selected")[segment] != selected).sum())
        odd = (~found.scores[:, rows].isfinite()).sum((1, 2))
        wrong += int((found.count("non_finite")[segment] != odd).sum())
        wrong += int(found.total("tokens")[segment]) != int(valid)
        wrong += int(found.total("selected")[segment]) != int((found.weights[rows] != 0).sum())
    yield holds(f"{name}: counts", wrong)


def _same(a: Tensor, b: Tensor) -> Tensor:
    """Equal, or both NaN."""
    return (a == b) | (a.isnan() & b.isnan())


def _written(found: Selection) -> list[Tensor]:
    """All that a launch writes."""
    results = [found.scores, found.valid, found.selected, found.weights, found.thresholds]
    assert found.advantages is not None and found.response_advantages is not None
    return [*results, found.advantages, found.response_advantages, found.counts, found.totals]
