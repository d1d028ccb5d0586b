"""What is measured on: times, memory and launches on a GPU, and their counterparts on a CPU."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MIB = 1 << 20
# Memory that is overwritten before every timed call, so that no call finds its inputs in a cache.
FLUSHED_BYTES = 256 * MIB


class Machine(Protocol):
    """A device and how to measure on it.

    Attributes:
        device: Where the inputs live.
        counted: What :meth:`launches` counts.
        weighed: What :meth:`peak_bytes` measures.
    """

    device: torch.device
    counted: str
    weighed: str

    def describe(self) -> dict[str, str]:
        """Hardware and versions."""
        ...

    def free_bytes(self) -> int:
        """Memory for inputs and results."""
        ...

    def time_ms(self, call: Callable[[], object]) -> float:
        """How long the device works on one call, from cold caches."""
        ...

    def peak_bytes(self, call: Callable[[], object]) -> int:
        """Memory that a call needs on top of its inputs."""
        ...

    def launches(self, call: Callable[[], object]) -> int:
        """What a call starts on the device."""
        ...

    def replayable(self, call: Callable[[], object]) -> Callable[[], object]:
        """The same work without the host's share in it, where the device can record it."""
        ...


class Gpu:
    """A CUDA device, by its own events, allocator and profiler."""

    counted = "kernels launched"
    weighed = "peak MiB"

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size
        self._flushed = torch.empty(max(FLUSHED_BYTES, 4 * cache), dtype=torch.int8, device=self.device)

    def describe(self) -> dict[str, str]:
        return {
            "device": torch.cuda.get_device_name(self.device),
            "memory": f"{torch.cuda.get_device_properties(self.device).total_memory / 2**30:.0f} GiB",
            "driver": _driver(),
            "cuda": str(torch.version.cuda or torch.version.hip),
        }

    def free_bytes(self) -> int:
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0]

    def time_ms(self, call: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flushed.zero_()  # the GPU is busy with it while the host prepares the launch
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def peak_bytes(self, call: Callable[[], object]) -> int:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def launches(self, call: Callable[[], object]) -> int:
        with profile(activities=[ProfilerActivity.CUDA]) as record:
            call()
            torch.cuda.synchronize()
        return sum(
            event.device_type == DeviceType.CUDA and not event.name.startswith(("Memcpy", "Memset"))
            for event in record.events()
        )

    def replayable(self, call: Callable[[], object]) -> Callable[[], object]:
        graph = torch.cuda.CUDAGraph()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            call()
        return graph.replay


class Cpu:
    """The processor: wall-clock time; memory and work by the operators of torch that run."""

    counted = "operators of torch"
    weighed = "largest array, MiB"

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self._flushed = torch.empty(FLUSHED_BYTES // 4, dtype=torch.int8)

    def describe(self) -> dict[str, str]:
        return {"device": f"CPU: {_processor()}", "threads": str(torch.get_num_threads())}

    def free_bytes(self) -> int:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    def time_ms(self, call: Callable[[], object]) -> float:
        self._flushed.zero_()
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1000

    def peak_bytes(self, call: Callable[[], object]) -> int:
        with _Operators() as seen:
            call()
        return seen.largest_bytes

    def launches(self, call: Callable[[], object]) -> int:
        with _Operators() as seen:
            call()
        return seen.count

    def replayable(self, call: Callable[[], object]) -> Callable[[], object]:
        return call


class _Operators(TorchDispatchMode):
    """Counts operators, views aside, and finds the largest array that one of them makes."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.largest_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count += not func.is_view
        known = {_address(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and _address(leaf) not in known:
                self.largest_bytes = max(self.largest_bytes, leaf.numel() * leaf.element_size())
        return result


def machine_for(device: str) -> Machine:
    """``cuda``, ``cpu``, or ``auto``: a GPU where there is one.

    Raises:
        ValueError: a GPU is asked for where there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here. Leave the option out, or use --device cpu.")
    return Gpu() if device != "cpu" and torch.cuda.is_available() else Cpu()


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _driver() -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return "unknown"
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=30)
    return answer.stdout.split("\n")[0].strip() or "unknown"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
