"""Prediction files as they come: JSON Lines or one JSON document, read line by line, every fault named.

Lines are what the file has between line feeds. Answers may hold characters that ``str.splitlines`` takes for
ends of lines, so it is not used.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keytoken.errors import DataError
from keytoken.scoring.items import Item, Prediction
from keytoken.scoring.rows import Placed

_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"PK": "a zip archive", b"PAR1": "Parquet"}
_SHOWN = 60


@dataclass(frozen=True, slots=True)
class Content:
    """What a file holds, before anything is made of it.

    Attributes:
        path: The file.
        rows: Its objects with their places: lines of JSON Lines, entries of a list, or the one object.
        document: The one object of a file that has one; None otherwise.
    """

    path: Path
    rows: Sequence[Placed]
    document: Mapping[str, Any] | None


@dataclass(frozen=True, kw_only=True)
class PredictionFile:
    """Predictions and what came with them.

    Attributes:
        path: The file.
        format: Name of its format.
        predictions: One entry for each answer.
        items: The questions, if the file carries them.
        match: Makes the predictions of a file that names no ids, once the questions are known.
        header: What the file says of its run: model, sampling contract, prompt.
    """

    path: Path
    format: str
    predictions: Sequence[Prediction]
    items: Sequence[Item] | None = None
    match: Callable[[Sequence[Item]], Sequence[Prediction]] | None = None
    header: Mapping[str, Any] = field(default_factory=dict)


def read_content(path: Path) -> Content:
    """Read a file of JSON Lines, a JSON list or a JSON object.

    Raises:
        DataError: A missing or empty file, a folder, another encoding, a line that is cut or is no JSON. The
            message names the file, the line and what to do.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise DataError(f"{path} {what}; give the path of a file of predictions.")
    with path.open("rb") as file:
        start = file.read(4)
        for mark, name in _MARKS.items():
            if start.startswith(mark):
                raise DataError(f"{path} is {name}; give predictions as JSON or JSON Lines in UTF-8.")
        file.seek(0)
        lines = [(number, line) for number, line in enumerate(file, start=1) if line.strip()]
    if not lines:
        raise DataError(f"{path} is empty; was the run that should have written it stopped?")
    # Documents that are indented have a first line which is no JSON; those in one line have no second one.
    first = None if _opens_a_document(lines[0][1]) else _object(path, *lines[0])
    if first is None:
        return _document(path, lines)
    rows = [(f"{path}, line {lines[0][0]}", first)]
    rows += [(f"{path}, line {number}", _object(path, number, line)) for number, line in lines[1:]]
    return Content(path, rows, first if len(lines) == 1 else None)


def _opens_a_document(line: bytes) -> bool:
    return line.strip() in (b"{", b"[") or line.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def _document(path: Path, lines: Sequence[tuple[int, bytes]]) -> Content:
    try:
        document = json.loads(b"".join(line for _, line in lines).decode("utf-8-sig"))
    except UnicodeDecodeError as problem:
        raise DataError(f"{path} is not UTF-8 ({problem.reason}); convert it to UTF-8.") from problem
    except json.JSONDecodeError as problem:
        raise DataError(f"{path} is not JSON ({problem}); is the file cut? Fetch it again.") from problem
    except RecursionError as problem:
        raise DataError(f"{path} is nested too deep to be read; fetch it again.") from problem
    if isinstance(document, Mapping):
        return Content(path, [(str(path), document)], document)
    if not isinstance(document, list) or not document:
        raise DataError(f"{path} holds {str(document)[:_SHOWN]!r}; it must hold predictions.")
    for number, row in enumerate(document):
        if not isinstance(row, Mapping):
            raise DataError(f"{path}, entry {number} is {str(row)[:_SHOWN]!r}; it must be an object.")
    return Content(path, [(f"{path}, entry {number}", row) for number, row in enumerate(document)], None)


def _object(path: Path, number: int, line: bytes) -> Mapping[str, Any]:
    place = f"{path}, line {number}"
    try:
        row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as problem:
        raise DataError(f"{place} is not UTF-8 ({problem.reason}); convert the file to UTF-8.") from problem
    except json.JSONDecodeError as problem:
        if not line.endswith(b"\n"):
            raise DataError(
                f"{place} is cut in the middle; finish the run that writes the file, or remove the line."
            ) from problem
        raise DataError(f"{place} is not JSON ({problem.msg}); every line must be an object.") from problem
    except RecursionError as problem:
        raise DataError(f"{place} is nested too deep to be read; fetch the file again.") from problem
    if not isinstance(row, Mapping):
        raise DataError(f"{place} is {str(row)[:_SHOWN]!r}; every line must be an object.")
    return row
