"""N14: two jobs on one Ray cluster with one data plane.

Breaks: TransferQueue's controller has one name in one namespace for a whole Ray cluster. The run that comes
   second joins that of the first, and since prompts are named alike in all runs, each trains on rows of the
   other; the first to end takes the controller with it.
Where: TransferQueue 0.1.11, interface.py:119 and 200-202.
Bound: TransferQueue==0.1.11 with SimpleStorage; its other backends have names of their own.
Does: adds the number of Ray's job to the namespace; a run's driver and all its workers have the same.
"""

from typing import Any

import ray


def apply(interface: Any) -> None:
    """Put the namespace of this job into the two calls that name one."""
    interface.ray = _InNamespaceOfJob(interface.ray)
    interface.TransferQueueController = _InNamespaceOfJob(interface.TransferQueueController)


class _InNamespaceOfJob:
    """What it stands for, with another namespace where one is given."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def get_actor(self, name: str, namespace: str) -> Any:
        return self._inner.get_actor(name, namespace=_of_job(namespace))

    def options(self, *, namespace: str, **options: Any) -> Any:
        return self._inner.options(namespace=_of_job(namespace), **options)


def _of_job(namespace: str) -> str:
    return f"{namespace}_{ray.get_runtime_context().get_job_id()}"
