"""The cluster's job server: submitting a job, following its log, and how it ended."""

import asyncio
import time
from collections.abc import Callable

from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from keytoken.errors import ClusterError
from keytoken.submit.request import Request
from keytoken.submit.restarts import Outcome

# A job server that cannot be reached for so long is given up; a head that restarts takes half a minute.
LOST_AFTER_S = 120.0
_POLL_S = 1.0
_LOGS = ", last available logs"  # which have been printed already
_ENDED = (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED)
# What the client raises while the job server is away or answers with an error.
_UNREACHABLE = (ConnectionError, RuntimeError, OSError)


class JobServer:
    """A Ray cluster's job server.

    Args:
        address: Such as ``http://HEAD:8265``.
        lost_after_s: Seconds after which a server that does not answer is given up.

    Raises:
        ClusterError: there is none, or it wants a token that was not given.
    """

    def __init__(self, address: str, lost_after_s: float = LOST_AFTER_S) -> None:
        self.address, self._lost_after_s = address, lost_after_s
        try:
            self._client = JobSubmissionClient(address)
        except AuthenticationError as problem:
            raise ClusterError(
                f"{address}: the cluster wants a token. Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to "
                "a file with the token of its head (there it is ~/.ray/auth_token)."
            ) from problem
        except (ConnectionError, ValueError) as problem:
            raise ClusterError(
                f"{address}: no job server of a Ray cluster answers there ({_first_line(problem)}). It is "
                "the address of the head's dashboard, http://HEAD:8265 unless `ray start` was told another; "
                "`ray status` on the head says whether it runs."
            ) from problem

    def submit(self, request: Request) -> None:
        """Submit a job.

        Raises:
            ClusterError: the server refuses it, such as for a name that is taken.
        """
        try:
            self._client.submit_job(
                entrypoint=request.entrypoint(),
                submission_id=request.name,
                runtime_env=request.runtime_env(),
            )
        except (RuntimeError, ValueError) as problem:
            reason = _first_line(problem)
            if "already exists" in str(problem):
                reason = "a job of that name exists; give another by --id"
            raise ClusterError(f"job {request.name} was refused by {self.address}: {reason}.") from problem

    def follow(self, name: str, say: Callable[[str], None]) -> Outcome:
        """Print the log of a job until it ends.

        Raises:
            ClusterError: the server cannot be reached any more.
        """
        asyncio.run(self._print_log(name, say))
        return self._wait(name)

    async def _print_log(self, name: str, say: Callable[[str], None]) -> None:
        """Until the stream ends, which it also does when the head is lost."""
        try:
            async for text in self._client.tail_job_logs(name):
                say(text)
        except _UNREACHABLE:
            return  # how the job ended is asked next, and says what is wrong

    def _wait(self, name: str) -> Outcome:
        seen = time.monotonic()
        while True:
            try:
                details: JobDetails = self._client.get_job_info(name)
            except _UNREACHABLE as problem:
                if time.monotonic() - seen > self._lost_after_s:
                    raise ClusterError(
                        f"{self.address} has not answered for {self._lost_after_s:.0f} s "
                        f"({_first_line(problem)}): the head is down or cannot be reached. When it is back, "
                        "the same command goes on from the last complete checkpoint."
                    ) from problem
            else:
                seen = time.monotonic()
                if details.status in _ENDED:
                    return _outcome_of(details)
            time.sleep(_POLL_S)


def _outcome_of(details: JobDetails) -> Outcome:
    message = _first_line(details.message or "").partition(_LOGS)[0]
    seconds = ((details.end_time or 0) - (details.start_time or 0)) / 1000.0
    return Outcome(str(details.status.value), details.driver_exit_code, message, seconds)


def _first_line(what: object) -> str:
    lines = [line.strip() for line in str(what).splitlines() if line.strip()]
    return lines[0][:300] if lines else ""
