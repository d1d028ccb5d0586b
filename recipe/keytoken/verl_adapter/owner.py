"""Ends an engine whose owner was killed.

SIGKILL leaves a process no time to stop what it has started, and vLLM's engine waits for ever for requests
that nobody will send, with all its memory (vllm 0.27.1). So the worker of an engine that
:class:`keytoken.verl_adapter.offline.OfflineEngine` started watches that process, and takes the engine and
itself down when it is gone.
"""

import os
import select
import signal
import threading

OWNER = "KEYTOKEN_ENGINE_OWNER"  # process id of who started the engine


def become_owner() -> None:
    """Let engines that this process starts from now on end with it."""
    os.environ[OWNER] = str(os.getpid())


def watch_owner() -> None:
    """Watch the owner from this process, if it has one and is not it; called in every process with verl."""
    owner = os.environ.get(OWNER)
    if not owner or int(owner) == os.getpid():
        return
    try:
        handle = os.pidfd_open(int(owner))
    except ProcessLookupError:
        _end()
    else:
        threading.Thread(target=_wait, args=(handle,), name="engine owner", daemon=True).start()


def _wait(handle: int) -> None:
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    poll.poll()
    _end()


def _end() -> None:
    parent = os.getppid()
    if parent > 1:  # vLLM's engine core, the worker's parent
        os.kill(parent, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
