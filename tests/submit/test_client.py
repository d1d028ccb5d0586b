"""The job server that is away, forgets, or is not the one that was meant: a small server that misbehaves."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from keytoken.errors import ClusterError, ConfigurationError
from keytoken.submit import client
from keytoken.submit.client import JobServer
from keytoken.submit.request import Request
from keytoken.submit.restarts import LOST

REQUEST = Request(("method=grpo",), "job", "/runs/1")


class Misbehaving:
    """Answers as it is told; of logs it knows nothing."""

    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.faults: list[int] = []  # status codes of the next answers
        self.silent = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer(lambda: outer.get(self.path))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self._answer(lambda: outer.post(body))

            def _answer(self, make: Callable[[], tuple[int, Any]]) -> None:
                if outer.silent.is_set():
                    outer.silent.wait(0.1)
                    outer.release.wait(30)
                code, content = (outer.faults.pop(0), "broken") if outer.faults else make()
                self.send_response(code)
                self.end_headers()
                self.wfile.write((content if isinstance(content, str) else json.dumps(content)).encode())

            def log_message(self, *_: Any) -> None:
                pass

        self.release = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def get(self, path: str) -> tuple[int, Any]:
        if path == "/api/version":
            return 200, {"version": "4", "ray_version": "2.60.0", "ray_commit": "x", "session_name": "s"}
        if path == "/api/jobs/":
            return 200, list(self.jobs.values())
        name = path.removeprefix("/api/jobs/")
        return (200, self.jobs[name]) if name in self.jobs else (404, f"Job {name} does not exist.")

    def post(self, body: dict[str, Any]) -> tuple[int, Any]:
        name = body["submission_id"]
        if name in self.jobs:
            return 400, f"Job with submission_id {name} already exists."
        self.add(name, "SUCCEEDED", body["metadata"]["keytoken_run_dir"])
        return 200, {"job_id": name, "submission_id": name}

    def add(self, name: str, status: str, run_dir: str) -> None:
        self.jobs[name] = {
            **{"type": "SUBMISSION", "submission_id": name, "entrypoint": "keytoken", "status": status},
            **{"message": "Job finished", "start_time": 1000, "end_time": 61000, "driver_exit_code": 0},
            "metadata": {"keytoken_run_dir": run_dir},
        }


@pytest.fixture
def misbehaving(monkeypatch: pytest.MonkeyPatch) -> Iterator[Misbehaving]:
    monkeypatch.setattr(client, "_POLL_S", 0.05)
    monkeypatch.setattr(client, "CALL_LIMIT_S", 0.5)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    server = Misbehaving()
    yield server
    server.release.set()
    server.server.shutdown()


def test_the_address_that_is_given_wins(misbehaving: Misbehaving, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own client prefers its variables to its argument."""
    other = Misbehaving()
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", other.address)
    monkeypatch.setenv("RAY_ADDRESS", other.address)
    JobServer(misbehaving.address).submit(REQUEST)
    other.server.shutdown()
    assert list(misbehaving.jobs) == ["job"] and not other.jobs


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (137, "was ended by SIGKILL, as the kernel does when memory is short"),
        (-9, "was ended by SIGKILL, as the kernel does when memory is short"),
        (-11, "was ended by SIGSEGV)"),
        *[(code, None) for code in (0, 1, 3, 128, 143, -15, None)],
    ],
)
def test_a_driver_that_a_signal_ended(misbehaving: Misbehaving, code: int | None, said: str | None) -> None:
    misbehaving.add("job", "FAILED", "/runs/1")
    misbehaving.jobs["job"]["driver_exit_code"] = code
    message = JobServer(misbehaving.address).follow("job", lambda text: None).message
    assert message.startswith("Job finished") and (said in message if said else message == "Job finished")


def test_a_short_outage_is_waited_for_and_the_job_sent_once(misbehaving: Misbehaving) -> None:
    server = JobServer(misbehaving.address)
    misbehaving.faults = [502, 500]
    server.submit(REQUEST)
    misbehaving.faults = [503, 502]
    assert server.follow("job", lambda text: None).status == "SUCCEEDED"
    assert list(misbehaving.jobs) == ["job"]


def test_a_lost_answer_to_a_submission_is_no_refusal(misbehaving: Misbehaving) -> None:
    server = JobServer(misbehaving.address)
    add = misbehaving.add

    def taken_and_lost(*words: str) -> None:
        add(*words)
        misbehaving.add = add
        raise ConnectionResetError

    misbehaving.add = taken_and_lost  # the handler dies: the connection breaks without an answer
    server.submit(REQUEST)
    assert list(misbehaving.jobs) == ["job"]
    with pytest.raises(ClusterError, match="a job of that name exists"):
        server.submit(REQUEST)


def test_a_head_that_says_nothing_is_given_up(misbehaving: Misbehaving) -> None:
    server = JobServer(misbehaving.address, lost_after_s=1.0)
    misbehaving.add("job", "RUNNING", "/runs/1")
    misbehaving.silent.set()
    with pytest.raises(ClusterError, match="has not answered for 1 s"):
        server.follow("job", lambda text: None)


def test_a_head_that_was_restarted_has_forgotten_the_job(misbehaving: Misbehaving) -> None:
    outcome = JobServer(misbehaving.address).follow("job", lambda text: None)
    assert (outcome.status, outcome.exit_code) == (LOST, None)


@pytest.mark.parametrize(("status", "refused"), [("RUNNING", True), ("PENDING", True), ("FAILED", False)])
def test_two_jobs_do_not_write_into_one_folder(misbehaving: Misbehaving, status: str, refused: bool) -> None:
    server = JobServer(misbehaving.address)
    misbehaving.add("earlier", status, "/runs/1")
    misbehaving.add("elsewhere", "RUNNING", "/runs/2")
    if not refused:
        return server.submit(REQUEST)
    with pytest.raises(ClusterError, match=f"logs --follow --address {misbehaving.address} earlier"):
        server.submit(REQUEST)
    assert "job" not in misbehaving.jobs
    return None


def test_an_address_is_one_of_http() -> None:
    with pytest.raises(ConfigurationError, match="write http://HEAD:8265"):
        JobServer("HEAD:8265")
