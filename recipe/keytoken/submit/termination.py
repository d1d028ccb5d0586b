"""SIGTERM to a command that follows a job: the job is asked to stop, and followed until it has.

Schedulers send it to whatever runs ``keytoken submit`` before they take the machines away. The job then
finishes its step and saves it (``keytoken.on_sigterm``). Ctrl-C only leaves.
"""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from keytoken.errors import KeyTokenError, StoppedError


@contextmanager
def stop_on_sigterm(stop: Callable[[], None], say: Callable[[str], None]) -> Iterator[Callable[[], bool]]:
    """While a job is followed; yields a function that says whether SIGTERM has come.

    Args:
        stop: Asks the job to stop.
        say: Prints a line.
    """
    asked = threading.Event()

    def ask() -> None:  # not in the handler, which may have interrupted a print
        say("\nSIGTERM: the job is asked to stop. A second one leaves without waiting for that.")
        try:
            stop()
        except KeyTokenError as problem:
            say(f"The job could not be asked to stop: {problem}")

    def handle(*_: Any) -> None:
        if asked.is_set():
            sys.exit(StoppedError.exit_code)
        asked.set()
        threading.Thread(target=ask, name="stop the job", daemon=True).start()

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGTERM, before)
