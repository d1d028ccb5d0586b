"""A model with random weights, a few prompts, and settings of a run without composing a configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from keytoken.demo.model import build_model
from keytoken.schema import MethodConfig
from keytoken.study.policy import Model
from keytoken.study.prompts import Prompt, load_split, processor
from keytoken.study.settings import TrainSettings

PLAIN_LOSS = {
    "normalizer": "all",
    "level": "response",
    "mask_kl": False,
    "kl_coef": 0.0,
    "kl_clamp": "video_r1",
    "clip_low": 0.2,
    "clip_high": 0.2,
}
NO_SIGNAL = {"visual_ratio": 0.0, "temporal_ratio": 0.0, "entropy_ratio": 0.0}


@pytest.fixture(scope="session")
def weights() -> dict[str, torch.Tensor]:
    return build_model(processor().tokenizer, seed=0).state_dict()


@pytest.fixture
def model(weights: dict[str, torch.Tensor]) -> Model:
    """A fresh model each time: trainers change it."""
    built = build_model(processor().tokenizer, seed=0)
    built.load_state_dict(weights)
    return built.eval()


@pytest.fixture(scope="session")
def prompts() -> tuple[Prompt, ...]:
    """One prompt of each family and one more: six with a clip, the last but one without."""
    return load_split("standard", "train", 8)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where warm starts are kept."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KEYTOKEN_CACHE", str(folder))
        yield folder


@pytest.fixture
def method() -> Callable[..., MethodConfig]:
    """Builds a method: ``method(entropy_ratio=0.2)`` selects, ``method()`` keeps all tokens."""

    def build(loss: dict[str, Any] | None = None, **selection: Any) -> MethodConfig:
        chosen = {"score_sign": "absolute", "scope": "response", **NO_SIGNAL, **selection}
        return MethodConfig.from_mapping(
            {
                "name": "video_ktr",
                "selection": chosen if selection else None,
                "loss": PLAIN_LOSS | (loss or {}),
                "advantage_epsilon": 1e-4,
            }
        )

    return build


@pytest.fixture
def settings(method: Callable[..., MethodConfig]) -> Callable[..., TrainSettings]:
    """Builds settings of a run; keyword arguments replace values."""

    def build(**changes: Any) -> TrainSettings:
        values: dict[str, Any] = {
            "method": method(),
            "seed": 1,
            "shuffle_seed": 0,
            "num_prompts": 3,
            "num_answers": 4,
            "max_tokens": 6,
            "temperature": 1.0,
            "lr": 1e-3,
            "warm_up": 0,
            "betas": (0.9, 0.95),
            "weight_decay": 0.0,
            "grad_clip": 1e9,
            "divide_by_std": True,
            "filter_metric": None,
            "reward_weights": {},
            "overlong": None,
        }
        return TrainSettings(**values | changes)

    return build
