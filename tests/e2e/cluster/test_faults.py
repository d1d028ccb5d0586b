"""The loss of a process, a host or its network while a job trains over several hosts.

Each is caused when the checkpoint of step 2 is complete. The job has to end with a message that names what
was lost, and its second try has to make the same steps 3 and 4 as the uninterrupted run. What was seen is
told in ``recipe/docs/faults.md``.
"""

import dataclasses
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.cluster, pytest.mark.timeout(1800)]

# Ray calls a host dead, or a process, before this; then the delay, and the start of the second try.
NOTICED_S = 90.0
RESTART_DELAY_S = 15


@dataclasses.dataclass(frozen=True)
class Fault:
    """What is done to the cluster, what is said of it, and how a host comes back.

    Attributes:
        cause: Causes the fault; returns what the message says of its place.
        says: The first words of the message, in which ``{where}`` is that.
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
    "rollout server": Fault(killing("ray::ProbedServer", "h2"), "The process of ProbedServer ({where}) died"),
    "actor rank": Fault(killing("ray::WorkerDict", "h4"), "The process of WorkerDict ({where}) died"),
    "driver": Fault(killing("python -m keytoken.cli train", "h1"), "Job entrypoint command failed"),
    "host": Fault(kill_host, "{where}", start_host),
    "network": Fault(cut_network, "{where}", replace_cut_host),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_job_says_what_was_lost_and_goes_on(
    name: str, hosts: Any, submit_across: Any, across_hosts: Any, assert_same_steps: Any
) -> None:
    fault, folder = FAULTS[name], name.replace(" ", "_")
    job = submit_across(folder, "--max-restarts=1", f"--restart-delay={RESTART_DELAY_S}")
    marker = job.run.folder / "checkpoints" / "latest_checkpointed_iteration.txt"
    job.wait_for(lambda: marker.exists() and marker.read_text().strip() == "2")
    before = job.log.read_text(errors="replace")
    where, began = fault.cause(hosts), time.monotonic()
    job.wait_for(lambda: "Try 1 of 1" in job.log.read_text(errors="replace"))
    noticed = time.monotonic() - began
    said = job.log.read_text(errors="replace").removeprefix(before).partition("Try 1 of 1")[0]
    print(f"{name} ({where}): the job had ended after {noticed:.1f} s, saying\n{said}")
    fault.mend(hosts)
    resumed = job.finish()
    print("left", {h: [" ".join(p.cmdline())[:60] for p in ps] for h, ps in hosts.processes("VLLM").items()})
    assert noticed < NOTICED_S
    assert fault.says.format(where=where) in said
    assert [int(step["training/global_step"]) for step in resumed.metrics()] == [3, 4]
    assert_same_steps(resumed, across_hosts, (3, 4))
