"""The base of every block of the typed configuration: strict parsing and the checks that blocks share."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar

from keytoken.errors import ConfigurationError

ConfigT = TypeVar("ConfigT", bound="Block")
ROOT = "keytoken"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """Base of all blocks: adds the strict constructor."""

    @classmethod
    def from_mapping(cls: type[ConfigT], mapping: Mapping[str, Any], where: str = ROOT) -> ConfigT:
        """Build the block from a plain mapping (a dict, or a hydra node).

        Args:
            mapping: Keys and values as a user would write them in YAML.
            where: Dotted path of this block, used in messages only.

        Raises:
            ConfigurationError: For unknown or missing keys, wrong types and values out of range.
        """
        if not isinstance(mapping, Mapping):
            raise ConfigurationError(f"{where} is {mapping!r}; it must be a mapping of keys to values.")
        specs = {spec.name: spec for spec in dataclasses.fields(cls)}
        for key in mapping:
            if key not in specs:
                raise ConfigurationError(unknown_name(f"key {where}.{key}", str(key), specs, "keys"))
        required = dataclasses.MISSING
        missing = [
            n for n, s in specs.items() if n not in mapping and s.default is s.default_factory is required
        ]
        if missing:
            raise ConfigurationError(f"{where} lacks the keys {', '.join(missing)}; add them.")
        hints = typing.get_type_hints(cls)
        return cls(**{key: _convert(value, hints[key], f"{where}.{key}") for key, value in mapping.items()})


def unknown_name(what: str, given: str, known: Iterable[str], plural: str) -> str:
    """The message for a name that is not known: what was given, what is known, and the closest match."""
    names = list(known)
    close = difflib.get_close_matches(given, names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"Unknown {what}; known {plural}: {', '.join(names)}.{hint}"


def require(condition: bool, message: str) -> None:
    """Raise :class:`ConfigurationError` unless the condition holds."""
    if not condition:
        raise ConfigurationError(message)


def check_choices(block: Block, where: str) -> None:
    """Check every field that is declared as a Literal."""
    for name, hint in typing.get_type_hints(type(block)).items():
        choices = typing.get_args(hint)
        value = getattr(block, name)
        if typing.get_origin(hint) is Literal and value not in choices:
            raise ConfigurationError(f"{where}.{name} is {value!r}; use one of {', '.join(choices)}.")


def _convert(value: Any, hint: Any, where: str) -> Any:
    """Check a value against a field's type; integers pass as floats, nothing else is converted."""
    if isinstance(hint, types.UnionType):  # X | None
        if value is None:
            return None
        hint = next(option for option in typing.get_args(hint) if option is not types.NoneType)
    if isinstance(hint, type) and issubclass(hint, Block):
        return value if isinstance(value, hint) else hint.from_mapping(value, where)
    if typing.get_origin(hint) is Literal:
        hint = str
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        got = type(value).__name__
        raise ConfigurationError(f"{where} is {value!r} ({got}); give it a value of type {hint.__name__}.")
    return value
