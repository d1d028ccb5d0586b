"""The cluster's job server: submitting a job, following its log, and how it ended."""

import asyncio
import logging
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import aiohttp
import requests
from ray.exceptions import AuthenticationError, RpcError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from keytoken.errors import ClusterError, ConfigurationError
from keytoken.submit.request import RUN_DIR, Request
from keytoken.submit.restarts import LOST, Outcome

# A job server that cannot be reached for so long is given up; a head that restarts takes half a minute.
LOST_AFTER_S = 120.0
# Of one question to the job server, which Ray's client would wait for without end.
CALL_LIMIT_S = 20.0
# How often a job is asked for beside its log: a log can fall silent because the head has.
_POLL_S = 2.0
_LOGS = ", last available logs"  # of Ray's account of a failure; they have been printed already
_ENDED = (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED)
_RUNNING = (JobStatus.PENDING, JobStatus.RUNNING)
# What Ray's client lets through while the job server is away or answers with an error.
_UNREACHABLE = (requests.RequestException, aiohttp.ClientError, RpcError, RuntimeError, OSError)

logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)


class _Client(JobSubmissionClient):
    """Ray's, with a limit on every question."""

    def _do_request(self, *args: Any, **kwargs: Any) -> requests.Response:
        return super()._do_request(*args, timeout=CALL_LIMIT_S, **kwargs)


class JobServer:
    """A Ray cluster's job server.

    Args:
        address: Such as ``http://HEAD:8265``.
        lost_after_s: Seconds after which a server that does not answer is given up.

    Raises:
        ConfigurationError: an address of another form.
        ClusterError: nobody answers there, or a token is wanted that was not given.
    """

    def __init__(self, address: str, lost_after_s: float = LOST_AFTER_S) -> None:
        if not address.startswith(("http://", "https://")):
            raise ConfigurationError(
                f"--address {address}: is no job server's; write http://HEAD:8265, with http:// in front."
            )
        self.address, self._lost_after_s = address, lost_after_s
        os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray's client prefers what stands there
        try:
            self._client = _Client(address)
        except AuthenticationError as problem:
            raise ClusterError(
                f"{address}: the cluster wants a token. Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to "
                "a file with the token of its head (there it is ~/.ray/auth_token)."
            ) from problem
        except (*_UNREACHABLE, ValueError) as problem:
            raise ClusterError(
                f"{address}: no job server of a Ray cluster answers there ({_first_line(problem)}). It is "
                "the address of the head's dashboard, http://HEAD:8265 unless `ray start` was told another; "
                "`ray status` on the head says whether it runs."
            ) from problem

    def command(self, verb: str, name: str) -> str:
        """A command of Ray's about a job that can be pasted."""
        return f"`ray job {verb} --address {self.address} {name}`"

    def submit(self, request: Request) -> None:
        """Submit a job; a server that is away for a while is waited for.

        Raises:
            ClusterError: the server refuses it: a name that is taken, a run folder that another job trains
                into; or it cannot be reached.
        """
        sent = False

        def send() -> None:
            nonlocal sent
            self._refuse_a_second_writer(request)
            first, sent = not sent, True
            try:
                self._client.submit_job(
                    entrypoint=request.entrypoint(),
                    submission_id=request.name,
                    runtime_env=request.runtime_env(),
                    metadata=request.metadata(),
                )
            except (RuntimeError, ValueError) as problem:
                taken = "already exists" in str(problem)
                if taken and not first:
                    return  # the answer to an earlier try was lost, the job was not
                reason = "a job of that name exists; give another by --id" if taken else _first_line(problem)
                raise ClusterError(
                    f"job {request.name} was refused by {self.address}: {reason}."
                ) from problem

        self._insist(send)

    def stop(self, name: str) -> None:
        """Ask a job to stop; Ray kills it when its time for that is over (``Request.stop_grace_s``).

        Raises:
            ClusterError: the server cannot be reached.
        """

        def send() -> None:
            self._client.stop_job(name)

        self._insist(send)

    def _refuse_a_second_writer(self, request: Request) -> None:
        for job in self._client.list_jobs():
            name, folder = str(job.submission_id), (job.metadata or {}).get(RUN_DIR)
            if folder == request.run_dir and job.status in _RUNNING and name != request.name:
                raise ClusterError(
                    f"job {name} is still training into keytoken.run_dir={request.run_dir}; two would "
                    f"overwrite each other's files. Follow it by {self.command('logs --follow', name)}, end "
                    f"it by {self.command('stop', name)}, or name another folder."
                )

    def _insist(self, call: Callable[[], None]) -> None:
        began = time.monotonic()
        while True:
            try:
                return call()
            except ClusterError:
                raise
            except _UNREACHABLE as problem:
                if time.monotonic() - began > self._lost_after_s:
                    raise self._gone(problem) from problem
                time.sleep(_POLL_S)

    def follow(self, name: str, log: Callable[[str], None]) -> Outcome:
        """Print the log of a job until it ends.

        Raises:
            ClusterError: the server cannot be reached any more.
        """
        return asyncio.run(self._follow(name, log))

    async def _follow(self, name: str, log: Callable[[str], None]) -> Outcome:
        """The log and the state of the job side by side; the state decides."""
        printing = asyncio.create_task(self._print_log(name, log))
        try:
            outcome = await self._wait(name, printing)
            await asyncio.wait([printing], timeout=CALL_LIMIT_S)  # what is left of the log
            return outcome
        finally:
            printing.cancel()
            await asyncio.gather(printing, return_exceptions=True)

    async def _print_log(self, name: str, log: Callable[[str], None]) -> None:
        """A stream that breaks is opened again, at its beginning, of which what is known is cut."""
        printed = 0
        while True:
            seen = 0
            stream = self._client.tail_job_logs(name)
            while True:
                try:
                    text = await anext(stream)
                except StopAsyncIteration:
                    return
                except _UNREACHABLE:
                    break
                new = text[max(0, printed - seen) :]
                seen += len(text)
                if new:
                    log(new)
                    printed = seen
            await asyncio.sleep(_POLL_S)

    async def _wait(self, name: str, printing: "asyncio.Task[None]") -> Outcome:
        answered = time.monotonic()
        while True:
            if printing.done() and not printing.cancelled() and printing.exception() is not None:
                printing.result()  # the reader of the log went away
            try:
                details = await asyncio.to_thread(self._client.get_job_info, name)
            except _UNREACHABLE as problem:
                if "does not exist" in str(problem):
                    return Outcome(LOST, None, "the head was restarted and has forgotten the job", 0.0)
                if time.monotonic() - answered > self._lost_after_s:
                    raise self._gone(problem) from problem
            else:
                answered = time.monotonic()
                if details.status in _ENDED:
                    return _outcome_of(details)
            await asyncio.sleep(_POLL_S)

    def _gone(self, problem: BaseException) -> ClusterError:
        return ClusterError(
            f"{self.address} has not answered for {self._lost_after_s:.0f} s ({_first_line(problem)}): the "
            "head is down or cannot be reached. When it answers again, `ray job list` says whether the job "
            "still runs; if not, the same command goes on from the last complete checkpoint."
        )


def _outcome_of(details: JobDetails) -> Outcome:
    message = _first_line(details.message or "").partition(_LOGS)[0]
    message += _signal_of(details.driver_exit_code)
    seconds = ((details.end_time or 0) - (details.start_time or 0)) / 1000.0
    return Outcome(str(details.status.value), details.driver_exit_code, message, seconds)


def _signal_of(code: int | None) -> str:
    """What ended a driver that did not end by itself, whose log has no word of it."""
    number = -code if code and code < 0 else (code or 0) - 128  # as Python says it, and as a shell does
    if number not in set(signal.Signals) or number == signal.SIGTERM:  # after that one it ends by itself
        return ""
    name = signal.Signals(number).name
    killed = ", as the kernel does when memory is short: `dmesg` on the head" if name == "SIGKILL" else ""
    return f" (the driver, `keytoken train` on the head, was ended by {name}{killed})"


def _first_line(what: object) -> str:
    lines = [line.strip() for line in str(what).splitlines() if line.strip()]
    return lines[0][:300] if lines else ""
