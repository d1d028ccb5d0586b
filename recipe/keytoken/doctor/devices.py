"""GPUs: the driver, what torch was built for, what is free, and whether a kernel runs."""

import csv
import ctypes
import os
import shutil
from dataclasses import dataclass

import torch

from keytoken.doctor.child import run_child, run_program
from keytoken.doctor.finding import GIB, MIB, Finding, Subject, fail, ok, several, skip, warn
from keytoken.resources import num_slots
from keytoken.verl_adapter.shims.hooks import on_cpu

# bfloat16 on tensor cores and FlashAttention 2 begin with Ampere.
_CAPABILITY = (8, 0)
_FREE_SHARE = 0.9  # less is in use by somebody else
_QUERY_LIMIT_S = 20.0
_KERNEL_LIMIT_S = 180.0
_FIELDS = "index,name,driver_version,memory.total,memory.free,compute_cap"


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU as the driver lists it; memory in bytes."""

    index: int
    name: str
    driver: str
    total: int
    free: int
    capability: tuple[int, int]


def gpu(subject: Subject) -> Finding:
    """The driver and its GPUs, without starting CUDA in this process."""
    present, problem = devices()
    if subject.cpu:
        note = f"; {len(present)} x {present[0].name} are not used by it" if present else ""
        if subject.config is not None and not on_cpu():
            return warn(
                f"platform=cpu, and torch {torch.__version__} is a CUDA build{note}",
                "Install requirements/cpu.txt (make setup), or set VERL_PLATFORM=cpu for all processes.",
            )
        return skip(f"everything is computed on the CPU (torch {torch.__version__}){note}")
    if torch.version.cuda is None:
        return fail(
            f"the run needs GPUs, and torch {torch.__version__} is built without CUDA",
            "Install requirements/gpu.txt, or run on the CPU: platform=cpu.",
        )
    if problem:
        count = count_by_driver()
        if count:
            return warn(
                f"{count} GPUs by the driver's library, and nothing more is known of them: {problem}",
                "Let nvidia-smi answer; in a container: NVIDIA_DRIVER_CAPABILITIES=compute,utility",
            )
        return fail(f"no NVIDIA driver answers: {problem}", "Install the driver, or run with platform=cpu.")
    return _judge(present, subject)


def _judge(present: list[Device], subject: Subject) -> Finding:
    wanted, offered = _version(torch.version.cuda or ""), driver_cuda()
    if offered and offered[0] < wanted[0]:  # within a major version, newer builds run on older drivers
        return fail(
            f"torch {torch.__version__} needs CUDA {wanted[0]}, driver {present[0].driver} goes up to CUDA "
            f"{offered[0]}.{offered[1]}",
            f"Install a driver for CUDA {wanted[0]}, or a torch that was built for CUDA {offered[0]}.",
        )
    seen = visible(present)
    needed = num_slots(subject.config) if subject.config is not None and subject.here else 1
    if len(seen) < needed:
        hidden = " (CUDA_VISIBLE_DEVICES hides others)" if len(present) > len(seen) else ""
        return fail(
            f"the pools need {needed} GPUs together, {len(seen)} are visible{hidden}",
            "Make the pools smaller (pools=one_device needs one), add GPUs, or join a cluster "
            "(RAY_ADDRESS=auto).",
        )
    old = [device for device in seen if device.capability < _CAPABILITY]
    if old:
        return fail(
            f"GPU {old[0].index}, {old[0].name}, has compute capability "
            f"{old[0].capability[0]}.{old[0].capability[1]}; bf16 and FlashAttention 2 need 8.0",
            "Hide it by CUDA_VISIBLE_DEVICES, or use an Ampere or newer GPU.",
        )
    busy = [device for device in seen if device.free < _FREE_SHARE * device.total]
    if busy:
        used = [f"GPU {d.index}: {d.free / GIB:.0f} of {d.total / GIB:.0f} GiB free" for d in busy]
        return warn(
            several(used), "See who holds it (`nvidia-smi`); vLLM takes its share of the whole memory."
        )
    first = seen[0]
    cuda = f", driver {first.driver} (CUDA {offered[0]}.{offered[1]})" if offered else ""
    return ok(
        f"{len(seen)} x {first.name}, {first.free / GIB:.0f} GiB free{cuda}, "
        f"torch for CUDA {torch.version.cuda}"
    )


def gpu_kernel(subject: Subject) -> Finding:
    """One bf16 product on every visible GPU, in a child: no context stays in this process."""
    if subject.cpu:
        return skip("no GPU is used")
    code = (
        "import torch\n"
        "assert torch.cuda.is_available(), 'torch.cuda.is_available() is false'\n"
        "for n in range(torch.cuda.device_count()):\n"
        "    a = torch.ones(256, 256, device=f'cuda:{n}', dtype=torch.bfloat16)\n"
        "    assert float((a @ a)[0, 0]) == 256.0, f'GPU {n} computes a wrong product'\n"
        "print(torch.cuda.device_count())\n"
    )
    done = run_child(["-c", code], _KERNEL_LIMIT_S)
    if done.error:
        return fail(
            f"a bf16 product failed: {done.error}",
            "Try `nvidia-smi`; restart the driver or the machine, or hide that GPU by CUDA_VISIBLE_DEVICES.",
        )
    return ok(f"a bf16 product is right on {done.output.strip()} GPUs ({done.seconds:.0f} s)")


def devices() -> tuple[list[Device], str]:
    """GPUs by ``nvidia-smi``, or the reason why it gives none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return [], "nvidia-smi is not on the PATH"
    command = [program, f"--query-gpu={_FIELDS}", "--format=csv,noheader,nounits"]
    try:
        done = run_program(command, _QUERY_LIMIT_S)
    except OSError as problem:
        return [], f"nvidia-smi: {problem}"
    rows = [[word.strip() for word in row] for row in csv.reader(done.output.splitlines())]
    found = [_device(row) for row in rows if len(row) == len(_FIELDS.split(",")) and row[0].isdigit()]
    return found, "" if found else f"nvidia-smi: {done.output.strip() or done.error or 'it lists none'}"


def count_by_driver() -> int:
    """GPUs that a program may use, asked of the driver's library in a child; 0 without a driver."""
    code = (
        "import ctypes\n"
        "library, count = ctypes.CDLL('libcuda.so.1'), ctypes.c_int(0)\n"
        "assert library.cuInit(0) == 0 and library.cuDeviceGetCount(ctypes.byref(count)) == 0\n"
        "print(count.value)\n"
    )
    done = run_child(["-c", code], _QUERY_LIMIT_S)
    return 0 if done.error else int(done.output)


def _device(row: list[str]) -> Device:
    index, name, driver, total, free, capability = row
    return Device(int(index), name, driver, _mib(total), _mib(free), _version(capability))


def _mib(text: str) -> int:
    return int(float(text) * MIB) if text.replace(".", "", 1).isdigit() else 0  # "[N/A]" on shared memory


def _version(text: str) -> tuple[int, int]:
    major, _, rest = text.partition(".")
    minor = rest.partition(".")[0]
    return (int(major) if major.isdigit() else 0), (int(minor) if minor.isdigit() else 0)


def driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA that the driver runs, asked of the driver's library; None without one."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int(0)
    if library.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return version.value // 1000, version.value % 1000 // 10


def visible(present: list[Device]) -> list[Device]:
    """Those that CUDA_VISIBLE_DEVICES leaves; names that are no numbers (UUIDs) are counted in order."""
    words = os.environ.get("CUDA_VISIBLE_DEVICES")
    if words is None:
        return present
    chosen = [word.strip() for word in words.split(",") if word.strip() not in ("", "-1")]
    numbers = {int(word) for word in chosen if word.isdigit()}
    return [d for d in present if d.index in numbers] if numbers else present[: len(chosen)]
