"""Broken files of questions and predictions: a clear error, or an entry that is counted.

One row of the matrix each. Nothing is replaced, nothing is dropped uncounted: a row is an error whose message
names the file, the place and the remedy, or it shows up in the counts of the report.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from keytoken.errors import KeyTokenError
from keytoken.scoring.run import ScoreOptions, run_score

HEADER = {"keytoken": "predictions", "version": 1, "benchmark": "video_holmes"}


def question(number: int, **fields: Any) -> dict[str, Any]:
    row = {
        "video ID": "abc",
        "Question ID": number,
        "Question Type": "SR",
        "Question": "Which?",
        "Options": {"A": "red", "B": "blue"},
        "Answer": "A",
    }
    return {**row, **fields}


def answer(number: int, response: str | None = "<answer>A</answer>", **fields: Any) -> dict[str, Any]:
    return {"item_id": f"abc/{number}", "response": response, **fields}


QUESTIONS = [question(1), question(2)]
ANSWERS = [HEADER, answer(1), answer(2)]


def lines(rows: list[Any], encoding: str = "utf-8") -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode(encoding)


def document(value: Any) -> bytes:
    return json.dumps(value, indent=1).encode()


def tw_grpo(**fields: Any) -> dict[str, Any]:
    row = {
        "problem_id": 1,
        "problem": "Which?",
        "problem_type": "multiple choice",
        "options": ["A. red", "B. blue"],
        "solution": "<answer>A</answer>",
        "video": "/MMVU/videos/Art/0.mp4",
    }
    return {"question": row, "model_output": "A", "accuracy_score": 1.0, **fields}


def row(
    name: str,
    message: str,
    *,
    answers: bytes = lines(ANSWERS),
    questions: bytes | None = document(QUESTIONS),
    benchmark: str = "video_holmes",
) -> Any:
    """A row of the matrix whose outcome is an error with this message."""
    return pytest.param(benchmark, answers, questions, message, id=name)


ERRORS = [
    row("an unknown benchmark", r"video_homes.*Did you mean 'video_holmes'", benchmark="video_homes"),
    row("predictions are no JSON", r"line 1 is not JSON", answers=b"hello\nworld\n"),
    row(
        "predictions cut in mid-line",
        r"line 3 is cut in the middle; finish the run",
        answers=lines(ANSWERS)[:-9],
    ),
    row(
        "a damaged line in the middle",
        r"line 2 is not JSON",
        answers=lines(ANSWERS).replace(b'"item', b"'item", 1),
    ),
    row("a JSON document cut", r"is not JSON .*cut", answers=document(QUESTIONS)[:-20]),
    row("predictions in UTF-16", r"is UTF-16; give", answers=lines(ANSWERS, "utf-16")),
    row(
        "predictions in Latin-1",
        r"line 2 is not UTF-8",
        answers=lines([HEADER, answer(1, "caf\xe9"), answer(2)], "latin-1"),
    ),
    row("a Parquet file as predictions", r"is Parquet", answers=b"PAR1....PAR1"),
    row("an empty file of predictions", r"is empty", answers=b""),
    row("predictions of white space only", r"is empty", answers=b" \n\n"),
    row("a line that is no object", r"line 2 is '\[1, 2\]'", answers=lines([HEADER, [1, 2], answer(1)])),
    row("a header and nothing else", r"a header and no predictions", answers=lines([HEADER])),
    row(
        "two files of predictions joined",
        r"line 4: a second header; .*one by one",
        answers=lines([*ANSWERS, HEADER, answer(1)]),
    ),
    row(
        "a header of another version",
        r"of version 2; this release reads",
        answers=lines([{**HEADER, "version": 2}]),
    ),
    row(
        "predictions of another benchmark",
        r"predictions of 'mmvu'",
        answers=lines([{**HEADER, "benchmark": "mmvu"}]),
    ),
    row(
        "a question answered twice",
        r"1 question is answered twice: abc/1",
        answers=lines([*ANSWERS, answer(1)]),
    ),
    row(
        "an answer without a question",
        r"1 prediction is of questions.*abc/9",
        answers=lines([*ANSWERS, answer(9)]),
    ),
    row(
        "an answer without an id", r"line 2 has no field item_id", answers=lines([HEADER, {"response": "A"}])
    ),
    row("an answer without a response", r"no response", answers=lines([HEADER, {"item_id": "abc/1"}])),
    row("a response that is a number", r"response is '3'", answers=lines([HEADER, answer(1, response=3)])),  # type: ignore[arg-type]
    row(
        "an unknown field",
        r"unknown fields \['controls'\]",
        answers=lines([HEADER, answer(1, controls="none")]),
    ),
    row("an unknown control", r"none of none, blank", answers=lines([HEADER, answer(1, control="mirror")])),
    row(
        "a score that is NaN",
        r"published_score is nan",
        answers=lines([HEADER, answer(1, published_score=float("nan"))]),
    ),
    row(
        "a score that is a word",
        r"published_score is 'good'",
        answers=lines([HEADER, answer(1, published_score="good")]),
    ),
    row(
        "a format that nobody knows",
        r"none of the known formats.*question, reply",
        answers=lines([{"question": 1, "reply": 2}]),
    ),
    row("nested too deep", r"nested too deep", answers=b"[" * 200_000),
    row("no questions given", r"carries no questions; add questions=FILE", questions=None),
    row("questions cut", r"questions.json, line \d+: not JSON", questions=document(QUESTIONS)[:-20]),
    row("questions that are an object", r"must hold a list", questions=b"{}"),
    row(
        "questions in Latin-1",
        r"is not UTF-8",
        questions=json.dumps([question(1, Question="caf\xe9")], ensure_ascii=False).encode("latin-1"),
    ),
    row("questions: an empty list", r"holds no rows", questions=b"[]"),
    row(
        "a question without options", r"row 0: Options is \{\}", questions=document([question(1, Options={})])
    ),
    row(
        "a question without an answer",
        r"row 0 has no field Answer",
        questions=document([question(1, Answer=None)]),
    ),
    row(
        "an answer that is no option",
        r"'C' is none of the options AB",
        questions=document([question(1, Answer="C")]),
    ),
    row("a question twice", r"has the id 'abc/1' of .*row 0", questions=document([question(1), question(1)])),
    row(
        "an output without its question",
        r"question is 'None'",
        answers=lines([tw_grpo(question=None)]),
        benchmark="mmvu",
        questions=None,
    ),
    row(
        "an output of a question without options",
        r"options is \[\]",
        answers=lines([tw_grpo(question={**tw_grpo()["question"], "options": []})]),
        benchmark="mmvu",
        questions=None,
    ),
    row(
        "an output of another benchmark's form",
        r"not known for benchmark=video_holmes",
        answers=lines([tw_grpo()]),
    ),
    row(
        "TempCompass's form for another benchmark",
        r"is a file of TempCompass",
        answers=document({"1": {"speed": []}}),
    ),
]


def run(
    tmp_path: Path, benchmark: str, answers: bytes | Path, questions: bytes | None
) -> tuple[int, str, list[Any]]:
    """Exit code, what was printed, and the lines of items.jsonl."""
    path = tmp_path / "answers.jsonl"
    if isinstance(answers, bytes):
        path.write_bytes(answers)
    if questions is not None:
        (tmp_path / "questions.json").write_bytes(questions)
    said: list[str] = []
    options = ScoreOptions(
        benchmark=benchmark,
        predictions=str(answers if isinstance(answers, Path) else path),
        questions=() if questions is None else (str(tmp_path / "questions.json"),),
        out=str(tmp_path / "out"),
    )
    code = run_score(options, said.append)
    scored = (tmp_path / "out" / "items.jsonl").read_text().splitlines()
    return code, "\n".join(said), [json.loads(line) for line in scored]


@pytest.mark.parametrize(("benchmark", "answers", "questions", "message"), ERRORS)
def test_errors(
    tmp_path: Path, benchmark: str, answers: bytes, questions: bytes | None, message: str
) -> None:
    with pytest.raises(KeyTokenError) as caught:
        run(tmp_path, benchmark, answers, questions)
    said = str(caught.value)
    assert re.search(message, said, re.DOTALL), said
    assert len(said) < 600 + 3 * len(str(tmp_path)), "a message is no dump of the file"
    assert not (tmp_path / "out").exists(), "nothing is written when something is wrong"


def test_a_folder_and_a_missing_file(tmp_path: Path) -> None:
    for path, what in ((tmp_path, "is a folder"), (tmp_path / "none.jsonl", "does not exist")):
        with pytest.raises(KeyTokenError, match=what):
            run(tmp_path, "video_holmes", path, document(QUESTIONS))


def counted(name: str, rows: list[Any], expected: dict[str, tuple[float | None, str]], code: int = 0) -> Any:
    """A row of the matrix whose outcome is an entry: score and rule by question."""
    return pytest.param(rows, expected, code, id=name)


RIGHT = (1.0, "tag")
COUNTED = [
    counted("everything in order", [answer(1), answer(2)], {"abc/1": RIGHT, "abc/2": RIGHT}),
    counted(
        "a question without an answer is missing",
        [answer(1)],
        {"abc/1": RIGHT, "abc/2": (None, "missing")},
        1,
    ),
    counted(
        "a failed sample is wrong",
        [answer(1), answer(2, None, error="no frames")],
        {"abc/1": RIGHT, "abc/2": (0.0, "failed")},
    ),
    counted("an empty response", [answer(1), answer(2, "")], {"abc/1": RIGHT, "abc/2": (0.0, "unmatched")}),
    counted(
        "an answer without tags", [answer(1), answer(2, "A")], {"abc/1": RIGHT, "abc/2": (1.0, "letter")}
    ),
    counted(
        "a tag that is not closed",
        [answer(1), answer(2, "<answer>x")],
        {"abc/1": RIGHT, "abc/2": (0.0, "unmatched")},
    ),
    counted(
        "a response of 10 MB",
        [answer(1), answer(2, "x" * 10_000_000 + "<answer>A</answer>")],
        {"abc/1": RIGHT, "abc/2": RIGHT},
    ),
    counted(
        "a response with every end of a line",
        [answer(1), answer(2, "a\u2028b\x85c\x0bd\r\n<answer>A</answer>")],
        {"abc/1": RIGHT, "abc/2": RIGHT},
    ),
    counted(
        "a response with half a surrogate pair",
        [answer(1), answer(2, "\\ud800<answer>A</answer>", published_score=0.0)],
        {"abc/1": RIGHT, "abc/2": RIGHT},
    ),
]


@pytest.mark.parametrize(("rows", "expected", "code"), COUNTED)
def test_counted(
    tmp_path: Path, rows: list[Any], expected: dict[str, tuple[float | None, str]], code: int
) -> None:
    answers = lines([HEADER, *rows]).replace(b"\\\\ud800", b"\\ud800")
    found, said, scored = run(tmp_path, "video_holmes", answers, document(QUESTIONS))
    assert found == code
    assert {line["item_id"]: (line["score"], line["rule"]) for line in scored} == expected
    assert ("Missing: 1 of 2 questions" in said) == (code == 1)
    failed = sum(rule == "failed" for _, rule in expected.values())
    assert ("Failed: 1 sample, counted as wrong" in said) == (failed == 1)
    assert said.encode("utf-8"), "a report can be printed"
    assert len(said) < 5_000, "a report is no dump of the responses"


def test_a_batch_that_failed_in_video_r1_s_script(tmp_path: Path) -> None:
    """The script writes this answer for all 64 of a batch; here they are failed samples, not wrong ones."""
    results = [
        {**tw_grpo()["question"], "output": "<answer>error</answer>", "reward": 0.0},
        {**tw_grpo()["question"], "problem_id": 2, "output": "<answer>A</answer>", "reward": 1.0},
    ]
    answers = document({"results": results, "final_acc": [{"mean_acc": 0.5}]})
    code, said, scored = run(tmp_path, "mmvu", answers, None)
    assert code == 0
    assert [(line["score"], line["rule"]) for line in scored] == [(0.0, "failed"), (1.0, "tag")]
    assert "its batch failed where it was generated" in said


def test_a_null_prediction_of_tempcompass_is_a_failed_sample(tmp_path: Path) -> None:
    rows = [
        {"question": "Is it fast?", "answer": "yes", "prediction": None},
        {"question": "Is it slow?", "answer": "no", "prediction": "No"},
    ]
    for answers in (document({"1": {"speed": rows}}), lines([{"1": {"speed": rows}}])):
        code, said, scored = run(tmp_path, "tempcompass", answers, None)
        assert (code, [line["score"] for line in scored]) == (0, [0.0, 1.0])
        assert "the file has no response" in said


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    mark = b"\xef\xbb\xbf"
    code, _, scored = run(tmp_path, "video_holmes", mark + lines(ANSWERS), mark + document(QUESTIONS))
    assert (code, len(scored)) == (0, 2)


def test_the_matrix_is_as_long_as_the_table_says() -> None:
    build: Callable[..., Any] = lambda entries: [entry.id for entry in entries]  # noqa: E731
    names = build(ERRORS) + build(COUNTED)
    assert len(names) == len(set(names)) >= 40
