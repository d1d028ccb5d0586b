"""Rows of official files: every fault is an error that names the file and, where there is one, the row."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from keytoken.errors import DataError
from keytoken.scoring.rows import letters_off, read_rows, text, texts

ROWS = [{"id": 1, "question": "Why\u2028?"}, {"id": 2, "question": "Who?"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def test_three_formats_hold_the_same_rows(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n\n"))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    for suffix in ("json", "jsonl", "parquet"):
        assert [row for _, row in read_rows(tmp_path / f"a.{suffix}")] == ROWS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        pytest.param("a.json", b"[", "line 1: not JSON", id="JSON cut"),
        pytest.param("a.json", b"{}", "holds one dict", id="an object instead of a list"),
        pytest.param("a.json", b"[]", "holds no rows", id="empty list"),
        pytest.param("a.json", b"[1]", "row 0 is '1'", id="a number instead of a row"),
        pytest.param("a.json", json.dumps(ROWS).encode("utf-16"), "not UTF-8", id="UTF-16"),
        pytest.param("a.jsonl", LINES[:-5], "row 1 is not JSON", id="line cut"),
        pytest.param("a.jsonl", LINES + b'{"a": "\xe9"}', "not UTF-8", id="Latin-1"),
        pytest.param("a.jsonl", b"[" * 100_000, "nested too deep", id="nested too deep"),
        pytest.param("a.jsonl", b"\n\n", "holds no rows", id="blank lines only"),
        pytest.param("a.parquet", b"PAR1 and no more", "not a Parquet file", id="no Parquet"),
        pytest.param("a.parquet", b"", "not a Parquet file", id="empty Parquet"),
        pytest.param("a.csv", b"id,question", "suffix '.csv' is not known", id="CSV"),
    ],
)
def test_files_that_cannot_be_read_are_refused(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as raised:
        read_rows(path)
    assert str(path) in str(raised.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "b.json").mkdir()
    with pytest.raises(DataError, match="does not exist"):
        read_rows(tmp_path / "a.json")
    with pytest.raises(DataError, match="is a folder"):
        read_rows(tmp_path / "b.json")


@pytest.mark.parametrize("value", [None, "", " \n", True, [], {"a": 1}])
def test_a_field_without_text_is_refused(value: object) -> None:
    with pytest.raises(DataError, match="here"):
        text({"a": value}, "here", "a")


def test_fields_are_found_by_any_of_their_names() -> None:
    assert text({"b": "x", "c": "y"}, "here", "a", "b", "c") == "x"
    assert text({"a": 4, "b": "x"}, "here", "a", "b") == "4"
    assert texts({"a": ["x", "y"]}, "here", "a") == ("x", "y")
    with pytest.raises(DataError, match="here has no field a or b; it has c"):
        text({"c": "x"}, "here", "a", "b")
    for value in (["x"], "xy", ["x", 1]):
        with pytest.raises(DataError, match="two or more texts"):
            texts({"a": value}, "here", "a")


@pytest.mark.parametrize(
    ("options", "bare"),
    [
        (["A. red", "B. blue"], ("red", "blue")),
        (["A) red", "B.blue"], ("red", "blue")),
        (["red", "blue"], ("red", "blue")),
        (["A. red", "blue"], ("A. red", "blue")),  # not letters of options, then
        (["A. red", "C. blue"], ("A. red", "C. blue")),
        (["A.", "B."], ("A.", "B.")),
    ],
)
def test_letters_are_taken_off_where_every_option_has_its_own(
    options: list[str], bare: tuple[str, ...]
) -> None:
    assert letters_off(options) == bare
