"""A killed owner takes down the process that watches it, and that process's parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import psutil

# Owner, engine core and worker, as vLLM starts them: the worker says when it watches, then all of them sleep.
WORKER = (
    "import time; from keytoken.verl_adapter.owner import watch_owner; "
    "watch_owner(); print('up', flush=True); time.sleep(600)"
)
CORE = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {WORKER!r}]); time.sleep(600)"
OWNER = (
    "import subprocess, sys, time; from keytoken.verl_adapter.owner import become_owner; become_owner(); "
    f"subprocess.Popen([sys.executable, '-c', {CORE!r}]); time.sleep(600)"
)


def test_a_killed_owner_leaves_nothing_behind() -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None and owner.stdout.readline() == "up\n"
    family = psutil.Process(owner.pid).children(recursive=True)
    assert len(family) == 2
    os.kill(owner.pid, signal.SIGKILL)
    owner.wait(30)
    _, alive = psutil.wait_procs(family, timeout=30)
    for process in alive:
        process.kill()
    assert not alive


def test_an_owner_that_is_gone_already() -> None:
    gone = subprocess.Popen(["true"])
    gone.wait(30)
    environment = {**os.environ, "KEYTOKEN_ENGINE_OWNER": str(gone.pid)}
    # Its parent, which is killed as well, is a shell.
    shell = f'{sys.executable} -c "{WORKER}"; echo survived'
    found = subprocess.run(
        ["/bin/sh", "-c", shell], env=environment, capture_output=True, text=True, timeout=60
    )
    assert found.returncode == -signal.SIGKILL and "up" not in found.stdout
