"""Pools of a real Ray: what is placed behind them, and a pool that the cluster never has room for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest
from omegaconf import DictConfig, OmegaConf

from keytoken.cluster_config import ClusterConfig
from keytoken.errors import ClusterError
from keytoken.verl_adapter.compat import RayResourcePool
from keytoken.verl_adapter.placement import ATTRIBUTION_POOL, place_pools

pytestmark = pytest.mark.e2e  # starts Ray

CONFIG: DictConfig = OmegaConf.create(
    {
        "trainer": {"nnodes": 1, "n_gpus_per_node": 1},
        "actor_rollout_ref": {"hybrid_engine": False, "rollout": {"nnodes": 1, "n_gpus_per_node": 2}},
        "keytoken": {"attribution": {"placement": "actor"}},
    }
)


@pytest.fixture(scope="module", autouse=True)
def cluster(started_ray: Callable[..., AbstractContextManager[None]]) -> Iterator[None]:
    with started_ray(num_cpus=40, num_gpus=4, resources={"rollout_host": 1}):
        yield


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RayResourcePool, "get_placement_groups", RayResourcePool.get_placement_groups)


def place(name: str, slots: int = 1) -> RayResourcePool:
    pool = RayResourcePool(process_on_nodes=[slots], name_prefix=name)
    pool.get_placement_groups(device_name="cpu")
    return pool


def test_what_waits_for_the_rollout_comes_once_all_its_replicas_have_their_place() -> None:
    placed: list[str] = []
    place_pools(CONFIG, ClusterConfig(), {"rollout": lambda: placed.append("behind")})
    for name in ("global_pool", "rollout_pool_0", "rollout_pool_1", ATTRIBUTION_POOL):
        pool = place(name)
        pool.get_placement_groups(device_name="cpu")  # verl asks again for what it has
        placed.append(name)
    assert placed == ["global_pool", "rollout_pool_0", "behind", "rollout_pool_1", ATTRIBUTION_POOL]


def test_a_pool_without_room_is_given_up() -> None:
    hosts = ClusterConfig(rollout_hosts="rollout_host", start_timeout_s=2)
    behind: list[str] = []
    place_pools(CONFIG, hosts, {"rollout": lambda: behind.append("called")})
    with pytest.raises(
        ClusterError, match="9 GPUs on hosts with the resource rollout_host, for rollout_pool_0"
    ):
        place("rollout_pool_0", slots=9)
    assert behind == []
