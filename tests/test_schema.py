"""The typed configuration: what it accepts, and that each refusal names the key and the remedy."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from keytoken.errors import ConfigurationError
from keytoken.schema import (
    AttributionConfig,
    DiagnosticsConfig,
    ExportConfig,
    KernelsConfig,
    KeyTokenConfig,
    LossConfig,
    SelectionConfig,
)

SELECTION = {
    "score_sign": "signed",
    "scope": "group",
    "visual_ratio": 0.2,
    "temporal_ratio": 0.2,
    "entropy_ratio": 0.2,
}
LOSS = {
    "normalizer": "selected",
    "level": "response",
    "mask_kl": True,
    "kl_coef": 0.04,
    "kl_clamp": "video_r1",
    "clip_low": None,
    "clip_high": None,
}

CONSTANT = {"method__loss__normalizer": "constant", "method__loss__constant_length": 768}
GSPO = {"method__loss__objective": "gspo", "method__loss__clip_low": 0.1, "method__loss__clip_high": 0.1}


def blackened(**changes: Any) -> dict[str, Any]:
    """Changes that choose the view blackened, with these options."""
    return {"method__view": {"visual": "blackened", "blackened": changes}}


def block(**changes: Any) -> dict[str, Any]:
    """A valid ``keytoken`` block; ``a__b=value`` replaces one value, ``a__b=KeyError`` removes it."""
    config: dict[str, Any] = {
        "method": {"name": "video_ktr", "selection": dict(SELECTION), "loss": dict(LOSS)},
        "attribution": {},
        "kernels": {},
        "media": {},
        "parity": {},
        "export": {},
        "diagnostics": {},
    }
    for path, value in changes.items():
        *parents, last = path.split("__")
        node = config
        for parent in parents:
            node = node[parent]
        if value is KeyError:
            del node[last]
        else:
            node[last] = value
    return config


def test_a_valid_block_becomes_typed_values() -> None:
    config = KeyTokenConfig.from_mapping(block(attribution__placement="actor", export__every_steps=3))
    assert config.method.selection == SelectionConfig(**SELECTION)  # type: ignore[arg-type]
    assert config.method.loss == LossConfig(**LOSS)  # type: ignore[arg-type]
    assert config.attribution == AttributionConfig(placement="actor")
    assert config.export == ExportConfig(every_steps=3)


def test_omitted_blocks_take_their_defaults() -> None:
    config = KeyTokenConfig.from_mapping({"method": block()["method"]})
    assert config.attribution == AttributionConfig()
    assert config.kernels == KernelsConfig(impl="auto", head="fused")
    assert config.export == ExportConfig()


def test_integers_pass_as_floats() -> None:
    config = KeyTokenConfig.from_mapping(block(method__selection__visual_ratio=1))
    assert config.method.selection is not None
    assert isinstance(config.method.selection.visual_ratio, float)


def test_values_are_frozen() -> None:
    config = KeyTokenConfig.from_mapping(block())
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.method.loss.kl_coef = 0.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "views"),
    [
        ({}, ("masked", "shuffled")),
        ({"method__selection__temporal_ratio": 0.0}, ("masked",)),
        ({"method__selection__visual_ratio": 0.0}, ("shuffled",)),
        ({"method__selection__visual_ratio": 0.0, "method__selection__temporal_ratio": 0.0}, ()),
        ({"method__selection": None}, ()),
        ({"method__selection": None, "method__loss__perception_coef": 0.01}, ("masked",)),
        ({"method__view": {"visual": "blank", "temporal": "frozen"}}, ("blank", "frozen")),
        ({"method__view": {"visual": "blank"}, "method__selection__visual_ratio": 0.0}, ("shuffled",)),
    ],
)
def test_views_follow_from_ratios_and_loss(changes: dict[str, Any], views: tuple[str, ...]) -> None:
    assert KeyTokenConfig.from_mapping(block(**changes)).method.views == views


@pytest.mark.parametrize(
    ("changes", "named", "remedy"),
    [
        ({"method__selection__visual_ratoi": 0.3}, "method.selection.visual_ratoi", "'visual_ratio'"),
        ({"metod": {}}, "keytoken.metod", "'method'"),
        ({"method__loss": KeyError}, "keytoken.method lacks the keys loss", "add them"),
        ({"method__loss__level": KeyError}, "keytoken.method.loss lacks the keys level", "add them"),
        ({"attribution": 3}, "keytoken.attribution is 3", "mapping"),
        ({"method__selection__visual_ratio": "0.2"}, "keytoken.method.selection.visual_ratio", "type float"),
        ({"method__selection__visual_ratio": True}, "keytoken.method.selection.visual_ratio", "type float"),
        ({"method__selection__visual_ratio": None}, "keytoken.method.selection.visual_ratio", "type float"),
        ({"method__loss__mask_kl": 1}, "keytoken.method.loss.mask_kl", "type bool"),
        ({"attribution__num_workers": True}, "keytoken.attribution.num_workers", "type int"),
        ({"attribution__micro_batch_size": 2.5}, "keytoken.attribution.micro_batch_size", "type int"),
        ({"method__selection__visual_ratio": 1.2}, "visual_ratio is 1.2", "0 (off) to 1"),
        ({"method__selection__entropy_ratio": float("nan")}, "entropy_ratio is nan", "0 (off) to 1"),
        ({"method__selection__scope": "sequence"}, "scope is 'sequence'", "response, group, batch"),
        ({"method__selection__score_sign": "abs"}, "score_sign is 'abs'", "signed, absolute"),
        ({"method__selection__floor": -0.1}, "floor is -0.1", "null for no floor"),
        ({"method__loss__kl_coef": -1.0}, "kl_coef is -1.0", "0 (off) or more"),
        ({"method__loss__clip_low": 0.2}, "clip_low and clip_high", "both null"),
        ({"method__loss__clip_low": 1.2, "method__loss__clip_high": 0.2}, "clip_low is 1.2", "at most 1"),
        ({"method__loss__clip_low": 0.2, "method__loss__clip_high": 0.0}, "clip_high is 0.0", "above 0"),
        ({"method__loss__dual_clip": 3.0}, "dual_clip needs clipping", "dual_clip=null"),
        ({"method__loss__normalizer": "sum"}, "normalizer is 'sum'", "selected, all, constant"),
        ({"method__loss__objective": "grpo"}, "objective is 'grpo'", "ppo, gspo, cispo"),
        (
            {"method__loss__normalizer": "constant"},
            "normalizer=constant needs",
            "${data.max_response_length}",
        ),
        ({"method__loss__constant_length": 768}, "constant_length is 768", "normalizer=constant, or"),
        ({"method__loss__constant_length": 2.5}, "loss.constant_length is 2.5", "type int"),
        ({**CONSTANT, "method__loss__constant_length": 0}, "constant_length is 0", "at least 1"),
        ({**CONSTANT, "method__loss__level": "batch"}, "normalizer=constant", "set level=response"),
        ({**GSPO, "method__loss__level": "batch"}, "objective=gspo", "set level=response"),
        ({**GSPO, "method__loss__dual_clip": 3.0}, "dual_clip belongs to objective=ppo", "null for"),
        ({"method__loss__entropy_penalty": -0.1}, "entropy_penalty is -0.1", "0 (off) or more"),
        ({"method__loss__perception_coef": float("inf")}, "perception_coef is inf", "0 (off) or more"),
        ({"method__loss__perception_clip": 0.2}, "perception_clip bounds a term that is off", "0.01"),
        (
            {"method__loss__perception_coef": 0.01, "method__loss__perception_clip": 0.0},
            "perception_clip is 0.0",
            "null for no bound",
        ),
        ({"method__view": {"vizual": "blank"}}, "method.view.vizual", "'visual'"),
        ({"method__view": {"visual": None}}, "method.view.visual is None", "type str"),
        (blackened(p=0.0), "view.blackened.p is 0.0", "0.01 to 1"),
        (blackened(p=1.5), "view.blackened.p is 1.5", "0.01 to 1"),
        (blackened(p=float("nan")), "view.blackened.p is nan", "0.01 to 1"),
        (blackened(size=0), "view.blackened.size is 0", "at least 1"),
        (blackened(size=14.0), "view.blackened.size is 14.0", "type int"),
        (blackened(per="answer"), "view.blackened.per is 'answer'", "prompt, response"),
        (
            {"method__view": {"visual": "blank"}, "method__positions": "compressed"},
            "method.positions=compressed",
            "positions=kept",
        ),
        ({"method__positions": "moved"}, "positions is 'moved'", "kept, compressed"),
        ({"method__advantage_epsilon": 0.0}, "advantage_epsilon is 0.0", "1e-6"),
        ({"attribution__placement": "gpu"}, "placement is 'gpu'", "pool, actor"),
        ({"attribution__num_workers": 0}, "num_workers is 0", "1 or more"),
        ({"attribution__sync_timeout_s": 0.0}, "sync_timeout_s is 0.0", "above 0"),
        ({"attribution__pass_timeout_s": float("inf")}, "pass_timeout_s is inf", "finite"),
        ({"media__cache_gb": -1.0}, "keytoken.media.cache_gb is -1.0", "0 to keep nothing"),
        ({"parity__prompts": -1}, "keytoken.parity.prompts is -1", "0 for none"),
        ({"parity__every_steps": 0}, "keytoken.parity.every_steps is 0", "null for none"),
        ({"parity__answer_tokens": 0}, "keytoken.parity.answer_tokens is 0", "1 or more"),
        ({"parity__log_prob_tolerance": 0.0}, "log_prob_tolerance is 0.0", "null for the bound"),
        ({"kernels__impl": "cuda"}, "keytoken.kernels.impl is 'cuda'", "auto, triton, reference"),
        ({"kernels__head": True}, "keytoken.kernels.head", "type str"),
        ({"kernels__head": "liger"}, "keytoken.kernels.head is 'liger'", "fused, verl"),
        ({"export__every_steps": 0}, "every_steps is 0", "enabled=false"),
        ({"export__pictures": -1}, "pictures is -1", "0 (none)"),
        ({"diagnostics__every_steps": 0}, "keytoken.diagnostics.every_steps is 0", "null for none"),
        (
            {"diagnostics__word_classes": {"tag": "<a>"}},
            "diagnostics.word_classes.tag is '<a>'",
            "list of words",
        ),
        ({"diagnostics__word_classes": {"tag": [1]}}, "diagnostics.word_classes.tag is [1]", "list of words"),
        (
            {"diagnostics__word_classes": {"color": ["orange"], "fruit": ["apple", "orange"]}},
            "'orange' in color and fruit",
            "choose one",
        ),
    ],
)
def test_each_refusal_names_the_key_and_the_remedy(changes: dict[str, Any], named: str, remedy: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        KeyTokenConfig.from_mapping(block(**changes))
    assert named in str(caught.value)
    assert remedy in str(caught.value)


def test_steps_that_diagnostics_are_due_in() -> None:
    every_third = DiagnosticsConfig(every_steps=3)
    assert [step for step in range(1, 10) if every_third.due(step)] == [3, 6, 9]
    assert not any(DiagnosticsConfig().due(step) for step in range(10))


def test_a_selection_without_any_signal_is_refused() -> None:
    off = {f"method__selection__{name}_ratio": 0.0 for name in ("visual", "temporal", "entropy")}
    with pytest.raises(ConfigurationError, match="selection=null"):
        KeyTokenConfig.from_mapping(block(**off))


def test_hydra_nodes_are_accepted() -> None:
    omegaconf = pytest.importorskip("omegaconf")
    assert KeyTokenConfig.from_mapping(omegaconf.OmegaConf.create(block())) == KeyTokenConfig.from_mapping(
        block()
    )


@pytest.mark.parametrize(
    ("changes", "selected_only"),
    [
        ({}, True),
        ({"mask_kl": False}, False),
        ({"mask_kl": False, "kl_coef": 0.0}, True),
        ({"entropy_penalty": 0.06}, False),
        ({"perception_coef": 0.01}, False),
    ],
)
def test_whether_the_loss_counts_selected_tokens_only(changes: dict[str, Any], selected_only: bool) -> None:
    assert LossConfig(**(LOSS | changes)).counts_selected_only is selected_only  # type: ignore[arg-type]
