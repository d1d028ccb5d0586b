"""Words of a command line become typed settings, or one message."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import pytest

from keytoken.errors import ConfigurationError
from keytoken.words import number_of, parse_words


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


@dataclass(frozen=True, kw_only=True)
class Framed:
    sources: tuple[str, ...] = ()
    sampling: str = field(default="usual", metadata={"keys": True})
    other: str | None = field(default=None, metadata={"keys": True})
    plain: str = "x"


def test_keys_of_a_setting_are_joined_with_it() -> None:
    def parsed(*words: str) -> Framed:
        return parse_words(words, Framed, "x", plain="sources")

    assert parsed("sampling.fps=1").sampling == "usual,fps=1"
    assert (
        parsed("sampling.fps=1", "sampling=demo", "sampling.max_frames=8").sampling
        == "demo,fps=1,max_frames=8"
    )
    assert parsed("other.fps=1").other == ",fps=1"  # of nothing that is named here
    assert parsed("clip.v2=3/a.mp4", "plain.fps=1").sources == ("clip.v2=3/a.mp4", "plain.fps=1")
    with pytest.raises(ConfigurationError, match=r"'plain\.fps=1' is no setting"):
        parse_words(["plain.fps=1"], Framed, "x")


def test_counts_with_their_nouns() -> None:
    assert [number_of(count, "question") for count in (0, 1, 2)] == [
        "0 questions",
        "1 question",
        "2 questions",
    ]
    assert number_of(2, "answer was", "answers were") == "2 answers were"


def test_plain_words_where_none_belong() -> None:
    with pytest.raises(ConfigurationError, match="'a' is no setting"):
        parse_words(["a"], Settings, "keytoken data x")
