"""Parameters: as transformers counts them, of the released models and of the demo's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from keytoken.compose import compose_config, groups
from keytoken.demo.model import build_model
from keytoken.demo.tokenizer import build_tokenizer
from keytoken.errors import ConfigurationError
from keytoken.plan.architecture import RELEASED, Architecture, architecture_of

# As the hub states them beside the weights of these models.
STATED = {
    "Qwen/Qwen2.5-VL-3B-Instruct": 3_754_622_976,
    "Qwen/Qwen2.5-VL-7B-Instruct": 8_292_166_656,
    "Video-R1/Qwen2.5-VL-7B-COT-SFT": 8_292_166_656,
    "Qwen/Qwen3-VL-4B-Instruct": 4_437_815_808,
    "Qwen/Qwen3-VL-8B-Instruct": 8_767_123_696,
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_models(name: str) -> None:
    config = {key: value for key, value in RELEASED[name].items() if key != "model_type"}
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(
            AutoConfig.for_model(RELEASED[name]["model_type"], **config)
        )
    found = architecture_of(name)
    parts = {
        "text": found.text.parameters,
        "vision": found.vision.parameters,
        "layer": found.text.layer_parameters,
        "block": found.vision.block_parameters,
    }
    truth = model.model
    heads = 0 if found.text.tied else model.lm_head.weight.numel()
    assert parts == {
        "text": size(truth.language_model) + heads,
        "vision": size(truth.visual),
        "layer": size(truth.language_model.layers[0]),
        "block": size(truth.visual.blocks[0]),
    }
    assert found.parameters == size(model) == STATED[name]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_the_demos_models_by_their_files(family: str, tmp_path: Path) -> None:
    model: Any = build_model(build_tokenizer(family), seed=0, family=family)
    model.config.save_pretrained(tmp_path)
    assert architecture_of(str(tmp_path)).parameters == size(model)


def test_the_older_layout_of_a_file() -> None:
    """Released files of Qwen2.5-VL have the language model's keys at the top."""
    config = RELEASED["Qwen/Qwen2.5-VL-7B-Instruct"]
    flat = {**config["text_config"], **{key: config[key] for key in config if key != "text_config"}}
    assert Architecture.from_config(flat, "file").parameters == STATED["Qwen/Qwen2.5-VL-7B-Instruct"]


def test_every_policy_has_a_known_shape() -> None:
    policies = [name for name in groups()["policy"] if not name.startswith("demo")]
    for name in policies:
        path = compose_config([f"policy={name}"]).actor_rollout_ref.model.path
        assert architecture_of(path).source == path


def test_what_is_no_model_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="not among the models whose shape is known"):
        architecture_of("Qwen/Qwen9-VL-1T")
    with pytest.raises(ConfigurationError, match=r"config\.json cannot be read"):
        architecture_of(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}), encoding="utf-8")
    with pytest.raises(ConfigurationError, match="model_type is 'llama'"):
        architecture_of(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_vl"}), encoding="utf-8")
    with pytest.raises(ConfigurationError, match="'num_attention_heads' is missing"):
        architecture_of(str(tmp_path))


def size(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
