"""Words of people: the settings of a command such as ``keytoken score``, and counts in what it prints.

Plain words are what the command works on, words of the form key=value its settings. The dataclass that holds
them says which keys there are, of which type, and which have to be given.
"""

import dataclasses
import re
import types
import typing
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

from keytoken.block import unknown_name
from keytoken.errors import ConfigurationError

SettingsT = TypeVar("SettingsT")

# A path such as ./fps=2/clip.mp4 is no setting.
_SETTING = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
_KEY_OF_SETTING = re.compile(r"([A-Za-z_]\w*)\.(\w+=.*)", re.DOTALL)
_BOOLEANS = {"true": True, "false": False}


def parse_words(
    words: Sequence[str], settings: type[SettingsT], command: str, *, plain: str | None = None
) -> SettingsT:
    """Build the settings of a command.

    Example: with fields ``sources: tuple[str, ...]`` and ``jobs: int = 1``, and ``plain="sources"``, the
    words ``a.parquet b.parquet jobs=4`` give ``sources=("a.parquet", "b.parquet"), jobs=4``.
    With a field ``sampling: str`` whose metadata say ``keys``, ``sampling=demo sampling.fps=1`` give it
    ``"demo,fps=1"``, whatever their order (:mod:`keytoken.data.sampling_words`).

    Args:
        words: What the user wrote after the command.
        settings: A dataclass with fields of type str, int, float, bool, a Literal of strings, or
            ``tuple[str, ...]`` (parts apart by commas, or the key repeated), each also ``| None``.
        command: The command, for messages.
        plain: The field, a ``tuple[str, ...]``, that takes the plain words; None if there are to be none.

    Raises:
        ConfigurationError: an unknown, repeated or missing key, a value of the wrong type, a plain word
            where none is expected.
    """
    hints = typing.get_type_hints(settings)
    fields = {field.name: field for field in dataclasses.fields(settings)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    changes: dict[str, list[str]] = {}
    for word in words:
        inner = _KEY_OF_SETTING.fullmatch(word)
        if inner and inner[1] in fields and fields[inner[1]].metadata.get("keys"):
            changes.setdefault(inner[1], []).append(inner[2])
            continue
        setting = _SETTING.fullmatch(word)
        if setting is None:
            if plain is None:
                raise ConfigurationError(f"{command}: {word!r} is no setting; write KEY=VALUE")
            values[plain] = (*values.get(plain, ()), word)
            continue
        key, text = setting.groups()
        if key not in fields or key == plain:
            known = [name for name in fields if name != plain]
            raise ConfigurationError(f"{command}: " + unknown_name(f"setting {key}", key, known, "settings"))
        value = _value(text, hints[key], f"{command}: {key}")
        if key in values and not isinstance(value, tuple):
            raise ConfigurationError(f"{command}: {key} is given twice; keep one of them")
        values[key] = (*values.get(key, ()), *value) if isinstance(value, tuple) else value
    for key, parts in changes.items():
        first = values.get(key, fields[key].default)
        values[key] = ",".join([first if isinstance(first, str) else "", *parts])
    none = dataclasses.MISSING
    missing = [name for name, spec in fields.items() if spec.default is spec.default_factory is none]
    for name in missing:
        if name not in values:
            what = f"give it at least one {name.upper()}" if name == plain else f"add {name}=..."
            what = fields[name].metadata.get("if_missing", what)
            raise ConfigurationError(f"{command}: {name} is missing; {what}")
    return settings(**values)


def number_of(count: int, one: str, many: str = "") -> str:
    """A count with its noun: "1 question", "2 questions"; ``many`` where it is not ``one`` and an s."""
    return f"{count} {one}" if count == 1 else f"{count} {many or one + 's'}"


def _value(text: str, hint: Any, where: str) -> Any:
    if isinstance(hint, types.UnionType):  # X | None
        if text == "null":
            return None
        hint = next(option for option in typing.get_args(hint) if option is not types.NoneType)
    if typing.get_origin(hint) is tuple:
        return tuple(part for part in text.split(",") if part)
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        if text not in choices:
            raise ConfigurationError(f"{where}={text}: use one of {', '.join(choices)}")
        return text
    if hint is bool:
        if text not in _BOOLEANS:
            raise ConfigurationError(f"{where}={text}: use true or false")
        return _BOOLEANS[text]
    try:
        return hint(text)
    except ValueError as problem:
        raise ConfigurationError(f"{where}={text}: give it a value of type {hint.__name__}") from problem
