"""Which rank gets which answers."""

from __future__ import annotations

import random
from typing import Any

import pytest
from transfer_queue import KVBatchMeta

from keytoken.errors import ConfigurationError
from keytoken.verl_adapter.balance import canonical_order, gather_groups, order_of_whole_groups


def batch_of(keys: list[str], lengths: dict[str, tuple[int, int]] | None = None) -> KVBatchMeta:
    """Keys that begin with "pad" were made up; ``lengths`` of prompt and answer by prompt."""
    tags: list[dict[str, Any]] = []
    for key in keys:
        prompt, answer = (lengths or {}).get(key.split("_")[0], (10, 2))
        tags.append({"is_padding": key.startswith("pad"), "prompt_len": prompt, "response_len": answer})
    return KVBatchMeta(partition_id="train", keys=list(keys), tags=tags, fields=None, extra_info={})


def prompts_of_ranks(keys: list[str], num_ranks: int) -> list[list[str]]:
    share = len(keys) // num_ranks
    names = [key.split("_")[0] for key in keys]
    return [names[start : start + share] for start in range(0, len(keys), share)]


@pytest.mark.parametrize("seed", range(20))
def test_no_group_is_split_over_ranks(seed: int) -> None:
    """Groups of up to four, some answers lost and made up for, three ranks with a multiple of four each."""
    draw = random.Random(seed)
    sizes = [draw.choice([4, 4, 3, 1]) for _ in range(9)]
    lengths = {str(prompt): (draw.randint(1, 99), draw.randint(1, 20)) for prompt in range(9)}
    keys = [f"{prompt}_{answer}_0" for prompt, size in enumerate(sizes) for answer in range(size)]
    keys += [f"pad5e_{number}_0" for number in range(36 - len(keys))]
    draw.shuffle(keys)
    order = order_of_whole_groups(batch_of(keys, lengths), 3, strict=True)
    assert sorted(order) == list(range(36))
    ranks = [set(names) - {"pad5e"} for names in prompts_of_ranks([keys[row] for row in order], 3)]
    assert sum(map(len, ranks)) == len(set.union(*ranks)) == 9


def test_groups_that_fit_no_share_are_refused_or_split() -> None:
    keys = [f"{prompt}_{answer}_0" for prompt in "abc" for answer in range(4)]
    message = (
        r"12 answers of a step do not divide over the 2 ranks .* 4 answers to prompt c.*ppo_mini_batch_size"
    )
    with pytest.raises(ConfigurationError, match=message):
        order_of_whole_groups(batch_of(keys), 2, strict=True)
    order = order_of_whole_groups(batch_of(keys), 2, strict=False)
    assert prompts_of_ranks([keys[row] for row in order], 2) == [[*"aaaacc"], [*"bbbbcc"]]


def test_full_groups_come_first_and_keep_the_canonical_order() -> None:
    keys = ["b_0_0", "c_0_0", "a_1_0", "c_1_0", "a_0_0", "pad5e_0_0"]
    batch = batch_of(keys, {"b": (500, 9)})
    canonical_order(batch)
    gather_groups(batch, 1)
    assert batch.keys == ["a_0_0", "a_1_0", "c_0_0", "c_1_0", "b_0_0", "pad5e_0_0"]


def test_ranks_get_equally_many_tokens() -> None:
    """One long prompt beside the shortest; the metrics count a prompt once on each rank."""
    lengths = {"a": (100, 5), "b": (50, 5), "c": (40, 5), "d": (10, 5)}
    keys = [f"{prompt}_{answer}_0" for prompt in "abcd" for answer in range(2)]
    batch = batch_of(keys, lengths)
    metrics = gather_groups(batch, 2)
    assert prompts_of_ranks(batch.keys, 2) == [[*"aadd"], [*"bbcc"]]
    assert metrics["global_seqlen/balanced_max"] == 100 + 10 + 20
    assert metrics["global_seqlen/balanced_min"] == 50 + 40 + 20
