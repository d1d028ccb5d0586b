"""Reads the rows of a source file one after the other: JSON lists, JSON Lines, CSV.

Nothing is held but the row at hand, so that a file of any size takes little memory. A row that cannot be read
by itself (one line of JSON Lines, one line of CSV) comes back with its problem; a file that cannot be read
any further (cut JSON, a wrong encoding, an unclosed quote) is an error that names the place, because nobody
knows what it would have held.
"""

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from keytoken.errors import DataError

MAX_ROW_CHARACTERS = 16 * 1024 * 1024
_CHUNK_CHARACTERS = 256 * 1024
_DELIMITERS = ",;\t|"
_BOMS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One row as it stands in the file.

    Attributes:
        number: Position from 0.
        place: Where that is, for people.
        values: Column or key to value; empty if the row cannot be read.
        problem: Why it cannot be read; empty if it can.
    """

    number: int
    place: str
    values: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""


def read_source(path: Path, encoding: str = "utf-8") -> Iterator[SourceRow]:
    """Read a source row by row, by its suffix: .json, .jsonl, .csv or .tsv.

    Raises:
        DataError: The file is missing, of another kind, in another encoding, or broken from some place on.
    """
    with _opened(path, encoding) as file:
        yield from _READERS[path.suffix.lower()](file, path)


def table_columns(path: Path, encoding: str = "utf-8") -> list[str] | None:
    """The column names of a CSV file; None for a file whose rows name their fields themselves.

    Raises:
        DataError: As :func:`read_source`.
    """
    with _opened(path, encoding) as file:
        return _table(file, path)[0] if _READERS[path.suffix.lower()] is _csv else None


@contextmanager
def _opened(path: Path, encoding: str) -> Iterator[TextIO]:
    """A source, open for reading; problems with its encoding become messages that name the line."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; check source=")
    if path.suffix.lower() not in _READERS:
        raise DataError(
            f"{path}: the suffix {path.suffix!r} is not known; give a file of {', '.join(_READERS)}"
        )
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty; copy or download it again")
    with path.open("rb") as raw:
        bom = _BOMS.get(raw.read(2))
    if bom and not encoding.lower().startswith("utf-16"):
        raise DataError(f"{path}: the file is {bom}; save it as UTF-8, or pass encoding=utf-16")
    try:
        # utf-8-sig also reads files without the mark that spreadsheets put first.
        name = "utf-8-sig" if encoding.lower() in ("utf-8", "utf8") else encoding
        with path.open(encoding=name, newline="") as file:
            yield file
    except UnicodeDecodeError as error:
        raise DataError(_encoding_problem(path, error)) from error
    except LookupError as error:
        raise DataError(f"encoding={encoding}: no such encoding; use utf-8, cp1252 or latin-1") from error


def _json_list(file: TextIO, path: Path) -> Iterator[SourceRow]:
    """The objects of one JSON list, parsed as they come."""
    text = _Window(file, path)
    if text.next_character() != "[":
        raise DataError(f"{path}: one list of objects is expected, and the file does not start with '['")
    text.skip(1)
    number = 0
    while (character := text.next_character()) != "]":
        if number:
            if character != ",":
                raise DataError(f"{path}, entry {number}: a comma or ']' is missing before it; fix the file")
            text.skip(1)
        value = text.value(number)
        place = f"entry {number}"
        if isinstance(value, Mapping):
            yield SourceRow(number, place, value)
        else:
            yield SourceRow(
                number, place, problem=f"the entry is a {type(value).__name__}; it must be an object"
            )
        number += 1


class _Window:
    """The part of a JSON text that is being parsed; it moves on with every value."""

    def __init__(self, file: TextIO, path: Path) -> None:
        self._file, self._path = file, path
        self._text, self._at = "", 0
        self._ended = False
        self._decoder = json.JSONDecoder()

    def next_character(self) -> str:
        """The next character that is no blank.

        Raises:
            DataError: The file ends.
        """
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in " \t\r\n":
                    return self._text[self._at]
                self._at += 1
            if not self._more(_CHUNK_CHARACTERS):
                raise DataError(f"{self._path}: the file ends before its list does; download it again")

    def skip(self, count: int) -> None:
        self._at += count

    def value(self, number: int) -> Any:
        """Parse the next value; reads on as long as it may only be cut by the end of the window."""
        self.next_character()
        wanted = _CHUNK_CHARACTERS
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                held = len(self._text) - self._at
                if held <= MAX_ROW_CHARACTERS and self._more(wanted):
                    wanted *= 2  # so that a long value is not parsed again for every small piece of it
                    continue
                what = "is cut off" if self._ended else f"is not JSON, or longer than {MAX_ROW_CHARACTERS}"
                raise DataError(
                    f"{self._path}, entry {number}: it {what} ({error.msg}); fix it or download it again"
                ) from error
            except RecursionError as error:
                raise DataError(f"{self._path}, entry {number}: nested too deeply; fix it") from error
            if end < len(self._text) or not self._more(wanted):
                self._at = end
                return value

    def _more(self, count: int) -> bool:
        """Read on, dropping what has been parsed; False at the end of the file."""
        piece = self._file.read(count)
        self._ended = not piece
        self._text, self._at = self._text[self._at :] + piece, 0
        return bool(piece)


def _json_lines(file: TextIO, path: Path) -> Iterator[SourceRow]:
    number = 0
    for line_number, line in enumerate(_lines(file, path), start=1):
        if not line.strip():
            continue
        place = f"line {line_number}"
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            row = SourceRow(number, place, problem=f"not JSON at column {error.colno} ({error.msg})")
        except RecursionError:
            row = SourceRow(number, place, problem="nested too deeply")
        else:
            row = SourceRow(number, place, value if isinstance(value, Mapping) else {})
            if not isinstance(value, Mapping):
                row = SourceRow(number, place, problem=f"a {type(value).__name__}, not an object")
        yield row
        number += 1


def _lines(file: TextIO, path: Path) -> Iterator[str]:
    """Lines by line feed alone: a text may hold other characters that count as ends of lines elsewhere."""
    number = 0
    while line := file.readline(MAX_ROW_CHARACTERS + 1):
        number += 1
        if len(line) > MAX_ROW_CHARACTERS:
            raise DataError(f"{path}, line {number}: longer than {MAX_ROW_CHARACTERS} characters; fix it")
        yield line


def _csv(file: TextIO, path: Path) -> Iterator[SourceRow]:
    names, delimiter = _table(file, path)
    reader = csv.reader(file, delimiter=delimiter, strict=True)
    line = 0
    try:
        next(reader)
        number, line = 0, reader.line_num
        for cells in reader:
            place, line = f"line {line + 1}", reader.line_num
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) > len(names):
                extra = f"{len(cells)} cells under {len(names)} columns; quote cells that hold {delimiter!r}"
                yield SourceRow(number, place, problem=extra)
            else:
                cells += [""] * (len(names) - len(cells))
                yield SourceRow(number, place, dict(zip(names, cells, strict=True)))
            number += 1
    except csv.Error as error:
        raise DataError(
            f"{path}, from line {line + 1} on: {error}; a quote is probably not closed there"
        ) from error


def _table(file: TextIO, path: Path) -> tuple[list[str], str]:
    """Column names and delimiter of a table: the delimiter is the one that the header has most of."""
    header = file.readline(MAX_ROW_CHARACTERS)
    delimiter = max(_DELIMITERS, key=header.count)
    file.seek(0)
    try:
        names = [name.strip() for name in next(csv.reader(file, delimiter=delimiter, strict=True), [])]
    except csv.Error as error:
        raise DataError(f"{path}, line 1: {error}; fix the column names") from error
    file.seek(0)
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        raise DataError(f"{path}, line 1: column {twice[0]!r} stands there twice; rename one")
    return names, delimiter


def _encoding_problem(path: Path, error: UnicodeDecodeError) -> str:
    """Names the line of the first byte that does not belong, found again from the start of the file."""
    line = 0
    with path.open("rb") as raw:
        for line, content in enumerate(raw, start=1):
            try:
                content.decode(error.encoding)
            except UnicodeDecodeError as found:
                shown = f"byte 0x{content[found.start]:02X} in column {found.start + 1}"
                return (
                    f"{path}, line {line}: {shown} is not {error.encoding}; save the file as UTF-8, or name "
                    "its encoding, for files from Windows mostly encoding=cp1252"
                )
    return f"{path}: not {error.encoding}; save the file as UTF-8"


_READERS: dict[str, Callable[[TextIO, Path], Iterator[SourceRow]]] = {
    ".json": _json_list,
    ".jsonl": _json_lines,
    ".csv": _csv,
    ".tsv": _csv,
}
