"""The result as JSON and as a table in Markdown."""

from __future__ import annotations

import json
import math
import platform
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from kernel_bench.cases import Case
from kernel_bench.ceilings import Ceilings
from kernel_bench.machine import MIB, Machine
from kernel_bench.runner import Row
from kernel_bench.timing import Timing
from kernel_bench.verdicts import Verdict

PACKAGES = ("torch", "triton", "verl", "liger-kernel", "cut-cross-entropy")
# Figures that belong together and are read side by side.
COLUMNS = ("case", "provider", "median ms", "p20", "p80", "noise", "us/token", "rate", "of ceiling")


@dataclass(slots=True)
class Report:
    """Everything that one run found out.

    Attributes:
        environment: Hardware, versions, date and commit, in the order of the table's head.
        counted: What the launches of a row count.
        weighed: What the memory of a row means.
        gates: Verdicts on our own operators; there are no timings unless all passed.
        others: Verdicts on the anchors.
        missing: Anchors that are not here, and why.
        remarks: What an anchor leaves out.
        ceilings: Best rates of the run.
        drift: Copy bandwidth at the end over the one at the start.
        rows: One for each provider of each case.
        skipped: Cases that were not run, and why.
        elsewhere: Cases that only a GPU runs.
    """

    environment: dict[str, str]
    counted: str
    weighed: str
    gates: list[Verdict] = field(default_factory=list)
    others: list[Verdict] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    remarks: dict[str, str] = field(default_factory=dict)
    ceilings: Ceilings | None = None
    drift: float | None = None
    rows: list[Row] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    elsewhere: list[Case] = field(default_factory=list)

    def failed(self) -> list[Verdict]:
        """Gates that did not pass."""
        return [verdict for verdict in self.gates if not verdict.passed]

    def write(self, folder: Path) -> Path:
        """Write both forms under a dated name and return the path of the table."""
        folder.mkdir(parents=True, exist_ok=True)
        device = "".join(c if c.isalnum() else "-" for c in self.environment["device"].lower())
        name = f"kernels-{self.environment['date'][:10]}-{'-'.join(filter(None, device.split('-')))[:40]}"
        (folder / f"{name}.json").write_text(json.dumps(as_json(self), indent=1) + "\n")
        table = folder / f"{name}.md"
        table.write_text(as_markdown(self))
        return table


def environment(machine: Machine, repository: Path) -> dict[str, str]:
    """What the figures were measured on."""
    found = {
        **machine.describe(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "python": platform.python_version(),
    }
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return {**found, "commit": _commit(repository)}


def as_json(report: Report) -> dict[str, Any]:
    """Plain numbers, texts, lists and objects."""
    return {
        "environment": report.environment,
        "gates": [asdict(verdict) for verdict in report.gates],
        "anchors": {
            "missing": report.missing,
            "remarks": report.remarks,
            "verdicts": [asdict(verdict) for verdict in report.others],
        },
        "ceilings": asdict(report.ceilings) if report.ceilings else None,
        "drift": report.drift,
        "launches": report.counted,
        "memory": report.weighed,
        "rows": [_row_json(row, report.ceilings) for row in report.rows],
        "targets": [
            dict(zip(("case", "asked", "reached", "met"), line, strict=True)) for line in _targets(report)
        ],
        "skipped": report.skipped,
        "only on a GPU": [case.name for case in report.elsewhere],
    }


def as_markdown(report: Report) -> str:
    """The dated table that is kept."""
    parts = [
        f"# Kernels on {report.environment['device']}, {report.environment['date'][:10]}",
        _table(("what", "value"), report.environment.items()),
        *_gates(report),
    ]
    if not report.failed():
        parts += [*_ceilings(report), *_rows(report), *_target_table(report)]
    parts += _notes(report)
    return "\n\n".join(parts) + "\n"


def _gates(report: Report) -> list[str]:
    failed = report.failed()
    title = f"## Correctness: {len(report.gates) - len(failed)} of {len(report.gates)} gates passed"
    if not failed:
        return [title]
    return [title, "No timings: they would be of wrong numbers.", _table(("gate", "found"), _found(failed))]


def _ceilings(report: Report) -> list[str]:
    if report.ceilings is None:
        return []
    lines = [("copy, read and written", f"{_number(report.ceilings.copy)} GB/s")]
    lines += [(name, f"{_number(rate)} TFLOP/s") for name, rate in report.ceilings.products.items()]
    if report.drift is not None:
        lines.append(("copy at the end of the run, of the one at its start", f"{report.drift:.2f}"))
    return ["## Ceilings of this run", _table(("what", "rate"), lines)]


def _rows(report: Report) -> list[str]:
    if not report.rows:
        return []
    lines = []
    for row in report.rows:
        remark = row.remark or report.remarks.get(row.provider.split(",")[0], "")
        lines.append((row.case.name, row.provider, *_figures(row, report.ceilings), remark))
    head = (*COLUMNS, report.weighed, report.counted, "remark")
    return [
        "## Times",
        "Medians of interleaved calls on three sets of random inputs with cold caches, two repeats; noise "
        "is the difference of the repeats' medians. Rates count what the task needs at least, not what a "
        "provider does; ceilings are those of this run.",
        _table(head, lines),
    ]


def _figures(row: Row, ceilings: Ceilings | None) -> Sequence[str]:
    timing = row.timing
    if timing is None:
        return ["-"] * 9
    rate = row.case.work.rate(timing)
    share = row.case.work.of_ceiling(timing, ceilings) if ceilings else None
    return (
        _number(timing.median_ms),
        _number(timing.p20_ms),
        _number(timing.p80_ms),
        f"{timing.noise:.1%}",
        _number(timing.median_ms * 1000 / row.case.tokens),
        "-" if rate is None else f"{_number(rate[0])} {rate[1]}",
        "-" if share is None else f"{share:.2f}",
        "-" if row.peak_bytes is None else _number(row.peak_bytes / MIB),
        "-" if row.launches is None else str(row.launches),
    )


def _targets(report: Report) -> list[tuple[str, str, str, str]]:
    """(case, asked, reached, met) for each target, also of the cases that did not run."""
    timings: dict[str, dict[str, Timing]] = {}
    for row in report.rows:
        if row.timing:
            timings.setdefault(row.case.name, {})[row.provider] = row.timing
    cases = {row.case.name: row.case for row in report.rows}
    lines = []
    for case in [*cases.values(), *report.elsewhere]:
        for target in case.targets:
            found = None
            if report.ceilings and case.name in timings:
                found = target.reached(case.work, timings[case.name], report.ceilings)
            reached, met = ("not measured", "-") if found is None else (found[0], "yes" if found[1] else "no")
            lines.append((case.name, target.asked(), reached, met))
    return lines


def _target_table(report: Report) -> list[str]:
    lines = [] if report.elsewhere else _targets(report)
    if not lines:
        return []
    return ["## Targets (set for an H200)", _table(("case", "asked", "reached", "met"), lines)]


def _notes(report: Report) -> list[str]:
    parts = []
    wrong = [verdict for verdict in report.others if not verdict.passed]
    if wrong:
        parts += ["## Checks that others do not pass here", _table(("what", "found"), _found(wrong))]
    if report.missing:
        parts += ["## Not compared with", _table(("what", "why"), report.missing.items())]
    if report.skipped:
        parts += ["## Skipped", _table(("case", "why"), report.skipped.items())]
    if report.elsewhere:
        lines = [
            (case.name, "; ".join(target.asked() for target in case.targets)) for case in report.elsewhere
        ]
        parts += [
            "## What a GPU would add",
            "The figures above are of the reference in torch on a CPU. On a machine with a GPU the same "
            "command times the kernels, and compares them with torch.compile and the packages above:",
            _table(("case", "target (H200)"), lines),
        ]
    return parts


def _row_json(row: Row, ceilings: Ceilings | None) -> dict[str, Any]:
    found: dict[str, Any] = {"case": row.case.name, "provider": row.provider, "tokens": row.case.tokens}
    if row.timing:
        rate = row.case.work.rate(row.timing)
        found |= asdict(row.timing)
        found["rate"], found["unit"] = rate or (None, None)
        found["of_ceiling"] = row.case.work.of_ceiling(row.timing, ceilings) if ceilings else None
    return {**found, "peak_bytes": row.peak_bytes, "launches": row.launches, "remark": row.remark}


def _found(verdicts: list[Verdict]) -> list[tuple[str, str]]:
    return [(verdict.name, verdict.detail) for verdict in verdicts]


def _table(head: Sequence[str], lines: Any) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', '/') for cell in row)} |" for row in rows)


def _number(value: float) -> str:
    """Four significant digits, never in exponential form."""
    if value == 0 or not math.isfinite(value):
        return str(value)
    return f"{value:.{max(3 - math.floor(math.log10(abs(value))), 0)}f}"


def _commit(repository: Path) -> str:
    def git(*words: str) -> str:
        answer = subprocess.run(["git", "-C", repository, *words], capture_output=True, text=True, timeout=30)
        return answer.stdout.strip() if answer.returncode == 0 else ""

    try:
        commit, changes = git("rev-parse", "--short", "HEAD"), git("status", "--porcelain", "--", "kernels")
    except FileNotFoundError:
        return "unknown (no git)"
    return f"{commit or 'unknown'}{' with local changes' if changes else ''}"
