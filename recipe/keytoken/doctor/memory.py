"""What a run needs of the memory, estimated part by part, against what this process may have.

An estimate: activations, and what libraries keep to themselves beyond a fixed sum, are not in it. Parts:

- processes: imports and Ray's services, ``PROCESSES``, and ``WORKER`` for each slot, as seen on the demo;
- actor: weights, gradients and two moments of Adam, 16 bytes a parameter in float32, over all its ranks;
- reference and attribution: their weights, where the method needs them;
- rollout: each engine's weights and its KV cache;
- media: pixels of a step's prompts at the contract's largest size, once in the data plane and once in the
  worker of every slot, which keeps no more of them than ``keytoken.media.cache_gb``.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import psutil
from omegaconf import DictConfig, OmegaConf

from keytoken.data.contract import SamplingContract
from keytoken.doctor.devices import devices, visible
from keytoken.doctor.finding import GIB, Finding, Subject, fail, ok, size, skip, warn
from keytoken.doctor.model import num_parameters
from keytoken.resources import needs_attribution, num_slots

# `keytoken bench` on the demo, whose model is next to nothing: 7.6 GiB with two slots, 8.2 with three.
PROCESSES = 6.0 * GIB
WORKER = 0.7 * GIB
_TRAINED = 16  # bytes a parameter: float32 weight, gradient, two moments
_CPU_CACHE = 4 * GIB  # vLLM's KV cache on a CPU, unless kv_cache_memory_bytes says otherwise
_CLOSE, _SHOWN_SHARE = 0.9, 0.01
_NUM_CHANNELS = 3
_CGROUPS = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60  # a version 1 limit of nearly 2^63 means none


@dataclass(frozen=True, slots=True)
class Room:
    """Memory that this process and its children may still take, in bytes, and who says so."""

    available: int
    total: int
    limit: str


def ram(subject: Subject) -> Finding:
    """The machine's or the container's memory, and with a run its estimate."""
    room = memory_room()
    there = f"{size(room.available)} of {size(room.total)} available ({room.limit})"
    if subject.config is None:
        return ok(there)
    parts = host_parts(subject.config, subject.contract, num_parameters(subject))
    needed = sum(parts.values())
    words = f"a run needs about {size(needed)} ({_words(parts)}); {there}"
    remedy = (
        "Take fewer prompts (data.train_batch_size) or pixels (sampling=), smaller pools (pools=one_device), "
        "or more memory."
    )
    if needed > room.available:
        return fail(words, remedy) if needed > room.total else warn(words, f"Free memory. {remedy}")
    return warn(words, remedy) if needed > _CLOSE * room.available else ok(words)


def gpu_memory(subject: Subject) -> Finding:
    """Each pool's share of the model against the memory of one GPU; an estimate, so it stops nobody."""
    if subject.cpu:
        return skip("no GPU is used")
    count, (present, problem) = num_parameters(subject), devices()
    if count is None:
        return skip("the model's size is not known on this machine")
    parts = gpu_parts(subject.run, count)
    pool, needed = max(parts.items(), key=lambda item: item[1])
    words = f"on each GPU: {_words(parts)}, activations not counted"
    known = [device.total for device in visible(present) if device.total]
    if problem or not known:
        return skip(f"{words}; the memory of the GPUs here is not known")
    least = min(known)
    if needed > least:
        return warn(
            f"{words}; a GPU has {size(least)}",
            f"Spread the pool {pool} over more GPUs; the actor's share can stay in the host's memory: "
            "actor_rollout_ref.actor.fsdp_config.offload_policy=true",
        )
    return ok(f"{words}; a GPU has {size(least)}")


def host_parts(config: DictConfig, contract: SamplingContract, count: int | None) -> dict[str, float]:
    """Bytes of host memory by part; on GPUs the model itself lies there."""
    parts = {"processes": PROCESSES + WORKER * num_slots(config)}
    if config.trainer.device == "cpu":
        engines = _engines(config)
        cache = OmegaConf.select(config.actor_rollout_ref.rollout, "engine_kwargs.vllm.kv_cache_memory_bytes")
        parts["KV cache"] = engines * float(cache or _CPU_CACHE)
        if count is not None:
            parts["actor"] = float(_TRAINED * count)
            parts["engines"] = 4.0 * count * engines
            parts |= dict.fromkeys(_frozen(config), 4.0 * count)
    media = float(config.data.train_batch_size * clip_bytes(contract))
    parts["media"] = media + num_slots(config) * min(media, config.keytoken.media.cache_gb * GIB)
    return parts


def gpu_parts(config: DictConfig, count: int) -> dict[str, float]:
    """Bytes on each GPU by pool: what is sharded is divided by the size of a group of shards.

    Only ``offload_policy`` takes the actor off the GPU: what ``param_offload`` and ``optimizer_offload`` move
    away is back for each update (verl 0.9.1, workers/engine/base.py:330). The reference lies in host memory.
    """
    rollout, actor = config.actor_rollout_ref.rollout, config.actor_rollout_ref.actor.fsdp_config
    ranks = config.trainer.nnodes * config.trainer.n_gpus_per_node
    shards = min(actor.fsdp_size, ranks) if actor.fsdp_size > 0 else ranks
    trained = _TRAINED if actor.model_dtype in ("fp32", "float32") else _TRAINED // 2
    parts = {"actor": 0.0 if actor.offload_policy else trained * count / shards}
    parts["rollout"] = 2.0 * count / rollout.tensor_model_parallel_size
    if "attribution" in _frozen(config):
        parts["attribution"] = 4.0 * count / config.keytoken.attribution.num_workers
    return parts


def clip_bytes(contract: SamplingContract) -> int:
    """Bytes of a clip's patches in float32 at the contract's largest size, as the model takes them."""
    frames = max(contract.max_frames // contract.temporal_patch_size, 1)
    patches = frames * (contract.max_pixels // contract.patch_size**2)
    values = _NUM_CHANNELS * contract.temporal_patch_size * contract.patch_size**2
    return int(patches * values * 4)


def _engines(config: DictConfig) -> int:
    rollout = config.actor_rollout_ref.rollout
    return int(max(1, rollout.n_gpus_per_node // rollout.tensor_model_parallel_size))


def _frozen(config: DictConfig) -> list[str]:
    """Further copies of the weights, without optimizer."""
    names = ["reference"] if config.actor_rollout_ref.actor.use_kl_loss else []
    own_pool = config.keytoken.attribution.placement == "pool" and needs_attribution(config)
    return [*names, "attribution"] if own_pool else names


def _words(parts: dict[str, float]) -> str:
    """The parts from the largest to the smallest; those below one percent together."""
    total = sum(parts.values())
    large = {name: value for name, value in parts.items() if value >= _SHOWN_SHARE * total}
    rest = total - sum(large.values())
    words = [f"{name} {size(value)}" for name, value in sorted(large.items(), key=lambda part: -part[1])]
    return ", ".join([*words, f"all else {size(rest)}"] if rest else words)


def memory_room(cgroups: Path = _CGROUPS, own: Path = Path("/proc/self/cgroup")) -> Room:
    """The least of the machine's free memory and of what each control group around this process leaves."""
    machine = psutil.virtual_memory()
    room = Room(machine.available, machine.total, "the machine's")
    for folder, names in _groups(cgroups, own):
        limit, used = (_number(folder / name) for name in names)
        if limit is None or used is None or limit >= min(_UNLIMITED, room.total):
            continue
        left = max(limit - used + _reclaimable(folder / "memory.stat"), 0)
        if left < room.available:
            room = Room(left, limit, f"the limit of the control group {os.sep}{folder.relative_to(cgroups)}")
    return room


def _groups(cgroups: Path, own: Path) -> list[tuple[Path, tuple[str, str]]]:
    """Folders of the control groups around this process, of versions 1 and 2, with their files' names."""
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, names = cgroups, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            base, names = cgroups / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        folder = base / path.strip("/")
        found += [(each, names) for each in (folder, *folder.parents) if each.is_relative_to(base)]
    return found


def _number(file: Path) -> int | None:
    try:
        text = file.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _reclaimable(file: Path) -> int:
    """Cached file pages that the kernel gives up when memory is short."""
    try:
        entries = dict(line.split() for line in file.read_text(encoding="ascii").splitlines())
    except OSError:
        return 0
    return int(entries.get("inactive_file", 0))
