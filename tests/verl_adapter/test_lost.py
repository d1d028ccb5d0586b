"""What is said of a process that died, from accounts that Ray 2.60.0 gave of killed ones."""

import pytest
import ray
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    NodeDiedError,
    OutOfMemoryError,
    RayTaskError,
)

from keytoken.errors import KeyTokenError
from keytoken.verl_adapter.lost import lost_process

KILLED = """The actor died unexpectedly before finishing this task.
	class_name: AttributionWorker
	actor_id: f5362aa21f0ee272e083795a04000000
	pid: 25702
	name: rz6WkDAttributionWorker_0:0
	namespace: cea21384-57b2-4481-aaf0-553a7b8290da
	ip: 10.0.0.3
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: \
Worker unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the \
process was killed by the OOM killer due to high memory usage, (2) ray stop --force was called."""


def died(text: str) -> ActorDiedError:
    error = ActorDiedError()
    error.error_msg = text
    return error


@pytest.mark.parametrize("wrappings", [0, 1, 2])
def test_a_killed_worker_is_named(wrappings: int) -> None:
    problem: BaseException = died(KILLED)
    for _ in range(wrappings):
        problem = RayTaskError("run", "traceback", problem).as_instanceof_cause()
    lost = lost_process(problem)
    assert lost is not None and lost.exit_code == 3 != KeyTokenError.exit_code
    assert str(lost).startswith(
        "The process of AttributionWorker (pid 25702 on 10.0.0.3) died: Worker unexpectedly exits with a "
        "connection error code 2. End of file. The same command goes on from the last complete checkpoint"
    )


def test_names_of_verl_are_explained() -> None:
    account = KILLED.replace("AttributionWorker\n", "create_colocated_worker_cls.<locals>.WorkerDict\n", 1)
    assert str(lost_process(died(account))).startswith(
        "The process of WorkerDict (pid 25702 on 10.0.0.3, a rank of the actor) died: Worker"
    )


def test_a_lost_host_is_said() -> None:
    account = KILLED.partition("The actor is dead")[0] + (
        "The actor died because its node has died. Node Id: 64d1\n"
        "\tthe actor's node was terminated unexpectedly: health check failed due to missing too many "
        "heartbeats"
    )
    assert str(lost_process(died(account))).startswith(
        "The process of AttributionWorker (pid 25702 on 10.0.0.3) died: its host was lost (health check "
        "failed due to missing too many heartbeats). The same command"
    )


def test_an_actor_that_ray_calls_by_its_number_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the loss of a host and its failed health checks Ray says no more than that."""
    number = "f5362aa21f0ee272e083795a04000000"
    row = {"ActorClassName": "WorkerDict", "Pid": 702, "Address": {"IPAddress": "10.0.0.4"}}
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray._private.state, "actors", {number: row}.get)
    problem = ActorUnavailableError("RpcError: Connection reset by peer; RPC code 14", bytes.fromhex(number))
    message = str(lost_process(problem))
    assert "`ray status` says which nodes live" in message and "dmesg" not in message
    assert message.startswith(
        "The process of WorkerDict (pid 702 on 10.0.0.4, a rank of the actor) cannot be reached: RpcError: "
        "Connection reset by peer; RPC code 14. The same command"
    )


def test_an_account_of_another_form_is_passed_on() -> None:
    assert str(lost_process(died("gone\n  for good."))).startswith(
        "A process of the run died: gone for good. The"
    )
    assert str(lost_process(NodeDiedError("host 7 is down"))).startswith(
        "A process of the run died: host 7 is"
    )


def test_a_node_without_memory_is_named() -> None:
    text = (
        "3 worker(s) were killed due to the node running low on memory. Memory on the node (IP: "
        "10.0.0.3, ID: afd6467249) was 22.20GB used / 23.54GB limit (0.9431), above its threshold."
    )
    message = str(lost_process(OutOfMemoryError(text)))
    assert "its node ran low on memory (22.20GB of 23.54GB used), and Ray killed processes. The" in message


def test_errors_of_a_program_are_no_losses() -> None:
    assert lost_process(ValueError("a bug")) is None
    assert lost_process(RayTaskError("run", "traceback", ValueError("a bug"))) is None
