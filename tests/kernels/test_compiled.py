"""What the compiler makes of every kernel, without a GPU: no spills, wide loads, few registers."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPORT = Path(__file__).resolve().parents[2] / "kernels" / "benchmarks" / "compile_report.py"
NVIDIA = ("sm_80", "sm_90")
AMD = "gfx942"

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Figures of every kernel on every target, from a process in which nothing is interpreted."""
    folder = tmp_path_factory.mktemp("compiled")
    file = folder / "report.json"
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder / "cache")}
    environment.pop("TRITON_INTERPRET", None)
    process = subprocess.run(
        [sys.executable, REPORT, "--json", file, "--targets", *NVIDIA, AMD],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    # 1 means that figures are out of bounds, which the tests below say one by one.
    assert process.returncode in (0, 1) and file.exists(), process.stderr
    return json.loads(file.read_text())


def report_offenders(rows, bad):
    offenders = [f"{row['name']} on {row['target']}: {bad(row)}" for row in rows if bad(row)]
    assert not offenders, "\n".join(offenders)


def test_every_kernel_is_compiled_for_every_target(report):
    names = {row["name"] for row in report}
    assert {"logprob/forward, fp32", "logprob/gradient, bf16", "logprob/nucleus, fp32"} <= names
    assert {(row["name"], row["target"]) for row in report} == {(n, t) for n in names for t in (*NVIDIA, AMD)}
    assert len(report) == 3 * len(names)


def test_nothing_spills(report):
    report_offenders(report, lambda row: row["stack"] or row["spills"])


def test_registers_stay_below_their_bounds(report):
    """A bound is what lets as many programs share a processor as the launch counts on."""
    report_offenders(
        [row for row in report if row["target"] in NVIDIA],
        lambda row: row["registers"] if row["registers"] > row["max_registers"] else 0,
    )


def test_logits_are_loaded_128_bits_at_a_time(report):
    wide = [row for row in report if row["wants_wide_loads"]]
    assert wide
    report_offenders(wide, lambda row: not row["wide_loads"] and "no 128-bit load")


def test_gradients_are_stored_128_bits_at_a_time(report):
    rows = [row for row in report if row["name"].startswith("logprob/gradient, ")]
    assert rows
    report_offenders(rows, lambda row: not row["wide_stores"] and "no 128-bit store")


def test_the_loop_over_a_row_has_no_scalar_loads(report):
    """One pass and its tail, four 128-bit loads per thread each, on NVIDIA."""
    rows = [r for r in report if r["name"].startswith("logprob/forward") and r["target"] in NVIDIA]
    report_offenders(rows, lambda row: row["wide_loads"] != 8 and f"{row['wide_loads']} 128-bit loads")


def test_no_launched_kernel_is_left_out():
    """Launched kernels are called ``*kernel``; each must be among the compiled cases of its operator."""
    launched, compiled = {}, {}
    package = REPORT.parents[1] / "keytoken_kernels"
    for file in package.glob("*/*.py"):
        module = importlib.import_module(f"keytoken_kernels.{file.parent.name}.{file.stem}")
        launched |= {
            id(value): f"{file.parent.name}/{file.name}: {name}"
            for name, value in vars(module).items()
            if name.endswith("kernel") and hasattr(value, "arg_names")
        }
        if file.stem == "triton":
            compiled |= {id(case.kernel): case.name for case in module.compiled_cases()}
    assert launched
    assert not [name for kernel, name in launched.items() if kernel not in compiled]


def test_the_report_refuses_to_run_interpreted():
    process = subprocess.run(
        [sys.executable, REPORT], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert process.returncode == 2 and "TRITON_INTERPRET is set" in process.stderr
