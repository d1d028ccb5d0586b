"""How often a prompt is computed: where micro-batches cut the answers to it."""

from __future__ import annotations

from pathlib import Path

import pytest

from keytoken.plan.batches import groups_of_rank
from keytoken.plan.flops import vision_flops
from keytoken.plan.run import Plan, plan_of
from keytoken.prefix.layout import Tree, cost_of
from keytoken.verl_adapter.shims.shared_micro_batches import micro_batches

SEVEN = "experiment=video_ktr_7b"
PASSES = "keytoken.attribution.micro_batch_size"
TOKENS = "actor_rollout_ref.actor.ppo_max_token_len_per_gpu"
STEM, ANSWER, GROUP = 1259, 361, 8


def test_whole_groups() -> None:
    plan = plan_of([SEVEN])
    assert plan.batches.update.copies == {8: 8} and plan.batches.update.answers == 64
    assert plan.batches.view.copies == {8: 32} and plan.batches.view.rounds == 32
    assert plan.batches.per_answer.copies == {1: 256}
    assert not plan.warnings


def test_sdpa_computes_hidden_pairs_in_an_update() -> None:
    """28 heads of 128 numbers in 28 layers: forward, again to recompute, and 2.5 times that backward."""
    attention = "actor_rollout_ref.model.override_config.attn_implementation"
    with_sdpa, flash = (
        plan_of([SEVEN, f"{attention}={name}"]).flops for name in ("sdpa", "flash_attention_2")
    )
    hidden = 32 * GROUP * (GROUP - 1) * ANSWER**2
    pair = 4 * 28 * 28 * 128
    assert with_sdpa.update.attention - flash.update.attention == pytest.approx(hidden * pair * 4.5)
    assert (with_sdpa.old, with_sdpa.views) == (flash.old, flash.views)


@pytest.mark.parametrize(
    ("size", "copies", "rounds"),
    [(4, {4: 64}, 64), (3, {3: 64, 2: 32}, 86), (12, {8: 21, 4: 22}, 22), (1, {1: 256}, 256)],
)
def test_passes_take_answers_in_order(size: int, copies: dict[int, int], rounds: int) -> None:
    """Three answers at a time are 3 + 3 + 2 of the first group, 1 + 3 + 3 + 1 of the second, and so on."""
    view = plan_of([SEVEN, f"{PASSES}={size}"]).batches.view
    assert view.rounds == rounds and view.answers == 256
    if size == 3:
        rows = [row // GROUP for row in range(256)]
        view_copies = sum(len(set(rows[at : at + 3])) for at in range(0, 256, 3))
        assert view.prompts == view_copies
    else:
        assert view.copies == copies


@pytest.mark.parametrize("limit", [17152, 3500, 4147, 4146, 9000])
def test_tokens_cut_groups_as_runs_do(limit: int) -> None:
    """The plan's copies are those of the micro-batches that a rank with such answers makes."""
    batches = plan_of([SEVEN, "data.max_prompt_length=2000", f"{TOKENS}={limit}"]).batches
    prompts = [str(row // GROUP) for row in range(64)]
    made = micro_batches(prompts, [STEM + 1 + ANSWER] * 64, [ANSWER] * 64, limit)
    seen = [{prompts[row] for row in rows} for rows in made]
    assert batches.update.rounds == len(made)
    assert batches.update.prompts == sum(map(len, seen))
    assert batches.update == batches.score


def test_a_cut_group_computes_its_prompt_again(tight: Plan) -> None:
    """3,500 tokens have room for a prompt and six answers."""
    assert tight.batches.update.copies == {6: 8, 2: 8}
    cost = [cost_of([Tree(STEM, (ANSWER,) * count)]) for count in (6, 2, 8)]
    whole = plan_of([SEVEN])
    ratio = (cost[0].tokens + cost[1].tokens) / cost[2].tokens
    clips = 2 * vision(whole) * 32
    old, uncut = tight.flops.old, whole.flops.old
    assert old.linear - clips == pytest.approx((uncut.linear - clips / 2) * ratio)
    assert old.head == pytest.approx(uncut.head)
    assert tight.flops.views == whole.flops.views  # these have micro-batches of their own


def test_a_cut_is_said_with_its_key(tight: Plan) -> None:
    assert len(tight.warnings) == 1
    assert f"{TOKENS} cuts the 8 answers" in tight.warnings[0]
    assert "computed 2.0 times; set it to at least 7403" in tight.warnings[0]
    passes = plan_of([SEVEN, f"{PASSES}=4"])
    assert [f"{PASSES} cuts" in text for text in passes.warnings] == [True]
    assert "a multiple of 8" in passes.warnings[0]
    assert passes.flops.old == plan_of([SEVEN]).flops.old
    assert passes.flops.views["real"].total > 1.3 * passes.flops.old.total
    assert not plan_of([SEVEN, f"{PASSES}=4", "keytoken.prefix=separate"]).warnings


def test_a_limit_of_its_own_for_log_probs() -> None:
    key = "actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu"
    plan = plan_of([SEVEN, "data.max_prompt_length=2000", f"{key}=3500"])
    assert plan.batches.score.copies == {6: 8, 2: 8} and plan.batches.update.copies == {8: 8}
    assert key in plan.warnings[0]


def test_ranks_with_a_part_of_a_group() -> None:
    """64 actors have four answers each; that no micro-batch can mend, so nothing is warned of."""
    plan = plan_of([SEVEN, "trainer.nnodes=16"])
    assert groups_of_rank(plan.work, 64) == [4] and groups_of_rank(plan.work, 10) == [8, 8, 8, 2]
    assert plan.batches.update.copies == {4: 1}
    assert not plan.warnings


def test_a_rank_never_has_more_than_its_answers() -> None:
    """One group on each of 32 ranks: with the longest answers it does not fill a micro-batch."""
    largest = plan_of([SEVEN, "pools=eight_nodes"]).batches.update.largest
    assert (largest.tokens, largest.answers, largest.prompts) == (STEM + 8 * 768, 8, 1)


def test_fixed_sizes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The demo: 32 answers in a micro-batch."""
    monkeypatch.setenv("KEYTOKEN_DEMO_DIR", str(tmp_path))
    plan = plan_of(["experiment=demo_cpu", "actor_rollout_ref.model.path=Qwen/Qwen2.5-VL-3B-Instruct"])
    rows = plan.work.answers // plan.pools.actor
    assert plan.batches.update.rounds == plan.batches.score.rounds == -(-rows // 32)
    assert plan.batches.update.copies == {8: rows // 8}


@pytest.fixture(scope="module")
def tight() -> Plan:
    return plan_of([SEVEN, "data.max_prompt_length=2000", f"{TOKENS}=3500"])


def vision(plan: Plan) -> float:
    """Of one clip."""
    return vision_flops(plan.model.vision, plan.work.grid).linear
