"""A bound on the wait for answers, and a look after those who make them.

verl polls until a batch of answers is there (verl 0.9.1, trainer/ppo/v1/replay_buffer.py). It would wait
without end for those of a process that died or of an engine that hangs.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import ray

from keytoken.errors import ClusterError

# How often those who make the answers are asked whether they live, and for how long; the dead answer at once.
ASK_EVERY_S = 5.0
ASK_FOR_S = 0.5


class AnswerWatch:
    """Looks after a wait for answers, between two looks of verl's replay buffer for them.

    The wait then ends with :class:`ClusterError` when no prompt was finished for too long, and with Ray's
    account of the process that died.

    Args:
        buffer: verl's replay buffer.
        workers: The agent loop workers, as soon as there are any.
        limit_s: Longest time without a finished prompt, ``keytoken.cluster.answers_timeout_s``.
    """

    def __init__(self, buffer: Any, workers: Callable[[], Sequence[Any]], limit_s: float) -> None:
        self._buffer, self._workers, self._limit_s = buffer, workers, limit_s
        self._sample, self._wait = buffer.sample, buffer._wait_for_next_poll
        buffer.sample, buffer._wait_for_next_poll = self.sample, self.wait

    def sample(self, *args: Any, **kwargs: Any) -> Any:
        """verl's, with a clock that starts now."""
        self._done: set[str] = set()
        self._progress = self._asked = time.monotonic()
        return self._sample(*args, **kwargs)

    def wait(self, partition: str, last: float) -> float:
        """verl's pause, then the look."""
        last, now = self._wait(partition, last), time.monotonic()
        done = self._buffer.finished_keys[partition] | self._buffer.failure_keys[partition]
        if done - self._done:
            self._done, self._progress = self._done | done, now
        if now - self._asked >= ASK_EVERY_S:
            answers = [worker.last_failure.remote() for worker in self._workers()]
            ray.get(ray.wait(answers, num_returns=len(answers), timeout=ASK_FOR_S)[0])
            self._asked = time.monotonic()
        if now - self._progress > self._limit_s:
            raise ClusterError(
                f"No prompt was finished for {now - self._progress:.0f} s, {len(done)} are. An engine or a "
                "reward hangs: `ray list actors` shows who is busy. If answers may take that long, raise "
                "keytoken.cluster.answers_timeout_s."
            )
        return last
