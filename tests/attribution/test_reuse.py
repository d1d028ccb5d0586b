"""Remembered scores, against means taken token by token in Python."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable
from statistics import fmean

import pytest
import torch

from keytoken.attribution.reuse import ScoreMemory
from keytoken.attribution.types import Signals
from keytoken.errors import ConfigurationError

Build = Callable[..., Signals]


def with_tokens(signals: Signals, seed: int) -> Signals:
    """Ids from a small vocabulary; padding holds ids that occur nowhere else."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 6, signals.mask.shape, generator=generator)
    return dataclasses.replace(signals, tokens=ids.masked_fill(~signals.mask, 99))


def unscored(signals: Signals) -> Signals:
    return dataclasses.replace(signals, logp_masked=None, logp_shuffled=None)


def test_a_token_scores_what_its_id_scored_on_average(ragged_signals: Build) -> None:
    scored = with_tokens(ragged_signals([9, 3, 14, 1], [0, 0, 1, 1]), seed=1)
    scored = dataclasses.replace(scored, has_temporal=torch.tensor([True, True, False, False]))
    assert scored.tokens is not None and scored.logp_shuffled is not None and scored.logp_masked is not None
    scored.logp_shuffled[2:] = torch.nan  # rows that have no such view
    differences: dict[int, list[float]] = defaultdict(list)
    for row, column in scored.mask.nonzero().tolist():
        differences[int(scored.tokens[row, column])].append(
            float(scored.logp[row, column] - scored.logp_masked[row, column])
        )
    memory = ScoreMemory()
    assert memory.complete(scored).logp_masked is scored.logp_masked
    later = with_tokens(ragged_signals([5, 8], [0, 0], seed=3), seed=4)
    found = memory.complete(unscored(later))
    assert found.logp_masked is not None and found.logp_shuffled is not None and later.tokens is not None
    for row, column in later.mask.nonzero().tolist():
        seen = differences.get(int(later.tokens[row, column]), [0.0])
        score = float(found.logp[row, column] - found.logp_masked[row, column])
        assert abs(score - fmean(seen)) < 1e-5
    assert bool(found.logp_shuffled[later.mask].isfinite().all())


def test_an_id_that_was_never_seen_scores_nothing(ragged_signals: Build) -> None:
    memory = ScoreMemory()
    memory.complete(with_tokens(ragged_signals([9, 3], [0, 0]), seed=1))
    later = ragged_signals([4, 2], [0, 0], seed=3)
    later = dataclasses.replace(unscored(later), tokens=torch.full(later.mask.shape, 77))
    found = memory.complete(later)
    assert found.logp_masked is not None
    assert torch.equal(found.logp_masked[later.mask], later.logp[later.mask])


def test_the_last_scored_batch_counts(ragged_signals: Build) -> None:
    memory, fresh = ScoreMemory(), ScoreMemory()
    batches = [with_tokens(ragged_signals([9, 3], [0, 0], seed=seed), seed=seed) for seed in (1, 2, 3)]
    for batch in batches[:2]:
        memory.complete(batch)
    fresh.complete(batches[1])
    one, other = memory.complete(unscored(batches[2])), fresh.complete(unscored(batches[2]))
    assert one.logp_masked is not None and other.logp_masked is not None
    assert torch.equal(one.logp_masked[one.mask], other.logp_masked[one.mask])


def test_nothing_is_made_up(ragged_signals: Build) -> None:
    """Without a memory a missing view is an error; a batch of texts is neither learnt from nor filled."""
    memory = ScoreMemory()
    batch = unscored(with_tokens(ragged_signals([9, 3], [0, 0]), seed=1))
    with pytest.raises(ConfigurationError, match="Step 1 runs no passes"):
        memory.complete(batch)
    nowhere = torch.zeros(2, dtype=torch.bool)
    texts = dataclasses.replace(
        with_tokens(ragged_signals([9, 3], [0, 0]), seed=1), has_visual=nowhere, has_temporal=nowhere
    )
    assert memory.complete(unscored(texts)).logp_masked is None
    memory.complete(texts)
    with pytest.raises(ConfigurationError, match="every_steps=1"):
        memory.complete(batch)
