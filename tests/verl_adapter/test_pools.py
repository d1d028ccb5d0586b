"""The attribution group's place in verl's pools and in its weight broadcast."""

from __future__ import annotations

import asyncio
import inspect
import re
from types import SimpleNamespace

import pytest

from keytoken.verl_adapter.compat import CheckpointEngineManager, ResourcePoolManager, Role
from keytoken.verl_adapter.pools import POOL, ROLE, AttributionReplica, add_pool, join_broadcast


@pytest.mark.parametrize(
    ("workers", "per_node", "nodes"),
    [(3, 4, [3]), (1, 8, [1]), (16, 8, [8, 8]), (12, 8, [6, 6]), (2, 1, [1, 1])],
)
def test_the_pool_is_added_beside_verls_own(workers: int, per_node: int, nodes: list[int]) -> None:
    """No node is asked for more slots than it has; verl wants as many of each."""
    manager = ResourcePoolManager(
        resource_pool_spec={"global_pool": [2]}, mapping={Role.Actor: "global_pool"}
    )
    add_pool(manager, workers, per_node)
    assert manager.resource_pool_spec == {"global_pool": [2], POOL: nodes}
    assert manager.mapping == {Role.Actor: "global_pool", ROLE: POOL}


def test_the_replica_has_all_that_the_manager_asks_of_one() -> None:
    """Every attribute that verl's checkpoint manager reads from a replica, found in its source."""
    replica = AttributionReplica(SimpleNamespace(workers=["worker"]))
    source = inspect.getsource(CheckpointEngineManager)
    asked = set(re.findall(r"\b(?:replica|r)\.(\w+)", source)) - {"workers"}
    assert {"abort_all_requests", "resume_generation"} <= asked
    for name in asked:
        assert asyncio.run(getattr(replica, name)()) is None
    assert replica.workers == ["worker"]


def test_an_unknown_question_is_an_error() -> None:
    with pytest.raises(AttributeError, match=r"no 'new_in_the_next_release'; verl's replica protocol has"):
        _ = AttributionReplica(SimpleNamespace(workers=[])).new_in_the_next_release


def test_the_servers_own_list_of_replicas_stays_as_it_is() -> None:
    """verl's ``add_replicas`` extends a list that the rollout server uses for routing requests."""
    servers = ["server"]
    manager = SimpleNamespace(replicas=servers)
    join_broadcast(manager, SimpleNamespace(workers=["worker"]))
    assert servers == ["server"]
    assert manager.replicas[0] == "server"
    assert manager.replicas[1].workers == ["worker"]
