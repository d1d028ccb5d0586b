"""Packs through the unchanged models of transformers, against a stock pass for every answer.

All in float32 on the demo's models. Kernels for GPUs do not run here: flash-attn's is replaced by what its
documentation says, everything around it is real; flex attention runs as torch's own reference, uncompiled.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from keytoken.errors import ConfigurationError
from keytoken.prefix.attention import Plan, _stem_then_branches, share_prefix
from keytoken.prefix.layout import Tree
from keytoken.prefix.packs import Pack, last_weighted, pack_inputs
from keytoken.workers.answer_head import AnswerHead
from keytoken_kernels.head import head_log_probs

TOLERANCE = 1e-5  # nats, and relative error of gradients
WRONG = 0.1  # nats by which what is not a tree must be off
ENOUGH = 100_000  # tokens: no group is split
# How many trees the ten answers are under each view; "blackened" draws anew for every answer.
TREES = {"real": 4, "shuffled": 2, "masked": 3, "reversed": 2, "blackened": 7}


def largest_gap(found: dict[int, torch.Tensor], truth: list[torch.Tensor]) -> float:
    """Nats; every answer with a token must have been found."""
    assert sorted(found) == [place for place, values in enumerate(truth) if len(values)]
    return max(float((values - truth[place][: len(values)]).abs().max()) for place, values in found.items())


@torch.no_grad()
def score(tools: Any, model: Any, packs: tuple[Pack, ...]) -> dict[int, torch.Tensor]:
    found: dict[int, torch.Tensor] = {}
    for pack in packs:
        found.update(pack.by_place(tools.packed(model, pack)))
    return found


@pytest.mark.parametrize("view", TREES)
def test_every_view_equals_separate_passes(
    maker: Any, truth: Any, sharing: Any, tools: Any, view: str
) -> None:
    packing = pack_inputs(maker.under(view), ENOUGH)
    assert len(packing.packs) == 1
    assert len(packing.packs[0].trees) == TREES[view]
    assert largest_gap(score(tools, sharing(), packing.packs), truth(view)) <= TOLERANCE


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention"])
def test_kernels_of_other_names_get_the_same_trees(
    maker: Any,
    truth: Any,
    sharing: Any,
    tools: Any,
    flash_on_cpu: None,
    implementation: str,
) -> None:
    packs = pack_inputs(maker.inputs, ENOUGH).packs
    with torch.compiler.set_stance("force_eager"):  # flex attention as torch's reference
        found = score(tools, sharing(implementation), packs)
    assert largest_gap(found, truth("real")) <= TOLERANCE


def test_parts_of_a_group_equal_the_whole(maker: Any, truth: Any, sharing: Any, tools: Any) -> None:
    chosen = [place for place, one in enumerate(maker.inputs) if one.prompt == "walk"]
    inputs = [maker.inputs[place] for place in chosen]
    (tree,) = pack_inputs(inputs, ENOUGH).packs[0].trees
    packing = pack_inputs(inputs, max_tokens=tree.stem + max(tree.branches))
    assert [pack.trees[0].branches for pack in packing.packs] == [(7, 1), (12,), (3,)]
    assert packing.cost.prompts == 3 * packing.whole.prompts
    wanted = [truth("real")[place] for place in chosen]
    assert largest_gap(score(tools, sharing(), packing.packs), wanted) <= TOLERANCE


def test_a_model_that_can_share_computes_everything_else_as_before(
    maker: Any, sharing: Any, tools: Any
) -> None:
    model, stock = sharing(), maker.model().eval()
    share_prefix(model)  # once more
    for one in maker.inputs:
        assert torch.equal(tools.separate(model, one), tools.separate(stock, one))


def test_the_head_for_answers_scores_packs(maker: Any, truth: Any, sharing: Any) -> None:
    """The head that the attribution passes and the update use, at the rows of a pack."""
    (pack,) = pack_inputs(maker.inputs, ENOUGH).packs
    model = sharing()
    score = partial(head_log_probs, labels=pack.labels)
    with torch.no_grad(), AnswerHead(model, pack.rows, score) as head:
        inputs = {"input_ids": pack.input_ids[None], "position_ids": pack.position_ids[:, None], **pack.media}
        log_prob, _ = head.read(model(**inputs, prefix_plan=Plan(pack.trees), use_cache=False))
    assert largest_gap(pack.by_place(log_prob.flatten()[pack.rows]), truth("real")) <= TOLERANCE


# --- gradients ------------------------------------------------------------------------------------


def policy_loss(log_prob: torch.Tensor, old: torch.Tensor, weight: torch.Tensor, sign: float) -> torch.Tensor:
    """Sum of the clipped objective over weighted tokens."""
    ratio = (log_prob - old).exp()
    return -(weight * torch.minimum(sign * ratio, sign * ratio.clamp(0.8, 1.2))).sum()


@pytest.fixture(scope="module")
def update(maker: Any, truth: Any) -> SimpleNamespace:
    """Old log-probs, weights of which three quarters are 0, and the gradient of separate stock passes."""
    generator = torch.Generator().manual_seed(1)
    log_probs = truth("real")
    old = [values + 0.3 * torch.randn(len(values), generator=generator) for values in log_probs]
    weights = [
        torch.rand(len(values), generator=generator) * (torch.rand(len(values), generator=generator) < 0.25)
        for values in log_probs
    ]
    signs = [(-1.0) ** place for place in range(len(old))]
    return SimpleNamespace(old=old, weights=weights, signs=signs)


def gradients(model: Any, losses: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    for loss in losses():
        loss.backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def in_training(model: Any, checkpointing: bool) -> Any:
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


@pytest.mark.parametrize("implementation", ["sdpa", "flash_attention_2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_those_of_separate_passes(
    maker: Any,
    update: Any,
    sharing: Any,
    tools: Any,
    flash_on_cpu: None,
    checkpointing: bool,
    implementation: str,
) -> None:
    """Of all parameters, the vision tower's too; the pack ends each answer after its last weighted token."""

    def loss_of(place: int, log_prob: torch.Tensor) -> torch.Tensor:
        length = len(log_prob)
        old, weight = update.old[place][:length], update.weights[place][:length]
        return policy_loss(log_prob, old, weight, update.signs[place])

    stock = in_training(maker.model(), checkpointing=False)
    wanted = gradients(
        stock, lambda: (loss_of(place, tools.separate(stock, one)) for place, one in enumerate(maker.inputs))
    )
    scored = last_weighted(update.weights)
    (pack,) = pack_inputs(maker.inputs, ENOUGH, scored).packs
    assert sum(scored) < sum(len(weights) for weights in update.weights)
    model = in_training(sharing(implementation), checkpointing)
    found = gradients(
        model,
        lambda: [
            sum(loss_of(place, values) for place, values in pack.by_place(tools.packed(model, pack)).items())
        ],
    )
    assert found.keys() == wanted.keys()
    assert any("visual" in name for name in found)
    whole = torch.stack([value.norm() for value in wanted.values()]).norm()
    for name, value in wanted.items():
        # A bias of keys has no gradient but rounding: what it adds is the same for all keys.
        scale = max(float(value.norm()), 1e-3 * float(whole))
        assert float((found[name] - value).norm()) <= TOLERANCE * scale, name


# --- what must fail -------------------------------------------------------------------------------


def test_a_plain_causal_mask_is_wrong(maker: Any, truth: Any, sharing: Any, tools: Any) -> None:
    (pack,) = pack_inputs(maker.inputs, ENOUGH).packs
    one_sequence = Plan([Tree(0, (len(pack),))])
    found = pack.by_place(tools.packed(sharing(), pack, one_sequence))
    assert largest_gap(found, truth("real")) > WRONG


def test_positions_that_run_on_are_wrong(maker: Any, truth: Any, sharing: Any, tools: Any) -> None:
    """Every answer at the positions that follow those of the answer before."""
    (pack,) = pack_inputs(maker.inputs, ENOUGH).packs
    positions, start = pack.position_ids.clone(), 0
    for tree in pack.trees:
        end = start + len(tree)
        first = positions[1:, start + tree.stem].clone()
        positions[1:, start + tree.stem : end] = first[:, None] + torch.arange(end - start - tree.stem)
        start = end
    found = pack.by_place(tools.packed(sharing(), pack, position_ids=positions[:, None]))
    assert largest_gap(found, truth("real")) > WRONG


@pytest.mark.parametrize("wrong", ["boundary", "stem"])
def test_wrong_segments_are_wrong(maker: Any, truth: Any, sharing: Any, tools: Any, wrong: str) -> None:
    """A token that belongs to the neighbouring answer; answers that do not see the end of their prompt."""
    (pack,) = pack_inputs(maker.inputs, ENOUGH).packs
    first, *others = pack.trees
    longest, *rest = first.branches
    tree = (
        Tree(first.stem, (longest - 1, rest[0] + 1, *rest[1:]))
        if wrong == "boundary"
        else Tree(first.stem - 3, (3, *first.branches))
    )
    found = pack.by_place(tools.packed(sharing(), pack, Plan([tree, *others])))
    assert largest_gap(found, truth("real")) > WRONG


def test_pixels_of_another_order_are_wrong(maker: Any, truth: Any, sharing: Any, tools: Any) -> None:
    """The views differ enough for a mix-up to show."""
    found = score(tools, sharing(), pack_inputs(maker.having("shuffled"), ENOUGH).packs)
    assert largest_gap(found, truth("shuffled")) > 1e-3


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", ["another pack", "two rows"])
def test_a_plan_of_something_else_is_refused(maker: Any, sharing: Any, tools: Any, changes: str) -> None:
    (pack,) = pack_inputs(maker.inputs, ENOUGH).packs
    other = dataclasses.replace(pack, media={})
    plan = Plan([*pack.trees, Tree(1, (1,))])
    if changes == "two rows":
        plan = Plan(pack.trees)
        words = torch.ones(2, len(pack), dtype=torch.int64)
        with pytest.raises(ConfigurationError, match="a plan for one sequence"):
            sharing()(input_ids=words, position_ids=None, prefix_plan=plan, use_cache=False)
        return
    with pytest.raises(ConfigurationError, match="pass the plan of the very pack"):
        tools.packed(sharing(), other, plan, input_ids=torch.ones(1, len(pack), dtype=torch.int64))


def test_an_attention_that_cannot_follow_is_named(sharing: Callable[..., Any]) -> None:
    with pytest.raises(ConfigurationError, match="attn_implementation=eager cannot share a prompt"):
        sharing("eager")


def test_a_plan_is_made_once(maker: Any) -> None:
    plan = Plan([Tree(3, (2, 1))])
    for one, other in itertools.pairwise([plan.segments, plan.segments]):
        assert one is other
    for together in (False, True):
        assert plan.branch_masks(torch.float32, together) is plan.branch_masks(torch.float32, together)
    assert plan.block_mask is plan.block_mask


@pytest.mark.parametrize("gradient", [False, True])
def test_sdpa_computes_no_pair_in_vain_without_a_gradient(gradient: bool) -> None:
    """With one it takes all branches of a tree together: keys and values are then kept once for all."""
    trees = [Tree(5, (2, 3, 1)), Tree(0, (4,)), Tree(2, (1,))]
    calls = list[tuple[int, int]]()

    def base(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **options: Any
    ) -> tuple[torch.Tensor]:
        assert key.shape == value.shape and options["is_causal"] == (mask is None)
        assert mask is None or mask.shape[2:] == (query.shape[2], key.shape[2])
        calls.append((query.shape[2], key.shape[2]))
        return (query.transpose(1, 2),)

    states = torch.zeros(1, 1, sum(map(len, trees)), 1)
    with torch.set_grad_enabled(gradient):
        _stem_then_branches(base, states, states, states, Plan(trees))
    branches = [(6, 11)] if gradient else [(2, 7), (3, 8), (1, 6)]
    assert calls == [(5, 5), *branches, (4, 4), (2, 2), (1, 3)]
