"""The three pools on hosts of their own, submitted from a machine without Ray."""

from typing import Any

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.cluster, pytest.mark.timeout(1800)]


def test_every_pool_is_on_its_hosts(across_hosts: Any, placed: dict[str, list[str]]) -> None:
    assert placed == {
        "ray::AttributionWorker": ["h1"],
        "ray::ProbedServer": ["h2"],
        "ray::WorkerDict": ["h3", "h4"],
    }
    assert len(across_hosts.metrics()) == 16


def test_hosts_that_the_cluster_lacks_are_named(submit_across: Any) -> None:
    job = submit_across("lacking", words=("keytoken.cluster.rollout_hosts=moon",))
    assert job.process.wait(300) == 3
    job.kill()
    log = job.log.read_text(errors="replace")
    assert "keytoken: keytoken.cluster.rollout_hosts=moon: the pool needs 1 GPUs, and the 0 nodes with" in log


def test_hosts_make_no_difference(across_hosts: Any, one_host: Any, assert_same_steps: Any) -> None:
    """The same steps as two ranks on one host: weights, answers, scores and metrics, bit for bit."""
    assert_same_steps(across_hosts, one_host, (1, 2, 3, 4))
