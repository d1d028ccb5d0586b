"""Reading exports: this version's, older ones, and what is broken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from keytoken.cli import _name_lens, main
from keytoken.errors import DataError
from keytoken.lens.frames import Strip
from keytoken.lens.image import find_answer
from keytoken.lens.page import payload, question_of
from keytoken.lens.read import find_files, read_export
from keytoken.lens.write import read_other, read_source, write_lens

RECORDED = Path(__file__).with_name("data") / "step_000001.parquet"  # a step of a real run of the demo
VERSION_1 = (
    *("step", "prompt_id", "answer", "prompt", "reward", "token_ids", "tokens", "log_prob"),
    *("log_prob_masked", "log_prob_shuffled", "entropy", "visual", "temporal"),
    *("selected_visual", "selected_temporal", "selected_entropy", "weight", "advantage"),
)


def older(target: Path) -> Path:
    """The recorded step as version 1 wrote it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    table = pq.read_table(RECORDED).select(VERSION_1).replace_schema_metadata(None)
    pq.write_table(table, target)
    return target


def changed(target: Path, **columns: Any) -> Path:
    rows = pq.read_table(RECORDED)
    for name, values in columns.items():
        place = rows.column_names.index(name)
        rows = rows.set_column(place, rows.schema.field(name), pa.array(values, rows.schema.field(name).type))
    target.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(rows, target)
    return target


def test_a_real_step_reads_as_pandas_has_it() -> None:
    found, rows = read_export(RECORDED), pq.read_table(RECORDED).to_pylist()
    assert (found.step, found.version, len(found.answers)) == (1, 2, 64)
    assert found.about["method"]["selection"]["visual_ratio"] == 0.2
    assert any("64 of the batch's 128 answers" in note for note in found.missing)
    for answer, row in zip(found.answers, rows, strict=True):
        assert "".join(answer.texts) == "".join(row["tokens"])
        assert (answer.prompt_id, answer.number) == (row["prompt_id"], row["answer"])
        assert answer.applies["visual"] == row["has_visual"]
        for name in ("visual", "entropy", "weight"):
            assert answer.values[name].tolist() == row[name]
        assert answer.selected["temporal"].tolist() == row["selected_temporal"]
    assert {len(answer.clips or ()) for answer in found.answers} == {0, 1}  # one family has no clip


def test_characters_of_several_tokens_are_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_of: Callable[..., Any]
) -> None:
    text = "<think> \u00fc \u6f22 \U0001f600 red"
    file = batch_of([text, "red"], per_prompt=2).write(tmp_path, monkeypatch)
    answer = read_export(file).answers[0]
    assert "".join(answer.texts) == text
    assert "\U0001f600" in "".join(answer.texts) and "" in answer.texts  # parts before the last add nothing


def test_an_older_export_opens_and_says_what_it_lacks(tmp_path: Path) -> None:
    file = older(tmp_path / "run" / "tokens" / "step_000001.parquet")
    found = read_export(file)
    assert (found.version, found.about) == (1, {})
    assert "older KeyToken" in found.missing[0] and "No selection is known" in found.missing[1]
    assert all(answer.clips is None and answer.accuracy is None for answer in found.answers)
    recorded = read_export(RECORDED).answers
    assert [a.applies for a in found.answers] == [a.applies for a in recorded]
    (tmp_path / "run" / "config.yaml").write_text(
        "keytoken: {method: {name: tor, selection: {scope: batch}}, attribution: {shuffle_seed: 3}}"
    )
    about = read_export(file).about
    assert about["method"]["selection"] == {"scope": "batch"} and about["shuffle_seed"] == 3


BROKEN: list[tuple[str, Callable[[Path], Any], str]] = [
    ("missing", lambda path: path, "no such file or folder"),
    ("folder without exports", lambda path: path.mkdir(), "no exports"),
    ("export of text", lambda path: path.write_text("no parquet"), "cannot be read as Parquet"),
    ("empty export", lambda path: path.write_bytes(b""), "cannot be read as Parquet"),
    (
        "export cut short",
        lambda path: path.write_bytes(RECORDED.read_bytes()[:-2000]),
        "cannot be read as Parquet",
    ),
    (
        "export damaged in the middle",
        lambda path: path.write_bytes(RECORDED.read_bytes()[:200] + bytes(400) + RECORDED.read_bytes()[600:]),
        "cannot be read as Parquet",
    ),
    ("another table", lambda path: pq.write_table(pa.table({"x": [1]}), path), "no column step"),
    (
        "export of a newer version",
        lambda path: pq.write_table(
            pq.read_table(RECORDED).replace_schema_metadata({b"keytoken": b'{"version": 9}'}), path
        ),
        "newer KeyToken",
    ),
    (
        "export with damaged metadata",
        lambda path: pq.write_table(
            pq.read_table(RECORDED).replace_schema_metadata({b"keytoken": b"{"}), path
        ),
        "metadata are damaged",
    ),
    ("export of two steps", lambda path: changed(path, step=[1] * 32 + [2] * 32), "[1, 2]"),
    (
        "column of another type",
        lambda path: pq.write_table(
            pq.read_table(RECORDED).drop_columns("visual").append_column("visual", pa.array([0.5] * 64)), path
        ),
        "column visual is of the type double",
    ),
    (
        "list of another length than its answer",
        lambda path: changed(path, visual=[[0.5]] * 64),
        "entries of visual",
    ),
]


@pytest.mark.parametrize(("make", "said"), [pytest.param(make, said, id=name) for name, make, said in BROKEN])
def test_broken_exports_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Callable[[Path], Any], said: str
) -> None:
    path = tmp_path / "given.parquet"
    make(path)
    assert main(["lens", str(path)]) == 2
    message = capsys.readouterr().err
    assert str(path) in message and said in message, message
    assert message.count("\n") == 1 and not (tmp_path / "lens.html").exists()


def test_a_broken_step_is_left_out_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = tmp_path / "run" / "tokens"
    tokens.mkdir(parents=True)
    (tokens / "step_000001.parquet").write_bytes(RECORDED.read_bytes())
    (tokens / "step_000002.parquet").write_bytes(RECORDED.read_bytes()[:5000])
    assert main(["lens", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "left out" in said and "step_000002.parquet" in said
    assert said.splitlines()[-1] == str(tmp_path / "run" / "lens.html")


def test_an_export_without_answers_makes_a_page_that_says_so(tmp_path: Path) -> None:
    table = pq.read_table(RECORDED).slice(0, 0)
    pq.write_table(table, tmp_path / "step_000001.parquet")
    page = write_lens(tmp_path, say=print).read_text()
    assert "The export holds no answers." in page


def test_a_step_and_another_run_are_found(tmp_path: Path) -> None:
    for run, step in (("a", 1), ("a", 2), ("b", 2)):
        changed(tmp_path / run / "tokens" / f"step_{step:06d}.parquet", step=[step] * 64)
    say: Callable[[str], None] = print
    assert [export.step for export in read_source(tmp_path / "a", None, say)] == [1, 2]
    assert [export.step for export in read_source(tmp_path / "a", 2, say)] == [2]
    with pytest.raises(DataError, match="step 3 was not exported; these were: 1, 2"):
        read_source(tmp_path / "a", 3, say)
    assert read_other(str(tmp_path / "b"), tmp_path / "a", say).run == "b"
    assert read_other(str(tmp_path / "b" / "2"), tmp_path / "a", say).run == "b"
    other = read_other("2", tmp_path / "a", say)
    assert (other.run, other.step) == ("a", 2)
    with pytest.raises(DataError, match="no such run"):
        read_other(str(tmp_path / "c"), tmp_path / "a", say)
    assert find_files(tmp_path / "a" / "tokens") == find_files(tmp_path / "a")


def test_a_long_run_is_shown_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in range(1, 11):
        changed(tmp_path / "tokens" / f"step_{step:06d}.parquet", step=[step] * 64)
    monkeypatch.setattr("keytoken.lens.write.MAX_ANSWERS", 256)
    said: list[str] = []
    assert [export.step for export in read_source(tmp_path, None, said.append)] == [1, 4, 7, 10]
    assert "4 of 10 steps" in said[0]


def test_a_page_has_a_bound_of_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in range(1, 11):
        changed(tmp_path / "tokens" / f"step_{step:06d}.parquet", step=[step] * 64)
    size = sum(len(answer.texts) for answer in read_export(RECORDED).answers)
    monkeypatch.setattr("keytoken.lens.write.MAX_TOKENS", 4 * size)
    said: list[str] = []
    assert [export.step for export in read_source(tmp_path, None, said.append)] == [1, 4, 7, 10]
    assert f"{10 * size} tokens" in said[0]


def test_a_file_that_pandas_wrote_again_opens(tmp_path: Path) -> None:
    """It turns whole numbers with gaps into floats with NaN."""
    rows = pq.read_table(RECORDED)
    for name in ("group_size", "row_key", "accuracy", "reward"):
        values = [None, float("nan"), *rows[name].to_pylist()[2:]]
        rows = rows.set_column(
            rows.column_names.index(name), name, pa.array(values, pa.float64(), from_pandas=False)
        )
    pq.write_table(rows, tmp_path / "step_000001.parquet")
    found, page = read_export(tmp_path / "step_000001.parquet"), tmp_path / "lens.html"
    assert write_lens(tmp_path, say=print) == page
    answers, originals = found.answers, read_export(RECORDED).answers
    for answer in answers[:2]:
        assert (answer.group_size, answer.row_key, answer.accuracy) == (None, None, None)
        assert np.isnan(answer.reward)
    assert isinstance(answers[2].row_key, int)
    assert [a.row_key for a in answers[2:]] == [a.row_key for a in originals[2:]]
    data = payload([found], lambda *_: Strip(path=""))["answers"]
    assert data["right"][:2] == data["reward"][:2] == [None, None] and None not in data["right"][2:]


def test_roles_are_not_part_of_a_question() -> None:
    assert question_of("user\nwhich way ? A up\nassistant\n") == "which way ? A up"
    assert question_of("my assistant is a user") == "my assistant is a user"


def test_metadata_are_json_that_anybody_reads() -> None:
    about = json.loads(pq.read_schema(RECORDED).metadata[b"keytoken"])
    assert about["version"] == 2 and about["sampling"]["max_frames"] == 8
    assert np.isfinite(about["tie_seed"])


def test_the_demo_ends_with_the_file_or_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _name_lens(tmp_path)
    assert capsys.readouterr().out.startswith("No token lens: ")  # and the run stays a success
    changed(tmp_path / "tokens" / "step_000010.parquet", step=[10] * 64)
    _name_lens(tmp_path)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"Token lens (open it in a browser): {tmp_path / 'lens.html'}"
    assert (tmp_path / "lens.html").stat().st_size > 100_000


def test_a_folder_that_is_no_run_is_told_from_a_run_without_exports(tmp_path: Path) -> None:
    runs = tmp_path / "outputs"
    (runs / "demo" / "tokens").mkdir(parents=True)
    shutil.copy(RECORDED, runs / "demo" / "tokens")
    with pytest.raises(DataError, match=r"no run folder: it holds demo; .*runs with exports: demo"):
        find_files(runs)
    (runs / "config.yaml").touch()
    with pytest.raises(DataError, match=r"every_steps=1"):
        find_files(runs)


def test_two_exports_without_a_common_prompt_are_not_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_of: Callable[..., Any]
) -> None:
    for run, prompt in (("a", "what color is it ?"), ("b", "what shape is it ?")):
        batch_of(["red"] * 8, prompt=prompt).write(tmp_path / run, monkeypatch)
    with pytest.raises(DataError, match=r"a has 2 in step 1, b has 2 in step 1.*--step N --compare RUN/N"):
        write_lens(tmp_path / "a", compare=str(tmp_path / "b"), say=print)


def test_an_answer_of_another_step_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_of: Callable[..., Any]
) -> None:
    batch_of(["red"] * 8).write(tmp_path, monkeypatch, step=1)
    batch_of(["red"] * 4).write(tmp_path, monkeypatch, step=2)
    *others, last = read_source(tmp_path, None, print)
    with pytest.raises(DataError, match=r"Step 1 has it: --step 1"):
        find_answer(last, "p0001/0", others)
    with pytest.raises(DataError, match=r"Other steps with exports \(--step N\): 1"):
        find_answer(last, "p0009/0", others)
