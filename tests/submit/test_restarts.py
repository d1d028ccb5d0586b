"""Which failures are worth another try, and how many tries there are."""

import os
import signal
import time

import pytest

from keytoken.submit.request import Request
from keytoken.submit.restarts import Outcome, run_to_the_end, worth_another_try

LOST = Outcome("FAILED", None, "Job supervisor actor died", 60.0)


class Script:
    """Stands where a job server stands, and ends each job as it was told."""

    def __init__(self, *outcomes: Outcome) -> None:
        self._outcomes, self.names, self.words = list(outcomes), [], set()
        self.stopped: list[str] = []

    def command(self, verb: str, name: str) -> str:
        return f"{verb} {name}"

    def submit(self, request: Request) -> None:
        self.names.append(request.name)
        self.words.add((request.overrides, tuple(request.variables.items()), request.source))

    def stop(self, name: str) -> None:
        self.stopped.append(name)

    def follow(self, name, say) -> Outcome:
        say(f"log of {name}\n")
        return self._outcomes.pop(0)


@pytest.mark.parametrize(
    ("outcome", "again"),
    [
        (LOST, True),
        (Outcome("FAILED", 1, "an actor died", 60.0), True),
        (Outcome("FAILED", 3, "the weight sync did not end", 60.0), True),
        (Outcome("FAILED", -9, "killed", 60.0), True),
        (Outcome("FAILED", None, "its machine was lost at once", 1.0), True),
        (Outcome("LOST", None, "the head was restarted", 0.0), True),
        (Outcome("FAILED", 1, "No module named keytoken", 1.0), False),
        (Outcome("FAILED", 2, "a wrong key", 60.0), False),
        (Outcome("FAILED", 143, "told to stop, its step saved", 60.0), False),
        (Outcome("SUCCEEDED", 0, "", 60.0), False),
        (Outcome("STOPPED", None, "stopped by its user", 60.0), False),
    ],
)
def test_which_failures_are_worth_another_try(outcome: Outcome, again: bool) -> None:
    assert worth_another_try(outcome) is again


@pytest.mark.parametrize(
    ("outcomes", "limit", "names", "status"),
    [
        ([Outcome("SUCCEEDED", 0, "", 60.0)], 3, ["job"], "SUCCEEDED"),
        ([LOST, LOST, Outcome("SUCCEEDED", 0, "", 60.0)], 3, ["job", "job-r1", "job-r2"], "SUCCEEDED"),
        ([LOST, LOST], 1, ["job", "job-r1"], "FAILED"),
        ([LOST], 0, ["job"], "FAILED"),
        ([LOST, Outcome("FAILED", 2, "", 60.0)], 5, ["job", "job-r1"], "FAILED"),
    ],
)
def test_a_job_is_submitted_again_with_the_same_words(outcomes, limit, names, status) -> None:
    server, said, logged = Script(*outcomes), [], []
    request = Request(("method=grpo",), "job", "/runs/1", {"A": "b"})
    outcome = run_to_the_end(server, request, limit, 0.0, said.append, logged.append)
    assert outcome.status == status and server.names == names
    assert server.words == {(("method=grpo",), (("A", "b"),), None)}
    assert logged == [f"log of {name}\n" for name in names]
    assert sum("Try" in line for line in said) == len(names) - 1


def test_sigterm_asks_the_job_to_stop_and_ends_the_tries() -> None:
    """What the job says of its end is taken as it is, and its try is the last."""

    class Terminated(Script):
        def follow(self, name, say) -> Outcome:
            os.kill(os.getpid(), signal.SIGTERM)
            limit = time.monotonic() + 30
            while not self.stopped and time.monotonic() < limit:
                time.sleep(0.01)
            return super().follow(name, say)

    for ending in (Outcome("STOPPED", None, "stopped", 60.0), LOST):
        server, said = Terminated(ending), []
        request = Request(("method=grpo",), "job", "/runs/1")
        outcome = run_to_the_end(server, request, 3, 0.0, said.append, lambda text: None)
        assert server.stopped == server.names == ["job"] and outcome.exit_code == 143
        assert any("SIGTERM" in line for line in said)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_job_that_somebody_else_stops_ends_as_one_that_was_told_to() -> None:
    """``ray job stop``, of which Ray keeps no exit code."""
    server = Script(Outcome("STOPPED", None, "Job was intentionally stopped.", 60.0))
    outcome = run_to_the_end(server, Request((), "job", "/runs/1"), 3, 0.0, print, print)
    assert server.names == ["job"] and outcome.command_code() == 143


@pytest.mark.parametrize(("exit_code", "code"), [(0, 1), (None, 1), (2, 2), (3, 3), (-9, 137)])
def test_the_exit_code_of_the_command_that_follows(exit_code: int | None, code: int) -> None:
    assert Outcome("FAILED", exit_code, "", 60.0).command_code() == code
    assert Outcome("SUCCEEDED", exit_code, "", 60.0).command_code() == 0


def test_a_second_sigterm_leaves_at_once() -> None:
    class Impatient(Script):
        def follow(self, name, say) -> Outcome:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.01)
            raise AssertionError("it went on waiting")

    with pytest.raises(SystemExit) as left:
        run_to_the_end(Impatient(LOST), Request((), "job", "/runs/1"), 3, 0.0, print, print)
    assert left.value.code == 143
