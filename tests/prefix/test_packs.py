"""Trees and packs: who lies where, who sees whom, what it costs."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch

from keytoken.attribution.views import ModelInput
from keytoken.errors import ConfigurationError, DataError
from keytoken.prefix.layout import (
    Cost,
    Tree,
    apart,
    branch_rows,
    cost_of,
    families,
    key_segments,
    seen_by_branches,
)
from keytoken.prefix.packs import arrange, groups_of, last_weighted, pack_inputs


def answer(prompt: list[int], ids: list[int], name: str = "p", **media: torch.Tensor) -> ModelInput:
    """An input whose M-RoPE positions are ten times its places."""
    length = len(prompt) + len(ids)
    return ModelInput(
        input_ids=torch.tensor([*prompt, *ids]),
        position_ids=torch.stack([torch.arange(length), *[10 * torch.arange(length)] * 3]),
        prompt_length=len(prompt),
        media=media,
        prompt=name,
    )


def sees(trees: list[Tree]) -> torch.Tensor:
    """[L, L] bool from the words of the definition: its own branch and stem, not the future."""
    names = [
        (number, part)
        for number, tree in enumerate(trees)
        for part, length in enumerate(tree.segments)
        for _ in range(length)
    ]
    return torch.tensor(
        [
            [
                key <= query and names[key][0] == names[query][0] and names[key][1] in (0, names[query][1])
                for key in range(len(names))
            ]
            for query in range(len(names))
        ]
    )


def random_trees(seed: int) -> list[Tree]:
    draw = random.Random(seed)
    return [
        Tree(draw.randrange(5), tuple(draw.randint(1, 4) for _ in range(draw.randint(1, 4))))
        for _ in range(draw.randint(1, 3))
    ]


def test_the_example_of_the_docstring() -> None:
    p, q, r, a, b, c, d, e = range(8)
    (pack,) = pack_inputs([answer([p, q, r], [a, b, c]), answer([p, q, r], [d, e])], max_tokens=100).packs
    assert pack.input_ids.tolist() == [p, q, r, a, b, r, d]
    assert pack.labels.tolist() == [a, b, c, d, e]
    assert pack.rows.tolist() == [2, 3, 4, 5, 6]
    assert pack.position_ids[1].tolist() == [0, 10, 20, 30, 40, 20, 30]
    assert pack.position_ids[0].tolist() == list(range(7))  # one sequence, as transformers finds them
    assert pack.trees == (Tree(2, (3, 2)),)


@pytest.mark.parametrize("seed", range(8))
def test_every_description_of_a_tree_says_the_same(seed: int) -> None:
    trees = random_trees(seed)
    wanted = sees(trees)
    segment, stem = families(trees)
    places = torch.arange(len(segment))
    block = (places[:, None] >= places) & ((segment[:, None] == segment) | (stem[:, None] == segment))
    assert torch.equal(block, wanted)

    start = 0
    for tree in trees:
        span = slice(start, start + len(tree))
        assert torch.equal(seen_by_branches(tree), wanted[span, span][tree.stem :])
        start += len(tree)

    found, query, first = torch.zeros_like(wanted), 0, 0
    made = key_segments(trees)
    for queries, keys in zip(made.query_lengths, made.key_lengths, strict=True):
        for number in range(queries):  # aligned at the ends
            found[query, made.index[first : first + keys - (queries - 1 - number)]] = True
            query += 1
        first += keys
    assert torch.equal(found, wanted)
    family = (
        (segment[:, None] != segment)
        & (stem[:, None] == stem)
        & (segment != stem)
        & (segment != stem)[:, None]
    )
    assert cost_of(trees) == Cost(
        tokens=len(wanted), pairs=int(wanted.sum()), prompts=len(trees), hidden=int(family.sum())
    )
    assert branch_rows(trees).tolist() == [i for i in range(len(wanted)) if in_branch(trees, i)]


def in_branch(trees: list[Tree], place: int) -> bool:
    """Whether a place belongs to a branch, counted by hand."""
    for tree in trees:
        if place < len(tree):
            return place >= tree.stem
        place -= len(tree)
    raise AssertionError


def test_answers_come_back_to_their_places() -> None:
    prompts = {"p": [1, 2, 3], "q": [4, 5]}
    lengths = [("p", 2), ("q", 3), ("p", 0), ("q", 1), ("p", 4)]
    inputs = [answer(prompts[name], list(range(10, 10 + n)), name) for name, n in lengths]
    packing = pack_inputs(inputs, max_tokens=100)
    (pack,) = packing.packs
    assert pack.trees == (Tree(2, (2, 4)), Tree(1, (3, 1)))
    found = pack.by_place(pack.labels)
    assert {place: ids.tolist() for place, ids in found.items()} == {
        place: list(range(10, 10 + n)) for place, (_, n) in enumerate(lengths) if n
    }
    assert pack.by_place(torch.stack([pack.labels, pack.rows]))[3].shape == (2, 1)


def test_a_prompt_of_one_token_has_no_stem() -> None:
    (pack,) = pack_inputs([answer([1], [2, 3]), answer([1], [4])], max_tokens=9).packs
    assert pack.trees == (Tree(0, (2, 1)),)
    assert pack.input_ids.tolist() == [1, 2, 1]


def test_groups_are_split_and_put_together_within_the_budget() -> None:
    long = [answer(list(range(11)), [1] * 4, "long") for _ in range(5)]  # a stem of 10, branches of 4
    short = [answer([1, 2], [3], "short") for _ in range(2)]
    packing = pack_inputs([*long, *short], max_tokens=18)
    assert [pack.trees for pack in packing.packs] == [
        (Tree(10, (4, 4)),),
        (Tree(10, (4, 4)),),
        (Tree(10, (4,)), Tree(1, (1, 1))),
    ]
    assert [len(pack) for pack in packing.packs] == [18, 18, 17]
    assert (packing.cost.tokens, packing.cost.prompts) == (53, 4)
    assert (packing.whole.tokens, packing.whole.prompts) == (33, 2)
    assert (packing.separate.tokens, packing.separate.prompts) == (74, 7)
    assert packing.whole.pairs < packing.cost.pairs < packing.separate.pairs


def test_a_budget_too_small_for_one_answer_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match=r"prompt p has 3 tokens and an answer with 4 to score"):
        pack_inputs([answer([1, 2, 3], [4, 5, 6, 7])], max_tokens=5)
    (pack,) = pack_inputs([answer([1, 2, 3], [4, 5, 6, 7])], max_tokens=6).packs
    assert len(pack) == 6


def test_answers_are_cut_after_their_last_weighted_token() -> None:
    weights = [
        torch.tensor([0.0, 1, 0.5, 0, 0]),
        torch.tensor([0.0, 0]),
        torch.tensor([2.0]),
        torch.tensor([]),
    ]
    assert last_weighted(weights) == [3, 0, 1, 0]
    inputs = [answer([1, 2], list(range(10, 10 + len(row)))) for row in weights]
    (pack,) = pack_inputs(inputs, max_tokens=99, scored=last_weighted(weights)).packs
    assert pack.input_ids.tolist() == [1, 2, 10, 11, 2]
    assert pack.labels.tolist() == [10, 11, 12, 10]
    assert pack.places == (0, 2)


@pytest.mark.parametrize("change", ["token", "position", "pixel", "kind", "name"])
def test_prompts_that_differ_anywhere_are_not_shared(change: str) -> None:
    pixels = torch.arange(6.0)
    one, other = (answer([1, 2, 3], [4], "p", pixel_values=pixels.clone()) for _ in range(2))
    assert len(groups_of([one, other])) == 1
    changes: dict[str, dict[str, Any]] = {
        "token": {"input_ids": torch.tensor([1, 9, 3, 4])},
        "position": {"position_ids": one.position_ids + torch.tensor([[0], [0], [0], [1]])},
        "pixel": {"media": {"pixel_values": pixels + 1}},
        "kind": {"media": {"pixel_values_videos": pixels}},
        "name": {"prompt": "q"},
    }
    groups = groups_of([one, dataclasses.replace(other, **changes[change]), one])
    assert [[branch.place for branch in group.branches] for group in groups] == [[0, 2], [1]]


def test_media_follow_their_prompts() -> None:
    kinds = [
        answer([1], [2], "a", pixel_values=torch.ones(2, 3), image_grid_thw=torch.ones(1, 3)),
        answer([1], [2], "b"),
        answer([1], [2], "c", pixel_values=torch.zeros(1, 3), image_grid_thw=torch.zeros(1, 3)),
    ]
    (pack,) = pack_inputs([*kinds, *kinds], max_tokens=99).packs
    assert pack.media["pixel_values"].tolist() == [[1.0] * 3, [1.0] * 3, [0.0] * 3]
    assert pack.media["image_grid_thw"].shape == (2, 3)


@pytest.mark.parametrize(
    ("inputs", "scored", "message"),
    [
        ([answer([], [1, 2])], None, "prompt p has no token"),
        ([answer([1], [2])], [2], "2 tokens of an answer to prompt p are to be scored, and it has 1"),
        ([answer([1], [2])], [-1], "-1 tokens of an answer"),
    ],
)
def test_what_cannot_be_scored_is_named(
    inputs: list[ModelInput], scored: list[int] | None, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        groups_of(inputs, scored)


def test_no_answers_give_no_packs() -> None:
    assert pack_inputs([], max_tokens=1).packs == ()
    assert pack_inputs([answer([1], [])], max_tokens=1).packs == ()
    assert arrange([], 1) == []


def test_the_model_of_cost() -> None:
    """Eight answers of 512 to a prompt of 8,320 tokens, in a text model like that of 7 B."""
    tree = Tree(8319, (512,) * 8)
    shared, separate = cost_of([tree]), cost_of(apart([tree]))
    assert (shared.tokens, separate.tokens) == (12_415, 8 * 8_831)
    assert separate.pairs == 8 * 8_831 * 8_832 // 2
    assert shared.pairs == separate.pairs - 7 * 8_319 * 8_320 // 2
    weights, layers, width = 6_525_000_000, 28, 3584
    flops = [2 * cost.tokens * weights + 4 * layers * width * cost.pairs for cost in (shared, separate)]
    assert [cost.flops(weights, layers, width) for cost in (shared, separate)] == flops
    assert flops[1] / flops[0] == pytest.approx(5.51, abs=0.005)
    assert (shared.hidden, separate.hidden) == (56 * 512**2, 0)
    more = 4 * layers * width * shared.hidden
    assert shared.flops(weights, layers, width, hidden=True) == flops[0] + more
