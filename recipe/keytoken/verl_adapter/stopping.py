"""SIGTERM, as schedulers send it before they kill: the running step is finished and saved, then the run ends.

The signal comes to the process that was started as ``keytoken train``, the step runs in another one, perhaps
on another machine: between them lies a file (:mod:`keytoken.stop_request`). The trainer looks for it between
its own save and the weight sync, so a checkpoint of this kind holds what one of ``trainer.save_freq`` would.
"""

import logging
import math
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import open_dict

from keytoken.errors import ConfigurationError, StoppedError
from keytoken.schema import KeyTokenConfig
from keytoken.stop_request import request_stop, stop_requested, who_asked, withdraw_stop

if TYPE_CHECKING:
    from keytoken.verl_adapter.compat import PPOTrainer as _Trainer
else:
    _Trainer = object  # a mixin: which of verl's trainers comes next is the subclass's choice

logger = logging.getLogger(__name__)

_SIGNAL = "SIGTERM"
_NOTICE = (
    f"\nkeytoken: {_SIGNAL}: the running step is finished and saved, then the run ends. "
    "A second SIGTERM ends it at once.\n"
)


class SigtermWatch:
    """Takes SIGTERM for a run, once Ray, which has a handler of its own, is up.

    Args:
        keytoken: The run's block.
    """

    def __init__(self, keytoken: KeyTokenConfig) -> None:
        self._run_dir, self._saves = keytoken.run_dir, keytoken.on_sigterm == "save"
        self._asked = self._at_once = False
        self._rays_handler: Any = None
        withdraw_stop(self._run_dir)

    def start(self) -> None:
        """Replace the handler of SIGTERM, which only the main thread may."""
        if threading.current_thread() is threading.main_thread():
            self._rays_handler = signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, *_: Any) -> None:
        if self._saves and not self._asked:
            self._asked = True
            request_stop(self._run_dir, _SIGNAL)
            os.write(sys.stderr.fileno(), _NOTICE.encode())  # print may be what was interrupted
            return
        self._at_once = True
        sys.exit(StoppedError.exit_code)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Around the run: says how it ended, in place of Ray, which makes another code of an exit."""
        try:
            yield
        except SystemExit as ended:
            if not self._at_once:
                raise
            raise StoppedError(
                f"{_SIGNAL}: the run was ended in the middle of a step. The same command goes on from the "
                "last complete checkpoint."
            ) from ended
        finally:
            if self._rays_handler is not None:
                signal.signal(signal.SIGTERM, self._rays_handler)


class Stopping(_Trainer):
    """Ends verl's loop after a step, on request, and not before the steps that were asked for."""

    keytoken: KeyTokenConfig
    steps_per_epoch: int
    stopped_after: int | None = None
    _stopped_by: str = ""
    _saved_step: int = -1

    def _init_dataloader(self) -> None:
        """verl's; the data are then gone through as often as ``trainer.total_training_steps`` needs.

        verl's loop would end after ``trainer.total_epochs`` without a word, the last step not saved.

        Raises:
            ConfigurationError: there are fewer prompts than a step takes.
        """
        super()._init_dataloader()
        steps, asked = self.steps_per_epoch, self.config.trainer.total_epochs
        if not steps:
            raise ConfigurationError(
                f"data.train_files has {len(self.train_dataset)} rows, fewer than "
                f"data.train_batch_size={self.config.data.train_batch_size}, so there is no step. Lower it."
            )
        needed = math.ceil(self.total_training_steps / steps)
        if needed > asked:
            logger.warning(
                "trainer.total_training_steps=%d is more than trainer.total_epochs=%d has (%d steps each): "
                "the data are gone through %d times",
                *(self.total_training_steps, asked, steps, needed),
            )
            with open_dict(self.config):
                self.config.trainer.total_epochs = needed

    def _save_checkpoint(self) -> None:
        super()._save_checkpoint()
        self._saved_step = self.global_steps

    def on_train_begin(self) -> None:
        """verl has counted the first step already; no prompt is sent out for it any more."""
        if self._shall_stop():
            self._stop_after(self.global_steps - 1)
        else:
            super().on_train_begin()

    def on_step_end(self) -> None:
        """Save, unless this step is saved already, before the weights are sent out."""
        # A resumed run must begin with a step that has passes: else it would have no scores to go by.
        may_stop = self.keytoken.attribution.scores(self.global_steps + 1)
        if may_stop and self.global_steps < self.total_training_steps and self._shall_stop():
            if self._saved_step != self.global_steps:
                self._save_checkpoint()
            self._stop_after(self.global_steps)
        super().on_step_end()

    def _shall_stop(self) -> bool:
        return stop_requested(self.keytoken.run_dir)

    def _stop_after(self, step: int) -> None:
        """verl's loop asks this number before each step, and the scheduler of the optimizer has its own."""
        self.stopped_after = self.total_training_steps = step
        self._stopped_by = who_asked(self.keytoken.run_dir)

    def raise_if_stopped(self) -> None:
        """Say that the run is not at its end.

        Raises:
            StoppedError: it ended early.
        """
        step = self.stopped_after
        if step is None:
            return
        folder = Path(self.config.trainer.default_local_dir)
        where = (
            f"saved in {folder / f'global_step_{step}'}"
            if step == self._saved_step
            else "nothing new to save"
        )
        raise StoppedError(
            f"{self._stopped_by}: the run ended after step {step}, {where}. The same command goes on from "
            "there."
        )
