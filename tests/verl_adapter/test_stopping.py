"""SIGTERM in the driver, and what the trainer does of it between the steps of verl's loop."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from keytoken.errors import ConfigurationError, StoppedError
from keytoken.golden import load_preset
from keytoken.schema import AttributionConfig, KeyTokenConfig
from keytoken.stop_request import request_stop, stop_requested, who_asked
from keytoken.verl_adapter.stopping import SigtermWatch, Stopping


def block(run_dir: Path, **more: Any) -> KeyTokenConfig:
    return KeyTokenConfig(method=load_preset("video_ktr"), run_dir=str(run_dir), **more)


class VerlsTrainer:
    """verl's loop, with the order of its hooks (trainer_base.py, fit)."""

    def __init__(
        self, keytoken: KeyTokenConfig, save_freq: int, begin: int, at: Callable[[str], None]
    ) -> None:
        self.keytoken, self.save_freq, self.global_steps, self.at = keytoken, save_freq, begin, at
        self.total_training_steps = 6
        self.did: list[str] = []
        self.config = OmegaConf.create(
            {
                "trainer": {"default_local_dir": "/checkpoints", "total_epochs": 1},
                "data": {"rows": 9, "train_batch_size": 2},
            }
        )

    def note(self, what: str) -> None:
        self.did.append(f"{what} {self.global_steps}")
        self.at(self.did[-1])

    def _init_dataloader(self) -> None:
        self.train_dataset = range(self.config.data.rows)
        self.steps_per_epoch = len(self.train_dataset) // self.config.data.train_batch_size

    def fit(self) -> None:
        self.global_steps += 1
        self.on_train_begin()
        while self.global_steps <= self.total_training_steps:
            is_last_step = self.global_steps >= self.total_training_steps
            self.note("step")
            if is_last_step or self.global_steps % self.save_freq == 0:
                self._save_checkpoint()
            self.on_step_end()
            self.global_steps += 1
            if is_last_step:
                return

    def on_train_begin(self) -> None:
        self.note("begin")

    def on_step_end(self) -> None:
        self.note("sync")

    def _save_checkpoint(self) -> None:
        self.note("save")


class Trainer(Stopping, VerlsTrainer):  # type: ignore[misc]
    pass


def sigterm(run_dir: Path, at: str) -> Callable[[str], None]:
    """What the driver makes of the signal, at a moment of the loop."""
    return lambda what: request_stop(run_dir, "SIGTERM") if what == at else None


@pytest.mark.parametrize(
    ("asked_at", "save_freq", "did", "stopped"),
    [
        ("step 2", 4, ["begin 1", "step 1", "sync 1", "step 2", "save 2", "sync 2"], 2),
        ("sync 1", 4, ["begin 1", "step 1", "sync 1", "step 2", "save 2", "sync 2"], 2),
        ("step 2", 2, ["begin 1", "step 1", "sync 1", "step 2", "save 2", "sync 2"], 2),
        ("never", 3, [], None),
        ("step 6", 6, [], None),  # there is nothing left to stop
    ],
)
def test_the_step_is_finished_saved_once_and_sent_out(
    tmp_path: Path, asked_at: str, save_freq: int, did: list[str], stopped: int | None
) -> None:
    trainer = Trainer(
        block(tmp_path),
        save_freq,
        0,
        lambda what: request_stop(tmp_path, "SIGTERM") if what == asked_at else None,
    )
    trainer.fit()
    assert trainer.stopped_after == stopped
    if stopped is None:
        assert trainer.did[-3:] == ["step 6", "save 6", "sync 6"]
        trainer.raise_if_stopped()
    else:
        assert trainer.did == did
        with pytest.raises(
            StoppedError,
            match=f"^SIGTERM: .* after step {stopped}, saved in /checkpoints/global_step_{stopped}",
        ):
            trainer.raise_if_stopped()


def test_a_run_that_is_stopped_before_its_first_step_makes_none(tmp_path: Path) -> None:
    """By a file that somebody made, which is named: no signal came."""
    (tmp_path / "stop").touch()
    trainer = Trainer(block(tmp_path), 2, 4, lambda what: None)
    trainer.fit()
    assert trainer.did == [] and trainer.stopped_after == 4
    with pytest.raises(StoppedError) as raised:
        trainer.raise_if_stopped()
    assert str(raised.value).startswith(
        f"The file {tmp_path}/stop: the run ended after step 4, nothing new to save. The same command"
    )


def test_it_stops_where_a_resumed_run_begins_with_passes(tmp_path: Path) -> None:
    """With the scores of every third step reused, steps 1, 4 and 7 have passes: so it ends after 3 or 6."""
    keytoken = block(tmp_path, attribution=AttributionConfig(every_steps=3))
    trainer = Trainer(
        keytoken, 100, 0, lambda what: request_stop(tmp_path, "SIGTERM") if what == "step 2" else None
    )
    trainer.fit()
    assert trainer.stopped_after == 3 and trainer.did[-2:] == ["save 3", "sync 3"]


@pytest.mark.parametrize(("steps", "epochs"), [(4, 1), (5, 2), (8, 2), (9, 3)])
def test_the_data_last_as_long_as_the_steps(tmp_path: Path, caplog: Any, steps: int, epochs: int) -> None:
    """Nine rows make four steps of two."""
    trainer = Trainer(block(tmp_path), 2, 0, lambda what: None)
    trainer.total_training_steps = steps
    OmegaConf.set_struct(trainer.config, True)
    trainer._init_dataloader()
    assert trainer.config.trainer.total_epochs == epochs
    said = f"trainer.total_training_steps={steps} is more than trainer.total_epochs=1 has (4 steps each)"
    assert [said in line for line in caplog.messages] == [True] * (epochs > 1)


def test_too_few_rows_for_a_step_are_refused(tmp_path: Path) -> None:
    trainer = Trainer(block(tmp_path), 2, 0, lambda what: None)
    trainer.config.data.rows = 1
    with pytest.raises(ConfigurationError, match=r"has 1 rows, fewer than data\.train_batch_size=2"):
        trainer._init_dataloader()


@pytest.fixture
def handler() -> Any:
    before = signal.getsignal(signal.SIGTERM)
    yield before
    signal.signal(signal.SIGTERM, before)


def test_the_first_signal_asks_and_the_second_ends(tmp_path: Path, handler: Any, capfd: Any) -> None:
    request_stop(tmp_path, "SIGTERM")
    watch = SigtermWatch(block(tmp_path))
    assert not stop_requested(tmp_path)  # that of an earlier run
    (
        tmp_path / "stop"
    ).touch()  # somebody asked for the same already: that does not make the first one a second
    with pytest.raises(StoppedError, match="in the middle of a step"), watch.watching():
        watch.start()
        os.kill(os.getpid(), signal.SIGTERM)
        assert who_asked(tmp_path) == "SIGTERM"
        assert capfd.readouterr().err.count("SIGTERM: the running step is finished and saved") == 1
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is handler


def test_the_first_signal_ends_a_run_that_shall_not_save(tmp_path: Path, handler: Any) -> None:
    watch = SigtermWatch(block(tmp_path, on_sigterm="end"))
    with pytest.raises(StoppedError), watch.watching():
        watch.start()
        os.kill(os.getpid(), signal.SIGTERM)
    assert StoppedError.exit_code == 128 + signal.SIGTERM


def test_an_exit_of_another_kind_stays_what_it_is(tmp_path: Path, handler: Any) -> None:
    with pytest.raises(SystemExit), SigtermWatch(block(tmp_path)).watching():
        raise SystemExit(5)
