"""Bounds on every wait: verl waits for ever where a peer has died, KeyToken does not."""

import threading
from collections.abc import Callable
from typing import TypeVar

from keytoken.errors import KeyTokenError

Result = TypeVar("Result")


def bounded(
    call: Callable[[], Result], timeout_s: float, what: str, remedy: str, error: type[KeyTokenError]
) -> Result:
    """Run ``call`` in a thread of its own and wait at most ``timeout_s`` seconds for it.

    Raises:
        error: the time is up.
        BaseException: whatever ``call`` itself raised, unchanged.
    """
    return begun(call, timeout_s, what, remedy, error)()


def begun(
    call: Callable[[], Result], timeout_s: float, what: str, remedy: str, error: type[KeyTokenError]
) -> Callable[[], Result]:
    """Begin ``call`` in a thread of its own; the function returned waits as :func:`bounded` does.

    The thread is a daemon: if it hangs, it dies with the process that the raised error ends.
    """
    outcome: list[Result] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(call())
        except BaseException as problem:  # noqa: BLE001 - the waiting thread raises it unchanged
            failure.append(problem)

    def wait() -> Result:
        thread.join(timeout_s)
        if thread.is_alive():
            raise error(f"{what} did not end within {timeout_s:g} s. {remedy}")
        if failure:
            raise failure[0]
        return outcome[0]

    thread = threading.Thread(target=run, name=what, daemon=True)
    thread.start()
    return wait
