"""Scores: signs, modalities, padding and non-finite values."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from keytoken.attribution.methods import compute_token_weights
from keytoken.attribution.scores import dependence
from keytoken.attribution.types import Signals, TokenWeights
from keytoken.errors import ConfigurationError, NonFiniteError
from keytoken.golden import load_preset
from keytoken.schema import SelectionConfig
from keytoken_kernels.selection import Segments, select

Build = Callable[..., Signals]


def published() -> SelectionConfig:
    selection = load_preset("video_ktr_official").selection
    assert selection is not None
    return selection


def run(signals: Signals, **changes: object) -> TokenWeights:
    """The published method with other values of its selection."""
    method = load_preset("video_ktr_official")
    selection = dataclasses.replace(published(), **changes)  # type: ignore[arg-type]
    return compute_token_weights(signals, dataclasses.replace(method, selection=selection))


@pytest.mark.parametrize(("sign", "expected"), [("signed", [2.0, -0.5, 0.0]), ("absolute", [2.0, 0.5, 0.0])])
def test_signed_and_absolute_by_hand(sign: str, expected: list[float]) -> None:
    logp = torch.tensor([[-1.0, -2.0, -0.5]])
    mask, here = torch.ones(1, 3, dtype=torch.bool), torch.tensor([True])
    signals = Signals(
        logp=logp,
        logp_masked=torch.tensor([[-3.0, -1.5, -0.5]]),
        logp_shuffled=None,
        entropy=logp,
        mask=mask,
        group=torch.tensor([0]),
        has_visual=here,
        has_temporal=~here,
    )
    selection = dataclasses.replace(published(), score_sign=sign)  # type: ignore[arg-type]
    score = dependence("visual", signals, selection)
    assert select([score], mask, Segments.of(signals.group)).scores[0].tolist() == [expected]


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
    result = run(signals, visual_ratio=1.0, temporal_ratio=1.0, entropy_ratio=1.0)
    assert result.masks["visual"].sum(dim=1).tolist() == [3, 5, 1, 0]
    assert result.masks["temporal"].sum(dim=1).tolist() == [3, 5, 0, 0]
    assert result.masks["entropy"].sum(dim=1).tolist() == [3, 5, 1, 4]
    for name, score in result.scores.items():
        assert bool(torch.isfinite(score).all())
        assert bool((score[~result.masks[name]] == 0).all())


def test_a_view_without_effect_scores_zero(ragged_signals: Build) -> None:
    signals = ragged_signals([3, 5], [0, 0])
    signals = dataclasses.replace(signals, logp_masked=signals.logp, logp_shuffled=signals.logp)
    scores = run(signals).scores
    assert bool((scores["visual"] == 0).all())
    assert bool((scores["temporal"] == 0).all())


@pytest.mark.parametrize(
    ("field", "view"),
    [("logp", "real"), ("logp_masked", "masked"), ("logp_shuffled", "shuffled"), ("entropy", "entropy")],
)
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_a_bad_value_names_its_view_and_place(
    ragged_signals: Build, field: str, view: str, value: float
) -> None:
    signals = ragged_signals([3, 5], [0, 0])
    getattr(signals, field)[1, 4] = value
    with pytest.raises(NonFiniteError, match=f"{view}.*{value} at response 1, token 4"):
        run(signals)


def test_bad_values_of_both_views_are_found() -> None:
    """Their difference is NaN as well, where both are infinite."""
    bad = torch.tensor([[-0.5, -torch.inf]])
    signals = Signals(
        logp=bad,
        logp_masked=bad,
        logp_shuffled=None,
        entropy=torch.zeros(1, 2),
        mask=torch.ones(1, 2, dtype=torch.bool),
        group=torch.tensor([0]),
        has_visual=torch.tensor([True]),
        has_temporal=torch.tensor([False]),
    )
    with pytest.raises(NonFiniteError, match="real view: -inf at response 0, token 1"):
        run(signals)


def test_signals_that_are_off_are_not_computed(ragged_signals: Build) -> None:
    signals = dataclasses.replace(ragged_signals([3, 5], [0, 0]), logp_masked=None, logp_shuffled=None)
    assert set(run(signals, visual_ratio=0.0, temporal_ratio=0.0).scores) == {"entropy"}


def test_a_missing_pass_is_refused_only_where_it_is_needed(ragged_signals: Build) -> None:
    signals = dataclasses.replace(ragged_signals([3, 5], [0, 0]), logp_shuffled=None)
    with pytest.raises(ConfigurationError, match=r"temporal_ratio is 0\.2 but the shuffled pass did not run"):
        run(signals)
    images = dataclasses.replace(signals, has_temporal=torch.zeros(2, dtype=torch.bool))
    result = run(images)
    assert not bool(result.masks["temporal"].any()) and not bool(result.scores["temporal"].any())
    assert result.metrics["attribution/temporal/coverage"] == 0.0
