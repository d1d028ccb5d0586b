"""Whether a job that failed is worth another try, and the tries."""

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from typing import Protocol

from keytoken.errors import KeyTokenError, StoppedError
from keytoken.submit.request import Request
from keytoken.submit.termination import stop_on_sigterm

# Ray reports a killed host as dead after 13 to 15 s; a job placed on it before that fails at once.
RESTART_DELAY_S = 30.0
LOST = "LOST"  # the status of a job that the head has forgotten
STOPPED = "STOPPED"  # Ray's, of a job that was told to stop; it keeps no exit code of it
# Importing what a driver needs takes longer than this.
LEAST_S = 5.0
# Of drivers that would end so again, and of those that were told to end (a file in the run folder, a signal).
FINAL_CODES = (KeyTokenError.exit_code, StoppedError.exit_code)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        status: Ray's word: SUCCEEDED, FAILED or STOPPED; or :data:`LOST`.
        exit_code: Of the driver; None where it was lost with its machine.
        message: Ray's account, its first line.
        seconds: From its start to its end.
    """

    status: str
    exit_code: int | None
    message: str
    seconds: float

    def command_code(self) -> int:
        """The exit code of a command that followed the job."""
        if self.status == "SUCCEEDED":
            return 0
        code = self.exit_code or 1
        return code if code > 0 else 128 - code  # as a shell says that a signal ended a program


class Server(Protocol):
    """What is needed of :class:`keytoken.submit.client.JobServer`."""

    def command(self, verb: str, name: str) -> str:
        """A command of Ray's about a job that can be pasted."""

    def submit(self, request: Request) -> None:
        """Submit a job."""

    def stop(self, name: str) -> None:
        """Ask a job to stop."""

    def follow(self, name: str, say: Callable[[str], None]) -> Outcome:
        """Print the log of a job until it ends."""


def run_to_the_end(
    server: Server,
    request: Request,
    max_restarts: int,
    delay_s: float,
    say: Callable[[str], None],
    log: Callable[[str], None],
) -> Outcome:
    """Submit a job and, while it fails for reasons that may pass, submit it again.

    A job goes on from its last complete checkpoint because its words are the same (the run folder and
    ``trainer.resume_mode=auto``).

    Args:
        server: The cluster's job server.
        request: The job.
        max_restarts: Tries after the first.
        delay_s: Pause before each of them.
        say: Prints a line of this command.
        log: Prints text of the job's log.
    """
    number = 0
    while True:
        name = request.name if number == 0 else f"{request.name}-r{number}"
        server.submit(dataclasses.replace(request, name=name))
        say(f"job {name}: submitted; {server.command('stop', name)} ends it, and leaving here does not")
        try:
            with stop_on_sigterm(partial(server.stop, name), say) as asked:
                outcome = server.follow(name, log)
        except KeyboardInterrupt:
            say(f"\nLeft. The job goes on; {server.command('logs --follow', name)} shows it.")
            raise
        if outcome.status == STOPPED or (asked() and outcome.status != "SUCCEEDED"):
            return dataclasses.replace(outcome, exit_code=StoppedError.exit_code)
        if number >= max_restarts or not worth_another_try(outcome):
            return outcome
        number += 1
        say(
            f"job {name}: {outcome.message or outcome.status}. Try {number} of {max_restarts} in "
            f"{delay_s:g} s, from the last complete checkpoint."
        )
        time.sleep(delay_s)


def worth_another_try(outcome: Outcome) -> bool:
    """Whether the same job may succeed: not after an error of its user's, nor when it was stopped.

    A driver that ends with the code of its user's error (a wrong key, a missing file) would end so again; so
    would one that ends before it can have talked to the cluster (no KeyToken in its Python). One that was
    told to stop says so. All else may be the loss of a process or machine, which Ray reports in many ways.
    """
    began = outcome.exit_code is None or outcome.seconds > LEAST_S
    return outcome.status in ("FAILED", LOST) and outcome.exit_code not in FINAL_CODES and began
