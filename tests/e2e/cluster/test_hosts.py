"""The three pools on hosts of their own, submitted from a machine without Ray."""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.cluster, pytest.mark.timeout(1800)]


@pytest.mark.hosts
def test_every_pool_is_on_its_hosts_until_the_job_is_stopped(
    hosts: Any, submit_across: Any, assert_placed: Callable[[], None], told_to_stop: Callable[[Any], int]
) -> None:
    """`ray job stop`: the running step is finished and saved."""
    job = submit_across("told", "--id=told")
    try:
        job.wait_for(lambda: (job.run.folder / "tokens" / "step_000001.parquet").exists())
        assert_placed()
        stop = ["-m", "ray.scripts.scripts", "job", "stop", "--address", hosts.address, "told"]
        done = subprocess.run(
            [*hosts.on_client, sys.executable, *stop],
            env={**os.environ, **hosts.client},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert told_to_stop(job) == len(job.run.metrics())
    finally:
        job.kill()


@pytest.mark.hosts
def test_hosts_that_the_cluster_lacks_are_named(submit_across: Any) -> None:
    job = submit_across("lacking", words=("keytoken.cluster.rollout_hosts=moon",))
    assert job.process.wait(300) == 3
    job.kill()
    log = job.log.read_text(errors="replace")
    assert "keytoken: keytoken.cluster.rollout_hosts=moon: the pool needs 1 GPUs, and the 0 nodes with" in log
