"""The bench's figures from metrics whose medians are known, and its watch over a run that is not verl's."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from keytoken.bench import (
    ATTRIBUTED,
    PLAIN,
    Measured,
    bench,
    measure,
    ratio,
    run_and_watch,
    table,
    write_result,
)
from keytoken.compose import compose_config
from keytoken.errors import ClusterError, ConfigurationError
from keytoken.validate import validate_run


def rows(*steps: float, **others: float) -> list[dict[str, Any]]:
    """Metrics of a run, with a row of an evaluation before the first step."""
    timed = [{"step": n + 1, "data": {"timing_s/step": s, **others}} for n, s in enumerate(steps)]
    return [{"step": 0, "data": {"val/accuracy": 0.5}}, *timed]


@pytest.fixture
def measured() -> dict[str, Measured]:
    return {
        PLAIN: measure(rows(90.0, 50.0, 10.0, 12.0, 11.0), 6.0),
        ATTRIBUTED: measure(
            rows(99.0, 60.0, 13.0, 14.0, 13.2, **{"attribution/wait_s": 0.25, "attribution/pass_s": 2.0}), 6.5
        ),
    }


def test_medians_leave_out_the_first_two_steps(measured: dict[str, Measured]) -> None:
    assert measured[PLAIN].seconds["whole step"] == 11.0
    assert measured[PLAIN].step_seconds == [90.0, 50.0, 10.0, 12.0, 11.0]
    assert measured[PLAIN].seconds["  attribution passes, beside it"] is None
    assert measured[ATTRIBUTED].seconds["  attribution passes, beside it"] == 2.0
    assert ratio(measured) == pytest.approx(1.2)


def test_the_table_says_it_all(measured: dict[str, Measured], tmp_path: Path) -> None:
    lines = {line[:34].strip(): line[34:].split() for line in table(measured).splitlines()[1:-1]}
    assert lines["whole step"] == ["11.00", "13.20", "+2.20"]
    assert lines["of it waiting for attribution"] == ["-", "0.25"]
    assert lines["peak memory, GiB"] == ["6.00", "6.50", "+0.50"]
    assert "takes 1.20 times one without (target: 1.3)" in table(measured)
    write_result(tmp_path / "bench.json", measured, ["a=1"])
    written = json.loads((tmp_path / "bench.json").read_text())
    assert written["runs"][PLAIN]["seconds"]["whole step"] == 11.0
    assert written["ratio"] == pytest.approx(1.2)


def test_too_few_steps() -> None:
    with pytest.raises(ConfigurationError, match="--steps 2: the first 2 steps are not counted"):
        bench([], 2, print)
    with pytest.raises(ConfigurationError, match="The run has 2 steps"):
        measure(rows(1.0, 1.0), 1.0)


def test_both_arms_are_valid_and_differ_in_the_selection_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from keytoken.bench import ARMS, SETTINGS

    monkeypatch.setenv("KEYTOKEN_DEMO_DIR", "/nowhere")
    plain, attributed = (compose_config([*SETTINGS, *ARMS[name]]) for name in (PLAIN, ATTRIBUTED))
    validate_run(plain)
    validate_run(attributed)
    assert plain.keytoken.method.selection is None
    plain.keytoken.method.selection = attributed.keytoken.method.selection
    assert plain == attributed


def test_memory_of_child_processes_counts(tmp_path: Path) -> None:
    child = "import time; held = bytearray(b'x') * (300 << 20); time.sleep(4)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    peak = run_and_watch([sys.executable, "-c", parent], tmp_path / "log.txt")
    assert 0.29 < peak < 0.5


def test_a_run_that_fails_is_an_error_with_its_last_line(tmp_path: Path) -> None:
    code = "print('first'); raise SystemExit('the reason')"
    with pytest.raises(ClusterError, match=r"ended with code 1: the reason\. Its log is .*log.txt"):
        run_and_watch([sys.executable, "-u", "-c", code], tmp_path / "log.txt")


def test_a_run_that_hangs_is_killed_with_its_children(tmp_path: Path) -> None:
    number = tmp_path / "pid"
    child = f"import os, time; open({str(number)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    start = time.monotonic()
    with pytest.raises(ClusterError, match="did not end within 5 s"):
        run_and_watch([sys.executable, "-c", parent], tmp_path / "log.txt", limit_s=5.0)
    assert time.monotonic() - start < 30.0
    pid = int(number.read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
