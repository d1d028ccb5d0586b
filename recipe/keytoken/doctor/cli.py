"""The command ``keytoken doctor``."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keytoken.errors import DoctorError

if TYPE_CHECKING:
    from keytoken.doctor.finding import Finding, Subject

_CLIP = "clip="


def add_doctor(commands: Any, say: Callable[[str], None]) -> None:
    """Add the command to the subparsers of the command line.

    Args:
        commands: What ``add_subparsers`` returned.
        say: Prints a line.
    """
    parser = commands.add_parser(
        "doctor",
        help="check this machine and a run: what is wrong, and what to do about it",
        description="Check the machine, and with overrides such as experiment=demo_cpu the run that they "
        "describe: packages against the lock, GPUs, memory, disks, decoders, Ray, model, data, reward. "
        "clip=PATH decodes one of your clips as well. The exit code is 1 if something would keep a run from "
        "working; warnings do not count. keytoken train makes the checks of --short by itself.",
    )
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--short", action="store_true", help="only what every run checks before it starts")
    parser.set_defaults(run=lambda arguments: _doctor(arguments, say))


def _doctor(arguments: argparse.Namespace, say: Callable[[str], None]) -> int:
    try:
        from keytoken.doctor.report import as_json, exit_code
        from keytoken.doctor.run import examine
    except (ImportError, OSError) as problem:  # a package of the stack, or one of its libraries, is broken
        raise DoctorError(
            f"{type(problem).__name__}: {problem}. Install the locked packages again: make setup (on GPUs: "
            "pip install --no-deps -r requirements/gpu.txt)."
        ) from problem

    subject = subject_of(arguments.words, short=arguments.short)
    watch = _watch()
    findings = examine(subject, watch=watch)
    watch("")
    if arguments.json:
        say(json.dumps(as_json(findings), indent=1))
    else:
        show(findings, say)
    return exit_code(findings)


def subject_of(words: Sequence[str], *, short: bool) -> "Subject":
    """What the words of the command line ask to examine; a run that does not compose becomes a finding."""
    from keytoken.doctor.finding import Subject
    from keytoken.errors import KeyTokenError
    from keytoken.main import load_config

    clip = next(
        (Path(word.removeprefix(_CLIP)).expanduser() for word in words if word.startswith(_CLIP)), None
    )
    overrides = [word for word in words if not word.startswith(_CLIP)]
    if not overrides:
        return Subject(clip=clip, short=short)
    try:
        return Subject(load_config(overrides), clip=clip, short=short)
    except KeyTokenError as problem:
        return Subject(problem=problem, clip=clip, short=short)


def show(findings: "Sequence[Finding]", say: Callable[[str], None]) -> None:
    """Print the table: in colours and as wide as a terminal, or plainly."""
    from rich.console import Console

    from keytoken.doctor.report import WIDTH, summary, table, table_text

    console = Console(file=sys.stdout, highlight=False)
    if console.is_terminal:
        console.width = min(console.width, 120)
        console.print(table(findings))
    else:
        say(table_text(findings, WIDTH))
    say(f"\n{summary(findings)}")


def _watch() -> Callable[[str], None]:
    """Names the check in progress on a terminal, on a line that the next one overwrites."""
    if not sys.stderr.isatty():
        return lambda name: None
    return lambda name: _overwrite(f"checking {name} ..." if name else "")


def _overwrite(text: str) -> None:
    sys.stderr.write(f"\r\033[K{text}")
    sys.stderr.flush()
