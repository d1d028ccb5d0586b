"""Findings as a table for people and as JSON for scripts."""

import io
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from keytoken.doctor.finding import STATUSES, Finding, Status

VERSION = 1  # of the JSON; raised when a key changes its meaning or goes
WIDTH = 100  # of a page that is piped, and the widest on a terminal
_COLORS = {"ok": "green", "warn": "yellow", "fail": "bold red", "skip": "dim"}


def exit_code(findings: Sequence[Finding]) -> int:
    """1 if something has failed, else 0: a warning stops nobody."""
    return int(any(finding.status == "fail" for finding in findings))


def as_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """What ``--json`` prints; see recipe/docs/doctor.md for the keys."""
    counts = Counter(finding.status for finding in findings)
    return {
        "version": VERSION,
        "exit_code": exit_code(findings),
        "counts": {status: counts[status] for status in STATUSES},
        "findings": [
            {
                "name": finding.name,
                "status": finding.status,
                "found": finding.found,
                "remedy": finding.remedy,
                "seconds": finding.seconds,
            }
            for finding in findings
        ],
    }


def table(findings: Sequence[Finding]) -> RenderableType:
    """One row for each finding, its remedy below it."""
    grid = Table(box=box.SIMPLE_HEAD, expand=False, pad_edge=False, show_edge=False)
    grid.add_column("", no_wrap=True)
    grid.add_column("check", no_wrap=True)
    grid.add_column("found, and what to do", overflow="fold")
    for finding in findings:
        text = Text(finding.found, style="dim" if finding.status == "skip" else "")
        if finding.remedy:
            text.append("\n-> ", style=_COLORS[finding.status])
            text.append(finding.remedy)
        grid.add_row(Text(finding.status, style=_COLORS[finding.status]), finding.name, text)
    return grid


def summary(findings: Sequence[Finding]) -> str:
    """``2 failed, 1 warning, 20 in order, 2 not looked at (31 s)``."""
    counts = Counter(finding.status for finding in findings)
    words: tuple[tuple[Status, str], ...] = (
        ("fail", "failed"),
        ("warn", "to look at"),
        ("ok", "in order"),
        ("skip", "not looked at"),
    )
    text = ", ".join(f"{counts[status]} {word}" for status, word in words if counts[status])
    return f"{text} ({sum(finding.seconds for finding in findings):.1f} s)"


def table_text(findings: Sequence[Finding], width: int = WIDTH) -> str:
    """The table as plain text, for a file, a pipe or an error."""
    console = Console(file=io.StringIO(), width=width, color_system=None, highlight=False)
    with console.capture() as captured:
        console.print(table(findings))
    return "\n".join(line.rstrip() for line in captured.get().rstrip().splitlines())
