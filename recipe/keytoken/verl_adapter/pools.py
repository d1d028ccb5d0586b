"""The attribution group: its Ray resource pool, its workers and its place in the weight broadcast."""

from collections.abc import Callable, Coroutine
from typing import Any

import ray
from omegaconf import DictConfig

from keytoken.schema import KeyTokenConfig
from keytoken.verl_adapter.compat import (
    CheckpointEngineManager,
    RayClassWithInitArgs,
    RayWorkerGroup,
    ResourcePoolManager,
)
from keytoken.verl_adapter.machine import check_slots
from keytoken.verl_adapter.placement import ATTRIBUTION_POOL as POOL
from keytoken.workers.actors import AttributionWorker

ROLE = "attribution"


def add_pool(manager: ResourcePoolManager, num_workers: int, per_node: int) -> None:
    """Reserve one slot for each attribution worker: as many on each node as a node may have, all alike.

    Args:
        manager: verl's.
        num_workers: Of the group.
        per_node: At most so many on one node, ``trainer.n_gpus_per_node``; verl asks for the slots of a node
            all together.
    """
    on_each = max(count for count in range(1, per_node + 1) if num_workers % count == 0)
    manager.resource_pool_spec[POOL] = [on_each] * (num_workers // on_each)
    manager.mapping[ROLE] = POOL


def require_slots(needed: int) -> None:
    """Refuse a run that the cluster can never hold; Ray itself would wait for ever.

    Raises:
        ClusterError: the pools need more GPUs (logical slots on a CPU) than the cluster has.
    """
    check_slots(needed, present=int(ray.cluster_resources().get("GPU", 0)))


def start_group(manager: ResourcePoolManager, config: DictConfig, keytoken: KeyTokenConfig) -> RayWorkerGroup:
    """Start the attribution workers on their pool."""
    worker = RayClassWithInitArgs(
        cls=ray.remote(AttributionWorker), config=config.actor_rollout_ref, keytoken=keytoken
    )
    group = RayWorkerGroup(
        resource_pool=manager.get_resource_pool(ROLE),
        ray_cls_with_init=worker,
        device_name=config.trainer.device,
    )
    # verl asks for the collect mask after the first dispatch, which would make that call blocking.
    group._collect_info["train"] = group._query_collect_info("train")
    return group


def join_broadcast(manager: CheckpointEngineManager, group: RayWorkerGroup) -> None:
    """Make every weight sync feed the attribution group as well.

    The list is replaced, not extended: ``add_replicas`` would extend the rollout server's own list
    (verl 0.9.1, workers/rollout/llm_server.py:538).
    """
    manager.replicas = [*manager.replicas, AttributionReplica(group)]


def own_broadcast(manager: CheckpointEngineManager, group: RayWorkerGroup) -> CheckpointEngineManager:
    """Weight syncs of the attribution group alone, by the transport of those of the rollout."""
    return CheckpointEngineManager(manager.config, manager.actor_wg, [AttributionReplica(group)])


class AttributionReplica:
    """What the checkpoint manager takes for a rollout replica: workers, and pauses that are no-ops."""

    def __init__(self, group: RayWorkerGroup) -> None:
        self.workers = group.workers

    def __getattr__(self, name: str) -> Callable[..., Coroutine[Any, Any, None]]:
        if name not in _PAUSES:
            raise AttributeError(f"AttributionReplica has no {name!r}; verl's replica protocol has changed.")

        async def nothing(**_: Any) -> None:
            return None

        return nothing


_PAUSES = frozenset(
    {"sleep", "wake_up", "abort_all_requests", "resume_generation", "release_kv_cache", "resume_kv_cache"}
)
