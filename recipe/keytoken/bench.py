"""What attribution costs: the demo trained with it and without it, everything else equal, in one table.

Both runs have the same data, seeds, loss, reference pass and pools; the plain one keeps all tokens
(``keytoken.method.selection=null``), so it starts no attribution group and runs no view. Each is a process of
its own: Ray and the worker processes of one run are gone before the next one starts.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from keytoken.demo.curves import read_metrics
from keytoken.demo.run import DEMO_VARIABLE, prepare_for_training
from keytoken.errors import ClusterError, ConfigurationError

GIB = 1 << 30
TARGET_RATIO = 1.3
NUM_WARM_UP_STEPS = 2  # caches fill and workers import their last modules in the first steps
LIMIT_S = 1200.0
SAMPLE_INTERVAL_S = 2.0

PLAIN, ATTRIBUTED = "plain GRPO", "Video-KTR"
ARMS = {PLAIN: ["keytoken.method.selection=null"], ATTRIBUTED: []}
SETTINGS = (
    "experiment=demo_cpu",
    "method=video_ktr",
    "trainer.val_before_train=false",
    "trainer.test_freq=-1",
    "trainer.save_freq=-1",
    "trainer.resume_mode=disable",
    "keytoken.export.enabled=false",
)
# Parts of a step by metric, in the order of the step. What is indented lies within the line above it.
PARTS = {
    "whole step": "timing_s/step",
    "sampling": "timing_s/gen",
    "old log-probs": "timing_s/old_log_prob",
    "  of it waiting for attribution": "attribution/wait_s",
    "  attribution passes, beside it": "attribution/pass_s",
    "reference log-probs": "timing_s/ref",
    "advantages and selection": "timing_s/adv",
    "actor update": "timing_s/update_actor",
    "weight sync": "timing_s/update_weights",
}


@dataclass(frozen=True, slots=True)
class Measured:
    """One run.

    Attributes:
        seconds: Median of each part over the warm steps; None where the run has no such part.
        step_seconds: The whole step, every step from the first on.
        peak_gib: Largest memory of all processes of the run together, shared pages counted once.
    """

    seconds: dict[str, float | None]
    step_seconds: list[float]
    peak_gib: float


def bench(overrides: Sequence[str], steps: int, announce: Callable[[str], None]) -> str:
    """Run both arms and return the table; also written to ``bench.json`` in the folder that it names.

    Args:
        overrides: hydra overrides for both arms.
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
        run_dir = folder / name.lower().replace(" ", "_")
        announce(f"{name}: {steps} steps; log in {run_dir / 'log.txt'}")
        words = [*SETTINGS, f"trainer.total_training_steps={steps}", f"keytoken.run_dir={run_dir}"]
        peak = run_and_watch(
            [sys.executable, "-m", "keytoken.cli", "train", *words, *overrides, *own], run_dir / "log.txt"
        )
        measured[name] = measure(read_metrics(run_dir / "metrics.jsonl"), peak)
    write_result(folder / "bench.json", measured, overrides)
    return f"{table(measured)}\nWritten to {folder / 'bench.json'}"


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


def measure(rows: Sequence[dict[str, Any]], peak_gib: float) -> Measured:
    """Medians over the warm steps of a metrics file.

    Args:
        rows: one a step: ``{"step": 1, "data": {"timing_s/step": 9.8, ...}}``.
        peak_gib: peak memory of the run.

    Raises:
        ConfigurationError: no step is left after the warm-up.
    """
    steps = [row["data"] for row in rows if PARTS["whole step"] in row["data"]]
    warm = steps[NUM_WARM_UP_STEPS:]
    if not warm:
        raise ConfigurationError(
            f"The run has {len(steps)} steps and the first {NUM_WARM_UP_STEPS} are not counted: give it more "
            "by --steps, and no trainer.total_training_steps."
        )
    seconds = {}
    for part, metric in PARTS.items():
        found = [step[metric] for step in warm if metric in step]
        seconds[part] = statistics.median(found) if found else None
    return Measured(seconds, [step[PARTS["whole step"]] for step in steps], peak_gib)


def ratio(measured: dict[str, Measured]) -> float:
    """The whole warm step with attribution over the one without."""
    with_it, without = (measured[name].seconds["whole step"] for name in (ATTRIBUTED, PLAIN))
    assert with_it is not None and without is not None  # measure() keeps steps that have it only
    return with_it / without


def table(measured: dict[str, Measured]) -> str:
    """The figures side by side."""
    lines = [_line("seconds, median of warm steps", PLAIN, ATTRIBUTED, "difference")]
    for part in PARTS:
        plain, attributed = (measured[name].seconds[part] for name in (PLAIN, ATTRIBUTED))
        difference = "" if plain is None or attributed is None else f"{attributed - plain:+.2f}"
        lines.append(_line(part, _figure(plain), _figure(attributed), difference))
    plain_gib, attributed_gib = (measured[name].peak_gib for name in (PLAIN, ATTRIBUTED))
    difference = f"{attributed_gib - plain_gib:+.2f}"
    lines.append(_line("peak memory, GiB", f"{plain_gib:.2f}", f"{attributed_gib:.2f}", difference))
    lines.append(
        f"A step with attribution takes {ratio(measured):.2f} times one without (target: {TARGET_RATIO})."
    )
    return "\n".join(lines)


def write_result(path: Path, measured: dict[str, Measured], overrides: Sequence[str]) -> None:
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


def _line(name: str, *columns: str) -> str:
    return f"{name:<34}" + "".join(f"{column:>12}" for column in columns)


def _figure(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.2f}"


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
