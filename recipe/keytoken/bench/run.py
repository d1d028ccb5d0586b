"""What attribution costs: the demo trained with it and without it, in one table.

All runs have the same data, seeds, loss, reference pass and pools. The plain ones keep all tokens
(``keytoken.method.selection=null``), so they start no attribution group and run no view; the stock one also
computes log-probs as verl by itself does, from logits of whole sequences and a prompt for every answer. Each
is a process of its own: Ray and the worker processes of one run are gone before the next one starts.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import psutil

from keytoken.bench.figures import (
    ATTRIBUTED,
    NUM_WARM_UP_STEPS,
    PLAIN,
    SEPARATE,
    STOCK,
    Measured,
    measure,
    ratio,
    table,
)
from keytoken.bench.picture import draw
from keytoken.demo.curves import read_metrics
from keytoken.demo.run import DEMO_VARIABLE, prepare_for_training
from keytoken.errors import ClusterError, ConfigurationError

GIB = 1 << 30
LIMIT_S = 1200.0
SAMPLE_INTERVAL_S = 2.0

_ALL_TOKENS, _APART = "keytoken.method.selection=null", "keytoken.prefix=separate"
ARMS = {
    STOCK: [_ALL_TOKENS, _APART, "keytoken.kernels.head=verl"],
    PLAIN: [_ALL_TOKENS],
    SEPARATE: [_APART],
    ATTRIBUTED: [],
}
SETTINGS = (
    "experiment=demo_cpu",
    "method=video_ktr",
    "trainer.val_before_train=false",
    "trainer.test_freq=-1",
    "trainer.save_freq=-1",
    "trainer.resume_mode=disable",
    "keytoken.export.enabled=false",
)


def bench(overrides: Sequence[str], steps: int, announce: Callable[[str], None]) -> str:
    """Run all arms and return the table; ``bench.json`` and ``bench.png`` are in the folder that it names.

    Args:
        overrides: hydra overrides for all arms.
        steps: training steps of each arm.
        announce: told what is going on, a line at a time.

    Raises:
        ConfigurationError: too few steps.
        ClusterError: a run failed or took too long.
    """
    if steps <= NUM_WARM_UP_STEPS:
        raise ConfigurationError(
            f"--steps {steps}: the first {NUM_WARM_UP_STEPS} steps are not counted; use at least "
            f"{NUM_WARM_UP_STEPS + 1}."
        )
    if DEMO_VARIABLE not in os.environ:
        prepare_for_training()
    folder = Path("outputs", "bench", time.strftime("%Y%m%d-%H%M%S")).absolute()
    measured = {}
    for name, own in ARMS.items():
        run_dir = folder / name.lower().replace(" ", "_").replace(",", "")
        announce(f"{name}: {steps} steps; log in {run_dir / 'log.txt'}")
        words = [*SETTINGS, f"trainer.total_training_steps={steps}", f"keytoken.run_dir={run_dir}"]
        peak = run_and_watch(
            [sys.executable, "-m", "keytoken.cli", "train", *words, *overrides, *own], run_dir / "log.txt"
        )
        measured[name] = measure(read_metrics(run_dir / "metrics.jsonl"), peak)
    write_result(folder / "bench.json", measured, overrides)
    draw(measured, folder / "bench.png")
    return f"{table(measured)}\nWritten to {folder / 'bench.json'} and {folder / 'bench.png'}"


def run_and_watch(command: Sequence[str], log: Path, limit_s: float = LIMIT_S) -> float:
    """Run a command to its end and return the peak memory of its process tree in GiB.

    Raises:
        ClusterError: it failed, or did not end within ``limit_s`` seconds; all its processes are killed.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    peak, start = 0, time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    tree = [psutil.Process(process.pid)]
    try:
        while process.poll() is None:
            if time.monotonic() - start > limit_s:
                raise ClusterError(f"The run did not end within {limit_s:g} s. Its log is {log}.")
            tree = _tree(process.pid) or tree
            peak = max(peak, sum(_memory(member) for member in tree))
            time.sleep(SAMPLE_INTERVAL_S if process.poll() is None else 0.0)
    finally:
        for member in reversed(tree):
            if member.is_running():  # compares the start time, so a number given out again is safe
                member.kill()
        process.wait()
        psutil.wait_procs(tree, timeout=5.0)  # their memory and ports are free before the next run
    if process.returncode:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        last = lines[-1] if lines else "nothing was printed"
        raise ClusterError(f"The run ended with code {process.returncode}: {last}. Its log is {log}.")
    return peak / GIB


def write_result(path: Path, measured: Mapping[str, Measured], overrides: Sequence[str]) -> None:
    """All figures and what they were measured on."""
    result = {
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "num_cpus": os.cpu_count(),
        "versions": {name: version(name) for name in ("torch", "verl", "transformers")},
        "overrides": list(overrides),
        "ratio": ratio(measured),
        "runs": {name: asdict(figures) for name, figures in measured.items()},
    }
    path.write_text(json.dumps(result, indent=2) + "\n")


def _tree(pid: int) -> list[psutil.Process]:
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _memory(process: psutil.Process) -> int:
    """Bytes of one process; pages that several share count in equal parts (Linux), else in each."""
    try:
        memory = process.memory_full_info()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0
    return int(getattr(memory, "pss", memory.rss))
