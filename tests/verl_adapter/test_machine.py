"""Checks before Ray starts: shared memory, ports, slots."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from keytoken.errors import ClusterError
from keytoken.verl_adapter import machine
from keytoken.verl_adapter.machine import MIB, check_machine, check_ports, check_shared_memory, check_slots


def run_config(device: str = "cpu", gpus: int = 1, tensor_parallel: int = 1, **ray_init: Any) -> DictConfig:
    rollout = {
        "n_gpus_per_node": gpus,
        "tensor_model_parallel_size": tensor_parallel,
        "checkpoint_engine": {"update_weights_bucket_megabytes": 16},
    }
    return OmegaConf.create(
        {
            "trainer": {"device": device},
            "actor_rollout_ref": {"rollout": rollout},
            "ray_kwargs": {"ray_init": ray_init},
        }
    )


@pytest.fixture
def used_port() -> Any:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


def test_the_need_grows_with_the_engines() -> None:
    need = machine.needed_shared_memory
    assert need(run_config()) == (400 + 2 * 16) * MIB
    assert need(run_config(gpus=4, tensor_parallel=2)) == 2 * need(run_config())
    assert need(run_config(device="cuda", gpus=3)) == 3 * 400 * MIB


def test_shared_memory_that_is_too_small_is_refused(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    check_shared_memory(free // 2, tmp_path)
    with pytest.raises(ClusterError) as caught:
        check_shared_memory(free * 2, tmp_path)
    for part in (str(tmp_path), f"needs {free * 2 / MIB:.0f} MiB", "docker run --shm-size", "psm_*"):
        assert part in str(caught.value)


def test_a_system_without_that_folder_passes(tmp_path: Path) -> None:
    check_shared_memory(1 << 60, tmp_path / "nowhere")


def test_a_port_in_use_is_refused_by_its_key(used_port: int) -> None:
    with pytest.raises(ClusterError) as caught:
        check_ports({"ray_kwargs.ray_init.dashboard_port": used_port})
    for part in (
        f"ray_kwargs.ray_init.dashboard_port={used_port}",
        "already in use",
        "another port",
        "ss -ltnp",
    ):
        assert part in str(caught.value)


def test_a_free_port_passes_and_a_wrong_number_does_not(used_port: int) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = probe.getsockname()[1]
    check_ports({"some.key": free})
    with pytest.raises(ClusterError, match=r"some\.key=70000"):
        check_ports({"some.key": 70000})


def test_both_checks_belong_to_a_run_on_this_machine(
    used_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ClusterError, match="dashboard_port"):
        check_machine(run_config(dashboard_port=used_port))
    with pytest.raises(ClusterError, match="shm-size"):
        check_machine(run_config(gpus=1 << 40))
    check_machine(run_config(address="10.0.0.1:6379", gpus=1 << 40, dashboard_port=used_port))


def test_pools_that_ask_for_more_than_the_cluster_has() -> None:
    check_slots(needed=3, present=3)
    with pytest.raises(ClusterError) as caught:
        check_slots(needed=4, present=3)
    for part in ("need 4 GPUs", "has 3", "trainer.n_gpus_per_node", "num_workers", "pools=one_device"):
        assert part in str(caught.value)
