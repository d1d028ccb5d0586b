"""The prediction file: what was written is there after any end, and nothing else is."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pytest

from keytoken.errors import ConfigurationError, DataError
from keytoken.evaluation.rows import key_of
from keytoken.evaluation.store import FILE_NAME, PredictionStore
from keytoken.scoring.items import Prediction

HEADER: dict[str, Any] = {
    "benchmark": "demo",
    "model": "/models/a",
    "model_digest": "0123",
    "sampling": {"fps": 2.0, "max_frames": 16},
    "prompt": "reasoning",
    "decoding": {"seed": 0, "temperature": 1.0},
}


def answer(name: str, response: str | None = "<answer>A</answer>", **fields: Any) -> Prediction:
    return Prediction(item_id=name, response=response, **fields)


def test_answers_survive_and_the_file_goes_on(tmp_path: Path) -> None:
    awkward = answer("b", "two\nlines, \u2028, \x85 and \U0001f600", decoding="sampled", sample=2)
    with PredictionStore(tmp_path, HEADER) as store:
        store.append(answer("a"))
        store.append(awkward)
    with PredictionStore(tmp_path, HEADER) as store:
        assert store.predictions == {key_of(each): each for each in (answer("a"), awkward)}
        store.append(answer("c", None, error="ClipError: gone"))
    lines = (tmp_path / FILE_NAME).read_bytes().split(b"\n")
    assert lines.pop() == b""
    assert json.loads(lines[0]) == HEADER
    assert [json.loads(line)["item_id"] for line in lines[1:]] == ["a", "b", "c"]
    assert all(json.loads(line)["benchmark"] == "demo" for line in lines)


def test_every_answer_is_in_the_file_at_once(tmp_path: Path) -> None:
    with PredictionStore(tmp_path, HEADER) as store:
        for number in range(3):
            store.append(answer(str(number)))
            assert (tmp_path / FILE_NAME).read_bytes().count(b"\n") == number + 2


@pytest.mark.parametrize("lost", [1, 2, 20, 60])
def test_line_cut_by_a_kill_is_dropped(lost: int, tmp_path: Path) -> None:
    with PredictionStore(tmp_path, HEADER) as store:
        store.append(answer("a"))
        store.append(answer("b"))
    path = tmp_path / FILE_NAME
    path.write_bytes(path.read_bytes()[:-lost])
    with PredictionStore(tmp_path, HEADER) as store:
        assert [key.item_id for key in store.predictions] == ["a"]
        store.append(answer("b"))
    assert [json.loads(line).get("item_id") for line in path.open()] == [None, "a", "b"]


@pytest.mark.parametrize("content", ["", '{"benchmark": "de'])
def test_file_without_a_whole_header_begins_anew(content: str, tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text(content)
    with PredictionStore(tmp_path, HEADER) as store:
        store.append(answer("a"))
    with PredictionStore(tmp_path, HEADER) as store:
        assert len(store.predictions) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_digest": "4567"}, r"model_digest was '0123' and is '4567'"),
        ({"sampling": {"fps": 2.0, "max_frames": 64}}, r"sampling\.max_frames was 16 and is 64"),
        ({"prompt": "direct"}, r"prompt was 'reasoning' and is 'direct'"),
        (
            {"decoding": {"seed": 1, "temperature": 0.7}},
            r"decoding\.seed was 0 and is 1; .*temperature was 1\.0",
        ),
        ({"benchmark": "mmvu"}, r"benchmark was 'demo' and is 'mmvu'"),
        ({"engine": "new"}, r"engine was None and is 'new'"),
    ],
)
def test_other_settings_are_refused_and_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with PredictionStore(tmp_path, HEADER) as store:
        store.append(answer("a"))
    before = (tmp_path / FILE_NAME).read_bytes()
    with pytest.raises(ConfigurationError, match=message):
        PredictionStore(tmp_path, {**HEADER, **changes})
    assert (tmp_path / FILE_NAME).read_bytes() == before


@pytest.mark.parametrize(
    "rest", ["", '{"benchmark": "demo", "item_id": "a", "resp'], ids=["alone", "and a cut line"]
)
def test_a_header_without_answers_is_no_other_evaluation(rest: str, tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    path.write_text(json.dumps(HEADER) + "\n" + rest)
    header = {**HEADER, "model_digest": "4567", "prompt": "direct"}
    with PredictionStore(tmp_path, header) as store:
        store.append(answer("a"))
    assert next(json.loads(line) for line in path.open()) == header
    with PredictionStore(tmp_path, header) as store:
        assert [key.item_id for key in store.predictions] == ["a"]


def test_a_line_of_something_else_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    path.write_text('{"item_id": "a", "response": "mine"}\n')
    with pytest.raises(ConfigurationError, match="another evaluation"):
        PredictionStore(tmp_path, {"keytoken": "predictions", **HEADER})
    assert path.read_text() == '{"item_id": "a", "response": "mine"}\n'


def test_the_same_model_elsewhere_is_the_same(tmp_path: Path) -> None:
    PredictionStore(tmp_path, HEADER).__exit__(None, None, None)
    with PredictionStore(tmp_path, {**HEADER, "model": "/moved/a"}) as store:
        assert store.predictions == {}


def test_failed_answers_can_be_dropped(tmp_path: Path) -> None:
    with PredictionStore(tmp_path, HEADER) as store:
        for name, response in (("a", "x"), ("b", None), ("c", "y")):
            store.append(answer(name, response))
    with PredictionStore(tmp_path, HEADER, retry_failed=True) as store:
        assert [key.item_id for key in store.predictions] == ["a", "c"]
        store.append(answer("b", "z"))
    with PredictionStore(tmp_path, HEADER, retry_failed=True) as store:
        assert [each.response for each in store.predictions.values()] == ["x", "y", "z"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [FILE_NAME]


def test_two_evaluations_cannot_write_one_file(tmp_path: Path) -> None:
    with (
        PredictionStore(tmp_path, HEADER),
        pytest.raises(ConfigurationError, match="another evaluation is writing it"),
    ):
        PredictionStore(tmp_path, HEADER)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        pytest.param("not json", "line 3: is no JSON", id="not JSON in the middle"),
        pytest.param("[1]", "line 3: is no JSON object", id="a list"),
        pytest.param('{"item_id": "b"}', "line 3: is no answer", id="answer without a response"),
        pytest.param('{"item_id": "a", "response": "again"}', "line 3: a second answer", id="answer twice"),
    ],
)
def test_damaged_files_name_the_line(line: str, message: str, tmp_path: Path) -> None:
    with PredictionStore(tmp_path, HEADER) as store:
        store.append(answer("a"))
    with (tmp_path / FILE_NAME).open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=message):
        PredictionStore(tmp_path, HEADER)


def test_full_disk_is_said_and_the_file_goes_on(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk; Python ignores the signal that comes with it."""
    long = answer("b", "x" * 4096)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with PredictionStore(tmp_path, HEADER) as store:
        store.append(answer("a"))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
        try:
            with pytest.raises(DataError, match="the same command again"):
                store.append(long)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with PredictionStore(tmp_path, HEADER) as store:
        assert [key.item_id for key in store.predictions] == ["a"]
        store.append(long)
