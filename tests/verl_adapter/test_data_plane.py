"""A real TransferQueue whose processes die or hang (N13), and two of them on one cluster (N14)."""

from __future__ import annotations

import asyncio
import inspect
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest
import ray
import transfer_queue as tq
from ray.exceptions import RayActorError
from transfer_queue import interface
from transfer_queue.client import AsyncTransferQueueClient

from keytoken.cluster_config import DATA_TIMEOUT_VARIABLE
from keytoken.errors import ClusterError
from keytoken.verl_adapter import register  # noqa: F401  (applies the shim)
from keytoken.verl_adapter.data_plane import named_as_the_cause, require_alive
from keytoken.verl_adapter.lost import lost_process
from keytoken.verl_adapter.shims import data_plane

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]  # starts Ray


@pytest.fixture
def queue(
    started_queue: Callable[..., AbstractContextManager[None]], monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    monkeypatch.setattr(data_plane, "LOOK_EVERY_S", 0.5)
    with started_queue(num_cpus=6):
        yield


def pid_of(process: str) -> int:
    (row,) = (row for row in ray._private.state.actors().values() if row["ActorClassName"] == process)
    return int(row["Pid"])


@pytest.fixture
def dead_controller(queue: None) -> None:
    os.kill(pid_of("TransferQueueController"), signal.SIGKILL)


def test_answers_come_as_ever(queue: None) -> None:
    require_alive()
    tq.kv_batch_put(keys=["a"], partition_id="train", tags=[{"status": "running"}])
    assert tq.kv_list() == {"train": {"a": {"status": "running"}}}


def test_a_dead_controller_is_named(dead_controller: None) -> None:
    began = time.monotonic()
    with pytest.raises(RayActorError) as loss, named_as_the_cause():
        tq.kv_list()
    assert time.monotonic() - began < 20.0
    said = str(lost_process(loss.value))
    assert "The process of TransferQueueController (pid" in said and ", the data plane) died" in said


def test_without_the_shim_the_wait_has_no_end(dead_controller: None, monkeypatch: pytest.MonkeyPatch) -> None:
    verls = AsyncTransferQueueClient._request_controller.__wrapped__
    monkeypatch.setattr(AsyncTransferQueueClient, "_request_controller", verls)
    asked = asyncio.run_coroutine_threadsafe(interface.async_kv_list(), tq.get_client()._loop)
    with pytest.raises(TimeoutError):
        asked.result(10.0)
    asked.cancel()


def test_a_controller_that_hangs_is_given_up(queue: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DATA_TIMEOUT_VARIABLE, "3")
    pid = pid_of("TransferQueueController")
    os.kill(pid, signal.SIGSTOP)
    try:
        with (
            pytest.raises(
                ClusterError, match=r"not answered for 3 s\. .*raise keytoken\.cluster\.data_timeout_s"
            ),
            named_as_the_cause(),
        ):
            tq.kv_list()
    finally:
        os.kill(pid, signal.SIGCONT)
    assert tq.kv_list() == {}


def test_a_dead_storage_is_named_for_what_it_makes_fail(queue: None) -> None:
    os.kill(pid_of("SimpleStorageUnit"), signal.SIGKILL)
    time.sleep(2.0)  # until Ray knows
    with pytest.raises(RayActorError) as loss, named_as_the_cause():
        raise RuntimeError("no answer in 200 s during get from storage unit 0")
    assert "The process of SimpleStorageUnit (pid" in str(lost_process(loss.value))


def test_other_errors_stay_what_they_are(queue: None) -> None:
    with pytest.raises(RuntimeError, match="of another kind"), named_as_the_cause():
        raise RuntimeError("of another kind")


ANOTHER_JOB = """
import ray
from keytoken.verl_adapter import register
import transfer_queue as tq
from omegaconf import OmegaConf

@ray.remote(num_cpus=0)
def worker():
    import verl  # which applies the shims in all processes of a run
    tq.init()  # joins what the driver has started
    return list(tq.kv_list()["train"])

modules = {"VERL_USE_EXTERNAL_MODULES": register.__name__}
ray.init(address="auto", log_to_driver=False, runtime_env={"env_vars": modules})
storage = {"num_data_storage_units": 1, "total_storage_size": 1000}
tq.init(OmegaConf.create({"backend": {"SimpleStorage": storage}}))
tq.kv_batch_put(keys=["theirs"], partition_id="train", tags=[{}])
print("seen:", ray.get(worker.remote()))
tq.close()
"""


def test_two_jobs_on_one_cluster_have_a_data_plane_each(queue: None) -> None:
    tq.kv_batch_put(keys=["ours"], partition_id="train", tags=[{}])
    address = ray.get_runtime_context().gcs_address
    done = subprocess.run(
        [sys.executable, "-c", ANOTHER_JOB],
        env={**os.environ, "RAY_ADDRESS": address},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert "seen: ['theirs']" in done.stdout, done.stdout + done.stderr
    assert list(tq.kv_list()["train"]) == ["ours"], "ours outlives theirs, which has been closed"


def test_the_name_is_still_one_for_a_whole_cluster() -> None:
    for function in (interface._init_from_existing, interface.init):
        assert 'namespace="transfer_queue"' in inspect.getsource(function)
