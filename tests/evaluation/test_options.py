"""Options: words in, typed values out, and one message for what cannot be."""

from __future__ import annotations

import pytest

from keytoken.errors import ConfigurationError
from keytoken.evaluation.options import COMMAND, EvaluateOptions
from keytoken.words import parse_words


def options(*words: str) -> EvaluateOptions:
    return parse_words(["benchmark=demo", "model=m", *words], EvaluateOptions, COMMAND)


def test_words_become_options() -> None:
    given = options("questions=a.json,b.json", "control=none,blank", "decoding=greedy,sampled", "samples=8")
    assert given.questions == ("a.json", "b.json")
    assert given.control == ("none", "blank")
    assert [given.answers_of(name) for name in given.decoding] == [1, 8]
    assert options("top_p=0.9").top_p == 0.9
    assert options("retry_failed=true").retry_failed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(["control=blnk"], "Did you mean 'blank'", id="unknown control"),
        pytest.param(["decoding=greedy,greedy"], "twice", id="decoding twice"),
        pytest.param(["control="], "control is empty", id="no control"),
        pytest.param(["dtype=fp16"], "dtype=fp16", id="unknown dtype"),
        pytest.param(["platform=tpu"], "platform=tpu", id="unknown platform"),
        pytest.param(["sampling_mismatch=alow"], "Did you mean 'allow'", id="unknown mismatch"),
        pytest.param(["limit=0"], "limit is 0", id="limit of nothing"),
        pytest.param(["concurrency=-2"], "concurrency is -2", id="negative concurrency"),
        pytest.param(["max_failures=-1"], "max_failures is -1", id="negative failures"),
        pytest.param(["temperature=0"], "decoding=greedy", id="temperature 0"),
        pytest.param(["top_p=1.5"], "top_p is 1.5", id="top_p above 1"),
        pytest.param(["samples=two"], "samples=two", id="samples in words"),
        pytest.param(["sample=2"], "Did you mean 'samples'", id="misspelt key"),
    ],
)
def test_impossible_options_are_named(words: list[str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        options(*words)


@pytest.mark.parametrize(("total", "limit"), [(10, 20), (400, 20), (401, 20), (420, 21), (10_000, 500)])
def test_five_percent_may_fail_and_twenty_at_least(total: int, limit: int) -> None:
    assert options().failure_limit(total) == limit
    assert options("max_failures=0").failure_limit(total) == 0
