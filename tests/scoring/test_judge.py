"""The judge against a real HTTP server on this machine, and its readings against worked examples."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from keytoken.cli import main
from keytoken.errors import ConfigurationError, DataError
from keytoken.scoring.chat import Endpoint
from keytoken.scoring.items import Item
from keytoken.scoring.judge import Judge
from keytoken.scoring.judge_prompts import asked, judge_prompt

Answer = Callable[[BaseHTTPRequestHandler, dict[str, Any]], None]
RIGHT = '{"extracted_answer": "dolly zoom", "correct": true}'
WRONG = '{"extracted_answer": "pan", "correct": false}'


def question(number: int = 0) -> Item:
    return Item(
        benchmark="mmvu",
        item_id=f"validation_{number}",
        question="Which technique is shown?",
        answer="Dolly zoom",
        kind="open",
    )


class Server:
    """A server whose answers are given by a list of functions, the last one for all further requests."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.answers: list[Answer] = []
        self.released = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append(body | {"path": self.path})
                outer.headers.append(dict(self.headers))
                index = min(len(outer.requests), len(outer.answers)) - 1
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client has given up
                    outer.answers[index](self, body)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.released.set()
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.close()


def endpoint(server: Server, **changes: Any) -> Endpoint:
    settings = {"url": server.url, "model": "judge-7b", "key_variable": "", "wait": 0.01, "timeout": 5.0}
    return Endpoint(**settings | changes)


def says(content: str) -> Answer:
    return sends(200, {"choices": [{"message": {"role": "assistant", "content": content}}]})


def sends(status: int, body: Any, **headers: str) -> Answer:
    def answer(handler: BaseHTTPRequestHandler, _: dict[str, Any]) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(data)

    return answer


def test_a_reply_becomes_a_verdict_and_the_request_has_the_official_parts(
    server: Server, tmp_path: Path
) -> None:
    server.answers = [says(f"Sure.\n```json\n{RIGHT}\n```"), says(WRONG)]
    judge = Judge(endpoint(server), tmp_path / "judge.jsonl", parallel=1)
    steps: list[tuple[int, int]] = []
    verdicts = judge.decide(
        [(question(0), "A dolly zoom."), (question(1), "A pan.")], lambda *step: steps.append(step)
    )
    assert [(one.score, one.extracted, one.rule) for one in verdicts] == [
        (1.0, "dolly zoom", "judge"),
        (0.0, "pan", "judge"),
    ]
    assert steps == [(1, 2), (2, 2)]
    request = server.requests[0]
    assert request["path"] == "/v1/chat/completions"
    assert (request["model"], request["temperature"]) == ("judge-7b", 0.0)
    system, user = request["messages"]
    assert "exact same technique or concept" in system["content"]
    assert user["content"] == (
        "Question: Which technique is shown?\n\nGround Truth Answer: Dolly zoom\n\n"
        "Model Response to the Question: A dolly zoom."
    )
    assert "Authorization" not in server.headers[0]


def test_status_500_is_tried_again(server: Server, tmp_path: Path) -> None:
    server.answers = [sends(500, {"error": "busy"}), sends(429, {}, Retry_After="0"), says(RIGHT)]
    verdicts = Judge(endpoint(server), tmp_path / "judge.jsonl").decide([(question(), "A dolly zoom.")])
    assert verdicts[0].score == 1.0
    assert len(server.requests) == 3


def test_a_time_out_is_tried_again(server: Server, tmp_path: Path) -> None:
    server.answers = [lambda *_: server.released.wait(10) and None, says(RIGHT)]
    judge = Judge(endpoint(server, timeout=0.3), tmp_path / "judge.jsonl")
    assert judge.decide([(question(), "A dolly zoom.")])[0].score == 1.0
    assert len(server.requests) == 2


def test_a_server_that_drips_does_not_outlast_the_time_limit(server: Server, tmp_path: Path) -> None:
    def drip(handler: BaseHTTPRequestHandler, _: dict[str, Any]) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        for _ in range(100):
            handler.wfile.write(b" ")
            handler.wfile.flush()
            if server.released.wait(0.05):
                return

    server.answers = [drip, says(RIGHT)]
    start = time.monotonic()
    judge = Judge(endpoint(server, timeout=0.3), tmp_path / "judge.jsonl")
    assert judge.decide([(question(), "A dolly zoom.")])[0].score == 1.0
    assert time.monotonic() - start < 3.0


@pytest.mark.parametrize(
    "content",
    [
        pytest.param("It is correct.", id="no object"),
        pytest.param('{"correct": "yes"}', id="no boolean"),
        pytest.param('{"correct": tr', id="cut"),
        pytest.param("", id="empty"),
    ],
)
def test_a_malformed_answer_is_undecided_and_asked_again_by_the_next_run(
    server: Server, tmp_path: Path, content: str
) -> None:
    server.answers = [says(content), says(RIGHT)]
    cache = tmp_path / "judge.jsonl"
    judge = Judge(endpoint(server), cache, parallel=1)
    verdict = judge.decide([(question(), "A dolly zoom.")])[0]
    assert (verdict.score, verdict.rule) == (None, "judge undecided")
    assert "unreadable reply" in judge.undecided["validation_0"]
    assert Judge(endpoint(server), cache).decide([(question(), "A dolly zoom.")])[0].score == 1.0


def test_a_reply_without_a_text_stays_without_a_score(server: Server, tmp_path: Path) -> None:
    server.answers = [says(RIGHT), sends(200, {"choices": []}), sends(200, b"<html>")]
    judge = Judge(endpoint(server, attempts=2), tmp_path / "judge.jsonl", parallel=1)
    verdicts = judge.decide([(question(0), "A dolly zoom."), (question(1), "A pan.")])
    assert [one.score for one in verdicts] == [1.0, None]
    assert "no reply (2 attempts" in judge.undecided["validation_1"]


def test_a_resumed_run_makes_no_second_request(server: Server, tmp_path: Path) -> None:
    server.answers = [says(RIGHT)]
    cache = tmp_path / "folder" / "judge.jsonl"
    asked = [(question(number), f"Answer {number}\u2028.") for number in range(5)]
    first = Judge(endpoint(server), cache).decide(asked)
    assert len(server.requests) == 5
    assert Judge(endpoint(server), cache).decide(asked) == first
    assert len(server.requests) == 5
    Judge(endpoint(server), cache).decide([*asked, (question(0), "Another answer.")])
    assert len(server.requests) == 6
    Judge(endpoint(server, model="other"), cache).decide(asked[:1])  # another judge has its own replies
    assert len(server.requests) == 7


def test_equal_questions_are_asked_once(server: Server, tmp_path: Path) -> None:
    server.answers = [says(RIGHT)]
    verdicts = Judge(endpoint(server), tmp_path / "judge.jsonl").decide([(question(), "A zoom.")] * 3)
    assert [one.score for one in verdicts] == [1.0, 1.0, 1.0]
    assert len(server.requests) == 1


def test_what_was_replied_before_a_failure_is_kept(server: Server, tmp_path: Path) -> None:
    server.answers = [says(RIGHT), says(RIGHT), sends(401, {"error": "who are you?"})]
    cache = tmp_path / "judge.jsonl"
    asked = [(question(number), f"Answer {number}.") for number in range(4)]
    with pytest.raises(ConfigurationError, match="who are you"):
        Judge(endpoint(server), cache, parallel=1).decide(asked)
    server.answers = [says(RIGHT)]
    before = len(server.requests)
    assert [one.score for one in Judge(endpoint(server), cache).decide(asked)] == [1.0] * 4
    assert len(server.requests) == before + 2


def test_a_line_that_was_cut_is_asked_again_and_a_damaged_file_is_refused(
    server: Server, tmp_path: Path
) -> None:
    server.answers = [says(RIGHT)]
    cache = tmp_path / "judge.jsonl"
    asked = [(question(number), f"Answer {number}.") for number in range(2)]
    Judge(endpoint(server), cache, parallel=1).decide(asked)
    cache.write_bytes(cache.read_bytes()[:-20])
    Judge(endpoint(server), cache).decide(asked)
    Judge(endpoint(server), cache).decide(asked)  # the file is whole again
    assert len(server.requests) == 3
    cache.write_text("[]\n" + cache.read_text())
    with pytest.raises(DataError, match="no reply of a judge"):
        Judge(endpoint(server), cache)


def test_an_endpoint_that_replies_to_nothing_ends_the_run(server: Server, tmp_path: Path) -> None:
    server.answers = [sends(503, {})]
    judge = Judge(endpoint(server, attempts=1), tmp_path / "judge.jsonl", parallel=1)
    with pytest.raises(ConfigurationError, match="replies to nothing"):
        judge.decide([(question(number), f"Answer {number}.") for number in range(50)])
    assert len(server.requests) < 10
    server.close()
    with pytest.raises(ConfigurationError, match="refused"):
        judge.decide([(question(number), f"Answer {number}.") for number in range(50)])


def test_the_key_comes_from_the_environment_and_stays_out_of_files_and_messages(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sk-secret-1234\n")
    server.answers = [says(RIGHT), sends(403, {"error": "no"})]
    cache = tmp_path / "judge.jsonl"
    judge = Judge(endpoint(server, key_variable="JUDGE_KEY"), cache, parallel=1)
    judge.decide([(question(), "A zoom.")])
    assert server.headers[0]["Authorization"] == "Bearer sk-secret-1234"
    assert "secret" not in cache.read_text()
    with pytest.raises(ConfigurationError, match="JUDGE_KEY") as raised:
        judge.decide([(question(1), "A pan.")])
    assert "secret" not in str(raised.value)
    server.answers = [sends(401, {"error": "no such key: sk-secret-1234"})]  # some servers repeat it
    with pytest.raises(ConfigurationError, match=r"no such key: \*\*\*") as raised:
        judge.decide([(question(3), "A pan.")])
    assert "secret" not in str(raised.value)
    monkeypatch.setenv("JUDGE_KEY", "sk-secret\r\nX: y")
    with pytest.raises(ConfigurationError, match="JUDGE_KEY holds characters") as raised:
        judge.decide([(question(2), "A pan.")])
    assert "secret" not in str(raised.value)


def test_a_redirect_is_refused(server: Server, tmp_path: Path) -> None:
    server.answers = [sends(302, {}, Location="http://example.invalid/")]
    with pytest.raises(ConfigurationError, match="status 302"):
        Judge(endpoint(server), tmp_path / "judge.jsonl").decide([(question(), "A zoom.")])
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"url": "file:///etc/passwd"}, "must begin with http", id="no http"),
        pytest.param({"url": "https://me:mine@host/v1"}, "holds a password .not shown", id="a password"),
        pytest.param({"key_variable": "sk-1234"}, "no name of an environment variable .not", id="a key"),
        pytest.param({"model": ""}, "model is empty", id="no model"),
        pytest.param({"timeout": 0.0}, "timeout is 0.0", id="no time"),
        pytest.param({"attempts": 0}, "attempts is 0", id="no attempts"),
    ],
)
def test_settings_that_cannot_work_are_refused(server: Server, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as raised:
        endpoint(server, **changes)
    assert "mine" not in str(raised.value) and "sk-1234" not in str(raised.value)


def test_a_benchmark_without_a_judge_is_refused(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="judge of vsibench"):
        Judge(endpoint(server), tmp_path / "judge.jsonl").decide(
            [(replace(question(), benchmark="vsibench"), "4")]
        )


CHOICE = Item(
    benchmark="tempcompass",
    item_id="1034419625/multi-choice/action/0",
    question="What is the man doing in the video?",
    answer="A",
    kind="multiple choice",
    options=("dunking a basketball", "dribbling a basketball", "passing a basketball"),
    task="multi-choice",
)


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("Correct", 1.0),
        ("Correct, not Incorrect", 1.0),
        ("Incorrect", 0.0),
        ("The prediction is Correct.", 1.0),
        ("It is Incorrect, as Correct would be A", 0.0),
        ("yes", None),
        ("correct", None),
        ("", None),
    ],
)
def test_tempcompass_reads_the_word_as_its_script_does(reply: str, score: float | None) -> None:
    reading = judge_prompt(CHOICE).read(CHOICE, reply)
    assert (None if reading is None else reading.score) == score


def test_tempcompass_asks_as_its_script_does() -> None:
    system, user = judge_prompt(CHOICE).messages(CHOICE, "He dunks.")
    assert system["content"] == "You are an AI assistant for question answering."
    assert user["content"].endswith(
        '"Incorrect".\n\nMulti-Choice Question:\nWhat is the man doing in the video?\n'
        "A. dunking a basketball\nB. dribbling a basketball\nC. passing a basketball\n"
        "Ground-Truth Answer: A. dunking a basketball\nModel Prediction: He dunks."
    )


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("Reasoning: He dunks.\nAnswer: A. dunking a basketball", 1.0),
        ("Reasoning: He passes.\nAnswer: C. passing a basketball", 0.0),
        ("Reasoning: Unclear.\nAnswer: None of the choices are correct", 0.0),
        ("Answer: A. dunking or B. dribbling", 0.0),
        ("A. dunking a basketball", 1.0),
        ("I cannot tell.", None),
        ("", None),
    ],
)
def test_tempcompass_checks_captions_by_the_multiple_choice_question(reply: str, score: float | None) -> None:
    caption = replace(
        CHOICE, item_id="1034419625/captioning/action/0", task="captioning", kind="captioning", options=()
    )
    put = asked(caption, {CHOICE.item_id: CHOICE})
    assert (put.item_id, put.options) == (caption.item_id, CHOICE.options)
    reading = judge_prompt(put).read(put, reply)
    assert (None if reading is None else reading.score) == score
    user = judge_prompt(put).messages(put, "A man dunks.")[1]["content"]
    assert "Video Description:A man dunks.\nMulti-Choice Question:\nWhat is the man doing" in user


def test_a_caption_without_its_question_is_refused_and_other_questions_are_put_as_they_are() -> None:
    caption = replace(CHOICE, item_id="1/captioning/action/0", task="captioning", kind="captioning")
    with pytest.raises(DataError, match="add the official file multi-choice"):
        asked(caption, {CHOICE.item_id: CHOICE})
    assert asked(CHOICE, {}) is CHOICE


def official(number: int, kind: str) -> dict[str, Any]:
    """A question of MMVU as its file has it."""
    return {
        "id": f"validation_{number}",
        "video": f"https://huggingface.co/datasets/yale-nlp/MMVU/resolve/main/videos/Art/{number}.mp4",
        "question_type": kind,
        "metadata": {"subject": "Art"},
        "question": "Which technique is shown?",
        "choices": {letter: f"option {letter}" for letter in "ABCDE"},
        "answer": "B" if kind == "multiple-choice" else "Dolly zoom",
    }


def test_the_command_asks_the_judge_for_open_questions_only_and_names_it(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions, predictions = tmp_path / "validation.json", tmp_path / "answers.jsonl"
    kinds = ["multiple-choice", "open-ended", "open-ended", "open-ended"]
    questions.write_text(json.dumps([official(number, kind) for number, kind in enumerate(kinds)]))
    responses = ["B", "<think>Or a pan?</think><answer>A dolly zoom.</answer>", "A pan.", "Hm."]
    rows = [{"item_id": f"validation_{n}", "response": text} for n, text in enumerate(responses)]
    predictions.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def replies(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        said = body["messages"][1]["content"].rpartition("Response to the Question: ")[2]
        reply = {"A dolly zoom.": RIGHT, "A pan.": WRONG}.get(said, "I do not know.")
        says(reply)(handler, body)

    server.answers = [replies]
    words = ["benchmark=mmvu", f"predictions={predictions}", f"questions={questions}", f"out={tmp_path}/out"]
    words += [f"judge={server.url}", "judge_model=judge-7b", "judge_key="]
    assert main(["score", *words]) == 0
    report = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "2 answers were judged by the language model judge-7b" in report
    assert "The judge left 1 answer undecided: validation_3: unreadable reply" in report
    results = json.loads((tmp_path / "out" / "items.jsonl").read_text(encoding="utf-8").splitlines()[1])
    assert "judge" in results.values()
    assert len(server.requests) == 3
    assert main(["score", *words]) == 0
    assert len(server.requests) == 4  # the undecided one alone is asked again
    capsys.readouterr()
    assert main(["score", *words[:-2]]) == 2
    assert "score: judge_model is missing; add judge_model=NAME" in capsys.readouterr().err
    assert main(["score", *[word for word in words if word != f"judge={server.url}"]]) == 2
    assert "score: judge is missing; add judge=URL" in capsys.readouterr().err
