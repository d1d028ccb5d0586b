"""The wait for answers, in verl's own polling loop over a queue in which nothing happens."""

from __future__ import annotations

import time
from typing import Any

import pytest
from omegaconf import OmegaConf

from keytoken.errors import ClusterError
from keytoken.verl_adapter.answers import AnswerWatch
from keytoken.verl_adapter.compat import ReplayBuffer


class Queue(ReplayBuffer):
    """verl's buffer; another prompt is finished with every ``every_s`` seconds, up to three."""

    def __init__(self, every_s: float) -> None:
        super().__init__("sync", OmegaConf.create({}), 1, "drop", OmegaConf.create({}), poll_interval=0.02)
        self.every_s, self.began = every_s, time.monotonic()

    def _sync_metadata_from_transfer_queue(self) -> None:
        count = min(3, int((time.monotonic() - self.began) / self.every_s))
        self.finished_keys["train"] = {f"prompt {number}" for number in range(count)}


def sample(buffer: Any, limit_s: float) -> Any:
    AnswerWatch(buffer, lambda: [], limit_s)
    return buffer.sample(global_steps=1, partition_id="train", batch_size=4)


def test_a_wait_in_which_nothing_is_finished_ends() -> None:
    began = time.monotonic()
    with pytest.raises(ClusterError, match=r"No prompt was finished for .*answers_timeout_s"):
        sample(Queue(every_s=1e9), limit_s=0.3)
    assert 0.3 <= time.monotonic() - began < 5


def test_each_finished_prompt_winds_the_clock_up_again() -> None:
    began = time.monotonic()
    with pytest.raises(ClusterError, match="3 are"):
        sample(Queue(every_s=0.4), limit_s=0.6)
    assert time.monotonic() - began > 1.6
