"""Runs Python in a child under a time limit: what hangs, crashes or prints there disturbs nobody."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Done:
    """What came of a child.

    Attributes:
        output: Its standard output.
        error: Why it failed, in one line; empty if it did not.
        place: File and line of a Python error, where there is one.
        seconds: That it took.
    """

    output: str
    error: str
    place: str
    seconds: float


def run_child(
    arguments: Sequence[str], limit_s: float, *, text: str = "", variables: Mapping[str, str] | None = None
) -> Done:
    """Run ``python ARGUMENTS`` and everything that it starts, for at most ``limit_s`` seconds.

    Args:
        arguments: After the interpreter's name.
        limit_s: Seconds until the child and its process group are killed.
        text: For its standard input.
        variables: Added to the environment.
    """
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env={**os.environ, **(variables or {})},
        start_new_session=True,  # so that a group of its own can be killed
    )
    try:
        output, errors = process.communicate(text, limit_s)
        late = False
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, errors = process.communicate()
        late = True
    error = f"no answer within {limit_s:g} s" if late else _reason(process.returncode, errors)
    places = [line.strip() for line in errors.splitlines() if line.strip().startswith('File "')]
    place = places[-1] if error and places else ""
    return Done(output, error, place, time.monotonic() - start)


def _reason(code: int, errors: str) -> str:
    if code == 0:
        return ""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    return lines[-1][:300] if lines else f"ended with code {code}"
