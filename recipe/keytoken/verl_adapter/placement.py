"""Pools on hosts that the configuration names, and a bound on the wait for them.

verl asks Ray for placement groups and waits for ever (verl 0.9.1, single_controller/ray/base.py:162). Its
pools can ask for hosts with a certain accelerator, which to Ray is a custom resource like any other; no key
of verl's configuration leads there.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import ray
from omegaconf import DictConfig

from keytoken.cluster_config import ClusterConfig
from keytoken.errors import ClusterError
from keytoken.resources import slots_of
from keytoken.verl_adapter.bounded import bounded
from keytoken.verl_adapter.compat import RayResourcePool

ATTRIBUTION_POOL = "attribution_pool"
# How the names of pools begin; verl's: trainer_base.py:817, workers/rollout/replica.py:198.
_POOLS = {"global_pool": "actor", "rollout_pool_": "rollout", ATTRIBUTION_POOL: "attribution"}
_verls: Callable[..., list[Any]] = RayResourcePool.get_placement_groups


def place_pools(
    config: DictConfig, cluster: ClusterConfig, behind: Mapping[str, Callable[[], object]] | None = None
) -> None:
    """Let the pools that this process makes from now on be placed as a run's configuration says.

    Args:
        config: The run's.
        cluster: Its hosts, and the bound on the wait for them.
        behind: What to call as soon as all slots of a pool have their place, by the pool's name. verl makes a
            pool of its own for each replica of the rollout.
    """
    unplaced = slots_of(config)

    def get_placement_groups(self: Any, *args: Any, **kwargs: Any) -> list[Any]:
        if self.pgs is not None:
            return self.pgs
        pool = next((pool for start, pool in _POOLS.items() if self.name_prefix.startswith(start)), None)
        self.accelerator_type = cluster.hosts_of(pool) if pool else None
        where = f" on hosts with the resource {self.accelerator_type}" if self.accelerator_type else ""
        placed = bounded(
            partial(_verls, self, *args, **kwargs),
            cluster.start_timeout_s,
            f"The wait for {self.world_size} GPUs{where}, for {self.name_prefix},",
            "Other jobs hold them, or no node has as many free as the pool asks of each node: compare "
            "`ray status` with the pools of the run. A cluster that grows by itself may need more time: "
            "keytoken.cluster.start_timeout_s.",
            ClusterError,
        )
        if pool in unplaced:
            unplaced[pool] -= self.world_size
            if unplaced[pool] == 0 and behind and pool in behind:
                behind[pool]()
        return placed

    RayResourcePool.get_placement_groups = get_placement_groups


def require_hosts(config: DictConfig, cluster: ClusterConfig) -> None:
    """Refuse hosts that the cluster does not have; Ray itself would wait for them.

    Raises:
        ClusterError: names the key, what its hosts have together and how a host is given the resource.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for pool, needed in slots_of(config).items():
        resource = cluster.hosts_of(pool)
        having = [node for node in nodes if resource in node]
        present = int(sum(node.get("GPU", 0) for node in having))
        if resource is not None and present < needed:
            raise ClusterError(
                f"keytoken.cluster.{pool}_hosts={resource}: the pool needs {needed} GPUs, and the "
                f"{len(having)} nodes with that resource have {present}. Start Ray on the hosts meant by "
                f"`ray start --resources='{{\"{resource}\": 1}}' ...`; `ray status` shows what there is."
            )
