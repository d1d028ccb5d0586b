"""A folder of clips with a table written by hand: CSV from a spreadsheet, or JSON Lines.

Columns, in any case and with blanks, dashes or underscores alike: ``video`` or ``image`` (or ``path``: then
the suffix decides), ``question``, ``answer``, and if wanted ``options``, ``problem type``, ``id``,
``category``, and ``start`` and ``end`` of the part that the question is about, in seconds. A video is a file
or a folder of frames.

Options stand in one cell, apart by ``|`` ("red | blue", "A. red | B. blue") or as a JSON list, or in columns
``option a``, ``option b``, ... The answer is a letter or the text of an option. Without a problem type,
options make a question multiple choice, a number makes it numerical, anything else free-form; the report
counts what was inferred.
"""

import json
import re
from collections.abc import Sequence
from math import inf

from keytoken.data.headers import MediaKind
from keytoken.data.part import WHOLE, Span
from keytoken.data.prepare.converters import Converter, Values, answer_text, option_texts, optional_text
from keytoken.data.prepare.samples import Draft, RowProblem, naming
from keytoken.errors import DataError

_NAMES = {
    "video": ("video", "video path", "video file", "clip"),
    "image": ("image", "image path", "image file", "picture", "photo"),
    "media": ("path", "file", "filename", "file name", "media"),
    "question": ("question", "problem", "prompt"),
    "answer": ("answer", "solution", "correct answer", "right answer", "ground truth"),
    "options": ("options", "choices"),
    "problem type": ("problem type", "question type", "answer type", "type"),
    "id": ("id", "question id", "problem id"),
    "category": ("category", "subject"),
    "start": ("start", "start s", "start time", "video start"),
    "end": ("end", "end s", "end time", "video end"),
}
_FIELDS = {name: field for field, names in _NAMES.items() for name in names}
_OPTION = re.compile(r"(?:option|choice) ?([a-z])")
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
_TYPES = {
    "mc": "multiple choice",
    "mcq": "multiple choice",
    "number": "numerical",
    "numeric": "numerical",
    "ocr": "OCR",
    "open": "free-form",
    "free form": "free-form",
}


def check_columns(columns: Sequence[str]) -> list[str]:
    """Columns that no field is read from, if the others are enough to make a question of a row.

    Raises:
        DataError: Says which are missing, which are there, and which two mean the same.
    """
    found = [_field(column) for column in columns]
    for index, field in enumerate(found):
        if field in found[:index] and not field.startswith("?"):
            raise DataError(
                f"the columns {columns[found.index(field)]!r} and {columns[index]!r} both give the {field}; "
                "remove or rename one"
            )
    lacking = [field for field in ("question", "answer") if field not in found]
    if not {"video", "image", "media"} & set(found):
        lacking.insert(0, "video (or image)")
    if lacking:
        raise DataError(
            f"the column{'s' if len(lacking) > 1 else ''} {', '.join(lacking)} cannot be found among "
            f"{', '.join(repr(column) for column in columns) or 'none'}; add or rename columns"
        )
    return [column for column in columns if _field(column).startswith("?")]


def _field(column: str) -> str:
    """The field of a column; a letter's option is "option a", an unknown column starts with "?"."""
    name = " ".join(re.split(r"[\s_-]+", column.strip().casefold()))
    if name in _FIELDS:
        return _FIELDS[name]
    option = _OPTION.fullmatch(name)
    if option:
        return f"option {option[1]}"
    return f"option {name}" if re.fullmatch("[a-j]", name) else f"?{name}"


def _convert(values: Values) -> Draft:
    row = {_field(column): value for column, value in values.items() if value not in ("", None)}
    media = {kind: optional_text(row, kind).strip() for kind in ("video", "image", "media")}
    given = [kind for kind, path in media.items() if path]
    if len(given) != 1:
        what = "no video and no image" if not given else f"both {' and '.join(given)}"
        raise RowProblem("no media" if not given else "two media", f"the row gives {what}; give one")
    kind = given[0]
    path = media[kind]
    image = kind == "image" or (kind == "media" and path.lower().endswith(_IMAGE_SUFFIXES))
    media_kind: MediaKind = "image" if image else "video"
    problem_type = optional_text(row, "problem type").strip()
    simple = " ".join(re.split(r"[\s_-]+", problem_type.casefold()))
    item_id = optional_text(row, "id").strip()
    with naming(path, item_id):
        return Draft(
            media=path,
            kind=media_kind,
            question=optional_text(row, "question"),
            answer=answer_text(optional_text(row, "answer")),
            options=_options(row),
            problem_type=_TYPES.get(simple, simple if simple == "multiple choice" else problem_type),
            item_id=item_id,
            data_source="folder",
            category=optional_text(row, "category").strip(),
            span=_span(row, media_kind),
        )


def _span(row: Values, kind: MediaKind) -> Span | None:
    given = {name: optional_text(row, name).strip() for name in ("start", "end")}
    if not any(given.values()):
        return None
    if kind == "image":
        raise RowProblem("part of an image", "start and end are seconds of a video; leave them out")
    try:
        span = float(given["start"] or 0.0), float(given["end"] or inf)
    except ValueError as error:
        what = f"start {given['start']!r}, end {given['end']!r}; write seconds, such as 12.5"
        raise RowProblem("part unreadable", what) from error
    return None if span == WHOLE else span


def _options(row: Values) -> tuple[str, ...]:
    columns = sorted(name for name in row if name.startswith("option "))
    cell = row.get("options")
    if columns and cell is not None:
        raise RowProblem(
            "options unreadable", "there are options in one cell and in columns; keep one of them"
        )
    if columns:
        letters = "".join(name.removeprefix("option ") for name in columns)
        if letters != "abcdefghij"[: len(letters)]:
            raise RowProblem("options unreadable", f"the options {letters.upper()} have a gap; fill it")
        return tuple(str(row[name]) for name in columns)
    if not isinstance(cell, str):
        return option_texts(row, "options")
    if cell.lstrip().startswith("["):
        try:
            return option_texts({"options": json.loads(cell)}, "options")
        except json.JSONDecodeError as error:
            raise RowProblem(
                "options unreadable",
                f"options start with '[' and are no JSON list ({error.msg}); write a | b",
            ) from error
    parts = cell.split("|") if "|" in cell else cell.split("\n")
    if len(parts) < 2:
        raise RowProblem("options unreadable", f"options are {cell[:60]!r}; write them as a | b | c")
    return tuple(part.strip() for part in parts)


CONVERTER = Converter(
    name="folder",
    title="a folder of clips with a table",
    source="keytoken",
    convert=_convert,
    check_columns=check_columns,
)
