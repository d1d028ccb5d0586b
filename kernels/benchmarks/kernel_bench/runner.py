"""Runs the cases within the time: times first, then, apart from them, launches."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch

from kernel_bench.anchors import COMPILED
from kernel_bench.cases import OURS, Case, Setting
from kernel_bench.sizes import NUM_SETS
from kernel_bench.timing import Budget, Call, Timing, measure
from kernel_bench.verdicts import failures

Announce = Callable[[str], None]

MEMORY_SHARE = 0.9  # of what is free
SLOW_START_S = 90.0  # torch.compile starts only with so much left
LAUNCHES_SHARE = 0.05  # of the limit, kept for counting launches at the end


@dataclass(slots=True)
class Row:
    """One provider on one case.

    Attributes:
        timing: None where it could not run; ``remark`` says why.
        peak_bytes: On top of the inputs.
        launches: Counted after all timing, because a profiler may slow down what follows it.
        remark: Why there is no timing.
    """

    case: Case
    provider: str
    timing: Timing | None = None
    peak_bytes: int | None = None
    launches: int | None = None
    remark: str = ""


def run_cases(
    cases: Iterable[Case],
    setting: Setting,
    budget: Budget,
    announce: Announce,
    done: Callable[[list[Row]], None],
) -> dict[str, str]:
    """Time case after case; ``done`` gets the rows of each. Returns why the others were skipped, by name."""
    skipped = {}
    for case in cases:
        reason = _obstacle(case, setting, budget)
        if not reason:
            announce(case.name)
            rows = _time_case(case, setting, budget, announce)
            done(rows)
            reason = "" if any(row.timing for row in rows) else rows[0].remark
            _free(setting)
        if reason:
            announce(f"skipped: {case.name}: {reason}")
            skipped[case.name] = reason
    return skipped


def count_launches(rows: list[Row], setting: Setting, budget: Budget, announce: Announce) -> None:
    """Fill in ``launches`` of the rows with a timing, as far as the time goes."""
    for case in dict.fromkeys(row.case for row in rows if row.timing):
        measured = [row for row in rows if row.case is case and row.timing is not None]
        if budget.left() < 3 * sum(row.timing.median_ms for row in measured if row.timing) / 1000:
            continue
        announce(f"launches: {case.name}")
        calls = case.prepare(setting)
        for row in measured:
            call = partial(calls[row.provider], 0)
            call()  # a new shape may start an autotuner
            row.launches = setting.machine.launches(call)
        del calls
        _free(setting)


def _obstacle(case: Case, setting: Setting, budget: Budget) -> str:
    """Why the case cannot start, if so."""
    if budget.left() < case.seconds + LAUNCHES_SHARE * budget.limit_s:
        return "no time left"
    free = setting.machine.free_bytes()
    if case.needs_bytes > MEMORY_SHARE * free:
        return f"needs {case.needs_bytes / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB are free"
    return ""


def _time_case(case: Case, setting: Setting, budget: Budget, announce: Announce) -> list[Row]:
    calls = case.prepare(setting)
    rows = [Row(case, provider) for provider in calls]
    for row in rows:
        row.remark = _warm_up(row, calls[row.provider], setting, budget)
        if row.remark:
            announce(f"  {row.provider}: {row.remark}")
    ready = {row.provider: calls[row.provider] for row in rows if not row.remark}
    found = None
    if ready:
        found = measure(
            ready, setting.machine.time_ms, num_sets=NUM_SETS, seconds=case.seconds, budget=budget
        )
    for row in rows:
        if row.provider in ready:
            row.timing = found[row.provider] if found else None
            row.remark = "" if found else "the fewest rounds do not fit the time left"
    return rows


def _warm_up(row: Row, call: Call, setting: Setting, budget: Budget) -> str:
    """Compile, and measure memory on the second call. Returns what prevents timing, if anything does."""
    if row.provider.startswith(COMPILED) and budget.left() < SLOW_START_S:
        return "no time left to compile"
    if budget.left() < 1.0:
        return "no time left"
    try:
        call(0)
        row.peak_bytes = setting.machine.peak_bytes(partial(call, 0))
    except torch.OutOfMemoryError:
        return "out of memory"
    except failures() as error:
        if row.provider.startswith(OURS):
            raise
        return f"{type(error).__name__}: {error}".split("\n")[0][:200]
    return ""


def _free(setting: Setting) -> None:
    gc.collect()
    if setting.machine.device.type == "cuda":
        torch.cuda.empty_cache()
