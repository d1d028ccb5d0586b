"""Runs Python or a program under a time limit: what hangs, crashes or prints there disturbs nobody."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_KILL_LIMIT_S = 5.0


@dataclass(frozen=True, slots=True)
class Done:
    """What came of a child.

    Attributes:
        output: Its standard output.
        error: Why it failed, in one line; empty if it did not.
        place: File and line of a Python error, where there is one.
        seconds: That it took.
        late: Whether it was killed because it took too long.
    """

    output: str
    error: str
    place: str
    seconds: float
    late: bool = False


def run_child(
    arguments: Sequence[str], limit_s: float, *, text: str = "", variables: Mapping[str, str] | None = None
) -> Done:
    """:func:`run_program` for ``python ARGUMENTS``."""
    return run_program([sys.executable, *arguments], limit_s, text=text, variables=variables)


def run_program(
    command: Sequence[str], limit_s: float, *, text: str = "", variables: Mapping[str, str] | None = None
) -> Done:
    """Run a program and everything that it starts, for at most ``limit_s`` seconds and a few to be killed.

    Args:
        command: The program and its arguments.
        limit_s: Seconds until the child and its process group are killed.
        text: For its standard input.
        variables: Added to the environment.

    Raises:
        OSError: the program cannot be started.
    """
    start = time.monotonic()
    process = subprocess.Popen(
        command,
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
        late = process.poll() is None  # else it is done, and something that it started holds the pipes
        output, errors = _kill(process)
    except KeyboardInterrupt:  # Ctrl-C does not reach a group of its own
        _kill(process)
        raise
    error = f"no answer within {limit_s:g} s" if late else _reason(process.returncode, errors)
    places = [line.strip() for line in errors.splitlines() if line.strip().startswith('File "')]
    place = places[-1] if error and places else ""
    return Done(output, error, place, time.monotonic() - start, late)


def _kill(process: "subprocess.Popen[str]") -> tuple[str, str]:
    """Kill the group; what holds its pipes even then, stuck in a driver or out of the group, is left."""
    with contextlib.suppress(ProcessLookupError):  # the whole group has just ended
        os.killpg(process.pid, signal.SIGKILL)
    try:
        return process.communicate(timeout=_KILL_LIMIT_S)
    except subprocess.TimeoutExpired as stuck:
        return _text(stuck.stdout), _text(stuck.stderr)


def _text(data: bytes | str | None) -> str:
    return data.decode(errors="replace") if isinstance(data, bytes) else data or ""


def _reason(code: int, errors: str) -> str:
    if code == 0:
        return ""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    return lines[-1][:300] if lines else f"ended with code {code}"
