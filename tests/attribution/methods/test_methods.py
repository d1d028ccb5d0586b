"""The registry, GRPO, and Video-KTR on the worked example of the docstrings and on random batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from keytoken.attribution.methods import METHODS, compute_token_weights
from keytoken.attribution.types import Signals
from keytoken.compose import groups
from keytoken.errors import ConfigurationError
from keytoken.golden import load_preset
from keytoken.schema import MethodConfig

Build = Callable[..., Signals]


# dr_grpo alone cannot be read so: it takes the longest answer from the dataset's file.
@pytest.fixture(params=[name for name in groups()["method"] if name != "dr_grpo"])
def preset(request: pytest.FixtureRequest) -> MethodConfig:
    return load_preset(request.param)


def test_every_method_keeps_padding_out(preset: MethodConfig, ragged_signals: Build) -> None:
    signals = ragged_signals([9, 3, 14, 1], [0, 0, 1, 1])
    result = compute_token_weights(signals, preset)
    assert preset.name in METHODS
    assert torch.equal(result.selected, result.weights > 0)
    assert not bool(result.weights[~signals.mask].any())
    assert bool(torch.isfinite(result.weights).all())
    assert 0.0 < result.metrics["attribution/selected_share"] <= 1.0
    assert all(name.startswith(("attribution/", "kernels/")) for name in result.metrics)


def test_unknown_methods_are_refused_with_the_closest_name(ragged_signals: Build) -> None:
    config = dataclasses.replace(load_preset("grpo"), name="video_ktr_offical")
    with pytest.raises(ConfigurationError, match="Did you mean 'video_ktr_official'"):
        compute_token_weights(ragged_signals([2], [0]), config)


def test_grpo_refuses_a_selection_that_it_would_ignore(ragged_signals: Build) -> None:
    config = dataclasses.replace(load_preset("grpo"), selection=load_preset("video_ktr").selection)
    with pytest.raises(ConfigurationError, match=r"selection=null"):
        compute_token_weights(ragged_signals([2], [0]), config)


def test_the_worked_example_of_the_docstring() -> None:
    signals = Signals(
        logp=torch.tensor([[-0.1, -1.2, -0.3], [-0.2, -0.9, 0.0]]),
        logp_masked=torch.tensor([[-0.1, -3.0, -0.3], [-0.2, -0.8, 0.0]]),
        logp_shuffled=torch.tensor([[-0.1, -1.3, -0.3], [-0.2, -2.0, 0.0]]),
        entropy=torch.tensor([[0.3, 1.1, 0.2], [0.5, 1.0, 0.0]]),
        mask=torch.tensor([[True, True, True], [True, True, False]]),
        group=torch.tensor([7, 7]),
        has_visual=torch.tensor([True, True]),
        has_temporal=torch.tensor([True, True]),
    )
    result = compute_token_weights(signals, load_preset("video_ktr_official"))
    assert result.weights.tolist() == [[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]]
    assert result.masks["visual"].tolist() == [[False, True, False], [False, False, False]]
    assert result.masks["temporal"].tolist() == [[False, False, False], [False, True, False]]
    assert result.masks["entropy"].tolist() == [[False, True, False], [False, False, False]]
    assert float(result.scores["visual"][0, 1]) == pytest.approx(1.8)
    assert result.metrics["attribution/selected_share"] == pytest.approx(0.4)


def test_signed_scores_never_select_what_the_video_made_less_likely() -> None:
    """One token with a large negative difference: the paper's rule keeps it, the code's does not."""
    zeros = torch.zeros(1, 10)
    signals = Signals(
        logp=zeros,
        logp_masked=torch.tensor([[0.5, *[-0.01 * t for t in range(9)]]]),
        logp_shuffled=zeros,
        entropy=zeros,
        mask=torch.ones(1, 10, dtype=torch.bool),
        group=torch.tensor([0]),
        has_visual=torch.tensor([True]),
        has_temporal=torch.tensor([False]),
    )
    paper = compute_token_weights(signals, load_preset("video_ktr"))
    code = compute_token_weights(signals, load_preset("video_ktr_official"))
    assert bool(paper.masks["visual"][0, 0])
    assert not bool(code.masks["visual"][0, 0])


def test_answers_of_other_prompts_do_not_matter_in_group_scope(ragged_signals: Build) -> None:
    signals = ragged_signals([9, 3, 14, 5], [0, 0, 1, 1])
    config = load_preset("video_ktr_official")
    before = compute_token_weights(signals, config).selected
    assert signals.logp_masked is not None
    changed = signals.logp_masked.clone()
    changed[2:] -= 10.0
    after = compute_token_weights(dataclasses.replace(signals, logp_masked=changed), config).selected
    assert torch.equal(before[:2], after[:2])


def test_no_selection_keeps_all_tokens(ragged_signals: Build) -> None:
    signals = ragged_signals([9, 3], [0, 0])
    config = dataclasses.replace(load_preset("video_ktr"), selection=None)
    assert torch.equal(compute_token_weights(signals, config).selected, signals.mask)


def test_every_signal_has_its_own_ratio(ragged_signals: Build) -> None:
    method = load_preset("video_ktr")
    assert method.selection is not None
    selection = dataclasses.replace(
        method.selection, scope="batch", visual_ratio=0.1, temporal_ratio=0.3, entropy_ratio=0.5
    )
    result = compute_token_weights(
        ragged_signals([40, 60], [0, 1]), dataclasses.replace(method, selection=selection)
    )
    assert {name: int(mask.sum()) for name, mask in result.masks.items()} == {
        "visual": 10,
        "temporal": 30,
        "entropy": 50,
    }
