"""TempCompass' captions from the command to the report, judged by a stub of an endpoint over real HTTP."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from keytoken.cli import main


class Server:
    """A judge that plays by the official prompt, and keeps what it was asked."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        requests = self.requests

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                requests.append(body)
                message = {"role": "assistant", "content": plays_the_judge(body)}
                content = json.dumps({"choices": [{"message": message}]}).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.http.shutdown()
    running.http.server_close()


def plays_the_judge(body: dict[str, Any]) -> str:
    """Reads the official prompt: answers by the option that the description names, if there is just one."""
    asked_for = body["messages"][1]["content"].rpartition("\n```\n")[2]
    described, _, question = asked_for.strip().partition("\nMulti-Choice Question:\n")
    options = [line for line in question.splitlines() if line[1:3] == ". "]
    named = [option for option in options if option[3:] in described]
    if "maybe" in described:
        return "I cannot tell."
    answer = named[0] if len(named) == 1 else "None of the choices are correct"
    return f"Reasoning: The video description says so.\nAnswer: {answer}"


def test_the_command_judges_captions_in_two_stages(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The caption goes to the judge with the multiple-choice question, the judge's choice to the rule."""
    choice = {"question": "What is he doing?\nA. running\nB. walking\nC. sitting", "answer": "B. walking"}
    other = {"question": "Which way?\nA. left\nB. right", "answer": "A. left"}
    ask = "Describe it.\nInformation A: running\nInformation B: walking\nGenerated Caption:"
    caption = {"question": ask, "answer": "B. walking"}
    described = {
        "1": ("A man is walking.", 1.0),
        "2": ("<think>running?</think><answer>A man is walking.</answer>", 1.0),
        "3": ("A man is running.", 0.0),
        "4": ("A man is walking, then running.", 0.0),
        "5": ("A man.", 0.0),
        "6": ("A man, maybe.", None),
    }
    files = {"multi-choice": [choice, other], "captioning": [caption]}
    for name, rows in files.items():
        content = {video: {"action": rows} for video in described}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    predictions = tmp_path / "answers.jsonl"
    rows = [
        {"item_id": f"{video}/captioning/action/0", "response": text}
        for video, (text, _) in described.items()
    ]
    predictions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions = ",".join(str(tmp_path / f"{name}.json") for name in files)
    words = [f"predictions={predictions}", f"questions={questions}", f"out={tmp_path}/out", "judge_key="]
    words += ["benchmark=tempcompass", "allow_missing=true", f"judge={server.url}", "judge_model=judge-7b"]
    assert main(["score", *words]) == 0

    asked_for = [request["messages"] for request in server.requests]
    assert len(asked_for) == 5  # the caption in tags is that of another clip, asked once
    assert {system["content"] for system, _ in asked_for} == {
        "You are an AI assistant for question answering."
    }
    for _, user in asked_for:
        assert user["content"].endswith(f"\nMulti-Choice Question:\n{choice['question']}\n")
        assert "think" not in user["content"] and "Ground-Truth" not in user["content"]
    lines = (tmp_path / "out" / "items.jsonl").read_text(encoding="utf-8").splitlines()
    scored = {row["item_id"]: row for row in map(json.loads, lines)}
    for video, (_, score) in described.items():
        row = scored[f"{video}/captioning/action/0"]
        assert (row["score"], row["rule"]) == (score, "judge undecided" if score is None else "judge")
    report = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "5 answers were judged by the language model judge-7b" in report
    assert "The judge left 1 answer undecided: 6/captioning/action/0: unreadable reply" in report
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    (captioning,) = [
        row for rows in results["runs"][0]["tables"].values() for row in rows if row["name"] == "captioning"
    ]
    assert captioning["score"]["value"] == pytest.approx(2 / 5)
    assert main(["score", *words]) == 0
    assert len(server.requests) == 6  # the undecided one alone is asked again
    capsys.readouterr()
