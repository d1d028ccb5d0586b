"""Media are looked for before an engine starts, and what is not there is said with its consequences."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from keytoken.cli import main
from keytoken.errors import DataError
from keytoken.evaluation.lookup import look_for_media
from keytoken.evaluation.rows import plan
from keytoken.evaluation.store import FILE_NAME
from keytoken.scoring.items import Item

ANSWERS = {"greedy": 1, "sampled": 4}


def questions(folder: Path, there: int, gone: int, root: str = "") -> list[Item]:
    names = [f"{number}.mp4" for number in range(there + gone)]
    for name in names[:there]:
        (folder / name).touch()
    return [
        Item(
            benchmark="own",
            item_id=f"i{name[:-4]}",
            question="q",
            answer="A",
            kind="multiple choice",
            video=name,
            root=root,
        )
        for name in names
    ]


def look(items: list[Item], root: Path | None, *controls: str, max_failures: int = 20) -> list[str]:
    said: list[str] = []
    look_for_media(plan(items, controls or ("none",), ANSWERS), root, max_failures, said.append)
    return said


def test_everything_there_is_nothing_to_say(tmp_path: Path) -> None:
    assert look(questions(tmp_path, 3, 0), tmp_path) == []


def test_nothing_there_ends_it_with_one_message(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        look(questions(tmp_path, 0, 3), tmp_path)
    said = str(caught.value)
    assert "no media for any of 3 questions" in said and "0.mp4: no such file" in said
    assert str(tmp_path) in said and "\n" not in said
    with pytest.raises(DataError, match=r"any of 1 question, .*Where the data moved, add media_root=FOLDER"):
        look(questions(tmp_path, 0, 1, root=str(tmp_path)), None)


def test_some_missing_are_announced_and_go_on(tmp_path: Path) -> None:
    (said,) = look(questions(tmp_path, 3, 2), tmp_path)
    assert said.startswith("2 of 5 questions have no media, the first: 3.mp4: no such file below")
    assert "count as failed" in said


def test_more_than_may_fail_end_it_before_the_engine(tmp_path: Path) -> None:
    """Two questions with five answers under each of two controls that show something."""
    items, controls = questions(tmp_path, 3, 2), ("none", "blank", "text")
    assert len(look(items, tmp_path, *controls, max_failures=20)) == 1
    with pytest.raises(
        DataError, match=r"20 answers that would fail, and max_failures is 19: .*max_failures=20"
    ):
        look(items, tmp_path, *controls, max_failures=19)


def test_text_alone_needs_no_media(tmp_path: Path) -> None:
    assert look(questions(tmp_path, 0, 3), tmp_path, "text") == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may enter every folder")
def test_a_folder_that_may_not_be_entered(tmp_path: Path) -> None:
    items = questions(tmp_path, 2, 0)
    tmp_path.chmod(0)
    try:
        with pytest.raises(DataError, match="Permission denied"):
            look(items, tmp_path)
    finally:
        tmp_path.chmod(0o700)


def test_the_command_stops_before_the_engine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its model folder has no weights: an engine could not start."""
    media, model, out = tmp_path / "media", tmp_path / "model", tmp_path / "out"
    media.mkdir()
    model.mkdir()
    (model / "config.json").write_text("{}")
    rows = [{"video": f"{number}.mp4", "question": "Who?", "answer": "a dog"} for number in range(3)]
    for row in rows:
        (media / row["video"]).write_bytes(b"x")
    (media / "table.json").write_text(json.dumps(rows))
    assert (
        main(["data", "prepare", "folder", f"source={media}", f"out={tmp_path / 'data'}", "check=none"]) == 0
    )
    for row in rows:
        (media / row["video"]).unlink()
    dataset = tmp_path / "data" / "train.parquet"
    words = ["benchmark=own", f"model={model}", f"questions={dataset}", f"out={out}"]
    capsys.readouterr()
    assert main(["evaluate", *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("keytoken: no media for any of 3 questions, the first: 0.mp4")
    assert (out / FILE_NAME).read_text().count("\n") == 1  # a header, which is no other evaluation's later on
    row = pq.read_table(dataset).to_pylist()[0]
    row["reward_model"]["ground_truth"] = None
    pq.write_table(pa.Table.from_pylist([row]), dataset)
    assert main(["evaluate", *words]) == 2
    assert "keytoken: " + str(dataset) in capsys.readouterr().err
