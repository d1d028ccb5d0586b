"""The sampling contract of runs and checkpoints: saved before one counts, compared when a run resumes."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from keytoken.data.contract import CONTRACT_FILE, SamplingContract
from keytoken.errors import ConfigurationError, DataError, NonFiniteError
from keytoken.verl_adapter.trainer import AttributionSteps

TRACKER = "latest_checkpointed_iteration.txt"
SAMPLING = {"fps": 2.0, "max_frames": 16}


class VerlsTrainer:
    """Stands where verl's trainer stands below ours."""

    config: DictConfig

    def _init_tokenizer(self) -> None:
        self.processor = SimpleNamespace(image_processor=SimpleNamespace(patch_size=16))

    def _save_checkpoint(self) -> None:
        """verl's order: the folder's content, then the tracker that makes it count."""
        folder = Path(self.config.trainer.default_local_dir)
        assert (folder / f"global_step_{self.global_steps}" / CONTRACT_FILE).exists()
        (folder / TRACKER).write_text(str(self.global_steps))

    global_steps = 2


class Trainer(AttributionSteps, VerlsTrainer):  # type: ignore[misc]
    def __init__(self, folder: Path, sampling: dict[str, Any], **trainer: Any) -> None:
        self.keytoken = SimpleNamespace(run_dir=str(folder), save_timeout_s=60.0)  # type: ignore[assignment]
        self.bad_weights: list[str | None] = [None, None]  # one for each rank of the actor
        self.actor_rollout_wg = SimpleNamespace(non_finite_weight=lambda: self.bad_weights)
        checkpoints = {"default_local_dir": str(folder / "checkpoints"), "resume_mode": "auto", **trainer}
        self.config = OmegaConf.create({"trainer": checkpoints, "data": {"sampling_contract": sampling}})


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """The folder of a run that has saved step 2."""
    first = Trainer(tmp_path / "run", SAMPLING)
    first._init_tokenizer()
    first._save_checkpoint()
    return tmp_path / "run"


def test_runs_and_checkpoints_have_their_contract(trained: Path) -> None:
    """With the patch size of the model's processor, which the configuration does not say."""
    expected = SamplingContract(patch_size=16, **SAMPLING)  # type: ignore[arg-type]
    for folder in (trained, trained / "checkpoints" / "global_step_2"):
        assert SamplingContract.read(folder / CONTRACT_FILE) == expected
    Trainer(trained, SAMPLING)._init_tokenizer()


def test_a_checkpoint_of_other_frames_is_refused(trained: Path) -> None:
    other = Trainer(trained, {"fps": 2.0, "max_frames": 64, "decoder": "pyav"})
    with pytest.raises(ConfigurationError) as refused:
        other._init_tokenizer()
    for part in (
        "global_step_2",
        "max_frames is 64 in this run and 16 in the checkpoint",
        "decoder is pyav in this run and auto in the checkpoint",
        "trainer.resume_mode=disable",
    ):
        assert part in str(refused.value)
    assert "fps" not in str(refused.value).split("Set keytoken")[0]
    # The refused start has left the run's own file alone.
    assert SamplingContract.read(trained / CONTRACT_FILE).max_frames == 16


def test_a_named_checkpoint_is_compared_too(trained: Path, tmp_path: Path) -> None:
    named = {"resume_mode": "resume_path", "resume_from_path": str(trained / "checkpoints" / "global_step_2")}
    Trainer(tmp_path / "other", SAMPLING, **named)._init_tokenizer()
    with pytest.raises(ConfigurationError, match="fps is 1"):
        Trainer(tmp_path / "other", {**SAMPLING, "fps": 1.0}, **named)._init_tokenizer()


def test_a_fresh_start_compares_nothing(trained: Path) -> None:
    Trainer(trained, {**SAMPLING, "fps": 1.0}, resume_mode="disable")._init_tokenizer()
    assert SamplingContract.read(trained / CONTRACT_FILE).fps == 1.0


def test_a_checkpoint_without_a_contract_is_said_so(trained: Path, caplog: pytest.LogCaptureFixture) -> None:
    (trained / "checkpoints" / "global_step_2" / CONTRACT_FILE).unlink()
    with caplog.at_level(logging.WARNING):
        Trainer(trained, {**SAMPLING, "fps": 1.0})._init_tokenizer()
    assert "global_step_2 has no sampling_contract.json" in caplog.text


def test_a_changed_file_is_refused(trained: Path) -> None:
    file = trained / "checkpoints" / "global_step_2" / CONTRACT_FILE
    file.write_text(file.read_text().replace('"max_frames": 16', '"max_frames": 8'))
    with pytest.raises(DataError, match=r"sampling_contract\.json.*digest"):
        Trainer(trained, SAMPLING)._init_tokenizer()


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    run = Trainer(tmp_path / "run", SAMPLING)
    run._init_tokenizer()
    run.bad_weights = [None, "lm_head.weight"]
    with pytest.raises(NonFiniteError, match=r"Step 2: the weight lm_head\.weight holds NaN"):
        run._save_checkpoint()
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_what_is_told_of_a_checkpoint_is_its_place(tmp_path: Path) -> None:
    """verl's hook (trainer.checkpoint_callback_class) may upload the folder, so it is the final one."""
    run, told = Trainer(tmp_path / "run", SAMPLING), []
    run._init_tokenizer()
    run.checkpoint_callback = SimpleNamespace(on_save=lambda **facts: told.append(facts["checkpoint_dir"]))
    run._save_checkpoint()
    place = tmp_path / "run" / "checkpoints" / "global_step_2"
    assert (
        told == [str(place)] and place.is_dir() and run.config.trainer.default_local_dir == str(place.parent)
    )
