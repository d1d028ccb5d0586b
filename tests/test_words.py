"""Words of a command line become typed settings, or one message."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pytest

from keytoken.errors import ConfigurationError
from keytoken.words import parse_words


@dataclass(frozen=True, kw_only=True)
class Settings:
    sources: tuple[str, ...]
    cache: str
    jobs: int = 2
    limit_s: float = 60.0
    dry_run: bool = False
    check: Literal["headers", "decode"] = "headers"
    days: float | None = 3.0
    against: tuple[str, ...] = ()


def parse(*words: str) -> Settings:
    return parse_words(words, Settings, "keytoken data x", plain="sources")


def test_words_become_settings() -> None:
    found = parse(
        "a.parquet", "jobs=4", "./fps=2/b.mp4", "cache=c=d e", "dry_run=true", "days=null", "limit_s=1"
    )
    assert found == Settings(
        sources=("a.parquet", "./fps=2/b.mp4"), cache="c=d e", jobs=4, limit_s=1.0, dry_run=True, days=None
    )
    assert parse("a", "cache=c", "check=decode").check == "decode"
    assert parse("a", "cache=c", "against=x,y", "against=z").against == ("x", "y", "z")


WRONG = {
    "unknown key": (["a", "cache=c", "job=4"], r"setting job;.*'jobs'\?"),
    "key of the plain words": (["sources=a", "cache=c"], "setting sources"),
    "missing key": (["a"], "add cache="),
    "no plain word": (["cache=c"], "at least one SOURCES"),
    "key twice": (["a", "cache=c", "cache=d"], "cache is given twice"),
    "word for a number": (["a", "cache=c", "jobs=many"], "jobs=many.*type int"),
    "word for a boolean": (["a", "cache=c", "dry_run=yes"], "true or false"),
    "unknown choice": (["a", "cache=c", "check=all"], "headers, decode"),
}


@pytest.mark.parametrize(("words", "message"), WRONG.values(), ids=WRONG)
def test_wrong_words_are_one_message(words: list[str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        parse(*words)
    assert "\n" not in str(caught.value) and "keytoken data x" in str(caught.value)


def test_plain_words_where_none_belong() -> None:
    with pytest.raises(ConfigurationError, match="'a' is no setting"):
        parse_words(["a"], Settings, "keytoken data x")
