"""What recipe/docs/scale.md shows of plans: ``python tests/plan/page.py`` prints it, and a test compares.

A table's rows are runs, given by their words.
"""

from __future__ import annotations

from keytoken.plan.report import COLUMNS, report, row
from keytoken.plan.run import plan_of

EXPERIMENTS = ("video_ktr_3b", "video_ktr_7b", "video_ktr_qwen3_vl_8b")
POOLS = ("one_gpu", "three_pools", "two_nodes", "eight_nodes")
TABLE = [[f"experiment={experiment}", f"pools={pools}"] for experiment in EXPERIMENTS for pools in POOLS]
OTHERS = [
    [
        "experiment=video_ktr_7b",
        "actor_rollout_ref.rollout.n_gpus_per_node=2",
        "keytoken.attribution.num_workers=2",
    ],
    ["experiment=video_ktr_7b", "pools=eight_nodes", "data.train_batch_size=256"],
]
SEPARATE = [[f"experiment={experiment}", "keytoken.prefix=separate"] for experiment in EXPERIMENTS]
LONGEST = ["experiment=video_ktr_7b", "plan.text_tokens=15424", "plan.answer_share=1"]
CUT = [*LONGEST, "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=20480"]
SMALL = ["experiment=video_ktr_7b", "pools=one_gpu", "keytoken.attribution.micro_batch_size=8"]
LARGE = [
    *(
        "experiment=video_ktr_7b",
        "pools=eight_nodes",
        "trainer.nnodes=64",
        "actor_rollout_ref.rollout.nnodes=32",
    ),
    *("keytoken.attribution.num_workers=256", "data.train_batch_size=4096"),
]
EXAMPLE = ["experiment=video_ktr_7b"]


def tables() -> list[str]:
    """Every row of the page."""
    return [row(plan_of(words)) for words in (*TABLE, *SEPARATE, *OTHERS, LARGE)]


def figures() -> list[str]:
    """What the section on 1,000 GPUs says of them."""
    plan = plan_of(LARGE)
    traffic, limits = plan.traffic, plan.limits
    separate = plan_of([*LARGE, "keytoken.prefix=separate"]).traffic
    sync = plan.step.of("weight sync")
    assert sync is not None
    workers, needed = limits.decode_workers
    return [
        f"{traffic.media_got / 1e9:,.0f} GB of pixels a step",
        f"{limits.media_gb_s:.0f} GB/s",
        f"{separate.media_got / 1e9:,.0f} GB with keytoken.prefix=separate",
        f"{workers} processes would need {limits.decode_s:.0f} s",
        f"{needed} of them keep up",
        f"{limits.requests:,} answers a step",
        f"{plan.flops.prefill.total / plan.flops.old.total * 100:.0f} % of a scoring pass",
        f"{plan.step.parts[0].seconds:.1f} s of prefill",
        f"{traffic.weights / 1e9:,.0f} GB to {plan.pools.rollout + plan.pools.attribution} receivers",
        f"{sync.seconds:.1f} s",
        f"{traffic.batch / 1e9:.1f} GB of tokens",
        f"every {limits.failure_hours:.0f} hours",
        f"every {limits.checkpoint_steps} steps",
        f"{limits.lost_share:.1%} of the time",
        f"{traffic.checkpoint / 1e9:.0f} GB",
        f"{traffic.gathers / 1e12:.0f} TB",
    ]


def micro_batches() -> list[str]:
    """What it says of micro-batches: of the longest groups, whole and cut, and of small ones on one GPU."""
    whole, cut, small = plan_of(LONGEST), plan_of(CUT), plan_of(SMALL)
    assert whole.work.prompt_tokens == 16384 and not any("cuts" in text for text in whole.warnings)
    assert cut.batches.update.prompts == 2 * whole.batches.update.prompts
    return [
        f"{whole.flops.update.total / 1e12:,.0f} TFLOP in an update",
        f"{cut.flops.update.total / 1e12:,.0f} with 20,480 tokens",
        f"{cut.step.seconds:.0f} to {whole.step.seconds:.0f} s",
        f"with 8 a step of the 7B would take {small.step.seconds:.0f} s",
    ]


if __name__ == "__main__":
    said = (*tables(), *figures(), *micro_batches())
    print(report(plan_of(EXAMPLE), with_assumptions=False), COLUMNS, *said, sep="\n")
