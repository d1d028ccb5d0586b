"""N12: which answers share a micro-batch, by the tokens of the packs that they become."""

from __future__ import annotations

import random

import pytest

from keytoken.errors import ConfigurationError
from keytoken.prefix.layout import Tree
from keytoken.verl_adapter.shims.shared_micro_batches import at_least, micro_batches


def test_a_group_is_whole_where_verl_would_have_to_split_it() -> None:
    """Four answers of 10 tokens to prompts of 100: 4 x 110 tokens as rows, 99 + 4 x 10 as a pack."""
    prompts = [*"abab" * 2]
    found = micro_batches(prompts, [110] * 8, [10] * 8, max_tokens=139)
    assert found == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert micro_batches(prompts, [110] * 8, [10] * 8, max_tokens=278) == [[0, 2, 4, 6, 1, 3, 5, 7]]
    assert micro_batches(prompts, [110] * 8, [10] * 8, max_tokens=138) == [[0, 2, 4], [6], [1, 3, 5], [7]]


@pytest.mark.parametrize("seed", range(20))
def test_every_row_is_in_one_micro_batch_that_has_room(seed: int) -> None:
    draw = random.Random(seed)
    lengths = {prompt: draw.randint(2, 60) for prompt in "abcdef"}
    prompts = [draw.choice("abcdef") for _ in range(40)]
    answers = [draw.randint(0, 30) for _ in prompts]
    totals = [lengths[prompt] + answer for prompt, answer in zip(prompts, answers, strict=True)]
    found = at_least(micro_batches(prompts, totals, answers, max_tokens=100), 9)
    assert sorted(row for rows in found for row in rows) == list(range(40))
    assert len(found) >= 9 and all(found)
    for rows in found:
        trees = [
            Tree(lengths[prompt] - 1, tuple(answers[row] for row in rows if prompts[row] == prompt))
            for prompt in {prompts[row] for row in rows}
        ]
        assert sum(map(len, trees)) <= 100


def test_an_answer_that_no_micro_batch_has_room_for_is_named() -> None:
    with pytest.raises(ConfigurationError, match=r"Row 1 \(prompt b\) has 120 tokens.*ppo_max_token_len"):
        micro_batches(["a", "b"], [20, 120], [5, 5], max_tokens=100)


def test_more_micro_batches_than_answers_are_refused() -> None:
    assert at_least([[0, 1, 2]], 3) == [[0], [1], [2]]
    with pytest.raises(ConfigurationError, match="Another rank needs 4 micro-batches"):
        at_least([[0, 1, 2]], 4)
