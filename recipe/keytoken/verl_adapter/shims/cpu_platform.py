"""S1: a CPU platform for verl.

Breaks: without a GPU, verl falls back to its "nvidia" platform and asks torch.cuda for everything.
Where: verl 0.9.1, plugin/platform/platform_manager.py:81-115 (registered: nvidia, npu, amd).
Bound: verl==0.9.1. Drop it when verl registers a platform called "cpu".
Does: registers one. Ray slots stay the logical resource "GPU" (``ray_kwargs.ray_init.num_gpus=N``), so
pool sizes mean the same as on a cluster; collectives run on gloo; memory counters report the resident
set of the process (bytes), which is what a CPU run has to fit into the machine.
"""

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from verl.plugin.platform.platform_base import PlatformBase


def _resident_bytes(*_: Any) -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


def _peak_resident_bytes(*_: Any) -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _free_and_total_bytes(*_: Any) -> tuple[int, int]:
    page = resource.getpagesize()
    return os.sysconf("SC_AVPHYS_PAGES") * page, os.sysconf("SC_PHYS_PAGES") * page


def _nothing(*_: Any, **__: Any) -> None:
    return None


class CpuDeviceModule(ModuleType):
    """``torch.cpu`` with the memory functions that verl expects of a ``torch.<device>`` module."""

    memory_allocated = staticmethod(_resident_bytes)
    memory_reserved = staticmethod(_resident_bytes)
    max_memory_allocated = staticmethod(_peak_resident_bytes)
    max_memory_reserved = staticmethod(_peak_resident_bytes)
    mem_get_info = staticmethod(_free_and_total_bytes)
    reset_peak_memory_stats = staticmethod(_nothing)
    set_per_process_memory_fraction = staticmethod(_nothing)
    empty_cache = staticmethod(_nothing)
    ipc_collect = staticmethod(_nothing)
    set_device = staticmethod(_nothing)
    manual_seed = staticmethod(torch.manual_seed)
    manual_seed_all = staticmethod(torch.manual_seed)
    get_rng_state = staticmethod(torch.get_rng_state)
    set_rng_state = staticmethod(torch.set_rng_state)

    def get_device_name(self, *_: Any) -> str:
        return "CPU"

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)


DEVICE_MODULE = CpuDeviceModule("keytoken_cpu_device")


class PlatformCPU(PlatformBase):
    """The host's cores as a verl platform."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = DEVICE_MODULE

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        # verl writes `.to(current_device())`; an index would mean a CUDA device there.
        return "cpu"  # type: ignore[return-value]

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None:
        return None

    def synchronize(self, device_index: int | None = None) -> None:
        return None

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        return None

    def empty_cache(self) -> None:
        return None

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def profiler_start(self) -> None:
        return None

    def profiler_stop(self) -> None:
        return None

    def cudart(self) -> Any:
        return None


def apply(manager: Any) -> None:
    """Register the platform and make it the current one, whatever was detected before."""
    manager.PlatformRegistry.register(platform="cpu")(PlatformCPU)
    manager.set_platform(PlatformCPU())
