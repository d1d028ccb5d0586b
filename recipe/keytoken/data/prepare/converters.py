"""What a converter is, and what the converters share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from keytoken.data.prepare.samples import Draft, RowProblem
from keytoken.rewards.extract import extract_answer

Values = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Converter:
    """How the rows of one kind of source are read.

    Attributes:
        name: What a user writes, the key in the registry.
        title: What a report calls it.
        source: Where the format was read.
        convert: From a row's values to a draft; raises RowProblem for a row that lacks something.
        check_columns: Called once with the columns of a table; returns those that are not used, raises
            DataError if one is missing that rows cannot do without.
        unique_ids: Whether two rows with one id contradict each other. Published sets number their parts
            separately, so there a repeated id is only counted.
    """

    name: str
    title: str
    source: str
    convert: Callable[[Values], Draft]
    check_columns: Callable[[Sequence[str]], list[str]] = lambda columns: []
    unique_ids: bool = True


def text(values: Values, *names: str) -> str:
    """The first of the named fields that is there, as text; numbers become their shortest text.

    Raises:
        RowProblem: None is there, or it is neither text nor a number.
    """
    for name in names:
        value = values.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise RowProblem(
                "wrong type", f"{name} is a {type(value).__name__}, not a text; correct the field"
            )
        return str(value)
    raise RowProblem("field missing", f"there is no {' or '.join(names)}; add the field")


def optional_text(values: Values, *names: str) -> str:
    """As :func:`text`; empty if none of the fields is there."""
    return text(values, *names) if any(values.get(name) is not None for name in names) else ""


def option_texts(values: Values, name: str) -> tuple[str, ...]:
    """Options given as a list of texts, or as a mapping from letters to texts; empty if there are none.

    Raises:
        RowProblem: They are given in another way, or the letters of a mapping are not A, B, C, ...
    """
    options = values.get(name)
    if options is None:
        return ()
    if isinstance(options, Mapping):
        letters = [str(letter).strip().upper() for letter in options]
        if letters != [chr(ord("A") + index) for index in range(len(letters))]:
            raise RowProblem(
                "options unreadable", f"{name} has the letters {letters}; name them A, B, C, ..."
            )
        options = list(options.values())
    if isinstance(options, list) and all(isinstance(option, str | int | float) for option in options):
        return tuple(str(option) for option in options)
    raise RowProblem("options unreadable", f"{name} is {str(options)[:60]!r}; it must be a list of texts")


def answer_text(solution: str) -> str:
    """The answer without ``<answer>`` tags, if it has them."""
    return extract_answer(solution) if "<answer>" in solution else solution
