"""The bench's figures from metrics whose medians are known, and its watch over a run that is not verl's."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from keytoken.bench.figures import ATTRIBUTED, PLAIN, SEPARATE, STOCK, Measured, measure, ratio, table
from keytoken.bench.picture import draw, spans
from keytoken.bench.run import bench, run_and_watch, write_result
from keytoken.compose import compose_config
from keytoken.errors import ClusterError, ConfigurationError
from keytoken.validate import validate_run


def rows(*steps: float, **others: float) -> list[dict[str, Any]]:
    """Metrics of a run, with a row of an evaluation before the first step."""
    timed = [{"step": n + 1, "data": {"timing_s/step": s, **others}} for n, s in enumerate(steps)]
    return [{"step": 0, "data": {"val/accuracy": 0.5}}, *timed]


def seconds(**parts: float) -> dict[str, float]:
    return {f"timing_s/{part}": value for part, value in parts.items()}


@pytest.fixture
def measured() -> dict[str, Measured]:
    return {
        STOCK: measure(
            rows(99.0, 60.0, 16.5, 16.5, 16.5, **seconds(gen=4.0, old_log_prob=2.0, ref=2.0)), 7.0
        ),
        PLAIN: measure(rows(90.0, 50.0, 10.0, 12.0, 11.0), 6.0),
        SEPARATE: measure(rows(99.0, 60.0, 13.0, 15.0, 14.0), 6.5),
        ATTRIBUTED: measure(
            rows(
                *(99.0, 60.0, 13.0, 14.0, 13.2),
                **{"attribution/wait_s": 0.25, "attribution/pass_s": 1.5},
                **seconds(gen=5.0, old_log_prob=1.5, update_actor=0.5, update_weights=0.2),
            ),
            6.5,
        ),
    }


def test_medians_leave_out_the_first_two_steps(measured: dict[str, Measured]) -> None:
    assert measured[PLAIN].seconds["whole step"] == 11.0
    assert measured[PLAIN].step_seconds == [90.0, 50.0, 10.0, 12.0, 11.0]
    assert measured[PLAIN].seconds["  attribution passes, beside it"] is None
    assert measured[ATTRIBUTED].seconds["  attribution passes, beside it"] == 1.5
    assert ratio(measured) == pytest.approx(1.2)


def test_the_table_says_it_all(measured: dict[str, Measured], tmp_path: Path) -> None:
    lines = {line[:34].strip(): line[34:].split() for line in table(measured).splitlines()[1:-1]}
    assert lines["whole step"] == ["16.50", "11.00", "14.00", "13.20"]
    assert lines["of it waiting for attribution"] == ["-", "-", "-", "0.25"]
    assert lines["training side"] == ["4.00", "0.00", "0.00", "2.00"]
    assert lines["peak memory, GiB"] == ["7.00", "6.00", "6.50", "6.50"]
    last = table(measured).splitlines()[-1]
    for part in (
        "takes 1.20 times one without (target: 1.3)",
        "0.80 times one of stock",
        "takes 0.50 of that",
    ):
        assert part in last
    write_result(tmp_path / "bench.json", measured, ["a=1"])
    written = json.loads((tmp_path / "bench.json").read_text())
    assert written["runs"][PLAIN]["seconds"]["whole step"] == 11.0
    assert written["ratio"] == pytest.approx(1.2)


def test_too_few_steps() -> None:
    with pytest.raises(ConfigurationError, match="--steps 2: the first 2 steps are not counted"):
        bench([], 2, print)
    with pytest.raises(ConfigurationError, match="The run has 2 steps"):
        measure(rows(1.0, 1.0), 1.0)


def test_a_step_as_a_picture(measured: dict[str, Measured], tmp_path: Path) -> None:
    """The views begin with the old log-probs, and what nobody accounts for comes last."""
    found = {span.name: span for span in spans(measured[ATTRIBUTED])}
    assert (
        found["views"].lane == "attribution" and found["views"].start == found["old log-probs"].start == 5.0
    )
    assert found["old log-probs"].seconds == 1.25
    assert found["actor update"].start == 6.5 and found["weight sync"].start == 7.0
    assert found["other"].start == pytest.approx(7.2)
    assert found["other"].start + found["other"].seconds == pytest.approx(13.2)
    draw(measured, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").stat().st_size > 5000


def test_all_arms_are_valid_and_differ_in_what_they_say_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from keytoken.bench.run import ARMS, SETTINGS

    monkeypatch.setenv("KEYTOKEN_DEMO_DIR", "/nowhere")
    arms = {name: compose_config([*SETTINGS, *words]) for name, words in ARMS.items()}
    for config in arms.values():
        validate_run(config)
    whole = arms[ATTRIBUTED]
    assert whole.keytoken.prefix == "shared" and arms[STOCK].keytoken.prefix == "separate"
    assert arms[PLAIN].keytoken.method.selection is arms[STOCK].keytoken.method.selection is None
    for config in arms.values():
        config.keytoken.method.selection = whole.keytoken.method.selection
        config.keytoken.kernels.head, config.keytoken.prefix = "fused", "shared"
        assert config == whole


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
