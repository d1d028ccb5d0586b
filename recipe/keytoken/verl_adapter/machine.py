"""What a run asks of its machine, checked before Ray starts.

A full ``/dev/shm`` and a port in use show late otherwise: as a bus error inside a weight sync, or as a
service that never answers.
"""

import os
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from keytoken.errors import ClusterError
from keytoken.resources import runs_here

MIB = 1 << 20
SHARED_MEMORY = Path("/dev/shm")
LEFTOVERS = "psm_*"  # below it: what killed engines leave there
# One vLLM engine makes message rings of 160 and 240 MiB (seen with vLLM 0.27, VLLM_MQ_MAX_CHUNK_BYTES_MB=16).
ENGINE_BYTES = 400 * MIB
# Keys that name a port which nobody looks for a free one of.
PORT_KEYS = ("ray_kwargs.ray_init.dashboard_port", "transfer_queue.metrics.port")

# On one machine Ray takes its outer address, and its servers, those of verl and the data plane then listen
# beyond this machine. This makes it take 127.0.0.1: by default Ray has clusters on Linux only, and reads the
# variable on every system, as it is imported (Ray 2.60, _private/services.py:815).
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}

# A local run beside a cluster that was started on this machine.
CLUSTER_REMEDY = (
    "Stop it (`ray stop`), or say what is meant: RAY_ADDRESS=local for a Ray of its own, RAY_ADDRESS=auto to "
    "join."
)


def stay_on_loopback() -> None:
    """Before Ray is imported: let what a run on this machine starts listen on loopback only.

    Who sets the variable himself decides otherwise; the doctor's row ``exposure`` says so.
    """
    for name, value in LOOPBACK.items():
        os.environ.setdefault(name, value)


def check_machine(config: DictConfig) -> None:
    """Check shared memory and ports of this machine, if the run stays on it.

    Raises:
        ClusterError: names the resource, what is there, what is needed and the remedy.
    """
    if not runs_here(config):
        return  # a cluster's nodes are not this machine
    check_shared_memory(needed_shared_memory(config))
    check_ports({key: port for key in PORT_KEYS if (port := OmegaConf.select(config, key))})


def needed_shared_memory(config: DictConfig) -> int:
    """Bytes of ``/dev/shm`` that the rollout engines of one node take.

    Where weights cannot be handed over between processes on a GPU, they pass through shared memory in
    buckets, at most one being filled while another is read.
    """
    rollout = config.actor_rollout_ref.rollout
    engines = max(1, rollout.n_gpus_per_node // rollout.tensor_model_parallel_size)
    buckets = 2 * rollout.checkpoint_engine.update_weights_bucket_megabytes * MIB
    return engines * (ENGINE_BYTES + (buckets if config.trainer.device == "cpu" else 0))


def check_shared_memory(needed: int, folder: Path = SHARED_MEMORY) -> None:
    """Refuse a machine whose shared memory is too small or full; one that has none under this name passes."""
    if not folder.is_dir():
        return
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ClusterError(
            f"{folder} has {free / MIB:.0f} MiB free, the run needs {needed / MIB:.0f} MiB (400 for each "
            "rollout engine, and its weight buckets). In a container start it with `docker run "
            f"--shm-size=8g`; otherwise remove what killed runs left there ({folder}/{LEFTOVERS}), or make "
            f"it larger: mount -o remount,size=8g {folder}"
        )


def check_ports(ports: Mapping[str, int]) -> None:
    """Refuse a configured port that another program listens on.

    Args:
        ports: Port numbers by the key that names them.
    """
    for key, port in ports.items():
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("0.0.0.0", port))
            except (OSError, OverflowError) as problem:
                reason = getattr(problem, "errno", None)
                text = os.strerror(reason) if reason else str(problem)
                raise ClusterError(
                    f"{key}={port}: the port cannot be used ({text}). Stop the program that holds it "
                    f"(`ss -ltnp 'sport = :{port}'` names it), or set {key} to another port."
                ) from problem


def check_slots(needed: int, present: int) -> None:
    """Refuse a run that the cluster can never hold; Ray itself would wait for ever.

    Args:
        needed: GPUs (logical slots on a CPU) of all pools together.
        present: GPUs that the Ray cluster has.
    """
    if present < needed:
        raise ClusterError(
            f"The pools of this run need {needed} GPUs, the Ray cluster has {present}. Add nodes, or make "
            "the pools smaller: trainer.nnodes x trainer.n_gpus_per_node (actor), "
            "actor_rollout_ref.rollout.nnodes x n_gpus_per_node (rollout), keytoken.attribution.num_workers "
            "(attribution); pools=one_device needs one GPU, platform=cpu none."
        )
