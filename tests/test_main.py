"""What load_config derives, and what train refuses before it imports the stack or makes a folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from keytoken import main
from keytoken.errors import ConfigurationError
from keytoken.main import load_config, train


@pytest.fixture(autouse=True)
def _demo_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KEYTOKEN_DEMO_DIR", str(tmp_path / "demo"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(tmp_path)


def test_paths_become_absolute_and_slots_are_counted(tmp_path: Path) -> None:
    config = load_config(
        [
            "experiment=demo_cpu",
            "keytoken.run_dir=runs/a",
            "trainer.rollout_data_dir=rollouts",
            "data.frame_cache=frames",
        ]
    )
    assert config.data.frame_cache == str(tmp_path / "frames")
    assert config.keytoken.run_dir == str(tmp_path / "runs/a")
    assert config.data.quarantine_file == str(tmp_path / "runs/a/quarantine.jsonl")
    assert config.trainer.default_local_dir == str(tmp_path / "runs/a/checkpoints")
    assert config.trainer.validation_data_dir == str(tmp_path / "runs/a/validation")
    assert config.trainer.rollout_data_dir == str(tmp_path / "rollouts")
    assert (config.ray_kwargs.ray_init.num_gpus, config.ray_kwargs.ray_init.num_cpus) == (3, 48)


def test_a_run_that_joins_a_cluster_brings_no_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray refuses num_cpus and num_gpus from somebody who joins."""
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    ray_init = load_config(["experiment=demo_cpu"]).ray_kwargs.ray_init
    assert ray_init.get("num_gpus") is None
    assert ray_init.num_cpus is None


@pytest.mark.parametrize(("coefficient", "needed"), [("0.04", True), ("0", False), ("0.0", False)])
def test_reference_log_probs_follow_the_kl_coefficient(coefficient: str, needed: bool) -> None:
    config = load_config(["experiment=demo_cpu", f"keytoken.method.loss.kl_coef={coefficient}"])
    assert config.actor_rollout_ref.actor.use_kl_loss is needed


def test_a_coefficient_that_is_no_number_is_refused_by_its_own_name() -> None:
    with pytest.raises(ConfigurationError, match=r"keytoken\.method\.loss\.kl_coef is 'abc'"):
        load_config(["experiment=demo_cpu", "keytoken.method.loss.kl_coef=abc"])


def test_missing_files_stop_a_run_before_it_leaves_anything(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"data\.train_files: .*demo --prepare-only"):
        train(["experiment=demo_cpu", "keytoken.run_dir=runs/a"])
    assert list(tmp_path.iterdir()) == []


def test_a_run_folder_that_cannot_be_made(tmp_path: Path) -> None:
    prepare(tmp_path / "demo")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match=r"keytoken\.run_dir=.*file/run cannot be made"):
        train(["experiment=demo_cpu", "keytoken.run_dir=file/run"])


def test_an_earlier_metrics_file_is_kept(tmp_path: Path) -> None:
    for text in ("first", "second"):
        main._fresh_metrics_file(tmp_path).write_text(text)
    current = main._fresh_metrics_file(tmp_path)
    assert current == tmp_path / "metrics.jsonl" and not current.exists()
    kept = [(tmp_path / f"metrics.{number:03d}.jsonl").read_text() for number in (0, 1)]
    assert kept == ["first", "second"]
    (tmp_path / "metrics.000.jsonl").unlink()
    current.write_text("third")
    main._fresh_metrics_file(tmp_path)
    kept = [(tmp_path / f"metrics.{number:03d}.jsonl").read_text() for number in (1, 2)]
    assert kept == ["second", "third"], "a number that is in use is left alone"


def test_workers_get_the_environment_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = {"VERL_USE_EXTERNAL_MODULES": "other", "VLLM_NO_USAGE_STATS": "0"}
    monkeypatch.setattr(os, "environ", mine)
    config = OmegaConf.create(
        {
            "ray_kwargs": {"ray_init": {"runtime_env": {"env_vars": {"MINE": 1}}}},
            "keytoken": {"cluster": {"data_timeout_s": 7.0}},
        }
    )
    main._set_environment(config, main._of_this_run(config, Path("/x")))
    expected = {
        "MINE": "1",
        "VERL_USE_EXTERNAL_MODULES": f"other,{main.EXTERNAL_MODULE}",
        "VERL_FILE_LOGGER_PATH": "/x",
        "KEYTOKEN_DATA_TIMEOUT_S": "7.0",
        "HF_UPDATE_DOWNLOAD_COUNTS": "0",
        "VLLM_NO_USAGE_STATS": "0",
    }
    given = config.ray_kwargs.ray_init.runtime_env.env_vars
    of_the_driver = {"RAY_OVERRIDE_JOB_RUNTIME_ENV": "1"}
    assert {name: str(value) for name, value in given.items()} == expected
    assert os.environ == expected | of_the_driver


def test_tensorboard_writes_into_the_run_folder_or_where_it_is_told_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TENSORBOARD_DIR", raising=False)
    config = OmegaConf.create({"trainer": {"logger": ["console", "tensorboard"]}})
    assert main._tracker_folder(config, tmp_path) == {"TENSORBOARD_DIR": str(tmp_path / "tensorboard")}
    monkeypatch.setenv("TENSORBOARD_DIR", "/elsewhere")
    assert main._tracker_folder(config, tmp_path) == {}
    monkeypatch.delenv("TENSORBOARD_DIR")
    assert main._tracker_folder(OmegaConf.create({"trainer": {"logger": ["file"]}}), tmp_path) == {}


def prepare(folder: Path) -> None:
    """The files that a demo run looks for, empty."""
    for name in ("train.parquet", "heldout.parquet", "validation.parquet", "model/config.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
