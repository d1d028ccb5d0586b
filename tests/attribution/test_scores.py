"""Scores: signs, modalities, padding and non-finite values."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from keytoken.attribution.scores import compute_scores, dependence
from keytoken.attribution.types import Signals
from keytoken.errors import ConfigurationError, NonFiniteError
from keytoken.schema import SelectionConfig

Build = Callable[..., Signals]


def config(**changes: object) -> SelectionConfig:
    values: dict[str, object] = {"score_sign": "signed", "scope": "group"}
    values |= {"visual_ratio": 0.2, "temporal_ratio": 0.2, "entropy_ratio": 0.2}
    return SelectionConfig(**(values | changes))  # type: ignore[arg-type]


def test_signed_and_absolute_by_hand() -> None:
    logp = torch.tensor([[-1.0, -2.0, -0.5]])
    view = torch.tensor([[-3.0, -1.5, -0.5]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    here = torch.tensor([True])
    assert dependence(logp, view, mask, here, "signed", "masked").values.tolist() == [[2.0, -0.5, 0.0]]
    assert dependence(logp, view, mask, here, "absolute", "masked").values.tolist() == [[2.0, 0.5, 0.0]]


def test_padding_and_other_modalities_are_never_read(ragged_signals: Build) -> None:
    signals = ragged_signals([3, 5, 1, 4], [0, 0, 1, 2])
    signals = dataclasses.replace(
        signals,
        has_visual=torch.tensor([True, True, True, False]),  # the last prompt is text
        has_temporal=torch.tensor([True, True, False, False]),  # the third one is an image
    )
    assert signals.logp_masked is not None and signals.logp_shuffled is not None
    signals.logp_masked[3] = torch.nan
    signals.logp_shuffled[2:] = torch.inf
    scores = compute_scores(signals, config())
    assert scores["visual"].valid.sum(dim=1).tolist() == [3, 5, 1, 0]
    assert scores["temporal"].valid.sum(dim=1).tolist() == [3, 5, 0, 0]
    assert scores["entropy"].valid.sum(dim=1).tolist() == [3, 5, 1, 4]
    for score in scores.values():
        assert bool(torch.isfinite(score.values).all())
        assert bool((score.values[~score.valid] == 0).all())


def test_a_view_without_effect_scores_zero(ragged_signals: Build) -> None:
    signals = ragged_signals([3, 5], [0, 0])
    signals = dataclasses.replace(signals, logp_masked=signals.logp, logp_shuffled=signals.logp)
    scores = compute_scores(signals, config())
    assert bool((scores["visual"].values == 0).all())
    assert bool((scores["temporal"].values == 0).all())


@pytest.mark.parametrize(
    ("field", "view"),
    [("logp", "real"), ("logp_masked", "masked"), ("logp_shuffled", "shuffled"), ("entropy", "entropy")],
)
def test_a_bad_value_names_its_view_and_place(ragged_signals: Build, field: str, view: str) -> None:
    signals = ragged_signals([3, 5], [0, 0])
    getattr(signals, field)[1, 4] = torch.nan
    with pytest.raises(NonFiniteError, match=f"{view}.*response 1, token 4"):
        compute_scores(signals, config())


def test_signals_that_are_off_are_not_computed(ragged_signals: Build) -> None:
    signals = dataclasses.replace(ragged_signals([3, 5], [0, 0]), logp_masked=None, logp_shuffled=None)
    scores = compute_scores(signals, config(visual_ratio=0.0, temporal_ratio=0.0))
    assert set(scores) == {"entropy"}


def test_a_missing_pass_is_refused_only_where_it_is_needed(ragged_signals: Build) -> None:
    signals = dataclasses.replace(ragged_signals([3, 5], [0, 0]), logp_shuffled=None)
    with pytest.raises(ConfigurationError, match="shuffled pass did not run"):
        compute_scores(signals, config())
    images = dataclasses.replace(signals, has_temporal=torch.zeros(2, dtype=torch.bool))
    assert not bool(compute_scores(images, config())["temporal"].valid.any())
