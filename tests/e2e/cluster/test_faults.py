"""The loss of a process, a host or its network while a job trains over several hosts, and telling it to stop.

One job loses them all, one after the other, each behind a step that is saved. It has to end each time with a
message that names what was lost, nothing of it may be left, and the next try has to make the next step as an
uninterrupted run on one host makes it. What was seen is told in ``recipe/docs/faults.md``.
"""

import dataclasses
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.cluster, pytest.mark.timeout(1800)]

# Ray calls a host dead, or a process, before this; then the delay, and the start of the next try.
NOTICED_S = 90.0
RESTART_DELAY_S = 10
GIVEN_UP_S = 300.0
MAX_RESTARTS = 9
RETRY = f" of {MAX_RESTARTS} in {RESTART_DELAY_S} s, from the last complete checkpoint"


@dataclasses.dataclass(frozen=True)
class Fault:
    """What is done to the cluster, what is said of it, and how a host comes back.

    Attributes:
        cause: Causes the fault; returns what the message says of its place.
        says: How the message begins, in which ``{where}`` is that.
        mend: Brings the cluster back to four hosts, as soon as the loss was noticed.
    """

    cause: Callable[[Any], str]
    says: str
    mend: Callable[[Any], None] = lambda hosts: None


def killing(title: str, host: str) -> Callable[[Any], str]:
    """Kills one process of a host by SIGKILL."""

    def kill(hosts: Any) -> str:
        (process,) = hosts.hosts[host].processes(title)
        where = f"pid {pid_inside(process)} on {hosts.hosts[host].address}"
        process.kill()
        return where

    return kill


def pid_inside(process: psutil.Process) -> int:
    """Its number on its own host."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.findall(r"^NSpid:.*\s(\d+)$", status, re.MULTILINE)[0])


def kill_host(hosts: Any) -> str:
    hosts.hosts["h4"].kill()
    return hosts.hosts["h4"].address


def cut_network(hosts: Any) -> str:
    hosts.set_link("h2", "down")
    return hosts.hosts["h2"].address


def start_host(hosts: Any) -> None:
    hosts.start("h4")


def replace_cut_host(hosts: Any) -> None:
    hosts.hosts["h2"].kill()
    hosts.set_link("h2", "up")
    hosts.start("h2")


FAULTS = {
    "attribution worker": Fault(
        killing("ray::AttributionWorker", "h1"), "The process of AttributionWorker ({where}) died"
    ),
    "rollout server": Fault(
        killing("ray::ProbedServer", "h2"), "The process of ProbedServer ({where}, vLLM's server) died"
    ),
    "actor rank": Fault(
        killing("ray::WorkerDict", "h4"), "The process of WorkerDict ({where}, a rank of the actor) died"
    ),
    "driver": Fault(
        killing("python -m keytoken.cli train", "h1"),
        "(the driver, `keytoken train` on the head, was ended by SIGKILL",
    ),
    "host": Fault(kill_host, "{where}", start_host),
    "network": Fault(cut_network, "{where}", replace_cut_host),
}


class Unlucky:
    """The job to which all of it happens."""

    def __init__(self, submit: Callable[..., Any], expected: Any, same: Callable[..., None]) -> None:
        self._expected, self._same = expected, same
        self._tries = 0
        flags = (f"--max-restarts={MAX_RESTARTS}", f"--restart-delay={RESTART_DELAY_S}")
        self.job = submit("unlucky", *flags)
        self.folder = self.job.run.folder
        self.first_step_of_a_try()

    def first_step_of_a_try(self) -> None:
        """Wait for the first step that the next try makes; it has to be that of the run on one host."""
        self.job.wait_for(self._has_made_one)
        self._tries += 1
        self.compare(int(self.job.run.metrics()[0]["training/global_step"]))

    def _has_made_one(self) -> bool:
        """Each try moves the metrics of the one before away."""
        earlier = len(list(self.folder.glob("metrics.*.jsonl")))
        return earlier == self._tries and (self.folder / "metrics.jsonl").exists() and self._rows()

    def _rows(self) -> bool:
        return "training/global_step" in (self.folder / "metrics.jsonl").read_text()

    def compare(self, step: int) -> None:
        """That step is bit for bit the one of the run on one host."""
        self._same(self.job.run, self._expected, [step])

    def said(self) -> str:
        """What the command that follows the job has printed."""
        return str(self.job.log.read_text(errors="replace"))


@pytest.fixture(scope="module")
def unlucky(submit_across: Any, one_host: Any, assert_same_steps: Any) -> Any:
    started = Unlucky(submit_across, one_host, assert_same_steps)
    yield started
    started.job.kill()


def test_every_pool_is_on_its_hosts(unlucky: Any, assert_placed: Callable[[], None]) -> None:
    """And the first step is that of the run on one host, or there would be no job by now."""
    assert_placed()


@pytest.mark.parametrize("name", FAULTS)
def test_the_job_says_what_was_lost_and_goes_on(
    name: str, unlucky: Any, hosts: Any, left_over: Callable[..., list[str]]
) -> None:
    fault, before = FAULTS[name], len(unlucky.said())
    where, began = fault.cause(hosts), time.monotonic()
    unlucky.job.wait_for(lambda: RETRY in unlucky.said()[before:], GIVEN_UP_S)
    noticed = time.monotonic() - began
    said = unlucky.said()[before:].partition(RETRY)[0]
    left = left_over({"h2"} if fault.mend is replace_cut_host else ())
    print(f"{name} ({where}): the job had ended after {noticed:.1f} s, saying\n{said}\nleft: {left}")
    fault.mend(hosts)
    unlucky.first_step_of_a_try()
    assert noticed < NOTICED_S
    assert fault.says.format(where=where) in said
    assert left == []


def test_sigterm_to_the_command_that_follows_the_job(unlucky: Any, told_to_stop: Any) -> None:
    """The step that ran is that of the uninterrupted run."""
    unlucky.job.process.send_signal(signal.SIGTERM)
    unlucky.compare(told_to_stop(unlucky.job))
    assert "SIGTERM: the job is asked to stop" in unlucky.said()
