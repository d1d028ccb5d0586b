"""A process of a run that died: which one, where and how, from the ways in which Ray says so (ray 2.60.0)."""

import re

import ray
from ray.exceptions import (
    ActorUnavailableError,
    ActorUnschedulableError,
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    TaskUnschedulableError,
    WorkerCrashedError,
)

from keytoken.errors import ClusterError

# A process or machine is gone, or what it held (an object's owner, a node that work was pinned to).
LOSSES = (
    RayActorError,
    WorkerCrashedError,
    NodeDiedError,
    LocalRayletDiedError,
    ObjectLostError,
    OutOfMemoryError,
    ActorUnschedulableError,
    TaskUnschedulableError,
)
# Lines of Ray's account of an actor: "\tclass_name: AttributionWorker", "\tpid: 4711", "\tip: 10.0.0.3".
_FACT = re.compile(r"^\s*(class_name|pid|ip): (\S+)", re.MULTILINE)
# What verl's names and ours stand for.
_ROLES = {
    "WorkerDict": ", a rank of the actor",
    "ProbedServer": ", vLLM's server",
    "CheckpointEngineWorker": ", which hands weights to vLLM",
    "KeyTokenTaskRunner": ", the trainer",
    "TransferQueueController": ", the data plane",
    "SimpleStorageUnit": ", the data plane",
}
_DETAIL = re.compile(r"Worker exit detail: ([^.]*(?:\. [^S][^.]*)?)|(The node [^.]*)", re.DOTALL)
_HOST = re.compile(r"the actor's node was terminated[^:]*: ([^\n]*)")
_UNAVAILABLE = re.compile(r"is unavailable: (.*?)\.? The task may or may not", re.DOTALL)
_MEMORY = re.compile(r"Memory on the node .* was ([\d.]+\wB) used / ([\d.]+\wB) limit")
_AGAIN = (
    "The same command goes on from the last complete checkpoint (`keytoken submit --max-restarts N` gives it "
    "again by itself). "
)
_KILLED = (
    "Out of memory is the most frequent cause: the kernel's log (`dmesg`) names killed processes, and the "
    "logs of Ray's session folder hold the last words of each."
)
_GONE = "Its host has been switched off, or the network to it has failed: `ray status` says which nodes live."


def lost_process(problem: BaseException) -> ClusterError | None:
    """The loss of a process or machine in words; None for an error of another kind.

    Args:
        problem: What Ray raised, perhaps wrapped once for each process that it passed.
    """
    while isinstance(problem, RayTaskError):
        problem = problem.cause
    if not isinstance(problem, LOSSES):
        return None
    text = str(problem)
    facts = dict(_FACT.findall(text)) or _looked_up(problem)
    name = facts.get("class_name", "").rpartition(".")[2]  # Ray's has the function that made the class
    who = f"The process of {name}" if name else "A process of the run"
    role = _ROLES.get(name, "")
    where = f" (pid {facts['pid']} on {facts['ip']}{role})" if {"pid", "ip"} <= set(facts) else ""
    away = isinstance(problem, ActorUnavailableError)
    what, cause = ("cannot be reached", _GONE) if away else ("died", _GONE if _HOST.search(text) else _KILLED)
    return ClusterError(f"{who}{where} {what}: {_detail(text)}. {_AGAIN}{cause}")


def _looked_up(problem: BaseException) -> dict[str, str]:
    """The same facts where Ray's account has no more than an actor's number."""
    number = getattr(problem, "actor_id", None)
    if not number or not ray.is_initialized():
        return {}
    row = ray._private.state.actors(number)
    if not row:
        return {}
    return {"class_name": row["ActorClassName"], "pid": str(row["Pid"]), "ip": row["Address"]["IPAddress"]}


def _detail(text: str) -> str:
    host = _HOST.search(text)
    if host:
        return f"its host was lost ({' '.join(host[1].split()).rstrip('.')})"
    memory = _MEMORY.search(text)
    if memory:
        return f"its node ran low on memory ({memory[1]} of {memory[2]} used), and Ray killed processes"
    found = _DETAIL.search(text) or _UNAVAILABLE.search(text)
    detail = next((group for group in found.groups() if group), "") if found else text
    return " ".join(detail.split())[:300].rstrip(".")
