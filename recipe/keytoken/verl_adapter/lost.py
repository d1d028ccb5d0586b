"""A process of a run that died: which one, where and how, from the ways in which Ray says so (ray 2.60.0)."""

import re

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
_DETAIL = re.compile(r"Worker exit detail: ([^.]*(?:\. [^S][^.]*)?)|(The node [^.]*)", re.DOTALL)
_MEMORY = re.compile(r"Memory on the node .* was ([\d.]+\wB) used / ([\d.]+\wB) limit")
_REMEDY = (
    "The same command goes on from the last complete checkpoint (`keytoken submit --max-restarts N` gives it "
    "again by itself). Out of memory is the most frequent cause: the kernel's log (`dmesg`) names killed "
    "processes, and the logs of Ray's session folder hold the last words of each."
)


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
    facts = dict(_FACT.findall(text))
    who = f"The process of {facts['class_name']}" if "class_name" in facts else "A process of the run"
    where = f" (pid {facts['pid']} on {facts['ip']})" if {"pid", "ip"} <= set(facts) else ""
    what = "cannot be reached" if isinstance(problem, ActorUnavailableError) else "died"
    return ClusterError(f"{who}{where} {what}: {_detail(text)}. {_REMEDY}")


def _detail(text: str) -> str:
    memory = _MEMORY.search(text)
    if memory:
        return f"its node ran low on memory ({memory[1]} of {memory[2]} used), and Ray killed processes"
    found = _DETAIL.search(text)
    detail = (found[1] or found[2]) if found else text[:200]
    return " ".join(detail.split()).rstrip(".")
