"""Rows of official files: JSON lists, JSON Lines and Parquet, each row with its place for messages.

>>> for place, row in read_rows(Path("test.jsonl")):
...     question = text(row, place, "question")
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from keytoken.errors import DataError

Row = Mapping[str, Any]
Placed = tuple[str, Row]  # "file: row 3" and the row


def read_rows(path: Path) -> list[Placed]:
    """Read every row of a ``.json`` file (one list), a ``.jsonl`` file or a ``.parquet`` file.

    Raises:
        DataError: If the file is missing, empty, cut, not UTF-8, or holds anything but objects. The message
            names the file and the row.
    """
    suffix = path.suffix.lower()
    if suffix not in (".json", ".jsonl", ".parquet"):
        raise DataError(f"{path}: the suffix {suffix!r} is not known; give a .json, .jsonl or .parquet file.")
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise DataError(f"{path} {what}; give the path of a file of questions.")
    try:
        rows = list(_READERS[suffix](path))
    except UnicodeDecodeError as problem:
        raise DataError(f"{path} is not UTF-8 (byte {problem.start}); convert it to UTF-8.") from problem
    if not rows:
        raise DataError(f"{path} holds no rows; fetch it again.")
    for place, row in rows:
        if not isinstance(row, Mapping):
            raise DataError(f"{place} is {str(row)[:60]!r}; every row must be an object.")
    return rows


def read_document(path: Path) -> Any:
    """Read a file that is one JSON document, whatever it holds and whatever its suffix.

    Raises:
        DataError: If the file is missing, empty, cut, not UTF-8, not JSON or nested too deep. The message
            names the file and the line.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise DataError(f"{path} {what}; give the path of a JSON file.")
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as problem:
        raise DataError(f"{path} is not UTF-8 (byte {problem.start}); convert it to UTF-8.") from problem
    except json.JSONDecodeError as problem:
        raise DataError(
            f"{path}, line {problem.lineno}: not JSON ({problem.msg}); fetch it again."
        ) from problem
    except RecursionError as problem:
        raise DataError(f"{path} is nested too deep to be read; fetch it again.") from problem


def text(row: Row, place: str, *names: str) -> str:
    """The first of the named fields that the row has, as text; numbers become their shortest text.

    Raises:
        DataError: If the row has none of them, or it is empty or neither text nor a number.
    """
    value = _first(row, place, names)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{place}: {names[0]} is {value!r}; it must be a text that is not empty.")
    return value


def texts(row: Row, place: str, *names: str) -> tuple[str, ...]:
    """The first of the named fields that the row has, as two or more texts.

    Raises:
        DataError: If the row has none of them, or it is anything but a list of two or more texts.
    """
    value = _first(row, place, names)
    if not isinstance(value, (list, tuple)) or len(value) < 2 or not all(isinstance(v, str) for v in value):
        raise DataError(f"{place}: {names[0]} is {value!r}; it must be a list of two or more texts.")
    return tuple(value)


def letters_off(options: Sequence[str]) -> tuple[str, ...]:
    """Options without their letters, if every one begins with its own: "A. red" or "B) red" becomes "red"."""
    bare = []
    for index, option in enumerate(options):
        head, rest = option.strip()[:2], option.strip()[2:].strip()
        if head not in (f"{chr(ord('A') + index)}.", f"{chr(ord('A') + index)})") or not rest:
            return tuple(options)
        bare.append(rest)
    return tuple(bare)


def require_unique(ids: Iterator[tuple[str, str]], remedy: str = "give every file once") -> None:
    """Raise when an id occurs twice.

    Args:
        ids: Place and id of every item.
        remedy: What to do about it.

    Raises:
        DataError: Names both places.
    """
    seen: dict[str, str] = {}
    for place, item_id in ids:
        if item_id in seen:
            raise DataError(f"{place} has the id {item_id!r} of {seen[item_id]}; {remedy}.")
        seen[item_id] = place


def _first(row: Row, place: str, names: tuple[str, ...]) -> Any:
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise DataError(
        f"{place} has no field {' or '.join(names)}; it has {', '.join(map(str, row)) or 'none'}."
    )


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    rows = read_document(path)
    if not isinstance(rows, list):
        raise DataError(f"{path} holds one {type(rows).__name__}; it must hold a list of objects.")
    for number, row in enumerate(rows):
        yield f"{path}: row {number}", row


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="\n") as lines:
        for number, line in enumerate(lines):
            if not line.strip():
                continue
            place = f"{path}: row {number}"
            try:
                yield place, json.loads(line)
            except json.JSONDecodeError as problem:
                raise DataError(f"{place} is not JSON ({problem.msg}); fetch the file again.") from problem
            except RecursionError as problem:
                raise DataError(f"{place} is nested too deep to be read; fetch the file again.") from problem


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as table:
            rows = table.read().to_pylist()
    except (ArrowException, OSError) as problem:
        raise DataError(
            f"{path} is not a Parquet file that can be read ({problem}); fetch it again."
        ) from problem
    for number, row in enumerate(rows):
        yield f"{path}: row {number}", row


_READERS = {".json": _json_rows, ".jsonl": _json_lines, ".parquet": _parquet_rows}
