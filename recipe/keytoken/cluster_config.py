"""On which hosts of a cluster the pools may be, and how long is waited for it."""

import dataclasses
import math

from keytoken.block import ROOT, Block, require

# How ``data_timeout_s`` comes to every process of a run.
DATA_TIMEOUT_VARIABLE = "KEYTOKEN_DATA_TIMEOUT_S"
_RAYS_OWN = ("", "CPU", "GPU", "memory", "object_store_memory")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig(Block):
    """Hosts of the pools, and limits on waits that would else have none.

    The hosts of a pool are named by a custom resource that they have: ``ray start
    --resources='{"rollout_host": 1}'``. Null is any host with a free GPU. A slot of a pool takes 0.0001 of
    the resource, so the number given to ``ray start`` is of no account.

    Attributes:
        actor_hosts: Of actor and reference; in ``trainer_mode=keytoken_sync`` of everything.
        rollout_hosts: Of the engines.
        attribution_hosts: Of the attribution group.
        start_timeout_s: Limit of the wait for a pool's GPUs, and of the start of the attribution group.
        answers_timeout_s: Longest time in which no prompt is finished.
        data_timeout_s: Longest wait of a process for an answer of the data plane's controller.
    """

    actor_hosts: str | None = None
    rollout_hosts: str | None = None
    attribution_hosts: str | None = None
    start_timeout_s: float = 900.0
    answers_timeout_s: float = 1800.0
    data_timeout_s: float = 600.0

    def __post_init__(self) -> None:
        where = f"{ROOT}.cluster"
        for name in ("actor_hosts", "rollout_hosts", "attribution_hosts"):
            resource = getattr(self, name)
            require(
                resource not in _RAYS_OWN,
                f"{where}.{name} is {resource!r}; name a custom resource, as in "
                "`ray start --resources='{\"rollout_host\": 1}'`, or null for any host.",
            )
        for name in ("start_timeout_s", "answers_timeout_s", "data_timeout_s"):
            value = getattr(self, name)
            require(0.0 < value < math.inf, f"{where}.{name} is {value}; use a finite number above 0.")

    def hosts_of(self, pool: str) -> str | None:
        """The resource that the hosts of a pool have."""
        return {
            "actor": self.actor_hosts,
            "rollout": self.rollout_hosts,
            "attribution": self.attribution_hosts,
        }[pool]
