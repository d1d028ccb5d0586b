"""Questions of one's own: read as `keytoken data prepare` writes them, scored as training rewards them."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from keytoken.cli import main
from keytoken.data.prepare.rows import SCHEMA
from keytoken.errors import ConfigurationError, DataError
from keytoken.rewards.answers import ACCURACY_REWARDS
from keytoken.rewards.score import compute_score
from keytoken.scoring.benchmarks import BENCHMARKS, own
from keytoken.scoring.benchmarks.base import question_text
from keytoken.scoring.cli import NAMES
from keytoken.scoring.items import Item, Prediction
from keytoken.scoring.lmms_export import ExportOptions, export
from keytoken.scoring.score import cluster, score_predictions, tables

TABLE = """\
video;question;options;answer;problem type;category;start;end
one.mp4;Which color?;red|green|blue;B;;color;;
one.mp4;How many?;;7;;count;1.5;
sub/two.mp4;How far?;;2.5;regression;count;1;4
sub/two.mp4;What is written?;;no entry for dogs;ocr;;;3
sub/two.mp4;What happens?;;a person waves at a dog;;color;;
;;;;;;;
"""
RESPONSES = [
    *("<answer>{}</answer>", "<think>so</think><answer> {} </answer>", "<answer>{}.</answer>", "{}", ""),
    *(
        "<answer></answer>",
        "<answer>{}",
        "<answer>x</answer><answer>{}</answer>",
        "<answer>{} and more</answer>",
    ),
]


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The dataset of the table, prepared by the command; clips are not opened."""
    media = tmp_path / "media"
    (media / "sub").mkdir(parents=True)
    for name in ("one.mp4", "sub/two.mp4", "still.png"):
        (media / name).write_bytes(b"not opened")
    (media / "table.csv").write_text(TABLE)
    monkeypatch.chdir(tmp_path)
    assert main(["data", "prepare", "folder", "source=media", "out=data", "check=none", "split=test"]) == 0
    return tmp_path / "data" / "test.parquet"


@pytest.fixture
def items(prepared: Path) -> list[Item]:
    return own.read([prepared])


def rows_of(path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path).to_pylist()


def test_a_row_is_asked_as_it_is_trained_on(prepared: Path, items: list[Item]) -> None:
    for row, item in zip(rows_of(prepared), items, strict=True):
        assert row["prompt"][0]["content"] == "<video>" + own.prompt(item)
        assert row["extra_info"]["prompt_id"] == item.item_id
        assert question_text(own.BENCHMARK, item, "official") == own.prompt(item)
        # The preparer's style is the usual one, so asking in it anew makes the same text, options and all.
        assert question_text(own.BENCHMARK, item, "reasoning") == own.prompt(item)
    assert question_text(own.BENCHMARK, items[0], "{question}").endswith("A. red\nB. green\nC. blue")


def test_media_parts_and_groups(prepared: Path, items: list[Item]) -> None:
    root = str((prepared.parents[1] / "media").resolve())
    assert {item.root for item in items} == {root}
    assert [item.video for item in items] == ["one.mp4"] * 2 + ["sub/two.mp4"] * 3
    assert [item.span for item in items] == [None, (1.5, math.inf), (1.0, 4.0), (0.0, 3.0), None]
    assert [item.task for item in items] == ["multiple choice", "numerical", "regression", "OCR", "free-form"]
    assert [item.categories.get("category") for item in items] == ["color", "count", "count", None, "color"]


def test_an_image_and_options_in_the_question(prepared: Path, tmp_path: Path) -> None:
    (tmp_path / "media" / "more.jsonl").write_text(
        json.dumps({"image": "still.png", "question": "Which?\n", "options": ["a", "b"], "answer": "a"})
        + "\n"
    )
    words = ["source=media/more.jsonl", "out=image", "check=none"]
    assert main(["data", "prepare", "folder", *words]) == 0
    (item,) = own.read([tmp_path / "image" / "train.parquet"])
    assert (item.video, item.images) == (None, ("still.png",))
    assert cluster(item) == "still.png"  # the bootstrap draws an image with all its questions
    row = copy.deepcopy(rows_of(prepared)[0])
    row["extra_info"]["question"] = "Which color?\nA) red\nB) green\nC) blue"
    row["prompt"][0]["content"] = "<video>" + row["extra_info"]["question"] + "\nReply."
    inline = own.item(row, "row")
    assert question_text(own.BENCHMARK, inline, "{question}") == row["extra_info"]["question"]


@pytest.mark.parametrize("form", RESPONSES)
def test_the_score_is_the_accuracy_of_the_reward(prepared: Path, items: list[Item], form: str) -> None:
    """Every problem type there is, right answers, near ones and wrong ones, by the function of training."""
    assert {item.task for item in items} == set(ACCURACY_REWARDS)
    near = {"B", "A", "7", "7.0", "2.5", "2.4", "no entry for cats", "a person waves", "\u0663", "1e400"}
    for row, item in zip(rows_of(prepared), items, strict=True):
        for answer in (*near, item.answer):
            response = form.replace("{}", answer)
            truth = row["reward_model"]["ground_truth"]
            reward = compute_score(row["data_source"], response, truth, row["extra_info"])
            assert own.score(item, response).score == reward["acc"]


def test_both_ends_of_the_scale_and_between_are_reached(items: list[Item]) -> None:
    given = ["B", "7", "2.0", "no entry for cats", "a person waves"]
    scores = [
        own.score(item, f"<answer>{answer}</answer>").score for item, answer in zip(items, given, strict=True)
    ]
    assert scores[:2] == [1.0, 1.0]
    assert scores[2] == pytest.approx(0.8) and scores[3] == pytest.approx(0.75)
    assert scores[4] is not None and 0.5 < scores[4] < 1.0


def test_a_key_in_tags_is_read_as_the_reward_reads_it(prepared: Path) -> None:
    row = rows_of(prepared)[0]
    row["reward_model"]["ground_truth"] = "<answer> B </answer>"
    assert own.score(own.item(row, "row"), "<answer>B</answer>") == own.score(
        own.item(rows_of(prepared)[0], "row"), "<answer>B</answer>"
    )


def test_untagged_answers_by_the_variant(items: list[Item]) -> None:
    choice, number = items[0], items[1]
    for response in ("B", "B. green", "<think>or A</think>\nB", "The answer is B.", "green"):
        assert own.score(choice, response).score == 0.0
        assert own.score_untagged(choice, response).score == 1.0
    assert own.score_untagged(choice, "<answer>A</answer> B").score == 0.0
    # Tags are read as the reward reads them, and nothing else is then.
    assert own.score_untagged(choice, "<answer>B. green</answer>").score == 0.0
    assert own.score_untagged(choice, "no idea").rule == "unmatched"
    assert own.score_untagged(number, "7").score == 1.0
    assert own.score_untagged(number, "seven").score == 0.0


def test_tables_by_type_and_category_with_intervals_by_clip(items: list[Item]) -> None:
    predictions = [
        Prediction(item_id=item.item_id, response=f"<answer>{item.answer}</answer>") for item in items
    ]
    (scores,) = score_predictions(own.BENCHMARK, items, predictions)
    found = {table.category: [row.name for row in table.rows] for table in tables(scores)}
    assert found == {
        "all": ["all"],
        "problem type": ["OCR", "free-form", "multiple choice", "numerical", "regression"],
        "category": ["color", "count"],
    }
    # Two clips, one all wrong: of resamples of two clips a quarter has the one alone, so the interval is
    # all there is, which resamples of five questions would not give.
    wrong = [Prediction(item_id=item.item_id, response="<answer>?</answer>") for item in items[2:]]
    (scores,) = score_predictions(own.BENCHMARK, items, predictions[:2] + wrong)
    row = tables(scores)[0].rows[0]
    assert row.score is not None
    assert (row.score.value, row.score.low, row.score.high) == (0.4, 0.0, 1.0)


def _change(*path: Any, to: Any) -> Callable[[list[dict[str, Any]]], None]:
    def apply(rows: list[dict[str, Any]]) -> None:
        node: Any = rows[1]
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = to

    return apply


BROKEN = [
    pytest.param(
        _change("reward_model", "ground_truth", to=None), "row 1: has no answer key", id="no answer key"
    ),
    pytest.param(
        _change("reward_model", "ground_truth", to=" "), "row 1: has no answer key", id="empty answer key"
    ),
    pytest.param(
        _change("extra_info", "problem_type", to="essay"),
        "'essay' has no reward; use one of",
        id="unknown type",
    ),
    pytest.param(_change("extra_info", "question", to=""), "row 1: question is ''", id="no question"),
    pytest.param(
        _change("extra_info", "prompt_id", to="test-000000"),
        r"row 1 has the id 'test-000000' of .*row 0; .*another split=",
        id="one id twice",
    ),
    pytest.param(_change("prompt", to=[]), "not one message of a user", id="no prompt"),
    pytest.param(
        _change("prompt", 0, "content", to="What?"),
        "1 videos and 0 images.*'What.'",
        id="no place for the clip",
    ),
    pytest.param(_change("videos", to=[]), "0 videos and 0 images", id="no clip"),
    pytest.param(
        _change("videos", 0, "video", to="/other/clip.mp4"), "which is not its end", id="another clip"
    ),
    pytest.param(
        _change("extra_info", "media", to=None), "row 1 has no field media", id="no name of the clip"
    ),
]


@pytest.mark.parametrize(("change", "message"), BROKEN)
def test_rows_that_are_not_as_they_were_written(
    prepared: Path, change: Callable[[list[dict[str, Any]]], None], message: str
) -> None:
    rows = rows_of(prepared)
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), prepared)
    with pytest.raises(DataError, match=message) as caught:
        own.read([prepared])
    assert str(prepared) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        pytest.param("plain.parquet", [{"question": "Which?"}], id="another table"),
        pytest.param(
            "demo.parquet",
            [{"extra_info": {"prompt_id": "a"}, "reward_model": {"x": 1}}],
            id="verl's rows without a prompt id",
        ),
        pytest.param("questions.json", [{"id": 1}], id="JSON in place of Parquet"),
    ],
)
def test_a_file_that_is_no_prepared_dataset(tmp_path: Path, name: str, rows: list[dict[str, Any]]) -> None:
    path = tmp_path / name
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    with pytest.raises(DataError, match=f"{name}.*`keytoken data prepare` wrote"):
        own.read([path])


def test_two_datasets_are_told_apart_by_their_split(prepared: Path, items: list[Item]) -> None:
    copied = prepared.with_name("copy.parquet")
    shutil.copy(prepared, copied)
    with pytest.raises(DataError, match="another split="):
        own.read([prepared, copied])
    assert main(["data", "prepare", "folder", "source=media/table.csv", "out=more", "check=none"]) == 0
    assert len(own.read([prepared, Path("more/train.parquet")])) == 2 * len(items)


def test_score_and_comparison_by_the_command(
    prepared: Path, items: list[Item], capsys: pytest.CaptureFixture[str]
) -> None:
    for name, answers in (("before", items[:1]), ("after", items)):
        lines = [{"item_id": item.item_id, "response": "<answer>?</answer>"} for item in items]
        for line, item in zip(lines, answers, strict=False):
            line["response"] = f"<answer>{item.answer}</answer>"
        Path(f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    capsys.readouterr()
    words = ["benchmark=own", f"questions={prepared}", "predictions=after.jsonl", "compare=before.jsonl"]
    assert main(["score", *words, "out=scores"]) == 0
    said = capsys.readouterr().out
    assert "| all | 5 | 20.00 | 100.00 | +80.00 |" in said
    assert "| problem type: OCR | 1 | 0.00 | 100.00 |" in said and "| category: count | 2 |" in said


def test_lmms_export_has_whole_clips_where_the_rows_say_they_lie(prepared: Path, tmp_path: Path) -> None:
    options = {"benchmark": "own", "questions": (str(prepared),), "out": str(tmp_path / "task")}
    with pytest.raises(DataError, match=r"test-000001 is about seconds 1\.5"):
        export(ExportOptions(**options), print)  # type: ignore[arg-type]
    pq.write_table(pa.Table.from_pylist(rows_of(prepared)[:1], schema=SCHEMA), prepared)
    said: list[str] = []
    export(ExportOptions(**options), said.append)  # type: ignore[arg-type]
    assert "1 question of Own questions" in said[0]
    (doc,) = map(json.loads, (tmp_path / "task" / "questions.jsonl").read_text().splitlines())
    assert doc["video"] == str((tmp_path / "media" / "one.mp4").resolve())
    assert doc["prompt"] == own.read([prepared])[0].prompt


def test_the_names_in_the_help_are_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(NAMES) == list(BENCHMARKS)
    for command in ("score", "evaluate", "lmms-export"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        said = " ".join(capsys.readouterr().out.split())
        assert ", ".join(NAMES) in said and "%%" not in said


def test_an_unknown_style_names_all_there_are(items: list[Item]) -> None:
    with pytest.raises(ConfigurationError, match="official, reasoning, direct"):
        question_text(own.BENCHMARK, items[0], "offical")
