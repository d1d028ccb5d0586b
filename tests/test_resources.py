"""Slots, files and places that a configuration asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from keytoken.errors import ConfigurationError
from keytoken.resources import num_slots, runs_here, validate_files


def method(visual_ratio: float) -> dict[str, Any]:
    selection = {"score_sign": "signed", "scope": "group", "temporal_ratio": 0.0, "entropy_ratio": 0.2}
    loss = {"normalizer": "all", "level": "response", "mask_kl": False, "kl_coef": 0.0, "kl_clamp": "verl"}
    return {
        "name": "video_ktr",
        "selection": {**selection, "visual_ratio": visual_ratio},
        "loss": {**loss, "clip_low": None, "clip_high": None},
    }


def slots(**changes: Any) -> int:
    config = {
        "trainer": {"nnodes": 2, "n_gpus_per_node": 4},
        "actor_rollout_ref": {"hybrid_engine": False, "rollout": {"nnodes": 1, "n_gpus_per_node": 3}},
        "keytoken": {
            "attribution": {"placement": "pool", "num_workers": 5},
            "method": method(visual_ratio=0.2),
        },
    }
    merged = OmegaConf.create(config)
    for key, value in changes.items():
        OmegaConf.update(merged, key.replace("__", "."), value)
    return num_slots(merged)


def test_slots_are_counted_over_the_pools_that_exist() -> None:
    assert slots() == 2 * 4 + 3 + 5
    assert slots(keytoken__attribution__placement="actor") == 8 + 3
    assert slots(keytoken__method__selection=None) == 8 + 3
    assert slots(keytoken__method__selection__visual_ratio=0.0) == 8 + 3
    assert slots(keytoken__method__selection=None, keytoken__method__loss__perception_coef=0.01) == 8 + 3 + 5
    assert slots(actor_rollout_ref__hybrid_engine=True) == 8 + 5


def test_a_method_without_views_may_need_passes() -> None:
    """For the entropy of a nucleus, or to compare answers."""
    no_view = {"keytoken__method__selection__visual_ratio": 0.0}
    assert slots(**no_view, keytoken__method__selection__entropy_top_p=0.95) == 8 + 3 + 5
    assert slots(keytoken__method__name="tw_grpo", keytoken__method__selection=None) == 8 + 3 + 5


@pytest.fixture
def files(tmp_path: Path) -> DictConfig:
    """A configuration whose files all exist."""
    for name in ("train.parquet", "val.parquet", "model/config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return OmegaConf.create(
        {
            "data": {"train_files": [f"{tmp_path}/train.parquet"], "val_files": f"{tmp_path}/val.parquet"},
            "actor_rollout_ref": {"model": {"path": f"{tmp_path}/model"}},
        }
    )


def test_files_that_exist_pass(files: DictConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    validate_files(files)
    monkeypatch.chdir(tmp_path)
    files.data.train_files, files.actor_rollout_ref.model.path = "train.parquet", "./model"
    validate_files(files)


@pytest.mark.parametrize("key", ["data.train_files", "data.val_files", "actor_rollout_ref.model.path"])
@pytest.mark.parametrize("path", ["/no/such/place", "./nowhere", "~/no/such/place", "no/such/place"])
def test_a_missing_file_is_named(files: DictConfig, key: str, path: str) -> None:
    OmegaConf.update(files, key, path)
    with pytest.raises(ConfigurationError) as caught:
        validate_files(files)
    assert key in str(caught.value) and path in str(caught.value) and "give the path" in str(caught.value)


def test_one_missing_file_of_several(files: DictConfig) -> None:
    files.data.train_files = [files.data.val_files, "/no/such.parquet"]
    with pytest.raises(ConfigurationError, match=r"data\.train_files: /no/such\.parquet"):
        validate_files(files)


def test_a_folder_without_a_model(files: DictConfig, tmp_path: Path) -> None:
    files.actor_rollout_ref.model.path = str(tmp_path)
    with pytest.raises(ConfigurationError, match=r"holds no model \(no config\.json\)"):
        validate_files(files)


@pytest.mark.parametrize("path", ["Qwen/Qwen2.5-VL-7B-Instruct", "gpt2", "hdfs://cluster/model"])
def test_models_that_are_elsewhere_pass(files: DictConfig, path: str) -> None:
    files.actor_rollout_ref.model.path = path
    validate_files(files)


def test_the_demo_that_was_not_prepared(files: DictConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEYTOKEN_DEMO_DIR", "/no/demo")
    files.data.train_files = "/no/demo/train.parquet"
    with pytest.raises(ConfigurationError, match="keytoken demo --prepare-only"):
        validate_files(files)


def test_a_run_is_here_unless_an_address_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    config = OmegaConf.create({"ray_kwargs": {"ray_init": {}}})
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert runs_here(config)
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert runs_here(config)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert not runs_here(config)
    monkeypatch.delenv("RAY_ADDRESS")
    assert not runs_here(OmegaConf.create({"ray_kwargs": {"ray_init": {"address": "auto"}}}))
