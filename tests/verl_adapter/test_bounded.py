"""A bounded wait ends in time, with the result, with the call's own error, or with ours."""

from __future__ import annotations

import threading
import time

import pytest

from keytoken.errors import WeightSyncError
from keytoken.verl_adapter.bounded import begun, bounded


def wait(call, timeout_s: float = 5.0) -> object:  # type: ignore[no-untyped-def]
    return bounded(call, timeout_s, "The weight sync of step 3", "Restart the run.", WeightSyncError)


def test_the_result_comes_back() -> None:
    assert wait(lambda: 42) == 42
    assert wait(lambda: None) is None


def test_time_is_up() -> None:
    never = threading.Event()
    start = time.monotonic()
    with pytest.raises(
        WeightSyncError, match=r"The weight sync of step 3 did not end within 0.2 s\. Restart"
    ):
        wait(never.wait, timeout_s=0.2)
    assert time.monotonic() - start < 3.0
    (stuck,) = [thread for thread in threading.enumerate() if thread.name == "The weight sync of step 3"]
    assert stuck.daemon  # it cannot keep the process alive
    never.set()


@pytest.mark.parametrize("problem", [ValueError("as it was"), KeyboardInterrupt(), SystemExit(3)])
def test_errors_pass_unchanged(problem: BaseException) -> None:
    def fail() -> None:
        raise problem

    with pytest.raises(type(problem)) as caught:
        wait(fail)
    assert caught.value is problem


def test_what_was_begun_runs_before_anybody_waits_for_it() -> None:
    runs = threading.Event()
    wait_for = begun(lambda: runs.set() or 42, 5.0, "The start of the group", "", WeightSyncError)
    assert runs.wait(5.0)
    assert wait_for() == 42 and wait_for() == 42
