"""The command: gates, then ceilings, times and launches, within the time, and what is written."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from kernel_bench import sizes as all_sizes
from kernel_bench.anchors import check_anchor, find_anchors
from kernel_bench.cases import OURS, Setting
from kernel_bench.ceilings import measure_ceilings, measure_copy
from kernel_bench.gates import GATES
from kernel_bench.inputs import generator_of, head_weight
from kernel_bench.machine import Machine, machine_for
from kernel_bench.matrix import cpu_cases, gpu_cases
from kernel_bench.operators import Operators
from kernel_bench.report import Report, as_markdown, environment
from kernel_bench.runner import Row, count_launches, run_cases
from kernel_bench.sizes import Sizes
from kernel_bench.timing import Budget
from kernel_bench.verdicts import run_gates

SCRIPT = Path(__file__).resolve().parents[1] / "gpu.py"
REPOSITORY = SCRIPT.parents[2]
LIMIT_S = {"cuda": 540.0, "cpu": 45.0}
MEMCHECK_ERROR = 99


def main(arguments: list[str], operators: Operators | None = None) -> int:
    """Run the benchmark; ``operators`` replaces what is tested and timed."""
    options = _options(arguments)
    if options.memcheck:
        return _memcheck(options.out)
    try:
        machine = machine_for(options.device)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    kind = machine.device.type
    budget = Budget(options.limit or LIMIT_S[kind])

    def announce(text: str) -> None:
        print(f"[{budget.limit_s - budget.left():5.0f} s] {text}", file=sys.stderr, flush=True)

    sizes = _sizes(options.sizes, kind)
    operators = operators or Operators.of("triton" if kind == "cuda" else "reference")
    report = Report(environment(machine, REPOSITORY), machine.counted, machine.weighed)
    report.gates = run_gates(GATES, operators, sizes, machine.device, announce)
    if not report.failed() and not options.gates_only:
        _measure(report, machine, sizes, operators, budget, options, announce)
    path = report.write(options.out)
    print(as_markdown(report), end="")
    announce(f"written to {path}")
    return 1 if report.failed() else 0


def _measure(
    report: Report,
    machine: Machine,
    sizes: Sizes,
    operators: Operators,
    budget: Budget,
    options: argparse.Namespace,
    announce: Callable[[str], None],
) -> None:
    """Ceilings, times and launches; the report is written after every case, in case the machine is lost."""
    anchors, report.missing = find_anchors(machine.device)
    checked = []
    for anchor in anchors:
        announce(f"anchor: {anchor.name}")
        usable, verdicts = check_anchor(anchor, sizes, machine.device)
        report.others += verdicts
        report.remarks[anchor.name] = anchor.remark
        checked.append(usable)
    weight = head_weight(sizes.vocabulary, sizes.hidden, sizes.dtype, generator_of(machine.device, 50))
    setting = Setting(
        operators=operators, sizes=sizes, machine=machine, anchors=tuple(checked), weight=weight
    )
    report.ceilings = measure_ceilings(machine, sizes, weight, announce)
    on_gpu = machine.device.type == "cuda"
    if not on_gpu:
        report.remarks[OURS] = "reference in torch"
    cases = gpu_cases(sizes) if on_gpu else cpu_cases(sizes)
    report.elsewhere = [] if on_gpu else gpu_cases(all_sizes.GPU)

    def keep(rows: list[Row]) -> None:
        report.rows += rows
        report.write(options.out)

    chosen = [case for case in cases if options.only in case.name]
    report.skipped = run_cases(chosen, setting, budget, announce, keep)
    count_launches(report.rows, setting, budget, announce)
    report.drift = measure_copy(machine, sizes) / report.ceilings.copy


def _memcheck(out: Path) -> int:
    """The gates on small sizes under compute-sanitizer; its report is kept beside the others."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        print(
            "compute-sanitizer is not on PATH. It is part of the CUDA toolkit: add its folder (often "
            "/usr/local/cuda/bin) to PATH.",
            file=sys.stderr,
        )
        return 2
    out.mkdir(parents=True, exist_ok=True)
    log = out / "memcheck.txt"
    command = [
        *(program, "--tool", "memcheck", "--error-exitcode", str(MEMCHECK_ERROR), "--log-file", str(log)),
        *(sys.executable, str(SCRIPT), "--device", "cuda", "--gates-only"),
        *("--sizes", "memcheck", "--out", str(out / "memcheck")),
    ]
    # Every array of its own, so that a step outside of one is outside of all.
    code = subprocess.run(command, env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}).returncode
    print(f"memcheck: {'no error' if code == 0 else f'exit code {code}'}; report in {log}", file=sys.stderr)
    return 0 if code == 0 else 1


def _sizes(name: str, kind: str) -> Sizes:
    known = {"small": all_sizes.SMALL, "memcheck": all_sizes.MEMCHECK}
    return known.get(name) or {"cuda": all_sizes.GPU, "cpu": all_sizes.CPU}[kind]


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu.py", description="Correctness and speed of the kernels. See kernels/benchmarks/README.md."
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/bench"), help="folder of the results")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument(
        "--limit",
        type=float,
        help=f"seconds in all; default {LIMIT_S['cuda']:g} on a GPU, {LIMIT_S['cpu']:g} on a CPU",
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases with this in their name")
    parser.add_argument("--sizes", choices=("auto", "small", "memcheck"), default="auto")
    parser.add_argument("--gates-only", action="store_true", help="check correctness, measure nothing")
    parser.add_argument("--memcheck", action="store_true", help="run the gates under compute-sanitizer")
    return parser.parse_args(arguments)
